"""Small programs that were given wrong groups: positions that two readings of one tensor tell apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from automerge import infer
from automerge.testing import assert_sound
from tests.inference.networks_hostile import Program
from tests.inference.test_found_networks import found, lin

Forward = Callable[[Any, torch.Tensor], torch.Tensor]
ROWS, MORE = torch.randn(6, 3), torch.randn(6, 3)


def par(*shape: int) -> Callable[[], nn.Parameter]:
    return lambda: nn.Parameter(torch.randn(shape))


# ------------------------------------------------------------ a function of all pieces is not what they were cut from
def _joined(s: Any, x: torch.Tensor) -> torch.Tensor:
    h = s.inp(x)
    one, two = h.chunk(2, -1)
    f = torch.cat([one.tanh(), two.tanh()], -1)
    return s.out(torch.cat([h[:, :3], f[:, 3:]], -1))


def _after_a_function(s: Any, x: torch.Tensor) -> torch.Tensor:
    h = s.inp(x)
    f = torch.cat([piece.tanh() for piece in h.split([2, 4], -1)], -1)
    return s.out(torch.cat([h.sin()[:, :3], f.sin()[:, 3:]], -1))


def _folded(s: Any, x: torch.Tensor) -> torch.Tensor:
    h = s.inp(x)
    f = torch.cat([piece.tanh() for piece in h.chunk(3, -1)], -1)
    return s.out(h[:, :3] + f[:, 3:])


@pytest.mark.parametrize(
    ("forward", "sizes"),
    [(_joined, "3 3"), (_after_a_function, "3 3"), (_folded, "3")],
    ids=["join", "function", "fold"],
)
def test_pieces_joined_after_a_function_are_another_tensor(forward: Forward, sizes: str) -> None:
    parts = {"inp": lin(3, 6), "out": lin(3 if forward is _folded else 6, 2)}
    found(lambda: Program(forward, parts), sizes, ROWS, MORE)


# ------------------------------------------------------------ two joint orders that share two letters
def test_pairs_that_two_tables_have_in_different_orders() -> None:
    """The pairs (t, k) can be exchanged, and within each the other positions of both tables."""

    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        a, b = s.a.view(2, 2, 3), s.b.view(3, 2, 2)
        product = a[:, :, :, None] * b.transpose(0, 1)[:, None]
        return x.sum() * product.sin().exp().sum()

    found(lambda: Program(forward, {"a": par(12), "b": par(12)}), "2x12 6", ROWS, MORE)


# ------------------------------------------------------------ rows that are read several times
def test_how_often_a_row_is_read_counts() -> None:
    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        rows = s.w.tanh()
        return x.sum() * ((rows[[0, 1, 1, 2, 3, 3]] * s.scale).sin().sum() + rows[2].exp().sum())

    found(lambda: Program(forward, {"w": par(4, 3), "scale": par(3)}), "2 3", ROWS, MORE)


@pytest.mark.parametrize("how", ["index", "cat"])
def test_matrices_read_by_several_rows(how: str) -> None:
    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        up, down = (torch.cat([w] * 3) if how == "cat" else w[[0, 1, 1, 0, 0, 1]] for w in (s.up, s.down))
        return torch.bmm(torch.bmm(x[:, None], up).tanh(), down)

    sizes = "4 4" if how == "index" else "4"  # matrices joined along their first axis keep one common order
    found(lambda: Program(forward, {"up": par(2, 3, 4), "down": par(2, 4, 2)}), sizes, ROWS, MORE)


def test_windows_over_several_axes_in_one_line() -> None:
    """Each of three orders is refined by the others; that came to no end."""

    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        windows = s.w.reshape(-1).unfold(0, 3, 1) * torch.arange(30.0)[:, None]
        return x.sum() * (windows.sin() @ s.v).exp().sum()

    found(lambda: Program(forward, {"w": par(4, 2, 4), "v": par(3, 2)}), "2", ROWS, MORE)


# ------------------------------------------------------------ chosen in no particular order
def _beside_copies(s: Any, h: torch.Tensor) -> torch.Tensor:
    """What is computed from copies of the rows cannot be tried: whole numbers that depend on the data are not there."""
    values = h.topk(4, sorted=False).values
    copies = h[:, None].expand(-1, 4, -1) * (h.argmax(0) + 1)
    return s.out(values * copies.sum(-1))


@pytest.mark.parametrize(
    ("read", "sizes"),
    [
        (lambda s, h: s.out(h.topk(4, sorted=False).values), ""),
        (lambda s, h: s.out(h.gather(1, h.topk(4, sorted=False).indices).exp()), ""),
        (lambda s, h: s.out(h.topk(4, sorted=False).values.sort().values), "9"),
        (lambda s, h: h.gather(1, h.topk(4, sorted=False).indices).exp().sum(1) * s.out.weight.sum(), "2 4 9"),
        (lambda s, h: s.out((h.topk(4, sorted=False).values - 1).relu()), ""),
        (_beside_copies, ""),
        (lambda s, h: s.out(F.hardtanh(h.topk(4, sorted=False).values, 2, 3)), ""),
        (lambda s, h: s.out(h.topk(4, sorted=False).values.floor()), ""),
    ],
    ids=["values", "positions", "sorted", "summed", "threshold", "beside copies", "bounds", "whole"],
)
def test_the_order_of_an_unsorted_choice_means_nothing(read: Callable[[Any, torch.Tensor], Any], sizes: str) -> None:
    """It depends on the order of what is chosen from, so that this stays where something is read in that order."""
    parts = {"inp": lin(3, 9), "out": lambda: nn.Linear(4, 2, bias=False)}
    found(lambda: Program(lambda s, x: read(s, s.inp(x)), parts), sizes, ROWS, MORE)


# ------------------------------------------------------------ what is written, and where it was found
@pytest.mark.parametrize("reduce", ["add", "multiply"])
def test_what_is_there_counts_where_something_is_added(reduce: Any) -> None:
    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        at = torch.tensor([2, 0, 1, 3]).expand(x.shape[0], 4)
        return s.out(torch.scatter(s.a(x), 1, at, s.b(x), reduce=reduce))

    found(lambda: Program(forward, {"a": lin(3, 4), "b": lin(3, 4), "out": lin(4, 2)}), "", ROWS, MORE)


def test_the_last_row_copied_to_a_place_stays() -> None:
    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        rows = torch.index_copy(s.a.sin(), 0, torch.tensor([0, 0, 2]), s.b.sin())
        return x.sum() * rows.exp().sum()

    found(lambda: Program(forward, {"a": par(4, 2), "b": par(3, 2)}), "2", ROWS, MORE)


def test_the_imaginary_part_of_a_conjugate_has_a_rule() -> None:
    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        return s.out(torch.complex(s.a(x), s.b(x)).conj().imag)

    found(lambda: Program(forward, {"a": lin(3, 4), "b": lin(3, 4), "out": lin(4, 2)}), "4", ROWS, MORE)


@pytest.mark.parametrize("window", [(1, 1), (2, 1)])
def test_where_a_window_of_one_column_has_its_largest_entry_names_the_column(window: tuple[int, int]) -> None:
    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        images = s.inp(x)[:, None, None] * s.rows
        return s.out(F.max_pool2d(images, window, return_indices=True)[1].to(x.dtype).sin().sum((1, 2)))

    found(lambda: Program(forward, {"inp": lin(3, 4), "rows": par(1, 1, 2, 1), "out": lin(4, 2)}), "", ROWS, MORE)


@pytest.mark.parametrize("column", [lambda w: w[:, 1], lambda w: w.T.unbind(0)[1], lambda w: w.view(-1)[1:][2:7]])
def test_a_view_of_memory_outside_its_operand_reads_what_that_is_a_view_of(column: Callable[[Any], Any]) -> None:
    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        w = s.w.exp()
        return x.sum() * (torch.as_strided(column(w), (4,), (3,), 0).sum() + (w.sin().exp() * s.row).sum())

    with torch.random.fork_rng():
        model = Program(forward, {"w": par(4, 3), "row": par(3)})
        symmetry = infer(model, ROWS, verify=False)
    assert symmetry.unruled
    assert not symmetry.generators()


@pytest.mark.parametrize(
    "rows",
    [
        lambda h: h[:, None].expand(-1, 2, -1).reshape(-1, 6),
        lambda h: h[torch.arange(2 * len(h)) // 2],
        lambda h: h.repeat_interleave(2, 0).clamp(max=1e3),
    ],
    ids=["expanded", "looked up", "repeated"],
)
def test_experts_chosen_in_no_particular_order_are_free(rows: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """A token's row is read for each of its experts: the same row, in whatever order they are listed."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inp, self.gate, self.out = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(6, 2)
            self.up, self.down = nn.Parameter(torch.randn(5, 6, 3)), nn.Parameter(torch.randn(5, 3, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.inp(x)
            weight, chosen = self.gate(h).softmax(-1).topk(2, -1, sorted=False)
            up, down = self.up[chosen.flatten()], self.down[chosen.flatten()]
            y = torch.bmm(torch.bmm(rows(h)[:, None], up).relu(), down)[:, 0] * weight.reshape(-1, 1)
            return self.out(y.view(len(h), 2, 6).sum(1))

    symmetry = infer(Experts(), torch.randn(7, 4))
    assert any({(s.param, s.axis) for s in g.slots} >= {("up", 0), ("gate.weight", 0)} for g in symmetry.generators())


@pytest.mark.parametrize(
    "windows",
    [
        lambda y: y.as_strided((len(y), 3, 4, 5), (y.stride(0), 2 * y.stride(1), y.stride(1), y.stride(2))),
        lambda y: y.unfold(1, 4, 2).transpose(2, 3),
        lambda y: F.pad(y.transpose(1, 2), (2, 2), mode="reflect").transpose(1, 2)[:, :12].unflatten(1, (3, 4)),
    ],
    ids=["strided", "unfolded", "reflected"],
)
def test_heads_that_are_one_axis_with_the_batch_survive_windows(
    windows: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """(Longformer's attention: overlapping windows of the memory of all heads.)"""

    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        q, k = (windows((x @ w).view(2, 8, 3, 5).transpose(1, 2).reshape(6, 8, 5)) for w in (s.q, s.k))
        return (q @ k.transpose(2, 3)).softmax(-1).reshape(2, 3, -1).transpose(1, 2) @ s.out

    with torch.random.fork_rng():
        model = Program(forward, {"q": par(4, 15), "k": par(4, 15), "out": par(3, 2)})
        symmetry = infer(model, torch.randn(2, 8, 4))
    assert sorted(g.size for g in symmetry.generators()) == [3, 5, 5, 5]


@pytest.mark.parametrize(
    ("read", "out", "expected"),
    [
        (lambda y: y.relu().flatten(1), 15, [2, 3, 3, 3, 3, 3, 3]),
        (lambda y: y.softmax(2).flatten(1), 15, [2, 3, 3, 3, 3, 3, 3]),
        (lambda y: y.sum(1), 3, [2, 3, 3]),
        (lambda y: y.softmax(1).flatten(1), 15, [2, 3, 3]),
        (lambda y: (y * y.flip(1)).sum(2), 5, None),
    ],
    ids=["apart", "normalised", "added", "compared", "turned round"],
)
def test_heads_that_are_joined_keep_an_order_each(
    read: Callable[[Any], Any], out: int, expected: list[int] | None
) -> None:
    """(ConvBert joins heads of attention and heads of convolutions.) Three heads and two, of three dimensions."""

    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        one = (x @ s.a).view(-1, 3, 3) * (x @ s.first)[..., None]
        two = (x @ s.b).view(-1, 2, 3).tanh() * (x @ s.second)[..., None]
        return read(torch.cat([one, two], 1)) @ s.out

    parts = {"a": par(3, 9), "b": par(3, 6), "first": par(3, 3), "second": par(3, 2), "out": par(out, 2)}
    with torch.random.fork_rng():
        model = Program(forward, parts)
        symmetry = infer(model, ROWS)
    if expected is not None:
        assert sorted(g.size for g in symmetry.generators()) == expected
    assert_sound(model, ROWS, symmetry)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_tangents_of_a_function_have_a_rule() -> None:
    def forward(s: Any, x: torch.Tensor) -> Any:
        return torch.func.jvp(lambda z: s.b(s.a(torch.cat([z, z.new_ones(len(z), 1)], 1)).tanh()), (x,), (x.cos(),))

    symmetry = infer(Program(forward, {"a": lin(5, 6), "b": lin(6, 4)}), torch.randn(3, 4))
    assert [g.size for g in symmetry.generators()] == [6]
    assert not symmetry.unruled
