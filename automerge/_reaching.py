"""Further traces of a model, for what the example does not reach."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from automerge._copies import copied
from automerge._errors import TraceError
from automerge._longer import longer_inputs
from automerge._machine import physical_memory
from automerge._tree_io import map_tensors, tensors_of
from automerge.rules import Analysis, analyse
from automerge.symmetry import Symmetry
from automerge.trace import normalise_args, trace

_OTHER_WEIGHTS = 3
_OTHER_SCALES = (-1.0, 4.0, -4.0)  # of the example


class OtherTraces:
    """Traces of a model on other inputs, and with other weights.

    Args:
        model: the model.
        args: the example inputs.
        kwargs: keyword inputs.
        constants: names of what is no parameter.
        symmetry: of the example; its shapes tell lengths from widths.
    """

    def __init__(
        self, model: nn.Module, args: Any, kwargs: Any, constants: Collection[str], symmetry: Symmetry
    ) -> None:
        self.model, self.constants, self.symmetry = model, constants, symmetry
        self.example = normalise_args(args, kwargs)
        tensors = (*model.parameters(), *model.buffers())
        self.on_cpu = all(t.device.type == "cpu" for t in tensors)
        self._bytes = sum(t.numel() * t.element_size() for t in tensors)

    def reaching(self, analysis: Analysis, depends: bool, draws: int) -> list[fx.GraphModule]:
        """Those that read parameters of which the example reads nothing, or not all.

        (An expert that none of few tokens was sent to; what a recurrence multiplies its first state with.) On longer inputs,
        and where data decide what is read also on the example at other scales (a block that small gates skip) and with weights
        in another order: an expert to which no input is sent.

        Args:
            analysis: of the example.
            depends: whether data decide what it reads.
            draws: how many times longer inputs are drawn, the longer each time; 0 for one length only.
        """
        left = _Left(self.symmetry, analysis, depends)
        if left and self.on_cpu:
            for graph in self._until(left, depends, draws):
                left.read_in(graph)
        return left.needed()

    def _until(self, left: _Left, depends: bool, draws: int) -> Iterator[fx.GraphModule]:
        """Traces, as long as something is left."""
        only = None if draws else 1  # of one step a recurrence does not show what it multiplies its state with
        for seed in range(draws or 1):
            on_data = False
            for graph in self.longer(seed, only):
                on_data = on_data or by_data(graph)
                yield graph
            if not left or not on_data:
                break
        memory = physical_memory()
        for seed in range(_OTHER_WEIGHTS if depends and draws and (memory is None or 4 * self._bytes < memory) else 0):
            for graph in self._with_other_weights(seed) if left else ():
                yield graph
                if not left:
                    return
        numbers = any(t.is_floating_point() for t in tensors_of(self.example))
        for scale in _OTHER_SCALES if depends and draws and numbers else ():
            yield from self._traced(self.model, _scaled(self.example, scale)) if left else ()

    def longer(self, seed: int, only: int | None = None) -> Iterator[fx.GraphModule]:
        """Traces on inputs that are the longer, the larger the seed, as far as the model runs on them.

        Args:
            seed: of the inputs.
            only: the one length of axes that are made longer; all without.
        """
        return self._longer(self.model, seed, only)

    def _longer(self, model: nn.Module, seed: int, only: int | None, scale: float = 1.0) -> Iterator[fx.GraphModule]:
        sizes = {n for shape in self.symmetry.shapes.values() for n in shape}
        for group in longer_inputs(*self.example, seed, sizes, seed + 1, only):
            for i, make in enumerate(group):
                graphs = list(self._traced(model, _scaled(make(), scale)))
                yield from graphs
                if graphs and i == 0:
                    break

    def _with_other_weights(self, seed: int) -> Iterator[fx.GraphModule]:
        """Traces of a copy in which the entries of every parameter stand in another order: scales stay, and choices do not.

        On larger inputs, beside which biases count little.
        """
        try:
            other = copied(self.model)
        except Exception:  # no copy, no further path
            return
        rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in other.parameters():
                order = torch.randperm(parameter.numel(), generator=rng)
                parameter.copy_(parameter.reshape(-1)[order].view_as(parameter))
        yield from self._longer(other, seed, None, scale=4.0)
        yield from self._traced(other, _scaled(self.example, 4.0))

    def _traced(self, model: nn.Module, given: tuple[Any, Any]) -> Iterable[fx.GraphModule]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return [trace(model, *given, values=False, constants=self.constants)]
        except TraceError:
            return []  # no inputs for this model


def _scaled(given: tuple[Any, Any], scale: float) -> tuple[Any, Any]:
    """Inputs of which all numbers that are not whole are multiplied."""
    return given if scale == 1.0 else map_tensors(lambda _, t: t * scale if t.is_floating_point() else t, given)


@dataclass(frozen=True)
class _Part:
    """Some of the parameters: by their names, and of others the entries under a mask."""

    whole: frozenset[str]
    masks: Mapping[str, np.ndarray]

    def __bool__(self) -> bool:
        return bool(self.whole or self.masks)

    def count(self) -> int:
        return len(self.whole) + sum(int(mask.sum()) for mask in self.masks.values())

    def both(self, other: _Part) -> _Part:
        masks = {n: mask & other.masks[n] for n, mask in self.masks.items() if n in other.masks}
        return _Part(self.whole & other.whole, {n: mask for n, mask in masks.items() if mask.any()})

    def without(self, other: _Part) -> _Part:
        masks = {n: mask & ~other.masks.get(n, False) for n, mask in self.masks.items()}
        return _Part(self.whole - other.whole, {n: mask for n, mask in masks.items() if mask.any()})


class _Left:
    """What no graph so far reads of the parameters."""

    def __init__(self, symmetry: Symmetry, analysis: Analysis, depends: bool) -> None:
        whole = {n for n in symmetry.shapes if n not in analysis.states}
        whole |= {n for n, mask in analysis.unseen.items() if mask.all()}
        # where the path depends on data, others may read more of what this one reads in part (experts stacked in one tensor);
        # so may further steps of what this one multiplies its first state with
        parts = {n: mask for n, mask in analysis.unseen.items() if depends or n in analysis.first}
        self._wanted = self._left = _Part(frozenset(whole), {n: mask for n, mask in parts.items() if n not in whole})
        self._reads: list[tuple[fx.GraphModule, _Part]] = []

    def __bool__(self) -> bool:
        return bool(self._left)

    def read_in(self, graph: fx.GraphModule) -> None:
        """What a graph reads of it is not left."""
        more = analyse([graph])
        whole = frozenset(n for n in more.states if n not in more.unseen or not more.unseen[n].all())
        masks = {n: ~more.unseen.get(n, np.zeros_like(m)) for n, m in self._wanted.masks.items() if n in more.states}
        read = self._wanted.both(_Part(whole, masks))
        if read.both(self._left):
            self._reads.append((graph, read))
            self._left = self._left.without(read)

    def needed(self) -> list[fx.GraphModule]:
        """Few of the graphs that read together what all of them do, those that read most of the rest first."""
        out, left = [], self._wanted.without(self._left)
        while left:
            graph, most = max(self._reads, key=lambda known: left.both(known[1]).count())
            out.append(graph)
            left = left.without(most)
        return out


def by_data(graph: fx.GraphModule) -> bool:
    """Whether data decide what is read: python reads them, or nothing was chosen somewhere."""
    values = (node.meta.get("val") for node in graph.graph.nodes)
    return bool(graph.meta["trace"].data_dependent) or any(
        isinstance(v, torch.Tensor) and v.numel() == 0 for v in values
    )
