"""Measures the universe matcher and writes docs/benchmarks.md: ``python -m tests.benchmarks.matching``.

Times are CPU seconds of one thread, the least of a few repetitions: they mean the same on a machine that others use.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from automerge._machine import readable
from automerge._polynomial import maximise_polynomial
from automerge._state import State
from automerge.blocks import decompose
from automerge.infer import infer
from automerge.matchers import FrankWolfe, Identity, Matcher, MergeMany, WeightMatching, match
from automerge.matchers._memory import estimate
from automerge.matchers._starts import vertices
from automerge.merge import average
from automerge.objective import Objective
from automerge.renormalise import reset_batchnorm
from automerge.symmetry import Symmetry
from tests._all_pairs import AllPairs
from tests.benchmarks.large import table as large_table
from tests.benchmarks.peer import peer_table
from tests.benchmarks.variants import tried
from zoo.data import digits
from zoo.models.mlp import MLP
from zoo.models.resnet import ResNet, build_layernorm
from zoo.models.vgg import build_vgg16
from zoo.models.vit import ViT
from zoo.train import Recipe, train

Factory = Callable[[], nn.Module]
State_ = dict[str, torch.Tensor]
now = time.process_time


# -------------------------------------------------------------------- one iteration
def problem(factory: Factory, count: int, shape: Sequence[int]) -> tuple[Symmetry, list[State_]]:
    torch.manual_seed(0)
    symmetry = infer(factory().eval(), torch.randn(*shape), verify=False)
    models = []
    for seed in range(count):
        torch.manual_seed(seed)
        models.append({n: v.detach() for n, v in factory().state_dict().items()})
    return symmetry, models


def products(objective: Objective) -> float:
    """The gradient's own products, as plain ``torch.mm`` on operands of their shapes."""
    operands = []
    for bundle in objective.bundles:
        for dim in bundle.dims:
            n = bundle.weights.shape[dim]
            k = bundle.weights[0].numel() // n
            operands.append((torch.randn(n, k), torch.randn(k, n)))
    best = float("inf")
    for _ in range(3):
        begin = now()
        for _ in range(objective.count):
            for a, b in operands:
                torch.mm(a, b)
        best = min(best, now() - begin)
    return best


def iteration(objective: Objective, repeat: int = 4) -> dict[str, float]:
    """Seconds of the parts of one iteration over all models, from a soft start, with steps that leave it soft."""
    state = State.soft(objective, objective.identity(), 0.9)
    best: dict[str, float] = {}
    for _ in range(repeat):
        parts = dict.fromkeys(("gradient", "assignment", "step"), 0.0)
        for m in range(objective.count):
            one, begin = slice(m, m + 1), now()
            gradient = state.gradient(one)
            parts["gradient"] += (after := now()) - begin
            sigma = vertices(objective, gradient)[0]
            parts["assignment"] += (begin := now()) - after
            segment = state.segment(sigma, one, state.ends(gradient, sigma, one))
            step, _ = maximise_polynomial(segment.coefficients)
            state.advance(segment, min(step, 0.9))
            parts["step"] += now() - begin
        if not best or sum(parts.values()) < sum(best.values()):
            best = parts
    return best


def iterations_table() -> list[str]:
    rows = ["| network, 3 models | million parameters | s | products s | ratio | gradient | assignment | step | peak |"]
    rows.append("|---|---|---|---|---|---|---|---|---|")
    cases: list[tuple[str, Factory]] = [
        (f"ResNet20, width x{w}", lambda w=w: ResNet(width=16 * w, depth=3, channels=3)) for w in (1, 2, 4, 8)
    ]
    cases += [("VGG16", build_vgg16)]
    cases += [(f"MLP, 3 layers of {n}", lambda n=n: MLP((64, n, n, n, 10))) for n in (128, 256, 512, 1024)]
    cases += [(f"MLP, {d} layers of 256", lambda d=d: MLP((64, *[256] * d, 10))) for d in (2, 8, 16)]
    for name, factory in cases:
        symmetry, models = problem(factory, 3, (1, 1, 8, 8) if "MLP" in name else (1, 3, 32, 32))
        objective = Objective(decompose(symmetry), models)
        parts, floor = iteration(objective), products(objective)
        total = sum(parts.values())
        size = sum(v.numel() for v in models[0].values()) / 1e6
        held = peak(3, 16 * int(name.rpartition("x")[2])) if "ResNet" in name else "-"
        shares = " | ".join(f"{v / total:.0%}" for v in parts.values())
        rows.append(f"| {name} | {size:.2f} | {total:.4f} | {floor:.4f} | {total / floor:.2f} | {shares} | {held} |")
    return rows


def number_table() -> list[str]:
    rows = ["| N | s per iteration | s per model | plain all pairs s | estimate of memory | peak measured |"]
    rows.append("|---|---|---|---|---|---|")
    symmetry, models = problem(lambda: ResNet(width=32, depth=3, channels=3), 16, (1, 3, 32, 32))
    blocks = decompose(symmetry)
    for count in (2, 3, 4, 8, 16):
        seconds = sum(iteration(Objective(blocks, models[:count])).values())
        pairs = "-"
        if count <= 8:
            oracle = AllPairs(blocks, models[:count], torch.float32)
            begin = now()
            oracle.iterate(1)
            pairs = f"{now() - begin:.2f}"
        held = readable(estimate(blocks, count, torch.float32))
        rows.append(f"| {count} | {seconds:.3f} | {seconds / count:.4f} | {pairs} | {held} | {peak(count)} |")
    return rows


def same_objective_table(steps: int = 40) -> list[str]:
    """A whole search against the all-pairs loop, which may stop before: what each takes, and what it gains."""
    rows = ["| N | all-pairs loop s | iterations | `FrankWolfe()` s | times faster | gain in f, the loop's = 100 % |"]
    rows.append("|---|---|---|---|---|---|")

    def factory() -> nn.Module:
        return ResNet(width=32, depth=3)

    symmetry = infer(factory().eval(), torch.randn(2, 1, 8, 8), verify=False)
    everyone = [train(factory, digits(), Recipe(epochs=2), seed).state_dict for seed in range(8)]
    for count in (3, 8):
        models = everyone[:count]
        oracle = AllPairs(decompose(symmetry), models, torch.float32)
        begin = now()
        values, plans = oracle.iterate(steps)
        theirs = now() - begin
        rounded = oracle.vertices(plans)
        eyes = [[torch.eye(len(s))[torch.from_numpy(s)] for s in v] for v in rounded]
        gained = float(oracle.value(eyes)) - values[0]
        begin = now()
        found = match(models, symmetry, FrankWolfe())
        ours = now() - begin
        share = (found.stats["objective"] - found.stats["start_objective"]) / gained
        rows.append(f"| {count} | {theirs:.1f} | {len(values) - 1} | {ours:.2f} | {theirs / ours:.0f} | {share:.1%} |")
    return rows


def peak(count: int, width: int = 32) -> str:
    """The growth of the resident memory of a process that matches so many (Linux; the high-water mark is reset first)."""
    if not Path("/proc/self/clear_refs").exists():
        return "-"
    code = (
        "import torch; torch.set_num_threads(1)\n"
        "from pathlib import Path\n"
        "from tests.benchmarks.matching import *\n"
        f"s, models = problem(lambda: ResNet(width={width}, depth=3, channels=3), {count}, (1, 3, 32, 32))\n"
        "match(models[:2], s, FrankWolfe(max_iterations=0, reheats=0, polish=0))\n"
        "def kilobytes(key): return int(Path('/proc/self/status').read_text().split(key + ':')[1].split()[0])\n"
        "Path('/proc/self/clear_refs').write_text('5')\n"
        "before = kilobytes('VmRSS')\n"
        "match(models, s, FrankWolfe(max_iterations=2, reheats=0, polish=1))\n"
        "print(kilobytes('VmHWM') - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return readable(int(done.stdout.split()[-1]) * 1024)


# -------------------------------------------------------------------- quality
NETWORKS: dict[str, tuple[Factory, int]] = {
    "MLP 4 x 32": (lambda: MLP((64, 32, 32, 32, 32, 10)), 2),
    "MLP 6 x 48": (lambda: MLP((64, 48, 48, 48, 48, 48, 48, 10)), 2),
    "MLP 2 x 64": (lambda: MLP((64, 64, 64, 10)), 2),
    "MLP 3 x 128": (lambda: MLP((64, 128, 128, 128, 10)), 2),
    "MLP 2 x 128, BatchNorm": (lambda: MLP((64, 128, 128, 10), norm=True), 2),
    "ResNet, width 8": (lambda: ResNet(width=8), 2),
    "ResNet, width 16": (lambda: ResNet(width=16), 2),
    "ResNet, LayerNorm": (build_layernorm, 2),
    "ViT, width 32": (ViT, 2),
    "ViT, width 48": (lambda: ViT(dim=48, heads=3, hidden=96), 2),
}
"""The networks, and how many sets of three seeds each."""
SETS: dict[str, tuple[Factory, int]] = {
    f"{name}, seeds {first} to {first + 2}": (factory, first)
    for name, (factory, count) in NETWORKS.items()
    for first in range(0, 3 * count, 3)
}
CHOICES: dict[str, Matcher] = {
    "Identity": Identity(),
    "WeightMatching": WeightMatching(),
    "MergeMany": MergeMany(),
    "FrankWolfe(reheats=0)": FrankWolfe(reheats=0),
    "FrankWolfe(restarts=1, reheats=0)": FrankWolfe(restarts=1, reheats=0),
    "FrankWolfe()": FrankWolfe(),
    "FrankWolfe(reheats=2)": FrankWolfe(reheats=2),
    'FrankWolfe(block_weights="normalised")': FrankWolfe(block_weights="normalised"),
    "FrankWolfe(polish=0, reheats=0)": FrankWolfe(polish=0, reheats=0),
}


def accuracy(factory: Factory, state: State_) -> float:
    """Of a merged network on held-out digits, its BatchNorm statistics measured on the training set."""
    data = digits()
    model = factory()
    model.load_state_dict(state)
    reset_batchnorm(model, list(data.x_train.split(256)))
    with torch.no_grad():
        return float((model.eval()(data.x_test).argmax(dim=1) == data.y_test).double().mean())


def agreement(symmetry: Symmetry, models: Sequence[State_]) -> float:
    """The sum of the inner products of all pairs."""
    names = [n for n in symmetry.shapes if n not in symmetry.statistics]
    pairs = itertools.combinations(models, 2)
    return sum(float((a[n].double() * b[n].double()).sum()) for a, b in pairs for n in names)


def all_pairs(symmetry: Symmetry, models: Sequence[State_]) -> float:
    """What the all-pairs loop gains over the models as they are."""
    oracle = AllPairs(decompose(symmetry), models)
    rounded = oracle.vertices(oracle.iterate(100)[1])
    eyes = [[torch.eye(len(s), dtype=torch.float64)[torch.from_numpy(s)] for s in v] for v in rounded]
    return float(oracle.value(eyes)) - float(oracle.value(oracle.identity()))


@dataclass
class Row:
    """What a way of matching found on every set."""

    gains: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def text(self, name: str, best: list[float] | None = None) -> str:
        """A line of the table; ``best`` are the gains with which it is compared."""
        mean = sum(self.gains) / len(self.gains)
        merged = sum(self.accuracies) / len(self.accuracies)
        above = sum(v > b * (1 + 1e-6) for v, b in zip(self.gains, best or [1.0] * len(self.gains), strict=True))
        least = min(self.gains)
        return (
            f"| {name} | {mean:.1%}, {least:.1%} | {above} of {len(self.gains)} | {merged:.2%} | {self.seconds:.1f} |"
        )


def quality_tables() -> tuple[list[str], list[str], list[str]]:
    """What the matchers find, what variants of the search find, and the same for two models against `rebasin`."""
    pairs: dict[str, tuple[Factory, Symmetry, list[State_]]] = {}
    found: dict[str, Row] = {name: Row() for name in CHOICES}
    other: dict[str, Row] = {}
    loop = 0.0
    for title, (factory, first) in SETS.items():
        models = [train(factory, digits(), Recipe(epochs=6), first + i).state_dict for i in range(3)]
        symmetry = infer(factory().eval(), torch.randn(2, 1, 8, 8), verify=False)
        pairs[title] = factory, symmetry, models
        still, begin = agreement(symmetry, models), now()
        theirs = all_pairs(symmetry, models)
        loop += now() - begin
        ways: dict[str, tuple[list[State_], float]] = {}
        for name, matcher in CHOICES.items():
            begin = now()
            matching = match(models, symmetry, matcher)
            ways[name] = matching.apply(models), now() - begin
        for name, (moved, seconds) in (ways | tried(symmetry, models)).items():
            row = found[name] if name in found else other.setdefault(name, Row())
            row.gains.append((agreement(symmetry, moved) - still) / theirs)
            row.accuracies.append(accuracy(factory, average(moved, [1 / 3] * 3)))
            row.seconds += seconds
    rows = ["| matcher | gain in f, all-pairs loop = 100 % (mean, least) | sets above it | merged accuracy | s |"]
    rows += ["|---|---|---|---|---|", f"| all-pairs loop | 100.0 %, 100.0 % | - | - | {loop:.1f} |"]
    rows += [row.text(f"`{name}`") for name, row in found.items()]
    default = found["FrankWolfe()"]
    more = [
        "| way | gain in f, all-pairs loop = 100 % (mean, least) | sets above `FrankWolfe()` | merged accuracy | s |"
    ]
    more += ["|---|---|---|---|---|", default.text("`FrankWolfe()`", default.gains)]
    more += [row.text(name, default.gains) for name, row in other.items()]
    return rows, more, peer_table(pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks.md"))
    torch.set_num_threads(1)
    out = parser.parse_args().out
    rev = f"torch {torch.__version__}, python {platform.python_version()}, {platform.machine()}"
    quality, tried_too, peers = quality_tables()
    text = TEXT.format(
        rev=rev,
        iterations="\n".join(iterations_table()),
        number="\n".join(number_table()),
        same="\n".join(same_objective_table()),
        large="\n".join(large_table()),
        quality="\n".join(quality),
        tried="\n".join(tried_too),
        peers="\n".join(peers),
        sets="; ".join(NETWORKS),
        count=len(SETS),
    )
    out.write_text(text, encoding="utf-8")


TEXT = """# Benchmarks of matching

Written by `python -m tests.benchmarks.matching` ({rev}). Times are CPU seconds of one thread.

## One iteration

All models move once. *Products* are the multiplications of the gradient alone, as plain `torch.mm` on operands of the same
shapes; the ratio says what everything else costs. On small networks that is the exact assignment, which alone is as long as the
products or longer, and the number of calls; on large ones it is memory traffic. Random weights, a soft start. *Peak* is the
growth of the process's memory in a whole match.

{iterations}

## The number of models

ResNet20, width x2. The plain all-pairs formulas (in `tests/_all_pairs.py`) evaluate the line search twelve times, as the
published code does. The estimate is what `FrankWolfe(max_memory=...)` is held against.

{number}

### To the same objective

ResNet20, width x2, trained on the digits for two epochs; the loop runs for at most 40 iterations (the published code took
40 to 110), in float32. The search is whole: starts, reheating and polishing.

{same}

## Whole matches of large networks

`python -m tests.benchmarks.large`: three networks of torchvision with fresh weights each, by the clock on two threads.
*Memory* is what the search holds beside the models.

{large}

## What the search finds

{count} sets of three networks, two (seeds 0 to 2 and 3 to 5) of each of these, trained on the digits for six epochs: {sets}.
The gain over the models as they are is set against that of the all-pairs loop from the identity, rounded, in
float64 and with up to 100 iterations. Merged accuracy is the mean over sets, BatchNorm statistics measured anew.

{quality}

### What else was tried

The same sets, in `tests/benchmarks/variants.py`: dense matrices in float64, so that the seconds compare these rows with
each other only. All start where `FrankWolfe` starts, and are rounded and polished as its ends are. Away and pairwise steps
are Algorithms 1 and 2 of Lacoste-Julien and Jaggi ([arXiv 1511.05932](https://arxiv.org/abs/1511.05932)), model after
model, with exact steps. Annealing is block-coordinate ascent under Gaussian noise on the gains that fades over 20 sweeps.
Starts, schedules and block weights are in the table above and in the [ablation](experiments/ablation.md).

{tried}

## Two models, against another package

The first two networks of every set. `rebasin` derives its permutations from the modules as well (its seconds include it).
The share is the growth of the inner product of the weights, the best of the three being 100 %. A permutation must not
change what the network computes. `pip install --no-deps rebasin torchview graphviz tqdm` adds it to a CPU build of torch.

{peers}
"""

if __name__ == "__main__":
    main()
