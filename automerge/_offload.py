"""Tensors in files that the system maps into memory: work on more than the memory holds.

The system reads the pages of such a file when they are used and writes them back when memory is short, so that code that
goes through its tensors one after the other needs memory for a few of them only. The files have no name once they are
mapped: nothing is left behind, however the work ends.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from automerge._errors import OutputError
from automerge._machine import releasing


class Store:
    """Where large tensors are held: in memory, or in files of a directory.

    Args:
        folder: the directory; None holds everything in memory.

    Raises:
        OutputError: if it is no directory that can be written to.

    Examples:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> Store(folder.name).keep(torch.ones(2, 2)).sum()
        tensor(4.)
        >>> list(Path(folder.name).iterdir())
        []
        >>> folder.cleanup()
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        if not isinstance(folder, str | os.PathLike | None):
            raise OutputError(f"offload: expected the path of a directory, got a {type(folder).__name__}")
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None:
            if not self.folder.is_dir():
                raise OutputError(f"offload: {self.folder} is no directory; create it first")
            self._file(0).close()

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A tensor without values; one on another device than the CPU is in its memory.

        Raises:
            OutputError: if the disk is full.
        """
        size = torch.Size(shape).numel()
        if self.folder is None or device.type != "cpu" or size == 0:
            return torch.empty(tuple(shape), dtype=dtype, device=device)
        with self._file(size * dtype.itemsize) as file:
            flat = torch.from_file(file.name, shared=True, size=size, dtype=dtype)
        return flat.view(tuple(shape))

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor itself, or a contiguous copy in a file."""
        if self.folder is None or tensor.device.type != "cpu":
            return tensor
        return self.empty(tensor.shape, tensor.dtype, tensor.device).copy_(tensor)

    def working(self) -> AbstractContextManager[None]:
        """Around work that makes large tensors on the way: on a disk, what it frees must not stay with the process."""
        return nullcontext() if self.folder is None else releasing()

    def free(self) -> int | None:
        """The bytes that the directory's disk has left; None in memory."""
        return None if self.folder is None else shutil.disk_usage(self.folder).free

    def _file(self, size: int) -> tempfile._TemporaryFileWrapper[bytes]:
        """A file of some bytes, which are on the disk: a full disk must not be found out by a later write to memory."""
        try:
            file = tempfile.NamedTemporaryFile(dir=self.folder, prefix=".automerge-")  # noqa: SIM115
            if size and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            elif size:
                file.truncate(size)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                reason = f"cannot be written: {error.strerror}; give a directory that you may write to"
            else:
                reason = (
                    f"cannot take {size:,} bytes more ({error.strerror or error}); give a directory on a larger disk"
                )
            raise OutputError(f"offload: {self.folder} {reason}") from error
        return file


MEMORY = Store()
"""Everything in memory."""
