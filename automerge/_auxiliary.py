"""What a model runs only while it is trained: auxiliary heads (GoogLeNet, deep supervision), averages of a codebook."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
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
def trained(model: nn.Module, layers: bool = False) -> Iterator[None]:
    """Within, what is made of other modules believes that it is trained when it is told to evaluate.

    PyTorch's layers evaluate: nothing is dropped, and statistics are those of the state. So do layers of others (a codebook
    with moving averages), but for ``layers``.

    Examples:
        >>> model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(3))
        >>> with trained(model):
        ...     [m.training for m in model.eval().modules()]
        [True, False, False]
        >>> [m.training for m in model.eval().modules()]
        [False, False, False]
    """
    before = vars(model).get("train")
    # what eval() calls; copies made within have one of their own
    vars(model)["train"] = MethodType(_with_layers if layers else _partly, model)
    try:
        yield
    finally:
        del vars(model)["train"]
        if before is not None:
            vars(model)["train"] = before


def _partly(self: nn.Module, mode: bool = True) -> nn.Module:
    for module in self.modules():
        module.training = any(True for _ in module.children()) and not _is_torch(module)
    return self


def _with_layers(self: nn.Module, mode: bool = True) -> nn.Module:
    for module in self.modules():
        module.training = not _is_torch(module)
    return self


def _is_torch(module: nn.Module) -> bool:
    """Whether a module is one of PyTorch's layers, or made from one."""
    return any(
        base.__module__.startswith("torch.nn.modules") and base not in _CONTAINERS for base in type(module).__mro__
    )


def _has_layers(model: nn.Module) -> bool:
    """Whether a model has layers that are not PyTorch's."""
    return any(not _is_torch(m) and not any(True for _ in m.children()) for m in model.modules())


@dataclass(frozen=True, eq=False)
class Training:
    """What a pass added in which a model believes that it is trained.

    Attributes:
        symmetry: of that pass and the others.
        analysis: it rests on.
        graph: the pass.
        names: the parameters that no other reads.
        layers: whether layers that are not PyTorch's believe so, too.
    """

    symmetry: Symmetry
    analysis: Analysis
    graph: fx.GraphModule
    names: tuple[str, ...]
    layers: bool

    @property
    def note(self) -> str:
        """For the report."""
        more = f" and {len(self.names) - 1} more" if self.names[1:] else ""
        return f"only training reads {self.names[0]}{more}: a pass in that mode was read, too"

    def holds(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any] | None) -> bool:
        """Whether verification passes in that mode."""
        try:
            with trained(model, self.layers):
                verify(model, args, self.symmetry, kwargs)
        except (InvarianceError, TraceError):
            return False
        return True


def with_training(
    model: nn.Module,
    args: Any,
    kwargs: Mapping[str, Any] | None,
    constants: Collection[str],
    graphs: list[fx.GraphModule],
    symmetry: Symmetry,
    analysis: Analysis,
    again: Callable[[list[fx.GraphModule]], tuple[Symmetry, Analysis]] = lambda graphs: infer_graph(*graphs),
    check: bool = False,
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
        check: whether verification must pass in that mode, too.
    """
    missing = {n for n in symmetry.shapes if n not in analysis.states}
    for layers in ((True, False) if _has_layers(model) else (False,)) if missing else ():
        try:
            with trained(model, layers):
                traced = trace(model, args, kwargs, values=False, constants=constants)
        except TraceError:
            continue  # it wants targets, say
        used = missing & {n.meta["name"] for n in traced.graph.nodes if n.op == "placeholder" and n.users}
        for graph in _with_writes(traced, used):
            found = sorted(used & set(analyse([graph]).states))
            larger, seen = again([*graphs, graph]) if found else (symmetry, analysis)
            out = Training(larger, seen, graph, tuple(found), layers)
            if adds(larger, symmetry) and (not check or out.holds(model, args, kwargs)):
                return out
        if not used:
            return None
    return None


def _with_writes(graph: fx.GraphModule, names: set[str]) -> Iterator[fx.GraphModule]:
    """A graph in which what is left in some buffers is read, also where nothing reads these; then as it is.

    (None without names.)
    """
    if not names:
        return
    info = graph.meta["trace"]
    if not names.isdisjoint(info.again.values()):
        graph.meta["trace"] = replace(info, again={k: n for k, n in info.again.items() if n not in names})
        yield graph
        graph.meta["trace"] = info
    yield graph


def adds(larger: Symmetry, symmetry: Symmetry) -> bool:
    """Whether more moves by a symmetry than by another one, and nothing is lost."""
    return _order(larger) >= _order(symmetry) and _moving(larger) > _moving(symmetry)


def _order(symmetry: Symmetry) -> float:
    """The logarithm of the number of elements, what is nested counted apart."""
    sizes = [g.size for g in symmetry.sets] + [e.size for e in symmetry.exchanges]
    return sum(math.lgamma(size + 1) for size in sizes)


def _moving(symmetry: Symmetry) -> int:
    return sum(slot.index.size for g in symmetry.sets for slot in g.slots)
