"""The coverage table: its page and its command, without the libraries."""

import json

import pytest
import torch
from torch import nn

from automerge._derive import infer_graph
from automerge.trace import trace
from zoo.coverage import __main__ as command
from zoo.coverage._case import Case, short
from zoo.coverage._measure import _MAPS, Row, _blind, balance
from zoo.coverage._table import page, summary, verified

GOOD = Row("torchvision", "a", "a", groups=3, free=0.5, pins=[("model output", 10)], error=1e-14, elements=2)
BAD = Row(
    "timm", "m:b", "m: b", error=None, message="InvarianceError: changes | the output", unruled=["aten::x in y at z"]
)
LOST = Row("transformers", "c", "c", "timeout", message="not done after 1 s")
UNBUILT = Row("transformers", "d", "d", "setup", message="ValueError: no")


def test_the_page_holds_every_row_and_the_totals():
    text = page([GOOD, BAD, LOST, UNBUILT], "2026-01-01")
    assert "answered: 2 of 3 models that run" in text
    assert "verified at 1e-09: 1 of 2" in text
    assert "**no**: InvarianceError: changes \\| the output" in text
    assert "`aten::x`" in text
    assert "- transformers d: ValueError: no" in text
    assert [verified(r) for r in (GOOD, BAD, LOST, UNBUILT)] == [True, False, False, False]
    assert summary([]) == ["- answered: 0 of 0 models that run", "- verified at 1e-09: 0 of 0"]


def test_texts_lose_the_paths_of_the_machine():
    assert short("at /opt/x-1/lib/site-packages/timm/a.py:3") == "at timm/a.py:3"
    assert short("at /home/me/automerge/zoo/a.py:3") == "at zoo/a.py:3"


def test_without_a_library_its_rows_are_skipped_with_a_reason(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(command, "missing", lambda library: f"{library} is not installed")
    assert command.main(["--quick"]) == 0
    assert "timm skipped: timm is not installed" in capsys.readouterr().out


def test_rows_are_resumed_from_the_json_beside_the_page(tmp_path):
    path = tmp_path / "coverage.md"
    command._write({("torchvision", "a"): GOOD}, path)
    assert command._load(path.with_suffix(".json"))["torchvision", "a"].error == GOOD.error
    assert json.loads(path.with_suffix(".json").read_text("utf-8"))["rows"][0]["name"] == "a"


@pytest.fixture
def case():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    return Case(net, (torch.randn(8, 4),))


def test_a_wrong_group_is_seen_unless_the_output_is_dead(case):
    symmetry, _ = infer_graph(trace(case.model, case.args))
    assert _blind(case, case.args, symmetry) is False


def test_balancing_gives_layers_unit_output(case):
    for layer in case.model:
        if isinstance(layer, nn.Linear):
            layer.weight.data.mul_(1e-4)
    balance(case, _MAPS)
    with torch.no_grad():
        assert float(case.model(*case.args).std()) == pytest.approx(1, abs=1e-4)
