"""Positions of a mask that python asked for: the experts that got a token."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import fx

from automerge._branches._counts import following, made_up_choices
from automerge._branches._distinct import MOVES, tells
from automerge._branches._graph import Workbench
from automerge._branches._joins import Same, aten

_CHOICES = {aten.argmax.default: 1, aten.max.dim: 1, aten.topk.default: 2, aten.sort.default: 1}  # -> where the axis is
_USES = (aten.eq.Tensor, aten.eq.Scalar, aten.index.Tensor, aten.index_select.default)
_SAME = (aten.squeeze.default, aten.squeeze.dim, aten.view.default, aten.reshape.default, aten.select.int)


def take_all_places(bench: Workbench) -> None:
    """The positions of a mask are known where python saw each; what it asked is whether these are chosen, and no others.

    (``for e in counts.nonzero():`` over the experts that got a token.) Only where python asked for positions: what an index
    chooses by data may be another number of them on other inputs.
    """
    for node in list(bench.graph.nodes):
        size = _kinds_of(node)
        if not size or node in bench.constant:
            continue
        places = _asked(node, bench.reads)
        if not places or places != sorted({*places} & {*range(size)}):
            continue
        of: Any = node.args[0]
        with bench.graph.inserting_before(node):
            unique = node.target is operator.getitem
            _ask_whether(bench, _hit(bench, of.args[0], size) if unique else of, places)
            _take_numbers(bench, node, bench.fixed(torch.tensor(places).reshape(node.meta["val"].shape), node))
    bench.know_all()


def _take_numbers(bench: Workbench, node: fx.Node, known: fx.Node) -> None:
    """Put known numbers in the place of a node; what is compared with one of them is compared with a number."""
    node.replace_all_uses_with(known)
    for taken in [u for u in known.users if u.target is aten.unbind.int and u.args[1:] in ((), (0,))]:
        for entry in list(taken.users):
            for user in [u for u in entry.users if u.target is aten.eq.Tensor and u.args[1] is entry]:
                if known.meta["val"].dim() == 1:
                    user.target, user.args = aten.eq.Scalar, (user.args[0], int(known.meta["val"][entry.args[1]]))
    if not node.users:
        bench.graph.erase_node(node)


def take_lists(bench: Workbench, telling: Collection[Same]) -> None:
    """Where python listed the kinds that were chosen, and a branch for each is like the others, these are asked for.

    (``for e in chosen.unique().tolist():``.) The list must be that of the numbers which tell the branches apart, in the
    order of these, so that what a program does for some of them only, or for another one than it lists, leaves it as it is.
    """
    for node in list(bench.graph.nodes):
        size = _kinds_of(node)
        seen = _numbers_of(node, bench.reads) if size and node not in bench.constant else {}
        listed = [e for numbers in seen.values() for e in numbers]
        every = len(listed) > 1 and len(listed) == node.meta["val"].numel()
        for root in _roots(bench, telling, listed) if every else []:
            if max(listed) < size and _lists_kinds(bench, node, root, size):
                with bench.graph.inserting_before(next(n for n in bench.graph.nodes if n.op == "output")):
                    _ask_whether(bench, _hit(bench, root, size), listed)
                bench.reads.difference_update(n.name for n in seen)
                break


def _kinds_of(node: fx.Node) -> int:
    """How many kinds there are, where a node lists those of which there are some; 0 for another node."""
    of: Any = node.args[0] if node.args else None
    if node.target is aten.nonzero.default:
        return int(of.meta["val"].numel()) if of.meta["val"].dim() == 1 else 0
    if node.target is not operator.getitem or node.args[1] != 0 or of.target is not aten._unique2.default:
        return 0
    root = _origin(of.args[0])
    made: Any = root.args[0] if root.target is operator.getitem else root
    if made.target not in _CHOICES:
        return 0
    dim = next((a for a in made.args[_CHOICES[made.target] :][:1]), -1)
    return int(made.args[0].meta["val"].shape[dim]) if isinstance(dim, int) else 0


def _origin(node: Any) -> Any:
    """What a value is a view of."""
    while node.target in MOVES:
        node = node.args[0]
    return node


def _numbers_of(node: fx.Node, reads: set[str]) -> dict[fx.Node, list[int]]:
    """The nodes of which python saw nothing but whole numbers that are entries of a node, and which."""
    if node.name in reads:
        return {node: node.meta["listed"].reshape(-1).tolist()} if "listed" in node.meta else {}
    found: dict[fx.Node, list[int]] = {}
    for user in node.users:
        if user.target in _SAME or user.target in (aten.unbind.int, aten.flatten.using_ints):
            parts: Sequence[fx.Node] = list(user.users) if user.target is aten.unbind.int else [user]
            for part in parts:
                if part.name in reads and "seen" in part.meta:
                    found[part] = [int(part.meta["seen"])]
                else:
                    found |= _numbers_of(part, reads)
    return found


def _roots(bench: Workbench, telling: Collection[Same], listed: list[int]) -> list[fx.Node]:
    """The choices whose numbers tell branches apart, where these are the listed ones, one after the other."""
    out = []
    order = {node: at for at, node in enumerate(bench.graph.nodes)}
    for same in (sorted(same, key=lambda n: order.get(n, -1)) for same in telling):
        told = [tells(node) for node in same]
        for what in told[0]:
            root = what
            while isinstance(root, tuple):  # an axis of a code, or the same elsewhere
                root = root[0]
            if root.target is aten.scatter.value:
                root = root.args[2]
            if [of.get(what, -1) for of in told] == listed and not root.meta["val"].is_floating_point():
                out.append(_origin(root))
    return out


def _lists_kinds(bench: Workbench, node: fx.Node, root: fx.Node, size: int) -> bool:
    """Whether a node holds the kinds that were chosen, for made-up choices."""
    worlds = made_up_choices(bench, root, following(bench, root), size)
    return all(node in w and torch.equal(w[node].reshape(-1), w[root].unique()) for w in worlds)


def _hit(bench: Workbench, chosen: fx.Node, size: int) -> fx.Node:
    """Of which kinds there are some, where nodes are inserted now."""
    flat = bench.call(chosen, aten.reshape.default, chosen, [chosen.meta["val"].numel(), 1])
    each = bench.call(chosen, aten.eq.Tensor, flat, bench.fixed(torch.arange(size), chosen))
    return bench.call(chosen, aten.any.dim, each, 0)


def _ask_whether(bench: Workbench, mask: fx.Node, places: list[int]) -> None:
    """Note that python asked whether a mask holds at these places, and at no others, where nodes are inserted now."""
    others = sorted({*range(mask.meta["val"].numel())}.difference(places))
    _ask(bench, mask, places, aten.all.default)
    if others:
        _ask(bench, mask, others, aten.any.default)


def _ask(bench: Workbench, mask: fx.Node, places: list[int], what: Any) -> None:
    """Note that python asked for something of some entries of a mask, where nodes are inserted now."""
    if len(places) < mask.meta["val"].numel():
        mask = bench.call(mask, aten.index_select.default, mask, 0, bench.fixed(torch.tensor(places), mask))
    bench.reads.add(bench.call(mask, what, mask).name)


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

    (``weight[e]`` for a tensor ``e`` of one number: python reads it, and takes the entry at once.) Nothing is told of a
    number that others are made from.
    """
    seen = [int(node.meta["seen"])] if node.name in reads and "seen" in node.meta else []
    used = bool(seen) and _selects(node.next, seen[0])
    for user in node.users:
        if user.target in _SAME:
            more = _views(user, reads)
            seen, used = seen + more[0], used or more[1]
        elif user.target in _USES:
            used = True
        else:
            return [], False
    return seen, used


def _selects(node: fx.Node, place: int) -> bool:
    """Whether a node takes the entry at some place."""
    return node.target is aten.select.int and bool(node.args[2] == place)
