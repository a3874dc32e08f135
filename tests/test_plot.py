"""Pictures are written whole or not at all, without a display, and say what is missing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from automerge._errors import AutomergeError, OutputError
from automerge._measures import Agreement, CycleError, Evaluation
from automerge.evaluate import Barrier, Similarity

pytest.importorskip("matplotlib")

from automerge.plot import plot_barrier, plot_objective, plot_similarity

_BEFORE = Barrier((0.0, 0.5, 1.0), (0.1, 2.0, 0.2), (0.97, 0.2, 0.96))
_AFTER = Barrier((0.0, 0.5, 1.0), (0.1, 0.3, 0.2), (0.97, 0.94, 0.96))


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_barrier_picture(tmp_path: Path, suffix: str) -> None:
    file = plot_barrier(_BEFORE, _AFTER, tmp_path / f"a.{suffix}", others={"repaired": _AFTER}, title="MLP")
    assert file.stat().st_size > 1000
    assert [p.name for p in tmp_path.iterdir()] == [file.name]


def test_the_other_pictures(tmp_path: Path) -> None:
    before, after = Similarity(0.1, {"a": 0.1, "b": -0.2}), Similarity(0.8, {"a": 0.9, "b": 0.7})
    assert plot_similarity(before, after, tmp_path / "s.png").exists()
    more = Similarity(0.8, {"a": 0.9}, {"relu": 0.5, "tanh": 0.25}, {"relu": 0.75, "tanh": 0.5})
    drawn = plot_similarity(more, more, tmp_path / "t.svg")
    assert {"CKA", "correlation of units", "before (all: 0.375)"} <= set(_texts(drawn))
    assert plot_objective([1.0, 2.0, 2.5], tmp_path / "o.png").exists()
    assert plot_objective({"fw": [1.0, 2.0], "polish": [2.0, 2.1]}, tmp_path / "p.png").exists()


def _texts(file: Path) -> list[str]:
    """The comments in which matplotlib repeats a drawing's texts."""
    return [t.strip() for t in re.findall(r"<!--(.*?)-->", file.read_text(), re.DOTALL)]


def test_every_measurement_draws_itself(tmp_path: Path) -> None:
    for name, value, texts in (
        ("e", Evaluation(0.5, 0.7, 10, {"f1": 0.25}), {"accuracy (%)", "loss (nats)", "f1"}),
        ("r", Evaluation(None, None, 10, {"mse": 2.0}), {"mse"}),
        ("a", Agreement(0.5, 10), {"agreement (%)", "10 samples"}),
        ("c", CycleError(0.25, 3), {"cycle error (%)", "3 models"}),
    ):
        assert texts <= set(_texts(value.plot(tmp_path / f"{name}.svg")))


def test_an_existing_picture_and_an_unknown_format(tmp_path: Path) -> None:
    plot_objective([1.0], tmp_path / "o.png")
    with pytest.raises(OutputError, match="exists; pass --force"):
        plot_objective([1.0], tmp_path / "o.png")
    plot_objective([1.0], tmp_path / "o.png", force=True)
    with pytest.raises(OutputError, match=r"unknown picture format '\.bmpx'"):
        plot_objective([1.0], tmp_path / "o.bmpx")
    with pytest.raises(OutputError, match="does not exist; create it first"):
        plot_barrier(_BEFORE, _AFTER, tmp_path / "no" / "a.png")


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(AutomergeError, match=r"pip install 'automerge\[plot\]'"):
        plot_objective([1.0], tmp_path / "o.png")


def test_importing_plot_needs_no_matplotlib() -> None:
    code = "import sys, automerge.plot; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
