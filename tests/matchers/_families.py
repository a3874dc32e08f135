"""Networks and families of their weights, for tests of every matcher."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn

from automerge import infer
from automerge.groups import Element
from automerge.symmetry import Symmetry
from tests.inference.networks import CASES
from zoo.models import ZOO

State = dict[str, torch.Tensor]

SELECTED = (
    "linear_only",  # no group at all
    "mlp_layernorm",  # one group
    "mlp",
    "conv_bn",
    "grouped",
    "depthwise_multiplier",
    "Residual",
    "ConcatenateTwice",
    "TiedEmbedding",
    "GroupedQuerySdpa",
    "MultiheadAttention",
    "LstmLayers",
    "ExpertsBmm",
    "Mamba",
    "WreathDeep",
)
FROM_ZOO = ("resnet_layernorm", "vit", "densenet")
NETWORKS = (*SELECTED, *(f"zoo {name}" for name in FROM_ZOO))


@cache
def network(name: str) -> tuple[nn.Module, tuple[Any, ...], Symmetry]:
    """A network in float64 and evaluation mode, its inputs, and its symmetry."""
    torch.manual_seed(0)
    factory: Callable[[], nn.Module]
    if name.startswith("zoo "):
        factory, args = ZOO[name.removeprefix("zoo ")]
    else:
        factory, args, _ = CASES[name]
    model = factory().double().eval()
    inputs = tuple(a.double() if a.is_floating_point() else a for a in args)
    return model, inputs, infer(model, inputs, verify=False)


def batches(name: str, count: int = 6) -> list[tuple[torch.Tensor, ...]]:
    """Batches of random inputs for a network."""
    args = network(name)[1]
    generator = torch.Generator().manual_seed(7)

    def one(a: torch.Tensor) -> torch.Tensor:
        if a.is_floating_point():
            return torch.randn(a.shape, generator=generator, dtype=a.dtype)
        return torch.randint(0, int(a.max()) + 1, a.shape, generator=generator)

    return [tuple(one(a) for a in args) for _ in range(count)]


def weights(model: nn.Module, symmetry: Symmetry, seed: int, dtype: torch.dtype = torch.float64) -> State:
    """Continuous random weights, of the size that keeps activations near one; running variances are positive."""
    generator = torch.Generator().manual_seed(seed)
    state = {n: t.detach().clone() for n, t in model.state_dict().items()}
    for name, value in state.items():
        if value.is_floating_point():
            draw = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            scale = max(1, value[0].numel() if value.ndim > 1 else 1) ** -0.5
            state[name] = (draw.abs() + 0.5 if "var" in name else draw * scale).to(dtype)
    return state | {alias: state[name] for alias, name in symmetry.aliases.items()}


def family(
    name: str, count: int, seed: int = 0, noise: float = 0.02, dtype: torch.dtype = torch.float64
) -> tuple[list[State], list[Element]]:
    """Noisy copies of one random network, each moved by a random group element, and those elements."""
    model, _, symmetry = network(name)
    base = weights(model, symmetry, seed)
    rng = np.random.default_rng(seed)
    elements = [symmetry.random_element(rng) for _ in range(count)]
    out = []
    for m, element in enumerate(elements):
        other = weights(model, symmetry, seed + 1000 + m)
        near = {n: v + noise * (other[n] - v) if v.is_floating_point() else v for n, v in base.items()}
        near |= {alias: near[key] for alias, key in symmetry.aliases.items()}
        moved = symmetry.apply(near, element)
        out.append({n: v.to(dtype) if v.is_floating_point() else v for n, v in moved.items()})
    return out, elements


def pairs(count: int) -> list[tuple[int, int]]:
    """All ordered pairs of models."""
    return list(itertools.permutations(range(count), 2))
