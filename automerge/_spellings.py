"""Rows under a mask, written with their positions: recorded as the mask, by which rules and branches know them.

``x[torch.where(mask)]``, ``x[mask.nonzero(as_tuple=True)]`` and, column by column, ``x[i, j]`` read the entries in the order
in which ``x[mask]`` does; ``rows = mask.nonzero(); x[rows, :]`` does, too, with an axis of length one beside.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
INDEXED = (aten.index.Tensor, aten.index_put.default)

Emit = Callable[..., fx.Node]


def by_mask(emit: Emit, target: Any, args: Any, kwargs: Any, value: Any) -> fx.Node | None:
    """Emit an operator that reads or writes at all positions of a mask with that mask; None if it does not.

    Args:
        emit: called with a target, arguments and a value.
        target, args, kwargs, value: the operator, one of `INDEXED`.
    """
    x, indices, *rest = args
    found = _mask(x, indices)
    if found is None or not isinstance(value, torch.Tensor):
        return None
    mask, at, column = found
    where = [*indices[:at], mask]
    if not column:
        return emit(target, (x, where, *rest), kwargs, value)
    if target is aten.index.Tensor:
        rows = emit(target, (x, where), kwargs, value.squeeze(at + 1))
        return emit(aten.unsqueeze.default, (rows, at + 1), {}, value)
    beside = x.meta["val"].dim() - at  # counted from the end: the axis of length one of what is written
    given = rest[0].meta["val"]
    if given.dim() >= beside:
        rest[0] = emit(aten.squeeze.dim, (rest[0], -beside), {}, given.squeeze(-beside))
    return emit(target, (x, where, *rest), kwargs, value)


def _mask(x: Any, indices: Sequence[Any]) -> tuple[fx.Node, int, bool] | None:
    """The mask whose positions some indices are, the first axis that it is for, and whether they have an axis beside."""
    at = next((k for k, n in enumerate(indices) if n is not None), 0)
    columns = list(indices[at:])
    if not columns or None in columns:
        return None
    column = columns[0].target is aten.nonzero.default
    positions = columns[0] if column else _source(columns[0])
    if positions is None or positions.target is not aten.nonzero.default:
        return None
    mask = positions.args[0]
    shape = mask.meta["val"].shape
    if not column and [_column(n, mask) for n in columns] != list(range(len(shape))):
        return None
    whole = mask.meta["val"].dtype is torch.bool and x.meta["val"].shape[at : at + len(shape)] == shape
    return (mask, at, column) if whole and len(shape) == len(columns) else None


def _source(column: fx.Node) -> Any:
    """What a column is of, were it one."""
    cut: Any = column.args[0] if column.target is operator.getitem else column
    source: Any = cut.args[0] if cut.target in (aten.unbind.int, aten.select.int) else None
    return source.args[0] if isinstance(source, fx.Node) and source.target is aten.t.default else source


def _column(node: fx.Node, mask: Any) -> int | None:
    """Which column of the positions of a mask a node is."""
    positions = _source(node)
    if positions is None or positions.target is not aten.nonzero.default or positions.args[0] is not mask:
        return None
    cut: Any = node.args[0] if node.target is operator.getitem else node
    dim = cut.args[1] if len(cut.args) > 1 else 0
    number: Any = node.args[1] if cut is not node else node.args[2]
    wanted = 1 if cut.args[0] is positions else 0
    return number % positions.meta["val"].shape[1] if dim % 2 == wanted else None
