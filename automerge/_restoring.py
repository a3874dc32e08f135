"""A pass leaves no trace on a model: what it is lent for one, and what it binds to its modules undone."""

from __future__ import annotations

import copy
import operator
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

_CONTAINERS = (list, dict, set)
_PLAIN = (list, dict, set, OrderedDict)


Before = Sequence[tuple[str, nn.Module, dict[str, tuple[Any, Any]]]]


@contextmanager
def restored(model: nn.Module) -> Iterator[Before]:
    """What is bound to the modules inside is undone: counters, caches, states, hooks, buffers and parameters by their names.

    Tensors that are written to keep what was written. A lazy module that gets its parameters keeps them.
    """
    before = [
        (path, module, _attributes(module))
        for path, module in model.named_modules()
        if not isinstance(module, torch.jit.ScriptModule | LazyModuleMixin)
    ]
    try:
        yield before
    finally:
        for _, module, attributes in before:
            _put_back(module, attributes)


def replaced(before: Before) -> Iterator[tuple[str, Any]]:
    """Attributes and buffers that are others now, by path, with what they held; of dicts, the entries that are others."""
    for path, module, attributes in before:
        now = vars(module)
        for name, (value, held) in attributes.items():
            new = now.get(name)
            if isinstance(held, dict):
                other = new if isinstance(new, dict) else {}
                lost = {k: v for k, v in held.items() if other.get(k) is not v}
                for key, old in lost.items():
                    yield ".".join(filter(None, (path, str(key) if name == "_buffers" else name))), old
            elif new is not value or (held is not None and not _same(value, held)):
                yield f"{path}.{name}" if path else name, value if held is None else held


def lent(model: nn.Module, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A bound state dict with one name for every place of a tensor, and parameters where the model has parameters.

    ``functional_call`` lends the tensors to the model name by name and takes them back in the same order: a module that is
    registered under two names would keep what it was lent. A model may hand on a parameter as one.
    """
    out, seen = dict(state_dict), set()
    made: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for own, tensor in (*module._parameters.items(), *module._buffers.items()):
            name = f"{path}.{own}" if path else own
            if (id(module), own) in seen:
                out.pop(name, None)
            elif name in out and isinstance(tensor, nn.Parameter):
                value = out[name]
                out[name] = made.setdefault(id(value), nn.Parameter(value, requires_grad=False))
            seen.add((id(module), own))
    return out


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """A module's attributes, each with a copy if it is a container; one level deep, tensors are not copied."""
    return {k: (v, _copy(v) if isinstance(v, _CONTAINERS) else None) for k, v in vars(module).items()}


def _copy(value: Any) -> Any:
    if not value:
        return ()
    return value.copy() if type(value) in _PLAIN else copy.copy(value)


def _same(a: Any, b: Any) -> bool:
    """Whether two containers of a kind hold the very same things."""
    if len(a) != len(b):
        return False
    if not a:
        return True
    if isinstance(a, dict):
        return all(map(operator.is_, a, b)) and all(map(operator.is_, a.values(), b.values()))
    return a == b if isinstance(a, set) else all(map(operator.is_, a, b))


def _put_back(module: nn.Module, attributes: dict[str, tuple[Any, Any]]) -> None:
    now = vars(module)
    for name in set(now) - set(attributes):
        del now[name]
    for name, (value, held) in attributes.items():
        if now.get(name, attributes) is not value:
            now[name] = value
        if held is None or _same(value, held):  # some containers refuse to be written to
            continue
        if isinstance(value, list):
            value[:] = held
        else:
            value.clear()
            value.update(held)
