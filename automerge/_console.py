"""What the command line shows while it works: progress on a terminal, plain lines elsewhere, tables in both."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any, Protocol

from rich.box import HEAVY_HEAD
from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from automerge._errors import OutputError


class Advance(Protocol):
    """Moves the bar of a stage."""

    def __call__(self, done: int, of: int, text: str = "") -> None:
        """Say that ``done`` of ``of`` are done (``of`` is 0 if nobody knows), and what is going on."""


def follow(advance: Advance) -> Callable[[Mapping[str, Any]], None]:
    """What a matcher's ``progress`` wants: its numbers, beside the bar.

    >>> follow(lambda done, of, text="": print(text))({"phase": "polish", "objective": 1234.5678, "moves": 3})
    polish, objective 1234.57, moves 3
    """

    def show(numbers: Mapping[str, Any]) -> None:
        plain = ((k, v) for k, v in numbers.items() if isinstance(v, int | float) and not isinstance(v, bool))
        parts = [f"{name.replace('_', ' ')} {value:.6g}" for name, value in plain]
        advance(0, 0, ", ".join([str(numbers["phase"]), *parts] if "phase" in numbers else parts))

    return show


class Console:
    """Progress and results of one command.

    Progress goes to standard error and results to standard output, so that a result can be piped.

    Args:
        prefix: put before the name of every stage where it is shown.

    Attributes:
        seconds: the wall time of every stage, by its name, in order.
    """

    def __init__(self, prefix: str = "") -> None:
        self._prefix = prefix
        self._error = RichConsole(stderr=True)
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[Advance]:
        """Show that ``name`` is going on, and note its seconds.

        Yields:
            What moves the bar; calling it is optional.
        """
        start = time.perf_counter()
        if self._error.is_terminal:
            with self._bar(self._prefix + name) as advance:
                yield advance
        else:
            with redirect_stdout(sys.stderr):  # what models and data print is no result
                yield lambda done, of, text="": None
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        self.note(f"{self._prefix}{name}: {time.perf_counter() - start:.1f} s")

    @contextmanager
    def _bar(self, name: str) -> Iterator[Advance]:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._error, transient=True) as progress:
            task = progress.add_task(name, total=None)

            def move(done: int, of: int, text: str = "") -> None:
                progress.update(task, completed=done, total=of or None, description=f"{name} {text}".rstrip())

            yield move

    def note(self, text: str) -> None:
        """One line of progress; work goes on if nobody can read it."""
        with suppress(OSError):
            print(text, file=sys.stderr, flush=True)

    def show(self, text: str) -> None:
        """A result.

        Raises:
            BrokenPipeError: if the reader has gone.
            OutputError: if standard output cannot be written for another reason.
        """
        try:
            print(text, flush=True)
        except UnicodeEncodeError:  # an encoding without the letters of a file's name
            encoding = sys.stdout.encoding
            self.show(text.encode(encoding, "backslashreplace").decode(encoding))
        except BrokenPipeError:
            raise
        except OSError as error:
            drop_output()
            raise OutputError(f"standard output cannot be written: {error.strerror or error}") from error

    def table(
        self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()
    ) -> None:
        """A table: drawn by rich on a terminal, aligned with blanks elsewhere; numbers after the first column.

        On a narrow terminal it has no lines, and long names go on in the next row: a name that is cut says nothing.
        """
        if sys.stdout is not None and sys.stdout.isatty():
            console = RichConsole()
            widths = [max(len(row[k]) for row in [columns, *rows]) for k in range(len(columns))]
            roomy = sum(widths) + 3 * len(widths) < console.width
            table = Table(
                title=title,
                title_justify="left",
                caption="\n".join(notes) or None,
                caption_justify="left",
                box=HEAVY_HEAD if roomy else None,
                padding=(0, 1) if roomy else (0, 1, 0, 0),
            )
            for number, column in enumerate(columns):
                short = bool(number) and widths[number] <= 10
                table.add_column(column, justify="right" if number else "left", no_wrap=short, overflow="fold")
            for row in rows:
                table.add_row(*row)
            console.print(table)
        else:
            self.show(plain_table(title, columns, rows, notes))


def drop_output() -> None:
    """Send what is still buffered, and everything after it, nowhere: python would try to write it once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> str:
    """A table in plain text.

    >>> print(plain_table("T", ["name", "n"], [["a", "10"], ["bcdef", "2"]]))
    T
      name    n
      a      10
      bcdef   2
    """
    cells = [list(columns), *[list(row) for row in rows]]
    widths = [max(len(row[k]) for row in cells) for k in range(len(columns))]
    lines = [
        "  "
        + "  ".join(
            cell.rjust(width) if k else cell.ljust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    return "\n".join([title, *(line.rstrip() for line in lines), *(f"  {note}" for note in notes)])
