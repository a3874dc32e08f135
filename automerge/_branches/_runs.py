"""Runs of rows sorted by a choice, read as the rows that a mask chooses.

A mixture of experts may sort its rows by expert and cut them by how many there are of each, which python reads::

    order = chosen.argsort();  counts = chosen.bincount().tolist()
    for e, rows in enumerate(x[order].split(counts)):
        parts.append(experts[e](rows))
    out = torch.cat(parts)

The same rows are those where ``chosen[order] == e``; written like this, the counts are needed no more::

    out[chosen[order] == e] = experts[e](x[order][chosen[order] == e])

What python read are lengths of runs, and each run is treated alike: that others would be cut as these are is as good a guess
as that a loop over experts goes on alike for each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from automerge._branches._counts import World, counted, following, made_up_choices
from automerge._branches._graph import Workbench
from automerge._branches._joins import SORTS, aten, copied, keeps_rows, likeness, order_of, piece
from automerge._branches._through import carry_through

_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.clone.default, aten.detach.default)


def takes_runs(graph: fx.GraphModule) -> bool:
    """Whether python may cut sorted rows by what it read."""
    return bool(graph.meta["trace"].reads) and any(n.target in SORTS for n in graph.graph.nodes)


def take_runs(bench: Workbench) -> None:
    """Read runs of sorted rows as rows that masks choose, where python cut them by the numbers of rows of each kind."""
    if not takes_runs(bench.recorded):
        return
    for sort in [n for n in bench.graph.nodes if n.target in SORTS and n not in bench.constant]:
        ids: Any = sort.args[0]
        value = ids.meta["val"]
        order = order_of(sort)
        if value.dim() != 1 or value.is_floating_point() or len(value) < 2 or order is None:
            continue
        runs = _runs(bench, ids, order)
        if runs is not None:
            _replace(bench, sort, runs)


@dataclass
class Runs:
    """How python cut sorted rows.

    Attributes:
        ids: the numbers that the rows were sorted by.
        order: where the rows came from.
        count: how many kinds of rows there may be.
        bounds: kind -> where its run begins and ends, for those of which there are rows.
        reads: names of the nodes that python read for it.
        slices: what is cut, all runs of each value: node -> kind.
        writes: where the runs are put together again.
    """

    ids: fx.Node
    order: fx.Node
    count: int
    bounds: dict[int, tuple[int, int]]
    reads: set[str]
    slices: dict[fx.Node, int]
    writes: list[fx.Node]


def _runs(bench: Workbench, ids: fx.Node, order: fx.Node) -> Runs | None:
    root = ids
    while root.target in _VIEWS and isinstance(root.args[0], fx.Node) and root.args[0] not in bench.constant:
        root = root.args[0]
    after = following(bench, root)
    lengths = {
        n.meta["val"].shape[0] for n in after if isinstance(n.meta["val"], torch.Tensor) and n.meta["val"].dim() == 1
    }
    for count in sorted(length for length in lengths if length > 1):
        worlds = made_up_choices(bench, root, after, count)
        if not all(_ascending(world, ids, order) for world in worlds):
            continue
        counts = [torch.bincount(world[ids].reshape(-1), minlength=count) for world in worlds]
        found = counted(bench, worlds, counts, count, len(ids.meta["val"]))
        if found is None:
            continue
        bounds, reads = found
        if len({stop - start for start, stop in bounds.values()}) < 2:
            continue  # equal pieces may be cut for another reason
        slices = _slices(bench, order, bounds, len(ids.meta["val"]))
        if carry_through(bench, slices, bounds):
            slices = _slices(bench, order, bounds, len(ids.meta["val"]))
        writes = _alike(bench, slices, bounds)
        if writes is not None:
            return Runs(ids, order, count, bounds, reads, slices, writes)
    return None


def _ascending(world: World, ids: fx.Node, order: fx.Node) -> bool:
    """Whether an order sorts numbers by size."""
    return order in world and torch.equal(world[ids][world[order]], world[ids].sort().values)


# -------------------------------------------------------------------- what it cut
def _slices(bench: Workbench, order: fx.Node, bounds: Mapping[int, tuple[int, int]], total: int) -> dict[fx.Node, int]:
    """The pieces that are runs, of values of which every run is cut."""
    kinds = {where: e for e, where in bounds.items()}
    cuts: dict[fx.Node, int] = {}
    behind = False
    for node in bench.graph.nodes:
        behind = behind or node is order
        cut = piece(node) if behind and node.op == "call_function" else None
        if cut is None or cut.dim or not cut.keeps or cut.source.meta["val"].shape[0] != total:
            continue
        kind = kinds.get((cut.start, cut.start + cut.length))
        if kind is not None:
            cuts[node] = kind
    found: dict[fx.Node, set[int]] = {}
    for node, kind in cuts.items():
        found.setdefault(node.all_input_nodes[0], set()).add(kind)
    return {node: kind for node, kind in cuts.items() if found[node.all_input_nodes[0]] == set(bounds)}


def _alike(
    bench: Workbench, slices: Mapping[fx.Node, int], bounds: Mapping[int, tuple[int, int]]
) -> list[fx.Node] | None:
    """Where the runs are put together again, if each is treated alike until then."""
    hashes = dict(bench.hashes)
    owner: dict[fx.Node, int] = {}
    made: dict[int, list[int]] = {e: [] for e in bounds}
    writes: list[fx.Node] = []
    for node in bench.graph.nodes:
        if node in slices:
            cut = piece(node)
            assert cut is not None
            owner[node], hashes[node] = slices[node], hash(("run", hashes[cut.source]))
            continue
        owners = {owner[n] for n in node.all_input_nodes if n in owner}
        if not owners:
            continue
        values = _written(node)
        if _only_written(node):
            if copied(node) in owner:
                owner[node] = owner[copied(node)]  # judged where it is written
            continue
        if values is None:
            if len(owners) > 1 or node.op == "output":
                return None
            (owner[node],) = owners
            rest = keeps_rows(node)
            hashes[node] = likeness(node, hashes) if rest is None else hash((node.target, hashes[node.args[0]], rest))
            if node.name in bench.reads:
                return None
            continue
        writes.append(node)
        if any(value not in owner for value in values) or (
            node.target is not aten.cat.default and node.args[0] in owner
        ):
            return None
        for value in values:
            made[owner[value]].append(hashes[value])
        if node.target is aten.slice_scatter.default and node.args[3:] != bounds[owner[values[0]]]:
            return None
        if node.target is aten.cat.default and [owner[v] for v in values] != sorted(bounds):
            return None
    first, *others = made.values()
    return writes if first and all(o == first for o in others) else None


def _written(node: fx.Node) -> list[fx.Node] | None:
    """What a node puts together or writes, rows or places of rows; None for another operator."""
    args: Any = node.args
    if node.target is aten.cat.default and (len(args) < 2 or args[1] == 0):
        return list(args[0])
    if node.target is aten.index_add.default:
        return [args[2], args[3]]
    if node.target is aten.index_put.default and len(args[1]) == 1:
        return [args[1][0], args[2]]
    if node.target in (aten.scatter_add.default, aten.scatter_reduce.two):
        return [args[2], args[3]]
    if node.target is aten.slice_scatter.default and (len(args) < 3 or args[2] == 0):
        return [copied(args[1])]
    return None


def _only_written(node: fx.Node) -> bool:
    """Whether a node only spreads a value over a slice, into which it is written next."""
    return copied(node) is not node and all(u.target is aten.slice_scatter.default for u in node.users)


# -------------------------------------------------------------------- the other graph
def _replace(bench: Workbench, sort: fx.Node, runs: Runs) -> None:
    graph = bench.graph
    masks: dict[int, fx.Node] = {}
    value = runs.ids.meta["val"]
    with graph.inserting_after(runs.order):
        numbers = bench.call(runs.order, aten.index.Tensor, runs.ids, [runs.order], value=value)
    with graph.inserting_after(numbers):
        for e in runs.bounds:
            blank = torch.empty(value.shape, dtype=torch.bool, device="meta")
            masks[e] = bench.call(runs.order, aten.eq.Scalar, numbers, e, value=blank)
    for node, e in runs.slices.items():
        source = piece(node).source  # type: ignore[union-attr]
        with graph.inserting_before(node):
            rows = bench.call(node, aten.index.Tensor, source, [masks[e]], value=node.meta["val"])
            node.replace_all_uses_with(rows)
        graph.erase_node(node)
    for node in runs.writes:
        args: Any = node.args
        with graph.inserting_before(node):
            if node.target is aten.cat.default:
                new = node.meta["val"]
                blank = torch.zeros((), dtype=new.dtype).expand(new.shape)
                base = bench.call(node, aten.zeros.default, list(new.shape), value=blank, dtype=new.dtype)
                parts = dict(zip(sorted(runs.bounds), args[0], strict=True))
            elif node.target is aten.slice_scatter.default:
                kind = next(e for e, where in runs.bounds.items() if where == tuple(args[3:5]))
                base, parts = args[0], {kind: copied(args[1])}
            else:
                continue
            for e, part in parts.items():
                base = bench.call(node, aten.index_put.default, base, [masks[e]], part, value=node.meta["val"])
        node.replace_all_uses_with(base)
        graph.erase_node(node)
    bench.reads -= runs.reads
    bench.erase([n for n in graph.nodes if n.op == "call_function"])  # what was written over, lengths
    bench.sorts[sort.name] = runs.count
