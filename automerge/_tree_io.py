"""Nested inputs and outputs: lists, tuples, dicts, dataclasses and anything torch's pytree knows."""

from __future__ import annotations

import copy
import dataclasses
from collections import deque
from collections.abc import Callable, ItemsView, Iterator, Mapping, ValuesView
from typing import Any

import torch
from torch.utils import _pytree as pytree

from automerge._errors import TraceError

_LEAVES = frozenset({type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout})


SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


def stored(tensor: torch.Tensor) -> torch.Tensor:
    """The numbers that a tensor holds; of a sparse one those that are not left out."""
    if tensor.layout is torch.sparse_coo:
        return tensor._values()
    return tensor.values() if tensor.layout in SPARSE else tensor


def map_tensors(fn: Callable[[str, torch.Tensor], Any], tree: Any, path: str = "") -> Any:
    """Rebuild ``tree`` with ``fn(path, tensor)`` in place of every tensor; other leaves stay.

    Any other object that is none of PyTorch's own (a cache, which a model writes to) is copied, with its tensors replaced.
    """
    if isinstance(tree, torch.Tensor):
        return fn(path, tree)
    if type(tree) in _LEAVES:
        return tree
    if isinstance(tree, (list, tuple)):
        if hasattr(tree, "_fields"):
            kind: Any = type(tree)  # a packed sequence refuses to be made of other things than tensors, but for _make
            return kind._make(map_tensors(fn, v, f"{path}.{k}") for k, v in zip(tree._fields, tree, strict=True))
        mapped = [v if type(v) in _LEAVES else map_tensors(fn, v, f"{path}[{i}]") for i, v in enumerate(tree)]
        return mapped if type(tree) is list else type(tree)(mapped)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        values = {
            f.name: map_tensors(fn, getattr(tree, f.name), f"{path}.{f.name}")
            for f in dataclasses.fields(tree)
            if f.init
        }
        return dataclasses.replace(tree, **values)
    if isinstance(tree, Mapping):
        items = {k: map_tensors(fn, v, f"{path}[{k!r}]") for k, v in tree.items()}
        return items if type(tree) is dict else _rebuild_mapping(tree, items)
    return tree if type(tree).__module__.partition(".")[0] in ("builtins", "torch") else _copied(fn, tree, path)


def _copied(fn: Callable[[str, torch.Tensor], Any], tree: Any, path: str) -> Any:
    """A copy of an object with other tensors; the object itself where it refuses to be copied, or is a module."""
    if isinstance(tree, torch.nn.Module | type):
        return tree
    found = list({id(t): t for t in tensors_of(tree)}.values())
    new = [fn(f"{path}[{i}]", t) for i, t in enumerate(found)]
    try:
        return copy.deepcopy(tree, {id(t): n.clone() if n is t else n for t, n in zip(found, new, strict=True)})
    except Exception:
        return tree


def _rebuild_mapping(tree: Any, items: dict[Any, Any]) -> Any:
    try:
        return type(tree)(**items) if all(isinstance(k, str) for k in items) else type(tree)(items)
    except TypeError:
        return items


def tensors_of(tree: Any) -> list[torch.Tensor]:
    """Every tensor in a nested structure, depth first; opaque objects are searched through pytree, then attributes."""
    found: list[torch.Tensor] = []
    _collect(tree, found, set())
    return found


def _collect(tree: Any, found: list[torch.Tensor], seen: set[int]) -> None:
    if isinstance(tree, torch.Tensor):
        found.append(tree)
        return
    if tree is None or isinstance(
        tree, bool | int | float | complex | str | bytes | torch.dtype | torch.device | torch.Size
    ):
        return
    if id(tree) in seen:
        return
    seen.add(id(tree))
    if isinstance(tree, Mapping):
        children: Any = list(tree.values())
    elif isinstance(tree, list | tuple | set | frozenset | deque | ValuesView | ItemsView):
        children = list(tree)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        children = [getattr(tree, f.name, None) for f in dataclasses.fields(tree)]
    else:
        leaves = pytree.tree_leaves(tree)
        children = _attributes(tree) if len(leaves) == 1 and leaves[0] is tree else leaves
    for child in children:
        _collect(child, found, seen)


def _attributes(held: Any) -> list[Any]:
    """What an object holds, in ``__slots__`` too; nothing of modules and classes."""
    if isinstance(held, torch.nn.Module | type):
        return []
    slots = (getattr(one, "__slots__", ()) for one in type(held).__mro__)
    names = [name for own in slots for name in ([own] if isinstance(own, str) else own)]
    return [*getattr(held, "__dict__", {}).values(), *(getattr(held, name, None) for name in names)]


def checked_outputs(result: Any) -> list[torch.Tensor]:
    """The tensors that a model returns.

    Raises:
        TraceError: if there are none, all are empty, or some are made after the pass.
    """
    outputs = tensors_of(result)
    if any(isinstance(leaf, Iterator) for leaf in pytree.tree_leaves(result)):
        raise TraceError(
            "the model returns an iterator, whose values are made after the pass; give a model that returns a list of them"
        )
    if not outputs:
        raise TraceError("the model returned no tensor; automerge needs an output that it can compare")
    if not any(t.numel() for t in outputs):
        raise TraceError(
            f"every output on the example inputs is empty ({', '.join(str(tuple(t.shape)) for t in outputs[:3])}), so "
            "nothing shows how the model works; give inputs with at least one row"
        )
    return outputs
