"""Random numbers that are not the caller's: those of torch, of numpy and of Python."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

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
