"""Copies of an architecture with the weights of a checkpoint; what shares memory in the one shares it in the other."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from automerge._aliases import memory_of, overlaps
from automerge._errors import CheckpointError
from automerge._offload import Store
from automerge.io import tied_names


def is_empty(network: nn.Module) -> bool:
    """Whether a parameter or buffer is on the meta device."""
    return any(t.is_meta for t in (*network.parameters(), *network.buffers()))


def lacking(network: nn.Module) -> str | None:
    """The name of a tensor without values that a state dict of the module does not hold; None if there is none."""
    held = {id(t) for t in network.state_dict(keep_vars=True).values()}
    for path, module in network.named_modules():
        attributes = {name: value for name, value in vars(module).items() if name not in ("_parameters", "_buffers")}
        for name, value in {**attributes, **module._parameters, **module._buffers}.items():
            if any(isinstance(t, torch.Tensor) and t.is_meta and id(t) not in held for t in tree_leaves(value)):
                return f"{path}.{name}" if path else name
    return None


def copied(network: nn.Module) -> nn.Module:
    """A copy of a module, with what it keeps of earlier passes by value."""
    return deepcopy(network, of_passes(network))


def of_passes(network: nn.Module) -> dict[Any, Any]:
    """Copies of what a module keeps of earlier passes, which ``deepcopy`` refuses, by identity.

    The weight of an older weight norm; what a pass with gradients left in a cache.
    """
    kept = (v for m in network.modules() for v in tree_leaves(vars(m)) if isinstance(v, torch.Tensor) and not v.is_leaf)
    return {id(t): t.detach().clone() for t in kept}


def loaded(network: nn.Module, weights: Mapping[str, torch.Tensor]) -> nn.Module:
    """A copy of a module with some weights, copied.

    ``deepcopy`` gives every parameter memory of its own, so that parameters over one memory (``nn.Parameter(w.t())``) would
    be independent in the copy, and so would their groups.
    """
    memo = of_passes(network)
    held: dict[Any, dict[int, torch.Tensor]] = {}
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.layout is torch.strided and tensor.numel():
            held.setdefault(memory_of(tensor), {})[id(tensor)] = tensor
    for together in (t for t in held.values() if len(t) > 1):
        for key, tensor in together.items():
            if type(tensor) is nn.Parameter:
                memo[key] = nn.Parameter(deepcopy(tensor.data, memo), tensor.requires_grad)
    own = deepcopy(network, memo)
    own.load_state_dict(dict(weights))
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
    state = network.state_dict()
    ties = tied_names(state)
    if shared := next(overlaps((n, t) for n, t in state.items() if n not in ties), None):
        if is_empty(network):
            raise CheckpointError(
                f"the architecture's {shared[0]} and {shared[1]} share memory in several shapes; build the architecture on "
                "the CPU"
            )
        return loaded(network, weights)
    memo = of_passes(network)
    for name, own in network.state_dict(keep_vars=True).items():
        if isinstance(own, torch.Tensor) and id(own) not in memo:
            value = weights[ties.get(name, name)].detach()
            value = value if value.dtype == own.dtype else store.keep(value.to(own.dtype))
            memo[id(own)] = nn.Parameter(value, own.requires_grad) if isinstance(own, nn.Parameter) else value
    return deepcopy(network, memo)
