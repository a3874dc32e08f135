"""Hypothesis strategies: networks with known symmetry, group elements, families of checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

from automerge._errors import AutomergeError
from automerge._extra_state import weights_of
from automerge.groups import Element
from automerge.infer import infer
from automerge.symmetry import Symmetry
from automerge.testing._networks import KINDS, Network, build, checked_kinds


def networks(kinds: Sequence[str] = KINDS, max_blocks: int = 4) -> st.SearchStrategy[Network]:
    """Random small networks over the whole algebra, with their symmetry known by construction.

    Width, depth, residual additions, concatenations, splits and slices, normalisations (batch, instance, layer, RMS,
    group), biases, modules called twice, grouped and depthwise convolutions, attention (also grouped-query), gated
    layers, mixtures of experts, flattening, tied weights, weight normalisation, pixel shuffles, constant reorderings.
    A network that fails a test can be built again without hypothesis: the last line of its repr is a call of `rebuild`.

    Args:
        kinds: what the input may be: ``"vector"``, ``"tokens"``, ``"image"``.
        max_blocks: the largest number of blocks before the head, at least one.

    Raises:
        AutomergeError: for other kinds, or no block.

    Examples:
        >>> from hypothesis import given, settings
        >>> @settings(max_examples=2, database=None, deadline=None)
        ... @given(networks(kinds=["vector"], max_blocks=2))
        ... def test(network):
        ...     assert network.model(*network.args).ndim == 2 or network.sizes is not None
        >>> test()
    """
    wanted = checked_kinds(kinds, max_blocks)

    @st.composite
    def draw_network(draw: Any) -> Network:
        def pick(options: Sequence[Any]) -> Any:
            return options[draw(st.integers(0, len(options) - 1))]

        return build(pick, wanted, max_blocks)

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
    if not isinstance(symmetry, Symmetry):
        raise AutomergeError(f"expected a Symmetry, as infer gives it, got a {type(symmetry).__name__}")
    units, modules = (
        st.tuples(*(st.permutations(range(g.size)) for g in groups))
        for groups in (symmetry.generators(), symmetry.exchanges)
    )
    return st.builds(symmetry.element, units, modules)


@dataclass(frozen=True, eq=False, repr=False)
class Checkpoints:
    """A family of state dicts that differ by known group elements and noise.

    Attributes:
        state_dicts: the family; all entries of the model's state dict.
        elements: ``state_dicts[i]`` is the first one's original moved by ``elements[i]``, plus noise.
        symmetry: the group.
        noise: the standard deviation of the noise, relative to each tensor's.
        seed: of the weights and the noise.
    """

    state_dicts: tuple[dict[str, torch.Tensor], ...]
    elements: tuple[Element, ...]
    symmetry: Symmetry
    noise: float
    seed: int = 0

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What hypothesis prints of a failing example."""
        printer.text(repr(self))

    def __repr__(self) -> str:
        moves = ", ".join(map(repr, self.elements))
        return f"Checkpoints(n={len(self)}, seed={self.seed}, noise={self.noise:g}, elements=({moves}))"

    def __len__(self) -> int:
        return len(self.state_dicts)


def checkpoints(
    model: nn.Module | Network,
    n: int = 3,
    *,
    symmetry: Symmetry | None = None,
    args: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    noise: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> st.SearchStrategy[Checkpoints]:
    """Families of checkpoints of one model: random weights, moved by random group elements, plus noise.

    Args:
        model: a module, or a `Network`.
        n: how many, at least one.
        symmetry: its group; inferred from ``args`` if not given, once.
        args: example inputs, to infer the symmetry.
        kwargs: keyword inputs.
        noise: standard deviation relative to each tensor's own.
        dtype: of the float tensors.

    Raises:
        AutomergeError: for unsuitable arguments; if neither ``symmetry`` nor inputs are given.

    Examples:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> from hypothesis import find
        >>> len(find(checkpoints(net, 4, args=torch.ones(1, 2)), lambda family: True))
        4
    """
    if isinstance(model, Network):
        symmetry, model = symmetry or model.symmetry, model.model
    if not isinstance(model, nn.Module):
        raise AutomergeError(f"checkpoints of a module or a Network, got a {type(model).__name__}")
    if symmetry is None and args is None and not kwargs:
        raise AutomergeError(
            "checkpoints needs the model's symmetry: give symmetry=, or example inputs by args= and kwargs="
        )
    if n < 1 or not 0 <= noise < math.inf or not dtype.is_floating_point:
        raise AutomergeError(
            f"checkpoints(n={n}, noise={noise}, dtype={dtype}): expected n of at least 1, finite noise of at least 0, and a "
            "float dtype"
        )
    own = weights_of(model)
    inputs = () if args is None else args
    group = cache(lambda: infer(model, inputs, kwargs, verify=False) if symmetry is None else symmetry)

    @st.composite
    def draw_family(draw: Any) -> Checkpoints:
        seed = draw(st.integers(0, 2**31 - 1))
        rng = torch.Generator().manual_seed(seed)
        base = _weights(own, group(), dtype, rng)
        moves = tuple(draw(elements(group())) for _ in range(n))
        family = tuple(_noisy(group().apply(base, e), noise, rng) for e in moves)
        return Checkpoints(family, moves, group(), noise, seed)

    return draw_family()


def _weights(
    own: Mapping[str, torch.Tensor], group: Symmetry, dtype: torch.dtype, rng: torch.Generator
) -> dict[str, torch.Tensor]:
    """Random weights in the place of a model's."""
    base: dict[str, torch.Tensor] = {}
    for name, value in own.items():
        if not value.is_floating_point():
            base[name] = value.clone()
        elif name in group.aliases:
            base[name] = base[group.aliases[name]]
        else:
            noisy = torch.randn(value.shape, generator=rng, dtype=torch.float64)
            base[name] = (noisy.abs() + 0.1 if name in group.statistics else noisy).to(dtype)
    return base


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
