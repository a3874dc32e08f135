"""Objects of a program's own that modules hold beside tensors and modules: caches, states, tables."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from enum import Enum
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

_FOREIGN = frozenset(sys.stdlib_module_names) | {"torch", "numpy", "builtins"}
_NAMESPACES = (SimpleNamespace, argparse.Namespace)
_MOST = 10_000  # objects, and entries of a container: what is larger is data
_OF_MODULES = frozenset(vars(nn.Module()))


def held_objects(model: nn.Module) -> list[tuple[str, Any]]:
    """Objects with attributes, of classes that are not Python's or PyTorch's, by the path at which they were found first.

    They are looked for in the attributes of modules and of one another, within lists, tuples and dicts.
    """
    found: dict[int, tuple[str, Any]] = {}
    seen: set[int] = set()
    todo = list(_attributes(model))
    while todo and len(found) < _MOST:
        path, value = todo.pop()
        if isinstance(value, list | tuple | dict) and id(value) not in seen and len(value) < _MOST:
            seen.add(id(value))
            entries = value.items() if isinstance(value, dict) else enumerate(value)
            todo += [(f"{path}.{key}", entry) for key, entry in entries if not isinstance(entry, _LEAVES)]
        if is_object(value) and id(value) not in found:
            found[id(value)] = path, value
            todo += [(f"{path}.{key}", entry) for key, entry in vars(value).items() if not isinstance(entry, _LEAVES)]
    return list(found.values())


_LEAVES = (torch.Tensor, nn.Module, str, int, float, type(None))


def is_object(value: Any) -> bool:
    """Whether a value is an object with attributes, of a class that is not Python's or PyTorch's."""
    if isinstance(value, (*_LEAVES, type, Enum)) or not isinstance(getattr(value, "__dict__", None), dict):
        return False
    return isinstance(value, _NAMESPACES) or type(value).__module__.partition(".")[0] not in _FOREIGN


def _attributes(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """What is bound to modules by a program, by path."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in _OF_MODULES and not isinstance(value, _LEAVES):
                yield f"{path}.{name}" if path else name, value
