"""Which entries of a parameter the traced pass reads at all.

A table of 1024 positions of which short example inputs read five has 1019 rows that nothing constrains. They are no
freedom: on longer inputs they are read as the five are. So what is not read stays where it is along the axis that is cut,
and keeps the order of what is read along the others.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

_SAME = frozenset(f"aten::{name}" for name in ("clone", "_to_copy", "to", "lift_fresh_copy", "detach", "alias"))
_CUTTING = frozenset(
    f"aten::{name}"
    for name in ("slice", "select", "index", "index_select", "embedding", "split", "split_with_sizes", "unbind")
)
_MOVING = (
    _CUTTING
    | _SAME
    | frozenset(
        f"aten::{name}"
        for name in (
            *(
                "view",
                "_unsafe_view",
                "reshape",
                "permute",
                "transpose",
                "t",
                "unsqueeze",
                "squeeze",
                "expand",
                "unbind",
            ),
            *("narrow", "flip", "roll", "contiguous", "flatten", "unflatten", "movedim", "diagonal"),
        )
    )
)


def unread(
    graph: fx.GraphModule,
    live: Collection[fx.Node],
    constant: Collection[fx.Node],
    looked: Collection[fx.Node],
    states: Collection[str],
) -> dict[str, np.ndarray]:
    """For every parameter that is only read in part: which of its entries are not, a boolean array of its shape.

    Entries are followed through what only moves them; an operator that computes reads all that it is given.

    Args:
        graph: the traced graph.
        live: the nodes that the output depends on.
        constant: the nodes that depend on nothing but constants; their values are there.
        looked: the nodes whose values python read.
        states: the names of the parameters.
    """
    walk = _Walk(live, constant, looked)
    out: dict[str, np.ndarray] = {}
    for node in graph.graph.nodes:
        if node.op == "placeholder" and node in live and node.meta.get("name") in states and walk.cut(node):
            value = node.meta["val"]
            read = torch.zeros(value.numel(), dtype=torch.bool)
            walk.follow(node, torch.arange(read.numel()).reshape(tuple(value.shape)), read)
            if not bool(read.all()):
                out[node.meta["name"]] = ~read.reshape(tuple(value.shape)).numpy()
    return out


def _name(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return schema.name if schema is not None else ""


@dataclass(frozen=True)
class _Walk:
    live: Collection[fx.Node]
    constant: Collection[fx.Node]
    looked: Collection[fx.Node]

    def users(self, node: fx.Node) -> list[fx.Node]:
        return [u for u in node.users if u in self.live]

    def moves(self, node: fx.Node, source: fx.Node) -> bool:
        """Whether the operator only moves the entries of its first operand, by what is known."""
        if _name(node) not in _MOVING or not node.args or node.args[0] is not source:
            return False
        return all(n is source or n in self.constant for n in node.all_input_nodes)

    def cut(self, node: fx.Node) -> bool:
        """Whether everybody who reads a tensor only moves it, and somebody cuts it: else it is read whole."""
        users = self.users(node)
        if node in self.looked or not all(self.moves(u, node) for u in users):
            return False
        whole = [u for u in users if _name(u) not in _CUTTING]
        return len(whole) < len(users) or any(self.cut(u) for u in whole)

    def follow(self, node: fx.Node, entries: Any, read: torch.Tensor) -> None:
        """Mark what is read of a tensor whose entries have these numbers."""
        if node in self.looked:
            read[entries.reshape(-1)] = True
        for user in self.users(node):
            if isinstance(entries, (tuple, list)):  # only ever taken apart
                which: Any = user.args[1]
                self.follow(user, entries[which], read)
                continue
            moved = self.moved(user, node, entries)
            if moved is None:
                read[entries.reshape(-1)] = True
            else:
                self.follow(user, moved, read)

    def moved(self, node: fx.Node, source: fx.Node, entries: torch.Tensor) -> Any:
        """What the operator makes of the numbers of entries; None if it computes."""
        if not self.moves(node, source):
            return None
        if _name(node) in _SAME:
            return entries

        def known(n: fx.Node) -> Any:
            return entries if n is source else n.meta["val"]

        try:
            return node.target(*fx.node.map_arg(node.args, known), **fx.node.map_arg(node.kwargs, known))  # type: ignore[operator]
        except Exception:  # an operator that refuses integers: then everything counts as read
            return None
