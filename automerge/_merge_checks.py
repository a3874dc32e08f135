"""What `automerge.merge` checks before any long work, so that bad input fails early and with one clear sentence."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from automerge._aliases import overlaps
from automerge._data import Batches
from automerge._errors import AutomergeError, CheckpointError, MatchingError, SymmetryError
from automerge._extra_state import extras, same, weights_of, without_extras
from automerge._forward import check_eager, device_of, evaluating, preserving, run_batch
from automerge._loading import as_loaded, check_tied
from automerge._numbers import is_whole
from automerge._repair_report import Renormaliser
from automerge._sketch import sketch
from automerge.io import buffer_names, check_state_dict, tied_names
from automerge.matchers import Matching
from automerge.renormalise import batchnorm_names
from automerge.symmetry import Symmetry

Model = nn.Module | Mapping[str, torch.Tensor]
_MODES = ("auto", "none", "reset", "repair", "both")


def listed_models(models: Any) -> list[Model]:
    """The models, of any iterable of them.

    Raises:
        CheckpointError: for one model or one path in the place of several, or what is no iterable.
    """
    one = isinstance(models, nn.Module) and not isinstance(models, nn.ModuleList)
    if isinstance(models, str | os.PathLike | Mapping) or one or not isinstance(models, Iterable):
        raise CheckpointError(
            f"models is one {type(models).__name__}; give a list of two or more modules or state dicts"
        )
    return list(models)


def check_models(
    models: Sequence[Model], architecture: nn.Module | None
) -> tuple[nn.Module, list[Mapping[str, torch.Tensor]], list[str]]:
    """The network, one state dict per model, and notes."""
    if len(models) < 2:
        raise MatchingError(f"merging needs at least two models, got {len(models)}")
    if architecture is not None and not isinstance(architecture, nn.Module):
        raise CheckpointError(
            f"architecture= is a {type(architecture).__name__}; give a module, such as build() rather than build"
        )
    network = architecture
    dicts: list[Mapping[str, torch.Tensor]] = []
    for number, model in enumerate(models):
        if isinstance(model, nn.Module):
            network = model if network is None else network  # a module may have a length, and that may be zero
            dicts.append(model.state_dict())
        elif isinstance(model, Mapping):
            dicts.append(model)
        else:
            read = isinstance(model, str | os.PathLike)
            hint = "; load_state_dict(path) reads one from a file" if read else ""
            raise CheckpointError(f"model {number} is a {type(model).__name__}; give a module or a state dict{hint}")
    if network is None:
        raise CheckpointError("state dicts alone do not say what they compute; give architecture=, a module of theirs")
    own = weights_of(network)
    beside = _entries_beside(network, dicts)
    dicts = [as_loaded(d, network) for d in dicts]
    expected: Mapping[str, torch.Tensor] = own if architecture is not None else dicts[0]
    buffers = buffer_names(network)
    notes = [n for k, d in enumerate(dicts) for n in check_state_dict(d, expected, f"model {k}", buffers)]
    notes += [*_other_modules(network, models), *beside]
    check_ties(network, dicts)
    notes += _different_masks(buffers, dicts)
    for name, first in dicts[0].items():
        if not (first.is_floating_point() or first.is_complex()):
            merge_integers(name, [d[name].to(first.device) for d in dicts])
    return network, dicts, notes


def _other_modules(network: nn.Module, models: Sequence[Model]) -> list[str]:
    """Notes on models whose weights fit and whose modules are of other types: an activation has no weights."""
    here = {name: type(module).__name__ for name, module in network.named_modules() if name}
    notes = []
    for number, model in enumerate(models):
        modules = model.named_modules() if isinstance(model, nn.Module) else ()
        there = {name: type(module).__name__ for name, module in modules if name in here}
        odd = next((name for name, kind in there.items() if kind != here[name]), None)
        if odd is not None:
            notes.append(
                f"model {number}: {odd} is a {there[odd]}, in the architecture a {here[odd]}, which is what the merged "
                "weights are for"
            )
    return notes


def _entries_beside(network: nn.Module, dicts: Sequence[Mapping[str, Any]]) -> list[str]:
    """A note on what state dicts hold beside weights, which stays as the module has it that the weights are loaded into."""
    own = extras(network)
    found = [state.keys() - without_extras(state, own).keys() for state in dicts]
    names = list(dict.fromkeys([*own, *(name for held in found for name in sorted(held))]))
    if not names:
        return []
    odd = (n for n in names if any(n in held and n not in own for held in found))
    others = [*odd, *(n for n in own if any(n in d and not same(d[n], own[n]) for d in dicts))]
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    differ = "".join(
        f" ({name} differs between the models or from the architecture's, and only the latter counts)"
        for name in others[:1]
    )
    return [
        f"{names[0]}{more} of the state dict: no weights, so not merged; MergeResult.load_into keeps those of the module "
        "that it loads into" + differ
    ]


def _different_masks(buffers: Iterable[str], dicts: Sequence[Mapping[str, torch.Tensor]]) -> list[str]:
    """A note on masks of pruning that differ: what is pruned in one model only comes out scaled, and not as it was."""
    found = []
    for name in buffers:
        first = dicts[0].get(name)
        if first is None or not first.is_floating_point() or all(torch.equal(d[name], first) for d in dicts[1:]):
            continue
        if all(bool(((d[name] == 0) | (d[name] == 1)).all()) for d in dicts):
            found.append(name)
    if not found:
        return []
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return [
        f"{found[0]}{more} hold zeros and ones only, which differ between the models, and are averaged like weights; make the "
        "pruning permanent first (torch.nn.utils.prune.remove)"
    ]


def check_ties(network: nn.Module, dicts: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """Names that the architecture ties, or that share its memory, must hold equal values."""
    own = weights_of(network)
    ties = tied_names(own)
    for number, state in enumerate(dicts):
        check_tied(state, ties, f"model {number}")
    for name, other, places in overlaps((n, t) for n, t in own.items() if n not in ties):
        both = places >= 0
        for number, state in enumerate(dicts):
            if not torch.equal(state[name].cpu()[both], state[other].cpu().reshape(-1)[places[both]]):
                raise CheckpointError(
                    f"model {number}: {name} and {other} share memory in the architecture, but differ here"
                )


def check_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """The models' weights, normalised to the sum one."""
    if weights is None:
        return [1.0 / count] * count
    try:
        if isinstance(weights, str | Mapping):
            raise TypeError
        values = [float(w) for w in weights]
    except (TypeError, ValueError):
        raise MatchingError(f"weights={weights!r}: give a list of {count} numbers, one for each model") from None
    if len(values) != count:
        raise MatchingError(f"got {len(values)} weights for {count} models; give one for each")
    for number, value in enumerate(values):
        if not np.isfinite(value) or value < 0:
            raise MatchingError(f"weight {number} is {value:g}; weights must be finite and not negative")
    total = sum(values)
    if not np.isfinite(total):
        raise MatchingError("the weights are too large to be added up; only their ratios matter, so scale them down")
    if total <= 0:
        raise MatchingError("the weights sum to zero; at least one must be positive")
    return values if abs(total - 1) < 1e-12 else [value / total for value in values]


def check_coordinates(coordinates: Any, count: int) -> Literal["universe"] | int:
    """The universe, or the number of a model."""
    if isinstance(coordinates, str) and coordinates == "universe":
        return "universe"
    if not is_whole(coordinates) or not 0 <= coordinates < count:
        raise MatchingError(
            f"coordinates must be 'universe' or a model number from 0 to {count - 1}, got {coordinates!r}"
        )
    return int(coordinates)


def choose_repair(repair: str | Renormaliser, network: nn.Module, data: Any) -> str | Renormaliser:
    """The mode that is carried out."""
    if isinstance(repair, Renormaliser):
        if repair.needs_data and data is None:
            raise AutomergeError(
                f"repair={type(repair).__name__}(...) measures activations; give data=, batches of inputs"
            )
        return repair
    if repair not in _MODES:
        raise AutomergeError(f"repair must be one of {', '.join(_MODES)}, got {repair!r}")
    if repair == "none":
        return repair
    norms = batchnorm_names(network)
    if data is None:
        if repair == "auto":
            return "none"
        raise AutomergeError(f"repair={repair!r} measures activations; give data=, batches of inputs")
    if repair == "auto":
        return "reset" if norms else "repair"
    if repair == "reset" and not norms:
        raise AutomergeError("repair='reset' needs BatchNorm statistics, and this model has none; use repair='repair'")
    return repair


def check_symmetry(symmetry: object) -> None:
    """A symmetry that was given is one.

    Raises:
        SymmetryError: if it is something else.
    """
    if symmetry is not None and not isinstance(symmetry, Symmetry):
        raise SymmetryError(
            f"symmetry= takes what automerge.infer returns, got a {type(symmetry).__name__}; leave it out to infer it"
        )


def check_matching(
    matching: Matching, symmetry: Symmetry | None, dicts: Sequence[Mapping[str, torch.Tensor]]
) -> list[str]:
    """A given matching is of so many models of this architecture; a note if it is of other ones.

    Raises:
        MatchingError: if it is not, or comes with another symmetry.
    """
    if not isinstance(matching, Matching):
        raise MatchingError(f"matching= takes what automerge.match returns, got a {type(matching).__name__}")
    if symmetry is not None and symmetry is not matching.symmetry:
        raise MatchingError("a matching brings its own symmetry; leave symmetry= out")
    if len(matching) != len(dicts):
        raise MatchingError(f"the matching is of {len(matching)} models, and {len(dicts)} are to be merged")
    for name, shape in matching.symmetry.shapes.items():
        found = tuple(dicts[0][name].shape) if name in dicts[0] else None
        if found != tuple(shape):
            has = "not in these models" if found is None else f"of shape {found} here"
            raise MatchingError(
                f"the matching is of another architecture: its {name}, of shape {tuple(shape)}, is {has}; match again"
            )
    here = [sketch(state, matching.symmetry.shapes) for state in dicts]
    known: Sequence[str] = matching.stats.get("models", here)
    odd = [number for number, mark in enumerate(here) if mark != known[number]]
    if not odd:
        return []
    same = sorted(here) == sorted(known)
    other = "these models in another order" if same else f"other weights than those of model {odd[0]}"
    return [f"the matching that was given was made of {other}; match again, unless that is meant"]


def check_inseparable(
    name: str,
    mode: str | Renormaliser,
    asked: str | Renormaliser,
    share: Sequence[float],
    coordinates: object,
    network: nn.Module,
) -> str | Renormaliser:
    """The repair of a merge whose moved models are no networks of their own.

    Raises:
        MatchingError: for what needs such networks: a repair towards them, other weights, a model's coordinates.
    """
    if asked == "auto" and mode not in ("none", "reset"):
        mode = "none"
    if mode not in ("none", "reset"):
        raise MatchingError(
            f"the models moved by {name} are no networks of their own, so there is nothing to repair towards; "
            "use repair='none'" + (" or 'reset'" if batchnorm_names(network) else "")
        )
    if any(abs(s - share[0]) > 1e-12 for s in share) or coordinates != "universe":
        raise MatchingError(f"{name} merges with equal weights in the universe; leave weights and coordinates out")
    return mode


def check_data(network: nn.Module, data: Any, args: Any, kwargs: Mapping[str, Any] | None) -> Batches:
    """The batches, re-iterable; the model has run on the first of them, and of a list on the first of every form.

    Raises:
        AutomergeError: if the data are empty or no batches, or the model does not run on one of those.
    """
    check_eager(network)
    batches = Batches.like(data, args, kwargs, device_of(network))
    first = next(iter(batches))
    try:
        with evaluating(network), preserving(network):
            run_batch(network, None, first)
    except AutomergeError as error:
        cause = error.__cause__ or error
        hint = f"the first {len(first.args)} items of a batch must be the model's inputs"
        if first.kwargs and not first.args:
            hint = "a batch's entries but for its labels must be the model's keyword inputs (labels too if kwargs= has them)"
        raise AutomergeError(
            f"the model does not run on the first batch of data: {type(cause).__name__}: {cause}; {hint}"
        ) from cause
    for batch in batches.others():
        with evaluating(network), preserving(network):
            run_batch(network, None, batch)
    return batches


def of_inputs(hashes: Sequence[str], states: Sequence[Mapping[str, torch.Tensor]], symmetry: Symmetry) -> Iterator[str]:
    """What a reader must know of the models that were merged: equal ones, counters that differ, nothing that may move."""
    for kept, numbers in _equal(hashes).items():
        if len(numbers) > 1:
            which = " and ".join(map(str, numbers))
            yield f"models {which} are the same (sha256 {kept[:16]}); they count as often as they were given"
    differ = [name for name in states[0] if _is_counter(states[0][name]) and not _alike([s[name] for s in states])]
    named = [name for name in differ if not name.endswith("num_batches_tracked")]
    if named:
        yield f"the integers {', '.join(named[:3])} differ between the models; the largest of each is taken, as of a counter"
    if not (symmetry.sets or symmetry.exchanges):
        yield (
            "nothing of this architecture can be permuted (print(automerge.infer(model, args)) says what pins it), so this is "
            "the plain average"
        )


def _equal(hashes: Sequence[str]) -> dict[str, list[int]]:
    out: dict[str, list[int]] = {}
    for number, value in enumerate(hashes):
        out.setdefault(value, []).append(number)
    return out


def _alike(values: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(v.cpu(), values[0].cpu()) for v in values[1:])


def _is_counter(value: torch.Tensor) -> bool:
    """Whether a buffer is one whole number, as ``num_batches_tracked`` is."""
    whole = not (value.is_floating_point() or value.is_complex() or value.dtype is torch.bool)
    return whole and value.numel() == 1


def merge_integers(name: str, values: Sequence[torch.Tensor]) -> torch.Tensor:
    """The common value of an integer or boolean buffer; the largest for a counter (``num_batches_tracked``, any scalar)."""
    if _is_counter(values[0]):
        # (of unsigned integers of more than eight bits torch knows no maximum)
        return torch.stack([v.to(torch.int64) for v in values]).amax(0).to(values[0].dtype)
    for number, value in enumerate(values):
        if not torch.equal(value, values[0]):
            raise CheckpointError(
                f"the {values[0].dtype} buffer {name} of model {number} differs from model 0's; it cannot be averaged, "
                "so the models are not of one architecture"
            )
    return values[0].clone()
