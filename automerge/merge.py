"""Merge independently trained networks of one architecture: match, average, repair.

The models are moved to one common *universe* of coordinates by a matcher, averaged there, and, if data are given,
repaired (`automerge.renormalise`). Universe averaging: Crisostomi et al., *C2M3: Cycle-Consistent Multi-Model Merging*,
NeurIPS 2024 (arXiv 2405.17897), section 3.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from automerge._data import Batches
from automerge._double import own_modes
from automerge._errors import AutomergeError, CheckpointError, MatchingError
from automerge._extra_state import load_weights, weights_of
from automerge._forward import device_of
from automerge._loading import check_values, checked_state
from automerge._merge_checks import (
    Model,
    check_coordinates,
    check_data,
    check_inseparable,
    check_matching,
    check_symmetry,
    check_weights,
    choose_repair,
    merge_integers,
    of_inputs,
)
from automerge._merge_task import Clock, Task, provenance
from automerge._offload import MEMORY, Store
from automerge._repair_report import Renormaliser, RepairReport
from automerge._repair_stage import renormalise
from automerge._singular import agreed, marks, measured_again
from automerge.groups import Element
from automerge.io import SHARD_BYTES, buffer_names, check_state_dict, save_state_dict, tied_names
from automerge.matchers import FrankWolfe, Matcher, Matching, Progress, check_matcher, match
from automerge.renormalise import batchnorm_names
from automerge.symmetry import Symmetry
from automerge.trace import normalise_args

StateDict = dict[str, torch.Tensor]
RepairMode = Literal["auto", "none", "reset", "repair", "both"]


# -------------------------------------------------------------------- result
@dataclass(frozen=True, eq=False)
class MergeResult:
    """A merged network, and where it came from.

    Attributes:
        state_dict: the merged weights, with the names, shapes and dtypes of the first model.
        matching: how the models were moved.
        symmetry: the symmetry that was used.
        provenance: inputs (SHA-256, number of parameters), versions, options, matcher, time; plain data for JSON.
        stats: seconds per stage: ``check``, ``infer``, ``match``, ``average``, ``repair``, ``total``.
        repair: what was done to the statistics.
        notes: what a reader must know.
    """

    state_dict: StateDict
    matching: Matching
    symmetry: Symmetry
    provenance: Mapping[str, Any]
    stats: Mapping[str, float] = field(default_factory=dict)
    repair: RepairReport = field(default_factory=RepairReport)
    notes: tuple[str, ...] = ()

    def load_into(self, model: nn.Module) -> nn.Module:
        """Write the merged weights into a model of the architecture, in place.

        Returns:
            The model.

        Raises:
            CheckpointError: if its keys or shapes differ, it is on the meta device, or it is no module.
        """
        if not isinstance(model, nn.Module):
            raise CheckpointError(f"load_into takes a module, such as build(), got a {type(model).__name__}")
        check_values(model)
        check_state_dict(self.state_dict, weights_of(model), "the merged state dict", buffer_names(model))
        load_weights(model, self.state_dict)
        return model

    def save(self, path: str | os.PathLike[str], force: bool = False, shard_bytes: int = SHARD_BYTES) -> None:
        """Write the merged weights as safetensors, with the provenance and the repair in the metadata.

        A path that ends in ``.safetensors.index.json`` gets an index and shards, see `automerge.io.save_state_dict`.

        Raises:
            OutputError: if the path exists (without ``force``) or cannot be written.
        """
        metadata = {"automerge.provenance": self.provenance, "automerge.repair": self.repair.to_dict()}
        save_state_dict(path, self.state_dict, {k: json.dumps(v) for k, v in metadata.items()}, force, shard_bytes)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data for JSON, without the weights."""
        return {
            "provenance": dict(self.provenance),
            "seconds": dict(self.stats),
            "repair": self.repair.to_dict(),
            "notes": list(self.notes),
        }

    def report(self) -> str:
        """What was merged, how, how long it took, and what was repaired, for a person."""
        options = self.provenance["options"]
        inputs = self.provenance["inputs"]
        where = options["coordinates"]
        frame = "the universe" if where == "universe" else f"model {where}"
        lines = [f"Merged {len(inputs)} models of {inputs[0]['parameters']:,} parameters in the coordinates of {frame}"]
        for number, (item, weight) in enumerate(zip(inputs, options["weights"], strict=True)):
            lines.append(f"  model {number}: weight {weight:.4g}, sha256 {item['sha256'][:16]}")
        lines.append(f"Matcher: {self.provenance['matcher']}")
        lines += [f"  {remark}" for remark in self.matching.remarks()]
        share = self.symmetry.free_share
        lines.append(f"Symmetry: {self.symmetry.counted}, {share:.1%} of the axes' positions free")
        lines.append(str(self.repair))
        lines.append("Seconds: " + ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in self.stats.items()))
        return "\n".join(lines + [f"Note: {note}" for note in self.notes])

    __str__ = report
    __repr__ = report


# -------------------------------------------------------------------- merge
@own_modes()
def merge(
    models: Sequence[Model],
    args: Any,
    kwargs: Mapping[str, Any] | None = None,
    *,
    matcher: Matcher = FrankWolfe(),  # noqa: B008
    weights: Sequence[float] | None = None,
    data: Any = None,
    symmetry: Symmetry | None = None,
    matching: Matching | None = None,
    architecture: nn.Module | None = None,
    coordinates: Literal["universe"] | int = "universe",
    repair: RepairMode | Renormaliser = "auto",
    verify: bool = True,
    offload: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> MergeResult:
    """Merge N >= 2 networks of one architecture into one.

    Floating-point entries are averaged in float64 and cast back to the dtype of the first model. A float buffer, or a
    parameter that takes no gradient, that is the same in all models (a mask, a table of positions) is a constant of the
    architecture and stays; the groups respect it. BatchNorm's running
    means and running variances are averaged like weights: the plain weighted mean of the variances, which is what naive
    averaging does too; it is not the merged network's own variance, so give ``data`` to measure that. Spectral norms are
    measured again on the merged weights. Integer and
    boolean entries must be equal, except single integers (counters, as ``num_batches_tracked``), of which the largest is
    taken; a note names others than that. Tied tensors stay tied.

    Args:
        models: modules of one architecture, or, with ``architecture``, state dicts of it. None of them is changed.
        args: example inputs of the model, a tensor or a tuple; their number says how many items of a batch are inputs.
        kwargs: example keyword inputs.
        matcher: how the models are aligned; ``Identity()`` for naive averaging.
        weights: one non-negative number per model; normalised to sum one; uniform by default.
        data: unlabelled or labelled batches for the repair (and matchers that look at activations): any iterable or
            DataLoader. A batch is a tensor, a list or tuple whose first ``len(args)`` items are the inputs, or a dict
            of keyword inputs. A one-shot generator is listed.
        symmetry: skip inference and use this one.
        matching: skip inference and the search, and use this one of the same models in the same order, made by `match` or
            loaded; ``matcher`` is then not asked.
        architecture: the module that the state dicts belong to; not changed. It may be on the meta device: then it takes the
            first model's weights, where they are.
        coordinates: ``"universe"``, or the number of the model whose order of neurons the result takes.
        repair: ``"none"``; ``"reset"`` BatchNorm statistics; ``"repair"`` activations (see `Repair`); ``"both"``:
            reset, then repair the layers that no BatchNorm follows; ``"auto"``: with data, reset where the model has
            BatchNorm and repair where it has none; without data, none. Or a `Renormaliser` with its options, such as
            ``GaussianRepair()``, which needs no data.
        verify: check the inferred symmetry numerically.
        offload: a directory for everything large that the work holds, for models whose files exceed the memory: read them
            with `automerge.io.load_state_dict` (safetensors are read where they are used), give the architecture on the
            meta device, and save the result as shards. Only with FrankWolfe; a repair runs networks in memory.
        progress: called by the matcher with a dict of numbers as the work goes on.

    Raises:
        MatchingError: for fewer than two models, unsuitable weights, a model number out of range, a matcher that needs
            data without data, or a matching of other models.
        CheckpointError: for models whose keys, shapes or integer buffers differ, or that hold NaN or Inf.
        AutomergeError: for an unknown ``repair``, one that needs data, or empty data.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> nets = [nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2)) for _ in range(2)]
        >>> result = merge(nets, torch.randn(4, 2))
        >>> result.state_dict["0.weight"].shape
        torch.Size([8, 2])
    """
    clock = Clock()
    check_matcher(matcher)
    check_symmetry(symmetry)
    if progress is not None and not callable(progress):
        raise AutomergeError(f"progress= is called with numbers as the work goes on; got a {type(progress).__name__}")
    matcher = _offloaded(matcher, offload, matching)
    task = Task.checked(models, architecture, Store(offload))
    share = check_weights(weights, len(task.states))
    coordinates = check_coordinates(coordinates, len(task.states))
    if matching is not None:
        task.notes.extend(check_matching(matching, symmetry, task.states))
        symmetry = matching.symmetry
    mode = choose_repair(repair, task.network, data)
    if not (matcher if matching is None else matching).separable:
        name = type(matcher).__name__ if matching is None else matching.matcher.partition("(")[0]
        mode = check_inseparable(name, mode, repair, share, coordinates, task.network)
    batches = None if data is None else check_data(task.network, data, args, kwargs)
    if matcher.needs_data and batches is None and matching is None:
        raise MatchingError(f"{type(matcher).__name__} looks at activations: give batches, merge(..., data=batches)")
    clock.lap("check")
    symmetry = task.infer(args, kwargs, verify) if symmetry is None else task.noted(symmetry)
    clock.lap("infer")
    if matching is None:
        runnable: list[Model] = [task.first() if matcher.needs_data else task.states[0], *task.states[1:]]
        matching = match(runnable, symmetry, matcher, progress=progress, data=batches)
    clock.lap("match")
    with _carrying(matching):
        moved = task.moved(symmetry, _elements(matching, coordinates), kept=mode != "none")
        aliases = {**symmetry.aliases, **tied_names(weights_of(task.network))}
        kept = agreed([marks(task.network, m) for m in moved], share)
        merged, spectral = measured_again(task.network, average(moved, share, aliases=aliases, store=task.store), kept)
        clock.lap("average")
        if batches is None and isinstance(mode, Renormaliser):
            batches = Batches.like([_example(args, kwargs)], args, kwargs, device_of(task.network))
        merged, report = renormalise(
            mode, task.network, merged, moved, share, batches, symmetry, watched=data is not None
        )
        clock.lap("repair")
    if report.drift is not None and report.drift[1] > 1.01 * report.drift[0]:
        task.notes.append(_FURTHER.format(*report.drift))
    if mode == "none" and batchnorm_names(task.network):
        task.notes.append(_AVERAGED)
    if spectral:
        more = f" and {len(spectral) - 3} more" if len(spectral) > 3 else ""
        task.notes.append(f"spectral norms were measured again on the merged weights: {', '.join(spectral[:3])}{more}")
    chosen = mode if isinstance(mode, str) else repr(mode)
    options = {"weights": share, "coordinates": coordinates, "repair": chosen, "verify": verify}
    made = provenance(task.network, task.states, options, matching.matcher)
    notes = (
        *of_inputs([item["sha256"] for item in made["inputs"]], task.states, symmetry),
        *task.notes,
        *symmetry.notes,
    )
    return MergeResult(merged, matching, symmetry, made, clock.seconds(), report, notes)


def average(
    state_dicts: Sequence[Mapping[str, torch.Tensor]],
    weights: Sequence[float],
    *,
    aliases: Mapping[str, str] | None = None,
    store: Store = MEMORY,
) -> StateDict:
    """The weighted mean of aligned state dicts, one tensor after the other.

    Args:
        state_dicts: of equal keys and shapes.
        weights: one per state dict; normalised to the sum one.
        aliases: names that share the tensor of another name.
        store: where the mean is held.

    Returns:
        New tensors with the dtypes and devices of the first state dict.

    Raises:
        CheckpointError: if integer or boolean entries, names or shapes differ, or something is no state dict.
        MatchingError: for unsuitable weights, or no state dict.

    Examples:
        >>> average([{"w": torch.zeros(2)}, {"w": torch.ones(2)}], [0.25, 0.75])
        {'w': tensor([0.7500, 0.7500])}
    """
    if not state_dicts:
        raise MatchingError("averaging needs at least one state dict, got none")
    state_dicts = [checked_state(state) for state in state_dicts]
    for number, state in enumerate(state_dicts):
        _check_alike(number, state, state_dicts[0])
    weights = check_weights(weights, len(state_dicts))
    out: StateDict = {}
    with store.working():
        for name, first in state_dicts[0].items():
            values = [first.detach(), *(s[name].detach().to(first.device) for s in state_dicts[1:])]
            if first.is_floating_point() or first.is_complex():
                out[name] = store.keep(_mean(values, weights))
            else:
                out[name] = merge_integers(name, values)
    for alias, name in (aliases or {}).items():
        if alias in out and name in out:
            out[alias] = out[name]
    return out


def _check_alike(number: int, state: Mapping[str, torch.Tensor], first: Mapping[str, torch.Tensor]) -> None:
    if odd := next((n for n in first if n not in state or state[n].shape != first[n].shape), None) or next(
        (n for n in state if n not in first), None
    ):
        raise CheckpointError(
            f"state dict {number} differs from the first in {odd!r}; they must be of one architecture"
        )


def _mean(values: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """The weighted mean in float64, in the type of the first; what is the same in all models is so to the last digit."""
    wide = torch.complex128 if values[0].is_complex() else torch.float64
    total = torch.zeros(values[0].shape, dtype=wide, device=values[0].device)
    used = [(value, weight) for value, weight in zip(values, weights, strict=True) if weight]
    same = torch.ones(total.shape, dtype=torch.bool, device=total.device)
    for value, weight in used:
        total.add_(value.to(wide), alpha=weight)
        same &= value.to(total.device) == used[0][0].to(total.device)
    if bool(same.any()):
        total = torch.where(same, used[0][0].to(total.device, wide), total)
    return total.to(values[0].dtype)


# -------------------------------------------------------------------- stages
@contextmanager
def _carrying(matching: Matching) -> Iterator[None]:
    """An error or an interrupt after the search has what was found with it, as ``matching``."""
    try:
        yield
    except BaseException as error:
        with suppress(AttributeError):
            error.matching = matching  # type: ignore[attr-defined]
        raise


_FURTHER = (
    "the repair moved the outputs away from the models' own, from {:.3g} to {:.3g} standard deviations of their mean; see by "
    "`automerge compare` whether repair='none' is better"
)
_AVERAGED = "the BatchNorm statistics are averages of the models' own; give data to measure the merged network's"


def _offloaded(matcher: Matcher, offload: str | os.PathLike[str] | None, matching: Matching | None) -> Matcher:
    """The matcher with its work in a directory."""
    if offload is None or matching is not None:
        return matcher
    if not isinstance(matcher, FrankWolfe):
        raise MatchingError(f"offload= is for FrankWolfe; {type(matcher).__name__} holds its work in memory")
    return replace(matcher, offload=offload)


def _elements(matching: Matching, coordinates: str | int) -> list[Element]:
    to_universe: Sequence[Element] = matching.to_universe
    if not isinstance(coordinates, int):
        return list(to_universe)
    back = to_universe[coordinates].inverse()
    return [element.then(back) for element in to_universe]


def _example(args: Any, kwargs: Mapping[str, Any] | None) -> Any:
    """The example inputs as a batch; keyword tensors among them make a batch of keyword inputs."""
    positional, keywords = normalise_args((args,) if args is None else args, kwargs)
    return positional or keywords
