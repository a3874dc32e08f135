"""Inference: from a model and example inputs to its `Symmetry`."""

from __future__ import annotations

import time
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.utils._pytree import keystr, tree_flatten_with_path

from automerge._assemble import Assembler, halved
from automerge._branches import stacked
from automerge._diagnosis import OtherPathError
from automerge._errors import InvarianceError, TraceError, UnknownOperatorError
from automerge._longer import longer_inputs
from automerge._machine import physical_memory, readable
from automerge._search import search
from automerge._stacks import joined, taken_apart
from automerge._structure import Structure
from automerge._verify import Verification, check_replay
from automerge._verify import verify as check_symmetry
from automerge.rules import DEBUG, Analysis, analyse, is_state
from automerge.symmetry import Exchange, Generator, Symmetry
from automerge.trace import TraceInfo, normalise_args, trace

_MAX_PASSES = _MAX_PATHS = 8
_DRAWS = 4


def infer(
    model: nn.Module,
    args: Any,
    kwargs: Mapping[str, Any] | None = None,
    *,
    verify: bool = True,
    strict: bool = False,
    constants: Collection[str] = (),
) -> Symmetry:
    """Derive which axes of which parameters may be permuted together, and which modules are interchangeable.

    Args:
        model: any module that runs forward on the inputs; it is not changed.
        args: a tensor, or a tuple or list of positional inputs.
        kwargs: keyword inputs.
        verify: check the answer with random group elements in float64 before returning it.
        strict: raise on an operator without a rule instead of pinning what it touches.
        constants: state-dict names of what stays as it is, such as masks that belong to the architecture. `merge` takes
            the buffers and the parameters without gradient that are the same in all its models.

    Returns:
        The `Symmetry`; ``print`` it for a report.

    Raises:
        TraceError: if the model does not run on the inputs, or has no tensor of such a name.
        UnknownOperatorError: with ``strict``, at the first operator without a rule.
        InvarianceError: if verification finds that a group is no symmetry (a defect of a rule; please report it).

    Examples:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> [g.size for g in infer(net, torch.ones(1, 3)).generators()]
        [8]
    """
    start = time.perf_counter()
    _check_constants(model, constants)
    graph = trace(model, args, kwargs, values=False, constants=constants)
    traced = time.perf_counter()
    symmetry, analysis = infer_graph(graph)
    _check_rules(symmetry, strict)
    done = time.perf_counter()
    stats: dict[str, Any] = {"trace_seconds": traced - start, "infer_seconds": done - traced}
    notes = [_numbers(*normalise_args(args, kwargs)), _too_large(model) if verify else None]
    if verify and notes[-1] is None:
        graphs = [graph, *_reaching(model, args, kwargs, constants, symmetry, analysis, _by_data(graph))]
        if len(graphs) > 1:
            symmetry, _ = infer_graph(*graphs)
        symmetry, outcome = _verified(model, args, kwargs, symmetry, graphs)
        _check_rules(symmetry, strict)
        notes += [check_replay(model, args, kwargs, graph), None if outcome.reacted else str(outcome)]
        stats |= {"verify_seconds": time.perf_counter() - done, "verified": outcome.error}
    object.__setattr__(symmetry, "notes", (*symmetry.notes, *(n for n in notes if n)))
    symmetry.stats.update(stats)  # type: ignore[attr-defined]
    return symmetry


def _numbers(positional: Any, keywords: Any) -> str | None:
    """What a reader must know of inputs that are numbers of Python: the recorded pass holds their values."""
    found = []
    for what, given in (("args", positional), ("kwargs", keywords)):
        leaves, _ = tree_flatten_with_path(given)
        found += [f"{what}{keystr(path)} = {value!r}" for path, value in leaves if type(value) in (int, float)]
    return f"the groups hold for the numbers that were given as inputs ({_some(found)})" if found else None


def _check_rules(symmetry: Symmetry, strict: bool) -> None:
    if strict and symmetry.unruled:
        raise UnknownOperatorError(
            f"no rule for {symmetry.unruled[0]}; register one with automerge.register_rule, or pass strict=False to pin "
            "what it touches"
        )


def _reaching(
    model: nn.Module,
    args: Any,
    kwargs: Mapping[str, Any] | None,
    constants: Collection[str],
    symmetry: Symmetry,
    analysis: Analysis,
    depends: bool,
) -> Iterator[fx.GraphModule]:
    """Traces on longer inputs, where these read parameters of which the example reads nothing, or not all.

    (An expert that none of few tokens was sent to; what a recurrence multiplies its first state with.)
    """
    missing = {n for n in symmetry.shapes if n not in analysis.states}
    missing |= {n for n, mask in analysis.unread.items() if mask.all()}
    # where the path depends on data, others may read more of what this one reads in part (experts stacked in one tensor)
    partly = {n: mask for n, mask in analysis.unread.items() if n not in missing and depends}
    if not (missing or partly) or any(t.device.type != "cpu" for t in (*model.parameters(), *model.buffers())):
        return
    for seed in range(_DRAWS):
        depends = False
        for graph in _longer_traces(model, args, kwargs, constants, symmetry, seed):
            depends = depends or _by_data(graph)
            more = analyse([graph])
            found = missing & {n for n in more.states if n not in more.unread or not more.unread[n].all()}
            left = {n: mask & more.unread.get(n, False) for n, mask in partly.items() if n in more.states}
            if found or any((left[n] != partly[n]).any() for n in left):
                yield graph
            missing -= found
            partly = {n: mask for n, mask in (partly | left).items() if mask.any()}
        if not (missing or partly) or not depends:
            return


def _by_data(graph: fx.GraphModule) -> bool:
    """Whether data decide what is read: python reads them, or nothing was chosen somewhere."""
    values = (node.meta.get("val") for node in graph.graph.nodes)
    return bool(graph.meta["trace"].data_dependent) or any(
        isinstance(v, torch.Tensor) and v.numel() == 0 for v in values
    )


def _longer_traces(
    model: nn.Module,
    args: Any,
    kwargs: Mapping[str, Any] | None,
    constants: Collection[str],
    symmetry: Symmetry,
    seed: int,
) -> Iterator[fx.GraphModule]:
    """Traces on longer inputs, as far as the model runs on them."""
    sizes = {n for shape in symmetry.shapes.values() for n in shape}
    for group in longer_inputs(*normalise_args(args, kwargs), seed, sizes):
        for i, make in enumerate(group):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    graph = trace(model, *make(), values=False, constants=constants)
            except TraceError:
                continue  # no inputs for this model
            yield graph
            if i == 0:
                break


def _verified(
    model: nn.Module,
    args: Any,
    kwargs: Mapping[str, Any] | None,
    symmetry: Symmetry,
    graphs: list[fx.GraphModule],
) -> tuple[Symmetry, Verification]:
    """The symmetry that verification passes, and what that measured.

    Where the groups hold on the recorded path only, they are inferred again from it and from the one that showed it:
    that of longer inputs, or of other weights. What only branches show must not end inference where it does not hold.
    """
    notes: list[str] = []
    recorded, plain = list(graphs), False
    before: Any = None
    while True:
        try:
            return symmetry, check_symmetry(model, args, symmetry, kwargs)
        except InvarianceError as error:
            # a path that does not reach all branches is not read with them, and then changes nothing
            claimed, before = before, (symmetry.sets, symmetry.exchanges)
            settled = not plain and symmetry.exchanges and claimed == before
            if isinstance(error, OtherPathError) and len(graphs) <= _MAX_PATHS and not settled:
                graphs.append(error.graph)
                notes.append(f"{str(error).partition(': ')[0]}; they were inferred again to hold on both")
            elif not plain and "branches_seconds" in symmetry.stats:
                graphs, plain = recorded, True
                notes = [
                    f"that branches of the model are interchangeable did not hold and was left out ({error}); please report it"
                ]
            else:
                raise InvarianceError(
                    f"{error}. This is a defect of the rule for that operator or one before it: please report it, and pin "
                    "the operator with automerge.register_rule meanwhile"
                ) from error
        symmetry = infer_recorded(*graphs)[0] if plain else infer_graph(*graphs)[0]
        object.__setattr__(symmetry, "notes", (*symmetry.notes, *dict.fromkeys(notes)))


def _too_large(model: nn.Module) -> str | None:
    """Why a model is not verified: what that takes is more than the machine has."""
    needed = 16 * sum(t.numel() for t in (*model.parameters(), *model.buffers()))
    have = physical_memory()
    if have is None or needed <= have:
        return None
    return f"not verified: two copies of the model in float64 take {readable(needed)}, and the machine has {readable(have)}"


def _check_constants(model: nn.Module, constants: Collection[str]) -> None:
    if isinstance(constants, str):
        raise TraceError(f"constants={constants!r}: give a list of names")
    known = model.state_dict(keep_vars=True) if isinstance(model, nn.Module) and constants else {}
    unknown = next((name for name in constants if name not in known), None)
    if unknown is not None:
        some = ", ".join(list(known)[:5]) or "none"
        raise TraceError(f"constants: the model's state dict has no {unknown!r}; it has {some}, ...")


def infer_graph(*graphs: fx.GraphModule) -> tuple[Symmetry, Analysis]:
    """The symmetry of a traced graph, unverified, and the analysis it rests on; of several, what holds for all.

    The analysis knows nothing of what only stacked branches show: exchanges of modules, and of pieces that a loop takes.
    """
    symmetry, analysis, assembler = infer_recorded(*graphs)
    start = time.perf_counter()
    try:
        found = _of_branches(symmetry, analysis, assembler, graphs)
    except Exception:  # what cannot be stacked must not take the model down with it
        if DEBUG:
            raise
        found = None
    if found is None:
        return symmetry, analysis
    return replace(found, stats={**found.stats, "branches_seconds": time.perf_counter() - start}), analysis


def _of_branches(
    symmetry: Symmetry, analysis: Analysis, assembler: Assembler, graphs: Sequence[fx.GraphModule]
) -> Symmetry | None:
    """The symmetry with what only stacked branches show; None where nothing is stacked."""
    branches = stacked(graphs)
    if branches is None:
        return None
    other, seen, _ = infer_recorded(*branches.graphs, splits=_nested(branches.stacks))
    found = [taken_apart(generator, branches.stacks, other.shapes) for generator in other.sets]
    partly = {*analysis.unread, *(n for stack in seen.unread for n in branches.stacks.get(stack, np.array([])).flat)}
    buffers = graphs[0].meta["trace"].buffers
    read = (_read(e, partly, buffers) for e in found if isinstance(e, Exchange))
    exchanges = tuple(e for e in read if e.size > 1)
    before = [n for n in symmetry.shapes if n not in analysis.states]
    generators = [g for g in found if isinstance(g, Generator)]
    # where nothing was recorded of some rows, what the recorded graph leaves free may be free in no other
    sets = tuple(generators) if branches.complete else joined(symmetry.sets, generators, before)
    if not exchanges and sets == symmetry.sets:
        return symmetry
    out = replace(symmetry, sets=sets, exchanges=exchanges)
    unused = [n for n in before if n not in out.moved]
    moved = [*sets, *(Generator(e.size, e.slots) for e in exchanges)]
    pins = tuple(assembler.pins(moved, dict(symmetry.shapes), unused))
    kept = [n for n in symmetry.notes if n not in _reach(analysis, before)]
    notes = tuple(dict.fromkeys((*kept, *_reach(analysis, unused), *seen.engine.notes)))
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
    graph = graphs[0]
    clock = time.perf_counter()
    splits = dict(splits or {})
    passes = 0
    while True:
        analysis = analyse(graphs, splits)
        passes += 1
        if set(analysis.engine.requests) == set(splits) or passes >= _MAX_PASSES:
            break
        splits = dict(analysis.engine.requests)
    ruled = time.perf_counter()
    axes = analysis.engine.axes
    structure = Structure(axes)
    assembler = Assembler(axes, structure)
    info: TraceInfo = graph.meta["trace"]
    shapes = _shapes(graph)
    generators: list[Generator] = []
    dropped = 0
    for units in search(structure, assembler.wanted()):
        made = assembler.generator(units)
        if made is None or halved(made, analysis.unread):
            dropped += 1
        else:
            generators.append(made)
            analysis.units.append(assembler.plain(units))
    analysis.united = structure.index
    unused = [n for n in shapes if n not in analysis.states]
    symmetry = Symmetry(
        shapes=shapes,
        sets=tuple(generators),
        statistics=frozenset(analysis.statistics),
        aliases={a: n for a, n in info.aliases.items() if n in shapes},
        pins=tuple(assembler.pins(generators, shapes, unused)),
        unruled=tuple(analysis.unruled),
        notes=(*_notes(info), *_reach(analysis, unused), *analysis.engine.notes),
        flow=_flow(graph),
        axis_graph=axes.graph,
        stats={
            "passes": passes,
            "rules_seconds": ruled - clock,
            "search_seconds": time.perf_counter() - ruled,
            "vertices": int(axes.count),
            "edges": int(structure.source.size),
            "unrepresentable": dropped,
        },
    )
    return symmetry, analysis, assembler


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


def _reach(analysis: Analysis, unused: list[str]) -> list[str]:
    """What the inputs did not reach."""
    notes = []
    if analysis.unread:
        cut = [f"{name} ({int(m.sum()):,} of {m.size:,} numbers)" for name, m in analysis.unread.items()]
        notes.append(
            f"these inputs do not read all of {_some(cut)}; the positions left out stay in place, and their other axes "
            "move with what is read"
        )
    if unused:
        notes.append(
            f"the output on these inputs does not depend on {_some(unused)}; these stay as they are while the rest moves, so "
            "give inputs that reach them if others do"
        )
    return notes


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _notes(info: TraceInfo) -> list[str]:
    notes = []
    if info.data_dependent:
        places = ", ".join(dict.fromkeys(info.data_dependent[:3]))
        notes.append(
            f"python read values that depend on the data ({places}); the groups hold for the path that these inputs took"
        )
    if info.unregistered:
        places = ", ".join(list(dict.fromkeys(info.unregistered))[:3])
        notes.append(
            f"the model computes with weights that its state dict does not hold ({places}); they are neither matched nor "
            "merged, so keep their modules in an nn.ModuleList, or run the model once if its first pass makes them"
        )
    if info.carried:
        notes.append(
            f"the model holds tensors of an earlier pass ({_some(info.carried)}), which were taken as constants: the units "
            "that meet them stay in place; reset them, or give a model that has not run"
        )
    return notes
