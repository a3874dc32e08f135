"""What a repair corrects: linear maps and normalisations in the order of execution."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from automerge._observe import Event, Key, View

UNRESET = "the data give its calls fewer than two values per channel: its statistics are averages"


@dataclass(frozen=True, eq=False)
class Site:
    """A linear map or convolution whose output channels can be rescaled by its own weight and bias.

    Attributes:
        key: the call of the linear map.
        weight: its output channels.
        bias: the bias vector, if there is one.
        channels: the number of output channels.
        groups: groups of a transposed convolution; 1 otherwise.
        free: bool, ``(channels,)``: which of them may be corrected.
        norm: without a bias, the running mean of the BatchNorm that alone reads the output.
    """

    key: Key
    weight: View
    bias: View | None
    channels: int
    groups: int
    free: torch.Tensor
    norm: str | None = None

    @property
    def shiftable(self) -> bool:
        """Whether the mean can be corrected, in the bias or in the running mean of the normalisation that follows."""
        return self.bias is not None or self.norm is not None

    def sees(self, event: Event) -> bool:
        """Whether the event's value is this site's complete output, bias included.

        One and the same layer may add its bias in the call or after it, depending on the batch's memory layout.
        """
        if self.bias is None:
            return event.key == self.key
        return (event.key == self.key and event.bias is not None) or event.key in self.bias_key()

    def bias_key(self) -> tuple[Key, ...]:
        """The key of an addition of this site's bias; empty without one."""
        return (("bias", self.bias.name, self.bias.axis, self.bias.start),) if self.bias else ()

    @property
    def name(self) -> str:
        """The weight's name, with the rows where an earlier block of rows belongs to another call."""
        view = self.weight
        return f"{view.name}[{view.start}:{view.stop}]" if view.start else view.name


@dataclass(frozen=True, eq=False)
class Norm:
    """A batch normalisation whose statistics are measured again: its call, and the names of mean and variance."""

    key: Key
    names: tuple[str, str]

    def sees(self, event: Event) -> bool:
        """Whether the event is this call."""
        return event.key == self.key

    @property
    def name(self) -> str:
        """The module path."""
        return self.names[0].rpartition(".")[0]


@dataclass(frozen=True)
class Plan:
    """What a pass corrects, in the order of execution, and what it leaves alone and why."""

    steps: tuple[Site | Norm, ...]
    skipped: Mapping[str, str]
    written: frozenset[str] = frozenset()
    """Tensors that the network itself writes to in a pass (counters, ``Embedding(max_norm=...)``): what a repair runs must
    not reach its result."""
    held: int = 0
    """The most bytes of activations that the run of the batch held at a time."""

    def place(self, event: Event) -> int | None:
        """The number of the step that observes an event."""
        return next((number for number, step in enumerate(self.steps) if step.sees(event)), None)

    def find(self, event: Event) -> Site | Norm | None:
        """The step that observes an event."""
        number = self.place(event)
        return None if number is None else self.steps[number]
