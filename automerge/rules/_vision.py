"""Operators of torchvision: boxes of features, and convolutions at places that are computed. By name; it is not imported."""

from __future__ import annotations

from typing import Any

from automerge.rules._contraction import convolved, repinned
from automerge.rules._engine import Engine
from automerge.rules._movement import without_axis
from automerge.rules._registry import Context, register_rule
from automerge.rules._value import Value, plain


@register_rule("torchvision::nms")
def suppression(context: Context, boxes: Value, scores: Value, *_: Any) -> Value:
    """Positions of the boxes that remain."""
    for x in (boxes, scores):
        context.engine.pin_all(x, "positions are read from it")
    return plain(context.shape, pinned=True)


@register_rule("torchvision::roi_align")
@register_rule("torchvision::roi_pool")
def boxes_of_features(context: Context, x: Value, boxes: Value, *_: Any) -> Any:
    """Every channel is sampled at the places of the boxes."""
    value = context.node.meta["val"]
    if isinstance(value, tuple | list):  # and where the largest entry was
        return (out := _sampled(context.engine, x, boxes, tuple(value[0].shape))), out
    return _sampled(context.engine, x, boxes, context.shape)


@register_rule("torchvision::ps_roi_align")
@register_rule("torchvision::ps_roi_pool")
def boxes_of_parts(context: Context, x: Value, boxes: Value, scale: float, rows: int, columns: int, *_: Any) -> Any:
    """As above, with channels of its own for every place in the box."""
    if 1 in context.used:
        context.engine.pin_all(x, "the channel of every place is read")
    n, c, *space = x.shape
    parts = context.engine.reshape(x, [n, c // (rows * columns), rows * columns, *space])
    parts = repinned(context.engine, context.engine.pin_letters(parts, set(parts.axes[2]), "place in a box"), 2, 1)
    out = _sampled(context.engine, without_axis(parts, 2), boxes, tuple(context.out(0).shape))
    return out, plain(tuple(context.out(1).shape), pinned=True)


def _sampled(engine: Engine, x: Value, boxes: Value, shape: tuple[int, ...]) -> Value:
    engine.pin_all(boxes, "coordinates")
    gone = {c for k in (0, 2, 3) for c in x.axes[k]}
    x = engine.reduce(engine.pin_letters(x, gone, "sampled at given coordinates"), gone)
    rest = plain((shape[0], *shape[2:]), pinned=True)
    axes = (rest.axes[0], x.axes[1], *rest.axes[1:])
    return Value(axes, x.size | rest.size, x.factors, x.pinned | rest.pinned)


@register_rule("torchvision::deform_conv2d")
def deformed(context: Context, x: Value, w: Value, offset: Value, mask: Value, bias: Value, *options: Any) -> Value:
    """A convolution whose places are computed, for every group of channels."""
    engine = context.engine
    *numbers, groups, kinds, masked = options
    n, c, *space = x.shape
    parts = engine.reshape(x, [n, kinds, c // kinds, *space])
    for places in (offset, mask) if masked else (offset,):
        there = engine.reshape(places, [places.shape[0], kinds, places.shape[1] // kinds, *places.shape[2:]])
        gone = {letter for axis in there.axes[2:] for letter in axis}
        there = engine.reduce(engine.pin_letters(there, gone, "coordinates"), gone)
        parts = engine.elementwise([parts, there.with_axes((*there.axes[:2], (), (), ()))])
    x = engine.reshape(parts, x.shape)
    for k in (2, 3):
        x = engine.pin_letters(x, set(x.axes[k]), "spatial axis of a convolution")
    stride, padding, dilation = (numbers[k : k + 2] for k in (0, 2, 4))
    size = context.shape
    for k in (2, 3):
        w = engine.pin_letters(w, set(w.axes[k]), "position in a convolution kernel")
    out = convolved(engine, x, w, (stride, padding, dilation, False, (0, 0), groups), size)
    return engine.elementwise([out, bias.with_axes((*bias.axes, (), ()))])
