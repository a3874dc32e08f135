"""What else Frank-Wolfe could do, tried out: away and pairwise steps, annealing, sweeps before the full steps.

All of them end as `FrankWolfe` does, rounded and polished, so that the table of `tests.benchmarks.matching` compares what
comes before. Written to be read and not to be fast: dense matrices in float64, one model after the other.

References: Lacoste-Julien and Jaggi (NeurIPS 2015, arXiv 1511.05932), Algorithms 1 (away steps) and 2 (pairwise).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.polynomial import polynomial as poly

from automerge._polynomial import maximise_polynomial
from automerge._tree import Perms
from automerge.blocks import decompose
from automerge.matchers import FrankWolfe, MergeMany, match
from automerge.matchers._polish import Polisher
from automerge.matchers._starts import identity_elements, induced, signature, vertices
from automerge.objective import Objective
from automerge.symmetry import Symmetry

Model = Mapping[str, torch.Tensor]
Plan = list[torch.Tensor]
"""Of one model a matrix per space."""


@dataclass(eq=False)
class Atom:
    """A point of the hull of which an iterate is a combination: a vertex, or without permutations the group's mean."""

    share: float
    sigma: list[torch.Tensor] | None

    def inner(self, gradient: Plan) -> float:
        """The gradient's inner product with it."""
        if self.sigma is None:
            return sum(float(g.sum()) / len(g) for g in gradient)
        return sum(float(g.gather(1, s[:, None]).sum()) for g, s in zip(gradient, self.sigma, strict=True))

    def matrices(self, like: Plan) -> Plan:
        """One per space."""
        if self.sigma is None:
            return [torch.full_like(p, 1 / len(p)) for p in like]
        return [torch.eye(len(p), dtype=p.dtype)[s] for p, s in zip(like, self.sigma, strict=True)]


@dataclass(eq=False)
class Walk:
    """Iterates of all models: where they are, and of what they are made."""

    objective: Objective
    atoms: list[list[Atom]]
    plans: list[Plan] = field(init=False)
    moved: list[list[torch.Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        like = [torch.zeros(s.size, s.size, dtype=self.objective.dtype) for s in self.objective.blocks.spaces]
        self.plans = [
            [
                sum(a.share * x for a, x in zip(mine, parts, strict=True))
                for parts in zip(*(a.matrices(like) for a in mine), strict=True)
            ]
            for mine in self.atoms
        ]
        self.moved = [self.move(m, plan) for m, plan in enumerate(self.plans)]

    def move(self, m: int, plan: Plan, skip: tuple[int, int] | None = None) -> list[torch.Tensor]:
        """The weights of a model moved by a plan; along all axes, or one bundle's along all but one."""
        out = []
        for b, bundle in enumerate(self.objective.bundles):
            value = bundle.weights[m]
            if skip is None or skip[0] == b:
                for k, (space, dim) in enumerate(zip(bundle.spaces, bundle.dims, strict=True)):
                    if skip is None or skip[1] != k:
                        value = torch.tensordot(plan[space], value, dims=([1], [dim - 1])).movedim(0, dim - 1)
            out.append(value)
        return out

    def rest(self, m: int) -> list[torch.Tensor]:
        """The sum of the other models' moved weights."""
        others = [x for k, x in enumerate(self.moved) if k != m]
        return [torch.stack(parts).sum(0) for parts in zip(*others, strict=True)]

    def gradient(self, m: int, rest: Sequence[torch.Tensor]) -> Plan:
        """df/dP of one model."""
        out = [torch.zeros_like(p) for p in self.plans[m]]
        for b, bundle in enumerate(self.objective.bundles):
            for k, (space, dim) in enumerate(zip(bundle.spaces, bundle.dims, strict=True)):
                value = self.move(m, self.plans[m], (b, k))[b]
                along = [a for a in range(value.ndim) if a != dim - 1]
                out[space] += torch.tensordot(rest[b], value, dims=(along, along))
        return out

    def value(self) -> float:
        """f."""
        totals = [torch.stack(parts).sum(0) for parts in zip(*self.moved, strict=True)]
        own = sum(float(x.square().sum()) for mine in self.moved for x in mine)
        return (sum(float(t.square().sum()) for t in totals) - own) / 2

    def step(self, m: int, kind: str) -> tuple[float, float]:
        """One step of a model, "toward" a vertex, "away" or "pairwise": what it gains, and the gap before."""
        rest = self.rest(m)
        gradient = self.gradient(m, rest)
        sigma = [s[0] for s in vertices(self.objective, [g[None] for g in gradient])[0]]
        best = Atom(1.0, sigma)
        worst = min(self.atoms[m], key=lambda a: a.inner(gradient))
        here = sum(float((g * p).sum()) for g, p in zip(gradient, self.plans[m], strict=True))
        gap = best.inner(gradient) - here
        leave = kind == "pairwise" or (kind == "away" and here - worst.inner(gradient) > gap)
        source = worst.matrices(self.plans[m]) if kind == "pairwise" and leave else self.plans[m]
        target = self.plans[m] if kind == "away" and leave else best.matrices(self.plans[m])
        if kind == "away" and leave:
            source = worst.matrices(self.plans[m])
            longest = worst.share / (1 - worst.share) if worst.share < 1 else 0.0
        else:
            longest = worst.share if leave else 1.0
        way = [longest * (t - s) for t, s in zip(target, source, strict=True)]
        gain, share = self._search(m, rest, way)
        self._take(m, kind, leave, best, worst, share * longest)
        return gain, gap

    def _search(self, m: int, rest: Sequence[torch.Tensor], way: Plan) -> tuple[float, float]:
        """The best point of a segment: f is a polynomial there, given by its values at a few."""
        degree = max(len(b.spaces) for b in self.objective.bundles)
        nodes = np.linspace(0, 1, degree + 1)
        values = []
        for t in nodes:
            moved = self.move(m, [p + float(t) * d for p, d in zip(self.plans[m], way, strict=True)])
            values.append(sum(float((r * x).sum()) for r, x in zip(rest, moved, strict=True)))
        share, _ = maximise_polynomial(poly.polyfit(nodes, np.array(values) - values[0], degree))
        plan = [p + share * d for p, d in zip(self.plans[m], way, strict=True)]
        moved = self.move(m, plan)
        gain = sum(float((r * x).sum()) for r, x in zip(rest, moved, strict=True)) - values[0]
        self.plans[m], self.moved[m] = plan, moved
        return gain, share

    def _take(self, m: int, kind: str, leave: bool, best: Atom, worst: Atom, step: float) -> None:
        """Of what the new iterate is made."""
        atoms = self.atoms[m]
        if leave and kind == "away":
            for a in atoms:
                a.share *= 1 + step
            worst.share -= step
        else:
            if leave:
                worst.share -= step
            else:
                for a in atoms:
                    a.share *= 1 - step
            twin = next((a for a in atoms if _same(a, best)), None)
            if twin is None:
                atoms.append(Atom(step, best.sigma))
            else:
                twin.share += step
        self.atoms[m] = [a for a in atoms if a.share > 1e-12]


def _same(a: Atom, b: Atom) -> bool:
    return a.sigma is not None and b.sigma is not None and all(map(torch.equal, a.sigma, b.sigma))


# -------------------------------------------------------------------- searches
def by_steps(objective: Objective, kind: str, softness: float = 0.9, sweeps: int = 300) -> list[Perms]:
    """Frank-Wolfe with other steps from the start of `FrankWolfe`, rounded and not polished."""
    sigma, _ = signature(objective, 0)
    atoms = [[Atom(1 - softness, [s[m] for s in sigma]), Atom(softness, None)] for m in range(objective.count)]
    walk = Walk(objective, atoms)
    value = walk.value()
    for _ in range(sweeps):
        turns = [walk.step(m, kind) for m in range(objective.count)]
        gained, gap = (sum(column) for column in zip(*turns, strict=True))
        value += gained
        if gap <= 1e-4 * abs(value) or gained <= (3e-4 if kind == "toward" else 3e-5) * abs(value):
            break
    plans = [torch.stack(parts) for parts in zip(*walk.plans, strict=True)]
    return vertices(objective, plans)[1]


def by_annealing(objective: Objective, sweeps: int = 20, hottest: float = 1.0, seed: int = 0) -> list[Perms]:
    """Sweeps over models and groups whose gains carry noise that fades; the best elements on the way."""
    rng = np.random.default_rng(seed)
    noise = torch.Generator().manual_seed(seed)
    elements = signature(objective, 0)[1]
    best, best_value = elements, objective.value(induced(objective, elements))
    places = [(m, root) for m in range(objective.count) for root in objective.blocks.structure.roots]
    for heat in np.geomspace(hottest, 1e-2 * hottest, sweeps):
        for k in rng.permutation(len(places)):
            m, root = places[k]
            sigma = induced(objective, elements)
            walk = Walk(objective, [[Atom(1.0, [s[j] for s in sigma])] for j in range(objective.count)])
            gains = walk.gradient(m, walk.rest(m))
            noisy = [
                (g + heat * g.std() * torch.randn(g.shape, generator=noise, dtype=g.dtype))[None]
                if len(g) > 1
                else g[None]
                for g in gains
            ]
            found = vertices(objective, noisy)[1][0]
            own = {r: p for r, p in found.items() if r in objective.blocks.structure.descendants(root)}
            elements = [{**e, **own} if j == m else e for j, e in enumerate(elements)]
        value = objective.value(induced(objective, elements))
        if value > best_value:
            best, best_value = elements, value
    return best


def polished(objective: Objective, candidates: Sequence[list[Perms]]) -> list[Perms]:
    """The best of some elements, after block-coordinate ascent."""
    best = max(candidates, key=lambda e: objective.value(induced(objective, e)))
    polisher = Polisher(objective, [dict(e) for e in best], frozenset())
    polisher.run(np.random.default_rng(0), 100)
    return polisher.elements


SEARCHES = {
    "steps towards a vertex, the same as `FrankWolfe(reheats=0)`": lambda o: by_steps(o, "toward"),
    "away steps": lambda o: by_steps(o, "away"),
    "pairwise steps": lambda o: by_steps(o, "pairwise"),
    "annealed sweeps": by_annealing,
}


def tried(symmetry: Symmetry, models: Sequence[Model]) -> dict[str, tuple[list[dict[str, torch.Tensor]], float]]:
    """Per variant the aligned models, and the seconds of the processor.

    Args:
        symmetry: of the architecture.
        models: state dicts.
    """
    out = {}
    objective = Objective(decompose(symmetry), models, dtype=torch.float64)
    for name, search in SEARCHES.items():
        begin = time.process_time()
        ends = polished(objective, [identity_elements(objective), signature(objective, 0)[1], search(objective)])
        seconds = time.process_time() - begin
        elements = [objective.blocks.structure.element(symmetry, e) for e in ends]
        out[name] = [symmetry.apply(dict(m), e) for m, e in zip(models, elements, strict=True)], seconds
    begin = time.process_time()
    first = match(models, symmetry, MergeMany())
    found = match(models, symmetry, FrankWolfe(resume=first, reheats=0))
    out["sweeps (`MergeMany`), then full steps from there"] = found.apply(models), time.process_time() - begin
    return out
