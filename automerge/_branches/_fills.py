"""Tensors that are filled piece after piece, read as the pieces side by side.

::

    out = torch.empty(len(heads), n, d)                 out = torch.stack([head(x) for head in heads])
    for i, head in enumerate(heads):
        out[i] = head(x)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx

from automerge._branches._graph import Workbench
from automerge._branches._joins import aten, copied, piece

_WRITES = (aten.select_scatter.default, aten.slice_scatter.default)


def fills(graph: fx.Graph) -> bool:
    """Whether two pieces of a tensor are written, one after the other."""
    return any(_range(n) is not None and _range(n.args[0]) is not None for n in graph.nodes)


def take_fills(bench: Workbench) -> None:
    """Read what two and more writes leave in different places of one axis as these values side by side."""
    filled: dict[fx.Node, _Filled] = {}
    for node in list(bench.graph.nodes):
        write = _range(node) if node not in bench.constant else None
        if write is None:
            _read(bench, node, filled)
            continue
        dim, start, length = write
        before = filled.get(node.args[0])
        if before is None or before.dim != dim or before.meets(start, start + length):
            before = _Filled(node.args[0], dim)
        parts = {**before.parts, (start, start + length): _written(bench, node)}
        filled[node] = _Filled(before.base, dim, parts, (*before.writes, node))
    for node, found in filled.items():
        if (
            len(found.parts) > 1
            and not _goes_on(node, filled)
            and not any(_read_between(n, filled) for n in found.writes)
        ):
            _as_cat(bench, node, found)
    bench.erase(list(filled))
    bench.know_all()


@dataclass(frozen=True)
class _Filled:
    """What was written over a tensor: from where to where along an axis, and the values; the nodes that did."""

    base: Any
    dim: int
    parts: dict[tuple[int, int], Any] = field(default_factory=dict)
    writes: tuple[fx.Node, ...] = ()

    def meets(self, start: int, stop: int) -> bool:
        """Whether some of these positions were written, and not just these at once."""
        return (start, stop) not in self.parts and any(start < b and a < stop for a, b in self.parts)


def _goes_on(node: fx.Node, filled: dict[fx.Node, _Filled]) -> bool:
    """Whether more is written over what a node gives."""
    return any(u in filled and filled[u].writes[-2:-1] == (node,) for u in node.users)


def _read_between(node: fx.Node, filled: dict[fx.Node, _Filled]) -> bool:
    """Whether a part that is neither one that was written nor one that was not is read before more is written."""
    return _goes_on(node, filled) and len(node.users) > 1


def _range(node: Any) -> tuple[int, int, int] | None:
    """The axis that a node writes along, from where, and how much; None for another node."""
    args: Any = node.args
    if node.op != "call_function" or node.target not in _WRITES or node.kwargs or not isinstance(args[1], fx.Node):
        return None
    shape = node.meta["val"].shape
    dim = (args[2] if len(args) > 2 else 0) % len(shape)
    if node.target is aten.select_scatter.default:
        return dim, args[3] % shape[dim], 1
    start, end, step = slice(*[*args[3:], *(None, None, None)[len(args) - 3 :]]).indices(shape[dim])
    return (dim, start, end - start) if step == 1 and 0 < end - start < shape[dim] else None


def _written(bench: Workbench, node: fx.Node) -> Any:
    """What a node writes; what that was copied over is of no use."""
    old: Any = node.args[1]
    value = copied(old)
    if value is not old:
        node.update_arg(1, value)
        bench.erase([*old.all_input_nodes[:1], old])
    return value


def _read(bench: Workbench, node: fx.Node, filled: dict[fx.Node, _Filled]) -> None:
    """Read a piece where it was written, or where nothing was written of what was there before."""
    cut = piece(node) if node.op == "call_function" else None
    found = filled.get(cut.source) if cut is not None else None
    if cut is None or found is None or found.dim != cut.dim or node.args[0] is not cut.source:
        return
    places = cut.start, cut.start + cut.length
    own = found.parts.get(places)
    if own is not None and own.meta["val"].shape == node.meta["val"].shape:
        node.replace_all_uses_with(own)
    elif own is None and not found.meets(*places):
        with bench.graph.inserting_before(node):
            node.replace_all_uses_with(bench.call(node, node.target, found.base, *node.args[1:]))
    bench.erase([node])


def _as_cat(bench: Workbench, node: fx.Node, found: _Filled) -> None:
    """Put the pieces that were written, and those of the base between them, in the place of a node."""
    dim, size = found.dim, node.meta["val"].shape[found.dim]
    with bench.graph.inserting_before(node):
        operands: list[fx.Node] = []
        at = 0
        for (start, stop), value in sorted(found.parts.items(), key=lambda part: part[0]):
            if at < start:
                operands.append(bench.call(node, aten.slice.Tensor, found.base, dim, at, start))
            single = value.meta["val"].dim() < node.meta["val"].dim()
            operands.append(bench.call(node, aten.unsqueeze.default, value, dim) if single else value)
            at = stop
        if at < size:
            operands.append(bench.call(node, aten.slice.Tensor, found.base, dim, at, size))
        joined = bench.call(node, aten.cat.default, operands, dim)
    node.replace_all_uses_with(joined)
