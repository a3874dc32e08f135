"""Whether a recorded pass may hide something behind a length of one, without looking at longer inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import fx

from automerge.rules._nodes import aten_names, schema_name

_VIEWS = aten_names("view", "reshape", "_unsafe_view", "_reshape_alias")


def hides(graph: fx.GraphModule) -> bool:
    """Whether some operator would do something else on longer inputs, or some table is of one row, made out of sight.

    Where a view takes an axis of length one elsewhere, it may mix what is on either side of a longer one.
    """
    return any(_one_row(node) or _mixes(node) for node in graph.graph.nodes)


def _one_row(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if node.op != "get_attr" or not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return False  # (of whole numbers most are the positions of the longest input)
    return 1 in value.shape and value.numel() > 1


def _mixes(node: fx.Node) -> bool:
    if node.op != "call_function" or schema_name(node) not in _VIEWS or not node.all_input_nodes:
        return False
    old, new = (_ones(n.meta["val"].shape) for n in (node.all_input_nodes[0], node))
    return bool(old - new and new - old)


def _ones(shape: Sequence[int]) -> set[int]:
    """Where the axes of length one are: how many entries the axes before them have."""
    return {math.prod(shape[:k]) for k, n in enumerate(shape) if n == 1}
