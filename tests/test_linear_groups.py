"""Groups with matrices: the oracle straightens what bends, and then no matrix may change the function at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

from automerge import infer, trace
from automerge._linear_groups import linear_groups
from automerge._linear_maps import Matrix, linear_element
from automerge._places import operator_of, survey
from automerge._tree_io import map_tensors, tensors_of
from automerge.trace import normalise_args
from tests.inference.networks import CASES

torch.set_num_threads(1)


def matrix(n: int, seed: int) -> Matrix:
    rng = torch.Generator().manual_seed(seed)
    made = torch.eye(n, dtype=torch.float64) + 0.4 * torch.randn(n, n, generator=rng, dtype=torch.float64)
    return Matrix(made, torch.linalg.inv(made))


class Straight(fx.Interpreter):
    """Runs a graph with every bending node replaced by a linear function of the one input that carries the units."""

    def __init__(self, graph: fx.GraphModule, bent: dict[str, str]) -> None:
        super().__init__(graph)
        self.bent = bent

    def run_node(self, n: fx.Node) -> Any:
        if n.name not in self.bent:
            return super().run_node(n)
        if operator_of(n) in ("addmm", "baddbmm"):  # what it adds is the same for all units
            return self.env[n.args[1]] @ self.env[n.args[2]]
        by_name = {a.name: self.env[a] for a in n.all_input_nodes}
        x = by_name[self.bent[n.name]]
        if operator_of(n) == "max_pool2d_with_indices":
            return nn.functional.avg_pool2d(x, *n.args[1:3]), torch.zeros(())
        like = n.meta["val"]
        return x.expand(like.shape) if x.shape != like.shape else x


def outputs(
    graph: fx.GraphModule, state: dict[str, torch.Tensor], given: Any, bent: dict[str, str]
) -> list[torch.Tensor]:
    info = graph.meta["trace"]
    fed: list[torch.Tensor] = []
    map_tensors(lambda _, t: fed.append(t) or t, given[0])  # type: ignore[func-returns-value]
    map_tensors(lambda _, t: fed.append(t) or t, given[1])  # type: ignore[func-returns-value]
    run = Straight(graph, bent)
    with torch.no_grad():
        return tensors_of(run.run(*[state[n] for n in info.names.values()], *fed, enable_io_processing=False))


def widen(value: Any) -> Any:
    return map_tensors(lambda _, t: t.double() if t.is_floating_point() else t, value)


ADMIT: dict[str, int] = {
    "mlp": 2,
    "conv_flatten": 1,
    "mlp_layernorm": 0,
    "conv_bn": 0,
}


@pytest.mark.parametrize("name", sorted(CASES))
def test_matrices_change_nothing_but_through_what_bends(name: str) -> None:
    torch.manual_seed(0)
    factory, args, _ = CASES[name]
    torch.set_default_dtype(torch.float64)
    try:
        check(factory, args, ADMIT.get(name))
    finally:
        torch.set_default_dtype(torch.float32)


def check(factory: Any, args: Any, expected: int | None) -> None:
    model = factory().double().eval()
    given = normalise_args(widen(args), None)
    graph = trace(model, *given)
    symmetry = infer(model, *given, verify=False)
    found = survey(graph, symmetry)
    groups, barred = linear_groups(found, symmetry)
    assert set(groups) | set(barred) == set(range(len(symmetry.sets)))
    assert not set(groups) & set(barred)
    assert len(groups) == (len(groups) if expected is None else expected)
    state = {n: v.detach() for n, v in model.state_dict().items()}
    nodes = {n.name: n for n in graph.graph.nodes}
    for g, group in groups.items():
        bent = {b: next(n.name for n in nodes[b].all_input_nodes if g in found.carried(n)) for b in group.bent}
        generator = symmetry.sets[g]
        element = linear_element(symmetry, symmetry.identity(), {g: group.roles}, {g: matrix(generator.size, g)})
        before = outputs(graph, state, given, bent)
        after = outputs(graph, symmetry.apply(state, element), given, bent)
        for x, y in zip(before, after, strict=True):
            assert torch.allclose(x, y, rtol=1e-8, atol=1e-9 * float(x.abs().max() + 1)), (generator.name, group)


class SelfGate(nn.Module):
    """x * sigmoid(x), written out: elementwise."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x * (1 + torch.tanh(x + 0.04 * x**3))


class Halves(nn.Module):
    """A gate: the product of two different values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        return a * b.sigmoid()


@pytest.mark.parametrize(("between", "width", "admits"), [(SelfGate(), 6, 1), (Halves(), 12, 0), (nn.SiLU(), 6, 1)])
def test_gates_admit_permutations_only(between: nn.Module, width: int, admits: int) -> None:
    net, x = nn.Sequential(nn.Linear(4, width), between, nn.Linear(6, 2)), torch.ones(1, 4)
    symmetry = infer(net, x)
    groups, barred = linear_groups(survey(trace(net, x), symmetry), symmetry)
    assert (len(groups), len(barred)) == (admits, 1 - admits)
    assert all("several values" in reason for reason in barred.values())
