"""Symmetries written by hand, for tests of everything that needs no inference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch

from automerge.symmetry import Generator, Slot, Symmetry


def units(n: int, k: int = 1, start: int = 0) -> np.ndarray:
    """Unit u owns k consecutive positions from ``start``."""
    return start + np.arange(n * k).reshape(n, k)


def mlp(sizes: Sequence[int] = (5, 7, 6, 3)) -> Symmetry:
    """Linear layers with biases; every hidden layer is free."""
    shapes: dict[str, tuple[int, ...]] = {}
    for i, (a, b) in enumerate(pairwise(sizes)):
        shapes |= {f"{i}.weight": (b, a), f"{i}.bias": (b,)}
    sets = [
        Generator(
            n,
            (
                Slot(f"{i}.weight", 0, units(n)),
                Slot(f"{i}.bias", 0, units(n)),
                Slot(f"{i + 1}.weight", 1, units(n)),
            ),
        )
        for i, n in enumerate(sizes[1:-1])
    ]
    return Symmetry(shapes, tuple(sets))


def residual(width: int = 8, depth: int = 2, tied: bool = True) -> Symmetry:
    """A residual stream with square weights (``tied``) or two-layer branches; a statistic moves along."""
    shapes: dict[str, tuple[int, ...]] = {"in.weight": (width, 4), "out.weight": (3, width), "norm.mean": (width,)}
    stream = [
        Slot("in.weight", 0, units(width)),
        Slot("out.weight", 1, units(width)),
        Slot("norm.mean", 0, units(width)),
    ]
    sets = []
    for i in range(depth):
        if tied:
            shapes[f"{i}.weight"] = (width, width)
            stream += [Slot(f"{i}.weight", 0, units(width)), Slot(f"{i}.weight", 1, units(width))]
        else:
            hidden = width + 2
            shapes |= {f"{i}.up": (hidden, width), f"{i}.down": (width, hidden)}
            stream += [Slot(f"{i}.up", 1, units(width)), Slot(f"{i}.down", 0, units(width))]
            sets.append(Generator(hidden, (Slot(f"{i}.up", 0, units(hidden)), Slot(f"{i}.down", 1, units(hidden)))))
    return Symmetry(shapes, (*sets, Generator(width, tuple(stream))), statistics=frozenset({"norm.mean"}))


def conv_flatten(channels: int = 4, pixels: int = 6, other: int = 3) -> Symmetry:
    """A convolution, flattened into a linear layer whose input is the concatenation with a pinned part."""
    shapes = {"conv.weight": (channels, 2, 3, 3), "conv.bias": (channels,), "fc.weight": (5, channels * pixels + other)}
    slots = (
        Slot("conv.weight", 0, units(channels)),
        Slot("conv.bias", 0, units(channels)),
        Slot("fc.weight", 1, units(channels, pixels, start=other)),
    )
    return Symmetry(shapes, (Generator(channels, slots),))


def heads(h: int = 3, d: int = 2, width: int = 5) -> Symmetry:
    """Self-attention with a fused qkv projection, a scalar per head, and a residual stream."""
    w = h * d
    shapes = {"qkv.weight": (3 * w, width), "qkv.bias": (3 * w,), "proj.weight": (width, w), "temperature": (h,)}
    shapes |= {"in.weight": (width, 4), "out.weight": (2, width)}
    sets = []
    for i in range(h):
        qk = [(units(d, 1, i * d)), (units(d, 1, w + i * d))]
        qk_slots = [Slot(p, 0, np.concatenate(qk, 1)) for p in ("qkv.weight", "qkv.bias")]
        v = units(d, 1, 2 * w + i * d)
        v_slots = [Slot("qkv.weight", 0, v), Slot("qkv.bias", 0, v), Slot("proj.weight", 1, units(d, 1, i * d))]
        sets += [Generator(d, tuple(qk_slots)), Generator(d, tuple(v_slots))]
    both = np.concatenate([units(h, d), units(h, d, w), units(h, d, 2 * w)], 1)
    outer = [Slot("qkv.weight", 0, both), Slot("qkv.bias", 0, both), Slot("proj.weight", 1, units(h, d))]
    sets.append(Generator(h, (*outer, Slot("temperature", 0, units(h)))))
    stream = [("qkv.weight", 1), ("proj.weight", 0), ("in.weight", 0), ("out.weight", 1)]
    sets.append(Generator(width, tuple(Slot(p, a, units(width)) for p, a in stream)))
    return Symmetry(shapes, tuple(sets))


def grouped_query(kv: int = 2, reps: int = 3, d: int = 3, width: int = 4) -> Symmetry:
    """Grouped-query attention: in every kv head the query heads and the dimensions permute, both on the q rows."""
    shapes = {"q": (kv * reps * d, width), "k": (kv * d, width), "v": (kv * d, width), "o": (width, kv * reps * d)}
    sets = []
    for i in range(kv):
        grid = i * reps * d + np.arange(reps * d).reshape(reps, d)
        sets.append(Generator(d, (Slot("q", 0, grid.T.copy()), Slot("k", 0, units(d, 1, i * d)))))
        sets.append(Generator(d, (Slot("o", 1, grid.T.copy()), Slot("v", 0, units(d, 1, i * d)))))
        sets.append(Generator(reps, (Slot("q", 0, grid), Slot("o", 1, grid))))
    outer = (Slot("q", 0, units(kv, reps * d)), Slot("o", 1, units(kv, reps * d)))
    sets.append(Generator(kv, (*outer, Slot("k", 0, units(kv, d)), Slot("v", 0, units(kv, d)))))
    return Symmetry(shapes, tuple(sets))


def grouped_conv(groups: int = 3, o: int = 2, i: int = 4) -> Symmetry:
    """Two convolutions around a grouped one: the kernel's input axis is confined to its group's rows."""
    shapes = {
        "a.weight": (groups * i, 3, 1, 1),
        "b.weight": (groups * o, i, 3, 3),
        "b.bias": (groups * o,),
        "c.weight": (2, groups * o, 1, 1),
    }
    sets = []
    for g in range(groups):
        rows = (0, g * o, (g + 1) * o)
        sets.append(Generator(i, (Slot("a.weight", 0, units(i, 1, g * i)), Slot("b.weight", 1, units(i), (rows,)))))
        out = units(o, 1, g * o)
        sets.append(Generator(o, tuple(Slot(p, a, out) for p, a in [("b.weight", 0), ("b.bias", 0), ("c.weight", 1)])))
    outer = [Slot(p, a, units(groups, o)) for p, a in [("b.weight", 0), ("b.bias", 0), ("c.weight", 1)]]
    sets.append(Generator(groups, (Slot("a.weight", 0, units(groups, i)), *outer)))
    return Symmetry(shapes, tuple(sets))


def experts(n: int = 3, hidden: int = 4, width: int = 5) -> Symmetry:
    """A mixture of experts with batched weights, in a residual stream."""
    shapes = {
        "up": (n, hidden, width),
        "down": (n, width, hidden),
        "router": (n, width),
        "in": (width, 3),
        "out": (2, width),
    }
    sets = []
    for e in range(n):
        slots = (Slot("up", 1, units(hidden), ((0, e, e + 1),)), Slot("down", 2, units(hidden), ((0, e, e + 1),)))
        sets.append(Generator(hidden, slots))
    sets.append(Generator(n, tuple(Slot(p, 0, units(n)) for p in ("up", "down", "router"))))
    stream = [("up", 2), ("down", 1), ("router", 1), ("in", 0), ("out", 1)]
    sets.append(Generator(width, tuple(Slot(p, a, units(width)) for p, a in stream)))
    return Symmetry(shapes, tuple(sets))


def batched(n: int = 2, a: int = 3, b: int = 2) -> Symmetry:
    """Batched weights whose last two axes both depend on the batch: a block-diagonal embedding."""
    shapes = {"x": (n, a, 2), "y": (n, b, a), "z": (n, 2, b)}
    sets = []
    for e in range(n):
        one = ((0, e, e + 1),)
        sets.append(Generator(a, (Slot("x", 1, units(a), one), Slot("y", 2, units(a), one))))
        sets.append(Generator(b, (Slot("y", 1, units(b), one), Slot("z", 2, units(b), one))))
    sets.append(Generator(n, tuple(Slot(p, 0, units(n)) for p in ("x", "y", "z"))))
    return Symmetry(shapes, tuple(sets))


def outer_product(a: int = 3, b: int = 4) -> Symmetry:
    """The flattened product of two hidden layers: one axis with two independent groups."""
    shapes = {"a": (a, 3), "b": (b, 3), "c": (2, a * b)}
    grid = np.arange(a * b).reshape(a, b)
    sets = (
        Generator(a, (Slot("a", 0, units(a)), Slot("c", 1, grid))),
        Generator(b, (Slot("b", 0, units(b)), Slot("c", 1, grid.T.copy()))),
    )
    return Symmetry(shapes, sets)


def outer_square(n: int = 4, k: int = 2) -> Symmetry:
    """Layers whose units are the pairs of another layer's, k of each, beside one that is pinned; and a square weight."""
    shapes = {"a": (n, 3), "pairs": (1 + n * n * k, 5), "bias": (1 + n * n * k,), "square": (n, n), "b": (2, n)}
    grid = 1 + np.arange(n * n * k).reshape(n, n, k)
    first, second = grid.reshape(n, -1), grid.transpose(1, 0, 2).reshape(n, -1)
    slots = [Slot(p, 0, index) for p in ("pairs", "bias") for index in (first, second)]
    plain = [("a", 0), ("square", 0), ("square", 1), ("b", 1)]
    return Symmetry(shapes, (Generator(n, (*slots, *(Slot(p, axis, units(n)) for p, axis in plain))),))


def cube(n: int = 4, m: int = 3, k: int = 3) -> Symmetry:
    """One tensor with three moving axes, and one vector per axis."""
    shapes = {"w": (n, m, 2, k), "a": (n, 3), "b": (m, 3), "c": (k, 3)}
    sets = [
        Generator(size, (Slot("w", axis, units(size)), Slot(name, 0, units(size))))
        for size, axis, name in ((n, 0, "a"), (m, 1, "b"), (k, 3, "c"))
    ]
    return Symmetry(shapes, tuple(sets))


def towers(n: int = 2, m: int = 2, k: int = 3) -> Symmetry:
    """Three levels: towers of blocks of units."""
    shapes = {"w": (n * m * k, 4), "v": (2, n * m * k), "s": (n * m,), "r": (n,)}
    both = (("w", 0), ("v", 1))
    sets = [
        Generator(k, tuple(Slot(p, a, units(k, 1, (i * m + j) * k)) for p, a in both))
        for i in range(n)
        for j in range(m)
    ]
    sets += [
        Generator(m, (*(Slot(p, a, units(m, k, i * m * k)) for p, a in both), Slot("s", 0, units(m, 1, i * m))))
        for i in range(n)
    ]
    top = (*(Slot(p, a, units(n, m * k)) for p, a in both), Slot("s", 0, units(n, m)), Slot("r", 0, units(n)))
    return Symmetry(shapes, (*sets, Generator(n, top)))


def mixtures(m: int = 2, n: int = 3, hidden: int = 4, width: int = 5) -> Symmetry:
    """An ensemble of mixtures of experts, stacked: a stream of every member's own meets all of its experts."""
    shapes = {
        "up": (m * n, hidden, width),
        "down": (m * n, width, hidden),
        "router": (m, n, width),
        "in": (m, width, 3),
    }
    sets = []
    for i in range(m):
        own = (0, i * n, (i + 1) * n)
        for e in range(i * n, (i + 1) * n):
            one = (0, e, e + 1)
            sets.append(
                Generator(hidden, (Slot("up", 1, units(hidden), (one,)), Slot("down", 2, units(hidden), (one,))))
            )
        here = (0, i, i + 1)
        stream = (Slot("up", 2, units(width), (own,)), Slot("router", 2, units(width), (here,)))
        sets.append(Generator(width, (*stream, Slot("in", 1, units(width), (here,)))))
        sets.append(Generator(width, (Slot("down", 1, units(width), (own,)),)))
        rows = [Slot(p, 0, units(n, 1, i * n)) for p in ("up", "down")]
        sets.append(Generator(n, (*rows, Slot("router", 1, units(n), (here,)))))
    whole = (*(Slot(p, 0, units(m, n)) for p in ("up", "down")), Slot("router", 0, units(m)), Slot("in", 0, units(m)))
    return Symmetry(shapes, (*sets, Generator(m, whole)))


ALL: dict[str, Callable[[], Symmetry]] = {
    "mlp": mlp,
    "residual": residual,
    "branches": lambda: residual(tied=False),
    "conv_flatten": conv_flatten,
    "heads": heads,
    "grouped_query": grouped_query,
    "grouped_conv": grouped_conv,
    "experts": experts,
    "batched": batched,
    "outer_product": outer_product,
    "outer_square": outer_square,
    "cube": cube,
    "towers": towers,
    "mixtures": mixtures,
}


def weights(symmetry: Symmetry, seed: int, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Continuous random values for every parameter."""
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for n, s in symmetry.shapes.items()}


def planted(
    symmetry: Symmetry, seed: int, count: int, dtype: torch.dtype = torch.float64
) -> list[dict[str, torch.Tensor]]:
    """Copies of one random network, each moved by a random group element."""
    base = weights(symmetry, seed, dtype)
    rng = np.random.default_rng(seed)
    return [symmetry.apply(base, symmetry.random_element(rng)) for _ in range(count)]
