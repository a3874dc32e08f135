"""Going on from a matching, other types than the work's, and the estimate of memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from automerge._errors import MatchingError
from automerge._machine import readable
from automerge.blocks import decompose
from automerge.matchers import FrankWolfe, Identity, Matching, match
from automerge.matchers._memory import estimate
from automerge.matchers._starts import from_element
from automerge.merge import average
from tests import _symmetries as hand


@pytest.mark.parametrize("name", hand.ALL)
def test_elements_are_read_back(name: str) -> None:
    symmetry = hand.ALL[name]()
    blocks = decompose(symmetry)
    rng = np.random.default_rng(0)
    for _ in range(3):
        draw = {r: p for root in blocks.structure.roots for r, p in blocks.structure.random(root, rng).items()}
        again = from_element(blocks, symmetry, blocks.structure.element(symmetry, draw), "it")
        assert draw.keys() == again.keys()
        assert all(np.array_equal(draw[r], again[r]) for r in draw)


def test_a_foreign_element_is_refused() -> None:
    symmetry = hand.mlp()
    torn = symmetry.element([np.arange(g.size) for g in symmetry.generators()])
    torn = type(torn)(symmetry.shapes, {"0.bias": (np.array([1, 0, 2, 3, 4, 5, 6]),)})
    with pytest.raises(MatchingError, match="model 3 is no element"):
        from_element(decompose(symmetry), symmetry, torn, "model 3")


@pytest.mark.parametrize("name", ["mlp", "heads", "residual", "experts", "towers"])
def test_an_interrupted_matching_is_saved_loaded_and_resumed(name: str, tmp_path: Path) -> None:
    symmetry = hand.ALL[name]()
    models = [hand.weights(symmetry, i) for i in range(3)]

    def stop(numbers: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    half = match(models, symmetry, FrankWolfe(dtype="float64"), progress=stop)
    assert half.stats["interrupted"]
    half.save(tmp_path / "half.safetensors")
    loaded = Matching.load(tmp_path / "half.safetensors")
    whole = match(models, symmetry, FrankWolfe(dtype="float64", resume=loaded))
    assert not whole.stats["interrupted"]
    assert whole.stats["objective"] >= half.stats["objective"] - 1e-9
    assert whole.stats["runs"][0]["start"] == "resume"
    again = match(models, symmetry, FrankWolfe(dtype="float64", resume=whole, max_iterations=0, reheats=0, polish=0))
    assert again.stats["objective"] == pytest.approx(whole.stats["objective"], rel=1e-12)


def test_resuming_from_another_matcher_and_misfits() -> None:
    symmetry = hand.mlp()
    models = [hand.weights(symmetry, i) for i in range(3)]
    plain = match(models, symmetry, Identity())
    assert match(models, symmetry, FrankWolfe(resume=plain)).stats["objective"] > plain.stats["objective"]
    with pytest.raises(MatchingError, match="does not fit these 2 models"):
        match(models[:2], symmetry, FrankWolfe(resume=plain))
    other = hand.mlp((5, 8, 6, 3))
    with pytest.raises(MatchingError, match="does not fit"):
        match([hand.weights(other, i) for i in range(3)], other, FrankWolfe(resume=plain))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_matched_in_float32_and_comes_back_in_its_own_type(dtype: torch.dtype) -> None:
    """The result is that of the same numbers given as float32: nothing is computed in half precision."""
    symmetry = hand.heads(3, 4, 16)
    half = [hand.weights(symmetry, i, dtype) for i in range(3)]
    wide = [{n: v.float() for n, v in m.items()} for m in half]
    a, b = match(half, symmetry), match(wide, symmetry)
    assert a.to_universe == b.to_universe
    assert a.stats["objective"] == b.stats["objective"]
    moved = a.apply(half)
    assert all(v.dtype == dtype for m in moved for v in m.values())
    mean = average(moved, [1 / 3] * 3)
    exact = average([{n: v.double() for n, v in m.items()} for m in moved], [1 / 3] * 3)
    assert all(mean[n].dtype == dtype and torch.equal(mean[n], exact[n].to(dtype)) for n in mean)


def test_too_little_memory_is_said_before_the_work() -> None:
    symmetry = hand.mlp()
    models = [hand.weights(symmetry, i) for i in range(3)]
    seen: list[dict[str, Any]] = []
    with pytest.raises(MatchingError, match=r"about .* max_memory allows 100\.0 B; take fewer models or .*float32"):
        match(models, symmetry, FrankWolfe(max_memory=100, dtype="float64"), progress=seen.append)
    with pytest.raises(MatchingError, match="schedule='cyclic'"):
        match(models, symmetry, FrankWolfe(max_memory=100, schedule="simultaneous"))
    assert not seen
    assert match(models, symmetry).stats["memory_estimate"] > 0


_MEASURE = """
import torch
from pathlib import Path
from automerge.blocks import decompose
from automerge.matchers import FrankWolfe, match
from automerge.matchers._memory import estimate
from tests import _symmetries as hand
def peak():  # of this program alone: ru_maxrss remembers the process that it was forked from
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
torch.set_num_threads(1)
symmetry = hand.mlp((700, 900, 900, 10))
models = [hand.weights(symmetry, i, torch.float32) for i in range(4)]
match([{n: v for n, v in m.items()} for m in [hand.weights(hand.mlp(), i) for i in range(2)]], hand.mlp())
before = peak()
match(models, symmetry, FrankWolfe(max_iterations=2, reheats=0))
print(peak() - before, estimate(decompose(symmetry), 4, torch.float32))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_estimate_is_what_is_held() -> None:
    """Measured in a process of its own: neither half nor twice of what it says."""
    out = subprocess.run([sys.executable, "-c", _MEASURE], capture_output=True, text=True, check=True)
    measured, estimated = (int(x) for x in out.stdout.split())
    assert 0.5 * measured <= estimated <= 2.0 * measured, (readable(measured), readable(estimated))


def test_estimate_of_the_parts() -> None:
    blocks = decompose(hand.mlp((5, 7, 3)))
    # 0.weight and 0.bias move along one axis, 1.weight too: 2 copies each; one space of 7
    size = 5 * 7 + 7 + 7 * 3
    assert estimate(blocks, 3, torch.float32) == 4 * (3 * (2 * size + 49) + 3 * size + 49)
