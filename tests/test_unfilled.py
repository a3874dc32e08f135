"""Products that are not computed: the same graphs as with all numbers, and the forms that kernels give."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

import automerge._recorder
from automerge import infer, trace
from automerge._unfilled import _FUNCTIONS, followed, unfilled, unwritten
from automerge.testing import Network, networks
from tests.inference import networks_hostile
from tests.inference.networks_hostile import Program
from tests.inference.test_networks import ALL

aten = torch.ops.aten


def described(graph: fx.GraphModule) -> list[Any]:
    """All that inference reads of a graph, constants' values included."""
    names = {n: i for i, n in enumerate(graph.graph.nodes)}

    def form(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if not value.is_meta and value.layout is torch.strided and value.numel() < 4096:
            return (value.dtype, value.shape, value.stride(), str(value.tolist()))
        return (value.dtype, value.shape, value.stride() if value.layout is torch.strided else None)

    rows = []
    for n in graph.graph.nodes:
        args = fx.node.map_arg((n.args, n.kwargs), lambda a: names[a])
        value = n.meta.get("val")
        shown = [form(v) for v in value] if isinstance(value, list | tuple) else form(value)
        rows.append((n.op, str(n.target), str(args), str(shown)))
    return [*rows, graph.meta["trace"].data_dependent, graph.meta["trace"].aliases]


def both(model: nn.Module, args: Any, kwargs: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], list[Any]]:
    torch.manual_seed(0)
    quick = described(trace(model, args, kwargs, values=False))
    with monkeypatch.context() as patch:
        patch.setattr(automerge._recorder, "unfilled", lambda *_: None)
        torch.manual_seed(0)
        return quick, described(trace(model, args, kwargs, values=False))


@pytest.mark.parametrize("name", ALL)
def test_the_graph_is_that_of_all_numbers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, args, _ = ALL[name]
    torch.manual_seed(0)
    quick, whole = both(kind(), args, networks_hostile.KWARGS.get(name), monkeypatch)
    assert quick == whole


@given(network=networks())
@settings(max_examples=30, deadline=None)
def test_the_graph_of_a_random_network(network: Network) -> None:
    with pytest.MonkeyPatch.context() as patch:
        quick, whole = both(network.model, network.args, None, patch)
    assert quick == whole


# -------------------------------------------------------------------- forms
sizes = st.integers(1, 5)
layouts = st.sampled_from(["dense", "transposed", "strided", "expanded"])


def laid_out(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(shape, dtype=dtype)
    if layout == "transposed":
        return x.mT.contiguous().mT
    if layout == "strided":
        return torch.randn((*shape[:-1], 2 * shape[-1]), dtype=dtype)[..., ::2]
    return x[..., :1].expand(shape) if layout == "expanded" else x


def same_form(func: Any, *args: Any) -> None:
    mine, out = unfilled(func, args, {}), func(*args)
    assert mine is not None
    assert (mine.shape, mine.stride(), mine.dtype, mine.storage_offset()) == (out.shape, out.stride(), out.dtype, 0)
    assert mine.untyped_storage().nbytes() == out.untyped_storage().nbytes()


@given(b=sizes, n=sizes, k=sizes, m=sizes, left=layouts, right=layouts, double=st.booleans())
@settings(max_examples=150, deadline=None)
def test_products(b: int, n: int, k: int, m: int, left: str, right: str, double: bool) -> None:
    dtype = torch.float64 if double else torch.float32
    x, y = laid_out((n, k), left, dtype), laid_out((k, m), right, dtype)
    same_form(aten.mm.default, x, y)
    same_form(aten.addmm.default, torch.randn(m, dtype=dtype), x, y)
    same_form(aten.bmm.default, laid_out((b, n, k), left, dtype), laid_out((b, k, m), right, dtype))


@given(
    data=st.data(),
    dims=st.integers(1, 3),
    batch=sizes,
    groups=st.integers(1, 3),
    inside=st.integers(1, 3),
    out=st.integers(1, 3),
    double=st.booleans(),
    bias=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_convolutions(
    data: st.DataObject, dims: int, batch: int, groups: int, inside: int, out: int, double: bool, bias: bool
) -> None:
    dtype = torch.float64 if double else torch.float32
    kernel = data.draw(st.lists(st.integers(1, 3), min_size=dims, max_size=dims))
    stride, dilation = (data.draw(st.lists(st.integers(1, 2), min_size=dims, max_size=dims)) for _ in range(2))
    padding = data.draw(st.lists(st.integers(0, 2), min_size=dims, max_size=dims))
    shape = [d * (k - 1) + 1 + data.draw(st.integers(0, 4)) for k, d in zip(kernel, dilation, strict=True)]
    x = torch.randn(batch, groups * inside, *shape, dtype=dtype)
    weight = torch.randn(groups * out, inside, *kernel, dtype=dtype)
    offset = torch.randn(groups * out, dtype=dtype) if bias else None
    same_form(aten.convolution.default, x, weight, offset, stride, padding, dilation, False, [0] * dims, groups)


@given(shape=st.lists(sizes, min_size=2, max_size=5), affine=st.booleans(), double=st.booleans())
@settings(max_examples=80, deadline=None)
def test_batch_norms(shape: list[int], affine: bool, double: bool) -> None:
    x = torch.randn(shape, dtype=torch.float64 if double else torch.float32)
    mean, variance = torch.zeros(shape[1], dtype=x.dtype), torch.ones(shape[1], dtype=x.dtype)
    weights = (variance, mean) if affine else (None, None)
    args = (x, *weights, mean, variance, False, 0.1, 1e-5)
    mine, out = unfilled(aten.native_batch_norm.default, args, {}), aten.native_batch_norm.default(*args)
    for a, b in zip(mine, out, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
    assert unfilled(aten.native_batch_norm.default, (*args[:5], True, *args[6:]), {}) is None


@given(shape=st.lists(sizes, max_size=4), name=st.sampled_from([*_FUNCTIONS, "add", "sub", "mul"]))
@settings(max_examples=150, deadline=None)
def test_functions_of_numbers_alone(shape: list[int], name: str) -> None:
    x = torch.randn(shape)
    func = getattr(aten, name).default if name in _FUNCTIONS else getattr(aten, name).Tensor
    for args in [(x,)] if name in _FUNCTIONS else [(x, torch.randn(shape)), (x, 2), (x, 0.5)]:
        mine, out = followed(func, args), func(*args)
        assert (mine.shape, mine.stride(), mine.dtype) == (out.shape, out.stride(), out.dtype)
        assert mine.untyped_storage().nbytes() == out.untyped_storage().nbytes()


def test_functions_of_another_form_are_computed() -> None:
    x = torch.randn(2, 3, 4)
    assert followed(aten.add.Tensor, (x, x)) is not None
    assert unwritten(aten.add_.Tensor, (x, x))
    for other in (torch.randn(4), x.double(), x.mT.contiguous().mT, 1j, torch.ones(2, 3, 4, dtype=torch.int64)):
        assert followed(aten.add.Tensor, (x, other)) is None
        assert not unwritten(aten.add_.Tensor, (x, other))
    assert followed(aten.gt.Tensor, (x, x)) is None
    assert followed(aten.add.Tensor, (torch.as_strided(x, (1, 2), (1, 1)), 2)) is None  # an axis of one with any stride
    assert unwritten(aten.relu_.default, (x,))
    assert not unwritten(aten.relu_.default, (x.mT,))
    for func in (aten.normal_.default, aten.bernoulli_.float, aten.transpose_.default):
        assert not unwritten(func, (x, 0, 1))


def test_numbers_that_are_not_computed_are_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = nn.Linear(3, 4)
    written: list[str] = []
    original = automerge._recorder.unwritten

    def spy(func: Any, args: Any) -> bool:
        written.append(func.__name__)
        return original(func, args)

    monkeypatch.setattr(automerge._recorder, "unwritten", spy)

    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner
            self.register_buffer("kept", torch.zeros(()), persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.clone().add_(1)  # computed: it follows from the input alone
            assert bool((x >= 1).all())
            self.kept.add_(self.inner(x).sum())  # computed: what the model keeps is put back by what was written
            return self.inner(x).add_(1).relu_()

    graph = trace(InPlace(), torch.ones(2, 3), values=False)
    assert written[:2] == ["add_.Tensor", "relu_.default"]  # a further pass is tried, as something is kept
    assert [str(n.target) for n in graph.graph.nodes][-4:-1] == [
        "aten.addmm.default",
        "aten.add.Tensor",
        "aten.relu.default",
    ]


def test_other_layouts_and_kinds_are_computed() -> None:
    x, w = torch.randn(2, 4, 5, 5), torch.randn(6, 4, 3, 3)
    rest = (None, [1, 1], [0, 0], [1, 1])
    assert unfilled(aten.convolution.default, (x, w, *rest, False, [0, 0], 1), {}) is not None
    channels_last = x.to(memory_format=torch.channels_last)
    assert unfilled(aten.convolution.default, (channels_last, w, *rest, False, [0, 0], 1), {}) is None
    assert unfilled(aten.convolution.default, (x, w.transpose(0, 1), *rest, True, [0, 0], 1), {}) is None
    assert unfilled(aten.mm.default, (torch.ones(2, 2).int(), torch.ones(2, 2).int()), {}) is None
    assert unfilled(aten.mm.default, (torch.ones(2, 3), torch.ones(4, 2)), {}) is None
    assert unfilled(aten.mm.default, (torch.ones(2, 3), torch.ones(3, 2).double()), {}) is None
    assert unfilled(aten.addmm.default, (torch.ones(5), torch.ones(2, 3), torch.ones(3, 2)), {}) is None
    assert unfilled(aten.convolution.default, (x, w, torch.ones(4), *rest[1:], False, [0, 0], 1), {}) is None
    one = torch.ones(4)
    assert unfilled(aten.native_batch_norm.default, (x, one, one, one, one[:2], False, 0.1, 1e-5), {}) is None
    assert unfilled(aten.add.Tensor, (x, x), {}) is None


# -------------------------------------------------------------------- programs that look
def _asks(s: Any, x: torch.Tensor) -> torch.Tensor:
    h = s.a(x)
    return s.b(h.relu()) if float(h.detach().abs().sum()) > 0 else s.b(h[:, :1].expand_as(h))


def _selects(s: Any, x: torch.Tensor) -> torch.Tensor:
    h = s.a(x)
    return s.b(h[(h.sum(1) > -1e9)])


def _swallows(s: Any, x: torch.Tensor) -> torch.Tensor:
    h = s.a(x)
    try:
        positive = bool((h.abs() > 0).any())
    except BaseException:
        positive = False
    return s.b(h.relu() if positive else h[:, :1].expand_as(h))


def _counts(s: Any, x: torch.Tensor) -> torch.Tensor:
    h = s.a(x)
    return s.b(h.relu() if len(torch.bincount((h != 0).long().flatten())) > 1 else h[:, :1].expand_as(h))


def _fails(s: Any, x: torch.Tensor) -> torch.Tensor:
    h = s.a(x)
    torch.multinomial(h.abs(), 1)  # none of them can be drawn if all are zero
    return s.b(h.relu())


def _packs(s: Any, x: torch.Tensor) -> torch.Tensor:
    h = s.a(x)
    lengths = (h != 0).sum(1)
    packed = torch.nn.utils.rnn.pack_padded_sequence(h[..., None], lengths, batch_first=True, enforce_sorted=False)
    return s.b(h.relu() if len(packed.data) > len(x) else h[:, :1].expand_as(h))


def _compares(s: Any, x: torch.Tensor) -> torch.Tensor:
    h = s.a(x)
    return s.b(h[:, :1].expand_as(h) if torch.allclose(h.abs().sum(1), torch.zeros(len(h))) else h.relu())


def _splits(s: Any, x: torch.Tensor) -> torch.Tensor:
    h = s.a(x)
    _, rest = torch.tensor_split(x, (h != 0).sum(1).max()[None].clamp(max=4), dim=1)
    return s.b(h[:, :1].expand_as(h) if rest.shape[1] else h.relu())


_LIBRARY = torch.library.Library("automerge_test_unfilled", "DEF")
_LIBRARY.define("positive(Tensor x) -> Tensor")
_LIBRARY.define("some(Tensor x) -> bool")
_LIBRARY.impl("some", lambda x: float(x.detach().numpy().any()) > 0, "CPU")
_LIBRARY.impl("positive", lambda x: x[x != 0].clone(), "CompositeExplicitAutograd")


def _filters(s: Any, x: torch.Tensor) -> torch.Tensor:
    h = s.a(x)
    return s.b(h.relu() if len(torch.ops.automerge_test_unfilled.positive(h)) else h[:, :1].expand_as(h))


def _tells(s: Any, x: torch.Tensor) -> torch.Tensor:
    h = s.a(x)
    return s.b(h.relu() if torch.ops.automerge_test_unfilled.some(h.sum(1)) else h[:, :1].expand_as(h))


def _recovers(s: Any, x: torch.Tensor) -> torch.Tensor:
    h = s.a(x)
    try:
        torch.linalg.cholesky(h @ h.T + h.square().sum() * torch.eye(len(h)))
    except RuntimeError:
        h = h[:, :1].expand_as(h)
    return s.b(h.relu())


@pytest.mark.parametrize(
    "forward", [_asks, _selects, _swallows, _counts, _fails, _recovers, _packs, _filters, _compares, _splits, _tells]
)
def test_a_program_that_looks_at_numbers_sees_them(forward: Any) -> None:
    torch.manual_seed(0)
    model = Program(forward, {"a": partial(nn.Linear, 4, 6), "b": partial(nn.Linear, 6, 2)})
    assert [g.size for g in infer(model, torch.randn(3, 4)).generators()] == [6]
