"""Positions of a mask that python asked for: the experts that got a token."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from automerge._branches._graph import Workbench
from automerge._branches._joins import aten

_SAME = (aten.squeeze.default, aten.squeeze.dim, aten.view.default, aten.reshape.default, aten.select.int)


def take_all_places(bench: Workbench) -> None:
    """The positions of a mask are known where python saw each; what it asked is whether these are chosen, and no others.

    (``for e in counts.nonzero():`` over the experts that got a token.) Only where python asked for positions: what an index
    chooses by data may be another number of them on other inputs.
    """
    for node in list(bench.graph.nodes):
        if node.target is not aten.nonzero.default or node in bench.constant:
            continue
        mask: Any = node.args[0]
        size = mask.meta["val"].numel()
        places = _asked(node, bench.reads) if mask.meta["val"].dim() == 1 else []
        if not places or places != sorted({*places} & {*range(size)}):
            continue
        with bench.graph.inserting_before(node):
            known = bench.fixed(torch.tensor(places)[:, None], node)
            _ask(bench, mask, places, aten.all.default)
            others = sorted({*range(size)}.difference(places))
            if others:
                _ask(bench, mask, others, aten.any.default)
        node.replace_all_uses_with(known)
        bench.graph.erase_node(node)
    for node in bench.graph.nodes:
        bench.know(node)


def _ask(bench: Workbench, mask: fx.Node, places: list[int], what: Any) -> None:
    """Note that python asked for something of some entries of a mask, where nodes are inserted now."""
    of = mask
    if len(places) < mask.meta["val"].numel():
        of = bench.graph.call_function(aten.index_select.default, (mask, 0, bench.fixed(torch.tensor(places), mask)))
        of.meta = {**mask.meta, "val": torch.empty(len(places), dtype=mask.meta["val"].dtype, device="meta")}
    asked = bench.graph.call_function(what, (of,))
    asked.meta = {**mask.meta, "val": torch.empty((), dtype=torch.bool, device="meta")}
    bench.reads.add(asked.name)


def _asked(node: fx.Node, reads: set[str]) -> list[int]:
    """What python saw when it took the entries of a value one by one, looked at each, and used each in an operator.

    What it made of a list of numbers alone, a trace does not tell.
    """
    taken = [list(user.users) for user in node.users if user.target is aten.unbind.int]
    if len(taken) != 1 or len(node.users) != 1:
        return []
    entries = sorted(taken[0], key=lambda one: int(one.args[1]))  # type: ignore[arg-type]
    found = [_views(one, reads) for one in entries]
    if any(not used or len({*seen}) != 1 for seen, used in found) or len(found) != node.meta["val"].shape[0]:
        return []
    return [seen[0] for seen, _ in found]


def _views(node: fx.Node, reads: set[str]) -> tuple[list[int], bool]:
    """What happens to a value or a view of it: what python saw of it, and whether an operator used it.

    (``weight[e]`` for a tensor ``e`` of one number: python reads it, and takes the entry at once.)
    """
    seen = [int(node.meta["seen"])] if node.name in reads and "seen" in node.meta else []
    used = bool(seen) and _selects(node.next, seen[0])
    for user in node.users:
        if user.target in _SAME:
            more = _views(user, reads)
            seen, used = seen + more[0], used or more[1]
        else:
            used = True
    return seen, used


def _selects(node: fx.Node, place: int) -> bool:
    """Whether a node takes the entry at some place."""
    return node.target is aten.select.int and bool(node.args[2] == place)
