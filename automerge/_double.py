"""Running a model in float64, whatever precision it casts to on the way."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from automerge._errors import TraceError
from automerge._tree_io import map_tensors, tensors_of

_LOW = (torch.float32, torch.float16, torch.bfloat16)


class Double(TorchDispatchMode):
    """Computes in float64 whatever a model casts to lower precision."""

    supports_higher_order_operators = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if isinstance(func, torch._ops.HigherOrderOperator):
            with self:
                return plainly(func, *args, **kwargs)
        args = tuple(_wider(a) for a in args)
        if "dtype" in kwargs:
            kwargs["dtype"] = _wider(kwargs["dtype"])
        if not func._schema.is_mutable:
            args, kwargs = map_tensors(widen, tuple(args)), map_tensors(widen, kwargs)
        elif any(a.dtype is torch.float64 for a in tensors_of(args)):
            args = (args[0], *map_tensors(widen, tuple(args[1:])))
        if func.overloadpacket is torch.ops.aten._grouped_mm:
            return _grouped_mm(*args, **kwargs)
        if func.overloadpacket in _FAKE_QUANTISED:
            return _fake_quantised(*args)
        return func(*args, **kwargs)


def plainly(operator: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a higher-order operator (flex attention, a conditional) as the function of plain operators that it stands for.

    Raises:
        TraceError: if it has none.
    """
    known = {torch.ops.higher_order.cond: _conditional, torch.ops.higher_order.while_loop: _loop}
    function = known.get(operator) or operator.py_kernels.get(torch._C.DispatchKey.CompositeExplicitAutograd)
    if function is None or operator._name in _OUTSIDE:
        raise TraceError(
            f"{operator._name} is a higher-order operator without a plain form; write it out for inference"
        )
    return function(*args, **kwargs)


_OUTSIDE = ("scan", "associative_scan", "map_impl")  # what these compute themselves would not be seen


def _conditional(predicate: Any, yes: Any, no: Any, operands: Any = ()) -> Any:
    return (yes if bool(predicate) else no)(*operands)


def _loop(condition: Any, body: Any, carried: Any, others: Any = ()) -> Any:
    while bool(condition(*carried, *others)):
        carried = body(*carried, *others)
    return tuple(carried)


def _wider(argument: Any) -> Any:
    """A type that is asked for, in double precision; anything else as it is."""
    if not isinstance(argument, torch.dtype):
        return argument
    return torch.float64 if argument in _LOW else torch.complex128 if argument is torch.complex64 else argument


def _grouped_mm(a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """The grouped product in float64, which PyTorch's kernel does not offer: rows up to ``offs[e]`` times ``b[e]``."""
    out = a.new_zeros(a.shape[0], b.shape[-1])
    start = 0
    for e, stop in enumerate(offs.tolist()):
        out[start:stop] = a[start:stop] @ b[e]
        start = stop
    return out


def _fake_quantised(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, *args: Any) -> tuple[torch.Tensor, ...]:
    """Rounding to multiples of a scale, for which PyTorch's kernels take float32 only: ``args`` end with the range."""
    *how, low, high = args
    if isinstance(how[0], int):  # a scale for every position of this axis
        view = [-1 if k == how[0] % x.dim() else 1 for k in range(x.dim())]
        scale, zero = scale.reshape(view), zero.reshape(view)
    whole = (x / scale).round() + zero
    rounded = (whole.clamp(low, high) - zero) * scale
    enabled = how[0] if isinstance(how[0], torch.Tensor) else torch.ones(1, device=x.device)
    return torch.where(enabled.bool(), rounded, x), (whole >= low) & (whole <= high)


_FAKE_QUANTISED = {
    torch.ops.aten.fake_quantize_per_channel_affine_cachemask,
    torch.ops.aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams,
}


def widen(_: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype in _LOW:
        return tensor.to(torch.float64)
    return tensor.to(torch.complex128) if tensor.dtype is torch.complex64 else tensor


@contextlib.contextmanager
def own_modes() -> Iterator[None]:
    """The caller's autocast and inference mode are off inside; those of a model itself are the model's.

    Products would be those of another precision, and what is made could be neither written to nor copied.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


class Calibrate(Double):
    """On the way, moves the running statistics of every BatchNorm most of the way to those of its input."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (
            getattr(func, "overloadpacket", None) in _BATCH_NORMS
            and len(args) > 4
            and isinstance(args[4], torch.Tensor)
        ):
            x, mean, var = args[0], args[3], args[4]
            axes = [k for k in range(x.dim()) if k != 1]
            if x.numel() > x.shape[1]:
                mean.mul_(0.2).add_(x.mean(axes), alpha=0.8)
                var.mul_(0.2 * float(x.var())).add_(x.var(axes, unbiased=False), alpha=0.8)
        return super().__torch_dispatch__(func, types, args, kwargs)


_BATCH_NORMS = {torch.ops.aten.native_batch_norm, torch.ops.aten._native_batch_norm_legit_no_training}


@contextlib.contextmanager
def double_precision(mode: type[Double] = Double) -> Iterator[None]:
    """Everything inside is computed in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), mode():
            yield
    finally:
        torch.set_default_dtype(before)
