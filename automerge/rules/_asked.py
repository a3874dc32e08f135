"""What no output depends on, but a value that python reads.

The argument checks of ``torch.distributions`` ask whether all scales are positive, and a network that leaves early asks
for the entropy of what its first head says: neither has an order. Where a policy acts by the mean, or the pass does not
leave, nothing in it then tells which unit of the mean a scale belongs to, or which class a row of the head is of: they
stay as they are. What was computed on the way with further parameters (the hidden units of such a head) has its order
in these, and moves.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from automerge.rules._nodes import is_state


def asked(reads: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
    """The last values on the way to what python reads that were computed with parameters, and the read.

    Of what is made of parameters alone: these.

    Args:
        reads: the nodes whose values python read.
    """
    out = dict[fx.Node, fx.Node]()
    own: dict[fx.Node, bool] = {}
    seen = set[fx.Node]()
    for read in reads:
        todo = [read]
        while todo:
            node = todo.pop()
            if node in seen or node.op not in ("call_function", "placeholder"):
                continue
            seen.add(node)
            beside = any(_weights(n, own) and _many(n) for n in node.all_input_nodes)
            if (beside and not _weights(node, own)) or (node.op == "placeholder" and _weights(node, own)):
                out[node] = read
            else:
                todo += node.all_input_nodes
    return out


def _weights(node: fx.Node, own: dict[fx.Node, bool]) -> bool:
    """Whether a value is made of parameters alone."""
    todo = [node]
    while todo:
        one = todo[-1]
        inputs = [n for n in one.all_input_nodes if n not in own]
        if one.op == "call_function" and inputs:
            todo += inputs
            continue
        todo.pop()
        if one.op == "placeholder":
            own[one] = one.meta["kind"] == "state" and is_state(one.meta["val"])
        else:
            own[one] = bool(one.all_input_nodes) and all(own[n] for n in one.all_input_nodes)
    return own[node]


def _many(node: fx.Node) -> bool:
    """Whether it has more than one number: a temperature has no units."""
    value = node.meta["val"]
    return not hasattr(value, "numel") or value.numel() > 1
