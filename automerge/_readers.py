"""Looks of python at the values of tensors: operators that give it a number, and ways that no operator announces."""

from __future__ import annotations

import sys
from functools import cache, partial
from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from automerge._row_lists import RowList, as_tensors, end, row_list

aten = torch.ops.aten
_ATTENTION = torch.nn.functional.scaled_dot_product_attention
_FEW = 4096
_READS = {getattr(aten, name).default for name in ("_local_scalar_dense", "item", "equal", "is_nonzero", "allclose")}


@cache
def tells(func: Any) -> bool:
    """Whether an operator gives python a number for the values of its tensors; ATen's others tell shapes and strides."""
    returns = func._schema.returns
    numbers = bool(returns) and not any("Tensor" in str(r.type) for r in returns)
    return func in _READS or (numbers and func.namespace != "aten")


def told(recorder: Any, func: Any, args: Any, kwargs: Any, node_args: Any, node_kwargs: Any) -> Any:
    """Run an operator that gives python a number; whether two tensors are equal says nothing of their order."""
    if func is aten.equal.default:
        if args[0].shape != args[1].shape:
            return func(*args, **kwargs)  # no value was looked at
        where = torch.eq(*args)
        same = recorder.emit(aten.eq.Tensor, node_args, {}, where)
        node_args = (recorder.emit(aten.all.default, (same,), {}, where.all()),)
    fx.node.map_arg((node_args, node_kwargs), recorder.note_read)
    seen = func(*args, **kwargs)
    if len(node_args) == 1 and isinstance(node_args[0], fx.Node):
        node_args[0].meta["seen"] = seen
    return seen


class Readers(TorchFunctionMode):
    """Notes the ways in which python reads a whole tensor without any operator."""

    def __init__(self, recorder: Any) -> None:
        super().__init__()
        self.recorder = recorder
        self.rows: list[RowList] = []

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        end(self.rows)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.rows:
            args, kwargs = as_tensors(func, args, kwargs, sys._getframe(1))
        if func in _WHOLE_READS and isinstance(args[0], torch.Tensor):
            node = self.recorder.node_of(args[0])
            if isinstance(node, fx.Node) and args[0].numel() <= _FEW:
                with _disable_current_modes():
                    node.meta["listed"] = args[0].detach().cpu().clone()
                rows = self._rows(func, node, args[0])
                if rows is not None:
                    return rows
            self.recorder.note_read(node)
        for tensor in (*args[_PART_READS[func] :], *(kwargs or {}).values()) if func in _PART_READS else ():
            if isinstance(tensor, torch.Tensor):
                self.recorder.note_read(self.recorder.node_of(tensor))
        if func is torch.Tensor.__deepcopy__:  # copies memory without any operator
            out = args[0].detach().clone()
            args[1][id(args[0])] = out
            return out
        if func is torch.nn.functional.one_hot:
            return _one_hot(*args, **(kwargs or {}))
        if func is _ATTENTION and not all(t.numel() for t in args[:3]):
            return _attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _rows(self, func: Any, node: fx.Node, tensor: torch.Tensor) -> RowList | None:
        """A list of positions that is no look at the values yet."""
        if func is not torch.Tensor.tolist or node not in self.recorder.tainted or node in self.recorder.blank:
            return None
        note, place = partial(self.recorder.note_read, node), self.recorder.place
        rows = row_list(tensor, node.meta["listed"].tolist(), note, place)
        if rows is not None:
            self.rows.append(rows)
        return rows


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Attention of no tokens, for which PyTorch's gives zeros and shows nothing of what it does with some."""
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype is torch.bool else scores + attn_mask
    return scores.softmax(-1) @ value


def _one_hot(index: torch.Tensor, num_classes: int = -1) -> torch.Tensor:
    """`one_hot` without its look at the smallest and largest index when the number of classes is known."""
    if num_classes <= 0:
        return torch.ops.aten.one_hot(index, num_classes)
    zeros = index.new_zeros((*index.shape, num_classes))
    return zeros.scatter(-1, index.unsqueeze(-1), 1)


# these read positions and lengths below the dispatcher: all operands from this one on
_PART_READS = {
    torch.tensor_split: 1,
    torch.Tensor.tensor_split: 1,
    torch.ctc_loss: 2,
    torch.nn.functional.ctc_loss: 2,
}
_WHOLE_READS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__}


def read_again(recorder: Any, before: fx.Node, after: fx.Node) -> None:
    """What a pass leaves in a parameter has the order of that parameter, since the next pass reads it in its place.

    So their difference is read, as one number that depends on no order; if anything is read of the parameter.
    """
    was, now = before.meta["val"], after.meta["val"]
    if was.shape != now.shape or not (was.is_floating_point() or was.is_complex()):
        return
    change = recorder.emit(aten.sub.Tensor, (before, after), {}, now if now.is_meta else was - now)
    total = recorder.emit(aten.sum.default, (change,), {}, change.meta["val"].sum())
    for node in (change, total):
        node.meta.update(module=after.meta["module"], source=after.meta["source"])
    recorder.info.reads.append(total.name)
    recorder.info.again[total.name] = before.meta["name"]
