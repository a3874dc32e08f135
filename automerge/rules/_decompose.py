"""PyTorch's own decompositions, as small graphs in place of one node."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx

from automerge._errors import TraceError

aten = torch.ops.aten


@functools.cache
def _table() -> dict[Any, Any]:
    from torch._decomp import decomposition_table

    return {
        **decomposition_table,
        aten._scaled_dot_product_flash_attention_for_cpu_backward.default: attention_backward,
    }


def attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    normaliser: torch.Tensor,
    dropout: float,
    causal: bool,
    *,
    attn_mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of softmax(q k^T scale + mask) v, with the weights computed anew."""
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    scores = q @ k.mT * factor
    if attn_mask is not None:
        hidden = attn_mask.dtype is torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if hidden else scores + attn_mask
    if causal:
        ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(ahead, -torch.inf)
    weights = scores.softmax(-1)
    moved = weights * (grad @ v.mT - (grad * out).sum(-1, keepdim=True)) * factor
    return moved @ k, moved.mT @ q, weights.mT @ grad


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
