"""A recorded graph while parts of it are replaced by others that compute the same."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from automerge._aliases import shadow
from automerge._branches._joins import likeness
from automerge._errors import TraceError
from automerge._lazy_module import LazyModule
from automerge._tree_io import tensors_of
from automerge.rules._nodes import draws, is_constant
from automerge.trace import record


class Workbench:
    """A copy of a recorded graph, whose parts may be replaced.

    Attributes:
        graph: the copy.
        reads: the names of the nodes whose values python looks at.
        hashes: node -> a number that is the same for like branches.
        constant: the nodes that depend neither on inputs nor on parameters; they keep their values.
        sorts: names of the nodes that sort rows of which masks choose the runs -> how many kinds of rows there may be.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        self.recorded = graph
        self.graph = fx.Graph()
        self.reads = set(graph.meta["trace"].reads)
        made: dict[fx.Node, fx.Node] = {}
        once: dict[Any, fx.Node] = {}
        for node in graph.graph.nodes:
            made[node] = copy = self.graph.node_copy(node, made.__getitem__)
            if node.op == "call_function" and not draws(node) and node.name not in self.reads:
                # what a program computes anew for every branch (``weights[layer][e]``) is one value
                made[node] = once.setdefault((copy.target, repr(copy.args), repr(copy.kwargs)), copy)
                if made[node] is not copy:
                    self.graph.erase_node(copy)
        self._values = {n.target: getattr(graph, n.target) for n in self.graph.nodes if n.op == "get_attr"}
        self.hashes: dict[fx.Node, int] = {}
        self.constant: set[fx.Node] = set()
        self.sorts: dict[str, int] = {}
        self.know_all()

    def finished(self) -> fx.GraphModule:
        """The graph as a module, without what nothing uses any more."""
        self.erase([n for n in self.graph.nodes if n.op == "call_function"])
        self.graph.lint()
        root = nn.Module()
        for name, value in self._values.items():
            root.register_buffer(name, value)
        out = LazyModule(root, self.graph)
        info = self.recorded.meta["trace"]
        names = {n.name for n in self.graph.nodes if n not in self.constant}
        out.meta["trace"] = replace(info, reads=sorted(self.reads & names))
        out.meta["sorts"] = self.sorts
        return out

    def know(self, node: fx.Node) -> None:
        """Note what a node is like, after those before it."""
        self.hashes[node] = likeness(node, self.hashes)
        if is_constant(node, self.constant):
            self.constant.add(node)
            if node.op == "call_function" and any(v.is_meta for v in tensors_of(node.meta["val"])):
                given = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
                if not any(v.is_meta for v in tensors_of(given)):
                    with torch.no_grad():
                        node.meta["val"] = node.target(*given[0], **given[1])  # type: ignore[operator]

    def know_all(self) -> None:
        """Note anew what all nodes are like."""
        for node in self.graph.nodes:
            self.know(node)

    def put(self, node: fx.Node, compute: Callable[..., Any], sources: list[fx.Node]) -> list[fx.Node] | None:
        """Record a function of the values of some nodes; the first of its results takes the place of a node.

        Returns:
            The nodes of all results; None if the function does not run.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = record(compute, [n.meta["val"] for n in sources], **_origin(node), compute=False)
        except (TraceError, NotImplementedError, RuntimeError, TypeError, ValueError, IndexError):
            return None  # an operator that cannot be mapped
        results: Any = next(n for n in found.graph.nodes if n.op == "output").args[0]
        was, now = node.meta["val"], results[0].meta["val"]
        if was.shape != now.shape or was.dtype != now.dtype or found.meta["trace"].reads:
            return None
        return self._inline(node, found, sources, results)

    def _inline(
        self, join: fx.Node, mapped_once: fx.GraphModule, sources: list[fx.Node], results: list[fx.Node]
    ) -> list[fx.Node]:
        made: dict[fx.Node, fx.Node] = {}
        given = iter(sources)
        with self.graph.inserting_before(join):
            for node in mapped_once.graph.nodes:
                if node.op == "output":
                    continue
                if node.op == "placeholder":
                    made[node] = next(given)
                    continue
                if node.op == "get_attr":
                    made[node] = self.fixed(node.meta["val"], node)
                else:
                    made[node] = self.graph.node_copy(node, made.__getitem__)
                self.know(made[node])
                if made[node] not in self.constant:
                    made[node].meta["val"] = _shadows(node.meta["val"])
        join.replace_all_uses_with(made[results[0]])
        self.hashes[join] = self.hashes[made[results[0]]]
        return [made[r] for r in results]

    def call(self, like: fx.Node, target: Any, *args: Any, value: torch.Tensor | None = None, **kwargs: Any) -> fx.Node:
        """A node for an operator, where nodes are inserted now.

        Args:
            like: where it comes from.
            target: the operator.
            args: its arguments.
            value: what it gives, if that cannot be told from shapes alone.
            kwargs: more arguments.
        """
        out = self.graph.call_function(target, args, kwargs)
        known = all(n in self.constant for n in out.all_input_nodes)
        if value is None:
            given = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"] if known else n.meta["val"].to("meta"))
            with torch.no_grad():
                value = target(*given[0], **given[1])
        out.meta = {k: v for k, v in like.meta.items() if k not in ("seen", "listed")} | {"val": value}
        self.know(out)
        return out

    def fixed(self, value: torch.Tensor, like: fx.Node) -> fx.Node:
        """A node for a constant, where nodes are inserted now."""
        name = f"_branches_{len(self._values)}"
        self._values[name] = value
        out = self.graph.create_node("get_attr", name)
        out.meta = {**like.meta, "val": value}
        self.know(out)
        return out

    def erase(self, nodes: Sequence[fx.Node]) -> None:
        """Remove what nothing uses of some nodes, in order."""
        for node in reversed(nodes):
            if not node.users and node.name not in self.reads:
                self.graph.erase_node(node)


def _origin(node: fx.Node) -> dict[str, str]:
    return {"module": node.meta.get("module", ""), "source": node.meta.get("source", "")}


def _shadows(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return shadow(value)
    return type(value)(_shadows(v) for v in value) if isinstance(value, list | tuple) else value
