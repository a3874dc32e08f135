"""The processes that share one matching: each holds its own models, sums over models go through `torch.distributed`.

A process alone uses `Alone`, whose operations do nothing; the algorithms are written once, for both.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

from automerge._errors import AutomergeError, RankError


class Ranks(ABC):
    """Some processes with numbers from 0; what one method does, all of them must call.

    Attributes:
        rank: the number of this one.
        size: how many there are.
    """

    rank: int
    size: int

    def shares(self, count: int) -> list[range]:
        """Which of ``count`` models each process holds: consecutive ones, as evenly as possible."""
        cuts = [count * r // self.size for r in range(self.size + 1)]
        return [range(a, b) for a, b in pairwise(cuts)]

    @abstractmethod
    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over processes, the same everywhere bit for bit; new, except for a process alone."""

    @abstractmethod
    def broadcast(self, tensor: torch.Tensor, owner: int) -> None:
        """Overwrite a tensor by the owner's."""

    @abstractmethod
    def gather(self, value: Any) -> list[Any]:
        """What every process has to say, in their order. Pickled: for plain data of our own."""

    def add(self, *values: float) -> list[float]:
        """Sums of numbers over processes."""
        if self.size == 1:
            return list(values)
        return [float(v) for v in self.sum(torch.tensor(values, dtype=torch.float64))]

    def tell(self, values: tuple[float, ...], owner: int) -> tuple[float, ...]:
        """The owner's numbers."""
        if self.size == 1:
            return values
        out = torch.tensor(values, dtype=torch.float64)
        self.broadcast(out, owner)
        return tuple(float(v) for v in out)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within, Ctrl-C of several processes is heard by `stopping`, where all of them are at the same point."""
        yield

    def stopping(self) -> bool:
        """Whether any process was asked to stop; the same on all. One alone is interrupted as python does it."""
        return False

    @contextmanager
    def together(self) -> Iterator[None]:
        """Do something that may fail on one process: then it fails on all, with that one's message.

        Raises:
            AutomergeError: what this process raised.
            RankError: what another one raised.
        """
        error: AutomergeError | None = None
        try:
            yield
        except AutomergeError as caught:
            error = caught
        said = self.gather(None if error is None else str(error))
        if error is not None:
            raise error
        for rank, message in enumerate(said):
            if message is not None:
                raise RankError(f"process {rank} of {self.size} stopped: {message}")


class Alone(Ranks):
    """One process; nothing to exchange."""

    rank = 0
    size = 1

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Ranks.sum`."""
        return tensor

    def broadcast(self, tensor: torch.Tensor, owner: int) -> None:
        """See `Ranks.broadcast`."""

    def gather(self, value: Any) -> list[Any]:
        """See `Ranks.gather`."""
        return [value]


class Group(Ranks):
    """The processes that torchrun started (environment variables RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).

    Args:
        seconds: the longest wait for another process. One that ends is noticed at once.

    Raises:
        RankError: if they cannot be reached.
    """

    def __init__(self, seconds: float = 600.0) -> None:
        # Its functions name the group of all processes as a default argument when they are imported, which is what tracing
        # does: imported later, they would keep the group, and with it the threads of gloo, beyond `close`.
        import torch.distributed.nn.functional  # noqa: F401

        self._asked = False
        with _noticing(self):
            self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            dist.init_process_group("gloo", timeout=timedelta(seconds=seconds))

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Ranks.sum`."""
        with _noticing(self):
            host = tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
            dist.all_reduce(host)
            return host.to(tensor.device)

    def broadcast(self, tensor: torch.Tensor, owner: int) -> None:
        """See `Ranks.broadcast`."""
        with _noticing(self):
            host = tensor.contiguous().cpu()
            dist.broadcast(host, owner)
            if self.rank != owner:
                tensor.copy_(host)

    def gather(self, value: Any) -> list[Any]:
        """See `Ranks.gather`."""
        with _noticing(self):
            out: list[Any] = [None] * self.size
            dist.all_gather_object(out, value)
            return out

    @contextmanager
    def listening(self) -> Iterator[None]:
        """See `Ranks.listening`; SIGTERM, by which launchers end processes, is heard too."""

        def ask(*_: object) -> None:
            self._asked = True

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def stopping(self) -> bool:
        """See `Ranks.stopping`."""
        return self.add(float(self._asked))[0] > 0

    def close(self) -> None:
        """Let go of the others, and join the threads that spoke to them: one that outlives the interpreter aborts."""
        if dist.is_initialized():
            dist.destroy_process_group()
            gc.collect()


@contextmanager
def _noticing(group: Group) -> Iterator[None]:
    """Turn the errors of the connection into one sentence."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError) as error:
        brief = (str(error).strip().splitlines() or [type(error).__name__])[0]
        where = f"process {getattr(group, 'rank', '?')} of {getattr(group, 'size', '?')}"
        raise RankError(
            f"{where}: another process of this run ended or does not answer ({brief}); nothing was written; look at the "
            "messages of the other processes, and start all of them again"
        ) from error


ALONE = Alone()
