"""One trainer for the zoo's classifiers and language models: deterministic per seed, resumable, and quiet about it.

``python -m zoo.train resnet --seed 0 --seed 1 --out runs`` writes ``runs/resnet-digits-seed0.safetensors`` and a JSON
card beside it. A run that was interrupted goes on from its last finished epoch; a complete one is read, not repeated.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import secrets
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from automerge.io import load_state_dict, save_state_dict
from zoo.data import Dataset, load
from zoo.models import ZOO

Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Recipe:
    """How to train. The defaults reach 98 to 99 percent on the digits in seconds.

    Attributes:
        epochs: passes over the training set.
        batch: images per step.
        rate: the peak learning rate of a cosine schedule with warm-up.
        decay: weight decay, decoupled (AdamW).
        shift: random translations of up to this many pixels.
        flip: mirror every other image, at random.
        patience: stop after this many epochs without a lower validation loss, and keep the best epoch's weights; 0 trains
            all epochs, on all images.
        validation: with ``patience``, the share of the training set (its end) that is held out for that.
    """

    epochs: int = 15
    batch: int = 64
    rate: float = 2e-3
    decay: float = 1e-2
    shift: int = 0
    flip: bool = False
    patience: int = 0
    validation: float = 0.1


@dataclass(frozen=True)
class Trained:
    """A trained network.

    Attributes:
        state_dict: its parameters and buffers, on the CPU.
        card: data, seed, recipe and final metrics.
        path: where it was written, if it was.
    """

    state_dict: dict[str, torch.Tensor]
    card: dict[str, Any]
    path: Path | None = None


def train(
    factory: Callable[[], nn.Module],
    data: Dataset,
    recipe: Recipe,
    seed: int,
    *,
    path: str | Path | None = None,
    report: Report | None = None,
    device: str | torch.device = "cpu",
    start: Mapping[str, torch.Tensor] | None = None,
) -> Trained:
    """Train one network from one seed, and write it if asked.

    The seed decides the initial weights, the order of the images and the augmentation; the caller's random state is
    left alone. On one machine with one number of threads the result is the same bit for bit.

    Args:
        factory: builds the network, without arguments.
        data: what to train on.
        recipe: how.
        seed: an integer.
        path: where to write ``.safetensors``; a JSON card of the same name goes beside it, and while the run goes on, a
            ``.resume`` file. A complete file of the same card is read instead of training again.
        report: called with (finished epochs, all epochs).
        device: where to train.
        start: weights to begin with, in place of random ones.

    Returns:
        The trained network.
    """
    out = Path(path) if path is not None else None
    parts = (data.x_train, data.y_train, data.x_test, data.y_test)
    head = {
        "model": _name(factory),
        "data": data.name,
        "images": _digest(parts),
        "seed": seed,
        "recipe": asdict(recipe),
    }
    if start is not None:
        head["start"] = _digest([start[name] for name in sorted(start)])
    if out is not None and (done := _finished(out, head)) is not None:
        if report:
            report(recipe.epochs, recipe.epochs)
        return done
    devices = [device] if torch.device(device).type == "cuda" else []
    exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)  # of CUDA's convolutions
    with torch.random.fork_rng(devices=devices), exact:
        torch.manual_seed(seed)
        model = factory()
        if start is not None:
            model.load_state_dict(dict(start))
        run = _Run(model.to(device), data, recipe, seed, out.with_suffix(".resume") if out else None, head)
        run.fit(report)
    state = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    card = {**head, "epochs": run.epoch, "metrics": _metrics(model, data.x_test, data.y_test)}
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_state_dict(out, state, {"card": json.dumps(card)}, force=True)
        write_atomically(out.with_suffix(".json"), lambda t: Path(t).write_text(json.dumps(card, indent=2) + "\n"))
        out.with_suffix(".resume").unlink(missing_ok=True)
    return Trained(state, card, out)


@dataclass
class _Run:
    """One training: epoch after epoch, from the last finished one."""

    model: nn.Module
    data: Dataset
    recipe: Recipe
    seed: int
    resume: Path | None
    head: dict[str, Any]
    epoch: int = 0
    best: dict[str, Any] = field(default_factory=dict)  # loss, epoch and weights of the best, with patience

    def __post_init__(self) -> None:
        held = round(len(self.data.y_train) * self.recipe.validation) if self.recipe.patience else 0
        if self.recipe.patience and not 0 < held < len(self.data.y_train):
            raise ValueError(
                f"a validation share of {self.recipe.validation:g} leaves nothing to train on, or to validate"
            )
        self.device = next(self.model.parameters()).device
        self.validation = self.data.tail(held) if held else None
        self.data = self.data.head(len(self.data.y_train) - held)
        steps = -(-len(self.data.y_train) // self.recipe.batch)
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=self.recipe.rate, weight_decay=self.recipe.decay)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimiser, self.recipe.rate, total_steps=self.recipe.epochs * steps
        )

    def fit(self, report: Report | None) -> None:
        """All epochs that are left."""
        self._restore()
        while self.epoch < self.recipe.epochs and not self._waited_enough():
            torch.manual_seed(self.seed * 100_003 + self.epoch)
            self._pass()
            self.epoch += 1
            self._validate()
            if self.resume is not None and self.epoch < self.recipe.epochs:
                self._remember(self.resume)
            if report:
                report(self.epoch, self.recipe.epochs)
        if self.best:
            self.model.load_state_dict(self.best["model"])

    def _pass(self) -> None:
        self.model.train()
        for rows in torch.randperm(len(self.data.y_train)).split(self.recipe.batch):
            x = _augmented(self.data.x_train[rows], self.recipe).to(self.device)
            self.optimiser.zero_grad(set_to_none=True)
            _loss(self.model(x), self.data.y_train[rows].to(self.device)).backward()
            self.optimiser.step()
            self.schedule.step()

    def _validate(self) -> None:
        if self.validation is None:
            return
        loss = _metrics(self.model, self.validation.x_train, self.validation.y_train)["test_loss"]
        if not self.best or loss < self.best["loss"]:
            weights = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
            self.best = {"loss": loss, "epoch": self.epoch, "model": weights}

    def _waited_enough(self) -> bool:
        return bool(self.best) and self.epoch - int(self.best["epoch"]) >= self.recipe.patience

    def _remember(self, resume: Path) -> None:
        state = {
            "head": json.dumps(self.head),
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "lr_step": self.schedule.last_epoch,
            "best": self.best,
        }
        write_atomically(resume, lambda temporary: torch.save(state, temporary))

    def _restore(self) -> None:
        """Load what `_remember` wrote for the same run."""
        if self.resume is None or not self.resume.is_file():
            return
        state = torch.load(self.resume, map_location="cpu", weights_only=True)  # made with a GPU, maybe
        if state["head"] != json.dumps(self.head):
            return
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.last_epoch = state["lr_step"]
        self.epoch, self.best = int(state["epoch"]), state["best"]


def _loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy per label; classes on the last axis."""
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def _augmented(x: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    if recipe.flip:
        x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(-1), x)
    return _shifted(x, recipe.shift)


def _shifted(x: torch.Tensor, limit: int) -> torch.Tensor:
    """Each image moved by up to ``limit`` pixels; what comes in has the value of the image's corner."""
    if not limit:
        return x
    height, width = x.shape[-2:]
    padded = F.pad(x - x[..., :1, :1], (limit,) * 4) + x[..., :1, :1]
    corners = torch.randint(0, 2 * limit + 1, (len(x), 2)).tolist()
    return torch.stack([image[:, a : a + height, b : b + width] for image, (a, b) in zip(padded, corners, strict=True)])


@torch.no_grad()
def _metrics(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
    """Accuracy and loss on held-out samples; labels of a text count one by one."""
    model.eval()
    device = next(model.parameters()).device
    right = loss = 0.0
    for inputs, labels in zip(x.split(512), y.split(512), strict=True):
        logits = model(inputs.to(device)).cpu().double()
        right += float((logits.argmax(dim=-1) == labels).sum())
        loss += float(_loss(logits, labels)) * labels.numel()
    return {"test_accuracy": right / y.numel(), "test_loss": loss / y.numel()}


def _finished(out: Path, head: dict[str, Any]) -> Trained | None:
    """The run at ``out`` if it is complete and was made by the same card."""
    card_path = out.with_suffix(".json")
    if not (out.is_file() and card_path.is_file()):
        return None
    card = json.loads(card_path.read_text())
    if {key: card.get(key) for key in head} != json.loads(json.dumps(head)):
        return None
    return Trained(load_state_dict(out), card, out)


def _name(factory: Callable[[], nn.Module]) -> str:
    if isinstance(factory, partial):
        given = [*map(repr, factory.args), *(f"{k}={v!r}" for k, v in sorted(factory.keywords.items()))]
        return f"{_name(factory.func)}({', '.join(given)})"
    return f"{getattr(factory, '__module__', '?')}:{getattr(factory, '__qualname__', repr(factory))}"


def _digest(parts: Iterable[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def write_atomically(path: Path, write: Callable[[str], Any]) -> None:
    """Let ``write`` fill a temporary file in the same directory, then rename it to ``path``.

    The result has the mode that `open` would have left: that of the file it replaces, else what the umask allows.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    temporary.touch(exist_ok=False)
    try:
        mode = stat.S_IMODE((path if path.exists() else temporary).stat().st_mode)
        write(str(temporary))
        temporary.chmod(mode)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def main(argv: list[str] | None = None) -> int:
    """Train one architecture of the zoo for each seed; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m zoo.train", description=__doc__)
    names = sorted(set(ZOO) - {"lm", "unet"})
    parser.add_argument("model", choices=names, metavar="MODEL", help=f"one of {', '.join(names)}")
    parser.add_argument("--data", default="digits", help="digits, or NAME of NAME.npz in $AUTOMERGE_DATA")
    parser.add_argument("--seed", type=int, action="append", help="repeat for several; 0 by default")
    parser.add_argument("--epochs", type=int, default=Recipe.epochs)
    parser.add_argument("--shift", type=int, default=Recipe.shift, help="random translations, in pixels")
    parser.add_argument("--flip", action="store_true", help="mirror every other image")
    parser.add_argument(
        "--patience",
        type=int,
        default=Recipe.patience,
        help="stop after so many epochs without a better validation loss",
    )
    parser.add_argument("--out", type=Path, default=Path("runs"))
    options = parser.parse_args(argv)
    try:
        data = load(options.data)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    recipe = Recipe(epochs=options.epochs, shift=options.shift, flip=options.flip, patience=options.patience)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for seed in options.seed or [0]:
        path = options.out / f"{options.model}-{options.data}-seed{seed}.safetensors"
        with bar(path.stem) as report:
            done = train(ZOO[options.model].factory, data, recipe, seed, path=path, device=device, report=report)
        print(f"{path}: held-out accuracy {done.card['metrics']['test_accuracy']:.4f}")
    return 0


@contextmanager
def bar(name: str) -> Iterator[Report | None]:
    """Give what shows the epochs of one training: a bar on a terminal, nothing elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as shown:
        task = shown.add_task(name, total=None)
        yield lambda done, of: shown.update(task, completed=done, total=of)


if __name__ == "__main__":
    sys.exit(main())
