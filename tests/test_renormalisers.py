"""Every way of renormalising: what each owes on every network, and known answers of the new tiers."""

from __future__ import annotations

import json
from copy import deepcopy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate
from torch import nn

from automerge import GaussianRepair, LeastSquares, Renormaliser, Repair, RowNorms, average, infer, merge, trace
from automerge._data import Batch
from automerge._errors import AutomergeError
from automerge._forward import bind, run_batch
from automerge._gauss import Gaussian, nonlinear, relu_moments
from automerge._propagation import propagate
from zoo.models import ZOO

torch.set_num_threads(1)
F64 = torch.float64
State = dict[str, torch.Tensor]
TIERS: dict[str, Renormaliser] = {
    "repair": Repair(),
    "rescale": Repair(shift=False),
    "row norms": RowNorms(),
    "row norms and biases": RowNorms(bias=True),
    "gaussian": GaussianRepair(gate=1.0),
    "least squares": LeastSquares(),
}


class Residual(nn.Module):
    """A stream, a branch with a bias added by hand, and a layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.up, self.down, self.out = nn.Linear(5, 8), nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 3)
        self.shift = nn.Parameter(torch.randn(8))
        self.twice = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.inp(x))
        h = h + self.down(torch.nn.functional.gelu(self.up(h))) + self.shift
        return self.twice(self.twice(self.out(h.mean(1))))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, groups=2),
        nn.ReLU(),
        nn.Conv2d(6, 8, 2, stride=2, dilation=2),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


NETS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 3)), (6,)),
    "residual": (Residual, (4, 5)),
    "convolutions": (convolutions, (2, 9, 9)),
    "layer norm": (lambda: nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.GELU(), nn.Linear(9, 3)), (6,)),
}


def build(name: str, count: int, n: int = 40) -> tuple[list[nn.Module], torch.Tensor]:
    factory, shape = NETS[name]
    torch.manual_seed(len(name))
    nets = [factory().eval() for _ in range(count)]
    return nets, torch.randn(n, *shape)


def states(nets: list[nn.Module]) -> list[State]:
    return [{n: v.clone() for n, v in net.state_dict().items()} for net in nets]


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("tier", TIERS)
def test_of_equal_networks_it_is_the_identity(tier: str, name: str) -> None:
    """On an endpoint itself nothing changes, whatever the mode; inputs, model and mode flags stay as they were."""
    (net,), x = build(name, 1)
    (own,) = states([net])
    if tier in ("repair", "least squares"):  # measured again on these data it must not change either
        net.train()
        with torch.no_grad():
            for _ in range(200):
                net(x)
        (own,) = states([net])
    flags = {n: k % 2 == 0 for k, (n, _) in enumerate(net.named_modules())}
    for n, module in net.named_modules():
        module.training = flags[n]
    ends = [deepcopy(own), deepcopy(own)]
    fixed, report = TIERS[tier](net, own, ends, [x[:30], x[30:]], symmetry=infer(net, x, verify=False))
    for n, v in own.items():
        tolerance = 1e-6 if "running" not in n else 0.2
        assert torch.allclose(fixed[n], v, rtol=0, atol=tolerance * (1 + float(v.abs().max()))), n
        assert fixed[n].dtype == v.dtype
    assert {n: m.training for n, m in net.named_modules()} == flags
    assert all(torch.equal(net.state_dict()[n], own[n]) for n in own)
    assert all(torch.equal(e[n], own[n]) for e in ends for n in own)
    json.dumps(report.to_dict())
    assert str(report).startswith("Repair (")


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("tier", TIERS)
def test_it_leaves_what_it_is_given(tier: str, name: str) -> None:
    nets, x = build(name, 3)
    ends = states(nets)
    merged = average(ends, [0.5, 0.3, 0.2])
    before = deepcopy(merged)
    fixed, report = TIERS[tier](nets[0], merged, ends, [x], weights=[0.5, 0.3, 0.2])
    assert all(torch.equal(merged[n], before[n]) for n in before)
    assert all(torch.equal(a[n], b[n]) for a, b in zip(ends, states(nets), strict=True) for n in a)
    assert report.layers
    assert any(not torch.equal(fixed[n], merged[n]) for n in merged)
    assert all(torch.isfinite(v).all() for v in fixed.values())
    listed = {layer.name for layer in report.layers} | set(report.skipped)
    assert {n for n, p in nets[0].named_parameters() if p.ndim > 1} <= listed, (
        "every weight is done, or named with a reason"
    )


# -------------------------------------------------------------------- row norms
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.floats(0.1, 3), min_size=2, max_size=4))
def test_rows_get_the_mean_norm(seed: int, weights: list[float]) -> None:
    torch.manual_seed(seed)
    nets = [nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double() for _ in weights]
    ends, share = states(nets), [w / sum(weights) for w in weights]
    fixed, _ = RowNorms()(nets[0], average(ends, share), ends, torch.ones(1, 4, dtype=F64), weights=weights)
    expected = sum(w * e["0.weight"].norm(dim=1) for w, e in zip(share, ends, strict=True))
    assert torch.allclose(fixed["0.weight"].norm(dim=1), torch.as_tensor(expected))
    assert torch.equal(fixed["2.weight"], average(ends, share)["2.weight"]), "the output keeps its scale"
    assert torch.equal(fixed["0.bias"], average(ends, share)["0.bias"])


# -------------------------------------------------------------------- gaussian moments
@settings(max_examples=30, deadline=None)
@given(st.floats(-3, 3), st.floats(0.05, 3), st.sampled_from(["relu", "gelu", "tanh", "silu"]))
def test_moments_after_a_nonlinearity(mean: float, std: float, name: str) -> None:
    """Against numerical integration; the slope by Stein's identity, E f'(x)."""
    function = {"relu": torch.relu, "gelu": nn.functional.gelu, "tanh": torch.tanh, "silu": nn.functional.silu}[name]

    def expect(g: object) -> float:
        def integrand(z: float) -> float:
            return float(g(torch.tensor(mean + std * z, dtype=F64))) * np.exp(-z * z / 2) / np.sqrt(2 * np.pi)  # type: ignore[operator]

        kink = [-mean / std] if abs(mean / std) < 8 else None
        return float(integrate.quad(integrand, -9, 9, points=kink, limit=200)[0])

    one = Gaussian(torch.tensor([mean], dtype=F64), torch.tensor([[std**2]], dtype=F64), 1, (1, 1))
    out = nonlinear(one, function, name)
    first, second = expect(function), expect(lambda x: function(x) ** 2)
    assert float(out.mean[0]) == pytest.approx(first, abs=1e-6)
    assert float(out.variance[0]) == pytest.approx(second - first**2, abs=1e-6)


def test_relu_moments_without_variance() -> None:
    first, second, slope = relu_moments(torch.tensor([-1.0, 2.0], dtype=F64), torch.zeros(2, dtype=F64))
    assert (first.tolist(), second.tolist(), slope.tolist()) == ([0, 2], [0, 4], [0, 1])


def predicted(net: nn.Module, x: torch.Tensor, spread: tuple[float, float] = (0.0, 1.0)) -> dict[str, Gaussian]:
    found: dict[str, Gaussian] = {}
    state = bind(net, net.state_dict())
    unknown = propagate(trace(net, x, values=False), state, lambda _, name, value: found.update({name: value}), spread)
    assert not unknown
    return found


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.floats(-1, 1), st.floats(0.2, 2))
def test_linear_networks_are_predicted_exactly(seed: int, mean: float, std: float) -> None:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4, bias=False), nn.Linear(4, 3))
    net = net.double().eval()
    for buffer in net.buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand(buffer.shape) + 0.5)
    basis = torch.cat([torch.zeros(1, 6, dtype=F64), torch.eye(6, dtype=F64)])
    with torch.no_grad():
        image = net(basis)
    slope = (image[1:] - image[0]).T
    found = predicted(net, torch.ones(2, 2, 3, dtype=F64), (mean, std))["4.weight"]
    assert torch.allclose(found.mean, image[0] + mean * slope.sum(1))
    assert torch.allclose(found.covariance, std**2 * slope @ slope.T)


@pytest.mark.parametrize("factory", [nn.ReLU, nn.GELU, nn.Tanh])
def test_wide_networks_are_predicted_well(factory: type[nn.Module]) -> None:
    """Against sampling: the first layer within its error, later ones within the neglect of higher terms."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 96), factory(), nn.Linear(96, 96), factory(), nn.Linear(96, 5)).eval()
    x = torch.randn(20000, 40)
    found = predicted(net, x[:2])
    h = x
    for k, tolerance in ((0, 0.02), (2, 0.05), (4, 0.12)):
        with torch.no_grad():
            h = net[k](h)
            wanted = h.var(0).double()
            assert float((found[f"{k}.weight"].variance / wanted - 1).abs().mean()) < tolerance
            assert float((found[f"{k}.weight"].mean - h.mean(0)).abs().mean()) < 0.05 * float(wanted.sqrt().mean())
            h = net[k + 1](h) if k < 4 else h


def test_convolutions_on_white_images() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 2, groups=2)).eval()
    x = torch.randn(400, 2, 12, 12)
    found = predicted(net, x[:1])
    with torch.no_grad():
        first, second = net[0](x), net(x)
    for name, value, tolerance in (("0.weight", first, 0.05), ("2.weight", second, 0.5)):
        flat = value.movedim(1, -1).flatten(0, -2).double()
        assert torch.allclose(found[name].mean, flat.mean(0), atol=0.05)
        assert torch.allclose(found[name].variance, flat.var(0), rtol=tolerance)


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + x


@pytest.mark.parametrize(
    "between", [nn.AvgPool2d(3, stride=1), nn.AvgPool2d((3, 1), stride=2), nn.AvgPool2d(2), Doubled()]
)
def test_pools_and_sums_of_one_value(between: nn.Module) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 6, 1), between, nn.Conv2d(6, 4, 1)).eval()
    x = torch.randn(400, 2, 12, 12)
    with torch.no_grad():
        flat = net(x).movedim(1, -1).flatten(0, -2).double()
    found = predicted(net, x[:1])["2.weight"]
    assert torch.allclose(found.mean, flat.mean(0), atol=0.02)
    assert torch.allclose(found.variance, flat.var(0), rtol=0.05)


def test_independent_averages_recover_their_variance() -> None:
    """Two wide networks with nothing in common: their mean has half the variance, and gets it back without data."""
    torch.manual_seed(0)
    nets = [
        nn.Sequential(nn.Linear(30, 80), nn.ReLU(), nn.Linear(80, 80), nn.ReLU(), nn.Linear(80, 4)) for _ in range(2)
    ]
    ends = states(nets)
    merged = average(ends, [0.5, 0.5])
    fixed, report = GaussianRepair()(nets[0], merged, ends, torch.ones(1, 30))
    assert [layer.name for layer in report.layers] == ["0.weight", "2.weight"]
    x = torch.randn(4000, 30)

    def deviation(state: State) -> float:
        with torch.no_grad():
            hidden = nets[0][:3].double()
            return float(
                torch.func.functional_call(
                    hidden, {n: v.double() for n, v in state.items() if n[0] in "02"}, x.double()
                )
                .std(0)
                .mean()
            )

    wanted = (deviation(ends[0]) + deviation(ends[1])) / 2
    assert deviation(merged) < 0.75 * wanted
    assert deviation(fixed) == pytest.approx(wanted, rel=0.05)


def test_what_has_not_collapsed_is_left_alone() -> None:
    nets, x = build("mlp", 2)
    ends = states(nets)
    merged = average(ends, [0.5, 0.5])
    fixed, report = GaussianRepair(gate=0)(nets[0], merged, ends, x[:1])
    assert not report.layers
    assert "its predicted variance is" in report.skipped["0.weight"]
    assert all(torch.equal(fixed[n], merged[n]) for n in merged)


@pytest.mark.filterwarnings("error")
def test_complex_weights_are_named_and_left() -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.i, self.o = nn.Linear(3, 4), nn.Linear(3, 2)
            self.w, self.v = (nn.Parameter(torch.randn(n, m, dtype=torch.complex64)) for n, m in ((4, 6), (6, 3)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.o(((self.i(x).to(self.w.dtype) @ self.w).tanh() @ self.v).abs())

    torch.manual_seed(0)
    nets = [Complex(), Complex()]
    merged = average([net.state_dict() for net in nets], [0.5, 0.5])
    fixed, report = GaussianRepair(gate=1.0)(nets[0], merged, [net.state_dict() for net in nets], torch.ones(1, 3))
    assert "complex numbers" in report.skipped["w"]
    assert torch.equal(fixed["w"], merged["w"])
    assert [layer.name for layer in report.layers] == ["i.weight"]


def test_what_cannot_be_predicted_is_named() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.MaxPool2d(2), nn.Conv2d(4, 4, 2), nn.Flatten(), nn.Linear(16, 2)).eval()
    other = deepcopy(net)
    with torch.no_grad():
        for p in other.parameters():
            p.neg_()
    ends = states([net, other])
    _, report = GaussianRepair()(net, average(ends, [0.75, 0.25]), ends, torch.ones(1, 1, 8, 8))
    assert [layer.name for layer in report.layers] == ["0.weight"]
    assert "max_pool2d" in report.skipped["2.weight"]


# -------------------------------------------------------------------- least squares
def test_one_layer_becomes_the_least_squares_solution() -> None:
    """Against numpy's lstsq: a linear network is fitted to the mean of the endpoints' outputs."""
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(5, 3)).double() for _ in range(2)]
    x = torch.randn(60, 5, dtype=F64)
    fixed, report = LeastSquares(1e-12)(nets[0], states(nets)[0], states(nets), [x[:45], x[45:]], weights=[3, 1])
    with torch.no_grad():
        wanted = (0.75 * nets[0](x) + 0.25 * nets[1](x)).numpy()
    solution = np.linalg.lstsq(np.c_[x.numpy(), np.ones(60)], wanted, rcond=None)[0]
    assert np.allclose(fixed["0.weight"].numpy(), solution[:5].T, atol=1e-8)
    assert np.allclose(fixed["0.bias"].numpy(), solution[5], atol=1e-8)
    assert report.mode == "fit"
    assert report.layers[0].error == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("name", ["mlp", "convolutions"])
def test_fitting_comes_near_the_mean_output(name: str) -> None:
    nets, x = build(name, 3, 300)
    ends = states(nets)
    merged = average(ends, [1 / 3] * 3)
    fixed, _ = LeastSquares()(nets[0], merged, ends, [x[:200]])
    fresh = x[200:]

    def output(state: State) -> torch.Tensor:
        with torch.no_grad():
            return run_batch(nets[0], bind(nets[0], state), Batch((fresh,)))

    wanted = torch.stack([output(e) for e in ends]).mean(0)
    assert (output(fixed) - wanted).norm() < 0.7 * (output(merged) - wanted).norm()


def test_grouped_convolutions_are_named_and_left() -> None:
    nets, x = build("convolutions", 2)
    ends = states(nets)
    merged = average(ends, [0.5, 0.5])
    fixed, report = LeastSquares()(nets[0], merged, ends, [x])
    assert "grouped" in report.skipped["3.weight"]
    assert torch.equal(fixed["3.weight"], merged["3.weight"])
    assert [layer.name for layer in report.layers] == ["0.weight", "5.weight", "9.weight"]
    assert report.reset == ("1",)


# -------------------------------------------------------------------- through merge
def test_merge_takes_a_renormaliser() -> None:
    nets, x = build("mlp", 2)
    plain = merge(nets, x[:2], repair="none")
    result = merge(nets, x[:2], repair=GaussianRepair())
    assert result.repair.mode == "gaussian"
    assert "GaussianRepair(gate=0.95" in result.provenance["options"]["repair"]
    by_hand, _ = GaussianRepair()(nets[0], plain.state_dict, plain.matching.apply(nets), x[:2], symmetry=plain.symmetry)
    assert all(torch.equal(by_hand[n], result.state_dict[n]) for n in by_hand)
    assert merge(nets, x[:2], repair=LeastSquares(), data=[x]).repair.mode == "fit"
    with pytest.raises(AutomergeError, match=r"repair=LeastSquares\(\.\.\.\) measures activations"):
        merge(nets, x[:2], repair=LeastSquares())


@pytest.mark.parametrize("name", ["mlp", "resnet", "vit", "unet", "densenet", "lm", "mobilenet"])
def test_the_zoo_runs_through(name: str) -> None:
    """Whatever cannot be done is named, and the network stays finite."""
    torch.manual_seed(0)
    nets = [ZOO[name].factory().eval() for _ in range(2)]
    args = ZOO[name].example_args
    ends = states(nets)
    merged = average(ends, [0.5, 0.5])
    for tier in (RowNorms(), GaussianRepair()):
        fixed, report = tier(nets[0], merged, ends, [args], inputs=len(args))
        assert report.layers or name == "lm", "its norms are of a kind whose moments are not known"
        listed = {layer.name for layer in report.layers} | set(report.skipped)
        names = {n for n, p in nets[0].named_parameters() if p.ndim > 1}
        assert all(any(one.startswith(n) for one in listed) for n in names)
        assert all(torch.isfinite(v).all() for v in fixed.values() if v.is_floating_point())


def test_bad_input() -> None:
    with pytest.raises(AutomergeError, match="gate must be from 0 to 1"):
        GaussianRepair(gate=2)
    with pytest.raises(AutomergeError, match="positive number"):
        LeastSquares(0)
    nets, x = build("mlp", 1)
    for tier in TIERS.values():
        with pytest.raises(AutomergeError, match="at least one"):
            tier(nets[0], nets[0].state_dict(), [], [x])
