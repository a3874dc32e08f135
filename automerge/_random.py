"""Random numbers that are not the caller's: those of torch, of numpy and of Python."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def forked(seed: int | None = None, devices: Sequence[torch.device] = ()) -> Iterator[None]:
    """What is drawn inside leaves the generators of torch, numpy and Python as they were.

    Args:
        seed: where all three start; where the caller's stand, if None.
        devices: whose generators are torch's, too, beside the CPU's.
    """
    python, numbers = random.getstate(), np.random.get_state()  # noqa: NPY002 - what models draw by
    with torch.random.fork_rng(devices=list(devices)):
        try:
            if seed is not None:
                torch.manual_seed(seed)
                random.seed(seed)
                np.random.seed(seed)  # noqa: NPY002
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numbers)  # noqa: NPY002


@contextmanager
def drawing(number: int, devices: Sequence[torch.device] = ()) -> Iterator[None]:
    """What is drawn inside depends on the number and on where the caller's torch stands, which stays there.

    Every pass of one batch then draws the same, whichever network makes it and whatever ran before; another batch draws
    other numbers.

    Args:
        number: of the batch.
        devices: see `forked`.

    Examples:
        >>> with drawing(3):
        ...     a = torch.rand(2)
        >>> with drawing(3):
        ...     b = torch.rand(2)
        >>> torch.equal(a, b)
        True
    """
    stand = zlib.crc32(torch.get_rng_state().numpy().data)
    with forked((stand + number) % 2**32, devices):
        yield


def gpus(tensors: Iterable[torch.Tensor]) -> list[torch.device]:
    """The GPUs of some tensors, each once."""
    return list({t.device for t in tensors if t.is_cuda}) if torch.cuda.is_available() else []


class Turns:
    """The generators' states of a run that takes turns with others, each as if it ran alone."""

    def __init__(self, devices: Sequence[torch.device] = ()) -> None:
        self._devices = devices
        self._state = self._read()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """The run draws inside, from where its last turn ended."""
        outside = self._read()
        self._write(self._state)
        try:
            yield
        finally:
            self._state = self._read()
            self._write(outside)

    def _read(self) -> tuple[Any, Any, torch.Tensor, list[torch.Tensor]]:
        own = [torch.cuda.get_rng_state(d) for d in self._devices]
        return random.getstate(), np.random.get_state(), torch.get_rng_state(), own  # noqa: NPY002

    def _write(self, state: tuple[Any, Any, torch.Tensor, list[torch.Tensor]]) -> None:
        python, numbers, main, own = state
        random.setstate(python)
        np.random.set_state(numbers)  # noqa: NPY002
        torch.set_rng_state(main)
        for device, value in zip(self._devices, own, strict=True):
            torch.cuda.set_rng_state(value, device)
