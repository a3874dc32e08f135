"""The demo with small settings: its tables, its files, and the same result for the same seed."""

import contextlib
import io
import json
import stat
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from automerge import cli
from automerge._console import Console, plain_table
from automerge._demo import Settings, rooms, run, run_room
from zoo import data, models, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished demo; what it printed is in ``printed.txt``."""
    out = tmp_path_factory.mktemp("demo")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        run(Settings(out, models=2, seed=1, quick=True), Console())
    (out / "printed.txt").write_text(printed.getvalue())
    return out


def tables(printed: str) -> list[str]:
    """The lines of a demo's output that do not depend on the clock or the directory."""
    return [line for line in printed.splitlines() if "seconds:" not in line and "report.json" not in line]


def test_files(folder: Path) -> None:
    names = {p.name for p in folder.iterdir()}
    for room in ("mlp", "resnet"):
        expected = {
            f"{room}-1000.safetensors",
            f"{room}-1001.safetensors",
            f"{room}-merged.safetensors",
            f"{room}-path.png",
        }
        assert expected <= names
        shapes = [{k: v.shape for k, v in load_file(folder / n).items()} for n in sorted(expected) if n.endswith("rs")]
        assert shapes[0] == shapes[1] == shapes[2]
    assert not [n for n in names if n.startswith(".") or n.endswith(".resume")]


def test_files_are_as_open_to_others_as_new_ones(folder: Path) -> None:
    (folder / "new.txt").open("w").close()
    cards = {p.with_suffix(".json") for p in folder.glob("*-*.safetensors")}  # zoo.train writes those
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in folder.iterdir() if p not in cards}
    assert len(modes) >= 10
    assert set(modes.values()) == {modes["new.txt"]}


def test_report(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    networks = report["result"]["networks"]
    assert sorted(networks["mlp"]["groups"]) == [256, 256, 256, 256]
    for room in ("mlp", "resnet"):
        rows = {row["name"]: row for row in networks[room]["rows"]}
        assert len(rows) == 6
        assert all(0 <= row["accuracy"] <= 1 for row in rows.values())
        assert networks[room]["cycle_error"] == 0
        assert networks[room]["path"]["after"]["loss_barrier"] <= networks[room]["path"]["before"]["loss_barrier"]
        assert {"train", "infer and verify", "match", "merge", "repair", "evaluate"} <= set(report["seconds"][room])
    assert any("BatchNorm reset" in row["name"] for row in networks["resnet"]["rows"])
    assert any("REPAIR" in row["name"] for row in networks["mlp"]["rows"])


def test_the_same_seed_gives_the_same_result(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--quick", "--models", "2", "--seed", "1", "--out", str(tmp_path)]) == 0
    first, second = (json.loads((d / "report.json").read_text())["result"] for d in (folder, tmp_path))
    assert first == second
    out = capsys.readouterr().out
    assert len(tables(out)) > 20
    assert tables(out) == tables((folder / "printed.txt").read_text())
    assert "ReLU MLP" in out
    assert "Residual CNN" in out
    assert "cycle error of the universe's pairwise maps: 0" in out
    assert "seconds" in out


@pytest.mark.slow
def test_the_repaired_universe_merge_of_the_mlps_loses_at_most_three_points(tmp_path: Path) -> None:
    digits = data.digits()
    room, options = rooms(digits, models)[0]
    assert room.name == "mlp"
    result = run_room(
        room, Settings(tmp_path, models=5, seed=0), Console(), train.train, digits, train.Recipe(**options)
    )
    assert min(result["groups"]) >= 256
    accuracy = {row["name"]: row["accuracy"] for row in result["rows"]}
    assert accuracy["universe merge, REPAIR"] >= accuracy["single models (mean of 5)"] - 0.03
    assert accuracy["naive average"] < 0.2
    assert accuracy["universe merge, REPAIR"] > accuracy["naive average, REPAIR"]


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(["demo", "--models", "1", "--out", str(tmp_path)]) == 2
    assert "at least two" in capsys.readouterr().err
    file = tmp_path / "file"
    file.write_text("")
    assert cli.main(["demo", "--out", str(file)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    for name in [n for n in sys.modules if n.split(".")[0] == "zoo"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "zoo", None)
    assert cli.main(["demo", "--out", str(tmp_path / "x")]) == 2
    err = capsys.readouterr().err
    assert "checkout" in err
    assert len(err.splitlines()) == 1


def test_plain_tables_align() -> None:
    text = plain_table("Title", ["name", "n"], [["a", "10"], ["long name", "2"]], ["note"])
    assert text.splitlines() == ["Title", "  name        n", "  a          10", "  long name   2", "  note"]
