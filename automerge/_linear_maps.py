"""Elements with invertible matrices on some groups, beside permutations on the others.

Where the rows that make a group's units and the columns that read them are plain linear maps, any invertible matrix T
may stand in the place of a permutation: producers are multiplied by T, consumers by its inverse. A network that is linear
in between stays the same function; an elementwise function in between does not commute with T, and the network *drifts*.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch

from automerge._errors import MatchingError, SymmetryError
from automerge.groups import Element, identity_index, written
from automerge.symmetry import Symmetry

ArrayLike = TypeVar("ArrayLike", np.ndarray, torch.Tensor)
Roles = Mapping[int, tuple[bool, ...]]
_SAME = 1e-8


@dataclass(frozen=True, eq=False)
class Matrix:
    """An invertible matrix, stored with its inverse; or a pair that merges units and copies them back.

    Attributes:
        forward: float64, ``(n, n)``: new units are ``forward @ old``.
        inverse: float64, ``(n, n)``.
        invertible: whether the second undoes the first.
    """

    forward: torch.Tensor
    inverse: torch.Tensor
    invertible: bool = True

    def __post_init__(self) -> None:
        # one layout and alignment, so that what is read from a file multiplies to the same bits
        for name in ("forward", "inverse"):
            value: torch.Tensor = getattr(self, name)
            object.__setattr__(self, name, value.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def permutation(perm: np.ndarray) -> Matrix:
        """The matrix of ``new = old[perm]``."""
        forward = torch.eye(perm.size, dtype=torch.float64)[torch.from_numpy(np.ascontiguousarray(perm))]
        return Matrix(forward, forward.T)

    def then(self, other: Matrix) -> Matrix:
        """The matrix that acts like this one and then the other.

        Raises:
            MatchingError: if one of them is not invertible.
        """
        self._check()
        other._check()
        return Matrix(other.forward @ self.forward, self.inverse @ other.inverse)

    def inverted(self) -> Matrix:
        """The inverse.

        Raises:
            MatchingError: if there is none.
        """
        self._check()
        return Matrix(self.inverse, self.forward)

    def _check(self) -> None:
        if not self.invertible:
            raise MatchingError(
                "units were merged within models, so that there is no map from one model to another; the models can be moved "
                "to the universe and averaged there, and nothing else"
            )

    def error(self) -> float:
        """The largest entry of ``forward @ inverse - 1``."""
        eye = torch.eye(len(self.forward), dtype=torch.float64)
        return float((self.forward @ self.inverse - eye).abs().max())


@dataclass(frozen=True, eq=False)
class LinearElement(Element):
    """An `Element` that also multiplies the units of some generators by invertible matrices.

    Its `maps` are the permutations of all other generators; parameters that only matrices change are named there with
    the identity.

    Attributes:
        symmetry: whose generators are meant.
        roles: generator number -> for each of its slots whether it produces the units (its axis is multiplied by the
            matrix) or consumes them (by the transposed inverse).
        matrices: generator number -> the matrix.

    Examples:
        >>> from automerge.symmetry import Generator, Slot
        >>> unit = np.arange(2)[:, None]
        >>> s = Symmetry({"a": (2, 3), "b": (1, 2)}, (Generator(2, (Slot("a", 0, unit), Slot("b", 1, unit))),))
        >>> half = torch.eye(2, dtype=torch.float64) / 2
        >>> e = linear_element(s, s.identity(), {0: (True, False)}, {0: Matrix(half, 4 * half)})
        >>> s.apply({"a": torch.ones(2, 3), "b": torch.ones(1, 2)}, e)["b"]
        tensor([[2., 2.]])
        >>> e.then(e.inverse()).is_identity()
        True
    """

    symmetry: Symmetry | None = None
    roles: Roles = field(default_factory=dict)
    matrices: Mapping[int, Matrix] = field(default_factory=dict)

    def then(self, other: Element) -> LinearElement:
        """The element that acts like ``self`` first and ``other`` second.

        Raises:
            SymmetryError: if the other has no matrices, or on other groups.
        """
        if not isinstance(other, LinearElement) or dict(other.roles) != dict(self.roles):
            raise SymmetryError(
                "elements with matrices compose only with elements that have matrices on the same groups"
            )
        matrices = {g: m.then(other.matrices[g]) for g, m in self.matrices.items()}
        return self._with(super().then(other), matrices)

    def inverse(self) -> LinearElement:
        """The inverse; no matrix is inverted numerically."""
        return self._with(super().inverse(), {g: m.inverted() for g, m in self.matrices.items()})

    def moved(self) -> int:
        """The number of axis positions that permutations displace, or whose row of a matrix is not the identity's (1e-8)."""
        assert self.symmetry is not None
        total = super().moved()
        for g, m in self.matrices.items():
            off = (m.forward - torch.eye(len(m.forward), dtype=torch.float64)).abs().amax(1) > _SAME
            total += int(off.sum()) * sum(s.index.shape[1] for s in self.symmetry.sets[g].slots)
        return total

    def apply_to(self, name: str, tensor: ArrayLike, out: ArrayLike | None = None) -> ArrayLike:
        """Move one tensor by its name; matrices are multiplied in float64."""
        tensor = super().apply_to(name, tensor)
        if isinstance(tensor, np.ndarray):
            return written(self._multiplied(name, torch.from_numpy(tensor)).numpy(), out)
        return written(self._multiplied(name, tensor), out)

    def _multiplied(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        assert self.symmetry is not None
        for g, m in self.matrices.items():
            for slot, produces in zip(self.symmetry.sets[g].slots, self.roles[g], strict=True):
                if slot.param == name:
                    matrix = m.forward if produces else m.inverse.T
                    tensor = _multiply(tensor, slot.axis, slot.index, matrix)
        return tensor

    def _with(self, element: Element, matrices: Mapping[int, Matrix]) -> LinearElement:
        return LinearElement(element.shapes, element.maps, element.sources, self.symmetry, self.roles, matrices)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LinearElement) or set(self.matrices) != set(other.matrices):
            return False
        pairs = [(m, other.matrices[g]) for g, m in self.matrices.items()]
        same = all(torch.equal(a.forward, b.forward) and torch.equal(a.inverse, b.inverse) for a, b in pairs)
        return same and super().__eq__(other)

    def __hash__(self) -> int:
        return super().__hash__()

    def __repr__(self) -> str:
        return f"LinearElement({len(self.matrices)} matrices; moves {self.moved()} positions)"


def linear_element(symmetry: Symmetry, element: Element, roles: Roles, matrices: Mapping[int, Matrix]) -> LinearElement:
    """An element of permutations with matrices on generators that it leaves where they are.

    Raises:
        SymmetryError: if a matrix has another size than its generator, or one of the generator's slots is confined by
            ``within`` (its units are not whole slices).
    """
    maps = dict(element.maps)
    for g, m in matrices.items():
        generator = symmetry.sets[g]
        if m.forward.shape != (generator.size, generator.size) or len(roles[g]) != len(generator.slots):
            raise SymmetryError(
                f"generator {generator.name or g} has {generator.size} units and {len(generator.slots)} slots, got a "
                f"matrix of shape {tuple(m.forward.shape)} and {len(roles[g])} roles"
            )
        for slot in generator.slots:
            if slot.within:
                raise SymmetryError(
                    f"generator {generator.name or g} is confined to a part of {slot.param}: no matrix fits"
                )
            maps.setdefault(slot.param, identity_index(tuple(symmetry.shapes[slot.param])))
    return LinearElement(symmetry.shapes, maps, element.sources, symmetry, dict(roles), dict(matrices))


def _multiply(tensor: torch.Tensor, axis: int, index: np.ndarray, matrix: torch.Tensor) -> torch.Tensor:
    """``new[index[:, j]] = matrix @ old[index[:, j]]`` along one axis, for every column j."""
    wide = torch.complex128 if tensor.is_complex() else torch.float64
    at = torch.from_numpy(np.ascontiguousarray(index)).to(tensor.device)
    out = tensor.detach().clone().movedim(axis, 0)
    rows = out[at].to(wide)
    out[at] = torch.tensordot(matrix.to(device=tensor.device, dtype=wide), rows, dims=1).to(tensor.dtype)
    return out.movedim(0, axis).contiguous()


def permutations_of(symmetry: Symmetry, element: Element, generators: set[int]) -> dict[int, np.ndarray]:
    """By which permutation an element moves the units of some generators, ``new[index[u]] = old[index[p[u]]]``.

    The generators must own positions that no other generator moves.
    """
    out: dict[int, np.ndarray] = {}
    for g in generators:
        slot = symmetry.sets[g].slots[0]
        line = np.arange(symmetry.shapes[slot.param][slot.axis])
        if slot.param in element.maps:
            line = element.maps[slot.param][slot.axis].reshape(-1)
        first = slot.index[:, 0]
        unit = np.full(line.size, -1)
        unit[first] = np.arange(first.size)
        out[g] = unit[line[first]]
        assert (out[g] >= 0).all()
    return out
