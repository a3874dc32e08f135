"""Entries of state dicts that are no tensors: what ``get_extra_state`` gives, and what a module's own ``state_dict`` adds.

Versions, settings and counters are carried by the modules and are no part of what is merged. An entry that may hold weights
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


def without_extras(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict without the entries that are no tensors and hold none."""
    return {n: v for n, v in state_dict.items() if isinstance(v, torch.Tensor) or not is_extra(v)}


def extras(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a state dict that are no tensors and hold none."""
    return {n: v for n, v in state_dict.items() if not isinstance(v, torch.Tensor) and is_extra(v)}


def weights_of(module: nn.Module, *, keep_vars: bool = False) -> dict[str, Any]:
    """The tensors of a module's state dict."""
    return without_extras(module.state_dict(keep_vars=keep_vars))


def load_weights(module: nn.Module, weights: Mapping[str, Any], *, assign: bool = False) -> None:
    """``load_state_dict`` of the tensors of a state dict; what else the module's own holds stays as it is."""
    module.load_state_dict({**extras(module.state_dict()), **weights}, assign=assign)


def same(a: Any, b: Any) -> bool:
    """Whether two such entries are equal, as far as can be told."""
    try:
        return bool(a == b) or repr(a) == repr(b)
    except Exception:  # a class whose comparison fails
        return a is b
