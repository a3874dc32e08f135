"""What a pass computes and drops: the last block's part of a stream that nothing is made of any more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from automerge import Symmetry, infer
from automerge.testing import assert_sound

torch.set_num_threads(1)
WIDTH, TEXT, HIDDEN = 5, 7, 6
IMAGE, WORDS, TIME = (torch.randn(2, *n, generator=torch.Generator().manual_seed(0)) for n in ((3, 4), (6, 3), (2,)))


class Block(nn.Module):
    """Image and text read each other; the text's part is modulated by pieces of one layer's output (MMDiT)."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation = nn.Linear(8, 3 * TEXT)
        self.read, self.write = nn.Linear(TEXT, WIDTH), nn.Linear(WIDTH, TEXT)
        self.up, self.down = nn.Linear(TEXT, HIDDEN), nn.Linear(HIDDEN, TEXT)

    def forward(self, image: torch.Tensor, text: torch.Tensor, time: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shift, scale, gate = self.modulation(time).unsqueeze(1).chunk(3, -1)
        words = self.read(text * (1 + scale) + shift)
        image = image + words.tanh().mean(1, keepdim=True)
        text = text + gate * self.write(image.mean(1, keepdim=True))
        return image, text + self.down(self.up(text).relu())


class Streams(nn.Module):
    """What is computed of the text last is dropped, after ``end`` made something of it."""

    def __init__(self, end: Callable[..., Any] = lambda self, text: text) -> None:
        super().__init__()
        self.image, self.text, self.time = nn.Linear(4, WIDTH), nn.Linear(3, TEXT), nn.Linear(2, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.out, self.aux, self.end = nn.Linear(WIDTH, 2), nn.Linear(TEXT, 3), end
        self.heads = nn.ModuleList(nn.Linear(TEXT, 2) for _ in range(3))

    def forward(self, image: torch.Tensor, words: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        image, text, time = self.image(image), self.text(words), self.time(time).relu()
        for block in self.blocks:
            image, text = block(image, text, time)
        self.end(self, text)
        return self.out(image)


def found(net: nn.Module, **how: Any) -> tuple[Symmetry, dict[int, set[tuple[str, int]]]]:
    torch.manual_seed(0)
    symmetry = infer(net, (IMAGE, WORDS, TIME), **how)
    assert_sound(net, (IMAGE, WORDS, TIME), symmetry)
    return symmetry, {g.size: {(s.param, s.axis) for s in g.slots} for g in symmetry.sets}


ENDS = {
    "nothing": lambda self, text: text,
    "another order": lambda self, text: text.transpose(0, 1).flip(0),
    "a head": lambda self, text: self.aux(text),
    "like heads": lambda self, text: sum(head(text).tanh() for head in self.heads),
    "its norm": lambda self, text: nn.functional.layer_norm(text, (TEXT,)),
}


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("end", ENDS)
def test_a_stream_moves_with_what_its_dropped_end_was_computed_with(end: str, verify: bool) -> None:
    symmetry, moved = found(Streams(ENDS[end]), verify=verify)
    assert sorted(g.size for g in symmetry.sets) == [WIDTH, HIDDEN, HIDDEN, TEXT, 8]
    assert not symmetry.exchanges
    assert {(f"blocks.{i}.{name}", 0) for i in range(2) for name in ("modulation.weight", "down.weight")} <= moved[TEXT]
    assert (("aux.weight", 1) in moved[TEXT]) == (end == "a head")
    assert any("results that the pass drops" in note for note in symmetry.notes)


def test_what_only_dropped_results_depend_on_has_no_order_of_its_own() -> None:
    symmetry, _ = found(Streams(ENDS["a head"]))
    assert not {("aux.weight", 0), ("aux.bias", 0)} & symmetry._free_masks().keys()
    assert ("blocks.1.up.weight", 0) in symmetry._free_masks()  # it has its order in what follows
    pins = {(p.param, p.axis): p.reason for p in symmetry.pins}
    assert "does not depend" in pins["aux.weight", 0]


def test_a_dropped_result_that_has_an_order_costs_nothing() -> None:
    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inp, self.aux, self.out = nn.Linear(4, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            h = self.inp(image).relu()
            (self.aux(h) + h).cumsum(-1)
            return self.out(h)

    symmetry = infer(Watched(), IMAGE)
    assert [g.size for g in symmetry.sets] == [WIDTH]
    assert any("does not depend on aux.weight" in note for note in symmetry.notes)


def test_pieces_that_nothing_is_computed_with_show_nothing() -> None:
    class Pieces(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inp, self.modulation, self.out = nn.Linear(4, WIDTH), nn.Linear(2, 2 * WIDTH), nn.Linear(WIDTH, 2)

        def forward(self, image: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            scale, _ = self.modulation(time).unsqueeze(1).chunk(2, -1)
            return self.out(self.inp(image) * scale)

    moved = infer(Pieces(), (IMAGE, TIME))._free_masks()
    assert not moved["modulation.weight", 0][WIDTH:].any()


class Joined(nn.Module):
    """Several heads of which all results are joined, and some are cut away: masks of SAM, layers of DETR."""

    def __init__(self, end: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inp, self.keys, self.end = nn.Linear(4, WIDTH), nn.Linear(4, TEXT), end
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, TEXT)) for _ in range(3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.inp(x).relu()
        return self.end(self, [head(h) for head in self.heads], self.keys(x).tanh())


def _masks(self: Joined, heads: list[torch.Tensor], keys: torch.Tensor) -> torch.Tensor:
    """Every head scores the same keys."""
    return (torch.stack(heads, 1) @ keys.mT[:, None])[:, 1:]


def _layers(self: Joined, heads: list[torch.Tensor], keys: torch.Tensor) -> torch.Tensor:
    """Every head gives the result; only the last counts."""
    return torch.stack(heads)[-1]


def _named(self: Joined, heads: list[torch.Tensor], keys: torch.Tensor) -> torch.Tensor:
    return torch.cat(heads, -1)[..., TEXT:]


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    ("end", "sizes"),
    [(_masks, [WIDTH, *[HIDDEN] * 3, TEXT]), (_layers, [WIDTH, *[HIDDEN] * 3]), (_named, [WIDTH, *[HIDDEN] * 3])],
)
def test_a_result_that_is_joined_and_cut_away_is_dropped(end: Any, sizes: list[int], verify: bool) -> None:
    net, x = Joined(end), IMAGE
    symmetry = infer(net, x, verify=verify)
    assert sorted(g.size for g in symmetry.sets) == sizes
    assert_sound(net, x, symmetry)
    assert not symmetry.exchanges
    assert any("results that the pass drops" in note for note in symmetry.notes)
    # what was cut away is as it was
    before = [head(net.inp(x).relu()) for head in net.heads]
    net.load_state_dict(symmetry.apply(net.state_dict(), symmetry.random_element(1)))
    after = [head(net.inp(x).relu()) for head in net.heads]
    same = [torch.allclose(a, b, atol=1e-5) for a, b in zip(before, after, strict=True)]
    assert same == ([False] * 3 if end is _masks else [True] * 3)
