"""Numbers in activations that no input decides: first states, padding, what is joined to features or multiplied with zero.

They are as constants are, in tensors that are formed like one that depends on inputs, or hold other numbers besides.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import torch
from torch import fx

from automerge.rules._nodes import aten_names, schema_name

Known = Mapping[fx.Node, torch.Tensor]

_ZEROS = aten_names("zeros_like", "new_zeros", "empty_like", "new_empty", "new_empty_strided", "zero")
_ONES = aten_names("ones_like", "new_ones")
_FULL = {"aten::full_like": 1, "aten::fill": 1, "aten::new_full": 2}  # the argument that has the number
_JOINS = aten_names("cat", "stack")
_PIECES = aten_names("split", "split_with_sizes", "unbind")
_VIEWS = aten_names("view", "_unsafe_view", "reshape")
_MOVING = aten_names(
    *("constant_pad_nd", "slice", "select", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "repeat"),
    *("flip", "clone", "_to_copy", "detach", "alias"),
)
_NUMERIC = aten_names("add", "sub", "rsub", "mul", "neg", "tanh", "sigmoid")
_FACTORS = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::baddbmm": 1}  # the first of the two
_MOST = 4_000_000
_ONE = torch.ones(())


def known_numbers(nodes: Sequence[fx.Node], constant: Collection[fx.Node], own: Collection[fx.Node]) -> Known:
    """What is known of the numbers of nodes that are no constants: NaN where nothing is.

    Args:
        nodes: in order of execution.
        constant: those that depend on nothing but constants; their values are there.
        own: those of parameters alone, which are not looked at.
    """
    out: dict[fx.Node, torch.Tensor] = {}
    for node in nodes:
        if node in constant or node.op != "call_function" or not _floats(node) or node.meta["val"].numel() > _MOST:
            continue
        try:
            value = formed(node)
            value = _computed(node, constant, out) if value is None and node not in own else value
        except Exception:  # an operator that does not run on these
            continue
        if value is not None and value.shape == node.meta["val"].shape and not bool(value.isnan().all()):
            out[node] = value
    return out


def _floats(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def formed(node: fx.Node) -> torch.Tensor | None:
    """What is made in the form of another tensor, whose numbers do not count."""
    name = schema_name(node)
    number: Any = 0.0 if name in _ZEROS else 1.0 if name in _ONES else None
    if name in _FULL:
        number = node.args[_FULL[name]]
    if not isinstance(number, bool | int | float):
        return None
    return torch.tensor(float(number), dtype=torch.float64).expand(node.meta["val"].shape)


def _computed(node: fx.Node, constant: Collection[fx.Node], known: Known) -> torch.Tensor | None:
    """What an operator makes of numbers some of which are known."""
    name, args = schema_name(node), node.args
    if node.target is operator.getitem:
        return _piece(cast(fx.Node, args[0]), cast(int, args[1]), known)
    sources = node.all_input_nodes
    if name not in _JOINS | _VIEWS | _MOVING | _NUMERIC or not all(_floats(n) for n in sources):
        return None
    fixed = {n: n.meta["val"].detach().cpu().double() for n in sources if n in constant}
    begins = name == "aten::constant_pad_nd" or (name in _JOINS and fixed)
    # (some zeros are a mask: the units that it leaves out have an order)
    begins = begins or (name == "aten::mul" and any(bool((v == 0).all()) for v in fixed.values()))
    if not begins and known.keys().isdisjoint(sources):
        return None

    def given(n: fx.Node) -> torch.Tensor:
        found = fixed.get(n, known.get(n))
        return torch.full(n.meta["val"].shape, torch.nan, dtype=torch.float64) if found is None else found

    if name in _VIEWS:
        return given(sources[0]).reshape(node.meta["val"].shape)
    operands, options = fx.node.map_arg(args, given), fx.node.map_arg(node.kwargs, given)
    value: torch.Tensor = node.target(*operands, **options)  # type: ignore[operator]
    if name == "aten::mul":
        for factor in (given(n) for n in sources if n in known or bool((fixed.get(n, _ONE) == 0).all())):
            value = value.masked_fill(factor == 0, 0.0)
    return value.double()


def _piece(node: fx.Node, number: int, known: Known) -> torch.Tensor | None:
    """One of several outputs."""
    source = cast(fx.Node, node.args[0])
    if schema_name(node) not in _PIECES or source not in known:
        return None
    pieces: Sequence[torch.Tensor] = node.target(known[source], *node.args[1:], **node.kwargs)  # type: ignore[operator]
    return pieces[number]


def alike(user: fx.Node, node: fx.Node, known: Known) -> torch.Tensor | None:
    """The positions along the axis over which a product sums that meet zeros in its other factor, or the same as others do.

    What stands there does not show, or not in which order: a recurrent matrix and its first state.

    Args:
        user: the product.
        node: one of its factors.
        known: from `known_numbers`.

    Returns:
        bool, of a shape that can be broadcast to that of ``node``; None if there are none.
    """
    name, args = schema_name(user), cast(Any, user.args)
    if name == "aten::convolution":
        if args[1] is not node or args[0] not in known or args[6] or args[8] != 1:
            return None
        rows, axis = known[args[0]].movedim(1, 0).flatten(1), 1
    else:
        first = _FACTORS.get(name)
        if first is None or (args[first] is node) == (args[first + 1] is node):
            return None
        right = args[first + 1] is node
        other = args[first] if right else args[first + 1]
        if other not in known:
            return None
        rows = known[other].movedim(-1 if right else -2, 0).flatten(1)
        axis = -2 if right else -1
    found = _repeated(rows)
    rank = node.meta["val"].dim()
    return found.view([-1 if k == axis % rank else 1 for k in range(rank)]) if bool(found.any()) else None


def _repeated(rows: torch.Tensor) -> torch.Tensor:
    """Which rows are known and zero, or known and the same as another one."""
    whole = ~rows.isnan().any(1)
    out = whole & (rows == 0).all(1)
    rest = torch.nonzero(whole & ~out).flatten()
    if len(rest) > 1:
        _, which, count = rows[rest].unique(dim=0, return_inverse=True, return_counts=True)
        out[rest[count[which] > 1]] = True
    return out
