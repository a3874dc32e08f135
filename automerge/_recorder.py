"""The dispatch mode that writes a model's operators into an fx graph as the model runs."""

from __future__ import annotations

import contextlib
import functools
import gc
import operator
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules import module as _nn_module
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.weak import TensorWeakRef

from automerge._aliases import Tracked, read, write
from automerge._errors import TraceError
from automerge._outline import Lookalikes, NeedsValues, Outline, filled
from automerge._tree_io import map_tensors, tensors_of

aten = torch.ops.aten
_TORCH_DIR = os.path.dirname(torch.__file__)
_HERE = os.path.dirname(__file__)


@dataclass
class TraceInfo:
    """What a trace knows beside its graph; found at ``graph_module.meta["trace"]``.

    Attributes:
        names: placeholder name -> state-dict name, for parameters and persistent buffers.
        aliases: further state-dict names of tied tensors -> the first name.
        inputs: placeholder name -> path of the tensor in ``(args, kwargs)``.
        outputs: the number of output tensors.
        data_dependent: where a python value was read from a tensor that depends on inputs or parameters.
        reads: nodes whose values python read (``.item()``, ``.tolist()``, ``if tensor``); they must not change either.
        rewritten: state-dict names that the forward pass writes to (they are put back).
        unknown: places where a tensor of unknown provenance entered (treated as a constant).
    """

    names: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    outputs: int = 0
    data_dependent: list[str] = field(default_factory=list)
    reads: list[str] = field(default_factory=list)
    rewritten: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


class Recorder(TorchDispatchMode):
    """Writes every dispatched operator into an fx graph; in-place operators become functional ones.

    Args:
        model: whose parameters and buffers become placeholders.
        values: whether nodes keep the values of what depends on inputs or float parameters.
        compute: whether operators over float inputs and float parameters are computed. Without, the model is given
            tensors of the right form that hold no numbers, and `NeedsValues` is raised where it looks at one.
        foreign: memory that an earlier run left without numbers.
    """

    def __init__(
        self, model: nn.Module, values: bool, compute: bool = True, foreign: Sequence[StorageWeakRef] = ()
    ) -> None:
        super().__init__()
        self.values, self.compute = values, compute
        self.blank: set[fx.Node] = set()  # what is not computed, and what that is computed from
        self.lookalikes = Lookalikes()
        self.gave_up = False
        self.foreign, self.met_foreign = frozenset(foreign), False
        self.stand_ins: list[StorageWeakRef] = []  # memory that was handed out and never written to
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.info = TraceInfo()
        self.paths = {id(m): name for name, m in model.named_modules()}
        self.stack: list[str] = []
        # by identity and by place in memory; tensors die while the model runs, and both are given out again
        self.tracked: dict[int, tuple[TensorWeakRef, Tracked, tuple[Any, ...] | None]] = {}
        self.layouts: dict[tuple[Any, ...], tuple[StorageWeakRef, Tracked]] = {}
        self.alive: list[torch.Tensor] = []
        self.tainted: set[fx.Node] = set()
        self.varying: set[fx.Node] = set()
        self.states: list[tuple[torch.Tensor, fx.Node]] = []
        self.owned = {} if compute else {id(t): t for t in _held_by(model)}
        self._add_state(model)

    # ------------------------------------------------------------ placeholders
    def _add_state(self, model: nn.Module) -> None:
        persistent = set(model.state_dict(keep_vars=True))
        tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        first: dict[tuple[Any, ...], str] = {}
        for name, tensor in tensors:
            if name not in persistent or not isinstance(tensor, torch.Tensor):
                continue
            key = (id(tensor),) if tensor.numel() == 0 else _layout(tensor)
            if key in first:
                self.info.aliases[name] = first[key]
                if id(tensor) not in self.tracked:
                    self._register(tensor, self.layouts[key][1])
                continue
            first[key] = name
            node = self._placeholder(name, tensor, "state")
            self.states.append((tensor, node))
            self.info.names[node.name] = name

    def restore(self) -> None:
        """Put back parameters and buffers that the forward pass wrote to."""
        for tensor, node in self.states:
            before = node.meta["val"]
            if tensor.numel() and before.data_ptr() != tensor.data_ptr() and before.shape == tensor.shape:
                self.info.rewritten.append(node.meta["name"])
                with torch.no_grad():
                    tensor.detach().copy_(before)

    def _placeholder(self, name: str, tensor: torch.Tensor, kind: str) -> fx.Node:
        word = "".join(c if c.isalnum() else "_" for c in name).strip("_") or kind
        node = self.graph.placeholder(word if word[0].isalpha() else f"{kind}_{word}")
        node.meta.update(val=tensor.detach(), kind=kind, name=name, module="", source="")
        self._register(tensor, Tracked(node))
        self.alive.append(tensor)
        self.tainted.add(node)
        numbers = tensor.is_floating_point() or tensor.is_complex()
        if kind == "input" or numbers:
            self.varying.add(node)
        if numbers and not self.compute:
            self.blank.add(node)
        return node

    def add_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Make a placeholder for every input tensor; returns inputs with fresh tensors, so that none is changed."""

        def visit(path: str, tensor: torch.Tensor) -> torch.Tensor:
            copy = tensor.detach().clone()
            node = self._placeholder(path or "input", copy, "input")
            self.info.inputs[node.name] = path
            return copy

        return map_tensors(visit, args, "args"), map_tensors(visit, kwargs, "kwargs")

    def add_operand(self, name: str, tensor: torch.Tensor, known: bool) -> None:
        """Make a placeholder for an operand of an operator whose pieces are recorded."""
        node = self._placeholder(name, tensor, "input")
        if not self.compute:
            (self.blank.discard if known else self.blank.add)(node)

    # ------------------------------------------------------------ where we are
    @contextlib.contextmanager
    def watch_modules(self) -> Iterator[None]:
        def enter(module: nn.Module, _: Any) -> None:
            self.stack.append(self.paths.get(id(module), self.stack[-1] if self.stack else ""))

        def leave(module: nn.Module, _: Any, __: Any) -> None:
            if self.stack:
                self.stack.pop()

        handles = [
            _nn_module.register_module_forward_pre_hook(enter),
            _nn_module.register_module_forward_hook(leave, always_call=False),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def where(self) -> str:
        return f" in module {self.stack[-1]!r}" if self.stack and self.stack[-1] else ""

    # ------------------------------------------------------------ tensors and nodes
    def _register(self, tensor: torch.Tensor, tracked: Tracked) -> None:
        layout = None
        if tensor.layout is torch.strided and tensor.numel():
            layout = _layout(tensor)
            self.layouts[layout] = (StorageWeakRef(tensor.untyped_storage()), tracked)
        else:
            self.alive.append(tensor)
        self.tracked[id(tensor)] = (TensorWeakRef(tensor), tracked, layout)

    def _lookup(self, tensor: torch.Tensor) -> Tracked:
        known = self.tracked.get(id(tensor))
        strided = tensor.layout is torch.strided and tensor.numel() > 0
        layout = _layout(tensor) if strided else None
        if known is not None and known[0]() is tensor and known[2] == layout:
            return known[1]
        # x.data and the like make tensors that no operator announced; x.data = y points x elsewhere
        place = self.layouts.get(layout) if layout is not None else None
        if place is not None and not place[0].expired():
            return place[1]
        whole = next((t for t, _ in self.states if _holds(t, tensor)), None) if strided else None
        found = Tracked(self._constant(tensor)) if whole is None else self._part(whole, tensor)
        self._register(tensor, found)
        return found

    def _part(self, whole: torch.Tensor, tensor: torch.Tensor) -> Tracked:
        """The entry of a tensor in the memory of a parameter or buffer that no operator of this run has made."""
        base = self._lookup(whole)
        where = (list(tensor.shape), list(tensor.stride()), tensor.storage_offset())
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            node = self.emit(aten.as_strided.default, (read(self, base), *where), {}, tensor.detach())
        return base.view(aten.as_strided.default, (whole, *where), {}, None, node, node.meta["val"])

    def knows(self, tensor: torch.Tensor) -> bool:
        """Whether this very object was registered."""
        known = self.tracked.get(id(tensor))
        return known is not None and known[0]() is tensor

    def _constant(self, tensor: torch.Tensor) -> fx.Node:
        if not self.compute and id(tensor) not in self.owned:
            raise self.give_up("a tensor of unknown provenance may be a copy of one that was not computed")
        if self.foreign and tensor.layout is torch.strided:
            self.met_foreign |= StorageWeakRef(tensor.untyped_storage()) in self.foreign
        name = f"_constant_{len(self.info.unknown)}"
        value = tensor.detach().clone()
        self.root.register_buffer(name, value)
        node = self.graph.get_attr(name)
        node.meta.update(val=value, module=self.stack[-1] if self.stack else "", source=_source())
        self.info.unknown.append(f"{name}{self.where()}")
        return node

    def emit(self, target: Any, args: Any, kwargs: Any, value: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        sources = node.all_input_nodes
        for kind in (self.tainted, self.varying, self.blank):
            if not kind.isdisjoint(sources):
                kind.add(node)
        node.meta.update(val=self.example(node, value), module=self.stack[-1] if self.stack else "", source=_source())
        return node

    def example(self, node: fx.Node, value: Any, own: bool = False) -> Any:
        """What a node keeps of its value: the value itself (a copy with ``own``), or its outline."""
        if not isinstance(value, torch.Tensor):
            return type(value)(self.example(node, v) for v in value) if type(value) in (list, tuple) else value
        if node in self.blank or (not self.values and node in self.varying):
            return Outline.of(value) if value.layout is torch.strided and not value.is_meta else value
        return value.detach().clone() if own else value

    # ------------------------------------------------------------ dispatch
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FROM_PYTHON:
            self.owned[id(args[0])] = args[0]
        sources: list[fx.Node] = []
        tensors: list[torch.Tensor] = []

        def to_node(_: str, tensor: torch.Tensor) -> fx.Node:
            sources.append(self.node_of(tensor))
            tensors.append(tensor)
            return sources[-1]

        node_args, node_kwargs = map_tensors(to_node, tuple(args)), map_tensors(to_node, dict(kwargs))
        if func in _READS:
            for node in sources:
                self.note_read(node)
            return func(*args, **kwargs)
        blank = not self.blank.isdisjoint(sources)
        if not self.compute and func.overloadpacket in _REPLACES:
            raise self.give_up(f"{func} gives a tensor other memory")
        blank = blank and (func._schema.is_mutable or not _is_view(func))
        looks_up = blank and self.check_operands(func, sources, tensors)
        if func._schema.is_mutable:
            return write(self, func, args, kwargs, node_args, node_kwargs, blank)
        out = self.alike(func, args, kwargs, looks_up) if blank else func(*args, **kwargs)
        self.record(func, args, node_args, node_kwargs, out)
        if func is aten.nonzero.default and node_args[0] in self.tainted:
            self.info.data_dependent.append(f"{_source()}{self.where()}")
        return out

    def alike(self, func: Any, args: Any, kwargs: Any, run: bool = False) -> Any:
        """What has the form of an operator's output that is not computed; with ``run`` it comes from the operator itself."""
        try:
            out = self.lookalikes.call(func, args, kwargs, run)
        except NeedsValues as error:
            raise self.give_up(str(error)) from error
        made = [out] if isinstance(out, torch.Tensor) else tensors_of(out)
        self.stand_ins += [StorageWeakRef(t.untyped_storage()) for t in made if t.numel()]
        return out

    def check_operands(self, func: Any, sources: Sequence[fx.Node], tensors: Sequence[torch.Tensor]) -> bool:
        """Let no operator pass uncomputed that could fail, or give another form, with numbers.

        The meta device takes operands of different types and devices, kernels take neither. Whether positions are in range is
        only known to the kernel.

        Returns:
            Whether whole numbers are among the operands.
        """
        first: torch.Tensor | None = None
        whole = False
        for node, tensor in zip(sources, tensors, strict=True):
            if tensor.dtype is torch.bool:
                continue
            if tensor.dtype not in _COMMON:
                if tensor.is_floating_point() or tensor.is_complex() or node in self.blank or func._schema.is_mutable:
                    raise self.give_up(f"{func} on {tensor.dtype}")
                whole = True
                continue
            if tensor.dim() == 0:
                continue
            if first is not None and (tensor.dtype is not first.dtype or tensor.device != first.device):
                raise self.give_up(f"{func} on operands of several types or devices")
            first = first if first is not None else tensor
        return whole

    def give_up(self, why: str) -> NeedsValues:
        """What to raise where a value is needed; the trace has failed even if somebody catches it on the way."""
        self.gave_up = True
        return NeedsValues(why)

    def leftovers(self) -> list[StorageWeakRef]:
        """Memory that was never written to and that somebody still holds."""
        if not all(ref.expired() for ref in self.stand_ins):
            gc.collect()
        return [ref for ref in self.stand_ins if not ref.expired()]

    def spoil(self) -> None:
        """Fill such memory with NaN, so that whoever uses it sees it."""
        for ref in self.leftovers():
            storage = torch.UntypedStorage._new_with_weak_ptr(ref.cdata)
            if storage is not None:
                storage.fill_(0xFF)  # type: ignore[attr-defined]

    def note_read(self, node: Any) -> None:
        """Python sees a tensor's values: from here on the trace holds for those values only."""
        if node in self.blank and node.op != "placeholder":
            raise self.give_up("python reads a value")
        if node in self.tainted:
            self.info.data_dependent.append(f"{_source()}{self.where()}")
            self.info.reads.append(node.name)

    def record(self, func: Any, args: Any, node_args: Any, node_kwargs: Any, out: Any) -> fx.Node:
        """Emit one functional operator and register its outputs, as views of their base where the schema says so."""
        if isinstance(out, torch.Tensor):
            node = self.emit(func, node_args, node_kwargs, out.detach())
            self._track(func, args, node_args, node_kwargs, out, node, None)
            return node
        node = self.emit(func, node_args, node_kwargs, out)
        if isinstance(out, list | tuple):
            for i, value in enumerate(out):
                if isinstance(value, torch.Tensor):
                    item = self.emit(operator.getitem, (node, i), {}, value)
                    self._track(func, args, node_args, node_kwargs, value, item, i)
        return node

    def _track(
        self, func: Any, args: Any, node_args: Any, node_kwargs: Any, out: torch.Tensor, node: fx.Node, item: int | None
    ) -> None:
        base = None
        if func._schema.returns and func._schema.returns[0].alias_info is not None and args:
            source = args[0]
            if isinstance(source, torch.Tensor):
                if out is source:
                    return
                base = self._lookup(source)
        held = node.meta["val"]
        self._register(
            out, Tracked(node) if base is None else base.view(func, node_args, node_kwargs, item, node, held)
        )

    def node_of(self, tensor: torch.Tensor) -> fx.Node:
        """The node that holds a tensor's present value."""
        return read(self, self._lookup(tensor))

    def record_call(self, target: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Emit a call that is no operator, and register its output tensor or tuple of tensors."""
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            node = self.emit(target, args, kwargs, out)
            if isinstance(out, torch.Tensor):
                self._register(out, Tracked(node))
            else:
                for i, value in enumerate(out):
                    self._register(value, Tracked(self.emit(operator.getitem, (node, i), {}, value)))

    def finish(self, result: Any) -> fx.GraphModule:
        if self.gave_up:
            raise NeedsValues("the model went on after it had looked at a value")
        outputs = tensors_of(result)
        if not outputs:
            raise TraceError("the model returned no tensor; automerge needs an output that it can compare")
        with torch.no_grad():
            nodes = tuple(self.node_of(t) for t in outputs)
        self.graph.output(nodes)
        for node in self.graph.nodes:
            node.meta["val"] = filled(node.meta.get("val"))
        self.info.outputs = len(nodes)
        module = _LazyGraphModule(self.root, self.graph)  # its code is only written when somebody runs it
        module.meta["trace"] = self.info
        return module


_COMMON = (torch.float32, torch.float64)
_REPLACES = (aten.set_, aten.resize_, aten.resize_as_)
_FROM_PYTHON = (aten.lift_fresh.default, aten.lift_fresh_copy.default)
_READS = (aten._local_scalar_dense.default, aten.item.default, aten.equal.default, aten.is_nonzero.default)


class Readers(TorchFunctionMode):
    """Notes the ways in which python reads a whole tensor without any operator."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _WHOLE_READS and isinstance(args[0], torch.Tensor):
            self.recorder.note_read(self.recorder.node_of(args[0]))
        if func in _SHOWN and args[0] is not None and self.recorder.node_of(args[0]) in self.recorder.blank:
            raise self.recorder.give_up("python shows a tensor")
        if func is torch.nn.functional.one_hot:
            return _one_hot(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _one_hot(index: torch.Tensor, num_classes: int = -1) -> torch.Tensor:
    """`one_hot` without its look at the smallest and largest index when the number of classes is known."""
    if num_classes <= 0:
        return torch.ops.aten.one_hot(index, num_classes)
    zeros = index.new_zeros((*index.shape, num_classes))
    return zeros.scatter(-1, index.unsqueeze(-1), 1)


_WHOLE_READS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.__dlpack__}
_SHOWN = {torch.Tensor.__repr__, torch.Tensor.__format__, torch.Tensor.__reduce_ex__}


@functools.cache
def _is_view(func: Any) -> bool:
    """Whether an operator only looks at its operand's memory in another way."""
    returns = func._schema.returns
    return bool(returns) and returns[0].alias_info is not None and "as_strided" not in func._schema.name


def _held_by(model: nn.Module) -> list[torch.Tensor]:
    """The tensors that modules hold: parameters, buffers, plain attributes and lists or dicts of tensors."""
    found: list[torch.Tensor] = []
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, dict):
                value = list(value.values())
            children = value if isinstance(value, list | tuple) else (value,)
            found += [v for v in children if isinstance(v, torch.Tensor)]
    return found


def _holds(whole: torch.Tensor, part: torch.Tensor) -> bool:
    """Whether a tensor lies in the memory of another."""
    if whole.dtype is not part.dtype or whole.untyped_storage().data_ptr() != part.untyped_storage().data_ptr():
        return False
    first, last = _extent(whole)
    start, stop = _extent(part)
    return first <= start and stop <= last


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    start = int(tensor.storage_offset())
    return start, start + sum((n - 1) * int(s) for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def _layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    return (
        tensor.data_ptr(),
        tuple(tensor.shape),
        tuple(tensor.stride()),
        tensor.dtype,
        tensor.is_neg(),
        tensor.is_conj(),
    )


def _source() -> str:
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith((_TORCH_DIR, _HERE, "<")):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""
