"""One trainer for every image classifier of the zoo: deterministic per seed, resumable, and quiet about it.

``python -m zoo.train resnet --seed 0 --seed 1 --out runs`` writes ``runs/resnet-digits-seed0.safetensors`` and a JSON
card beside it. A run that was interrupted goes on from its last finished epoch; a complete one is read, not repeated.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
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
    """

    epochs: int = 15
    batch: int = 64
    rate: float = 2e-3
    decay: float = 1e-2
    shift: int = 0


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

    Returns:
        The trained network.
    """
    out = Path(path) if path is not None else None
    head = {"model": _name(factory), "data": data.name, "images": _digest(data), "seed": seed, "recipe": asdict(recipe)}
    if out is not None and (done := _finished(out, head)) is not None:
        if report:
            report(recipe.epochs, recipe.epochs)
        return done
    devices = [device] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        model = factory().to(device)
        _fit(model, data, recipe, seed, out.with_suffix(".resume") if out else None, head, report, torch.device(device))
    state = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    card = {**head, "metrics": _metrics(model, data, torch.device(device))}
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_state_dict(out, state, {"card": json.dumps(card)}, force=True)
        write_atomically(out.with_suffix(".json"), lambda t: Path(t).write_text(json.dumps(card, indent=2) + "\n"))
        out.with_suffix(".resume").unlink(missing_ok=True)
    return Trained(state, card, out)


def _fit(
    model: nn.Module,
    data: Dataset,
    recipe: Recipe,
    seed: int,
    resume: Path | None,
    head: dict[str, Any],
    report: Report | None,
    device: torch.device,
) -> None:
    """The epochs, from the last finished one."""
    count = len(data.y_train)
    steps = -(-count // recipe.batch)
    optimiser = torch.optim.AdamW(model.parameters(), lr=recipe.rate, weight_decay=recipe.decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, recipe.rate, total_steps=recipe.epochs * steps)
    first = _restore(resume, head, model, optimiser, schedule)
    for epoch in range(first, recipe.epochs):
        torch.manual_seed(seed * 100_003 + epoch)
        model.train()
        for rows in torch.randperm(count).split(recipe.batch):
            x = _shifted(data.x_train[rows], recipe.shift).to(device)
            optimiser.zero_grad(set_to_none=True)
            F.cross_entropy(model(x), data.y_train[rows].to(device)).backward()
            optimiser.step()
            schedule.step()
        if resume is not None and epoch + 1 < recipe.epochs:
            _remember(resume, head, epoch + 1, model, optimiser, schedule)
        if report:
            report(epoch + 1, recipe.epochs)


def _remember(resume: Path, head: dict[str, Any], epoch: int, model: Any, optimiser: Any, schedule: Any) -> None:
    state = {
        "head": json.dumps(head),
        "epoch": epoch,
        "model": model.state_dict(),
        "optimiser": optimiser.state_dict(),
        "lr_step": schedule.last_epoch,
    }
    write_atomically(resume, lambda temporary: torch.save(state, temporary))


def _restore(resume: Path | None, head: dict[str, Any], model: nn.Module, optimiser: Any, schedule: Any) -> int:
    """Load what `_remember` wrote for the same run; the number of finished epochs."""
    if resume is None or not resume.is_file():
        return 0
    state = torch.load(resume, weights_only=True)
    if state["head"] != json.dumps(head):
        return 0
    model.load_state_dict(state["model"])
    optimiser.load_state_dict(state["optimiser"])
    schedule.last_epoch = state["lr_step"]
    return int(state["epoch"])


def _shifted(x: torch.Tensor, limit: int) -> torch.Tensor:
    """Each image moved by up to ``limit`` pixels; what comes in has the value of the image's corner."""
    if not limit:
        return x
    height, width = x.shape[-2:]
    padded = F.pad(x - x[..., :1, :1], (limit,) * 4) + x[..., :1, :1]
    corners = torch.randint(0, 2 * limit + 1, (len(x), 2)).tolist()
    return torch.stack([image[:, a : a + height, b : b + width] for image, (a, b) in zip(padded, corners, strict=True)])


@torch.no_grad()
def _metrics(model: nn.Module, data: Dataset, device: torch.device) -> dict[str, float]:
    model.eval()
    logits = torch.cat([model(x.to(device)).cpu() for x in data.x_test.split(512)])
    accuracy = (logits.argmax(dim=1) == data.y_test).double().mean()
    return {"test_accuracy": float(accuracy), "test_loss": float(F.cross_entropy(logits.double(), data.y_test))}


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
    return f"{getattr(factory, '__module__', '?')}:{getattr(factory, '__qualname__', repr(factory))}"


def _digest(data: Dataset) -> str:
    digest = hashlib.sha256()
    for part in (data.x_train, data.y_train, data.x_test, data.y_test):
        digest.update(part.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def write_atomically(path: Path, write: Callable[[str], Any]) -> None:
    """Let ``write`` fill a temporary file in the same directory, then rename it to ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
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
    parser.add_argument("--out", type=Path, default=Path("runs"))
    options = parser.parse_args(argv)
    try:
        data = load(options.data)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    recipe = Recipe(epochs=options.epochs, shift=options.shift)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for seed in options.seed or [0]:
        path = options.out / f"{options.model}-{options.data}-seed{seed}.safetensors"
        done = train(ZOO[options.model].factory, data, recipe, seed, path=path, device=device, report=_line(path.stem))
        print(f"{path}: held-out accuracy {done.card['metrics']['test_accuracy']:.4f}")
    return 0


def _line(name: str) -> Report | None:
    """A line that counts epochs on a terminal; nothing elsewhere."""
    if not sys.stderr.isatty():
        return None
    return lambda done, of: print(f"\r{name}: epoch {done}/{of}", end="\n" if done == of else "", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
