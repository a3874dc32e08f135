"""Work on disk instead of in memory: the same result, little memory, and nothing left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from automerge import FrankWolfe, MatchingError, MergeMany, infer, match, merge
from automerge._errors import CheckpointError, OutputError
from automerge._offload import Store
from automerge.io import load_state_dict, save_state_dict
from tests import _symmetries as hand

FW = {
    "default": {},
    "several starts": {"restarts": 1, "start": "barycentre"},
    "simultaneous": {"schedule": "simultaneous", "anchor": 1},
    "random, unpolished": {"start": "sinkhorn", "polish": 0, "reheats": 0},
}


class Network(nn.Module):
    """A tied residual network: its head is its first layer."""

    def __init__(self, width: int = 24, hidden: int = 40) -> None:
        super().__init__()
        self.first = nn.Linear(6, width, bias=False)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 6, bias=False)
        self.register_buffer("mask", torch.linspace(0, 1, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x * self.mask)
        x = self.norm(x + self.down(self.up(x).relu()))
        return self.head(x)


class Tied(Network):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(24, 24, bias=False)
        self.back = nn.Linear(24, 24, bias=False)
        self.back.weight = self.last.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x * self.mask)
        return self.head(self.norm(self.back(self.last(h).relu()).relu() + h))


def _cast(state: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {n: v.to(dtype) if v.is_floating_point() else v for n, v in state.items()}


def models(make: type[nn.Module] = Network, count: int = 3) -> list[nn.Module]:
    out = []
    for seed in range(count):
        torch.manual_seed(seed)
        out.append(make())
    return out


# -------------------------------------------------------------------- the same result
@pytest.mark.parametrize("name", hand.ALL)
@pytest.mark.parametrize("how", FW)
def test_a_matching_on_disk_is_the_one_in_memory(name: str, how: str, tmp_path: Path) -> None:
    symmetry = hand.ALL[name]()
    weights = [hand.weights(symmetry, seed) for seed in range(3)]
    options = FW[how]
    memory = match(weights, symmetry, FrankWolfe(**options))  # type: ignore[arg-type]
    disk = match(weights, symmetry, FrankWolfe(offload=tmp_path, **options))  # type: ignore[arg-type]
    assert memory.to_universe == disk.to_universe
    assert memory.stats["runs"] == disk.stats["runs"]
    assert memory.matcher == disk.matcher
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("make", [Network, Tied])
@pytest.mark.parametrize("reference", ["universe", 1])
def test_a_merge_on_disk_is_the_one_in_memory(make: type[nn.Module], reference: str | int, tmp_path: Path) -> None:
    nets, x = models(make), torch.randn(5, 6)
    memory = merge(nets, x, coordinates=reference)  # type: ignore[arg-type]
    with torch.device("meta"):
        empty = make()
    states = [n.state_dict() for n in nets]
    disk = merge(states, x, architecture=empty, coordinates=reference, offload=tmp_path)  # type: ignore[arg-type]
    assert memory.state_dict.keys() == disk.state_dict.keys()
    assert all(torch.equal(v, disk.state_dict[n]) for n, v in memory.state_dict.items())
    assert memory.symmetry.aliases == disk.symmetry.aliases
    assert all(p.is_meta for p in empty.parameters())
    assert not list(tmp_path.iterdir())


def test_a_repair_on_disk_is_the_one_in_memory(tmp_path: Path) -> None:
    nets, x = models(), [torch.randn(16, 6) for _ in range(2)]
    results = [merge(nets, x[0], data=x, repair="both", offload=o) for o in (None, tmp_path)]
    assert all(torch.equal(v, results[1].state_dict[n]) for n, v in results[0].state_dict.items())


def test_half_precision_checkpoints_and_an_architecture_without_values(tmp_path: Path) -> None:
    nets = models()
    with torch.device("meta"):
        empty = Network()
    halves = [_cast(net.state_dict(), torch.float16) for net in nets]
    wide = merge([_cast(h, torch.float32) for h in halves], torch.ones(2, 6), architecture=nets[0])
    result = merge(halves, torch.ones(2, 6), architecture=empty, offload=tmp_path)
    assert result.state_dict["up.weight"].dtype == torch.float16
    assert torch.equal(result.state_dict["up.weight"], wide.state_dict["up.weight"].half())


# -------------------------------------------------------------------- memory
_LARGE = """
import sys, threading, time
import torch
from torch import nn
torch.set_num_threads(1)
import automerge
from automerge.io import load_state_dict, save_state_dict

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(256), nn.Linear(256, 512), nn.Linear(512, 256)
    def forward(self, x):
        return x + self.b(self.a(self.norm(x)).relu())

def build():
    return nn.Sequential(nn.Linear(8, 256), *[Block() for _ in range(24)], nn.Linear(256, 8))

def private():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

folder, offload = sys.argv[1], sys.argv[2] == "offload"
for seed in range(3):
    torch.manual_seed(seed)
    state = build().state_dict()
    save_state_dict(f"{folder}/{seed}.safetensors.index.json", state, shard_bytes=4_000_000, force=True)
size = sum(v.numel() * v.element_size() for v in state.values())
del state
with torch.device("meta"):
    empty = build()
net = empty if offload else build()
x = torch.ones(2, 8)
automerge.merge([nn.Linear(2, 3).requires_grad_(False) for _ in range(2)], torch.ones(1, 2))  # whatever loads late
peak, done = [0], []
def watch():
    while not done:
        peak[0] = max(peak[0], private())
        time.sleep(0.002)
before = private()
thread = threading.Thread(target=watch)
thread.start()
states = [load_state_dict(f"{folder}/{seed}.safetensors.index.json") for seed in range(3)]
matcher = automerge.FrankWolfe(max_iterations=2, reheats=0, polish=1)
result = automerge.merge(states, x, architecture=net, matcher=matcher, verify=False, offload=folder if offload else None)
result.save(f"{folder}/{sys.argv[2]}.safetensors.index.json", shard_bytes=4_000_000)
done.append(1)
thread.join()
print((peak[0] - before) / (3 * size))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured as Linux tells it")
def test_models_are_merged_in_less_memory_than_they_take(tmp_path: Path) -> None:
    """Three checkpoints in shards: what is held in memory, as a share of their size."""
    shares, states = {}, {}
    for how in ("memory", "offload"):
        done = subprocess.run(
            [sys.executable, "-c", _LARGE, str(tmp_path), how], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        shares[how] = float(done.stdout.split()[-1])
        states[how] = load_state_dict(tmp_path / f"{how}.safetensors.index.json")
    assert all(torch.equal(v, states["offload"][n]) for n, v in states["memory"].items())
    assert shares["memory"] > 2.0
    assert shares["offload"] < 0.5


# -------------------------------------------------------------------- refusals
def test_what_cannot_be_offloaded_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nets, x = models(), torch.randn(4, 6)
    with pytest.raises(OutputError, match="is no directory; create it first"):
        merge(nets, x, offload=tmp_path / "absent")
    with pytest.raises(MatchingError, match=r"offload= is for FrankWolfe; MergeMany holds"):
        merge(nets, x, matcher=MergeMany(), offload=tmp_path)
    monkeypatch.setattr(Store, "free", lambda self: None if self.folder is None else 1000)
    with pytest.raises(MatchingError, match=r"the disk of .* has 1000.0 B.*or offload to a directory on a larger one"):
        merge(nets, x, offload=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_an_error_and_no_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OutputError, match=r"cannot take [\d,]+ bytes more \(No space left on device\)"):
        Store(tmp_path).keep(torch.ones(10))
    assert not list(tmp_path.iterdir())


def test_a_folder_without_permission_is_not_called_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", refused)
    with pytest.raises(
        OutputError, match=r"cannot be written: Permission denied; give a directory that you may write to"
    ):
        Store(tmp_path)


def test_too_little_memory_points_to_the_disk() -> None:
    with pytest.raises(MatchingError, match="hold it on a disk with offload=DIRECTORY"):
        merge(models(), torch.randn(4, 6), matcher=FrankWolfe(max_memory=1000))


class Hidden(Network):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(6), persistent=False)


def test_what_no_checkpoint_holds_must_have_values(tmp_path: Path) -> None:
    with torch.device("meta"):
        empty = Hidden()
    states = [n.state_dict() for n in models(Hidden)]
    with pytest.raises(
        CheckpointError, match=r"the architecture's scale is on the meta device.*build the architecture on"
    ):
        merge(states, torch.randn(2, 6), architecture=empty, offload=tmp_path)


def test_a_model_too_large_to_be_verified_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Network()
    assert not any("not verified" in n for n in infer(net, torch.randn(3, 6)).notes)
    monkeypatch.setattr(sys.modules["automerge.infer"], "physical_memory", lambda: 1000)
    symmetry = infer(net, torch.randn(3, 6))
    assert any(n.startswith("not verified: two copies of the model in float64 take") for n in symmetry.notes)
    assert "verified" not in symmetry.stats


# -------------------------------------------------------------------- shards
def test_shards_are_what_other_libraries_read(tmp_path: Path) -> None:
    state = Tied().state_dict()
    index = tmp_path / "model.safetensors.index.json"
    save_state_dict(index, state, {"automerge.provenance": "p"}, shard_bytes=5000)
    files = sorted(p.name for p in tmp_path.iterdir())
    shards = [f for f in files if f != index.name]
    assert len(shards) > 2
    assert shards == [f"model-{k:05d}-of-{len(shards):05d}.safetensors" for k in range(1, len(shards) + 1)]
    listed = json.loads(index.read_text())
    assert listed["weight_map"].keys() == state.keys()
    assert listed["metadata"]["total_size"] == sum(v.numel() * v.element_size() for v in state.values())
    assert listed["metadata"]["automerge.provenance"] == "p"
    again = load_state_dict(index)
    assert all(torch.equal(v, again[n]) for n, v in state.items())
    assert again["last.weight"] is again["back.weight"]


def test_shards_are_written_together_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = tmp_path / "m.safetensors.index.json"
    old, new = Network().state_dict(), Network().state_dict()
    save_state_dict(index, old, shard_bytes=3000)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(OutputError, match="exists; pass --force"):
        save_state_dict(index, new, shard_bytes=3000)
    import automerge.io as io

    calls, whole = [], io.save_file

    def breaks(*args: object, **kwargs: object) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        whole(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(io, "save_file", breaks)
    with pytest.raises(OutputError, match="No space left"):
        save_state_dict(index, new, force=True, shard_bytes=3000)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    monkeypatch.undo()
    renamed, rename = [], os.replace

    def dies(source: object, target: object) -> None:
        renamed.append(target)
        if len(renamed) == 2:
            raise KeyboardInterrupt
        rename(source, target)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        save_state_dict(index, new, force=True, shard_bytes=3000)
    assert not index.exists()  # it would name old shards and new ones
    monkeypatch.undo()
    save_state_dict(index, new, force=True, shard_bytes=3000)
    assert all(torch.equal(v, load_state_dict(index)[n]) for n, v in new.items())
