"""Copies of an architecture with the weights of a checkpoint; what shares memory in the one shares it in the other."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from copy import deepcopy
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from automerge._aliases import memory_of, overlaps
from automerge._errors import AutomergeError, CheckpointError
from automerge._extra_state import held_tensors, load_weights, weights_of
from automerge._gradients import as_original
from automerge._objects import attributes_of, held_objects
from automerge._offload import Store
from automerge._uncopyable import uncopyable
from automerge.io import tied_names

_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


def is_empty(network: nn.Module) -> bool:
    """Whether a parameter or buffer is on the meta device."""
    return any(t.is_meta for t in (*network.parameters(), *network.buffers()))


def lacking(network: nn.Module) -> str | None:
    """The name of a tensor without values that a state dict of the module does not hold; None if there is none."""
    held = {id(t) for t in held_tensors(network).values()}
    for path, module in network.named_modules():
        attributes = {name: value for name, value in vars(module).items() if name not in ("_parameters", "_buffers")}
        for name, value in {**attributes, **module._parameters, **module._buffers}.items():
            if any(isinstance(t, torch.Tensor) and t.is_meta and id(t) not in held for t in tree_leaves(value)):
                return f"{path}.{name}" if path else name
    return None


def copied(network: nn.Module) -> nn.Module:
    """A copy of a module, with what it keeps of earlier passes by value.

    ``deepcopy`` gives every parameter memory of its own, so that parameters over one memory (``nn.Parameter(w.t())``) would
    be independent in the copy, and so would their groups.
    """
    memo = of_passes(network)
    held: dict[Any, dict[int, torch.Tensor]] = {}
    for tensor in (*network.parameters(), *network.buffers()):
        if _has_place(tensor):
            held.setdefault(memory_of(tensor), {})[id(tensor)] = tensor
    for together in (t for t in held.values() if len(t) > 1):
        for key, tensor in together.items():
            if type(tensor) is nn.Parameter:
                memo[key] = nn.Parameter(deepcopy(tensor.data, memo), tensor.requires_grad)
    return duplicate(network, memo)


def _has_place(tensor: torch.Tensor) -> bool:
    """Whether it is a tensor over memory that another may be over as well."""
    plain = tensor.layout is torch.strided and not is_traceable_wrapper_subclass(tensor) and not is_lazy(tensor)
    return plain and tensor.numel() > 0


def duplicate(network: nn.Module, memo: dict[Any, Any]) -> nn.Module:
    """``deepcopy``; functions that the module holds (lambdas on self, hooks) read the copy where they read the module.

    Args:
        network: the module.
        memo: what stands for what in the copy, by identity.

    Raises:
        AutomergeError: if it cannot be copied.
    """
    known = dict(memo)
    try:
        own = deepcopy(network, memo)
    except Exception:  # python modules, locks, open files, ...: a copy uses the same
        memo.clear()
        memo.update(known | {key: value for key, value in uncopyable(network).items() if key not in known})
        try:
            own = deepcopy(network, memo)
        except Exception as error:
            raise AutomergeError(
                f"{type(network).__name__} cannot be copied (copy.deepcopy: {type(error).__name__}: {error}), and copies of it "
                "are run; take what cannot be copied out of it, or mend its __deepcopy__"
            ) from error
    closures = _Closures(memo)
    for module in own.modules():
        closures.within(vars(module))
    as_original(own, network)
    return own


class _Closures:
    """Rebuilds functions over the cells and defaults of a copy; ``deepcopy`` takes functions as they are."""

    def __init__(self, memo: Mapping[Any, Any]) -> None:
        self.memo = memo
        self.made: dict[int, Any] = {}
        self.seen: set[int] = set()

    def within(self, held: Any) -> None:
        """Replace what a dict or list of the copy holds."""
        if id(held) in self.seen:
            return
        self.seen.add(id(held))
        for key, value in list(held.items() if isinstance(held, dict) else enumerate(held)):
            if type(value) in (dict, list, OrderedDict):
                self.within(value)
            elif (new := self.of(value)) is not value:
                held[key] = new

    def of(self, value: Any) -> Any:
        """What stands for a value in the copy."""
        if isinstance(value, nn.Module | torch.Tensor):
            return self.memo.get(id(value), value)
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, MethodType):
            own = self.of(value.__self__)
            return value if own is value.__self__ else MethodType(value.__func__, own)
        if isinstance(value, partial):
            func, args, keywords = self.of(value.func), self.of(value.args), self.of(value.keywords)
            same = func is value.func and args is value.args and keywords is value.keywords
            return value if same else partial(func, *args, **keywords)
        if type(value) is dict:
            items = {k: self.of(v) for k, v in value.items()}
            return value if all(v is value[k] for k, v in items.items()) else items
        if type(value) in (list, tuple):
            found = [self.of(v) for v in value]
            return value if all(a is b for a, b in zip(found, value, strict=True)) else type(value)(found)
        return value

    def _function(self, value: FunctionType) -> FunctionType:
        if id(value) in self.made or not (value.__closure__ or value.__defaults__ or value.__kwdefaults__):
            return self.made.get(id(value), value)
        cells = tuple(CellType() for _ in value.__closure__ or ())
        new = FunctionType(
            value.__code__, value.__globals__, value.__name__, self.of(value.__defaults__), cells or None
        )
        keywords = self.of(value.__kwdefaults__)
        new.__kwdefaults__ = keywords
        new.__dict__.update(value.__dict__)
        self.made[id(value)] = new
        changed = new.__defaults__ is not value.__defaults__ or keywords is not value.__kwdefaults__
        for cell, own in zip(value.__closure__ or (), cells, strict=True):
            with suppress(ValueError):  # a cell that is still empty
                own.cell_contents = self.of(cell.cell_contents)
                changed = changed or own.cell_contents is not cell.cell_contents
        if not changed:
            self.made[id(value)] = value
        return self.made[id(value)]


def of_passes(network: nn.Module) -> dict[Any, Any]:
    """Copies of what a module keeps of earlier passes, which ``deepcopy`` refuses, by identity.

    The weight of an older weight norm; what a pass with gradients left in a cache; and sparse rows, which it never copies.
    """
    owners = (*network.modules(), *(held for _, held in held_objects(network)))
    kept = (
        v
        for one in owners
        for v in tree_leaves(dict(attributes_of(one)))
        if isinstance(v, torch.Tensor) and (not v.is_leaf or v.layout in _COMPRESSED)
    )
    return {id(t): t.detach().clone() for t in kept}


def loaded(network: nn.Module, weights: Mapping[str, torch.Tensor]) -> nn.Module:
    """A copy of a module with some weights, copied."""
    own = copied(network)
    load_weights(own, weights)
    return own


def carrying(network: nn.Module, weights: Mapping[str, torch.Tensor], store: Store) -> nn.Module:
    """A copy of a module whose parameters and buffers are the given tensors, not copies of them.

    Those of another type than the module's are converted. What the module ties stays tied.

    Args:
        network: the module; its own values do not matter where there are weights.
        weights: its state dict.
        store: where converted tensors are held.

    Raises:
        CheckpointError: if a tensor of the module has no values, and the weights have none for it.
    """
    if name := lacking(network):
        raise CheckpointError(
            f"the architecture's {name} is on the meta device, and the checkpoints do not hold it; build the architecture on "
            "the CPU"
        )
    state = weights_of(network)
    ties = tied_names(state)
    if shared := next(overlaps((n, t) for n, t in state.items() if n not in ties), None):
        if is_empty(network):
            raise CheckpointError(
                f"the architecture's {shared[0]} and {shared[1]} share memory in several shapes; build the architecture on "
                "the CPU"
            )
        return loaded(network, weights)
    memo = of_passes(network)
    for name, own in held_tensors(network).items():
        if id(own) not in memo:
            value = weights[ties.get(name, name)].detach()
            value = value if value.dtype == own.dtype else store.keep(value.to(own.dtype))
            memo[id(own)] = nn.Parameter(value, own.requires_grad) if isinstance(own, nn.Parameter) else value
    return duplicate(network, memo)
