"""One branch mapped over the stacks of what differs between the branches, and joined again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from automerge._branches._joins import FOLDS, NUMBERED, MismatchError, Same, folds

_KEYS = ("FuncTorchBatched", "FuncTorchBatchedDecomposition", "CompositeImplicitAutograd")


@dataclass(frozen=True)
class Leaf:
    """A value that differs between the branches, or not: ``take`` makes it, and names its axis of branches, from ``source``."""

    source: fx.Node | torch.Tensor
    take: Callable[[torch.Tensor], tuple[torch.Tensor, int | None]]


@dataclass
class Branch:
    """What corresponds in some operands of a join.

    Attributes:
        nodes: the operands.
        steps: the operators, in an order in which they can run.
        leaves: what they begin with.
        parameters: those of them that are parameters, which are to be stacked first.
    """

    nodes: Same
    steps: list[Same] = field(default_factory=list)
    leaves: dict[Same, Leaf] = field(default_factory=dict)
    parameters: list[Same] = field(default_factory=list)


def joined(
    join: fx.Node, operands: list[Any], mapped: list[tuple[Branch, torch.Tensor]], known: dict[Any, Any]
) -> torch.Tensor:
    """The value of a join, where some of its operands are given as stacks."""
    place = {branch.nodes[0]: value for branch, value in mapped}
    inside = {n for branch, _ in mapped for n in branch.nodes[1:]}
    left = [o for o in operands if not (isinstance(o, fx.Node) and o in inside)]
    if folds(join):
        fold: Any = join.target
        return reduce(fold, [FOLDS[fold](place[o]) if o in place else known.get(o, o) for o in left])
    rank = join.meta["val"].dim()
    dim = int(join.args[1] if len(join.args) > 1 else 0) % rank  # type: ignore[arg-type]
    stacks = join.target is torch.ops.aten.stack.default
    pieces = []
    for o in left:
        if o not in place:
            pieces.append(known[o].unsqueeze(dim) if stacks else known[o])
        else:
            along = place[o].movedim(0, dim)
            pieces.append(along if stacks else along.flatten(dim, dim + 1))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def mapped(branch: Branch, known: dict[Any, Any]) -> torch.Tensor:
    """The results of all branches, along a new first axis."""
    shared: dict[Same, torch.Tensor] = {}
    keys, values, dims = [], [], []
    for same, leaf in branch.leaves.items():
        value, dim = leaf.take(leaf.source if isinstance(leaf.source, torch.Tensor) else known[leaf.source])
        if dim is None:
            shared[same] = value
        else:
            keys.append(same)
            values.append(value)
            dims.append(dim)
    for same in branch.steps:
        number = numbers(same)
        if number is not None:
            keys.append((same,))  # type: ignore[arg-type]
            values.append(number)
            dims.append(0)

    def one(*given: torch.Tensor) -> torch.Tensor:
        env: dict[Any, Any] = {**shared, **dict(zip(keys, given, strict=True))}
        for same in branch.steps:
            env[same] = _step(same, env)
        return env[branch.nodes]

    if not values:
        raise ValueError("nothing differs")
    return torch.vmap(one, in_dims=tuple(dims))(*values)


def _step(same: Same, env: dict[Any, Any]) -> Any:
    """One operator of a branch."""
    node = same[0]
    if (same,) in env:
        return NUMBERED[node.target](env[sources_of(same)[0]], env[same,])
    flat, spec = tree_flatten((node.args, node.kwargs))
    others = [tree_flatten((n.args, n.kwargs))[0] for n in same]
    values = [env[tuple(o[i] for o in others)] if isinstance(a, fx.Node) else a for i, a in enumerate(flat)]
    args, kwargs = tree_unflatten(values, spec)
    if node.target is torch.ops.aten.view.default:
        return torch.ops.aten.reshape.default(*args)  # with an axis of branches the memory may lie otherwise
    if node.target in (
        torch.ops.aten.copy.default,
        torch.ops.aten.fill.Tensor,
    ):  # mapped, these warn that they are slow
        return args[1].to(args[0].dtype).expand(args[0].shape)
    if node.target is torch.ops.aten.index_add.default and args[1] == 0 and not kwargs:
        base, _, index, rows = args  # that operator would run once for each branch
        return torch.ops.aten.index_put.default(base, [index], rows, True)
    return _mappable(node.target)(*args, **kwargs)


@functools.cache
def _mappable(target: Any) -> Callable[..., Any]:
    """An operator, or what PyTorch decomposes it into where it cannot be mapped as one.

    Raises:
        ValueError: if there is no way; running it once for each branch would tell them apart.
    """
    if not isinstance(target, torch._ops.OpOverload):
        return target
    if any(torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), key) for key in _KEYS):
        return target
    from torch._decomp import decomposition_table

    if target not in decomposition_table:
        raise ValueError(f"{target} cannot be mapped")
    return decomposition_table[target]


def numbers(same: Same) -> torch.Tensor | None:
    """The numbers that branches compare with, if they do and these differ."""
    if same[0].target not in NUMBERED:
        return None
    found = [n.args[1] for n in same]
    return torch.tensor(found) if len(set(found)) > 1 else None


def sources_of(same: Same) -> list[Same]:
    """The corresponding operands of corresponding nodes.

    Raises:
        MismatchError: if their operators or numbers differ.
    """
    first = same[0]
    flat, spec = tree_flatten((first.args, first.kwargs))
    others = []
    for node in same:
        leaves, other = tree_flatten((node.args, node.kwargs))
        if node.target is not first.target or other != spec:
            raise MismatchError
        others.append(leaves)
    out = []
    for i, a in enumerate(flat):
        column = [o[i] for o in others]
        if isinstance(a, fx.Node):
            if not all(isinstance(c, fx.Node) for c in column):
                raise MismatchError
            out.append(tuple(column))
        elif any(type(c) is not type(a) or c != a for c in column) and not (first.target in NUMBERED and i == 1):
            raise MismatchError
    return out
