"""Whether anything depends on the order in which ``topk(sorted=False)`` lists what it chose.

That order is an accident of the selection, and another one where the entries are permuted. A mixture of experts sums over
what was chosen, so that any order will do, as the one by size. What is computed from such a choice is tried on made-up
numbers, with the chosen entries in several orders, until it is the same in all of them or reaches an output. A bound or a
threshold may hide the order of small numbers (``relu(v - 1)``) and that of large ones, so that both are tried.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

from automerge._double import double_precision
from automerge._made_up import Draw, signed, small
from automerge.rules._known import formed
from automerge.rules._nodes import constants, liveness, schema_name
from automerge.rules._reads import MOVING, SAME

_MAX_ENTRIES = 4_000_000
_TOLERANCE = 1e-6

Held = dict[fx.Node, list[Any]]


def order_matters(node: Any, dim: int) -> bool:
    """Whether an output, or what Python read, is seen to depend on the order of the chosen entries along an axis.

    What cannot be tried (an operator on large weights, sizes that depend on the order) is not seen.
    """
    module = node.graph.owning_module
    scores, count = node.args[0].meta["val"], node.meta["val"][1].shape[dim]
    if module is None or scores.numel() > _MAX_ENTRIES:
        return False
    read = [n for n in node.graph.nodes if n.name in module.meta["trace"].reads]
    rng = torch.Generator().manual_seed(0)
    live = liveness(module, read)[0]
    known = {n: n.meta["val"] for n in constants(node.graph)}
    copied = _copies(node.graph)
    for draw in (small, partial(signed, scale=10.0)):
        values, index = draw(scores.shape, rng).topk(count, dim)
        ahead = torch.arange(count).reshape([-1 if k == dim else 1 for k in range(index.dim())]).expand(index.shape)
        orders = [ahead, ahead.flip(dim), torch.rand(index.shape, generator=rng).argsort(dim)]
        held: Held = {node: [(values.gather(dim, o), index.gather(dim, o)) for o in orders]}
        # rows that were copied for each choice are the same rows also in what is computed from them, which takes longer; what
        # cannot be tried like this is left as it was seen
        if _seen(_Trial(draw, rng, set(), dict(known), dict(held)), node, live, read, False) and _seen(
            _Trial(draw, rng, copied, dict(known), held), node, live, read, True
        ):
            return True
    return False


def zeros_matter(node: fx.Node, dim: int) -> bool:
    """Whether it may matter which of some scores are chosen along an axis, where all of them are zero.

    What is weighted by a score of zero is none. (A softmax over the chosen scores gives them weights.) What cannot be
    tried may.
    """
    module, scores = node.graph.owning_module, node.all_input_nodes[0]
    shape = scores.meta["val"].shape
    if module is None or scores.meta["val"].numel() > _MAX_ENTRIES:
        return True
    value = node.meta["val"]
    pair = not isinstance(value, torch.Tensor)
    index = value[1] if pair else value
    ends = (torch.zeros(index.shape, dtype=torch.int64), torch.full(index.shape, shape[dim] - 1))
    if index.dim() == len(shape):
        ahead = torch.arange(index.shape[dim]).reshape([-1 if k == dim else 1 for k in range(index.dim())])
        ends = (ends[0] + ahead, ends[1] - ahead)
    nothing = torch.zeros(index.shape, dtype=torch.float64)
    held: Held = {node: [(nothing, e) for e in ends] if pair else list(ends)}
    read = [n for n in node.graph.nodes if n.name in module.meta["trace"].reads]
    known = {n: n.meta["val"] for n in constants(node.graph)} | {scores: torch.zeros(shape, dtype=torch.float64)}
    trial = _Trial(partial(signed, scale=1.0), torch.Generator().manual_seed(0), set(), known, held)
    return _seen(trial, node, liveness(module, read)[0], read, True)


def _seen(trial: _Trial, node: fx.Node, live: Collection[fx.Node], read: Collection[fx.Node], otherwise: bool) -> bool:
    """Whether a trial shows that the order matters; something else if an operator cannot be tried."""
    try:
        with torch.no_grad(), double_precision():
            return trial.reaches(node, live, read)
    except Exception:
        return otherwise


@dataclass
class _Trial:
    """Made-up numbers, and what comes of them.

    Attributes:
        draw: makes numbers up, with ``rng``.
        computed: the nodes that are computed from others, not made up.
        made: values that are the same in every order.
        held: values in every order, of the others.
    """

    draw: Draw
    rng: torch.Generator
    computed: Collection[fx.Node]
    made: dict[fx.Node, Any]
    held: Held

    def reaches(self, start: fx.Node, live: Collection[fx.Node], read: Collection[fx.Node]) -> bool:
        """Go through what is computed from a node; whether that is an output, or read, before it is the same again."""
        nodes = list(start.graph.nodes)
        for node in nodes[nodes.index(start) + 1 :]:
            if node not in live or self.held.keys().isdisjoint(node.all_input_nodes):
                continue
            if node.op == "output" or node in read:
                return True
            for n in node.all_input_nodes:
                if n not in self.held:
                    self.make_up(n)
            orders = range(len(self.held[start]))
            values = [_computed(node, {**self.made, **{n: v[k] for n, v in self.held.items()}}) for k in orders]
            if all(_same(values[0], v) for v in values[1:]):
                self.made[node] = values[0]
            else:
                self.held[node] = values
        return False

    def make_up(self, node: fx.Node) -> None:
        """Any numbers in the place of a tensor; whole numbers and masks as they were recorded.

        Those that are made from whole numbers alone are computed: where rows are left unsorted, others were recorded. So is
        what an operator only moves, or changes by itself: a row that is read for each of several choices is the same row.
        """
        value = node.meta["val"]
        if node in self.made:
            return
        plain = formed(node) if node.op == "call_function" else None
        if plain is not None:
            self.made[node] = plain.clone()
            return
        whole = all(map(_is_whole, (node, *node.all_input_nodes)))
        if node.op == "call_function" and (whole or node in self.computed or _entry_by_entry(node)):
            for n in node.all_input_nodes:
                self.make_up(n)
            self.made[node] = _computed(node, self.made)
        else:
            self.made[node] = _any(value, self.draw, self.rng) if isinstance(value, torch.Tensor) else value


def _copies(graph: fx.Graph) -> set[fx.Node]:
    """What is computed from entries of which some are copies of each other."""
    out: set[fx.Node] = set()
    for node in graph.nodes:
        source = node.all_input_nodes[0] if schema_name(node) in MOVING and node.all_input_nodes else None
        copies = source is not None and _numel(node) > _numel(source)
        if node.op == "call_function" and (copies or not out.isdisjoint(node.all_input_nodes)):
            out.add(node)
    return out


def _numel(node: fx.Node) -> int:
    value = node.meta["val"]
    return value.numel() if isinstance(value, torch.Tensor) else 0


def _computed(node: fx.Node, given: Mapping[fx.Node, Any]) -> Any:
    args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), lambda a: given[a] if isinstance(a, fx.Node) else a)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _any(value: torch.Tensor, draw: Draw, rng: torch.Generator) -> torch.Tensor:
    if value.numel() > _MAX_ENTRIES or (value.is_meta and not value.is_floating_point()):
        raise ValueError("cannot be made up")
    if not value.is_floating_point():
        return value.cpu()
    return draw(value.shape, rng)


def _entry_by_entry(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    pointwise = torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags
    return pointwise or schema_name(node) in MOVING | SAME


def _is_whole(node: fx.Node) -> bool:
    value = node.meta["val"]
    return isinstance(value, torch.Tensor) and not (value.is_floating_point() or value.is_complex())


def _same(a: Any, b: Any) -> bool:
    if not isinstance(a, torch.Tensor):
        return type(a) is type(b) and len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if a.shape != b.shape or not a.is_floating_point():
        return torch.equal(a, b)
    return torch.allclose(
        a, b, rtol=_TOLERANCE, atol=_TOLERANCE * float(a.abs().max()) if a.numel() else 0, equal_nan=True
    )
