"""Networks and data as people have them: several heads, padding, language models with ``labels``, random draws, wrappers."""

from __future__ import annotations

import itertools
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map_only

from automerge._errors import AutomergeError, CheckpointError, MatchingError, OutputError, SymmetryError, TraceError
from automerge._verify import verify
from automerge.cli import main
from automerge.compare import compare
from automerge.evaluate import agreement, barrier, cycle_error, evaluate, interpolate, similarity
from automerge.gauges import canonicalise
from automerge.infer import infer
from automerge.io import load_state_dict, save_state_dict
from automerge.landscape import plane
from automerge.matchers import (
    CCA,
    ActivationMatching,
    FrankWolfe,
    Identity,
    Matching,
    MergeMany,
    Synchronised,
    WeightMatching,
    match,
)
from automerge.merge import average, merge
from automerge.renormalise import Repair
from automerge.symmetry import Generator, Slot, Symmetry
from tests import _factories


# -------------------------------------------------------------------- several heads
class Heads(nn.Module):
    """A dict of two outputs, the scores not the first of them."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.size, self.kind = nn.Linear(4, 6), nn.Linear(6, 1), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        h = self.body(x).relu()
        return {"size": self.size(h).squeeze(-1), "parts": [self.kind(h), h > 0], "name": "heads"}


def _heads_data(sizes: list[int]) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    torch.manual_seed(3)
    return [(torch.randn(n, 4), {"size": torch.randn(n), "kind": torch.randint(0, 3, (n,))}) for n in sizes]


def _share(output: dict[str, Any], labels: dict[str, torch.Tensor]) -> torch.Tensor:
    return (output["parts"][0].argmax(1) == labels["kind"]).float().mean()


def _error(output: dict[str, Any], labels: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.mse_loss(output["size"], labels["size"])


def test_metrics_of_several_heads_are_weighted_by_samples() -> None:
    net, data = Heads(), _heads_data([7, 2, 1])
    x, labels = torch.cat([d[0] for d in data]), {k: torch.cat([d[1][k] for d in data]) for k in ("size", "kind")}
    found = evaluate(net, data, {"share": _share, "error": _error})
    with torch.no_grad():
        whole = net(x)
    assert found.samples == 10
    assert found.metrics["share"] == pytest.approx(float(_share(whole, labels)))
    assert found.metrics["error"] == pytest.approx(float(_error(whole, labels)), rel=1e-5)


def test_an_ensemble_s_output_has_the_form_of_one() -> None:
    nets, data = [Heads(s) for s in range(3)], _heads_data([5])
    found = evaluate(nets, data, {"share": _share, "error": _error})
    with torch.no_grad():
        outputs = [net(data[0][0]) for net in nets]
    mean = {"size": sum(o["size"] for o in outputs) / 3, "parts": [sum(o["parts"][0] for o in outputs) / 3]}
    assert found.metrics["error"] == pytest.approx(float(_error(mean, data[0][1])), rel=1e-5)
    assert found.metrics["share"] == pytest.approx(float(_share(mean, data[0][1])))


def test_one_score_is_no_choice_between_classes() -> None:
    net = nn.Linear(3, 1)
    x, labels = torch.randn(8, 3), torch.arange(8) % 2
    for y in (labels, torch.zeros(8).long()):
        with pytest.raises(AutomergeError, match=r"are no class indices for scores \(8, 1\); give a callable"):
            evaluate(net, [(x, y)])
    found = evaluate(net, [(x, labels)], {"right": lambda o, y: ((o[:, 0] > 0) == (y > 0)).float().mean()})
    assert (found.accuracy, found.samples) == (None, 8)
    for regressor in (net, nn.Sequential(net, nn.Flatten(0))):
        with pytest.raises(AutomergeError, match="one score per sample, and agreement is about classes"):
            agreement(regressor, regressor, [x])


# -------------------------------------------------------------------- language models
class Causal(nn.Module):
    """Takes labels as the causal models of transformers do: it shifts them itself."""

    def __init__(self, seed: int = 0, shift: int = 1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table, self.head, self.shift = nn.Embedding(7, 5), nn.Linear(5, 7), shift

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        scores = self.head(self.table(input_ids).cumsum(1).tanh())
        end = scores.shape[1] - self.shift
        loss = (
            None
            if labels is None
            else F.cross_entropy(scores[:, :end].flatten(0, 1), labels[:, self.shift :].flatten())
        )
        return SimpleNamespace(loss=loss, logits=scores)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("padded", [False, True])
def test_labels_that_are_the_inputs_are_read_as_the_model_reads_them(shift: int, padded: bool) -> None:
    net, tokens = Causal(shift=shift), torch.randint(0, 7, (6, 9), generator=torch.Generator().manual_seed(1))
    labels = tokens.masked_fill(torch.arange(9) > 5, -100) if padded else tokens
    data = [{"input_ids": t, "labels": y} for t, y in zip(tokens.split(3), labels.split(3), strict=True)]
    found = evaluate(net, data)
    with torch.no_grad():
        whole = net(tokens, labels)
    wanted = labels[:, shift:]
    right = (whole.logits[:, : 9 - shift].argmax(-1) == wanted)[wanted != -100]
    assert found.loss == pytest.approx(float(whole.loss), rel=1e-5)
    assert found.accuracy == pytest.approx(float(right.float().mean()))
    assert found.samples == right.numel()


def test_tokens_as_inputs_and_as_labels_of_a_pair() -> None:
    net, tokens = Causal(), torch.randint(0, 7, (4, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert evaluate(net, [(tokens, tokens)]).loss == pytest.approx(float(net(tokens, tokens).loss), rel=1e-5)
    copy = nn.Sequential(net.table, net.head)  # says nothing about labels: they are what they are
    with torch.no_grad():
        here = F.cross_entropy(copy(tokens).flatten(0, 1), tokens.flatten())
    assert evaluate(copy, [(tokens, tokens)]).loss == pytest.approx(float(here), rel=1e-5)


class Seq2Seq(nn.Module):
    """Decodes from its labels, as T5 does."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table, self.mix, self.head = nn.Embedding(7, 5), nn.Linear(5, 6), nn.Linear(6, 7)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        if labels is None:
            raise ValueError("nothing to decode")
        start = self.table(input_ids).mean(1, keepdim=True)
        return self.head(self.mix(start + self.table(labels.roll(1, 1))).relu())


def test_labels_that_are_inputs_too() -> None:
    nets, tokens = [Seq2Seq(s) for s in range(2)], torch.randint(0, 7, (4, 9))
    batch = {"input_ids": tokens, "labels": tokens}
    result = merge(nets, (), batch, data=[batch, batch])
    assert [layer.name for layer in result.repair.layers] == ["mix.weight"]
    with pytest.raises(AutomergeError, match=r"nothing to decode; a batch's entries but for its labels must be"):
        merge(nets, (), {"input_ids": tokens}, data=[batch])


def test_labels_that_are_shifted_already_stay() -> None:
    net, tokens = Causal(), torch.randint(0, 7, (4, 9), generator=torch.Generator().manual_seed(1))
    found = evaluate(net, [{"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}])
    with torch.no_grad():
        assert found.loss == pytest.approx(float(net(tokens, tokens).loss), rel=1e-5)


class Cached(nn.Module):
    """Returns keys and values unless it is told not to, as transformers' decoders do."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.config = SimpleNamespace(use_cache=True)
        self.q, self.k, self.v, self.o = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: torch.Tensor, use_cache: bool | None = None) -> Any:
        q, k, v = self.q(x), self.k(x), self.v(x)
        y = self.o(F.scaled_dot_product_attention(q, k, v))
        return (y, (k, v)) if (self.config.use_cache if use_cache is None else use_cache) else (y,)


def test_a_cache_of_keys_and_values_pins_no_heads() -> None:
    nets = [Cached(s) for s in range(2)]
    x = torch.randn(3, 5, 4)
    assert sorted(g.size for g in merge(nets, x, repair="none").symmetry.sets) == [4, 4]
    assert not merge(nets, x, {"use_cache": True}, repair="none").symmetry.sets  # asked for, they are outputs


# -------------------------------------------------------------------- padding, random draws
def test_padding_takes_no_part_in_agreement() -> None:
    x = torch.randn(4, 6, 3)
    labels = torch.randint(0, 3, (4, 6)).masked_fill(torch.arange(6) > 3, -100)
    net = nn.Identity()
    other = x.clone()
    other[:, 4:] = -x[:, 4:]
    swapped = _Constant(other)
    assert agreement(net, swapped, [(x, labels)], class_axis=-1).share == 1.0
    assert agreement(net, swapped, [(x, labels)], class_axis=-1).samples == 16
    assert agreement(net, swapped, [x], class_axis=-1).share < 1.0


class _Constant(nn.Module):
    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.value


class Tagger(nn.Module):
    """Scores for every token, and none of its own for padding: there they are the sum of the weights."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table, self.hidden, self.out = nn.Embedding(8, 6), nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.out(self.hidden(self.table(tokens)).relu())


def test_padding_takes_no_part_in_a_comparison() -> None:
    nets = [Tagger(s) for s in range(2)]
    tokens = torch.randint(1, 8, (40, 5), generator=torch.Generator().manual_seed(0))
    labels = tokens % 3
    for net in nets:
        optimiser = torch.optim.Adam(net.parameters(), 0.03)
        for _ in range(60):
            optimiser.zero_grad()
            F.cross_entropy(net(tokens).flatten(0, 1), labels.flatten()).backward()
            optimiser.step()
        with torch.no_grad():
            net.table.weight[0] = 0  # the models disagree on padding
            net.out.bias += 0.01 * F.one_hot(torch.tensor(nets.index(net)), 3)
    tokens[:, 3:] = 0
    labels[:, 3:] = -100
    found = compare(nets, tokens[:2], [(tokens, labels)], matchers={"identity": Identity()}, repairs={"none": "none"})
    for own in found.models:
        assert own.accuracy == 1.0
        assert own.agreement == 1.0


class Noisy(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.one(x)
        return self.two((h + torch.randn_like(h)).relu())


def test_random_draws_are_not_the_caller_s() -> None:
    nets = [Noisy(s) for s in range(2)]
    x, y = torch.randn(30, 4), torch.arange(30) % 3
    before = torch.get_rng_state()
    symmetry = merge(nets, x, repair="none").symmetry
    merge(nets, x, matcher=ActivationMatching(), data=[x, x + 1], symmetry=symmetry)
    first = evaluate(nets[0], [(x, y)])
    assert evaluate(nets[0], [(x, y)]) == first
    states = [net.state_dict() for net in nets]
    agreement(nets[0], nets[1], [x])
    barrier(nets[0], *states, [(x, y)], 3, Repair())
    one, two = (merge(nets, x, symmetry=symmetry, data=[x, x + 1]).state_dict for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[n], two[n]) for n in one)
    torch.manual_seed(99)
    assert evaluate(nets[0], [(x, y)]) != first  # the caller's seed decides


# -------------------------------------------------------------------- checkpoints, the command line
def test_the_prefix_of_a_lightning_module(tmp_path: Path) -> None:
    state = _factories.mlp().state_dict()
    file = tmp_path / "m.ckpt"
    torch.save({"state_dict": {f"net.model.{n}": v for n, v in state.items()}, "epoch": 3}, file)
    assert set(load_state_dict(file, state)) == set(state)
    assert set(load_state_dict(file)) == {f"net.model.{n}" for n in state}
    torch.save({"state_dict": {**{f"net.{n}": v for n, v in state.items()}, "loss.weight": torch.ones(3)}}, file)
    assert "loss.weight" in load_state_dict(file, state)  # not all of it is the architecture's
    compiled = {f"_orig_mod.model.{n}": v for n, v in state.items()}
    torch.save(compiled, file)
    assert set(load_state_dict(file, state)) == set(state)


def test_the_command_line_finds_how_many_inputs_a_model_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "users_two.py").write_text(
        "import torch\nfrom torch import nn\n\n\n"
        "class Two(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)\n\n"
        "    def forward(self, x, length, scale=None):\n        return self.b(self.a(x).relu() / length[:, None])\n\n\n"
        "def batches():\n    torch.manual_seed(0)\n"
        "    return [(torch.randn(64, 3), torch.ones(64), torch.arange(64) % 2) for _ in range(2)]\n"
    )
    for seed in range(2):
        torch.manual_seed(seed)
        parts = {"a": nn.Linear(3, 6), "b": nn.Linear(6, 2)}
        save_state_dict(f"{seed}.safetensors", nn.ModuleDict(parts).state_dict())
    shared = ["users_two:Two", "0.safetensors", "1.safetensors", "--data", "users_two:batches"]
    assert main(["merge", *shared, "-o", "m.safetensors"]) == 0
    assert main(["compare", *shared, "--matchers", "identity", "--repairs", "none"]) == 0
    assert "2 models of users_two:Two" in capsys.readouterr().out
    assert set(load_state_dict("m.safetensors")) == {"a.weight", "a.bias", "b.weight", "b.bias"}


@pytest.mark.parametrize("wrap", [torch.nn.utils.weight_norm, torch.nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_modules_that_keep_a_weight_of_their_last_pass(wrap: Any) -> None:
    nets = []
    for seed in range(2):
        torch.manual_seed(seed)
        nets.append(nn.Sequential(wrap(nn.Linear(3, 5)), nn.ReLU(), nn.Linear(5, 2)))
        F.cross_entropy(nets[-1](_X), _Y).backward()  # leaves a weight with a history on the module
        nets[-1].eval()
    states = [net.state_dict() for net in nets]
    one = merge(nets, _X, data=[_X])
    two = merge(states, _X, architecture=nets[0], data=[_X])
    assert [g.size for g in one.symmetry.sets] == [5]
    assert all(torch.equal(one.state_dict[n], two.state_dict[n]) for n in states[0])
    compare(nets, _X, [(_X, _Y)] * 4, matchers={"identity": Identity()}, repairs={"none": "none"})


def test_statistics_of_a_compiled_model_are_reset() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).eval()
    plain = merge([net, net], _X, data=[_X])
    both = [torch.compile(net, backend="eager")] * 2
    found = merge(both, _X, data=[_X])
    assert found.repair.reset == ("_orig_mod.1",)
    assert torch.equal(found.state_dict["_orig_mod.1.running_mean"], plain.state_dict["1.running_mean"])


class Auxiliary(nn.Module):
    """A head that training alone uses."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)
        self.out, self.extra = nn.Linear(4, 2), nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))

    def forward(self, x: torch.Tensor) -> Any:
        h = self.norm(self.body(x)).relu()
        return (self.out(h), self.extra(h)) if self.training else self.out(h)


def test_statistics_that_no_batch_reaches_are_named() -> None:
    found = merge([Auxiliary(), Auxiliary()], _X, data=[_X])
    assert found.repair.reset == ("norm",)
    assert "extra.1: left alone, the data give its calls fewer than two values" in str(found)


def test_what_the_command_line_says_of_a_file_and_of_a_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(tmp_path / f"{k}.safetensors") for k in range(2)]
    for file in files:
        save_state_dict(file, _factories.mlp().state_dict())
    end = ["-o", str(tmp_path / "m.safetensors"), "--data", "tests.test_users:pair"]
    assert main(["merge", "zoo/models/mlp.py:build", *files, *end[:2], "--input", "1,1,8,8"]) == 2
    assert "names a file; name its module: zoo.models.mlp:build" in capsys.readouterr().err
    assert main(["merge", "tests._factories:mlp", *files, *end]) == 2
    assert "if they are the inputs and labels of one batch, give [(inputs, labels)]" in capsys.readouterr().err


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(8, 1, 4, 4), torch.zeros(8).long()


# -------------------------------------------------------------------- odd calls
@dataclass(frozen=True)
class _Odd:
    kind: type[AutomergeError]
    message: str
    call: Any


class _Extra(nn.Linear):
    def get_extra_state(self) -> bytes:
        return b"weights, perhaps"

    def set_extra_state(self, state: Any) -> None:
        pass


class _Single(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 2)

    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("once only")


class _Wrapped(torch.Tensor):
    """A tensor that holds others, as those of sharded or quantised models do."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined]

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> Any:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, *_: Any) -> Any:
        return _Wrapped(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return _Wrapped(args[0].inner)
        return func(*tree_map_only(_Wrapped, lambda t: t.inner, args), **(kwargs or {}))


def _wrapped() -> nn.Module:
    net = nn.Linear(3, 2)
    net.weight = nn.Parameter(_Wrapped(net.weight.detach()), requires_grad=False)
    return net


def _lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(4))


def _scripted(frozen: bool = False) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        net = torch.jit.script(nn.Linear(3, 2).eval())
        return torch.jit.freeze(net) if frozen else net


def _empty() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def _wider() -> dict[str, torch.Tensor]:
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).state_dict()


_NET = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
_SD, _X, _Y = _NET.state_dict(), torch.randn(6, 3), torch.arange(6) % 2
_EXTRA = _Extra(3, 2)
_PASS: dict[str, Any] = {"data": [_X], "verify": False}
_ODD = {
    "inputs and labels": _Odd(
        AutomergeError,
        r"data is a tuple of different tensors.*\[\(inputs, labels\)\]",
        lambda: evaluate(_NET, (_X, _Y)),
    ),
    "one dict": _Odd(AutomergeError, r"is it one batch\? then give \[batch\]", lambda: evaluate(_NET, {"input": _X})),
    "too few inputs": _Odd(
        AutomergeError, "inputs= says how many items", lambda: evaluate(nn.Bilinear(3, 3, 2), [(_X, _X, _Y)])
    ),
    "class as a metric": _Odd(
        AutomergeError, r"is the class MSELoss; give one: MSELoss\(\)", lambda: evaluate(_NET, [(_X, _Y)], nn.MSELoss)
    ),
    "metric without a number": _Odd(
        AutomergeError,
        "gave None; it must give one number",
        lambda: evaluate(_NET, [(_X, _Y)], {"m": lambda o, y: None}),
    ),
    "reset without a norm": _Odd(
        AutomergeError, "needs BatchNorm statistics", lambda: barrier(_NET, _SD, _SD, [(_X, _Y)], 3, "reset")
    ),
    "reset in a plane": _Odd(
        AutomergeError, "needs BatchNorm statistics", lambda: plane(_NET, _SD, _SD, _SD, [(_X, _Y)], 3, repair="reset")
    ),
    "position": _Odd(AutomergeError, "a number from 0 to 1, got 'a'", lambda: interpolate(_SD, _SD, "a")),  # type: ignore[arg-type]
    "cycle": _Odd(MatchingError, "takes what automerge.match returns, got a list", lambda: cycle_error([1, 2])),
    "path as a model": _Odd(
        CheckpointError, r"model 0 is a str.*load_state_dict\(path\) reads", lambda: merge(["a.pt", "b.pt"], _X)
    ),  # type: ignore[list-item]
    "one module": _Odd(CheckpointError, "models is one Sequential; give a list", lambda: merge(_NET, _X)),  # type: ignore[arg-type]
    "models of a comparison": _Odd(
        CheckpointError, "models is one str; give a list", lambda: compare("a.pt", _X, [_X])
    ),  # type: ignore[arg-type]
    "progress": _Odd(AutomergeError, "progress= is called", lambda: merge([_NET, _NET], _X, progress=3)),  # type: ignore[arg-type]
    "path moved": _Odd(
        MatchingError,
        "a state dict or a module, got a str",
        lambda: match([_NET, _NET], merge([_NET, _NET], _X).symmetry).apply(["a", "b"]),
    ),  # type: ignore[list-item]
    "weights of an average": _Odd(MatchingError, "got 1 weights for 2 models", lambda: average([_SD, _SD], [1])),
    "module in an average": _Odd(CheckpointError, "expected a state dict", lambda: average([_NET], [1])),  # type: ignore[list-item]
    "average of nothing": _Odd(MatchingError, "at least one state dict", lambda: average([], [])),
    "class to load into": _Odd(
        CheckpointError, "takes a module, such as build", lambda: merge([_NET, _NET], _X).load_into(nn.Linear)
    ),  # type: ignore[arg-type]
    "state dict as a path": _Odd(
        CheckpointError, "takes the path of a file, got a OrderedDict", lambda: load_state_dict(_SD)
    ),  # type: ignore[arg-type]
    "as torch.save": _Odd(OutputError, "the path comes first", lambda: save_state_dict(_SD, "a.safetensors")),  # type: ignore[arg-type]
    "no models": _Odd(CheckpointError, "models is one NoneType", lambda: merge(None, _X)),  # type: ignore[arg-type]
    "weights beyond numbers": _Odd(
        MatchingError, "too large to be added up", lambda: average([_SD, _SD], [1e308, 1e308])
    ),
    "average of two architectures": _Odd(
        CheckpointError, r"differs from the first in '0\.weight'", lambda: average([_SD, {"0.bias": _X}], [1, 1])
    ),
    "number as a folder": _Odd(OutputError, "path of a directory", lambda: merge([_NET, _NET], _X, offload=3)),  # type: ignore[arg-type]
    "nowhere on a line": _Odd(AutomergeError, "got nan", lambda: interpolate(_SD, _SD, float("nan"))),
    "fewer than no inputs": _Odd(AutomergeError, "inputs=-1", lambda: evaluate(_NET, [(_X, _Y)], inputs=-1)),
    "no elements": _Odd(
        AutomergeError, "elements=0 would test nothing", lambda: verify(_NET, _X, infer(_NET, _X), elements=0)
    ),
    "any difference": _Odd(
        AutomergeError, "tolerance=nan", lambda: verify(_NET, _X, infer(_NET, _X), tolerance=float("nan"))
    ),
    "gauges of nothing": _Odd(CheckpointError, "one or more", lambda: canonicalise(_NET, _X, [], infer(_NET, _X))),
    "gauges of modules": _Odd(
        CheckpointError, "expected a state dict", lambda: canonicalise(_NET, _X, [_NET], infer(_NET, _X))
    ),  # type: ignore[list-item]
    "gauges of another network": _Odd(
        CheckpointError, "model 0 has no key", lambda: canonicalise(_NET, _X, [{"w": _X}], infer(_NET, _X))
    ),
    "gauges without a symmetry": _Odd(
        SymmetryError, "what automerge.infer returns", lambda: canonicalise(_NET, _X, [_SD], None)
    ),  # type: ignore[arg-type]
    "metadata": _Odd(OutputError, "a mapping of names to text", lambda: save_state_dict("a.safetensors", _SD, "me")),  # type: ignore[arg-type]
    "name of the header": _Odd(
        OutputError, "belongs to safetensors", lambda: save_state_dict("a.safetensors", {"__metadata__": _X})
    ),
    "TorchScript and data": _Odd(
        AutomergeError, "give the module that was scripted", lambda: merge([_scripted(), _scripted()], _X, data=[_X])
    ),
    "DataParallel and data": _Odd(
        AutomergeError, r"give that, model\.module", lambda: merge([nn.DataParallel(_NET)] * 2, _X, data=[_X])
    ),
    "weights whose products are too large": _Odd(
        MatchingError, "dtype='float64'", lambda: merge([_NET, {n: v * 1e30 for n, v in _SD.items()}], _X)
    ),
    "inputs in a string": _Odd(AutomergeError, "inputs='1'", lambda: evaluate(_NET, [(_X, _Y)], inputs="1")),  # type: ignore[arg-type]
    "two metrics of one name": _Odd(
        AutomergeError, "two metrics are called '<lambda>'", lambda: evaluate(_NET, [(_X, _Y)], [lambda o, y: 1.0] * 2)
    ),
    "margin": _Odd(AutomergeError, "margin=nan", lambda: plane(_NET, _SD, _SD, _SD, [(_X, _Y)], margin=float("nan"))),
    "reference that is true": _Odd(
        MatchingError, r"FrankWolfe\(seed=True\): expected a whole number", lambda: FrankWolfe(seed=True)
    ),
    "restarts by halves": _Odd(MatchingError, "expected a whole number", lambda: MergeMany(restarts=0.5)),  # type: ignore[arg-type]
    "seed below zero": _Odd(MatchingError, "expected a number of at least 0", lambda: WeightMatching(seed=-1)),
    "tolerance in words": _Odd(MatchingError, "expected a number", lambda: FrankWolfe(gap_tolerance="x")),  # type: ignore[arg-type]
    "reference in words": _Odd(MatchingError, "expected a whole number", lambda: CCA(reference="a")),  # type: ignore[arg-type]
    "class as solver": _Odd(MatchingError, "expected a Matcher", lambda: ActivationMatching(WeightMatching)),  # type: ignore[arg-type]
    "no pairwise matcher": _Odd(MatchingError, "expected a Pairwise", lambda: Synchronised(FrankWolfe())),  # type: ignore[arg-type]
    "a name to go on from": _Odd(MatchingError, "expected a Matching", lambda: FrankWolfe(resume="a")),  # type: ignore[arg-type]
    "frozen TorchScript": _Odd(
        TraceError, "infer on the module before freeze", lambda: infer(_scripted(frozen=True), _X)
    ),
    "exported": _Odd(
        TraceError,
        "infer on the module that was exported",
        lambda: infer(torch.export.export(_NET, (_X,)).module(), _X),
    ),
    "lazy": _Odd(CheckpointError, "not initialised yet", lambda: merge([_lazy(), _lazy()], _X)),
    "one lazy": _Odd(
        CheckpointError, "not initialised yet", lambda: merge([nn.Sequential(nn.Linear(3, 4)), _lazy()], _X)
    ),
    "lazy match": _Odd(CheckpointError, "not initialised yet", lambda: match([_lazy(), _lazy()], infer(_NET, _X))),
    "bytes evaluated": _Odd(
        CheckpointError, "is a bytes that may hold", lambda: evaluate((_EXTRA, _EXTRA.state_dict()), [(_X, _Y)])
    ),
    "bytes merged": _Odd(
        CheckpointError, "_extra_state is a bytes in the architecture", lambda: merge([_Extra(3, 2), _Extra(3, 2)], _X)
    ),
    "bytes averaged": _Odd(CheckpointError, "is a bytes that", lambda: average([_EXTRA.state_dict()] * 2, [1, 1])),
    "bytes compared": _Odd(
        CheckpointError, "is a bytes that", lambda: similarity(_EXTRA.state_dict(), _EXTRA.state_dict())
    ),
    "bytes on a path": _Odd(
        CheckpointError, "is a bytes that", lambda: interpolate(_EXTRA.state_dict(), _EXTRA.state_dict(), 0.5)
    ),
    "no copy": _Odd(
        AutomergeError,
        r"_Single cannot be copied .*once only",
        lambda: merge([_Single(), _Single()], _X, matcher=CCA(), **_PASS),
    ),
    "wrapped tensors": _Odd(TraceError, "is a _Wrapped; infer on the model with plain", lambda: infer(_wrapped(), _X)),
    "merge of wrapped tensors": _Odd(
        CheckpointError, "is a _Wrapped; give plain tensors", lambda: merge([_wrapped(), _wrapped()], _X)
    ),
    "one wrapped": _Odd(
        CheckpointError,
        r"its names lack 'module\.'",
        lambda: merge([nn.DataParallel(_NET), _NET], _X),
    ),
    "index of a list": _Odd(
        SymmetryError,
        "must be a numpy array, got a list",
        lambda: Symmetry({"a": (2,)}, (Generator(2, (Slot("a", 0, [[0], [1]]),)),)),  # type: ignore[arg-type]
    ),
    "match without a symmetry": _Odd(MatchingError, "expected the Symmetry", lambda: match([_NET, _NET], None)),  # type: ignore[arg-type]
    "matching of nothing": _Odd(CheckpointError, "path of a file, got a NoneType", lambda: Matching.load(None)),  # type: ignore[arg-type]
    "shards in words": _Odd(
        OutputError,
        "a number of bytes, got '5GB'",
        lambda: save_state_dict("a.safetensors.index.json", _SD, shard_bytes="5GB"),  # type: ignore[arg-type]
    ),
    "evaluation of another width": _Odd(
        CheckpointError, "the shape of '0.weight'", lambda: evaluate((_NET, _wider()), [(_X, _Y)])
    ),
    "evaluation without values": _Odd(
        CheckpointError, "0.weight of the module is on the meta device", lambda: evaluate((_empty(), _SD), [(_X, _Y)])
    ),
    "similarity without values": _Odd(
        CheckpointError, "on the meta device", lambda: similarity(_SD, _SD, model=_empty(), data=[_X])
    ),
    "repair without values": _Odd(CheckpointError, "on the meta device", lambda: Repair()(_empty(), _SD, [_SD], [_X])),
    "gauges without values": _Odd(
        CheckpointError, "on the meta device", lambda: canonicalise(_empty(), _X, [_SD], infer(_NET, _X))
    ),
    "verification without values": _Odd(
        CheckpointError, "on the meta device", lambda: verify(_empty(), _X, infer(_NET, _X))
    ),
    "into what keeps nothing": _Odd(
        CheckpointError, "on the meta device", lambda: merge([_NET, _NET], _X).load_into(_empty())
    ),
    "module to save": _Odd(
        OutputError, "writes a state dict, got a Sequential", lambda: save_state_dict("a.safetensors", _NET)
    ),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", _ODD)
def test_odd_calls_get_one_clear_error(name: str) -> None:
    odd = _ODD[name]
    with pytest.raises(odd.kind, match=odd.message):
        odd.call()


def test_numbers_of_numpy_are_numbers() -> None:
    best, half = np.argmax([0.1, 0.9]), np.float32(0.5)
    result = merge([_NET, _NET], _X, coordinates=best, matcher=FrankWolfe(seed=best, block_weights={"0.weight": half}))
    assert result.to_dict()["provenance"]["options"]["coordinates"] == 1
    assert json.dumps(result.to_dict())
    assert interpolate(_SD, _SD, half).keys() == _SD.keys()
    assert len(barrier(_NET, _SD, _SD, [(_X, _Y)], best + 1).losses) == 2


def test_weights_whose_products_are_too_large_are_matched_in_float64() -> None:
    large = {n: v * 1e30 for n, v in _SD.items()}
    merged = merge([_NET, large], _X, matcher=FrankWolfe(dtype="float64")).state_dict
    assert all(bool(v.isfinite().all()) for v in merged.values())


def test_compiled_modules() -> None:
    nets = [nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)) for _ in range(2)]
    plain = merge(nets, _X, data=[_X]).state_dict
    found = merge([torch.compile(net, backend="eager") for net in nets], _X, data=[_X]).state_dict
    assert all(torch.equal(found[f"_orig_mod.{n}"], v) for n, v in plain.items())


@pytest.mark.parametrize("repair", ["auto", "both"])
def test_batchnorm_of_which_only_the_tensors_are_read(repair: Any) -> None:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inp, self.norm, self.out = nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            own = self.norm
            h = nn.functional.batch_norm(self.inp(x), own.running_mean, own.running_var, own.weight, own.bias)
            return self.out(h.relu())

    report = merge([Read().eval() for _ in range(2)], _X, data=[_X, _X], repair=repair).repair
    assert report is not None
    assert report.reset == (("norm",) if repair == "both" else ())
    assert ("norm" in report.skipped) is (repair == "auto")
    assert repair == "both" or "give its calls fewer than two" in report.skipped["norm"]


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "net."])
def test_state_dicts_of_a_wrapped_module(prefix: str) -> None:
    states = [nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).state_dict() for _ in range(2)]
    wrapped = [{prefix + n: v for n, v in s.items()} for s in states]
    plain = merge(states, _X, architecture=_NET).state_dict
    found = merge(wrapped, _X, architecture=_NET).state_dict
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[n], v) for n, v in plain.items())


def test_weights_that_fit_modules_of_another_type_are_named() -> None:
    other = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    assert any("model 1: 1 is a Tanh, in the architecture a ReLU" in note for note in merge([_NET, other], _X).notes)
    assert not any("is a" in note for note in merge([_NET, _NET], _X).notes)


def test_a_repair_that_saw_nothing_says_so() -> None:
    other = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    report = str(merge([_NET, other], _X, data=[torch.ones(8, 3)]))
    assert "Repair (repair): 0 layers rescaled" in report
    assert "nothing varies on these data" in report
    assert "nothing varies" not in str(merge([_NET, other], _X, data=[_X]))


def test_an_average_normalises_its_weights() -> None:
    states = [{"w": torch.zeros(2)}, {"w": torch.full((2,), 3.0)}]
    for weights in ([1, 2], torch.tensor([1.0, 2.0]), (2.0, 4.0)):
        assert average(states, weights)["w"].tolist() == [2.0, 2.0]  # type: ignore[arg-type]


def test_batches_of_one_kind_are_no_pair() -> None:
    x = torch.randn(6, 4, 3)
    for data in (x.split(2), [x, x[:2]], itertools.repeat(x, 2)):
        assert merge([_NET, _NET], x, data=data).repair.mode == "repair"
    match([_NET, _NET], merge([_NET, _NET], x).symmetry, ActivationMatching(FrankWolfe()), data=[x, x[:, :2]])


def test_compiled_models_are_run_as_they_are_written() -> None:
    """Nothing is compiled for the few passes that a merge takes."""
    compiled: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    nets = [
        torch.compile(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), backend=backend) for _ in range(2)
    ]
    result = merge(nets, _X, data=[_X])
    assert agreement(nets[0], nets[1], [_X]).samples == len(_X)
    assert result.repair.layers
    assert not compiled
    nets[0](_X)
    assert compiled, "the caller's own pass compiles"
