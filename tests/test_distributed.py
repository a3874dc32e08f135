"""Several gloo processes on the loopback interface: the same answer as one process, and clear ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from automerge import cli, infer
from automerge._ranks import ALONE, Ranks
from automerge.io import load_state_dict
from automerge.matchers import FrankWolfe, Matching, match
from tests import _factories
from tests import _symmetries as hand
from tests.matchers.test_crossing import Monarch, states_of

ROOT = Path(__file__).resolve().parents[1]

_SHARE = """
import sys, torch
torch.set_num_threads(1)
from automerge._ranks import Group
from automerge.matchers import FrankWolfe
from tests import _symmetries as hand
name, count, out, options = sys.argv[1], int(sys.argv[2]), sys.argv[3], eval(sys.argv[4])
symmetry = hand.ALL[name]()
ranks = Group(60)
models = [hand.weights(symmetry, m) for m in ranks.shares(count)[ranks.rank]]
matching = FrankWolfe(dtype="float64", **options).match_share(models, symmetry, ranks=ranks)
matching.save(f"{out}/{ranks.rank}.safetensors")
ranks.close()
"""


def environment(rank: int, size: int, port: int, **more: str) -> dict[str, str]:
    """What torchrun sets."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {**os.environ, **{k: str(v) for k, v in own.items()}, "OMP_NUM_THREADS": "1", **more}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def start(size: int, *argv: object, **more: str) -> list[subprocess.Popen[str]]:
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, *map(str, argv)],
            env=environment(r, size, port, **more),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(size)
    ]


def ends(processes: list[subprocess.Popen[str]], seconds: float = 100) -> list[tuple[int, str, str]]:
    out = []
    for p in processes:
        printed, error = p.communicate(timeout=seconds)
        out.append((p.returncode, printed, error))
    return out


def same_everywhere(running: list[subprocess.Popen[str]], alone: Matching, folder: Path) -> None:
    """Every process has written the matching that one process finds."""
    done = ends(running)
    assert all(code == 0 for code, _, _ in done), done
    for rank in range(len(running)):
        shared = Matching.load(folder / f"{rank}.safetensors")
        assert shared.to_universe == alone.to_universe
        assert shared.stats["objective"] == pytest.approx(alone.stats["objective"], rel=1e-12)


def test_shares_cover_all_models() -> None:
    class Some(Ranks):
        rank, size = 0, 3

        def sum(self, tensor: torch.Tensor) -> torch.Tensor:
            raise NotImplementedError

        def broadcast(self, tensor: torch.Tensor, owner: int) -> None:
            raise NotImplementedError

        def gather(self, value: Any) -> list[Any]:
            raise NotImplementedError

    assert [list(r) for r in Some().shares(7)] == [[0, 1], [2, 3], [4, 5, 6]]
    assert ALONE.shares(4) == [range(4)]


@pytest.mark.parametrize(
    ("size", "count", "name", "options"),
    [
        (2, 3, "heads", {}),
        (
            4,
            5,
            "residual",
            {"max_iterations": 3, "reheats": 0, "polish": 1, "block_weights": "normalised", "anchor": 2},
        ),
    ],
)
def test_all_processes_find_what_one_finds(
    size: int, count: int, name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    symmetry = hand.ALL[name]()
    running = start(size, "-c", _SHARE, name, count, tmp_path, repr(options))
    alone = match([hand.weights(symmetry, m) for m in range(count)], symmetry, FrankWolfe(dtype="float64", **options))
    same_everywhere(running, alone, tmp_path)


_CROSSING = """
import sys, torch
torch.set_num_threads(1)
from automerge import infer
from automerge._ranks import Group
from automerge.matchers import FrankWolfe
from automerge.matchers._crossing import Crossing
from tests.matchers.test_crossing import Monarch, states_of
count, out, options = int(sys.argv[1]), sys.argv[2], eval(sys.argv[3])
parts = Crossing.of(infer(Monarch(), torch.ones(4, 5)))
ranks = Group(60)
models = [states_of(m) for m in ranks.shares(count)[ranks.rank]]
matching = parts.match(FrankWolfe(dtype="float64", **options), models, None, ranks)
matching.save(f"{out}/{ranks.rank}.safetensors")
ranks.close()
"""


@pytest.mark.parametrize(
    ("size", "count", "options"), [(2, 3, {}), (3, 4, {"anchor": 3, "block_weights": "normalised"})]
)
def test_groups_that_cross_are_searched_by_turns(
    size: int, count: int, options: dict[str, Any], tmp_path: Path
) -> None:
    symmetry = infer(Monarch(), torch.ones(4, 5))
    running = start(size, "-c", _CROSSING, count, tmp_path, repr(options))
    alone = match([states_of(m) for m in range(count)], symmetry, FrankWolfe(dtype="float64", **options))
    same_everywhere(running, alone, tmp_path)
    assert any(not e.is_identity() for e in alone.to_universe)


@pytest.fixture
def checkpoints(tmp_path: Path) -> list[Path]:
    paths = []
    for seed in range(3):
        torch.manual_seed(seed)
        paths.append(tmp_path / f"{'abc'[seed]}.safetensors")
        save_file(_factories.mlp().state_dict(), paths[-1])
    return paths


def arguments(checkpoints: list[Path], out: Path) -> list[object]:
    return ["merge", "tests._factories:mlp", *checkpoints, "-o", out, "--input", "2,1,4,4"]


_THREADS = """
import glob, sys, torch
from automerge import infer
from automerge._ranks import Group
names = lambda: {open(path).read().strip() for path in glob.glob("/proc/self/task/*/comm")}
ranks = Group(60)
infer(torch.nn.Linear(2, 3), torch.ones(1, 2))
assert len(ranks.gather(0)) == 2 and any("gloo" in name for name in names()), names()
ranks.close()
sys.exit(str(names()) if any("gloo" in name for name in names()) else 0)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads are counted in /proc")
def test_no_thread_of_the_connection_is_left_behind() -> None:
    """One that still holds a tensor while the interpreter ends aborts the process (seen once in some hundred runs)."""
    done = ends(start(2, "-c", _THREADS))
    assert all(code == 0 for code, _, _ in done), done


def test_torchrun_writes_what_one_process_writes(checkpoints: list[Path], tmp_path: Path) -> None:
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    run += [f"--master-port={free_port()}", "-m", "automerge"]
    done = subprocess.run(
        [*run, *map(str, arguments(checkpoints, tmp_path / "two.safetensors"))],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "merged 3 checkpoints in 2 processes" in done.stdout
    assert cli.main([str(a) for a in arguments(checkpoints, tmp_path / "one.safetensors")]) == 0
    one, two = load_file(tmp_path / "one.safetensors"), load_file(tmp_path / "two.safetensors")
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[n], two[n], rtol=1e-6, atol=1e-7) for n in one)


def test_a_mask_that_all_checkpoints_share_stays(tmp_path: Path) -> None:
    paths = []
    for seed in range(3):
        torch.manual_seed(seed)
        paths.append(tmp_path / f"{seed}.safetensors")
        save_file(_factories.masked().state_dict(), paths[-1])
    for name, size in (("one", 1), ("two", 2)):
        command = ["merge", "tests._factories:masked", *paths, "-o", tmp_path / f"{name}.safetensors", "--input", "2,4"]
        done = ends(start(size, "-m", "automerge", *command))
        assert all(code == 0 for code, _, _ in done), done
    one, two, own = (load_file(p) for p in (tmp_path / "one.safetensors", tmp_path / "two.safetensors", paths[0]))
    for name in ("first", "second"):
        assert torch.equal(one[name], own[name])
        assert torch.equal(two[name], own[name])
    assert all(torch.allclose(one[n], two[n], rtol=1e-6, atol=1e-6) for n in one)


def test_a_bad_checkpoint_ends_every_process_with_a_sentence(checkpoints: list[Path], tmp_path: Path) -> None:
    state = load_file(checkpoints[2])
    save_file({**state, "extra": torch.zeros(1)}, checkpoints[2])
    out = tmp_path / "out.safetensors"
    first, second = ends(start(2, "-m", "automerge", *arguments(checkpoints, out)))
    assert first[0] == second[0] == 2
    assert "c.safetensors has the extra key 'extra'" in second[2]
    assert "process 1 of 2 stopped" in first[2]
    assert "extra key" in first[2]
    assert not out.exists()


def test_a_process_that_dies_ends_the_others(checkpoints: list[Path], tmp_path: Path) -> None:
    """Killed once it is in the matching; the other says so, soon, and nothing is left."""
    victim = 1
    out = tmp_path / "out.safetensors"
    before = sorted(p.name for p in tmp_path.iterdir())
    running = start(2, "-c", _SLOW, victim, 100, *arguments(checkpoints, out))
    line = running[victim].stdout.readline()  # type: ignore[union-attr]
    assert line == "matching\n", running[victim].communicate()
    os.kill(running[victim].pid, signal.SIGKILL)
    begin = time.monotonic()
    code, _, error = ends(running)[1 - victim]
    assert code == 2
    assert "another process of this run ended or does not answer" in error
    assert time.monotonic() - begin < 60
    assert sorted(p.name for p in tmp_path.iterdir()) == before


_SLOW = """
import os, sys, time
from automerge import cli, infer
from automerge.matchers import _search
step = _search.Search._turn
def slow(self, *given):
    if os.environ["RANK"] == sys.argv[1]:
        print("matching", file=sys.__stdout__, flush=True)
        time.sleep(float(sys.argv[2]))
    return step(self, *given)
_search.Search._turn = slow
sys.exit(cli.main(sys.argv[3:]))
"""


def test_processes_offload_what_they_hold_and_write_shards(checkpoints: list[Path], tmp_path: Path) -> None:
    """The same as in memory, bit for bit; nothing is left in the directory."""
    disk = tmp_path / "disk"
    disk.mkdir()
    index = tmp_path / "merged.safetensors.index.json"
    more = ["--matching", tmp_path / "matching.safetensors"]
    first = ends(start(2, "-m", "automerge", *arguments(checkpoints, tmp_path / "one.safetensors"), *more))
    second = ends(start(2, "-m", "automerge", *arguments(checkpoints, index), "--offload", disk))
    assert all(code == 0 for code, _, _ in first + second), first + second
    one, two = load_file(tmp_path / "one.safetensors"), load_state_dict(index)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert not list(disk.iterdir())
    assert len(Matching.load(tmp_path / "matching.safetensors")) == 3


def test_an_interrupt_of_one_process_ends_all_with_the_best_so_far(checkpoints: list[Path], tmp_path: Path) -> None:
    out, kept = tmp_path / "out.safetensors", tmp_path / "matching.safetensors"
    running = start(2, "-c", _SLOW, 0, 0.2, *arguments(checkpoints, out), "--matching", kept)
    assert running[0].stdout.readline() == "matching\n", running[0].communicate()  # type: ignore[union-attr]
    os.kill(running[1].pid, signal.SIGINT)
    first, second = ends(running)
    assert first[0] == second[0] == 130, (first, second)
    assert f"the search was interrupted; go on with --resume {kept}" in first[1]
    assert not out.exists()
    assert Matching.load(kept).stats["interrupted"]
    done = ends(start(2, "-m", "automerge", *arguments(checkpoints, out), "--resume", kept))
    assert all(code == 0 for code, _, _ in done), done
    assert out.exists()
