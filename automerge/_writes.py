"""Parameters that a forward pass writes to (embeddings of bounded norm, weights that are clipped) are put back after it.

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

_known: dict[int, tuple[weakref.ref[nn.Module], frozenset[str]]] = {}


@contextmanager
def unwritten(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """A pass of a model, after which its parameters hold what they held before.

    So do its buffers, if it writes to a parameter (a flag beside scales that the first batch sets); those of a model that
    writes to no parameter keep what was written.

    Args:
        model: the module itself, by which is known what its passes write to.
        weights: the tensors that it runs with, under the names of its parameters and buffers.
    """
    if any(map(is_lazy, weights.values())):  # the pass gives them values, which they keep
        yield
        return
    known = _known.get(id(model))
    if known is not None and known[0]() is model:
        kept = {name: (weights[name], weights[name].detach().clone()) for name in known[1] & weights.keys()}
        try:
            yield
        finally:
            _put_back(kept.values())
        return
    watch = _Watch(weights)
    try:
        with watch:
            yield
    finally:
        own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        kept = {} if own.isdisjoint(watch.kept) else watch.kept
        _put_back(kept.values())
        key = id(model)
        _known[key] = weakref.ref(model, lambda _: _known.pop(key, None)), frozenset(kept)


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
