"""Verification: random group elements on a float64 copy with randomised weights and statistics."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from automerge._batches import mixes_rows
from automerge._diagnosis import OtherPathError, Setting, failure
from automerge._difference import finite, relative_difference
from automerge._double import own_modes
from automerge._errors import AutomergeError, InvarianceError, SymmetryError, TraceError
from automerge._loading import check_values
from automerge._longer import far_inputs, other_sizes
from automerge._numbers import is_whole
from automerge._subject import Move, Subject, fresh_inputs, named_tensors, randomised, runnable
from automerge._tree_io import tensors_of
from automerge._trials import jitter, trial_elements, within_rounding
from automerge.symmetry import Symmetry
from automerge.trace import normalise_args

_QUICK = 0.1  # seconds
_SINGLE = 1e-4  # the smallest tolerance where a model computes in float32 only
_PLAIN = 1e-3  # a change that changes of the last digits do not come to where errors of 1e-9 are told from them


@dataclass(frozen=True)
class Verification:
    """What `verify` measured.

    Attributes:
        error: the largest difference of outputs, relative to the largest output.
        elements: how many random elements were tried, on one input each.
        inputs: how many inputs.
        reacted: False if the outputs did not change when the moved weights were perturbed, or hold nothing but rounding
            errors, so that nothing was checked.
        randomised: False if the model gave no finite output with randomised weights, so that its own were used.
        seconds: wall time.
        longer: how many inputs of other sizes the model ran on, with two elements or three each.
        mixed: of what shapes inputs were left out since the model mixes the entries of a batch on them; empty if none were.
        dtype: what was computed in: ``"float64"``, or ``"float32"`` if the model does not run in it.
    """

    error: float
    elements: int
    inputs: int
    randomised: bool
    seconds: float
    reacted: bool = True
    longer: int = 0
    mixed: str = ""
    dtype: str = "float64"

    def __str__(self) -> str:
        if not self.reacted:
            return f"not verified: the outputs do not react to the weights that move, on {self.inputs} inputs"
        own = "" if self.randomised else ", with the model's own weights"
        sizes = f" and others on {self.longer} of other sizes" if self.longer else ""
        return (
            f"verified: {self.elements} random elements on {self.inputs} inputs{sizes} change the {self.dtype} output by at "
            f"most {self.error:.1e} (relative){own}, in {self.seconds:.1f} s"
        )


@own_modes()
def verify(
    model: nn.Module,
    args: Any,
    symmetry: Symmetry,
    kwargs: Mapping[str, Any] | None = None,
    *,
    elements: int = 3,
    seed: int = 0,
    tolerance: float = 1e-9,
) -> Verification:
    """Check a symmetry on the model: random group elements must leave the float64 output unchanged.

    The weights and normalisation statistics are randomised first, because a fresh initialisation (zeros, ones, layer
    scales of 1e-6) hides mistakes. The elements take turns on the example and on a fresh input. Then a few are tried on
    inputs whose axes are longer (none that are large), longer by one, or half as long, where the model runs on them: a
    sequence of one hides distances. (On the CPU only.)

    Args:
        model: the model; it is copied, not changed.
        args: the example inputs, as for `infer`.
        symmetry: what to check.
        kwargs: keyword inputs.
        elements: how many random elements on each input, at least; one or more.
        seed: of weights, inputs and elements.
        tolerance: the largest relative difference that passes; 1e-4 at least where the model does not run in float64.

    Raises:
        AutomergeError: for options under which nothing could fail.
        InvarianceError: naming the first operator whose value differs, and the inputs where these are longer.
        SymmetryError: if the symmetry is of another architecture.
    """
    if not is_whole(elements) or elements < 1:
        raise AutomergeError(f"elements={elements!r} would test nothing; give a whole number of at least one")
    if not tolerance >= 0:
        raise AutomergeError(f"tolerance={tolerance}: expected a relative difference, 0 or more")
    start = time.perf_counter()
    check_values(model)
    positional, keywords = normalise_args(args, kwargs)
    subject = Subject(model)
    _check_fits(symmetry, subject.tensors, model)
    setting = _setting(model, subject, symmetry, (positional, keywords), seed)
    if not setting.subject.wide:
        tolerance = max(tolerance, _SINGLE)
    worst, drowned, count = _tried(model, symmetry, setting, elements, seed, tolerance)
    reacted = not count or (not drowned and _reacts(setting, symmetry))
    longer, mixed = 0, list[str]()
    if setting.randomised and symmetry.moved:
        for error, other in _check_longer(model, setting, symmetry, seed, tolerance, mixed):
            worst, longer = max(worst, error), longer + 1
            reacted = reacted or (not drowned and _reacts(other, symmetry))
    seconds = time.perf_counter() - start
    dtype = "float64" if setting.subject.wide else "float32"
    return Verification(
        worst, count, len(setting.inputs), setting.randomised, seconds, reacted, longer, "".join(mixed[:1]), dtype
    )


def _setting(model: nn.Module, subject: Subject, symmetry: Symmetry, example: tuple[Any, Any], seed: int) -> Setting:
    """The weights and inputs to try elements on; of a copy as the model is where the one in float64 does not run.

    Raises:
        TraceError: if that does not run either.
    """
    try:
        return _randomised(subject, symmetry, example, seed) or _own(model, subject, example)
    except TraceError:
        plain = Subject(model, wide=False)
        setting = _randomised(plain, symmetry, example, seed)
        if setting is None:
            raise
        return setting


def _randomised(subject: Subject, symmetry: Symmetry, example: tuple[Any, Any], seed: int) -> Setting | None:
    """The example and a fresh input under randomised weights; None if the model gives no finite output then."""
    free = {n: t for n, t in subject.tensors.items() if symmetry.aliases.get(n, n) in symmetry.shapes}
    rest = {n: t.detach().clone() for n, t in subject.tensors.items() if n not in free}
    base = rest | _alias(randomised(free, symmetry.statistics, seed), symmetry)
    try:
        if any(t.is_floating_point() for t in subject.model.buffers()):  # running statistics, if there are any
            base = subject.calibrate(base, *example, fixed=rest)
        how, found = runnable(partial(subject.outputs, base), *example, seed)
        inputs = [example, fresh_inputs(*example, seed, how)]
        before = [subject.outputs(base, *inputs[0]), found or subject.outputs(base, *inputs[1])]
    except Exception:
        return None
    return Setting(subject, base, inputs, before, True) if all(map(finite, before)) else None


def _own(model: nn.Module, subject: Subject, example: tuple[Any, Any]) -> Setting:
    """The example under the model's own weights."""
    base = {n: t.detach().to(subject.tensors[n].dtype, copy=True) for n, t in named_tensors(model).items()}
    try:
        return Setting(subject, base, [example], [subject.outputs(base, *example)], False)
    except Exception as problem:
        raise TraceError(
            f"a copy of {type(model).__name__} does not run in float64, as verification needs ({type(problem).__name__}: "
            f"{problem}); pass verify=False to skip it"
        ) from problem


def _tried(
    model: nn.Module, symmetry: Symmetry, setting: Setting, elements: int, seed: int, tolerance: float
) -> tuple[float, bool, int]:
    """The largest difference under random elements, whether one drowned in rounding errors, and how many were tried.

    Raises:
        InvarianceError: if one changes the outputs.
    """
    worst, drowned, count = 0.0, False, 0
    for element in trial_elements(symmetry, elements * len(setting.inputs), seed):
        turn, count = count % len(setting.inputs), count + 1
        before, run, move = setting.before[turn], partial(setting.run, turn), Move(symmetry, element, setting.base)
        error = relative_difference(before, run(move))
        if not error <= tolerance:
            if not within_rounding(error, before, run, relative_difference, size=setting.subject.rounding):
                raise _diagnosed(model, symmetry, setting, turn, move, error)
            drowned = True
        else:
            worst = max(worst, error)
    return worst, drowned, count


def _diagnosed(*found: Any) -> Exception:
    """The error for an element that changes the outputs; one without a place if looking for that fails."""
    try:
        return failure(*found)
    except Exception as problem:
        return InvarianceError(
            f"a random element of the group changes the output by {found[-1]:.1e} (relative); where values differ first was "
            f"not found ({type(problem).__name__}: {problem})"
        )


def _check_longer(
    model: nn.Module, setting: Setting, symmetry: Symmetry, seed: int, tolerance: float, mixed: list[str]
) -> Iterator[tuple[float, Setting]]:
    """The differences on inputs of other sizes, as far as the model runs on them.

    On the CPU only: elsewhere an index out of range ends the process's use of the device. The shapes of inputs on which the
    model mixes the entries of a batch are added to ``mixed``.
    """
    subject = setting.subject
    if any(t.device.type != "cpu" for t in subject.tensors.values()):
        return
    sizes = {n for shape in symmetry.shapes.values() for n in shape}
    example = setting.inputs[0]

    def tried(given: tuple[Any, Any], before: list[torch.Tensor]) -> tuple[float, Setting] | None:
        other = Setting(subject, setting.base, [given], [before], True, other_sizes=True)
        try:
            return _tried(model, symmetry, other, 2, seed, tolerance)[0], other
        except OtherPathError as error:
            shapes = " and ".join(str(tuple(t.shape)) for t in tensors_of(given))
            if mixes_rows(lambda inputs: subject.outputs(setting.base, *inputs), example, given, before):
                mixed.append(shapes)
                return None
            text = f"the groups hold on the example, but not on inputs of the shapes {shapes}: {error}"
            raise OtherPathError(text, error.graph) from error
        except AutomergeError:
            raise
        except Exception:
            return None  # an input that the model takes with some weights only

    for group in other_sizes(*example, seed, sizes, single=bool(symmetry.exchanges)):
        for i, make in enumerate(group):
            found = _outputs(setting, make)
            result = tried(*found) if found is not None else None
            if result is not None:
                yield result
                if i == 0:
                    break
    start = time.perf_counter()
    subject.outputs(setting.base, *example)
    once = time.perf_counter() - start
    for further in far_inputs(*example, seed) if 2 * once < _QUICK else ():
        last = _last_quick(setting, further, once)
        result = tried(*last) if last is not None else None
        if result is not None:
            yield result


def _outputs(
    setting: Setting, make: Callable[[], tuple[Any, Any]]
) -> tuple[tuple[Any, Any], list[torch.Tensor]] | None:
    """Inputs and what the model makes of them; None if they are no inputs for it."""
    given = make()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            before = setting.subject.outputs(setting.base, *given)
    except Exception:
        return None
    return (given, before) if finite(before) else None


def _last_quick(
    setting: Setting, further: Iterator[Callable[[], tuple[Any, Any]]], took: float
) -> tuple[tuple[Any, Any], list[torch.Tensor]] | None:
    """The longest inputs that the model takes before a pass over twice as many might take longer than `_QUICK`.

    None if these are no longer than what was tried before: twice as long as the example.

    Args:
        setting: the weights.
        further: makes inputs, each time twice as long.
        took: seconds of a pass over the example.
    """
    last = None
    for turn, make in enumerate(further):
        start = time.perf_counter()
        found = _outputs(setting, make)
        if found is None:
            break
        last = found if turn else None
        before, took = took, time.perf_counter() - start
        if 2 * took * max(1.0, took / before) > _QUICK:
            break
    return last


def _reacts(setting: Setting, symmetry: Symmetry) -> bool:
    """Whether the outputs depend on what the group moves: a dead output would agree with any claim."""
    names = symmetry.moved

    def perturbed(name: str, value: torch.Tensor) -> torch.Tensor:
        key = symmetry.aliases.get(name, name)
        return jitter(1e-2, 1, key, value) if key in names else value

    for turn, values in enumerate(setting.before):
        run, size = partial(setting.run, turn), setting.subject.rounding
        change = relative_difference(values, run(perturbed))
        if change > _PLAIN or (
            change > 1e-8 and not within_rounding(change, values, run, relative_difference, 1, size)
        ):
            return True
    return False


def _alias(state: dict[str, torch.Tensor], symmetry: Symmetry) -> dict[str, torch.Tensor]:
    return {n: state[symmetry.aliases.get(n, n)] for n in state}


def _check_fits(symmetry: Symmetry, tensors: Mapping[str, torch.Tensor], model: nn.Module) -> None:
    """The symmetry is of this architecture."""
    if not isinstance(symmetry, Symmetry):
        raise SymmetryError(
            f"verify(model, args, symmetry) takes what automerge.infer returned, got a {type(symmetry).__name__}"
        )
    for name, shape in symmetry.shapes.items():
        if name not in tensors or tuple(tensors[name].shape) != tuple(shape):
            found = f"has the shape {tuple(tensors[name].shape)}" if name in tensors else "does not exist"
            raise SymmetryError(
                f"the symmetry is of another architecture: its {name}, of the shape {tuple(shape)}, {found} in this "
                f"{type(model).__name__}; infer it again"
            )
