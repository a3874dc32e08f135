"""Rows that a mask chooses, read as all rows of which the others count nothing.

A mixture of experts that sends each token to few of them works on the tokens of one expert at a time::

    token, slot = torch.where(chosen == e)
    out.index_add_(0, token, expert(x[token]) * weight[token, slot, None])

If every row is treated alike, the same comes out where the expert works on all rows and the others are multiplied by zero:
then nothing depends on the data but numbers. Whether rows are treated alike is tried on made-up numbers.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_map

from automerge._branches._distinct import EMPTY, ZEROS, exclusive, once
from automerge._branches._graph import Workbench
from automerge._branches._joins import SORTS, aten, keeps_rows, order_of
from automerge._double import double_precision
from automerge._made_up import Draw, signed, small

_SCATTERS = (aten.scatter_add.default, aten.scatter_reduce.two)
_WRITES = (aten.index_add.default, aten.index_put.default, *_SCATTERS)
_KEPT = (  # every row of places stays what it is
    *(aten.index.Tensor, aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.repeat.default),
    *(aten.expand.default, aten.floor_divide.default, aten.div.Tensor_mode, aten._to_copy.default, aten.clone.default),
)


@dataclass
class Choice:
    """What works on the rows that a mask chooses.

    Attributes:
        mask: the mask.
        closure: the nodes whose values have one row for every chosen position, in order.
        rows: those of them that matter for what is put back.
        write: where the rows are put back.
        base: what they are put into.
        added: the node that holds what each row adds to the base.
        at: along which axes of the mask the base lies, if the rows are put where they were taken from.
        places: where else every row is added.
        replaces: whether the rows take the place of what is in the base.
        outside: the nodes that the rows are made from, the base and the mask first.
    """

    mask: fx.Node
    closure: list[fx.Node]
    rows: list[fx.Node]
    write: fx.Node
    base: fx.Node
    added: fx.Node
    at: tuple[int, ...]
    places: fx.Node | None
    outside: list[fx.Node]
    replaces: bool = False

    def masks(self, known: Mapping[fx.Node, list[fx.Node]]) -> list[fx.Node] | None:
        """The masks under which rows were put into zeros, with this one; None if they do not tell where zeros are left."""
        before = known.get(self.base, [] if self.base.target in (*ZEROS, *EMPTY) else None)
        here = self.places is None and not self.replaces and _everywhere(self.at, self.mask)
        return [*before, self.mask] if here and before is not None else None

    def compute(self, *tensors: torch.Tensor) -> torch.Tensor:
        """The base with what all rows add to it; of those that the mask does not choose nothing."""
        known = dict(zip(self.outside, tensors, strict=True))
        shape = known[self.mask].shape
        values = self.values(known, torch.arange(math.prod(shape)))
        added = values[self.added]
        chosen = (known[self.mask] != 0).reshape(-1, *(1 for _ in added.shape[1:]))
        base = known[self.base]
        if self.places is not None:
            blank = torch.zeros(base.shape, dtype=base.dtype)
            scatters = self.write.target in _SCATTERS
            add = torch.ops.aten.scatter_add if scatters else torch.ops.aten.index_add
            return base + add(blank, 0, values[self.places], added * chosen)
        grid = (added * chosen).reshape(*shape, *added.shape[1:])
        rest = [k for k in range(len(shape)) if k not in self.at]
        if rest:
            grid = grid.sum(rest)
        left = [k for k in range(len(shape)) if k in self.at]
        order = [left.index(k) for k in self.at]
        if order != sorted(order):
            grid = grid.permute(*order, *range(len(order), grid.dim()))
        if self.replaces:
            return torch.where(chosen.reshape(*shape, *chosen.shape[1:]), grid, base)
        return (torch.zeros_like(base) if self.base.target in EMPTY else base) + grid

    def values(self, known: Mapping[fx.Node, Any], places: torch.Tensor) -> dict[fx.Node, Any]:
        """The values of the rows at some positions of the mask, numbered row after row."""
        env: dict[fx.Node, Any] = dict(known)
        shape = known[self.mask].shape
        columns = list(torch.unravel_index(places, tuple(shape)))
        for node in self.rows:
            if node.target is aten.nonzero.default and node.args[0] is self.mask:
                env[node] = torch.stack(columns, 1)
                continue
            args, kwargs = tree_map(lambda a: env[a] if isinstance(a, fx.Node) else a, (node.args, node.kwargs))
            if node.target is aten.index.Tensor:
                args = (args[0], _spread(node.args[1], args[1], self.mask, columns))
            elif (rest := keeps_rows(node)) is not None:
                args = (args[0], [args[0].shape[0], *rest], *args[2:])
            env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return env

    def alike(self, constant: set[fx.Node]) -> bool:
        """Whether every row is treated as it would be among others, also where all were chosen.

        Tried are as many as were recorded, and both halves: each row is left out of one, and so is the first and the last.
        """
        rng = torch.Generator().manual_seed(0)
        size = self.mask.meta["val"].numel()
        if size < 2:
            return False
        some = min(self.rows[0].meta["val"].shape[0] or 2, size - 1)
        drawn = torch.randperm(size, generator=rng)[:some].sort().values
        parts = [drawn, torch.arange(size // 2), torch.arange(size // 2, size)]
        return all(self._same_among(parts, constant, draw, rng) for draw in (small, signed))

    def _same_among(self, parts: list[torch.Tensor], constant: set[fx.Node], draw: Draw, rng: torch.Generator) -> bool:
        """Whether the rows at some positions of the mask are the same without the others, for made-up numbers."""
        known: dict[fx.Node, Any] = {}
        for n in self.outside:
            _make_up(n, constant, draw, rng, known)
        size = self.mask.meta["val"].numel()
        with torch.no_grad(), double_precision():
            whole = self.values(known, torch.arange(size))[self.added]
            if whole.shape[0] != size or (draw is small and not (whole != 0).flatten(1).any(1).all()):
                return False  # what is zero shows nothing
            found = [(whole[places], self.values(known, places)[self.added]) for places in parts]
        return all(torch.allclose(a, b, rtol=1e-9, atol=1e-12, equal_nan=True) for a, b in found)


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
    tried: dict[int, bool] = {}  # what is alike in its operators treats rows in the same way
    put: dict[fx.Node, list[fx.Node]] = {}  # base -> the masks under which rows were put into zeros
    over: dict[fx.Node, tuple[fx.Node, list[fx.Node]]] = {}  # what rows were put over -> that before, and their masks
    for mask in masks:
        _read_before(mask, over)
        for choice in _choices(bench, mask, order, put):
            none = _taken(bench, choice, tried, put, over) or none
    return none


def _read_before(mask: fx.Node, over: Mapping[fx.Node, tuple[fx.Node, list[fx.Node]]]) -> None:
    """Read the rows of a mask from what was there before others were put over it, under masks that exclude this one."""
    for reader in [u for u in mask.users if u.target is aten.index.Tensor and u.args[1] == [mask]]:
        first, masks = over.get(reader.args[0], (None, []))  # type: ignore[arg-type]
        if first is not None and all(exclusive(mask, other) for other in masks):
            reader.update_arg(0, first)


def _taken(
    bench: Workbench,
    choice: Choice,
    tried: dict[int, bool],
    put: dict[fx.Node, list[fx.Node]],
    over: dict[fx.Node, tuple[fx.Node, list[fx.Node]]],
) -> bool:
    """Read all rows in the place of a choice if they are alike; whether that was done for a mask that chose none."""
    kind = bench.hashes[choice.added]
    if kind not in tried:
        tried[kind] = _tried(choice, bench.constant)
    made = bench.put(choice.write, choice.compute, choice.outside) if tried[kind] else None
    if made is None:
        return False
    masks_so_far = choice.masks(put)
    if masks_so_far is not None:
        put[made[0]] = masks_so_far
    if choice.replaces:
        first, before = over.get(choice.base, (choice.base, []))
        over[made[0]] = first, [*before, choice.mask]
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


def _choices(
    bench: Workbench, mask: fx.Node, order: dict[fx.Node, int], known: dict[fx.Node, list[fx.Node]]
) -> Iterator[Choice]:
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
        choice = None if write.args[0] in rows else _written(mask, sorted(rows, key=order.__getitem__), write, known)
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


def _written(mask: fx.Node, rows: list[fx.Node], write: fx.Node, known: dict[fx.Node, list[fx.Node]]) -> Choice | None:
    """The choice that ends in a write, if that adds."""
    args: Any = write.args
    base, value = args[0], args[2] if write.target is aten.index_put.default else args[3]
    if write.target is aten.index_add.default:
        index, adds = [args[2]], args[1] == 0 and not write.kwargs
    elif write.target in _SCATTERS:
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
        elif not _everywhere(at, mask):
            return None
        else:
            replaces = not _fresh(base, mask, known)
    if not isinstance(value, fx.Node) or value not in rows or any(i is None for i in index):
        return None
    if value.meta["val"].dim() - 1 != base.meta["val"].dim() - len(at):
        return None
    needed = _made_from(value, rows)
    outside = dict.fromkeys([base, mask, *(n for r in needed for n in r.all_input_nodes if n not in rows)])
    return Choice(mask, rows, needed, write, base, value, at, None, list(outside), replaces)


def _added(mask: fx.Node, rows: list[fx.Node], write: fx.Node, index: list[Any]) -> Choice | None:
    """The choice that ends in a write which adds every row at a place of the row's own."""
    args: Any = write.args
    base, value = args[0], args[2] if write.target is aten.index_put.default else args[3]
    inside, places = set(rows), index[0]
    if (
        len(index) != 1
        or value not in inside
        or places not in inside
        or value.meta["val"].dim() != base.meta["val"].dim()
    ):
        return None
    mine = _made_from(places, rows)
    if any(n.target not in _KEPT for n in mine) or (write.target not in _SCATTERS and places.meta["val"].dim() != 1):
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


def _reads(node: Any, base: fx.Node, index: list[Any]) -> bool:
    """Whether a node is what stood at the written places."""
    return (
        isinstance(node, fx.Node)
        and node.target is aten.index.Tensor
        and node.args[0] is base
        and list(node.args[1]) == index  # type: ignore[arg-type]
    )


def _fresh(base: fx.Node, mask: fx.Node, known: dict[fx.Node, list[fx.Node]]) -> bool:
    """Whether a base holds nothing wherever a mask chooses: new, and written to under masks that exclude this one."""
    before = known.get(base, [] if base.target in (*ZEROS, *EMPTY) else None)
    return before is not None and all(exclusive(mask, other) for other in before)


def _everywhere(at: tuple[int, ...], mask: fx.Node) -> bool:
    """Whether the places that rows are put to are the positions of the mask, so that others are for other masks."""
    return at == tuple(range(mask.meta["val"].dim()))


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


def _spread(index: Any, values: Sequence[Any], mask: fx.Node, columns: list[torch.Tensor]) -> list[Any]:
    """Indices in which the mask is given by the positions that it chooses."""
    out: list[Any] = []
    for node, value in zip(index, values, strict=True):
        out += columns if node is mask else [value]
    return out


def _orders(node: fx.Node) -> bool:
    """Whether a node holds the places that sorted entries came from."""
    source: Any = node.args[0] if node.target is operator.getitem else node
    return source.target in SORTS and order_of(source) is node


def _make_up(
    node: fx.Node, constant: set[fx.Node], draw: Draw, rng: torch.Generator, known: dict[fx.Node, Any]
) -> None:
    """Any numbers in the place of a value; places that rows came from are some order of them, or made from one.

    Other whole numbers are 0 and 1, so that what they are indices of has them.
    """
    value = node.meta["val"]
    if node in known:
        return
    if node in constant:
        known[node] = value
    elif value.is_floating_point() or value.is_complex():
        known[node] = draw(value.shape, rng)
    elif node.op == "call_function" and _orders(node):
        known[node] = torch.rand(value.shape, generator=rng).argsort(-1)
    elif node.op == "call_function" and node.target in _KEPT:
        for n in node.all_input_nodes:
            _make_up(n, constant, draw, rng, known)
        args, kwargs = tree_map(lambda a: known[a] if isinstance(a, fx.Node) else a, (node.args, node.kwargs))
        known[node] = node.target(*args, **kwargs)
    else:
        known[node] = (torch.rand(value.shape, generator=rng) < 0.5).to(value.dtype)
