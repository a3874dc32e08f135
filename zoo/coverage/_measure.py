"""One row: infer on a model, and verify the answer."""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from automerge._auxiliary import Training, with_training
from automerge._derive import infer_graph
from automerge._diagnosis import OtherPathError
from automerge._dropped import with_dropped
from automerge._errors import InvarianceError
from automerge._verify import verify
from automerge.symmetry import Generator, Symmetry
from automerge.trace import trace
from zoo.coverage._case import Case, catalogue, short
from zoo.coverage._peak import Peak

_MAPS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)
_NORMS: tuple[type[nn.Module], ...] = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_MOST_PATHS = 8
TOLERANCE = 1e-9  # of a relative difference in float64


@dataclass
class Row:
    """What was measured on one model.

    Attributes:
        library: torchvision, timm or transformers.
        name: as given to ``--only``.
        title: as the table shows it.
        status: ``ok`` (answered), ``failed`` (trace or inference raised), ``setup`` (the model does not build or run here),
            ``timeout`` or ``died`` (the process ended, for want of memory).
        parameters: how many.
        inputs: the shapes of the example inputs.
        cpu_seconds: processor seconds of trace and inference, on one thread.
        wall_seconds: wall time of the same, on a machine that may do other things.
        memory: bytes that trace and inference held at their peak, beside the model; None where that cannot be measured.
        model: bytes of parameters and buffers.
        groups: the number of generators.
        modules: the number of exchanges of modules.
        free: the share of parameter axes' positions that are free.
        pins: (reason, positions), the most frequent first.
        unruled: operators without a rule, with their place.
        elements: how many random elements verification tried; each generator moves in at least one of two.
        error: what verification measured; None if it did not pass or did not run.
        blind: whether a wrong group passed as well, so that the error says nothing; None if that was not tried.
        randomised: whether verification could randomise the weights.
        message: what went wrong.
        notes: from the symmetry and the case.
    """

    library: str
    name: str
    title: str = ""
    status: str = "ok"
    parameters: int = 0
    inputs: list[list[int]] = field(default_factory=list)
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0
    memory: int | None = None
    model: int = 0
    groups: int = 0
    modules: int = 0
    free: float = 0.0
    pins: list[tuple[str, int]] = field(default_factory=list)
    unruled: list[str] = field(default_factory=list)
    elements: int = 0
    error: float | None = None
    blind: bool | None = None
    randomised: bool = True
    message: str = ""
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def warm_up() -> None:
    """Lazy imports and first calls, so that no row pays for them."""
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 4), nn.Softmax(-1)
    )
    image = torch.randn(1, 3, 5, 5)
    verify(net, (image,), infer_graph(trace(net, image))[0], elements=1)


def balance(case: Case, kinds: tuple[type[nn.Module], ...]) -> None:
    """Scale layers of some kinds so that their output has unit variance on the example input.

    In a fresh network the signal can shrink by a factor at every layer; the output would not depend on the first ones.
    """
    seen: set[int] = set()

    def scale(module: nn.Module, _: Any, out: Any) -> Any:
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or id(weight) in seen or not isinstance(out, torch.Tensor):
            return out
        seen.add(id(weight))
        spread = float(out.std()) if out.numel() > 1 else 0.0
        if not (1e-12 < spread < 1e12):
            return out
        weight.data.div_(spread)
        bias = getattr(module, "bias", None)
        if isinstance(bias, nn.Parameter):
            bias.data.div_(spread)
        return out / spread

    handles = [m.register_forward_hook(scale) for m in case.model.modules() if isinstance(m, kinds)]
    try:
        with torch.no_grad():
            case.model.eval()(*case.args, **case.kwargs)
    finally:
        for handle in handles:
            handle.remove()


def measure(library: str, name: str, elements: int = 2) -> Row:
    """Build, infer and verify one model; whatever it raises is in the row."""
    torch.manual_seed(0)
    row = Row(library, name, title=name)
    try:
        case = catalogue(library).build(name)
        row.title = case.title or name
        row.notes = [case.note] if case.note else []
        tensors = (*case.model.parameters(), *case.model.buffers())
        row.model = sum(t.numel() * t.element_size() for t in tensors)
        row.parameters = sum(p.numel() for p in case.model.parameters())
        row.inputs = [list(t.shape) for t in (*case.args, *case.kwargs.values()) if isinstance(t, torch.Tensor)]
        balance(case, ())
    except Exception as error:
        row.status, row.message = "setup", _text(error)
        return row
    gc.collect()
    known, paths = list(row.notes), list[fx.GraphModule]()
    while True:
        try:
            symmetry, training = _infer(row, case, paths)
        except Exception as error:
            row.status, row.message = "failed", _text(error)
            return row
        names = training.names if training else ()
        other = _verify(row, case, symmetry, elements, names)
        if training and row.error is not None and not training.holds(case.model, case.args, case.kwargs):
            row.error, row.message = None, "does not hold in the pass that training takes"
        if other is None or len(paths) == _MOST_PATHS:
            return _scaled(row, case, symmetry, elements, names) if row.blind else row
        paths.append(other.graph)  # as `automerge.infer` does: again, to hold on both
        row.message, row.notes = "", [*known, short(f"inferred again: {str(other).partition(': ')[0]}")]


def _scaled(row: Row, case: Case, symmetry: Symmetry, elements: int, training: Sequence[str]) -> Row:
    """Verify again with scaled layers, until it is not blind; a wrong group is a failure, any other obstacle a note."""
    notes = list(row.notes)
    for kinds in (_MAPS, _MAPS + _NORMS):
        balance(case, kinds)
        again = replace(
            row, error=None, blind=None, message="", notes=[*notes, "verified with layers scaled to unit output"]
        )
        _verify(again, case, symmetry, elements, training)
        if again.error is None and not again.message.startswith("InvarianceError"):
            return replace(row, notes=[*notes, f"with layers scaled to unit output: {again.message}"])
        row = again
        if not row.blind:
            break
    return row


def _infer(row: Row, case: Case, paths: Sequence[fx.GraphModule]) -> tuple[Symmetry, Training | None]:
    """The symmetry, and the pass that training takes, if it reads more."""
    with Peak() as peak:
        wall, cpu = time.perf_counter(), time.process_time()
        graphs = [trace(case.model, case.args, case.kwargs, values=False), *paths]
        symmetry, analysis = infer_graph(*graphs)
        found = with_training(case.model, case.args, case.kwargs, (), graphs, symmetry, analysis)
        if found is not None:
            symmetry, analysis, graphs = found.symmetry, found.analysis, [*graphs, found.graph]
        kept = with_dropped(graphs, symmetry, analysis, lambda graphs: infer_graph(*graphs))
        symmetry = symmetry if kept is None else kept.symmetry
        row.cpu_seconds, row.wall_seconds = time.process_time() - cpu, time.perf_counter() - wall
    row.memory = peak.bytes
    row.groups, row.modules, row.free = len(symmetry.sets), len(symmetry.exchanges), symmetry.free_share
    counts: Counter[str] = Counter()
    for pin in symmetry.pins:
        counts[pin.reason] += pin.count
    row.pins = [(short(reason), n) for reason, n in counts.most_common(6)]
    row.unruled = [short(u) for u in symmetry.unruled]
    row.notes += [short(n) for n in (*symmetry.notes, *(more.note for more in (found, kept) if more))]
    return symmetry, found


def _verify(row: Row, case: Case, symmetry: Symmetry, elements: int, unread: Sequence[str]) -> OtherPathError | None:
    """Fill in what verification gives; returns the error of groups that hold on the example's path only."""
    message = ""
    for args in (case.small, case.args):
        if args is None:
            continue
        try:
            outcome = verify(case.model, args, symmetry, case.kwargs, elements=elements)
        except InvarianceError as error:
            row.message = _text(error)
            return error if isinstance(error, OtherPathError) else None
        except Exception as error:
            message = f"verification: {_text(error)}"
            continue
        row.error, row.elements, row.randomised = outcome.error, outcome.elements, outcome.randomised
        row.blind = _blind(case, args, symmetry, unread)
        return None
    row.message = message
    return None


def _blind(case: Case, args: Any, symmetry: Symmetry, unread: Sequence[str] = ()) -> bool | None:
    """Whether a group that moves one parameter and leaves its partners passes verification as well.

    Signals of fresh networks can vanish on the way to the output. The first group with two parameters is broken; where
    that happens to be a symmetry as well (all partners alike), the next few are tried.
    """
    order = {name: i for i, name in enumerate(symmetry.shapes)}
    slots = [[s for s in g.slots if s.param not in unread] for g in symmetry.sets]
    tried = [mine for mine in slots if len({s.param for s in mine}) > 1]
    tried.sort(key=lambda mine: min(order[s.param] for s in mine))
    for mine in tried[:3]:
        slot = min(mine, key=lambda s: order[s.param])
        wrong = replace(symmetry, sets=(Generator(len(slot.index), (slot,)),), exchanges=())
        outcome = verify(case.model, args, wrong, case.kwargs, elements=2, tolerance=float("inf"))
        if not outcome.error <= TOLERANCE:
            return False
    return True if tried else None


def _text(error: Exception) -> str:
    return short(f"{type(error).__name__}: {error}".strip())[:700]
