"""The rules run over one traced graph, operator after operator."""

from __future__ import annotations

import operator
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx

from automerge.rules._asked import asked
from automerge.rules._axes import Unruled
from automerge.rules._constants import veils
from automerge.rules._decompose import decomposition
from automerge.rules._engine import Engine
from automerge.rules._exact import entries, in_double, told_apart
from automerge.rules._movement import all_border
from automerge.rules._nodes import (
    choosing_none,
    counted,
    given,
    is_constant,
    is_state,
    lasting,
    liveness,
    python_reads,
    sizing,
    viewed,
)
from automerge.rules._parameters import Splits, parameter, share
from automerge.rules._registry import (
    Context,
    carries,
    distinct_from,
    find_rule,
    operator_name,
    values_in,
)
from automerge.rules._shadows import shadows, single, told_apart_by
from automerge.rules._twins import twins
from automerge.rules._unread import unread
from automerge.rules._value import ConstantValue, Factor, Value, plain

DEBUG = bool(os.environ.get("AUTOMERGEDEBUG"))


@dataclass
class Analysis:
    """What the rules found.

    Attributes:
        engine: its `Axes` hold all vertices and relations.
        statistics: state-dict names of normalisation statistics.
        unruled: operators without a rule, with their place.
        states: state-dict name -> its value, for every float parameter or buffer that the output depends on.
        values: node -> value, for the pictures and for localising a failure.
        united: vertex -> united vertex; filled in by the search, as is ``units``.
        units: for each generator found its united vertices, ``(units, columns)``.
        unread: state-dict name -> which of its entries the traced pass does not read, for those read in part.
        untold: the same of what no output depends on, where python reads values; empty where it reads none.
        asked: the labels of the last values before what python reads (see `asked`), and the places of the reads; "" for
            results that are dropped.
        unseen: the same as ``unread`` of what no value with entries was computed from, as where data chose no rows.
        first: names among ``unread`` of what meets numbers that are no input's, such as a first state.
        sorted: nodes whose rows are in an order that depends on the data: row i is not the same sample in every model.
    """

    engine: Engine
    statistics: set[str] = field(default_factory=set)
    unruled: list[str] = field(default_factory=list)
    states: dict[str, Value] = field(default_factory=dict)
    values: dict[fx.Node, Any] = field(default_factory=dict)
    united: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    units: list[np.ndarray] = field(default_factory=list)
    unread: dict[str, np.ndarray] = field(default_factory=dict)
    unseen: dict[str, np.ndarray] = field(default_factory=dict)
    untold: dict[str, np.ndarray] = field(default_factory=dict)
    asked: list[tuple[np.ndarray, str]] = field(default_factory=list)
    first: set[str] = field(default_factory=set)
    sorted: set[fx.Node] = field(default_factory=set)


def place(node: fx.Node) -> str:
    """Operator, module path and source line of a node."""
    parts = [operator_name(node.target) if node.op == "call_function" else node.name]
    if node.meta.get("module"):
        parts.append(f"in {node.meta['module']}")
    if node.meta.get("source"):
        parts.append(f"at {node.meta['source']}")
    return " ".join(parts)


class Run:
    def __init__(self, graph: fx.GraphModule, splits: Splits, out: Analysis) -> None:
        self.graph, self.splits = graph, splits
        self.engine, self.out = out.engine, out
        self.values: dict[fx.Node, Any] = {}
        self.constant: set[fx.Node] = set()
        self.veiled: set[fx.Node] = set()
        self.single: set[fx.Node] = set()
        self.shadows: dict[fx.Node, Sequence[Any]] = {}
        self.statistics: list[Value] = []
        self.twins = twins(graph.graph)
        self.reads = python_reads(graph)
        self.asked = asked(self.reads)
        self.none = choosing_none(graph)
        self.live, self.used = lasting(graph, self.reads, self.none)
        shaped = [(n, counted(node)) for node in graph.graph.nodes if node not in self.live for n in sizing(node)]
        self.counted = [n for n, alike in shaped if alike]
        if shaped:
            self.reads += [n for n, alike in shaped if not alike]
            self.live, self.used = lasting(graph, self.reads + self.counted, self.none)
        self.seen = lasting(graph, self.reads + self.counted)[0] if self.none else self.live

    def run(self) -> None:
        for node in self.graph.graph.nodes:
            if node not in self.live:
                continue
            self.engine.axes.where = place(node)
            if node.op == "output":
                for value in values_in(self.fetch(node.args)):
                    self.engine.pin_all(value.settle(), "model output")
            else:
                self.visit(node)
        for node in self.reads:
            self.engine.axes.where = place(node)
            for value in values_in([self.read(node)]):
                self.engine.pin_all(value.settle(), "python read its values")
        dropped = self.graph.meta.get("dropped", ())
        for node, end in self.asked.items():
            where = "" if end.name in dropped else place(end)
            for value in values_in([self.values.get(node)]):
                self.out.asked += [(f.labels, where) for f in value.settle().factors]
        for node in self.counted:
            self.engine.axes.where = place(node)
            for value in values_in([self.read(node)]):
                self.engine.reduce(value.settle(), set(value.letters))
        self.out.values.update(self.values)
        axes = self.engine.axes
        for value in self.statistics:
            for f in value.factors:
                family = axes.family(f.labels)
                if family is not None and family.param is not None:
                    self.out.statistics.add(family.param)

    def unread(self, live: Collection[fx.Node]) -> dict[str, np.ndarray | None]:
        """For every parameter that some nodes read, which of its entries they do not; None if they read all."""
        mine = {n.meta["name"] for n in live if n.op == "placeholder" and n.meta["name"] in self.out.states}
        found = unread(self.graph, live, self.constant, self.reads + self.counted, self.out.states)
        self.out.first |= found.first
        return dict.fromkeys(mine) | found.entries

    # ------------------------------------------------------------ leaves
    def visit(self, node: fx.Node) -> None:
        value = node.meta["val"]
        if isinstance(value, torch.Tensor) and value.numel() == 0 and node not in self.none:
            self.values[node] = self.empty(node, value)
        elif node.op == "placeholder":
            if node.meta["kind"] == "input":
                self.values[node] = plain(value.shape, pinned=True)
            elif is_state(value):
                name = node.meta["name"]
                if name not in self.out.states:
                    self.out.states[name] = parameter(self.engine.axes, name, tuple(value.shape), self.splits)
                    share(self.engine, name, self.out.states, self.graph.meta["trace"].overlaps)
                self.values[node] = self.out.states[name]
            else:
                self.constant.add(node)
        elif given(node):
            self.values[node] = plain(value.shape, pinned=True)
        elif is_constant(node, self.constant):
            self.constant.add(node)
            if single(node) or not self.single.isdisjoint(node.all_input_nodes):
                self.single.add(node)
            if not self.veiled.isdisjoint(node.all_input_nodes) or veils(node, self.live, self.engine.several):
                self.veiled.add(node)  # known by its values, but its structure is that of what it was made from
                self.values[node] = _with_data(self.found(node), value)
        else:
            again = self.again(node)
            self.values[node] = self.found(node) if again is None else again
            self.engine.same_choice(self.values.get(self.twins[node]), self.values[node])

    def again(self, node: fx.Node) -> Any:
        """What is known of an earlier node that computes the same; None if there is none, or if it is one of several uses.

        (Pieces and positions promise something until they are used in another way than to be joined again.)
        """
        first = self.twins[node]
        if first is node or first not in self.values or not self.used.get(node, {0}) <= self.used.get(first, {0}):
            return None
        known = self.values[first]
        several = [known] if isinstance(known, Value) else known
        bound = any(v is not None and (v.origin is not None or v.promises or v.obligations) for v in several)
        return None if bound else known

    def empty(self, node: fx.Node, value: torch.Tensor) -> Value:
        """A tensor without entries; a cut of none still shows its other axes, which may be filled up again."""
        args: Any = node.args
        source = self.values.get(args[0]) if node.target is torch.ops.aten.slice.Tensor else None
        if not isinstance(source, Value) or 0 in source.shape:
            return plain(value.shape)
        dim = (args[1] if len(args) > 1 else 0) % value.dim()
        return all_border(self.engine, source, dim, 0)

    # ------------------------------------------------------------ operators
    def fetch(self, args: Any) -> Any:
        return fx.node.map_aggregate(args, lambda a: self.read(a) if isinstance(a, fx.Node) else a)

    def read(self, node: fx.Node) -> Any:
        if node not in self.values:
            self.values[node] = self.constant_value(node)
        return self.values[node]

    def constant_value(self, node: fx.Node) -> Any:
        value = node.meta["val"]
        if not isinstance(value, torch.Tensor):
            return tuple(self._constant_tensor(v) for v in value)
        return self._constant_tensor(value, node)

    def _constant_tensor(self, tensor: torch.Tensor, node: fx.Node | None = None) -> Value:
        if tensor.numel() == 0:
            return plain(tensor.shape)

        def structure(axes: tuple[tuple[int, ...], ...]) -> tuple[list[Factor], set[int]]:
            array = entries(tensor)
            low = tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)
            if low and node is not None and node.op == "call_function":
                array = told_apart(array, lambda: entries(in_double(node, self.constant)))
            if node in self.single and tensor.numel() > 1:
                array = told_apart_by(array, shadows(node, self.single, self.shadows))
            return self.engine.constant_structure(array, axes)

        return ConstantValue(tensor, structure)

    def found(self, node: fx.Node) -> Any:
        """What is known of an operator's result, or of one of several."""
        return self.fetch(node.args[0])[node.args[1]] if node.target is operator.getitem else self.apply(node)

    def apply(self, node: fx.Node) -> Any:
        rule = find_rule(node.target)
        reason = "no rule"
        if rule is not None:
            try:
                return self.checked(node, self.call(rule, node))
            except Unruled as error:
                reason = str(error)
            except Exception as error:  # a rule that fails must not take the model down with it
                if DEBUG:
                    raise
                reason = f"its rule failed: {type(error).__name__}: {error}"
        inner = decomposition(node)
        if inner is not None:
            try:
                return self.decomposed(node, inner)
            except Unruled as error:
                reason = str(error)
        self.out.unruled.append(f"{place(node)} ({reason})" if reason != "no rule" else place(node))
        return self.opaque(node)

    def call(self, rule: Any, node: fx.Node) -> Any:
        used = self.used.get(node, {0})
        context = Context(self.engine, node, used, self.statistics, self.twins.__getitem__)
        args, kwargs = self.fetch(node.args), self.fetch(node.kwargs)
        if carries(node.target):
            return rule(context, *args, **kwargs)
        values = [value.settle() for value in values_in([*args, *kwargs.values()])]
        return distinct_from(values, rule(context, *args, **kwargs))

    def checked(self, node: fx.Node, result: Any) -> Any:
        """A rule's answer must have the shape of what really came out."""
        value = node.meta["val"]
        used = self.used.get(node, {0})
        single = isinstance(value, torch.Tensor)
        pairs = [(result, value)] if single else [(result[i], value[i]) for i in sorted(used)]
        if single and not isinstance(result, Value):
            raise Unruled("its rule gives several values where the operator gives one")
        for claimed, real in pairs:
            if isinstance(claimed, Value) and isinstance(real, torch.Tensor) and claimed.shape != tuple(real.shape):
                raise Unruled(f"its rule gives the shape {claimed.shape} where the operator gave {tuple(real.shape)}")
        return result

    def decomposed(self, node: fx.Node, inner: fx.GraphModule) -> Any:
        """Rule the pieces of an operator in its place."""
        outputs = Sub(self, inner, {}, node.all_input_nodes).result()
        result = outputs[0] if isinstance(node.meta["val"], torch.Tensor) else outputs
        return self.checked(node, result)

    def opaque(self, node: fx.Node) -> Any:
        """Pin what an operator without a rule touches."""
        name = operator_name(node.target)
        behind = [self.read(n) for n in viewed(node)]
        for value in values_in([*self.fetch(list(node.args)), *self.fetch(dict(node.kwargs)).values(), *behind]):
            self.engine.pin_all(value.settle(), f"touched by {name}, which has no rule")
        value = node.meta["val"]
        if isinstance(value, torch.Tensor):
            return plain(value.shape, pinned=True)
        return tuple(plain(v.shape, pinned=True) if isinstance(v, torch.Tensor) else None for v in value)


class Sub(Run):
    """The same run over the graph of a decomposition, sharing everything with its parent."""

    def __init__(
        self, parent: Run, graph: fx.GraphModule, values: dict[fx.Node, Any], sources: Sequence[fx.Node]
    ) -> None:
        self.graph, self.splits = graph, parent.splits
        self.engine, self.out = parent.engine, parent.out
        self.values, self.constant, self.veiled, self.statistics = values, set(), set(), parent.statistics
        self.twins = twins(graph.graph)
        self.single, self.shadows, self.none = set(), {}, choosing_none(graph)
        self.live, self.used = liveness(graph, [])
        placeholders = [n for n in graph.graph.nodes if n.op == "placeholder"]
        for inside, source in zip(placeholders, sources, strict=True):
            if source in parent.constant and source not in parent.veiled:
                self.constant.add(inside)
                inside.meta["val"] = source.meta["val"]
                if source in parent.single:
                    self.single.add(inside)
                    self.shadows[inside] = shadows(source, parent.single, parent.shadows)
            values[inside] = parent.read(source)

    def result(self) -> Any:
        for node in self.graph.graph.nodes:
            if node.op == "output":
                return self.fetch(node.args[0])
            if node.op != "placeholder" and node in self.live:
                self.visit(node)
        raise AssertionError("a graph without an output")


def _with_data(value: Any, tensor: Any) -> Any:
    """What a rule says of a constant, which keeps its entries for the rules that read positions from it."""
    if not isinstance(value, Value):
        return tuple(_with_data(v, t) for v, t in zip(value, tensor, strict=True)) if value is not None else None
    out = value.settle().with_axes(value.axes)
    out.data = tensor
    return out
