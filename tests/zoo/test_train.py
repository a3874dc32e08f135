"""The trainer is deterministic per seed, goes on where it stopped, and leaves no half-written file."""

import json
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from automerge.io import load_state_dict
from tests._far import CUDA, Far, pretended
from zoo import data as zoo_data
from zoo import train as zoo_train
from zoo.models import lm, mlp, resnet
from zoo.train import Recipe, train

RECIPE = Recipe(epochs=3)


def small() -> zoo_data.Dataset:
    return zoo_data.digits().head(256, 64)


def factory() -> torch.nn.Module:
    return mlp.MLP((64, 32, 10), norm=True)


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_the_split_is_fixed_and_standardised() -> None:
    a, b = zoo_data.digits(), zoo_data.digits()
    assert torch.equal(a.x_train, b.x_train)
    assert len(a.x_train) + len(a.x_test) == 1797
    assert a.x_train.shape[1:] == (1, 8, 8)
    assert a.classes == 10
    assert abs(float(a.x_train.mean())) < 1e-4
    assert abs(float(a.x_train.std()) - 1) < 1e-3


def test_same_seed_same_weights_and_the_callers_random_state_is_kept() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = train(factory, small(), RECIPE, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    assert_same(first.state_dict, train(factory, small(), RECIPE, seed=3).state_dict)
    other = train(factory, small(), RECIPE, seed=4)
    assert not torch.equal(first.state_dict["layers.1.weight"], other.state_dict["layers.1.weight"])


def test_an_interrupted_run_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    whole = train(factory, small(), RECIPE, seed=0)

    def stop(done: int, of: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(factory, small(), RECIPE, seed=0, path=path, report=stop)
    assert [p.name for p in tmp_path.iterdir()] == ["net.resume"]
    epochs: list[int] = []
    resumed = train(factory, small(), RECIPE, seed=0, path=path, report=lambda done, of: epochs.append(done))
    assert epochs == [3]
    assert_same(whole.state_dict, resumed.state_dict)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.json", "net.safetensors"]


def test_a_finished_run_is_read_and_another_recipe_trains_again(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    first = train(factory, small(), RECIPE, seed=0, path=path)
    written = path.stat().st_mtime_ns
    again = train(factory, small(), RECIPE, seed=0, path=path)
    assert path.stat().st_mtime_ns == written
    assert_same(first.state_dict, again.state_dict)
    assert again.card == json.loads((tmp_path / "net.json").read_text())
    train(factory, small(), Recipe(epochs=1), seed=0, path=path)
    assert path.stat().st_mtime_ns != written


def test_a_resume_file_of_another_run_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"

    def stop(done: int, of: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(factory, small(), RECIPE, seed=1, path=path, report=stop)
    resumed = train(factory, small(), RECIPE, seed=0, path=path)
    assert_same(train(factory, small(), RECIPE, seed=0).state_dict, resumed.state_dict)


def test_the_card_tells_data_seed_recipe_and_metrics() -> None:
    card = train(factory, small(), RECIPE, seed=5).card
    assert card["data"] == "digits"
    assert card["seed"] == 5
    assert card["recipe"]["epochs"] == 3
    assert 0 <= card["metrics"]["test_accuracy"] <= 1


def test_shifts_move_images_and_keep_the_background() -> None:
    torch.manual_seed(0)
    x = torch.full((20, 1, 8, 8), -1.0)
    x[:, 0, 4, 4] = 3.0
    y = zoo_train._shifted(x, 2)
    assert y.shape == x.shape
    assert torch.equal(y.flatten(1).max(dim=1).values, torch.full((20,), 3.0))
    assert torch.equal(y.flatten(1).min(dim=1).values, torch.full((20,), -1.0))
    assert len(set(y.flatten(1).argmax(dim=1).tolist())) > 1


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def fail(temporary: str) -> None:
        Path(temporary).write_text("half")
        raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        zoo_train.write_atomically(tmp_path / "a.json", fail)
    assert list(tmp_path.iterdir()) == []


def test_other_data_come_from_the_named_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (30, 6, 6, 3), dtype=np.uint8)
    labels = rng.integers(0, 3, 30).astype(np.uint8)
    np.savez(tmp_path / "tiny.npz", x_train=images, y_train=labels, x_test=images[:5], y_test=labels[:5])
    np.savez(tmp_path / "short.npz", x_train=images)
    monkeypatch.setenv("AUTOMERGE_DATA", str(tmp_path))
    data = zoo_data.load("tiny")
    assert data.x_train.shape == (30, 3, 6, 6)
    assert data.y_train.dtype == torch.int64
    with pytest.raises(ValueError, match="y_train"):
        zoo_data.load("short")
    with pytest.raises(FileNotFoundError, match=r"absent\.npz"):
        zoo_data.load("absent")
    monkeypatch.delenv("AUTOMERGE_DATA")
    with pytest.raises(FileNotFoundError, match="AUTOMERGE_DATA"):
        zoo_data.load("tiny")


def test_the_command_trains_each_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["lstm", "--epochs", "1", "--seed", "0", "--seed", "1", "--out", str(tmp_path)]
    assert zoo_train.main(argv) == 0
    assert capsys.readouterr().out.count("held-out accuracy") == 2
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_epochs_are_shown_on_a_terminal_and_nowhere_else(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    with zoo_train.bar("net") as report:
        train(factory, small(), RECIPE, seed=0, report=report)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes that for a terminal
    with zoo_train.bar("net, seed 0") as report:
        train(factory, small(), RECIPE, seed=0, report=report)
    shown = capsys.readouterr().err
    assert "net, seed 0" in shown
    assert "3/3" in shown


def test_tied_weights_are_written(tmp_path: Path) -> None:
    from automerge.io import load_state_dict, save_state_dict

    model = lm.build()
    save_state_dict(tmp_path / "lm.safetensors", model.state_dict())
    state = load_state_dict(tmp_path / "lm.safetensors")
    assert state["head.weight"].data_ptr() == state["embedding.weight"].data_ptr()


def test_width_multiplies_the_channels() -> None:
    assert resnet.build(width=1).stem.out_channels == 16
    assert resnet.build(width=4).stem.out_channels == 64


# -------------------------------------------------------------------- early stop, start, modes
def overfitting() -> zoo_data.Dataset:
    """Labels that cannot be learnt, so that the validation loss rises soon."""
    torch.manual_seed(0)
    x, y = torch.randn(120, 1, 8, 8), torch.randint(0, 10, (120,))
    return zoo_data.Dataset("noise", x, y, x[:20], y[:20])


def test_training_stops_when_the_validation_loss_rises_and_keeps_the_best_weights() -> None:
    recipe = Recipe(epochs=60, patience=3, validation=0.25, rate=1e-2)
    stopped = train(factory, overfitting(), recipe, seed=0)
    assert 3 < stopped.card["epochs"] < 60
    patient = train(factory, overfitting(), replace(recipe, patience=60), seed=0)  # never stops, keeps the best of all
    assert patient.card["epochs"] == 60
    held = overfitting().tail(30)
    untrained = zoo_train._metrics(factory(), held.x_train, held.y_train)["test_loss"]
    losses = []
    for found in (stopped, patient):
        model = factory()
        model.load_state_dict(found.state_dict)
        losses.append(zoo_train._metrics(model, held.x_train, held.y_train)["test_loss"])
    assert losses[1] <= losses[0] < untrained + 0.5
    last = train(factory, overfitting().head(90), replace(recipe, patience=0), seed=0)  # the same images, to the end
    model.load_state_dict(last.state_dict)
    assert zoo_train._metrics(model, held.x_train, held.y_train)["test_loss"] > losses[0] + 0.1


def stop_after(epochs: int) -> zoo_train.Report:
    def report(done: int, of: int) -> None:
        if done == epochs:
            raise KeyboardInterrupt

    return report


def test_an_interrupted_run_with_early_stop_ends_as_a_whole_one(tmp_path: Path) -> None:
    recipe = Recipe(epochs=60, patience=3, validation=0.25, rate=1e-2)
    whole = train(factory, overfitting(), recipe, seed=0)
    path = tmp_path / "net.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train(factory, overfitting(), recipe, seed=0, path=path, report=stop_after(whole.card["epochs"] - 1))
    resumed = train(factory, overfitting(), recipe, seed=0, path=path)
    assert resumed.card["epochs"] == whole.card["epochs"]
    assert_same(whole.state_dict, resumed.state_dict)


def test_early_stop_does_not_train_on_what_it_validates_with() -> None:
    data = overfitting()
    changed = zoo_data.Dataset("noise", data.x_train.clone(), data.y_train, data.x_test, data.y_test)
    changed.x_train[-30:] = 0.0
    recipe = Recipe(epochs=1, patience=1, validation=0.25)  # one epoch, so that nothing else can depend on them
    assert_same(train(factory, data, recipe, seed=0).state_dict, train(factory, changed, recipe, seed=0).state_dict)
    with pytest.raises(ValueError, match="validation share"):
        train(factory, data, Recipe(epochs=1, patience=1, validation=0.001), seed=0)


def test_training_can_start_from_given_weights() -> None:
    first = train(factory, small(), RECIPE, seed=0)
    tuned = train(factory, small(), Recipe(epochs=1, rate=1e-9, decay=0.0), seed=9, start=first.state_dict)
    for name in ("layers.1.weight", "layers.4.weight"):
        torch.testing.assert_close(tuned.state_dict[name], first.state_dict[name], rtol=0, atol=1e-5)
    assert (
        tuned.card["start"] != train(factory, small(), Recipe(epochs=1), seed=9, start=tuned.state_dict).card["start"]
    )


def test_flipped_images_are_mirrored_or_as_they_were() -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 1, 4, 4)
    y = zoo_train._augmented(x, Recipe(flip=True))
    mirrored = [bool(torch.equal(b, a.flip(-1))) for a, b in zip(x, y, strict=True)]
    same = [bool(torch.equal(b, a)) for a, b in zip(x, y, strict=True)]
    assert all(m != s for m, s in zip(mirrored, same, strict=True))
    assert 5 < sum(mirrored) < 35


def test_a_language_model_is_trained_on_text() -> None:
    torch.manual_seed(0)
    x = torch.randint(0, 50, (64, 12))
    data = zoo_data.Dataset("copy", x, x, x[:8], x[:8])  # the next token is the one that is read
    card = train(lm.build, data, Recipe(epochs=8, batch=16, rate=1e-2), seed=0).card
    assert card["metrics"]["test_accuracy"] > 0.5


def test_written_files_follow_the_umask_and_keep_the_mode_they_had(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    before = os.umask(0o027)
    try:
        zoo_train.write_atomically(path, lambda t: Path(t).write_text("1"))
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(0o600)
        zoo_train.write_atomically(path, lambda t: Path(t).write_text("2"))
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text() == "2"


def test_partial_factories_are_named_by_their_arguments() -> None:
    assert zoo_train._name(partial(mlp.MLP, (64, 8, 10), norm=True)) == "zoo.models.mlp:MLP((64, 8, 10), norm=True)"


def _moved(module: torch.nn.Module, device: str | torch.device) -> torch.nn.Module:
    """`Module.to`, which a build of torch without CUDA refuses for parameters that are trained."""
    if torch.device(device).type == "cuda":
        for part in module.modules():
            for held in (part._parameters, part._buffers):
                for name, tensor in held.items():
                    if tensor is not None:
                        there: torch.Tensor = Far(tensor.detach().clone())
                        held[name] = torch.nn.Parameter(there) if held is part._parameters else there
    return module


@pytest.mark.parametrize("recipe", [Recipe(epochs=2, shift=1, flip=True), Recipe(epochs=4, patience=2)])
@pytest.mark.parametrize("make", [factory, partial(resnet.ResNet, width=4, depth=1, channels=1)])
def test_on_a_pretended_gpu_it_trains_there_and_gives_the_same_weights_on_the_cpu(
    make: Callable[[], torch.nn.Module], recipe: Recipe, tmp_path: Path
) -> None:
    seen: set[torch.device] = set()

    def watched() -> torch.nn.Module:
        model = make()
        model.register_forward_pre_hook(lambda _, args: seen.add(args[0].device))
        return model

    here = train(make, small(), recipe, seed=1)
    state = torch.get_rng_state()
    with (
        pretended(),
        mock.patch.object(torch.nn.Module, "to", _moved),
        mock.patch("torch.cuda.get_rng_state", return_value=state),
        mock.patch("torch.cuda.set_rng_state") as put_back,
    ):
        there = train(watched, small(), recipe, seed=1, path=tmp_path / "net.safetensors", device="cuda")
    assert seen == {CUDA}
    assert put_back.called
    assert {type(t) for t in there.state_dict.values()} == {torch.Tensor}
    assert_same(here.state_dict, there.state_dict)
    assert here.card["metrics"] == there.card["metrics"]
    assert_same(there.state_dict, load_state_dict(tmp_path / "net.safetensors"))
