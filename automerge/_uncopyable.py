"""What ``deepcopy`` refuses, among all that a module holds."""

from __future__ import annotations

import contextvars
import copy
import io
import queue
import threading
import types
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from automerge._objects import entries_of

_SHARED: tuple[type, ...] = (  # nothing of a network is in these; a copy may use the very same ones
    *(types.ModuleType, staticmethod, classmethod, io.IOBase, types.GeneratorType, memoryview, types.MappingProxyType),
    *(contextvars.ContextVar, threading.local, queue.SimpleQueue, type(threading.Lock()), type(threading.RLock())),
    *(type({}.keys()), type({}.values()), type({}.items())),
)


def uncopyable(held: Any) -> dict[Any, Any]:
    """What stands in a copy for the things reachable from an object that ``deepcopy`` refuses, by identity.

    Python modules, locks, open files, objects that cannot be copied and the like stand for themselves, unless a network is
    seen in them; tensors that a pass with gradients left for their values.
    """
    out: dict[Any, Any] = {}
    for one in _reachable(held):
        if isinstance(one, torch.Tensor):
            if not one.is_leaf:
                out[id(one)] = one.detach().clone()
        elif _shared(one):
            if not _holds_network(_inside(one)):
                out[id(one)] = one
        elif _refuses(one) and not _holds_network(one):
            out[id(one)] = one
    return out


def _shared(one: Any) -> bool:
    return isinstance(one, _SHARED) or (isinstance(one, RemovableHandle) and one.hooks_dict_ref() is None)


def _holds_network(held: Any) -> bool:
    return any(isinstance(n, torch.Tensor | nn.Module) for n in _reachable(held))


def _refuses(one: Any) -> bool:
    """Whether an object of a program's own cannot be copied, though all that it holds may stay as it is."""
    if isinstance(one, nn.Module) or type(one).__module__ == "builtins":
        return False
    try:
        copy.deepcopy(one, {id(part): part for part in _within(one)})
    except Exception:
        return True
    return False


def _inside(one: Any) -> list[Any]:
    """What something shared would give a copy to read, as far as it can be seen."""
    if isinstance(one, types.MappingProxyType):
        return list(one.values())
    if isinstance(one, type({}.values()) | type({}.items())):
        return list(one)
    if isinstance(one, types.GeneratorType):
        return list(one.gi_frame.f_locals.values()) if one.gi_frame is not None else []
    if isinstance(one, staticmethod | classmethod):
        return [c.cell_contents for c in getattr(one.__func__, "__closure__", None) or () if c != types.CellType()]
    return []


def _reachable(held: Any) -> Iterator[Any]:
    """An object and everything that it holds."""
    seen: dict[int, Any] = {}
    todo = [held]
    while todo:
        one = todo.pop()
        if id(one) in seen or isinstance(one, type | types.FunctionType):
            continue
        seen[id(one)] = one  # kept, so that no other gets its identity
        yield one
        if not isinstance(one, (torch.Tensor, *_SHARED)):
            todo += _within(one)


def _within(one: Any) -> Iterable[Any]:
    entries = entries_of(one)
    if entries is not None:
        return entries
    return [*getattr(one, "__dict__", {}).values(), *(getattr(one, name, None) for name in _slots(type(one)))]


def _slots(kind: type) -> Iterator[str]:
    for base in kind.__mro__:
        names = base.__dict__.get("__slots__", ())
        yield from [names] if isinstance(names, str) else names
