"""Rules that users register: custom operators and opaque modules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import automerge
from automerge import AutomergeError, register_rule
from automerge.rules import _registry


@torch.library.custom_op("automerge_test::twist", mutates_args=())
def twist(x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(x.detach().cpu().numpy() * 3.0 + 1.0).to(x)


@twist.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class Twisted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.ops.automerge_test.twist(self.a(x)))


class Black(nn.Module):
    """A module whose inside nobody can follow: it reads numbers into python."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = [[v * s for v, s in zip(row, self.scale.tolist(), strict=True)] for row in x.tolist()]
        return torch.tensor(rows, dtype=x.dtype)


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.black, self.out = nn.Linear(4, 6), Black(), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.black(self.a(x)))


@pytest.fixture(autouse=True)
def clean_registry() -> Iterator[None]:
    rules, modules = dict(_registry._RULES), dict(_registry._MODULE_RULES)
    classes = set(_registry.CLASSES)
    yield
    for store, before in ((_registry._RULES, rules), (_registry._MODULE_RULES, modules)):
        store.clear()
        store.update(before)
    _registry.CLASSES.clear()
    _registry.CLASSES.update(classes)


def test_operator_without_rule_is_pinned_and_named() -> None:
    symmetry = automerge.infer(Twisted(), torch.randn(2, 4))
    assert symmetry.generators() == []
    assert "automerge_test::twist" in symmetry.unruled[0]
    assert "automerge_test::twist" in str(symmetry)
    with pytest.raises(automerge.UnknownOperatorError, match="register_rule"):
        automerge.infer(Twisted(), torch.randn(2, 4), strict=True)


def test_registered_operator_is_used_and_verified() -> None:
    @automerge.register_rule("automerge_test::twist")
    def rule(context, x):  # type: ignore[no-untyped-def]
        return context.engine.elementwise([x])

    symmetry = automerge.infer(Twisted(), torch.randn(2, 4), strict=True)
    assert [g.size for g in symmetry.generators()] == [6]


def test_a_wrong_rule_is_caught_by_verification() -> None:
    @automerge.register_rule(torch.ops.aten.cumsum)
    def rule(context, x, dim):  # type: ignore[no-untyped-def]
        return context.engine.elementwise([x])

    class Scan(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.out = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.a(x).cumsum(1))

    with pytest.raises(automerge.InvarianceError, match="cumsum"):
        automerge.infer(Scan(), torch.randn(2, 4))


def test_opaque_module() -> None:
    model = Holder()
    before = automerge.infer(model, torch.randn(2, 4), verify=False)
    assert before.generators() == []

    @automerge.register_rule(Black)
    def rule(context, state, x):  # type: ignore[no-untyped-def]
        return context.engine.elementwise([x, state["scale"]])

    after = automerge.infer(model, torch.randn(2, 4))
    assert [(g.size, [s.param for s in g.slots]) for g in after.generators()] == [
        (6, ["a.weight", "a.bias", "black.scale", "out.weight"])
    ]
    assert "forward" not in vars(model.black)


@pytest.mark.parametrize(("operator", "rule", "words"), [(None, len, "got None"), ("aten::cos", 5, "cannot be called")])
def test_what_is_no_rule_is_refused(operator: Any, rule: Any, words: str) -> None:
    with pytest.raises(AutomergeError, match=words):
        register_rule(operator, rule)
