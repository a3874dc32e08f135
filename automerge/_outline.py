"""Tensors without their numbers: outlines, and operators that are looked at instead of being computed.

Inference needs shapes, types and places in memory, not activations. An operator over numbers that nobody has computed is
run on the meta device; what it returns stands in the model as memory that is never written to, so that neither time nor
pages are spent on it. Everything that looks at such numbers raises `NeedsValues`, and the model is run once more for real.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

aten = torch.ops.aten


class NeedsValues(BaseException):
    """The program looks at numbers that were not computed; no `Exception`, so that no model swallows it."""


@dataclass(frozen=True, slots=True)
class Outline:
    """Shape, strides, type and place in its storage of a tensor that is not kept.

    A tensor on the meta device would do, but thousands of them allocated while activations come and go keep the
    allocator from giving any memory back.
    """

    shape: torch.Size
    strides: tuple[int, ...]
    start: int
    dtype: torch.dtype
    nbytes: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Outline:
        return cls(
            tensor.shape,
            tensor.stride(),
            int(tensor.storage_offset()),
            tensor.dtype,
            tensor.untyped_storage().nbytes(),
        )

    def stride(self, axis: int | None = None) -> Any:
        """As for a tensor."""
        return self.strides if axis is None else self.strides[axis]

    def storage_offset(self) -> int:
        """As for a tensor."""
        return self.start

    def tensor(self) -> torch.Tensor:
        """The tensor on the meta device that the outline describes."""
        storage = torch.UntypedStorage(self.nbytes, device="meta")
        return torch.empty(0, dtype=self.dtype, device="meta").set_(storage, self.start, self.shape, self.strides)


def filled(value: Any) -> Any:
    """An example value with tensors on the meta device in place of outlines."""
    if isinstance(value, Outline):
        return value.tensor()
    return type(value)(filled(v) for v in value) if type(value) in (list, tuple) else value


def shadow(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor on the meta device with the same shape, type and place in a storage of the same size."""
    if tensor.is_meta or tensor.layout is not torch.strided:
        return tensor
    return Outline.of(tensor).tensor()


class Lookalikes:
    """What operators return when they are not computed: tensors of the right form in memory that nobody writes to."""

    def __init__(self) -> None:
        self._known: dict[Any, Any] = {}

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], run: bool = False) -> Any:
        """What has the form of ``func(*args, **kwargs)``; with ``run`` that itself, if its form depends on no number."""
        if run or _own_strides(func, args):
            if func not in _LOOKUPS and not _FORMAL(func):
                raise NeedsValues(f"{func} depends on values or on memory")
            return func(*args, **kwargs)
        return _stand_in(self.form(func, args, kwargs), _device(args, kwargs))

    def form(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The outlines of an operator's outputs.

        Raises:
            NeedsValues: if they depend on the numbers, or nobody knows.
        """
        if not _FORMAL(func) and not (func in _LOOKUPS and _whole_numbers(args[1])):
            raise NeedsValues(f"{func} depends on values or on memory")
        easy = _same_form(func, args, kwargs)
        if easy is not None:
            return easy
        try:
            key = (func, _key(args), _key(kwargs))
            hash(key)
        except TypeError:
            return _form(func, args, kwargs)
        if key not in self._known:
            self._known[key] = _form(func, args, kwargs)
        return self._known[key]


_LOOKUPS = {aten.index.Tensor, aten._unsafe_index.Tensor}


def _whole_numbers(indices: Any) -> bool:
    """Whether indices are positions: the form of what a mask selects depends on its values."""
    return all(i is None or i.dtype not in (torch.bool, torch.uint8) for i in indices)


# operators whose output has the form of their first operand, if that lies dense in memory and nothing else is given
_ALIKE = {
    getattr(aten, name).default
    for name in ("relu", "relu_", "sigmoid", "tanh", "silu", "silu_", "hardtanh", "hardtanh_", "hardswish", "hardswish_",
                 "hardsigmoid", "gelu", "exp", "neg", "sqrt", "rsqrt", "clone", "native_batch_norm")
}  # fmt: skip


def _same_form(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The form of the commonest operators, which is plain to see; None for all others (the meta device knows)."""
    if func not in _ALIKE or kwargs:
        return None
    x = args[0]
    if not x.is_floating_point() or x.stride() != _packed(x.shape):
        return None
    form = Outline(x.shape, x.stride(), 0, x.dtype, x.numel() * x.element_size())
    if func is not aten.native_batch_norm.default:
        return form
    if args[5] is True:
        return None
    nothing = Outline(torch.Size([0]), (1,), 0, x.dtype, 0)
    return (form, nothing, nothing)


# operators on operands in any layout whose strides the meta device is known to give
_EXACT = {aten.bmm.default, aten.clone.default, aten._softmax.default,
          aten._scaled_dot_product_flash_attention_for_cpu.default}  # fmt: skip


def _own_strides(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether an operator may choose its output's strides as the meta device does not: operands are laid out otherwise."""
    if func in _EXACT or torch.Tag.pointwise in func.tags:
        return False
    return any(isinstance(t, torch.Tensor) and t.dim() > 2 and t.stride() != _packed(t.shape) for t in args)


def _packed(shape: torch.Size) -> tuple[int, ...]:
    """The strides of a tensor whose entries follow each other in memory."""
    return tuple(itertools.accumulate([1, *shape[:0:-1]], lambda a, b: a * max(b, 1)))[::-1] if shape else ()


def _formal(func: Any) -> bool:
    """Whether the form of an operator's outputs depends on the form of its inputs alone."""
    tags = func.tags
    if torch.Tag.dynamic_output_shape in tags or torch.Tag.data_dependent_output in tags:
        return False
    if "as_strided" in func._schema.name or not func._schema.returns:
        return not func._schema.returns
    return all("Tensor" in str(r.type) for r in func._schema.returns)


class _Memo(dict[Any, bool]):
    def __call__(self, func: Any) -> bool:
        known = self.get(func)
        if known is None:
            known = self[func] = _formal(func)
        return known


_FORMAL = _Memo()


def _key(value: Any) -> Any:
    kind = type(value)
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided:
            raise NeedsValues("a tensor that is not strided")
        return (value.shape, value.stride(), value.dtype)
    if kind is list or kind is tuple:
        return (kind, *map(_key, value))
    if kind is dict:
        return tuple((k, _key(v)) for k, v in value.items())
    return (kind, value)


def _form(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The outlines of an operator's outputs, from running it on the meta device."""
    if "device" in kwargs:
        kwargs = kwargs | {"device": torch.device("meta")}
    try:
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            out = func(*_map(_on_meta, args), **_map(_on_meta, kwargs))
    except Exception as error:
        raise NeedsValues(f"{func} does not run on the meta device ({error})") from error
    form = _map(_described, out)
    if func is aten.native_batch_norm.default and args[5] is not True and _device(args, {}).type == "cpu":
        nothing = Outline(torch.Size([0]), (1,), 0, form[1].dtype, 0)
        return (form[0], nothing, nothing)  # the CPU saves no statistics in evaluation
    return form


def _described(tensor: torch.Tensor) -> Outline:
    if not tensor.is_meta or tensor.layout is not torch.strided:
        raise NeedsValues("an operator gives something else than a strided tensor")
    return Outline.of(tensor)


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _map(fn: Callable[[torch.Tensor], Any], value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return fn(value)
    kind = type(value)
    if kind is list or kind is tuple:
        return kind(_map(fn, v) for v in value)
    return {k: _map(fn, v) for k, v in value.items()} if kind is dict else value


def _stand_in(known: Any, device: torch.device) -> Any:
    if isinstance(known, Outline):
        return torch.empty_strided(known.shape, known.strides, dtype=known.dtype, device=device)
    kind = type(known)
    return kind(_stand_in(k, device) for k in known) if kind is list or kind is tuple else known


def _device(args: Any, kwargs: dict[str, Any]) -> torch.device:
    """Where an operator's outputs are: as asked, else with its operands (a number may be elsewhere)."""
    asked = kwargs.get("device")
    if asked is not None:
        return torch.device(asked)
    first = None
    for value in args:
        for one in value if type(value) in (list, tuple) else (value,):
            if isinstance(one, torch.Tensor):
                if one.dim():
                    return one.device
                first = first or one.device
    return first or torch.device("cpu")
