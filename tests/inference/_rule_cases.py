"""One line per operator family: how to draw a use of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st

from tests.inference._one_operator import Call, Case, I, P, call, ints, p

SPACE = (3, 2, 2)


class Draw:
    """Short names for what the table draws."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw

    def pick(self, *options: Any) -> Any:
        return options[self.draw(st.integers(0, len(options) - 1))]

    def n(self, low: int = 2, high: int = 4) -> int:
        return self.draw(st.integers(low, high))

    def flag(self) -> bool:
        return self.draw(st.booleans())

    def shape(self, low: int = 1, high: int = 3, least: int = 2) -> tuple[int, ...]:
        return tuple(self.n(least) for _ in range(self.n(low, high)))

    def dim(self, shape: Sequence[int]) -> int:
        return self.n(-len(shape), len(shape) - 1)

    def perm(self, n: int) -> list[int]:
        return list(self.draw(st.permutations(range(n))))

    def index(self, n: int) -> torch.Tensor:
        """A constant index: an order, a part, or one with repeats."""
        return torch.tensor(
            self.pick(self.perm(n), self.perm(n)[: max(1, n - 1)], [self.n(0, n - 1) for _ in range(3)])
        )


def complexes(*shape: int) -> Call:
    """A complex tensor made of a real parameter."""
    return Call("view_as_complex", (p(*shape, 2),))


# -------------------------------------------------------------------- drawn arguments
def on_dim(d: Draw, *rest: Any, least: int = 2, keep: bool = False, listed: bool = False, **kwargs: Any) -> Case:
    """``op(x, dim, ...)``; ``keep`` returns that axis as it is."""
    s = d.shape(least=least)
    dim = d.dim(s) % len(s)
    return call(P(s), [dim] if listed else dim, *rest, keep=[dim] if keep else [], **kwargs)


def attention(d: Draw) -> Case:
    b, h, s, t, e = (d.n(2, 3) for _ in range(5))
    options: Any = d.pick({}, {"attn_mask": p(s, t)}, {"attn_mask": p(b, 1, s, t)})
    causal = not options and s <= t and d.flag()  # of more queries than keys the last see all; the rule pins them, too
    served = d.n(1, 2)  # heads of queries for each of the keys and values
    q, k, v = p(b, h * served, s, e), p(b, h, t, e), p(b, h, t, e)
    return call(q, k, v, 0.0, causal, **options, outs=d.pick((0,), (0, 1)))


def viewed(d: Draw) -> tuple[P, list[int]]:
    """A tensor and another shape of the same size."""
    a, b, c = d.n(2, 3), d.n(2, 3), d.n(2, 3)
    shapes = [(a * b, c), (a, b, c), (a, b * c), (a * b * c,)]
    return P(d.pick(*shapes)), list(d.pick(*shapes))


def selected(d: Draw, *more: str) -> Case:
    a, b = d.n(3, 4), d.n(2, 3)
    which = d.pick("order", "second", "both", "input", "inputs", *more)
    constant = {
        "order": [d.index(a)],
        "second": [None, d.index(b)],
        "both": [torch.tensor([0, 1, 0]), torch.tensor([1, 0, 0])],
        "mask": [torch.arange(a) != 1],
        "input": [ints(a, 3)],
        "inputs": [ints(a, 2, 1), ints(b, 3)],
        "apart": [ints(a, 3), None, ints(a, 3)],
    }
    return call(p(a, b, a) if which == "apart" else p(a, b), constant[which])


def joined(d: Draw) -> Case:
    a, b, c = d.n(), d.n(), d.n()
    one = p(a, b)
    other = d.pick(one, p(c, b), p(a, b))
    return call(d.pick([one, other], [one, other, one]), 0, tied=(1,))


def written(d: Draw, *rest: Any) -> Case:
    a, b, k = d.n(3, 4), d.n(2, 3), 2
    return call(p(a, b), 0, ints(a, k), p(k, b), *rest, tied=(1,))


def put(d: Draw) -> Case:
    a, b, k = d.n(3, 4), d.n(2, 3), 2
    every, order = torch.arange(a), torch.tensor(d.perm(a))
    return d.pick(
        call(p(a, b), [ints(a, k)], p(k, b), d.flag(), tied=(1,)),
        call(p(a, b), [every[:, None], ints(b, a, k)], p(a, k), True, tied=(1,), complete=False),
        call(p(a, b), [None, ints(b, k)], p(a, k), True, tied=(1,)),
        call(p(a, b), [order[:k]], p(k, b), d.flag(), tied=(1,)),
        # along a diagonal: every axis tells where on the other one was written
        call(p(a, a), [every, order], p(a), d.flag(), tied=(0, 1)),
        call(p(a, a, b), [every, order], p(a, b), d.flag(), tied=(0, 1, 2)),
        call(p(b, a, a), [None, every, order], p(b, a), d.flag(), tied=(0, 1, 2)),
        call(p(a, b, a), [every, None, order], p(a, b), d.flag(), tied=(0, 1, 2)),
        call(p(a, b, a), [every[:, None], torch.arange(b), order[:, None]], p(a, b), complete=False),
    )


def scattered(d: Draw, *rest: Any) -> Case:
    a, b, k = d.n(3, 4), d.n(2, 3), 2
    return call(p(a, b), 0, ints(a, k, b), p(k, b), *rest, tied=(1,))


def looked_up(d: Draw) -> Case:
    a, b = d.n(3, 4), d.n(2, 3)
    column = torch.tensor(d.perm(a))[:, None].expand(a, b).contiguous()
    column = torch.tensor(d.perm(a))[:, None].expand(a, b).contiguous()
    index = d.pick(ints(a, 2, b), column)
    return call(p(a, b), index, 0) if d.flag() else call(p(a, b), index, dim=0)


def gathered(d: Draw) -> Case:
    made = looked_up(d)
    return call(made.args[0], 0, made.args[1])


def convolved(d: Draw, *rest: Any) -> Case:
    """Kernels of one position, or overlapping windows of stride one; spatial positions are returned as they are."""
    g, o, i, k, dims = d.n(1, 2), d.n(1, 2), d.n(1, 3), d.n(1, 2), d.n(1, 2)
    transposed = d.flag()
    space, kernel = SPACE[:dims], (k, 1)[:dims]
    w = p(*((g * i, o) if transposed else (g * o, i)), *kernel)
    bias = d.pick(None, p(g * o))
    keep = [] if k == 1 else range(2, 2 + dims)
    ones, zeros = [1] * dims, [0] * dims
    return call(p(2, g * i, *space), w, bias, ones, zeros, ones, transposed, zeros, g, *rest, keep=keep)


def pooled(d: Draw, dims: int, *, outs: Sequence[int] = (0,)) -> Case:
    """Overlapping windows, one window over everything, or windows side by side."""
    space = SPACE[:dims]
    if d.flag():
        window = d.pick([2, *(1,) * (dims - 1)], [3, *(2,) * (dims - 1)])
        wide = [2 * w for w in window]
        return call(p(2, d.n(2, 3), *wide), window, window, keep=range(2, 2 + dims), outs=outs)
    kernel = list(space) if d.flag() else [2, *(1,) * (dims - 1)]
    return call(p(2, d.n(), *space), kernel, [1] * dims, keep=range(2, 2 + dims), outs=outs)


def adaptive(d: Draw, dims: int) -> Case:
    if d.flag():
        size = [2, *(1,) * (dims - 1)]
        return call(p(2, 2, 6, *SPACE[1:dims]), size, keep=range(2, 2 + dims), outs=d.pick((0,), (0, 1)))
    size = d.pick([2, *SPACE[1:dims]], [1] * dims, [2, *(1,) * (dims - 1)])
    return call(p(2, d.n(), *SPACE[:dims]), size, keep=range(2, 2 + dims), outs=d.pick((0,), (0, 1)))


def resized(d: Draw, dims: int, *rest: Any) -> Case:
    return call(p(2, d.n(2, 3), *SPACE[:dims]), [n + 2 for n in SPACE[:dims]], *rest, keep=range(2, 2 + dims))


def padded(d: Draw, dims: int) -> Case:
    return call(p(2, d.n(2, 3), *SPACE[:dims]), [1, 1] + [0, 1] * (dims - 1), keep=range(2, 2 + dims))


def sent_back(d: Draw, dims: int, *rest: Any) -> Case:
    """The gradient of a resized tensor; positions that come from one are summed, which the rule does not look at."""
    c, size = d.n(2, 3), SPACE[:dims]
    wide = [n + 2 for n in size]
    return call(p(2, c, *wide), wide, [2, c, *size], *rest, keep=range(2, 2 + dims), complete=False)


def through_windows(d: Draw, dims: int, *rest: Any, more: int) -> Case:
    """The gradient of windows of stride one, whose operand only gives its shape; borders are summed as in `sent_back`."""
    c, size = d.n(2, 3), SPACE[:dims]
    whole = torch.zeros(2, c, *size, dtype=torch.float64)
    return call(p(2, c, *(n + more for n in size)), whole, *rest, keep=range(2, 2 + dims), complete=False)


def convolved_back(d: Draw) -> Case:
    """The gradients of an operand, a kernel and a bias; spatial positions are returned as they are."""
    g, o, i, k, transposed = d.n(1, 2), d.n(1, 2), d.n(1, 3), d.n(1, 2), d.flag()
    w = p(*((g * i, o) if transposed else (g * o, i)), k)
    n = 3 + (k - 1) * (1 if transposed else -1)
    which = d.n(0, 2)
    keep = [] if k == 1 or which == 2 else [2]
    mask = [j == which for j in range(3)]
    options = [g * o], [1], [0], [1], transposed, [0], g, mask
    return call(p(2, g * o, n), p(2, g * i, 3), w, *options, keep=keep, outs=(which,))


def unpooled(d: Draw, dims: int) -> Case:
    c, n = d.n(), 2**dims
    plane = torch.arange(n).reshape(*(2,) * dims) * 2
    where = plane.expand(2, c, *plane.shape).contiguous()
    rest = [[1] * dims, [0] * dims] if dims == 3 else []
    return call(p(2, c, *plane.shape), where, [4] * dims, *rest, keep=range(2, 2 + dims))


def fractional(d: Draw, dims: int) -> Case:
    """Windows that depend on a sample for every channel; which entries no window reads, no rule can know."""
    c = d.n(2, 3)
    samples = torch.linspace(0, 0.99, dims * c).double().view(1, c, dims)
    kernel, size = [2, *(1,) * (dims - 1)], [3, *(2,) * (dims - 1)]
    return call(p(1, c, 5, *(4,) * (dims - 1)), kernel, size, samples, complete=False)


def normalised(d: Draw, *rest: Any, bias: bool = True, outs: Sequence[int] = (0,)) -> Case:
    s = d.shape(1, 3, least=3)
    last = d.n(1, min(2, len(s)))
    affine = d.flag()
    vectors = [p(*s[-last:]) if affine else None for _ in range(1 + bias)]
    return call(P(s), list(s[-last:]), *vectors, *rest, outs=outs)


def group_normed(d: Draw) -> Case:
    n, g, k, size = 2, d.n(1, 3), 2, 3
    return call(p(n, g * k, size), p(g * k), p(g * k), n, g * k, size, g, 1e-5, outs=d.pick((0,), (0, 1)))


def batch_normed(d: Draw, *rest: Any, statistics: bool = True, training: bool | None = None) -> Case:
    c = d.n()
    x = p(*d.pick((3, c), (3, c, 3)))
    given: list[Any] = [p(c), p(c, how="positive")] if statistics else []
    return call(x, p(c), p(c), *given, *([] if training is None else [training]), *rest)


def ranked(d: Draw, *rest: Any, listed: bool = False) -> Case:
    """Values alone, or with the positions (then every rank is returned as it is)."""
    s = d.shape(least=3)
    dim = d.dim(s)
    both = d.flag()
    return call(P(s), *rest, dim, keep=[dim] if both else [], outs=(0, 1) if both else (0,))


def extremal(d: Draw, *rest: Any) -> Case:
    s = d.shape()
    return call(P(s), *rest, d.dim(s), d.flag(), outs=d.pick((0,), (0, 1)))


def matrices(d: Draw) -> Case:
    a, b, c = d.n(), d.n(), d.n()
    square = p(a, a)
    return call(*d.pick((p(a, b), p(b, c)), (square, square), (square, Call("t", (square,)))))


def sampled(d: Draw, dims: int) -> Case:
    n, space = d.n(2, 3), SPACE[:dims]
    grid = p(n, *((2, 3, 1)[:dims]), dims, how="small")
    return call(p(n, d.n(2, 3), *space), grid, 0, 0, d.flag())


def bags(d: Draw) -> Case:
    v, e = d.n(3, 4), d.n()
    starts = d.pick([0, 2, 3], [0, 2, 4])
    scale = (d.pick(0, 1),) if starts[2] == 3 else (0, False, p(6))
    return call(p(v, e), ints(v, 6), I(lambda rng: torch.tensor(starts)), False, *scale, outs=(0,))


TABLE: dict[str, Callable[[Draw], Case]] = {
    # moving data
    "clone contiguous alias detach lift_fresh lift_fresh_copy positive resolve_conj resolve_neg _to_copy": lambda d: (
        call(P(d.shape()))
    ),
    "to": lambda d: call(P(d.shape()), torch.float64),
    "dropout": lambda d: call(P(d.shape()), 0.5, False),
    "conj _conj conj_physical": lambda d: call(complexes(*d.shape(1, 2))),
    "view_as_real": lambda d: call(complexes(*d.shape(1, 2)), keep=(-1,)),
    "view_as_complex": lambda d: call(p(*d.shape(1, 2), 2)),
    "view reshape _unsafe_view view_copy": lambda d: call(*viewed(d)),
    "_reshape_alias": lambda d: (lambda a, b: call(p(a * b, 2), [a, b * 2], [b * 2, 1]))(d.n(2, 3), d.n(2, 3)),
    "squeeze": lambda d: call(p(d.n(), 1, d.n()), 1),
    "unsqueeze": lambda d: call(P(d.shape()), 0),
    "flatten": lambda d: call(p(d.n(2, 3), 2, d.n(2, 3)), *d.pick((0, 1), (1, 2), (0, 2))),
    "unflatten": lambda d: call(p(6, d.n()), 0, d.pick([2, 3], [3, 2])),
    "permute": lambda d: (lambda s: call(P(s), d.perm(len(s))))(d.shape()),
    "t": lambda d: call(P(d.shape(1, 2))),
    "transpose swapaxes": lambda d: (lambda s: call(P(s), d.dim(s), d.dim(s)))(d.shape(2, 3)),
    "expand broadcast_to": lambda d: (lambda a: call(*d.pick((p(a, 1), [a, 3]), (p(a), [2, a]), (p(1, a), [2, 3, a]))))(
        d.n()
    ),
    "expand_as": lambda d: (lambda a: call(p(a, 1), torch.zeros(a, 3)))(d.n()),
    "repeat tile": lambda d: call(p(d.n(), d.n(2, 3)), [d.n(1, 2), d.n(1, 2)]),
    "repeat_interleave": lambda d: call(p(d.n(), d.n(2, 3)), 2, d.pick(0, 1, -1)),
    "slice slice_copy": lambda d: call(p(4, d.n()), 0, *d.pick((1, 4), (0, 2), (0, 4, 2), (-2, None))),
    "select select_copy": lambda d: (lambda s: call(P(s), d.dim(s), d.pick(0, 1, -1)))(d.shape()),
    "flip": lambda d: (lambda s: call(P(s), d.pick([0], [-1], list(range(len(s))))))(d.shape()),
    # rolled as one line, both axes reversed together are a symmetry that no axis has alone
    "roll": lambda d: (lambda how: call(p(d.n(), d.n()), *how, complete=len(how) > 1))(
        d.pick(([1], [0]), ([1, -1], [0, 1]), ([1],))
    ),
    "rot90": lambda d: call(p(d.n(), d.n()), d.n(1, 3), [0, 1]),
    "split unsafe_split split_copy": lambda d: call(p(4, d.n()), d.pick(2, 3), 0, outs=d.pick((0,), (0, 1))),
    "split_with_sizes unsafe_split_with_sizes split_with_sizes_copy": lambda d: call(
        p(d.n(), 4), d.pick([1, 3], [2, 2]), 1, outs=d.pick((0,), (1,), (0, 1))
    ),
    "chunk unsafe_chunk tensor_split": lambda d: call(p(d.pick(4, 5), d.n()), 2, 0, outs=d.pick((0,), (0, 1))),
    "unbind unbind_copy": lambda d: call(p(2, d.n(), d.n()), 0, outs=d.pick((0,), (0, 1))),
    "cat concat concatenate": joined,
    "stack": lambda d: (lambda s, one: call([one, d.pick(one, P(s))], 0, tied=range(1, len(s) + 1)))(
        s := d.shape(), P(s)
    ),
    "slice_scatter": lambda d: call(p(4, 3), p(2, 3), 0, *d.pick((1, 3), (0, 4, 2)), tied=(1,)),
    "select_scatter": lambda d: (lambda b: call(p(d.n(), b), p(b), 0, d.pick(0, 1), tied=(1,)))(d.n()),
    "diagonal_scatter": lambda d: (lambda k: call(p(3, 3), p(3 - abs(k)), k, tied=(0, 1)))(d.pick(0, 1, -1)),
    "as_strided_scatter": lambda d: call(p(4, 3), p(2, 3), [2, 3], [3, 1], 3, tied=(1,)),
    "copy": lambda d: (lambda a, b: call(p(a, b), d.pick(p(b), p(a, b), p(a, 1))))(d.n(), d.n()),
    "constant_pad_nd": lambda d: call(p(d.n(), d.n()), d.pick([1, 0], [1, 2], [0, 1, 1, 0], [-1, 1])),
    "pixel_shuffle": lambda d: call(p(4 * d.n(1, 2), 2, 1), 2),
    "pixel_unshuffle": lambda d: call(p(d.n(1, 3), 2, 4), 2),
    "channel_shuffle native_channel_shuffle": lambda d: call(p(2, d.pick(4, 6), 2, 1), 2),
    "diag_embed": lambda d: call(P(d.shape(1, 2)), d.pick(0, 0, 1)),
    "diag": lambda d: call(d.pick(p(d.n()), p(3, 3), p(2, 3)), d.pick(0, 0, 1)),
    "diagonal diagonal_copy": lambda d: call(p(d.n(3, 4), 3), d.pick(0, 1, -1)),
    "unfold unfold_copy": lambda d: call(p(4, d.n()), 0, 2, d.pick(1, 2)),
    "as_strided": lambda d: call(p(4, 3), *d.pick(([2, 3], [6, 1]), ([3, 3], [3, 1], 3), ([4], [3]))),
    "reflection_pad1d replication_pad1d": lambda d: padded(d, 1),
    "reflection_pad2d replication_pad2d": lambda d: padded(d, 2),
    "reflection_pad3d replication_pad3d": lambda d: padded(d, 3),
    "im2col": lambda d: call(p(2, d.n(2, 3), 3, 2), [2, 1], [1, 1], [0, 0], [1, 1], keep=(2,)),
    "col2im": lambda d: call(p(2, 2 * d.n(2, 3), 4), [3, 2], [2, 1], [1, 1], [0, 0], [1, 1], keep=(2, 3)),
    # constants
    "zeros_like ones_like zero": lambda d: call(P(d.shape()), plus=True),
    "full_like fill": lambda d: call(P(d.shape()), 2.0, plus=True),
    "new_zeros new_ones": lambda d: call(P(d.shape()), list(d.shape()), plus=True),
    "_new_zeros_with_same_feature_meta": lambda d: (lambda s: call(P(s), P(s), plus=True))(d.shape()),
    "new_full": lambda d: call(P(d.shape()), list(d.shape()), 0.5, plus=True),
    "zeros ones": lambda d: call(list(d.shape()), dtype=torch.float64, plus=True),
    "full": lambda d: call(list(d.shape()), 0.5, dtype=torch.float64, plus=True),
    # reductions
    "sum mean nansum nanmean amax amin logsumexp special_logsumexp": lambda d: on_dim(d, d.flag(), listed=True),
    "prod": lambda d: on_dim(d, d.flag()),
    "_is_all_true _is_any_true": lambda d: call(Call("gt", (P(d.shape()), 0.0))),
    "any all": lambda d: (lambda s: call(Call("gt", (P(s), 0.0)), d.dim(s), d.flag()))(
        tuple(d.n(2, 3) for _ in range(2))
    ),
    "count_nonzero": lambda d: (lambda s: call(Call("relu", (P(s),)), [d.dim(s)]))(d.shape()),
    "var std": lambda d: on_dim(d, listed=True, correction=1, keepdim=d.flag()),
    "var_mean std_mean": lambda d: on_dim(d, listed=True, correction=0, keepdim=d.flag(), outs=d.pick((0,), (0, 1))),
    "aminmax": lambda d: (lambda s: call(P(s), dim=d.dim(s), keepdim=d.flag(), outs=d.pick((0,), (0, 1))))(d.shape()),
    "rrelu_with_noise": lambda d: (lambda s: call(P(s), torch.zeros(s)))(d.shape()),
    "norm linalg_vector_norm": lambda d: (lambda s: call(P(s), d.pick(1, 2, 3), [d.dim(s)], d.flag()))(d.shape()),
    "max min median nanmedian mode": extremal,
    "kthvalue": lambda d: extremal(d, 2),
    "argmax argmin": lambda d: on_dim(d, d.flag()),
    "_softmax _log_softmax": lambda d: on_dim(d, False),
    "softmax log_softmax special_softmax _safe_softmax": on_dim,
    "_scaled_dot_product_flash_attention_for_cpu": attention,
    "native_layer_norm": lambda d: normalised(d, 1e-5, outs=d.pick((0,), (0, 1))),
    "layer_norm": lambda d: normalised(d, 1e-5),
    "rms_norm _fused_rms_norm": lambda d: normalised(d, 1e-5, bias=False),
    "native_group_norm": group_normed,
    "native_batch_norm": lambda d: batch_normed(d, 0.1, 1e-5, training=False),
    "batch_norm": lambda d: batch_normed(d, 0.1, 1e-5, False, training=False),
    "_native_batch_norm_legit": lambda d: batch_normed(d, 0.1, 1e-5, statistics=False, training=True),
    "_native_batch_norm_legit_functional": lambda d: batch_normed(d, 0.1, 1e-5, training=False),
    "_native_batch_norm_legit_no_training _batch_norm_no_update": lambda d: batch_normed(d, 0.1, 1e-5),
    # windows
    "avg_pool1d max_pool1d": lambda d: pooled(d, 1),
    "avg_pool2d max_pool2d": lambda d: pooled(d, 2),
    "avg_pool3d max_pool3d": lambda d: pooled(d, 3),
    "max_pool2d_with_indices": lambda d: pooled(d, 2, outs=d.pick((0,), (0, 1))),
    "max_pool3d_with_indices": lambda d: pooled(d, 3, outs=d.pick((0,), (0, 1))),
    "adaptive_avg_pool1d adaptive_max_pool1d": lambda d: adaptive(d, 1),
    "_adaptive_avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d": lambda d: adaptive(d, 2),
    "_adaptive_avg_pool3d adaptive_avg_pool3d adaptive_max_pool3d": lambda d: adaptive(d, 3),
    "upsample_nearest1d _upsample_nearest_exact1d": lambda d: resized(d, 1),
    "upsample_nearest2d _upsample_nearest_exact2d": lambda d: resized(d, 2),
    "upsample_nearest3d _upsample_nearest_exact3d": lambda d: resized(d, 3),
    "upsample_linear1d": lambda d: resized(d, 1, d.flag()),
    "upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa": lambda d: resized(
        d, 2, d.flag()
    ),
    "upsample_trilinear3d": lambda d: resized(d, 3, d.flag()),
    "fractional_max_pool2d": lambda d: fractional(d, 2),
    "fractional_max_pool3d": lambda d: fractional(d, 3),
    "upsample_nearest1d_backward": lambda d: sent_back(d, 1),
    "upsample_nearest2d_backward": lambda d: sent_back(d, 2),
    "upsample_nearest3d_backward": lambda d: sent_back(d, 3),
    "upsample_linear1d_backward": lambda d: sent_back(d, 1, False),
    "upsample_bilinear2d_backward upsample_bicubic2d_backward": lambda d: sent_back(d, 2, d.flag()),
    "upsample_trilinear3d_backward": lambda d: sent_back(d, 3, False),
    "avg_pool2d_backward": lambda d: through_windows(d, 2, [2, 2], [1, 1], [0, 0], False, True, None, more=-1),
    "avg_pool3d_backward": lambda d: through_windows(d, 3, [2] * 3, [1] * 3, [0] * 3, False, True, None, more=-1),
    "_adaptive_avg_pool2d_backward": lambda d: through_windows(d, 2, more=d.n(0, 2)),
    "reflection_pad1d_backward replication_pad1d_backward": lambda d: through_windows(d, 1, [1, 1], more=2),
    "reflection_pad2d_backward replication_pad2d_backward": lambda d: through_windows(d, 2, [1, 1, 1, 1], more=2),
    "max_unpool2d": lambda d: unpooled(d, 2),
    "max_unpool3d": lambda d: unpooled(d, 3),
    # contractions
    "mm": matrices,
    "bmm": lambda d: (lambda n, k: call(p(n, d.n(), k), p(n, k, d.n())))(d.n(2, 3), d.n()),
    "matmul": lambda d: (
        lambda n, a, k, b: call(
            *d.pick((p(k), p(k, b)), (p(a, k), p(k)), (p(n, a, k), p(k, b)), (p(n, a, k), p(n, k, b)), (p(k), p(k)))
        )
    )(d.n(2, 3), d.n(), d.n(), d.n()),
    "addmm _addmm_activation": lambda d: (
        lambda a, b, c: call(p(*d.pick((c,), (a, c))) if d.flag() else p(c), p(a, b), p(b, c))
    )(d.n(), d.n(), d.n()),
    "addmv": lambda d: (lambda a, b: call(p(a), p(a, b), p(b)))(d.n(), d.n()),
    "addbmm": lambda d: (lambda a, b, c: call(p(a, c), p(2, a, b), p(2, b, c)))(d.n(), d.n(2, 3), d.n()),
    "baddbmm": lambda d: (lambda a, b, c: call(d.pick(p(2, a, c), p(1, c)), p(2, a, b), p(2, b, c)))(
        d.n(), d.n(2, 3), d.n()
    ),
    "mv": lambda d: (lambda a, b: call(p(a, b), p(b)))(d.n(), d.n()),
    "dot vdot": lambda d: (lambda a: call(p(a), p(a)))(d.n()),
    "inner": lambda d: (lambda a, b: call(*d.pick((p(a), p(a)), (p(b, a), p(a)), (p(b, a), p(3, a)))))(d.n(), d.n()),
    "linear": lambda d: (lambda a, b: call(p(*d.shape(0, 2), a), p(b, a), d.pick(None, p(b))))(d.n(), d.n()),
    "_trilinear": lambda d: (lambda n, a, b, o: call(p(n, a), p(o, a, b), p(n, b), [1, 3], [0], [1, 2], [2, 3]))(
        2, d.n(2, 3), d.n(2, 3), d.n(2, 3)
    ),
    # rows and columns may also move apart if both are odd, or both even: no orders that are free of each other
    "_linalg_slogdet": lambda d: (lambda n, outs: call(p(*d.pick((), (2,)), n, n), outs=outs, complete=outs == [1]))(
        d.n(), d.pick([0], [1], [0, 1])
    ),
    "_linalg_det": lambda d: (lambda n: call(p(*d.pick((), (2,)), n, n), outs=[0], complete=False))(d.n()),
    "linalg_inv_ex": lambda d: (lambda n: call(p(*d.pick((), (2,)), n, n), outs=[0]))(d.n()),
    "_pdist_forward": lambda d: call(p(3, d.n()), d.pick(1.0, 2.0), complete=False),
    "linalg_pinv": lambda d: call(p(*d.pick((), (2,)), d.n(), d.n())),
    "linalg_lstsq": lambda d: (lambda m, n, lead: call(p(*lead, m, n), p(*lead, m, d.n()), outs=[0]))(
        d.n(3, 4), d.n(2, 3), d.pick((), (2,))
    ),
    "linalg_matrix_exp": lambda d: (lambda n: call(p(*d.pick((), (2,)), n, n)))(d.n()),
    "_linalg_solve_ex": lambda d: (
        lambda n, m: (
            call(p(n, n), p(n, m), outs=[0]) if d.flag() else call(p(n, n), d.pick(p(m, n)), left=False, outs=[0])
        )
    )(d.n(), d.n()),
    "linalg_solve_triangular": lambda d: (
        lambda n, m: (
            call(p(2, n, n), p(2, n, m), upper=d.flag()) if d.flag() else call(p(n, n), p(m, n), upper=True, left=False)
        )
    )(d.n(), d.n()),
    "cholesky_solve": lambda d: (lambda n, m: call(p(n, m), p(n, n), d.flag()))(d.n(), d.n()),
    "linalg_cholesky_ex": lambda d: (lambda n: call(Call("add", (p(2, n, n), 20 * torch.eye(n))), outs=[0]))(d.n()),
    "linalg_qr": lambda d: (lambda n, m: call(p(2, n, m), outs=[0, 1], complete=False))(d.n(), d.n()),
    "linalg_lu_factor_ex": lambda d: (lambda n: call(p(2, n, n), outs=[0], complete=False))(d.n()),
    "_cdist_forward": lambda d: (lambda a, b, k: call(p(a, k), p(b, k), d.pick(1.0, 2.0, 3.0), None))(
        d.n(), d.n(), d.n()
    ),
    "cdist": lambda d: (lambda a, b, k: call(p(a, k), p(b, k)))(d.n(), d.n(), d.n()),
    "_euclidean_dist": lambda d: (lambda a, b, k: call(p(a, k), p(b, k)))(d.n(), d.n(), d.n()),
    "convolution": convolved,
    "convolution_backward": convolved_back,
    "_convolution": lambda d: convolved(d, False, False, False, False),
    # lookups
    "embedding": lambda d: call(p(d.n(3, 4), d.n()), ints(3, 3)),
    "embedding_renorm": lambda d: call(p(4, d.n()), ints(4, 2), 1.0, 2.0),
    "_embedding_bag _embedding_bag_forward_only": bags,
    "index_select": lambda d: (lambda a: call(p(a, d.n()), 0, d.pick(d.index(a), ints(a, 3))))(d.n()),
    "index": lambda d: selected(d, "mask", "apart"),
    "_unsafe_index": selected,
    "gather": gathered,
    "take_along_dim": looked_up,
    "scatter scatter_add": scattered,
    "scatter_reduce": lambda d: scattered(d, d.pick("sum", "amax")),
    "index_add index_copy": written,
    "index_reduce": lambda d: written(d, d.pick("amax", "amin", "prod", "mean")),
    "index_fill": lambda d: call(p(d.n(3, 4), d.n()), 0, ints(3, 2), 0.5),
    "index_put _index_put_impl _unsafe_index_put": put,
    "masked_fill": lambda d: call(p(3, 2), I(lambda rng: torch.rand(3, 2, generator=rng) > 0.5), 0.5),
    "masked_scatter": lambda d: d.pick(
        lambda: call(p(3, 2), I(lambda rng: torch.rand(3, 2, generator=rng) > 0.5), p(6), unruled=True),
        lambda: call(p(3, 2), torch.tensor([[d.flag(), d.flag()] for _ in range(3)]), p(d.n(6, 8))),
    )(),
    "masked_select": lambda d: call(p(3, 2), torch.tensor([[True, d.flag()], [d.flag(), d.flag()], [False, True]])),
    "put": lambda d: call(p(3, 2), I(lambda rng: torch.randperm(6, generator=rng)[:3]), p(3), unruled=True),
    "sort": ranked,
    "topk": lambda d: ranked(d, 2),
    "msort": lambda d: call(P(d.shape(least=3))),
    "argsort": lambda d: on_dim(d, keep=True),
    "cumsum cumprod logcumsumexp": on_dim,
    "cummax cummin": lambda d: on_dim(d, least=3, outs=d.pick((0,), (0, 1))),
    "diff": lambda d: (lambda s: call(P(s), 1, d.dim(s)))(d.shape(2, 3, least=3)),
    "_fft_r2c": lambda d: on_dim(d, 0, d.flag(), listed=True, keep=True),
    "_fft_c2c": lambda d: (lambda s, k: call(complexes(*s), [k], 0, True, keep=[k]))(
        s := d.shape(1, 2), d.n(0, len(s) - 1)
    ),
    "_fft_c2r": lambda d: call(complexes(d.n(), 3), [1], 0, d.pick(4, 5), keep=(1,)),
    "_pack_padded_sequence": lambda d: call(p(3, 2, d.n()), torch.tensor([3, 2]), False, keep=(0,)),
    "_pad_packed_sequence": lambda d: call(p(5, d.n()), torch.tensor([2, 2, 1]), False, 0.0, 3, keep=(0, 1)),
    # of positions, see test_choices; equal numbers are few
    "eq ne": lambda d: (lambda s: call(Call("argmax", (p(*s), 1)), Call("argmax", (p(*s), 1)), complete=False))(
        d.shape(2, 2)
    ),
    "lt le gt ge": lambda d: d.pick(  # between bounds of all positions nothing is asked of them
        lambda: call(p(*d.shape(2, 2)), d.pick(0.0, p(1))),
        lambda: call(Call("argmax", (p(*d.shape(2, 2)), 1)), d.pick(-1, 9)),
    )(),
    "remainder": lambda d: call(P(d.shape()), d.pick(0.7, 3)),
    "clamp": lambda d: call(P(d.shape()), *d.pick((-9.0, 9.0), (None, 9.0), (-9.0,))),
    "clamp_min": lambda d: call(P(d.shape()), -9.0),
    "clamp_max": lambda d: call(P(d.shape()), 9.0),
    "tril triu": lambda d: call(p(3, 3), d.pick(0, 1, -1)),
    "grid_sampler_2d grid_sampler": lambda d: sampled(d, 2),
    "grid_sampler_3d": lambda d: sampled(d, 3),
    "fake_quantize_per_tensor_affine_cachemask": lambda d: call(P(d.shape()), 0.3, 1, -8, 7, outs=(0,)),
    "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams": lambda d: call(
        P(d.shape()), torch.tensor([0.3]), torch.tensor([1], dtype=torch.int32), torch.tensor([1]), -8, 7, outs=(0,)
    ),
    "histc": lambda d: call(p(d.n(3, 4)), 3, -1.0, 1.0),
    "searchsorted": lambda d: (
        call(p(d.n()), p(*d.shape())) if d.flag() else (lambda n: call(p(n, d.n()), p(n, d.n())))(d.n())
    ),
    "_unique2": lambda d: call(p(d.n(3, 4)), complete=False),
    "unique_dim": lambda d: call(p(d.n(3, 4), 2), 0, complete=False),
    "_ctc_loss": lambda d: (
        lambda n, k: call(P((5, n, k)), ints(k, n, 2), [5] * n, [2] * n, outs=(0,), complete=False)
    )(d.n(2, 3), d.n(3, 4)),
    "linalg_householder_product": lambda d: call(p(d.n(3, 4), 3), p(d.n(2, 3)), complete=False),
    "nonzero": lambda d: call(p(d.n(3, 4)), complete=False),
    # some of those that the tag of pointwise operators covers
    "relu sin exp gelu neg _neg_view": lambda d: call(P(d.shape())),
    "add mul maximum atan2": lambda d: (lambda a, b: call(p(a, b), d.pick(p(b), p(a, 1), p(a, b), p(2, a, b))))(
        d.n(), d.n()
    ),
    "where": lambda d: (lambda a, b: call(Call("gt", (p(a, b), 0.0)), p(b), p(a, 1)))(d.n(), d.n()),
}

CASES: dict[str, Callable[[Draw], Case]] = {name: make for names, make in TABLE.items() for name in names.split()}
