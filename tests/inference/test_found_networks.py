"""What networks of small repositories do: recurrences joined by hand, kernels over all features, gradients inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Normal
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from automerge import TraceError, evaluate, infer, match, merge, trace
from automerge.testing import assert_sound
from tests.inference.networks_hostile import Program
from tests.inference.test_networks import parse, worst_change

lin = lambda i, o: lambda: nn.Linear(i, o)  # noqa: E731
STEPS, MORE = torch.randn(2, 5, 4), torch.randn(3, 7, 4)
IMAGE, OTHER = torch.randn(2, 3, 6, 6), torch.randn(3, 3, 7, 5)


def found(make: Callable[[], nn.Module], sizes: str, *inputs: Any) -> None:
    """The groups are these, by the rules alone and verified, and they hold on all inputs by the independent check."""

    def seeded() -> nn.Module:
        torch.manual_seed(0)
        return make()

    for verify in (False, True):
        symmetry = infer(seeded(), inputs[0], verify=verify)
        assert sorted(g.size for g in symmetry.generators()) == parse(sizes), str(symmetry)
        assert not symmetry.unruled
    for x in inputs:
        assert worst_change(seeded, x if isinstance(x, tuple) else (x,), {}, symmetry) < 1e-9


# ------------------------------------------------------------ recurrences: input and state joined
def _recurrent(s: Any, x: torch.Tensor, front: bool) -> torch.Tensor:
    h = torch.zeros(x.shape[0], 7)
    for t in range(x.shape[1]):
        h = torch.tanh(s.w(torch.cat((h, x[:, t]) if front else (x[:, t], h), 1)))
    return s.out(h)


def _gated(s: Any, x: torch.Tensor) -> torch.Tensor:
    h, c = torch.zeros(x.shape[0], 6), torch.zeros(x.shape[0], 6)
    for t in range(x.shape[1]):
        i, f, o, g = s.w(torch.cat((x[:, t], h), 1)).split(6, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
    return s.out(h)


def _images(s: Any, x: torch.Tensor) -> torch.Tensor:
    h = torch.zeros(x.shape[0], 5, *x.shape[2:])
    for _ in range(2):
        h = s.w(torch.cat((x, h), 1)).tanh()
    return s.out(h.mean((2, 3)))


def _read(s: Any, x: torch.Tensor, packed: bool) -> torch.Tensor:
    """Two heads read one memory of words of three numbers; what they read is beside the next input."""
    memory, words = torch.zeros(x.shape[0], 4, 3), torch.zeros(x.shape[0], 6)
    for t in range(x.shape[1]):
        h = s.w(torch.cat((x[:, t], words), 1)).tanh()
        keys, new = s.keys(h).split([6, 3], 1) if packed else (s.keys(h), s.new(h))
        memory = memory * 0.9 + torch.arange(4.0)[:, None] * new[:, None]
        words = ((keys.view(-1, 2, 3) @ memory.mT).softmax(-1) @ memory).flatten(1)
    return s.out(torch.cat((h, words), 1))


READERS = {"w": lin(10, 5), "out": lin(11, 2)}
RECURRENCES: dict[str, tuple[str, Any, Callable[..., Any], dict[str, Callable[[], Any]]]] = {
    "state behind": ("7", (STEPS, MORE), lambda s, x: _recurrent(s, x, False), {"w": lin(11, 7), "out": lin(7, 2)}),
    "state in front": ("7", (STEPS, MORE), lambda s, x: _recurrent(s, x, True), {"w": lin(11, 7), "out": lin(7, 2)}),
    "gates": ("6", (STEPS, MORE), _gated, {"w": lin(10, 24), "out": lin(6, 2)}),
    "heads of one memory": (
        "5 2 3",
        (STEPS, MORE),
        lambda s, x: _read(s, x, False),
        {**READERS, "keys": lin(5, 6), "new": lin(5, 3)},
    ),
    "heads and memory of one layer": (
        "5 2 3",
        (STEPS, MORE),
        lambda s, x: _read(s, x, True),
        {**READERS, "keys": lin(5, 9)},
    ),
    "images": ("5", (IMAGE, OTHER), _images, {"w": lambda: nn.Conv2d(8, 5, 3, padding=1), "out": lin(5, 2)}),
}


@pytest.mark.parametrize("name", RECURRENCES)
def test_a_first_state_of_zeros_beside_the_input_has_units(name):
    sizes, inputs, forward, parts = RECURRENCES[name]
    found(lambda: Program(forward, parts), sizes, *inputs)


@pytest.mark.parametrize("how", ["ones", "pad", "bias"])
def test_learned_tokens_beside_a_mask_that_is_an_input(how: str) -> None:
    def forward(s: Any, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        rows = x.shape[0]
        if how == "pad":
            mask = F.pad(mask, (4, 0), value=1)
        elif how == "ones":
            mask = torch.cat([torch.ones(rows, 4).to(mask), mask], 1)
        else:
            mask = torch.cat([torch.zeros(rows, 4), (1 - mask.float()) * -1e9], 1)
        k, v = (torch.cat([own.expand(rows, -1, -1), f(x)], 1) for own, f in ((s.own_k, s.k), (s.own_v, s.v)))
        scores = s.q(x) @ k.mT
        scores = scores + mask[:, None] if how == "bias" else scores.masked_fill(mask[:, None] == 0, -1e9)
        return s.out(scores.softmax(-1) @ v)

    own = {n: lambda: nn.Parameter(torch.randn(4, 6)) for n in ("own_k", "own_v")}
    parts = {**own, "q": lin(4, 6), "k": lin(4, 6), "v": lin(4, 6), "out": lin(6, 2)}
    mask = torch.ones(3, 5).long()
    mask[1, 3:] = 0
    found(
        lambda: Program(forward, parts),
        "4 6 6",
        (torch.randn(3, 5, 4), mask),
        (torch.randn(2, 9, 4), torch.ones(2, 9).long()),
    )


@pytest.mark.parametrize("verify", [False, True])
def test_a_sequence_of_one_shows_what_the_zeros_are_when_it_goes_on(verify: bool) -> None:
    net = Program(lambda s, x: _recurrent(s, x, False), {"w": lin(11, 7), "out": lin(7, 2)})
    symmetry = infer(net, STEPS[:, :1], verify=verify)
    (units,) = symmetry.generators()
    assert {(s.param, s.axis) for s in units.slots} == {
        ("w.weight", 0),
        ("w.weight", 1),
        ("w.bias", 0),
        ("out.weight", 1),
    }


def test_tokens_filled_up_with_zeros_stay_in_place():
    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([x, x.new_zeros(x.shape[0], 12 - x.shape[1], 4)], 1)
        return s.out(x + s.up(s.down(x.mT).relu()).mT).sum(1)

    parts = {"down": lin(12, 8), "up": lin(8, 12), "out": lin(4, 2)}
    found(lambda: Program(forward, parts), "8", STEPS, MORE)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_cut_that_only_meets_zeros(steps):
    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        h = torch.zeros(x.shape[0], 7)
        for t in range(steps):
            h = torch.tanh(s.b(x[:, t]) + h @ s.w.weight[:, 4:].t())
        return s.out(h)

    symmetry = infer(Program(forward, {"w": lin(11, 7), "b": lin(4, 7), "out": lin(7, 2)}), STEPS)
    assert [g.size for g in symmetry.generators()] == [7]


# ------------------------------------------------------------ kernels over a whole axis
def test_a_kernel_over_all_features_is_a_product_with_them():
    def words(s: Any, x: torch.Tensor) -> torch.Tensor:
        maps = [c(s.e(x)[:, None]).relu().squeeze(3).amax(2) for c in (s.a, s.b)]
        return s.out(torch.cat(maps, 1))

    parts: dict[str, Callable[[], Any]] = {
        "e": lambda: nn.Embedding(9, 6),
        "a": lambda: nn.Conv2d(1, 4, (2, 6)),
        "b": lambda: nn.Conv2d(1, 5, (3, 6)),
        "out": lin(9, 2),
    }
    found(lambda: Program(words, parts), "4 5 6", torch.randint(0, 9, (2, 7)), torch.randint(0, 9, (3, 11)))


def test_a_kernel_over_the_whole_image_keeps_its_places():
    parts: dict[str, Callable[[], Any]] = {"a": lambda: nn.Conv2d(3, 4, 6), "out": lin(4, 2)}
    found(lambda: Program(lambda s, x: s.out(s.a(x).relu().flatten(1)), parts), "4", IMAGE)


def test_every_group_of_a_kernel_over_all_features_has_its_own_order():
    def heads(s: Any, x: torch.Tensor) -> torch.Tensor:
        h = s.inp(x).relu().unflatten(2, (2, 3)).transpose(1, 2)
        return s.out(s.c(h).tanh().squeeze(3).mean(2))

    parts: dict[str, Callable[[], Any]] = {
        "inp": lin(4, 6),
        "c": lambda: nn.Conv2d(2, 2, (1, 3), groups=2),
        "out": lin(2, 2),
    }
    found(lambda: Program(heads, parts), "2 3x2", STEPS, MORE)


@pytest.mark.parametrize(("groups", "expected"), [(4, "4"), (2, "2 2 2 2 2"), (1, "4 4")])
@pytest.mark.parametrize("padded", [0, 2])
def test_groups_of_a_kernel_over_the_whole_image_move(groups: int, expected: str, padded: int) -> None:
    """(A global depthwise convolution.) Its places stay, in an order of their own in every group."""
    parts: dict[str, Callable[[], Any]] = {
        "a": lambda: nn.Conv2d(3, 4, 1),
        "c": lambda: nn.Conv2d(4, 4, 6 + 2 * padded, groups=groups),
        "out": lin(4, 2),
    }
    forward = lambda s, x: s.out(s.c(F.pad(s.a(x).relu(), [padded] * 4)).relu().flatten(1))  # noqa: E731
    found(lambda: Program(forward, parts), expected, IMAGE)


# ------------------------------------------------------------ gradients inside
def _gradient(energy: Callable[[Any, torch.Tensor], torch.Tensor]) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x = x.detach().clone().requires_grad_()
            return torch.autograd.grad(energy(s, x).pow(2).sum(), x)[0]

    return forward


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2)])
def test_gradients_of_convolutions(kind, groups, kernel, stride):
    parts: dict[str, Callable[[], Any]] = {
        "a": lambda: nn.Conv2d(3, 4, 3, padding=1),
        "b": lambda: kind(4, 6, kernel, stride=stride, padding=kernel // 2, groups=groups),
        "out": lin(6, 1),
    }
    forward = _gradient(lambda s, x: s.out(s.b(s.a(x).tanh()).tanh().mean((2, 3))))
    found(lambda: Program(forward, parts), "4 6" if groups == 1 else "2x3 3x2", IMAGE, OTHER)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_step_down_the_gradient_of_a_kernel(groups, transposed):
    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        convolve = F.conv_transpose2d if transposed else F.conv2d

        def out(w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return s.out(convolve(s.a(x).tanh(), w, b, padding=1, groups=groups).tanh().mean((2, 3)))

        with torch.enable_grad():
            own = [p.detach().clone().requires_grad_() for p in (s.b.weight, s.b.bias)]
            steps = torch.autograd.grad(out(*own).pow(2).sum(), own)
        return out(*(w - 0.1 * step for w, step in zip(own, steps, strict=True)))

    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    parts: dict[str, Callable[[], Any]] = {
        "a": lambda: nn.Conv2d(3, 4, 3, padding=1),
        "b": lambda: kind(4, 6, 3, padding=1, groups=groups),
        "out": lin(6, 1),
    }
    found(lambda: Program(forward, parts), "4 6" if groups == 1 else "2x3 3x2", IMAGE, OTHER)


@pytest.mark.parametrize(
    "window",
    [
        lambda h: F.avg_pool2d(h, 2),
        lambda h: F.interpolate(h, scale_factor=2, mode="bilinear"),
        lambda h: F.interpolate(h, scale_factor=2),
        lambda h: F.pad(h, (1, 1, 1, 1), mode="reflect"),
    ],
    ids=["pool", "bilinear", "nearest", "reflect"],
)
def test_gradients_of_windows(window):
    parts: dict[str, Callable[[], Any]] = {"a": lambda: nn.Conv2d(3, 4, 3), "out": lin(4, 1)}
    forward = _gradient(lambda s, x: s.out(window(s.a(x).tanh()).sin().mean((2, 3))))
    found(lambda: Program(forward, parts), "4", IMAGE, OTHER)


# ------------------------------------------------------------ what a pass writes, draws, and holds
@pytest.mark.parametrize("row", [True, False])
def test_a_normalisation_in_training_leaves_the_statistics_as_they_were(row):
    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        mean, var = (s.m[0], s.v[0]) if row else (s.m, s.v)
        h = F.batch_norm(s.a(x), mean, var, training=True)
        return s.out(h) + (mean - var).sum()  # as they are after it

    shape = (2, 6) if row else (6,)
    parts: dict[str, Callable[[], Any]] = {
        "a": lin(4, 6),
        "m": lambda: nn.Parameter(torch.zeros(shape), requires_grad=False),
        "v": lambda: nn.Parameter(torch.ones(shape), requires_grad=False),
        "out": lin(6, 2),
    }
    net, x = Program(forward, parts), torch.randn(5, 4)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    symmetry = infer(net, x)
    assert [g.size for g in symmetry.generators()] == [6]
    assert any("writes to m, v" in note for note in symmetry.notes)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())

    graph = trace(net, x)
    names = [n.meta["name"] for n in graph.graph.nodes if n.op == "placeholder" and n.meta["kind"] == "state"]
    other = torch.randn(9, 4)
    with torch.no_grad():
        (replayed,) = graph(*(before[n].clone() for n in names), other)
        assert torch.allclose(replayed, net.eval()(other), atol=1e-6)


def test_samples_by_reparametrisation_have_a_rule():
    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        h = s.a(x).relu()
        return Normal(s.mean(h), s.scale(h).exp()).rsample()

    symmetry = infer(Program(forward, {"a": lin(4, 6), "mean": lin(6, 2), "scale": lin(6, 2)}), STEPS[0], strict=True)
    assert [g.size for g in symmetry.generators()] == [6]
    assert any("draws random numbers" in note for note in symmetry.notes)


def test_weights_that_the_state_dict_lacks_are_named():
    held = [nn.Linear(6, 6)]  # of a list of Python that the module keeps, say
    net = Program(lambda s, x: s.out(held[0](s.a(x)).relu()), {"a": lin(4, 6), "out": lin(6, 2)})
    (note,) = (n for n in infer(net, STEPS[0]).notes if "state dict does not hold" in n)
    assert "test_found_networks.py" in note
    assert "nn.ModuleList" in note
    assert not any("does not hold" in n for n in infer(nn.Linear(4, 2), STEPS[0]).notes)


def test_a_tuple_with_names_is_one_input():
    def forward(s: Any, packed: PackedSequence) -> torch.Tensor:
        return s.out(pad_packed_sequence(s.g(packed)[0])[0])

    net = Program(forward, {"g": lambda: nn.GRU(4, 6), "out": lin(6, 2)})
    packed = pack_padded_sequence(STEPS, torch.tensor([5, 3]), batch_first=True)
    assert [g.size for g in infer(net, packed).generators()] == [6]


def test_products_with_a_sparse_graph():
    graph = (torch.rand(5, 5) > 0.5).float().to_sparse()

    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        return s.out(torch.sparse.mm(graph.to(x.dtype), s.a(x)).relu())

    found(lambda: Program(forward, {"a": lin(4, 6), "out": lin(6, 2)}), "6", STEPS[0], MORE[0, :5])


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_products_with_a_sparse_graph_that_the_forward_pass_turns():
    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        graph = torch.eye(5, dtype=x.dtype).to_sparse_csr().t()
        return s.out((graph @ s.a(x)).relu())

    symmetry = infer(Program(forward, {"a": lin(4, 6), "out": lin(6, 2)}), STEPS[0])
    assert [g.size for g in symmetry.generators()] == [6]


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.strided])
def test_a_graph_that_is_an_input(layout: torch.layout):
    """The adjacency of a graph may be sparse; the inputs and the data of a merge are used as they are."""
    graph = (torch.rand(5, 5, generator=torch.Generator().manual_seed(0)) > 0.5).float()

    def forward(s: Any, x: torch.Tensor, adjacency: torch.Tensor) -> torch.Tensor:
        h = torch.relu(torch.spmm(adjacency, x @ s.w) + s.b)
        return s.out(torch.sparse.mm(adjacency, h))

    parts = {"w": lambda: nn.Parameter(torch.randn(4, 6)), "b": lambda: nn.Parameter(torch.randn(6)), "out": lin(6, 2)}
    torch.manual_seed(0)
    model, inputs = (
        Program(forward, parts).eval(),
        (STEPS[0], graph if layout is torch.strided else graph.to_sparse(layout=layout)),
    )
    symmetry = infer(model, inputs)
    assert [g.size for g in symmetry.generators()] == [6]
    assert_sound(model, inputs, symmetry)
    assert inputs[1].layout is layout
    other = Program(forward, parts).eval()
    other.load_state_dict(symmetry.apply(model.state_dict(), symmetry.random_element(0)))
    merged = merge([model, other], inputs, data=[inputs], coordinates=0)
    torch.testing.assert_close(merged.state_dict["w"], model.state_dict()["w"])


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_a_graph_in_a_sparse_buffer(persistent, layout):
    """Whisper's alignment heads, the adjacency of a transductive GCN."""
    graph = (torch.rand(5, 5, generator=torch.Generator().manual_seed(0)) > 0.5).float()

    def network(seed):
        torch.manual_seed(seed)
        net = Program(lambda s, x: s.out(torch.sparse.mm(s.graph, s.a(x)).relu()), {"a": lin(3, 6), "out": lin(6, 2)})
        net.register_buffer("graph", graph.to_sparse(layout=layout), persistent=persistent)
        return net

    models, x = [network(seed) for seed in range(2)], torch.randn(5, 3)
    symmetry = infer(models[0], x)
    assert [(g.size, len(g.slots)) for g in symmetry.generators()] == [(6, 3)]
    assert "graph" not in symmetry.shapes
    assert_sound(models[0], (x,), symmetry=symmetry)
    states = [m.state_dict() for m in models]
    assert len(match(states, symmetry)) == len(match(models, symmetry)) == 2
    data = [(x, torch.tensor([0, 1, 0, 1, 1]))]
    result = merge(states, x, architecture=network(2), data=data, repair="repair")
    assert "graph" not in result.state_dict
    assert any("graph of the state dict" in note for note in result.notes) is persistent
    made = result.load_into(network(3))
    assert evaluate(made, data).loss == evaluate((network(4), result.state_dict), data).loss
    assert torch.equal(made.graph.to_dense(), graph)


def test_a_sparse_parameter_is_refused():
    net = Program(lambda s, x: s.out(x), {"out": lin(3, 2)})
    net.graph = nn.Parameter(torch.eye(3).to_sparse())
    with pytest.raises(TraceError, match=r"graph is a sparse parameter .* make it a dense one, or a buffer"):
        infer(net, STEPS[0])


@pytest.mark.parametrize(
    ("pool", "sizes"),
    [
        (lambda h: F.max_pool1d(h[:, None], 3)[:, 0], "2 3 3 5"),
        (lambda h: F.avg_pool2d(h[:, None, None], (1, 3))[:, 0, 0], "2 3 3 5"),
        (lambda h: F.adaptive_max_pool1d(h[:, None], 2)[:, 0], "2 3 3 5"),
        (lambda h: F.max_pool1d(h[:, None], 3, stride=3, padding=1)[:, 0], "5"),
        (lambda h: F.max_pool1d(h[:, None], 2, stride=4)[:, 0], "5"),
        (lambda h: F.max_pool1d(h[:, None], 3, stride=1, dilation=2)[:, 0], "5"),
    ],
)
def test_maxout_by_pooling(pool: Callable[[torch.Tensor], torch.Tensor], sizes: str):
    """Windows of units side by side are groups of units; those that overlap, or leave units out, tell them apart."""
    make = {"inp": lin(4, 5), "a": lin(5, 6), "out": lin(2, 2)}
    found(lambda: Program(lambda s, x: s.out(pool(s.a(s.inp(x)))), make), sizes, STEPS[0], MORE[0])


# ------------------------------------------------------------ experts of recommenders
def _expert() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 4))


def _experts(count: int) -> Callable[[], nn.Module]:
    return lambda: nn.ModuleList(_expert() for _ in range(count))


def _mixed(outputs: list[torch.Tensor], scores: torch.Tensor) -> torch.Tensor:
    return (torch.stack(outputs, 1) * scores.softmax(-1)[..., None]).sum(1)


def _extracted(s: Any, x: torch.Tensor) -> torch.Tensor:
    """Progressive layered extraction: every task has experts of its own, and all share some."""
    first, second, shared = ([e(x) for e in some] for some in (s.first, s.second, s.shared))
    every = _mixed(first + second + shared, s.every(x))
    return torch.cat([_mixed(first + shared, s.one(x)), _mixed(second + shared, s.two(x)), every], 1)


def _asked_anew(s: Any, x: torch.Tensor) -> torch.Tensor:
    return sum(e(x) * s.gate(x)[:, i : i + 1] for i, e in enumerate(s.experts))  # type: ignore[return-value]


def _used_elsewhere(s: Any, x: torch.Tensor) -> torch.Tensor:
    four, three = [e(x) for e in s.four], [e(x) for e in s.three]
    return torch.cat([sum(four), torch.stack(three).amax(0), four[0] * three[0]], 1)  # type: ignore[list-item]


def _weights_stacked(s: Any, x: torch.Tensor) -> torch.Tensor:
    first, last = (torch.stack([e[i].weight for e in s.experts]) for i in (0, 2))
    return (torch.einsum("bi,ehi->ebh", x, first).tanh() @ last.mT * s.gate(x).T[..., None]).sum(0)


def _weights_joined(s: Any, x: torch.Tensor) -> torch.Tensor:
    first, last = (torch.cat([e[i].weight for e in s.experts], i // 2) for i in (0, 2))
    return (x @ first.T).tanh() @ last.T


def _masked(s: Any, x: torch.Tensor) -> torch.Tensor:
    """A weight and its mask are no branches, though their product is that of either order."""
    return F.linear(sum(e(x) for e in s.experts), s.gate.weight * s.mask.weight)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("forward", "modules", "sizes"),
    [
        (_weights_stacked, {"experts": _experts(3), "gate": lin(4, 3)}, [3]),
        (_weights_joined, {"experts": _experts(3)}, [3]),
        (_masked, {"experts": _experts(3), "gate": lin(4, 3), "mask": lin(4, 3)}, [3]),
        (
            _extracted,
            {n: _experts(k) for n, k in (("first", 3), ("second", 3), ("shared", 2))}
            | {"one": lin(4, 5), "two": lin(4, 5), "every": lin(4, 8)},
            [2, 3, 3],
        ),
        (_asked_anew, {"experts": _experts(3), "gate": lin(4, 3)}, [3]),
        (_used_elsewhere, {"four": _experts(4), "three": _experts(3)}, [2, 3]),
    ],
    ids=lambda f: getattr(f, "__name__", ""),
)
def test_experts_that_are_interchangeable(forward: Any, modules: Any, sizes: list[int]) -> None:
    torch.manual_seed(0)
    net = Program(forward, modules)
    symmetry = assert_sound(net, STEPS[0], infer(net, STEPS[0]))
    assert sorted(e.size for e in symmetry.exchanges) == sizes


class _Stacked(nn.Module):
    """Experts in one parameter, by layer and number (DCN-mix)."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.u = nn.Parameter(torch.randn(2, 3, 4, 5)), nn.Parameter(torch.randn(2, 3, 5, 4))
        self.gates = nn.ModuleList(nn.Linear(4, 1) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in range(2):
            x = x + torch.stack(
                [(x @ self.v[i][e]).tanh() @ self.u[i][e] * g(x) for e, g in enumerate(self.gates)]
            ).sum(0)
        return x


def test_experts_in_a_parameter_of_several_layers() -> None:
    net = _Stacked()
    symmetry = assert_sound(net, STEPS[0], infer(net, STEPS[0]))
    assert [e.size for e in symmetry.exchanges] == [3]
    alone = {w for g in symmetry.sets for s in g.slots if s.param == "v" for w in [s.within] if len(w) == 2}
    assert len(alone) == 6  # the hidden units of each expert in each layer


# ------------------------------------------------------------ capsules: an order inside each, however many share weights
def _squash(s: torch.Tensor) -> torch.Tensor:
    n = s.square().sum(-1, keepdim=True)
    return n / (1 + n) * s / (n.sqrt() + 1e-8)


class Capsules(nn.Module):
    """Three layers of capsules that choose by agreement (Sabour et al. 2017), as einsum: 6 of 3, 5 of 4, 3 outputs of 2."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(5, 18)
        self.first, self.second = nn.Parameter(torch.randn(5, 6, 4, 3)), nn.Parameter(torch.randn(3, 5, 2, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        u = _squash(self.inp(x).view(-1, 6, 3))
        for w in (self.first, self.second):
            votes = torch.einsum("jidk,bik->bjid", w, u)
            b = torch.zeros(votes.shape[:3])
            for _ in range(3):
                u = _squash(torch.einsum("bji,bjid->bjd", b.softmax(1), votes))
                b = b + torch.einsum("bjd,bjid->bji", u, votes)
        return u.norm(dim=-1)


def test_capsules_have_orders_of_their_own_in_both_layers() -> None:
    found(Capsules, "6 5 3x6 4x5 2x3", torch.randn(2, 5), torch.randn(7, 5))


def test_a_split_that_comes_to_nothing_gives_way() -> None:
    """The inputs that a sum runs over show no order for each of the outputs, but the outputs do for their entries."""

    def program(s: Any, x: torch.Tensor) -> torch.Tensor:
        votes = torch.einsum("jidk,bik->bjid", s.w, x)
        chosen = torch.einsum("bji,bjid->bjd", votes.square().sum(-1).softmax(1), votes)
        return torch.einsum("bjd,jdp->bp", chosen, s.v)

    parts = {"w": lambda: nn.Parameter(torch.randn(5, 3, 4, 2)), "v": lambda: nn.Parameter(torch.randn(5, 4, 2))}
    found(lambda: Program(program, parts), "5 4x5", torch.randn(2, 3, 2), torch.randn(4, 3, 2))
