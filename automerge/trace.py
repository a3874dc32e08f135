"""Tracing: run a model once on real tensors and write down every operator.

The result is a `torch.fx.GraphModule` of ATen operators. Recording at the dispatcher makes ``nn.Linear``, ``F.linear``,
``x @ w.T``, a parametrisation and a third-party module the same few hundred operators; python control flow, ``.item()``,
loops and hooks need no support, because they simply run. The graph holds for the path that was recorded.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from automerge._caches import forget
from automerge._double import own_modes
from automerge._errors import TraceError
from automerge._extra_state import renamed
from automerge._gradients import as_needed, passed
from automerge._machine import releasing
from automerge._opaque import opaque_modules
from automerge._passes import add_further, end_first
from automerge._random import forked
from automerge._readers import Readers
from automerge._recorder import NO_NESTED, Recorder
from automerge._restoring import Before, replaced, restored
from automerge._trace_info import TraceInfo as TraceInfo  # public here
from automerge._tree_io import SPARSE, map_tensors, tensors_of
from automerge._unfilled import NeedsValues

_LARGE = 8 << 20  # bytes; a smaller tensor's memory stays in the heap, which the notes taken meanwhile break up

Args = torch.Tensor | Sequence[Any]


def normalise_args(args: Any, kwargs: Mapping[str, Any] | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments of a call, from a tensor, a tuple or list of inputs, and a dict.

    A tuple with names (a packed sequence, a batch) is one input. A sparse tensor (the adjacency of a graph) is made dense:
    what a product with it computes is the same.
    """
    if not isinstance(args, list | tuple) or hasattr(args, "_fields"):
        positional: tuple[Any, ...] = (args,) if args is not None else ()
    else:
        positional = tuple(args)
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise TraceError(f"kwargs must be a dict of keyword arguments, got {type(kwargs).__name__}")
    given = positional, dict(kwargs or {})
    return map_tensors(_dense, given) if any(t.layout in SPARSE for t in tensors_of(given)) else given


def _dense(_: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_dense() if tensor.layout in SPARSE else tensor


@own_modes()
def trace(
    model: nn.Module,
    args: Any,
    kwargs: Mapping[str, Any] | None = None,
    *,
    values: bool = True,
    constants: Collection[str] = (),
) -> fx.GraphModule:
    """Record a forward pass as a graph of ATen operators.

    The model runs once in eval mode without gradients, and once more where it keeps states between calls that a further pass
    reads; its mode, parameters and buffers are left as they were.

    Args:
        model: any module that runs forward.
        args: a tensor, or a tuple or list of positional inputs (they may nest).
        kwargs: keyword inputs.
        values: whether nodes keep their example values. Without, what depends on inputs or float parameters is kept as a
            tensor on the meta device (shape, dtype, strides), so that activations are freed as the model runs.
        constants: state-dict names of what is no parameter: it enters the graph as a constant, with its values.

    Returns:
        A GraphModule. Its placeholders are the state-dict tensors (once per tied tensor) and then the input tensors; every
        node's ``meta`` holds ``val`` (the example value), ``module`` (module path), ``source`` (file:line) and, for
        placeholders, ``kind`` (``"state"`` or ``"input"``) and ``name``. ``graph_module.meta["trace"]`` is a `TraceInfo`.

    Raises:
        TraceError: if the model does not run on the inputs; the original exception is the cause.

    Examples:
        >>> graph = trace(nn.Linear(3, 2), torch.ones(1, 3))
        >>> [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]
        ['aten.t.default', 'aten.addmm.default']
    """
    if not isinstance(model, nn.Module):
        raise TraceError(
            f"expected a torch.nn.Module to trace, got {type(model).__name__}; pass an instance of the model"
        )
    positional, keywords = normalise_args(args, kwargs)
    _check_traceable(model, (positional, keywords))
    if not values:
        quick = Recorder(model, values, constants, compute=False)
        with contextlib.suppress(NeedsValues, TraceError):
            graph = _recorded(model, positional, keywords, quick)
            if not quick.gave_up:
                return graph
    return passed(model, lambda: _recorded(model, positional, keywords, Recorder(model, values, constants)))


def _recorded(model: nn.Module, positional: Any, keywords: Any, recorder: Recorder) -> fx.GraphModule:
    """One run of a model under a recorder."""
    positional, keywords = recorder.add_inputs(positional, keywords)
    # what the model draws is not the caller's
    with prepared(model) as before, recorder.at.watching(), releasing(_LARGE), forked():
        try:
            with torch.no_grad(), as_needed(model), opaque_modules(recorder, model):
                with recorder, Readers(recorder):
                    result = model(*positional, **keywords)
                if end_first(recorder, model, result):
                    add_further(recorder, model, positional, keywords)
            recorder.info.carried += _carried(before, recorder)
            _mark_unseen(before, recorder)
        except TraceError:
            raise
        except Exception as error:
            shapes = ", ".join(str(tuple(t.shape)) for t in tensors_of((positional, keywords))) or "no tensors"
            text = f"{error}".strip().split("\n")[0][:300]
            raise TraceError(
                f"{type(model).__name__} does not run on the example inputs ({shapes})"
                f"{recorder.at.where()}: {type(error).__name__}: {text}"
            ) from error
        finally:
            recorder.restore()
    return recorder.finish(result)


def _carried(before: Before, recorder: Recorder) -> list[str]:
    """Where the model held a state of an earlier pass: what this one read as a constant, and replaced.

    One number, or equal ones, are no state of units.
    """
    read = {
        id(tensor)
        for _, tensor, value, _ in recorder.kept
        if value.layout is torch.strided and value.numel() > 1 and bool((value != value.flatten()[0]).any())
    }
    found = (name for name, held in replaced(before) if any(id(t) in read for t in tree_leaves(held)))
    return list(dict.fromkeys(found)) if read else []


def _mark_unseen(before: Before, recorder: Recorder) -> None:
    """Constants without entries of which nothing is known; what this pass replaces is the beginning of a state."""
    if recorder.unseen:
        begun = {id(t) for _, held in replaced(before) for t in tree_leaves(held)}
        for number, node in recorder.unseen.items():
            node.meta["unseen"] = number not in begun


def _check_traceable(model: nn.Module, inputs: Any) -> None:
    if not all(hasattr(module, "training") for module in model.modules()):
        raise TraceError(
            "a frozen TorchScript module has no mode and no parameters; infer on the module before freeze()"
        )
    if text := renamed(model):
        raise TraceError(text)
    for name, tensor in [
        *model.named_parameters(),
        *model.named_buffers(),
        *(("an input", t) for t in tensors_of(inputs)),
    ]:
        if is_lazy(tensor):
            raise TraceError(f"{name} is not initialised yet (a lazy module); run the model once on real inputs first")
        if tensor.is_meta:
            raise TraceError(
                f"{name} is on the meta device and has no values; materialise the model first (to_empty, then load)"
            )
        if tensor.is_nested:
            raise TraceError(f"{name} is a nested tensor, {NO_NESTED}")
        if is_traceable_wrapper_subclass(tensor):
            raise TraceError(
                f"{name} is a {type(tensor).__name__}; infer on the model with plain tensors, before it is sharded or quantised"
            )
        if tensor.layout is not torch.strided and isinstance(tensor, nn.Parameter):
            raise TraceError(
                f"{name} is a sparse parameter ({tensor.layout}), which no group can move; make it a dense one, or a buffer"
            )


def record(
    function: Callable[..., Any],
    tensors: Sequence[torch.Tensor],
    *,
    module: str = "",
    source: str = "",
    compute: bool = True,
) -> fx.GraphModule:
    """Record a function of tensors; its nodes all carry the given module path and source line.

    A tensor on the meta device stands for any values: zeros take its place. Without ``compute`` so do they for products of
    tensors, as far as nothing looks at them.

    Raises:
        TraceError: if no tensor comes out.
    """
    if not compute:
        with contextlib.suppress(NeedsValues):
            return _record(function, tensors, Recorder(nn.Module(), values=True, compute=False), module, source)
    return _record(function, tensors, Recorder(nn.Module(), values=True), module, source)


def _record(
    function: Callable[..., Any], tensors: Sequence[torch.Tensor], recorder: Recorder, module: str, source: str
) -> fx.GraphModule:
    copies = []
    for i, tensor in enumerate(tensors):
        copies.append(_materialised(tensor))
        recorder._placeholder(f"arg{i}", copies[-1], "input")
    with torch.no_grad(), recorder:
        result = function(*copies)
    graph = recorder.finish(result)
    for node in graph.graph.nodes:
        node.meta.update(module=module, source=source)
    return graph


def _materialised(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_meta:
        return tensor.detach().clone()
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).zero_()


@contextlib.contextmanager
def prepared(model: nn.Module) -> Iterator[Before]:
    """Eval mode, nothing compiled, unfused attention and recurrences, and everything put back afterwards (buffers included)."""
    modules = list(model.modules())
    modes = [(m, m.training) for m in modules]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    mkldnn, recurrent = torch._C._get_mkldnn_enabled(), any(isinstance(m, nn.RNNBase) for m in modules)
    with restored(model) as before:
        forget(model)
        try:
            model.eval()  # in eval mode already, too: a model may drop its caches at that
        except NotImplementedError as error:
            raise TraceError(
                f"{type(model).__name__} has no eval(), as modules of torch.export; infer on the module that was exported"
            ) from error
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            if recurrent:
                torch._C._set_mkldnn_enabled(False)
            with sdpa_kernel(_attention_kernels(model)), torch.compiler.set_stance("force_eager"):
                yield before
        finally:
            forget(model)
            torch._C._set_mkldnn_enabled(mkldnn)
            torch.backends.mha.set_fastpath_enabled(fastpath)
            for module, mode in modes:
                if module.training is not mode:
                    module.training = mode


def _attention_kernels(model: nn.Module) -> list[SDPBackend]:
    """On the CPU the kernel that never holds all scores, which has a rule; elsewhere the plain operators."""
    if all(t.device.type == "cpu" for t in itertools.chain(model.parameters(), model.buffers())):
        return [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    return [SDPBackend.MATH]
