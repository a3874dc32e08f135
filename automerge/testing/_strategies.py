"""Hypothesis strategies: networks with known symmetry, group elements, families of checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

from automerge.groups import Element
from automerge.infer import infer
from automerge.symmetry import Symmetry
from automerge.testing._networks import KINDS, Network, build


def networks(kinds: Sequence[str] = KINDS, max_blocks: int = 4) -> st.SearchStrategy[Network]:
    """Random small networks over the whole algebra, with their symmetry known by construction.

    Width, depth, residual additions, concatenations, splits and slices, normalisations (batch, instance, layer, RMS,
    group), biases, modules called twice, grouped and depthwise convolutions, attention (also grouped-query), gated
    layers, mixtures of experts, flattening, tied weights, weight normalisation, pixel shuffles, constant reorderings.

    Args:
        kinds: what the input may be: ``"vector"``, ``"tokens"``, ``"image"``.
        max_blocks: the largest number of blocks before the head.

    Examples:
        >>> from hypothesis import given, settings
        >>> @settings(max_examples=2, database=None, deadline=None)
        ... @given(networks(kinds=["vector"], max_blocks=2))
        ... def test(network):
        ...     assert network.model(*network.args).ndim == 2 or network.sizes is not None
        >>> test()
    """

    @st.composite
    def draw_network(draw: Any) -> Network:
        def pick(options: Sequence[Any]) -> Any:
            return options[draw(st.integers(0, len(options) - 1))]

        return build(pick, tuple(kinds), max_blocks)

    return draw_network()


def elements(symmetry: Symmetry) -> st.SearchStrategy[Element]:
    """Random group elements; they shrink to the identity.

    Args:
        symmetry: whose group.

    Examples:
        >>> import torch, automerge
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> from hypothesis import find
        >>> find(elements(automerge.infer(net, torch.ones(1, 2))), lambda e: True).is_identity()
        True
    """
    return st.tuples(*(st.permutations(range(g.size)) for g in symmetry.generators())).map(symmetry.element)


@dataclass(frozen=True, eq=False)
class Checkpoints:
    """A family of state dicts that differ by known group elements and noise.

    Attributes:
        state_dicts: the family; all entries of the model's state dict.
        elements: ``state_dicts[i]`` is the first one's original moved by ``elements[i]``, plus noise.
        symmetry: the group.
        noise: the standard deviation of the noise, relative to each tensor's.
    """

    state_dicts: tuple[dict[str, torch.Tensor], ...]
    elements: tuple[Element, ...]
    symmetry: Symmetry
    noise: float

    def __len__(self) -> int:
        return len(self.state_dicts)


@st.composite
def checkpoints(
    draw: Any,
    model: nn.Module | Network,
    n: int = 3,
    *,
    symmetry: Symmetry | None = None,
    args: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    noise: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> Checkpoints:
    """Families of checkpoints of one model: random weights, moved by random group elements, plus noise.

    Args:
        draw: given by hypothesis.
        model: a module, or a `Network`.
        n: how many.
        symmetry: its group; inferred from ``args`` if not given.
        args: example inputs, to infer the symmetry.
        kwargs: keyword inputs.
        noise: standard deviation relative to each tensor's own.
        dtype: of the float tensors.

    Examples:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> from hypothesis import find
        >>> len(find(checkpoints(net, 4, args=torch.ones(1, 2)), lambda family: True))
        4
    """
    if isinstance(model, Network):
        symmetry, model = symmetry or model.symmetry, model.model
    group = symmetry if symmetry is not None else infer(model, args, kwargs, verify=False)
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    base: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        if not value.is_floating_point():
            base[name] = value.clone()
        elif name in group.aliases:
            base[name] = base[group.aliases[name]]
        else:
            noisy = torch.randn(value.shape, generator=rng, dtype=torch.float64)
            base[name] = (noisy.abs() + 0.1 if name in group.statistics else noisy).to(dtype)
    moves = tuple(draw(elements(group)) for _ in range(n))
    return Checkpoints(tuple(_noisy(group.apply(base, e), noise, rng) for e in moves), moves, group, noise)


def _noisy(state: dict[str, torch.Tensor], noise: float, rng: torch.Generator) -> dict[str, torch.Tensor]:
    if not noise:
        return state
    out = {}
    for name, value in state.items():
        if value.is_floating_point() and value.numel() > 1:
            shake = torch.randn(value.shape, generator=rng, dtype=torch.float64).to(value.dtype)
            value = value + noise * value.std() * shake
        out[name] = value
    return out
