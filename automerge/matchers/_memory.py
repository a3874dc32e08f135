"""How much memory the universe matcher will hold, before it holds it."""

from __future__ import annotations

import math

import torch

from automerge._errors import MatchingError
from automerge._machine import physical_memory, readable
from automerge._offload import MEMORY, Store
from automerge.blocks import Blocks


def estimate(blocks: Blocks, count: int, dtype: torch.dtype, schedule: str = "cyclic") -> int:
    """The bytes that Frank-Wolfe holds at its peak, beside the models themselves.

    Per model the weights of every block and their copies moved along each set of moving axes, and a matrix per space;
    once more what the line search and the sums over models need.

    Args:
        blocks: the decomposition.
        count: the number of models.
        dtype: of the work.
        schedule: "simultaneous" holds the mixed products of all models at once.
    """
    per_model = once = 0
    for block in blocks.blocks:
        moving = sum(s is not None for s in block.spaces)
        size = math.prod(block.shape)
        per_model += size * 2**moving
        once += 3 * size
        if schedule == "simultaneous":
            per_model += size * (3**moving - 2**moving + 1)
    squares = sum(s.size**2 for s in blocks.spaces)
    per_model += squares
    once += squares * (count if schedule == "simultaneous" else 1)
    return (count * per_model + once) * dtype.itemsize


def check(needed: int, allowed: float | None, count: int, dtype: str, schedule: str, store: Store = MEMORY) -> None:
    """Refuse work that does not fit.

    Args:
        needed: what `estimate` gave.
        allowed: bytes; the machine's memory if None.
        count: the number of models.
        dtype: the option.
        schedule: the option.
        store: where the work is held: the disk's space counts instead, if it is on a disk.

    Raises:
        MatchingError: with what to lower.
    """
    disk = store.free()
    limit = disk if disk is not None else physical_memory() if allowed is None else allowed
    if limit is None or needed <= limit:
        return
    advice = ["fewer models"]
    if schedule == "simultaneous":
        advice.append("schedule='cyclic'")
    if dtype == "float64":
        advice.append("dtype='float32'")
    what = "the machine has" if allowed is None else "max_memory allows"
    if disk is not None:
        what, more = f"the disk of {store.folder} has", "or offload to a directory on a larger one"
    else:
        more = "hold it on a disk with offload=DIRECTORY, spread the models over several machines with torchrun, or "
        more += "raise max_memory"
    raise MatchingError(
        f"matching {count} models in {dtype} would hold about {readable(needed)} and {what} {readable(limit)}; "
        f"take {' or '.join(advice)}, {more}"
    )
