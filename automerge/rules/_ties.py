"""Scores that are equal for more than an accident: the first of them is chosen, which another order of the axis changes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from automerge.rules._distances import floored_distance
from automerge.rules._known import formed
from automerge.rules._nodes import aten_names, schema_name
from automerge.rules._reads import MOVING, SAME
from automerge.rules._unsorted import zeros_matter

ORDERED = "ordered"  # in the meta of a graph: whatever is chosen from keeps its order

_STEPS = aten_names(
    *(
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
        "sign",
        "sgn",
        "round",
        "floor",
        "ceil",
        "trunc",
        "fix",
        "heaviside",
        "isnan",
    ),
    *(
        "logical_and",
        "logical_or",
        "logical_not",
        "logical_xor",
        "bitwise_and",
        "bitwise_or",
        "bitwise_not",
        "isfinite",
    ),
    "count_nonzero",
)
_RECTIFIED = aten_names(
    *("relu", "clamp", "clamp_min", "hardtanh", "hardsigmoid", "hardswish", "threshold", "softshrink", "hardshrink"),
)
_CAPPED = aten_names("minimum", "maximum", "fmin", "fmax", "clamp_max")
_PRODUCTS = aten_names("mm", "bmm", "mv", "matmul", "dot")
_SUMS = aten_names("add", "sub", "rsub")
_OVER_ROWS = aten_names("sum", "mean", "amax", "amin", "cumsum", "_softmax", "_log_softmax", "native_layer_norm")

_NEVER, _ZERO, _EQUAL = 0, 1, 2  # what may be equal: nothing, entries that are zero, others
_DEEP = 200


def tied(node: Any, axis: int) -> bool:
    """Whether scores are equal by the way they are made, so that it matters which of them is chosen.

    Steps of others (comparisons, roundings, counts of these), products with zeros, what is capped; rectified ones where those
    that are zero count, too. In a graph that is ``ORDERED``, any.

    Args:
        node: the choice.
        axis: along which it chooses.
    """
    module = node.graph.owning_module
    if module is not None and module.meta.get(ORDERED):
        return True
    found = _equal(node.args[0], {}, _DEEP) if isinstance(node.args[0], fx.Node) else _NEVER
    return found == _EQUAL or (found == _ZERO and zeros_matter(node, axis))


def _equal(node: fx.Node, known: dict[fx.Node, int], deep: int) -> int:
    if node not in known:
        known[node] = _NEVER if node.op != "call_function" or not deep else _made_equal(node, known, deep - 1)
    return known[node]


def _made_equal(node: fx.Node, known: dict[fx.Node, int], deep: int) -> int:
    """What an operator makes equal of what its operands are."""
    name, sources = schema_name(node), node.all_input_nodes
    if name in _STEPS or (name in _PRODUCTS | {"aten::mul"} and any(map(_is_zero, sources))):
        return _EQUAL
    alike = name in _OVER_ROWS | MOVING | SAME or torch.Tag.pointwise in getattr(node.target, "tags", ())
    if not alike and name not in _RECTIFIED | _CAPPED | _SUMS:
        return _NEVER
    varied = [n for n in sources if not _is_uniform(n, node)]
    kinds = [_equal(n, known, deep) for n in varied]
    if name in _RECTIFIED:
        return _NEVER if floored_distance(node) else max([_ZERO, *kinds])
    if name in _CAPPED:
        return _EQUAL if len(varied) < len(sources) or name == "aten::clamp_max" else max(kinds)
    if name == "aten::mul":
        return min(_ZERO, max(kinds)) if _NEVER in kinds else max(kinds, default=_NEVER)
    if name in _SUMS:
        return min(kinds, default=_NEVER)
    return kinds[0] if len(kinds) == 1 else _NEVER


def _is_uniform(node: fx.Node, user: fx.Node) -> bool:
    """Whether an operand is one number, or as many as are broadcast, or the same number everywhere."""
    value, out = node.meta.get("val"), user.meta.get("val")
    if not isinstance(value, torch.Tensor) or not isinstance(out, torch.Tensor):
        return False
    if schema_name(user) in _CAPPED and value.shape != out.shape:
        return True
    return value.numel() == 1 < out.numel() or (node.op == "call_function" and formed(node) is not None)


def _is_zero(node: fx.Node) -> bool:
    """Whether a node holds zeros for all inputs: a constant, or zeros in the form of something."""
    while schema_name(node) in MOVING | SAME and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    shaped = formed(node) if node.op == "call_function" else None
    value = node.meta.get("val") if shaped is None else shaped
    known = isinstance(value, torch.Tensor) and value.is_floating_point() and not value.is_meta and value.numel() > 0
    return known and node.op == "call_function" and not bool(value.any())
