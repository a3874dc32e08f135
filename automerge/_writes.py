"""What a forward pass writes to is put back after it: parameters (of bounded norm, clipped) and what is in no state dict.

Which these are, the first pass of a module shows: every operator that writes is seen, and what it writes to kept before.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from automerge._restoring import kept_tensors

_HELD = "held "  # and a number: no name of a state dict begins so
_known: dict[int, tuple[weakref.ref[nn.Module], frozenset[str]]] = {}


@contextmanager
def unwritten(model: nn.Module, state: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """A pass of a model, after which its parameters hold what they held before, and so do tensors that are in no state dict.

    (Buffers that are not persistent, plain attributes.) So do its other buffers, if it writes to a parameter (a flag beside
    scales that the first batch sets); those of a model that writes to no parameter keep what was written.

    Args:
        model: the module itself, by which is known what its passes write to.
        state: the tensors that it runs with, under the names of its state dict.
    """
    if any(map(is_lazy, state.values())):  # the pass gives them values, which they keep
        yield
        return
    known = _known.get(id(model))
    if known is not None and known[0]() is model:
        weights = {**state, **_held(model)} if any(name.startswith(_HELD) for name in known[1]) else state
        kept = {name: (weights[name], weights[name].detach().clone()) for name in known[1] & weights.keys()}
        try:
            yield
        finally:
            _put_back(kept.values())
        return
    watch, whole = _Watch({**state, **_held(model)}), False
    try:
        with watch:
            yield
        whole = True
    finally:
        own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        every = not own.isdisjoint(watch.kept)
        kept = {name: pair for name, pair in watch.kept.items() if every or name.startswith(_HELD)}
        _put_back(kept.values())
        if whole:  # a pass that ends early, as where it is only observed, does not show all
            key = id(model)
            _known[key] = weakref.ref(model, lambda _: _known.pop(key, None)), frozenset(kept)


def written(model: nn.Module) -> list[torch.Tensor]:
    """The tensors outside of the state dict that a whole pass of this very module has written to."""
    known = _known.get(id(model))
    if known is None or known[0]() is not model:
        return []
    return [tensor for name, tensor in _held(model).items() if name in known[1]]


def _held(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that modules hold outside of the state dict."""
    state = {id(t) for t in state_of(model).values()}
    return {f"{_HELD}{k}": t for k, t in enumerate(kept_tensors(model)) if id(t) not in state and not is_lazy(t)}


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers themselves; a state dict may hold what hooks make of them."""
    found: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for path, module in model.named_modules(remove_duplicate=False):
        for name, tensor in module._buffers.items():
            if tensor is not None and name not in module._non_persistent_buffers_set:
                found[f"{path}.{name}" if path else name] = tensor
    return found


class _Watch(TorchDispatchMode):
    """Keeps what weights hold before an operator writes to them."""

    supports_higher_order_operators = True

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.kept: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.places: dict[Any, list[tuple[str, torch.Tensor]]] = {}
        for name, tensor in weights.items():
            if tensor.layout is torch.strided and not is_traceable_wrapper_subclass(tensor):
                self.places.setdefault(_memory(tensor), []).append((name, tensor))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = getattr(func, "_schema", None)
        if schema is not None and schema.is_mutable:
            for tensor in _targets(schema, args, kwargs or {}):
                self._keep(tensor)
        return func(*args, **(kwargs or {}))

    def _keep(self, target: torch.Tensor) -> None:
        if target.layout is not torch.strided or is_traceable_wrapper_subclass(target):
            return
        for name, tensor in self.places.get(_memory(target), ()):
            if name not in self.kept:
                self.kept[name] = tensor, tensor.detach().clone()


def _targets(schema: Any, args: Any, kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """What an operator writes to."""
    given = [
        args[i] if i < len(args) else kwargs.get(argument.name)
        for i, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return [t for t in tree_leaves(given) if isinstance(t, torch.Tensor)]


def _memory(tensor: torch.Tensor) -> Any:
    return tensor.untyped_storage()._cdata


def _put_back(kept: Collection[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for tensor, value in kept:
        with torch.no_grad(), torch.inference_mode(tensor.is_inference()):
            tensor.detach().copy_(value)
