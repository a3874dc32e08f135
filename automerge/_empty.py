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
    memo: dict[int, torch.Tensor] = {}
    for name, own in network.state_dict(keep_vars=True).items():
        if isinstance(own, torch.Tensor) and id(own) not in memo:
            value = weights[name].detach()
            value = value if value.dtype == own.dtype else store.keep(value.to(own.dtype))
            memo[id(own)] = nn.Parameter(value, own.requires_grad) if isinstance(own, nn.Parameter) else value
    out = deepcopy(network, memo)
    for path, module in out.named_modules():
        attributes = {name: held for name, held in vars(module).items() if name not in ("_parameters", "_buffers")}
        for name, held in {**attributes, **module._parameters, **module._buffers}.items():
            if any(isinstance(t, torch.Tensor) and t.is_meta for t in tree_leaves(held)):
                full = f"{path}.{name}" if path else name
                raise CheckpointError(
                    f"the architecture's {full} is on the meta device, and the checkpoints do not hold it; build the "
                    "architecture on the CPU"
                )
    return out
