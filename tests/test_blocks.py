"""Blocks partition the parameters, and moving a block axis by axis is the group's action."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from automerge.blocks import Blocks, decompose
from automerge.symmetry import Generator, Slot, Symmetry
from tests import _symmetries as hand


def move(blocks: Blocks, number: int, value: torch.Tensor, perms: dict[int, np.ndarray]) -> torch.Tensor:
    sigma = blocks.induced(perms)
    for axis, space in enumerate(blocks.blocks[number].spaces):
        if space is not None:
            value = value.index_select(axis, torch.from_numpy(sigma[space]))
    return value


@pytest.mark.parametrize("name", hand.ALL)
@given(seed=st.integers(0, 2**31))
@settings(max_examples=8, deadline=None)
def test_moving_blocks_is_moving_parameters(name: str, seed: int) -> None:
    symmetry = hand.ALL[name]()
    blocks = decompose(symmetry)
    assert not blocks.structure.dropped
    rng = np.random.default_rng(seed)
    perms = {r: p for root in blocks.structure.roots for r, p in blocks.structure.random(root, rng).items()}
    element = blocks.structure.element(symmetry, perms)
    values = hand.weights(symmetry, seed)
    moved = symmetry.apply(values, element)
    for i, block in enumerate(blocks.blocks):
        assert torch.equal(move(blocks, i, block.read(values[block.param]), perms), block.read(moved[block.param]))


@pytest.mark.parametrize("name", hand.ALL)
def test_blocks_partition_what_moves(name: str) -> None:
    symmetry = hand.ALL[name]()
    blocks = decompose(symmetry)
    values = hand.weights(symmetry, 0)
    counts = {n: torch.zeros(v.shape) for n, v in values.items()}
    copies = {n: v.clone() for n, v in values.items()}
    for block in blocks.blocks:
        part = block.read(values[block.param])
        assert tuple(part.shape) == block.shape
        one = torch.zeros(values[block.param].shape)
        block.write(one, torch.ones(block.shape))
        counts[block.param] += one
        block.write(copies[block.param], part)
    for name_, count in counts.items():
        assert int(count.max()) <= 1
        assert torch.equal(copies[name_], values[name_])
        if name_ not in symmetry.statistics:
            assert torch.equal(count[touched(symmetry, name_)], torch.ones(int(touched(symmetry, name_).sum())))


def touched(symmetry: Symmetry, name: str) -> torch.Tensor:
    """The entries that some generator moves."""
    out = torch.zeros(symmetry.shapes[name], dtype=torch.bool)
    for g in symmetry.generators():
        for slot in g.slots:
            if slot.param == name:
                part = out
                for axis, start, stop in slot.within:
                    part = part.narrow(axis, start, stop - start)
                part.index_fill_(slot.axis, torch.from_numpy(slot.index.reshape(-1)), True)
    return out


@pytest.mark.parametrize("name", hand.ALL)
def test_every_element_of_the_generators_is_reached(name: str) -> None:
    """The group of the trees is as large as the generators say: sizes and members agree."""
    symmetry = hand.ALL[name]()
    structure = decompose(symmetry).structure
    numbers = sorted(m.generator for role in structure.roles for m in role.members.values())
    assert numbers == list(range(len(symmetry.generators())))


def test_statistics_and_untouched_parameters_are_no_blocks() -> None:
    symmetry = hand.residual()
    assert "norm.mean" not in {b.param for b in decompose(symmetry).blocks}


def test_two_groups_on_one_axis_are_two_block_axes() -> None:
    block = next(b for b in decompose(hand.outer_product(3, 4)).blocks if b.param == "c")
    assert block.shape == (2, 3, 4)
    assert len({s for s in block.spaces if s is not None}) == 2


def test_expert_weights_share_their_outer_axis_and_grouped_kernels_are_embedded() -> None:
    up = next(b for b in decompose(hand.experts(3, 4, 5)).blocks if b.param == "up")
    assert up.shape == (12, 5)
    assert up.mask is None
    kernel = next(b for b in decompose(hand.grouped_conv(3, 2, 4)).blocks if b.param == "b.weight")
    assert kernel.shape == (6, 12, 3, 3)
    assert kernel.mask is not None
    assert int(kernel.mask.sum()) == 6 * 4


def test_units_listed_in_another_order_are_aligned() -> None:
    """Inner generators may list their units in any order."""
    rng = np.random.default_rng(0)
    symmetry = hand.heads()
    sets = []
    for g in symmetry.generators():
        order = rng.permutation(g.size)
        sets.append(Generator(g.size, tuple(Slot(s.param, s.axis, s.index[order], s.within) for s in g.slots)))
    shuffled = Symmetry(symmetry.shapes, tuple(sets))
    blocks = decompose(shuffled)
    assert not blocks.structure.dropped
    perms = {r: p for root in blocks.structure.roots for r, p in blocks.structure.random(root, rng).items()}
    values = hand.weights(shuffled, 1)
    moved = shuffled.apply(values, blocks.structure.element(shuffled, perms))
    for i, block in enumerate(blocks.blocks):
        assert torch.equal(move(blocks, i, block.read(values[block.param]), perms), block.read(moved[block.param]))


def test_a_generator_without_counterpart_is_left_out() -> None:
    symmetry = hand.heads()
    sets = symmetry.generators()[1:]
    blocks = decompose(Symmetry(symmetry.shapes, tuple(sets)))
    assert 1 in blocks.structure.dropped
    assert len(blocks.structure.dropped) == 2


def test_tied_and_conditioned_generators_that_make_no_grid_are_left_out() -> None:
    """Two generators that overlap partially fit no product."""
    unit = np.arange(3)[:, None]
    s = Symmetry({"a": (5, 2)}, (Generator(3, (Slot("a", 0, unit),)), Generator(3, (Slot("a", 0, unit + 2),))))
    assert decompose(s).structure.dropped
