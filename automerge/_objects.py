"""Objects of a program's own that modules hold beside tensors and modules: caches, states, tables."""

from __future__ import annotations

import argparse
import sys
from collections import deque
from collections.abc import Iterator, MutableMapping
from enum import Enum
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

_FOREIGN = frozenset(sys.stdlib_module_names) | {"torch", "numpy", "builtins"}
_NAMESPACES = (SimpleNamespace, argparse.Namespace)
_CONTAINERS: tuple[Any, ...] = (dict, list, tuple, set, frozenset, deque)
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
        if isinstance(value, list | tuple | dict) and id(value) not in seen and size_of(value) < _MOST:
            seen.add(id(value))
            entries = dict.items(value) if isinstance(value, dict) else enumerate(entries_of(value) or ())
            todo += [(f"{path}.{key}", entry) for key, entry in entries if not isinstance(entry, _LEAVES)]
        if is_object(value) and id(value) not in found:
            found[id(value)] = path, value
            own = attributes_of(value).items()
            todo += [(f"{path}.{key}", entry) for key, entry in own if not isinstance(entry, _LEAVES)]
    return list(found.values())


_LEAVES = (torch.Tensor, nn.Module, str, int, float, type(None))


def size_of(container: Any) -> int:
    """How much is in a container, whatever its class makes of ``len``."""
    return next((kind.__len__(container) for kind in _CONTAINERS if isinstance(container, kind)), 0)


def entries_of(container: Any) -> list[Any] | None:
    """What is in a container (keys too), whatever its class makes of iteration; None if it is none."""
    if isinstance(container, dict):
        return [*dict.keys(container), *dict.values(container)]
    kind = next((kind for kind in _CONTAINERS if isinstance(container, kind)), None)
    return None if kind is None else [*kind.__iter__(container)]


def is_object(value: Any) -> bool:
    """Whether a value is an object with attributes, of a class that is not Python's or PyTorch's."""
    if isinstance(value, (*_LEAVES, type, Enum)):
        return False
    if not isinstance(getattr(value, "__dict__", None), dict) and not _slots(type(value)):
        return False
    return isinstance(value, _NAMESPACES) or type(value).__module__.partition(".")[0] not in _FOREIGN


def attributes_of(held: Any) -> MutableMapping[str, Any]:
    """What an object or a module holds, by name; what is done to it is done to the object."""
    own = getattr(held, "__dict__", None)
    return own if isinstance(own, dict) else _Slots(held)


class _Slots(MutableMapping[str, Any]):
    """The attributes of an object that has ``__slots__`` and nothing else."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def __getitem__(self, name: str) -> Any:
        try:
            return getattr(self.held, name)
        except AttributeError:
            raise KeyError(name) from None

    def __setitem__(self, name: str, value: Any) -> None:
        object.__setattr__(self.held, name, value)  # frozen dataclasses, too

    def __delitem__(self, name: str) -> None:
        object.__delattr__(self.held, name)

    def __iter__(self) -> Iterator[str]:
        return (name for name in _slots(type(self.held)) if hasattr(self.held, name))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _slots(kind: type) -> tuple[str, ...]:
    """The names of the slots of a class."""
    found = (vars(one).get("__slots__", ()) for one in kind.__mro__)
    names = (name for own in found for name in ([own] if isinstance(own, str) else own))
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


def _attributes(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """What is bound to modules by a program, by path."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in _OF_MODULES and not isinstance(value, _LEAVES):
                yield f"{path}.{name}" if path else name, value
