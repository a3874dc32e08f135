"""What the blocks of random networks are made of: choices, layers with their bookkeeping, small modules."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from automerge.testing._ledger import Layout, Ledger, Units, cells, distinct, tagged

T = TypeVar("T")
Pick = Callable[[Sequence[Any]], Any]
Built = tuple[nn.Module, Layout]

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
    "square": torch.square,
}


class Block(nn.Module):
    """A small function of its input, its parts and its parameters, with a text for the report."""

    def __init__(self, text: str, fn: Callable[[Block, torch.Tensor], torch.Tensor], *parts: nn.Module) -> None:
        super().__init__()
        self.text, self.fn = text, fn
        self.parts = nn.ModuleList(parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fn(self, x)

    def extra_repr(self) -> str:
        return self.text


@dataclass
class Builder:
    """Draws choices and keeps the books.

    Attributes:
        pick: chooses one of some options.
        kind: ``"vector"`` (batch, channels), ``"tokens"`` (batch, tokens, channels) or ``"image"`` (batch, channels, s, s).
        space: the number of tokens, or the side of the image.
        pixels: whether the axis of the channels counts the pixels of an image, too: at another size of the image, positions
            counted from its start are other channels'.
        ledger: who owns what.
    """

    pick: Pick
    kind: str
    space: int = 1
    pixels: bool = False
    ledger: Ledger = field(default_factory=Ledger)
    _tags: Any = field(default_factory=itertools.count)

    @property
    def dim(self) -> int:
        """The axis of the channels."""
        return 1 if self.kind == "image" else -1

    def width(self, most: int = 5) -> int:
        """A number of units."""
        return self.pick(range(2, most + 1))

    def fresh(self, most: int = 5) -> Layout:
        """A new set of units, laid out in order."""
        return cells(Units(self.width(most)))

    def retag(self, layout: Layout) -> Layout:
        """The layout after a function that keeps equal values equal; every call is another function."""
        return tagged(layout, next(self._tags))

    def activation(self) -> nn.Module:
        """An elementwise function."""
        name = self.pick(list(ACTIVATIONS))
        return Block(name, lambda self, x: ACTIVATIONS[self.text](x))

    # ------------------------------------------------------------ layers
    def mix(self, layout: Layout, rows: Layout, pixels: bool = True) -> nn.Module:
        """A linear layer or convolution whose outputs have the units ``rows``.

        Args:
            layout: of its input.
            rows: of its output.
            pixels: for images, whether a kernel may be larger than one.
        """
        bias = self.pick([True, False])
        n, m = len(layout), len(rows)
        if self.kind == "image":
            kernel = self.pick([1, 3]) if pixels else 1
            transposed = self.pick([False, False, True])
            make: Any = nn.ConvTranspose2d if transposed else nn.Conv2d
            layer: nn.Module = make(n, m, kernel, padding=kernel // 2, bias=bias)
            self.own_matrix(layer, rows, layout, bias, into=1 if transposed else 0)
            return layer
        style = self.pick(["linear", "linear", "weight_norm", "bare"])
        if style == "bare":
            return self._bare(layout, rows)
        layer = nn.Linear(n, m, bias=bias)
        if style == "weight_norm":
            nn.utils.parametrizations.weight_norm(layer)
            inner: Any = layer.parametrizations
            self.ledger.own(inner.weight.original0, 0, rows)
            self.ledger.own(inner.weight.original1, 0, rows)
            self.ledger.own(inner.weight.original1, 1, distinct(layout))
            if bias:
                self.ledger.own(layer.bias, 0, rows)
            return layer
        self.own_matrix(layer, rows, layout, bias)
        return layer

    def own_matrix(self, layer: Any, rows: Layout, layout: Layout, bias: bool, into: int = 0) -> None:
        """The usual ownership of a weight matrix (outputs on axis ``into``) and its bias."""
        self.ledger.own(layer.weight, into, rows)
        self.ledger.own(layer.weight, 1 - into, distinct(layout))
        if bias:
            self.ledger.own(layer.bias, 0, rows)

    def _bare(self, layout: Layout, rows: Layout) -> nn.Module:
        spelling = self.pick(["x @ w", "einsum", "(w.T @ x.T).T"])

        def forward(self: Block, x: torch.Tensor) -> torch.Tensor:
            weight: Any = self.w
            if self.text == "einsum":
                return torch.einsum("...i,io->...o", x, weight)
            return x @ weight if self.text == "x @ w" else (weight.mT @ x.mT).mT

        block = Block(spelling, forward)
        block.w = nn.Parameter(torch.randn(len(layout), len(rows)))
        self.ledger.own(block.w, 0, distinct(layout))
        self.ledger.own(block.w, 1, rows)
        return block

    def on_channels(self, module: Any, layout: Layout) -> Layout:
        """Give every vector of a module (scale, shift, statistics) one entry per channel; returns the layout after it."""
        apart = distinct(layout)
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.is_floating_point():
                self.ledger.own(tensor, 0, apart)
        return self.retag(apart)

    def stack(self, *modules: nn.Module) -> nn.Module:
        """Modules one after the other."""
        return nn.Sequential(*modules)
