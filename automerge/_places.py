"""Where activations carry groups: values of a traced graph whose entries the generators of a symmetry permute.

Places are the inputs of contractions (linear maps, convolutions, attention products): the values after the nonlinearity,
or the residual stream as its consumers read it, as Git Re-Basin and ZipIt observe them. A group that no such input
carries is observed at the last value that does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from automerge._assemble import Assembler
from automerge._derive import infer_recorded
from automerge._search import search
from automerge._structure import Structure
from automerge.rules import Analysis, Value
from automerge.rules._registry import is_pointwise
from automerge.symmetry import Slot, Symmetry

CONTRACTIONS = frozenset(
    {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "convolution", "linear", "_grouped_mm"}
)
VIEWS = frozenset(
    {"view", "_unsafe_view", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze", "clone", "alias", "detach"}
)
_OVERWRITING = frozenset({"masked_fill", "scatter", "index_put", "fill", "index_fill", "full_like"})
_FILLING = _OVERWRITING | {"add", "where", "full", "scalar_tensor"}
_LARGEST = 1 << 16
_HUGE = 1e8


@dataclass(frozen=True, eq=False)
class Place:
    """A value of the graph whose entries a group permutes.

    Attributes:
        node: its name in the graph.
        where: for the report.
        axes: for each tensor axis the ``(size, kept)`` of its factors, outer first; what is not kept counts as samples.
        chosen: which of the kept positions are observed (copies of others are not).
        slots: generator number -> int64 ``(units, k)``: the observed positions that each unit owns, columns corresponding.
    """

    node: str
    where: str
    axes: tuple[tuple[tuple[int, bool], ...], ...]
    chosen: np.ndarray
    slots: Mapping[int, np.ndarray]

    @property
    def size(self) -> int:
        """The number of observed positions."""
        return int(self.chosen.size)

    @property
    def owned(self) -> int:
        """How many of the positions a unit owns, of the generator of which they are fewest."""
        return min(table.shape[1] for table in self.slots.values())

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for places at which the same groups act alike."""
        return (self.size, *((g, t.shape, t.tobytes()) for g, t in sorted(self.slots.items())))

    def read(self, value: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor | None:
        """The activations as ``(samples, positions)``, float64; None if the shape is another one than was traced.

        The traced extents are kept for what carries groups; the first of an axis's others (the batch) may differ.

        Args:
            value: of the place's node.
            mask: bool, ``(batch, tokens)`` or the like, True for what counts. Its axes are those of ``value`` with the
                same lengths, or flattened into one; a value without them (pooled tokens) is taken as a whole.
        """
        split = self._split(tuple(value.shape))
        if split is None:
            return None
        shape, keep = split
        order = [k for k, kept in enumerate(keep) if not kept] + [k for k, kept in enumerate(keep) if kept]
        samples = [n for n, kept in zip(shape, keep, strict=True) if not kept]
        width = math.prod(n for n, kept in zip(shape, keep, strict=True) if kept)
        flat = value.detach().reshape(shape).permute(order).reshape(-1, width)
        counted = None if mask is None else _spread_mask(mask, samples)
        if counted is not None:
            flat = flat[counted.to(flat.device)]
        return flat[:, torch.from_numpy(self.chosen).to(flat.device)].double()

    def _split(self, given: tuple[int, ...]) -> tuple[list[int], list[bool]] | None:
        """A tensor's shape with every axis split into its factors, and which of them are kept."""
        if len(given) != len(self.axes):
            return None
        shape: list[int] = []
        keep: list[bool] = []
        for n, parts in zip(given, self.axes, strict=True):
            # an extent of one has no factor: a batch of one may be any of them
            full = parts if any(not kept for _, kept in parts) else ((1, False), *parts)
            free = next(i for i, (_, kept) in enumerate(full) if not kept)
            rest = math.prod(size for i, (size, _) in enumerate(full) if i != free)
            if n % rest:
                return None
            shape += [n // rest if i == free else size for i, (size, _) in enumerate(full)]
            keep += [kept for _, kept in full]
        return shape, keep


def _spread_mask(mask: torch.Tensor, samples: Sequence[int]) -> torch.Tensor | None:
    """A mask as one flag per sample; None if the samples have none of its axes.

    >>> _spread_mask(torch.tensor([[True, False]]), [1, 2, 2])
    tensor([ True, False, False, False])
    """
    wanted, flags = list(mask.shape), mask.to(torch.bool)
    at = _axes_of(wanted, samples)
    if not at and mask.numel() in samples:
        wanted, flags, at = [mask.numel()], flags.reshape(-1), [samples.index(mask.numel())]
    if not at:
        return None
    counted = torch.ones(list(samples), dtype=torch.bool, device=mask.device)
    # scores of tokens with tokens have the last axis twice
    for last in (k for k in range(len(samples)) if samples[k] == wanted[-1] and k not in at[:-1]):
        order = np.argsort((*at[:-1], last))
        view = [1] * len(samples)
        for k, n in zip((*at[:-1], last), wanted, strict=True):
            view[k] = n
        counted = counted & flags.permute(*order.tolist()).reshape(view)
    return counted.reshape(-1)


def _axes_of(wanted: Sequence[int], given: Sequence[int]) -> list[int]:
    """For each wanted length the first axis of that length that is not taken; empty if one has none."""
    out: list[int] = []
    for n in wanted:
        found = next((k for k in range(len(given)) if given[k] == n and k not in out), None)
        if found is None:
            return []
        out.append(found)
    return out


# -------------------------------------------------------------------- surveys
@dataclass(frozen=True, eq=False)
class Survey:
    """A traced graph, what inference knows of it, and where a symmetry's generators are seen.

    Attributes:
        graph: the trace.
        analysis: what the rules found.
        tables: generator number -> the united vertices of its units, ``(units, columns)``; generators that inference does
            not find in the graph miss.
        places: where the activations are observed, in order of execution.
    """

    graph: fx.GraphModule
    analysis: Analysis
    tables: Mapping[int, np.ndarray]
    places: tuple[Place, ...]

    def carried(self, node: fx.Node) -> dict[int, Place]:
        """Generator number -> the place it makes of a node, for every generator that moves entries of its value."""
        place = _place(node, self.analysis, self.tables)
        return {} if place is None else dict.fromkeys(place.slots, place)


def survey(graph: fx.GraphModule, symmetry: Symmetry) -> Survey:
    """Find the values of a traced graph at which the generators of a symmetry are observed.

    Args:
        graph: from `automerge.trace`; example values are not needed.
        symmetry: inferred from the same architecture, read from a file, or written by hand.

    Examples:
        >>> from torch import nn
        >>> from automerge import infer, trace
        >>> net, x = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), torch.ones(1, 3)
        >>> [(p.node, p.slots[0].shape) for p in survey(trace(net, x), infer(net, x)).places]
        [('relu_default', (8, 1))]
    """
    _, analysis, _ = infer_recorded(graph)
    tables = _tables(analysis, symmetry)
    found: dict[fx.Node, Place] = {}
    data = [node for node in data_nodes(graph) if node not in analysis.sorted]
    known = set(data)
    for node in data_nodes(graph):
        if operator_of(node) in CONTRACTIONS or "scaled_dot_product" in operator_of(node):
            for source in node.all_input_nodes:
                base = base_of(source)
                if base in known and base not in found:
                    place = _place(base, analysis, tables)
                    if place is not None:
                        found[base] = place
    missing = set(tables) - {g for place in found.values() for g in place.slots}
    struck = _struck_out(graph)
    for node in (*(n for n in reversed(data) if n not in struck), *(n for n in reversed(data) if n in struck)):
        if missing and node not in found:
            place = _place(node, analysis, tables)
            if place is not None and missing & set(place.slots):
                found[node] = place
                missing -= set(place.slots)
    return Survey(graph, analysis, tables, tuple(found[node] for node in data if node in found))


def _struck_out(graph: fx.GraphModule) -> set[fx.Node]:
    """Scores of which some are overwritten with (minus) infinity or a huge number, so that they are never chosen."""
    out: set[fx.Node] = set()
    for node in graph.graph.nodes:
        if any(n in out for n in node.all_input_nodes):
            if is_pointwise(node.target) or operator_of(node) in VIEWS | _OVERWRITING:
                out.add(node)
        elif operator_of(node) in _FILLING:
            values = [a.meta["val"] if isinstance(a, fx.Node) and a.op == "get_attr" else a for a in node.args]
            if any(_huge(v) for v in values):
                out.add(node)
    return out


def _huge(value: Any) -> bool:
    """Whether a number, or one of a constant's, is as large as only those are that stand for none."""
    if isinstance(value, torch.Tensor):
        return value.is_floating_point() and value.numel() > 0 and not bool((value.abs() < _HUGE).all())
    return isinstance(value, float) and not abs(value) < _HUGE


def operator_of(node: fx.Node) -> str:
    """The short name of a node's operator, such as ``addmm``; empty for what is none."""
    packet = getattr(node.target, "overloadpacket", None)
    return getattr(packet, "__name__", "")


def base_of(node: fx.Node) -> fx.Node:
    """The value that a node is a view of."""
    while operator_of(node) in VIEWS and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def data_nodes(graph: fx.GraphModule) -> list[fx.Node]:
    """The nodes that depend on the model's inputs, in order (their values are activations)."""
    seen: dict[fx.Node, None] = {}
    for node in graph.graph.nodes:
        given = node.op == "placeholder" and node.meta.get("kind") == "input"
        if node.op != "output" and (given or any(n in seen for n in node.all_input_nodes)):
            seen[node] = None
    return list(seen)


def _tables(analysis: Analysis, symmetry: Symmetry) -> dict[int, np.ndarray]:
    """Generator number -> united vertices of its units, those that operators made included, which values may carry."""
    # a symmetry may know more parameters than one pass reads: what only training reads, or longer inputs
    seen = [tuple(s for s in g.slots if s.param in analysis.states) for g in symmetry.sets]
    numbers = {key: (i, order) for i, slots in enumerate(seen) if slots for key, order in [_normal(slots)]}
    structure = Structure(analysis.engine.axes)
    assembler = Assembler(analysis.engine.axes, structure)
    out: dict[int, np.ndarray] = {}
    for units in search(structure):
        generator = assembler.generator(units)
        if generator is None:
            continue
        key, own = _normal(generator.slots)
        if key in numbers and numbers[key][0] not in out:
            number, order = numbers[key]
            table = assembler.plain(units)
            out[number] = np.empty_like(table)
            out[number][order] = table[own]
    return out


def _normal(slots: Sequence[Slot]) -> tuple[tuple[Any, ...], np.ndarray]:
    """What a generator does to some slots, whatever the order of these, of units and columns; and its units in that order."""
    slots = sorted(slots, key=lambda s: (s.param, s.axis, s.within, int(s.index.min())))
    order = np.argsort(slots[0].index.min(axis=1))
    tables = [s.index[order] for s in slots]
    tables = [t[:, np.argsort(t[0])] for t in tables]
    return tuple((s.param, s.axis, s.within, t.shape, t.tobytes()) for s, t in zip(slots, tables, strict=True)), order


def _place(node: fx.Node, analysis: Analysis, tables: Mapping[int, np.ndarray]) -> Place | None:
    """What is to be read at a node; None if nothing moves there, or not as a permutation of slices."""
    value, tensor = analysis.values.get(node), node.meta.get("val")
    if not isinstance(value, Value) or not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
        return None
    united = analysis.united
    n = int(united.max()) + 1 if united.size else 0
    moving = np.zeros(n, bool)
    for table in tables.values():
        moving[table] = True
    factors = [f for f in value.factors if moving[united[f.labels]].any()]
    keep = [c for c in value.letters if any(c in f.letters for f in factors)]
    shape = tuple(value.size[c] for c in keep)
    if not keep or math.prod(shape) > _LARGEST or any(c in value.chosen for f in factors for c in f.letters):
        return None
    grid = np.indices(shape).reshape(len(keep), -1)
    at = dict(zip(keep, grid, strict=True))
    labels = np.stack([united[f.labels][tuple(at[c] for c in f.letters)] for f in factors])
    # entries with equal labels at equal pinned coordinates are copies of one value
    pinned = np.stack([np.zeros_like(grid[0]), *(at[c] for c in keep if c in value.pinned)])
    chosen = np.sort(np.unique(np.concatenate([labels, pinned]), axis=1, return_index=True)[1])
    labels, pinned = labels[:, chosen], pinned[:, chosen]
    slots: dict[int, np.ndarray] = {}
    for g, table in tables.items():
        try:
            made = _slot(labels, pinned, table, n)
        except ValueError:
            return None
        if made is not None:
            slots[g] = made
    axes = tuple(tuple((value.size[c], c in at) for c in axis) for axis in value.axes)
    where = f"{node.name} in {node.meta['module']}" if node.meta.get("module") else node.name
    return Place(node.name, where, axes, chosen, slots) if slots else None


def _slot(labels: np.ndarray, pinned: np.ndarray, table: np.ndarray, n: int) -> np.ndarray | None:
    """The positions that each unit owns, ``(units, k)``, in corresponding order; None if the units own none.

    Args:
        labels: ``(factors, positions)`` united vertices.
        pinned: ``(letters, positions)`` coordinates that mean themselves.
        table: ``(units, columns)`` vertices.
        n: the number of vertices.

    Raises:
        ValueError: if the units do not own slices that correspond.
    """
    unit, column = np.full(n, -1), np.full(n, -1)
    unit[table] = np.arange(table.shape[0])[:, None]
    column[table] = np.arange(table.shape[1])[None]
    units, columns = unit[labels], column[labels]
    mine = (units >= 0).any(axis=0)
    if not mine.any():
        return None
    owner = units.max(axis=0)
    # a position is known by the columns of the labels that move, by the labels that do not, and by what is pinned
    known = np.concatenate([np.where(units >= 0, columns, n + labels), pinned])[:, mine]
    if ((units >= 0) & (units != owner)).any():
        raise ValueError("a position belongs to two units")
    kinds, kind = np.unique(known, axis=1, return_inverse=True)
    out = np.full((table.shape[0], kinds.shape[1]), -1)
    out[owner[mine], kind.reshape(-1)] = np.flatnonzero(mine)
    if (out < 0).any() or np.unique(out).size != int(mine.sum()):
        raise ValueError("the units' slices do not correspond")
    return out
