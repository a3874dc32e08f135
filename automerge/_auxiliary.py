"""Parts that a model runs only while it is trained: auxiliary heads (GoogLeNet, deep supervision)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import fx, nn

from automerge._derive import infer_graph
from automerge._errors import InvarianceError, TraceError
from automerge._verify import verify
from automerge.rules import Analysis, analyse
from automerge.symmetry import Symmetry
from automerge.trace import trace

_CONTAINERS = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@contextlib.contextmanager
def trained(model: nn.Module) -> Iterator[None]:
    """Within, what is made of other modules believes that it is trained when it is told to evaluate.

    Layers evaluate: nothing is dropped, and statistics are those of the state.

    Examples:
        >>> model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(3))
        >>> with trained(model):
        ...     [m.training for m in model.eval().modules()]
        [True, False, False]
        >>> [m.training for m in model.eval().modules()]
        [False, False, False]
    """
    before = vars(model).get("train")
    vars(model)["train"] = MethodType(_partly, model)  # what eval() calls; copies made within have one of their own
    try:
        yield
    finally:
        del vars(model)["train"]
        if before is not None:
            vars(model)["train"] = before


def _partly(self: nn.Module, mode: bool = True) -> nn.Module:
    for module in self.modules():
        module.training = any(True for _ in module.children()) and not any(
            base.__module__.startswith("torch.nn.modules") and base not in _CONTAINERS for base in type(module).__mro__
        )
    return self


@dataclass(frozen=True, eq=False)
class Training:
    """What a pass added in which a model believes that it is trained.

    Attributes:
        symmetry: of that pass and the others.
        graph: the pass.
        names: the parameters that no other reads.
    """

    symmetry: Symmetry
    graph: fx.GraphModule
    names: tuple[str, ...]

    @property
    def note(self) -> str:
        """For the report."""
        more = f" and {len(self.names) - 1} more" if self.names[1:] else ""
        return f"only training reads {self.names[0]}{more}: a pass in that mode was read, too"


def with_training(
    model: nn.Module,
    args: Any,
    kwargs: Mapping[str, Any] | None,
    constants: Collection[str],
    graphs: list[fx.GraphModule],
    symmetry: Symmetry,
    analysis: Analysis,
    again: Callable[[list[fx.GraphModule]], tuple[Symmetry, Analysis]] = lambda graphs: infer_graph(*graphs),
) -> Training | None:
    """A symmetry with what only training reads, where there is such and nothing is lost by it.

    Args:
        model: the model.
        args: its inputs.
        kwargs: keyword inputs.
        constants: as for `trace`.
        graphs: the passes that were read.
        symmetry: of these.
        analysis: the same.
        again: infers from several graphs.
    """
    missing = {n for n in symmetry.shapes if n not in analysis.states}
    if not missing:
        return None
    try:
        with trained(model):
            graph = trace(model, args, kwargs, values=False, constants=constants)
    except TraceError:
        return None  # it wants targets, say
    found = sorted(missing & set(analyse([graph]).states))
    larger = again([*graphs, graph])[0] if found else symmetry
    if _order(larger) < _order(symmetry) or _moving(larger) <= _moving(symmetry):
        return None
    return Training(larger, graph, tuple(found))


def holds_in_training(model: nn.Module, args: Any, kwargs: Mapping[str, Any] | None, symmetry: Symmetry) -> bool:
    """Whether verification passes in the mode of `trained`."""
    try:
        with trained(model):
            verify(model, args, symmetry, kwargs)
    except (InvarianceError, TraceError):
        return False
    return True


def _order(symmetry: Symmetry) -> float:
    """The logarithm of the number of elements, what is nested counted apart."""
    sizes = [g.size for g in symmetry.sets] + [e.size for e in symmetry.exchanges]
    return sum(math.lgamma(size + 1) for size in sizes)


def _moving(symmetry: Symmetry) -> int:
    return sum(slot.index.size for g in symmetry.sets for slot in g.slots)
