"""Measures rows in another process, which may hang, run out of memory or die without ending the run."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import warnings
from multiprocessing.connection import Connection
from typing import Any

from zoo.coverage._measure import Row, measure, warm_up

_FRESH = 12  # rows that one process measures before a new one takes over, so that memory is given back


def serve(connection: Connection, threads: int = 1) -> None:
    """Answer (library, name) with a row until None comes."""
    import torch

    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with contextlib.suppress(Exception):
        warm_up()
    while (task := connection.recv()) is not None:
        connection.send(measure(*task).to_dict())


class Worker:
    """A process that measures rows, replaced when one takes too long or dies."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.process: Any = None
        self.connection: Any = None
        self.served = 0

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other,), daemon=True)
        self.process.start()
        other.close()
        self.served = 0

    def stop(self) -> None:
        """End the process, if there is one."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.connection.close()
            self.process = None

    def measure(self, library: str, name: str) -> Row:
        """One row; never raises for what the model does."""
        if self.served >= _FRESH:
            self.stop()
        if self.process is None:
            self._start()
        self.served += 1
        try:
            self.connection.send((library, name))
            if self.connection.poll(self.seconds):
                return Row(**self.connection.recv())
            row = Row(library, name, name, "timeout", message=f"not done after {self.seconds:.0f} s")
        except (EOFError, OSError):
            self.process.join(1)
            row = Row(library, name, name, "died", message=f"the process ended with code {self.process.exitcode}")
        self.stop()
        return row
