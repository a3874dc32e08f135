"""Branches that do the same with other weights, read as one branch over stacked weights.

Experts in an `nn.ModuleList`, one module per attention head, a loop of python over the matrices of a stacked parameter:
the program runs the branches one after the other and joins what they give::

    out = sum(g[:, e : e + 1] * expert(x) for e, expert in enumerate(experts))

The same comes out of one branch that is mapped over the stack of the branches' parameters (`torch.vmap`)::

    out = vmap(lambda w, g: g * expert(x, w), in_dims=(0, 1))(stack(weights), g[..., None]).sum(0)

Read in this way, which branches may be exchanged is a matter of one axis, and the rules need to know nothing new.
Operands of a join (``cat``, ``stack``, sums, products, ...) are the same branch if their operators and numbers agree down
to values that they share; they may differ in the parameters, in which piece of a shared value they take, and in a number
that positions are compared with.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from automerge._aliases import shadow
from automerge._branches._chosen import chooses, take_all_rows
from automerge._branches._counts import counts_of
from automerge._branches._fills import fills, take_fills
from automerge._branches._forms import take_forms, takes_forms
from automerge._branches._graph import Workbench
from automerge._branches._hits import take_all_places, take_lists
from automerge._branches._joins import (
    MismatchError,
    Same,
    alike,
    along,
    cutting,
    folds,
    operands_of,
    piece,
    promising,
    side_by_side,
    whole,
)
from automerge._branches._mapping import Branch, Leaf, joined, mapped, numbers, sources_of
from automerge._branches._runs import take_runs, takes_runs
from automerge._branches._sums import adds_in_turn, take_writes_apart
from automerge._stacks import stack_name

aten = torch.ops.aten
_MOST = 20_000  # nodes of all branches of a join


@dataclass(frozen=True)
class Stacked:
    """Graphs that compute the same as recorded ones, with stacks of parameters in the place of some parameters.

    Attributes:
        graphs: the graphs; the recorded ones stay as they are.
        stacks: name of a stack -> the state-dict names along its leading axes.
        complete: whether they hold more than the recorded ones: what happens to rows of which a mask chose none there.
    """

    graphs: tuple[fx.GraphModule, ...]
    stacks: dict[str, np.ndarray]
    complete: bool = False


def stacked(graphs: Sequence[fx.GraphModule], everywhere: bool = False) -> Stacked | None:
    """Graphs with their like branches stacked; None where there are none.

    Args:
        graphs: traced graphs of one model, from `automerge.trace`.
        everywhere: whether the same must be stacked in all of them.
    """
    if not any(_hopeful(graph) for graph in graphs):
        return None
    works: list[_Work] = []
    for graph in graphs:
        works.append(_Work(graph))
        works[-1].run()
        if everywhere and works[-1].stacked != works[0].stacked:
            return None
    if not any(work.stacked for work in works):
        return None
    most = max(works, key=lambda work: work.stacked)
    # others did not reach all branches: an expert that no row was sent to
    fitting = [work for work in works if work.stacked == most.stacked and work.adopt(most.stacks)]
    complete = len(fitting) == len(works) and any(work.complete for work in works)
    return Stacked(tuple(work.finished() for work in fitting), most.stacks, complete)


def _hopeful(graph: fx.GraphModule) -> bool:
    """Whether a graph may have like branches, as it is or once rows and writes are read otherwise."""
    if promising(graph) or takes_runs(graph):
        return True
    return any(of(graph.graph) for of in (chooses, adds_in_turn, takes_forms, fills))


class _Work(Workbench):
    """One graph while its branches are being stacked."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.states = {
            n.meta["name"]: n for n in self.graph.nodes if n.op == "placeholder" and n.meta["kind"] == "state"
        }
        shared = {name for a, b, _ in graph.meta["trace"].overlaps for name in (a, b)}
        self.pinned = shared | set(graph.meta["trace"].rewritten)
        self.stacks: dict[str, np.ndarray] = {}
        self.side_by_side: dict[Same, fx.Node] = {}  # what corresponds in branches that were joined -> its stack
        self.complete = False
        self.stacked = 0  # how many branches
        self.telling: set[Same] = set()  # what told them apart

    def run(self) -> bool:
        """Stack what can be; whether anything was."""
        take_all_places(self)
        take_runs(self)
        take_fills(self)
        take_forms(self)
        self.complete = take_all_rows(self)
        take_writes_apart(self)
        found = False
        for node in list(self.graph.nodes):
            self.know(node)
            operands = operands_of(node)
            kinds = alike(node, operands, self.hashes)
            if kinds and node not in self.constant:
                found = self._stack(node, operands, kinds) or found
        if found:
            self._count_looks()
            self._count_lists()
            take_lists(self, self.telling)
        return found

    def _count_looks(self) -> None:
        """Where python looks at a value of every branch and sees the same, only their number counts.

        (``if mask.any():`` before each expert.) The values must be made from something that tells the branches of a join
        apart (``chosen == e``): that they are alike is no reason why the program should go on alike for each.
        """
        looked: dict[Any, list[fx.Node]] = {}
        told = {node: number for number, same in enumerate(self.telling) for node in same}
        for node in self.graph.nodes:
            if node.name in self.reads and "seen" in node.meta and isinstance(node.meta["val"], torch.Tensor):
                by = frozenset(
                    told[n] for n in self._made_from(node, told)
                )  # an expert's first choices, and its second
                looked.setdefault((self.hashes[node], node.meta["seen"], by), []).append(node)
        for nodes in (tuple(nodes) for nodes in looked.values() if len(nodes) > 1):
            try:
                telling = _telling(self._branch(nodes))
            except MismatchError:
                continue
            if telling and telling <= self.telling:  # (a flag of its own tells nothing of what else a branch does)
                self._count(nodes)

    def _count_lists(self) -> None:
        """Where python listed how many there are of each kind, and a branch for each is like the others, these are counted.

        (``if counts[e] == 0: continue``.) Other numbers than these were seen for other branches, so that nothing was made of
        them that differs.
        """
        for node in [n for n in self.graph.nodes if n.name in self.reads and "listed" in n.meta]:
            for same in self.telling:
                if same[0].target is not aten.eq.Scalar or len({n.args[0] for n in same}) > 1:
                    continue
                counts = counts_of(self, node, same[0].args[0])  # type: ignore[arg-type]
                if counts and set(counts) == {n.args[1] for n in same} and len(set(counts.values())) > 1:
                    self.reads.discard(node.name)

    def _count(self, nodes: Same) -> None:
        with self.graph.inserting_before(next(n for n in self.graph.nodes if n.op == "output")):
            stack = self.call(nodes[0], aten.stack.default, list(nodes), 0)
            total = self.call(nodes[0], aten.sum.default, stack)
        if self._stack(stack, list(nodes), [nodes]):
            self.reads = {*self.reads.difference(n.name for n in nodes), total.name}

    # ---------------------------------------------------------------- branches
    def _stack(self, join: fx.Node, operands: list[Any], kinds: list[Same]) -> bool:
        """Stack the like operands of a join."""
        branches = [b for nodes in kinds for b in self._branches(join, operands, nodes)]
        if folds(join):  # the factors of one product (a weight and its mask) are no modules
            branches = [b for b in branches if b.nodes[0].op != "placeholder"]
        taken: dict[fx.Node, fx.Node] = {}
        for same in [s for b in branches for s in b.parameters]:
            if all(n.meta["name"] in self.states for n in same):
                taken.update(zip(same, self._introduce([n.meta["name"] for n in same]), strict=True))
        operands = [taken.get(o, o) for o in operands]
        try:
            branches = [self._branch(tuple(taken.get(n, n) for n in b.nodes)) for b in branches]
        except MismatchError:
            return False
        if not branches or any(b.parameters for b in branches) or not self._replace(join, operands, branches):
            return False
        self.stacked += sum(len(b.nodes) for b in branches)
        self.telling |= set().union(*map(_telling, branches))
        return True

    def _branches(self, join: fx.Node, operands: list[Any], nodes: Same) -> list[Branch]:
        """What corresponds in some operands, all of them or as far as they can be told apart by their parameters.

        A join may hold the same expert several times (``for k in range(2): for e, expert in enumerate(experts)``), and beside
        those that belong to it others that it shares with a join before it.
        """
        with contextlib.suppress(MismatchError):
            return [self._branch(nodes)]
        out = []
        for run in (run for part in self._parts(nodes) for run in side_by_side(join, operands, part)):
            if 1 < len(run) < len(nodes):
                with contextlib.suppress(MismatchError):
                    out.append(self._branch(run))
        return out

    def _parts(self, nodes: Same) -> list[Same]:
        """Operands whose parameters are in the same stacks, each parameter once."""
        read = [self._read(node) for node in nodes]
        shared = frozenset.intersection(*read)
        found: dict[Any, list[fx.Node]] = {}
        often: Counter[Any] = Counter()
        for node, own in zip(nodes, (r - shared for r in read), strict=True):
            stacks = frozenset(n.args[0] for n in own if n.op == "call_function")
            found.setdefault((stacks, often[own]), []).append(node)
            often[own] += 1
        return [tuple(part) for part in found.values()]

    def _read(self, node: fx.Node) -> frozenset[fx.Node]:
        """The parameters that a node is made from, and the pieces of stacks that are in their place."""
        stacks = {self.states[name] for name in self.stacks}
        pieces = {n for stack in stacks for n in stack.users if n.target is aten.select.int}
        return self._made_from(node, {*self.states.values(), *pieces})

    def _made_from(self, node: fx.Node, ends: Collection[fx.Node]) -> frozenset[fx.Node]:
        """The first of some nodes on every way back from a node."""
        out, seen, todo = set(), {node}, [node]
        while todo and len(seen) < _MOST:
            one = todo.pop()
            if one in ends:
                out.add(one)
                continue
            more = [n for n in one.all_input_nodes if n not in seen]
            seen.update(more)
            todo += more
        return frozenset(out)

    def _branch(self, nodes: Same) -> Branch:
        """What corresponds in some operands.

        Raises:
            MismatchError: if they are not the same branch.
        """
        out = Branch(nodes)
        seen: set[Same] = set()
        todo: list[tuple[Same, bool]] = [(nodes, False)]
        while todo:
            same, expanded = todo.pop()
            if expanded:
                out.steps.append(same)
            elif same not in seen:
                seen.add(same)
                if all(n.op == "placeholder" for n in same) and len(set(same)) > 1:
                    out.parameters.append(self._parameters(same))
                    continue
                leaf = self._leaf(same)
                if leaf is not None:
                    out.leaves[same] = leaf
                    continue
                todo.append((same, True))
                todo += [(s, False) for s in sources_of(same)]
            if len(seen) * len(nodes) > _MOST:
                raise MismatchError
        differs = out.parameters or any(numbers(same) is not None for same in out.steps)
        if not differs and all(len(set(same)) == 1 for same in out.leaves):
            raise MismatchError  # one value, computed several times
        return out

    def _leaf(self, same: Same) -> Leaf | None:
        """How corresponding nodes are made from one value; None if their operators are followed further."""
        first = same[0]
        if len(set(same)) == 1:
            return Leaf(first, whole)
        if same in self.side_by_side:
            return Leaf(self.side_by_side[same], along(0))
        if all(n.op == "get_attr" for n in same):
            values = [n.meta["val"] for n in same]
            if all(torch.equal(v, values[0]) for v in values):
                return Leaf(first, whole)
            return Leaf(torch.stack(values), along(0))
        if any(n.op != "call_function" for n in same):
            raise MismatchError
        pieces = [p for p in map(piece, same) if p is not None]
        if len(pieces) == len(same) and len({p.source for p in pieces}) == 1:
            if len({p.start for p in pieces}) == 1:
                return Leaf(first, whole)
            return Leaf(pieces[0].source, cutting(pieces))
        if any(p.source.meta.get("name") in self.stacks for p in pieces):
            raise MismatchError  # one is in a stack already, the others are not, or in another
        return None

    def _parameters(self, same: Same) -> Same:
        names = [n.meta["name"] for n in same]
        if (
            len(set(same)) < len(same)
            or any(n.meta["kind"] != "state" for n in same)
            or not self.pinned.isdisjoint(names)
        ):
            raise MismatchError
        return same

    def _introduce(self, names: list[str]) -> list[fx.Node]:
        """The pieces of a stack of parameters, which take the place of these from now on."""
        parts = [self.states.pop(name) for name in names]
        inner = [self.stacks.pop(name, np.array(name, dtype=object)) for name in names]
        name = stack_name(names, {*self.states, *self.stacks})
        value = parts[0].meta["val"]
        with self.graph.inserting_before(next(iter(self.graph.nodes))):
            stack = self.graph.placeholder(f"stack_{parts[0].name}")
        shape = (len(parts), *value.shape)
        stack.meta = {**parts[0].meta, "name": name, "val": torch.empty(shape, dtype=value.dtype, device="meta")}
        stack.target = stack.name
        self.know(stack)
        with self.graph.inserting_before(next(n for n in self.graph.nodes if n.op != "placeholder")):
            pieces = [self.graph.call_function(aten.select.int, (stack, 0, e)) for e in range(len(parts))]
        for part, one in zip(parts, pieces, strict=True):
            one.meta = {**part.meta, "val": shadow(value)}
            self.hashes[one] = self.hashes[part]
            part.replace_all_uses_with(one)
            self.graph.erase_node(part)
        self.states[name], self.stacks[name] = stack, np.stack(inner)
        return pieces

    def adopt(self, stacks: dict[str, np.ndarray]) -> bool:
        """Take the stacks of other graphs over; whether they fit this one's."""
        for name, names in stacks.items():
            if name in self.stacks:
                if not np.array_equal(self.stacks[name], names):
                    return False
                continue
            mine = list(names.reshape(-1))
            if names.ndim > 1 or any(n not in self.states for n in mine):
                return False
            self._introduce(mine)
        return set(self.stacks) == set(stacks)

    # ---------------------------------------------------------------- the other graph
    def _replace(self, join: fx.Node, operands: list[Any], branches: list[Branch]) -> bool:
        """Put one mapped branch in the place of each kind of like operands."""
        leaves = list(dict.fromkeys(leaf.source for b in branches for leaf in b.leaves.values()))
        inside = {n for b in branches for n in b.nodes}
        others = [o for o in operands if isinstance(o, fx.Node) and o not in inside]
        sources = list(dict.fromkeys(s for s in (*leaves, *others) if isinstance(s, fx.Node)))

        def compute(*tensors: torch.Tensor) -> list[torch.Tensor]:
            known: dict[Any, Any] = dict(zip(sources, tensors, strict=True))
            values = [(b, mapped(b, known)) for b in branches]
            return [joined(join, operands, values, known), *(value for _, value in values)]

        made = self.put(join, compute, sources)
        if made is not None:
            self.side_by_side.update(zip((b.nodes for b in branches), made[1:], strict=True))
        return made is not None


def _telling(branch: Branch) -> set[Same]:
    """What tells branches apart."""
    leaves = {same for same in branch.leaves if len(set(same)) > 1}
    return leaves | {same for same in branch.steps if numbers(same) is not None}
