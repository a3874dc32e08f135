"""PyTorch's own decompositions, as small graphs in place of one node."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx

from automerge._errors import TraceError


@functools.cache
def _table() -> dict[Any, Any]:
    from torch._decomp import decomposition_table

    return dict(decomposition_table)


def decomposition(node: fx.Node) -> fx.GraphModule | None:
    """The pieces of a node's operator as a graph over its tensor inputs, or None if PyTorch knows none.

    The placeholders correspond to ``node.all_input_nodes``, in order.
    """
    from automerge.trace import record

    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return None
    function = _table().get(target)
    if function is None:
        if not target._can_decompose():
            return None
        function = target.decompose
    inputs = node.all_input_nodes
    if not all(isinstance(n.meta["val"], torch.Tensor) for n in inputs):
        return None

    def call(*tensors: torch.Tensor) -> Any:
        lookup = dict(zip(inputs, tensors, strict=True))
        args = fx.node.map_arg(node.args, lookup.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, lookup.__getitem__)
        return function(*args, **kwargs)

    try:
        graph = record(
            call,
            [n.meta["val"] for n in inputs],
            module=node.meta.get("module", ""),
            source=node.meta.get("source", ""),
        )
    except (TraceError, NotImplementedError, RuntimeError, TypeError, AssertionError, ValueError, AttributeError):
        return None
    if graph.meta["trace"].reads or any(n.target is target for n in graph.graph.nodes):  # a read: of zeros, perhaps
        return None
    return graph
