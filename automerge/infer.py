"""Inference: from a model and example inputs to its `Symmetry`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from torch import fx, nn

from automerge._auxiliary import with_training
from automerge._derive import infer_graph, infer_recorded, with_branches
from automerge._diagnosis import OtherPathError
from automerge._double import own_modes
from automerge._dropped import with_dropped
from automerge._errors import InvarianceError, TraceError, UnknownOperatorError
from automerge._extra_state import held_tensors
from automerge._hidden import hides
from automerge._machine import physical_memory, readable
from automerge._notes import of_mixed, of_numbers, of_precision, of_writes
from automerge._reaching import OtherTraces, by_data
from automerge._replay import check_replay
from automerge._settled import settled
from automerge._subject import check_inputs
from automerge._verify import Verification
from automerge._verify import verify as check_symmetry
from automerge.rules import ORDERED, Analysis
from automerge.rules._nodes import choosing_none
from automerge.rules._reads import chooses
from automerge.symmetry import Symmetry
from automerge.trace import normalise_args, trace

_MAX_PATHS = 8
_DRAWS = 4


@own_modes()
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
        TraceError: if the model does not run on the inputs, or makes nothing but NaN of inputs with NaN, or has no tensor of
            such a name.
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
    check_inputs(model, args, kwargs)
    graph = trace(model, args, kwargs, values=False, constants=constants)
    recorded, model = _recorded(model, args, kwargs, constants, graph)
    traced = time.perf_counter()
    symmetry, analysis, assembler = infer_recorded(*recorded)
    _check_rules(symmetry, strict)
    notes = [of_numbers(*normalise_args(args, kwargs)), of_writes(recorded), _too_large(model) if verify else None]
    verify = verify and notes[-1] is None
    # without verification only where other data take another path: an expert that python skips would stay in place
    draws = _DRAWS if verify or graph.meta["trace"].data_dependent or choosing_none(graph) else 0
    others = OtherTraces(model, args, kwargs, constants, symmetry)
    graphs = [*recorded, *others.reaching(analysis, by_data(graph), draws)]
    if not verify and hides(graph) and others.on_cpu:  # with verification longer inputs are looked at anyway
        graphs += others.longer(0)
    if len(graphs) > len(recorded):
        symmetry, analysis, assembler = infer_recorded(*graphs)
    symmetry = with_branches(symmetry, analysis, assembler, graphs, everywhere=not verify)
    again = partial(_inferred, verify=verify)
    found = with_training(model, args, kwargs, constants, graphs, symmetry, analysis, again, verify)
    if found is not None:
        symmetry, analysis, graphs = found.symmetry, found.analysis, [*graphs, found.graph]
        notes.append(found.note)
    kept = with_dropped(graphs, symmetry, analysis, again)
    if kept is not None:
        symmetry, graphs = kept.symmetry, kept.graphs
        notes.append(kept.note)
    done = time.perf_counter()
    stats: dict[str, Any] = {"trace_seconds": traced - start, "infer_seconds": done - traced}
    if verify:
        symmetry, outcome = _verified(model, args, kwargs, symmetry, graphs)
        notes += [of_mixed(outcome.mixed), of_precision(outcome.dtype)]
        notes += [check_replay(model, args, kwargs, recorded[-1]), None if outcome.reacted else str(outcome)]
        stats |= {"verify_seconds": time.perf_counter() - done, "verified": outcome.error}
    _check_rules(symmetry, strict)
    object.__setattr__(symmetry, "notes", (*symmetry.notes, *(n for n in notes if n)))
    symmetry.stats.update(stats)  # type: ignore[attr-defined]
    return symmetry


def _inferred(graphs: list[fx.GraphModule], verify: bool) -> tuple[Symmetry, Analysis]:
    """What holds for some graphs; what branches show in some of them only where it is verified."""
    return infer_graph(*graphs, everywhere=not verify)


def _recorded(
    model: nn.Module,
    args: Any,
    kwargs: Mapping[str, Any] | None,
    constants: Collection[str],
    graph: fx.GraphModule,
) -> tuple[list[fx.GraphModule], nn.Module]:
    """The recorded pass, and where it sets parameters that later ones read also such a later one, with the model for it."""
    later = settled(model, args, kwargs, graph)
    if later is None:
        return [graph], model
    with contextlib.suppress(TraceError):
        return [graph, trace(later, args, kwargs, values=False, constants=constants)], later
    return [graph], model


def _check_rules(symmetry: Symmetry, strict: bool) -> None:
    if strict and symmetry.unruled:
        raise UnknownOperatorError(
            f"no rule for {symmetry.unruled[0]}; register one with automerge.register_rule, or pass strict=False to pin "
            "what it touches"
        )


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
    recorded, plain, everywhere, ordered = list(graphs), False, False, False
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
            elif isinstance(error, OtherPathError) and settled and not everywhere:
                everywhere = True  # branches that only some of these paths show to be alike are not
            elif not ordered and any(chooses(node) for graph in graphs for node in graph.graph.nodes):
                ordered = True
                notes.append(
                    f"scores from which the model chooses may be equal, so that what it chooses from keeps its order ({error})"
                )
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
        for graph in graphs if ordered else ():
            graph.meta[ORDERED] = True
        symmetry = infer_recorded(*graphs)[0] if plain else infer_graph(*graphs, everywhere=everywhere)[0]
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
    known = held_tensors(model) if isinstance(model, nn.Module) and constants else {}
    unknown = next((name for name in constants if name not in known), None)
    if unknown is not None:
        some = ", ".join(list(known)[:5]) or "none"
        raise TraceError(f"constants: the model's state dict has no {unknown!r}; it has {some}, ...")
