"""A copy of a model, in float64, that answers under other weights and inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from automerge._copies import copied
from automerge._double import Calibrate, Double, double_precision, widen
from automerge._errors import AutomergeError, TraceError
from automerge._gradients import as_needed, asking, copy_of, passed
from automerge._objects import attributes_of, held_objects
from automerge._random import forked
from automerge._restoring import kept_tensors
from automerge._tree_io import map_tensors, tensors_of
from automerge.groups import Element
from automerge.symmetry import Symmetry
from automerge.trace import normalise_args, prepared

_OF_MODULES = frozenset(vars(nn.Module()))
_LOW = (torch.float32, torch.float16, torch.bfloat16, torch.complex64)
_WIDE: dict[type, Callable[[Any, Callable[[Any], Any]], Any]] = {
    torch.Tensor: lambda held, _: widen("", held) if held.layout is torch.strided else held,
    list: lambda held, inner: [inner(v) for v in held],
    tuple: lambda held, inner: tuple(inner(v) for v in held),
    dict: lambda held, inner: {k: inner(v) for k, v in held.items()},
}
_NUMBERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def randomised(state: Mapping[str, torch.Tensor], statistics: frozenset[str], seed: int) -> dict[str, torch.Tensor]:
    """Float64 weights without coincidences: zeros, ones and tiny scales of a fresh initialisation are replaced.

    Signs are kept where a tensor has only one, so that variances stay positive.
    """
    rng = torch.Generator().manual_seed(seed)
    out: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        if value.is_complex():
            parts = randomised({f"{name} parts": torch.view_as_real(value.resolve_conj())}, frozenset(), seed)
            out[name] = torch.view_as_complex(*parts.values())
            continue
        if not value.is_floating_point() or value.numel() == 0:
            out[name] = value
            continue
        w = value.detach().to("cpu", torch.float64, copy=True)
        noise = torch.randn(w.shape, generator=rng, dtype=torch.float32)  # in float32: several times faster
        low, high = map(float, w.aminmax())
        if name in statistics:
            positive = low > 0
            out[name] = w.abs().clamp(min=0.1) * torch.exp(0.3 * noise) if positive else w + 0.3 * noise
        elif w.numel() > 1 and max(-low, high) < 1e-3:
            out[name] = 0.2 * (noise if bool((w == 0).any()) else torch.exp(0.3 * noise) * torch.sign(w)).double()
        else:
            zero = w == 0
            instead = 0.1 * noise[zero].double()
            out[name] = w.mul_(noise.mul_(0.2).exp_())
            if instead.numel():
                w.masked_scatter_(zero, instead)
        out[name] = out[name].to(value.device)
    return out


@dataclass(frozen=True)
class Fresh:
    """How other inputs are made of an example.

    Attributes:
        floats: "new" values of the example's mean and deviation; the same "positive"; as large as these, of either sign
            ("centred"); "exchanged" along the first axis, "kept".
        integers: "reversed" along their last axis; "exchanged" along the first; "kept".
    """

    floats: Literal["new", "positive", "centred", "exchanged", "kept"] = "new"
    integers: Literal["reversed", "exchanged", "kept"] = "reversed"


_KEPT = Fresh("kept", "kept")
_CHOICES = (
    Fresh(),
    Fresh("new", "exchanged"),
    Fresh("positive", "reversed"),
    Fresh("positive", "exchanged"),
    Fresh("exchanged", "exchanged"),
)


def fresh_inputs(args: Any, kwargs: Any, seed: int, how: Fresh = _CHOICES[0]) -> tuple[Any, Any]:
    """Other inputs of the same kind: new float and complex values, integers in another order; masks stay.

    Args:
        args: example inputs.
        kwargs: example keyword inputs.
        seed: of the new values.
        how: they are made.
    """
    rng = torch.Generator().manual_seed(seed)

    def change(_: str, x: torch.Tensor) -> torch.Tensor:
        if x.is_floating_point():
            return _other_floats(x, rng, how)
        if x.is_complex() and x.dim():
            return torch.view_as_complex(_other_floats(torch.view_as_real(x.resolve_conj()), rng, how).contiguous())
        if x.dtype in (torch.int64, torch.int32, torch.int16, torch.int8) and x.dim() and how.integers != "kept":
            return x.flip(x.dim() - 1 if how.integers == "reversed" else 0)
        return x

    def changed(name: str, x: torch.Tensor) -> torch.Tensor:
        return asking(change(name, x.detach()), x) if x.requires_grad else change(name, x)

    return map_tensors(changed, args), map_tensors(changed, kwargs)


def _other_floats(x: torch.Tensor, rng: torch.Generator, how: Fresh) -> torch.Tensor:
    if how.floats in ("exchanged", "kept"):
        return x.flip(0) if x.dim() and how.floats == "exchanged" else x
    finite = torch.isfinite(x)
    if not bool(finite.all()) or (x.numel() > 2 and bool(((x == 0) | (x == 1)).all()) and x.unique().numel() == 2):
        return x
    scale = float(x.std()) if x.numel() > 1 else 0.0
    noise = torch.randn(x.shape, generator=rng, dtype=torch.float64).to(x.device, x.dtype)
    if how.floats == "centred":
        return float(x.square().mean().sqrt()) * noise
    new = float(x.mean()) + (scale if scale > 1e-6 else 1.0) * noise
    return new.abs() if how.floats == "positive" and bool((x >= 0).all()) else new


def runnable(run: Callable[[Any, Any], Any], args: Any, kwargs: Any, seed: int = 0) -> tuple[Fresh, Any]:
    """How `fresh_inputs` makes inputs that a model runs with.

    Tokens may stand anywhere, but the columns of a table have ranges of their own; and not every number has a logarithm.

    Args:
        run: runs the model on inputs and returns its outputs; raises where it cannot.
        args: example inputs.
        kwargs: example keyword inputs.
        seed: of the new values.

    Returns:
        The first choice that gives finite outputs, or else that runs. What may be an index and is not on the CPU gets no new
        values: a wrong one there ends the whole process. Beside it the outputs on these inputs; None if they were not asked.
    """
    plain = tensors_of((args, kwargs))
    if any(_may_index(t) for t in plain if not t.is_cpu):
        return Fresh("exchanged", "kept"), None
    ran: tuple[Fresh, Any] | None = None
    tried = [plain]
    for choice in _CHOICES:
        given = fresh_inputs(args, kwargs, seed, choice)
        values = tensors_of(given)
        if any(all(map(_same, values, other)) for other in tried):
            continue
        tried.append(values)
        try:
            result = run(*given)
        except Exception:
            continue
        if all(bool(t.isfinite().all()) for t in tensors_of(result) if t.is_floating_point()):
            return choice, result
        ran = ran or (choice, result)
    return ran or (_CHOICES[0] if len(tried) == 1 else _KEPT, None)


def _may_index(x: torch.Tensor) -> bool:
    """Whether the last axis has an entry of whole numbers only."""
    if not x.is_floating_point():
        return not x.is_complex()
    return bool((x == x.round()).reshape(-1, x.shape[-1]).all(0).any()) if x.dim() and x.numel() else False


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a is b or torch.equal(a, b)


Change = Callable[[str, torch.Tensor], torch.Tensor]
"""What is done to a tensor on its way into the model, by its name."""


@dataclass(frozen=True)
class Move:
    """The `Change` that a group element makes."""

    symmetry: Symmetry
    element: Element

    state: Mapping[str, torch.Tensor]

    def __call__(self, name: str, value: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """The moved tensor, in memory of its own or in ``out``."""
        return self.element.take(name, self.state, self.symmetry.aliases, out)


def unchanged(name: str, value: torch.Tensor) -> torch.Tensor:
    return value


def doubled(model: nn.Module) -> nn.Module:
    """A copy of a model in double precision and in eval mode; `nn.Module.double` leaves complex tensors as they are.

    So are the tensors that modules and objects hold as plain attributes: what a pass writes to them is read again.
    """
    out = copied(model).double()._apply(lambda t: widen("", t)).eval()
    # what several hold stays one; with the old, lest its identity be given anew
    wide: dict[int, tuple[Any, Any]] = {}

    def widened(held: Any) -> Any:
        if id(held) not in wide:
            wide[id(held)] = held, held if type(held) not in _WIDE else _WIDE[type(held)](held, widened)
        return wide[id(held)][1]

    shared = {id(held) for _, held in held_objects(model)}  # what cannot be copied
    owners = [*out.modules(), *(held for _, held in held_objects(out) if id(held) not in shared)]
    for owner in owners:
        for name, held in list(attributes_of(owner).items()):
            if name not in _OF_MODULES and any(type(t) is torch.Tensor and t.dtype in _LOW for t in tree_leaves(held)):
                attributes_of(owner)[name] = widened(held)
    return out


class Subject:
    """A copy of the model whose weights can be set; one tensor at a time, so that no third copy is made.

    Attributes:
        model: the copy.
        wide: whether it computes in float64; else as the model does, where that knows nothing else.
        rounding: relative, about four units in the last place.
    """

    def __init__(self, model: nn.Module, wide: bool = True) -> None:
        self.wide, self.rounding = wide, 1e-15 if wide else 5e-7
        try:
            self.model = doubled(model) if wide else copied(model).eval()
        except Exception as error:
            what = str(error) if isinstance(error, AutomergeError) else f"{type(error).__name__}: {error}"
            raise TraceError(
                f"verification runs a copy of {type(model).__name__}: {what}; pass verify=False to skip it"
            ) from error
        self.tensors = named_tensors(self.model)
        self.keeps: bool | None = None  # whether a pass leaves tensors for the next one; not known before the first

    def load(self, state: Mapping[str, torch.Tensor], change: Change = unchanged) -> None:
        """Set the weights, changed on the way."""
        done: set[int] = set()
        with torch.no_grad():
            for name, value in state.items():
                own = self.tensors.get(name)
                if own is None or own.shape != value.shape or id(own) in done:
                    continue
                done.add(id(own))  # a tied tensor has several names
                if isinstance(change, Move) and own.dtype == value.dtype and own.device == value.device:
                    change(name, value, own)
                else:
                    own.copy_(change(name, value))

    def calibrate(
        self, state: dict[str, torch.Tensor], args: Any, kwargs: Any, *, fixed: Collection[str] = ()
    ) -> dict[str, torch.Tensor]:
        """The state with BatchNorm statistics near those of the data, so that signals neither die out nor explode.

        What is ``fixed`` (statistics that are constants) keeps its values.
        """
        if not self.wide:
            return state
        self.outputs(state, args, kwargs, mode=Calibrate)
        own = {n: t for n, t in self.tensors.items() if n not in fixed}
        return {n: own[n].detach().clone() if n in own and not torch.equal(own[n], v) else v for n, v in state.items()}

    def outputs(
        self,
        state: Mapping[str, torch.Tensor],
        args: Any,
        kwargs: Any,
        change: Change = unchanged,
        mode: type[Double] = Double,
    ) -> list[torch.Tensor]:
        """The outputs under some weights, of two passes where one leaves tensors for the next.

        Random operators draw the same numbers every time.
        """
        self.load(state, change)
        held = _held(self.model) if self.keeps is None and mode is Double and change is unchanged else None
        with prepared(self.model), self.computing(mode), forked(seed=0):
            found = self._pass(args, kwargs)
            if held is not None:
                self.keeps = _numbers(held) != _numbers(_held(self.model)) or self._wrote(state)
            if self.keeps:
                with contextlib.suppress(Exception):  # a cache that is full, say
                    found += self._pass(args, kwargs)
        return found

    def computing(self, mode: type[Double] = Double) -> AbstractContextManager[Any]:
        """Where the copy is run."""
        return double_precision(mode) if self.wide else contextlib.nullcontext()

    def given(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """An input that the copy may write to."""
        plain = value.detach()
        own = widen(name, plain) if self.wide else plain
        return asking(own.clone() if own is plain else own, value)

    def _wrote(self, state: Mapping[str, torch.Tensor]) -> bool:
        """Whether the weights are others than those that were set; what is written to by ``.data`` counts no writes."""
        pairs = ((self.tensors[n], value) for n, value in state.items() if n in self.tensors)
        return any(a.dtype == b.dtype and a.shape == b.shape and not torch.equal(a, b) for a, b in pairs)

    def _pass(self, args: Any, kwargs: Any) -> list[torch.Tensor]:
        def run() -> list[torch.Tensor]:
            with as_needed(self.model):
                result = self.model(*map_tensors(self.given, args), **map_tensors(self.given, kwargs))
            return [widen("", t.detach().clone()) for t in tensors_of(result)]

        return passed(self.model, run)


def _held(model: nn.Module) -> list[tuple[torch.Tensor, int]]:
    """The tensors that the modules hold, and how often each was written to."""
    return [(t, 0 if t.is_inference() else t._version) for t in kept_tensors(model)]


def _numbers(held: list[tuple[torch.Tensor, int]]) -> list[tuple[int, int]]:
    return [(id(t), version) for t, version in held]


def check_inputs(model: nn.Module, args: Any, kwargs: Any) -> None:
    """Inputs with NaN, unless the model knows what to do with them (values that are missing).

    Raises:
        TraceError: if all that comes out is NaN, too, by which nothing can be checked.
    """
    given = normalise_args(args, kwargs)
    if not any(t.dtype in _NUMBERS and not t.is_meta and bool(t.isnan().any()) for t in tensors_of(given)):
        return

    def run() -> list[torch.Tensor]:
        with torch.no_grad(), prepared(model), forked(), as_needed(model):
            own = map_tensors(lambda _, t: copy_of(t), given)
            return tensors_of(model(*own[0], **own[1]))

    try:
        outputs = passed(model, run)
    except Exception:  # said where it is recorded
        return
    if all(t.dtype in _NUMBERS and bool(t.isnan().all()) for t in outputs):
        raise TraceError("the example inputs hold NaN, and so does all that the model makes of them; give others")


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, but for sparse ones (the adjacency of a graph), which stay as they are."""
    pairs = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: tensor for name, tensor in pairs if tensor.layout is torch.strided}
