"""Every architecture of the zoo runs, in float64 too, and is built the same from the same seed."""

import pytest
import torch

from automerge import infer
from automerge.testing import assert_invariant
from zoo.models import ZOO


@pytest.mark.parametrize("name", sorted(ZOO))
def test_runs_in_double_precision_close_to_single(name: str) -> None:
    factory, args = ZOO[name]
    torch.manual_seed(0)
    model = factory().eval()
    with torch.no_grad():
        single = model(*args)
        double = model.double()(*(a.double() if a.is_floating_point() else a for a in args))
    assert double.dtype == torch.float64
    assert torch.isfinite(double).all()
    torch.testing.assert_close(single.double(), double, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", sorted(ZOO))
def test_random_group_elements_leave_the_output_alone(name: str) -> None:
    torch.manual_seed(0)
    factory, args = ZOO[name]
    model = factory()
    symmetry = infer(model, args, verify=False)
    assert symmetry.sets
    assert symmetry.free_share > 0.5
    assert_invariant(model, args, symmetry, tolerance=1e-10)


@pytest.mark.parametrize("name", sorted(set(ZOO) - {"vgg16"}))
def test_the_seed_decides_the_weights(name: str) -> None:
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(ZOO[name].factory().state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert any(not torch.equal(states[0][k], states[2][k]) for k in states[0])


@pytest.mark.parametrize("name", sorted(set(ZOO) - {"vgg16"}))
def test_every_parameter_is_used(name: str) -> None:
    factory, args = ZOO[name]
    torch.manual_seed(0)
    model = factory()
    model(*args).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_the_language_model_is_causal() -> None:
    factory, (tokens,) = ZOO["lm"]
    model = factory().eval()
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 50
    with torch.no_grad():
        torch.testing.assert_close(model(tokens)[:, :-1], model(changed)[:, :-1])
