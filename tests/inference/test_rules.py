"""Every rule: what it says is free is free, and what it says is pinned is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from automerge.rules._registry import _RULES
from tests.inference._one_operator import OneOperator
from tests.inference._rule_cases import CASES, Draw

RANDOM = (
    "bernoulli binomial cauchy exponential geometric log_normal multinomial normal normal_functional poisson rand rand_like "
    "randint randint_like randn randn_like random randperm uniform native_dropout"
)
MEMORY = "empty empty_like empty_strided new_empty new_empty_strided"
WITHOUT: dict[str, str] = {
    **dict.fromkeys(RANDOM.split(), "random numbers are no function of the operands; tests of inference cover them"),
    **dict.fromkeys(MEMORY.split(), "its values are whatever was in memory"),
    "_grouped_mm": "takes bfloat16 only, too coarse to compare",
    **dict.fromkeys(
        ("_linalg_svd", "_linalg_eigh"), "refuses numbers that are none, which stand for what is not read; see networks"
    ),
    **dict.fromkeys(("_to_dense", "_sparse_addmm"), "for sparse tensors"),
    "bincount": "takes integers, which parameters are not",
    "fake_quantize_per_channel_affine_cachemask": "takes scales in float32 only; see test_verify",
}
TWINS: dict[str, str] = {  # no kernel for float64 on this machine: the same rule as an operator that has one
    "cudnn_convolution": "convolution",
    "mkldnn_convolution": "convolution",
    "convolution_overrideable": "convolution",
    "cudnn_batch_norm": "native_batch_norm",
    "miopen_batch_norm": "native_batch_norm",
    "_batch_norm_with_update": "native_batch_norm",
    "cudnn_grid_sampler": "grid_sampler_2d",
    "_int_mm": "mm",
}

MODES = ("sum", "read", "out")


@st.composite
def uses(draw: Any, name: str) -> OneOperator:
    """One use of an operator in a network around it."""
    case = CASES[name](Draw(draw))
    made = OneOperator(name, case, lambda: draw(st.sampled_from(MODES)), draw(st.integers(0, 99)))
    made.case = case  # type: ignore[attr-defined]
    return made


@pytest.mark.parametrize("name", CASES)
def test_rule(name: str) -> None:
    @settings(max_examples=7, database=None)
    @given(uses(name))
    def check(network: Any) -> None:
        code = network.module.code
        assert network.case.unruled or not network.symmetry.unruled, network.symmetry.unruled
        assert network.unsound() is None, f"{network.unsound()}\n{code}"
        if network.case.complete and not network.symmetry.unruled:
            assert network.missing() is None, f"{network.missing()}\n{code}"

    check()


def test_every_rule_has_a_case_or_a_reason() -> None:
    names = {n.removeprefix("aten::") for n in _RULES if n.startswith("aten::")}
    real = {n for n in names if hasattr(torch.ops.aten, n)}
    assert real - set(CASES) - set(WITHOUT) - set(TWINS) == set()
    assert all(_RULES[f"aten::{n}"] is _RULES[f"aten::{twin}"] for n, twin in TWINS.items() if n in real)
    assert not set(CASES) & (set(WITHOUT) | set(TWINS))


def test_no_rule_is_for_an_operator_that_does_not_exist() -> None:
    """A rule for a name that PyTorch lacks is dead, or a typing error."""
    gone = [n for n in _RULES if n.startswith("aten::") and not hasattr(torch.ops.aten, n.removeprefix("aten::"))]
    assert gone == []
