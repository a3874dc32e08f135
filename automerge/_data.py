"""Batches of data, and running a model on them without changing it."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import Dataset, IterableDataset

from automerge._errors import AutomergeError, CheckpointError
from automerge._gradients import as_needed, copy_of, needs_gradients, passed
from automerge._loading import as_loaded, check_tied, check_values, checked_state
from automerge._machine import physical_memory
from automerge._numbers import is_whole
from automerge._random import drawing, forked, gpus
from automerge._restoring import lent, restored
from automerge._tree_io import map_tensors, stored
from automerge._writes import state_of, unwritten
from automerge.io import tied_names

_LABEL_KEYS = ("labels", "label", "targets", "target")
_SMALLEST = 64  # bytes that a batch takes at least


@dataclass(frozen=True)
class Batch:
    """One batch: positional inputs, keyword inputs, labels (None if there are none), and its place among the others."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    labels: Any = None
    number: int = 0

    def tensors(self) -> list[torch.Tensor]:
        """The tensors among its inputs."""
        return [t for t in tree_leaves((self.args, dict(self.kwargs))) if isinstance(t, torch.Tensor)]


class Batches:
    """Any iterable of batches, made re-iterable and moved to a device.

    Batches of batches keep what they know about their inputs. A batch is a tensor, a list or tuple whose first
    ``arity`` items are the positional inputs (what follows are labels), or a dict of keyword inputs (an entry ``labels``
    or ``targets`` is taken as labels, and is an input too if it is one of ``kwargs``). A bare tensor is one batch, and so is
    a packed sequence, which is one input. An iterator that can be consumed only once is listed once; anything else is
    iterated afresh every time. Batches without a sample are passed over.

    Args:
        data: the batches.
        arity: the number of positional inputs.
        kwargs: keyword inputs for every batch; tensors among them belong to one example and are dropped.
        device: where tensors are moved to; None leaves them.
        named: types of tuples with names that are one input; any other is a batch, as a DataLoader makes of named samples.

    Raises:
        AutomergeError: if the data are no iterable of batches; on iteration, if they are empty or an input holds NaN.

    Examples:
        >>> [b.labels for b in Batches(iter([(torch.ones(2, 3), torch.zeros(2))]))]
        [tensor([0., 0.])]
    """

    def __init__(
        self,
        data: Any,
        arity: int = 1,
        kwargs: Mapping[str, Any] | None = None,
        device: torch.device | None = None,
        named: Collection[type] = (),
    ) -> None:
        self._single: tuple[type, ...] = (torch.Tensor, PackedSequence, *named)
        if isinstance(data, self._single):
            data = [data]
        if isinstance(data, Batches):
            known: Batches = data
            data, arity, device = known._data, known._arity, device or known._device
            kwargs = {**dict.fromkeys(known._named, torch.zeros(0)), **known._kwargs}
            self._single = known._single
        if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
            raise AutomergeError(
                f"data is a {type(data).__name__} of single samples, not of batches; "
                "wrap it: torch.utils.data.DataLoader(dataset, batch_size=256)"
            )
        if not isinstance(data, Iterable) or isinstance(data, (str, bytes, Mapping)):
            one = "; is it one batch? then give [batch]" if isinstance(data, Mapping) else ""
            raise AutomergeError(
                f"data is a {type(data).__name__}; give an iterable of batches, such as a list or a DataLoader{one}"
            )
        if not is_whole(arity) or arity < 0:
            raise AutomergeError(f"inputs={arity!r}: it says how many items of a batch are the model's inputs")
        check_pair(data)
        self._data: Iterable[Any] = listed(_noted(data)) if isinstance(data, Iterator) else data
        self._arity: int = arity
        self._kwargs: dict[str, Any] = {k: v for k, v in (kwargs or {}).items() if not isinstance(v, torch.Tensor)}
        self._named: frozenset[str] = frozenset(kwargs or {})
        self._device: torch.device | None = device

    @classmethod
    def like(cls, data: Any, args: Any, kwargs: Mapping[str, Any] | None, device: torch.device | None) -> Batches:
        """Batches of inputs as those of an example: a tensor, or a tuple or list of inputs.

        A tuple with names is one input, as in `automerge.trace.normalise_args`.
        """
        one = not isinstance(args, list | tuple) or hasattr(args, "_fields")
        example = [args] if one else args
        return cls(data, len(example), kwargs, device, {type(a) for a in example if hasattr(a, "_fields")})

    def __iter__(self) -> Iterator[Batch]:
        given = used = 0
        for number, item in enumerate(_noted(self._data)):
            given += 1
            batch = self._batch(item, number)
            tensors = batch.tensors()
            if tensors and all(t.ndim and not t.shape[0] for t in tensors):
                continue
            if any((t.is_floating_point() or t.is_complex()) and bool(torch.isnan(stored(t)).any()) for t in tensors):
                raise AutomergeError(
                    f"batch {number} of the data holds NaN among its inputs; fill or drop those samples"
                )
            used += 1
            yield batch
        if not given:
            raise AutomergeError(
                "data gave no batch; give at least one (is the DataLoader or the generator empty, or can it be read only "
                "once? then give list(...) of it)"
            )
        if not used:
            raise AutomergeError(f"the data hold no sample: all their batches ({given}) have the length zero")

    def others(self) -> list[Batch]:
        """Of batches that lie in memory, the first of every form but the first batch's; all are looked at."""
        if not isinstance(self._data, list | tuple):
            return []
        forms: dict[str, Batch] = {}
        for batch in self:
            shapes = [(tuple(t.shape[1:]), t.dtype) for t in batch.tensors()]
            forms.setdefault(repr((shapes, len(batch.args), sorted(batch.kwargs))), batch)
        return list(forms.values())[1:]

    def _batch(self, item: Any, number: int) -> Batch:
        if any(isinstance(leaf, torch.Tensor) and leaf.is_meta for leaf in tree_leaves(item)):
            raise AutomergeError(
                f"batch {number} of the data is on the meta device and has no values; load the data first"
            )
        item = _moved(item, self._device)
        if isinstance(item, self._single):
            item = (item,)
        if isinstance(item, Mapping):
            label = next((k for k in _LABEL_KEYS if k in item), None)
            inputs = {k: v for k, v in item.items() if k != label or k in self._named}
            return Batch((), {**self._kwargs, **inputs}, item[label] if label else None, number)
        if not isinstance(item, (list, tuple)):
            raise AutomergeError(
                f"batch {number} of the data is a {type(item).__name__}; "
                "give a tensor, a tuple (inputs, labels) or a dict of keyword inputs"
            )
        if not self._arity:
            raise AutomergeError(
                f"batch {number} of the data is a {type(item).__name__}, but the model's example inputs are keywords; "
                "give dicts of keyword inputs"
            )
        if len(item) < self._arity:
            raise AutomergeError(
                f"batch {number} of the data has {len(item)} items, but the model takes {self._arity} positional inputs"
            )
        rest = tuple(item[self._arity :])
        labels = rest[0] if len(rest) == 1 else (rest or None)
        return Batch(tuple(item[: self._arity]), self._kwargs, labels, number)


def _moved(item: Any, device: torch.device | None) -> Any:
    """A batch without history, on a device."""

    def move(leaf: Any) -> Any:
        if isinstance(leaf, PackedSequence):  # its lengths stay on the CPU
            leaf = leaf._replace(data=leaf.data.detach())
            return leaf if device is None else leaf.to(device)
        return leaf.detach().to(device or leaf.device) if isinstance(leaf, torch.Tensor) else leaf

    return tree_map(move, item, is_leaf=lambda leaf: isinstance(leaf, PackedSequence))


def check_pair(data: object) -> None:
    """Inputs and labels are not two batches.

    Raises:
        AutomergeError: if a list or tuple begins with tensors of different kinds.
    """
    if not isinstance(data, list | tuple) or not data or not all(isinstance(t, torch.Tensor) for t in data[:2]):
        return
    first, *others = data[:2]
    if any(t.dtype != first.dtype or t.ndim < first.ndim for t in others):
        kinds = ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in (first, *others))
        raise AutomergeError(
            f"data is a {type(data).__name__} of different tensors, {kinds}; if they are the inputs and labels of one batch, "
            "give [(inputs, labels)]"
        )


def listed(items: Iterable[Any]) -> list[Any]:
    """All batches of an iterator, so that they can be read again.

    Raises:
        AutomergeError: if they take more than half of the memory; without it, one that never ends would take all of it.
    """
    out: list[Any] = []
    size, limit = 0, (physical_memory() or 2**60) // 2
    for item in items:
        out.append(item)
        size += max(sum(getattr(leaf, "nbytes", 0) for leaf in tree_leaves(item)), _SMALLEST)
        if size > limit:
            raise AutomergeError(
                f"the data are an iterator, which has to be kept in memory, and its first {len(out)} batches take "
                f"{size / 2**30:.3g} GiB, more than half of it; end it with itertools.islice, or give a DataLoader, which is "
                "read again instead"
            )
    return out


def _noted(data: Iterable[Any]) -> Iterator[Any]:
    """The same items; an error of the iterable itself gets a note that says which batch was due."""
    items: Iterator[Any] | None = None
    for number in itertools.count():
        try:
            items = iter(data) if items is None else items
            item = next(items)
        except StopIteration:
            return
        except Exception as error:
            error.add_note(f"while batch {number} of the data was read")
            raise
        yield item


def device_of(model: nn.Module) -> torch.device | None:
    """The device of the model's first parameter or buffer; None if it has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; every module's own mode flag is restored on the way out.

    So is the state of the random generators (torch's, numpy's, Python's): a model that draws numbers takes none of the
    caller's, and from one seed all passes of a batch draw the same (`run_batch`). The fused fast path of multi-head attention
    is off inside, so that its parts are visible to observers and every pass computes the same numbers; nothing is compiled.
    """
    flags = [(module, module.training) for module in model.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        model.eval()
        torch.backends.mha.set_fastpath_enabled(False)
        drawn = forked(devices=gpus((*model.parameters(), *model.buffers())))
        with torch.no_grad(), drawn, torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, training in flags:
            module.training = training


@contextmanager
def preserving(model: nn.Module, state_dict: Mapping[str, torch.Tensor] | None = None) -> Iterator[None]:
    """Buffers that a forward pass writes to or replaces (counters, running averages) are put back on the way out."""
    places = [(module, name, own) for module in model.modules() for name, own in module._buffers.items()]
    buffers = [own for _, _, own in places if own is not None]
    if state_dict is not None:
        buffers += [state_dict[name] for name, _ in model.named_buffers() if name in state_dict]
    kept = [buffer.detach().clone() for buffer in buffers]
    try:
        yield
    finally:
        for module, name, own in places:
            module._buffers[name] = own
        for buffer, value in zip(buffers, kept, strict=True):
            with torch.no_grad(), torch.inference_mode(buffer.is_inference()):
                buffer.copy_(value)


def run_batch(
    model: nn.Module, state_dict: Mapping[str, torch.Tensor] | None, batch: Batch, written: Collection[str] = ()
) -> Any:
    """The model's output on a batch, with its own weights or with those of a state dict.

    What the pass binds to the modules (a hidden state, a weight computed anew) is gone after it. Random numbers are those of
    the batch: other weights, other networks and later passes draw the same on it. It gets copies of the inputs, and of tensors
    whose names are in ``written``; parameters that it writes to are put back.

    Raises:
        AutomergeError: if the model does not run on it, with the model's own error as the cause.
    """
    own = state_of(model) if state_dict is None else state_dict
    weights = {name: tensor for name, tensor in own.items() if name not in written}

    def run() -> Any:
        with drawing(batch.number, gpus(batch.tensors())), restored(model), as_needed(model), unwritten(model, weights):
            args, kwargs = map_tensors(lambda _, t: copy_of(t), (batch.args, batch.kwargs))
            if state_dict is None:
                return model(*args, **kwargs)
            copies = {id(state_dict[name]): state_dict[name].clone() for name in written}
            tensors = lent(model, {name: copies.get(id(value), value) for name, value in state_dict.items()})
            return torch.func.functional_call(model, tensors, args, dict(kwargs), tie_weights=False)

    try:
        out = passed(model, run)
        return map_tensors(lambda _, t: t.detach(), out) if needs_gradients(model) else out
    except AutomergeError:
        raise
    except Exception as error:
        shapes = ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in batch.tensors())
        raise AutomergeError(
            f"the model does not run on batch {batch.number} of the data ({shapes or 'no tensors'}): "
            f"{type(error).__name__}: {error}{few_inputs(batch, error)}"
        ) from error


def few_inputs(batch: Batch, error: BaseException | None) -> str:
    """What to do where a model was given fewer positional inputs than it needs; empty if that is not the error."""
    if not batch.args or not isinstance(error, TypeError) or "required positional argument" not in str(error):
        return ""
    return f"; inputs= says how many items of a batch are inputs, and it is {len(batch.args)}"


def logits_of(output: Any) -> torch.Tensor:
    """The tensor that holds the scores: the output itself, its ``logits``, or its first tensor.

    Raises:
        AutomergeError: if there is none.
    """
    if isinstance(output, torch.Tensor):
        return output
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(named, torch.Tensor):
        return named
    items = output.values() if isinstance(output, Mapping) else output
    if isinstance(items, Iterable):
        for item in items:
            if isinstance(item, torch.Tensor):
                return item
    raise AutomergeError(
        f"the model returns a {type(output).__name__} without a tensor of scores; wrap it so that it returns its logits"
    )


def reals(value: torch.Tensor) -> torch.Tensor | None:
    """The numbers of a float tensor in float64, real and imaginary parts apart; None for integers and booleans.

    Examples:
        >>> reals(torch.tensor([1 + 2j]))
        tensor([[1., 2.]], dtype=torch.float64)
    """
    if value.is_complex():
        value = torch.view_as_real(value.detach().resolve_conj())
    return value.detach().double() if value.is_floating_point() else None


def bind(model: nn.Module, state_dict: Mapping[str, torch.Tensor], *, copy: bool = False) -> dict[str, torch.Tensor]:
    """A state dict as `run_batch` wants it: as the model would load it, with one tensor for names that the model ties.

    Args:
        model: the architecture.
        state_dict: its weights; of any device and precision, they are converted to the model's. Names that the model ties may
            be left out.
        copy: whether every tensor gets memory of its own.

    Raises:
        CheckpointError: if it is no state dict, has other names or shapes than the model, or two values for names that it ties.
    """
    check_eager(model)
    expected = model.state_dict()
    state_dict = as_loaded(checked_state(state_dict), model)
    differ = [n for n in expected if n not in state_dict] + [n for n in state_dict if n not in expected]
    resized = [n for n in expected if not differ and state_dict[n].shape != expected[n].shape]
    if differ or resized:
        what = f"the key {differ[0]!r}" if differ else f"the shape of {resized[0]!r}"
        raise CheckpointError(f"the state dict and the model differ in {what}")
    ties, device = tied_names(expected), device_of(model)
    check_tied(state_dict, ties, "the state dict")
    out: dict[str, torch.Tensor] = {}
    for name, value in state_dict.items():
        if ties.get(name) in out:
            out[name] = out[ties[name]]
            continue
        own = value.detach().to(device, expected[name].dtype)
        out[name] = own.clone(memory_format=torch.contiguous_format) if copy else own
    return out


def check_eager(model: nn.Module) -> None:
    """Weights cannot be lent to a module of TorchScript, one that runs copies of itself, or one on the meta device."""
    check_values(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise AutomergeError("a TorchScript module runs with its own weights only; give the module that was scripted")
    if isinstance(model, nn.DataParallel):
        raise AutomergeError("a DataParallel module runs copies of the module it wraps; give that, model.module")
