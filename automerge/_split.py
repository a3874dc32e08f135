"""Cutting labelled batches into disjoint parts by samples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from automerge._data import Batch
from automerge._errors import AutomergeError
from automerge._tree_io import map_tensors, tensors_of


def split_batches(batches: Iterable[Batch], shares: Sequence[float], seed: int) -> list[list[Batch]]:
    """Every batch's samples, dealt at random to parts, so that each part holds its share of every batch.

    Where batches are so small that a part would be empty, each part gets its share of all of them instead.
    A part's pieces are joined to batches again, none larger than the largest that was given.

    Args:
        batches: whose tensors all have the samples on their first axis.
        shares: one positive number per part.
        seed: of the deal.

    Raises:
        AutomergeError: if the tensors of a batch differ in length, or a part would get no sample.

    Examples:
        >>> parts = split_batches([Batch((torch.arange(6.0),), {}, torch.arange(6))], [1, 2], 0)
        >>> [part[0].labels.numel() for part in parts]
        [2, 4]
    """
    total = sum(shares)
    edges = [sum(shares[:k]) / total for k in range(len(shares) + 1)]
    pieces = [(batch, _samples(batch, number)) for number, batch in enumerate(batches)]
    lengths = [n for _, n in pieces]
    parts = _dealt(pieces, [[round(e * n) for e in edges] for n in lengths], len(shares), seed)
    if not all(parts):
        parts = _dealt(pieces, _running([s / total for s in shares], lengths, seed), len(shares), seed)
    for k, part in enumerate(parts):
        if not part:
            raise AutomergeError(f"the data are too few to be cut into {len(shares)} parts (part {k} is empty)")
    return [_joined(part, max(lengths)) for part in parts]


def _samples(batch: Batch, number: int) -> int:
    """The length that all tensors of a batch have."""
    tensors = tensors_of((batch.args, dict(batch.kwargs), batch.labels))
    if any(t.layout != torch.strided for t in tensors):
        raise AutomergeError(
            f"batch {number} cannot be cut into samples: it holds a sparse tensor; make it dense (to_dense()), or give "
            "separate data for calibration, selection and report"
        )
    lengths = {t.shape[0] if t.ndim else -1 for t in tensors}
    if len(lengths) != 1 or -1 in lengths:
        raise AutomergeError(
            f"batch {number} cannot be cut into samples: its tensors have the lengths {sorted(lengths)}; give separate "
            "data for calibration, selection and report"
        )
    return lengths.pop()


def _dealt(
    pieces: Sequence[tuple[Batch, int]], edges: Sequence[Sequence[int]], count: int, seed: int
) -> list[list[Batch]]:
    """The parts; of a batch, in a random order of its samples, each holds those between two edges."""
    rng = torch.Generator().manual_seed(seed)
    parts: list[list[Batch]] = [[] for _ in range(count)]
    for (batch, n), own in zip(pieces, edges, strict=True):
        order = torch.randperm(n, generator=rng)
        for k, part in enumerate(parts):
            rows = order[own[k] : own[k + 1]].sort().values
            if len(rows):
                part.append(_taken(batch, rows))
    return parts


def _running(shares: Sequence[float], lengths: Sequence[int], seed: int) -> list[list[int]]:
    """Edges for every batch, in a random order of batches: a sample goes where most lacks of the share of all so far.

    >>> sorted(_running([0.25, 0.25, 0.5], [1, 1, 1, 1], 0))
    [[0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 1, 1], [0, 1, 1, 1]]
    """
    given = [0] * len(shares)
    out: list[list[int]] = [[] for _ in lengths]
    for number in torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist():
        before = list(given)
        for _ in range(lengths[number]):
            lack = [share * (sum(given) + 1) - g for share, g in zip(shares, given, strict=True)]
            given[lack.index(max(lack))] += 1
        counts = [g - b for g, b in zip(given, before, strict=True)]
        out[number] = [sum(counts[:k]) for k in range(len(counts) + 1)]
    return out


def _taken(batch: Batch, rows: torch.Tensor) -> Batch:
    def take(_: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[rows.to(tensor.device)]

    labels: Any = None if batch.labels is None else map_tensors(take, batch.labels)
    args, kwargs = map_tensors(take, tuple(batch.args)), map_tensors(take, dict(batch.kwargs))
    return Batch(args, kwargs, labels, batch.number)


def _joined(part: Sequence[Batch], largest: int) -> list[Batch]:
    """Neighbours of one form as one batch, as long as it is not larger than that."""
    out: list[Batch] = []
    size = 0
    for batch in part:
        n = tensors_of((batch.args, dict(batch.kwargs), batch.labels))[0].shape[0]
        if out and size + n <= largest and _form(out[-1]) == _form(batch):
            out[-1], size = _cat(out[-1], batch), size + n
        else:
            out.append(batch)
            size = n
    return out


def _form(batch: Batch) -> str:
    """What batches must have in common to be joined: everything but their length."""
    parts = (tuple(batch.args), dict(batch.kwargs), batch.labels)
    return repr(map_tensors(lambda _, t: (tuple(t.shape[1:]), t.dtype, t.device), parts))


def _cat(a: Batch, b: Batch) -> Batch:
    rest = iter(tensors_of((tuple(b.args), dict(b.kwargs), b.labels)))

    def join(_: str, tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor, next(rest)])

    args, kwargs = map_tensors(join, tuple(a.args)), map_tensors(join, dict(a.kwargs))
    return Batch(args, kwargs, None if a.labels is None else map_tensors(join, a.labels), a.number)
