"""What works on the rows that a mask chooses, computed for all rows, and whether that treats rows alike."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_map

from automerge._branches._distinct import EMPTY, ZEROS
from automerge._branches._joins import SORTS, aten, keeps_rows, order_of
from automerge._double import double_precision
from automerge._made_up import Draw, signed, small

SCATTERS = (aten.scatter_add.default, aten.scatter_reduce.two)
KEPT = (  # every row of places stays what it is
    *(aten.index.Tensor, aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.repeat.default),
    *(aten.expand.default, aten.floor_divide.default, aten.div.Tensor_mode, aten._to_copy.default, aten.clone.default),
)


@dataclass
class Choice:
    """What works on the rows that a mask chooses.

    Attributes:
        mask: the mask.
        closure: the nodes whose values have one row for every chosen position, in order.
        rows: those of them that matter for what is put back.
        write: where the rows are put back.
        base: what they are put into.
        added: the node that holds what each row adds to the base.
        at: along which axes of the mask the base lies, if the rows are put where they were taken from.
        places: where else every row is added.
        replaces: whether the rows take the place of what is in the base.
        outside: the nodes that the rows are made from, the base and the mask first.
    """

    mask: fx.Node
    closure: list[fx.Node]
    rows: list[fx.Node]
    write: fx.Node
    base: fx.Node
    added: fx.Node
    at: tuple[int, ...]
    places: fx.Node | None
    outside: list[fx.Node]
    replaces: bool = False

    def masks(self, known: Mapping[fx.Node, list[fx.Node]]) -> list[fx.Node] | None:
        """The masks under which rows were put into zeros, with this one; None if they do not tell where zeros are left."""
        before = known.get(self.base, [] if self.base.target in (*ZEROS, *EMPTY) else None)
        here = self.places is None and not self.replaces and everywhere(self.at, self.mask)
        return [*before, self.mask] if here and before is not None else None

    def compute(self, *tensors: torch.Tensor) -> torch.Tensor:
        """The base with what all rows add to it; of those that the mask does not choose nothing."""
        known = dict(zip(self.outside, tensors, strict=True))
        shape = known[self.mask].shape
        values = self.values(known, torch.arange(math.prod(shape)))
        added = values[self.added]
        chosen = (known[self.mask] != 0).reshape(-1, *(1 for _ in added.shape[1:]))
        base = known[self.base]
        if self.places is not None:
            blank = torch.zeros(base.shape, dtype=base.dtype)
            scatters = self.write.target in SCATTERS
            add = torch.ops.aten.scatter_add if scatters else torch.ops.aten.index_add
            return base + add(blank, 0, values[self.places], added * chosen)
        grid = (added * chosen).reshape(*shape, *added.shape[1:])
        rest = [k for k in range(len(shape)) if k not in self.at]
        if rest:
            grid = grid.sum(rest)
        left = [k for k in range(len(shape)) if k in self.at]
        order = [left.index(k) for k in self.at]
        if order != sorted(order):
            grid = grid.permute(*order, *range(len(order), grid.dim()))
        if self.replaces:
            return torch.where(chosen.reshape(*shape, *chosen.shape[1:]), grid, base)
        return (torch.zeros_like(base) if self.base.target in EMPTY else base) + grid

    def values(self, known: Mapping[fx.Node, Any], places: torch.Tensor) -> dict[fx.Node, Any]:
        """The values of the rows at some positions of the mask, numbered row after row."""
        env: dict[fx.Node, Any] = dict(known)
        shape = known[self.mask].shape
        columns = list(torch.unravel_index(places, tuple(shape)))
        for node in self.rows:
            if node.target is aten.nonzero.default and node.args[0] is self.mask:
                env[node] = torch.stack(columns, 1)
                continue
            args, kwargs = tree_map(lambda a: env[a] if isinstance(a, fx.Node) else a, (node.args, node.kwargs))
            if node.target is aten.index.Tensor:
                args = (args[0], _spread(node.args[1], args[1], self.mask, columns))
            elif (rest := keeps_rows(node)) is not None:
                args = (args[0], [args[0].shape[0], *rest], *args[2:])
            env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return env

    def alike(self, constant: set[fx.Node]) -> bool:
        """Whether every row is treated as it would be among others, also where all were chosen.

        Tried are as many as were recorded, and both halves: each row is left out of one, and so is the first and the last.
        """
        rng = torch.Generator().manual_seed(0)
        size = self.mask.meta["val"].numel()
        if size < 2:
            return False
        some = min(self.rows[0].meta["val"].shape[0] or 2, size - 1)
        drawn = torch.randperm(size, generator=rng)[:some].sort().values
        parts = [drawn, torch.arange(size // 2), torch.arange(size // 2, size)]
        return all(self._same_among(parts, constant, draw, rng) for draw in (small, signed))

    def _same_among(self, parts: list[torch.Tensor], constant: set[fx.Node], draw: Draw, rng: torch.Generator) -> bool:
        """Whether the rows at some positions of the mask are the same without the others, for made-up numbers."""
        known: dict[fx.Node, Any] = {}
        for n in self.outside:
            _make_up(n, constant, draw, rng, known)
        size = self.mask.meta["val"].numel()
        with torch.no_grad(), double_precision():
            whole = self.values(known, torch.arange(size))[self.added]
            if whole.shape[0] != size or (draw is small and not (whole != 0).flatten(1).any(1).all()):
                return False  # what is zero shows nothing
            found = [(whole[places], self.values(known, places)[self.added]) for places in parts]
        return all(torch.allclose(a, b, rtol=1e-9, atol=1e-12, equal_nan=True) for a, b in found)


def everywhere(at: tuple[int, ...], mask: fx.Node) -> bool:
    """Whether the places that rows are put to are the positions of the mask, so that others are for other masks."""
    return at == tuple(range(mask.meta["val"].dim()))


def _spread(index: Any, values: Sequence[Any], mask: fx.Node, columns: list[torch.Tensor]) -> list[Any]:
    """Indices in which the mask is given by the positions that it chooses."""
    out: list[Any] = []
    for node, value in zip(index, values, strict=True):
        out += columns if node is mask else [value]
    return out


def _orders(node: fx.Node) -> bool:
    """Whether a node holds the places that sorted entries came from."""
    source: Any = node.args[0] if node.target is operator.getitem else node
    return source.target in SORTS and order_of(source) is node


def _make_up(
    node: fx.Node, constant: set[fx.Node], draw: Draw, rng: torch.Generator, known: dict[fx.Node, Any]
) -> None:
    """Any numbers in the place of a value; places that rows came from are some order of them, or made from one.

    Other whole numbers are 0 and 1, so that what they are indices of has them.
    """
    value = node.meta["val"]
    if node in known:
        return
    if node in constant:
        known[node] = value
    elif value.is_floating_point() or value.is_complex():
        known[node] = draw(value.shape, rng)
    elif node.op == "call_function" and _orders(node):
        known[node] = torch.rand(value.shape, generator=rng).argsort(-1)
    elif node.op == "call_function" and node.target in KEPT:
        for n in node.all_input_nodes:
            _make_up(n, constant, draw, rng, known)
        args, kwargs = tree_map(lambda a: known[a] if isinstance(a, fx.Node) else a, (node.args, node.kwargs))
        known[node] = node.target(*args, **kwargs)
    else:
        known[node] = (torch.rand(value.shape, generator=rng) < 0.5).to(value.dtype)
