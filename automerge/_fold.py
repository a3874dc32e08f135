"""The traced graph of a `Symmetry`, folded by module until a person can read it: what `automerge._draw` draws.

Nodes are calls of modules. A module that works twice (a block that first applies an activation and later adds) becomes
two nodes, so that the graph has no cycle; calls without parameters and with one input are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import networkx as nx
import numpy as np

if TYPE_CHECKING:
    from automerge.symmetry import Generator, Slot, Symmetry

_LIMIT = 44
_ENDS = ("input", "output")
_SUMS = ("aten::add", "aten::add_", "aten::sub", "aten::sub_")
Key = tuple[str, int]


@dataclass(frozen=True, order=True)
class Shade:
    """What gets one colour: the generators of a nest (heads, and the dimensions within each) that play one part in it.

    Attributes:
        family: number of the outermost generator of the nest.
        part: 0 for that one, then the inner ones by the slots they have.
    """

    family: int
    part: int = 0


@dataclass
class Folded:
    """A graph to draw.

    Attributes:
        graph: nodes are ``(module path, number of the call)`` with ``shades`` (what their parameters read, then what they
            write), ``join`` (a call without parameters), ``sign`` (of a join); edges have ``shades``.
        shade: generator number -> its colour.
        streams: families that additions tie.
        opened: module paths whose insides are shown.
        params: folded module path -> number of parameters.
    """

    graph: nx.DiGraph
    shade: Sequence[Shade]
    streams: frozenset[int] = frozenset()
    opened: frozenset[str] = frozenset()
    params: Mapping[str, int] = field(default_factory=dict)


def fold(symmetry: Symmetry, limit: int = _LIMIT) -> Folded:
    """Fold a symmetry's flow to about ``limit`` nodes.

    Modules are opened level by level; where a level is too large, only the first module of each kind is opened.
    """
    pairs = [(_plain(a), _plain(b)) for a, b in symmetry.flow]
    owned = _owned(symmetry, pairs)
    opened: frozenset[str] = frozenset()
    level = 0
    containers = _containers(p for pair in pairs for p in pair)
    while True:
        inside = [c for c in containers if c.count(".") == level and _parent(c) in (opened | {""})]
        if not inside:
            break
        kinds: dict[Any, str] = {}
        for path in inside:
            kinds.setdefault(_kind(path, owned, pairs), path)
        for chosen in (inside, list(kinds.values())):
            wider = opened | set(chosen)
            if _build(pairs, owned, wider)[0].number_of_nodes() <= limit:
                opened = wider
                break
        else:
            break
        level += 1
    graph, params = _build(pairs, owned, opened, contract=False)
    shade = _shades(symmetry.sets)
    streams = _colour(graph, params, symmetry, shade, opened)
    _contract(graph, params, opened)
    for node in graph:
        _sign(graph, node, symmetry, streams, opened)
    counts = {path: len(names) for path, names in params.items()}
    return Folded(graph, shade, streams, opened, counts)


# -------------------------------------------------------------------- folding
def _plain(path: str) -> str:
    return path.split(".parametrizations", 1)[0]


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _containers(paths: Iterable[str]) -> list[str]:
    """Module paths that hold other ones, in order."""
    out: dict[str, None] = {}
    for path in paths:
        parts = path.split(".")
        for k in range(1, len(parts)):
            out[".".join(parts[:k])] = None
    return list(out)


def _owned(symmetry: Symmetry, pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Parameter name -> the module that uses it: its own, or the nearest one around it that the trace shows."""
    known = {p for pair in pairs for p in pair}
    out = {}
    for name in (*symmetry.shapes, *symmetry.aliases):
        own = home = _plain(_parent(name))
        while home not in known and home:
            home = _parent(home)
        out[name] = home if home in known else own
    return out


def _kind(path: str, owned: Mapping[str, str], pairs: Sequence[tuple[str, str]]) -> Any:
    """Equal for modules with the same insides."""
    cut = len(path) + 1
    names = frozenset(n[cut:] for n in owned if n.startswith(path + "."))
    inner = frozenset((a[cut:], b[cut:]) for a, b in pairs if a.startswith(path + ".") and b.startswith(path + "."))
    return names, inner


def visible(path: str, opened: frozenset[str]) -> str:
    """The module that stands for ``path``: the outermost one around it that is not opened."""
    parts = path.split(".")
    for k in range(1, len(parts)):
        prefix = ".".join(parts[:k])
        if prefix not in opened:
            return prefix
    return path


def _build(
    pairs: Sequence[tuple[str, str]], owned: Mapping[str, str], opened: frozenset[str], contract: bool = True
) -> tuple[nx.DiGraph, dict[str, list[str]]]:
    params: dict[str, list[str]] = {}
    for name, home in owned.items():
        params.setdefault(visible(home, opened), []).append(name)
    graph = _unroll([(visible(a, opened), visible(b, opened)) for a, b in pairs])
    if not pairs:
        graph.add_nodes_from((path, 0) for path in params)
    if contract:
        _contract(graph, params, opened)
    return graph, params


def _unroll(pairs: Iterable[tuple[str, str]]) -> nx.DiGraph:
    """Calls instead of modules: what flows into a module that already gave something away begins a new call of it."""
    graph = nx.DiGraph()
    call: dict[str, int] = {}
    gave: set[str] = set()
    for a, b in pairs:
        if a == b:
            continue
        if b not in call or b in gave:
            call[b] = call.get(b, -1) + 1
            gave.discard(b)
        gave.add(a)
        graph.add_edge((a, call.setdefault(a, 0)), (b, call[b]))
    return graph


def _bears(node: Key, params: Mapping[str, list[str]], opened: frozenset[str]) -> bool:
    """Whether a call shows parameters; those that a module holds beside its children belong to its first call."""
    return bool(params.get(node[0])) and not (node[1] and (node[0] == "" or node[0] in opened))


def _contract(graph: nx.DiGraph, params: Mapping[str, list[str]], opened: frozenset[str]) -> None:
    """Leave out calls without parameters that join nothing."""
    changed = True
    while changed:
        changed = False
        for node in list(graph):
            if node[0] in _ENDS or _bears(node, params, opened):
                continue
            before, after = list(graph.pred[node]), list(graph.succ[node])
            if len(before) > 1 and after:
                continue
            for a in before:
                for b in after:
                    data = {**graph.edges[node, b]}
                    if graph.has_edge(a, b):
                        data["shades"] = sorted({*data.get("shades", ()), *graph.edges[a, b].get("shades", ())})
                    graph.add_edge(a, b, **data)
            graph.remove_node(node)
            changed = True


# -------------------------------------------------------------------- groups
def _shades(sets: Sequence[Generator]) -> list[Shade]:
    """A colour for every generator; nested ones share the family of the outermost."""
    slots: dict[tuple[str, int], list[tuple[int, Slot]]] = {}
    for number, generator in enumerate(sets):
        for slot in generator.slots:
            slots.setdefault((slot.param, slot.axis), []).append((number, slot))
    parent: dict[int, int] = {}
    for number, generator in enumerate(sets):
        for slot in generator.slots:
            spans = [(slot.axis, slot.index.reshape(-1))]
            spans += [(axis, np.arange(start, stop)) for axis, start, stop in slot.within]
            for axis, positions in spans:
                for other, outer in slots.get((slot.param, axis), ()):
                    if other != number and number not in parent and _inside(positions, outer, sets[other].size):
                        parent[number] = other
    out = []
    parts: dict[tuple[int, Any], int] = {}
    seen: dict[int, int] = {}
    for number, generator in enumerate(sets):
        root, steps = number, 0
        while root in parent and steps < len(sets):
            root, steps = parent[root], steps + 1
        if root == number:
            out.append(Shade(number))
            continue
        form = tuple(sorted((s.param, s.axis, s.index.shape[1]) for s in generator.slots))
        if (root, form) not in parts:
            parts[root, form] = seen[root] = seen.get(root, 0) + 1
        out.append(Shade(root, parts[root, form]))
    return out


def _inside(positions: np.ndarray, outer: Slot, size: int) -> bool:
    """Whether positions lie within a single unit of the outer slot, and are not all there is."""
    if size < 2 or positions.size == 0:
        return False
    table = np.sort(outer.index, axis=1)
    if table.shape[1] == 1 and not outer.within and positions.size > 1:
        return False
    rows = np.flatnonzero((table == positions[0]).any(axis=1))
    return bool(rows.size) and bool(np.isin(positions, table[rows[0]]).all()) and positions.size <= table.shape[1]


def _colour(
    graph: nx.DiGraph,
    params: Mapping[str, list[str]],
    symmetry: Symmetry,
    shade: Sequence[Shade],
    opened: frozenset[str],
) -> frozenset[int]:
    """Write on nodes and edges what they carry; returns the families of residual streams."""
    table: dict[str, dict[int, set[Shade]]] = {}
    for number, generator in enumerate(symmetry.sets):
        for slot in generator.slots:
            table.setdefault(slot.param, {}).setdefault(slot.axis, set()).add(shade[number])
    axes = {n: table.get(symmetry.aliases.get(n, n), {}) for names in params.values() for n in names}
    holders = {*opened, ""}
    order = list(nx.topological_sort(graph))
    touch: dict[Key, set[Shade]] = {}
    carry: dict[Key, set[Shade]] = {}
    for node in order:
        names = params[node[0]] if _bears(node, params, opened) else []
        touch[node] = set().union(*(s for n in names for s in axes[n].values()))
        coming = set().union(*(carry[a] for a in graph.pred[node]))
        if not names or node[0] in holders:
            carry[node] = coming | touch[node]
        else:
            closed = any(_plain(_parent(n)) != node[0] for n in names)
            carry[node] = touch[node] if closed else _written(names, axes, coming) or set()
    _link(graph, symmetry, carry, opened)
    need: dict[Key, set[Shade]] = {}
    for node in reversed(list(nx.topological_sort(graph))):
        need[node] = touch[node] or set().union(*(need[b] for b in graph.succ[node]))
        if node[0] in holders and touch[node]:
            need[node] = need[node].union(*(need[b] for b in graph.succ[node]))
    for a, b, data in graph.edges(data=True):
        data["shades"] = sorted(carry[a] & need[b])
    for node, data in graph.nodes(data=True):
        data["join"] = node[0] not in _ENDS and not _bears(node, params, opened)
        data["shades"] = [*sorted(touch[node] - carry[node]), *sorted(touch[node] & carry[node])]
        if data["join"]:
            data["shades"] = sorted(carry[node] & need[node])
    return _streams(graph, symmetry, shade)


def _written(names: Sequence[str], axes: Mapping[str, Mapping[int, set[Shade]]], coming: set[Shade]) -> set[Shade]:
    """What a module with these parameters gives away: the axes of its biases, or the axis of the weight not read."""
    vectors = [axes[n][0] for n in names if set(axes[n]) == {0}]
    matrices = [axes[n] for n in names if set(axes[n]) - {0}]
    if vectors or not matrices:
        return set().union(*vectors)
    out: set[Shade] = set()
    for table in matrices:
        first, second = table.get(0, set()), set().union(*(v for k, v in table.items() if k))
        turned = bool(first & coming) and not second & coming
        out |= second if turned or (not first and not second & coming) else first
    return out


def _sums(symmetry: Symmetry) -> list[tuple[str, str, str, int, int]]:
    """The additions in the axis graph: ``(module, param, param, axis, axis)``."""
    if symmetry.axis_graph is None:
        return []
    out = []
    nodes = symmetry.axis_graph.nodes
    for u, v, data in symmetry.axis_graph.edges(data=True):
        name, module = _operator(data.get("op", ""))
        a, b = nodes[u].get("param"), nodes[v].get("param")
        if name in _SUMS and a is not None and b is not None:
            out.append((module, a, b, nodes[u]["axis"], nodes[v]["axis"]))
    return out


def _operator(text: str) -> tuple[str, str]:
    """``"aten::add in blocks.0 at file:3"`` -> the name and the module."""
    name, _, rest = text.partition(" ")
    module = rest.split(" at ")[0].removeprefix("in ") if rest.startswith("in ") else ""
    return name, module


def _link(graph: nx.DiGraph, symmetry: Symmetry, carry: Mapping[Key, set[Shade]], opened: frozenset[str]) -> None:
    """Add the streams that stay within a module: from one call to the next that adds to the same groups."""
    calls: dict[str, list[Key]] = {}
    for node in sorted(graph):
        calls.setdefault(node[0], []).append(node)
    for module, a, b, _, _ in _sums(symmetry):
        homes = {visible(_plain(_parent(n)), opened) for n in (a, b)} - {module}
        places = calls.get(visible(module, opened), [])
        for late in places[1:]:
            above = nx.ancestors(graph, late)
            between = {k: {n[0] for n in above & nx.descendants(graph, k)} for k in places if k < late}
            starts = [k for k in between if carry[k] & carry[late] and between[k] & homes]
            if starts and len(graph.pred[late]) == 1 and not graph.has_edge(starts[-1], late):
                graph.add_edge(starts[-1], late)


def _streams(graph: nx.DiGraph, symmetry: Symmetry, shade: Sequence[Shade]) -> frozenset[int]:
    """Families that are added to themselves: known from the axis graph, or else read off where paths of unequal length meet."""
    if symmetry.axis_graph is not None:
        of: dict[tuple[str, int], set[int]] = {}
        for number, generator in enumerate(symmetry.sets):
            for slot in generator.slots:
                of.setdefault((slot.param, slot.axis), set()).add(shade[number].family)
        found: set[int] = set()
        for _, a, b, i, j in _sums(symmetry):
            if _parent(a) != _parent(b):
                found |= of.get((a, i), set()) & of.get((b, j), set())
        return frozenset(found)
    depth = {n: k for k, layer in enumerate(nx.topological_generations(graph)) for n in layer}
    found = set()
    for node, data in graph.nodes(data=True):
        if data["join"]:
            for s in data["shades"]:
                sources = {depth[a] for a in graph.pred[node] if s in graph.edges[a, node]["shades"]}
                found |= {s.family} if len(sources) > 1 else set()
    return frozenset(found)


def _sign(graph: nx.DiGraph, node: Key, symmetry: Symmetry, streams: frozenset[int], opened: frozenset[str]) -> None:
    """What a join does, if known."""
    data = graph.nodes[node]
    data["sign"] = ""
    if not data.get("join"):
        return
    names = set()
    if symmetry.axis_graph is not None:
        ops = (_operator(d.get("op", "")) for *_, d in symmetry.axis_graph.edges(data=True))
        names = {name for name, module in ops if visible(module, opened) == node[0]}
    if any(s.family in streams for s in data["shades"]):
        data["sign"] = "+"
    elif names & {"aten::mul", "aten::mul_"}:
        data["sign"] = "\N{MULTIPLICATION SIGN}"
