"""Architectures without values, and modules that take weights over where they are."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from automerge._errors import CheckpointError
from automerge._offload import Store


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
    memo: dict[int, torch.Tensor] = {}
    for name, own in network.state_dict(keep_vars=True).items():
        if isinstance(own, torch.Tensor) and id(own) not in memo:
            value = weights[name].detach()
            value = value if value.dtype == own.dtype else store.keep(value.to(own.dtype))
            memo[id(own)] = nn.Parameter(value, own.requires_grad) if isinstance(own, nn.Parameter) else value
    return deepcopy(network, memo)
