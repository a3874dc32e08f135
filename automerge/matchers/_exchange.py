"""The exact gain of exchanging two units of one model, for all pairs of units at once.

Where a tree acts on two axes of one tensor (square weights in a residual stream, recurrent weights) f is quadratic in its
element, and an assignment of the linearisation may miss what even a single exchange would gain. With ``D = T - X_m``, the
moved weights Y and the contractions ``R[i, k] = <D at i, Y at k>`` along each axis of the tree, exchanging a and b gains
``R[a, b] + R[b, a] - R[a, a] - R[b, b]``, summed over axes; tensors with two such axes need a correction at the four
entries where both indices are a or b (the delta of a quadratic assignment; Burkard, Dell'Amico, Martello, *Assignment
Problems*, 2009, section 8.2).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from automerge._tensors import contract

Piece = tuple[torch.Tensor, torch.Tensor, tuple[int, ...]]
"""``D`` and ``Y`` of one bundle, ``(1, n1, pinned, n2, ...)``, and the axes on which the tree acts: one or two."""


def exchange_gains(pieces: Iterable[Piece]) -> torch.Tensor:
    """What every exchange gains: float64 ``(n, n)``, symmetric, zero on the diagonal."""
    out: torch.Tensor | None = None
    for rest, moved, dims in pieces:
        for dim in dims:
            part = _swapped(contract(rest, moved, dim)[0].double())
            out = part if out is None else out + part
        if len(dims) == 2 and out is not None:
            out += _correction(_square(rest, dims), _square(moved, dims))
    if out is None:
        raise ValueError("no bundle is moved by this tree")
    return out


def _swapped(r: torch.Tensor) -> torch.Tensor:
    diagonal = r.diagonal()
    return r + r.mT - diagonal[:, None] - diagonal[None, :]


def _square(tensor: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """The tree's two axes first, the others flattened: ``(n, n, rest)``, float64."""
    return tensor[0].movedim((dims[0] - 1, dims[1] - 1), (0, 1)).flatten(2).double()


def _correction(d: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Exact minus linear gain at the entries (a, a), (a, b), (b, a) and (b, b).

    Exchanging rows and columns together takes Y[b, b] to (a, a) and Y[b, a] to (a, b); the contractions count an exchange
    of rows alone and of columns alone there.
    """
    n = d.shape[0]
    across = torch.arange(n, device=d.device)
    d_aa, y_aa = d[across, across][:, None], y[across, across][:, None]
    d_bb, y_bb = d[across, across][None], y[across, across][None]
    d_ab, y_ab = d, y
    d_ba, y_ba = d.transpose(0, 1), y.transpose(0, 1)
    exact = (d_aa - d_bb) * (y_bb - y_aa) + (d_ab - d_ba) * (y_ba - y_ab)
    rows = (d_aa - d_ba) * (y_ba - y_aa) + (d_ab - d_bb) * (y_bb - y_ab)
    columns = (d_aa - d_ab) * (y_ab - y_aa) + (d_ba - d_bb) * (y_bb - y_ba)
    return (exact - rows - columns).sum(dim=2)
