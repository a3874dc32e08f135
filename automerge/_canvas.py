"""An empty matplotlib figure, and writing one all at once or not at all; needs the extra ``plot``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from automerge._errors import AutomergeError, OutputError
from automerge._files import check_writable, replacement

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float, **options: Any) -> Figure:
    """A figure of a size in inches that belongs to no display and no global state.

    Raises:
        AutomergeError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise AutomergeError("drawing needs matplotlib; install it with: pip install 'automerge[plot]'") from error
    return Figure(figsize=(width, height), **options)


def save_figure(figure: Figure, path: str | os.PathLike[str], force: bool = False) -> Path:
    """Write a figure under a temporary name and rename it; the format follows the suffix (png, pdf, svg).

    Raises:
        OutputError: if the path exists (without ``force``), cannot be written, or has an unknown suffix.
    """
    file = Path(path)
    check_picture(figure, file, force)
    try:
        with replacement(file) as temporary:
            figure.savefig(temporary, dpi=150)
    except OSError as error:
        raise OutputError(f"{file} cannot be written: {error.strerror or error}") from error
    return file


def check_picture(figure: Figure, path: str | os.PathLike[str], force: bool = False) -> None:
    """Find out before long work whether a picture can be written to ``path``.

    Raises:
        OutputError: as `save_figure` does.
    """
    file = Path(path)
    check_writable(file, force)
    known = figure.canvas.get_supported_filetypes()
    if file.suffix[1:].lower() not in known:
        raise OutputError(f"{file}: unknown picture format {file.suffix!r}; use one of {', '.join(sorted(known))}")
