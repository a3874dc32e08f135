"""Nodes that compute the same: one operator, called several times on the same operands (a layer on one input)."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import fx

from automerge.rules._nodes import draws


def twins(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """For every node the first one that computes the same, whatever the parameters and inputs are: often itself.

    A recorded graph writes to no operand, so that a function of the same operands is the same tensor.
    """
    known: dict[Hashable, fx.Node] = {}
    first: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        first[node] = known.setdefault(_key(node, first), node) if _is_function(node) else node
    return first


def _key(node: fx.Node, first: Mapping[fx.Node, fx.Node]) -> Hashable:
    return node.target, _plain(node.args, first), _plain(node.kwargs, first)


def _plain(given: Any, first: Mapping[fx.Node, fx.Node]) -> Hashable:
    if isinstance(given, fx.Node):
        return first[given]
    if isinstance(given, list | tuple):
        return tuple(_plain(one, first) for one in given)
    if isinstance(given, dict):
        return tuple((name, _plain(one, first)) for name, one in sorted(given.items()))
    return type(given), repr(given)  # for Python 1 and 1.0 and True are equal


def _is_function(node: fx.Node) -> bool:
    """Whether an operator gives the same for the same operands; nobody says so of those of other libraries.

    (A tensor without entries that the model holds twice, for sources and for targets, will be two when it is filled.)
    """
    if any(n.meta.get("unseen") for n in node.all_input_nodes):
        return False
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten":
        return False
    return not node.target._schema.is_mutable and not draws(node)
