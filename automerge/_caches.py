"""Caches of python functions (``functools.lru_cache``) that a model calls: what they hold was computed in another pass.

A table that comes out of a cache does not show what it was made from, and one that a pass puts there (in float64, or from
numbers that were not computed) would be found by the next. So they are emptied before a pass and after it.
"""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

_CACHED = type(functools.cache(len))
_LEAD_AWAY = (nn.Module, type, FunctionType, ModuleType)


def forget(model: nn.Module) -> None:
    """Empty what holds tensors of the caches of a model's methods, and of functions in the files where these are written."""
    files: set[str] = set()
    for kind in {base for module in model.modules() for base in type(module).__mro__}:
        if kind.__module__.partition(".")[0] in ("torch", "builtins", "abc", "typing"):
            continue
        files.add(kind.__module__)
        for held in list(vars(kind).values()):
            _empty(held)
    for name in files:
        for held in list(vars(sys.modules.get(name, nn)).values()):
            if not isinstance(held, type):
                _empty(held)


def _empty(held: Any) -> None:
    for function in _behind(held):
        if type(function) is _CACHED and function.cache_info().currsize and _tensors(function):
            function.cache_clear()


def _tensors(cached: Any) -> bool:
    """Whether a cache holds tensors; what else a program keeps (a configuration, its data) is not touched."""
    todo, levels = gc.get_referents(cached), 4  # the dictionary, a link of the list, a tuple, what is in it
    for _ in range(levels):
        if any(isinstance(held, torch.Tensor) for held in todo):
            return True
        todo = gc.get_referents(*(held for held in todo if not isinstance(held, _LEAD_AWAY)))
    return False


def _behind(held: Any) -> Iterator[Any]:
    """A function, and those that it wraps."""
    held = getattr(held, "__func__", held) if isinstance(held, (staticmethod, classmethod)) else held
    yield held
    if isinstance(held, property):
        yield held.fget
    if isinstance(held, FunctionType) and "__wrapped__" in vars(held):
        for cell in held.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # not set yet
                continue
