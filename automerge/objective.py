"""The universe objective on blocks, in O(N).

With X_m model m's blocks moved to the universe and T their sum,
``f = sum_{l<m} <X_l, X_m> = (|T|^2 - sum_m |X_m|^2) / 2`` and ``df/dX_m = T - X_m`` (C2M3, arXiv 2405.17897, Alg. 1,
rewritten). Blocks that nothing moves add a constant and are left out, and so are normalisation statistics.

Blocks with the same spaces are laid side by side in a `Bundle`, of shape ``(N, n1, pinned)`` or
``(N, n1, pinned, n2, ...)``: the first and the last axis move, so that both gradient contractions are plain matrix
products without a copy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from automerge._errors import MatchingError
from automerge._offload import MEMORY, Store
from automerge._ranks import ALONE, Ranks
from automerge._tensors import add_up, dot, gather
from automerge.blocks import Block, Blocks
from automerge.io import tied_names

Sigmas = Sequence[torch.Tensor]
BlockWeights = str | Mapping[str, float]
"""How much the blocks of every parameter count: "uniform", "normalised", or a number by the parameter's name."""


@dataclass(frozen=True, eq=False)
class Bundle:
    """Blocks with the same spaces, of all models.

    Attributes:
        spaces: the space of each moving axis.
        dims: where those axes stand in ``weights``.
        weights: ``(N, n1, pinned, n2, ...)``.
    """

    spaces: tuple[int, ...]
    dims: tuple[int, ...]
    weights: torch.Tensor

    @property
    def full(self) -> int:
        """The bit set of all moving axes."""
        return (1 << len(self.spaces)) - 1

    def along(self, space: int) -> tuple[int, ...]:
        """The axes of ``weights`` on which a space acts."""
        return tuple(d for s, d in zip(self.spaces, self.dims, strict=True) if s == space)


class Objective:
    """The objective of N models, and what depends only on them.

    Args:
        blocks: the decomposition.
        models: N state dicts, all with the parameters that the blocks name. The work is done where the first one's first
            block is.
        dtype: in which the blocks are held.
        block_weights: "uniform"; "normalised", which divides every block by its mean squared norm; or a number that is not
            negative by the name of a parameter, by which the inner products of its blocks are multiplied (one for the rest).
        ranks: the processes that hold the other models; this one has only its own (`Ranks.shares`).
        store: where the blocks, and what matchers make of them, are held.

    Attributes:
        blocks: the decomposition.
        count: the number of models here.
        world: N, the number of models everywhere.
        mine: their numbers here.
        bundles: the weights.
        device: where they are.
    """

    def __init__(
        self,
        blocks: Blocks,
        models: Sequence[Mapping[str, torch.Tensor]],
        *,
        dtype: torch.dtype = torch.float32,
        block_weights: BlockWeights = "uniform",
        ranks: Ranks = ALONE,
        store: Store = MEMORY,
    ) -> None:
        self.blocks = blocks
        self.store = store
        self.ranks = ranks
        self.count = len(models)
        self.world = round(ranks.add(self.count)[0])
        self.owners = [r for r, share in enumerate(ranks.shares(self.world)) for _ in share]
        self.mine = ranks.shares(self.world)[ranks.rank]
        self.dtype = dtype
        given = {} if isinstance(block_weights, str) else _given(block_weights, models)
        ties = tied_names(models[0]) if given else {}
        groups: dict[tuple[int, ...], list[torch.Tensor]] = {}
        first = blocks.stacks.device(blocks.blocks[0].param, models[0]) if models and blocks.blocks else None
        self.device = torch.device("cpu") if first is None else first
        for block in blocks.blocks:
            spaces, value = _canonical(blocks, block, models, dtype, self.device)
            if given:
                value = value * _canonical(blocks, block, [_Roots(models[0], given, ties)], dtype, self.device)[1]
            elif block_weights == "normalised":
                scale = math.sqrt(ranks.add(dot(value, value))[0] / self.world)
                value = value / scale if scale > 0 else value
            groups.setdefault(spaces, []).append(store.keep(value))
        self.bundles = [
            Bundle(spaces, _dims(len(spaces)), self._side_by_side(groups.pop(spaces))) for spaces in sorted(groups)
        ]
        self.touching = {
            s: [b for b, bundle in enumerate(self.bundles) if s in bundle.spaces] for s in self.space_numbers
        }

    def empty(self, *shape: int) -> torch.Tensor:
        """A tensor without values beside the bundles: of their type, on their device, in their store."""
        return self.store.empty(shape, self.dtype, self.device)

    def _side_by_side(self, parts: list[torch.Tensor]) -> torch.Tensor:
        return self.store.keep(torch.cat(parts, dim=2).contiguous()) if len(parts) > 1 else parts[0]

    def one(self, stack: torch.Tensor, m: int) -> torch.Tensor:
        """The entry of model m, by its number everywhere, in a stack of which every process has its models' entries."""
        owner = self.owners[m]
        if owner == self.ranks.rank:
            out = stack[m - self.mine.start]
            out = out if self.ranks.size == 1 else out.clone()
        else:
            out = torch.empty_like(stack[0])
        self.ranks.broadcast(out, owner)
        return out

    @property
    def quadratic(self) -> bool:
        """Whether some tree acts on two axes of one bundle, so that f is not linear in its element."""
        roots = [[self.blocks.spaces[s].root for s in b.spaces] for b in self.bundles]
        return any(len(set(r)) < len(r) for r in roots)

    @property
    def space_numbers(self) -> range:
        """The numbers of all spaces."""
        return range(len(self.blocks.spaces))

    def identity(self, count: int | None = None) -> list[torch.Tensor]:
        """The identity on every space: one ``(N, n)`` int64 tensor per space."""
        n = self.count if count is None else count
        return [torch.arange(s.size, device=self.device).expand(n, -1).clone() for s in self.blocks.spaces]

    def moved(self, b: int, sigma: Sigmas, models: slice, skip: int | None = None) -> torch.Tensor:
        """Bundle b of some models, moved by permutations along all moving axes but the ``skip``-th.

        Args:
            b: the bundle.
            sigma: per space ``(number of those models, n)``.
            models: which models.
            skip: an axis to leave, by its place in ``dims``.
        """
        bundle = self.bundles[b]
        out = bundle.weights[models]
        for k in reversed(range(len(bundle.dims))):
            if k != skip:
                out = gather(out, bundle.dims[k], sigma[bundle.spaces[k]])
        return out

    def value(self, sigma: Sigmas) -> float:
        """F at a group element of every model; ``sigma`` per space ``(N, n)``, new position -> old position."""
        return self.value_of(self.moved(b, sigma, slice(None)) for b in range(len(self.bundles)))

    def value_of(self, moved: Iterable[torch.Tensor]) -> float:
        """F of moved bundles ``(N, ...)``: half of ``|sum_m X_m|^2 - sum_m |X_m|^2``."""
        together, own = [], []
        for x in moved:
            total = self.ranks.sum(add_up(x))
            together.append(dot(total, total))
            own.append(dot(x, x))
        return 0.5 * (math.fsum(together) - self.ranks.add(math.fsum(own))[0])

    @property
    def scale(self) -> float:
        """The sum over models of the squared norms: what f is measured against."""
        return self.ranks.add(math.fsum(dot(b.weights, b.weights) for b in self.bundles))[0]

    @property
    def bound(self) -> float:
        """What f exceeds nowhere: ``sum_{p<q} |X_p| |X_q|``, summed over bundles (Cauchy and Schwarz); copies reach it."""
        squares = [[dot(x, x) for x in b.weights] for b in self.bundles]
        own = [(math.fsum(map(math.sqrt, s)), math.fsum(s)) for s in squares]
        sums = self.ranks.add(*(number for pair in own for number in pair))
        return max(0.0, 0.5 * math.fsum(norms**2 - whole for norms, whole in zip(sums[::2], sums[1::2], strict=True)))


def _given(block_weights: Mapping[str, float], models: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, float]:
    """The weights by the first name of each tensor."""
    unknown = next((n for n in block_weights if n not in models[0]), None)
    if unknown is not None:
        some = ", ".join(list(models[0])[:3])
        raise MatchingError(f"block_weights: the models have no {unknown!r}; they have {some}, ...")
    ties = tied_names(models[0])
    return {ties.get(name, name): float(weight) for name, weight in block_weights.items()}


def _dims(moving: int) -> tuple[int, ...]:
    return (1, *range(3, 2 + moving))


class _Roots(Mapping[str, torch.Tensor]):
    """For each parameter a tensor of its shape, filled with the square root of its weight (for both parts of a complex one)."""

    def __init__(self, like: Mapping[str, torch.Tensor], given: Mapping[str, float], ties: Mapping[str, str]) -> None:
        self._like, self._given, self._ties = like, given, ties

    def __getitem__(self, name: str) -> torch.Tensor:
        root = math.sqrt(self._given.get(self._ties.get(name, name), 1.0))
        like = self._like[name]
        kind = torch.complex128 if like.is_complex() else torch.float64
        return torch.tensor(complex(root, root) if like.is_complex() else root, dtype=kind).expand(like.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._like)

    def __len__(self) -> int:
        return len(self._like)


def _canonical(
    blocks: Blocks, block: Block, models: Sequence[Mapping[str, torch.Tensor]], dtype: torch.dtype, device: torch.device
) -> tuple[tuple[int, ...], torch.Tensor]:
    """A block of all models as ``(N, n1, pinned, n2, ...)``, its moving axes sorted by space.

    Complex numbers count as two real ones, which stay together: one more pinned axis of length two.
    """
    moving = sorted((s, k) for k, s in enumerate(block.spaces) if s is not None)
    pinned = [k for k, s in enumerate(block.spaces) if s is None]
    values = [blocks.read(block, model).to(device) for model in models]
    if any(v.is_complex() for v in values):
        wide = torch.complex128 if dtype is torch.float64 else torch.complex64
        values = [torch.view_as_real(v.to(wide).resolve_conj()) for v in values]
        pinned.append(len(block.spaces))
    order = [moving[0][1], *pinned, *(k for _, k in moving[1:])]
    sizes = [block.shape[k] for _, k in moving]
    shape = (sizes[0], math.prod(values[0].shape[k] for k in pinned) if values else 1, *sizes[1:])
    # torch lays out a stack of small matrices as images with the channels last, if it likes
    parts = [v.to(dtype).permute(order).reshape(shape) for v in values]
    return tuple(s for s, _ in moving), torch.stack(parts).contiguous()
