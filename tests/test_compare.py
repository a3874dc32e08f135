"""The comparison: disjoint data, honest rows, JSON, one page, and the command."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from automerge import (
    CCA,
    FrankWolfe,
    Identity,
    Matcher,
    Matching,
    Repair,
    ZipIt,
    compare,
    evaluate,
    infer,
    merge,
    save_state_dict,
)
from automerge._comparison import COLUMNS, Comparison, Row, Score
from automerge._comparison_page import page
from automerge._console import Console
from automerge._data import Batch
from automerge._errors import AutomergeError, MatchingError
from automerge._split import split_batches
from automerge.cli import main
from automerge.compare import REPAIRS
from automerge.matchers import MATCHERS
from tests import _factories

torch.set_num_threads(1)


def problem(count: int = 3, seed: int = 0) -> tuple[list[nn.Module], list[tuple[torch.Tensor, torch.Tensor]]]:
    """Small networks trained on one task from several seeds, and data."""
    torch.manual_seed(seed)
    x = torch.randn(400, 4)
    y = (x[:, 0] * x[:, 1] > 0).long() + (x[:, 2] > 0.5).long()
    nets = []
    for _ in range(count):
        net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
        optimiser = torch.optim.Adam(net.parameters(), 0.02)
        for _ in range(60):
            optimiser.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimiser.step()
        nets.append(net.eval())
    return nets, [(x[:150], y[:150]), (x[150:], y[150:])]


def test_checkpoints_in_another_precision_are_compared_as_the_architecture_would_load_them() -> None:
    nets, data = problem()
    types = (torch.half, torch.double, torch.float)
    states = [{k: v.to(t) for k, v in n.state_dict().items()} for n, t in zip(nets, types, strict=True)]
    chosen = {"matchers": {n: MATCHERS[n]() for n in ("frank-wolfe", "cca")}, "architecture": nets[0]}
    found = compare(states, data[0][0][:2], data, **chosen)
    assert not [row.error for row in found.rows if row.error]
    expected = compare(nets, data[0][0][:2], data, **chosen)
    for one, other in zip(found.models, expected.models, strict=True):
        assert one.accuracy == pytest.approx(other.accuracy, abs=0.02)


def test_an_architecture_without_values_takes_the_first_model_s() -> None:
    nets, data = problem(2)
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    states = [n.state_dict() for n in nets]
    chosen = {"matchers": {"frank-wolfe": FrankWolfe()}, "repairs": {"reset": "none"}}
    found, expected = (compare(states, data[0][0][:2], data, architecture=a, **chosen) for a in (empty, nets[0]))
    assert found.models == expected.models
    assert [r.report for r in found.rows] == [r.report for r in expected.rows]


# -------------------------------------------------------------------- cuts
@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(4, 30), min_size=1, max_size=4),
    st.lists(st.integers(1, 3), min_size=1, max_size=4),
    st.integers(0, 99),
)
def test_parts_are_disjoint_and_complete(sizes: list[int], shares: list[int], seed: int) -> None:
    start = 0
    batches = []
    for n in sizes:
        numbers = torch.arange(start, start + n)
        batches.append(Batch((numbers.double()[:, None],), {"extra": -numbers}, numbers))
        start += n
    with contextlib.suppress(AutomergeError):  # a part that would be empty
        check_parts(split_batches(batches, shares, seed), shares, start, len(sizes))


def check_parts(parts: list[list[Batch]], shares: list[int], start: int, slack: int) -> None:
    labels = [torch.cat([b.labels for b in part]).tolist() for part in parts]
    assert sorted(itertools.chain(*labels)) == list(range(start))
    for part in parts:
        for batch in part:
            assert torch.equal(batch.args[0][:, 0], batch.labels.double())
            assert torch.equal(batch.kwargs["extra"], -batch.labels)
    for own, share in zip(labels, shares, strict=True):
        assert abs(len(own) - start * share / sum(shares)) <= slack


def test_data_given_twice_are_noticed() -> None:
    nets, data = problem(2)
    fixes: Any = {"none": "none"}
    one: Any = {"matchers": {"identity": Identity()}, "repairs": fixes}
    apart = compare(nets, data[0][0], data, **one)
    assert not any("flatters" in n for n in apart.notes)
    twice = compare(nets, data[0][0], data[:1], select=data, report=data[1:], **one)
    assert [n for n in twice.notes if "flatters" in n] == [
        "250 of the 250 samples of the report are also among those that select: the report flatters"
    ]


def test_units_merged_within_models_have_equal_weights_only() -> None:
    nets, data = problem()
    found = compare(nets, data[0][0][:4], data, matchers={"z": ZipIt(), "i": Identity()}, weights=[0.5, 0.25, 0.25])
    rows = {row.matcher: row for row in found.rows}
    assert "equal weights" in rows["z"].error
    assert not rows["i"].error


def test_what_is_fitted_and_selected_on_the_same_samples_is_said() -> None:
    nets, data = problem()
    found = compare(nets, data[0][0][:4], data[:1], select=data[:1], report=data[1:], matchers={"i": Identity()})
    assert any("150 of the 150 samples that select are also among those that calibrate" in n for n in found.notes)


def test_small_pieces_are_joined_again() -> None:
    """As few batches as fit into the largest that was given, and only those of one form."""
    batches = [Batch((torch.full((10, 2), float(k)),), {}, torch.full((10,), k)) for k in range(8)]
    batches[4] = Batch((torch.full((10, 3), 4.0),), {}, torch.full((10,), 4))
    quarter, rest = split_batches(batches, [1, 3], 0)
    sizes = [len(b.labels) for b in quarter]
    assert sum(sizes) == sum(int((b.labels == k).sum()) for b in quarter for k in range(8))
    assert len(sizes) <= 5
    assert max(sizes) <= 10
    assert [len(b.labels) for b in rest] == [8] * 8 or sum(len(b.labels) for b in rest) == 80 - sum(sizes)
    for batch in (*quarter, *rest):
        assert (batch.args[0] == batch.labels[:, None]).all()
        assert batch.args[0].shape[1] == (3 if 4 in batch.labels else 2)


@pytest.mark.parametrize("length", [1, 2])
def test_batches_of_one_or_two_samples_are_cut_too(length: int) -> None:
    sizes = [length + k % 3 for k in range(40)]  # of another form each, as sentences are
    batches = [Batch((torch.full((length, n), float(k)),), {}, torch.full((length,), k)) for k, n in enumerate(sizes)]
    parts = split_batches(batches, [1, 1, 2], 0)
    found = [sorted(int(y) for b in part for y in b.labels) for part in parts]
    assert sorted(k for part in found for k in part) == sorted(k for k in range(40) for _ in range(length))
    assert [len(part) for part in found] == [10 * length, 10 * length, 20 * length]


def test_data_that_cannot_be_cut() -> None:
    with pytest.raises(AutomergeError, match=r"lengths \[3, 5\]; give separate data"):
        split_batches([Batch((torch.ones(3), torch.ones(5)))], [1, 1], 0)
    with pytest.raises(AutomergeError, match="too few"):
        split_batches([Batch((torch.ones(1),))], [1, 1], 0)
    with pytest.raises(AutomergeError, match="batch 0 cannot be cut into samples: it holds a sparse tensor"):
        split_batches([Batch((torch.eye(4).to_sparse(),))], [1, 1], 0)


# -------------------------------------------------------------------- the table
@dataclass(frozen=True)
class Broken(Matcher):
    def match(self, models: Any, symmetry: Any, *, progress: Any = None, data: Any = None) -> Matching:
        raise ValueError("it does not work")


def test_every_row_is_what_merging_by_hand_gives() -> None:
    nets, data = problem()
    parts = [
        [(b.args[0], b.labels) for b in part]
        for part in split_batches([Batch((x,), {}, y) for x, y in data], [1, 1, 1], 5)
    ]
    matchers = {"fw": FrankWolfe(), "cca": CCA(), "broken": Broken()}
    found = compare(nets, data[0][0], parts[0], select=parts[1], report=parts[2], matchers=matchers, seed=1)
    names = [n for n in REPAIRS if n not in ("reset", "both")]
    assert {(r.matcher, r.repair) for r in found.rows if not r.error} == {
        (m, r) for m in ("identity", "fw", "cca") for r in names
    }
    assert [r.error for r in found.rows if r.matcher == "broken"] == ["ValueError: it does not work"]
    keys = [r.select.key for r in found.rows if r.select is not None]
    assert keys == sorted(keys, reverse=True)
    models = [evaluate(net, parts[2]) for net in nets]
    assert [m.accuracy for m in found.models] == [m.accuracy for m in models]
    assert found.ensemble.accuracy == evaluate(nets, parts[2]).accuracy
    mean = sum(float(m.loss or 0) for m in models) / 3
    naive = next(r for r in found.rows if r.name == "identity + none")
    for row in found.rows:
        if row.error:
            continue
        assert row.report is not None
        assert row.select is not None
        merged = merge(
            nets,
            data[0][0],
            symmetry=infer(nets[0], data[0][0]),
            matcher={"identity": Identity(), **matchers}[row.matcher],
            data=parts[0],
            repair=REPAIRS[row.repair],  # type: ignore[arg-type]
        )
        expected = evaluate((nets[0], merged.state_dict), parts[2])
        assert row.report.accuracy == expected.accuracy
        assert row.report.loss == pytest.approx(expected.loss, rel=1e-6)
        assert row.barrier == pytest.approx(float(expected.loss or 0) - mean, rel=1e-5, abs=1e-7)
        assert row.select.accuracy == evaluate((nets[0], merged.state_dict), parts[1]).accuracy
        assert row.worse_than_naive == row.report.worse_than(naive.report)  # type: ignore[arg-type]
        assert row.fits == (row.repair == "least squares")
        assert (row.drift > 0) == (row.matcher == "cca")
    json.dumps(found.to_dict())


def test_one_split_is_cut_and_labels_are_not_needed() -> None:
    nets, data = problem(2)
    repairs: Any = {"none": "none"}
    matchers = {"fw": FrankWolfe()}
    one = compare(nets, data[0][0], data, matchers=matchers, repairs=repairs)
    assert dict(one.samples) == {"calibrate": 100, "select": 100, "report": 200}
    two = compare(nets, data[0][0], data[:1], report=data[1:], matchers=matchers, repairs=repairs)
    assert dict(two.samples) == {"calibrate": 75, "select": 75, "report": 250}
    blind = compare(nets, data[0][0], [x for x, _ in data], matchers=matchers, repairs=repairs)
    assert blind.ensemble.accuracy is None
    assert [r.report.agreement for r in blind.rows if r.report] == [
        next(o.report.agreement for o in one.rows if o.name == r.name and o.report) for r in blind.rows
    ], "the same samples, and what the ensemble says of them"
    assert "agreement with the ensemble" in blind.recommendation()
    again = compare(nets, data[0][0], data, matchers=matchers, repairs=repairs)
    assert [r.report for r in again.rows] == [r.report for r in one.rows]


def test_data_are_refused_before_the_long_work(monkeypatch: pytest.MonkeyPatch) -> None:
    nets, data = problem(2)
    module = importlib.import_module("automerge.compare")

    def long(*args: object, **kwargs: object) -> None:
        raise AssertionError("inference began")

    monkeypatch.setattr(module, "infer_common", long)
    (x, y), _ = data
    bad: dict[str, Any] = {"data": [(x[:, :3], y)], "select": [(x, y + 5)], "report": [(x, y.double())]}
    for name, wrong in bad.items():
        with pytest.raises(AutomergeError, match=f"^{name}: "):
            compare(nets, x, **{"data": data, "select": data, "report": data, name: wrong})


def test_pictures_that_fail_leave_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    nets, data = problem(2)
    module = importlib.import_module("automerge.compare")
    one: Any = {"matchers": {"fw": FrankWolfe()}, "repairs": {"none": "none"}, "pictures": True}

    def fail(*args: object, **kwargs: object) -> None:
        raise AutomergeError("no ink")

    monkeypatch.setattr(module, "barrier", fail)
    found = compare(nets, data[0][0], data, **one)
    assert len(found.rows) == 2
    assert "the pictures could not be drawn: no ink" in found.notes
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(module, "infer_common", fail)
    with pytest.raises(AutomergeError, match=r"pip install 'automerge\[plot\]'"):
        compare(nets, data[0][0], data, **one)


def test_outputs_that_are_no_classes() -> None:
    nets: list[nn.Module] = [nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)) for _ in range(2)]
    x = torch.randn(40, 4)
    for data in ([x], [(x, x[:, :1])]):
        with pytest.raises(AutomergeError, match=r"one score.*evaluate\(metrics="):
            compare(nets, x, data)
    wide: list[nn.Module] = [nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)) for _ in range(2)]
    with pytest.raises(AutomergeError, match="comparing needs labels that are classes, or none"):
        compare(wide, x, [(x, torch.randn(40, 3))])


def test_bad_input() -> None:
    nets, data = problem(2)
    with pytest.raises(MatchingError, match="comparing needs data"):
        compare(nets, data[0][0], None)
    with pytest.raises(MatchingError, match="two models"):
        compare(nets[:1], data[0][0], data)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"matchers": ["identity"]}, "matchers maps names .* got a list"),
        ({"matchers": {"a": "identity"}}, r"matchers\['a'\] is 'identity', not a matcher"),
        ({"matchers": {"a": FrankWolfe}}, r"matchers\['a'\] is <class .*not a matcher such as FrankWolfe\(\)"),
        ({"repairs": ["none"]}, "repairs maps names .* got a list"),
        ({"repairs": {"a": "foo"}}, r"repairs\['a'\] is 'foo'; give none, reset"),
        ({"repairs": {"a": Repair}}, r"repairs\['a'\] is <class"),
    ],
)
def test_choices_of_another_kind_are_refused(options: Any, words: str) -> None:
    models, data = problem(2)
    with pytest.raises(AutomergeError, match=words):
        compare(models, data[0][0][:2], data, **options)


def test_models_may_come_from_a_generator() -> None:
    models, data = problem(2)
    options: Any = {"matchers": {"identity": MATCHERS["identity"]()}, "repairs": {"none": "none"}}
    found = compare((m for m in models), data[0][0][:2], data, **options)  # type: ignore[arg-type]
    assert [r.matcher for r in found.rows] == ["identity"]


def test_outputs_that_are_nan_are_called_so() -> None:
    models, data = problem(2)
    with pytest.raises(AutomergeError, match="select: the models' outputs are NaN on all of it"):
        compare(models, data[0][0][:2], data, select=[(x * torch.inf, y) for x, y in data])


def score(accuracy: float, loss: float, n: int = 100) -> Score:
    return Score(accuracy, loss, accuracy, n)


def table(*rows: Row) -> Comparison:
    return Comparison(rows, (score(0.9, 0.3),) * 2, score(0.95, 0.2), {"calibrate": 10, "select": 40, "report": 100})


def test_the_recommendation_tells_what_it_rests_on() -> None:
    naive = Row("identity", "none", select=score(0.5, 1.0), report=score(0.6, 1.0))
    fit = Row("fw", "least squares", fits=True, select=score(0.9, 0.3), report=score(0.84, 0.4))
    plain = Row("fw", "none", select=score(0.8, 0.5), report=score(0.75, 0.6))
    text = table(fit, plain, naive).recommendation()
    assert "Recommended: fw + least squares, accuracy 84.00%" in text
    assert "Without fitting weights to data: fw + none, accuracy 75.00%" in text
    assert "Chosen on 40 samples and reported on 100 others" in text
    assert "give or take 7.4%" in text, "2 sqrt(86 / 104 * 18 / 104 / 104)"
    sure = replace(naive, report=score(1.0, 0.0, 16))
    assert "give or take 13.4%" in table(sure).recommendation(), "2 sqrt(18 / 20 * 2 / 20 / 20): no certainty"
    lucky = replace(plain, report=score(0.55, 1.1), worse_than_naive=True)
    assert "no better than the plain average" in table(lucky, naive).recommendation()
    assert "no better" not in table(naive, lucky).recommendation()
    shown = str(table(lucky, naive))
    assert "55.00% !" in shown
    assert "! accuracy or loss is worse" in shown
    failed = table(Row("a", "b", error="it failed"))
    assert failed.best() is None
    assert "No combination worked" in failed.recommendation()
    assert "a + b failed: it failed" in str(failed)
    assert all(len(r.cells()) == len(COLUMNS) for r in (naive, fit, lucky, failed.rows[0]))


def test_a_loss_that_is_nan_is_the_worst_and_json_has_none() -> None:
    good, lost = score(0.5, 1.0), score(0.5, float("nan"))
    assert sorted([lost, good, lost, good], key=lambda s: s.key)[-1] is good
    assert lost.worse_than(good)
    assert not good.worse_than(lost)
    told = table(Row("fw", "none", select=lost, report=lost, drift=float("inf"), barrier=float("nan"))).to_dict()
    text = json.dumps(told, allow_nan=False)
    assert json.loads(text)["rows"][0]["report"]["loss"] is None


def test_units_merged_within_models_have_no_drift_and_no_path() -> None:
    nets, data = problem(2)
    fixes: Any = {"none": "none"}
    found = compare(
        nets, data[0][0], data, matchers={"zipit": ZipIt(), "identity": Identity()}, repairs=fixes, pictures=True
    )
    row = next(r for r in found.rows if r.matcher == "zipit")
    assert row.drift is None
    assert row.cells()[COLUMNS.index("drift")] == "-"
    assert not any("zipit" in title for title in found.pictures)


def test_pictures_show_the_best_repair_at_every_point() -> None:
    nets, data = problem(3)
    fixes: Any = {"repair": "repair"}
    found = compare(nets, data[0][0], data, matchers={"fw": FrankWolfe()}, repairs=fixes, pictures=True)
    best = found.best()
    assert best is not None
    assert best.repair == "repair", "else this test shows nothing"
    assert f"From model 0 to model 1, aligned by {best.matcher}, repair at every point" in found.pictures
    assert len(found.pictures) == 5


@pytest.mark.parametrize("width", [80, 100, 200])
def test_a_narrow_terminal_cuts_no_name(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        Row(m, r, r == "least squares", score(0.9771, 0.0583), score(0.9629, 0.0919), 0.0235, 0.268, 11.4)
        for m in MATCHERS
        for r in REPAIRS
    ]
    found = table(*rows)
    with monkeypatch.context() as patch:
        patch.setenv("COLUMNS", str(width))
        patch.setattr(sys.stdout, "isatty", lambda: True)
        Console().table("T", COLUMNS, [*found.ends(), *(r.cells() for r in rows)], found.footnotes())
    shown = re.sub("\x1b\\[[0-9;]*m", "", capsys.readouterr().out)
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= width
    assert shown.count("97.71%") == len(rows)
    for name in MATCHERS:
        assert name[: 9 if width < 100 else None] in shown


def test_the_page_needs_nothing_else() -> None:
    row = Row("<fw> & co", "none", select=score(0.8, 0.5), report=score(0.75, 0.6))
    text = page(replace(table(row), pictures={"a <path>": b"\x89PNG"}))
    assert "&lt;fw&gt; &amp; co" in text
    assert "<fw>" not in text
    assert 'src="data:image/png;base64,iVBORw=="' in text
    assert "http" not in text
    assert "Recommended" in text


# -------------------------------------------------------------------- the command
def files(tmp_path: Path, count: int = 3) -> list[str]:
    out = []
    for seed in range(count):
        torch.manual_seed(seed)
        out.append(str(tmp_path / f"m{seed}.safetensors"))
        save_state_dict(out[-1], _factories.mlp().state_dict())
    return out


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    rng = torch.Generator().manual_seed(0)
    return [(torch.randn(n, 16, generator=rng), torch.randint(3, (n,), generator=rng)) for n in (40, 24)]


def unlabelled_dicts() -> list[Any]:
    return [{"x": x, "scale": torch.ones(len(x), 1)} for x in (torch.randn(20, 4),)]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = "tests.test_compare:batches"
    data, out, html = ["--data", here, "--report", here], tmp_path / "c.json", tmp_path / "c.html"
    command = ["compare", "tests._factories:mlp", *files(tmp_path), *data]
    command += ["--matchers", "weight-matching,identity", "--repairs", "repair, gaussian"]
    assert main([*command, "--json", str(out), "--html", str(html)]) == 0
    shown = capsys.readouterr()
    assert "Recommended: " in shown.out
    assert "weight-matching" in shown.out
    told = json.loads(out.read_text())
    assert told["format"] == "automerge.comparison/1"
    assert {(r["matcher"], r["repair"]) for r in told["rows"]} == {
        (m, r) for m in ("weight-matching", "identity") for r in ("none", "repair", "gaussian")
    }
    assert told["samples"] == {"calibrate": 32, "select": 32, "report": 64}
    assert told["settings"]["factory"] == "tests._factories:mlp"
    assert html.read_text().count("data:image/png") == (4 if told["best"].endswith("+ none") else 5)
    assert any("32 of the 64 samples of the report are also among those that select" in n for n in told["notes"])
    assert main([*command, "--json", str(out)]) == 2
    assert "exists" in capsys.readouterr().err
    assert main([*command, "--json", str(out), "--force"]) == 0


def test_keyword_inputs_without_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = []
    for seed in range(2):
        torch.manual_seed(seed)
        names.append(str(tmp_path / f"{seed}.safetensors"))
        save_state_dict(names[-1], _factories.Keyword().state_dict())
    command = ["compare", "tests._factories:Keyword", *names, "--data", "tests.test_compare:unlabelled_dicts"]
    assert (
        main([*command, "--matchers", "frank-wolfe,activation-matching,cca", "--html", str(tmp_path / "x.html")]) == 0
    )
    shown = capsys.readouterr().out
    assert "failed" not in shown
    assert "chosen by their agreement" in shown


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--matchers", "magic"], "--matchers 'magic': choose from frank-wolfe"),
        (["--repairs", ""], "choose from none, reset"),
        (["--data", "nowhere:x"], "nowhere"),
    ],
)
def test_bad_options(tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str) -> None:
    command = ["compare", "tests._factories:mlp", *files(tmp_path, 2), "--data", "tests.test_compare:batches", *more]
    assert main(command) == 2
    assert message in capsys.readouterr().err


def test_bad_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = files(tmp_path, 2)
    data = ["--data", "tests.test_compare:batches"]
    assert main(["compare", "tests._factories:mlp", one, *data]) == 2
    assert "at least two checkpoints" in capsys.readouterr().err
    assert main(["compare", "tests._factories:mlp", one, two, one, *data]) == 2
    assert "given twice" in capsys.readouterr().err


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("labelled", [True, False])
def test_tokens_agree_by_their_own_classes(length: int, labelled: bool) -> None:
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7)) for _ in range(2)]
    tokens, classes = torch.randint(0, 11, (3, 8, length)), torch.randint(0, 7, (3, 8, length))
    parts = [[(t, c)] if labelled else [t] for t, c in zip(tokens, classes, strict=True)]
    found = compare(
        nets,
        tokens[0, :2],
        parts[0],
        select=parts[1],
        report=parts[2],
        matchers={"identity": Identity()},
        repairs={"none": "none"},
    )
    states = [n.state_dict() for n in nets]
    mean = nn.Sequential(*nets[0])
    with torch.no_grad():
        joint = torch.stack([n(tokens[2]).softmax(-1) for n in nets]).mean(0).argmax(-1)
        mean.load_state_dict({k: (states[0][k] + states[1][k]) / 2 for k in states[0]})
        share = (mean(tokens[2]).argmax(-1) == joint).double().mean().item()
    (row,) = found.rows
    assert row.report is not None
    assert row.report.agreement == pytest.approx(share)
    assert row.report.samples == 8 * length
