"""The three disjoint sets of data of a comparison."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from torch import nn

from automerge._data import Batch, Batches
from automerge._errors import AutomergeError, MatchingError
from automerge._forward import device_of
from automerge._split import split_batches


@dataclass(frozen=True)
class DataSets:
    """Three disjoint sets of batches."""

    calibrate: list[Batch]
    select: list[Batch]
    report: list[Batch]
    how: str

    @staticmethod
    def make(data: Any, select: Any, report: Any, args: Any, kwargs: Any, network: nn.Module, seed: int) -> DataSets:
        given: list[list[Batch] | None] = []
        for name, source in (("data", data), ("select", select), ("report", report)):
            with about(name):
                given.append(None if source is None else list(Batches.like(source, args, kwargs, device_of(network))))
        first, second, third = given
        if first is None:
            raise MatchingError("comparing needs data: batches for calibration (data=)")
        if second is not None and third is None:
            calibrate, third = split_batches(first, [1, 1], seed)
            return DataSets(calibrate, second, third, "data cut into calibration and report")
        if second is None and third is not None:
            calibrate, second = split_batches(first, [1, 1], seed)
            return DataSets(calibrate, second, third, "data cut into calibration and selection")
        if second is None or third is None:
            calibrate, second, third = split_batches(first, [1, 1, 2], seed)
            return DataSets(calibrate, second, third, "data cut into calibration, selection and report")
        return DataSets(first, second, third, "separate data for calibration, selection and report")

    def counts(self) -> dict[str, int]:
        return {name: sum(_length(b) for b in getattr(self, name)) for name in ("calibrate", "select", "report")}

    def notes(self) -> list[str]:
        out = [self.how]
        calibrate, select = (set(_fingerprints(b)) for b in (self.calibrate, self.select))
        report = _fingerprints(self.report)
        for name, own in (("calibrate", calibrate), ("select", select)):
            if both := sum(key in own for key in report):
                out.append(
                    f"{both} of the {len(report)} samples of the report are also among those that {name}: the report flatters"
                )
        if both := len(calibrate & select):
            out.append(
                f"{both} of the {len(select)} samples that select are also among those that calibrate: what is fitted to them "
                "looks better than it is"
            )
        if any(b.labels is None for b in (*self.select, *self.report)):
            out.append("without labels, combinations are chosen by their agreement with the ensemble")
        return out


def _length(batch: Batch) -> int:
    tensors = [t for t in (*batch.args, *batch.kwargs.values(), batch.labels) if isinstance(t, torch.Tensor) and t.ndim]
    return tensors[0].shape[0] if tensors else 1


def _fingerprints(batches: Sequence[Batch]) -> list[bytes]:
    """One short digest for the inputs of every sample; what is not cut into samples belongs to all of its batch."""
    out = []
    for batch in batches:
        n = _length(batch)
        inputs = [t.detach().cpu().contiguous() for t in batch.tensors() if t.layout is torch.strided]
        parts = [t for t in inputs if t.ndim and t.shape[0] == n]
        common = blake2b(b"".join(map(_bytes, (t for t in inputs if not t.ndim or t.shape[0] != n)))).digest()
        for k in range(n if parts else 0):
            whole = common + b"".join(_bytes(p[k]) for p in parts)
            out.append(blake2b(whole, digest_size=12).digest())
    return out


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def as_items(batches: Sequence[Batch], labels: Sequence[torch.Tensor] | None = None) -> list[Any]:
    """Batches as `automerge.evaluate` takes them; with other labels, or with their own."""
    out: list[Any] = []
    for k, batch in enumerate(batches):
        label = batch.labels if labels is None else labels[k]
        if batch.args:
            out.append((*batch.args, label))
        else:
            out.append({**batch.kwargs, "labels": label})
    return out


@contextmanager
def about(name: str) -> Iterator[None]:
    """Errors say which of the three data they are about."""
    try:
        yield
    except AutomergeError as error:
        if str(error).startswith("--"):
            raise
        raise AutomergeError(f"{name}: {error}") from error
