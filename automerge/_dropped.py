"""What a pass computes and drops: what the last block does with a stream that nothing is made of any more.

The text stream of QwenImage ends so, with the pieces of a modulation that only it would have read. Where the units of a
stream are in them is in the pass, but not in what its output depends on.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import fx

from automerge._auxiliary import adds
from automerge._lazy_module import LazyModule
from automerge.rules import Analysis
from automerge.rules._nodes import choosing_none, constants, lasting, python_reads, schema_name
from automerge.rules._reads import MOVING, SAME
from automerge.rules._unread import unread
from automerge.symmetry import Symmetry
from automerge.trace import TraceInfo


@dataclass(frozen=True, eq=False)
class Dropped:
    """What following the computations added whose results are dropped.

    Attributes:
        symmetry: of the graphs.
        graphs: the recorded ones, in which one number is read of each of these results.
        names: the parameters of which more moves than the output depends on.
    """

    symmetry: Symmetry
    graphs: list[fx.GraphModule]
    names: tuple[str, ...]

    @property
    def note(self) -> str:
        """For the report."""
        more = f" and {len(self.names) - 1} more" if self.names[1:] else ""
        return (
            f"the output does not depend on all of {self.names[0]}{more}; results that the pass drops show what moves with "
            "the rest"
        )


def with_dropped(
    graphs: list[fx.GraphModule],
    symmetry: Symmetry,
    analysis: Analysis,
    again: Callable[[list[fx.GraphModule]], tuple[Symmetry, Analysis]],
) -> Dropped | None:
    """A symmetry in which parameters move that only dropped results read, where there are such and nothing is lost by it.

    Args:
        graphs: the passes that were read.
        symmetry: of these.
        analysis: the same.
        again: infers from several graphs.
    """
    apart = {n: np.ones(shape, bool) for n, shape in symmetry.shapes.items() if n not in analysis.states}
    apart |= analysis.unread
    read = [_read(graph, apart) for graph in graphs] if apart else []
    shown = {n for graph, other in zip(graphs, read, strict=False) if other is not graph for n in _shown(other, apart)}
    names = tuple(n for n in apart if n in shown)
    if not names:
        return None
    larger = again(read)[0]
    return Dropped(larger, read, names) if adds(larger, symmetry) else None


def _shown(graph: fx.GraphModule, apart: Mapping[str, np.ndarray]) -> set[str]:
    """The parameters of which a graph reads more than the output depends on."""
    live, reads = _live(graph)
    mine = {n.meta["name"] for n in live if n.op == "placeholder"} & apart.keys()
    left = unread(graph, live, constants(graph.graph), reads, mine).entries
    return {n for n in mine if n not in left or not left[n][apart[n]].all()}


def _live(graph: fx.GraphModule) -> tuple[set[fx.Node], list[fx.Node]]:
    """The nodes that the output, or a value read by python, depends on; and the latter."""
    reads = python_reads(graph)
    return lasting(graph, reads, choosing_none(graph))[0], reads


def _read(graph: fx.GraphModule, apart: Mapping[str, np.ndarray]) -> fx.GraphModule:
    """The graph with one number read of every result that is dropped: their sum, which has no order; itself if none is."""
    ends = _ends(graph, apart)
    if not ends:
        return graph
    out, sums = fx.Graph(), []
    made: dict[fx.Node, fx.Node] = {}
    for node in graph.graph.nodes:
        made[node] = out.node_copy(node, made.__getitem__)
        if node in ends:
            total = out.create_node(
                "call_function", torch.ops.aten.sum.default, (made[node],), name=f"{node.name}_total"
            )
            total.meta = {**node.meta, "val": node.meta["val"].sum()}
            sums.append(total.name)
    other = LazyModule(graph, out)
    info: TraceInfo = graph.meta["trace"]
    other.meta |= {"trace": replace(info, reads=[*info.reads, *sums]), "apart": apart, "dropped": frozenset(sums)}
    return other


def _ends(graph: fx.GraphModule, names: Collection[str]) -> set[fx.Node]:
    """What was computed last, with some of these parameters, on the way to what nothing reads; or is then cut away."""
    nodes, (live, reads) = list(graph.graph.nodes), _live(graph)
    reached: set[fx.Node] = set()
    for node in nodes:
        own = node.op == "placeholder" and node.meta.get("name") in names
        if own or not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    states = {n.meta["name"] for n in live if n.op == "placeholder" and n.meta["kind"] == "state"}
    ends = (
        set() if states.isdisjoint(names) else unread(graph, live, constants(graph.graph), reads, states).cut & reached
    )
    seen = set[fx.Node]()
    todo = [n for n in nodes if not n.users]
    while todo:
        node = todo.pop()
        if node in live or node in seen or node not in reached or node.op != "call_function":
            continue
        seen.add(node)
        value = node.meta["val"]
        if _moves(node):  # a piece that nobody takes is no result
            todo += node.all_input_nodes
        elif isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel() and not _beside(node):
            ends.add(node)
    return ends


def _moves(node: fx.Node) -> bool:
    """Whether nothing is computed but places."""
    return schema_name(_operator(node)) in MOVING | SAME


def _beside(node: fx.Node) -> bool:
    """Whether it is a further output of an operator, such as the mean that a norm took."""
    return node.target is operator.getitem and bool(node.args[1] != 0)


def _operator(node: fx.Node) -> fx.Node:
    """What gave this output."""
    return node.all_input_nodes[0] if node.target is operator.getitem else node
