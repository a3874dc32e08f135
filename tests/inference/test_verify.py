"""Verification: what it must catch, what it must not call wrong, and what it must leave alone."""

from __future__ import annotations

import copy
import math
import random
import types
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from automerge import Generator, InvarianceError, Slot, Symmetry, SymmetryError, TraceError, infer, verify
from automerge._trials import trial_elements
from automerge.testing import assert_sound


def units(n: int) -> np.ndarray:
    return np.arange(n)[:, None]


def by_hand(model: nn.Module, *sets: tuple[int, list[tuple[str, int]]], statistics: frozenset[str] = frozenset()):
    """A symmetry that somebody claims."""
    named = [*model.named_parameters(), *model.named_buffers()]
    shapes = {n: tuple(t.shape) for n, t in named if t.is_floating_point() or t.is_complex()}
    made = tuple(Generator(n, tuple(Slot(p, axis, units(n)) for p, axis in slots)) for n, slots in sets)
    return Symmetry(shapes, made, statistics)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))


class Lambda(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x):
        return self.fn(x)


def test_a_true_group_passes_and_the_report_says_how_well():
    model = mlp()
    report = verify(model, torch.randn(4, 3), infer(model, torch.randn(4, 3), verify=False))
    assert report.error < 1e-12
    assert report.reacted
    assert report.randomised
    assert (report.elements, report.inputs) == (6, 2)
    assert "verified: 6 random elements on 2 inputs" in str(report)


class Waves(nn.Module):
    """Adds a table that was computed from lists; its first row holds nothing but ones."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x):
        table = torch.tensor([[math.cos(t * f) for f in range(6)] for t in range(x.shape[1])])
        return self.b((self.a(x) + table.to(x)).relu())


def test_a_group_that_holds_on_the_example_only_is_caught():
    model, x = Waves(), torch.randn(2, 1, 3)
    wrong = by_hand(model, (6, [("a.weight", 0), ("a.bias", 0), ("b.weight", 1)]))
    with pytest.raises(InvarianceError, match=r"not on inputs of the shapes \(2, 7, 3\): .* differ is aten"):
        verify(model, x, wrong)
    symmetry = infer(model, x)
    assert symmetry.sets == ()
    assert any("(2, 7, 3); they were inferred again to hold on both" in note for note in symmetry.notes)


def test_what_stays_as_it_is_does_so_when_groups_are_inferred_again():
    class Scaled(Waves):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.tensor([1.0, 1, 1, 2, 2, 2]))

        def forward(self, x):
            table = torch.tensor([[1.0, 1, 1, 1, 1, t + 1] for t in range(x.shape[1])])
            return self.b((self.a(x) + table.to(x)).relu() * self.mask)

    groups = infer(Scaled(), torch.randn(2, 1, 3), constants=["mask"]).generators()
    assert sorted(g.size for g in groups) == [2, 3]
    assert not any(s.param == "mask" for g in groups for s in g.slots)


def test_inputs_of_other_sizes_are_counted():
    model, x = mlp(), torch.randn(4, 3)
    report = verify(model, x, infer(model, x, verify=False))
    assert report.longer == 3  # twice as many rows, one more, and half as many
    assert "and others on 3 of other sizes" in str(report)
    large = torch.randn(6000, 3)
    assert verify(model, large, infer(model, large, verify=False)).longer == 1  # half as many


@pytest.mark.parametrize("leave_out", [("0.weight", 0), ("0.bias", 0), ("2.weight", 1)])
def test_a_missing_slot_is_caught(leave_out):
    model = mlp()
    slots = [s for s in (("0.weight", 0), ("0.bias", 0), ("2.weight", 1)) if s != leave_out]
    with pytest.raises(InvarianceError, match=r"first operator whose values\s+differ is aten"):
        verify(model, torch.randn(4, 3), by_hand(model, (6, slots)))


def test_the_first_operator_that_differs_is_named_with_its_module():
    model = mlp()
    wrong = by_hand(model, (6, [("2.weight", 0), ("2.bias", 0)]))  # forgets 4.weight[1]
    with pytest.raises(InvarianceError, match=r"aten\.\w+.* in module '4'"):
        verify(model, torch.randn(4, 3), wrong)


def test_two_pairs_that_may_only_move_together_are_told_apart():
    """Sets of two units always move by the same exchange: one that moves without its partner must be tried."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2))
    torn = by_hand(model, (2, [("0.weight", 0), ("0.bias", 0)]), (2, [("2.weight", 1)]))
    for seed in range(40):
        with pytest.raises(InvarianceError):
            verify(model, torch.randn(4, 3), torn, seed=seed)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 100])
def test_trial_elements_separate_small_sets(count):
    names = [f"w{i}" for i in range(count)]
    symmetry = Symmetry(dict.fromkeys(names, (2,)), tuple(Generator(2, (Slot(n, 0, units(2)),)) for n in names))
    moved = [frozenset(e.maps) for e in trial_elements(symmetry, 3, 0)]
    patterns = [tuple(n in m for m in moved) for n in names]
    assert len(set(patterns)) == count
    assert all(any(p) for p in patterns)


def test_fresh_normalisation_statistics_hide_nothing():
    """Running mean 0 and variance 1 are the same for every channel until they are randomised."""
    model = nn.Sequential(nn.Linear(3, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    slots = [("0.weight", 0), ("3.weight", 1)]
    statistics = frozenset({"1.running_mean", "1.running_var"})
    x = torch.randn(8, 3)
    for forgotten in ("1.weight", "1.bias", "1.running_mean", "1.running_var"):
        rest = [(n, 0) for n in ("1.weight", "1.bias", "1.running_mean", "1.running_var") if n != forgotten]
        with pytest.raises(InvarianceError):
            verify(model, x, by_hand(model, (6, [*slots, *rest]), statistics=statistics))
    everything = [(n, 0) for n in ("1.weight", "1.bias", "1.running_mean", "1.running_var")]
    assert verify(model, x, by_hand(model, (6, [*slots, *everything]), statistics=statistics)).error < 1e-12


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0])
def test_a_branch_that_starts_at_nothing_is_checked(scale):
    """Layer scales of 1e-6 and zero-initialised branches."""

    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)
            self.gamma = nn.Parameter(scale * torch.ones(4))

        def forward(self, x):
            return x + self.gamma * self.down(self.up(x).relu())

    model = Branch()
    with pytest.raises(InvarianceError):
        verify(model, torch.randn(3, 4), by_hand(model, (6, [("up.weight", 0), ("up.bias", 0)])))
    assert not any("not verified" in note for note in infer(model, torch.randn(3, 4)).notes)


def test_an_output_that_cancels_exactly_is_no_counterexample():
    """The normalised halves of two channels are +1 and -1: their sum is rounding error, in whatever order it is taken."""
    model = nn.Sequential(
        nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 2), nn.LayerNorm(2, elementwise_affine=False, eps=0.0)
    )
    model.append(Lambda(lambda x: x.tanh().sum(-1)))
    for seed in range(5):
        torch.manual_seed(seed)
        symmetry = infer(copy.deepcopy(model), torch.randn(16, 3))
        assert 7 in [g.size for g in symmetry.generators()]
        assert any("not verified" in note for note in symmetry.notes)


def test_a_dead_output_is_not_called_verified():
    model = nn.Sequential(nn.Linear(3, 6), Lambda(lambda x: x * 0), nn.Linear(6, 2))
    report = verify(model, torch.randn(4, 3), by_hand(model, (6, [("0.weight", 0), ("0.bias", 0)])))
    assert not report.reacted


def test_a_network_that_amplifies_rounding_still_reveals_a_wrong_group():
    """Rounding grows by about 1e9 here; a wrong group changes the output altogether."""
    depth = [m for _ in range(6) for m in (nn.Linear(5, 5, bias=False), Lambda(lambda x: torch.sin(30 * x)))]
    model = nn.Sequential(nn.Linear(3, 5), *depth, nn.Linear(5, 2))
    right = infer(model, torch.randn(4, 3), verify=False)
    verify(model, torch.randn(4, 3), right)
    with pytest.raises(InvarianceError):
        verify(model, torch.randn(4, 3), by_hand(model, (5, [("0.weight", 0), ("0.bias", 0)])))


def test_masked_scores_do_not_hide_the_others():
    """An output of -1e30 in places: the entries beside it count by their own size."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 4)

        def forward(self, x):
            mask = torch.tensor([True, False, False, False])
            return self.b(self.a(x).relu()).masked_fill(mask, -1e30)

    model = Masked()
    with pytest.raises(InvarianceError):
        verify(model, torch.randn(4, 3), by_hand(model, (6, [("a.weight", 0), ("a.bias", 0)])))
    assert infer(model, torch.randn(4, 3)).stats["verified"] < 1e-12


def test_integer_outputs_are_compared_exactly():
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4), Lambda(lambda x: x.argmax(-1)))
    x = torch.randn(64, 3)
    with pytest.raises(InvarianceError):
        verify(model, x, by_hand(model, (6, [("0.weight", 0), ("0.bias", 0)])))
    assert verify(model, x, infer(model, x, verify=False)).error == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_type_is_checked_in_float64(dtype):
    model = mlp().to(dtype)
    assert infer(model, torch.randn(4, 3, dtype=dtype)).stats["verified"] < 1e-12


def test_the_model_and_the_global_generator_are_left_alone():
    model = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2)).train()
    x = torch.randn(4, 3)
    symmetry = infer(model, x, verify=False)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    verify(model, x, symmetry)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert all(m.training for m in model.modules())


def test_a_model_that_cannot_be_copied_is_named():
    class Stubborn(nn.Linear):
        def __deepcopy__(self, memo):
            raise RuntimeError("no")

    model = Stubborn(6, 2)
    with pytest.raises(TraceError, match=r"Stubborn cannot be copied.*verify=False"):
        verify(model, torch.randn(4, 3), by_hand(model))


class Single(nn.Module):
    """Takes no other floats than those of 32 bits, as a kernel that is written for these."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.norm, self.out = nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(self.inp(x)).relu()
        if h.dtype != torch.float32:
            raise TypeError("float32 only")
        return self.out(h)


def test_a_model_of_float32_only_is_checked_in_that():
    model = Single().eval()
    symmetry = infer(model, torch.randn(4, 3))
    assert [g.size for g in symmetry.generators()] == [6]
    assert any("verified in float32" in note for note in symmetry.notes)
    outcome = verify(model, torch.randn(4, 3), symmetry)
    assert (outcome.dtype, outcome.reacted, outcome.randomised) == ("float32", True, True)
    assert outcome.error < 1e-5
    assert "change the float32 output" in str(outcome)
    with pytest.raises(InvarianceError, match="in module 'norm'"):
        verify(model, torch.randn(4, 3), by_hand(model, (6, [("inp.weight", 0), ("inp.bias", 0)])))


class Spectral(nn.Module):
    """Complex weights that an operator meets which compares types before it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 6)
        self.weight = nn.Parameter(torch.randn(6, 5, dtype=torch.complex64))
        self.out = nn.Parameter(torch.randn(5, 2, dtype=torch.complex64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tensordot(self.inner(x).to(torch.complex64), self.weight, dims=1)
        return torch.tensordot(h * h.abs(), self.out, dims=1)


def test_complex_weights_are_in_double_precision_too():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        symmetry = infer(model := Spectral(), x := torch.randn(4, 3))
    assert_sound(model, x, symmetry)
    assert sorted(g.size for g in symmetry.generators()) == [5, 6]
    assert symmetry.stats["verified"] < 1e-9


def test_complex_weights_are_drawn_and_perturbed_too():
    class Waves(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.zeros(4, 6, dtype=torch.cfloat))
            self.b = nn.Parameter(torch.randn(6, 2, dtype=torch.cfloat))

        def forward(self, x):
            return torch.view_as_real(((x + 0j) @ self.a).tanh() @ self.b).flatten(1)

    model, x = Waves(), torch.randn(3, 4)
    result = verify(model, x, infer(model, x, verify=False))
    assert result.reacted
    assert result.error < 1e-9
    with pytest.raises(InvarianceError):
        verify(model, x, by_hand(model, (6, [("a", 1)])))


def test_statistics_that_are_constants_keep_their_values():
    """They are no part of the group, so calibrating them would tell units apart that are alike."""

    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)
            self.register_buffer("mean", torch.zeros(6), persistent=False)
            self.register_buffer("var", torch.ones(6), persistent=False)

        def forward(self, x):
            return self.b(torch.nn.functional.batch_norm(self.a(x), self.mean, self.var).relu())

    assert [g.size for g in infer(Fixed(), torch.randn(8, 3)).generators()] == [6]


def test_a_hook_that_holds_on_to_the_original_is_named():
    class Hooked(nn.Module):
        def __init__(self, holder):
            super().__init__()
            self.a, self.b, self.scale = nn.Linear(3, 6), nn.Linear(6, 2), nn.Parameter(torch.rand(6))
            holder.scale = self.scale
            self.a.register_forward_hook(lambda module, args, out: out * holder.scale)

        def forward(self, x):
            return self.b(self.a(x).relu())

    with pytest.raises(TraceError, match="still reads scale of the original, from a hook"):
        infer(Hooked(types.SimpleNamespace()), torch.randn(4, 3))


def test_a_hook_that_reads_the_module_around_it_reads_the_copy():
    class Hooked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.scale = nn.Linear(3, 6), nn.Linear(6, 2), nn.Parameter(torch.rand(6))
            self.a.register_forward_hook(lambda module, args, out: out * self.scale)

        def forward(self, x):
            return self.b(self.a(x).relu())

    (found,) = infer(Hooked(), torch.randn(4, 3)).generators()
    assert "scale" in {slot.param for slot in found.slots}


class AtHome(nn.Linear):
    """Runs as the module that was built, and not as a copy of it."""

    def __init__(self) -> None:
        super().__init__(3, 2)
        self.home = id(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.home == id(self)
        return super().forward(x)


def test_a_model_of_which_no_copy_runs_is_named():
    with pytest.raises(TraceError, match=r"(?s)does not run in float64.*verify=False"):
        infer(AtHome(), torch.randn(4, 3))
    assert infer(AtHome(), torch.randn(4, 3), verify=False).unruled == ()


def test_bits_of_float32_are_checked_in_that():
    model = nn.Sequential(nn.Linear(3, 6), Lambda(lambda x: x.view(torch.int32).float()), nn.Linear(6, 2))
    assert any("verified in float32" in note for note in infer(model, torch.randn(4, 3)).notes)


def test_bits_viewed_as_another_type_are_pinned():
    model = nn.Sequential(
        nn.Linear(3, 6), Lambda(lambda x: torch.view_as_real(x.view(torch.complex64) * 2j).flatten(1)), nn.Linear(6, 2)
    )
    symmetry = infer(model, torch.randn(4, 3))
    assert symmetry.sets == ()
    assert "what an element is" in symmetry.unruled[0]


@pytest.mark.parametrize("given", ["channel", "tensor", "number"])
def test_fake_quantisation_moves_with_its_scales(given):
    class Aware(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)
            self.register_buffer("scale", 0.05 + 0.1 * torch.rand(6 if given == "channel" else 1))

        def forward(self, x):
            zeros = torch.zeros(len(self.scale), dtype=torch.int32)
            w = self.a.weight
            if given == "channel":
                w = torch.fake_quantize_per_channel_affine(w, self.scale, zeros, 0, -8, 7)
            elif given == "tensor":
                w = torch.fake_quantize_per_tensor_affine(w, self.scale, zeros, -8, 7)
            else:
                w = torch.fake_quantize_per_tensor_affine(w, 0.1, 0, -8, 7)
            return self.b(nn.functional.linear(x, w, self.a.bias).relu())

    model, x = Aware(), torch.randn(4, 3)
    symmetry = infer(model, x)
    (group,) = symmetry.generators()
    assert group.size == 6
    assert ("scale" in {s.param for s in group.slots}) == (given == "channel")
    if given == "channel":
        with pytest.raises(InvarianceError):
            verify(model, x, by_hand(model, (6, [("a.weight", 0), ("a.bias", 0), ("b.weight", 1)])))


def test_the_symmetry_of_another_model_is_told_apart_from_a_defect() -> None:
    net, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(5, 3)
    other = infer(nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)), x)
    with pytest.raises(
        SymmetryError, match=r"its 0\.weight, of the shape \(6, 3\), has the shape \(4, 3\) in this Sequential"
    ):
        verify(net, x, other)
    longer = infer(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 2)), x)
    with pytest.raises(SymmetryError, match=r"its 4\.weight, of the shape \(2, 2\), does not exist"):
        verify(net, x, longer)
    row = np.arange(2)[:, None]
    wrong = Symmetry(infer(net, x).shapes, (Generator(2, (Slot("2.weight", 0, row), Slot("2.bias", 0, row))),))
    with pytest.raises(InvarianceError, match="a random element of the group changes the output by") as caught:
        verify(net, x, wrong)
    assert "report" not in str(caught.value)


@pytest.mark.parametrize("library", [random, np.random], ids=["python", "numpy"])
def test_numbers_that_other_libraries_draw_are_the_same_in_every_pass(library: Any) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.out = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.inner(x).relu() * library.uniform(1, 2))

    model, x = Noisy(), torch.randn(2, 3)
    library.seed(0)
    drawn = [library.uniform(0, 1) for _ in range(3)]
    library.seed(0)
    symmetry = infer(model, x)
    assert [g.size for g in symmetry.generators()] == [8]
    assert symmetry.stats["verified"] < 1e-9
    assert not any("not verified" in note for note in symmetry.notes)
    assert_sound(model, x, symmetry)
    assert [library.uniform(0, 1) for _ in range(3)] == drawn  # what the passes drew is not the caller's


@pytest.mark.parametrize("name", ["first.running_mean", "second.running_mean"])
def test_a_constant_with_two_names(name):
    class Twice(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
            self[1].running_mean.normal_()

        def forward(self, x):
            return self[3](self[2](self.first(self[0](x))))

    net = Twice().eval()
    net.first = net.second = net[1]
    assert not infer(net, torch.randn(16, 4), constants=[name]).generators()
