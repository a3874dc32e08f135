"""Small random programs that choose positions, move the index tensors about, compute with them, and read by them."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS, CODES, WIDTH = 3, 4, 2
Step = Callable[["IndexProgram", Tensor, random.Random], Tensor]


class IndexProgram(nn.Module):
    """A choice of one of ``CODES`` for each of ``GROUPS``, moved and read in the way that a seed says.

    Attributes:
        steps: what the last pass did, for the report of a failure.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed, self.steps = seed, []
        self.one, self.two = nn.Linear(3, GROUPS * CODES), nn.Linear(3, GROUPS * CODES)
        self.queries, self.keys = nn.Linear(3, GROUPS * WIDTH), nn.Parameter(torch.randn(GROUPS, CODES, WIDTH))
        self.tables, self.flat = nn.Parameter(torch.randn(GROUPS, CODES, WIDTH)), nn.Embedding(GROUPS * CODES, WIDTH)
        self.table, self.pairs = nn.Embedding(CODES, WIDTH), nn.Embedding(CODES * CODES, WIDTH)
        self.groups, self.last = nn.Embedding(GROUPS, WIDTH), nn.Linear(GROUPS * WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        draw, self.steps = random.Random(self.seed), []
        out = torch.zeros(len(x), GROUPS, WIDTH, dtype=x.dtype)
        for _ in range(draw.choice([1, 1, 2])):
            index = self.moved(x, draw)
            for _ in range(draw.choice([1, 1, 2])):
                out = out + self.pick(READS, draw)(self, index, x, draw)
        return self.last(out.flatten(1).tanh())

    def pick(self, steps: dict[str, Callable[..., Tensor]], draw: random.Random) -> Callable[..., Tensor]:
        name = draw.choice(sorted(steps))
        self.steps.append(name)
        return steps[name]

    def scores(self, x: Tensor, draw: random.Random) -> Tensor:
        """Rows, groups, codes."""
        return self.pick(SCORES, draw)(self, x)

    def moved(self, x: Tensor, draw: random.Random) -> Tensor:
        """Rows, groups: the number of a code."""
        index = self.pick(CHOICES, draw)(self.scores(x, draw))
        for _ in range(draw.choice([0, 0, 1, 2])):
            index = self.pick(MOVES, draw)(index, x)
        return index


SCORES: dict[str, Callable[..., Tensor]] = {
    "linear": lambda s, x: s.one(x).view(-1, GROUPS, CODES),
    "softmax": lambda s, x: s.two(x).view(-1, GROUPS, CODES).softmax(-1),
    "keys": lambda s, x: torch.einsum("bgd,gkd->bgk", s.queries(x).view(-1, GROUPS, WIDTH), s.keys),
    "codes first": lambda s, x: s.two(x).view(-1, CODES, GROUPS).transpose(1, 2),
}
CHOICES: dict[str, Callable[..., Tensor]] = {
    "argmax": lambda p: p.argmax(-1),
    "argmin": lambda p: p.transpose(1, 2).argmin(1),
    "max": lambda p: p.max(-1)[1],
    "second": lambda p: p.topk(2, -1)[1][..., 1],
    "sorted": lambda p: p.argsort(-1)[..., 0],
}
MOVES: dict[str, Callable[..., Tensor]] = {
    "turned": lambda i, x: i.t().contiguous().t(),
    "flipped": lambda i, x: i.flip(1),
    "viewed": lambda i, x: i.reshape(-1).view(-1, GROUPS),
    "cut and joined": lambda i, x: torch.cat([i[:, 1:], i[:, :1]], 1),
    "stacked": lambda i, x: torch.stack([i[:, 2], i[:, 0], i[:, 1]], 1),
    "in another type": lambda i, x: i.to(torch.int32).to(x.dtype).long(),
    "looked up": lambda i, x: i[:, torch.tensor([1, 2, 0])],
    "one for all": lambda i, x: i[:, :1].expand(-1, GROUPS),
    "either": lambda i, x: torch.where(x[:, :1] > 0, i, i.flip(1)),
    "the second in places": lambda i, x: torch.where(x[:, 1:2] > 0.3, i, 1),
    "filled": lambda i, x: i.masked_fill(x[:, :1] > 0.5, 2),
    "there and back": lambda i, x: (i + torch.arange(GROUPS) * CODES) % CODES,
    "times and over": lambda i, x: i * 3 // 3,
}


def _scattered(s: IndexProgram, i: Tensor, x: Tensor, draw: random.Random) -> Tensor:
    ones = torch.zeros(len(x), GROUPS, CODES, dtype=x.dtype).scatter(-1, i[..., None], 1.0)
    return ones @ s.table.weight


def _slots(s: IndexProgram, i: Tensor, x: Tensor, draw: random.Random) -> Tensor:
    at = i + torch.arange(GROUPS) * CODES
    ones = torch.zeros(len(x), GROUPS * CODES, dtype=x.dtype).scatter(1, at, 1.0)
    return torch.einsum("bgk,gkd->bgd", ones.view(-1, GROUPS, CODES), s.tables)


def _sent(s: IndexProgram, i: Tensor, x: Tensor, draw: random.Random) -> Tensor:
    rows = s.queries(x).view(-1, GROUPS, WIDTH)
    room = torch.zeros(len(x), CODES, WIDTH, dtype=x.dtype).scatter_add(1, i[..., None].expand(-1, -1, WIDTH), rows)
    return (room * s.table.weight).sum(1, keepdim=True).expand(-1, GROUPS, -1)


def _of_two(s: IndexProgram, i: Tensor, j: Tensor, join: Callable[..., Tensor], dim: int) -> Tensor:
    both = join([i + torch.arange(GROUPS) * CODES, j + torch.arange(GROUPS) * CODES], dim)
    one, two = s.tables.reshape(-1, WIDTH)[both].chunk(2, dim)
    return (one * two).view(len(i), GROUPS, WIDTH)


def _best_of_all(s: IndexProgram, i: Tensor, x: Tensor, draw: random.Random) -> Tensor:
    best = s.scores(x, draw).flatten(1).topk(GROUPS, -1)[1]
    return s.groups(best // CODES) * s.table(best % CODES) * s.table(i)


READS: dict[str, Callable[..., Tensor]] = {
    "one hot": lambda s, i, x, draw: torch.einsum("bgk,gkd->bgd", F.one_hot(i, CODES).to(x.dtype), s.tables),
    "embedding": lambda s, i, x, draw: s.table(i),
    "beside the group": lambda s, i, x, draw: s.tables[torch.arange(GROUPS), i],
    "with offsets": lambda s, i, x, draw: s.flat(i + torch.arange(GROUPS) * CODES),
    "rows of all": lambda s, i, x, draw: s.tables.reshape(-1, WIDTH)[i + torch.arange(GROUPS) * CODES],
    "compared": lambda s, i, x, draw: (i[..., None] == torch.arange(CODES)).to(x.dtype) @ s.table.weight,
    "is the second": lambda s, i, x, draw: (i == 1).to(x.dtype)[..., None] * s.table.weight[0],
    "two with offsets": lambda s, i, x, draw: _of_two(
        s, i, s.moved(x, draw), draw.choice([torch.cat, torch.stack]), draw.choice([0, 1])
    ),
    "alike": lambda s, i, x, draw: (i == s.moved(x, draw)).to(x.dtype)[..., None] * s.table.weight[0],
    "gathered": lambda s, i, x, draw: s.scores(x, draw).gather(-1, i[..., None]) * s.table.weight[1],
    "pairs": lambda s, i, x, draw: s.pairs(i * CODES + s.moved(x, draw)),
    "counted": lambda s, i, x, draw: (torch.bincount(i.reshape(-1), minlength=CODES).to(x.dtype) @ s.table.weight)[
        None, None
    ],
    "as a number": lambda s, i, x, draw: i.to(x.dtype)[..., None] * s.table.weight[0],
    "one by one": lambda s, i, x, draw: torch.stack([s.tables[g][i[:, g]] for g in range(GROUPS)], 1),
    "scattered": _scattered,
    "slots": _slots,
    "sent": _sent,
    "best of all": _best_of_all,
}
