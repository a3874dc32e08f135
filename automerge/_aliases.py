"""Functionalisation of in-place writes: every tensor remembers how it is a view of its base.

A write to a view is scattered back into the base through the chain of view operators; other views of the same base are
replayed on the new base when they are next read.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes

from automerge._tree_io import map_tensors, tensors_of

aten = torch.ops.aten


def shadow(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor on the meta device with the same shape, type and place in a storage of the same size."""
    if tensor.is_meta or tensor.layout is not torch.strided:
        return tensor
    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    storage = torch.UntypedStorage(tensor.untyped_storage().nbytes(), device="meta")
    empty = torch.empty(0, dtype=tensor.dtype, device="meta")
    return empty.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


class _Base:
    """One storage: its current node, and a version that grows with every write."""

    def __init__(self, node: fx.Node) -> None:
        self.node = node
        self.version = 0
        self.live: list[fx.Node] = []  # nodes whose example value shares the storage

    def freeze(self) -> None:
        """Before a write: give every node that shares the storage an example value of its own."""
        for node in self.live:
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor) and not value.is_meta:
                node.meta["val"] = value.detach().clone()
        self.live.clear()


@dataclass(frozen=True)
class _Step:
    """One view operator of a chain; ``args`` are node arguments without the first, ``start`` is where its operand began."""

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    item: int | None
    shape: torch.Size
    strides: tuple[int, ...]
    start: int
    value: torch.Tensor


class Tracked:
    """One tensor: the node that holds its value as of ``version``, and how it is a view of its base."""

    def __init__(self, node: fx.Node, base: _Base | None = None, chain: tuple[_Step, ...] = ()) -> None:
        self.node = node
        self.base = base or _Base(node)
        self.chain = chain
        self.version = self.base.version
        self.base.live.append(node)

    def view(
        self,
        op: Any,
        args: Any,
        kwargs: Any,
        item: int | None,
        node: fx.Node,
        source: torch.Tensor,
        value: torch.Tensor,
    ) -> Tracked:
        """The entry of a view of this tensor.

        Args:
            op: the view operator.
            args: its arguments, nodes in the place of tensors.
            kwargs: its keyword arguments.
            item: which of its outputs.
            node: of the view.
            source: the tensor that is viewed.
            value: the view, or what its node keeps of it.
        """
        where = (source.shape, source.stride(), int(source.storage_offset()))
        step = _Step(op, tuple(args[1:]), dict(kwargs), item, *where, value)
        return Tracked(node, self.base, (*self.chain, step))


def read(recorder: Any, tracked: Tracked) -> fx.Node:
    """The node of a tensor's present value; replays its view chain if the base was written since."""
    if tracked.version != tracked.base.version:
        node = tracked.base.node
        for step in tracked.chain:
            node = _replay(recorder, step, node)
        tracked.node, tracked.version = node, tracked.base.version
    return tracked.node


def _replay(recorder: Any, step: _Step, node: fx.Node) -> fx.Node:
    if step.item is None:
        return computed(recorder, step.op, (node, *step.args), step.kwargs, step.value)
    whole = computed(recorder, step.op, (node, *step.args), step.kwargs, None)
    return computed(recorder, operator.getitem, (whole, step.item), {}, step.value)


def computed(
    recorder: Any, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], live: torch.Tensor | None
) -> fx.Node:
    """Emit a node whose example value is computed from its operands' example values.

    The live tensor shares memory that may be written again; it only serves where the operator depends on memory layout.
    """
    values, named = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
    if any(t.is_meta for t in tensors_of((values, named, live))):
        values, named = map_tensors(lambda _, t: shadow(t), values), map_tensors(lambda _, t: shadow(t), named)
        live = None if live is None else shadow(live)
    if "as_strided" in str(target) and live is not None:
        if "scatter" not in str(target):
            return recorder.emit(target, args, kwargs, live.detach().clone())
        source = torch.empty_strided(live.shape, live.stride(), dtype=live.dtype, device=live.device)
        values = (source.copy_(values[0]), *values[1:])
    with torch.no_grad(), _disable_current_modes(), torch._C.DisableTorchFunction():
        # a view by its shape: the operand's strides may differ from those of the recorded run
        run = aten.reshape.default if target in (aten.view.default, aten._unsafe_view.default) else target
        return recorder.emit(run, args, kwargs, run(*values, **named))


_BATCH_NORMS = {getattr(aten, name).default for name in ("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm")}


def writes(func: Any, args: Any) -> bool:
    """Whether an operator writes to its operands; batch normalisations do in training, which their schemas do not tell."""
    return bool(func._schema.is_mutable or (func in _BATCH_NORMS and args[5]))


def write(recorder: Any, func: Any, args: Any, kwargs: Any, node_args: Any, node_kwargs: Any) -> Any:
    """Run an in-place or ``out=`` operator, and record its functional form written to what it mutates."""
    if func in _BATCH_NORMS:
        return _normalise(recorder, func, args, node_args)
    targets = written(func, args, kwargs)
    before = [recorder._lookup(target) for target in targets]
    for tracked in before:
        tracked.base.freeze()
    out = recorder.overwritten(func, args, kwargs, node_args)
    if func.overloadpacket in _METADATA:
        return _retarget(recorder, func, args, node_args, node_kwargs, out, before[0])
    _record_new(recorder, func, node_args, node_kwargs, out)
    functional, drop = functional_of(func)
    plain_kwargs = {k: v for k, v in node_kwargs.items() if k not in drop}
    values = [t.detach() for t in targets]
    if functional is None:
        nodes = [recorder.emit(func, node_args, node_kwargs, v) for v in values]
    elif len(targets) == 1:
        nodes = [recorder.emit(functional, node_args, plain_kwargs, values[0])]
        nodes[0].meta["val"] = recorder.example(nodes[0], nodes[0].meta["val"], own=True)
    else:
        whole = recorder.emit(functional, node_args, plain_kwargs, tuple(values))
        whole.meta["val"] = recorder.example(whole, whole.meta["val"], own=True)  # they may be written to again
        nodes = [recorder.emit(operator.getitem, (whole, i), {}, v) for i, v in enumerate(whole.meta["val"])]
    for target, node in zip(targets, nodes, strict=True):
        assign(recorder, recorder._lookup(target), node, target)
    returned = out if isinstance(out, list | tuple) else [out]
    for value in returned:
        if isinstance(value, torch.Tensor) and not recorder.knows(value):
            recorder._register(value, recorder._lookup(value))
    return out


def _normalise(recorder: Any, func: Any, args: Any, node_args: Any) -> Any:
    """Run a batch normalisation in training, and record its form that returns what becomes of the running statistics."""
    running = args[3:5]
    if any(t is None for t in running):
        out = func(*args)
        recorder.record(func, args, node_args, {}, out)
        return out
    for statistic in running:
        recorder._lookup(statistic).base.freeze()
    out = func(*args)
    whole = recorder.emit(aten._native_batch_norm_legit_functional.default, node_args, {}, (*out, *running))
    nodes = [recorder.emit(operator.getitem, (whole, i), {}, v.detach()) for i, v in enumerate((*out, *running))]
    for value, node in zip(out, nodes[:3], strict=False):
        recorder._register(value, Tracked(node))
    for statistic, node in zip(running, nodes[3:], strict=True):
        node.meta["val"] = recorder.example(node, node.meta["val"], own=True)
        assign(recorder, recorder._lookup(statistic), node, statistic)
    return out


def _record_new(recorder: Any, func: Any, node_args: Any, node_kwargs: Any, out: Any) -> None:
    """What an operator returns beside what it writes to (an activation, beside the noise that it keeps)."""
    single = not isinstance(out, list | tuple)
    returned = [out] if single else out
    new = [
        (i, value)
        for i, (value, about) in enumerate(zip(returned, func._schema.returns, strict=True))
        if isinstance(value, torch.Tensor) and about.alias_info is None
    ]
    if not new:
        return
    whole = recorder.emit(func, node_args, node_kwargs, out.detach() if single else out)
    for i, value in new:
        node = whole if single else recorder.emit(operator.getitem, (whole, i), {}, value.detach())
        recorder._register(value, Tracked(node))


def each(func: Any, args: Any, kwargs: Any) -> Any:
    """An operator on lists of tensors, run on one after the other: ``_foreach_mul_`` as ``mul_``.

    Raises:
        AttributeError: if there is no operator on single tensors of that name.
    """
    one = getattr(aten, func._schema.name.removeprefix("aten::_foreach_"))
    count = len(args[0])

    def pick(value: Any, i: int) -> Any:
        return value[i] if isinstance(value, list | tuple) and len(value) == count else value

    out = [one(*(pick(a, i) for a in args), **{k: pick(v, i) for k, v in kwargs.items()}) for i in range(count)]
    return out if func._schema.returns else None


_METADATA = {aten.transpose_, aten.t_, aten.unsqueeze_, aten.squeeze_, aten.swapaxes_, aten.swapdims_, aten.detach_}


def _retarget(
    recorder: Any, func: Any, args: Any, node_args: Any, node_kwargs: Any, out: torch.Tensor, before: Tracked
) -> torch.Tensor:
    """An operator that changes a tensor's own shape: the object becomes a view of what it was."""
    functional, _ = functional_of(func)
    node = recorder.emit(functional, node_args, node_kwargs, out)
    node.meta["val"] = recorder.example(node, node.meta["val"], own=True)
    recorder._register(
        args[0],
        before.view(
            functional, node_args, node_kwargs, None, node, before.node.meta["val"], recorder.example(node, out)
        ),
    )
    return out


def written(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The tensors that a mutating operator writes to."""
    targets: list[torch.Tensor] = []
    for i, a in enumerate(func._schema.arguments):
        if a.alias_info is not None and a.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(a.name)
            targets += [
                t for t in (value if isinstance(value, list | tuple) else [value]) if isinstance(t, torch.Tensor)
            ]
    return targets


def functional_of(func: Any) -> tuple[Any, set[str]]:
    """The operator without side effects that computes what an in-place or ``out=`` operator writes."""
    name = func._schema.name.split("::")[1]
    space = getattr(torch.ops, func.namespace)
    outs = {
        a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write and a.kwarg_only
    }
    wanted = [a.name for a in func._schema.arguments if a.name not in outs]
    in_place = name.endswith("_") and not name.endswith("__")
    plain = name[:-1] if in_place else name
    packets = [getattr(space, n, None) for n in ((plain, f"{plain}_functional") if in_place else (plain,))]
    names = [
        (p, n) for p in packets if p is not None for n in sorted(p.overloads(), key=lambda n: n != func._overloadname)
    ]
    for packet, overload in names:
        candidate = getattr(packet, overload)
        if not candidate._schema.is_mutable and [a.name for a in candidate._schema.arguments] == wanted:
            return candidate, outs
    return (aten.zeros_like.default, set()) if name == "zero_" else (None, set())


def assign(recorder: Any, tracked: Tracked, node: fx.Node, tensor: torch.Tensor) -> None:
    """Make ``node`` the present value of a tensor and of everything that shares its memory."""
    base = tracked.base
    sources: list[fx.Node] = []
    for i in range(len(tracked.chain)):
        sources.append(base.node if i == 0 else _replay(recorder, tracked.chain[i - 1], sources[-1]))
    new = node
    for step, source in zip(reversed(tracked.chain), reversed(sources), strict=True):
        new = _scatter(recorder, step, source, new)
    base.node = new
    base.version += 1
    tracked.node, tracked.version = node, base.version


def _scatter(recorder: Any, step: _Step, source: fx.Node, new: fx.Node) -> fx.Node:
    """``source`` with the part that ``step`` views replaced by ``new``."""
    shape = list(step.shape)
    op, args = step.op.overloadpacket, step.args
    if op is aten.slice:
        return computed(recorder, aten.slice_scatter.default, (source, new, *args), step.kwargs, None)
    if op is aten.select:
        return computed(recorder, aten.select_scatter.default, (source, new, *args), step.kwargs, None)
    if op is aten.diagonal:
        return computed(recorder, aten.diagonal_scatter.default, (source, new, *args), step.kwargs, None)
    if op in (aten.view, aten._unsafe_view, aten.squeeze, aten.unsqueeze, aten.alias, aten.detach, aten._reshape_alias):
        return computed(recorder, aten.reshape.default, (new, shape), {}, None)
    if op in (aten.t, aten.transpose, aten.permute):
        order = _order(op, args, len(shape))
        back = [order.index(k) for k in range(len(shape))]
        return computed(recorder, aten.permute.default, (new, back), {}, None)
    if op is aten.unbind:
        dim = args[0] if args else 0
        return computed(recorder, aten.select_scatter.default, (source, new, dim, step.item), {}, None)
    view = step.value
    if op in (aten.split, aten.split_with_sizes) and step.item is not None:
        dim = (args[1] if len(args) > 1 else 0) % len(shape)
        start = (view.storage_offset() - step.start) // max(step.strides[dim], 1)
        return computed(
            recorder, aten.slice_scatter.default, (source, new, dim, start, start + view.shape[dim]), {}, None
        )
    offset = view.storage_offset() - step.start
    places = torch.empty_strided(shape, step.strides, dtype=torch.int64)
    if places.is_contiguous():  # the operator counts places from the start of the memory: let it be the tensor's own
        whole = computed(recorder, aten.clone.default, (source,), {"memory_format": torch.contiguous_format}, None)
        where = (list(view.shape), list(view.stride()), offset)
        return computed(recorder, aten.as_strided_scatter.default, (whole, new, *where), {}, None)
    places.copy_(torch.arange(places.numel()).reshape(places.shape))
    index = recorder.fixed(places.as_strided(view.shape, view.stride(), offset).reshape(-1))
    flat, part = (computed(recorder, aten.reshape.default, (n, [-1]), {}, None) for n in (source, new))
    filled = computed(recorder, aten.scatter.src, (flat, 0, index, part), {}, None)
    return computed(recorder, aten.reshape.default, (filled, shape), {}, None)


def _order(op: Any, args: tuple[Any, ...], ndim: int) -> list[int]:
    if op is aten.permute:
        return [d % ndim for d in args[0]]
    order = list(range(ndim))
    a, b = (0, ndim - 1) if op is aten.t else (args[0] % ndim, args[1] % ndim)
    if ndim > 1:
        order[a], order[b] = order[b], order[a]
    return order


def overlaps(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Where tensors share entries with earlier ones (a transposed twin, a view of a flat parameter).

    Yields:
        ``(name, other, places)``: entry i of ``name`` is entry ``places[i]`` of ``other``, or none where that is -1.
    """
    beside: dict[Any, list[tuple[str, torch.Tensor]]] = {}
    for name, tensor in tensors:
        if tensor.layout is not torch.strided or tensor.numel() == 0:
            continue
        for other, known in (near := beside.setdefault(memory_of(tensor), [])):
            if not _meet(tensor, known):
                continue
            mine = _addresses(tensor)
            theirs, order = _addresses(known).sort()
            at = torch.searchsorted(theirs, mine).clamp(max=theirs.numel() - 1)
            places = torch.where(theirs[at] == mine, order[at], -1)
            if bool((places >= 0).any()):
                yield name, other, places.reshape(tensor.shape)
        near.append((name, tensor))


def memory_of(tensor: torch.Tensor) -> tuple[str, int]:
    """What tensors that share memory have in common; without values there is no address, but a storage."""
    storage = tensor.untyped_storage()
    return tensor.device.type, storage._cdata if tensor.is_meta else storage.data_ptr()


def _meet(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors reach into one stretch of the storage that they share."""
    if a.dtype != b.dtype:
        return False
    first = [t.storage_offset() for t in (a, b)]
    last = [t.storage_offset() + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) for t in (a, b)]
    return max(first) <= min(last)


def _addresses(tensor: torch.Tensor) -> torch.Tensor:
    """The place in its storage of every entry, in order."""
    places = torch.tensor(tensor.storage_offset())
    for n, stride in zip(tensor.shape, tensor.stride(), strict=True):
        places = places[..., None] + torch.arange(n) * stride
    return places.reshape(-1)
