"""What a node of a traced graph is: a parameter, a random draw, or a constant."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx

ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def is_state(tensor: torch.Tensor) -> bool:
    """Whether a state-dict tensor is a block of numbers (integer and boolean buffers are constants)."""
    return tensor.is_floating_point() or tensor.is_complex()


def draws(node: fx.Node) -> bool:
    """Whether an operator draws random numbers, anew in every pass; attention does for its dropout."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    dropout: Any = node.args[3] if len(node.args) > 3 else 0.0
    return node.target is not ATTENTION or dropout != 0


def is_constant(node: fx.Node, known: Collection[fx.Node]) -> bool:
    """Whether a node depends neither on inputs nor on parameters.

    Args:
        node: of a traced graph.
        known: those before it that do not.
    """
    if node.op == "placeholder":
        return node.meta["kind"] == "state" and not is_state(node.meta["val"])
    return node.op != "output" and not draws(node) and all(n in known for n in node.all_input_nodes)


def constants(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that depend neither on inputs nor on parameters."""
    out: set[fx.Node] = set()
    for node in graph.nodes:
        if is_constant(node, out):
            out.add(node)
    return out
