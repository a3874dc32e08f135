"""Squared distances that are computed as |a|^2 + |b|^2 - 2 ab: below zero only by rounding, zero only by coincidence."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import fx

from automerge.rules._nodes import aten_names, schema_name
from automerge.rules._reads import MOVING, SAME

_SMALL, _LARGEST = 1e-4, 20_000_000
_PRODUCTS = aten_names("mm", "bmm", "mv", "matmul")
_FLOORS = aten_names("clamp", "clamp_min", "relu")
_JOINING = aten_names("cat", "stack")
_Term = tuple[float, fx.Node]


def floored_distance(node: fx.Node) -> bool:
    """Whether a node is a squared distance that is kept from falling below zero, or below a small number."""
    name, args = schema_name(node), node.args
    if name not in _FLOORS or (name == "aten::clamp" and (node.kwargs.get("max") or args[2:] not in ((), (None,)))):
        return False
    least = 0.0 if name == "aten::relu" else args[1] if len(args) > 1 else node.kwargs.get("min")
    return isinstance(least, int | float) and least <= _SMALL and _is_distance(args[0])


def _is_distance(node: Any) -> bool:
    """Whether a node is the sum of the squares of two tensors, less twice their product."""
    terms = _terms(node, 1.0) if isinstance(node, fx.Node) else []
    products = [(k, n) for k, n in terms if schema_name(n) in _PRODUCTS]
    squares = [_squared(n) for k, n in terms if k == 1.0 and schema_name(n) not in _PRODUCTS]
    if len(products) != 1 or len(squares) != 2 or len(terms) != 3:
        return False
    factor, product = products[0]
    sides = [_plain(n) for n in product.all_input_nodes]
    if len(sides) == 1:
        sides *= 2  # with itself
    ends = {n for _, n in sides}
    return factor * sides[0][0] * sides[1][0] == -2.0 and set(squares) == ends and _is_its_gradient(node, ends)


def _is_its_gradient(node: fx.Node, ends: set[fx.Node]) -> bool:
    """Whether entries are an eighth of the squares of their gradients, as (a - b)^2 is: then they are never below zero.

    Tried on random numbers, which a sum of other squares and products does not stand.
    """
    if node.meta["val"].numel() > _LARGEST:
        return False
    rng = torch.Generator().manual_seed(0)
    with contextlib.suppress(Exception), torch.enable_grad():  # an operator that refuses these numbers
        values: dict[fx.Node, torch.Tensor] = {
            n: torch.randn(n.meta["val"].shape, generator=rng, dtype=torch.float64).requires_grad_() for n in ends
        }
        entries = _evaluated(node, values).flatten()
        for k in torch.randint(entries.numel(), (8,), generator=rng).tolist():
            found = torch.autograd.grad(entries[k], list(values.values())[: len(ends)], retain_graph=True)
            if not torch.isclose(sum((g**2).sum() for g in found) / 8, entries[k], rtol=1e-3, atol=1e-6):  # type: ignore[arg-type]
                return False
        return True
    return False


def _evaluated(node: fx.Node, values: dict[fx.Node, torch.Tensor]) -> torch.Tensor:
    """What a node is where others, that it is made from, have these values."""
    todo = [node]
    while todo:
        one = todo[-1]
        missing = [n for n in one.all_input_nodes if n not in values]
        if one not in values and not missing:
            args, kwargs = fx.node.map_arg((one.args, one.kwargs), lambda n: values[n])
            values[one] = one.target(*args, **kwargs) if callable(one.target) else one.meta["val"].cpu()
        if one in values:
            todo.pop()
        todo += missing
    return values[node]


def _terms(node: Any, factor: float) -> list[_Term]:
    """What a sum is made of."""
    k, node = _plain(node)
    name, args = schema_name(node), node.args
    if name not in ("aten::add", "aten::sub", "aten::rsub") or not all(isinstance(a, fx.Node) for a in args[:2]):
        return [(factor * k, node)]
    alpha: Any = node.kwargs.get("alpha", args[2] if len(args) > 2 else 1)
    first, second = (args[1], args[0]) if name == "aten::rsub" else args[:2]
    sign = alpha if name == "aten::add" else -alpha
    return _terms(first, factor * k) + _terms(second, factor * k * sign)


def _plain(node: Any) -> _Term:
    """What a node is a view or a multiple of, and how many times that."""
    factor = 1.0
    while isinstance(node, fx.Node) and node.op == "call_function":
        name, args = schema_name(node), node.args
        number = args[1] if len(args) > 1 else None
        if name in (MOVING | SAME) - _JOINING and len(node.all_input_nodes) == 1:
            node = args[0]
        elif name == "aten::neg":
            factor, node = -factor, args[0]
        elif name == "aten::mul" and (times := _number(number)) is not None:
            factor, node = factor * times, args[0]
        else:
            break
    return factor, node


def _number(value: Any) -> float | None:
    """A number, be it a constant of one entry."""
    if isinstance(value, fx.Node):
        held = value.meta.get("val")
        if value.op != "get_attr" or not isinstance(held, torch.Tensor) or held.numel() != 1 or held.is_complex():
            return None
        return float(held)
    return float(value) if isinstance(value, int | float) else None


def _squared(node: fx.Node) -> fx.Node | None:
    """What the squares are of that a node is the sum of."""
    if schema_name(node) != "aten::sum":
        return None
    inner: Any = node.args[0]
    name, args = schema_name(inner), inner.args
    twice = (name == "aten::pow" and args[1] == 2) or (name == "aten::mul" and args[0] is args[1])
    if name != "aten::square" and not twice:
        return None
    factor, found = _plain(args[0])
    return found if abs(factor) == 1.0 else None
