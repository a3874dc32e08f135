"""Which entries of a value are needed, followed backwards from where some of them are cut away."""

from __future__ import annotations

import operator
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import fx

from automerge.rules._known import Known, alike
from automerge.rules._nodes import aten_names, schema_name

CUTTING = aten_names(
    *("slice", "select", "index", "index_select", "embedding", "narrow", "split", "split_with_sizes", "unbind"),
    *("slice_copy", "select_copy", "narrow_copy", "split_copy", "split_with_sizes_copy", "unbind_copy"),
    *("gather", "take", "diagonal", "unfold", "as_strided", "constant_pad_nd"),
)
MOVING = CUTTING | aten_names(
    *("view", "_unsafe_view", "reshape", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "repeat"),
    *("flip", "roll", "contiguous", "flatten", "unflatten", "movedim", "diagonal", "cat", "stack", "unfold"),
)
_TABLES = aten_names("slice", "narrow", "index_select", "select", "embedding", "index", "gather")
_VIEWS = aten_names(
    *("slice", "select", "narrow", "split", "split_with_sizes", "unbind", "diagonal"),
    *("view", "permute", "transpose", "t", "unsqueeze", "squeeze", "alias", "detach"),
)
_PIECES = aten_names("split", "split_with_sizes", "unbind", "split_copy", "split_with_sizes_copy", "unbind_copy")
PRODUCTS = aten_names("mm", "bmm", "mv", "addmm", "baddbmm", "addmv", "dot", "matmul")
_CHOOSING = re.compile("max|min|sort|top|median|mode|kth|quantile")
_MAX_MIXED = 4_000_000
SAME = aten_names("clone", "_to_copy", "to", "lift_fresh_copy", "detach", "alias")


def chooses(node: fx.Node) -> bool:
    """Whether an operator picks some of the entries by their values: with other values it picks others."""
    return _CHOOSING.search(schema_name(node)) is not None


@dataclass(frozen=True)
class Back:
    """Which entries of a value are needed, where not all are; for several outputs, a list."""

    cuts: Collection[fx.Node]
    own: Collection[fx.Node]
    constant: Collection[fx.Node]
    live: Collection[fx.Node]
    needed: dict[fx.Node, Any]
    known: Known = field(default_factory=dict)
    hidden: set[fx.Node] = field(default_factory=set)  # factors of products with known numbers

    def visit(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        users = [u for u in node.users if u in self.live]
        if not isinstance(value, torch.Tensor):
            self.pieces(node, users)
            return
        if value.numel() == 0 or any(u not in self.cuts and u not in self.needed for u in users):
            return
        mask = torch.zeros(value.shape, dtype=torch.bool)
        for user in users:
            mask |= self.asked(user, node)
            if bool(mask.all()):
                return
        self.needed[node] = mask

    def pieces(self, node: fx.Node, users: Sequence[fx.Node]) -> None:
        """What is needed of several outputs: of pieces that a tensor is cut in, and of a normalisation beside its mean."""
        read = {u.args[1]: u for u in users if u.target is operator.getitem}
        unread = schema_name(node) in _PIECES and len(read) < len(node.meta["val"])
        if unread or not self.needed.keys().isdisjoint(read.values()):
            self.needed[node] = [
                self.all_of(read[i]) if i in read else torch.zeros(v.shape, dtype=torch.bool)
                for i, v in enumerate(node.meta["val"])
            ]

    def all_of(self, node: fx.Node) -> Any:
        """What is needed of a node."""
        found = self.needed.get(node)
        return torch.ones(node.meta["val"].shape, dtype=torch.bool) if found is None else found

    def asked(self, user: fx.Node, node: fx.Node) -> Any:
        """Which entries of a node its user needs; True for all, False for none."""
        name = schema_name(user)
        if name in _PIECES and user not in self.needed:
            return True
        needed = self.all_of(user)
        if torch.is_tensor(needed) and not bool(needed.any()):
            return False
        try:
            if name in SAME or torch.Tag.pointwise in getattr(user.target, "tags", ()):
                return needed.float().sum_to_size(tuple(node.meta["val"].shape)) > 0
            if name in _VIEWS:
                return _seen(user, node, needed)
            if any(not is_real(n) and n not in self.constant for n in user.all_input_nodes):
                return True  # places that depend on data
            if name in MOVING:
                return self._moved(user, node, needed)
            if torch.Tag.reduction in getattr(user.target, "tags", ()):
                return _summed(user, node, needed)
            if user not in self.own and name in _OPERANDS:
                hidden = alike(user, node, self.known)
                asked = _multiplied(user, node, needed)
                if hidden is None:
                    return asked
                self.hidden.add(node)
                return ~hidden.expand(node.meta["val"].shape) & asked
            if name == "aten::native_layer_norm":
                return _normalised(user, node, needed)
            if not chooses(user) and (user in self.own or node.meta["val"].numel() < _MAX_MIXED):
                return self._mixed(user, node, needed)
        except Exception:  # an operator that refuses integers, a shape that is not known
            return True
        return True

    def _mixed(self, user: fx.Node, node: fx.Node, needed: Any) -> torch.Tensor:
        """What any other operator takes of an operand: where the derivative of what is needed is not zero.

        Where it is zero by chance, something that is read stays in place, which is sound.
        """
        rng = torch.Generator().manual_seed(0)
        leaf = torch.rand(tuple(node.meta["val"].shape), generator=rng, dtype=torch.float64).requires_grad_()

        def known(n: fx.Node) -> Any:
            value = n.meta["val"]
            if n is node:
                return leaf
            if n in self.known and not bool(self.known[n].isnan().any()):
                return self.known[n]
            if not value.is_floating_point():
                return value
            drawn = torch.rand(value.shape, generator=rng, dtype=torch.float64) + 0.5
            return drawn if value.is_meta or n.op == "placeholder" else value.detach().cpu().double()

        with torch.enable_grad():
            out = user.target(*fx.node.map_arg(user.args, known), **fx.node.map_arg(user.kwargs, known))  # type: ignore[operator]
            total = torch.zeros((), dtype=torch.float64)
            for value, mask in zip(*([out], [needed]) if torch.is_tensor(out) else (out, needed), strict=True):
                if bool(mask.any()):
                    total = total + (value * mask * (torch.rand(mask.shape, generator=rng) + 0.5)).sum()
            return torch.autograd.grad(total, leaf)[0] != 0

    @staticmethod
    def _moved(user: fx.Node, node: fx.Node, needed: Any) -> torch.Tensor:
        """Send the numbers of the entries along, and see which ones arrive where something is needed."""
        shape = tuple(node.meta["val"].shape)
        if schema_name(user) == "aten::as_strided" and not node.meta["val"].is_contiguous():
            return torch.ones(shape, dtype=torch.bool)
        out = torch.zeros(node.meta["val"].numel(), dtype=torch.bool)

        def known(n: fx.Node) -> Any:
            if n is node:
                return torch.arange(out.numel()).reshape(shape)
            value = n.meta["val"]
            return torch.full(value.shape, -1) if value.is_floating_point() or value.is_complex() else value

        args = user.args if schema_name(user) != "aten::constant_pad_nd" else (*user.args[:2], -1)
        moved = user.target(*fx.node.map_arg(args, known), **fx.node.map_arg(user.kwargs, known))  # type: ignore[operator]
        for numbers, mask in zip(*([moved], [needed]) if torch.is_tensor(moved) else (moved, needed), strict=True):
            arrived = numbers[mask]
            out[arrived[arrived >= 0]] = True
        return out.reshape(shape)


def is_real(node: fx.Node) -> bool:
    value = node.meta["val"]
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def partly_read(node: fx.Node, live: Collection[fx.Node]) -> tuple[torch.Tensor, int, int] | None:
    """The constant table that a cut reads, if not all of it is read.

    Returns:
        The table, the axis that is cut, and how many axes of the cut take its place; None for anything else.
    """
    name, args = schema_name(node), cast(Any, node.args)
    if name not in _TABLES or not isinstance(args[0], fx.Node):
        return None
    source, table = args[0], args[0].meta["val"]
    dim, rank = (args[1] if len(args) > 1 and isinstance(args[1], int) else 0), 0 if name == "aten::select" else 1
    if name in ("aten::embedding", "aten::index"):
        given = (
            [(0, args[1])] if name == "aten::embedding" else [(k, i) for k, i in enumerate(args[1]) if i is not None]
        )
        if len(given) != 1 or given[0][1].meta["val"].dtype in (torch.bool, torch.uint8):
            return None
        dim, rank = given[0][0], given[0][1].meta["val"].dim()
    users = {u for u in source.users if u in live}
    if not all(schema_name(u) in CUTTING and u.args[0] is source for u in users):
        return None
    back = Back(users, (), {n for u in users for n in u.all_input_nodes}, live, {})
    mask = torch.zeros(table.shape, dtype=torch.bool)
    for user in users:
        mask |= back.asked(user, source)
    return None if bool(mask.all()) else (table, dim % table.dim(), rank)


def _seen(user: fx.Node, node: fx.Node, needed: Any) -> torch.Tensor:
    """Look at the entries through the view itself."""
    mask = torch.zeros(node.meta["val"].shape, dtype=torch.bool)
    views = user.target(mask, *user.args[1:], **user.kwargs)  # type: ignore[operator]
    for view, part in zip(*([views], [needed]) if torch.is_tensor(views) else (views, needed), strict=True):
        view |= part
    return mask


def _summed(user: fx.Node, node: fx.Node, needed: torch.Tensor) -> Any:
    """All that goes into an entry of a reduction that is needed."""
    shape = node.meta["val"].shape
    dims: Any = user.args[1] if len(user.args) > 1 else user.kwargs.get("dim")
    dims = [dims] if isinstance(dims, int) else dims
    if isinstance(dims, bool) or not dims:
        return True
    for k in sorted(d % len(shape) for d in dims) if needed.dim() < len(shape) else ():
        needed = needed.unsqueeze(k)
    return needed.expand(shape)


_OPERANDS = {  # which arguments are the factors of a product, and which axis of the output each of them lacks
    **{name: {0: -1, 1: -2} for name in aten_names("mm", "bmm")},
    **{name: {1: -1, 2: -2} for name in aten_names("addmm", "baddbmm")},
    "aten::convolution": {},
}


def _multiplied(user: fx.Node, node: fx.Node, needed: torch.Tensor) -> Any:
    """The rows and columns (or the filters) of a product that are needed."""
    places = [i for i, a in enumerate(user.args) if a is node]
    shape = tuple(node.meta["val"].shape)
    if len(places) != 1:
        return True
    if schema_name(user) == "aten::convolution":
        if (
            places == [0] or user.args[6]
        ):  # pixels are read by their neighbours; a transposed kernel has its inputs first
            return True
        filters = needed.any(0).flatten(1).any(1)
        return filters.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
    lacks = _OPERANDS[schema_name(user)].get(places[0])
    if lacks is None:
        return needed.float().sum_to_size(shape) > 0
    return needed.any(lacks, keepdim=True).expand(shape)


def _normalised(user: fx.Node, node: fx.Node, needed: Sequence[torch.Tensor]) -> Any:
    """The rows that are normalised, or the entries of weight and bias, behind what is needed of a layer norm."""
    places = [i for i, a in enumerate(user.args) if a is node]
    count = len(cast(Any, user.args[1]))
    if len(places) != 1:
        return True
    if places != [0]:
        return needed[0].flatten(0, -count - 1).any(0) if needed[0].dim() > count else needed[0]
    rows = needed[0].flatten(-count).any(-1)
    rows = rows.reshape(*rows.shape, *[1] * count) | needed[1] | needed[2]
    return rows.expand(needed[0].shape)
