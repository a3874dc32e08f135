"""The universe matcher: Frank-Wolfe over the hull of the group, rounding, and exact polishing."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from automerge._errors import MatchingError
from automerge._polynomial import maximise_polynomial
from automerge._tree import Perms
from automerge.blocks import decompose
from automerge.matchers._base import Matcher, Matching, Model, Progress, check_models
from automerge.matchers._polish import Polisher
from automerge.matchers._starts import identity_elements, induced, random_plan, signature, vertices
from automerge.objective import Objective, State
from automerge.symmetry import Symmetry

_STARTS = ("signature", "identity", "barycentre", "sinkhorn")
_SCHEDULES = ("simultaneous", "cyclic")


@dataclass(frozen=True)
class FrankWolfe(Matcher):
    """Match N models in one universe (C2M3, arXiv 2405.17897, Alg. 1, with an O(N) objective and an exact step).

    Attributes:
        max_iterations: of Frank-Wolfe, per start.
        gap_tolerance: stop when the Frank-Wolfe gap, an upper bound on what is left to gain on a concave stretch, falls
            below this share of the objective.
        progress_tolerance: stop when an iteration gains less than this share of the objective.
        start: "signature" (positions assigned by their sorted entries), "identity", "barycentre" (the mean of the
            group), or "sinkhorn" (random).
        softness: the share of the barycentre in a start from "signature" or "identity"; 0 starts at the vertex itself.
        restarts: further starts from random points, seeded; the best end is returned.
        schedule: "cyclic" moves one model after the other, each with its own exact step; "simultaneous" moves all with
            one common step, as the paper does.
        anchor: a model whose coordinates are the universe's and do not move; None lets all move.
        polish: the largest number of sweeps of block-coordinate ascent after rounding; 0 turns it off.
        block_weights: "uniform", or "normalised" by each block's mean squared norm.
        dtype: "float32" or "float64": in which the work is done, whatever the models' own types.
        seed: of random starts and of the order of the sweeps.

    Examples:
        >>> from automerge.symmetry import Generator, Slot
        >>> unit = np.arange(4)[:, None]
        >>> s = Symmetry({"a": (4, 3), "b": (2, 4)}, (Generator(4, (Slot("a", 0, unit), Slot("b", 1, unit))),))
        >>> model = {"a": torch.randn(4, 3), "b": torch.randn(2, 4)}
        >>> planted = s.element([[2, 0, 3, 1]])
        >>> matching = FrankWolfe().match([model, s.apply(model, planted)], s)
        >>> matching.between(0, 1) == planted
        True
    """

    max_iterations: int = 100
    gap_tolerance: float = 1e-4
    progress_tolerance: float = 1e-4
    start: str = "signature"
    softness: float = 0.9
    restarts: int = 0
    schedule: str = "cyclic"
    anchor: int | None = None
    polish: int = 100
    block_weights: str = "uniform"
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("start", self.start, _STARTS),
            ("schedule", self.schedule, _SCHEDULES),
            ("block_weights", self.block_weights, ("uniform", "normalised")),
            ("dtype", self.dtype, ("float32", "float64")),
        ):
            if value not in allowed:
                raise MatchingError(f"FrankWolfe({name}={value!r}): expected one of {', '.join(allowed)}")
        for name in ("max_iterations", "restarts", "polish", "gap_tolerance", "progress_tolerance"):
            if getattr(self, name) < 0:
                raise MatchingError(f"FrankWolfe({name}={getattr(self, name)}): expected a number of at least 0")
        if not 0 <= self.softness <= 1:
            raise MatchingError(f"FrankWolfe(softness={self.softness}): expected a share between 0 and 1")

    def match(
        self, models: Sequence[Model], symmetry: Symmetry, *, progress: Progress | None = None, data: Any = None
    ) -> Matching:
        """See `Matcher.match`. Ctrl-C ends with the best matching so far (``stats["interrupted"]``)."""
        values = check_models(models, symmetry)
        if self.anchor is not None and not 0 <= self.anchor < len(values):
            raise MatchingError(f"FrankWolfe(anchor={self.anchor}): there are the models 0 to {len(values) - 1}")
        begin = time.perf_counter()
        blocks = decompose(symmetry)
        objective = Objective(blocks, values, dtype=getattr(torch, self.dtype), block_weights=self.block_weights)
        search = _Search(self, objective, progress)
        search.seconds["setup"] = time.perf_counter() - begin
        elements = search.run() if objective.bundles else [{} for _ in values]
        moved = tuple(blocks.structure.element(symmetry, perms) for perms in elements)
        search.seconds["total"] = time.perf_counter() - begin
        return Matching(moved, symmetry, repr(self), search.report())


class _Search:
    """One call of `FrankWolfe.match`: the candidates so far, and what was measured."""

    def __init__(self, options: FrankWolfe, objective: Objective, progress: Progress | None) -> None:
        self.options, self.objective, self.progress = options, objective, progress
        self.seconds = dict.fromkeys(
            ("setup", "start", "gradient", "assignment", "line_search", "polish", "total"), 0.0
        )
        self.fixed = frozenset() if options.anchor is None else frozenset({options.anchor})
        self.signature: tuple[list[torch.Tensor], list[Perms]] = ([], [])
        self.best: list[Perms] = []
        self.best_value = -np.inf
        self.start_value = 0.0
        self.runs: list[dict[str, Any]] = []
        self.interrupted = False

    # ---------------------------------------------------------------- candidates
    def run(self) -> list[Perms]:
        """All starts, and the vertices that cost next to nothing; the best end."""
        self.start_value = self._consider(identity_elements(self.objective))
        rng = np.random.default_rng(self.options.seed)
        try:
            with self._timed("start"):
                self.signature = signature(self.objective, self.options.anchor or 0)
            for attempt in range(self.options.restarts + 1):
                self._attempt(self.options.start if attempt == 0 else "sinkhorn", rng)
            done = self.best_value
            if self._consider(self.signature[1]) > done and self.options.polish:
                self._polish("signature", self.signature[1], rng)
        except KeyboardInterrupt:
            self.interrupted = True
        return self.best

    def _consider(self, elements: list[Perms]) -> float:
        value = self.objective.value(induced(self.objective, elements))
        if value > self.best_value:
            self.best_value = value
            self.best = [{r: p.copy() for r, p in perms.items()} for perms in elements]
        return value

    def _attempt(self, start: str, rng: np.random.Generator) -> None:
        """Frank-Wolfe from one start, rounded and polished."""
        trace: dict[str, Any] = {"start": start, "objective": [], "step": [], "gap": [], "converged": False}
        self.runs.append(trace)
        state = self._state(start, rng)
        try:
            self._descend(state, trace)
        except KeyboardInterrupt:
            self.interrupted = True
        with self._timed("assignment"):
            elements = vertices(self.objective, state.plan)[1]
        for m in self.fixed:
            elements[m] = identity_elements(self.objective)[m]
        del state
        trace["rounded"] = self._consider(elements)
        if self.interrupted:
            raise KeyboardInterrupt
        if self.options.polish:
            trace["polished"] = self._polish(f"frank-wolfe from {start}", elements, rng)

    def _state(self, start: str, rng: np.random.Generator) -> State:
        soft = self.options.softness
        with self._timed("start"):
            if start == "sinkhorn":
                plan = random_plan(self.objective, rng)
                for m in self.fixed:
                    for p in plan:
                        p[m] = torch.eye(p.shape[1], dtype=p.dtype, device=p.device)
                return State(self.objective, plan)
            sigma = self.signature[0] if start == "signature" else self.objective.identity()
            return State.soft(self.objective, sigma, 1.0 if start == "barycentre" else soft, self.fixed)

    # ---------------------------------------------------------------- Frank-Wolfe
    def _descend(self, state: State, trace: dict[str, Any]) -> None:
        """Iterate until a stop rule holds; fills the trace."""
        value = state.value()
        trace["objective"].append(value)
        groups = self._groups()
        for iteration in range(1, self.options.max_iterations + 1):
            gained, gap, steps = 0.0, 0.0, []
            for models in groups:
                gain, own, step = self._step(state, models)
                gained, gap = gained + gain, gap + own
                steps.append(step)
            if len(groups) > 1:
                state.refresh()
            value += gained
            scale = max(abs(value), 1e-12 * self.objective.scale, 1e-30)
            trace["objective"].append(value)
            trace["step"].append(float(np.mean(steps)))
            trace["gap"].append(gap / scale)
            self._tell(phase="frank-wolfe", iteration=iteration, objective=value, gap=gap / scale, step=steps[-1])
            if gap <= self.options.gap_tolerance * scale or gained <= self.options.progress_tolerance * scale:
                trace["converged"] = True
                break

    def _groups(self) -> list[slice]:
        """The models that move together."""
        free = [m for m in range(self.objective.count) if m not in self.fixed]
        if self.options.schedule == "cyclic":
            return [slice(m, m + 1) for m in free]
        if not self.fixed:
            return [slice(None)]
        anchor = min(self.fixed)
        return [s for s in (slice(0, anchor), slice(anchor + 1, self.objective.count)) if s.start < s.stop]

    def _step(self, state: State, models: slice) -> tuple[float, float, float]:
        """One Frank-Wolfe step of some models: gain, gap, step."""
        with self._timed("gradient"):
            gradient = state.gradient(models)
        with self._timed("assignment"):
            sigma = vertices(self.objective, gradient)[0]
        with self._timed("line_search"):
            gap = state.inner(gradient, sigma, models)
            segment = state.segment(sigma, models)
            step, gain = maximise_polynomial(segment.coefficients)
            if step > 0:
                state.advance(segment, step)
        return gain, gap, step

    # ---------------------------------------------------------------- polishing
    def _polish(self, name: str, elements: list[Perms], rng: np.random.Generator) -> float:
        mine = [dict(perms) for perms in elements]
        with self._timed("polish"):
            polisher = Polisher(self.objective, mine, self.fixed)
            try:
                polisher.run(rng, self.options.polish)
            finally:
                value = self._consider(polisher.elements)
        self.runs.append({"start": f"polish {name}", "value": value, "moves": polisher.moves})
        self._tell(phase="polish", candidate=name, objective=value, moves=polisher.moves)
        return value

    # ---------------------------------------------------------------- measures
    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] += time.perf_counter() - begin

    def _tell(self, **numbers: Any) -> None:
        if self.progress is not None:
            self.progress(numbers)

    def report(self) -> dict[str, Any]:
        """The statistics of the matching."""
        first: dict[str, Any] = next(
            (r for r in self.runs if "objective" in r), {"objective": [], "step": [], "gap": [], "converged": True}
        )
        return {
            "objective": float(self.best_value) if self.runs else 0.0,
            "start_objective": float(self.start_value),
            "objectives": first["objective"],
            "steps": first["step"],
            "gaps": first["gap"],
            "iterations": len(first["step"]),
            "converged": first["converged"],
            "interrupted": self.interrupted,
            "seconds": self.seconds,
            "runs": self.runs,
            "left_out_generators": sorted(self.objective.blocks.structure.dropped),
        }
