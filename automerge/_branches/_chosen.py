"""Rows that a mask chooses, read as all rows of which the others count nothing.

A mixture of experts that sends each token to few of them works on the tokens of one expert at a time::

    token, slot = torch.where(chosen == e)
    out.index_add_(0, token, expert(x[token]) * weight[token, slot, None])

If every row is treated alike, the same comes out where the expert works on all rows and the others are multiplied by zero:
then nothing depends on the data but numbers. Whether rows are treated alike is tried on made-up numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_map

from automerge._branches._distinct import EMPTY, ZEROS, exclusive, once
from automerge._branches._graph import Workbench
from automerge._branches._joins import aten
from automerge._branches._rows import KEPT, SCATTERS, Choice, everywhere

_WRITES = (aten.index_add.default, aten.index_put.default, *SCATTERS)


@dataclass
class _Known:
    """What was found of the choices so far.

    Attributes:
        tried: likeness of what the rows add -> whether it treats all rows in the same way.
        put: what rows were put into -> the masks under which they were put into zeros.
        over: what rows were put over or added to -> what was there before, and the masks.
    """

    tried: dict[int, bool] = field(default_factory=dict)
    put: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    over: dict[fx.Node, tuple[fx.Node, list[fx.Node]]] = field(default_factory=dict)


def chooses(graph: fx.Graph) -> bool:
    """Whether a graph may put rows back that a mask chose."""
    nodes = list(graph.nodes)
    writes = any(n.target in _WRITES for n in nodes)
    return writes and any(n.target is aten.nonzero.default or _masks(n) for n in nodes)


def take_all_rows(bench: Workbench) -> bool:
    """Read rows that a mask chooses as all rows, and multiply those that it does not choose by zero.

    Returns:
        Whether some mask chose none, so that nothing was recorded of what happens to them.
    """
    if not chooses(bench.graph):
        return False
    none = False
    order = {node: i for i, node in enumerate(bench.graph.nodes)}
    masks = dict.fromkeys(
        mask
        for node in order
        for mask in ([node.args[0]] if node.target is aten.nonzero.default else _masks(node))
        if mask not in bench.constant
    )
    known = _Known()
    for mask in masks:
        for choice in _choices(bench, mask, order, known):
            none = _taken(bench, choice, known) or none
    return none


def _taken(bench: Workbench, choice: Choice, known: _Known) -> bool:
    """Read all rows in the place of a choice if they are alike; whether that was done for a mask that chose none."""
    kind = bench.hashes[choice.added]
    if kind not in known.tried:
        known.tried[kind] = _tried(choice, bench.constant)
    made = bench.put(choice.write, choice.compute, choice.outside) if known.tried[kind] else None
    if made is None:
        return False
    masks_so_far = choice.masks(known.put)
    if masks_so_far is not None:
        known.put[made[0]] = masks_so_far
    if choice.places is None and everywhere(choice.at, choice.mask):
        first, before = known.over.get(choice.base, (choice.base, []))
        known.over[made[0]] = first, [*before, choice.mask]
    none = bool(choice.added.meta["val"].shape[0] == 0)
    bench.erase([*choice.closure, choice.write])
    return none


def _masks(node: fx.Node) -> list[fx.Node]:
    """The masks that a node reads rows by."""
    if node.target is not aten.index.Tensor:
        return []
    return [i for i in node.args[1] if isinstance(i, fx.Node) and i.meta["val"].dtype is torch.bool]  # type: ignore[union-attr]


def _tried(choice: Choice, constant: set[fx.Node]) -> bool:
    try:
        return choice.alike(constant)
    except Exception:  # a shape that is fixed in the program, or no numbers that it runs on
        return False


def _choices(bench: Workbench, mask: fx.Node, order: dict[fx.Node, int], known: _Known) -> Iterator[Choice]:
    """What works on the rows that a mask chooses, as far as it ends in one write each (every layer of an expert, say)."""
    found: list[tuple[set[fx.Node], set[fx.Node]]] = []
    for reader in [u for u in mask.users if u.target is aten.nonzero.default or mask in _masks(u)]:
        worked = _worked(bench, reader, order)
        if worked is None:
            return
        rows, writes = worked
        for other in [o for o in found if o[0] & rows or o[1] & writes]:
            found.remove(other)
            rows, writes = rows | other[0], writes | other[1]
        found.append((rows, writes))
    for rows, writes in found:
        if len(writes) != 1:
            continue
        (write,) = writes
        own = sorted(rows, key=order.__getitem__)
        choice = None if write.args[0] in rows else _written(mask, own, write, known)
        if choice is not None:
            yield choice


def _worked(bench: Workbench, reader: fx.Node, order: dict[fx.Node, int]) -> tuple[set[fx.Node], set[fx.Node]] | None:
    """What is made of the rows that a node reads, and where they are put; None if they are used for something else."""
    rows: set[fx.Node] = set()
    writes: set[fx.Node] = set()
    todo = [reader]
    while todo:
        node = todo.pop()
        if node in rows or node in writes:
            continue
        if node not in order or node.op == "output" or node.name in bench.reads:
            return None
        if node.target in _WRITES:
            writes.add(node)
        else:
            rows.add(node)
            todo += node.users
    return rows, writes


def _written(mask: fx.Node, rows: list[fx.Node], write: fx.Node, known: _Known) -> Choice | None:
    """The choice that ends in a write, if that adds."""
    args: Any = write.args
    base, value = args[0], _row(args[2]) if write.target is aten.index_put.default else args[3]
    if write.target is aten.index_add.default:
        index, adds = [args[2]], args[1] == 0 and not write.kwargs
    elif write.target in SCATTERS:
        sums = write.target is aten.scatter_add.default or (args[4] == "sum" and write.kwargs.get("include_self", True))
        return _added(mask, rows, write, [args[2]]) if sums and args[1] == 0 else None
    else:
        index, adds = list(args[1]), len(args) > 3 and bool(args[3])
    at = _axes(index, mask, rows)
    shape = mask.meta["val"].shape
    if at is None and adds:
        return _added(mask, rows, write, index)
    if at is None or len(set(at)) < len(at) or [shape[k] for k in at] != list(base.meta["val"].shape[: len(at)]):
        return None
    replaces = False
    if not adds and write.target is aten.index_put.default:
        if not once(mask, at):
            return None  # of several rows for one place the last is kept
        own = [a for a in value.args if _reads(a, base, index)] if value.target is aten.add.Tensor else []
        if own and not value.kwargs:
            value = next((a for a in value.args if a is not own[0]), None)
        elif not everywhere(at, mask):
            return None
        else:
            replaces = not _fresh(base, mask, known)
    if not isinstance(value, fx.Node) or value not in rows or any(i is None for i in index):
        return None
    if value.meta["val"].dim() - 1 != base.meta["val"].dim() - len(at):
        return None
    if everywhere(at, mask):
        _read_before(mask, rows, base, index, known)
    needed = _made_from(value, rows)
    outside = dict.fromkeys([base, mask, *(n for r in needed for n in r.all_input_nodes if n not in rows)])
    return Choice(mask, rows, needed, write, base, value, at, None, list(outside), replaces)


def _added(mask: fx.Node, rows: list[fx.Node], write: fx.Node, index: list[Any]) -> Choice | None:
    """The choice that ends in a write which adds every row at a place of the row's own."""
    args: Any = write.args
    base, value = args[0], _row(args[2]) if write.target is aten.index_put.default else args[3]
    inside, places = set(rows), index[0]
    if (
        len(index) != 1
        or value not in inside
        or places not in inside
        or value.meta["val"].dim() != base.meta["val"].dim()
    ):
        return None
    mine = _made_from(places, rows)
    if any(n.target not in KEPT for n in mine) or (write.target not in SCATTERS and places.meta["val"].dim() != 1):
        return None
    seen = {*mine, *_made_from(value, rows)}
    needed = [row for row in rows if row in seen]
    outside = dict.fromkeys([base, mask, *(n for r in needed for n in r.all_input_nodes if n not in inside)])
    return Choice(mask, rows, needed, write, base, value, (), places, list(outside))


def _made_from(value: fx.Node, rows: list[fx.Node]) -> list[fx.Node]:
    """Those rows that a value is made from, and itself, in order."""
    inside, seen = set(rows), {value}
    todo = [value]
    while todo:
        more = [n for n in todo.pop().all_input_nodes if n in inside and n not in seen]
        seen.update(more)
        todo += more
    return [row for row in rows if row in seen]


def _row(value: Any) -> Any:
    """What is assigned: of a single row PyTorch takes the first axis away, and of several it does not."""
    if isinstance(value, fx.Node) and value.target in (aten.view.default, aten.reshape.default):
        source: Any = value.args[0]
        if tuple(source.meta["val"].shape) == (1, *value.meta["val"].shape):
            return source
    return value


def _reads(node: Any, base: fx.Node, index: list[Any]) -> bool:
    """Whether a node is what stood at the written places."""
    return (
        isinstance(node, fx.Node)
        and node.target is aten.index.Tensor
        and node.args[0] is base
        and list(node.args[1]) == index  # type: ignore[arg-type]
    )


def _fresh(base: fx.Node, mask: fx.Node, known: _Known) -> bool:
    """Whether a base holds nothing wherever a mask chooses: new, and written to under masks that exclude this one."""
    before = known.put.get(base, [] if base.target in (*ZEROS, *EMPTY) else None)
    return before is not None and all(exclusive(mask, other) for other in before)


def _read_before(mask: fx.Node, rows: list[fx.Node], base: fx.Node, index: list[Any], known: _Known) -> None:
    """Read the rows of a mask from what was there before others were put over it, under masks that exclude this one."""
    first, masks = known.over.get(base, (base, []))
    if all(exclusive(mask, other) for other in masks):
        for row in (r for r in rows if _reads(r, base, index)):
            row.update_arg(0, first)


def _axes(index: list[Any], mask: fx.Node, rows: list[fx.Node]) -> tuple[int, ...] | None:
    """The axes of the mask that the indices of a write run along."""
    if index == [mask]:
        return tuple(range(mask.meta["val"].dim()))
    place = torch.ones(mask.meta["val"].shape, dtype=torch.bool)
    env: dict[fx.Node, Any] = {}
    for node in rows:
        if node.target is aten.nonzero.default and node.args[0] is mask:
            env[node] = place.nonzero()
        elif all(n in env for n in node.all_input_nodes):
            args, kwargs = tree_map(lambda a: env[a] if isinstance(a, fx.Node) else a, (node.args, node.kwargs))
            env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    columns = place.nonzero().T
    out = []
    for i in index:
        found = [k for k, c in enumerate(columns) if i in env and torch.equal(env[i], c)]
        if not found:
            return None
        out.append(found[0] if len(found) == 1 else next((k for k in found if k not in out), found[0]))
    return tuple(out)
