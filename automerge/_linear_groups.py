"""Which groups admit any invertible matrix, not permutations only; read off the traced graph.

A group does if every parameter axis of it is the output of a linear map, a convolution, a bias or an embedding (it
*produces* the units), or is contracted with the units (it *consumes* them), and if the values between are only added,
moved, averaged over other axes, multiplied by what is the same for all units, or passed through elementwise functions.
Everything else (normalisation, gates, depthwise kernels, attention scores, heads, whatever is not known) admits
permutations only, with the reason.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from automerge._places import CONTRACTIONS, VIEWS, Survey, data_nodes, operator_of
from automerge.rules import Value
from automerge.rules._value import ConstantValue, Factor
from automerge.symmetry import Symmetry

_MOVES = VIEWS | frozenset(
    [
        "cat",
        "stack",
        "slice",
        "select",
        "split",
        "split_with_sizes",
        "unbind",
        "unsqueeze",
        "squeeze",
        "repeat",
        "flip",
        "roll",
        "_reshape_alias",
        "reshape",
        "contiguous",
        "lift_fresh",
        "narrow",
        "chunk",
        "copy",
        "_to_copy",
        "mean",
        "sum",
        "neg",
        "avg_pool1d",
        "avg_pool2d",
        "avg_pool3d",
        "_adaptive_avg_pool2d",
        "_adaptive_avg_pool3d",
        "adaptive_avg_pool1d",
        "upsample_nearest1d",
        "upsample_nearest2d",
        "upsample_bilinear2d",
    ]
)
_IN_PLACE = frozenset({"clone", "detach", "alias", "contiguous", "lift_fresh", "copy", "_to_copy", "neg"})
_PARTS = VIEWS | frozenset({"slice", "select", "split", "split_with_sizes", "unbind", "narrow", "chunk", "lift_fresh"})
_POOLS = frozenset(["max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices", "amax", "amin"])
_SUMS = frozenset({"add", "sub", "rsub"})
_ELEMENTWISE = frozenset({"dropout", "hardswish", "mish", "relu6", "selu", "celu"})


@dataclass(frozen=True)
class LinearGroup:
    """A generator that admits invertible matrices.

    Attributes:
        roles: for each slot of the generator whether it produces the units; else it consumes them.
        bent: the nodes of the graph that act elementwise on the units and not linearly: T does not commute with them.
            Empty: the function stays exactly the same.
    """

    roles: tuple[bool, ...]
    bent: frozenset[str]


def linear_groups(found: Survey, symmetry: Symmetry) -> tuple[dict[int, LinearGroup], dict[int, str]]:
    """The generators that admit invertible matrices, and for every other one the reason why it admits permutations only.

    Args:
        found: where the generators are seen in the traced graph.
        symmetry: whose generators are meant.

    Examples:
        >>> from torch import nn
        >>> from automerge import infer, trace
        >>> from automerge._places import survey
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 2))
        >>> x = torch.ones(1, 3)
        >>> s = infer(net, x)
        >>> groups, barred = linear_groups(survey(trace(net, x), s), s)
        >>> groups
        {1: LinearGroup(roles=(True, True, False), bent=frozenset({'relu_default'}))}
        >>> barred
        {0: 'native_layer_norm with weights of each unit in 1'}
    """
    walk = _Walk(found, symmetry)
    for node in found.graph.graph.nodes:
        walk.visit(node)
    groups: dict[int, LinearGroup] = {}
    for g, generator in enumerate(symmetry.sets):
        if g in walk.barred:
            continue
        roles = [walk.roles.get((g, s.param, s.axis)) for s in generator.slots]
        if any(len(r or ()) != 1 for r in roles):
            slot = generator.slots[next(i for i, r in enumerate(roles) if len(r or ()) != 1)]
            twice = len(walk.roles.get((g, slot.param, slot.axis)) or ()) > 1
            how = "both produces and consumes its units" if twice else "is no plain producer or consumer of its units"
            walk.barred[g] = f"{slot.param} axis {slot.axis} {how}"
            continue
        groups[g] = LinearGroup(tuple(next(iter(r or ())) for r in roles), frozenset(walk.bent.get(g, ())))
    return groups, dict(sorted(walk.barred.items()))


class _Walk:
    """One pass over the graph for all generators.

    Attributes:
        barred: generator -> why only permutations.
        roles: (generator, parameter, axis) -> the roles seen: True for producing.
        bent: generator -> nodes that bend.
        origin: (node, generator) -> the value of which the node is an elementwise function; products of such functions of
            one value are elementwise, gates are not.
    """

    def __init__(self, found: Survey, symmetry: Symmetry) -> None:
        self.found, self.symmetry = found, symmetry
        self.analysis = found.analysis
        self.united = found.analysis.united
        self.barred: dict[int, str] = {}
        self.roles: dict[tuple[int, str, int], set[bool]] = {}
        self.bent: dict[int, set[str]] = {}
        self.origin: dict[tuple[fx.Node, int], object] = {}
        self.data = set(data_nodes(found.graph))
        self.owner = self._owners()
        self._carried: dict[fx.Node, dict[int, list[Factor]]] = {}

    def _owners(self) -> np.ndarray:
        """United vertex -> the one generator that moves it, or -1; generators that share vertices are barred."""
        owner = np.full(int(self.united.max()) + 1 if self.united.size else 0, -1)
        for g, generator in enumerate(self.symmetry.sets):
            table = self.found.tables.get(g)
            if table is None:
                self.barred[g] = "inference does not find it in this graph"
                continue
            if any(s.within for s in generator.slots):
                self.barred[g] = "it acts inside the units of another group"
            for other in np.unique(owner[table]).tolist():
                if other >= 0:
                    why = "it contains, or is inside, the units of another group"
                    self.barred.setdefault(g, why)
                    self.barred.setdefault(other, why)
            owner[table] = g
        for g in _moved_by_others(
            self.symmetry, [g for g in range(len(self.symmetry.sets)) if g not in self.found.tables]
        ):
            self.barred.setdefault(g, "its units move with modules, or pieces, that are interchangeable")
        return owner

    # ---------------------------------------------------------------- what a node carries
    def carried(self, node: fx.Node) -> dict[int, list[Factor]]:
        """Generator -> the factors of a node's value that it moves."""
        if node in self._carried:
            return self._carried[node]
        held = self.analysis.values.get(node)
        values = [held] if isinstance(held, Value) else [v for v in held or () if isinstance(v, Value)]
        # a constant's structure may be worked out only now, under vertices that no search has seen
        values = [v for v in values if not isinstance(v, ConstantValue)]
        out: dict[int, list[Factor]] = {}
        for value in values:
            for f in value.factors:
                for g in np.unique(self.owner[self.united[f.labels]]).tolist():
                    if g >= 0:
                        out.setdefault(g, []).append(f)
        self._carried[node] = out
        return out

    def axes(self, node: fx.Node, g: int) -> set[int]:
        """The tensor axes of a node's value along which a generator's units lie."""
        value = self.analysis.values.get(node)
        letters = {c for f in self.carried(node).get(g, ()) for c in f.letters}
        return {k for k, axis in enumerate(value.axes) if letters & set(axis)} if isinstance(value, Value) else set()

    # ---------------------------------------------------------------- the walk
    def visit(self, node: fx.Node) -> None:
        """Judge one operator for every generator that it touches."""
        if node.op in ("placeholder", "get_attr", "output") or node not in self.analysis.values:
            return  # the last: nothing depends on it
        touched = set(self.carried(node)) | {g for n in node.all_input_nodes for g in self.carried(n)}
        for g in touched - set(self.barred):
            reason = self._judge(node, g)
            if reason:
                place = f" in {node.meta['module']}" if node.meta.get("module") else ""
                self.barred[g] = f"{reason}{place}"

    def _judge(self, node: fx.Node, g: int) -> str | None:
        """None if the operator leaves room for matrices; else what stands in the way."""
        name = operator_of(node)
        inputs = [n for n in _arguments(node) if g in self.carried(n)]
        if node.target is operator.getitem:
            self._derive(node, g, None)
            return None
        if node not in self.data:
            single = len(node.all_input_nodes) == 1 and len(inputs) == 1
            return None if name in _PARTS and single else f"weights are computed ({name})"
        if name in CONTRACTIONS:
            return self._contraction(node, g, name)
        if name == "embedding":
            return self._embedding(node, g)
        if g not in self.carried(node):
            return name  # its units are summed up, compared or chosen from
        weights = [n for n in inputs if n not in self.data]
        moving = [n for n in inputs if n in self.data]
        if name in _SUMS and weights:
            return self._bias(node, g, weights, moving)
        if weights or not moving:
            return f"{name} with weights of each unit" if weights else name
        return self._between(node, g, name, moving)

    def _between(self, node: fx.Node, g: int, name: str, moving: list[fx.Node]) -> str | None:
        """An operator on activations only."""
        same = {id(self._source(n, g)) for n in moving}
        others: list[Any] = [a for a in node.all_input_nodes if a not in moving] or [
            a for a in node.args[:2] if isinstance(a, int | float)
        ]
        if name in _MOVES:
            self._derive(node, g, moving[0] if name in _IN_PLACE else None)
        elif name in _POOLS:
            self._bend(node, g)
        elif name in _SUMS and len(moving) > 1:
            self._derive(node, g, moving[0] if len(same) == 1 else None)
        elif len(moving) == 1 and (name == "mul" or (name == "div" and moving[0] is node.args[0])):
            self._derive(node, g, moving[0])
        elif self._pointwise(node, name) and (len(moving) == 1 or (len(same) == 1 and not others)):
            self._bend(node, g, moving[0])
        else:
            return f"{name} of several values" if len(moving) > 1 else name
        return None

    def _pointwise(self, node: fx.Node, name: str) -> bool:
        return name in _ELEMENTWISE or torch.Tag.pointwise in getattr(node.target, "tags", ())

    def _contraction(self, node: fx.Node, g: int, name: str) -> str | None:
        """A linear map or convolution, or a product of activations."""
        bias, left, right = _operands(node, name)
        if bias is not None and g in self.carried(bias):
            if bias in self.data or (name == "convolution" and bias is not node.args[2]):
                return f"{name} adds activations"
            self._note(bias, g, produces=True)
        if name == "convolution" and (node.args[8] != 1 or not _plain_input(self, left, g)):
            return "grouped or depthwise convolution"
        if name in ("bmm", "baddbmm", "_grouped_mm"):
            batched = [n for n in (left, right) if 0 in self.axes(n, g)]
            if len(batched) > 1 or any(n not in self.data for n in batched):
                return f"{name} with weights of each unit"
        inner = _inner_axes(node, name)
        sums = [bool(self.axes(n, g) & {k}) for n, k in zip((left, right), inner, strict=True)]
        for n, k in zip((left, right), inner, strict=True):
            if n not in self.data:
                self._weight(n, g, k)
            elif self.axes(n, g) - {k} and len(self.axes(n, g)) > 1:
                return f"{name} of one group with itself"
        if sums[0] != sums[1]:
            return f"{name} sums over its units with weights that are not its own"
        if sums[0] and left in self.data and right in self.data:
            return f"{name} of activations with activations"
        if g in self.carried(node):
            self.origin[node, g] = node
            if bias is not None and g not in self.carried(bias):
                self.bent.setdefault(g, set()).add(node.name)  # the same is added to all its units
        return None

    def _weight(self, node: fx.Node, g: int, inner: int) -> None:
        """Note the roles of a weight's axes: the one summed over consumes, others produce."""
        value = self.analysis.values.get(node)
        assert isinstance(value, Value)
        for f in self.carried(node).get(g, ()):
            on = {k for k, axis in enumerate(value.axes) if set(f.letters) & set(axis)}
            self._note_factor(f, g, produces=on != {inner} if len(on) == 1 else None)

    def _bias(self, node: fx.Node, g: int, weights: list[fx.Node], moving: list[fx.Node]) -> str | None:
        """The sum of activations and a bias (or a table of positions)."""
        if not moving:
            return "weights are added to what is the same for all units"
        for n in weights:
            self._note(n, g, produces=True)
        self.origin[node, g] = node
        return None

    def _embedding(self, node: fx.Node, g: int) -> str | None:
        table = node.args[0]
        assert isinstance(table, fx.Node)
        if table in self.data or self.axes(table, g) != {1}:
            return "embedding"
        self._note(table, g, produces=True)
        self.origin[node, g] = node
        return None

    # ---------------------------------------------------------------- notes
    def _note(self, node: fx.Node, g: int, *, produces: bool) -> None:
        for f in self.carried(node).get(g, ()):
            self._note_factor(f, g, produces)

    def _note_factor(self, factor: Factor, g: int, produces: bool | None) -> None:
        family = self.analysis.engine.axes.family(factor.labels)
        if family is None or family.param is None or produces is None:
            self.barred[g] = "its weights are used in a way that is not a plain linear map"
            return
        self.roles.setdefault((g, family.param, family.axis), set()).add(produces)

    def _derive(self, node: fx.Node, g: int, source: fx.Node | None) -> None:
        self.origin[node, g] = node if source is None else self._source(source, g)

    def _bend(self, node: fx.Node, g: int, source: fx.Node | None = None) -> None:
        self.bent.setdefault(g, set()).add(node.name)
        self._derive(node, g, source)

    def _source(self, node: fx.Node, g: int) -> object:
        return self.origin.get((node, g), node)


def _arguments(node: fx.Node) -> list[fx.Node]:
    """The nodes among an operator's arguments, as often as they stand there."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), lambda n: found.append(n) or n)  # type: ignore[func-returns-value]
    return found


def _operands(node: fx.Node, name: str) -> tuple[Any, Any, Any]:
    """What is added, and the two factors of a contraction."""
    args = list(node.args)
    if name in ("addmm", "baddbmm", "addmv"):
        return args[0], args[1], args[2]
    if name in ("convolution", "linear"):
        return args[2] if len(args) > 2 else None, args[0], args[1]
    return None, args[0], args[1]


def _moved_by_others(symmetry: Symmetry, unseen: Sequence[int]) -> set[int]:
    """The generators that do not commute with exchanges of modules, or with generators that the traced graph does not show."""
    taken: dict[tuple[str, int], list[np.ndarray]] = {}
    slots = [s for e in symmetry.exchanges for s in e.slots] + [s for g in unseen for s in symmetry.sets[g].slots]
    for slot in slots:
        taken.setdefault((slot.param, slot.axis), []).append(slot.index.reshape(-1))
    columns = [column for e in symmetry.exchanges for column in zip(*e.params, strict=True)]
    out = set()
    for g, generator in enumerate(symmetry.sets):
        own: dict[str, set[tuple[int, bytes]]] = {}
        for slot in generator.slots:
            own.setdefault(slot.param, set()).add((slot.axis, slot.index.tobytes()))
            if any(np.isin(slot.index, at).any() for at in taken.get((slot.param, slot.axis), ())):
                out.add(g)
        if any(own.get(n) != own.get(column[0]) for column in columns for n in column):
            out.add(g)
    return out - set(unseen)


def _inner_axes(node: fx.Node, name: str) -> tuple[int, int]:
    """The axes of the two factors that are summed over."""
    if name == "convolution":
        return 1, 0 if node.args[6] else 1
    if name == "linear":
        _, left, right = _operands(node, name)
        return left.meta["val"].ndim - 1, right.meta["val"].ndim - 1
    _, left, right = _operands(node, name)
    wide, narrow = left.meta["val"].ndim, right.meta["val"].ndim
    return wide - 1, max(narrow - 2, 0)


def _plain_input(walk: _Walk, node: fx.Node, g: int) -> bool:
    return node not in walk.data or walk.axes(node, g) <= {1}


def summary(groups: Mapping[int, LinearGroup], barred: Mapping[int, str], symmetry: Symmetry) -> dict[str, Any]:
    """Plain data for a report: the groups with matrices, and why the others have permutations."""

    def name(g: int) -> str:
        return symmetry.sets[g].name or str(g)

    return {
        "linear_groups": [name(g) for g in groups],
        "permuted_groups": {f"{g} {name(g)}": reason for g, reason in barred.items()},
    }
