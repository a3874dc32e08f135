"""Stacks of tensors, one entry per model: gathers, products along one axis, inner products.

A stack has the models on its first axis. Its other axes are laid out as `automerge.objective.Bundle` says.
"""

from __future__ import annotations

import math
from functools import reduce

import torch

_STRETCH = 16384
_TOGETHER = 64


def gather(tensor: torch.Tensor, dim: int, sigma: torch.Tensor) -> torch.Tensor:
    """``out[m, .., i, ..] = tensor[m, .., sigma[m, i], ..]`` along ``dim`` (1 or more); ``sigma`` is ``(N, n)``."""
    count, n = sigma.shape
    if count == 0:
        return tensor
    if count == 1:
        return gather_one(tensor, dim, sigma, torch.empty_like(tensor, memory_format=torch.contiguous_format))
    if dim == 1 and tensor[0, 0].numel() > 1:
        rows = (sigma + n * torch.arange(count, device=sigma.device)[:, None]).reshape(-1)
        return tensor.reshape(count * n, -1).index_select(0, rows).reshape(tensor.shape)
    view = [1] * tensor.ndim
    view[0], view[dim] = count, n
    return tensor.gather(dim, sigma.view(view).expand(tensor.shape))


def gather_one(tensor: torch.Tensor, dim: int, sigma: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """`gather` of one model, ``(1, ...)``, written to ``out``.

    The last axis is gathered from a matrix: in torch that is ten times faster than from a tensor of more axes.
    """
    if dim == tensor.ndim - 1 and dim != 1:
        n = tensor.shape[-1]
        torch.index_select(tensor.reshape(-1, n), 1, sigma[0], out=out.view(-1, n))
    else:
        torch.index_select(tensor, dim, sigma[0], out=out)
    return out


def take(tensor: torch.Tensor, axis: int, positions: torch.Tensor) -> torch.Tensor:
    """Some positions along one axis; the last one is read from a matrix, as in `gather_one`."""
    if axis == tensor.ndim - 1 and axis > 1:
        matrix = tensor.reshape(-1, tensor.shape[-1]).index_select(1, positions)
        return matrix.reshape(*tensor.shape[:-1], -1)
    return tensor.index_select(axis, positions)


def act(tensor: torch.Tensor, dim: int, matrix: torch.Tensor) -> torch.Tensor:
    """Along ``dim``: ``out[m, .., i, ..] = sum_j matrix[m, i, j] tensor[m, .., j, ..]``; matrices ``(N, n, n)``."""
    front = tensor.movedim(dim, 1)
    out = torch.bmm(matrix, front.reshape(*front.shape[:2], -1))
    return out.reshape(front.shape).movedim(1, dim).contiguous()


def contract(left: torch.Tensor, right: torch.Tensor, dim: int) -> torch.Tensor:
    """``G[m, i, j] = <left at i, right at j>`` over all axes but ``dim``, along which they may differ in length."""
    a, b = _factors(left, right, dim)
    return torch.bmm(a, b)


def add_contraction(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, dim: int) -> None:
    """Add `contract` to ``out``, in place."""
    if left.shape[0] == 0:
        return
    a, b = _factors(left, right, dim)
    if a.shape[0] == 1:
        out[0].addmm_(a[0], b[0])
    else:
        out.baddbmm_(a, b)


def _factors(left: torch.Tensor, right: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two stacks of matrices whose products are the contraction; views, if the axis is the first or the last one."""
    count, n, k = left.shape[0], left.shape[dim], right.shape[dim]
    if dim == left.ndim - 1 and dim != 1:
        return left.reshape(count, -1, n).mT, right.reshape(count, -1, k)
    if dim != 1:
        left, right = left.movedim(dim, 1), right.movedim(dim, 1)
    return left.reshape(count, n, -1), right.reshape(count, k, -1).mT


def dot(a: torch.Tensor, b: torch.Tensor) -> float:
    """The inner product: along the last axis (or a stretch of it) in the tensors' type, then in float64."""
    if a.numel() == 0:
        return 0.0
    rows = a.shape[-1] if 16 <= a.shape[-1] <= 4096 else math.gcd(a.numel(), 512)
    if rows < 16:
        return float((a.double() * b.double()).sum())
    return float(torch.linalg.vecdot(a.reshape(-1, rows), b.reshape(-1, rows)).sum(dtype=torch.float64))


def quick_dot(a: torch.Tensor, b: torch.Tensor) -> float:
    """The inner product of contiguous tensors: stretches of 16,384 entries in the tensors' type, then in float64.

    Few calls with many stretches each: where others use the processor, every call of a threaded kernel waits for them.
    """
    a, b = a.view(-1), b.view(-1)
    whole = a.numel() // _STRETCH * _STRETCH
    rows = [x[:whole].view(-1, _STRETCH).split(_TOGETHER) for x in (a, b)] if whole else [[], []]
    sums = [float(torch.linalg.vecdot(x, y).sum(dtype=torch.float64)) for x, y in zip(*rows, strict=True)]
    return math.fsum((*sums, float(torch.dot(a[whole:], b[whole:])))) if whole < a.numel() else math.fsum(sums)


def add_up(stack: torch.Tensor) -> torch.Tensor:
    """The sum over models; a view if there is one, zero if there is none."""
    if stack.shape[0] == 0:
        return stack.new_zeros(stack.shape[1:])
    return reduce(torch.add, stack.unbind())


def matrices(sigma: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Permutations ``(N, n)`` as matrices ``(N, n, n)`` with ones at ``[m, i, sigma[m, i]]``."""
    out = torch.zeros(*sigma.shape, sigma.shape[1], dtype=dtype, device=sigma.device)
    return out.scatter_(2, sigma[:, :, None], 1.0)
