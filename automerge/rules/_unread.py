"""Which entries of a parameter the traced pass reads at all.

A table of 1024 positions of which short example inputs read five has 1019 rows that nothing constrains. They are no
freedom: on longer inputs they are read as the five are. So what is not read stays where it is along the axis that is cut,
and keeps the order of what is read along the others. It is the same with a layer that gives 1024 scores of which five are
used.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import fx

from automerge.rules._known import alike, formed, known_numbers
from automerge.rules._nodes import later_reads, schema_name
from automerge.rules._reads import CUTTING, MOVING, PRODUCTS, Back, chooses, is_real


def in_part(
    reads: Sequence[Mapping[str, np.ndarray | None]], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """The entries that no graph reads, of parameters that none of them reads whole."""
    found: dict[str, np.ndarray] = {}
    for name, shape in shapes.items():
        masks = [of[name] for of in reads if name in of]
        partly = [mask for mask in masks if mask is not None]
        if len(partly) == len(masks):
            found[name] = np.logical_and.reduce(partly) if partly else np.ones(shape, bool)
    return found


class Unread(NamedTuple):
    """What a pass does not read.

    Attributes:
        entries: for every parameter that is only read in part which of its entries are not, a boolean array of its shape.
        first: the names of those that meet numbers that are no input's, such as a first state: further steps may read more.
        cut: the results of which some entries are cut away, but for those of a parameter that is read in part: of another
            input there may be more of it.
    """

    entries: dict[str, np.ndarray]
    first: set[str]
    cut: set[fx.Node]


def unread(
    graph: fx.GraphModule,
    live: Collection[fx.Node],
    constant: Collection[fx.Node],
    looked: Collection[fx.Node],
    states: Collection[str],
) -> Unread:
    """Follow what is read back from every cut, through whatever is read in part only.

    Args:
        graph: the traced graph.
        live: the nodes that the output depends on.
        constant: the nodes that depend on nothing but constants; their values are there.
        looked: the nodes whose values python read.
        states: the names of the parameters.
    """
    held = graph.meta.setdefault("unread", {})  # further passes of the rules ask the same
    asked = (frozenset(live), frozenset(constant), frozenset(looked), frozenset(states))
    if asked not in held:
        held[asked] = _unread(graph, live, constant, looked, states)
    return held[asked]


def _unread(
    graph: fx.GraphModule,
    live: Collection[fx.Node],
    constant: Collection[fx.Node],
    looked: Collection[fx.Node],
    states: Collection[str],
) -> Unread:
    nodes = [n for n in graph.graph.nodes if n in live]
    own = _of_parameters(nodes, constant, states, [n for n in nodes if formed(n) is not None])
    known = known_numbers(nodes, constant, own)
    fixed = {n: v for n, v in known.items() if not bool(v.isnan().any())}
    own = _of_parameters(nodes, constant, states, fixed) if fixed else own
    cuts = {n for n in nodes if _cuts(n, constant) or (n in own and _selects(n, constant | fixed.keys()))}
    cuts |= {n for n in nodes if any(alike(n, factor, known) is not None for factor in n.all_input_nodes)}
    if not cuts:
        return Unread({}, set(), set())
    back = _followed(Back(cuts, own, constant, live, {}, known), [n for n in nodes if n not in constant], looked, graph)
    tables: set[fx.Node] = set()  # parameters that are cut themselves
    for node in reversed(nodes):
        if any(u in own and (u in cuts or u in tables) for u in node.users):
            tables.add(node)
    out: dict[str, np.ndarray] = {}
    for node, mask in back.needed.items():
        if node.op == "placeholder" and node in own:
            out[node.meta["name"]] = ~mask.numpy()
    return Unread(dict(sorted(out.items())), _behind(back.hidden, own) & out.keys(), _cut_away(back, out))


def _cut_away(back: Back, unread: Mapping[str, np.ndarray]) -> set[fx.Node]:
    """The results that lose entries where they are cut, to which only parameters lead that are not read at all."""
    in_part = {n for n in back.needed if n.op == "placeholder" and not unread.get(n.meta["name"], np.False_).all()}
    todo = list(in_part)
    while todo:
        more = {u for u in todo.pop().users if u in back.needed} - in_part
        in_part |= more
        todo += more
    results = (n for n in back.needed if n.op == "call_function" and n not in back.own and n not in in_part)
    return {n for n in results if is_real(n) and any(u in back.cuts and schema_name(u) in CUTTING for u in n.users)}


def _behind(nodes: Collection[fx.Node], own: Collection[fx.Node]) -> set[str]:
    """The parameters that some nodes are made of."""
    seen, todo = set[fx.Node](), [n for n in nodes if n in own]
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo += [n for n in node.all_input_nodes if n in own]
    return {n.meta["name"] for n in seen if n.op == "placeholder"}


def _of_parameters(
    nodes: Sequence[fx.Node], constant: Collection[fx.Node], states: Collection[str], fixed: Collection[fx.Node]
) -> set[fx.Node]:
    """The nodes that depend on parameters, and on nothing else but what has the same numbers for all inputs."""
    own: set[fx.Node] = set()
    for node in nodes:
        if node.op == "placeholder" and node.meta.get("name") in states:
            own.add(node)
        elif node.op == "call_function" and node not in fixed and not own.isdisjoint(sources := node.all_input_nodes):
            own.update([node] if all(n in own or n in constant or n in fixed for n in sources) else [])
    return own


def _followed(back: Back, nodes: Sequence[fx.Node], looked: Collection[fx.Node], graph: fx.GraphModule) -> Back:
    """What is needed of every node, over this pass and later ones.

    A later pass reads what this one leaves in a parameter where this one reads the parameter: at no entry at first, and
    at those that were found until there are no more.
    """
    changes = {total.all_input_nodes[0]: own for total, own in later_reads(graph, back.live).items()}
    needed = {change: torch.zeros(own.meta["val"].shape, dtype=torch.bool) for change, own in changes.items()}
    while True:
        back.needed.clear()
        back.needed.update(needed)
        for node in reversed(nodes):
            if node not in looked and node not in changes:
                back.visit(node)
        found = {change: back.all_of(own) for change, own in changes.items()}
        if all(torch.equal(found[change], needed[change]) for change in changes):
            return back
        needed = found


def _cuts(node: fx.Node, constant: Collection[fx.Node]) -> bool:
    """Whether an operator takes part of its operand, at places that do not depend on data."""
    return schema_name(node) in CUTTING and all(n in constant for n in node.all_input_nodes[1:])


def _selects(node: fx.Node, constant: Collection[fx.Node]) -> bool:
    """Whether an operator that is not known to cut may leave out something of its operand.

    A product with a constant does where its coefficients are zero (one-hot rows); others, where less comes out than went in.
    """
    value, tags = node.meta["val"], getattr(node.target, "tags", ())
    if node.op == "placeholder" or not isinstance(value, torch.Tensor):
        return False
    if torch.Tag.reduction in tags or torch.Tag.pointwise in tags or schema_name(node) in MOVING or chooses(node):
        return False
    sources = [n.meta["val"] for n in node.all_input_nodes if n not in constant]
    smaller = any(isinstance(v, torch.Tensor) and v.numel() > value.numel() for v in sources)
    return smaller or (schema_name(node) in PRODUCTS and any(n in constant for n in node.all_input_nodes))
