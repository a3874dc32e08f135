"""What a verification that fails says: where values differ first, and on which path through the model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from automerge._errors import InvarianceError, TraceError
from automerge._extra_state import weights_of
from automerge._random import forked
from automerge._subject import Change, Subject, named_tensors, unchanged
from automerge._tree_io import map_tensors
from automerge.symmetry import Symmetry
from automerge.trace import trace


@dataclass(frozen=True)
class Setting:
    """Weights and inputs on which elements are tried, and the outputs before."""

    subject: Subject
    base: Mapping[str, torch.Tensor]
    inputs: Sequence[tuple[Any, Any]]
    before: Sequence[list[torch.Tensor]]
    randomised: bool
    other_sizes: bool = False

    def run(self, turn: int, change: Change) -> list[torch.Tensor]:
        return self.subject.outputs(self.base, *self.inputs[turn], change)


class OtherPathError(InvarianceError):
    """The groups hold on the recorded path, but not on that of ``graph``: of other weights, or of inputs of other sizes."""

    def __init__(self, text: str, graph: fx.GraphModule) -> None:
        super().__init__(text)
        self.graph = graph


def failure(model: nn.Module, symmetry: Symmetry, setting: Setting, turn: int, move: Change, error: float) -> Exception:
    """The error to raise for an element that changes the outputs: where values differ first, and on which path."""
    where, subject, given = "the output", setting.subject, setting.inputs[turn]
    own = {n: t.detach() for n, t in named_tensors(model).items()}
    known = {*symmetry.shapes, *symmetry.aliases}
    fixed = [n for n, t in weights_of(subject.model).items() if t.is_floating_point() and n not in known]
    graphs = []
    for state, change in ((setting.base, unchanged), (setting.base, move), (own, unchanged)):
        subject.load(state, change)
        with torch.no_grad(), subject.computing(), forked(seed=0):
            inputs = map_tensors(subject.given, given[0]), map_tensors(subject.given, given[1])
            graphs.append(trace(subject.model, *inputs, constants=fixed))
    for node in graphs[0].graph.nodes:  # tensors in one memory that are several in a copy
        if node.meta.get("name") in symmetry.aliases:
            node.meta["name"] = symmetry.aliases[node.meta["name"]]
    held = _still_used(model, graphs[0], fixed)
    if held:
        return TraceError(
            f"a copy of the model still reads {held} of the original, from a hook or a function that holds on to it, so "
            "nothing can be verified (or merged) on copies; read the tensor from the module that the hook is called with"
        )
    for a, b in zip(graphs[0].graph.nodes, graphs[1].graph.nodes, strict=False):
        x, y = a.meta.get("val"), b.meta.get("val")
        if a.op != "call_function" or not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
            continue
        if _multiset_differs(x, y):
            module = f" in module {a.meta['module']!r}" if a.meta.get("module") else ""
            where = f"{a.target}{module} at {a.meta.get('source', '?')}"
            break
    text = (
        f"a random element of the group changes the output by {error:.1e} (relative); the first operator whose values "
        f"differ is {where}"
    )
    if setting.other_sizes:
        return OtherPathError(text, graphs[0])
    if setting.randomised and _path(graphs[0]) != _path(graphs[2]):
        text = f"with other weights the model takes another path, on which the groups do not hold: {text}"
        return OtherPathError(text, graphs[0])
    return InvarianceError(text)


def _path(graph: fx.GraphModule) -> list[Any]:
    """The operators that ran, and on which parameters."""
    nodes = [n for n in graph.graph.nodes if n.op == "call_function"]
    return [(n.target, [a.name for a in n.all_input_nodes if a.op == "placeholder"]) for n in nodes]


def _still_used(model: nn.Module, graph: fx.GraphModule, fixed: Collection[str]) -> str | None:
    """The name of one of a model's tensors that entered the trace of its copy as a constant and is not one of the fixed."""
    constants = [c.double() for c in graph.buffers() if c.is_floating_point() and c.unique().numel() > 1]
    for name, tensor in weights_of(model).items():
        if name not in fixed and any(
            c.shape == tensor.shape and torch.equal(c, tensor.detach().to(c)) for c in constants
        ):
            return name
    return None


@torch.no_grad()
def _multiset_differs(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether two tensors differ by more than a permutation of their entries."""
    if x.shape != y.shape:
        return True
    if x.is_complex():
        x, y = torch.view_as_real(x.resolve_conj()), torch.view_as_real(y.resolve_conj())
    a, b = x.double().flatten().sort().values, y.double().flatten().sort().values
    a, b = torch.nan_to_num(a, posinf=0.0, neginf=0.0), torch.nan_to_num(b, posinf=0.0, neginf=0.0)
    return bool((a - b).abs().max() > 1e-8 * (a.abs().max() + 1e-30)) if a.numel() else False
