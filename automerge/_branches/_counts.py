"""What python read of how many rows of each kind there are.

A choice gives every row the number of its kind. What depends on the choice alone is computed for some made-up choices: so it
shows whether it counts the rows of each kind, whichever operators it is made of.
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_map

from automerge._branches._graph import Workbench
from automerge._branches._joins import aten

_DRAWS = 12

World = dict[fx.Node, Any]


def following(bench: Workbench, root: fx.Node) -> list[fx.Node]:
    """What is computed from a node and constants alone, in order."""
    at = {node: i for i, node in enumerate(bench.graph.nodes)}
    found, todo = {root}, [(at[u], u.name, u) for u in root.users]
    heapq.heapify(todo)
    out: list[fx.Node] = []
    while todo:
        node = heapq.heappop(todo)[2]
        alone = node.op == "call_function" and all(n in found or n in bench.constant for n in node.all_input_nodes)
        if alone and node not in found:
            found.add(node)
            out.append(node)
            for u in node.users:
                heapq.heappush(todo, (at[u], u.name, u))
    return out


def made_up_choices(bench: Workbench, root: fx.Node, after: list[fx.Node], count: int) -> list[World]:
    """The values of what depends on the choice alone, for some made-up choices among a number of kinds."""
    rng = torch.Generator().manual_seed(0)
    value = root.meta["val"]
    chosen = root.args[0] if root.target is operator.getitem else root
    several = isinstance(chosen, fx.Node) and chosen.target is aten.topk.default and value.shape[-1] <= count
    out: list[World] = []
    for i in range(_DRAWS):
        if several:  # each kind once in a row; some are chosen more often
            scores = torch.rand((*value.shape[:-1], count), generator=rng) + torch.rand(count, generator=rng) * (i % 3)
            drawn = scores.argsort(-1)[..., : value.shape[-1]].contiguous()
        else:
            drawn = torch.randint(i % count if i % 3 else 0, count, value.shape, generator=rng)
        drawn[drawn == drawn.max()] = count - 1  # a table that is as long as the largest number needs
        out.append(_followed(bench, after, {root: drawn.to(value.dtype)}))
    return out


def _followed(bench: Workbench, after: list[fx.Node], world: World) -> World:
    """All values that follow from one."""
    for node in after:
        if not all(n in world or n in bench.constant for n in node.all_input_nodes):
            continue
        args, kwargs = tree_map(
            lambda a: world.get(a, a.meta.get("val")) if isinstance(a, fx.Node) else a, (node.args, node.kwargs)
        )
        try:
            world[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception:  # a length that python read
            continue
    return world


def _forms(counts: torch.Tensor) -> dict[str, torch.Tensor]:
    """What python may want to know of the numbers of rows."""
    stops = counts.cumsum(0)
    return {"count": counts, "stop": stops, "start": stops - counts, "none": counts == 0, "some": counts > 0}


def counted(
    bench: Workbench, worlds: list[World], counts: list[torch.Tensor], count: int, total: int
) -> tuple[dict[int, tuple[int, int]], set[str]] | None:
    """The runs that python read of, and the names of what it read; None where it read no more than some."""
    forms = [_forms(c) for c in counts]
    whole: dict[str, torch.Tensor] = {}
    reads: set[str] = set()
    single: dict[str, dict[int, Any]] = {}
    looks: dict[str, list[tuple[str, int]]] = {}
    for node in bench.graph.nodes:
        if node.name not in bench.reads or any(node not in world for world in worlds):
            continue
        values = [world[node] for world in worlds]
        if values[0].dim() == 1 and "listed" in node.meta:
            for kind in forms[0]:
                if all(torch.equal(v, f[kind]) for v, f in zip(values, forms, strict=True)):
                    whole[kind] = node.meta["listed"]
                    reads.add(node.name)
        elif values[0].dim() == 0 and "seen" in node.meta:
            column = torch.stack(values)
            for kind in (k for k, form in forms[0].items() if form.dtype == column.dtype):
                table = torch.stack([f[kind] for f in forms])
                for e in (table == column[:, None]).all(0).nonzero()[:, 0].tolist():
                    single.setdefault(kind, {})[e] = node.meta["seen"]
                    looks.setdefault(node.name, []).append((kind, e))
    bounds = _bounds(whole, single, count, total)
    if bounds is None:
        return None
    for name, matches in looks.items():
        if any(_of_every(kind, single[kind], bounds) for kind, _ in matches):
            reads.add(name)
    return (bounds, reads) if reads else None


def _of_every(kind: str, found: Mapping[int, Any], bounds: Mapping[int, Any]) -> bool:
    """Whether python asked the same of every kind of which there are rows; the first begins at 0, the last ends at the end."""
    free = {"start": {min(bounds)}, "stop": {max(bounds)}}.get(kind, set())
    return set(bounds) - free <= set(found)


def _bounds(
    whole: Mapping[str, torch.Tensor], single: Mapping[str, Mapping[int, Any]], count: int, total: int
) -> dict[int, tuple[int, int]] | None:
    """Where the runs begin and end, from what python saw."""
    seen: dict[str, dict[int, Any]] = {k: dict(v) for k, v in single.items()}
    for kind, values in whole.items():
        seen.setdefault(kind, {}).update(enumerate(values.tolist()))
    out: dict[int, tuple[int, int]] = {}
    at = 0
    for e in range(count):
        stop = None
        if e in seen.get("count", {}):
            stop = at + int(seen["count"][e])
        elif seen.get("none", {}).get(e) is True or seen.get("some", {}).get(e) is False:
            stop = at
        elif e in seen.get("stop", {}):
            stop = int(seen["stop"][e])
        elif e + 1 in seen.get("start", {}):
            stop = int(seen["start"][e + 1])
        elif e == count - 1:
            stop = total
        if stop is None or stop < at:
            return None
        if stop > at:
            out[e] = (at, stop)
        at = stop
    return out if at == total and len(out) > 1 else None


def counts_of(bench: Workbench, read: fx.Node, chosen: fx.Node) -> dict[int, int] | None:
    """How many there are of each kind that was chosen, if python read that."""
    listed: Any = read.meta.get("listed")
    if listed is None or listed.dim() != 1 or len(listed) < 2 or chosen.meta["val"].is_floating_point():
        return None
    worlds = made_up_choices(bench, chosen, following(bench, chosen), len(listed))
    counts = [torch.bincount(world[chosen].reshape(-1), minlength=len(listed)) for world in worlds]
    found = counted(bench, worlds, counts, len(listed), chosen.meta["val"].numel())
    if found is None or read.name not in found[1]:
        return None
    return {e: stop - start for e, (start, stop) in found[0].items()}
