"""Other spellings of sums, and of choices under a mask, in the form that the rest reads.

::

    out = out * (1 - m) + m * expert(x)                 # as torch.where(m != 0, m * expert(x), out)
    out = out.masked_scatter(m[:, None], expert(x[m]))  # as out[m] = expert(x[m])
    out = torch.addcmul(out, g, expert(x))              # as out + g * expert(x)
    out = out - expert(x)                               # as out + -expert(x)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from automerge._branches._distinct import PRODUCTS, TRUTHS, ZEROS, tells
from automerge._branches._graph import Workbench
from automerge._branches._joins import aten

SPREADS = (aten.unsqueeze.default, aten.expand.default, aten.view.default, aten.reshape.default)
_MATRICES: dict[Any, Any] = {aten.addmm.default: aten.mm.default, aten.baddbmm.default: aten.bmm.default}
_ADDING = (aten.add.Tensor, aten.sub.Tensor, aten.addcmul.default, *_MATRICES)
_NOT = (aten.logical_not.default, aten.bitwise_not.default)


def takes_forms(graph: fx.Graph) -> bool:
    """Whether a graph has other spellings of sums or choices."""
    return any(_opposite(node) is not None or _scatters(node) or _adds(node) for node in graph.nodes)


def take_forms(bench: Workbench) -> None:
    """Read chains of what adds as sums; products with a mask and its opposite, and rows scattered under one, as choices."""
    for node in list(bench.graph.nodes):
        blend = _blend(node)
        adds = blend is None and _adds(node)
        if blend is None and not adds and not _scatters(node):
            continue
        with bench.graph.inserting_before(node):
            if blend is not None:
                mask, value, base = blend
                made = bench.call(node, aten.where.self, bench.call(node, aten.ne.Scalar, mask, 0), value, base)
            elif adds:
                made = _sum(bench, node)
            else:
                base, over, rows = node.args
                made = bench.call(node, aten.index_put.default, base, [over.args[0]], rows, value=node.meta["val"])
        node.replace_all_uses_with(made)
        bench.erase([node])
    bench.know_all()


def _adds(node: Any) -> bool:
    """Whether a node adds to what another one added to, or is added to, but for plain sums."""
    if not _changes(node) or (node.target is aten.add.Tensor and not node.kwargs):
        return False
    before = node.args[0]
    if _changes(before) and len(before.users) == 1:
        return True
    return any(_changes(user) and user.args[0] is node for user in node.users) and len(node.users) == 1


def _changes(node: Any) -> bool:
    """Whether a node adds to its first operand."""
    if not isinstance(node, fx.Node) or node.target not in _ADDING or not {*node.kwargs} <= {"alpha", "value"}:
        return False
    value: torch.Tensor = node.meta["val"]
    tensors: Any = node.args
    if not all(isinstance(a, fx.Node) for a in tensors) or not value.is_floating_point():
        return False
    matrices = node.target in _MATRICES
    return bool(tensors[0].meta["val"].shape == value.shape) and not (matrices and node.kwargs)


def _sum(bench: Workbench, node: fx.Node) -> fx.Node:
    """A node that adds to its first operand, as a plain sum, where nodes are inserted now."""
    args: Any = node.args
    if node.target in (aten.add.Tensor, aten.sub.Tensor):
        added = args[1]
    else:
        added = bench.call(node, _MATRICES.get(node.target, aten.mul.Tensor), *args[1:])
    scale: Any = next(iter(node.kwargs.values()), 1)
    if node.target is aten.sub.Tensor:
        scale = -scale
    if scale != 1:
        added = bench.call(node, aten.mul.Tensor, added, scale)
    return bench.call(node, aten.add.Tensor, args[0], added)


def core(mask: Any) -> tuple[Any, tuple[Any, ...]]:
    """What a mask is made of in the same places, and how that is spread over further axes."""
    spread = []
    while isinstance(mask, fx.Node):
        if mask.target in SPREADS:
            spread.append((mask.target, mask.args[1:]))
        elif mask.target not in TRUTHS and (mask.target is not aten.ne.Scalar or mask.args[1] != 0):
            break
        mask = mask.args[0]
    return mask, tuple(spread)


def _blend(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """The mask, what is put where it holds, and what stays elsewhere, of ``base * (1 - mask) + mask * value``."""
    if node.target is not aten.add.Tensor or node.kwargs or not node.meta["val"].is_floating_point():
        return None
    for kept, value in (node.args, node.args[::-1]):
        if not isinstance(value, fx.Node) or not isinstance(kept, fx.Node) or kept.target is not aten.mul.Tensor:
            continue
        for rest, base in (kept.args, kept.args[::-1]):
            if not isinstance(base, fx.Node) or base.meta["val"].shape != node.meta["val"].shape:
                continue
            opposite = _opposite(rest)
            mask = None if opposite is None else next((f for f in _factors(value) if core(f) == opposite), None)
            if mask is not None and value.meta["val"].shape == node.meta["val"].shape:
                return mask, value, base
    return None


def _opposite(rest: Any) -> tuple[Any, tuple[Any, ...]] | None:
    """The mask that a factor is one without, as `core` tells of it."""
    spread: tuple[Any, ...] = ()
    while isinstance(rest, fx.Node) and rest.target in (*SPREADS, *TRUTHS):
        spread += ((rest.target, rest.args[1:]),) if rest.target in SPREADS else ()
        rest = rest.args[0]
    args: Any = rest.args if isinstance(rest, fx.Node) else ()
    less = isinstance(rest, fx.Node) and rest.target is aten.rsub.Scalar and args[1] == 1 and len(args) == 2
    if not isinstance(rest, fx.Node) or not (less or rest.target in _NOT):
        return None
    mask, more = core(args[0])
    truth = args[0].meta["val"].dtype is torch.bool or less
    return (mask, spread + more) if truth and isinstance(mask, fx.Node) and _binary(mask) and tells(mask) else None


def _factors(value: fx.Node) -> list[fx.Node]:
    """The factors of a product."""
    if value.target not in PRODUCTS:
        return [value]
    return [f for a in value.args if isinstance(a, fx.Node) for f in _factors(a)]


def _binary(mask: fx.Node) -> bool:
    """Whether a mask holds nothing but zeros and ones."""
    args: Any = mask.args
    if mask.meta["val"].dtype is torch.bool:
        return True
    if mask.target is aten.scatter.value:
        return bool(args[3] == 1) and args[0].target in ZEROS
    if mask.target in (*SPREADS, *TRUTHS, aten.select.int, aten.slice.Tensor, aten.permute.default, aten.transpose.int):
        return _binary(args[0])
    return mask.target in PRODUCTS and all(isinstance(a, fx.Node) and _binary(a) for a in args)


def _scatters(node: fx.Node) -> bool:
    """Whether a node puts rows, one after the other, where a mask chooses rows."""
    args: Any = node.args
    if node.target is not aten.masked_scatter.default or not all(isinstance(a, fx.Node) for a in args):
        return False
    base, mask, rows = (a.meta["val"] for a in args)
    if args[1].target is not aten.unsqueeze.default or mask.dim() != base.dim() or mask.shape[-1] != 1:
        return False
    return (
        rows.dim() == 2 and rows.shape[1:] == base.shape[-1:] and args[1].args[0].meta["val"].shape == base.shape[:-1]
    )
