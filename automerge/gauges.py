"""Canonical gauges: continuous symmetries that leave a network's function as it is, used up before matching.

Networks that compute the same function may differ by more than permutations: units of a positively homogeneous layer can
be scaled, an attention key's bias does nothing, and a value's bias passes through to the output projection. Matching
compares weights, so that such differences count against units that do the same. `canonicalise` takes every model to one
representative.

Nothing here knows an architecture. Candidates come from the sets of units of a `Symmetry`; which of them are symmetries is
measured on randomised float64 weights and must hold on several of them, on the models' own and on inputs of other sizes;
and every changed model is compared with itself before.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from automerge._difference import relative_difference
from automerge._double import own_modes
from automerge._errors import CheckpointError, InvarianceError, SymmetryError
from automerge._extra_state import extras, weights_of, without_extras
from automerge._forward import reals
from automerge._gauge_steps import (
    Candidate,
    Fold,
    Scaling,
    StateDict,
    apply_gauges,
    bounded,
    carry,
    multiply,
    scale_units,
    widened,
)
from automerge._loading import check_tied, check_values, checked_state
from automerge._longer import longer_inputs
from automerge._norm_folds import NormFinder, NormFold
from automerge._subject import Subject, fresh_inputs, randomised, runnable
from automerge.io import buffer_names, check_state_dict, tied_names
from automerge.symmetry import Generator, Slot, Symmetry
from automerge.trace import normalise_args

Inputs = tuple[Any, Any]

_STEP = 1e-5
_EXACT = 1e-9
_COLUMNS = 4
_DRAWS = 3


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


@own_modes()
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
        CheckpointError: if a state dict does not fit the model, or there is none.
        InvarianceError: if a model's output changed, which is a defect.
        SymmetryError: if the symmetry is none.

    Examples:
        >>> from automerge.infer import infer
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
        >>> x = torch.randn(4, 3)
        >>> out, report = canonicalise(net, x, [net.state_dict()], infer(net, x))
        >>> len(report.scalings), report.error < 1e-9
        (1, True)
    """
    states = _checked(model, states, symmetry)
    given = normalise_args(args, kwargs)
    probe = _Probe(model, given, symmetry, states[0], seed)
    found: list[Candidate] = []
    if scales:
        found += [s for i, g in enumerate(symmetry.generators()) for s in [probe.scaling(i, g)] if s]
    if biases:
        found += probe.biases()
    if norms:
        found += probe.norms()
    for weights, inputs in probe.settings(states):
        found = probe.kept(found, weights, inputs)
    idle = tuple(c for c in found if isinstance(c, Slot))
    folds = tuple(c for c in found if isinstance(c, Fold))
    folded = tuple(c for c in found if isinstance(c, NormFold))
    scalings = bounded(probe.start, [c for c in found if isinstance(c, Scaling)], folded)
    out: list[StateDict] = []
    error = 0.0
    for number, state in enumerate(states):
        wide = {n: widened(v.detach().clone()) for n, v in state.items()}
        apply_gauges(wide, idle, folds, scalings, folded, symmetry)
        for k in range(2):
            inputs = probe.fresh(seed + 100 + k)
            before = {n: widened(v) for n, v in state.items()}
            own = relative_difference(probe.subject.outputs(before, *inputs), probe.subject.outputs(wide, *inputs))
            error = max(error, own)
            if not own <= _EXACT:
                raise InvarianceError(
                    f"canonical gauges change the output of model {number} by {own:.1e} (relative); this is a defect of "
                    "automerge, please report it, and match without gauges"
                )
        out.append({n: v.to(state[n].dtype) for n, v in wide.items()})
    return out, GaugeReport(scalings, idle, folds, error, folded)


def _checked(model: nn.Module, states: Any, symmetry: Any) -> list[StateDict]:
    """The state dicts, which fit the model."""
    if not isinstance(symmetry, Symmetry):
        raise SymmetryError(f"expected what automerge.infer returns, got a {type(symmetry).__name__}")
    if not isinstance(states, Sequence) or not states:
        raise CheckpointError("states is a list of one or more state dicts of the model")
    check_values(model)
    found = [without_extras(checked_state(state), extras(model)) for state in states]
    for number, state in enumerate(found):
        check_state_dict(state, weights_of(model), f"model {number}", buffer_names(model))
        check_tied(state, tied_names(weights_of(model)), f"model {number}")
    return found


# -------------------------------------------------------------------- finding
class _Probe:
    """Tries candidates on randomised weights and several inputs."""

    def __init__(
        self, model: nn.Module, given: tuple[Any, Any], symmetry: Symmetry, state: Mapping[str, torch.Tensor], seed: int
    ) -> None:
        self.subject, self.symmetry, self.given, self.seed = Subject(model), symmetry, given, seed
        self.rng = np.random.default_rng(seed)
        self.inputs: Sequence[Inputs] = ()
        wide = {n: widened(v) for n, v in state.items()}
        self.how, _ = runnable(partial(self.subject.outputs, wide), *given)
        self.start = self._random(state, seed)
        self._look(self.start, [self.fresh(seed + k) for k in range(2)])

    def fresh(self, seed: int) -> Inputs:
        """Other inputs than the given ones."""
        return fresh_inputs(*self.given, seed, self.how)

    def _random(self, state: Mapping[str, torch.Tensor], seed: int) -> StateDict:
        base = randomised(state, self.symmetry.statistics, seed)
        return self.subject.calibrate(base, *self.fresh(seed))

    def _look(self, state: Mapping[str, torch.Tensor], inputs: Sequence[Inputs]) -> None:
        """Try what follows on these weights and inputs."""
        self.base = {n: v for n, v in state.items() if n not in self.symmetry.aliases}
        self.inputs = inputs
        self.here = self._outputs(self.base)

    def settings(self, states: Sequence[Mapping[str, torch.Tensor]]) -> Iterator[tuple[StateDict, Sequence[Inputs]]]:
        """Weights and inputs on which all candidates must hold: others, the models' own, and inputs of other sizes.

        A unit that happens to be dead in one setting, or a sequence of one token, shows symmetries that are none.
        """
        for k in range(_DRAWS):
            inputs = [self.fresh(self.seed + 10 * (k + 1) + i) for i in range(2)]
            yield self._random(self._shuffled(states[k % len(states)], k), self.seed + k + 1), inputs
        for state in states:
            inputs = [self.fresh(self.seed + 50 + i) for i in range(2)]
            yield {n: widened(v) for n, v in state.items()}, inputs
        # on another device a wrong index of an input that is none ends the whole process
        if all(t.device.type == "cpu" for t in self.subject.tensors.values()):
            for group in longer_inputs(*self.given, self.seed):
                yield from ((self.start, [make()]) for make in group)

    def _shuffled(self, state: Mapping[str, torch.Tensor], seed: int) -> StateDict:
        """Weights without the structure of their model; signs and sizes stay what they may be."""
        rng = torch.Generator().manual_seed(seed)
        moved = self.symmetry.moved - self.symmetry.statistics
        return {
            n: v.reshape(-1)[torch.randperm(v.numel(), generator=rng).to(v.device)].reshape(v.shape)
            if n in moved
            else v
            for n, v in state.items()
        }

    def kept(self, found: list[Candidate], weights: StateDict, inputs: Sequence[Inputs]) -> list[Candidate]:
        """The candidates that leave the outputs as they are; all of them where the model does not run on these inputs."""
        if not found:
            return found
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._look(weights, inputs)
        except Exception:
            return found
        if not all(bool(torch.isfinite(t).all()) for t in self.here if t.is_floating_point()):
            return found
        return self._holding(found)

    def _holding(self, found: list[Candidate]) -> list[Candidate]:
        """All at once; if that changes the outputs, each half of them on its own."""
        state = {n: v.clone() for n, v in self.base.items()}
        for candidate in found:
            self._try(state, candidate)
        if self._same(state):
            return found
        half = len(found) // 2
        return [*self._holding(found[:half]), *self._holding(found[half:])] if half else []

    def _try(self, state: StateDict, candidate: Candidate) -> None:
        """Apply a candidate with random numbers, in place."""
        if isinstance(candidate, Scaling):
            factors = self.rng.uniform(0.5, 2.0, (candidate.up[0].index.shape[0],))
            scale_units(state, candidate, factors)
        elif isinstance(candidate, Slot):
            at = torch.from_numpy(candidate.index.reshape(-1))
            bias = state[candidate.param]
            bias[at] += torch.from_numpy(self.rng.normal(size=at.numel())).to(bias)
        elif isinstance(candidate, Fold):
            carry(state, candidate)
        else:
            candidate.apply(state)

    def _holds(self, candidate: Candidate) -> bool:
        return bool(self._holding([candidate]))

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
            multiply(state[piece.param], piece, 1.0 + sign * _STEP * factors)
            parts = (reals(t) for t in self._outputs(state))
            ends.append(torch.cat([t.reshape(-1) for t in parts if t is not None]))
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
        return found if found is not None and self._holds(found) else None

    def biases(self) -> list[Candidate]:
        """Pieces of vectors that change nothing, and those that another vector can take up."""
        found: list[Candidate] = []
        for generator in self.symmetry.generators():
            vectors = [s for s in generator.slots if len(self.symmetry.shapes[s.param]) == 1]
            for piece in (p for s in vectors if s.param not in self.symmetry.statistics for p in _columns(s)):
                fold = piece if self._holds(piece) else self._fold(generator, piece)
                found += [] if fold is None else [fold]
        return found

    def norms(self) -> list[NormFold]:
        """BatchNorms that the layer before them can take up."""
        finder = NormFinder(self.subject.model, self.subject.tensors)
        with finder.observer:
            self.subject.outputs(self.base, *self.inputs[0])
        return [fold for fold in finder.found.values() if self._holds(fold)]

    def _fold(self, generator: Generator, bias: Slot) -> Fold | None:
        for weight in generator.slots:
            shape = self.symmetry.shapes[weight.param]
            if len(shape) != 2 or weight.axis != 1 or weight.within or weight.index.shape != bias.index.shape:
                continue
            for into, size in self.symmetry.shapes.items():
                kinds = {self.base[name].dtype for name in (bias.param, weight.param, into)}
                if (
                    len(kinds) == 1
                    and tuple(size) == (shape[0],)
                    and into.rpartition(".")[0] == weight.param.rpartition(".")[0]
                ):
                    fold = Fold(bias, weight, into)
                    if self._holds(fold):
                        return fold
        return None


def _columns(slot: Slot) -> list[Slot]:
    """A slot in pieces of one position per unit (several roles may share a slot); as it is if there are many."""
    if slot.index.shape[1] > _COLUMNS:
        return [slot]
    return [Slot(slot.param, slot.axis, slot.index[:, k : k + 1], slot.within) for k in range(slot.index.shape[1])]
