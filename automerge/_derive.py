"""From traced graphs to a `Symmetry`: as they are, and with what only stacked branches show."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import fx

from automerge._assemble import Assembler, halved, within
from automerge._branches import stacked
from automerge._composed import without_composed
from automerge._notes import of_reach, of_reads, of_trace
from automerge._search import UnitSet, search
from automerge._stacks import aligned, joined, taken_apart
from automerge._structure import Structure
from automerge.rules import DEBUG, ORDERED, Analysis, analyse, is_state
from automerge.rules._axes import Family
from automerge.rules._nodes import looked_at
from automerge.symmetry import Exchange, Generator, Symmetry
from automerge.trace import TraceInfo

_MAX_PASSES = 8


def infer_graph(*graphs: fx.GraphModule, everywhere: bool = False) -> tuple[Symmetry, Analysis]:
    """The symmetry of a traced graph, unverified, and the analysis it rests on; of several, what holds for all.

    The analysis knows nothing of what only stacked branches show: exchanges of modules, and of pieces that a loop takes.

    Args:
        graphs: traced graphs of one model.
        everywhere: whether what branches show must show in all graphs; else it may be in those that reach most of them.
    """
    symmetry, analysis, assembler = infer_recorded(*graphs)
    return with_branches(symmetry, analysis, assembler, graphs, everywhere), analysis


def with_branches(
    symmetry: Symmetry, analysis: Analysis, assembler: Assembler, graphs: Sequence[fx.GraphModule], everywhere: bool
) -> Symmetry:
    """A symmetry of `infer_recorded`, with what only stacked branches show; the other arguments are those of `infer_graph`."""
    start = time.perf_counter()
    try:
        found = _of_branches(symmetry, analysis, assembler, graphs, everywhere)
    except Exception:  # what cannot be stacked must not take the model down with it
        if DEBUG:
            raise
        found = None
    if found is None:
        return symmetry
    return replace(found, stats={**found.stats, "branches_seconds": time.perf_counter() - start})


def _of_branches(
    symmetry: Symmetry, analysis: Analysis, assembler: Assembler, graphs: Sequence[fx.GraphModule], everywhere: bool
) -> Symmetry | None:
    """The symmetry with what only stacked branches show; None where nothing is stacked."""
    if any(node.meta.get("from_inputs") for graph in graphs for node in graph.graph.nodes):
        return None  # stacked, these would be constants
    branches = stacked(graphs, everywhere)
    if branches is None or (everywhere and len(branches.graphs) < len(graphs)):
        return None
    for graph in branches.graphs if graphs[0].meta.get(ORDERED) else ():
        graph.meta[ORDERED] = True
    other, seen, _ = infer_recorded(*branches.graphs, splits=_nested(branches.stacks))
    found = [taken_apart(generator, branches.stacks, other.shapes) for generator in other.sets]
    left = [g for g, own in zip(other.sets, found, strict=True) if own is None]
    parts = aligned(left, branches.stacks, other.shapes)
    found += [taken_apart(generator, branches.stacks, other.shapes) for generator in parts]
    apart = _apart(graphs)
    found = [own for own in found if own is not None and not within(own, apart)]
    found += [own for own in symmetry.sets if within(own, apart)]
    partly = {*analysis.unread, *(n for stack in seen.unread for n in branches.stacks.get(stack, np.array([])).flat)}
    buffers = graphs[0].meta["trace"].buffers
    read = (_read(e, partly, buffers) for e in found if isinstance(e, Exchange))
    # a number that python may use anywhere in the module that it is of
    looked = {name.rpartition(".")[0] for graph in graphs for name in looked_at(graph)} - {""}
    exchanges = tuple(e for e in read if e.size > 1 and not _told_apart(e, looked))
    before = [n for n in symmetry.shapes if n not in analysis.states]
    generators = [g for g in found if isinstance(g, Generator)]
    # where nothing was recorded of some rows, what the recorded graph leaves free may be free in no other
    sets = tuple(generators) if branches.complete else joined(symmetry.sets, generators, symmetry.shapes, before)
    if not exchanges and sets == symmetry.sets:
        return symmetry
    out = replace(symmetry, sets=sets, exchanges=exchanges)
    unused = [n for n in before if n not in out.moved]
    moved = [*sets, *(Generator(e.size, e.slots) for e in exchanges)]
    pins = tuple(assembler.pins(moved, dict(symmetry.shapes), unused, apart))
    kept = [n for n in symmetry.notes if n not in of_reach(analysis, before)]
    notes = tuple(dict.fromkeys((*kept, *of_reach(analysis, unused), *seen.engine.notes)))
    return replace(out, pins=pins, notes=notes)


def _read(exchange: Exchange, partly: Collection[str], buffers: Mapping[str, torch.Tensor]) -> Exchange:
    """An exchange of those units of which all is read.

    Of a table that is read in part, nothing says whether the rest may be exchanged; of a buffer that is the same in all
    units (a mask; not zeros, which training may fill), its values do.
    """
    same = {name for column in zip(*exchange.params, strict=True) if _equal(column, buffers) for name in column}
    units = [u for u, params in enumerate(exchange.params) if same.issuperset(n for n in params if n in partly)]
    slots = tuple(replace(s, index=s.index[units]) for s in exchange.slots)
    return Exchange(len(units), tuple(exchange.params[u] for u in units), slots, exchange.name)


def _told_apart(exchange: Exchange, modules: Collection[str]) -> bool:
    """Whether some of these modules are in one unit, and not in all."""
    names = [name for params in exchange.params for name in params]
    inside = ([name.startswith(f"{module}.") for name in names] for module in modules)
    return any(any(of) and not all(of) for of in inside)


def _equal(names: Sequence[str], buffers: Mapping[str, torch.Tensor]) -> bool:
    values = [buffers.get(name) for name in names]
    first = values[0]
    if first is None or not first.numel() or bool((first == first.flatten()[0]).all()):
        return False
    return all(v is not None and torch.equal(v, first) for v in values[1:])


def _nested(stacks: Mapping[str, np.ndarray]) -> dict[tuple[str, int, int], np.ndarray]:
    """Modules within several outer ones have an order for each of these."""
    return {
        (stack, names.ndim - 1, outer): np.arange(names.shape[outer])
        for stack, names in stacks.items()
        for outer in range(names.ndim - 1)
    }


def infer_recorded(
    *graphs: fx.GraphModule, splits: Mapping[tuple[str, int, int], np.ndarray] | None = None
) -> tuple[Symmetry, Analysis, Assembler]:
    """The symmetry of some graphs as they are, the analysis it rests on, and what makes its generators.

    Args:
        graphs: traced graphs of one model.
        splits: parameter axes that have an order for every class of positions of another axis, from the first pass on.
    """
    graph, apart = graphs[0], _apart(graphs)
    searched = _searched(graphs, splits or {})
    analysis, structure, assembler = searched.analysis, searched.structure, searched.assembler
    info: TraceInfo = graph.meta["trace"]
    shapes = _shapes(graph)
    kept: list[tuple[UnitSet, Generator]] = []
    reads: dict[str, str] = {}
    for units in searched.found:
        made = assembler.generator(units)
        read = _read_only(made, units, analysis, structure)
        reads |= dict.fromkeys(filter(None, read), made.name if made else "")
        if made is not None and not (read or halved(made, analysis.unread)):
            kept.append((units, made))
    dropped = len(searched.found) - len(kept)
    kept = [kept[i] for i in without_composed([units for units, _ in kept], assembler.wanted())]
    generators = [made for _, made in kept]
    analysis.units += [assembler.plain(units) for units, _ in kept]
    analysis.united = structure.index
    unused = [n for n in shapes if n not in analysis.states]
    symmetry = Symmetry(
        shapes=shapes,
        sets=tuple(generators),
        statistics=frozenset(analysis.statistics),
        aliases={a: n for a, n in info.aliases.items() if n in shapes},
        pins=tuple(assembler.pins(generators, shapes, unused, {**analysis.untold, **apart})),
        unruled=tuple(analysis.unruled),
        notes=(*of_trace(info), *of_reach(analysis, unused), *of_reads(reads), *analysis.engine.notes),
        flow=_flow(graph),
        axis_graph=analysis.engine.axes.graph,
        stats={**searched.stats, "unrepresentable": dropped},
    )
    return symmetry, analysis, assembler


@dataclass(frozen=True, eq=False)
class _Searched:
    """The analysis that has the largest group, and its sets of units."""

    analysis: Analysis
    structure: Structure
    assembler: Assembler
    found: list[UnitSet]
    stats: Mapping[str, Any] = field(default_factory=dict)


def _searched(graphs: Sequence[fx.GraphModule], splits: Mapping[tuple[str, int, int], np.ndarray]) -> _Searched:
    """Analyse and search until no split of a parameter's axis has come to nothing."""
    clock = time.perf_counter()
    withdrawn, passes = set[tuple[str, int, int]](), 0
    best: tuple[float, _Searched] | None = None
    while True:
        analysis, more = _analysed(graphs, splits, withdrawn)
        passes += more
        ruled = time.perf_counter()
        structure = Structure(analysis.engine.axes)
        assembler = Assembler(analysis.engine.axes, structure)
        found = search(structure, assembler.wanted())
        order = sum(math.lgamma(len(units.table) + 1) for units in found)
        if best is None or order >= best[0]:  # what takes the place of a split that gave way may come to less
            best = order, _Searched(analysis, structure, assembler, found)
        idle = _idle(analysis.engine.in_the_way(), structure, found) - withdrawn
        if not idle:
            break
        withdrawn |= idle
        splits = {key: classes for key, classes in analysis.engine.requests.items() if key not in withdrawn}
    stats = {
        "passes": passes,
        "rules_seconds": ruled - clock,
        "search_seconds": time.perf_counter() - ruled,
        "vertices": int(best[1].analysis.engine.axes.count),
        "edges": int(best[1].structure.source.size),
    }
    return replace(best[1], stats=stats)


def _read_only(made: Generator | None, units: UnitSet, analysis: Analysis, structure: Structure) -> list[str]:
    """Where python reads values that have these units, if no output depends on what they move: what they are is not known."""
    if made is None or not analysis.asked or not within(made, analysis.untold):
        return []
    return [where for labels, where in analysis.asked if np.isin(structure.index[labels], units.table).any()]


def _analysed(
    graphs: Sequence[fx.GraphModule],
    splits: Mapping[tuple[str, int, int], np.ndarray],
    withdrawn: Collection[tuple[str, int, int]],
) -> tuple[Analysis, int]:
    """The analysis with all splits that it asks for, and the number of passes."""
    for passes in itertools.count(1):
        analysis = analyse(graphs, splits, withdrawn)
        if set(analysis.engine.requests) == set(splits) or passes >= _MAX_PASSES:
            break
        splits = dict(analysis.engine.requests)
    return analysis, passes


def _idle(
    splits: Sequence[tuple[Family, int]], structure: Structure, found: Sequence[UnitSet]
) -> set[tuple[str, int, int]]:
    """Splits that came to nothing: whatever moves positions of one class moves some of all.

    Args:
        splits: families of parameters, and by which of its axes each.
        structure: what was searched.
        found: the sets of units.
    """
    out = set()
    for family, i in splits:
        vertices = structure.index[family.start : family.start + family.size].reshape(family.shape)
        classes = np.moveaxis(vertices, i, 0).reshape(family.shape[i], -1)
        moved = [np.isin(classes, units.table).any(1) for units in found]
        if family.param is not None and all(of.all() or not of.any() for of in moved):
            out.add((family.param, family.axis, family.by[i][0]))
    return out


def _apart(graphs: Sequence[fx.GraphModule]) -> Mapping[str, np.ndarray]:
    """The entries of parameters that the output does not depend on, though rules follow what is computed with them."""
    found: Mapping[str, np.ndarray] = graphs[0].meta.get("apart", {})
    return found


def _shapes(graph: fx.GraphModule) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for node in graph.graph.nodes:
        if node.op == "placeholder" and node.meta["kind"] == "state" and is_state(node.meta["val"]):
            shapes[node.meta["name"]] = tuple(node.meta["val"].shape)
    return shapes


def _flow(graph: fx.GraphModule) -> tuple[tuple[str, str], ...]:
    """Module paths between which tensors pass; inputs and outputs are ``"input"`` and ``"output"``."""
    pairs: dict[tuple[str, str], None] = {}

    def home(node: fx.Node) -> str | None:
        if node.op == "placeholder":
            return "input" if node.meta["kind"] == "input" else None
        return "output" if node.op == "output" else node.meta.get("module", "")

    for node in graph.graph.nodes:
        to = home(node)
        for source in node.all_input_nodes:
            here = home(source)
            if here is not None and to is not None and here != to:
                pairs[here, to] = None
    return tuple(pairs)
