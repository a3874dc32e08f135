"""Elements are a group that acts on tensors, also where inner permutations depend on outer positions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from automerge import Element, Symmetry
from automerge.groups import apply_index, axis_index, compose_index, identity_index, inverse_index
from automerge.testing import elements
from tests._symmetries import ALL, weights

SYMMETRIES: dict[str, Symmetry] = {name: make() for name, make in ALL.items()}


@st.composite
def acting(draw: st.DrawFn, count: int) -> tuple[Symmetry, list[Element]]:
    """A symmetry and some of its elements, themselves products of two."""
    symmetry = SYMMETRIES[draw(st.sampled_from(sorted(SYMMETRIES)))]
    one = elements(symmetry)
    return symmetry, [draw(one).then(draw(one)) for _ in range(count)]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[n]) for n, v in a.items())


@settings(max_examples=60)
@given(acting(3))
def test_the_group_laws_hold_exactly(case: tuple[Symmetry, list[Element]]) -> None:
    symmetry, (a, b, c) = case
    one = symmetry.identity()
    assert a.then(b).then(c) == a.then(b.then(c))
    assert a.then(one) == a == one.then(a)
    assert a.then(a.inverse()) == one == a.inverse().then(a)
    assert a.then(a.inverse()).is_identity()
    assert a.then(a.inverse()).moved() == 0
    assert a.inverse().inverse() == a
    assert a.then(b).inverse() == b.inverse().then(a.inverse())
    assert (a == b) == a.then(b.inverse()).is_identity()
    assert hash(a) == hash(a.then(one)) or a.maps.keys() != a.then(one).maps.keys()


@settings(max_examples=60)
@given(acting(2), st.integers(0, 99))
def test_the_action_is_one(case: tuple[Symmetry, list[Element]], seed: int) -> None:
    symmetry, (a, b) = case
    state = weights(symmetry, seed)
    both = symmetry.apply(symmetry.apply(state, a), b)
    assert same(symmetry.apply(state, a.then(b)), both)
    assert same(symmetry.apply(symmetry.apply(state, a), a.inverse()), state)
    assert same(symmetry.apply(state, symmetry.identity()), state)
    for name, value in state.items():  # nothing is lost, nothing is made
        assert torch.equal(value.flatten().sort().values, both[name].flatten().sort().values)


@settings(max_examples=30)
@given(acting(1))
def test_numpy_and_torch_agree(case: tuple[Symmetry, list[Element]]) -> None:
    symmetry, (a,) = case
    for name, value in weights(symmetry, 1).items():
        assert np.array_equal(a.apply_to(name, value.numpy()), a.apply_to(name, value).numpy())


def test_moved_counts_positions() -> None:
    index = (np.array([1, 0, 2]).reshape(3, 1), axis_index((3, 2), 1))
    element = Element({"w": (3, 2)}, {"w": index})
    assert element.moved() == 2
    assert not element.is_identity()
    assert repr(element) == "Element(moves 2 positions in 1 parameters)"
    assert element != Element({"v": (3, 2)}, {"v": index})
    assert element != "something else"


def test_inner_permutations_may_depend_on_outer_positions() -> None:
    """Rows swap; the columns of row 0 are reversed: new[i, j] = old[p[i], q[i, j]]."""
    shape = (2, 3)
    swap = (np.array([[1], [0]]), axis_index(shape, 1))
    inner = (axis_index(shape, 0), np.array([[2, 1, 0], [0, 1, 2]]))
    x = np.arange(6).reshape(shape)
    assert apply_index(compose_index(swap, inner), x).tolist() == [[5, 4, 3], [0, 1, 2]]
    assert apply_index(compose_index(inner, swap), x).tolist() == [[3, 4, 5], [2, 1, 0]]
    both = compose_index(inner, swap)
    assert all(
        np.array_equal(a, b)
        for a, b in zip(compose_index(both, inverse_index(both)), identity_index(shape), strict=True)
    )


def test_axes_that_depend_on_each_other_have_no_inverse_here() -> None:
    grid = np.array([[0, 1], [1, 0]])
    with pytest.raises(ValueError, match="depend on each other in a cycle"):
        inverse_index((grid, grid))


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.complex128)


@settings(max_examples=150)
@given(st.data())
def test_every_memory_is_moved_as_advanced_indexing_does(data: st.DataObject) -> None:
    """Any dtype, layout, subset of axes and chunk of rows; into memory of its own or into given memory."""
    shape = tuple(data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=4)))
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    moves = [data.draw(st.booleans()) for _ in shape]
    index = tuple(
        rng.permutation(n).reshape([n if j == k else 1 for j in range(len(shape))])
        if moves[k]
        else axis_index(shape, k)
        for k, n in enumerate(shape)
    )
    order = rng.permutation(len(shape)).tolist()
    wide = torch.arange(2 * int(np.prod(shape))).reshape(*(shape[k] for k in order[:-1]), 2 * shape[order[-1]])[
        ..., ::2
    ]
    tensor = wide.permute(np.argsort(order).tolist()).to(data.draw(st.sampled_from(DTYPES)))
    if data.draw(st.booleans()) and tensor.is_complex():
        tensor = (tensor * (1 + 2j)).conj()
    expected = tensor[tuple(torch.from_numpy(a) for a in index)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("automerge.groups._CACHED", data.draw(st.sampled_from([1, 7, 1 << 16])))
        assert torch.equal(apply_index(index, tensor), expected)
        out = torch.zeros_like(tensor)
        assert apply_index(index, tensor, out) is out
        assert torch.equal(out, expected)


def test_moving_a_parameter_keeps_its_gradient() -> None:
    w = torch.nn.Parameter(torch.randn(4, 3))
    index = (np.array([[2], [0], [3], [1]]), axis_index((4, 3), 1))
    weight = torch.randn(4, 3)
    (apply_index(index, w) * weight).sum().backward()
    assert w.grad is not None
    assert torch.equal(apply_index(index, w.grad), weight)
    with torch.no_grad():
        assert torch.equal(apply_index(index, w), w[[2, 0, 3, 1]])


@pytest.mark.parametrize("wrong", [-1, 3])
def test_positions_that_do_not_exist_are_refused(wrong: int) -> None:
    index = (np.array([[0], [wrong], [1]]), axis_index((3, 2), 1))
    with pytest.raises(IndexError, match="axis 0 has 3 positions"):
        apply_index(index, torch.zeros(3, 2))
