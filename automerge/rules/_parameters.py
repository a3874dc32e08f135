"""Parameters as values: a family of vertices for every axis, in blocks where an axis has an order for each class of another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from automerge.rules._axes import Axes
from automerge.rules._engine import Engine
from automerge.rules._positions import gathered
from automerge.rules._value import Factor, Value, drop_constant, plain, split_letter

Splits = Mapping[tuple[str, int, int], np.ndarray]


def parameter(axes: Axes, name: str, shape: tuple[int, ...], requests: Splits) -> Value:
    """A parameter: a family for every axis, axes that were asked to be split once for every class of another axis."""
    splits = _splits_of(name, requests)
    value, blocks = _in_blocks(plain(shape), splits)
    lines: dict[int, np.ndarray] = {}
    for k, letters in enumerate(value.axes):
        if letters and k not in splits:
            lines[k] = axes.fresh((shape[k],), param=name, axis=k)
            value.factors.append(Factor(letters, lines[k].reshape([value.size[c] for c in letters])))
    for k, parts in splits.items():
        value.factors.append(_split_factor(axes, value, name, k, parts, lines, blocks))
    return value


def share(
    engine: Engine, name: str, states: dict[str, Value], overlaps: Sequence[tuple[str, str, torch.Tensor]]
) -> None:
    """What is in one memory under several shapes moves as one.

    Args:
        engine: the engine.
        name: of the parameter that was made last.
        states: all that were made.
        overlaps: see `TraceInfo`.
    """
    for mine, other, places in overlaps:
        if mine != name or other not in states:
            continue
        back = torch.full((int(np.prod(states[other].shape)),), -1)
        back[places[places >= 0]] = torch.arange(places.numel()).reshape(places.shape)[places >= 0]
        if bool((places >= 0).all()):
            engine.elementwise([states[mine], gathered(engine, states[other], places.numpy())])
        elif bool((back >= 0).all()):
            engine.elementwise(
                [states[other], gathered(engine, states[mine], back.reshape(states[other].shape).numpy())]
            )
        else:
            for state in (mine, other):
                states[state] = engine.pin_all(states[state], "shares memory with another parameter")


def _splits_of(name: str, requests: Splits) -> dict[int, list[tuple[int, np.ndarray]]]:
    splits: dict[int, list[tuple[int, np.ndarray]]] = {}
    outer: set[int] = set()
    for (param, axis, by), classes in requests.items():
        # an axis is either split or splits others: requests that would nest are dropped
        if param == name and by not in splits and axis not in outer:
            splits.setdefault(axis, []).append((by, classes))
            outer.add(by)
    return splits


def _split_factor(
    axes: Axes,
    value: Value,
    name: str,
    axis: int,
    by: Sequence[tuple[int, np.ndarray]],
    lines: Mapping[int, np.ndarray],
    blocks: Mapping[int, int],
) -> Factor:
    """An axis whose order depends on the class of the position along other axes."""
    shape = value.shape
    counts = [int(c.max()) + 1 for _, c in by]
    labels = axes.fresh((*counts, shape[axis]), param=name, axis=axis, by=tuple(by))
    for i, (other, classes) in enumerate(by):
        containers = axes.fresh((counts[i],))
        axes.edge(lines[other], containers[classes])
        view = [1] * (len(by) + 1)
        view[i] = counts[i]
        axes.edge(labels, np.broadcast_to(containers.reshape(view), labels.shape))
    own = value.axes[axis][0]
    if all(other in blocks for other, _ in by):
        return Factor((*(blocks[other] for other, _ in by), own), labels)
    wide = labels[np.ix_(*(c for _, c in by), np.arange(shape[axis]))]
    letters = (*(c for other, _ in by for c in value.axes[other]), own)
    reduced = drop_constant(Factor(letters, wide.reshape([value.size[c] for c in letters])))
    assert reduced is not None
    return reduced


def _in_blocks(value: Value, splits: Mapping[int, Sequence[tuple[int, np.ndarray]]]) -> tuple[Value, dict[int, int]]:
    """Write axes whose classes are equal runs as (class, position inside); returns the class letters, by axis."""
    wanted: dict[int, np.ndarray] = {}
    for parts in splits.values():
        for other, classes in parts:
            wanted[other] = classes if other not in wanted or np.array_equal(wanted[other], classes) else classes[:0]
    blocks: dict[int, int] = {}
    for other, classes in wanted.items():
        count = int(classes.max()) + 1 if classes.size else 0
        if (
            not count
            or classes.size % count
            or not np.array_equal(classes, np.repeat(np.arange(count), classes.size // count))
        ):
            continue
        if 1 < count < classes.size:
            value = split_letter(value, value.axes[other][0], [count, classes.size // count])
        blocks[other] = value.axes[other][0]
    return value, blocks
