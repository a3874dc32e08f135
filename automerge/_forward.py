"""Running a model on batches, with its own weights or others, without changing it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from automerge._data import Batch
from automerge._errors import AutomergeError, CheckpointError
from automerge._extra_state import weights_of
from automerge._gradients import as_needed, copy_of, needs_gradients, passed
from automerge._loading import as_loaded, check_tied, check_values, checked_state
from automerge._random import drawing, forked, gpus
from automerge._restoring import lent, restored
from automerge._tree_io import map_tensors
from automerge._writes import state_of, unwritten
from automerge.io import tied_names


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
    expected = weights_of(model)
    state_dict = as_loaded(checked_state(state_dict), model)
    differ = [n for n in expected if n not in state_dict] + [n for n in state_dict if n not in expected]
    resized = [n for n in expected if not differ and state_dict[n].shape != expected[n].shape]
    if differ or resized:
        what = f"the key {differ[0]!r}" if differ else f"the shape of {resized[0]!r}"
        raise CheckpointError(f"the state dict and the model differ in {what}; are they of one architecture?")
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
