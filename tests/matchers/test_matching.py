"""The answer of a matcher: files, report, indices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from automerge._errors import AutomergeError, CheckpointError, MatchingError, OutputError
from automerge._sketch import sketch
from automerge.groups import Element
from automerge.matchers import CCA, FrankWolfe, Matching, match
from automerge.symmetry import Symmetry
from tests import _symmetries as hand

torch.set_num_threads(1)


@pytest.mark.parametrize("name", ["mlp", "heads", "grouped_conv", "experts"])
def test_round_trip(name: str, tmp_path: Path) -> None:
    symmetry = hand.ALL[name]()
    models = [hand.weights(symmetry, seed, torch.float32) for seed in range(3)]
    matching = match(models, symmetry)
    file = tmp_path / "matching.safetensors"
    matching.save(file)
    again = Matching.load(file)
    assert again.to_universe == matching.to_universe
    assert again.symmetry.generators() == symmetry.generators()
    assert again.matcher == matching.matcher
    assert again.stats["objectives"] == matching.stats["objectives"]
    assert again.between(0, 2) == matching.between(0, 2)
    assert again.cycle_error() == 0.0
    moved, other = matching.apply(models), again.apply(models)
    assert all(torch.equal(a[n], b[n]) for a, b in zip(moved, other, strict=True) for n in a)
    assert [p.name for p in tmp_path.iterdir()] == ["matching.safetensors"]
    with pytest.raises(OutputError, match="exists"):
        matching.save(file)
    matching.save(file, force=True)


def test_identity_round_trip(tmp_path: Path) -> None:
    symmetry = hand.mlp()
    matching = Matching((symmetry.identity(), symmetry.identity()), symmetry)
    matching.save(tmp_path / "m.safetensors")
    assert Matching.load(tmp_path / "m.safetensors").to_universe == matching.to_universe


def test_a_file_without_permission_is_not_called_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "m.safetensors").touch()
    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(CheckpointError, match=r"m\.safetensors cannot be read: Permission denied"):
        Matching.load(tmp_path / "m.safetensors")


def test_damaged_files(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    with pytest.raises(CheckpointError, match="does not exist; check the path"):
        Matching.load(file)
    with pytest.raises(CheckpointError, match="is a directory; give the file"):
        Matching.load(tmp_path)
    file.write_bytes(b"nonsense" * 10)
    with pytest.raises(CheckpointError, match="cannot be read"):
        Matching.load(file)
    from automerge.io import save_state_dict

    save_state_dict(tmp_path / "w.safetensors", {"w": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="not a matching"):
        Matching.load(tmp_path / "w.safetensors")


def test_cycle_error_is_measured() -> None:
    """Maps that are no inverses of each other would show: the sum is over what `between` composes."""
    symmetry = hand.mlp()
    matching = Matching(tuple(symmetry.random_element(i) for i in range(4)), symmetry)
    assert matching.cycle_error() == 0.0

    class Broken(Matching):
        def between(self, a: int, b: int) -> Element:
            return self.to_universe[a]

    assert Broken(matching.to_universe, symmetry).cycle_error() > 0


def test_unknown_models_and_report() -> None:
    symmetry = hand.mlp()
    models = [hand.weights(symmetry, seed) for seed in range(2)]
    matching = match(models, symmetry, FrankWolfe(max_iterations=2))
    with pytest.raises(MatchingError, match="no model 2"):
        matching.between(0, 2)
    with pytest.raises(MatchingError, match="of 2 models, got 1"):
        matching.apply(models[:1])
    text = str(matching)
    for word in ("2 models", "FrankWolfe(max_iterations=2", "objective", "iterations", "gradient", "positions moved"):
        assert word in text


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, m: m.between("a", 0), "there is no model 'a'; this matching has the models 0 to 1"),
        (lambda s, m: match([{}, {}], s, "frank-wolfe"), "matcher is 'frank-wolfe'; give a matcher"),
        (lambda s, m: match([{}, {}], s, FrankWolfe), "matcher is the class FrankWolfe"),
        (lambda s, m: s.random_element(-1), r"random_element\(-1\): give an integer of at least 0"),
        (lambda s, m: s.random_element("a"), "random_element"),
        (lambda s, m: CCA(ridge="a"), "CCA\\(ridge='a'\\): expected a number of at least 0"),
    ],
)
def test_arguments_of_another_kind(call: Callable[[Symmetry, Matching], object], message: str) -> None:
    symmetry = hand.mlp()
    matching = Matching((symmetry.identity(), symmetry.identity()), symmetry)
    with pytest.raises(AutomergeError, match=message):
        call(symmetry, matching)


def test_large_tensors_are_told_by_entries_that_they_have() -> None:
    """The last of them is no float32 number."""
    large = torch.zeros(1).expand(2**25 + 4)
    assert sketch({"w": large}, ["w"]) != sketch({"w": large + 1}, ["w"])
