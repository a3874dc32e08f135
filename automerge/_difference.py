"""How far two results are from each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def relative_difference(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> float:
    """The largest relative difference; infinite where shapes, integers or non-finite entries disagree.

    Every entry is held against its own size, or against a small quantile of the tensor where it is smaller than that,
    so that masked (huge) entries do not hide the others.
    """
    worst = 0.0
    if len(a) != len(b):
        return float("inf")
    for x, y in zip(a, b, strict=True):
        if x.shape != y.shape:
            return float("inf")
        if not (x.is_floating_point() or x.is_complex()):
            worst = max(worst, 0.0 if torch.equal(x, y) else float("inf"))
            continue
        finite = torch.isfinite(x)
        if not torch.equal(finite, torch.isfinite(y)):
            return float("inf")
        x, y = (x, y) if bool(finite.all()) else (x.detach()[finite], y.detach()[finite])
        if x.numel():
            size = x.abs()
            worst = max(worst, float(((x - y).abs() / size.clamp(min=_floor(size))).max()))
    return worst


def _floor(size: torch.Tensor) -> float:
    """The size below which an entry of a tensor counts as zero."""
    ordinary = size[(size > 0) & (size < 1e8)]
    if not ordinary.numel():
        return 1e-30
    some = ordinary[:: max(1, ordinary.numel() // 100_000)]
    return max(float(torch.quantile(some, 0.1)), 1e-4 * float(some.median()), 1e-30)


def finite(outputs: Sequence[torch.Tensor]) -> bool:
    """Whether every output holds a finite number."""
    floats = [t for t in outputs if (t.is_floating_point() or t.is_complex()) and t.numel()]
    return all(bool(torch.isfinite(t).any()) for t in floats)


def changed(tensor: torch.Tensor, before: torch.Tensor) -> bool:
    """Whether a tensor has other values than before."""
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized or tensor.shape != before.shape:
        return False
    tensor = tensor.detach()
    return not (torch.equal(tensor, before) or bool(((tensor == before) | (before != before)).all()))
