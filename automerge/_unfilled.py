"""Products, convolutions and BatchNorms whose numbers nobody looks at, given as zeros in the form that their kernels give.

Of what depends on inputs and weights, inference needs shapes, types and places in memory. Everything runs as it is but for
these few operators, which take most of a forward pass, and the functions of every number alone that follow them; what else
follows runs on zeros. A program that looks at such numbers (``if x.sum() > 0``, positions of a mask) raises `NeedsValues`
and is run once more with all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cache
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


class NeedsValues(BaseException):
    """The program looks at numbers that were not computed; no `Exception`, so that no model swallows it."""


def unfilled(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Zeros in the place of ``func(*args, **kwargs)``; None if it is to be computed.

    Only forms that are the same in every kernel: products come out dense, and so do convolutions and BatchNorms of dense
    operands.
    """
    shape = _SHAPES.get(func)
    if shape is None or kwargs or not _plain([a for a in args if isinstance(a, torch.Tensor)]):
        return None
    if func is aten.native_batch_norm.default:
        return _batch_norm(*args)
    size = shape(*args)
    return None if size is None else torch.zeros(size, dtype=args[0].dtype)


def followed(func: Any, args: tuple[Any, ...]) -> Any:
    """Zeros in the place of a function of every number alone, of dense operands of one shape; None if it is to be computed."""
    if func not in _POINTWISE or not _alike(args):
        return None
    out = torch.zeros(args[0].shape, dtype=args[0].dtype)
    # along an axis of length one operands may have any stride, of which kernels make different ones
    return out if all(a.stride() == out.stride() for a in args if isinstance(a, torch.Tensor)) else None


def unwritten(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether an operator writes nothing but a function of every number alone over its first operand, of its own form."""
    return _overwrites(func) and _alike(args)


@cache
def _overwrites(func: Any) -> bool:
    tags, schema = func.tags, func._schema
    plainly = torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags and len(schema.returns) == 1
    mutated = [a.alias_info is not None and a.alias_info.is_write for a in schema.arguments]
    return plainly and func.namespace == "aten" and mutated[0] and not any(mutated[1:])


def _alike(args: tuple[Any, ...]) -> bool:
    """Whether all operands that are tensors are dense and of one shape and type, the first one among them."""
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    if not isinstance(args[0], torch.Tensor) or any(isinstance(a, list | tuple | complex) for a in args):
        return False
    return _plain(tensors) and all(t.shape == args[0].shape and t.is_contiguous() for t in tensors)


def looks(func: Any, args: tuple[Any, ...], nodes: tuple[Any, ...], blank: Collection[fx.Node]) -> bool:
    """Whether the form of an operator's outputs depends on numbers that were not computed, or may.

    Args:
        func: the operator.
        args: its arguments.
        nodes: the same, with nodes in the place of tensors.
        blank: the nodes of numbers that were not computed, and of what follows from them.
    """
    if func in _LOOKUPS:
        masks = (n for n, i in zip(nodes[1], args[1], strict=True) if i is not None and i.dtype in _MASKS)
        return any(n in blank for n in masks)
    if func in _PACKING:
        return nodes[1] in blank
    if func.namespace == "aten" and _BY_VALUE.isdisjoint(func.tags):
        return False
    found: list[fx.Node] = []
    fx.node.map_arg(nodes, found.append)
    return any(n in blank for n in found)


_MASKS = (torch.bool, torch.uint8)
_LOOKUPS = (aten.index.Tensor, aten._unsafe_index.Tensor)
_PACKING = (aten._pack_padded_sequence.default, aten._pad_packed_sequence.default)  # by lengths
_BY_VALUE = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}


def _plain(tensors: list[torch.Tensor]) -> bool:
    """Ordinary numbers of one type in the CPU's memory, which operators treat alike."""
    return tensors[0].dtype in (torch.float32, torch.float64) and all(
        type(t) in (torch.Tensor, torch.nn.Parameter)
        and t.device.type == "cpu"
        and t.layout is torch.strided
        and t.dtype is tensors[0].dtype
        for t in tensors
    )


# what a kernel would refuse is left to it
def _mm(a: torch.Tensor, b: torch.Tensor) -> tuple[int, ...] | None:
    return (a.shape[0], b.shape[1]) if a.dim() == b.dim() == 2 and a.shape[1] == b.shape[0] else None


def _bmm(a: torch.Tensor, b: torch.Tensor) -> tuple[int, ...] | None:
    fits = a.dim() == b.dim() == 3 and a.shape[0] == b.shape[0] and a.shape[2] == b.shape[1]
    return (a.shape[0], a.shape[1], b.shape[2]) if fits else None


def _addmm(bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[int, ...] | None:
    size = _mm(a, b)
    return size if size is not None and bias.shape == size[1:] else None


def _convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    _: list[int],
    groups: int,
) -> tuple[int, ...] | None:
    fits = x.dim() == weight.dim() in (3, 4, 5) and x.shape[1] == weight.shape[1] * groups
    fits = fits and weight.shape[0] % groups == 0 and (bias is None or bias.shape == weight.shape[:1])
    if transposed or not fits or not (x.is_contiguous() and weight.is_contiguous()) or 0 in x.shape:
        return None
    sizes = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    after = tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes)
    return (x.shape[0], weight.shape[0], *after) if min(after) > 0 else None


def _batch_norm(x: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...] | None:
    """By running statistics; on the CPU the batch's own, which are not taken, are without entries."""
    if rest[4] or rest[2] is None or rest[3] is None or x.dim() < 2 or not x.is_contiguous():
        return None
    if any(t is not None and t.shape != x.shape[1:2] for t in rest[:4]):
        return None
    return torch.zeros(x.shape, dtype=x.dtype), x.new_zeros(0), x.new_zeros(0)


_SHAPES: dict[Any, Callable[..., tuple[int, ...] | None]] = {
    aten.mm.default: _mm,
    aten.bmm.default: _bmm,
    aten.addmm.default: _addmm,
    aten.convolution.default: _convolution,
    aten.native_batch_norm.default: lambda *_: None,
}
_FUNCTIONS = ("relu", "silu", "gelu", "mish", "sigmoid", "tanh", "hardswish", "hardsigmoid", "leaky_relu", "elu")
_POINTWISE = {
    *(getattr(aten, name).default for name in _FUNCTIONS),
    *(getattr(aten, name).Tensor for name in ("add", "sub", "mul")),
}
