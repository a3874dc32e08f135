"""Where branches are joined, which of the joined values may be alike, and what a node cuts out of another."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from automerge.rules._nodes import draws, is_state

aten = torch.ops.aten
NUMBERED: dict[Any, Any] = {aten.eq.Scalar: aten.eq.Tensor, aten.ne.Scalar: aten.ne.Tensor}

FOLDS: dict[Any, Callable[[torch.Tensor], torch.Tensor]] = {  # operators that join any number -> the same along an axis
    aten.add.Tensor: lambda values: values.sum(0),
    aten.mul.Tensor: lambda values: values.prod(0),
    aten.maximum.default: lambda values: values.amax(0),
    aten.minimum.default: lambda values: values.amin(0),
    aten.fmax.default: lambda values: values.amax(0),
    aten.fmin.default: lambda values: values.amin(0),
    aten.logaddexp.default: lambda values: values.logsumexp(0),
    aten.logical_or.default: lambda values: values.any(0),
    aten.logical_and.default: lambda values: values.all(0),
    aten.bitwise_or.Tensor: lambda values: values.any(0),
    aten.bitwise_and.Tensor: lambda values: values.all(0),
}
_OF_TRUTHS = (aten.bitwise_or.Tensor, aten.bitwise_and.Tensor)

SORTS = (aten.sort.default, aten.sort.stable, aten.argsort.default, aten.argsort.stable)
_SIZED = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default)

Same = tuple[fx.Node, ...]  # the nodes that correspond to each other, one for each branch


class MismatchError(Exception):
    """Two operands are different branches."""


def alike(join: fx.Node, operands: list[Any], hashes: dict[fx.Node, int]) -> list[Same]:
    """The sets of operands that may be the same branch."""
    kinds: dict[int, list[fx.Node]] = {}
    for operand in operands:
        if isinstance(operand, fx.Node):
            kinds.setdefault(hashes[operand], []).append(operand)
    runs = (run for nodes in kinds.values() for run in side_by_side(join, operands, nodes))
    return [run for run in runs if 1 < len(run) == len(set(run))]


def operands_of(node: fx.Node) -> list[Any]:
    """The operands of a join, in order; empty for another node, or where the join goes on."""
    if node.target is aten.stack.default:
        return list(node.args[0])  # type: ignore[arg-type]
    if node.target is aten.cat.default:
        return [] if len(node.users) == 1 and _extends(next(iter(node.users)), node) else _flattened(node)
    if not folds(node) or (len(node.users) == 1 and _goes_on(node, next(iter(node.users)))):
        return []
    neutral = 1 if node.target is aten.mul.Tensor else 0
    out: list[Any] = []
    todo: list[Any] = [node]
    while todo:
        one = todo.pop()
        if one is node or (isinstance(one, fx.Node) and len(one.users) == 1 and _goes_on(one, node)):
            todo += [a for a in reversed(one.args) if type(a) is not int or a != neutral]
        else:
            out.append(one)
    return out if len(out) > 1 else []


def _extends(node: fx.Node, part: fx.Node) -> bool:
    """Whether a node puts more beside some values that are side by side along the same axis."""
    if node.target is not aten.cat.default or part.target is not aten.cat.default or part.meta["val"].dim() == 0:
        return False
    a, b = ((n.args[1] if len(n.args) > 1 else 0) % n.meta["val"].dim() for n in (node, part))
    return bool(a == b and node.meta["val"].dim() == part.meta["val"].dim())


def _flattened(node: fx.Node) -> list[Any]:
    """What is put side by side, one after the other (``out = torch.cat([out, head(x)])``)."""
    out: list[Any] = []
    todo = list(reversed(node.args[0]))  # type: ignore[arg-type]
    while todo:
        one = todo.pop()
        if isinstance(one, fx.Node) and len(one.users) == 1 and _extends(node, one):
            todo += reversed(one.args[0])  # type: ignore[arg-type]
        else:
            out.append(one)
    return out


def folds(node: Any) -> bool:
    """Whether a node joins two operands, with others before and after them in any order."""
    if not isinstance(node, fx.Node) or node.target not in FOLDS or node.kwargs or len(node.args) != 2:
        return False
    return node.target not in _OF_TRUTHS or node.meta["val"].dtype is torch.bool


def _goes_on(a: fx.Node, b: fx.Node) -> bool:
    """Whether two nodes are parts of one join."""
    if not folds(a) or a.target is not b.target or b.kwargs:
        return False
    return bool(a.meta["val"].shape == b.meta["val"].shape and a.meta["val"].dtype == b.meta["val"].dtype)


def side_by_side(join: fx.Node, operands: list[Any], nodes: Sequence[fx.Node]) -> list[Same]:
    """Like operands, in runs of those that are side by side where their order matters."""
    if folds(join):
        return [tuple(nodes)]
    out: list[list[fx.Node]] = []
    for node in nodes:
        if out and operands.index(node) == operands.index(out[-1][-1]) + 1:
            out[-1].append(node)
        else:
            out.append([node])
    return [tuple(run) for run in out]


def promising(graph: fx.GraphModule) -> bool:
    """Whether some join of a graph may have like operands."""
    hashes: dict[fx.Node, int] = {}
    for node in graph.graph.nodes:
        hashes[node] = likeness(node, hashes)
        if alike(node, operands_of(node), hashes):
            return True
    return False


def copied(node: fx.Node) -> fx.Node:
    """What is written over a slice."""
    args: Any = node.args
    if node.target is not aten.copy.default or not isinstance(args[1], fx.Node):
        return node
    new, old = args[1].meta["val"], node.meta["val"]
    return args[1] if new.shape == old.shape and new.dtype == old.dtype else node


def keeps_rows(node: fx.Node) -> tuple[int, ...] | None:
    """The other lengths that a view is given, if it leaves the first axis of its operand; None for another node."""
    args: Any = node.args
    if node.target not in _SIZED or not args[1] or not args[0].meta["val"].dim():
        return None
    return tuple(args[1][1:]) if args[1][0] == args[0].meta["val"].shape[0] else None


def order_of(sort: fx.Node) -> fx.Node | None:
    """The node of the places that sorted entries came from."""
    if sort.target in (aten.argsort.default, aten.argsort.stable):
        return sort
    return next((u for u in sort.users if u.target is operator.getitem and u.args[1] == 1), None)


def likeness(node: fx.Node, hashes: dict[fx.Node, int]) -> int:
    """A number that is the same for like branches, from those of the nodes before."""
    value: Any = node.meta.get("val")
    if node.op == "placeholder":
        free = node.meta["kind"] == "state" and is_state(value)
        return hash(("state", tuple(value.shape), value.dtype) if free else node.name)
    if node.op == "get_attr":
        return hash(("constant", tuple(value.shape), value.dtype))
    if node.op != "call_function" or draws(node):
        return hash(node.name)
    cut = piece(node)
    if cut is not None:
        return hash(("piece", hashes[cut.source], cut.dim, cut.length, cut.keeps))
    parts: list[Any] = [node.target]

    def visit(arg: Any) -> None:
        if isinstance(arg, fx.Node):
            parts.append(hashes[arg])
        elif isinstance(arg, list | tuple):
            parts.append(len(arg))
            for one in arg:
                visit(one)
        else:
            parts.append((type(arg), arg if isinstance(arg, int | float) else str(arg)))

    for arg in node.args[:1] if node.target in NUMBERED else node.args:
        visit(arg)
    parts += sorted((k, str(v)) for k, v in node.kwargs.items() if not isinstance(v, fx.Node))
    return hash(tuple(parts))


# -------------------------------------------------------------------- pieces of a value
@dataclass(frozen=True)
class _Piece:
    """Positions ``start`` to ``start + length`` of one axis of a value; the axis stays where ``keeps``."""

    source: fx.Node
    dim: int
    start: int
    length: int
    keeps: bool


def piece(node: fx.Node) -> _Piece | None:
    """What a node cuts out of another; None if it does something else."""
    args: Any = node.args
    if node.target is operator.getitem and isinstance(args[0], fx.Node):
        return _split(args[0], args[1])
    if node.target is aten.select.int:
        value = args[0].meta["val"]
        return _Piece(args[0], args[1] % value.dim(), args[2] % value.shape[args[1]], 1, False)
    if node.target is not aten.slice.Tensor:
        return None
    given: list[Any] = [*args, *(0, None, None, 1)[len(args) - 1 :]]
    source, dim, start, end, step = given
    size = source.meta["val"].shape[dim]
    start, end, step = slice(start, end, step).indices(size)
    length = end - start
    return (
        _Piece(source, dim % source.meta["val"].dim(), start, length, True) if step == 1 and 0 < length < size else None
    )


def _split(node: fx.Node, number: int) -> _Piece | None:
    args: Any = node.args
    if node.target is aten.unbind.int:
        dim = (args[1] if len(args) > 1 else 0) % args[0].meta["val"].dim()
        return _Piece(args[0], dim, number, 1, False)
    if node.target not in (aten.split.Tensor, aten.split_with_sizes.default):
        return None
    dim = (args[2] if len(args) > 2 else 0) % args[0].meta["val"].dim()
    sizes = [v.shape[dim] for v in node.meta["val"]]
    return _Piece(args[0], dim, sum(sizes[:number]), sizes[number], True)


def whole(tensor: torch.Tensor) -> tuple[torch.Tensor, None]:
    return tensor, None


def along(dim: int) -> Callable[[torch.Tensor], tuple[torch.Tensor, int]]:
    return lambda tensor: (tensor, dim)


def cutting(pieces: Sequence[_Piece]) -> Callable[[torch.Tensor], tuple[torch.Tensor, int]]:
    """Pieces of one value side by side along an axis of their own."""
    dim, length, keeps = pieces[0].dim, pieces[0].length, pieces[0].keeps
    if any((p.dim, p.length, p.keeps) != (dim, length, keeps) for p in pieces):
        raise MismatchError
    places = [p.start + i for p in pieces for i in range(length)]

    def take(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
        if places != list(range(tensor.shape[dim])):
            tensor = tensor.index_select(dim, torch.tensor(places))
        return (tensor.unflatten(dim, (len(pieces), length)) if keeps else tensor), dim

    return take
