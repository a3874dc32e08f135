"""One run of a model as an fx graph of ATen operators: what is dispatched is written down."""

from __future__ import annotations

import keyword
import operator
import re
from collections.abc import Collection
from typing import Any, NoReturn

import torch
from torch import fx, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.weak import TensorWeakRef

from automerge._aliases import Tracked, each, overlaps, read, shadow, write, writes
from automerge._at_once import at_once
from automerge._difference import changed
from automerge._double import plainly
from automerge._errors import TraceError
from automerge._extra_state import held_tensors
from automerge._gradients import copy_of
from automerge._lazy_module import LazyModule
from automerge._masked import CHOICES, by_entry
from automerge._objects import attributes_of, held_objects
from automerge._readers import read_again, tells, told
from automerge._spellings import INDEXED, by_mask
from automerge._trace_info import TraceInfo, source_line
from automerge._tree_io import checked_outputs, map_tensors
from automerge._unfilled import NeedsValues, followed, looks, unfilled, unwritten
from automerge._whereabouts import Whereabouts

aten = torch.ops.aten
_NO_WORD = re.compile("[^0-9A-Za-z]")


class Recorder(TorchDispatchMode):
    """Writes every dispatched operator into an fx graph; in-place operators become functional ones."""

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, values: bool, constants: Collection[str] = (), compute: bool = True) -> None:
        super().__init__()
        self.values = values
        self.compute = compute
        self.gave_up = False
        self.blank: set[fx.Node] = set()  # what follows from numbers that were not computed
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.info = TraceInfo()
        self.at = Whereabouts(model)
        # by identity and by place in memory; tensors die while the model runs, and both are given out again
        self.tracked: dict[int, tuple[TensorWeakRef, Tracked, tuple[Any, ...] | None]] = {}
        self.layouts: dict[tuple[Any, ...], tuple[StorageWeakRef, Tracked]] = {}
        self.alive: list[torch.Tensor] = []
        self.tainted: set[fx.Node] = set()
        self.lists = False  # whether anything was chosen of a tensor
        self.given: set[int] = set()  # what was declared to be constant
        self.arrays = False  # whether inputs are arrays, from which the model makes tensors out of sight
        self.varying: set[fx.Node] = set()
        self.states: list[tuple[torch.Tensor, fx.Node]] = []
        self.outputs: tuple[fx.Node, ...] | None = None  # of the first of several passes
        self.after: list[tuple[fx.Node, fx.Node]] = []  # parameters and what is left in them
        self.replaced: list[str] = []
        self.kept: list[tuple[str, torch.Tensor, torch.Tensor, int]] = []
        self.unseen: dict[int, fx.Node] = {}  # constants without entries that the model holds
        self.buffers = {id(t): name for name, t in model.named_buffers()}
        owners = [*model.named_modules(), *held_objects(model)]
        held = [(f"{path}.{n}" if path else n, t) for path, one in owners for n, t in attributes_of(one).items()]
        self.held = {id(t): name for name, t in reversed(held) if isinstance(t, torch.Tensor)} | self.buffers
        self._add_state(model, constants)

    # ------------------------------------------------------------ placeholders
    def _add_state(self, model: nn.Module, constants: Collection[str]) -> None:
        persistent = set(held_tensors(model))
        tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        first: dict[tuple[Any, ...], str] = {}
        fixed = {id(tensor) for name, tensor in tensors if name in constants}  # under all names of a tied one
        self.given |= fixed
        for name, tensor in tensors:
            if name not in persistent or not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
                continue
            if id(tensor) in fixed:
                self.keep(name, tensor, tensor.detach().clone())
                continue
            key = (id(tensor),) if tensor.numel() == 0 else _layout(tensor)
            if first.setdefault(key, name) is not name:
                self.info.aliases[name] = first[key]
                if id(tensor) not in self.tracked:
                    self._register(tensor, self.layouts[key][1])
                continue
            node = self._placeholder(name, tensor, "state")
            self.states.append((tensor, node))
            self.info.names[node.name] = name
            if id(tensor) in self.buffers:
                self.info.buffers[name] = tensor.detach()
        self.info.overlaps += overlaps((n.meta["name"], t) for t, n in self.states)

    def restore(self) -> None:
        """Put back parameters and buffers that the forward pass wrote to."""
        for tensor, node in self.states:
            before = node.meta["val"]
            if tensor.numel() and before.data_ptr() != tensor.data_ptr() and before.shape == tensor.shape:
                self.info.rewritten.append(node.meta["name"])
                with torch.no_grad():
                    tensor.detach().copy_(before)
        for name, tensor, value, version in self.kept:
            if _version(tensor) != version or changed(tensor, value):  # writes to `.data` leave the version
                self.info.rewritten.append(name)
                with torch.no_grad():
                    tensor.detach().copy_(value)
        self.info.rewritten += self.replaced

    def keep(self, name: str, tensor: torch.Tensor, value: torch.Tensor) -> None:
        """Remember what a tensor that is no parameter held before the forward pass (a cache, a counter)."""
        self.kept.append((name, tensor, value, _version(tensor)))

    def _placeholder(self, name: str, tensor: torch.Tensor, kind: str) -> fx.Node:
        word = _NO_WORD.sub("_", name).strip("_") or kind
        usable = word[0].isalpha() and word != "self" and not keyword.iskeyword(word)
        node = self.graph.placeholder(word if usable else f"{kind}_{word}")
        if node.target != node.name:  # two names may make one word
            node.target = node.name
        node.meta.update(val=tensor.detach(), kind=kind, name=name, module="", source="")
        self._register(tensor, Tracked(node))
        self.alive.append(tensor)
        self.tainted.add(node)
        if kind == "input" or tensor.is_floating_point() or tensor.is_complex():
            self.varying.add(node)
        return node

    def add_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Make a placeholder for every input tensor; returns inputs with fresh tensors, so that none is changed."""

        def visit(path: str, tensor: torch.Tensor) -> torch.Tensor:
            copy = copy_of(tensor)
            node = self._placeholder(path or "input", copy, "input")
            self.info.inputs[node.name] = path
            return copy

        self.arrays = any(
            hasattr(leaf, "__array__") for leaf in tree_leaves((args, kwargs)) if not torch.is_tensor(leaf)
        )
        return map_tensors(visit, args, "args"), map_tensors(visit, kwargs, "kwargs")

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
        found = Tracked(self._constant(tensor))
        self._register(tensor, found)
        return found

    def knows(self, tensor: torch.Tensor) -> bool:
        """Whether this very object was registered."""
        known = self.tracked.get(id(tensor))
        return known is not None and known[0]() is tensor

    def _constant(self, tensor: torch.Tensor) -> fx.Node:
        if self.blank and id(tensor) not in self.held:
            self.give_up()  # it may have come from numbers that were not computed, below the dispatcher
        value = tensor.detach().clone()
        node = self.fixed(value)
        node.meta["from_inputs"] = self.arrays and id(tensor) not in self.held
        if not tensor.numel() and id(tensor) in self.held:
            self.unseen[id(tensor)] = node
        self.info.unknown.append(f"{node.target}{self.at.where()}")
        if isinstance(tensor, nn.Parameter) and id(tensor) not in self.given:
            self.info.unregistered.append(node.meta["source"])
        self.keep(self.held.get(id(tensor), f"a tensor of its own{self.at.where()}"), tensor, value)
        return node

    def fixed(self, value: torch.Tensor) -> fx.Node:
        """A constant as a node."""
        name = f"_constant_{len(self.root._buffers)}"
        self.root.register_buffer(name, value)
        node = self.graph.get_attr(name)
        node.meta.update(val=value, module=self.at.module, source=source_line())
        return node

    def emit(self, target: Any, args: Any, kwargs: Any, value: Any) -> fx.Node:
        plain = by_mask(self.emit, target, args, kwargs, value) if target in INDEXED else None
        self.lists = self.lists or target in CHOICES
        if plain is None and self.lists:  # only then is it worth a look back
            plain = by_entry(self.emit, self.tainted, target, args, kwargs, value)
        if plain is not None:
            return plain
        node = self.graph.call_function(target)
        # given to the call they would be searched for symbols, which takes longest of all
        node.args = args
        if kwargs:
            node.kwargs = kwargs
        sources = node.all_input_nodes
        if any(n in self.tainted for n in sources):
            self.tainted.add(node)
        if any(n in self.varying for n in sources):
            self.varying.add(node)
        if self.blank and any(n in self.blank for n in sources):
            self.blank.add(node)
        node.meta.update(val=self.example(node, value), module=self.at.module, source=source_line())
        return node

    def example(self, node: fx.Node, value: Any, own: bool = False) -> Any:
        """What a node keeps of its value: the value itself (a copy with ``own``), or its shape, type and strides."""
        if not isinstance(value, torch.Tensor):
            return type(value)(self.example(node, v) for v in value) if type(value) in (list, tuple) else value
        if not self.values and node in self.varying:
            return shadow(value)
        return value.detach().clone() if own else value

    # ------------------------------------------------------------ dispatch
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return self._dispatched(func, args, kwargs or {})
        except Exception:
            if self.blank:
                self.give_up()  # a factorisation that fails on zeros, say; the model may go another way then
            raise

    def _dispatched(self, func: Any, args: Any, kwargs: Any) -> Any:
        if isinstance(func, torch._ops.HigherOrderOperator):
            with self:
                return plainly(func, *args, **kwargs)
        if func._schema.name.startswith("aten::_foreach_") and hasattr(aten, func._schema.name[15:]):
            with self:
                return each(func, args, kwargs)
        if func.namespace == "profiler":  # a named span computes nothing
            return func(*args, **kwargs)
        if any(isinstance(a, torch.ScriptObject) for a in args):
            raise TraceError(
                f"{func._schema.name}{self.at.where()} reads packed (quantised) weights, which are no tensors; infer on the "
                "model before it is quantised"
            )

        def to_node(_: str, tensor: torch.Tensor) -> fx.Node:
            return self.node_of(tensor)

        node_args, node_kwargs = map_tensors(to_node, tuple(args)), map_tensors(to_node, dict(kwargs))
        if tells(func):
            return told(self, func, args, kwargs, node_args, node_kwargs)
        if self.blank and looks(func, args, node_args, self.blank):
            self.give_up()
        if writes(func, args):
            return write(self, func, args, kwargs, node_args, node_kwargs)
        out = None if self.compute else self._unfilled(func, args, kwargs, node_args, node_kwargs)
        if out is not None:
            return out
        out = func(*args, **kwargs)
        if isinstance(out, torch.Tensor) and out.is_nested:
            raise TraceError(f"the model makes a nested tensor{self.at.where()} ({source_line()}), {NO_NESTED}")
        if func.overloadpacket in _BARE and not out.is_meta:
            out.zero_()  # what lies in memory by chance is no constant with distinct entries
        self.record(func, args, node_args, node_kwargs, out)
        if func is aten.nonzero.default and node_args[0] in self.tainted:
            self.info.data_dependent.append(self.place())
        return out

    def _unfilled(self, func: Any, args: Any, kwargs: Any, node_args: Any, node_kwargs: Any) -> Any:
        """Zeros in the place of a product that depends on inputs or weights, recorded; None if it is to be computed."""
        if not any(n in self.varying for n in node_args if isinstance(n, fx.Node)):
            return None
        out = unfilled(func, args, kwargs)
        if out is None and self._follows(node_args):
            out = followed(func, args)
        if out is not None:
            node = self.record(func, args, node_args, node_kwargs, out)
            self.blank |= {node, *node.users}
        return out

    def _follows(self, node_args: Any) -> bool:
        """Whether some operand holds numbers that were not computed."""
        return bool(self.blank) and any(n in self.blank for n in node_args if isinstance(n, fx.Node))

    def overwritten(self, func: Any, args: Any, kwargs: Any, node_args: Any) -> Any:
        """Run an operator that writes to its operands, unless it writes over numbers that were not computed."""
        skipped = not self.compute and bool(node_args) and node_args[0] in self.blank and unwritten(func, args)
        return args[0] if skipped else func(*args, **kwargs)

    def give_up(self) -> NoReturn:
        """Numbers that were not computed are looked at; remembered, lest a model catch the exception."""
        self.gave_up = True
        raise NeedsValues

    def place(self) -> str:
        """Where the model is."""
        return f"{source_line()}{self.at.where()}"

    def note_read(self, node: Any, place: str = "") -> None:
        """Python sees a tensor's values: from here on the trace holds for those values only."""
        if isinstance(node, fx.Node) and node in self.blank:
            self.give_up()
        if isinstance(node, fx.Node) and node in self.tainted:
            self.info.data_dependent.append(place or self.place())
            self.info.reads.append(node.name)

    def record(self, func: Any, args: Any, node_args: Any, node_kwargs: Any, out: Any) -> fx.Node:
        """Emit one functional operator and register its outputs, as views of their base where the schema says so."""
        if isinstance(out, torch.Tensor):
            # what was written through a view has other strides in the graph
            written = func is aten.view.default and self._lookup(args[0]).base.version > 0
            node = self.emit(aten.reshape.default if written else func, node_args, node_kwargs, out.detach())
            self._track(func, args, node_args, node_kwargs, out, node, None)
            return node
        node = self.emit(func, node_args, node_kwargs, out)
        if isinstance(out, list | tuple):
            for i, value in enumerate(out):
                if isinstance(value, torch.Tensor) and not (func in _ONE_OUTPUT and value.numel() == 0):
                    item = self.emit(operator.getitem, (node, i), {}, value)
                    self._track(func, args, node_args, node_kwargs, value, item, i)
        return node

    def _track(
        self, func: Any, args: Any, node_args: Any, node_kwargs: Any, out: torch.Tensor, node: fx.Node, item: int | None
    ) -> None:
        source = args[0] if args else None
        viewed = func._schema.returns and func._schema.returns[0].alias_info is not None
        if not viewed or not isinstance(source, torch.Tensor) or source.layout is not torch.strided:
            self._register(out, Tracked(node))
        elif out is not source:
            base = self._lookup(source)
            self._register(out, base.view(func, node_args, node_kwargs, item, node, source, node.meta["val"]))

    def node_of(self, tensor: torch.Tensor) -> fx.Node:
        """The node that holds a tensor's present value."""
        return read(self, self._lookup(tensor))

    def record_call(self, target: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Emit a call that is no operator, and register its output tensor or tuple of tensors."""
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            node = self.emit(target, args, kwargs, out)
            if node in self.blank:
                self.give_up()
            if isinstance(out, torch.Tensor):
                self._register(out, Tracked(node))
            else:
                for i, value in enumerate(out):
                    self._register(value, Tracked(self.emit(operator.getitem, (node, i), {}, value)))

    def finish(self, result: Any) -> fx.GraphModule:
        outputs = checked_outputs(result)
        with torch.no_grad():
            nodes = tuple(map(self.node_of, outputs)) if self.outputs is None else self.outputs
            for node, after in self.after:
                read_again(self, node, after)
        self.graph.output(nodes)
        at_once(self.graph, self.info.reads)
        self.info.outputs = len(nodes)
        module = (fx.GraphModule if self.values and self.compute else LazyModule)(self.root, self.graph)
        module.meta["trace"] = self.info
        return module


NO_NESTED = "which has no shape to follow; pad the sequences (torch.nested.to_padded_tensor) for inference"
_ONE_OUTPUT = (aten.native_batch_norm.default,)  # what it keeps for a backward pass has no entries in evaluation
_BARE_NAMES = ("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided")
_BARE = tuple(getattr(aten, name) for name in _BARE_NAMES)


def _version(tensor: torch.Tensor) -> int:
    """How often a tensor was written to."""
    return 0 if tensor.is_inference() else tensor._version


def _layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    return (
        tensor.data_ptr(),
        tensor.shape,
        tensor.stride(),
        tensor.dtype,
        tensor.is_neg(),
        tensor.is_conj(),
    )
