"""Every experiment runs in its smallest form; pages come from the records alone; verdicts are right on planted numbers."""

import doctest
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

import automerge
from automerge import FrankWolfe, Identity
from zoo import _formats
from zoo.experiments import __main__ as command
from zoo.experiments import _experiment, _tables, corruptions, report, stability, tasks, widths
from zoo.experiments import cycle as cycle_experiment
from zoo.experiments import modules as modules_experiment
from zoo.experiments._bench import Bench, fuse
from zoo.experiments._experiment import PROFILES, Experiment, Lab, Record, Row, Unit, disjoint
from zoo.experiments._figures import panels
from zoo.experiments._run import render, run
from zoo.experiments._settings import SETTINGS, dataset, mlp_of_width, resnet_of_width
from zoo.experiments._tables import difference, mean
from zoo.experiments.many import MATCHERS
from zoo.models.vit import ViT
from zoo.train import Recipe

EXPERIMENTS = command.EXPERIMENTS


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def lab_in(runs: Path) -> Lab:
    return Lab(runs, PROFILES["smoke"])


# -------------------------------------------------------------------- every experiment
def test_there_are_these() -> None:
    names = "many, width, cycle, landscape, ablation, stability, corruptions, tasks, widths, soups, modules"
    assert ", ".join(EXPERIMENTS) == names


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_first_unit_gives_finite_numbers_and_a_page_that_can_be_made_again(
    name: str, runs: Path, tmp_path: Path
) -> None:
    lab = lab_in(runs)
    small = replace(EXPERIMENTS[name], units=lambda given: islice(EXPERIMENTS[name].units(given), 1))
    record = run(small, lab, tmp_path, command="test")
    assert len(record.rows) >= 4
    numbers = [v for r in record.rows for v in r.values() if isinstance(v, float)]
    assert len(numbers) >= 8
    assert all(map(math.isfinite, numbers))
    assert all({"setting", "n", "set", "seeds"} <= r.keys() for r in record.rows)
    accuracies = [r["accuracy"] for r in record.rows if "accuracy" in r]
    assert all(0 <= a <= 1 for a in accuracies)
    assert not accuracies or max(accuracies) > 0.3  # ten classes: something was learnt, and merged
    written = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert sorted(written) == sorted(f"{name}.{ending}" for ending in ("json", "md", "svg"))
    for ending in ("md", "svg"):
        (tmp_path / f"{name}.{ending}").unlink()
    render(EXPERIMENTS[name], tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == written
    text = written[f"{name}.md"].decode()
    assert "nan" not in text
    assert f"({name}.svg)" in text
    assert list((runs / "rows").glob("*")) == []  # the notes go when the work is done


@pytest.mark.parametrize("profile", PROFILES)
def test_all_units_are_different_and_full_runs_have_three_disjoint_sets(profile: str, tmp_path: Path) -> None:
    lab = Lab(tmp_path, PROFILES[profile])
    for experiment in EXPERIMENTS.values():
        keys = [json.dumps(dict(u.key)) for u in experiment.units(lab)]
        assert keys
        assert len(set(keys)) == len(keys)
        if profile != "full":
            assert all("mnist" not in k and "cifar" not in k and "shakespeare" not in k for k in keys)
    many = [u.key for u in EXPERIMENTS["many"].units(lab)]
    for setting in {k["setting"] for k in many}:
        for n in {k["n"] for k in many if k["setting"] == setting}:
            spans = [k["seeds"] for k in many if (k["setting"], k["n"]) == (setting, n)]
            assert len(spans) >= PROFILES[profile].sets
            seeds = [s for text in spans for s in range(int(text.split("-")[0]), int(text.split("-")[1]) + 1)]
            assert len(seeds) == len(set(seeds)) == n * len(spans)
    with pytest.raises(ValueError, match="do not fit"):
        disjoint(3, 2, 3)


# -------------------------------------------------------------------- running
def made_up(done: list[int], stop_at: int | None = None) -> Experiment:
    """Five units without networks; the one at which it stops is interrupted."""

    def work(number: int) -> Iterator[Row]:
        if number == stop_at:
            raise KeyboardInterrupt
        done.append(number)
        yield {"accuracy": 0.1 * number, "matcher": "x", "nothing": None}

    def units(lab: Lab) -> Iterator[Unit]:
        for k in range(5):
            yield Unit({"setting": "ab"[k % 2], "set": k}, lambda k=k: work(k))  # type: ignore[misc]

    return Experiment(
        "made-up",
        "Made up",
        "Does it run?",
        units,
        lambda record: panels(1)[0],
        lambda record: f"{len(record.rows)} rows",
    )


def test_width_eight_is_planned_and_its_network_is_that_wide(tmp_path: Path) -> None:
    units = command.EXPERIMENTS["width"].units(Lab(tmp_path, PROFILES["full"]))
    assert [u.key["setting"] for u in units if u.key["width"] == 8] == ["digits-resnet-w8"] * 3
    channels = {w: resnet_of_width(w).factory().state_dict()["stem.weight"].shape[0] for w in (1, 8)}
    assert channels[8] == 8 * channels[1]


def test_an_interrupted_run_leaves_the_results_and_goes_on(tmp_path: Path) -> None:
    lab, out, done = Lab(tmp_path / "runs", PROFILES["smoke"]), tmp_path / "out", []
    run(made_up(done), lab, out, command="first")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    done.clear()
    with pytest.raises(KeyboardInterrupt):
        run(made_up(done, stop_at=3), lab, out, command="second")
    assert done == [0, 1, 2]
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    record = run(made_up(done), lab, out, command="third")
    assert done == [0, 1, 2, 3, 4]
    assert [r["accuracy"] for r in record.rows] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    run(made_up(done), lab, out, command="fourth")
    assert done == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]  # a finished run's notes are gone


def test_a_half_written_note_is_done_again(tmp_path: Path) -> None:
    lab, done = Lab(tmp_path / "runs", PROFILES["smoke"]), []
    with pytest.raises(KeyboardInterrupt):
        run(made_up(done, stop_at=2), lab, tmp_path / "out", command="")
    notes = tmp_path / "runs" / "rows" / "made-up-smoke.jsonl"
    text = notes.read_text()
    notes.write_text(text[: len(text) - 10])
    run(made_up(done), lab, tmp_path / "out", command="")
    assert done == [0, 1, 1, 2, 3, 4]


def test_one_setting_s_rows_are_replaced_and_the_others_kept(tmp_path: Path) -> None:
    lab, out, done = Lab(tmp_path / "runs", PROFILES["smoke"]), tmp_path / "out", []
    run(made_up(done), lab, out, command="all")
    done.clear()
    run(made_up(done), lab, out, command="some", only=["b"])
    assert done == [1, 3]
    record = Record.read(out / "made-up.json")
    assert sorted(r["set"] for r in record.rows) == [0, 1, 2, 3, 4]
    assert [(r["command"], r["settings"]) for r in record.runs] == [("all", ["a"]), ("some", ["b"])]
    assert "nothing" not in record.rows[0]


def test_other_json_is_no_record(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match="no record"):
        Record.read(tmp_path / "a.json")


# -------------------------------------------------------------------- command
def one_sentence(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_an_unknown_name_ends_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["manny", "--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs")]) == 2
    assert "'manny'" in one_sentence(capsys)
    assert list(tmp_path.iterdir()) == []


def test_missing_data_are_told_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AUTOMERGE_DATA", raising=False)
    dataset.cache_clear()
    assert command.main(["many", "--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs")]) == 2
    assert "AUTOMERGE_DATA" in one_sentence(capsys)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_setting_and_nothing_to_render_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["cycle", "--smoke", "--only", "digits", "--out", str(tmp_path)]) == 2
    assert "digits-mlp" in one_sentence(capsys)
    assert command.main(["cycle", "--render", "--out", str(tmp_path)]) == 2
    assert "cycle.json" in one_sentence(capsys)


def test_an_interrupt_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run", interrupted)
    assert command.main(["cycle", "--smoke", "--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs")]) == 130
    assert "goes on from there" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_writes_a_record_and_the_report(
    tmp_path: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    argv = ["widths", "--smoke", "--only", "digits-mlp", "--out", str(out), "--runs", str(runs)]
    assert command.main(argv) == 0
    assert "refused" not in {r["matcher"] for r in Record.read(out / "widths.json").rows}
    first = {p.name: p.read_bytes() for p in out.iterdir()}
    assert set(first) == {"widths.json", "widths.md", "widths.svg", "index.md"}
    assert command.main(["all", "--render", "--out", str(out), "--runs", str(runs)]) == 0
    assert {p.name: p.read_bytes() for p in out.iterdir()} == first
    capsys.readouterr()


# -------------------------------------------------------------------- benches
def test_folding_batchnorm_keeps_the_function() -> None:
    torch.manual_seed(0)
    network = resnet_of_width(0.25).factory().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
            module.weight.data.uniform_(0.5, 2.0)
    x = torch.randn(4, 1, 8, 8)
    folded = fuse(network)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    torch.testing.assert_close(folded(x), network(x), rtol=1e-4, atol=1e-5)


def test_repairs_aim_at_the_aligned_networks(runs: Path) -> None:
    bench = lab_in(runs).bench("digits-mlp")
    states = bench.states([0, 1])
    shuffled = [states[0], bench.symmetry.apply(states[1], bench.symmetry.random_element(0))]
    aligned = bench.align(FrankWolfe(), shuffled)
    right = bench.repaired("repair", aligned)
    wrong = bench.repaired("repair", aligned, towards=shuffled)
    assert any(not torch.allclose(right[n], wrong[n]) for n in right)
    same = bench.align(Identity(), [states[0], states[0]])
    for repair in bench.repairs:  # nothing to repair: the function stays
        assert bench.score(bench.repaired(repair, same))["accuracy"] == bench.score(states[0])["accuracy"]


def test_a_shortened_setting_does_not_touch_the_long_one_s_networks(tmp_path: Path) -> None:
    short = SETTINGS["digits-mlp"].shortened()
    assert short.recipe.epochs == 2
    short.network(0, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["digits-mlp~short"]


# -------------------------------------------------------------------- parts of experiments
def test_a_cycle_through_the_universe_closes_and_pairwise_maps_are_the_right_way_round(runs: Path) -> None:
    bench = lab_in(runs).bench("digits-mlp")
    first = bench.state(0)
    planted = [bench.symmetry.random_element(k) for k in range(3)]
    copies = [bench.symmetry.apply(first, e) for e in planted]
    for name in ("universe", "pairwise, pair by pair"):  # copies of one network: every map is known
        steps = cycle_experiment.steps(bench, name, copies)
        for k, step in enumerate(steps):
            assert step == planted[k].inverse().then(planted[(k + 1) % 3])


def test_stability_undoes_the_shuffles(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of one network have one best map, whatever the shuffle."""
    few = {n: stability._MATCHERS[n] for n in ("universe", "pairwise")}
    monkeypatch.setattr(stability, "_MATCHERS", few)
    lab = lab_in(runs)
    bench = lab.bench("digits-mlp")
    for seed in (0, 1, 2):
        bench._states[seed] = bench.state(0)
    rows = list(stability._work(lab, "digits-mlp", [0, 1, 2]))
    assert [r["same"] for r in rows if "same" in r] == [1.0] * 6


def test_corruptions_are_of_growing_strength_and_the_same_each_time() -> None:
    x = dataset("digits").x_test[:50]
    for name, corrupt in corruptions.CORRUPTIONS.items():
        changes = [float((corrupt(x, s) - x).square().mean()) for s in corruptions.SEVERITIES]
        assert changes == sorted(changes), name
        assert changes[0] > 0
        assert torch.equal(corrupt(x, 2), corrupt(x, 2))
    grey = torch.full((2, 1, 8, 8), 0.7)
    for name in ("blur", "rotation", "contrast"):
        torch.testing.assert_close(corruptions.CORRUPTIONS[name](grey, 3), grey)


def test_calibration_error_of_known_answers() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    sure = torch.tensor([[1.0, 0.0]] * 4)
    assert corruptions.calibration_error(sure, labels) == pytest.approx(0.5)
    honest = torch.tensor([[0.5, 0.5]] * 4)
    assert corruptions.calibration_error(honest, labels) == pytest.approx(0.0)


def test_probabilities_of_an_ensemble_are_the_mean(runs: Path) -> None:
    bench = lab_in(runs).bench("digits-mlp")
    x = bench.data.x_test[:20]
    a, b = (corruptions.probabilities(bench, [bench.state(s)], x) for s in (0, 1))
    torch.testing.assert_close(corruptions.probabilities(bench, bench.states([0, 1]), x), (a + b) / 2)


def test_tasks_have_disjoint_labels_and_different_first_weights(runs: Path) -> None:
    first, second = tasks.parts_of(SETTINGS["digits-mlp"], "halves")
    assert not set(first.dataset.y_train.tolist()) & set(second.dataset.y_train.tolist())
    assert len(first.dataset.y_train) + len(second.dataset.y_train) == len(dataset("digits").y_train)
    own, other = tasks.parts_of(SETTINGS["fashion-resnet"], "data sets")
    assert (own.data, other.data) == ("fashion_mnist/2:10000", "mnist/2:10000")
    a, b = Bench(first.shortened(), runs).state(0), Bench(second.shortened(), runs).state(tasks.OTHER)
    assert not torch.allclose(a["layers.1.weight"], b["layers.1.weight"], atol=0.05)
    head = tasks.with_head(a, b)
    assert torch.equal(head["layers.7.weight"], b["layers.7.weight"])
    assert torch.equal(head["layers.5.weight"], a["layers.5.weight"])


def test_dead_units_keep_the_function_or_are_refused_with_the_reason() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 1, 8, 8)
    for narrow, wide in ((mlp_of_width(16), mlp_of_width(24)), (resnet_of_width(0.25), resnet_of_width(0.5))):
        small, large = narrow.factory().eval(), wide.factory().eval()
        found = widths.pad(small, large, x)
        torch.testing.assert_close(torch.func.functional_call(large, found.state, (x,)), small(x), rtol=1e-4, atol=1e-5)
        assert found.error < 1e-4
    layernorm = SETTINGS["digits-resnet-layernorm"]
    with pytest.raises(widths.PaddingError, match=r"LayerNorm 'norm\.norm' .* all 16 units, of which 8 would be dead"):
        widths.pad(_half(layernorm).eval(), layernorm.factory().eval(), x)
    with pytest.raises(widths.PaddingError, match="LayerNorm"):
        widths.pad(ViT(dim=16).eval(), ViT(dim=32).eval(), x)


def _half(setting: object) -> nn.Module:
    from zoo.models.resnet import ChannelNorm, ResNet

    return ResNet(8, norm=ChannelNorm)


@pytest.mark.parametrize(
    "module", [_formats, _experiment, _tables, corruptions], ids=lambda m: m.__name__.rpartition(".")[2]
)
def test_the_examples_in_the_docstrings_hold(module: ModuleType) -> None:
    found = doctest.testmod(module)
    assert found.attempted
    assert not found.failed


# -------------------------------------------------------------------- verdicts
def planted(ours: float, theirs: float, noise: float = 0.001) -> Record:
    """A record of `many` in which every matcher scores as said, up to a little noise by set."""
    rows = []
    rng = np.random.default_rng(0)
    for n in (2, 5, 10):
        for k in range(3):
            for matcher in ("single models", "ensemble", *MATCHERS):
                score = {"universe": ours, "single models": 0.99, "ensemble": 0.99}.get(matcher, theirs)
                for repair in ("none", "repair", "repair (unaligned)"):
                    accuracy = score + noise * float(rng.standard_normal())
                    rows.append(
                        {
                            "setting": "digits-mlp",
                            "n": n,
                            "set": k,
                            "matcher": matcher,
                            "repair": repair,
                            "accuracy": accuracy,
                        }
                    )
    return Record("many", "full", tuple(rows))


@pytest.mark.parametrize(
    ("ours", "theirs", "noise", "verdict"),
    [
        (0.9, 0.8, 0.001, report.HOLDS),
        (0.7, 0.8, 0.001, report.AGAINST),
        (0.8, 0.8, 0.05, report.OPEN),
    ],
)
def test_the_report_s_verdicts_on_planted_numbers(ours: float, theirs: float, noise: float, verdict: str) -> None:
    record = planted(ours, theirs, noise)
    first = next(c for c in report.CLAIMS if c.source == "C2M3, table 1")
    assert first.answer(record).verdict == verdict
    text = report.report({"many": record})
    assert f"**{verdict}**" in text
    assert text.count(f"**{report.NONE}**") == 2 * sum(c.experiment != "many" for c in report.CLAIMS)


def test_a_fall_with_the_number_of_models_is_seen() -> None:
    flat = planted(0.9, 0.8)
    falling = replace(
        flat,
        rows=tuple(
            {**r, "accuracy": r["accuracy"] - 0.02 * r["n"]} if r["matcher"] == "universe" else r for r in flat.rows
        ),
    )
    claim = next(c for c in report.CLAIMS if "flat" in c.text)
    assert claim.answer(flat).verdict == report.HOLDS
    assert claim.answer(falling).verdict == report.AGAINST
    holds_up = next(c for c in report.CLAIMS if "holds up" in c.text)
    assert holds_up.answer(falling).verdict == report.OPEN  # ahead of the universe, level with weight matching


def test_two_networks_are_compared_on_their_own() -> None:
    level = planted(0.8, 0.8)
    ahead = [{**r, "accuracy": r["accuracy"] + 0.1} if r["matcher"] == "universe" else r for r in level.rows]
    two = next(c for c in report.CLAIMS if c.text.startswith("Two networks"))
    for n, verdict in ((2, report.HOLDS), (5, report.OPEN)):
        rows = [a if a["n"] == n else b for a, b in zip(ahead, level.rows, strict=True)]
        found = two.answer(replace(level, rows=tuple(rows)))
        assert found.verdict == verdict
        assert "(N = 2)" in found.text


def swaying(by: dict[str, float]) -> Record:
    """A record of `stability` in which every matcher's accuracy goes up and down by so much."""
    rows = [
        {
            "setting": setting,
            "n": 3,
            "set": k,
            "matcher": m,
            "again": again,
            "accuracy": 0.9 + by.get(m, 0.05) * (1 + 0.1 * k) * (-1) ** again,
        }
        for setting in ("a", "b")
        for k in range(3)
        for m in ("universe", "merge-many", "weight-matching")
        for again in range(4)
    ]
    return Record("stability", "full", tuple(rows))


@pytest.mark.parametrize(
    ("by", "verdict"),
    [
        ({"universe": 0.001}, report.HOLDS),
        ({"universe": 0.2}, report.AGAINST),
        ({"universe": 0.1, "merge-many": 0.2}, report.AGAINST),  # steadier than one, less so than the other
        ({"universe": 0.05}, report.OPEN),
    ],
)
def test_the_deviation_over_repetitions_decides_on_stability(by: dict[str, float], verdict: str) -> None:
    claim = next(c for c in report.CLAIMS if c.experiment == "stability")
    assert claim.answer(swaying(by)).verdict == verdict
    found = stability.spread(swaying({"universe": 0.03}), "universe", ["b"])
    assert [r["setting"] for r in found] == ["b"] * 3
    assert found[0]["deviation"] == pytest.approx(0.03 * math.sqrt(4 / 3))


def test_a_setting_of_which_only_parts_were_trained_has_its_title() -> None:
    record = Record("tasks", "full", (), {"mnist-mlp": {"title": "as recorded"}})
    assert record.title("digits-mlp") == SETTINGS["digits-mlp"].title
    assert record.title("mnist-mlp") == "as recorded"
    assert record.title("digits-mlp-0to4") == "digits-mlp-0to4"


def test_means_are_over_sets_and_differences_are_paired() -> None:
    rows = [{"set": 0, "accuracy": 0.2}, {"set": 0, "accuracy": 0.4}, {"set": 1, "accuracy": 0.5}]
    found = mean(rows)
    assert (found.value, found.sets, found.rows) == (pytest.approx(0.4), 2, 3)
    a = [{"setting": "s", "n": n, "set": k, "accuracy": 0.5 * k + 0.1 * n} for n in (2, 3) for k in range(4)]
    b = [{**r, "accuracy": r["accuracy"] - 0.01 - 0.001 * r["set"]} for r in a]
    gap = difference(a, b)
    assert gap.sets == 4  # two N of one set are one pair
    assert gap.wins == 4
    assert gap.value == pytest.approx(0.0115)
    assert gap.margin == pytest.approx(3.182446 * 0.0012909944 / 2, rel=1e-4)  # Student's t, three degrees of freedom
    assert gap.verdict == "ahead"
    assert difference(a[:2], b[:2]).verdict == "not settled"


def test_recipes_of_settings_are_deterministic_and_the_same_for_all_seeds() -> None:
    assert all(isinstance(s.recipe, Recipe) and s.recipe.epochs > 1 for s in SETTINGS.values())
    assert len({s.name for s in SETTINGS.values()}) == len(SETTINGS)


def test_experts_are_exchanged_only_where_they_may_be(runs: Path) -> None:
    """Networks that differ by the order of their experts are one where experts are exchanged, and are not where they stay."""
    bench = lab_in(runs).bench("digits-experts")
    known = modules_experiment.symmetries(bench.symmetry)
    assert [e.size for e in known["experts exchanged"].exchanges] == [4, 4]
    assert not known["experts stay"].exchanges
    whole = bench.symmetry
    copies = [whole.apply(bench.state(0), whole.random_element(seed)) for seed in range(2)]
    found = {name: automerge.match(copies, symmetry, FrankWolfe()) for name, symmetry in known.items()}
    assert found["experts exchanged"].stats["objective"] > 1.1 * found["experts stay"].stats["objective"]
