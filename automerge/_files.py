"""Writing files all at once or not at all, and finding out beforehand whether that can be done."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from automerge._errors import AutomergeError, OutputError


def status_of(file: Path, error: type[AutomergeError], verb: str) -> os.stat_result | None:
    """What is at a path; None if nothing is.

    Args:
        file: the path.
        error: what to raise if that cannot be found out.
        verb: for its message, ``"read"`` or ``"written"``.
    """
    try:
        return file.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or str(problem)
        raise error(f"{file} cannot be {verb}: {reason}; check the path") from problem


def check_writable(path: str | os.PathLike[str], force: bool = False) -> None:
    """Find out before long work whether a result can be written to ``path``.

    Raises:
        OutputError: if the path is a directory, exists (without ``force``), or its directory is missing or not
            writable.
    """
    file = Path(path)
    status = status_of(file, OutputError, "written")
    if status is not None and stat.S_ISDIR(status.st_mode):
        raise OutputError(f"{file} is a directory; give a file name inside it")
    if status is not None and not stat.S_ISREG(status.st_mode):
        raise OutputError(f"{file} is a device or a pipe; results are written to regular files only")
    if status is not None and not force:
        raise OutputError(f"{file} exists; pass --force (force=True) to replace it, or choose another name")
    target = Path(os.path.realpath(file))
    if not target.parent.is_dir():
        problem = "is a file; choose another" if target.parent.exists() else "does not exist; create it first"
        raise OutputError(f"{file} cannot be written: the directory {file.parent} {problem}")
    probe = temporary_name(target)
    try:
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise OutputError(
            f"{file} cannot be written: {error.strerror or error}; choose a directory that you may write to"
        ) from error


def temporary_name(file: Path) -> Path:
    """A fresh hidden name next to ``file``, with its suffix, to write to before ``os.replace``."""
    return file.with_name(f".{file.stem[:100]}.{secrets.token_hex(6)}.tmp{file.suffix}")


@contextmanager
def replacement(path: str | os.PathLike[str], force: bool = True) -> Iterator[Path]:
    """A temporary file beside ``path`` to write to; it takes that path's place at the end, and goes if the block raises.

    Without ``force`` a file that another process has put there meanwhile stays, and `FileExistsError` is raised.
    The result has the mode that `open` would have left: that of the file it replaces, else what the umask allows. A
    symbolic link is followed.

    Examples:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> with replacement(Path(folder.name) / "a.txt") as temporary:
        ...     _ = temporary.write_text("whole or not at all")
        >>> [p.name for p in Path(folder.name).iterdir()]
        ['a.txt']
        >>> folder.cleanup()
    """
    target = Path(os.path.realpath(path))
    temporary = temporary_name(target)
    try:
        temporary.touch(exist_ok=False)
        mode = stat.S_IMODE((target if target.exists() else temporary).stat().st_mode)
        yield temporary
        if stat.S_IMODE(temporary.stat().st_mode) != mode:  # safetensors writes files that only their owner can read
            temporary.chmod(mode)
        if force:
            os.replace(temporary, target)
        else:
            _link(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _link(temporary: Path, target: Path) -> None:
    """Give a file its name unless that is taken; where the file system has no links, a check must do."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise
    except OSError:
        if target.exists():
            raise FileExistsError(errno.EEXIST, "it was written by another process meanwhile") from None
        os.replace(temporary, target)


def write_text(path: Path, text: str, force: bool = False) -> None:
    """Write under a temporary name and rename.

    Raises:
        OutputError: if the path exists (without ``force``) or cannot be written.
    """
    check_writable(path, force)
    try:
        with replacement(path, force) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error


def make_directory(path: Path) -> None:
    """Make a directory for results, its parents included, and make sure that files can be written there.

    Raises:
        OutputError: if it is a file or cannot be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"the directory {path} cannot be made: {error.strerror or error}; choose another") from error
    check_writable(path / ".probe", force=True)
