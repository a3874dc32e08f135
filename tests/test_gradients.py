"""Models that differentiate inside their forward pass, with gradients on or left to the caller."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

import automerge
from automerge.rules._decompose import attention_backward
from automerge.testing import assert_sound

aten = torch.ops.aten


def layers(*widths: int) -> nn.Sequential:
    made = [m for n, k in itertools.pairwise(widths) for m in (nn.Linear(n, k), nn.Tanh())]
    return nn.Sequential(*made[:-1])


class Residual(nn.Module):
    """The residual of a heat equation: first and second derivatives of a network, as an example of physics has them."""

    def __init__(self) -> None:
        super().__init__()
        self.u = layers(2, 8, 7, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.requires_grad_(True)
        u = self.u(x)
        (first,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first[:, 0].sum(), x, create_graph=True)
        return torch.cat([u, first[:, 1:] - second[:, :1]], 1)


class Forces(nn.Module):
    """Forces and energy, differentiated where gradients are switched on."""

    def __init__(self) -> None:
        super().__init__()
        self.u = layers(1, 8, 7, 1)

    @torch.enable_grad()
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.detach().clone().requires_grad_(True)
        far = (x[:, None] - x[None]).pow(2).sum(-1, keepdim=True)
        energy = self.u(far).sum(1)
        return -torch.autograd.grad(energy.sum(), x)[0], energy


class Backward(Residual):
    """A derivative by a backward pass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_(True)
        u = self.u(x)
        torch.autograd.backward(u.sum(), inputs=[x])
        assert x.grad is not None
        return torch.cat([u, x.grad], 1)


KINDS = [Residual, Forces, Backward]
X = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", KINDS)
def test_groups(kind: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = kind().double().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for verify in (False, True):
            symmetry = automerge.infer(model, X.double(), verify=verify)
            assert sorted(g.size for g in symmetry.generators()) == [7, 8]
        assert_sound(model, X.double(), symmetry)
        with torch.no_grad():
            assert automerge.infer(model, X.double()).sets == symmetry.sets


@pytest.mark.parametrize("kind", KINDS)
def test_merge_with_data(kind: Callable[[], nn.Module]) -> None:
    """Everything that runs a model does: a merge repaired on data, activations, a comparison; nothing is left behind."""
    torch.manual_seed(0)
    base = kind().eval()
    symmetry = automerge.infer(base, X)
    models = [base, *(kind().eval() for _ in range(2))]
    for seed, model in enumerate(models[1:]):
        model.load_state_dict(symmetry.apply(base.state_dict(), symmetry.random_element(seed)))
    data = [(torch.randn_like(X),) for _ in range(2)]
    flags = [p.requires_grad for p in base.parameters()]

    merged = automerge.merge(models, X, data=data, coordinates=0)
    for name, value in base.state_dict().items():
        torch.testing.assert_close(merged.state_dict[name], value)
    matching = automerge.match(models, symmetry, automerge.ActivationMatching(), data=data)
    assert len(matching.to_universe) == 3
    assert automerge.agreement(models[0], models[1], data).samples > 0
    assert not X.requires_grad
    assert not any(x.requires_grad for (x,) in data)
    assert torch.is_grad_enabled()
    assert [p.requires_grad for p in base.parameters()] == flags
    assert all(p.grad is None for p in base.parameters())


def test_a_model_whose_loss_has_no_gradient_says_so() -> None:
    """Where gradients are on and still nothing requires one, the error is the model's own."""

    class Detached(Residual):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.autograd.grad(self.u(x).detach().sum(), x)[0]

    with pytest.raises(automerge.TraceError, match="does not require grad"):
        automerge.infer(Detached().eval(), X)


def test_an_input_of_which_gradients_are_asked() -> None:
    """The caller may have switched them on for the input."""

    class Asked(Residual):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.autograd.grad(self.u(x).sum(), x, create_graph=True)[0]

    torch.manual_seed(0)
    model, x = Asked().eval(), X.clone().requires_grad_()
    assert sorted(g.size for g in automerge.infer(model, x).generators()) == [7, 8]
    assert x.grad is None


class Attending(nn.Module):
    """The gradient of what attention gives."""

    def __init__(self, **how: bool) -> None:
        super().__init__()
        self.inp, self.out, self.how = nn.Linear(2, 24), nn.Linear(8, 1), how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.requires_grad_()
        q, k, v = self.inp(x).view(1, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, **self.how)
        return torch.autograd.grad(self.out(y.transpose(1, 2).flatten(2)).sum(), x)[0]


@pytest.mark.parametrize("how", [{}, {"is_causal": True}])
def test_attention_keeps_its_heads(how: dict[str, bool]) -> None:
    torch.manual_seed(0)
    model = Attending(**how).eval()
    symmetry = automerge.infer(model, X)
    assert sorted(g.size for g in symmetry.generators()) == [2, 4, 4, 4, 4]
    assert not symmetry.unruled
    assert_sound(model, X, symmetry)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, torch.randn(5, 5).double(), torch.rand(5, 5) > 0.3])
def test_the_pieces_of_the_backward_pass_of_attention(causal: bool, mask: torch.Tensor | None) -> None:
    if causal and mask is not None:
        pytest.skip("the operator takes one of the two")
    if mask is not None and mask.dtype is torch.bool:
        mask = mask | torch.eye(5, dtype=torch.bool)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 4, dtype=torch.float64) for _ in range(3))
    added = (
        torch.zeros(5, 5).double().masked_fill(~mask, -torch.inf)
        if mask is not None and mask.dtype is torch.bool
        else mask
    )
    out, normaliser = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=added, scale=0.7)
    given = torch.randn_like(out), q, k, v, out, normaliser, 0.0, causal
    expected = aten._scaled_dot_product_flash_attention_for_cpu_backward(*given, attn_mask=added, scale=0.7)
    for name, piece, whole in zip("qkv", attention_backward(*given, attn_mask=mask, scale=0.7), expected, strict=True):
        torch.testing.assert_close(piece, whole, msg=name)
