"""What no output depends on but by a test that python makes of all entries.

The argument checks of ``torch.distributions`` ask whether all scales are positive, which has no order. Where a policy acts
by the mean, nothing in the pass then tells which unit of the mean a scale belongs to: so the scales stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from automerge.rules._nodes import aten_names, is_state, schema_name

_WHOLE = aten_names("all", "any", "_is_all_true", "_is_any_true", "amin", "amax", "min", "max")


def tested(reads: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
    """The values that tests of all their entries read, and the operator that tests each.

    Args:
        reads: the nodes whose values python read.
    """
    out = dict[fx.Node, fx.Node]()
    todo, seen = [n for n in reads if _tests(n)], set[fx.Node]()
    while todo:
        node = todo.pop()
        seen.add(node)
        for source in node.all_input_nodes:
            if _tests(source):
                todo += [source] if source not in seen else []
            elif is_state(source.meta["val"]):
                out[source] = node
    return out


def _tests(node: fx.Node) -> bool:
    """Whether it is a test of every entry, or of all of them."""
    if node.op != "call_function" or not isinstance(node.meta["val"], torch.Tensor):
        return False
    every = torch.Tag.pointwise in getattr(node.target, "tags", ()) and node.meta["val"].dtype is torch.bool
    return every or schema_name(node) in _WHOLE
