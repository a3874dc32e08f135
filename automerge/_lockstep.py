"""One network on several batches, each in a thread of its own, that wait for each other at watched calls.

A correction that is measured on all the data and must be seen by everything after it would otherwise need one run of the
network per layer. Only one thread computes at a time. What it costs is memory: all batches' live activations at once.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_iter

from automerge._copies import duplicate
from automerge._data import Batch, Batches
from automerge._forward import run_batch
from automerge._machine import physical_memory
from automerge._observe import Event, Observer
from automerge._random import Turns, gpus
from automerge._repair_plan import Plan
from automerge._writes import written

_MOST_RUNS = 64
_SHARE = 0.25


class Held(TorchDispatchMode):
    """Measures the most bytes of results that were alive at a time: ``peak``."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_iter(out):
            if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided:
                storage = leaf.untyped_storage()
                if storage._cdata not in self._alive:
                    self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._alive = {k: v for k, v in self._alive.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return out


def several(batches: Batches, held: int) -> list[Batch] | None:
    """The batches, if their runs may be held at once.

    Args:
        batches: the data.
        held: the bytes that a run of the first batch holds (`Held`).

    Returns:
        None if there are more than 64, or they would take more than a quarter of the memory.
    """
    found = list(islice(iter(batches), _MOST_RUNS + 1))
    sizes = [sum(t.numel() for t in batch.tensors()) for batch in found]
    needed = held * sum(size / max(sizes[0], 1) for size in sizes)
    limit = _available(found[0])
    return found if len(found) <= _MOST_RUNS and limit is not None and needed <= _SHARE * limit else None


def _available(batch: Batch) -> int | None:
    device = next((t.device for t in batch.tensors()), torch.device("cpu"))
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return physical_memory() if device.type == "cpu" else None


def replicas(model: nn.Module, count: int) -> list[nn.Module] | None:
    """Copies of a model that share its tensors, but for those outside of its state dict that passes write to.

    What one run leaves on a module stays its own.

    Args:
        model: the model; for one run it needs no copy.
        count: the number of runs.

    Returns:
        None where runs side by side could meet: a model that cannot be copied or has hooks that are plain functions
        (they may keep what they see), or a caller inside autocast, inference mode or another mode of its thread.
    """
    if count == 1:
        return [model]
    if _get_current_function_mode_stack() or _get_current_dispatch_mode_stack() or torch.is_inference_mode_enabled():
        return None
    if any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")) or any(map(_hooked, model.modules())):
        return None
    tensors = chain(
        model.parameters(),
        model.buffers(),
        (v for m in model.modules() for v in vars(m).values() if isinstance(v, torch.Tensor)),
    )
    own = set(map(id, written(model)))
    shared = {id(t): t for t in tensors if id(t) not in own}
    try:
        return [duplicate(model, dict(shared)) for _ in range(count)]
    except Exception:
        return None


def _hooked(module: nn.Module) -> bool:
    hooks = chain(module._forward_hooks.values(), module._forward_pre_hooks.values())
    return any(not (getattr(h, "__module__", None) or type(h).__module__).startswith("torch.") for h in hooks)


class _Stopped(BaseException):
    """Ends a run; no `Exception`, so that a model's own handlers let it through."""


class _Run:
    """A thread with a run of the model that waits at every awaited call until it is told to go on."""

    def __init__(
        self, work: Callable[[Callable[[Event], None]], None], awaits: Callable[[Event], bool], draws: Turns
    ) -> None:
        self.event: Event | None = None
        self._work, self._awaits, self._draws = work, awaits, draws
        self._thread = threading.Thread(target=contextvars.copy_context().run, args=(self._run,), daemon=True)
        self._go, self._waits = threading.Semaphore(0), threading.Semaphore(0)
        self._closing = False
        self._error: BaseException | None = None

    def _run(self) -> None:
        try:
            self._work(self._listen)
        except _Stopped:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self.event = None
            self._waits.release()

    def _listen(self, event: Event) -> None:
        if not self._awaits(event):
            return
        self.event = event
        self._waits.release()
        self._go.acquire()
        self.event = None
        if self._closing:
            raise _Stopped

    def advance(self) -> None:
        """Go on to the next awaited call, or to the end; raises what the run raised."""
        with self._draws.turn():
            if self._thread.ident is None:
                self._thread.start()
            else:
                self._go.release()
            self._waits.acquire()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End it where it is."""
        if self._thread.ident is not None:
            self._closing = True
            with self._draws.turn():
                self._go.release()
                self._thread.join()


@contextmanager
def _thread_like(device: torch.device | None) -> Iterator[None]:
    """What the calling thread had set and a new one has not."""
    with torch.no_grad():
        if device is not None and device.type == "cuda":
            with torch.cuda.device(device):
                yield
        else:
            yield


def run_together(
    models: Sequence[nn.Module],
    tensors: Mapping[str, torch.Tensor],
    batches: Sequence[Batch],
    plan: Plan,
    meet: Callable[[int, list[Event]], None],
) -> None:
    """Run every batch once; where the runs come to an awaited call, all that come to it wait there together.

    Args:
        models: one replica for each batch.
        tensors: their weights; ``meet`` may write to them.
        batches: the data.
        plan: the awaited calls in the order of execution, and the tensors of which every run gets copies.
        meet: called once for every awaited call with the events of the runs that come to it, in the order of the batches.
            It may change ``event.value`` in place. A run that takes the calls in another order comes too late and is not
            waited for.

    Raises:
        AutomergeError: what a run raised.
    """
    met: set[int] = set()
    place = plan.place

    def awaits(event: Event) -> bool:
        number = place(event)
        return number is not None and number not in met

    def work(model: nn.Module, batch: Batch) -> Callable[[Callable[[Event], None]], None]:
        def run(listen: Callable[[Event], None]) -> None:
            device = next((t.device for t in tensors.values()), None)
            with _thread_like(device), Observer(tensors, listen):
                run_batch(model, tensors, batch, plan.written)

        return run

    if len(batches) == 1:
        _alone(work(models[0], batches[0]), place, meet)
        return
    devices = gpus(tensors.values())
    runs = [_Run(work(model, batch), awaits, Turns(devices)) for model, batch in zip(models, batches, strict=True)]
    try:
        for run in runs:
            run.advance()
        while waiting := [(place(run.event), run) for run in runs if run.event is not None]:
            number = min(n for n, _ in waiting if n is not None)
            here = [run for n, run in waiting if n == number]
            met.add(number)
            meet(number, [run.event for run in here if run.event is not None])
            for run in here:
                run.advance()
    finally:
        for run in runs:
            run.close()


def _alone(
    work: Callable[[Callable[[Event], None]], None],
    place: Callable[[Event], int | None],
    meet: Callable[[int, list[Event]], None],
) -> None:
    """A single run, which waits for nobody and needs no thread."""

    def listen(event: Event) -> None:
        number = place(event)
        if number is not None:
            meet(number, [event])

    work(listen)
