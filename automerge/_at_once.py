"""Symmetric functions taken axis after axis, recorded as the one over all these axes that they are.

``corr.mean(1).mean(1)`` is ``corr.mean((1, 2))``, under which the units of both axes may be exchanged; one after the other
only those within each row of the first are.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any, NamedTuple, cast

import torch
from torch import fx

aten = torch.ops.aten

_BY_DIMS = {  # operator -> what it is over several axes
    **dict.fromkeys((aten.sum.dim_IntList, aten.sum.default), aten.sum.dim_IntList),
    **dict.fromkeys((aten.mean.dim, aten.mean.default), aten.mean.dim),
    **dict.fromkeys((aten.any.dims, aten.any.dim, aten.any.default), aten.any.dims),
    **dict.fromkeys((aten.all.dims, aten.all.dim, aten.all.default), aten.all.dims),
    **dict.fromkeys((aten.amax.default, aten.max.default, aten.max.dim), aten.amax.default),
    **dict.fromkeys((aten.amin.default, aten.min.default, aten.min.dim), aten.amin.default),
    **{form: form for form in (aten.nansum.default, aten.logsumexp.default, aten.linalg_vector_norm.default)},
}
_PAIRS = (aten.max.dim, aten.min.dim)  # and the place


class _Reduction(NamedTuple):
    """A symmetric function of some axes of ``source``; ``order`` is a norm's."""

    target: Any
    source: fx.Node
    dims: frozenset[int]
    keepdim: bool
    order: tuple[Any, ...]


def at_once(graph: fx.Graph, read: Collection[str]) -> None:
    """Let a reduction of what only it reads, and what is the same one over other axes, be one over all of them.

    Args:
        graph: recorded, with its output.
        read: the names of nodes whose values python reads.
    """
    for node in reversed(graph.nodes):
        first = last = _reduction(node, read) if node.users or node.name in read else None
        if first is None:
            continue
        while len(first.source.users) == 1 and first.source.name not in read:
            before = _reduction(first.source, read)
            if before is None or (before.target, before.order) != (first.target, first.order):
                break
            rank = before.source.meta["val"].dim()
            left = range(rank) if before.keepdim else [k for k in range(rank) if k not in before.dims]
            first = before._replace(dims=before.dims | {left[k] for k in first.dims})
        if first is not last:
            _replace(graph, node, first)


def _replace(graph: fx.Graph, node: fx.Node, by: _Reduction) -> None:
    """Let a node be a reduction; a view of it where some axes are kept and others are not."""
    value, whole, dims = node.meta["val"], by.source.meta["val"].shape, sorted(by.dims)
    kept = [1 if k in by.dims else n for k, n in enumerate(whole)]
    given = (by.source, *by.order, dims)
    if value.dim() in (len(whole), len(whole) - len(dims)):
        node.target, node.args = by.target, (*given, value.dim() == len(whole))
        return
    with graph.inserting_before(node):
        both = graph.call_function(by.target, (*given, True))
    both.meta.update(node.meta, val=value.reshape(kept))
    node.target, node.args = aten.view.default, (both, list(value.shape))


def _reduction(node: fx.Node, read: Collection[str]) -> _Reduction | None:
    """What a node computes, if that is a symmetric function over axes, and nothing but its value is used."""
    call, args = node, cast(Any, node.args)
    if node.target is operator.getitem:
        call = args[0]
        places = (n for n in call.users if n.args[1] == 1)
        if call.target not in _PAIRS or args[1] != 0 or any(n.users or n.name in read for n in places):
            return None
    elif node.target in _PAIRS:
        return None
    if call.target not in _BY_DIMS or call.kwargs:
        return None
    given: Any = call.args
    source, rest = given[0], list(given[1:])
    rank = source.meta["val"].dim()
    order = (rest.pop(0) if rest else 2,) if call.target is aten.linalg_vector_norm.default else ()
    if len(rest) > 2 or not rank:
        return None
    dims, keepdim = rest + [None, False][len(rest) :]
    over = {d % rank for d in ([dims] if isinstance(dims, int) else dims or range(rank))}
    return _Reduction(_BY_DIMS[call.target], source, frozenset(over), bool(keepdim), order)
