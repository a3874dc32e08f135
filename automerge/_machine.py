"""What the machine has."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def in_threads(function: Callable[[T], R], items: Sequence[T], worth: bool = True) -> list[R]:
    """A function of every item, in as many threads as torch uses; for work that lets go of the interpreter's lock.

    Args:
        function: of one item.
        items: independent of each other.
        worth: whether the work is large enough for threads; else one after the other.
    """
    workers = min(torch.get_num_threads(), len(items))
    if workers < 2 or not worth:
        return [function(item) for item in items]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(function, items))


def physical_memory() -> int | None:
    """The bytes of memory of the machine; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


@contextmanager
def releasing(size: int = 1 << 17) -> Iterator[None]:
    """Within, memory of tensors above some bytes goes back to the system when they are freed; glibc keeps up to 32 MiB each.

    For the whole process, and only with glibc; elsewhere nothing happens.
    """
    _depth.append(size)
    _threshold(size)
    try:
        yield
    finally:
        _depth.pop()
        _threshold(_depth[-1] if _depth else 32 << 20)  # what glibc adapts itself to


_depth: list[int] = []


def _threshold(size: int) -> None:
    try:
        ctypes.CDLL(None).mallopt(-3, size)  # M_MMAP_THRESHOLD
    except (AttributeError, OSError, TypeError):
        return


def readable(size: float) -> str:
    """Bytes for people.

    >>> readable(3 * 2**30)
    '3.0 GiB'
    """
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
