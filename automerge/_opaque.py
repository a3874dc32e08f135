"""Modules that are traced as one node, because somebody registered a rule for their class."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.utils._python_dispatch import _disable_current_modes

from automerge._tree_io import map_tensors

CLASSES: set[type[nn.Module]] = set()


class OpaqueModule:
    """The target of an opaque module's node: ``target(state, *args, **kwargs)`` runs it with the given tensors."""

    def __init__(self, path: str, module: nn.Module) -> None:
        self.path = path
        self.module = module
        self.__name__ = f"opaque_{type(module).__name__}"
        self.__module__ = type(module).__module__
        self.__qualname__ = self.__name__

    def __call__(self, state: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(self.module, state, args, kwargs)


@contextlib.contextmanager
def opaque_modules(recorder: Any, model: nn.Module) -> Iterator[None]:
    """While it lasts, modules of registered classes run unseen and leave one node each."""
    patched: list[nn.Module] = []
    for path, module in model.named_modules():
        if type(module) in CLASSES:
            module.forward = _wrapper(recorder, path, module, module.forward)
            patched.append(module)
    try:
        yield
    finally:
        for module in patched:
            del module.forward


def _wrapper(recorder: Any, path: str, module: nn.Module, forward: Any) -> Any:
    target = OpaqueModule(path, module)

    def run(*args: Any, **kwargs: Any) -> Any:
        def node(_: str, tensor: torch.Tensor) -> fx.Node:
            return recorder.node_of(tensor)

        tensors = dict(module.named_parameters()) | dict(module.named_buffers())
        state = {name: node("", t) for name, t in tensors.items()}
        node_args, node_kwargs = map_tensors(node, args), map_tensors(node, kwargs)
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            out = forward(*args, **kwargs)
        recorder.record_call(target, (state, *node_args), node_kwargs, out)
        return out

    return run
