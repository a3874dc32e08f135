"""What a merge says of its inputs: equal models, frozen layers, counters that differ, architectures in which nothing moves."""

from __future__ import annotations

import copy
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from automerge import CheckpointError, Identity, TraceError, infer, load_state_dict, merge, save_state_dict
from automerge.cli import main

X = torch.randn(4, 6)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3))


def test_a_frozen_layer_that_all_share_is_a_constant_and_no_missing_weight() -> None:
    a, b = net(), net()
    b[0].load_state_dict(a[0].state_dict())  # type: ignore[index]
    for model in (a, b):
        model[0].requires_grad_(False)  # type: ignore[index]
    (note,) = merge([a, b], X, verify=False).notes
    assert "kept as constants" in note
    assert "0.weight" in note


def test_equal_models_are_named() -> None:
    a, b = net(), net()
    notes = merge([a, b, copy.deepcopy(a)], X, matcher=Identity(), verify=False).notes
    assert any("models 0 and 2 are the same (sha256 " in note for note in notes)
    assert not any("are the same (" in note for note in merge([a, b], X, matcher=Identity(), verify=False).notes)


def test_nothing_to_permute_is_said() -> None:
    notes = merge([nn.Linear(6, 3), nn.Linear(6, 3)], X).notes
    assert any("nothing of this architecture can be permuted" in note for note in notes)


def test_counters_that_differ_are_named() -> None:
    class Counting(nn.Module):
        def __init__(self, steps: int) -> None:
            super().__init__()
            self.body = net()
            self.register_buffer("steps", torch.tensor(steps))
            self.register_buffer("seen", torch.tensor(7))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x) * self.steps

    merged = merge([Counting(3), Counting(4)], X, matcher=Identity(), verify=False)
    assert int(merged.state_dict["steps"]) == 4
    assert any("the integers steps differ" in note for note in merged.notes)
    assert not merge([Counting(3), Counting(3)], X, matcher=Identity(), verify=False).notes


def test_example_inputs_with_nan() -> None:
    """They are refused where the model only makes NaN of them; some models know what is missing."""
    missing = X.masked_fill(torch.eye(4, 6, dtype=torch.bool), torch.nan)
    with pytest.raises(TraceError, match="the example inputs hold NaN"):
        infer(net(), missing)
    with pytest.raises(TraceError, match="the example inputs hold NaN"):
        merge([net(), net()], missing)

    class Filling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x.nan_to_num())

    assert sorted(g.size for g in infer(Filling(), missing).generators()) == [10, 12]


def test_an_archive_that_unpacks_to_far_more_than_it_takes(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.pt"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(200_000_000))
        archive.writestr("archive/version", "3\n")
    with pytest.raises(CheckpointError, match="unpack to 200,000,002"):
        load_state_dict(bomb)
    large = tmp_path / "zeros.pt"
    torch.save({"w": torch.zeros(3_000_000)}, large)
    assert load_state_dict(large)["w"].shape == (3_000_000,)


@pytest.mark.parametrize(
    ("last", "says"), [("torch.full((4, 6), float('nan'))", "NaN"), ("torch.ones(4, 7)", "batch 3")]
)
def test_a_late_batch_is_looked_at_before_the_models(
    last: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"late_{says.split()[0].lower()}"
    (tmp_path / f"{name}.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def model(): return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))\n"
        f"def data(): return [torch.ones(4, 6)] * 3 + [{last}]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for k in range(2):
        model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
        save_state_dict(tmp_path / f"{k}.safetensors", model.state_dict())
    monkeypatch.setattr(
        sys.modules["automerge.merge"], "match", lambda *_, **__: pytest.fail("matched before the data were looked at")
    )
    code = main(
        ["merge", f"{name}:model", "0.safetensors", "1.safetensors", "-o", "o.safetensors", "--data", f"{name}:data"]
    )
    assert code == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "o.safetensors").exists()
