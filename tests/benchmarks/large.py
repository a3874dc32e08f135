"""Whole matches of three networks of torchvision with fresh weights, each in a process of its own, on two threads.

`python -m tests.benchmarks.large` prints the table of `docs/benchmarks.md`, with `NAME [--offload DIRECTORY]` one match as
JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

from automerge import FrankWolfe, infer, match
from automerge._assignment import lapx_solver
from automerge._machine import readable
from automerge.blocks import decompose
from automerge.matchers._memory import estimate
from zoo.coverage._operators import import_torchvision

NAMES = {"resnet50": "ResNet50", "vit_b_16": "ViT-B/16"}


def private() -> int:
    """The bytes of memory that are no file's (Linux)."""
    status = Path("/proc/self/status")
    return int(status.read_text().split("RssAnon:")[1].split()[0]) * 1024 if status.exists() else 0


class Peak:
    """The largest private memory of this process, looked at every 20 ms."""

    def __enter__(self) -> Peak:
        self.bytes, self._done = private(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.bytes = max(self.bytes, private())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def one(name: str, offload: Path | None) -> dict[str, float | str]:
    """Match three networks; seconds by the clock, memory beside the models."""
    torch.set_num_threads(2)
    torchvision = import_torchvision()
    models = []
    for seed in range(3):
        torch.manual_seed(seed)
        models.append(getattr(torchvision.models, name)().eval())
    begin = time.perf_counter()
    symmetry = infer(models[0], torch.randn(1, 3, 224, 224), verify=False)
    inferred = time.perf_counter() - begin
    before = private()
    with Peak() as peak:
        begin = time.perf_counter()
        matching = match(models, symmetry, FrankWolfe(offload=offload))
        seconds = time.perf_counter() - begin
    return {
        "million": sum(p.numel() for p in models[0].parameters()) / 1e6,
        "infer": inferred,
        "match": seconds,
        **{f"of it {k}": v for k, v in matching.stats["seconds"].items()},
        "memory": peak.bytes - before,
        "estimate": estimate(decompose(symmetry), 3, torch.float32),
        "resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "objective": matching.stats["objective"],
        "gain": matching.stats["objective"] - matching.stats["start_objective"],
        "solver": "lapx" if lapx_solver() else "scipy",
    }


def table() -> list[str]:
    """The rows of `docs/benchmarks.md`."""
    rows = ["| three networks | million parameters | s | start | gradient | assignment | step | polish | memory |"]
    rows.append("|---|---|---|---|---|---|---|---|---|")
    for name, title in NAMES.items():
        done = subprocess.run(
            [sys.executable, "-m", "tests.benchmarks.large", name],
            capture_output=True,
            text=True,
            check=True,
        )
        found = json.loads(done.stdout.splitlines()[-1])
        parts = " | ".join(
            f"{found[f'of it {k}']:.0f}" for k in ("start", "gradient", "assignment", "line_search", "polish")
        )
        first = f"{title} ({found['solver']}) | {found['million']:.1f} | {found['match']:.0f}"
        rows.append(f"| {first} | {parts} | {readable(found['memory'])} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", nargs="?", choices=NAMES)
    parser.add_argument("--offload", type=Path)
    options = parser.parse_args()
    print(json.dumps(one(options.name, options.offload)) if options.name else "\n".join(table()))


if __name__ == "__main__":
    main()
