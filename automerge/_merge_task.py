"""The models of one merge: checked, with a module that carries their weights, moved to other coordinates; its record."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import numpy as np
import torch
from torch import nn

from automerge._copies import carrying, is_empty, loaded
from automerge._fixed import infer_common, moved_constants, shared_constants
from automerge._merge_checks import Model, check_models, listed_models
from automerge._offload import Store
from automerge._version import __version__
from automerge.groups import Element
from automerge.io import hash_state_dict
from automerge.symmetry import Symmetry


@dataclass(frozen=True)
class Task:
    """What is merged.

    Attributes:
        models: as they were given.
        network: the architecture.
        states: one state dict per model.
        store: where large tensors are held.
        notes: what a reader must know; grows.
    """

    models: Sequence[Model]
    network: nn.Module
    states: list[Mapping[str, torch.Tensor]]
    store: Store
    notes: list[str]

    @staticmethod
    def checked(models: Sequence[Model], architecture: nn.Module | None, store: Store) -> Task:
        given = listed_models(models)
        network, states, notes = check_models(given, architecture)
        network = carrying(network, states[0], store) if is_empty(network) else network
        return Task(given, network, states, store, notes)

    def first(self) -> nn.Module:
        """A module that carries the first model's weights."""
        if isinstance(self.models[0], nn.Module):
            return self.models[0]
        if self.store.folder is not None:
            return carrying(self.network, self.states[0], self.store)
        return loaded(self.network, self.states[0])

    def infer(self, args: Any, kwargs: Mapping[str, Any] | None, verify: bool) -> Symmetry:
        """The models' symmetry; what they share stays."""
        return infer_common(self.first(), shared_constants(self.network, self.states), args, kwargs, verify=verify)

    def noted(self, symmetry: Symmetry) -> Symmetry:
        """A symmetry that was given, after a note if it moves what all models share."""
        if apart := moved_constants(symmetry, shared_constants(self.network, self.states), self.states[0]):
            self.notes.append(
                f"the symmetry that was given moves {apart[0]}, which is the same in all models; "
                f"infer(..., constants={apart[:3]}) keeps it"
            )
        return symmetry

    def moved(self, symmetry: Symmetry, elements: Sequence[Element], kept: bool) -> list[Mapping[str, torch.Tensor]]:
        """The models in other coordinates: held, or moved tensor by tensor when they are read."""
        moved: list[Mapping[str, torch.Tensor]] = [
            Moved(symmetry, d, e) for d, e in zip(self.states, elements, strict=True)
        ]
        if not kept:
            return moved
        with self.store.working():
            return [{name: self.store.keep(value) for name, value in m.items()} for m in moved]


class Moved(Mapping[str, torch.Tensor]):
    """A state dict in other coordinates; every tensor is moved when it is read."""

    def __init__(self, symmetry: Symmetry, state: Mapping[str, torch.Tensor], element: Element) -> None:
        self._symmetry, self._state, self._element = symmetry, state, element

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._element.take(name, self._state, self._symmetry.aliases)

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


def provenance(
    network: nn.Module, dicts: Sequence[Mapping[str, torch.Tensor]], options: Mapping[str, Any], matcher: str
) -> dict[str, Any]:
    """Where a merged network comes from: its parts by their hashes, versions, options, the time."""
    count = sum(p.numel() for p in network.parameters())
    inputs = [{"sha256": hash_state_dict(state), "parameters": count} for state in dicts]
    versions = {
        "automerge": __version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
    return {
        "inputs": inputs,
        "versions": versions,
        "options": dict(options),
        "matcher": matcher,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


class Clock:
    """Seconds per stage."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._start = self._last = now()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        current = self._now()
        self._laps[name] = current - self._last
        self._last = current

    def seconds(self) -> dict[str, float]:
        return {**self._laps, "total": self._now() - self._start}
