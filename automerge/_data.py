"""Batches of data, from whatever iterable holds them."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import Dataset, IterableDataset

from automerge._errors import AutomergeError
from automerge._machine import physical_memory
from automerge._numbers import is_whole
from automerge._tree_io import stored

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
