"""How much memory a stretch of work held at its peak, beside what the process held before."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path
from types import TracebackType

_PROC = Path("/proc/self")


class Peak:
    """A context manager; on leaving, ``bytes`` is the peak of resident memory above the start, None where unknown.

    Examples:
        >>> with Peak() as peak:
        ...     data = bytearray(64 * 2**20)
        >>> peak.bytes is None or peak.bytes >= 32 * 2**20
        True
    """

    def __init__(self) -> None:
        self.bytes: int | None = None
        self._before: int | None = None

    def __enter__(self) -> Peak:
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # memory that was freed before must not hide what is taken now
        with contextlib.suppress(OSError):
            (_PROC / "clear_refs").write_text("5")  # the peak starts anew
            self._before = _status("VmRSS")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._before is not None:
            self.bytes = max(0, (_status("VmHWM") or 0) - self._before)


def _status(key: str) -> int | None:
    for line in (_PROC / "status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    return None
