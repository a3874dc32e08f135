"""Symmetric functions of an axis (sums, maxima, norms), softmax, normalisation layers, pooling."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from automerge.rules._axes import Unruled
from automerge.rules._contraction import batched, repinned
from automerge.rules._engine import Engine
from automerge.rules._movement import without_axis
from automerge.rules._registry import Context, rule
from automerge.rules._value import Factor, Value, new_letter


def axes_of(x: Value, dim: Any) -> list[int]:
    """The axes that a ``dim`` argument names; None and an empty list name all."""
    if dim is None or (isinstance(dim, list | tuple) and not dim):
        return list(range(len(x.axes)))
    return [d % max(len(x.axes), 1) for d in ([dim] if isinstance(dim, int) else dim)] if x.axes else []


def reduced(engine: Engine, x: Value, axes: Sequence[int], keepdim: bool) -> Value:
    """A symmetric function over some axes."""
    value = engine.reduce(x, {c for k in axes for c in x.axes[k]})
    if not keepdim:
        for k in sorted(axes, reverse=True):
            value = without_axis(value, k)
    return value


def fits(engine: Engine, x: Value, axes: Sequence[int], shape: tuple[int, ...]) -> Value:
    """Reduce, keeping the axes or not, as the output's shape says."""
    value = reduced(engine, x, axes, keepdim=True)
    return value if value.shape == shape and len(shape) == len(x.axes) else engine.reshape(value, shape)


@rule("sum", "mean", "nansum", "amax", "amin", "logsumexp", "prod", "any", "all", "var", "std", "norm", "count_nonzero",
      "linalg_vector_norm", "nanmean", "special_logsumexp", "_is_all_true", "_is_any_true")  # fmt: skip
def reduction(context: Context, x: Value, *args: Any, **kwargs: Any) -> Value:
    name = context.node.target._schema.name.split("::")[1]
    arguments = [a.name for a in context.node.target._schema.arguments]
    given = dict(zip(arguments, (x, *args), strict=False)) | kwargs
    dim = given.get("dim")
    if name in ("var", "std") and isinstance(dim, bool):
        dim = None
    return fits(context.engine, x, axes_of(x, dim), context.shape)


@rule("var_mean", "std_mean", "aminmax")
def pair_reduction(context: Context, x: Value, *args: Any, **kwargs: Any) -> tuple[Value, ...]:
    arguments = [a.name for a in context.node.target._schema.arguments]
    dim = (dict(zip(arguments, (x, *args), strict=False)) | kwargs).get("dim")
    dim = None if isinstance(dim, bool) else dim
    return tuple(fits(context.engine, x, axes_of(x, dim), tuple(context.out(i).shape)) for i in range(2))


@rule("_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax", "special_softmax")
def softmax(context: Context, x: Value, dim: int, *_: Any, **__: Any) -> Value:
    return normalised(context.engine, x, axes_of(x, dim))


def normalised(engine: Engine, x: Value, axes: Sequence[int]) -> Value:
    """A function of each entry and of a symmetric function over its axes (softmax, normalisation)."""
    return engine.elementwise([x, reduced(engine, x, axes, keepdim=True)])


@rule("_scaled_dot_product_flash_attention_for_cpu")
def attention(
    context: Context, q: Value, k: Value, v: Value, _: float = 0.0, is_causal: bool = False, **kwargs: Any
) -> tuple[Value, Value]:
    """Softmax over the keys of query times key, plus a mask, times value."""
    engine = context.engine
    k, v = (_for_queries(one, q.shape[1]) for one in (k, v))
    scores = batched(engine, q, k.with_axes((*k.axes[:-2], k.axes[-1], k.axes[-2])))
    if is_causal:
        scores = engine.pin_letters(scores, {*scores.axes[-1], *scores.axes[-2]}, "a causal mask")
    if isinstance(kwargs.get("attn_mask"), Value):
        scores = engine.elementwise([scores, kwargs["attn_mask"]])
    last = len(scores.axes) - 1
    return batched(engine, normalised(engine, scores, [last]), v), reduced(engine, scores, [last], keepdim=False)


def _for_queries(x: Value, heads: int) -> Value:
    """Keys or values of which each head serves a run of the queries' heads (grouped queries)."""
    if x.shape[1] in (1, heads):
        return x
    if heads % x.shape[1]:
        raise Unruled("attention whose heads do not fit")
    run = new_letter()
    axes = (x.axes[0], (*x.axes[1], run), *x.axes[2:])
    return Value(axes, x.size | {run: heads // x.shape[1]}, x.factors, x.pinned, chosen=x.chosen)


def on_axis(value: Value | None, axis: int, ndim: int) -> list[Value]:
    """A vector laid along one axis of a tensor with ``ndim`` axes."""
    if value is None:
        return []
    axes: list[tuple[int, ...]] = [()] * ndim
    axes[axis] = value.axes[0]
    return [value.with_axes(tuple(axes))]


@rule("fake_quantize_per_tensor_affine_cachemask", "fake_quantize_per_channel_affine_cachemask",
      "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams")  # fmt: skip
def fake_quantised(context: Context, x: Value, *args: Any) -> tuple[Value, Value]:
    """Rounded to multiples of a scale, which may be one for each position of an axis."""
    given = [v for v in args if isinstance(v, Value)]
    if "channel" in context.node.target._schema.name:
        given = [v for one in given for v in on_axis(one, args[2] % len(x.axes), len(x.axes))]
    out = context.engine.elementwise([x, *given])
    return out, out


@rule("rrelu_with_noise")
def rrelu(
    context: Context, x: Value, _: Value, lower: Any = 0, upper: Any = 0, training: bool = False, *__: Any
) -> Value:
    """A leaky ReLU, but in training."""
    if training:
        raise Unruled("slopes drawn at random")
    return x


@rule("native_layer_norm", "_fused_rms_norm", "layer_norm", "rms_norm")
def layer_norm(context: Context, x: Value, shape: Sequence[int], w: Value | None = None, b: Any = None, *_: Any) -> Any:
    axes = list(range(len(x.axes) - len(shape), len(x.axes)))
    statistic = reduced(context.engine, x, axes, keepdim=True)
    out = context.engine.elementwise([x, statistic, *(v for v in (w, b) if isinstance(v, Value))])
    return out if isinstance(context.node.meta["val"], torch.Tensor) else (out, statistic, statistic)


@rule("native_group_norm")
def group_norm(
    context: Context, x: Value, w: Value | None, b: Value | None, n: int, c: int, hw: int, groups: int, eps: float
) -> tuple[Value, ...]:
    shape = x.shape
    grouped = context.engine.reshape(x, [shape[0], groups, c // groups, *shape[2:]])
    axes = list(range(2, len(grouped.axes)))
    statistic = reduced(context.engine, grouped, axes, keepdim=True)
    out = context.engine.elementwise([grouped, statistic])
    out = context.engine.reshape(out, shape)
    out = context.engine.elementwise([out, *on_axis(w, 1, len(shape)), *on_axis(b, 1, len(shape))])
    flat = reduced(context.engine, grouped, axes, keepdim=False)
    return out, flat, flat


@rule("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "_native_batch_norm_legit",
      "batch_norm", "miopen_batch_norm", "_batch_norm_with_update", "_batch_norm_no_update",
      "_native_batch_norm_legit_functional")  # fmt: skip
def batch_norm(
    context: Context, x: Value, w: Value | None, b: Value | None, mean: Any = None, var: Any = None, *args: Any
) -> Any:
    engine, n = context.engine, len(x.axes)
    stats = [v for v in (mean, var) if isinstance(v, Value)]
    context.statistics += stats
    vectors = [v for p in (w, b, *stats) for v in on_axis(p, 1, n)]
    training = bool(args and args[0] is True) or not stats
    others = [k for k in range(n) if k != 1]
    if training:
        vectors.append(reduced(engine, x, others, keepdim=True))
    out = engine.elementwise([x, *vectors])
    if isinstance(context.node.meta["val"], torch.Tensor):
        return out
    if context.used <= {0}:
        return (out, *[None] * 4)
    of_batch = [reduced(engine, x, others, keepdim=False)] if training else []
    moments = engine.elementwise([*of_batch, *stats])  # the statistics of the batch, and what the running ones become
    return (out, *[moments] * 4)


@rule("avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices",
      "max_pool3d_with_indices", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d",
      "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool2d", "adaptive_max_pool3d", "adaptive_max_pool1d",
      "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d", "upsample_linear1d",
      "upsample_trilinear3d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
      "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d",
      )  # fmt: skip
def pooling(context: Context, x: Value, *args: Any, **kwargs: Any) -> Any:
    """Windows over spatial axes; a window that is the whole axis is a reduction."""
    engine = context.engine
    name = context.node.target._schema.name
    value = context.node.meta["val"]
    single = isinstance(value, torch.Tensor)
    out = value if single else value[0]
    spatial = next((n for n in (1, 2, 3) if f"{n}d" in name), 2)
    x, alike = _not_resized(context, x, args, kwargs, spatial) if "upsample" in name else (x, set())
    placed = not single and 1 in context.used  # where in the image the largest entry was
    for k in range(len(x.axes) - spatial, len(x.axes)):
        at = k - len(x.axes)
        same = "pool" in name and "adaptive" not in name and x.shape[k] == out.shape[k]
        one = same and _window(args, spatial, at) == 1 and _stride(args, spatial, at) == 1
        if k in alike or (one and not placed):
            continue  # a window of one position
        if (
            not placed
            and _tiled(name, args, spatial, at, x.shape[k], out.shape[k])
            and not x.pinned.issuperset(x.axes[k])
        ):
            with contextlib.suppress(Unruled):  # no product of windows and what is within
                x = _of_tiles(engine, x, k, out.shape[k])
                continue
        whole = out.shape[k] == 1 and ("adaptive" in name or _window(args, spatial, k - len(x.axes)) == x.shape[k])
        if not whole or placed:
            x = engine.pin_letters(x, set(x.axes[k]), "spatial axis of a window operator")
        x = repinned(engine, x, k, out.shape[k])
    return x if single else (x, x)


@rule("avg_pool2d_backward", "avg_pool3d_backward", "upsample_nearest1d_backward", "upsample_nearest2d_backward",
      "upsample_nearest3d_backward", "upsample_linear1d_backward", "upsample_bilinear2d_backward",
      "upsample_trilinear3d_backward", "upsample_bicubic2d_backward", "_adaptive_avg_pool2d_backward",
      "reflection_pad1d_backward", "reflection_pad2d_backward", "replication_pad1d_backward",
      "replication_pad2d_backward")  # fmt: skip
def window_backward(context: Context, x: Value, *_: Any, **__: Any) -> Value:
    """A gradient sent back through windows: linear, channel by channel."""
    spatial = next(n for n in (1, 2, 3) if f"{n}d" in context.node.target._schema.name)
    for k in range(len(x.axes) - spatial, len(x.axes)):
        x = context.engine.pin_letters(x, set(x.axes[k]), "spatial axis of a window operator")
        x = repinned(context.engine, x, k, context.shape[k])
    return x


@rule("max_unpool2d", "max_unpool3d")
def unpooling(context: Context, x: Value, index: Value, *_: Any) -> Value:
    """Values written where the pooling found them: the spatial axes are pinned, the others are those of both operands."""
    x = context.engine.elementwise([x, index])
    spatial = 2 if "2d" in context.node.target._schema.name else 3
    for k in range(len(x.axes) - spatial, len(x.axes)):
        x = context.engine.pin_letters(x, set(x.axes[k]), "spatial axis of a window operator")
        x = repinned(context.engine, x, k, context.shape[k])
    return x


@rule("fractional_max_pool2d", "fractional_max_pool3d")
def fractional_pooling(context: Context, x: Value, kernel: Any, size: Any, samples: Value) -> tuple[Value, Value]:
    """Windows at positions drawn for every channel: the channels are those of both operands."""
    engine = context.engine
    spatial = len(x.axes) - len(samples.axes) + 1
    drawn = engine.reduce(engine.pin_letters(samples, set(samples.axes[-1]), "coordinates"), set(samples.axes[-1]))
    drawn = drawn.with_axes((*drawn.axes[:-1], *((),) * spatial))
    x = engine.elementwise([x, drawn])
    for k in range(len(x.axes) - spatial, len(x.axes)):
        x = engine.pin_letters(x, set(x.axes[k]), "spatial axis of a window operator")
        x = repinned(engine, x, k, context.out(0).shape[k])
    return x, x


def _not_resized(
    context: Context, x: Value, args: Sequence[Any], kwargs: dict[str, Any], spatial: int
) -> tuple[Value, set[int]]:
    """The axes that an interpolation leaves as they are (a table of positions by channels), if their length is no accident.

    They get labels of their own, which are settled in the end.
    """
    names = [a.name for a in context.node.target._schema.arguments[1:]]
    given = dict(zip(names, args, strict=False)) | kwargs
    scales = given.get("scale_factors") or [given.get(n) for n in names if n.startswith("scales")]
    found: set[int] = set()
    x = x.with_axes(x.axes)
    axes = context.engine.axes
    for k, scale in enumerate(scales, len(x.axes) - spatial):
        letters = set(x.axes[k])
        own = [f for f in x.factors if set(f.letters) & letters]
        if scale not in (None, 1) or x.shape[k] != context.shape[k]:
            continue
        if all(set(f.letters) == letters and f.injective for f in own):
            after = [Factor(f.letters, axes.fresh(f.labels.shape)) for f in own]
            x.factors = [f for f in x.factors if not set(f.letters) & letters] + after
            context.engine.resized += [(f.labels, g.labels, axes.where) for f, g in zip(own, after, strict=True)]
            found.add(k)
    return x, found


def _stride(args: Sequence[Any], spatial: int, axis: int) -> int:
    """The window's stride along an axis; by default the window's extent."""
    stride = args[1] if len(args) > 1 and args[1] else args[0]
    return int(stride[axis]) if len(stride) == spatial else int(stride[0])


def _tiled(name: str, args: Sequence[Any], spatial: int, axis: int, whole: int, windows: int) -> bool:
    """Whether the windows of a pooling lie side by side, none of them cut."""
    if "pool" not in name or windows < 2 or whole % windows or whole == windows:
        return False
    given = args[3] if "max" in name and len(args) > 3 and isinstance(args[3], list | tuple) else [1]
    apart = given[axis if len(given) == spatial else 0] > 1
    size = whole // windows
    return "adaptive" in name or (
        not apart and _window(args, spatial, axis) == size and _stride(args, spatial, axis) == size
    )


def _of_tiles(engine: Engine, x: Value, axis: int, windows: int) -> Value:
    """A symmetric function of every window (maxout over groups of units)."""
    x = engine.reshape(x, [*x.shape[:axis], windows, x.shape[axis] // windows, *x.shape[axis + 1 :]])
    x = engine.reduce(x, set(x.axes[axis + 1]))
    return x.with_axes((*x.axes[: axis + 1], *x.axes[axis + 2 :]))


def _window(args: Sequence[Any], spatial: int, axis: int) -> int:
    """The window's extent, or 0 where stride, padding or dilation are unusual."""
    if not args or not isinstance(args[0], list | tuple):
        return 0
    padding = args[2] if len(args) > 2 and isinstance(args[2], list | tuple) else [0]
    if padding[axis if len(padding) == spatial else 0]:
        return 0
    return int(args[0][axis]) if len(args[0]) == spatial else int(args[0][0])
