"""The paper's formulas, pair by pair, on whole parameters: a slow oracle for tests.

Every model has one dense matrix per space; a parameter is moved by the Kronecker product of them, block by block, and
f is the plain sum over pairs. The gradient comes from the pairs too (C2M3, Alg. 1, line 5), or from autograd.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from automerge._oracle import maximise
from automerge.blocks import Blocks

Plan = list[torch.Tensor]


class AllPairs:
    """The objective as a sum over pairs of models."""

    def __init__(
        self, blocks: Blocks, models: Sequence[Mapping[str, torch.Tensor]], dtype: torch.dtype = torch.float64
    ) -> None:
        self.blocks = blocks
        self.count = len(models)
        self.values = [[b.read(model[b.param].to(dtype)) for b in blocks.blocks] for model in models]

    def move(
        self, value: torch.Tensor, spaces: Sequence[int | None], plan: Plan, skip: int | None = None
    ) -> torch.Tensor:
        for axis, space in enumerate(spaces):
            if space is not None and axis != skip:
                value = torch.tensordot(plan[space], value, dims=([1], [axis])).movedim(0, axis)
        return value

    def value(self, plans: Sequence[Plan]) -> torch.Tensor:
        out = torch.zeros((), dtype=self.values[0][0].dtype)
        for m in range(self.count):
            for other in range(m):
                for i, block in enumerate(self.blocks.blocks):
                    a = self.move(self.values[other][i], block.spaces, plans[other])
                    b = self.move(self.values[m][i], block.spaces, plans[m])
                    out = out + (a * b).sum()
        return out

    def gradient(self, plans: Sequence[Plan]) -> list[Plan]:
        out = [[torch.zeros_like(p) for p in plan] for plan in plans]
        for m in range(self.count):
            for other in range(self.count):
                if other == m:
                    continue
                for i, block in enumerate(self.blocks.blocks):
                    target = self.move(self.values[other][i], block.spaces, plans[other])
                    for axis, space in enumerate(block.spaces):
                        if space is not None:
                            mine = self.move(self.values[m][i], block.spaces, plans[m], skip=axis)
                            rest = [k for k in range(target.ndim) if k != axis]
                            out[m][space] += torch.tensordot(target, mine, dims=(rest, rest))
        return out

    def identity(self) -> list[Plan]:
        dtype = self.values[0][0].dtype
        return [[torch.eye(s.size, dtype=dtype) for s in self.blocks.spaces] for _ in range(self.count)]

    def vertices(self, gradient: Sequence[Plan]) -> list[list[np.ndarray]]:
        structure = self.blocks.structure
        out = []
        for plan in gradient:
            perms = {}
            for root in structure.roots:
                gains = {s.roles: g.numpy() for s, g in zip(self.blocks.spaces, plan, strict=True) if s.root == root}
                perms.update(maximise(structure, root, gains)[1])
            out.append(self.blocks.induced(perms))
        return out

    def iterate(self, steps: int, evaluations: int = 12, tolerance: float = 1e-6) -> tuple[list[float], list[Plan]]:
        """Frank-Wolfe from the identity with a bounded scalar line search, as the published code does it."""
        from scipy.optimize import minimize_scalar

        plans = self.identity()
        trace = [float(self.value(plans))]
        for _ in range(steps):
            vertices = self.vertices(self.gradient(plans))
            ends = [
                [torch.eye(len(s), dtype=p[0].dtype)[torch.from_numpy(s)] for s in v]
                for v, p in zip(vertices, plans, strict=True)
            ]

            def at(t: float, start: list[Plan] = plans, end: list[Plan] = ends) -> list[Plan]:
                return [
                    [(1 - t) * a + t * b for a, b in zip(p, v, strict=True)] for p, v in zip(start, end, strict=True)
                ]

            found = minimize_scalar(
                lambda t: -float(self.value(at(t))), bounds=(0, 1), method="bounded", options={"maxiter": evaluations}
            )
            plans = at(float(found.x))
            trace.append(float(self.value(plans)))
            if math.isclose(trace[-1], trace[-2], rel_tol=tolerance):
                break
        return trace, plans
