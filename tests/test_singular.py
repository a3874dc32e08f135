"""Spectral norms of merged weights are those of the merged weights, whatever signs the models' singular vectors have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from automerge._singular import measured_again
from automerge.compare import compare
from automerge.evaluate import barrier, evaluate
from automerge.infer import infer
from automerge.landscape import plane
from automerge.matchers import Identity
from automerge.merge import merge

Wrap = Callable[[nn.Module], nn.Module]
KINDS: dict[str, Wrap] = {
    "parametrization": torch.nn.utils.parametrizations.spectral_norm,
    "hook": torch.nn.utils.spectral_norm,
}


def _net(wrap: Wrap, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    first, second = nn.Conv2d(1, 6, 3, bias=False), nn.ConvTranspose2d(6, 5, 3)
    net = nn.Sequential(wrap(first), nn.ReLU(), wrap(second), nn.ReLU(), nn.Flatten(), wrap(nn.Linear(180, 3)))
    for _ in range(30):  # the vectors converge
        net(torch.randn(2, 1, 6, 6))
    return net.eval()


def _flipped(net: nn.Module) -> dict[str, torch.Tensor]:
    """The same network: the first pair of vectors with the other sign."""
    return {n: -v if n.startswith("0.") and n.endswith(("_u", "_v")) else v for n, v in net.state_dict().items()}


@pytest.mark.parametrize("wrap", KINDS.values(), ids=KINDS)
def test_the_sign_of_singular_vectors_does_not_matter(wrap: Wrap) -> None:
    net, x = _net(wrap), torch.randn(5, 1, 6, 6)
    states = [net.state_dict(), _flipped(net)]
    result = merge(states, x, architecture=net, matcher=Identity(), repair="none")
    with torch.no_grad():
        torch.testing.assert_close(result.load_into(_net(wrap))(x), net(x), rtol=1e-3, atol=1e-4)
    assert any("spectral norms were measured again" in note for note in result.notes)


@settings(max_examples=20)
@given(seed=st.integers(0, 100), kind=st.sampled_from(sorted(KINDS)))
def test_norms_are_those_of_the_weights(seed: int, kind: str) -> None:
    net, other = _net(KINDS[kind], 0), _net(KINDS[kind], seed + 1)
    names = [n for n in net.state_dict() if n.endswith(("original", "_orig"))]
    state = {**net.state_dict(), **{n: other.state_dict()[n] for n in names}}
    fixed, found = measured_again(net, state)
    assert found == names
    net.load_state_dict(fixed)
    for module, name, axis in zip((net[0], net[2], net[5]), names, (0, 1, 0), strict=True):
        matrix = state[name].movedim(axis, 0).flatten(1)
        if kind == "hook":
            module(
                torch.randn(1, 6, 4, 4) if axis else torch.randn(1, 1, 6, 6) if name[0] == "0" else torch.randn(1, 180)
            )
        weight = module.weight.detach()
        torch.testing.assert_close(weight, state[name] / torch.linalg.matrix_norm(matrix, 2), rtol=1e-4, atol=1e-6)


def _unsettled(wrap: Wrap, seed: int = 0) -> nn.Module:
    """Vectors after one step of the power iteration, far from the singular ones."""
    torch.manual_seed(seed)
    net = nn.Sequential(wrap(nn.Linear(6, 16)), nn.ReLU(), wrap(nn.Linear(16, 16)), nn.ReLU(), nn.Linear(16, 3))
    net(torch.randn(2, 6))
    return net.eval()


@pytest.mark.parametrize("weights", [None, (1.0, 0.0)])
@pytest.mark.parametrize("wrap", KINDS.values(), ids=KINDS)
def test_copies_of_one_model_are_merged_to_that_model(wrap: Wrap, weights: Any) -> None:
    net, x = _unsettled(wrap), torch.randn(7, 6)
    own = {n: v.detach() for n, v in net.state_dict().items()}
    symmetry = infer(net, x)
    states = [own, symmetry.apply(own, symmetry.random_element(1))]
    if weights is not None:
        states[1] = {n: v.detach() for n, v in _unsettled(wrap, 1).state_dict().items()}
    result = merge(states, x, architecture=net, symmetry=symmetry, repair="none", weights=weights, coordinates=0)
    for name in own:
        torch.testing.assert_close(result.state_dict[name], own[name])
    assert not any("spectral" in note for note in result.notes)


def test_the_way_from_a_model_to_itself_is_flat() -> None:
    net = _unsettled(KINDS["hook"])
    own, data = net.state_dict(), [(torch.randn(20, 6), torch.arange(20) % 3)]
    path = barrier(net, own, own, data, 3)
    assert max(path.losses) - min(path.losses) < 1e-6


def test_a_zero_weight_and_a_vector_are_left() -> None:
    net = nn.Sequential(KINDS["parametrization"](nn.Linear(3, 3)), KINDS["parametrization"](nn.LayerNorm(3)))
    zero = {
        n: torch.zeros_like(v) if n == "0.parametrizations.weight.original" else v for n, v in net.state_dict().items()
    }
    fixed, found = measured_again(net, zero)
    assert not found
    assert all(torch.equal(fixed[n], zero[n]) for n in zero)


def test_paths_planes_and_comparisons() -> None:
    wrap = KINDS["parametrization"]
    net = _net(wrap)
    states = [net.state_dict(), _flipped(net)]
    x = torch.randn(40, 1, 6, 6)
    data = [(x, torch.arange(40) % 3)]
    own = evaluate(net, data).loss
    assert own is not None
    assert barrier(net, *states, data, 3).losses == pytest.approx([own] * 3, rel=1e-3)
    third = {n: v + 0.1 if n == "5.bias" else v for n, v in states[0].items()}
    fourth = {n: v - 0.1 if n == "2.bias" else v for n, v in _flipped(net).items()}
    spread = plane(net, states[0], third, fourth, data, 3)
    mean = {n: (states[0][n] + third[n] + fourth[n]) / 3 for n in third}
    net.load_state_dict(measured_again(net, mean)[0])
    with torch.no_grad():
        assert spread.centre_loss == pytest.approx(float(F.cross_entropy(net(x), data[0][1])), rel=1e-3)
    found = compare(states, x[:2], data, architecture=net, matchers={"identity": Identity()}, repairs={"none": "none"})
    assert found.rows[0].report is not None
    assert found.rows[0].report.agreement == 1.0
