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
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from automerge._double import double_precision
from automerge.rules._nodes import constants, liveness, schema_name
from automerge.rules._row_order import GROUPED, Dispatch, Trial

aten = torch.ops.aten
_SORTS = ("aten::sort", "aten::argsort")
_TRIALS, _FEW = 4, 16  # made-up whole numbers may be equal by chance; the more so where there are few rows


@dataclass(frozen=True)
class Unsorted:
    """A graph that computes the same as a recorded one, without sorting rows by their expert.

    Attributes:
        graph: the graph; the recorded one itself where there is nothing to change.
        nodes: node of the recorded graph -> its node in this one; empty where nothing is changed.
        sorted: nodes of the recorded graph whose rows are in an order that depends on the data.
    """

    graph: fx.GraphModule
    nodes: Mapping[fx.Node, fx.Node] = field(default_factory=dict)
    sorted: frozenset[fx.Node] = frozenset()


def without_dispatch(graph: fx.GraphModule) -> Unsorted:
    """Undo every dispatch in a graph from `automerge.trace`; what is sorted for another purpose, or used in order, stays."""
    if "unsorted" not in graph.meta:
        graph.meta["unsorted"] = _without_dispatch(graph)
    return graph.meta["unsorted"]


def _without_dispatch(graph: fx.GraphModule) -> Unsorted:
    sorts: Mapping[str, int] = graph.meta.get("sorts", {})
    if not any(schema_name(node) in _SORTS for node in graph.graph.nodes):
        return Unsorted(graph)
    constant = constants(graph.graph)
    read = [node for node in graph.graph.nodes if node.name in graph.meta["trace"].reads]
    alive = liveness(graph, read)[0]
    live = [node for node in graph.graph.nodes if node in alive]
    found = [d for node in live for d in [_dispatch(live, read, node, constant, sorts.get(node.name))] if d is not None]
    return _rewritten(graph, found) if found else Unsorted(graph)


def _dispatch(
    live: Sequence[fx.Node], read: Collection[fx.Node], sort: fx.Node, constant: set[fx.Node], kinds: int | None = None
) -> Dispatch | None:
    """The dispatch that begins with a node, or None.

    Runs may be of kinds that masks choose, or have a matrix each, or there may be one that is read for every row.
    """
    if schema_name(sort) not in _SORTS or sort in constant:
        return None
    ids: Any = sort.args[0]
    if ids.meta["val"].dim() != 1 or ids.meta["val"].is_floating_point():
        return None
    outputs: dict[Any, fx.Node] = {u.args[1]: u for u in sort.users if u.target is operator.getitem}
    order = sort if schema_name(sort) == "aten::argsort" else outputs.get(1)
    numbers = {outputs[0]} if 0 in outputs and order is not sort else set()
    counts = [node.args[1].meta["val"].shape[0] for node in live if schema_name(node) == GROUPED]
    counts += [] if kinds is None else [kinds]
    counts += [count for node in live for count in _entries(node, len(ids.meta["val"]))]
    for count in sorted(set(counts), reverse=True) if order is not None else ():
        assert order is not None
        try:
            with torch.no_grad(), double_precision():
                trial = None
                for _ in range(_TRIALS + _FEW // max(len(ids.meta["val"]), 1)):
                    found = Dispatch(ids, sort, order, set(numbers))
                    trial = Trial(live, read, found, constant, count, trial)
                    trial.run()
        except Exception:  # the order is used (`OrderedError`), or an operator cannot be tried
            continue
        return found
    return None


def _entries(node: fx.Node, rows: int) -> list[int]:
    """How many entries a table has of which one is read for each of some rows."""
    if schema_name(node) not in ("aten::index", "aten::_unsafe_index", "aten::index_select", "aten::embedding"):
        return []
    table, *where = node.all_input_nodes
    single = len(where) == 1 and where[0].meta["val"].shape == (rows,)
    return [table.meta["val"].shape[0]] if single and table.meta["val"].dim() > 1 else []


# ---------------------------------------------------------------- the other graph
def _rewritten(graph: fx.GraphModule, found: Sequence[Dispatch]) -> Unsorted:
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
    return Unsorted(other, made, frozenset().union(*(d.moved for d in found)))


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
