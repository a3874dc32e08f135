"""Positions that have an order for every place of an index tensor, and positions computed from positions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from automerge import infer
from automerge.testing import assert_sound
from tests.inference._index_programs import IndexProgram

torch.set_num_threads(1)
GROUPS, CODES, WIDTH = 3, 5, 4
Read = Callable[["Quantiser", Tensor], Tensor]


def _sizes(net: nn.Module, *args: Tensor) -> list[int]:
    found = infer(net, args, verify=False)
    assert_sound(net, args, found)
    return sorted(g.size for g in found.generators())


# -------------------------------------------------------------------- a codebook for every group of features
class Quantiser(nn.Module):
    def __init__(self, read: Read) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(3, GROUPS * WIDTH), nn.Linear(GROUPS * WIDTH, 2)
        self.codes, self.read = nn.Parameter(torch.randn(GROUPS, CODES, WIDTH)), read

    def forward(self, x: Tensor) -> Tensor:
        z = self.inp(x).view(-1, GROUPS, WIDTH)
        nearest = ((z[:, :, None] - self.codes) ** 2).sum(-1).argmin(-1)
        return self.out(self.read(self, nearest).flatten(1))


READS: dict[str, Read] = {
    "one-hot": lambda s, i: torch.einsum("ngk,gkd->ngd", F.one_hot(i, CODES).to(s.codes.dtype), s.codes),
    "gather": lambda s, i: (
        s.codes.expand(len(i), -1, -1, -1).gather(2, i[:, :, None, None].expand(-1, -1, 1, WIDTH)).squeeze(2)
    ),
    "index": lambda s, i: s.codes[torch.arange(GROUPS), i],
    "offsets": lambda s, i: s.codes.reshape(-1, WIDTH)[i + torch.arange(GROUPS) * CODES],
    "one by one": lambda s, i: torch.stack([s.codes[g][i[:, g]] for g in range(GROUPS)], 1),
    "flat": lambda s, i: F.embedding(torch.arange(0, GROUPS * CODES, CODES) + i, s.codes.flatten(0, 1)),
}


@pytest.mark.parametrize("name", READS)
def test_every_codebook_has_its_own_order(name: str) -> None:
    expected = sorted([GROUPS, *[CODES] * GROUPS, *[WIDTH] * GROUPS])
    assert _sizes(Quantiser(READS[name]), torch.randn(6, 3)) == expected


def test_the_numbers_themselves_pin() -> None:
    """Codes that are read as numbers have no order that could change."""
    net = Quantiser(lambda s, i: s.codes[torch.arange(GROUPS), i] * i[..., None])
    found = infer(net, torch.randn(6, 3))
    assert not any((s.param, s.axis) == ("codes", 1) for g in found.generators() for s in g.slots)


class Product(nn.Module):
    """The codes of all groups in one table (wav2vec 2.0, arXiv 2006.11477): written as ones, then summed in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.scores, self.out = nn.Linear(6, GROUPS * CODES), nn.Linear(GROUPS * WIDTH, 2)
        self.inp, self.codes = nn.Linear(3, 6), nn.Parameter(torch.randn(1, GROUPS * CODES, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.scores(self.inp(x).tanh()).view(len(x) * GROUPS, CODES)
        ones = torch.zeros_like(rows).scatter_(-1, rows.argmax(-1).view(-1, 1), 1.0).view(len(x), -1)
        return self.out((ones[..., None] * self.codes).view(len(x), GROUPS, CODES, WIDTH).sum(-2).flatten(1))


def test_every_group_of_one_table_has_its_own_orders() -> None:
    assert _sizes(Product(), torch.randn(6, 3)) == sorted([6, GROUPS, *[CODES] * GROUPS, *[WIDTH] * GROUPS])


# -------------------------------------------------------------------- classes of several variables, fed back
class Latents(nn.Module):
    """A recurrent state of several categorical variables, as in Dreamer (arXiv 2010.02193): straight-through classes."""

    def __init__(self, steps: int, variables: int = 4, classes: int = 3, width: int = 5) -> None:
        super().__init__()
        self.steps, self.shape = steps, (variables, classes)
        self.inp, self.cell = nn.Linear(variables * classes + 2, 8), nn.GRUCell(8, width)
        self.post, self.out = nn.Linear(width + 6, variables * classes), nn.Linear(width + variables * classes, 2)

    def forward(self, seen: Tensor, action: Tensor) -> Tensor:
        h, z = seen.new_zeros(len(seen), self.cell.hidden_size), seen.new_zeros(len(seen), self.post.out_features)
        out = []
        for t in range(self.steps):
            h = self.cell(self.inp(torch.cat([z, action[:, t]], -1)).relu(), h)
            p = self.post(torch.cat([h, seen[:, t]], -1)).unflatten(1, self.shape).softmax(-1)
            z = (F.one_hot(p.argmax(-1), self.shape[1]) + p - p.detach()).flatten(1)
            out.append(self.out(torch.cat([h, z], -1)))
        return torch.stack(out, 1)


@pytest.mark.parametrize("steps", [2, 3])
def test_every_variable_has_its_own_order_of_classes(steps: int) -> None:
    """Also where the first state is zeros beside actions."""
    assert _sizes(Latents(steps), torch.randn(2, 3, 6), torch.randn(2, 3, 2)) == sorted([8, 5, 4, 3, 3, 3, 3])


# -------------------------------------------------------------------- pairs of positions
class ProductKeys(nn.Module):
    """A value for every pair of two keys (arXiv 1907.05242)."""

    def __init__(self, keys: int = 5, width: int = 6) -> None:
        super().__init__()
        self.inp, self.query = nn.Linear(3, width), nn.Linear(width, 4)
        self.rows, self.columns = nn.Linear(4, keys), nn.Linear(4, keys)
        self.values, self.out = nn.Embedding(keys * keys, width), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        (v, i), (w, j) = (half(self.query(h)).topk(2, -1) for half in (self.rows, self.columns))
        both = (v[:, :, None] + w[:, None]).flatten(1)
        places = (i[:, :, None] * self.rows.out_features + j[:, None]).flatten(1)
        best, which = both.topk(2, -1)
        return self.out(h + (self.values(places.gather(1, which)) * best.softmax(-1)[..., None]).sum(1))


def test_both_keys_of_a_pair_move() -> None:
    found = infer(ProductKeys(), torch.randn(6, 3), verify=False)
    assert_sound(ProductKeys(), torch.randn(6, 3), found)
    moved = [{s.param for s in g.slots} for g in found.generators()]
    assert {"rows.weight", "rows.bias", "values.weight"} in moved
    assert {"columns.weight", "columns.bias", "values.weight"} in moved


class Memory(nn.Module):
    """The same with several heads, one after the other, whose keys are one parameter (as the authors wrote it)."""

    def __init__(self, heads: int, keys: int = 5, half: int = 3) -> None:
        super().__init__()
        self.keys, self.half = nn.Parameter(torch.randn(heads, 2, keys, half)), half
        self.inp, self.query = nn.Linear(3, 6), nn.Linear(6, heads * 2 * half)
        self.values, self.out = nn.EmbeddingBag(keys * keys, 4, mode="sum"), nn.Linear(4, 2)

    def best(self, query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        halves = zip(query.split(self.half, 1), (keys[0], keys[1]), strict=True)
        (v, i), (w, j) = (F.linear(q, k).topk(2, dim=1) for q, k in halves)
        both = (v[:, :, None].expand(-1, 2, 2) + w[:, None].expand(-1, 2, 2)).reshape(len(query), -1)
        places = (i[:, :, None].expand(-1, 2, 2) * keys.shape[1] + j[:, None].expand(-1, 2, 2)).reshape(len(query), -1)
        scores, which = both.topk(2, dim=1)
        return scores, places.gather(1, which)

    def forward(self, x: Tensor) -> Tensor:
        query = self.query(self.inp(x)).view(len(x), len(self.keys), 2 * self.half)
        found = [self.best(query[:, h], self.keys[h]) for h in range(len(self.keys))]
        scores, places = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
        return self.out(self.values(places, per_sample_weights=scores.softmax(-1)))


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_heads_that_read_one_memory_share_the_orders_of_both_keys(heads: int) -> None:
    expected = [4, 5, 5, 6, *[3] * 2 * heads, *([heads] if heads > 1 else [])]
    assert _sizes(Memory(heads), torch.randn(6, 3)) == sorted(expected)


class Levels(nn.Module):
    """The best of all experts of all groups, named by their group and their number in it."""

    def __init__(self, how: str, groups: int = 2, count: int = 4) -> None:
        super().__init__()
        self.how, self.count = how, count
        self.gate, self.out = nn.Linear(3, groups * count), nn.Linear(5, 2)
        self.of_group, self.of_number = nn.Embedding(groups, 5), nn.Embedding(count, 5)

    def forward(self, x: Tensor) -> Tensor:
        best = self.gate(x).topk(2, -1)[1]
        if self.how == "divmod":
            group, number = best // self.count, best % self.count
        else:
            group = torch.div(best, self.count, rounding_mode="floor")
            number = best - group * self.count
        return self.out((self.of_group(group) * self.of_number(number)).sum(1))


def test_quotient_and_remainder_name_groups_and_numbers() -> None:
    assert _sizes(Levels("divmod"), torch.randn(6, 3)) == [2, 4, 5]


def test_a_difference_of_positions_pins() -> None:
    assert 5 in _sizes(Levels("subtracted"), torch.randn(6, 3))


# -------------------------------------------------------------------- any program
@given(st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_programs_that_choose_move_and_read_positions(seed: int) -> None:
    torch.manual_seed(seed)
    net, x = IndexProgram(seed), torch.randn(4, 3)
    found = infer(net, x, verify=False)
    assert not found.unruled
    net(x)
    try:
        assert_sound(net, x, found)
    except AssertionError as error:
        raise AssertionError(f"{error}; the program: {', '.join(net.steps)}") from None
