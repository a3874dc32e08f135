"""Which entries of a parameter the traced pass reads at all.

A table of 1024 positions of which short example inputs read five has 1019 rows that nothing constrains. They are no
freedom: on longer inputs they are read as the five are. So what is not read stays where it is along the axis that is cut,
and keeps the order of what is read along the others.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx


def _aten(*names: str) -> frozenset[str]:
    return frozenset(f"aten::{name}" for name in names)


_CUTTING = _aten(
    *("slice", "select", "index", "index_select", "embedding", "narrow", "split", "split_with_sizes", "unbind"),
    *("slice_copy", "select_copy", "narrow_copy", "split_copy", "split_with_sizes_copy", "unbind_copy"),
    *("gather", "take", "diagonal", "unfold", "as_strided", "constant_pad_nd"),
)
_MOVING = _CUTTING | _aten(
    *("view", "_unsafe_view", "reshape", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "repeat"),
    *("flip", "roll", "contiguous", "flatten", "unflatten", "movedim", "diagonal", "cat", "stack", "unfold"),
)
_PRODUCTS = _aten("mm", "bmm", "mv", "addmm", "baddbmm", "addmv", "dot", "matmul")
_SAME = _aten("clone", "_to_copy", "to", "lift_fresh_copy", "detach", "alias")


def unread(
    graph: fx.GraphModule,
    live: Collection[fx.Node],
    constant: Collection[fx.Node],
    looked: Collection[fx.Node],
    states: Collection[str],
) -> dict[str, np.ndarray]:
    """For every parameter that is only read in part: which of its entries are not, a boolean array of its shape.

    What is read is followed back from where it meets the inputs, through what is made of parameters alone.

    Args:
        graph: the traced graph.
        live: the nodes that the output depends on.
        constant: the nodes that depend on nothing but constants; their values are there.
        looked: the nodes whose values python read.
        states: the names of the parameters.
    """
    nodes = [n for n in graph.graph.nodes if n in live]
    own: set[fx.Node] = set()
    for node in nodes:
        if node.op == "placeholder" and node.meta.get("name") in states:
            own.add(node)
        elif node.op == "call_function" and not own.isdisjoint(sources := node.all_input_nodes):
            own.update([node] if all(n in own or n in constant for n in sources) else [])
    inner: set[fx.Node] = set()
    todo = [n for n in own if _name(n) in _CUTTING or _selects(n, constant)]
    while todo:
        node = todo.pop()
        if node not in inner:
            inner.add(node)
            todo += [n for n in node.all_input_nodes if n in own]
    back = _Back(inner, live, looked, {})
    for node in reversed(nodes):
        if node in inner:
            back.visit(node)
    out: dict[str, np.ndarray] = {}
    for node in inner:
        if node.op == "placeholder" and not bool(back.needed[node].all()):
            out[node.meta["name"]] = ~back.needed[node].numpy()
    return dict(sorted(out.items()))


def _name(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return schema.name if schema is not None else ""


def _selects(node: fx.Node, constant: Collection[fx.Node]) -> bool:
    """Whether an operator that is not known to cut may leave out something of its operand.

    A product with a constant does where its coefficients are zero (one-hot rows); others, where less comes out than went in.
    """
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor) or torch.Tag.reduction in getattr(node.target, "tags", ()):
        return False
    if _name(node) in _MOVING or torch.Tag.pointwise in getattr(node.target, "tags", ()) or _chooses(node):
        return False
    sources = [n.meta["val"] for n in node.all_input_nodes if n not in constant]
    smaller = any(isinstance(v, torch.Tensor) and v.numel() > value.numel() for v in sources)
    return smaller or (_name(node) in _PRODUCTS and any(n in constant for n in node.all_input_nodes))


def _chooses(node: fx.Node) -> bool:
    """Whether an operator picks some of the entries by their values: with other values it picks others."""
    return any(word in _name(node) for word in ("max", "min", "sort", "top", "median", "mode", "kth", "quantile"))


@dataclass(frozen=True)
class _Back:
    """Which entries of the values in ``inner`` are needed; for several outputs, a list."""

    inner: Collection[fx.Node]
    live: Collection[fx.Node]
    looked: Collection[fx.Node]
    needed: dict[fx.Node, Any]

    def visit(self, node: fx.Node) -> None:
        value = node.meta["val"]
        users = [u for u in node.users if u in self.live]
        if not isinstance(value, torch.Tensor):
            masks = [torch.zeros(v.shape, dtype=torch.bool) if isinstance(v, torch.Tensor) else None for v in value]
            for user in users:
                which: Any = user.args[1] if user.target is operator.getitem else slice(None)
                for mask in [masks[which]] if isinstance(which, int) else masks:
                    if mask is not None:
                        mask |= self.needed[user] if user in self.inner else True
            self.needed[node] = masks
            return
        mask = torch.zeros(value.shape, dtype=torch.bool)
        for user in users:
            mask |= self.asked(user, node) if user in self.inner and user.target is not operator.getitem else True
        self.needed[node] = mask | (node in self.looked)

    def asked(self, user: fx.Node, node: fx.Node) -> Any:
        """Which entries of a node its user needs; True for all."""
        name, needed = _name(user), self.needed[user]
        try:
            if name in _SAME or torch.Tag.pointwise in getattr(user.target, "tags", ()):
                return needed.float().sum_to_size(tuple(node.meta["val"].shape)) > 0
            if name in _MOVING:
                return self._moved(user, node, needed)
            if torch.Tag.reduction not in getattr(user.target, "tags", ()) and not _chooses(user):
                return self._mixed(user, node, needed)
        except Exception:  # an operator that refuses integers, a shape that is not known
            return True
        return True

    @staticmethod
    def _mixed(user: fx.Node, node: fx.Node, needed: Any) -> torch.Tensor:
        """What any other operator takes of an operand: where the derivative of what is needed is not zero.

        Where it is zero by chance, something that is read stays in place, which is sound.
        """
        rng = torch.Generator().manual_seed(0)
        leaf = torch.rand(tuple(node.meta["val"].shape), generator=rng, dtype=torch.float64).requires_grad_()

        def known(n: fx.Node) -> Any:
            value = n.meta["val"]
            if n is node:
                return leaf
            if not value.is_floating_point():
                return value
            drawn = torch.rand(value.shape, generator=rng, dtype=torch.float64) + 0.5
            return drawn if value.is_meta or n.op == "placeholder" else value.detach().cpu().double()

        with torch.enable_grad():
            out = user.target(*fx.node.map_arg(user.args, known), **fx.node.map_arg(user.kwargs, known))  # type: ignore[operator]
            weight = torch.rand(out.shape, generator=rng, dtype=torch.float64) + 0.5
            return torch.autograd.grad((out * weight * needed).sum(), leaf)[0] != 0

    @staticmethod
    def _moved(user: fx.Node, node: fx.Node, needed: Any) -> torch.Tensor:
        """Send the numbers of the entries along, and see which ones arrive where something is needed."""
        shape = tuple(node.meta["val"].shape)
        if _name(user) == "aten::as_strided" and not node.meta["val"].is_contiguous():
            return torch.ones(shape, dtype=torch.bool)
        out = torch.zeros(node.meta["val"].numel(), dtype=torch.bool)

        def known(n: fx.Node) -> Any:
            if n is node:
                return torch.arange(out.numel()).reshape(shape)
            value = n.meta["val"]
            return torch.full(value.shape, -1) if value.is_floating_point() or value.is_complex() else value

        args = user.args if _name(user) != "aten::constant_pad_nd" else (*user.args[:2], -1)
        moved = user.target(*fx.node.map_arg(args, known), **fx.node.map_arg(user.kwargs, known))  # type: ignore[operator]
        for numbers, mask in zip(*([moved], [needed]) if torch.is_tensor(moved) else (moved, needed), strict=True):
            if mask is not None:
                arrived = numbers[mask]
                out[arrived[arrived >= 0]] = True
        return out.reshape(shape)
