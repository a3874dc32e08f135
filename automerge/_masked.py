"""Entries that a mask chooses, each changed by itself: recorded as all entries, changed, and the mask beside.

``x[m] = f(y[m])`` is ``where(m, f(y), x)``, and ``f(y[m]).sum()`` is ``where(m, f(y), 0).sum()``: nothing is listed in an
order that depends on data. A mask that is the same for all data stays: its positions are known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
CHOICES = (aten.index.Tensor, aten.masked_select.default)
_WRITES = (aten.index_put.default, aten.masked_scatter.default)
_SAME = ("aten::clone", "aten::_to_copy", "aten::alias", "aten::detach", "aten::lift_fresh")
# what an entry that is left out counts as
_NEUTRAL = {
    "aten::sum": 0.0,
    "aten::mean": 0.0,
    "aten::prod": 1.0,
    "aten::max": -math.inf,
    "aten::amax": -math.inf,
    "aten::min": math.inf,
    "aten::amin": math.inf,
    "aten::linalg_vector_norm": 0.0,
}

Emit = Callable[..., fx.Node]


def by_entry(
    emit: Emit, varying: Collection[fx.Node], target: Any, args: Any, kwargs: Any, value: Any
) -> fx.Node | None:
    """Emit what writes or sums up a list of chosen entries as what it is for all entries; None for anything else.

    Args:
        emit: called with a target, arguments and a value.
        varying: the nodes that depend on inputs or parameters.
        target, args, kwargs, value: the operator.
    """
    writes = target in _WRITES
    listed = args[2] if writes else args[0] if args and _name(target) in _NEUTRAL else None
    chosen = _Chosen.of(listed) if isinstance(listed, fx.Node) and isinstance(value, torch.Tensor) else None
    if chosen is None or chosen.mask not in varying:
        return None
    return (_written if writes else _reduced)(emit, chosen, target, args, kwargs, value)


def _written(emit: Emit, chosen: _Chosen, target: Any, args: Any, _: Any, value: torch.Tensor) -> fx.Node | None:
    """``where(m, f(y), x)`` for ``x[m] = f(y[m])``."""
    x, where, source, *adds = args
    whole = chosen.whole(emit, source) if chosen.listed(x, where) else None
    if whole is None or whole.meta["val"].dtype != x.meta["val"].dtype:
        return None
    if adds and adds[0]:
        return emit(aten.add.Tensor, (x, _call(emit, aten.where.ScalarOther, chosen.mask, whole, 0.0)), {}, value)
    return emit(aten.where.self, (chosen.mask, whole, x), {}, value)


def _reduced(emit: Emit, chosen: _Chosen, target: Any, args: Any, kwargs: Any, value: torch.Tensor) -> fx.Node | None:
    """``where(m, f(y), 0).sum()`` for ``f(y[m]).sum()``; a mean is divided by how many there are."""
    (x, *rest), name = args, _name(target)
    norm = name == "aten::linalg_vector_norm"
    whole = chosen.whole(emit, x) if value.dim() == 0 and not (norm and rest[:1] not in ([], [2])) else None
    if whole is None or not whole.meta["val"].is_floating_point():
        return None
    kept = _call(emit, aten.where.ScalarOther, chosen.mask, whole, _NEUTRAL[name])
    if name == "aten::mean":
        alike = math.prod(chosen.shape[: chosen.at])
        count = _call(emit, aten.mul.Scalar, _call(emit, aten.sum.default, chosen.mask), alike)
        total = _call(emit, aten.sum.default, kept, dtype=value.dtype)
        return emit(aten.div.Tensor, (total, count), {}, value)
    plain: Any = {"aten::amax": aten.max.default, "aten::amin": aten.min.default}.get(name, target)
    dtype = {k: v for k, v in kwargs.items() if k == "dtype"}
    return emit(plain, (kept, *rest[:1]) if norm else (kept,), dtype, value)


@dataclass
class _Chosen:
    """The entries that a mask chooses, as some values list them along their last axis.

    Attributes:
        mask: the mask.
        at: how many axes are before its own; with any, it has one.
        shape: of what the entries are chosen from.
        count: how many are chosen.
        made: node of the lists -> the node that holds it for all entries.
    """

    mask: fx.Node
    at: int
    shape: torch.Size
    count: int
    made: dict[fx.Node, fx.Node | None] = field(default_factory=dict)

    @staticmethod
    def of(node: fx.Node) -> _Chosen | None:
        """Those that a node holds, after functions of each entry."""
        while not _is_choice(node):
            held = node.meta.get("val")
            before = [n for n in node.all_input_nodes if _as_many(n, held)] if _entrywise(node) else []
            if not before:
                return None
            node = before[0]
        *ahead, mask = _indices(node)
        source = _source(node).meta["val"]
        whole = ahead == [None] * len(ahead) and (not ahead or mask.meta["val"].dim() == 1)
        fits = whole and source.shape[len(ahead) :] == mask.meta["val"].shape
        return _Chosen(mask, len(ahead), source.shape, node.meta["val"].shape[-1]) if fits else None

    def listed(self, x: fx.Node, where: Any) -> bool:
        """Whether some indices (or a mask) choose the same entries of a tensor of the same shape."""
        *ahead, mask = where if isinstance(where, list | tuple) else [where]
        return ahead == [None] * self.at and same(mask, self.mask) and x.meta["val"].shape == self.shape

    def whole(self, emit: Emit, node: fx.Node) -> fx.Node | None:
        """What a list would be with all entries; None if it is not made from such lists entry by entry."""
        if node not in self.made:
            self.made[node] = self._whole(emit, node)
        return self.made[node]

    def _whole(self, emit: Emit, node: fx.Node) -> fx.Node | None:
        if _is_choice(node):
            return _source(node) if self.listed(_source(node), _indices(node)) else None
        if not _entrywise(node):
            return None
        given = {n: self._operand(emit, n) for n in node.all_input_nodes}
        if None in given.values():
            return None
        args, kwargs = fx.node.map_aggregate(
            (node.args, dict(node.kwargs)), lambda a: given[a] if isinstance(a, fx.Node) else a
        )
        return _call(emit, node.target, *args, **kwargs)

    def _operand(self, emit: Emit, node: fx.Node) -> fx.Node | None:
        """A list, or what is the same for all entries of it (of a list of one nobody knows)."""
        held = node.meta["val"]
        if not isinstance(held, torch.Tensor):
            return None
        single = held.dim() > 0 and held.shape[-1] == 1 != self.count and held.dim() <= self.at + 1
        return node if held.dim() == 0 or single else self.whole(emit, node)


def same(a: Any, b: Any) -> bool:
    """Whether two nodes compute the same from the same nodes."""
    if a is b or not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
        return a is b
    if a.op != "call_function" or a.target is not b.target or a.kwargs != b.kwargs or _draws(a):
        return False
    pairs = zip(a.args, b.args, strict=False)
    return len(a.args) == len(b.args) and all(same(x, y) if isinstance(x, fx.Node) else x == y for x, y in pairs)


def _is_choice(node: Any) -> bool:
    """Whether a node lists the entries that one mask chooses along the last axes of a tensor."""
    if node.op != "call_function" or node.target not in CHOICES:
        return False
    mask = _indices(node)[-1]
    return mask is not None and mask.meta["val"].dtype is torch.bool


def _source(node: fx.Node) -> Any:
    return node.args[0]


def _indices(node: fx.Node) -> Sequence[Any]:
    given: Any = node.args[1]
    return list(given) if node.target is aten.index.Tensor else [given]


def _name(target: Any) -> str:
    schema = getattr(target, "_schema", None)
    return schema.name if schema is not None else ""


def _entrywise(node: fx.Node) -> bool:
    """Whether an operator makes numbers that are not whole, each from those at its own place."""
    held = node.meta.get("val")
    if node.op != "call_function" or not isinstance(held, torch.Tensor) or _draws(node):
        return False
    pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ()) or _name(node.target) in _SAME
    return pointwise and (held.is_floating_point() or held.is_complex() or held.dtype is torch.bool)


def _as_many(node: fx.Node, held: Any) -> bool:
    own = node.meta.get("val")
    return isinstance(own, torch.Tensor) and own.dim() > 0 and own.shape == held.shape


def _draws(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _call(emit: Emit, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Emit an operator with its value, which is one without numbers where an operand's is."""
    given = [n.meta["val"] for n in (*args, *kwargs.values()) if isinstance(n, fx.Node)]
    bare = any(t.is_meta for t in given)

    def held(a: Any) -> Any:
        value = a.meta["val"] if isinstance(a, fx.Node) else a
        return value.to("meta") if bare and isinstance(value, torch.Tensor) else value

    return emit(target, args, kwargs, target(*map(held, args), **{k: held(a) for k, a in kwargs.items()}))
