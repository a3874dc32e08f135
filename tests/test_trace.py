"""Tracing: the recorded graph computes what the model computes, and says where everything came from."""

from __future__ import annotations

import copy
import dataclasses
import multiprocessing
import platform
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.weak import TensorWeakRef

from automerge import SymmetryError, TraceError, infer, merge, trace, verify
from automerge._derive import infer_graph
from automerge.testing import Network, networks
from tests.inference.networks_hostile import Program
from zoo.coverage._peak import Peak


def replay(graph: fx.GraphModule, model: nn.Module, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The graph on the model's present state and on inputs."""
    state = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    names = [n.meta["name"] for n in graph.graph.nodes if n.op == "placeholder" and n.meta["kind"] == "state"]
    with torch.no_grad():
        return graph(*(state[n] for n in names), *inputs)


def targets(graph: fx.GraphModule) -> list[str]:
    return [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]


class Run(nn.Module):
    """A function of tensors as a module."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


# -------------------------------------------------------------------- replay
@settings(max_examples=25)
@given(networks())
def test_the_graph_replays(network: Network) -> None:
    model = network.model.eval()
    graph = trace(model, network.args)
    other = torch.randn(network.args[0].shape)
    for x in (*network.args, other):
        (out,) = replay(graph, model, x)
        assert torch.allclose(out, model(x), rtol=1e-5, atol=1e-6)
    assert {n.op for n in graph.graph.nodes} <= {"placeholder", "call_function", "get_attr", "output"}
    assert all(isinstance(n.meta["val"], torch.Tensor | list | tuple) for n in graph.graph.nodes if n.op != "output")


def _views(x: torch.Tensor, choice: int, k: int) -> torch.Tensor:
    """Some view of a tensor."""
    n = x.shape[0]
    options = [
        lambda: x[k % n :],
        lambda: x[:: 1 + k % 2],
        lambda: x.t() if x.ndim == 2 else x,
        lambda: x[..., k % x.shape[-1]] if x.ndim > 1 else x,
        lambda: x.reshape(-1) if x.is_contiguous() else x,
        lambda: x.unsqueeze(0),
        lambda: x.unfold(0, 1, 1),
        lambda: x.split(max(1, n // 2))[k % 2 if n > 1 else 0],
        lambda: x.unbind(0)[k % n] if x.ndim > 1 else x,
        lambda: x.diagonal() if x.ndim == 2 else x,
        lambda: x.transpose(0, -1),
        lambda: x.detach(),
    ]
    return options[choice % len(options)]()


def _writes(x: torch.Tensor, choice: int, k: int, other: torch.Tensor) -> None:
    """Some change of a tensor in place."""
    options = [
        lambda: x.add_(k + 1),
        lambda: x.mul_(0.5),
        lambda: x.copy_(x.flip(0) if x.ndim else x),
        lambda: x.fill_(float(k)),
        lambda: x.zero_(),
        lambda: x.sigmoid_(),
        lambda: x.add_(other.sum()),
        lambda: x.__setitem__(0, other.mean()) if x.ndim else x.add_(1),
        lambda: x.__setitem__(slice(0, 1), 2.0) if x.ndim else x.add_(1),
        lambda: x.clamp_(-1.0, 1.0),
        lambda: x.masked_fill_(x > 0.5, 0.25),
        lambda: torch.add(x, 1, out=x) if x.is_contiguous() else x.add_(1),
    ]
    options[choice % len(options)]()


def test_a_flat_view_of_what_was_written_transposed() -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        base = x * 1.0
        across, flat = base.t(), base.view(-1)
        across.masked_fill_(across > 0.5, 0.25)
        return flat

    x = torch.rand(2, 3)
    (out,) = replay(trace(Run(program), x), nn.Module(), x)
    assert torch.equal(out, program(x))


Steps = list[tuple[str, int, int, int]]
STEP = st.tuples(
    st.sampled_from(["view", "write", "write", "op"]), st.integers(0, 5), st.integers(0, 11), st.integers(0, 3)
)


@settings(max_examples=150)
@example([("view", 0, 0, 1), ("view", 1, 6, 0), ("write", 2, 0, 0)], (2, 1))  # a window of a part
@example([("view", 0, 0, 1), ("write", 1, 0, 0), ("view", 1, 6, 0), ("write", 2, 0, 0)], (2, 1))
@example([("view", 0, 2, 0), ("view", 1, 0, 1), ("view", 2, 6, 0), ("write", 3, 0, 0)], (3, 3))  # of a transpose
@example([("view", 0, 2, 0), ("write", 1, 10, 0), ("view", 0, 4, 0)], (2, 2))  # flat, of what was written transposed
@given(st.lists(STEP, min_size=1, max_size=7), st.tuples(st.integers(1, 3), st.integers(1, 3)))
def test_writes_in_place_and_views(steps: Steps, shape: tuple[int, int]) -> None:
    """Random programs of views and writes: the functional graph gives what running them gives, and changes no input."""

    def program(x: torch.Tensor) -> list[torch.Tensor]:
        base = x * 1.0
        alive = [base]
        for kind, which, choice, k in steps:
            value = alive[which % len(alive)]
            if kind == "view":
                alive.append(_views(value, choice, k))
            elif kind == "write":
                _writes(value, choice, k, base)
            else:
                alive.append(value * 2 + 1)
        return alive

    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    kept = x.clone()
    graph = trace(Run(program), x)
    assert torch.equal(x, kept)
    nodes = [n for n in graph.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    assert not [n.target for n in nodes if n.target._schema.is_mutable]
    for given_ in (x, torch.randn(shape, generator=torch.Generator().manual_seed(2))):
        want, got = program(given_.clone()), replay(graph, nn.Module(), given_)
        assert all(torch.allclose(a, b, equal_nan=True) for a, b in zip(want, got, strict=True))
    for node, value in zip(graph.graph.output_node().args[0], program(x.clone()), strict=True):
        assert torch.allclose(node.meta["val"], value, equal_nan=True)


def test_a_write_to_the_input_stays_inside() -> None:
    x = torch.zeros(2)
    graph = trace(Run(lambda t: t.add_(1) * 2), x)
    assert x.tolist() == [0, 0]
    assert replay(graph, nn.Module(), torch.ones(2))[0].tolist() == [4, 4]


# -------------------------------------------------------------------- state
class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.other = nn.Linear(3, 3)
        self.again = self.other
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("hidden", torch.arange(3.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.again(self.embed(x)) * self.scale + self.hidden)


def test_tied_weights_are_one() -> None:
    model = Tied()
    graph = trace(model, torch.tensor([1, 2]))
    info = graph.meta["trace"]
    state = [n.meta["name"] for n in graph.graph.nodes if n.op == "placeholder" and n.meta["kind"] == "state"]
    assert state == ["embed.weight", "other.weight", "other.bias", "scale"]
    assert info.aliases == {"head.weight": "embed.weight", "again.weight": "other.weight", "again.bias": "other.bias"}
    assert sorted(info.names.values()) == sorted(state)
    assert any("hidden" in u or "_constant" in u for u in info.unknown) or "hidden" not in state
    assert torch.allclose(replay(graph, model, torch.tensor([1, 2]))[0], model(torch.tensor([1, 2])))


def test_a_storage_shared_by_two_parameters_is_one() -> None:
    model = nn.Module()
    model.a = nn.Parameter(torch.randn(3))
    model.b = nn.Parameter(model.a.data)
    model.forward = lambda x: x * model.a + model.b  # type: ignore[method-assign]
    assert trace(model, torch.ones(3)).meta["trace"].aliases == {"b": "a"}


class Changing(nn.Module):
    """Everything that a forward pass may leave behind."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.linear = nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return self.drop(self.norm(self.linear(x))) + self.calls


def test_the_model_is_left_unchanged() -> None:
    model = Changing().train()
    model.norm.eval()
    before = copy.deepcopy(model.state_dict())
    objects = dict(model.named_buffers()) | dict(model.named_parameters())
    x = torch.randn(4, 3)
    kept = x.clone()
    graph = trace(model, x)
    assert [m.training for m in (model, model.norm, model.drop)] == [True, False, True]
    after = model.state_dict()
    assert all(torch.equal(v, after[n]) for n, v in before.items())
    assert all(t is objects[n] for n, t in [*model.named_buffers(), *model.named_parameters()])
    assert torch.equal(x, kept)
    assert not model._forward_hooks
    assert not [t for t in targets(graph) if "dropout" in t or "rand" in t]
    assert all(p.requires_grad for p in model.parameters())


def test_the_model_is_put_back_after_a_failure() -> None:
    class Fails(Changing):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            super().forward(x)
            raise ValueError("no\nsecond line")

    model = Fails().train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TraceError, match=r"ValueError: no$"):
        trace(model, torch.randn(4, 3))
    assert model.training
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in before.items())


class Remembers(nn.Module):
    """A cache that is filled in place: in buffers outside the state dict, and in a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.out = nn.Linear(3, 4), nn.Linear(4, 2)
        self.register_buffer("cache", torch.zeros(8, 4), persistent=False)
        self.register_buffer("filled", torch.tensor(0), persistent=False)
        self.seen = torch.zeros(())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = int(self.filled)
        self.cache[n : n + len(x)] = self.linear(x)
        self.filled += len(x)
        self.seen += 1
        return self.out(self.cache[: n + len(x)].relu())


def test_what_is_filled_in_place_is_put_back() -> None:
    model = Remembers()
    symmetry = infer(model, torch.randn(5, 3))
    assert [g.size for g in symmetry.generators()] == [4]
    assert (int(model.filled), float(model.cache.abs().max()), float(model.seen)) == (0, 0.0, 0.0)
    assert any("writes to" in note and "cache" in note for note in symmetry.notes)


# -------------------------------------------------------------------- inputs and outputs
@dataclasses.dataclass
class Pair:
    first: torch.Tensor
    second: Any = None


def test_nested_inputs_and_outputs() -> None:
    def forward(x: Any, *, extra: Any) -> Any:
        a = x["a"] + x["list"][1]
        return {"sum": a, "pair": Pair(a * 2, [extra.first - 1, None]), "text": "kept", "tuple": (a,)}

    args = {"a": torch.ones(2), "list": [0, torch.full((2,), 3.0)]}
    graph = trace(Run(forward), args, {"extra": Pair(torch.zeros(3))})
    info = graph.meta["trace"]
    assert list(info.inputs.values()) == ["args[0]['a']", "args[0]['list'][1]", "kwargs['extra'].first"]
    assert info.outputs == 4
    outs = replay(graph, nn.Module(), torch.zeros(2), torch.ones(2), torch.ones(3))
    assert [o.tolist() for o in outs] == [[1, 1], [2, 2], [0, 0, 0], [1, 1]]


@pytest.mark.parametrize(
    ("args", "kwargs", "count"),
    [
        (torch.ones(2), None, 1),
        ((torch.ones(2),), None, 1),
        ([torch.ones(2), torch.ones(2)], None, 2),
        ((), {"x": torch.ones(2)}, 1),
        (torch.ones(2), {"y": torch.ones(2)}, 2),
        ((torch.ones(2), 3), {}, 1),
    ],
)
def test_the_forms_of_arguments(args: Any, kwargs: Any, count: int) -> None:
    graph = trace(Run(lambda x, y=0: x + y), args, kwargs)
    assert len(graph.meta["trace"].inputs) == count


# -------------------------------------------------------------------- where
def test_module_paths_and_source_lines() -> None:
    class Inner(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.cos()  # the line that is named

    model = nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"deep": Inner()})["deep"], nn.Sequential(Inner()))
    nodes = {str(n.target): n for n in trace(model, torch.ones(1, 2)).graph.nodes if n.op == "call_function"}
    cosines = [n for n in trace(model, torch.ones(1, 2)).graph.nodes if "cos" in str(n.target)]
    assert nodes["aten.addmm.default"].meta["module"] == "0"
    assert [n.meta["module"] for n in cosines] == ["1", "2.0"]
    line = Inner.forward.__code__.co_firstlineno + 1
    assert all(n.meta["source"] == f"{__file__}:{line}" for n in cosines)


def test_placeholders_are_named() -> None:
    graph = trace(nn.Sequential(nn.Linear(2, 3)), torch.ones(1, 2))
    leaves = [n for n in graph.graph.nodes if n.op == "placeholder"]
    assert [(n.meta["name"], n.meta["kind"]) for n in leaves] == [
        ("0.weight", "state"), ("0.bias", "state"), ("args[0]", "input"),
    ]  # fmt: skip
    assert [tuple(n.meta["val"].shape) for n in leaves] == [(3, 2), (3,), (1, 2)]


def test_data_dependence_is_noted() -> None:
    info = trace(Run(lambda x: x * 2 if x.sum().item() > 0 else x), torch.ones(2)).meta["trace"]
    assert len(info.data_dependent) == 1
    assert __file__ in info.data_dependent[0]
    free = trace(Run(lambda x: x * torch.arange(3).sum().item()), torch.ones(2)).meta["trace"]
    assert free.data_dependent == []


def test_tensors_from_elsewhere_are_constants() -> None:
    outside = torch.arange(3.0)
    graph = trace(Run(lambda x: x * outside), torch.ones(3))
    assert len(graph.meta["trace"].unknown) == 1
    (node,) = (n for n in graph.graph.nodes if n.op == "get_attr")
    assert node.meta["val"].tolist() == [0, 1, 2]


# -------------------------------------------------------------------- errors
def test_wrong_shapes() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Sequential(nn.Linear(4, 1)))
    with pytest.raises(
        TraceError, match=r"Sequential does not run on the example inputs \(\(1, 2\)\).*'2\.0'"
    ) as raised:
        trace(model, torch.ones(1, 2))
    assert isinstance(raised.value.__cause__, RuntimeError)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("model", [torch.sin, nn.Linear, None, {}])
def test_no_module(model: Any) -> None:
    with pytest.raises(
        TraceError, match=r"expected a torch.nn.Module to trace, got \w+; pass an instance of the model"
    ):
        trace(model, torch.ones(1))


@pytest.mark.parametrize("result", [None, 3, "text", {"a": [1]}])
def test_no_tensor_comes_out(result: Any) -> None:
    with pytest.raises(TraceError, match="the model returned no tensor"):
        trace(Run(lambda x: result), torch.ones(1))


def test_wrong_arguments() -> None:
    with pytest.raises(TraceError, match="kwargs must be a dict of keyword arguments, got list"):
        trace(Run(lambda x: x), torch.ones(1), [1])  # type: ignore[arg-type]
    with pytest.raises(TraceError, match=r"does not run on the example inputs \(no tensors\): TypeError"):
        trace(nn.Linear(2, 2), ())


def test_the_trace_is_deterministic() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.GELU(), nn.LayerNorm(3))
    one, two = (trace(model, torch.tensor(np.eye(2, dtype=np.float32))) for _ in range(2))
    assert one.code == two.code


# -------------------------------------------------------------------- memory
class _Watched(nn.Module):
    """Ten layers with views and in-place writes between them; keeps weak references to what they compute."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(10))
        self.made: list[TensorWeakRef] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            y = layer(x)
            self.made.append(TensorWeakRef(y))
            y.view(-1, 2, 3)[:, 0].mul_(2)
            x = y.relu_() + x
        return x


def test_activations_die_while_the_model_runs():
    model, alive = _Watched(), []

    def count(*_: Any) -> None:
        alive.append(sum(r() is not None for r in model.made))

    for layer in model.layers:
        layer.register_forward_hook(count)
    graph = trace(model, torch.randn(2, 6), values=False)
    assert len(alive) == 10
    assert max(alive) <= 2
    nodes = [n for n in graph.graph.nodes if n.op == "call_function"]
    assert all(n.meta["val"].is_meta for n in nodes)
    kept = trace(model, torch.randn(2, 6))
    shapes = [(str(n.target), n.meta["val"].shape, n.meta["val"].dtype) for n in kept.graph.nodes if n.op != "output"]
    assert shapes == [
        (str(n.target), n.meta["val"].shape, n.meta["val"].dtype) for n in graph.graph.nodes if n.op != "output"
    ]


def test_memory_given_out_again_is_not_mistaken():
    """Tensors of one size follow each other in the same memory; an alias outlives the tensor that it was made from."""

    class Reuse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            total = torch.zeros_like(x)
            for _ in range(20):
                h = self.a(x)
                alias = h.data
                del h
                total = total + self.b(alias * 2)
                del alias
            return total

    model, x = Reuse(), torch.randn(3, 4)
    graph = trace(model, x, values=False)
    assert not graph.meta["trace"].unknown
    state = dict(model.named_parameters())
    fed = [state[n].detach() for n in graph.meta["trace"].names.values()]
    assert torch.allclose(graph(*fed, x)[0], model(x))


def test_constants_keep_their_values_without_the_others():
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.register_buffer("order", torch.tensor([3, 1, 0, 2]))
            self.register_buffer("scale", torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mask = torch.ones(4, 4).tril()
            mask[0] = 2.0
            return self.a(x)[:, self.order.flip(0)] @ mask * self.scale

    graph = trace(Table(), torch.randn(2, 4), values=False)
    values = {str(n.target): n.meta["val"] for n in graph.graph.nodes if n.op != "output"}
    assert values["aten.flip.default"].tolist() == [2, 0, 1, 3]
    assert values["aten.tril.default"].tolist()[3] == [1, 1, 1, 1]
    assert values["aten.mm.default"].is_meta


@pytest.mark.parametrize("kinds", ["vector", "tokens", "image"])
def test_the_answer_does_not_depend_on_the_values_kept(kinds):
    @settings(max_examples=15)
    @given(networks(kinds=[kinds]))
    def check(network):
        lean = infer_graph(trace(network.model, network.args, values=False))[0]
        full = infer_graph(trace(network.model, network.args))[0]
        assert lean.generators() == full.generators()
        assert [(p.param, p.axis, p.count) for p in lean.pins] == [(p.param, p.axis, p.count) for p in full.pins]

    check()


def _flex(s: Any, x: torch.Tensor) -> torch.Tensor:
    q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (s.q, s.k, s.v))
    return s.out(flex_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_higher_order_operators_are_recorded_as_what_they_stand_for():
    parts = {name: partial(nn.Linear, 5, 8) for name in "qkv"}
    model = Program(_flex, {**parts, "out": partial(nn.Linear, 8, 2)})
    symmetry = infer(model, torch.randn(2, 7, 5))
    assert sorted(g.size for g in symmetry.generators()) == [2, 4, 4, 4, 4]
    assert not symmetry.unruled
    assert verify(model, torch.randn(2, 7, 5), symmetry).randomised


def test_conditionals_and_loops_are_recorded_as_the_branch_and_the_rounds_that_ran():
    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        h = torch.cond(x.sum() > 0, torch.relu, torch.tanh, (s.a(x),))
        _, h = torch.while_loop(lambda i, _: i < 3, lambda i, h: (i + 1, (h @ s.w).sin()), (torch.tensor(0), h))
        return s.out(h)

    model = Program(
        forward,
        {"a": partial(nn.Linear, 4, 6), "w": lambda: nn.Parameter(torch.randn(6, 6)), "out": partial(nn.Linear, 6, 2)},
    )
    graph = trace(model, torch.ones(3, 4))
    assert targets(graph).count("aten.sin.default") == 3
    symmetry = infer(model, torch.ones(3, 4))
    assert [g.size for g in symmetry.generators()] == [6]
    assert any("read values that depend on the data" in note for note in symmetry.notes)


def test_higher_order_operators_that_compute_out_of_sight_are_refused():
    from torch._higher_order_ops.scan import scan

    model = Program(
        lambda s, x: scan(lambda c, y: (c + y, c * y), torch.zeros(4), s.a(x), dim=0)[1],
        {"a": partial(nn.Linear, 4, 4)},
    )
    with pytest.raises(TraceError, match="scan is a higher-order operator without a plain form"):
        infer(model, torch.randn(3, 4))


@torch.library.custom_op("automerge_tests::counted", mutates_args={"count"})
def _counted(x: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    count.add_(1)
    return x * 2


@pytest.mark.parametrize(
    ("forward", "sizes"),
    [
        (lambda s, x: s.out(torch.nn.functional.rrelu(s.a(x))), [6]),
        (lambda s, x: s.out(copy.deepcopy(s.a(x)).relu()), [6]),
        (lambda s, x: s.out(_counted(s.a(x), s.count)), []),  # without a rule: pinned, and not lost
    ],
    ids=["noise beside it", "a deep copy", "a custom operator"],
)
def test_what_comes_out_of_an_operator_is_no_constant(forward, sizes):
    parts = {"a": partial(nn.Linear, 4, 6), "out": partial(nn.Linear, 6, 2), "count": partial(torch.zeros, 1)}
    model = Program(forward, parts)
    graph = trace(model, torch.randn(3, 4))
    assert not graph.meta["trace"].unknown
    symmetry = infer(model, torch.randn(3, 4))
    assert [g.size for g in symmetry.generators()] == sizes
    assert not any("depend on a.weight" in note for note in symmetry.notes)


def test_compiled_parts_run_as_they_are_written():
    model = nn.Sequential(torch.compile(nn.Sequential(nn.Linear(4, 6), nn.ReLU()), fullgraph=True), nn.Linear(6, 2))
    assert [g.size for g in infer(model, torch.randn(3, 4)).generators()] == [6]


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantised_weights_are_refused():
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.packed = torch.ops.quantized.linear_prepack(
                torch.quantize_per_tensor(torch.randn(6, 4), 0.1, 0, torch.qint8), None
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.quantized.linear_dynamic(x, self.packed)

    with pytest.raises(TraceError, match=r"packed .quantised. weights.*before it is quantised"):
        infer(Packed(), torch.randn(3, 4))


def test_an_example_without_rows_is_refused():
    with pytest.raises(TraceError, match=r"every output .* is empty \(\(0, 2\)\).*at least one row"):
        infer(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(0, 4))


class Scores(nn.Module):
    """Attention over 2000 positions: each of its scores takes 15 MiB."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(x).chunk(3, -1)
        scores = (query @ key.transpose(-1, -2)) * 0.3
        return x + (scores + scores.new_zeros(len(scores))).softmax(-1) @ value


def held_while_tracing(queue: Any) -> None:
    """Puts the bytes that a trace holds beside the model at its peak; to be run in a process of its own."""
    torch.set_num_threads(1)
    model, x = nn.Sequential(*(Scores() for _ in range(20))), torch.randn(2000, 8)
    trace(model, x[:2], values=False)
    with Peak() as peak:
        trace(model, x, values=False)
    queue.put(peak.bytes)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the peak of memory is measured on Linux with glibc")
def test_activations_are_freed_as_the_model_runs() -> None:
    """Of 20 layers with 60 MiB of scores each only those of one layer are held, and the heap is not left in pieces.

    In a fresh process: holes that other tests have left in the heap would be filled, and count as taken.
    """
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=held_while_tracing, args=(queue,))
    process.start()
    held = queue.get(timeout=300)
    process.join()
    if held is None:
        pytest.skip("the system does not say what a process holds")
    assert held < 300 * 2**20  # a quarter of all scores


@pytest.mark.parametrize(
    "look",
    [
        lambda h, x: torch.allclose(h, x),
        lambda h, x: torch.tensor_split(x, h.long().flatten()[:1] % 2, dim=1),
        lambda h, x: x.tensor_split(tensor_indices_or_sections=h.long().flatten()[:1] % 2),
        lambda h, x: torch.nn.functional.ctc_loss(x[None].log_softmax(-1), *[h[0, :1].long() % 1 + 1] * 3),
    ],
)
def test_looks_that_the_dispatcher_does_not_see(look: Any) -> None:
    graph = trace(Run(lambda x: (look(x[0] * 2, x[0]), x + 1)[1]), torch.rand(1, 1, 4).contiguous())
    assert graph.meta["trace"].data_dependent
    assert graph.meta["trace"].reads


class Frozen(dict[str, int]):
    def clear(self) -> None:
        raise TypeError("this dict does not change")


class Notes(dict[str, int]):
    """A dict of its own kind."""


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.notes, self.frozen = nn.Linear(4, 2), Notes(passes=0), Frozen(width=4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.notes["passes"] += 1
        return self.layer(x)


def test_containers_keep_their_kind_and_contents() -> None:
    model = Counting()
    notes = model.notes
    trace(model, torch.randn(2, 4), values=False)
    assert model.notes is notes
    assert notes == {"passes": 0}


class Collecting(nn.Module):
    """Installs hooks in its first pass that collect what its layers give, and notes that it has."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.out = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not getattr(self, "installed", False):
            self.found: list[torch.Tensor] = []
            for layer in self.layers:
                layer.register_forward_hook(lambda _, __, y: self.found.append(y))
            self.installed = True
        self.found.clear()
        for layer in self.layers:
            x = layer(x).relu()
        return self.out(self.found[1])


def test_hooks_of_the_first_pass_do_not_stay() -> None:
    model, fresh, x = Collecting(), Collecting(), torch.randn(2, 4)
    fresh.load_state_dict(model.state_dict())
    for _ in range(2):
        trace(model, x, values=False)
        assert not any(layer._forward_hooks for layer in model.layers)
        assert "installed" not in vars(model)
    assert torch.equal(model(x), fresh(x))


class Cut(nn.Module):
    """Doubles the first units of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor, count: int = 0, *, scale: float = 1.0) -> torch.Tensor:
        x = self.up(x).relu()
        return self.down(torch.cat([2 * x[:, :count], x[:, count:]], 1)) * scale


def test_numbers_given_as_inputs_are_named() -> None:
    x = torch.randn(2, 4)
    given = infer(Cut(), (x, 3), {"scale": 2.5})
    assert sorted(g.size for g in given.generators()) == [3, 5]
    assert "numbers that were given as inputs (args[1] = 3, kwargs['scale'] = 2.5)" in str(given)
    assert not infer(Cut(), x).notes


class Drawing(nn.Module):
    """Adds noise, measures itself and differentiates by its input, as people's models do."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.enable_grad(), torch.profiler.record_function("span"):
            x = x.detach().requires_grad_()
            y = self.down(torch.tanh(self.up(x)) + 0.1 * torch.randn(6))
            (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return y, slope


@pytest.mark.filterwarnings("error")
def test_the_caller_s_random_numbers_are_left_alone() -> None:
    torch.manual_seed(5)
    model, before = Drawing(), torch.get_rng_state()
    symmetry = infer(model, torch.ones(3, 4))
    assert symmetry.stats["verified"] < 1e-9
    assert torch.equal(before, torch.get_rng_state())
    trace(model, torch.ones(3, 4))
    verify(model, torch.ones(3, 4), symmetry)
    assert torch.equal(before, torch.get_rng_state())


def test_what_is_no_symmetry_is_told() -> None:
    with pytest.raises(SymmetryError, match=r"takes what automerge\.infer returned, got a dict"):
        verify(Drawing(), torch.ones(3, 4), {})  # type: ignore[arg-type]


class Warm(nn.Module):
    """Keeps a lookup of its parameter from pass to pass, in eval mode, and drops it whenever the mode is set."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.bias = nn.Linear(4, 6), nn.Linear(6, 2), nn.Parameter(torch.zeros(6, 2))
        self.register_buffer("index", torch.tensor([0, 1, 1, 0]), persistent=False)
        self.cache: dict[str, torch.Tensor] = {}

    def train(self, mode: bool = True) -> Warm:
        self.cache = {}
        return super().train(mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training and "cpu" not in self.cache:
            self.cache["cpu"] = self.bias[:, self.index]
        table = self.bias[:, self.index] if self.training else self.cache["cpu"]
        return self.down(self.up(x) * (1 + table.sum(1)))


@pytest.mark.parametrize("gradients", [False, True])
def test_a_model_that_has_run_is_inferred_as_a_fresh_one(gradients: bool) -> None:
    x = torch.randn(3, 4)
    fresh, warm = Warm().eval(), Warm().eval()
    with torch.set_grad_enabled(gradients):
        warm(x)
    assert str(infer(warm, x)) == str(infer(fresh, x))
    assert [g.size for g in infer(warm, x).generators()] == [6, 2]
    models = [Warm().eval(), warm]
    for model in models:
        model(x)
    merged = merge(models, x, data=[x]).load_into(Warm().eval())
    assert torch.isfinite(merged(x)).all()
