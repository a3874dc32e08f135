"""A pretended device: tensors that say they are on ``cuda:0``, lie on the CPU, and refuse what CUDA would refuse.

A machine without a GPU cannot run its kernels, but it can see whether tensors of two devices meet, whether a tensor of the
device is turned into a numpy array, and whether results come back where the inputs were.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

CUDA = torch.device("cuda", 0)
_aten = torch.ops.aten
_MAY_MEET = {  # between devices, or with an index on the CPU
    _aten._to_copy,
    _aten.copy_,
    _aten.copy,
    _aten.index,
    _aten.index_put,
    _aten.index_put_,
    _aten._index_put_impl_,
    _aten._unsafe_index_put,
}


class Far(torch.Tensor):
    """A tensor of the pretended device.

    Args:
        near: the tensor on the CPU that holds its values.
    """

    near: torch.Tensor

    @staticmethod
    def __new__(cls, near: torch.Tensor) -> Far:
        out = torch.Tensor._make_wrapper_subclass(
            cls,
            near.shape,
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            layout=near.layout,
            device="meta",  # a build without CUDA has no guard for it; python is told otherwise
        )
        out.near = near.detach()
        return out

    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]

    def data_ptr(self) -> int:
        return self.near.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.near.untyped_storage()

    def tolist(self) -> Any:
        return self.near.tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) not in memo:
            new: torch.Tensor = Far(self.near.clone())
            memo[id(self)] = nn.Parameter(new, requires_grad=False) if isinstance(self, nn.Parameter) else new
        return memo[id(self)]

    def __repr__(self, **_: Any) -> str:
        return f"Far({self.near!r})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # these make tensors of numbers below the dispatcher
        if func in (torch.where, torch.Tensor.where):
            args = [Far(torch.tensor(a)) if isinstance(a, int | float) else a for a in args]
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            args = (args[0], _index(args[1]), *args[2:])
        if func is torch.Tensor.__setitem__ and not isinstance(args[2], torch.Tensor):
            args = (*args[:2], Far(torch.tensor(args[2], dtype=args[0].dtype)))
        with torch._C.DisableTorchFunctionSubclass():
            if func in (torch.quantile, torch.Tensor.quantile):
                return Far(torch.quantile(args[0].near, *args[1:], **(kwargs or {})))
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _index(index: Any) -> Any:
    """Lists as tensors."""
    if isinstance(index, tuple):
        return tuple(_index(i) for i in index)
    return torch.tensor(index, dtype=None if index else torch.int64) if isinstance(index, list) else index


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    far = any(isinstance(t, Far) for t in tensors)
    wanted = kwargs.get("device")
    kinds = (
        ("cuda", "meta") if func is _aten._to_copy.default else ("cuda",)
    )  # ``x.to(other)`` reads ``other`` below python
    target = far if wanted is None else torch.device(wanted).type in kinds
    if not far and not target:
        return func(*args, **kwargs)
    if far and func.overloadpacket not in _MAY_MEET:
        near = [tuple(t.shape) for t in tensors if not isinstance(t, Far) and t.dim()]
        if near:
            raise RuntimeError(
                f"{func}: expected all tensors to be on the same device, but found cuda:0 and cpu {near}"
            )
    generator = kwargs.get("generator")
    if target and isinstance(generator, torch.Generator) and generator.device.type == "cpu":
        raise RuntimeError(f"{func}: expected a 'cuda' device type for generator but found 'cpu'")
    plain_args, plain = tree_map_only(Far, lambda t: t.near, (args, kwargs))
    if wanted is not None:
        plain["device"] = torch.device("cpu")
    if plain.get("pin_memory"):
        plain["pin_memory"] = False
    out = func(*plain_args, **plain)
    if func in (_aten._local_scalar_dense.default, _aten.equal.default):
        return out
    given = {id(t.near): t for t in tensors if isinstance(t, Far)}
    if not target:
        return out
    return tree_map_only(torch.Tensor, lambda t: given[id(t)] if id(t) in given else Far(t), out)


class _Mode(TorchDispatchMode):
    """Makes what is asked for on the device, and is asked for by nobody else."""

    supports_higher_order_operators = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(func, torch._ops.HigherOrderOperator):
            return func(*args, **(kwargs or {}))
        return _run(func, args, kwargs or {})


@contextlib.contextmanager
def pretended() -> Iterator[None]:
    """Within, ``device="cuda"`` is the pretended device."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # ``parameter.data = ...`` would miss ``near``
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch("torch.cuda._lazy_init"))
            stack.enter_context(mock.patch("torch.cuda.mem_get_info", return_value=(1 << 30, 1 << 31)))
            stack.enter_context(mock.patch("torch.cuda.device", return_value=contextlib.nullcontext()))
            stack.enter_context(_Mode())
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


def far(value: Any) -> Any:
    """Tensors, state dicts and modules on the pretended device; what is tied stays so."""
    if isinstance(value, nn.Module):
        out = copy.deepcopy(value)
        memo: dict[int, torch.Tensor] = {}
        for module in out.modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is not None:
                        new: torch.Tensor = Far(tensor.detach().clone())
                        new = nn.Parameter(new, requires_grad=False) if held is module._parameters else new
                        held[name] = memo.setdefault(id(tensor), new)
        return out
    memo = {}
    return tree_map_only(torch.Tensor, lambda t: memo.setdefault(id(t), Far(t.detach().clone())), value)


def near(value: Any) -> Any:
    """The values on the CPU."""
    return tree_map_only(Far, lambda t: t.near, value)
