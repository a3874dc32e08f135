"""Parameters cut at their sums and unflattened at their products: dense blocks with one space per axis.

Everything downstream (objective, gradient, matchers) works on `Blocks` and knows nothing of architectures. Along every
axis of a parameter each position has coordinates: the unit of each role that acts there. Positions with the same set of
roles form a *segment*, a grid of those units times a pinned rest; the product of one segment per axis is a `Block`.
Where a slot is confined by ``within``, the coordinates of one axis depend on another axis; the parameter is then first
cut into the *regions* that the slices make, and regions that the group swaps are reassembled: either the shared outer
coordinate is kept once (batched expert weights), or the block is embedded block-diagonally with a mask (grouped
kernels).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from automerge._cut import OddError, RawBlock, cut
from automerge._stacks import Stacks
from automerge._tree import Path, Structure, derive
from automerge.symmetry import Symmetry, slots_by_parameter


@dataclass(frozen=True)
class Space:
    """A set of positions on which one tree acts by permutations.

    Attributes:
        root: the tree, named by its root role.
        roles: the roles whose units are the coordinates, ancestors first.
        shape: their sizes.
    """

    root: int
    roles: Path
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """The number of positions."""
        return math.prod(self.shape)


@dataclass(frozen=True, eq=False)
class Block:
    """A dense part of one parameter.

    Attributes:
        param: state-dict name, or the name of a stack (`Blocks.stacks`).
        spaces: for each axis the number of its space, or None where the order is pinned.
        shape: the extent of each axis.
        index: one int64 array per axis of the parameter, broadcasting to ``shape``: ``block = parameter[index]``.
        mask: bool, broadcasting to ``shape``; False where a block-diagonal embedding holds no entry. None if dense.
    """

    param: str
    spaces: tuple[int | None, ...]
    shape: tuple[int, ...]
    index: tuple[np.ndarray, ...]
    mask: np.ndarray | None = None

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """The block of a parameter; zero where the embedding holds no entry."""
        out = tensor[tuple(torch.from_numpy(i).to(tensor.device) for i in self.index)].expand(self.shape)
        if self.mask is not None:
            out = out * torch.from_numpy(self.mask).to(tensor.device)
        return out.contiguous()

    def write(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        """Put the block back into the parameter, in place."""
        index = np.broadcast_arrays(*self.index, np.empty(self.shape, dtype=bool))[:-1]
        keep = np.ones(self.shape, bool) if self.mask is None else np.broadcast_to(self.mask, self.shape)
        at = tuple(torch.from_numpy(i[keep]).to(tensor.device) for i in index)
        tensor[at] = value[torch.from_numpy(np.array(keep)).to(value.device)].to(tensor.dtype)


@dataclass(frozen=True, eq=False)
class Blocks:
    """The block decomposition of a symmetry.

    Attributes:
        structure: the trees of roles.
        spaces: the spaces that occur as block axes.
        blocks: the parts of all parameters (statistics excepted) with at least one moving axis.
        stacks: the parameters of interchangeable modules, which are blocks of one stack.

    Examples:
        >>> from automerge.symmetry import Generator, Slot
        >>> unit = np.arange(3)[:, None]
        >>> s = Symmetry({"a": (3, 2), "b": (1, 3)}, (Generator(3, (Slot("a", 0, unit), Slot("b", 1, unit))),))
        >>> [(b.param, b.shape, b.spaces) for b in decompose(s).blocks]
        [('a', (3, 2), (0, None)), ('b', (1, 3), (None, 0))]
    """

    structure: Structure
    spaces: tuple[Space, ...]
    blocks: tuple[Block, ...]
    stacks: Stacks

    def read(self, block: Block, model: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """A block of one model; where modules are interchangeable, of their parameters stacked."""
        return block.read(self.stacks.read(block.param, model))

    def induced(self, perms: Mapping[int, np.ndarray]) -> list[np.ndarray]:
        """The permutation of every space that an element of all trees (role -> array) induces; ``new = old[sigma]``."""
        return [self.structure.induced(perms, s.roles) for s in self.spaces]


def decompose(symmetry: Symmetry) -> Blocks:
    """Cut the parameters of a symmetry into blocks.

    Generators that fit no nested structure are left out (`Structure.dropped` names them): what remains is a subgroup.

    Args:
        symmetry: inferred or written by hand.
    """
    whole = symmetry.stacked
    generators = whole.generators()
    ignore: set[int] = set()
    while True:
        structure = derive(generators, ignore)
        kept = {i for role in structure.roles for m in role.members.values() for i in [m.generator]}
        table = slots_by_parameter(generators)
        raw: list[RawBlock] = []
        odd: set[int] = set()
        for param, slots in table.items():
            mine = [(i, slot) for i, slot in slots if i in kept]
            if param in whole.statistics or not mine:
                continue
            try:
                raw += cut(structure, param, tuple(whole.shapes[param]), mine)
            except OddError as error:
                odd |= error.generators
        if not odd:
            return _collect(structure, raw, symmetry.stacks)
        ignore |= odd | structure.dropped


def _collect(structure: Structure, raw: list[RawBlock], stacks: Stacks) -> Blocks:
    numbers: dict[Path, int] = {}
    spaces: list[Space] = []
    blocks = []
    for part in raw:
        axes: list[int | None] = []
        for roles in part.axes:
            if roles is not None and roles not in numbers:
                numbers[roles] = len(spaces)
                spaces.append(Space(structure.root_of(roles[0]), roles, structure.grid(roles)))
            axes.append(None if roles is None else numbers[roles])
        blocks.append(Block(part.param, tuple(axes), part.shape, part.index, part.mask))
    return Blocks(structure, tuple(spaces), tuple(blocks), stacks)
