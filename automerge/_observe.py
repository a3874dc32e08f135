"""Watch a model's linear maps and convolutions at the dispatcher, whatever module or function calls them.

A weight is recognised by its storage, so that ``nn.Linear``, ``F.linear``, ``x @ w``, one row block of a fused
projection and a convolution are seen alike. What is computed from a weight before use (a parametrisation, a mask) is
not recognised.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from automerge._double import plainly

_VIEWS = ("_unsafe_view", "detach", "alias", "lift_fresh", "_reshape_alias")
_RECENT = 8

Key = tuple[str, str, int, int]
"""``(kind, tensor name, axis, start)``; kind is ``linear``, ``bias`` or ``norm``."""


@dataclass(frozen=True)
class View:
    """How a tensor looks into a named one: its axis that is watched, and the range there."""

    name: str
    axis: int
    start: int
    stop: int
    whole: bool


@dataclass(frozen=True, eq=False)
class Event:
    """One watched operator call.

    Attributes:
        key: what was called, equal in every run of the model.
        value: the tensor whose channels are observed: the output of a linear map, or the input of a normalisation.
        channel: the channel axis of ``value``.
        weight: the weight's output channels.
        bias: the bias that the same call, or this addition, adds.
        names: for a normalisation, the names of running mean and running variance.
        follows: the keys of earlier calls whose untouched output this call reads.
        groups: groups of a transposed convolution; 1 otherwise.
        foldable: whether the call adds nothing to the linear map that is not a known bias.
        source: what the linear map reads: ``(..., fan_in)``, or a convolution's input.
        kernel: for a convolution ``(stride, padding, dilation, transposed, groups)``.
        size: for a convolution the kernel's extents.
    """

    key: Key
    value: torch.Tensor
    channel: int
    weight: View | None = None
    bias: View | None = None
    names: tuple[str, str] | None = None
    follows: tuple[Key, ...] = ()
    groups: int = 1
    foldable: bool = True
    source: torch.Tensor | None = None
    kernel: tuple[Any, ...] | None = None
    size: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class _Output:
    """A recent output, held so that its memory is not given to another tensor, with its version when it was made."""

    value: torch.Tensor
    version: int
    key: Key
    channel: int

    def is_seen_by(self, other: torch.Tensor) -> bool:
        same = self.value.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
        return same and self.value._version == self.version and self.value.numel() == other.numel()


@dataclass
class Uses:
    """How often each named tensor was read by an operator that is no view, and by which; and how often each output was."""

    count: dict[str, int] = field(default_factory=dict)
    operators: dict[str, list[str]] = field(default_factory=dict)
    outputs: dict[Key, int] = field(default_factory=dict)

    def add(self, name: str, operator: str) -> None:
        self.count[name] = self.count.get(name, 0) + 1
        self.operators.setdefault(name, []).append(operator)


class Observer(TorchDispatchMode):
    """A dispatch mode that reports linear maps, convolutions, bias additions and batch normalisations.

    Args:
        tensors: state-dict name -> tensor as the model reads it; tied names map to the same tensor.
        listener: called with every `Event`; a normalisation is reported before it runs, anything else after. It may
            change ``event.value`` in place.
    """

    supports_higher_order_operators = True

    def __init__(self, tensors: Mapping[str, torch.Tensor], listener: Callable[[Event], None]) -> None:
        super().__init__()
        self._by_storage: dict[int, tuple[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            if tensor.numel():
                self._by_storage.setdefault(tensor.untyped_storage().data_ptr(), (name, tensor))
        self._listener = listener
        self._recent: deque[_Output] = deque(maxlen=_RECENT)
        self._made: dict[int, tuple[StorageWeakRef, Key]] = {}
        self.uses = Uses()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.HigherOrderOperator):
            with self:
                return plainly(func, *args, **kwargs)
        name = func.overloadpacket.__name__
        if not (func.is_view or name in _VIEWS):
            self._count(name, args, kwargs)
        if "batch_norm" in name and len(args) > 4:
            self._norm(args)
        before = self._pending(args) if name in ("add", "add_") else None
        out = func(*args, **kwargs)
        if name in ("addmm", "mm", "bmm"):
            self._matmul(name, args, kwargs, out)
        elif name == "convolution":
            self._convolution(args, out)
        elif before is not None and kwargs.get("alpha", 1) == 1:
            self._addition(before, out)
        return out

    # ---------------------------------------------------------------- recognition
    def _find(self, value: Any) -> tuple[str, torch.Tensor] | None:
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided or not value.numel():
            return None
        return self._by_storage.get(value.untyped_storage().data_ptr())

    def _count(self, operator: str, args: Any, kwargs: Any) -> None:
        for leaf in tree_iter((args, kwargs)):
            found = self._find(leaf)
            if found is not None:
                self.uses.add(found[0], operator)
            elif isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided:
                made = self._made.get(leaf.untyped_storage()._cdata)
                if made is not None:
                    self.uses.outputs[made[1]] = self.uses.outputs.get(made[1], 0) + 1

    def _view(self, value: Any, axis: int) -> View | None:
        """The named tensor's axis and range that ``axis`` of ``value`` runs over."""
        found = self._find(value)
        if found is None:
            return None
        name, base = found
        size, stride = value.shape[axis], value.stride(axis)
        fits = [k for k in range(base.ndim) if base.stride(k) == stride and base.shape[k] >= size]
        if not fits:
            return None
        own = min(fits, key=lambda k: (base.shape[k] != size, k))
        offset, start = value.storage_offset() - base.storage_offset(), 0
        for k in sorted(range(base.ndim), key=base.stride, reverse=True):
            place, offset = divmod(offset, max(base.stride(k), 1))
            start = place if k == own else start
        if start + size > base.shape[own]:
            return None
        rest = value.numel() // max(size, 1) == base.numel() // max(base.shape[own], 1)
        return View(name, own, start, start + size, rest)

    def _follows(self, value: torch.Tensor) -> tuple[_Output, ...]:
        """The recent outputs that ``value`` is a whole view of, unchanged since."""
        return tuple(recent for recent in self._recent if recent.is_seen_by(value))

    def made(self, value: torch.Tensor) -> tuple[Key, ...]:
        """The keys of the latest watched calls that wrote the memory of ``value``."""
        at = value.untyped_storage().data_ptr()
        return tuple(recent.key for recent in self._recent if recent.value.untyped_storage().data_ptr() == at)

    # ---------------------------------------------------------------- events
    def _emit(self, event: Event) -> None:
        self._listener(event)
        if event.weight is not None or event.bias is not None:
            self._recent.append(_Output(event.value, event.value._version, event.key, event.channel))
            storage = (
                event.value.untyped_storage()
            )  # a weak reference keeps its address from being given to another one
            self._made[storage._cdata] = (StorageWeakRef(storage), event.key)

    def _matmul(self, name: str, args: Any, kwargs: Any, out: torch.Tensor) -> None:
        left, right = args[-2:]
        on_right, on_left = self._view(_unbatched(right), -1), self._view(_unbatched(left), -2)
        if (on_right is None) == (on_left is None):
            return
        weight, channel = (on_right, out.ndim - 1) if on_right else (on_left, out.ndim - 2)
        if weight is None or not weight.whole:
            return
        bias, foldable = None, True
        if name == "addmm":
            plain = kwargs.get("beta", 1) == 1 and kwargs.get("alpha", 1) == 1
            bias = self._view(args[0], -1) if args[0].ndim == 1 and channel == out.ndim - 1 and plain else None
            foldable = bias is not None and bias.stop - bias.start == out.shape[channel]
        source = left if on_right else right.mT
        self._emit(Event(_key("linear", weight), out, channel, weight, bias, foldable=foldable, source=source))

    def _convolution(self, args: Any, out: torch.Tensor) -> None:
        transposed, groups = bool(args[6]), int(args[8])
        weight = self._view(args[1], 1 if transposed else 0)
        if weight is None or not weight.whole or (transposed and groups > 1 and weight.axis != 1):
            return
        bias = self._view(args[2], 0)
        foldable = args[2] is None or bias is not None
        own = groups if transposed else 1
        kernel = (tuple(args[3]), tuple(args[4]), tuple(args[5]), transposed, groups)
        key = _key("linear", weight)
        seen = Event(key, out, 1, weight, bias, groups=own, foldable=foldable, source=args[0], kernel=kernel)
        self._emit(replace(seen, size=tuple(args[1].shape[2:])))

    def _pending(self, args: Any) -> tuple[tuple[Key, ...], View, int] | None:
        """Whether an addition adds a named vector to a recent output's channels; asked before it runs.

        Returns:
            The calls that made the output, the vector, and the channel axis counted from the end.
        """
        for value, other in ((args[0], args[1]), (args[1], args[0])):
            if self._find(other) is None or not isinstance(value, torch.Tensor) or other.ndim > value.ndim:
                continue
            axis = max(range(-other.ndim, 0), key=lambda k: int(other.shape[k]), default=None)
            view = None if axis is None else self._view(other, axis)
            if axis is None or view is None or other.numel() != other.shape[axis]:
                continue
            keys = tuple(
                seen.key
                for seen in self._follows(value)
                if value.shape[axis] == other.shape[axis] == seen.value.shape[seen.channel]
                and value.stride(axis) == seen.value.stride(seen.channel)
            )
            if keys:
                return keys, view, axis
        return None

    def _addition(self, before: tuple[tuple[Key, ...], View, int], out: torch.Tensor) -> None:
        keys, bias, axis = before
        self._emit(Event(_key("bias", bias), out, out.ndim + axis, bias=bias, follows=keys))

    def _norm(self, args: Any) -> None:
        mean, variance = self._find(args[3]), self._find(args[4])
        if mean is not None and variance is not None:
            follows = tuple(seen.key for seen in self._follows(args[0]))
            names = (mean[0], variance[0])
            self._emit(Event(("norm", mean[0], 0, 0), args[0], 1, names=names, follows=follows))


def _unbatched(value: torch.Tensor) -> torch.Tensor | None:
    """One matrix, if ``value`` is one or the same for every entry of a batch."""
    if value.ndim == 2:
        return value
    return value[0] if value.shape[0] == 1 or value.stride(0) == 0 else None


def _key(kind: str, view: View) -> Key:
    return (kind, view.name, view.axis, view.start)
