"""A network of one operator: parameters feed it, and each axis of its output is read out in one of three ways.

The graph is written by hand, so that operators that the dispatcher would take apart first meet their own rules, too.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from sympy.combinatorics import Permutation, PermutationGroup
from torch import fx, nn

from automerge import Symmetry
from automerge._derive import infer_graph
from automerge.testing._witness import difference, permuted
from automerge.trace import TraceInfo

aten = torch.ops.aten
MOST_MOVES = 120


@dataclass(frozen=True)
class P:
    """A parameter: ``how`` is ``"normal"``, ``"positive"`` or ``"small"`` (inside (-1, 1))."""

    shape: tuple[int, ...]
    how: str = "normal"

    def draw(self, rng: torch.Generator) -> torch.Tensor:
        x = torch.randn(self.shape, generator=rng, dtype=torch.float64)
        return {"normal": x, "positive": x.abs() + 0.5, "small": 0.9 * torch.tanh(x)}[self.how]


def p(*shape: int, how: str = "normal") -> P:
    return P(shape, how)


@dataclass(frozen=True)
class I:  # noqa: E742
    """An input: drawn anew for every comparison, so that only what holds for all inputs counts."""

    make: Callable[[torch.Generator], torch.Tensor]


def ints(high: int, *shape: int) -> I:
    """Random positions."""
    return I(lambda rng: torch.randint(high, shape, generator=rng))


@dataclass(frozen=True)
class Call:
    """An operator's result as an operand."""

    name: str
    args: tuple[Any, ...]


@dataclass
class Case:
    """One use of an operator.

    Attributes:
        args: P for parameters, I for inputs, tensors for constants, Call for results of other operators.
        kwargs: keyword arguments.
        keep: output axes that are returned as they are, because reading them out symmetrically would make symmetries that
            no rule about axes can know (reflections of a convolution, sums over all ranks).
        outs: which outputs to read.
        tied: output axes that are not summed over: their order is one for all parts of the output, by design (cat).
        plus: add a parameter of the output's shape, where the operator itself makes a constant.
        complete: False where more is free than the rule says, and that is accepted.
        unruled: the operator may go without a rule: what it touches is pinned, and it is listed.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    keep: tuple[int, ...] = ()
    outs: tuple[int, ...] = (0,)
    tied: tuple[int, ...] = ()
    plus: bool = False
    complete: bool = True
    unruled: bool = False


OPTIONS = ("keep", "outs", "tied", "plus", "complete", "unruled")


def call(*args: Any, **kwargs: Any) -> Case:
    """A case; keyword arguments that are no options of it are the operator's."""
    options = {k: kwargs.pop(k) for k in OPTIONS if k in kwargs}
    options |= {k: tuple(options[k]) for k in ("keep", "outs", "tied") if k in options}
    return Case(args, kwargs, **options)


class Sketch:
    """An fx graph with example values, as `automerge.trace` makes it."""

    def __init__(self, seed: int) -> None:
        self.graph, self.root = fx.Graph(), nn.Module()
        self.rng = torch.Generator().manual_seed(seed)
        self.leaves: dict[int, fx.Node] = {}
        self.drawn: list[P | I] = []
        self.names: list[str] = []

    def leaf(self, what: P | I) -> fx.Node:
        """The placeholder of a parameter or input; the same object is the same tensor."""
        if id(what) not in self.leaves:
            name = f"p{len(self.drawn)}"
            node = self.graph.placeholder(name)
            value = what.draw(self.rng) if isinstance(what, P) else what.make(self.rng)
            kind = "state" if isinstance(what, P) else "input"
            node.meta.update(val=value, kind=kind, name=name, module="", source="")
            self.leaves[id(what)] = node
            self.drawn.append(what)
            self.names.append(name)
        return self.leaves[id(what)]

    def operand(self, a: Any) -> Any:
        if isinstance(a, P | I):
            return self.leaf(a)
        if isinstance(a, Call):
            return self.call(a.name, *a.args)
        if isinstance(a, torch.Tensor):
            name = f"c{len(list(self.root.buffers()))}"
            self.root.register_buffer(name, a)
            node = self.graph.get_attr(name)
            node.meta.update(val=a, module="", source="")
            return node
        if isinstance(a, list):
            return [self.operand(b) for b in a]
        return a

    def call(self, name: str, *args: Any, **kwargs: Any) -> fx.Node:
        """Append one operator."""
        nodes, keys = [self.operand(a) for a in args], {k: self.operand(v) for k, v in kwargs.items()}
        values = fx.node.map_arg(nodes, lambda n: n.meta["val"])
        keyed = fx.node.map_arg(keys, lambda n: n.meta["val"])
        overload = torch._C._jit_resolve_packet(f"aten::{name}", *values, **keyed)
        target = getattr(getattr(aten, name), overload)
        node = self.graph.call_function(target, tuple(nodes), keys)
        node.meta.update(val=target(*values, **keyed), module="", source="")
        return node

    def item(self, node: fx.Node, i: int) -> fx.Node:
        out = self.graph.call_function(operator.getitem, (node, i))
        out.meta.update(val=node.meta["val"][i], module="", source="")
        return out


class OneOperator:
    """The network of one case.

    Args:
        name: the operator.
        case: its operands.
        mode: says how to read out an axis: ``"out"`` (returned), ``"sum"``, or ``"read"`` (by a parameter).
        seed: of the example values.
    """

    def __init__(self, name: str, case: Case, mode: Callable[[], str], seed: int) -> None:
        sketch = Sketch(seed)
        with torch.no_grad():
            result = sketch.call(name, *case.args, **case.kwargs)
            single = isinstance(result.meta["val"], torch.Tensor)
            outs = [result] if single else [sketch.item(result, i) for i in case.outs]
            ends = [self._read_out(sketch, out, case, mode) for out in outs]
        placeholders = [n for n in sketch.graph.nodes if n.op == "placeholder"]
        for node in reversed(placeholders[:]):
            first = next(iter(sketch.graph.nodes))
            if node is not first:
                first.prepend(node)
        sketch.graph.output(tuple(ends))
        self.module = fx.GraphModule(sketch.root, sketch.graph)
        self.module.meta["trace"] = TraceInfo()
        self.leaves = dict(zip(sketch.names, sketch.drawn, strict=True))
        self.order = [n.meta["name"] for n in placeholders]
        self.symmetry, self.analysis = infer_graph(self.module)

    @staticmethod
    def _read_out(sketch: Sketch, node: fx.Node, case: Case, mode: Callable[[], str]) -> fx.Node:
        value = node.meta["val"]
        if value.is_complex():
            node = sketch.call("view_as_real", sketch_resolved(sketch, node))
        elif not value.is_floating_point():
            node = sketch.call("_to_copy", node, dtype=torch.float64)
        if case.plus:
            node = sketch.call("add", node, P(tuple(node.meta["val"].shape)))
        node = sketch.call("exp", sketch.call("sin", node))
        shape = tuple(node.meta["val"].shape)
        keep = {k % len(shape) for k in case.keep} | ({len(shape) - 1} if value.is_complex() else set())
        tied = {k % len(shape) for k in case.tied}
        gone = []
        for axis in range(len(shape)):
            how = "out" if axis in keep else mode()
            if how == "read" or (how == "sum" and axis in tied):
                node = sketch.call("mul", node, P((shape[axis], *(1,) * (len(shape) - axis - 1))))
            if how != "out":
                gone.append(axis)
        return sketch.call("sum", node, gone) if gone else node

    # ------------------------------------------------------------ values
    def values(self, rng: torch.Generator) -> dict[str, torch.Tensor]:
        """Random parameters and inputs."""
        return {n: a.draw(rng) if isinstance(a, P) else a.make(rng) for n, a in self.leaves.items()}

    @torch.no_grad()
    def run(self, values: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        return list(self.module(*(values[n] for n in self.order)))

    # ------------------------------------------------------------ (a) soundness
    def unsound(self, trials: int = 2) -> str | None:
        """A generator that changes the output, or None."""
        rng = torch.Generator().manual_seed(7)
        for _ in range(trials):
            values = self.values(rng)
            before = self.run(values)
            for g in self.symmetry.generators():
                for perm in (np.roll(np.arange(g.size), 1), np.array([1, 0, *range(2, g.size)])):
                    error = difference(before, self.run(permuted(values, g, perm)))
                    if not error < 1e-10:
                        slots = [(s.param, s.axis, s.index.tolist(), s.within) for s in g.slots]
                        return f"permuting the units of {slots} by {perm} changes the output by {error:.1e}"
        return None

    # ------------------------------------------------------------ (b) completeness
    def moves(self, seed: int) -> Iterator[dict[tuple[str, int], np.ndarray]]:
        """Involutions of axes, alone and together: all where they are few, else those of equal axes and a sample."""
        live = {n: a.shape for n, a in self.leaves.items() if isinstance(a, P) and n in self.analysis.states}
        axes = [(n, k) for n, shape in live.items() for k, m in enumerate(shape) if m > 1]
        options = {(n, k): involutions(live[n][k]) for n, k in axes}
        if np.prod([float(len(o) + 1) for o in options.values()]) <= MOST_MOVES:
            for choice in itertools.product(*([None, *o] for o in options.values())):
                made = {a: m for a, m in zip(axes, choice, strict=True) if m is not None}
                if made:
                    yield made
            return
        equal: list[dict[tuple[str, int], np.ndarray]] = []
        for length in sorted({live[n][k] for n, k in axes}):
            mine = [a for a in axes if live[a[0]][a[1]] == length]
            for count in range(1, len(mine) + 1):
                for chosen in itertools.combinations(mine, count):
                    equal += [dict.fromkeys(chosen, m) for m in involutions(length)]
        rng = np.random.default_rng(seed)
        for i in rng.permutation(len(equal))[: MOST_MOVES // 2]:
            yield equal[int(i)]
        for _ in range(MOST_MOVES // 2):
            chosen_axes = rng.choice(len(axes), size=min(len(axes), int(rng.integers(1, 4))), replace=False)
            yield {axes[i]: options[axes[i]][int(rng.integers(len(options[axes[i]])))] for i in chosen_axes}

    def silent(self) -> dict[tuple[str, int], np.ndarray]:
        """For each parameter axis with positions that the output does not depend on: which ones, by putting NaN there."""
        values = self.values(torch.Generator().manual_seed(5))
        before = self.run(values)
        out = {}
        for name, leaf in self.leaves.items():
            if not isinstance(leaf, P) or name not in self.analysis.states:
                continue
            for axis, length in enumerate(leaf.shape):
                mask = np.zeros(length, bool)
                for k in range(length):
                    spoiled = values[name].clone()
                    spoiled.select(axis, k).fill_(float("nan"))
                    with contextlib.suppress(RuntimeError):  # an operator that refuses NaN reads it
                        mask[k] = difference(before, self.run({**values, name: spoiled})) == 0
                if mask.any():
                    out[name, axis] = mask
        return out

    def missing(self, seed: int = 0, trials: int = 40) -> str | None:
        """A move that changes nothing and is not in the group, or None."""
        rng = torch.Generator().manual_seed(11)
        sets: list[tuple[dict[str, torch.Tensor], list[torch.Tensor]]] = []

        def changes(trial: int, move: dict[tuple[str, int], np.ndarray]) -> bool:
            if trial == len(sets):
                values = self.values(rng)
                sets.append((values, self.run(values)))
            values, before = sets[trial]
            return not difference(before, self.run(moved(values, move))) < 1e-9

        group: Flat | None = None
        silent = self.silent()
        for move in self.moves(seed):
            if any((m[silent[a]] != np.flatnonzero(silent[a])).any() for a, m in move.items() if a in silent):
                continue  # what is not read at all stays, by design
            if any(changes(trial, move) for trial in range(3)):
                continue
            group = group or Flat(self.symmetry)
            if not group.contains(move) and not any(changes(trial, move) for trial in range(3, trials)):
                shown = {f"{n}[{k}]": m.tolist() for (n, k), m in move.items()}
                return f"moving {shown} changes nothing, but is not in the group {describe(self.symmetry)}"
        return None


def sketch_resolved(sketch: Sketch, node: fx.Node) -> fx.Node:
    """A complex node without a lazy conjugation, which ``view_as_real`` refuses."""
    return sketch.call("conj_physical", sketch.call("conj_physical", node)) if node.meta["val"].is_conj() else node


def describe(symmetry: Symmetry) -> list[Any]:
    return [[(s.param, s.axis, s.index.tolist(), s.within) for s in g.slots] for g in symmetry.generators()]


def involutions(n: int) -> list[np.ndarray]:
    """Exchanges of two positions, the flip, and exchanges of blocks or of positions in all blocks."""
    made: dict[bytes, np.ndarray] = {}

    def add(order: np.ndarray) -> None:
        order = np.ascontiguousarray(order).reshape(-1)
        if not np.array_equal(order, np.arange(n)):
            made.setdefault(order.tobytes(), order)

    for i, j in itertools.combinations(range(n), 2):
        line = np.arange(n)
        line[[i, j]] = j, i
        add(line)
    add(np.arange(n)[::-1])
    for a in range(2, n):
        if n % a == 0:
            grid = np.arange(n).reshape(a, n // a)
            for i, j in itertools.combinations(range(a), 2):
                rows = np.arange(a)
                rows[[i, j]] = j, i
                add(grid[rows])
            for i, j in itertools.combinations(range(n // a), 2):
                columns = np.arange(n // a)
                columns[[i, j]] = j, i
                add(grid[:, columns])
    return list(made.values())


def moved(values: dict[str, torch.Tensor], move: dict[tuple[str, int], np.ndarray]) -> dict[str, torch.Tensor]:
    out = dict(values)
    for (name, axis), order in move.items():
        out[name] = out[name].index_select(axis, torch.from_numpy(order))
    return out


class Flat:
    """The group as permutations of all entries of all parameters."""

    def __init__(self, symmetry: Symmetry) -> None:
        start = 0
        self.places: dict[str, torch.Tensor] = {}
        for name, shape in symmetry.shapes.items():
            size = int(np.prod(shape))
            self.places[name] = torch.arange(start, start + size).reshape(shape)
            start += size
        generators = []
        for g in symmetry.generators():
            for u in range(1, g.size):
                swap = np.arange(g.size)
                swap[[0, u]] = u, 0
                generators.append(self._permutation(permuted(self.places, g, swap)))
        self.group = PermutationGroup(generators or [Permutation(max(start, 1) - 1)])

    def contains(self, move: dict[tuple[str, int], np.ndarray]) -> bool:
        return self.group.contains(self._permutation(moved(self.places, move)))

    def _permutation(self, places: dict[str, torch.Tensor]) -> Permutation:
        return Permutation(torch.cat([v.reshape(-1) for v in places.values()]).tolist())
