"""Group elements: what moves a state dict, exactly and in integer arithmetic.

An element holds, for every parameter that it moves, one integer array per axis. The action is numpy's advanced
indexing, ``new = old[idx_0, idx_1, ...]``, where each ``idx_k`` broadcasts to the parameter's shape: a plain axis
permutation has the shape ``(1, n, 1)``; the inner permutations of a wreath product, which depend on the position along
another axis, have extent there too. Composition and inversion stay in this form, so cycles compose to the identity
exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch

IndexArrays = tuple[np.ndarray, ...]
ArrayLike = TypeVar("ArrayLike", np.ndarray, torch.Tensor)
_CACHED = 1 << 16  # entries


def axis_index(shape: tuple[int, ...], axis: int) -> np.ndarray:
    """The identity index of one axis, shaped to broadcast against the others.

    >>> axis_index((2, 3), 1).shape
    (1, 3)
    """
    view = [1] * len(shape)
    view[axis] = shape[axis]
    return np.arange(shape[axis], dtype=np.int64).reshape(view)


def identity_index(shape: tuple[int, ...]) -> IndexArrays:
    """The identity of one parameter: `axis_index` for each axis."""
    return tuple(axis_index(shape, k) for k in range(len(shape)))


def _shrink(index: np.ndarray, axis: int) -> np.ndarray:
    """Drop the extent of every other axis along which the index is constant."""
    for other in range(index.ndim):
        if other != axis and index.shape[other] > 1:
            first = index.take([0], axis=other)
            if np.array_equal(np.broadcast_to(first, index.shape), index):
                index = first
    return np.ascontiguousarray(index)


def _evaluate(index: np.ndarray, at: IndexArrays) -> np.ndarray:
    """``index`` read at the positions ``at``; axes where it has extent one are broadcast."""
    return index[tuple(a if index.shape[k] > 1 else 0 for k, a in enumerate(at))]


def compose_index(first: IndexArrays, second: IndexArrays) -> IndexArrays:
    """The index that acts like ``first`` and then ``second``: ``new[j] = old[first(second(j))]``."""
    ndim = len(first)
    out = []
    for axis in range(ndim):
        value = _evaluate(first[axis], second)
        out.append(_shrink(value.reshape((1,) * (ndim - value.ndim) + value.shape), axis))
    return tuple(out)


def inverse_index(index: IndexArrays) -> IndexArrays:
    """The inverse of `compose_index`. Axes are inverted from those that depend on nothing inwards.

    Raises:
        ValueError: if two axes depend on each other, so that no order exists.
    """
    ndim = len(index)
    done: dict[int, np.ndarray] = {}
    while len(done) < ndim:
        before = len(done)
        for axis in range(ndim):
            others = [k for k in range(ndim) if k != axis and index[axis].shape[k] > 1]
            if axis in done or any(k not in done for k in others):
                continue
            extent = tuple(index[axis].shape)
            at = tuple(done[k] if k in others else axis_index(extent, k) for k in range(ndim))
            value = _evaluate(index[axis], at)
            value = value.reshape((1,) * (ndim - value.ndim) + value.shape)
            done[axis] = _shrink(np.argsort(value, axis=axis), axis)
        if len(done) == before:
            raise ValueError("the axes of this element depend on each other in a cycle")
    return tuple(done[k] for k in range(ndim))


def apply_index(index: IndexArrays, tensor: ArrayLike, out: ArrayLike | None = None) -> ArrayLike:
    """Move one tensor: ``tensor[idx_0, idx_1, ...]``, one gather per axis where the axes are independent.

    Args:
        index: one array per axis.
        tensor: what is moved.
        out: another tensor of its shape and dtype to write to; a new one, or the same where nothing moves, if None.
    """
    if isinstance(tensor, np.ndarray):
        moved = tensor[index]
    elif all(a.size == a.shape[k] for k, a in enumerate(index)):
        moving = {k: a.reshape(-1) for k, a in enumerate(index) if not _is_identity_axis(a)}
        for k, a in moving.items():
            if a.size and not 0 <= int(a.min()) <= int(a.max()) < tensor.shape[k]:
                raise IndexError(f"axis {k} has {tensor.shape[k]} positions, and the element asks for others")
        if moving and tensor.numel() and _in_plain_memory(tensor) and (out is None or _in_plain_memory(out)):
            out = tensor.new_empty(tensor.shape) if out is None else out
            _gather(_bits(tensor), moving, _bits(out))
            return out
        moved = tensor
        for k, a in moving.items():
            moved = moved.index_select(k, torch.from_numpy(a).to(tensor.device))
    else:
        moved = tensor[tuple(torch.from_numpy(a).to(tensor.device) for a in index)]
    return written(moved, out)


def written(value: ArrayLike, out: ArrayLike | None) -> ArrayLike:
    """``out`` with a value in it; the value itself if there is none."""
    if out is None:
        return value
    out[...] = value
    return out


def _in_plain_memory(tensor: torch.Tensor) -> bool:
    """Whether numpy can read and write a tensor's memory as it is."""
    return (
        tensor.is_cpu
        and tensor.layout is torch.strided
        and type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and not (tensor.is_conj() or tensor.is_neg() or (tensor.requires_grad and torch.is_grad_enabled()))
    )


def _bits(tensor: torch.Tensor) -> np.ndarray:
    """The memory of a tensor as numbers of the same size; numpy has no bfloat16."""
    same = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}[tensor.element_size()]
    return tensor.detach().view(same).numpy()


def _gather(source: np.ndarray, moving: Mapping[int, np.ndarray], out: np.ndarray) -> None:
    """Move along some axes, a few rows at a time: what is moved along one axis is still in the cache for the next."""
    rows = moving.get(0)
    rest = sorted((k, a) for k, a in moving.items() if k)
    if rows is not None and not rest:
        np.take(source, rows, 0, out=out, mode="clip")
        return
    step = max(1, _CACHED // source[0].size) if rows is not None or len(rest) > 1 else len(source)
    (last, order) = rest.pop()
    for start in range(0, len(source), step):
        part = source[start : start + step] if rows is None else source[rows[start : start + step]]
        for k, a in rest:
            part = np.take(part, a, k, mode="clip")
        np.take(part, order, last, out=out[start : start + step], mode="clip")


def _is_identity_axis(index: np.ndarray) -> bool:
    flat = index.reshape(-1)
    return bool(np.array_equal(flat, np.arange(flat.size)))


@dataclass(frozen=True, eq=False)
class Element:
    """One element of a model's permutation group.

    Attributes:
        maps: for each moved parameter one int64 array per axis (see the module's docstring); parameters that are
            not named stay as they are.
        shapes: the shape of each parameter that may move.
        sources: for each parameter that gets another one's entries (of an interchangeable module) the name of that one; the
            maps then say how these are moved.
    """

    shapes: Mapping[str, tuple[int, ...]]
    maps: Mapping[str, IndexArrays] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)

    def then(self, other: Element) -> Element:
        """The element that acts like ``self`` first and ``other`` second."""
        shapes = {**self.shapes, **other.shapes}
        # the entries of n come from source(n) before other, and from that one's source before self
        names = self.touched | other.touched
        between = {n: other.sources.get(n, n) for n in names}
        sources = {n: self.sources.get(b, b) for n, b in between.items()}
        return Element(
            shapes,
            {n: compose_index(self._of(between[n]), other._of(n)) for n in sorted(names)},
            {n: s for n, s in sorted(sources.items()) if s != n},
        )

    def inverse(self) -> Element:
        """The element with ``e.then(e.inverse())`` the identity."""
        maps = {self.sources.get(n, n): inverse_index(self._of(n)) for n in sorted(self.touched)}
        return Element(self.shapes, maps, {s: n for n, s in self.sources.items()})

    def is_identity(self) -> bool:
        """Whether nothing moves; exact, no tolerance."""
        return self.moved() == 0

    def moved(self) -> int:
        """The number of axis positions that do not stay where they are; all of a parameter that gets another one's entries."""
        inside = sum(
            int(np.count_nonzero(a != axis_index(self.shapes[n], k)))
            for n, m in self.maps.items()
            if n not in self.sources
            for k, a in enumerate(m)
        )
        return inside + sum(max(1, sum(self.shapes[n])) for n in self.sources)

    def apply_to(self, name: str, tensor: ArrayLike, out: ArrayLike | None = None) -> ArrayLike:
        """Move one tensor (a parameter's value, its gradient, ...) by its name, see `apply_index`.

        Where modules are exchanged, the tensor is the one of the parameter that the entries come from (``sources``).
        """
        return apply_index(self.maps[name], tensor, out) if name in self.maps else written(tensor, out)

    def take(
        self,
        name: str,
        tensors: Mapping[str, torch.Tensor],
        aliases: Mapping[str, str] | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The moved tensor of a name, from a state dict.

        Args:
            name: a name of the state dict.
            tensors: the state dict.
            aliases: further names of tied tensors -> the first name.
            out: as for `apply_index`.
        """
        key = (aliases or {}).get(name, name)
        return self.apply_to(key, tensors[self.sources.get(key, name)], out)

    @property
    def touched(self) -> set[str]:
        """The parameters that change, in part or altogether."""
        return {*self.maps, *self.sources}

    def _of(self, name: str) -> IndexArrays:
        if name in self.maps:
            return self.maps[name]
        return identity_index(self.shapes[name])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Element):
            return NotImplemented
        if self._proper() != other._proper():
            return False
        names = self.touched | other.touched
        return all(
            all(
                np.array_equal(_shrink(a, k), _shrink(b, k))
                for k, (a, b) in enumerate(zip(self._of(n), other._of(n), strict=True))
            )
            if n in self.shapes and n in other.shapes
            else False
            for n in names
        )

    def _proper(self) -> dict[str, str]:
        return {n: s for n, s in self.sources.items() if n != s}

    def __hash__(self) -> int:
        return hash(tuple(sorted(self.maps)))

    def __repr__(self) -> str:
        return f"Element(moves {self.moved()} positions in {len(self.touched)} parameters)"
