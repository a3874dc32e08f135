"""What a node of a traced graph is: a parameter, a random draw, a constant, without entries; and which nodes count."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from typing import Any

import networkx as nx
import torch
from torch import fx

from automerge._tree_io import tensors_of

ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def aten_names(*names: str) -> frozenset[str]:
    """The names of operators as their schemas have them."""
    return frozenset(f"aten::{name}" for name in names)


def is_state(tensor: torch.Tensor) -> bool:
    """Whether a state-dict tensor is a block of numbers (integer and boolean buffers are constants)."""
    return tensor.is_floating_point() or tensor.is_complex()


def draws(node: fx.Node) -> bool:
    """Whether an operator draws random numbers, anew in every pass; attention does for its dropout."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    dropout: Any = node.args[3] if len(node.args) > 3 else 0.0
    return node.target is not ATTENTION or dropout != 0


def is_constant(node: fx.Node, known: Collection[fx.Node]) -> bool:
    """Whether a node depends neither on inputs nor on parameters.

    Args:
        node: of a traced graph.
        known: those before it that do not.
    """
    if node.op == "placeholder":
        return node.meta["kind"] == "state" and not is_state(node.meta["val"])
    if node.op == "output" or node.meta.get("from_inputs") or (node.meta.get("unseen") and fills(node)):
        return False
    return not draws(node) and all(n in known for n in node.all_input_nodes)


def constants(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that depend neither on inputs nor on parameters."""
    out: set[fx.Node] = set()
    for node in graph.nodes:
        if is_constant(node, out):
            out.add(node)
    return out


def schema_name(node: fx.Node) -> str:
    """An operator's full name (``aten::addmm``); empty for what is none."""
    schema = getattr(node.target, "_schema", None)
    return schema.name if schema is not None else ""


def _empty(node: fx.Node) -> bool:
    value = node.meta.get("val", ())
    tensors = [value] if isinstance(value, torch.Tensor) else tensors_of(value)
    return bool(tensors) and all(t.numel() == 0 for t in tensors)


def _chosen(node: fx.Node, known: set[fx.Node]) -> bool:
    """Whether data say how many entries there are."""
    by = node.all_input_nodes[1:] or node.all_input_nodes
    return torch.Tag.dynamic_output_shape in getattr(node.target, "tags", ()) and not known.issuperset(by)


def given(node: fx.Node) -> bool:
    """Whether a node is an input, or a constant that stands for one (``unseen``: what will be in it is not known yet)."""
    return any(node.meta.get(key) for key in ("from_inputs", "unseen")) or node.meta.get("kind") == "input"


def _is_state(node: fx.Node) -> bool:
    return node.meta.get("kind") == "state"


def fills(node: fx.Node) -> bool:
    """Whether something with entries is made from a tensor without any."""
    seen, todo = {node}, [node]
    while todo:
        users = [u for n in todo for u in n.users if u not in seen and u.op != "output" and not _shaped(schema_name(u))]
        if any(not _empty(u) for u in users):
            return True
        seen |= set(users)
        todo = users
    return False


def _shaped(name: str) -> bool:
    """Whether an operator reads the shape of its operand alone."""
    return name.startswith("aten::new_") or name.endswith("_like")


def choosing_none(graph: fx.GraphModule) -> set[fx.Node]:
    """The nodes without entries because data chose none: rows of an expert that no row was sent to.

    Other data choose some, which are treated as the operators say; so their other axes are what they would be then. What
    meets them without entries (a weight expanded to as many) has as many then, too. So it is with inputs and with tensors
    that the model holds, if what has entries is made from them: messages of no edges that are summed.
    """
    empty = [node for node in graph.graph.nodes if node.op != "output" and _empty(node) and not _is_state(node)]
    known = constants(graph.graph) if empty else set()
    chosen = [n for n in empty if (_chosen(n, known) if n.op == "call_function" else given(n) and fills(n))]
    among = set(empty)
    met = nx.Graph([(n, source) for n in empty for source in n.all_input_nodes if source in among])
    met.add_nodes_from(empty)
    return {other for node in chosen for other in nx.node_connected_component(met, node)}


def python_reads(graph: fx.GraphModule) -> list[fx.Node]:
    """The nodes whose values python reads, but for changes of buffers: those count where the buffer is read."""
    info = graph.meta["trace"]
    return [n for n in graph.graph.nodes if n.name in info.reads and n.name not in info.again]


def looked_at(graph: fx.GraphModule) -> set[str]:
    """The parameters and buffers of which alone python reads numbers."""
    names: set[str] = set()
    for node in python_reads(graph):
        behind, todo = set[fx.Node](), [node]
        while todo:
            one = todo.pop()
            if one not in behind:
                behind.add(one)
                todo += one.all_input_nodes
        given = [n for n in behind if n.op == "placeholder"]
        if all(n.meta["kind"] == "state" for n in given):
            names |= {n.meta["name"] for n in given}
    return names


def lasting(
    graph: fx.GraphModule, reads: Sequence[fx.Node], none: Collection[fx.Node] = ()
) -> tuple[set[fx.Node], dict[fx.Node, set[int]]]:
    """`liveness` over this pass and later ones, which read what this one leaves in the parameters."""
    found, again = liveness(graph, reads, none), 0
    while again != (again := len(later := later_reads(graph, found[0]))):
        found = liveness(graph, [*reads, *later], none)
    return found


def liveness(
    graph: fx.GraphModule, reads: Sequence[fx.Node], none: Collection[fx.Node] = ()
) -> tuple[set[fx.Node], dict[fx.Node, set[int]]]:
    """The nodes that the output (or a value read by python) depends on, and which outputs of a node are read.

    Args:
        graph: the traced graph.
        reads: the nodes whose values python read.
        none: nodes without entries that have some on other inputs.
    """
    live: set[fx.Node] = set()
    used: dict[fx.Node, set[int]] = {}
    todo = [n for n in graph.graph.nodes if n.op == "output"] + list(reads)
    while todo:
        node = todo.pop()
        if node in live:
            continue
        live.add(node)
        if node not in none and _empty(node):  # holds nothing of what went into it
            continue
        if node.target is operator.getitem:
            used.setdefault(node.args[0], set()).add(node.args[1])
        todo += node.all_input_nodes
    return live, used


def later_reads(graph: fx.GraphModule, live: Collection[fx.Node]) -> dict[fx.Node, fx.Node]:
    """What the next pass reads in the place of parameters that this one writes to: node of the change -> placeholder.

    Only of parameters among the given nodes: of the others no pass reads anything.
    """
    again = graph.meta["trace"].again
    own = {n.meta["name"]: n for n in live if n.op == "placeholder"} if again else {}
    return {n: own[again[n.name]] for n in graph.graph.nodes if again.get(n.name) in own}


def viewed(node: fx.Node) -> list[fx.Node]:
    """For a view of memory that may be outside its operand: the tensors that the operand is a view of."""
    out: list[fx.Node] = []
    last: Any = node if schema_name(node) == "aten::as_strided" else None
    while last is not None:
        schema = getattr(last.target, "_schema", None)
        alias = schema is not None and schema.arguments and schema.arguments[0].alias_info is not None
        last = last.args[0] if alias or last.target is operator.getitem else None
        out += [last] if last is not None and isinstance(last.meta["val"], torch.Tensor) else []
    return out


_COUNTED = aten_names(
    "nonzero",
    "masked_select",
    "index",
    "_unsafe_index",
    "bincount",
    "_unique",
    "_unique2",
    "unique_dim",
    "repeat_interleave",
)


def counted(node: fx.Node) -> bool:
    """Whether the shape of what an operator gives is a symmetric function of the numbers that it depends on."""
    return schema_name(node) in _COUNTED


def sizing(node: fx.Node) -> list[fx.Node]:
    """The operands whose numbers give the shape of what comes out: python may read it, though nothing else does."""
    if torch.Tag.dynamic_output_shape not in getattr(node.target, "tags", ()):
        return []
    if schema_name(node) in ("aten::index", "aten::_unsafe_index"):
        return [n for n in node.all_input_nodes[1:] if n.meta["val"].dtype in (torch.bool, torch.uint8)]
    if schema_name(node) == "aten::bincount":
        fewest = dict(enumerate(node.args)).get(2, node.kwargs.get("minlength", 0))
        return [] if node.meta["val"].shape[0] == fewest else node.all_input_nodes[:1]
    return node.all_input_nodes[-1:] if schema_name(node) == "aten::masked_select" else node.all_input_nodes[:1]
