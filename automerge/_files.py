"""Writing text files all at once or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from automerge._errors import OutputError
from automerge.io import check_writable, temporary_name


def write_text(path: Path, text: str, force: bool = False) -> None:
    """Write under a temporary name and rename.

    Raises:
        OutputError: if the path exists (without ``force``) or cannot be written.
    """
    check_writable(path, force)
    temporary = temporary_name(path)
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


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
