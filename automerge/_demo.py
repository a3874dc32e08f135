"""``automerge demo``: train, infer, verify, match, merge, repair and measure, on real handwritten digits."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from automerge._console import Advance, Console, follow
from automerge._factory import UsageError, add_current_directory
from automerge._files import make_directory, write_text
from automerge._version import __version__
from automerge.evaluate import barrier, cycle_error, evaluate
from automerge.infer import infer
from automerge.io import StateDict
from automerge.matchers import FrankWolfe, Identity, Matcher, Matching, match
from automerge.matchers._base import Model, Progress
from automerge.merge import MergeResult, merge
from automerge.plot import plot_barrier
from automerge.symmetry import Symmetry

_BATCH = 256
_MLP = {"epochs": 20, "rate": 2e-3, "decay": 1e-2}
_RESNET = {"epochs": 10, "rate": 1e-2, "decay": 1e-1}


@dataclass(frozen=True)
class Settings:
    """What the demo runs.

    Attributes:
        out: where results go.
        models: networks per architecture.
        seed: decides weights, order of images and everything else.
        quick: few images and epochs.
    """

    out: Path
    models: int = 5
    seed: int = 0
    quick: bool = False


@dataclass(frozen=True)
class Room:
    """One architecture on its data.

    Attributes:
        name: of files.
        title: of the table.
        factory: builds a network.
        train_batches: labelled batches for the repair, whose labels are not used.
        test_batches: labelled, held out.
    """

    name: str
    title: str
    factory: Callable[[], nn.Module]
    train_batches: list[tuple[torch.Tensor, torch.Tensor]]
    test_batches: list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, repr=False)
class _Known(Matcher):
    """Gives a matching that was found before, so that merging again does not search again."""

    matching: Matching

    def match(
        self, models: Sequence[Model], symmetry: Symmetry, *, progress: Progress | None = None, data: Any = None
    ) -> Matching:
        """The known matching."""
        return self.matching

    def __repr__(self) -> str:
        return self.matching.matcher


def run(settings: Settings, console: Console) -> dict[str, Any]:
    """Run the demo and write its files.

    Args:
        settings: what to run.
        console: where progress and tables go.

    Returns:
        What ``report.json`` holds: ``result`` is the same for the same seed, ``seconds`` is not.

    Raises:
        UsageError: for fewer than two models, or without ``zoo/``.
        OutputError: if the directory cannot be written.
    """
    if settings.models < 2:
        raise UsageError(f"--models {settings.models}: merging needs at least two models")
    data, train_module, models = _zoo()
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("the demo draws pictures and needs matplotlib; install it with: pip install 'automerge[plot]'")
    make_directory(settings.out)
    digits = data.digits()
    if settings.quick:
        digits = digits.head(512, 256)
    result: dict[str, Any] = {}
    seconds: dict[str, Any] = {}
    for room, options in rooms(digits, models):
        recipe = train_module.Recipe(**{**options, "epochs": 2} if settings.quick else options)
        stages = Console(prefix=f"{room.name}: ")
        with _threads(1):
            result[room.name] = run_room(room, settings, stages, train_module.train, digits, recipe)
        seconds[room.name] = {name: round(value, 2) for name, value in stages.seconds.items()}
        _show(room, result[room.name], seconds[room.name], console)
    report = {"result": {"seed": settings.seed, "models": settings.models, "networks": result}, "seconds": seconds}
    report["versions"] = {"automerge": __version__, "torch": str(torch.__version__)}
    write_text(settings.out / "report.json", json.dumps(report, indent=2) + "\n", force=True)
    console.show(f"checkpoints, merged networks, pictures and report.json are in {settings.out}")
    return report


def rooms(digits: Any, models: Any) -> list[tuple[Room, dict[str, Any]]]:
    """The architectures on their data, each with the options of its recipe.

    Args:
        digits: the data set.
        models: `zoo.models`.
    """
    train_batches = list(zip(digits.x_train.split(_BATCH), digits.y_train.split(_BATCH), strict=True))
    test_batches = list(zip(digits.x_test.split(_BATCH), digits.y_test.split(_BATCH), strict=True))
    return [
        (Room("mlp", "ReLU MLP, four hidden layers of 256", models.mlp.build, train_batches, test_batches), _MLP),
        (Room("resnet", "Residual CNN with BatchNorm", models.resnet.build, train_batches, test_batches), _RESNET),
    ]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """A fixed number of threads, on which the last bits of a sum depend; these networks are too small for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _zoo() -> tuple[Any, Any, Any]:
    """The data, the trainer and the models; they are no part of the wheel."""
    add_current_directory()
    try:
        from zoo import data, models, train
    except ImportError as error:
        raise UsageError(
            "the demo's networks live in zoo/, which is in the repository and not in the installed package "
            f"({error}); run it from a checkout, installed with: pip install -e '.[plot]'"
        ) from error
    return data, train, models


def run_room(
    room: Room, settings: Settings, console: Console, train: Callable[..., Any], digits: Any, recipe: Any
) -> dict[str, Any]:
    """Everything for one architecture; plain data that is the same for the same seed."""
    folder = settings.out
    with console.stage("train") as advance:
        states = [_network(k, room, settings, train, digits, recipe, advance) for k in range(settings.models)]
    network = room.factory().eval()
    example = room.test_batches[0][0][:4]
    network.load_state_dict(states[0])
    with console.stage("infer and verify"):
        symmetry = infer(network, example)
    with console.stage("match") as advance:
        matching = match(states, symmetry, FrankWolfe(), progress=follow(advance))
    if matching.stats.get("interrupted"):
        raise KeyboardInterrupt
    merged = _merge_all(room, network, states, symmetry, matching, console)
    merged["universe, repaired"].save(folder / f"{room.name}-merged.safetensors", force=True)
    with console.stage("evaluate"):
        rows = _rows(room, network, states, merged)
    with console.stage("path"):
        path_data = _path(room, network, states, symmetry, matching, folder)
    return {
        "title": room.title,
        "groups": [generator.size for generator in symmetry.sets],
        "free_share": symmetry.free_share,
        "rows": rows,
        "cycle_error": cycle_error(matching).value,
        "path": path_data,
    }


def _network(
    number: int, room: Room, settings: Settings, train: Callable[..., Any], digits: Any, recipe: Any, advance: Advance
) -> StateDict:
    """Train or read one network, and move the bar of all."""
    seed = settings.seed * 1000 + number
    path = settings.out / f"{room.name}-{seed}.safetensors"

    def report(done: int, of: int) -> None:
        advance(number * of + done, settings.models * of)

    return train(room.factory, digits, recipe, seed, path=path, report=report).state_dict


def _merge_all(
    room: Room,
    network: nn.Module,
    states: Sequence[StateDict],
    symmetry: Symmetry,
    matching: Matching,
    console: Console,
) -> dict[str, MergeResult]:
    """The naive and the universe average, as they are and repaired."""
    out: dict[str, MergeResult] = {}
    for name, matcher in (("naive", Identity()), ("universe", _Known(matching))):
        for suffix, data in (("", None), (", repaired", room.train_batches)):
            with console.stage("repair" if data else "merge"):
                out[name + suffix] = merge(
                    states,
                    room.test_batches[0][0][:4],
                    architecture=network,
                    symmetry=symmetry,
                    matcher=matcher,
                    data=data,
                )
    return out


def _rows(
    room: Room, network: nn.Module, states: Sequence[StateDict], merged: Mapping[str, MergeResult]
) -> list[dict[str, Any]]:
    """Accuracy and loss on held-out digits, one row per way of having one network (or all)."""
    data = room.test_batches
    singles = [evaluate((network, state), data) for state in states]
    count = len(singles)
    rows = [
        _row(
            f"single models (mean of {count})",
            sum(e.accuracy or 0.0 for e in singles) / count,
            sum(e.loss or 0.0 for e in singles) / count,
        )
    ]
    ensemble = evaluate([(network, state) for state in states], data)
    rows.append(_row(f"ensemble of {count}", ensemble.accuracy, ensemble.loss))
    repair = {"reset": "BatchNorm reset", "repair": "REPAIR", "both": "reset and REPAIR", "none": ""}
    for name, label in (("naive", "naive average"), ("universe", "universe merge")):
        for suffix in ("", ", repaired"):
            result = merged[name + suffix]
            measured = evaluate((network, result.state_dict), data)
            how = f", {repair[result.repair.mode]}" if suffix else ""
            rows.append(_row(label + how, measured.accuracy, measured.loss))
    return rows


def _row(name: str, accuracy: float | None, loss: float | None) -> dict[str, Any]:
    return {"name": name, "accuracy": accuracy, "loss": loss}


def _path(
    room: Room, network: nn.Module, states: Sequence[StateDict], symmetry: Symmetry, matching: Matching, folder: Path
) -> dict[str, Any]:
    """The loss along the line between the first two models before and after matching; also a picture."""
    moved = [symmetry.apply(states[k], matching.to_universe[k]) for k in range(2)]
    before = barrier(network, states[0], states[1], room.test_batches)
    after = barrier(network, moved[0], moved[1], room.test_batches)
    others = {}
    if any(name.endswith("running_mean") for name in states[0]):
        data = room.train_batches
        for name, (a, b) in (("before", states[:2]), ("after", moved)):
            others[f"{name}, BatchNorm reset"] = barrier(
                network, a, b, room.test_batches, repair="reset", repair_data=data
            )
    plot_barrier(before, after, folder / f"{room.name}-path.png", others=others, title=room.title, force=True)
    named = {"before": before, "after": after, **others}
    return {name: value.to_dict() for name, value in named.items()}


def _show(room: Room, result: Mapping[str, Any], seconds: Mapping[str, float], console: Console) -> None:
    rows = [[row["name"], f"{100 * row['accuracy']:.2f}", f"{row['loss']:.4f}"] for row in result["rows"]]
    sizes = ", ".join(str(size) for size in sorted(result["groups"], reverse=True))
    barriers = ", ".join(f"{data['loss_barrier']:.4f} {name}" for name, data in result["path"].items())
    notes = [
        f"permutation groups: {sizes} units; {result['free_share']:.1%} of the axes' positions are free",
        f"cycle error of the universe's pairwise maps: {result['cycle_error']:g}",
        f"loss barrier between two models, matching: {barriers}",
    ]
    console.table(room.title, ["held-out digits", "accuracy %", "loss"], rows, notes)
    console.show("  seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in seconds.items()) + "\n")
