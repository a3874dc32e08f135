"""How far the outputs of a merged network are from those of the networks that were merged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from automerge._data import Batch, Batches
from automerge._errors import AutomergeError
from automerge._forward import bind, evaluating, logits_of, preserving, run_batch

SAMPLES = 512  # that are looked at; the distance is a mean over all outputs, and a comparison needs no more


def drifts(
    network: nn.Module,
    candidates: Sequence[Mapping[str, torch.Tensor]],
    endpoints: Sequence[Mapping[str, torch.Tensor]],
    share: Sequence[float],
    batches: Batches,
) -> list[float] | None:
    """The distance of each candidate's outputs from the weighted mean of the endpoints' outputs.

    Every pass of a batch starts with the same random numbers; only the first batches, with 512 samples, are looked at.

    Args:
        network: the architecture; not changed.
        candidates: state dicts.
        endpoints: the state dicts that were merged; they compute outputs that can be compared.
        share: their weights, with the sum one.
        batches: the data.

    Returns:
        Per candidate the root mean square of the difference, relative to the mean outputs' own standard deviation over the
        samples, every output about its own mean: a network that gives the best constant is at one. None where the model has no
        real outputs of one shape, the endpoints' mean is the same for all samples, or a candidate's output is not finite where
        that mean is.
    """
    nets = [bind(network, state) for state in (*candidates, *endpoints)]
    squares = [0.0] * len(candidates)
    spread = _Spread()
    for batch in _first(batches):
        outputs = [_output(network, bound, batch) for bound in nets]
        real = [o for o in outputs if o is not None]
        if len({o.shape for o in real}) != 1 or len(real) < len(outputs):
            return None
        ends = real[len(candidates) :]
        mean = torch.stack([w * x for w, x in zip(share, ends, strict=True) if w]).sum(0)
        known = mean.isfinite()
        centre = mean[known]
        spread.add(mean, known)
        for k, own in enumerate(real[: len(candidates)]):
            squares[k] += float((own[known] - centre).square().sum())
    about = spread.about_means()
    if about is None or not all(map(math.isfinite, squares)):
        return None
    return [math.sqrt(s / about) for s in squares]


class _Spread:
    """How far outputs are from their means over the samples, which are along the first axis.

    Where samples differ in shape (sequences of several lengths), what the last axis tells apart has one mean each.
    """

    def __init__(self) -> None:
        self._sums: dict[torch.Size, torch.Tensor] = {}  # of the numbers, their squares, and how many there are
        self._square = 0.0

    def add(self, values: torch.Tensor, known: torch.Tensor) -> None:
        rows = values.where(known, 0.0).reshape(values.shape[0] if values.dim() else 1, *values.shape[1:])
        sums = torch.stack([rows.sum(0), rows.square().sum(0), known.reshape(rows.shape).sum(0).double()])
        before = self._sums.get(sums.shape)
        self._sums[sums.shape] = sums if before is None else before + sums
        self._square += float(sums[1].sum())

    def about_means(self) -> float | None:
        """The sum of squares about the means; None if nothing differs from sample to sample."""
        sums = list(self._sums.values())
        if len(sums) > 1:
            alike = len({s.shape[-1] for s in sums}) == 1 and all(s.dim() > 1 for s in sums)
            wide = [s.reshape(3, -1, s.shape[-1] if alike else 1) for s in sums]
            sums = [torch.stack([w.sum(1) for w in wide]).sum(0)]
        total, square, count = (
            torch.cat([s[i].reshape(-1) for s in sums]) if sums else torch.zeros(0) for i in range(3)
        )
        about = float((square - total.square() / count.clamp(min=1)).sum())
        return about if about > 1e-12 * self._square else None


def _first(batches: Batches) -> list[Batch]:
    """The batches until there are enough samples."""
    out: list[Batch] = []
    seen = 0
    for batch in batches:
        out.append(batch)
        seen += max((t.shape[0] for t in batch.tensors() if t.ndim), default=1)
        if seen >= SAMPLES:
            break
    return out


def _output(network: nn.Module, bound: Mapping[str, torch.Tensor], batch: Batch) -> torch.Tensor | None:
    """The scores in float64; None where the model has none, or they are integers."""
    with evaluating(network), preserving(network, bound):
        found = run_batch(network, bound, batch)
    try:
        scores = logits_of(found)
    except AutomergeError:
        return None
    return scores.detach().double() if scores.is_floating_point() and scores.numel() else None
