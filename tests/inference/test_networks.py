"""Every small network has exactly its known generators, and they are symmetries by a check that shares no code."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from automerge._errors import TraceError
from automerge._tree_io import tensors_of
from automerge.infer import infer
from automerge.symmetry import Generator, Symmetry
from tests.inference import networks, networks_hostile

ALL = {**networks.CASES, **networks_hostile.CASES}
assert len(ALL) == len(networks.CASES) + len(networks_hostile.CASES)


def parse(sizes: str) -> list[int]:
    """``"8 4x3"`` is one generator of 8 units and three of 4."""
    out: list[int] = []
    for word in sizes.split():
        size, _, times = word.partition("x")
        out += [int(size)] * int(times or 1)
    return sorted(out)


def permuted(
    state: dict[str, torch.Tensor], generator: Generator, p: np.ndarray, names: dict[str, list[str]]
) -> dict[str, torch.Tensor]:
    """``new[index[u]] = old[index[p[u]]]`` for every slot, written from the definition alone."""
    new = {n: t.clone() for n, t in state.items()}
    for slot in generator.slots:
        for name in names[slot.param]:
            window: list[Any] = [slice(None)] * new[name].dim()
            for axis, start, stop in slot.within:
                window[axis] = slice(start, stop)
            old = new[name][tuple(window)].movedim(slot.axis, 0).clone()
            part = old.clone()
            for u in range(generator.size):
                part[torch.as_tensor(slot.index[u])] = old[torch.as_tensor(slot.index[p[u]])]
            new[name][tuple(window)] = part.movedim(0, slot.axis)
    return new


def worst_change(make: Callable[[], nn.Module], args: Any, kwargs: dict[str, Any], symmetry: Symmetry) -> float:
    """The largest change of an output entry under each generator alone and under all of them."""
    wide = lambda t: t.double() if torch.is_tensor(t) and t.is_floating_point() else t  # noqa: E731
    args, kwargs = tuple(wide(a) for a in args), {k: wide(v) for k, v in kwargs.items()}
    model = copy.deepcopy(make()).double().eval()
    for module in model.modules():
        for group in (module._parameters, module._buffers):
            for key, tensor in group.items():
                if tensor is not None and tensor.is_complex() and tensor.dtype is not torch.complex128:
                    group[key] = nn.Parameter(tensor.detach().to(torch.complex128))
    names = {n: [n, *(a for a, b in symmetry.aliases.items() if b == n)] for n in symmetry.shapes}

    def tensors(m: nn.Module) -> dict[str, torch.Tensor]:
        return dict(m.named_parameters(remove_duplicate=False)) | dict(m.named_buffers(remove_duplicate=False))

    def outputs(state: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        torch.manual_seed(3)
        fresh = copy.deepcopy(model)
        for name, tensor in tensors(fresh).items():
            tensor.copy_(state[name])
        return [t.clone() for t in tensors_of(fresh(*args, **kwargs))]

    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            rng = torch.Generator().manual_seed(5)
            for name, tensor in tensors(model).items():
                if (tensor.is_floating_point() or tensor.is_complex()) and name in symmetry.shapes:
                    scale = 1 + 0.3 * torch.rand(tensor.shape, generator=rng)
                    shift = 0.05 * torch.rand(tensor.shape, generator=rng)
                    tensor.copy_(tensor * scale + (0 if name in symmetry.statistics else shift))
            base = {n: t.clone() for n, t in tensors(model).items()}
            before = outputs(base)
            draw = np.random.default_rng(1)
            worst = 0.0
            for group in [*([g] for g in symmetry.generators()), symmetry.generators()]:
                state = base
                for generator in group:
                    p = draw.permutation(generator.size)
                    p = np.roll(p, 1) if np.array_equal(p, np.arange(generator.size)) else p
                    state = permuted(state, generator, p, names)
                for a, b in zip(before, outputs(state), strict=True):
                    assert a.shape == b.shape
                    if a.is_floating_point() or a.is_complex():
                        scale = a.abs().nan_to_num().clamp(min=1e-3)
                        change = ((a.nan_to_num() - b.nan_to_num()).abs() / scale).flatten()
                        worst = max(worst, float(change.max()) if change.numel() else 0.0)
                    else:
                        assert torch.equal(a, b)
            return worst
    finally:
        torch.set_default_dtype(default)


def free_positions(symmetry: Symmetry, name: str) -> tuple[int, ...]:
    """On every axis of a parameter, how many positions belong to some generator."""
    masks = [np.zeros(n, bool) for n in symmetry.shapes[name]]
    for generator in symmetry.generators():
        for slot in generator.slots:
            if slot.param == name:
                masks[slot.axis][slot.index.reshape(-1)] = True
    return tuple(int(m.sum()) for m in masks)


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return ALL[name][0]()


def cases() -> list[Any]:
    marked = networks_hostile.OPEN
    return [pytest.param(n, marks=pytest.mark.xfail(reason=marked[n], strict=True) if n in marked else ()) for n in ALL]


@pytest.mark.parametrize("name", cases())
def test_known_generators(name):
    _, args, sizes = ALL[name]
    symmetry = infer(build(name), args, networks_hostile.KWARGS.get(name))  # verifies, too
    assert sorted(g.size for g in symmetry.generators()) == parse(sizes), str(symmetry)
    assert bool(symmetry.unruled) == (name in networks_hostile.UNRULED), symmetry.unruled
    for param, expected in networks_hostile.FREE.get(name, {}).items():
        assert free_positions(symmetry, param) == expected, param


@pytest.mark.parametrize("name", ALL)
def test_sound_by_an_independent_check(name):
    """Also where groups are missing: whatever is claimed must be a symmetry."""
    _, args, _ = ALL[name]
    kwargs = networks_hostile.KWARGS.get(name, {})
    symmetry = infer(build(name), args, kwargs, verify=False)
    assert worst_change(lambda: build(name), args, kwargs, symmetry) < 1e-6


@pytest.mark.parametrize("name", ["BufferRebound", "BufferInPlace", "EmbeddingMaxNorm", "PythonCounter"])
def test_the_model_stays_as_it_was(name):
    model = build(name)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    infer(model, ALL[name][1], verify=False)
    after = model.state_dict()
    assert all(torch.equal(before[n], after[n]) for n in before)


def _ragged(_: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return torch.nested.to_padded_tensor(torch.nested.nested_tensor([x[0], x[1, :2]]), 0.0)


@pytest.mark.parametrize(
    ("model", "args", "kwargs", "words"),
    [
        (lambda x: x, torch.ones(1, 4), None, "expected a torch.nn.Module"),
        (nn.Linear, torch.ones(1, 4), None, "pass an instance"),
        (nn.Linear(4, 2), torch.ones(1, 5), None, "does not run on the example inputs"),
        (nn.Linear(4, 2), (), None, "no tensors"),
        (nn.Linear(4, 2), torch.ones(1, 4), [1], "kwargs must be a dict"),
        (networks_hostile.Program(lambda s, x: 3.0, {}), torch.ones(1), None, "returned no tensor"),
        (nn.LazyLinear(4), torch.ones(1, 4), None, "not initialised yet"),
        (networks_hostile.Program(_ragged, {}), torch.ones(2, 4), None, "nested tensor.*pad the sequences"),
    ],
    ids=["function", "class", "shape", "argument", "kwargs", "output", "lazy", "nested"],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_clear_errors(model, args, kwargs, words):
    with pytest.raises(TraceError, match=words):
        infer(model, args, kwargs)
