"""Canonical gauges: what is found, that functions stay, and that models which differ by a gauge become one."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from automerge import gauges
from automerge._errors import InvarianceError
from automerge.gauges import canonicalise
from automerge.infer import infer
from automerge.matchers import match
from zoo.models.resnet import ResNet
from zoo.models.vit import ViT


def mlp(activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 7), activation(), nn.Linear(7, 6), activation(), nn.Linear(6, 3))


def state(net: nn.Module) -> dict[str, torch.Tensor]:
    return {n: v.detach().clone() for n, v in net.state_dict().items()}


@pytest.mark.parametrize(
    ("activation", "count"),
    [(nn.ReLU, 2), (nn.LeakyReLU, 2), (nn.Identity, 2), (nn.GELU, 0), (nn.Tanh, 0), (nn.Sigmoid, 0)],
)
def test_scalings_are_found_where_the_layer_is_homogeneous(activation: Callable[[], nn.Module], count: int) -> None:
    net = mlp(activation)
    x = torch.randn(5, 4)
    out, report = canonicalise(net, x, [state(net)], infer(net, x), biases=False)
    assert len(report.scalings) == count
    other = mlp(activation)
    other.load_state_dict(out[0])
    assert torch.allclose(net(x), other(x), atol=1e-6)


def test_the_norms_of_units_become_equal() -> None:
    net = mlp()
    x = torch.randn(5, 4)
    wide = {n: v.double() for n, v in state(net).items()}
    (out,), _ = canonicalise(net.double(), x.double(), [wide], infer(net, x.double()))
    for i in (0, 2):
        incoming = out[f"{i}.weight"].square().sum(1) + out[f"{i}.bias"].square()
        outgoing = out[f"{i + 2}.weight"].square().sum(0)
        assert torch.allclose(incoming, outgoing, rtol=1e-8)


def test_models_that_differ_by_scales_and_an_order_become_one() -> None:
    net = mlp()
    x = torch.randn(5, 4)
    symmetry = infer(net, x)
    first = state(net)
    second = symmetry.apply(first, symmetry.random_element(np.random.default_rng(1)))
    for i, n in ((0, 7), (2, 6)):
        factors = torch.rand(n) + 0.5
        second[f"{i}.weight"] = second[f"{i}.weight"] * factors[:, None]
        second[f"{i}.bias"] = second[f"{i}.bias"] * factors
        second[f"{i + 2}.weight"] = second[f"{i + 2}.weight"] / factors
    canonical, _ = canonicalise(net, x, [first, second], symmetry)
    a, b = match(canonical, symmetry).apply(canonical)
    assert all(torch.allclose(a[n], b[n], atol=1e-5) for n in a)


def test_attention_biases() -> None:
    """Key biases do nothing, value biases go into the projection; queries and keys, values and outputs are balanced."""
    torch.manual_seed(0)
    net = ViT(dim=12, heads=2, depth=1, hidden=10).eval()
    x = torch.randn(3, 1, 8, 8)
    own = {n: torch.randn_like(v) * 0.3 for n, v in state(net).items()}
    (out,), report = canonicalise(net, x, [own], infer(net, x))
    query, key, value = out["blocks.0.attention.qkv.bias"].view(3, 12)
    assert not key.any()
    assert not value.any()
    assert query.all()
    assert not torch.equal(out["blocks.0.attention.out.bias"], own["blocks.0.attention.out.bias"])
    weights = out["blocks.0.attention.qkv.weight"].double().view(3, 12, 12)
    q = weights[0].square().sum(1) + query.double().square()
    assert torch.allclose(q, weights[1].square().sum(1), rtol=1e-4)
    projected = out["blocks.0.attention.out.weight"].double().square().sum(0)
    assert torch.allclose(weights[2].square().sum(1), projected, rtol=1e-4)
    folds = {(f.bias.param, f.into) for f in report.folds}
    assert ("blocks.0.attention.qkv.bias", "blocks.0.attention.out.bias") in folds
    assert ("blocks.0.norm1.bias", "blocks.0.attention.qkv.bias") in folds
    assert not out["blocks.0.norm1.bias"].any()
    assert report.error <= 1e-9
    net.load_state_dict(own)
    before = net(x)
    net.load_state_dict(out)
    assert torch.allclose(before, net(x), atol=1e-4)


def test_batchnorm_scale_against_the_next_convolution() -> None:
    torch.manual_seed(0)
    net = ResNet(width=4).eval()
    x = torch.randn(2, 1, 8, 8)
    own = state(net)
    for n, v in own.items():
        if n.endswith(("weight", "bias")):
            v.add_(0.3 * torch.randn_like(v))
    (out,), report = canonicalise(net, x, [own], infer(net, x))
    assert report.scalings
    inner = next(s for s in report.scalings if any(p.param == "blocks.0.norm1.weight" for p in s.up + s.down))
    names = [{p.param for p in side} for side in (inner.up, inner.down)]
    assert {"blocks.0.norm1.weight", "blocks.0.norm1.bias"} in names
    assert {"blocks.0.conv2.weight"} in names
    assert torch.equal(out["blocks.0.norm1.running_var"], own["blocks.0.norm1.running_var"])


class Normed(nn.Module):
    """BatchNorm after a map with a bias, without one, without gamma and beta, and where the map is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(1, 4, 3, bias=True), nn.BatchNorm2d(4)
        self.b, self.nb = nn.Conv2d(4, 5, 3, bias=False), nn.BatchNorm2d(5)
        self.c, self.nc = nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6, affine=False, eps=1e-2)
        self.d, self.nd = nn.Linear(6, 6), nn.BatchNorm1d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.nb(self.b(self.na(self.a(x)).relu())).relu().mean((2, 3))
        y = self.d(self.nc(self.c(x)).relu())
        return self.nd(y) + y


def test_batchnorms_are_folded_on_request() -> None:
    torch.manual_seed(0)
    net = Normed()
    for _ in range(3):
        net(torch.randn(8, 1, 7, 7) + 1)
    net.eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn_like(p))
    x = torch.randn(6, 1, 7, 7)
    own = {n: v.double() if v.is_floating_point() else v for n, v in state(net).items()}
    symmetry = infer(net, x)
    assert not canonicalise(net, x, [own], symmetry)[1].norms
    (out,), report = canonicalise(net, x, [own], symmetry, scales=False, biases=False, norms=True)
    assert [f.norm for f in report.norms] == ["na", "nb", "nc"]  # what reads the last map besides its norm would change
    assert "3 BatchNorms folded" in str(report)
    assert report.error < 1e-12
    for norm, eps in (("na", 1e-5), ("nb", 1e-5), ("nc", 1e-2)):
        assert torch.equal(out[f"{norm}.running_var"], torch.full_like(out[f"{norm}.running_var"], 1 - eps))
        if norm != "nc":
            assert torch.equal(out[f"{norm}.running_mean"], torch.zeros_like(out[f"{norm}.running_mean"]))
            assert torch.equal(out[f"{norm}.weight"], torch.ones_like(out[f"{norm}.weight"]))
    assert torch.equal(out["na.bias"], torch.zeros(4, dtype=torch.float64))
    assert torch.equal(out["nd.running_var"], own["nd.running_var"])
    net.double().load_state_dict(own)
    before = net(x.double())
    net.load_state_dict(out)
    torch.testing.assert_close(net(x.double()), before, rtol=1e-10, atol=1e-12)


def test_networks_that_differ_by_the_scales_that_batchnorm_takes_up_become_one() -> None:
    torch.manual_seed(0)
    net = ResNet(width=4).eval()
    x = torch.randn(2, 1, 8, 8)
    first = {n: v.double() if v.is_floating_point() else v for n, v in state(net).items()}
    factors = torch.rand(4, dtype=torch.float64) + 0.5
    second = {n: v.clone() for n, v in first.items()}
    second["blocks.0.conv1.weight"] *= factors[:, None, None, None]
    second["blocks.0.norm1.running_mean"] *= factors
    second["blocks.0.norm1.running_var"] = (first["blocks.0.norm1.running_var"] + 1e-5) * factors**2 - 1e-5
    (one, other), report = canonicalise(net, x, [first, second], infer(net, x), norms=True)
    assert len(report.norms) == sum(n.endswith("running_mean") for n in first)
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, msg=name)


def test_types_stay_and_inputs_are_not_changed() -> None:
    net = mlp().bfloat16()
    x = torch.randn(5, 4, dtype=torch.bfloat16)
    own = state(net)
    copies = {n: v.clone() for n, v in own.items()}
    (out,), report = canonicalise(net, x, [own], infer(net, x))
    assert all(v.dtype == torch.bfloat16 for v in out.values())
    assert all(torch.equal(own[n], copies[n]) for n in own)
    assert "units balanced" in str(report)


def test_a_wrong_gauge_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    net = mlp(nn.Tanh)
    x = torch.randn(5, 4)
    symmetry = infer(net, x)
    unit = symmetry.generators()[0]
    wrong = gauges.Scaling(0, tuple(s for s in unit.slots if s.axis == 0), tuple(s for s in unit.slots if s.axis == 1))
    monkeypatch.setattr(gauges._Probe, "scaling", lambda self, i, g: wrong if i == 0 else None)
    (out,), report = canonicalise(net, x, [state(net)], symmetry)
    assert report.scalings == ()
    assert all(torch.equal(v, out[n]) for n, v in state(net).items())
    monkeypatch.setattr(gauges._Probe, "kept", lambda self, found, weights, inputs: found)
    with pytest.raises(InvarianceError, match="output of model 0"):
        canonicalise(net, x, [state(net)], symmetry)


def _same_function(net: nn.Module, out: dict[str, torch.Tensor], *inputs: torch.Tensor) -> None:
    other = copy.deepcopy(net)
    other.load_state_dict(out)
    with torch.no_grad():
        for x in inputs:
            torch.testing.assert_close(other(x), net(x), rtol=1e-9, atol=1e-9)


class Attention(nn.Module):
    """Rotary attention: biases of keys count, but in a sequence of one token no query or key does."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(5, 4), nn.Linear(5, 4), nn.Linear(5, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        angle = torch.arange(x.shape[1]).double()[:, None]

        def turned(h: torch.Tensor) -> torch.Tensor:
            return h * angle.cos() + torch.cat([-h[..., 2:], h[..., :2]], -1) * angle.sin()

        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.out((turned(q) @ turned(k).mT).softmax(-1) @ v)


def test_gauges_of_a_short_example_are_tried_on_longer_inputs() -> None:
    torch.manual_seed(0)
    net, x = Attention().double(), torch.randn(2, 1, 5).double()
    (out,), report = canonicalise(net, x, [state(net)], infer(net, x))
    assert {c.param for c in report.idle} == set()
    assert [fold.bias.param for fold in report.folds] == ["v.bias"]
    _same_function(net, out, x, torch.randn(2, 6, 5).double())


class Mirrored(nn.Module):
    """Units are added to their mirror images: a unit of a pair alone may not be scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.into(x).relu()
        return self.out(h + h.flip(1))


@pytest.mark.parametrize("seed", [0, 1, 5])
def test_units_that_are_dead_in_one_model_make_no_gauge(seed: int) -> None:
    torch.manual_seed(seed)
    nets = [Mirrored().double() for _ in range(3)]
    nets[0].into.bias.data[3:] = -20
    x = torch.randn(2, 4).double()
    out, _ = canonicalise(nets[0], x, [state(n) for n in nets], infer(nets[0], x), seed=seed)
    for net, new in zip(nets, out, strict=True):
        _same_function(net, new, torch.randn(40, 4).double())


class CosineAttention(nn.Module):
    """Queries and keys have a length of their own, so a whole head scales with its values alone, or with all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(5, 24), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        scores = nn.functional.normalize(q, dim=-1) @ nn.functional.normalize(k, dim=-1).mT
        return self.out((4 * scores).softmax(-1).matmul(v).transpose(1, 2).flatten(2))


class Looped(nn.Module):
    """A weight with the same units on both sides settles slowly."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.loop, self.out = nn.Linear(4, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.into(x).relu()
        for _ in range(3):
            h = (h + self.loop(h)).relu()
        return self.out(h)


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda: CosineAttention(),
        lambda: Looped(),
        lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)),
        lambda: nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.Linear(6, 3)),
    ],
)
def test_a_canonical_model_stays(make: Callable[[], nn.Module], norms: bool) -> None:
    torch.manual_seed(0)
    nets = [make().double().eval() for _ in range(2)]
    x = torch.randn(2, 5, 5).double() if isinstance(nets[0], CosineAttention) else torch.randn(6, 4).double()
    for net in nets:
        for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm1d)):
            nn.init.uniform_(norm.running_mean, -1, 1)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 2)
            nn.init.uniform_(norm.bias, -1, 1)
    symmetry = infer(nets[0], x)
    once, report = canonicalise(nets[0], x, [state(n) for n in nets], symmetry, norms=norms)
    assert report.scalings
    twice, _ = canonicalise(nets[0], x, once, symmetry, norms=norms)
    for net, first, second in zip(nets, once, twice, strict=True):
        _same_function(net, first, x)
        for name, value in first.items():
            torch.testing.assert_close(second[name], value, rtol=1e-7, atol=1e-9)


class _Complex(nn.Module):
    """Complex layers, a split nonlinearity, and a real head that reads absolute values."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.one = nn.Linear(4, 6, dtype=torch.complex64)
        self.two = nn.Linear(6, 5, dtype=torch.complex64)
        self.head = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.one(x.to(torch.complex64))
        h = torch.complex(h.real.relu(), h.imag.relu())
        return self.head(self.two(h).abs())


def test_complex_weights_are_balanced() -> None:
    nets, x = [_Complex(s) for s in range(2)], torch.randn(7, 4)
    out, report = canonicalise(nets[0], x, [state(n) for n in nets], infer(nets[0], x))
    assert len(report.scalings) == 2
    for net, new in zip(nets, out, strict=True):
        before = net(x)
        assert not torch.equal(new["one.weight"], net.one.weight)
        net.load_state_dict(new)
        torch.testing.assert_close(net(x), before, rtol=1e-4, atol=1e-5)
    incoming = out[0]["one.weight"].abs().square().sum(1) + out[0]["one.bias"].abs().square()
    torch.testing.assert_close(incoming, out[0]["two.weight"].abs().square().sum(0), rtol=1e-3, atol=1e-5)
