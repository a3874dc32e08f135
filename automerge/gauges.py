"""Canonical gauges: continuous symmetries that leave a network's function as it is, used up before matching.

Networks that compute the same function may differ by more than permutations: units of a positively homogeneous layer can
be scaled, an attention key's bias does nothing, and a value's bias passes through to the output projection. Matching
compares weights, so that such differences count against units that do the same. `canonicalise` takes every model to one
representative.

Nothing here knows an architecture. Candidates come from the sets of units of a `Symmetry`; which of them are symmetries is
measured on randomised float64 weights, for all of which it must hold, and every changed model is compared with itself
before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from automerge._errors import InvarianceError
from automerge._norm_folds import NormFinder, NormFold
from automerge._subject import Subject, fresh_inputs, randomised
from automerge._verify import relative_difference
from automerge.symmetry import Generator, Slot, Symmetry
from automerge.trace import normalise_args

StateDict = dict[str, torch.Tensor]

_STEP = 1e-5
_EXACT = 1e-9
_COLUMNS = 4


@dataclass(frozen=True)
class Scaling:
    """Units whose incoming weights may be multiplied by a number if the outgoing ones are divided by it.

    ReLU units and the like; the dimensions of attention heads (queries against keys, values against the projection); a
    BatchNorm's weight and bias against the next layer.

    Attributes:
        generator: the number of the set of units.
        up: the pieces that are multiplied.
        down: those that are divided.
    """

    generator: int
    up: tuple[Slot, ...]
    down: tuple[Slot, ...]


@dataclass(frozen=True)
class Fold:
    """A bias that passes linearly through a weight into another bias: values in attention, a LayerNorm's bias.

    Attributes:
        bias: its piece.
        weight: the piece of the matrix on the same units.
        into: the bias that takes it up.
    """

    bias: Slot
    weight: Slot
    into: str


@dataclass(frozen=True)
class GaugeReport:
    """What `canonicalise` found and did.

    Attributes:
        scalings: sets of units that were balanced.
        idle: pieces of biases that change nothing and were set to zero.
        folds: biases that were folded into others and set to zero.
        error: the largest relative change of a float64 output among the models.
        norms: BatchNorms that were folded into the layer before them.
    """

    scalings: tuple[Scaling, ...]
    idle: tuple[Slot, ...]
    folds: tuple[Fold, ...]
    error: float
    norms: tuple[NormFold, ...] = ()

    def __str__(self) -> str:
        scaled = sum(s.up[0].index.shape[0] for s in self.scalings)
        return (
            f"{len(self.scalings)} sets of {scaled} units balanced, {len(self.idle)} idle biases set to zero, "
            f"{len(self.folds)} biases and {len(self.norms)} BatchNorms folded; "
            f"float64 outputs changed by at most {self.error:.1e} (relative)"
        )


def canonicalise(
    model: nn.Module,
    args: Any,
    states: Sequence[Mapping[str, torch.Tensor]],
    symmetry: Symmetry,
    kwargs: Mapping[str, Any] | None = None,
    *,
    scales: bool = True,
    biases: bool = True,
    norms: bool = False,
    seed: int = 0,
) -> tuple[list[StateDict], GaugeReport]:
    """Take models to canonical gauges; their functions stay.

    Args:
        model: the architecture; not changed.
        args: example inputs.
        states: the models' state dicts; not changed.
        symmetry: of the architecture.
        kwargs: example keyword inputs.
        scales: make the norms of each unit's incoming and outgoing weights equal.
        biases: set biases that do nothing to zero, and fold those that pass through.
        norms: fold every BatchNorm into the linear map or convolution before it: its statistics become 0 and 1 and its
            weight 1. The scales, which a network with BatchNorm is free to choose, then count in the matching.
        seed: of the weights and inputs on which candidates are tried.

    Returns:
        New state dicts, in their own dtypes, and what was done.

    Raises:
        InvarianceError: if a model's output changed, which is a defect.

    Examples:
        >>> from automerge.infer import infer
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
        >>> x = torch.randn(4, 3)
        >>> out, report = canonicalise(net, x, [net.state_dict()], infer(net, x))
        >>> len(report.scalings), report.error < 1e-9
        (1, True)
    """
    given = normalise_args(args, kwargs)
    probe = _Probe(model, given, symmetry, states[0], seed)
    scalings = (
        tuple(s for i, g in enumerate(symmetry.generators()) for s in [probe.scaling(i, g)] if s) if scales else ()
    )
    idle, folds = probe.biases() if biases else ((), ())
    folded = probe.norms() if norms else ()
    out: list[StateDict] = []
    error = 0.0
    for number, state in enumerate(states):
        wide = {n: v.detach().double().clone() if v.is_floating_point() else v for n, v in state.items()}
        _apply(wide, idle, folds, scalings, folded, symmetry)
        for k in range(2):
            inputs = fresh_inputs(*given, seed=seed + 100 + k)
            before = {n: v.double() if v.is_floating_point() else v for n, v in state.items()}
            own = relative_difference(probe.subject.outputs(before, *inputs), probe.subject.outputs(wide, *inputs))
            error = max(error, own)
            if not own <= _EXACT:
                raise InvarianceError(
                    f"canonical gauges change the output of model {number} by {own:.1e} (relative); this is a defect of "
                    "automerge, please report it, and match without gauges"
                )
        out.append({n: v.to(state[n].dtype) for n, v in wide.items()})
    return out, GaugeReport(scalings, idle, folds, error, folded)


# -------------------------------------------------------------------- finding
class _Probe:
    """Tries candidates on randomised weights and several inputs."""

    def __init__(
        self, model: nn.Module, given: tuple[Any, Any], symmetry: Symmetry, state: Mapping[str, torch.Tensor], seed: int
    ) -> None:
        self.subject, self.symmetry = Subject(model), symmetry
        self.rng = np.random.default_rng(seed)
        self.inputs = [fresh_inputs(*given, seed=seed + k) for k in range(2)]
        base = randomised(state, symmetry.statistics, seed)
        base = self.subject.calibrate(base, *self.inputs[0])
        self.base = {n: v for n, v in base.items() if n not in symmetry.aliases}
        self.here = self._outputs(self.base)

    def _outputs(self, state: StateDict) -> list[torch.Tensor]:
        aliases = {a: state[n] for a, n in self.symmetry.aliases.items() if n in state}
        return [t for given in self.inputs for t in self.subject.outputs({**state, **aliases}, *given)]

    def _same(self, state: StateDict) -> bool:
        return relative_difference(self.here, self._outputs(state)) <= _EXACT

    def _slope(self, piece: Slot, factors: np.ndarray) -> torch.Tensor:
        """The change of the outputs per change of the logarithm of a piece, its units weighted by ``factors``."""
        ends = []
        for sign in (1.0, -1.0):
            state = dict(self.base)
            state[piece.param] = state[piece.param].clone()
            _multiply(state[piece.param], piece, 1.0 + sign * _STEP * factors)
            ends.append(torch.cat([t.reshape(-1).double() for t in self._outputs(state) if t.is_floating_point()]))
        return (ends[0] - ends[1]) / (2 * _STEP)

    def scaling(self, number: int, generator: Generator) -> Scaling | None:
        """The powers of a common factor of each unit, one per piece, under which the outputs stay; if +1 and -1.

        They span the null space of the pieces' slopes. It must be one line, not counting pieces that do nothing.
        """
        pieces = [p for s in generator.slots if s.param not in self.symmetry.statistics for p in _columns(s)]
        if len(pieces) < 2:
            return None
        factors = self.rng.uniform(0.5, 1.5, generator.size)
        slopes = torch.stack([self._slope(p, factors) for p in pieces], dim=1)
        size = slopes.norm(dim=0)
        alive = [k for k in range(len(pieces)) if size[k] > 1e-7 * float(size.max())]
        if len(alive) < 2 or not bool(torch.isfinite(slopes).all()):
            return None
        _, values, vectors = torch.linalg.svd(slopes[:, alive], full_matrices=False)
        if values[-1] > 1e-7 * values[0] or values[-2] < 1e-5 * values[0]:
            return None
        power = vectors[-1] / vectors[-1].abs().max()
        whole = power.round()
        if (power - whole).abs().max() > 1e-3:
            return None
        up = tuple(pieces[k] for k, w in zip(alive, whole.tolist(), strict=True) if w == 1)
        down = tuple(pieces[k] for k, w in zip(alive, whole.tolist(), strict=True) if w == -1)
        found = Scaling(number, up, down) if up and down else None
        if found is not None:
            state = {n: v.clone() for n, v in self.base.items()}
            _scale(state, found, self.rng.uniform(0.5, 2.0, generator.size))
            found = found if self._same(state) else None
        return found

    def biases(self) -> tuple[tuple[Slot, ...], tuple[Fold, ...]]:
        """Pieces of vectors that change nothing, and those that another vector can take up."""
        idle: list[Slot] = []
        folds: list[Fold] = []
        for generator in self.symmetry.generators():
            vectors = [s for s in generator.slots if len(self.symmetry.shapes[s.param]) == 1]
            for piece in (p for s in vectors if s.param not in self.symmetry.statistics for p in _columns(s)):
                state = {n: v.clone() for n, v in self.base.items()}
                at = torch.from_numpy(piece.index.reshape(-1))
                state[piece.param][at] += torch.from_numpy(self.rng.normal(size=at.numel()))
                if self._same(state):
                    idle.append(piece)
                elif (fold := self._fold(generator, piece)) is not None:
                    folds.append(fold)
        return tuple(idle), tuple(folds)

    def norms(self) -> tuple[NormFold, ...]:
        """BatchNorms that the layer before them can take up."""
        finder = NormFinder(self.subject.model, self.subject.tensors)
        with finder.observer:
            self.subject.outputs(self.base, *self.inputs[0])
        found = []
        for fold in finder.found.values():
            state = {n: v.clone() for n, v in self.base.items()}
            fold.apply(state)
            if self._same(state):
                found.append(fold)
        return tuple(found)

    def _fold(self, generator: Generator, bias: Slot) -> Fold | None:
        for weight in generator.slots:
            shape = self.symmetry.shapes[weight.param]
            if len(shape) != 2 or weight.axis != 1 or weight.within or weight.index.shape != bias.index.shape:
                continue
            for into, size in self.symmetry.shapes.items():
                if tuple(size) == (shape[0],) and into.rpartition(".")[0] == weight.param.rpartition(".")[0]:
                    fold = Fold(bias, weight, into)
                    state = {n: v.clone() for n, v in self.base.items()}
                    _carry(state, fold)
                    if self._same(state):
                        return fold
        return None


def _columns(slot: Slot) -> list[Slot]:
    """A slot in pieces of one position per unit (several roles may share a slot); as it is if there are many."""
    if slot.index.shape[1] > _COLUMNS:
        return [slot]
    return [Slot(slot.param, slot.axis, slot.index[:, k : k + 1], slot.within) for k in range(slot.index.shape[1])]


# -------------------------------------------------------------------- applying
def _view(tensor: torch.Tensor, slot: Slot) -> torch.Tensor:
    """The part of a tensor to which a slot is confined, its axis first; shares memory."""
    for axis, start, stop in slot.within:
        tensor = tensor.narrow(axis, start, stop - start)
    return tensor.movedim(slot.axis, 0)


def _multiply(tensor: torch.Tensor, slot: Slot, factors: np.ndarray) -> None:
    part = _view(tensor, slot)
    along = torch.ones(part.shape[0], dtype=tensor.dtype)
    along[torch.from_numpy(slot.index)] = torch.from_numpy(factors).to(tensor.dtype)[:, None]
    part.mul_(along.view(-1, *[1] * (part.ndim - 1)))


def _squares(state: StateDict, slots: Sequence[Slot]) -> np.ndarray:
    """The squared norm of each unit's entries."""
    total = np.zeros(slots[0].index.shape[0])
    for slot in slots:
        rows = _view(state[slot.param], slot).flatten(1) if state[slot.param].ndim > 1 else state[slot.param][:, None]
        total += rows.square().sum(dim=1).numpy()[slot.index].sum(axis=1)
    return total


def _scale(state: StateDict, scaling: Scaling, factors: np.ndarray) -> None:
    for slot in scaling.up:
        _multiply(state[slot.param], slot, factors)
    for slot in scaling.down:
        _multiply(state[slot.param], slot, 1.0 / factors)


def _carry(state: StateDict, fold: Fold) -> None:
    at = torch.from_numpy(fold.bias.index.reshape(-1))
    columns = torch.from_numpy(fold.weight.index.reshape(-1))
    state[fold.into] += state[fold.weight.param][:, columns] @ state[fold.bias.param][at]
    state[fold.bias.param][at] = 0.0


def _apply(
    state: StateDict,
    idle: Sequence[Slot],
    folds: Sequence[Fold],
    scalings: Sequence[Scaling],
    norms: Sequence[NormFold],
    symmetry: Symmetry,
) -> None:
    """All gauges on one float64 state dict, in place; balancing goes round until it changes nothing."""
    for norm in norms:  # before balancing, which looks at the norms of weights, and again after it, which scales gamma
        norm.apply(state)
    for _ in folds:  # what is folded into a bias may have to be folded on from there
        for fold in folds:
            _carry(state, fold)
    for slot in idle:
        state[slot.param][torch.from_numpy(slot.index.reshape(-1))] = 0.0
    for _ in range(100):
        largest = 0.0
        for scaling in scalings:
            up, down = _squares(state, scaling.up), _squares(state, scaling.down)
            fine = (up > 0) & (down > 0)
            factors = np.where(fine, np.where(fine, down, 1.0) / np.where(fine, up, 1.0), 1.0) ** 0.25
            _scale(state, scaling, factors)
            largest = max(largest, float(np.abs(np.log(factors)).max()))
        if largest < 1e-10:
            break
    for norm in norms:
        norm.apply(state)
    for alias, name in symmetry.aliases.items():
        if alias in state and name in state:
            state[alias] = state[name]
