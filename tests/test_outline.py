"""Tracing without numbers: the same graph as with them, nothing computed, and numbers wherever the model looks at one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from automerge import TraceError, trace
from automerge._outline import Lookalikes, NeedsValues, Outline, shadow
from automerge._recorder import Recorder
from automerge.infer import infer, infer_graph
from automerge.testing import Network, networks
from automerge.trace import _run, record
from tests.test_trace import Changing, Run, replay


def uncomputed(model: nn.Module, *args: Any) -> fx.GraphModule:
    """The trace without numbers, which must not need any."""
    return _run(model, args, {}, Recorder(model, values=False, compute=False))


def described(graph: fx.GraphModule) -> list[Any]:
    def form(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            strides = [s for s, n in zip(value.stride(), value.shape, strict=True) if n > 1]
            return tuple(value.shape), value.dtype, strides if value.numel() else None
        return [form(v) for v in value] if isinstance(value, list | tuple) else value

    nodes = [n for n in graph.graph.nodes if n.op != "output"]
    return [(n.op, str(n.target), str(n.args), str(n.kwargs), form(n.meta["val"]), n.meta["module"]) for n in nodes]


@settings(max_examples=40)
@given(networks())
def test_the_graph_is_the_one_that_computing_records(network: Network) -> None:
    assert described(uncomputed(network.model, *network.args)) == described(trace(network.model, network.args))


# -------------------------------------------------------------------- nothing is computed
@torch.library.custom_op("automerge_tests::never", mutates_args=())
def never(x: torch.Tensor) -> torch.Tensor:
    raise AssertionError("this operator was computed")


@never.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def test_no_operator_over_numbers_is_computed() -> None:
    model = nn.Sequential(nn.Linear(3, 4), Run(never), nn.Linear(4, 2))
    graph = trace(model, torch.ones(1, 3), values=False)
    assert "automerge_tests.never.default" in [str(n.target) for n in graph.graph.nodes]
    with pytest.raises(Exception, match="this operator was computed"):
        trace(model, torch.ones(1, 3))


def test_nothing_is_written() -> None:
    model = Changing()
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(4, 3)
    kept = x.clone()
    graph = uncomputed(nn.Sequential(Run(lambda t: t.mul_(2)), model, Run(lambda t: t.add_(1))), x)
    assert torch.equal(x, kept)
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in before.items())
    values = [n.meta["val"] for n in graph.graph.nodes if n.op == "call_function" and n.all_input_nodes]
    assert all(v.is_meta for v in values if isinstance(v, torch.Tensor))


def test_whole_numbers_and_constants_are_computed() -> None:
    """Token indices, masks and tables stay numbers: what Python asks of them needs no second run."""

    def forward(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        table = torch.eye(4).cumsum(0)
        if bool(mask.all()) and int(tokens.max()) < 4 and float(table.sum()) == 10.0:
            return table[tokens] * mask.unsqueeze(-1)
        raise AssertionError

    tokens, mask = torch.tensor([[0, 3]]), torch.ones(1, 2, dtype=torch.long)
    graph = uncomputed(Run(forward), tokens, mask)
    assert torch.equal(replay(graph, nn.Module(), tokens, mask)[0], forward(tokens, mask))


# -------------------------------------------------------------------- where a number is needed
LOOKS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "item": lambda x: x * 2 if x.sum().item() > 0 else x,
    "bool": lambda x: x * 2 if (x > 0).any() else x,
    "int": lambda x: x[: int(x.abs().max() * 0) + 1],
    "list": lambda x: x * (x * 1).tolist()[0][0],
    "numpy": lambda x: x + torch.from_numpy((x * 1).numpy().copy()),
    "array": lambda x: x + float(np.asarray(x * 1).sum()),
    "nonzero": lambda x: (x * 1)[(x > 0).nonzero()[:, 0]],
    "mask": lambda x: x[x > 0],
    "where": lambda x: x[torch.where(x.sum(1) > -100.0)[0]],
    "masked_select": lambda x: torch.masked_select(x, x > 0),
    "unique": lambda x: torch.unique(x * 1),
    "equal": lambda x: x if torch.equal(x * 1, x + 0) else x * 2,
    "as_strided": lambda x: (x * 1).as_strided((2, 2), (1, 2)),
    "deepcopy": lambda x: copy.deepcopy(x * 1) + x,
    "repeat_interleave": lambda x: x.repeat_interleave((x[:, 0] * 0 + 2).long(), 0),
    "out": lambda x: torch.add(x, x * 1, out=torch.empty(0)),
}


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
@pytest.mark.parametrize("look", LOOKS)
def test_a_model_that_looks_at_a_number_is_run_with_numbers(look: str) -> None:
    x = torch.tensor([[0.5, -1.0, 2.0], [0.25, 1.0, 3.0]])
    with pytest.raises(NeedsValues):
        uncomputed(Run(LOOKS[look]), x)
    graph = trace(Run(LOOKS[look]), x, values=False)
    with_numbers = trace(Run(LOOKS[look]), x)
    assert [d[:4] for d in described(graph)] == [d[:4] for d in described(with_numbers)]
    assert graph.meta["trace"] == with_numbers.meta["trace"]


def test_operands_of_other_precisions_fail_as_with_numbers() -> None:
    with pytest.raises(TraceError, match="dtype"):
        trace(nn.Linear(3, 2).half(), torch.ones(1, 3), values=False)
    with pytest.raises(NeedsValues):
        uncomputed(nn.Linear(3, 2).half(), torch.ones(1, 3))


def test_positions_out_of_range_fail_as_with_numbers() -> None:
    with pytest.raises(TraceError, match="index out of range"):
        trace(nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 2)), torch.tensor([[0, 3]]), values=False)


def test_positions_from_uncomputed_numbers_need_them() -> None:
    choose = Run(lambda x: torch.gather(x, 1, (x * 1).topk(2)[1]))
    with pytest.raises(NeedsValues):
        uncomputed(choose, torch.randn(2, 4))


_KEPT: dict[str, torch.Tensor] = {}


def test_no_cache_is_left_with_numbers_that_nobody_computed() -> None:
    """A cache outside of the model is overwritten by the run with numbers; where it is not, that is said."""

    def overwrites(x: torch.Tensor) -> torch.Tensor:
        _KEPT["last"] = x * 2
        return _KEPT["last"] + 1

    def keeps(x: torch.Tensor) -> torch.Tensor:
        if "first" not in _KEPT:
            _KEPT["first"] = x * 2
        return _KEPT["first"] + x

    x = torch.randn(2, 3)
    try:
        trace(Run(overwrites), x, values=False)
        assert torch.equal(_KEPT["last"], x * 2)
        with pytest.raises(TraceError, match="outside of its modules"):
            trace(Run(keeps), x, values=False)
        _KEPT["first"] = x * 2
        trace(Run(keeps), x, values=False)
        assert torch.equal(_KEPT["first"], x * 2)
    finally:
        _KEPT.clear()


def test_what_a_model_hands_out_and_never_reads_again_is_no_matter() -> None:
    """Activations that a hook collects: those that nobody computed hold nothing that could pass for numbers."""
    seen: list[torch.Tensor] = []
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    model[1].register_forward_hook(lambda module, args, out: seen.append(out))
    x = torch.randn(2, 3)
    assert [g.size for g in infer(model, x, verify=False).generators()] == [4]
    for value in seen:
        assert bool(value.isnan().all()) or torch.equal(value, model[1](model[0](x)))


@settings(max_examples=40)
@given(
    st.sampled_from([nn.Conv2d(3, 4, 3), nn.Conv2d(3, 3, 1, groups=3), nn.AvgPool2d(2), nn.ZeroPad2d(1), nn.ReflectionPad2d(1),
                     nn.AdaptiveAvgPool2d(1), nn.Upsample(scale_factor=2), nn.GroupNorm(3, 3), nn.BatchNorm2d(3),
                     nn.InstanceNorm2d(3), nn.MaxPool2d(2), nn.PixelUnshuffle(1), nn.ConvTranspose2d(3, 2, 2), nn.GELU()]),
    st.permutations(range(4)),
    st.booleans(),
)  # fmt: skip
def test_strides_of_images_are_those_of_the_kernels(layer: nn.Module, order: list[int], last: bool) -> None:
    """Memory laid out in any order of the axes, in front of every kind of layer, and what reads strides behind it."""
    shape = [2, 3, 4, 6]
    x = torch.randn([shape[k] for k in order]).permute([order.index(k) for k in range(4)])
    x = x.to(memory_format=torch.channels_last) if last else x
    model = nn.Sequential(Run(lambda t: (t.permute(order) * 1).permute([order.index(k) for k in range(4)])), layer)
    whole = nn.Sequential(model, Run(lambda t: t.reshape(t.shape[0], -1).transpose(0, 1).contiguous() * 2))
    assert described(uncomputed(whole, x)) == described(trace(whole, x))


@settings(max_examples=40)
@given(
    st.sampled_from([
        lambda q: torch.bmm(q.flatten(0, 1), q.flatten(0, 1).transpose(1, 2)),
        lambda q: q.softmax(-1), lambda q: q.softmax(1), lambda q: q.clone(), lambda q: q.contiguous(),
        lambda q: nn.functional.scaled_dot_product_attention(q, q, q),
        lambda q: nn.functional.scaled_dot_product_attention(q, q * 2, q.transpose(0, 1).transpose(0, 1), is_causal=True),
        lambda q: q.matmul(q.transpose(2, 3)), lambda q: torch.cat([q, q], 1), lambda q: q.sum((1, 2)), lambda q: q.mean(1),
        lambda q: nn.functional.layer_norm(q, q.shape[-1:]), lambda q: q.cumsum(1), lambda q: q.roll(1, 2),
        lambda q: nn.functional.pad(q, (1, 1)), lambda q: q.amax(3), lambda q: torch.stack([q, q], 2),
        lambda q: q.repeat(1, 2, 1, 1),
    ]),
    st.permutations(range(4)),
)  # fmt: skip
def test_strides_of_attention_are_those_of_the_kernels(function: Any, order: list[int]) -> None:
    back = [order.index(k) for k in range(4)]
    turned = Run(lambda t: t.permute(order).contiguous().permute(back))
    whole = nn.Sequential(turned, Run(function), Run(lambda t: t.flatten().contiguous() * 2))
    x = torch.randn(2, 3, 4, 6)
    assert described(uncomputed(whole, x)) == described(trace(whole, x))


def test_a_look_that_the_model_hides_counts() -> None:
    """A model that catches everything goes on along a path that numbers would not have taken."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        try:
            return x * 2 if float(x.sum()) > 0 else x * 3
        except BaseException:
            return x * 5

    with pytest.raises(NeedsValues):
        uncomputed(Run(forward), torch.ones(2))
    assert replay(trace(Run(forward), torch.ones(2), values=False), nn.Module(), torch.ones(2))[0].tolist() == [2, 2]


def test_errors_of_the_model_are_those_of_a_run_with_numbers() -> None:
    with pytest.raises(Exception, match=r"does not run on the example inputs \(\(1, 3\)\).*mat1 and mat2"):
        trace(nn.Sequential(nn.Linear(2, 2)), torch.ones(1, 3), values=False)


# -------------------------------------------------------------------- forms of operators
OPERATORS = ["relu", "sigmoid", "tanh", "silu", "hardtanh", "hardswish", "hardsigmoid", "gelu", "exp", "neg", "sqrt",
             "rsqrt", "clone"]  # fmt: skip


@settings(max_examples=60)
@given(
    st.sampled_from(OPERATORS),
    st.lists(st.integers(1, 3), min_size=0, max_size=4),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64]),
    st.booleans(),
)
def test_plain_forms_are_those_of_the_operator(name: str, shape: list[int], dtype: torch.dtype, turned: bool) -> None:
    x = torch.ones(shape, dtype=dtype)
    x = x.permute(list(range(x.dim()))[::-1]) if turned else x
    operator = getattr(torch.ops.aten, name).default
    try:
        want = operator(x)
    except (RuntimeError, NotImplementedError):
        return
    form = Lookalikes().form(operator, (x,), {})
    strides = [(a, b) for a, b, n in zip(form.stride(), want.stride(), form.shape, strict=True) if n > 1]
    assert (form.shape, form.dtype, form.start) == (want.shape, want.dtype, 0)
    assert all(a == b for a, b in strides)


@settings(max_examples=30)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=4), st.booleans(), st.booleans())
def test_the_form_of_batch_norm(shape: list[int], training: bool, turned: bool) -> None:
    x = torch.randn(shape)
    x = x.transpose(0, -1).contiguous().transpose(0, -1) if turned else x
    n = shape[1]
    training = training and x.numel() > n  # no variance of one value
    args = (x, torch.ones(n), torch.ones(n), torch.zeros(n), torch.ones(n), training, 0.1, 1e-5)
    operator = torch.ops.aten.native_batch_norm.default
    form = Lookalikes().form(operator, args, {})
    assert [(f.shape, f.dtype) for f in form] == [(t.shape, t.dtype) for t in operator(*args)]


def test_equal_arguments_of_other_types_have_forms_of_their_own() -> None:
    forms, x = Lookalikes(), torch.ones(2, dtype=torch.int64)
    multiply = torch.ops.aten.mul.Tensor
    assert forms.form(multiply, (x, 1), {}).dtype is torch.int64
    assert forms.form(multiply, (x, 1.0), {}).dtype is torch.float32
    assert forms.form(multiply, (torch.ones(2, dtype=torch.bool), True), {}).dtype is torch.bool


def test_an_outline_is_the_tensor_without_its_numbers() -> None:
    x = torch.randn(4, 6)[1:, ::2]
    made = shadow(x)
    assert made.is_meta
    assert (made.shape, made.stride(), made.storage_offset(), made.dtype) == (x.shape, (6, 2), 6, x.dtype)
    assert made.untyped_storage().nbytes() == x.untyped_storage().nbytes()
    assert (Outline.of(x).stride(1), Outline.of(x).storage_offset()) == (2, 6)


def test_the_pieces_of_an_operator_keep_the_values_of_its_constants() -> None:
    unknown, table = torch.empty(3, device="meta"), torch.tensor([2, 0, 1])
    graph = record(lambda x, index: (x * 2)[index.flip(0)], [unknown, table])
    values = {str(n.target): n.meta["val"] for n in graph.graph.nodes if n.op == "call_function"}
    assert values["aten.flip.default"].tolist() == [1, 0, 2]
    assert values["aten.mul.Tensor"].is_meta


# -------------------------------------------------------------------- memory shared behind the trace's back
class Sharing(nn.Module):
    """Keeps part of a parameter as a plain tensor."""

    def __init__(self, part: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(3, 2)
        self.part = part(self.first.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu()) + self.third((x @ self.part.t()).relu())


@pytest.mark.parametrize("part", [lambda w: w[:3], lambda w: w.detach()[:3], lambda w: w.data.view(-1)[:12].view(3, 4)])
@pytest.mark.parametrize("values", [True, False])
def test_a_plain_tensor_in_the_memory_of_a_parameter_is_part_of_it(part: Any, values: bool) -> None:
    model, x = Sharing(part), torch.randn(2, 4)
    graph = trace(model, x, values=values)
    assert not graph.meta["trace"].unknown
    with torch.no_grad():
        model.first.weight.mul_(3.0)
    assert torch.allclose(replay(graph, model, x)[0], model(x))
    sets = [
        sorted((s.param, s.axis, *s.index.reshape(-1).tolist()) for s in g.slots) for g in infer_graph(graph)[0].sets
    ]
    tied = [("first.bias", 0, 0, 1, 2), ("first.weight", 0, 0, 1, 2), ("second.weight", 1, 0, 1, 2),
            ("third.weight", 1, 0, 1, 2)]  # fmt: skip
    assert sorted(sets) == sorted([tied, [(n, a, 3, 4, 5) for n, a, *_ in tied[:3]]])


# -------------------------------------------------------------------- scripts
class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layers(x)
        if float(y.sum()) > 1e9:
            y = y * 2
        return y


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m.layers, torch.ones(5, 4))])
def test_compiled_scripts_are_traced_like_modules(make: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 4), make(Branching()), nn.Linear(4, 2))
    for _ in range(3):  # a script is compiled anew after its first runs
        symmetry = infer(model, torch.randn(5, 3))
        assert sorted(g.size for g in symmetry.sets) == [4, 4, 8]
        assert not symmetry.unruled


def test_hooks_that_the_first_run_installs_are_removed() -> None:
    class Installs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not hasattr(self, "installed"):
                self.inner.register_forward_hook(lambda module, args, out: out * 2)
                self.installed = True
            return self.inner(x)

    model, x = Installs(), torch.ones(1, 2)
    first = trace(model, x)
    assert not model.inner._forward_hooks
    assert described(trace(model, x)) == described(first)


def test_a_change_of_strides_in_place_is_no_new_tensor() -> None:
    """Adaptive pooling of a channels-last image ends in ``as_strided_``."""
    turn = Run(lambda t: t.permute(0, 3, 1, 2))
    model = nn.Sequential(nn.Linear(3, 4), turn, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    x = torch.randn(1, 4, 4, 3)
    for values in (True, False):
        graph = trace(model, x, values=values)
        assert any("as_strided" in str(n.target) for n in graph.graph.nodes)
        assert not graph.meta["trace"].unknown
        assert torch.allclose(replay(graph, model, x)[0], model(x), atol=1e-6)
        assert [g.size for g in infer_graph(graph)[0].sets] == [4]
