"""Whether what follows a sort of rows depends on their order: each operator is tried with the rows in several orders."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from automerge.rules._nodes import schema_name
from automerge.rules._registry import is_pointwise

GROUPED = "aten::_grouped_mm"
_EMPTY = ("aten::empty_like", "aten::new_empty", "aten::new_empty_strided", "aten::empty_strided")
_LEVEL = (
    *_EMPTY,
    *(
        f"aten::{n}"
        for n in ["zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "zero", "fill"]
    ),
)
_READS = ("aten::index", "aten::_unsafe_index", "aten::index_select", "aten::gather", "aten::embedding")
_COPIES = ("aten::_to_copy", "aten::to", "aten::lift_fresh_copy")
_FIRST = ("aten::argmax", "aten::argmin")  # the first of equals
_SYMMETRIC = (
    *_READS,
    *(f"aten::{n}" for n in ["mm", "bmm", "addmm", "baddbmm", "mv", "dot"]),
    *(f"aten::{n}" for n in ["index_put", "_unsafe_index_put", "index_add", "index_copy", "scatter", "scatter_add"]),
    *(f"aten::{n}" for n in ["histc", "bincount"]),
)


@dataclass
class Dispatch:
    """One sort of rows by their expert, and what follows until they are back in their order.

    Attributes:
        ids: the number of every row's expert, before sorting.
        sort: the node that sorts.
        numbers: the nodes that hold the sorted numbers.
        order: the node that holds the places that the rows came from.
        grouped: the grouped products.
        known: nodes that depend on nothing but the order -> their value where the rows stay as they are.
        moved: nodes whose values depend on the order.
    """

    ids: fx.Node
    sort: fx.Node
    order: fx.Node
    numbers: set[fx.Node] = field(default_factory=set)
    grouped: list[fx.Node] = field(default_factory=list)
    known: dict[fx.Node, Any] = field(default_factory=dict)
    moved: set[fx.Node] = field(default_factory=set)


@dataclass(frozen=True)
class _Rows:
    """A value with the sorted rows along one of its axes."""

    axis: int


_PLACES = "places among the sorted rows"
_SEVERAL = "several outputs"
_Kind = _Rows | str | None  # None: the same in any order


class OrderedError(Exception):
    """Something depends on the order of the rows."""


class Trial:
    """Tries each operator behind a sort on made-up numbers, with the rows in several orders, and compares.

    Attributes:
        orders: the first leaves the rows as they are.
        given: made-up numbers of the rows' experts, of which there are ``count``.
        kinds: node -> how its value depends on the order; a list for several outputs.
        held: node -> its value in every order, for integers and what depends on nothing else than the order. All other
            values are made up for every operator again.
        level: nodes with the same number everywhere.
        drawn: what was made up for the operator that is tried.
        before: the trial before this one: only made-up whole numbers and masks are tried again.
        unequal: whether whole numbers and masks that are made up differ between the first two rows; else they may be equal.
    """

    def __init__(
        self,
        live: Sequence[fx.Node],
        read: Collection[fx.Node],
        found: Dispatch,
        constant: set[fx.Node],
        count: int,
        before: Trial | None = None,
    ) -> None:
        self.live, self.read, self.found, self.constant, self.count = live, read, found, constant, count
        self.before = before
        self.number: int = 0 if before is None else before.number + 1
        self.rng, self.unequal = torch.Generator().manual_seed(self.number), self.number % 2 == 0
        n = len(found.ids.meta["val"])
        ahead = torch.arange(n)
        # what keeps to a swap of two rows and to a turn of all keeps to every order: these two make them all; but whole
        # numbers may be equal by chance, so that there are two more
        turned = [ahead.flip(0), torch.randperm(n, generator=self.rng)]
        self.orders = [ahead, torch.cat([ahead[:2].flip(0), ahead[2:]]), ahead.roll(1), *turned]
        self.given = torch.randint(count, (n,), generator=self.rng, dtype=found.ids.meta["val"].dtype)
        self.given[:1] = (self.given[1:2] + 1) % count if n > 1 else self.given
        self.kinds: dict[fx.Node, Any] = {}
        self.held: dict[fx.Node, list[Any]] = {found.ids: [self.given] * len(self.orders)}
        self.level: set[fx.Node] = set()
        self.drawn: dict[fx.Node, torch.Tensor] = {}

    def run(self) -> None:
        """Go through the nodes behind the sort.

        Raises:
            OrderedError: if one depends on the order in another way than by having its rows in it.
        """
        found = self.found
        self.held[found.order], self.kinds[found.order] = list(self.orders), _Rows(0)
        found.known[found.order] = self.orders[0]
        for node in found.numbers:
            self.held[node], self.kinds[node] = [self.given[o] for o in self.orders], _Rows(0)
        for node in self.live:
            if node not in self.kinds and any(self.kinds.get(n) is not None for n in node.all_input_nodes):
                if node.op == "output":
                    raise OrderedError("an output")
                self.visit(node)
            if self.kinds.get(node) is not None and node in self.read:
                raise OrderedError("python reads it")
        found.moved = {node for node, kind in self.kinds.items() if kind is not None}

    def visit(self, node: fx.Node) -> None:
        """Find out how a node's value depends on the order."""
        if schema_name(node) == GROUPED:
            self.grouped(node)
            return
        if self.before is not None and self.settled(node):
            self.kinds[node] = self.before.kinds[node]
            self.level |= {node} & self.before.level
            return
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise OrderedError("random numbers")
        result = node.meta["val"]
        pure = all(self.exact(n) for n in node.all_input_nodes)
        copied = schema_name(node) in _COPIES and isinstance(self.kinds.get(node.all_input_nodes[0]), _Rows)
        pointwise = is_pointwise(node.target) or copied
        seen = self.viewed(node) or self.kept(node)
        if seen is not None and not pure and not _whole(result):
            self.kinds[node] = seen
            return
        single = isinstance(result, torch.Tensor)
        if pure or (single and not pointwise) or _whole(result):
            self.drawn.clear()
            values = [self.value(node, turn) for turn in range(len(self.orders))]
            if pure or _whole(result):
                self.held[node] = values
            if pure:
                self.found.known[node] = values[0]
        if not single:
            self.kinds[node] = _SEVERAL
        elif schema_name(node) in _LEVEL and all(self.kinds.get(n) is None for n in node.all_input_nodes[1:]):
            self.kinds[node] = None
            self.level.add(node)
        else:
            self.kinds[node] = self.broadcast(node) if pointwise else seen or self.kind(node, values)
        if self.rereads(node):
            self.found.numbers.add(node)

    def exact(self, node: fx.Node) -> bool:
        """Whether a value is known for every order, not made up."""
        return node in self.constant or node in self.found.known

    def settled(self, node: fx.Node) -> bool:
        """Whether other made-up numbers would tell no more than those of an earlier trial: they are real, and never equal."""
        if not isinstance(node.meta["val"], torch.Tensor) or all(self.exact(n) for n in node.all_input_nodes):
            return False
        return not any(_discrete(n) and not self.exact(n) for n in (node, *node.all_input_nodes))

    def rereads(self, node: fx.Node) -> bool:
        """Whether a node is the numbers in the rows' order (``ids[order]``)."""
        source, *where = node.all_input_nodes
        if (
            schema_name(node) not in _READS
            or source is not self.found.ids
            or any(n not in self.found.known for n in where)
        ):
            return False
        return torch.equal(self.held[node][0], self.given)

    def grouped(self, node: fx.Node) -> None:
        """A function of every row and its expert, if each run of rows is multiplied by the matrix of its number."""
        args: Any = node.args
        x, weight = args[:2]
        offsets = args[2] if len(args) > 2 else node.kwargs.get("offs")
        bias = args[3] if len(args) > 3 else node.kwargs.get("bias")
        whole = self.kinds.get(x) == _Rows(0) and self.kinds.get(weight) is None and bias is None
        if not whole or weight.meta["val"].shape[:-2] != (self.count,) or not self.runs(offsets):
            raise OrderedError("a grouped product of other runs")
        self.kinds[node] = _Rows(0)
        self.found.grouped.append(node)

    def runs(self, offsets: Any) -> bool:
        """Whether the offsets are those of the sorted numbers, whatever the numbers are."""
        ids, n, count = self.found.ids, len(self.given), self.count
        draws = [torch.randint(high, (n,), generator=self.rng) for high in (*[count] * 8, max(count // 2, 1), 1)]
        more = torch.randint(
            count, (32 * count + 8 * n,), generator=self.rng
        )  # a capacity that the example does not reach
        for numbers in (*draws, count - 1 - draws[-1], more):
            known: dict[fx.Node, Any] = {ids: numbers.to(ids.meta["val"].dtype)}
            try:
                made, first = self.of_ids(offsets, known), self.of_ids(self.found.sort, known)
            except Exception:
                if numbers is more:
                    continue  # it is written for this many rows
                return False
            order = first if isinstance(first, torch.Tensor) else first[1]
            whole = torch.bincount(numbers, minlength=count).cumsum(0)
            if not torch.equal(numbers[order], numbers.sort().values) or not torch.equal(made.to(whole), whole):
                return False
        return True

    def of_ids(self, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
        """A node's value for given numbers of the rows' experts, if it depends on nothing else."""
        if node not in known:
            if node in self.constant:
                return node.meta["val"]
            if node.op != "call_function":
                raise OrderedError("depends on more than the choice")
            known[node] = _called(node, lambda n: self.of_ids(n, known))
        return known[node]

    def broadcast(self, node: fx.Node) -> _Rows:
        """An operator on entries at the same place: it meets nothing else that differs from row to row."""
        moved = [(n, self.kinds[n]) for n in node.all_input_nodes if self.kinds.get(n) is not None]
        back = {n.meta["val"].dim() - kind.axis if isinstance(kind, _Rows) else 0 for n, kind in moved}
        if len(back) > 1 or 0 in back:
            raise OrderedError("rows meet another axis")
        (dim,) = back
        for other in node.all_input_nodes:
            value = other.meta["val"]
            if (
                self.kinds.get(other) is None
                and other not in self.level
                and value.dim() >= dim
                and value.shape[-dim] > 1
            ):
                line = value.movedim(-dim, 0)
                if other not in self.constant or not torch.equal(line, line[:1].expand_as(line)):
                    raise OrderedError("rows meet another axis")
        return _Rows(node.meta["val"].dim() - dim)

    def viewed(self, node: fx.Node) -> _Rows | None:
        """Where a view has the rows of its operand, as its strides say; None for what is no view."""
        source: Any = node.args[0] if node.target is operator.getitem else node
        schema = getattr(source.target, "_schema", None)
        alias = schema.arguments[0].alias_info if schema is not None and schema.arguments else None
        plain = alias is not None and not alias.is_write and source.all_input_nodes == [source.args[0]]
        kind = self.kinds.get(source.args[0]) if plain else None
        if not isinstance(kind, _Rows):
            return None
        shape, n = source.args[0].meta["val"].shape, len(self.given)
        line = torch.arange(n).view([n if k == kind.axis else 1 for k in range(len(shape))])
        try:
            out = source.target(line.expand(shape), *source.args[1:], **source.kwargs)
        except RuntimeError:  # no view of such memory, or of integers
            return None
        out = out if source is node else out[node.args[1]]
        if not isinstance(out, torch.Tensor) or out.untyped_storage().data_ptr() != line.untyped_storage().data_ptr():
            return None
        moving = [k for k, (m, stride) in enumerate(zip(out.shape, out.stride(), strict=True)) if m > 1 and stride]
        whole = len(moving) == 1 and out.storage_offset() == 0 and out.shape[moving[0]] == n
        return _Rows(moving[0]) if whole and out.stride(moving[0]) == 1 else None

    def kept(self, node: fx.Node) -> _Rows | None:
        """Where a reduction over other axes has the rows of its operand, whatever the numbers are; None for anything else."""
        if torch.Tag.reduction not in getattr(node.target, "tags", ()) or not isinstance(
            node.meta["val"], torch.Tensor
        ):
            return None
        source: Any = node.args[0]
        kind, rank = self.kinds.get(source), source.meta["val"].dim()
        arguments = [a.name for a in node.target._schema.arguments]
        given: Any = (dict(zip(arguments, node.args, strict=False)) | node.kwargs).get("dim")
        dims = [given] if isinstance(given, int) else given
        if not isinstance(kind, _Rows) or not dims or isinstance(given, bool):
            return None
        gone = {d % rank for d in dims}
        if kind.axis in gone:
            return None
        return kind if node.meta["val"].dim() == rank else _Rows(kind.axis - sum(d < kind.axis for d in gone))

    # ------------------------------------------------------------ values
    def value(self, node: fx.Node, turn: int) -> Any:
        """A node's value in one of the orders."""
        if schema_name(node) in _EMPTY:
            return torch.zeros(node.meta["val"].shape, dtype=node.meta["val"].dtype)
        if node.target is operator.getitem:
            source: Any = node.args[0]
            return (self.held[source][turn] if source in self.held else self.value(source, turn))[node.args[1]]
        try:
            return _called(node, lambda n: self.operand(n, turn))
        except Exception as error:
            raise OrderedError(f"{node.name} does not run") from error

    def operand(self, node: fx.Node, turn: int) -> Any:
        """Made-up numbers, with the rows in order; constants and integers as they are."""
        value, kind = node.meta["val"], self.kinds.get(node)
        if node in self.held:
            return self.held[node][turn]
        if node in self.constant or not isinstance(value, torch.Tensor):
            return value
        if node not in self.drawn:
            drawn = torch.rand(value.shape, generator=self.rng, dtype=torch.float64).add_(0.5)
            if not value.is_floating_point() and not value.is_complex():
                drawn = drawn.to(value.dtype) if value.dtype is not torch.bool else drawn > 1  # integers: 0 and 1
                if isinstance(kind, _Rows) and len(self.given) > 1 and self.unequal:
                    drawn.select(kind.axis, 0).copy_(drawn.select(kind.axis, 1) == 0)
            self.drawn[node] = drawn
        drawn = self.drawn[node]
        return drawn.index_select(kind.axis, self.orders[turn]) if isinstance(kind, _Rows) else drawn

    def by_chance(self, node: fx.Node, value: torch.Tensor) -> bool:
        """Whether a value may be the same in every order only because of the numbers that were made up."""
        name, source = schema_name(node), node.args[0]
        if name in _READS and isinstance(source, fx.Node) and _discrete(source):
            return self.kinds.get(source) is not None and all(
                self.kinds.get(n) is None for n in node.all_input_nodes[1:]
            )
        if name in _SYMMETRIC or (torch.Tag.reduction in getattr(node.target, "tags", ()) and name not in _FIRST):
            return False
        moved = [n for n in node.all_input_nodes if self.kinds.get(n) is not None]
        return len(self.given) in value.shape or any(_discrete(n) or n in self.held for n in (node, *moved))

    def kind(self, node: fx.Node, values: Sequence[torch.Tensor]) -> _Kind:
        """How a value depends on the order."""
        first, *others = values
        n = len(self.given)
        if all(_equal(v, first) for v in others):
            alike = [k for k, m in enumerate(first.shape) if m == n and _equal(first, first.roll(1, k))]
            if schema_name(node) in _READS and len(alike) == 1:
                return _Rows(alike[0])  # rows that were read at one place each, though there may be one place only
            if self.by_chance(node, first):
                raise OrderedError("its rows may differ for other numbers")
            return None
        if any(v.shape != first.shape for v in others):
            raise OrderedError("its shape depends on the order")
        pairs = list(zip(others, self.orders[1:], strict=True))
        for axis in (k for k in range(first.dim()) if first.shape[k] == n):
            if all(_equal(v, first.index_select(axis, o)) for v, o in pairs):
                return _Rows(axis)
        inside = _whole(first) and all(int(v.min()) >= 0 and int(v.max()) < n for v in values)
        if inside and all(_equal(o[v], first.to(o)) for v, o in pairs):
            return _PLACES
        raise OrderedError("its values depend on the order")


def _discrete(node: fx.Node) -> bool:
    value = node.meta["val"]
    return isinstance(value, torch.Tensor) and not value.is_floating_point() and not value.is_complex()


def _whole(value: Any) -> bool:
    """Whether this is a tensor of integers."""
    return (
        isinstance(value, torch.Tensor)
        and not value.is_floating_point()
        and not value.is_complex()
        and value.dtype is not torch.bool
    )


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape:
        return False
    return torch.allclose(a, b, rtol=1e-9, atol=1e-12) if a.is_floating_point() or a.is_complex() else torch.equal(a, b)


def _called(node: fx.Node, value: Any) -> Any:
    """A node's operator on the values of its operands, on the CPU."""
    kwargs = {k: ("cpu" if k == "device" else v) for k, v in node.kwargs.items()}
    return node.target(*fx.node.map_arg(node.args, value), **fx.node.map_arg(kwargs, value))  # type: ignore[operator]
