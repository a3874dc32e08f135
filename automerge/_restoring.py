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
from torch.utils._pytree import tree_leaves

from automerge._objects import attributes_of, held_objects, size_of

_CONTAINERS = (list, dict, set)
_PLAIN = (list, dict, set, OrderedDict)
_BARE = frozenset(vars(nn.Module())) - {"_buffers"}
_UNTOUCHED = (torch.jit.ScriptModule, LazyModuleMixin)


class _Kept:
    """What a module or an object holds: its attributes, and copies of containers; one level deep, tensors are not copied."""

    def __init__(self, path: str, owner: Any) -> None:
        self.path = path
        self.owner = owner
        self.attributes = dict(attributes_of(owner))
        containers = {k: v for k, v in self.attributes.items() if isinstance(v, _CONTAINERS)}
        self.copies = {k: v.copy() if type(v) in _PLAIN else copy.copy(v) for k, v in containers.items() if size_of(v)}
        self.empty: list[Any] = [v for v in containers.values() if not size_of(v)]


Before = Sequence[_Kept]


@contextmanager
def restored(model: nn.Module) -> Iterator[Before]:
    """What is bound to the modules inside is undone: counters, caches, states, hooks, buffers and parameters by their names.

    So is what is bound to objects that they hold. Tensors that are written to keep what was written. A lazy module that
    gets its parameters keeps them.
    """
    before = [_Kept(path, module) for path, module in model.named_modules() if not isinstance(module, _UNTOUCHED)]
    before += [_Kept(path, held) for path, held in held_objects(model)]
    try:
        yield before
    finally:
        for kept in before:
            _put_back(kept)


def replaced(before: Before) -> Iterator[tuple[str, Any]]:
    """Attributes and buffers that are others now, by path, with what they held; of dicts, the entries that are others."""
    for kept in before:
        now, path = attributes_of(kept.owner), kept.path
        changed = {} if _same(now, kept.attributes) else kept.attributes
        for name, value in changed.items():
            if name not in kept.copies and now.get(name) is not value:
                yield f"{path}.{name}" if path else name, value
        for name, held in kept.copies.items():
            new = now.get(name)
            if isinstance(held, dict):
                other = new if isinstance(new, dict) else {}
                lost = {k: v for k, v in held.items() if other.get(k) is not v}
                for key, old in lost.items():
                    yield ".".join(filter(None, (path, str(key) if name == "_buffers" else name))), old
            elif new is not kept.attributes[name] or not _same(new, held):
                yield f"{path}.{name}" if path else name, held


def kept_tensors(model: nn.Module) -> list[torch.Tensor]:
    """The buffers of all modules inside, and the tensors that a program binds to them or to objects; no parameters."""
    bound = [v for m in model.modules() for k, v in vars(m).items() if k not in _BARE]
    leaves = tree_leaves(bound + [list(attributes_of(held).values()) for _, held in held_objects(model)])
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


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


def _same(a: Any, b: Any) -> bool:
    """Whether two containers of a kind hold the very same things."""
    if len(a) != len(b):
        return False
    if isinstance(a, dict):
        return all(map(operator.is_, a, b)) and all(map(operator.is_, a.values(), b.values()))
    return a == b if isinstance(a, set) else all(map(operator.is_, a, b))


def _put_back(kept: _Kept) -> None:
    now = attributes_of(kept.owner)
    if not _same(now, kept.attributes):
        for name in set(now) - set(kept.attributes):
            del now[name]
        for name, value in kept.attributes.items():
            if now.get(name, kept) is not value:
                now[name] = value
    for filled in filter(None, kept.empty):
        filled.clear()
    for name, held in kept.copies.items():
        value = kept.attributes[name]
        if _same(value, held):  # some containers refuse to be written to
            continue
        if isinstance(value, list):
            value[:] = held
        else:
            value.clear()
            value.update(held)
