"""What state dicts hold beside weights: what ``get_extra_state`` gives, what a module's ``state_dict`` adds, sparse buffers.

Versions, settings, counters and graphs are carried by the modules and are no part of what is merged. What may hold weights
(packed parameters of a quantised layer, pickled bytes) stays among the weights, so that their checks refuse it.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from types import BuiltinFunctionType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from automerge._errors import CheckpointError
from automerge._objects import attributes_of, entries_of, is_object

_PLAIN = (
    *(type(None), bool, int, float, complex, str, type, Enum, FunctionType, BuiltinFunctionType, np.generic),
    *(torch.dtype, torch.device, torch.layout),
)


def is_extra(value: Any) -> bool:
    """Whether a state dict's entry is no tensor and holds none: numbers, words and functions, and what is made of these."""
    seen: set[int] = set()
    todo = [value]
    while todo:
        one = todo.pop()
        if id(one) in seen or isinstance(one, _PLAIN):
            continue
        seen.add(id(one))
        within = entries_of(one)
        if within is None and not (is_object(one) and not isinstance(one, nn.Module | torch.Tensor)):
            return False
        todo += within if within is not None else attributes_of(one).values()
    return True


def without_extras(state_dict: Mapping[str, Any], own: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A state dict without the entries that are no tensors and hold none.

    Args:
        state_dict: of a model.
        own: what `extras` gives for the architecture, if that is known: its sparse buffers are left out, too.
    """
    return {n: v for n, v in state_dict.items() if not _is_beside(v) or (_is_sparse(v) and n not in (own or ()))}


def extras(module: nn.Module) -> dict[str, Any]:
    """What a module's state dict holds beside weights: entries without tensors, and sparse buffers (a graph's adjacency)."""
    weights = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    return {n: v for n, v in module.state_dict().items() if n not in weights and _is_beside(v)}


def _is_beside(value: Any) -> bool:
    return _is_sparse(value) or (not isinstance(value, torch.Tensor) and is_extra(value))


def _is_sparse(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout is not torch.strided and not value.is_nested


def weights_of(module: nn.Module) -> dict[str, Any]:
    """A module's state dict without `extras`.

    Raises:
        CheckpointError: if it has other names there than in its modules.
    """
    if text := renamed(module):
        raise CheckpointError(text)
    own = extras(module)
    return {n: v for n, v in module.state_dict().items() if n not in own}


def held_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters and buffers themselves under the names of a module's state dict, and what else it holds of tensors."""
    own = _named(module)
    try:
        held = module.state_dict(keep_vars=True)
    except TypeError:  # a state_dict of the module's own that takes nothing
        held = {name: own.get(name, value) for name, value in module.state_dict().items()}
    return {name: value for name, value in held.items() if isinstance(value, torch.Tensor)}


def renamed(module: nn.Module) -> str | None:
    """What to say of a module that saves its weights under other names than its modules have; None if it does not.

    A wrapper that saves what it wraps (Lightning's Fabric), hooks that change names.
    """
    own, held = _named(module), held_tensors(module)
    if held.keys() <= own.keys():
        return None
    kept = {_place(own[name]) for name in held.keys() & own.keys() if _has_place(own[name])}
    lost = ((_place(tensor), name) for name, tensor in own.items() if _has_place(tensor))
    places = {place: name for place, name in lost if place not in kept}
    for name, tensor in held.items():
        path = None if name in own or not _has_place(tensor) else places.get(_place(tensor))
        if path is not None:
            inside = path.removesuffix(name).rstrip(".") if path.endswith(f".{name}") else ""
            return f"{type(module).__name__}.state_dict() calls {name!r} what its modules call {path!r}; give " + (
                f"the module that it wraps, its {inside}"
                if inside
                else "a module that saves its weights by their own names"
            )
    return None


def _named(module: nn.Module) -> dict[str, torch.Tensor]:
    pairs = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return dict(pairs)


def _has_place(tensor: torch.Tensor) -> bool:
    plain = tensor.layout is torch.strided and not is_traceable_wrapper_subclass(tensor) and not is_lazy(tensor)
    return plain and not tensor.is_meta and tensor.numel() > 0


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def load_weights(module: nn.Module, weights: Mapping[str, Any], *, assign: bool = False) -> None:
    """``load_state_dict`` of the tensors of a state dict; what else the module's own holds stays as it is."""
    module.load_state_dict({**extras(module), **weights}, assign=assign)


def same(a: Any, b: Any) -> bool:
    """Whether two such entries are equal, as far as can be told."""
    try:
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            return torch.equal(a.to_dense(), b.to_dense())
        return bool(a == b) or repr(a) == repr(b)
    except Exception:  # a class whose comparison fails
        return a is b
