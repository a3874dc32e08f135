"""Rows sorted by a choice, so that every expert works on one run of them: read as what that stands for.

Tokens are sorted by the number of their expert, a grouped product multiplies each run by that expert's matrix, and the
rows are put back in their order. If nothing on the way depends on the order of the rows, the same comes out where they
are not sorted and every row is multiplied by the matrix of its own expert::

    number, order = sort(ids)                                  number, order = ids, arange(n)
    rows = tokens[order // k]                                  rows = tokens[order // k]
    out = grouped_mm(rows, weight, cumsum(counts(number)))     out = bmm(rows, weight[ids])
    back[order] = arange(n);  out[back]                        back[order] = arange(n);  out[back]

The rules read the graph on the right, in which each index is known; the recorded one stays as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from automerge._double import double_precision

aten = torch.ops.aten
_GROUPED = "aten::_grouped_mm"
_EMPTY = ("aten::empty_like", "aten::new_empty", "aten::new_empty_strided", "aten::empty_strided")
_READS = ("aten::index", "aten::index_select", "aten::gather")
_TRIES = 3


def without_dispatch(graph: fx.GraphModule) -> tuple[fx.GraphModule, Mapping[fx.Node, fx.Node]]:
    """A graph that computes the same without sorting rows by their expert, and the node of it for every node of the old one.

    What is sorted for another purpose, or used in an order, stays.

    Args:
        graph: from `automerge.trace`.

    Returns:
        The graph itself, and no nodes, if there is nothing to change.
    """
    if not any(_name(node) == _GROUPED for node in graph.graph.nodes):
        return graph, {}
    constant = _constants(graph)
    found = [d for node in graph.graph.nodes for d in [_dispatch(graph, node, constant)] if d is not None]
    return _rewritten(graph, found) if found else (graph, {})


@dataclass
class _Dispatch:
    """One sort of rows by their expert, and what follows until they are back in their order.

    Attributes:
        ids: the number of every row's expert, before sorting.
        sort: the node that sorts.
        numbers: the nodes that hold the sorted numbers.
        order: the node that holds the places that the rows came from.
        grouped: the grouped products.
        known: nodes that depend on nothing but the order -> their value where the rows stay as they are.
    """

    ids: fx.Node
    sort: fx.Node
    order: fx.Node
    numbers: set[fx.Node] = field(default_factory=set)
    grouped: list[fx.Node] = field(default_factory=list)
    known: dict[fx.Node, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Rows:
    """A value with the sorted rows along one of its axes."""

    axis: int


_PLACES = "places among the sorted rows"
_Kind = _Rows | str | None  # None: the same in any order


class _OrderedError(Exception):
    """Something depends on the order of the rows."""


def _dispatch(graph: fx.GraphModule, sort: fx.Node, constant: set[fx.Node]) -> _Dispatch | None:
    """The dispatch that begins with a node, or None."""
    if _name(sort) not in ("aten::sort", "aten::argsort") or sort in constant:
        return None
    ids: Any = sort.args[0]
    if ids.meta["val"].dim() != 1 or ids.meta["val"].is_floating_point():
        return None
    outputs: dict[Any, fx.Node] = {u.args[1]: u for u in sort.users if u.target is operator.getitem}
    order = sort if _name(sort) == "aten::argsort" else outputs.get(1)
    if order is None:
        return None
    found = _Dispatch(ids, sort, order, {outputs[0]} if 0 in outputs and order is not sort else set())
    try:
        with torch.no_grad(), double_precision():
            _Walk(graph, found, constant).run()
    except _OrderedError:
        return None
    return found if found.grouped else None


class _Walk:
    """Runs what follows a sort on made-up numbers, with the rows in several orders, and compares.

    Attributes:
        orders: the first leaves the rows as they are.
        given: made-up numbers of the rows' experts.
        held: node -> its value in every order.
        kinds: node -> how these values differ.
    """

    def __init__(self, graph: fx.GraphModule, found: _Dispatch, constant: set[fx.Node]) -> None:
        self.graph, self.found, self.constant = graph, found, constant
        self.rng = torch.Generator().manual_seed(0)
        n = len(found.ids.meta["val"])
        self.orders = [torch.arange(n), *(torch.randperm(n, generator=self.rng) for _ in range(_TRIES))]
        self.held: dict[fx.Node, list[Any]] = {}
        self.kinds: dict[fx.Node, Any] = {}
        self.drawn: dict[fx.Node, torch.Tensor] = {}
        self.reads = set(graph.meta["trace"].reads)
        count = min(n.args[1].meta["val"].shape[0] for n in graph.graph.nodes if _name(n) == _GROUPED)
        self.given = torch.randint(count, (n,), generator=self.rng, dtype=found.ids.meta["val"].dtype)
        self.drawn[found.ids] = self.given

    def run(self) -> None:
        """Go through the nodes behind the sort.

        Raises:
            _OrderedError: if one depends on the order in another way than by having its rows in it.
        """
        found = self.found
        self.held[found.order], self.kinds[found.order] = list(self.orders), _Rows(0)
        found.known[found.order] = self.orders[0]
        for node in found.numbers:
            self.held[node], self.kinds[node] = [self.given[o] for o in self.orders], _Rows(0)
        for node in self.graph.graph.nodes:
            moved = [n for n in node.all_input_nodes if self.kinds.get(n) is not None]
            if node not in self.held and moved and not (node.op == "output" and self._wrong("an output")):
                self.visit(node)
            if self.kinds.get(node) is not None and node.name in self.reads:
                self._wrong("python reads it")

    def _wrong(self, why: str) -> bool:
        raise _OrderedError(why)

    def visit(self, node: fx.Node) -> None:
        """Find out how a node's value depends on the order."""
        if _name(node) == _GROUPED:
            self.grouped(node)
            return
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            self._wrong("random numbers")
        if torch.Tag.pointwise in getattr(node.target, "tags", ()):
            self.broadcast(node)
        self.held[node] = values = [self.value(node, turn) for turn in range(len(self.orders))]
        if all(n in self.constant or n in self.found.known for n in node.all_input_nodes):
            self.found.known[node] = values[0]
        if self.rereads(node):
            self.found.numbers.add(node)
        if isinstance(values[0], torch.Tensor):
            self.kinds[node] = self.kind(values)
            if isinstance(self.kinds[node], _OrderedError):
                raise self.kinds[node]
        else:  # of several outputs some may not be read
            self.kinds[node] = [self.kind([v[i] for v in values]) for i in range(len(values[0]))]

    def rereads(self, node: fx.Node) -> bool:
        """Whether a node is the numbers in the rows' order (``ids[order]``)."""
        source, *where = node.all_input_nodes
        if _name(node) not in _READS or source is not self.found.ids or any(n not in self.found.known for n in where):
            return False
        return torch.equal(self.held[node][0], self.given)

    def grouped(self, node: fx.Node) -> None:
        """A function of every row and its expert, if each run of rows is multiplied by the matrix of its number."""
        args: Any = node.args
        x, weight = args[:2]
        offsets = args[2] if len(args) > 2 else node.kwargs.get("offs")
        shape = weight.meta["val"].shape
        whole = self.kinds.get(x) == _Rows(0) and self.kinds.get(weight) is None and len(shape) == 3
        if not whole or not isinstance(offsets, fx.Node) or not self.runs(offsets, shape[0]):
            self._wrong("a grouped product of other runs")
        made = self.random(node)
        self.held[node], self.kinds[node] = [made[o] for o in self.orders], _Rows(0)
        self.found.grouped.append(node)

    def runs(self, offsets: fx.Node, count: int) -> bool:
        """Whether the offsets are those of the sorted numbers, whatever the numbers are."""
        ids, n = self.found.ids, len(self.orders[0])
        draws = [torch.randint(high, (n,), generator=self.rng) for high in (count, count, max(count // 2, 1), 1)]
        for numbers in (*draws, count - 1 - draws[-1]):
            numbers = numbers.to(ids.meta["val"].dtype)
            try:
                known: dict[fx.Node, Any] = {ids: numbers}
                made, first = self._of_ids(offsets, known), self._of_ids(self.found.sort, known)
            except Exception:
                return False
            order = first if isinstance(first, torch.Tensor) else first[1]
            whole = torch.bincount(numbers, minlength=count).cumsum(0)
            if not torch.equal(numbers[order], numbers.sort().values) or not torch.equal(made.to(whole), whole):
                return False
        return True

    def _of_ids(self, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
        """A node's value for given numbers of the rows' experts, if it depends on nothing else."""
        if node not in known:
            if node.op == "get_attr" or node in self.constant:
                return node.meta["val"]
            if node.op != "call_function":
                self._wrong("depends on more than the choice")
            known[node] = _called(node, lambda n: self._of_ids(n, known))
        return known[node]

    def broadcast(self, node: fx.Node) -> None:
        """An operator on entries at the same place meets nothing else that differs from row to row."""
        dims = [n.meta["val"].dim() - kind.axis for n, kind in self._moved(node) if isinstance(kind, _Rows)]
        if len({*dims}) > 1 or any(not isinstance(kind, _Rows) for _, kind in self._moved(node)):
            self._wrong("rows meet another axis")
        for other in node.all_input_nodes:
            value = self.held[other][0] if other in self.held else other.meta["val"]
            if self.kinds.get(other) is None and value.dim() >= dims[0] and value.shape[-dims[0]] > 1:
                line = value.movedim(-dims[0], 0)
                if (other not in self.constant and other not in self.held) or not torch.equal(
                    line, line[:1].expand_as(line)
                ):
                    self._wrong("rows meet another axis")

    def _moved(self, node: fx.Node) -> list[tuple[fx.Node, _Kind]]:
        return [(n, self.kinds[n]) for n in node.all_input_nodes if self.kinds.get(n) is not None]

    # ------------------------------------------------------------ values
    def value(self, node: fx.Node, turn: int) -> Any:
        """A node's value in one of the orders."""
        if _name(node) in _EMPTY:
            return torch.zeros(node.meta["val"].shape, dtype=node.meta["val"].dtype)
        try:
            return _called(node, lambda n: self.held[n][turn] if n in self.held else self.random(n))
        except Exception as error:
            raise _OrderedError(f"{node.name} does not run") from error

    def random(self, node: fx.Node) -> Any:
        """Made-up numbers in the place of what the order does not enter; constants as they are."""
        value = node.meta["val"]
        if node in self.constant or not isinstance(value, torch.Tensor):
            return value
        if node not in self.drawn:
            real = value.is_floating_point() or value.is_complex()
            drawn = torch.rand(value.shape, generator=self.rng, dtype=torch.float64) + 0.5
            self.drawn[node] = drawn if real else drawn.to(value.dtype)  # integers: 0 and 1
        return self.drawn[node]

    def kind(self, values: Sequence[torch.Tensor]) -> Any:
        """How a value depends on the order; an error to be raised where it does in another way."""
        first, *others = values
        if all(_equal(v, first) for v in others):
            return None
        if any(v.shape != first.shape for v in others):
            return _OrderedError("its shape depends on the order")
        pairs = list(zip(others, self.orders[1:], strict=True))
        for axis in range(first.dim()):
            if first.shape[axis] == len(self.orders[0]) and all(
                _equal(v, first.index_select(axis, o)) for v, o in pairs
            ):
                return _Rows(axis)
        inside = not first.is_floating_point() and all(int(v.min()) >= 0 and int(v.max()) < len(o) for v, o in pairs)
        if inside and first.dtype is not torch.bool and all(_equal(o[v], first.long()) for v, o in pairs):
            return _PLACES
        return _OrderedError("its values depend on the order")


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape:
        return False
    return torch.allclose(a, b, rtol=1e-9, atol=1e-12) if a.is_floating_point() or a.is_complex() else torch.equal(a, b)


def _called(node: fx.Node, value: Any) -> Any:
    """A node's operator on the values of its operands, on the CPU."""
    kwargs = {k: ("cpu" if k == "device" else v) for k, v in node.kwargs.items()}
    return node.target(*fx.node.map_arg(node.args, value), **fx.node.map_arg(kwargs, value))  # type: ignore[operator]


def _name(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return schema.name if schema is not None else ""


def _constants(graph: fx.GraphModule) -> set[fx.Node]:
    """The nodes that depend neither on inputs nor on parameters."""
    out: set[fx.Node] = set()
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder":
            fixed = node.meta["kind"] == "state" and not value.is_floating_point() and not value.is_complex()
        else:
            random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
            fixed = node.op != "output" and not random and all(n in out for n in node.all_input_nodes)
        if fixed:
            out.add(node)
    return out


# ---------------------------------------------------------------- the other graph
def _rewritten(graph: fx.GraphModule, found: Sequence[_Dispatch]) -> tuple[fx.GraphModule, Mapping[fx.Node, fx.Node]]:
    """The graph with the rows of every dispatch left as they are."""
    out = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    orders = {d.order: d for d in found}
    numbers = {node: d for d in found for node in d.numbers}
    products = {node: d for d in found for node in d.grouped}
    known = {node: value for d in found for node, value in d.known.items()}
    for node in graph.graph.nodes:
        if node in orders:
            made[node] = _call(out, node, aten.arange.default, (len(known[node]),), known[node])
        elif node in numbers:
            made[node] = made[numbers[node].ids]
        elif node in products:
            made[node] = _every_row(out, node, made, made[products[node].ids])
        else:
            made[node] = out.node_copy(node, made.__getitem__)
            if node in known:
                made[node].meta["val"] = known[node]
    other = fx.GraphModule(graph, out)
    other.meta.update(graph.meta)
    return other, made


def _every_row(out: fx.Graph, node: fx.Node, made: Mapping[fx.Node, fx.Node], ids: fx.Node) -> fx.Node:
    """Every row times the matrix of its own expert."""
    x, weight = (made[n] for n in node.args[:2])  # type: ignore[index]
    n, inner = x.meta["val"].shape
    last = weight.meta["val"].shape[2]
    blank = node.meta["val"].new_zeros(())
    read = _call(out, node, aten.index.Tensor, (weight, [ids]), blank.expand(n, inner, last))
    rows = _call(out, node, aten.unsqueeze.default, (x, 1), x.meta["val"].unsqueeze(1))
    product = _call(out, node, aten.bmm.default, (rows, read), node.meta["val"].unsqueeze(1))
    return _call(out, node, aten.squeeze.dim, (product, 1), node.meta["val"])


def _call(out: fx.Graph, like: fx.Node, target: Any, args: tuple[Any, ...], value: torch.Tensor) -> fx.Node:
    """A new node at the place of an old one, under a name that no copied node has."""
    node = out.create_node("call_function", target, args, name=f"{like.name}_unsorted")
    node.meta = {**like.meta, "val": value}
    return node
