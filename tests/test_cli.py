"""The command line: what each command prints, and one sentence with exit code 2 for every bad input."""

import io
import json
import os
import pickle
import pty
import signal
import stat
import subprocess
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from automerge import _commands, cli
from automerge._console import Console
from automerge._errors import OutputError
from automerge._factory import InputSpec, UsageError, draw_inputs, parse_input
from automerge.io import hash_state_dict, load_state_dict, save_state_dict
from automerge.matchers import Matching
from tests import _factories

F = "tests._factories:"
SHAPE = ["--input", "2,1,4,4"]
ROOT = Path(__file__).resolve().parents[1]


def run(*argv: object) -> int:
    """Run the command line; argparse leaves by SystemExit."""
    try:
        return cli.main([str(a) for a in argv])
    except SystemExit as error:
        return int(error.code or 0)


def fails(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one sentence that a bad call prints."""
    assert run(*argv) == 2
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if not _is_progress(line)]
    assert len(lines) == 1, printed.err
    assert "Traceback" not in printed.err + printed.out
    assert lines[0].startswith("automerge ")
    return lines[0]


def _is_progress(line: str) -> bool:
    return line.endswith(" s") and ": " in line


@pytest.fixture
def checkpoints(tmp_path: Path) -> list[Path]:
    paths = []
    for seed in range(3):
        torch.manual_seed(seed)
        paths.append(tmp_path / f"{'abc'[seed]}.safetensors")
        save_file(_factories.mlp().state_dict(), paths[-1])
    return paths


def damaged(path: Path, **changes: Any) -> Path:
    """A copy of a checkpoint with entries replaced, added, or (None) removed."""
    state = {**load_file(path), **{k.replace("_", "."): v for k, v in changes.items()}}
    out = path.with_name("damaged.safetensors")
    save_file({k: v for k, v in state.items() if v is not None}, out)
    return out


# ---------------------------------------------------------------- inspect, verify
def test_inspect_prints_the_groups(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", F + "mlp", *SHAPE) == 0
    out = capsys.readouterr().out
    assert "12 units" in out
    assert "8 units" in out
    assert "3.weight[1]" in out


def test_inspect_names_the_operator_without_a_rule(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", F + "Odd", "--input", "3,4") == 0
    out = capsys.readouterr().out
    assert "automerge_tests" in out
    assert "odd" in out
    assert "5 units" in out
    assert "6 units" not in out
    assert "verified" in out


def test_strict_fails_on_the_operator_without_a_rule(capsys: pytest.CaptureFixture[str]) -> None:
    assert "odd" in fails(capsys, "inspect", F + "Odd", "--input", "3,4", "--strict")


def test_inspect_writes_json_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s.json"
    assert run("inspect", F + "mlp", *SHAPE, "--json", path) == 0
    assert len(json.loads(path.read_text())["generators"]) == 2
    capsys.readouterr()
    assert "--force" in fails(capsys, "inspect", F + "mlp", *SHAPE, "--json", path)
    assert run("inspect", F + "mlp", *SHAPE, "--json", path, "--force") == 0


def test_inspect_takes_tokens_and_keywords(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", F + "tokens", "--input", "int:2,5<20") == 0
    assert "6 units" in capsys.readouterr().out
    assert run("inspect", F + "Keyword", "--input", "3,4", "--input", "scale=3,1") == 0
    assert "6 units" in capsys.readouterr().out


def test_verify_accepts_the_inferred_and_refuses_a_wrong_symmetry(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("verify", F + "mlp", *SHAPE) == 0
    assert "holds" in capsys.readouterr().out
    path = tmp_path / "s.json"
    assert run("inspect", F + "mlp", *SHAPE, "--json", path) == 0
    assert run("verify", F + "mlp", *SHAPE, "--symmetry", path) == 0
    data = json.loads(path.read_text())
    data["generators"][0]["slots"] = data["generators"][0]["slots"][:1]
    path.write_text(json.dumps(data))
    capsys.readouterr()
    fails(capsys, "verify", F + "mlp", *SHAPE, "--symmetry", path)
    path.write_text("{")
    message = fails(capsys, "verify", F + "mlp", *SHAPE, "--symmetry", path)
    assert "not a symmetry file" in message
    assert str(path) in message
    assert "absent.json" in fails(capsys, "verify", F + "mlp", *SHAPE, "--symmetry", tmp_path / "absent.json")


# ---------------------------------------------------------------- merge
@pytest.mark.parametrize("matcher", ["frank-wolfe", "identity"])
def test_merge_writes_the_average(
    matcher: str, checkpoints: Sequence[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged.safetensors"
    assert run("merge", F + "mlp", *checkpoints, "-o", out, *SHAPE, "--matcher", matcher) == 0
    merged = load_file(out)
    assert {k: v.shape for k, v in merged.items()} == {k: v.shape for k, v in _factories.mlp().state_dict().items()}
    if matcher == "identity":
        mean = torch.stack([load_file(p)["1.weight"] for p in checkpoints]).mean(dim=0)
        torch.testing.assert_close(merged["1.weight"], mean)
    assert str(out) in capsys.readouterr().out


def test_merge_of_permuted_copies_gives_the_model_back(checkpoints: Sequence[Path], tmp_path: Path) -> None:
    state = load_file(checkpoints[0])
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    moved = {**state, "1.weight": state["1.weight"][order], "1.bias": state["1.bias"][order]}
    moved["3.weight"] = state["3.weight"][:, order]
    save_file(moved, checkpoints[1])
    out = tmp_path / "merged.safetensors"
    assert run("merge", F + "mlp", *checkpoints[:2], "-o", out, *SHAPE, "--reference", 0) == 0
    for name, value in load_file(out).items():
        torch.testing.assert_close(value, state[name], msg=name)


def test_a_kept_alignment_is_gone_on_from(
    checkpoints: Sequence[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, kept = tmp_path / "merged.safetensors", tmp_path / "kept.safetensors"
    assert run("merge", F + "mlp", *checkpoints, "-o", out, *SHAPE, "--matching", kept) == 0
    found = Matching.load(kept)
    again = tmp_path / "again.safetensors"
    assert run("merge", F + "mlp", *checkpoints, "-o", again, *SHAPE, "--resume", kept) == 0
    assert load_file(again).keys() == load_file(out).keys()
    assert len(found) == 3
    command, new = ("merge", F + "mlp", *checkpoints, *SHAPE, "-o"), tmp_path / "x.safetensors"
    assert "exists" in fails(capsys, *command, new, "--matching", kept)
    assert "same file" in fails(capsys, *command, new, "--matching", new)
    assert "frank-wolfe" in fails(capsys, *command, new, "--resume", kept, "--matcher", "merge-many")
    fewer = ("merge", F + "mlp", *checkpoints[:2], *SHAPE, "-o", new)
    assert "of 3 models" in fails(capsys, *fewer, "--resume", kept)
    assert "not a matching" in fails(capsys, *command, new, "--resume", out)
    assert not (tmp_path / "x.safetensors").exists()


def test_an_interrupted_search_is_kept(
    checkpoints: Sequence[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("automerge.matchers._search.Search._descend", interrupt)
    out, kept = tmp_path / "merged.safetensors", tmp_path / "kept.safetensors"
    assert run("merge", F + "mlp", *checkpoints, "-o", out, *SHAPE, "--matching", kept) == 130
    assert not out.exists()
    assert f"--resume {kept}" in capsys.readouterr().out
    assert Matching.load(kept).stats["interrupted"]
    monkeypatch.undo()
    assert run("merge", F + "mlp", *checkpoints, "-o", out, *SHAPE, "--resume", kept) == 0
    assert out.exists()


def test_a_search_that_ended_is_kept_where_the_repair_does_not(
    checkpoints: Sequence[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["automerge.merge"], "renormalise", interrupt)
    out, kept = tmp_path / "merged.safetensors", tmp_path / "kept.safetensors"
    assert run("merge", F + "mlp", *checkpoints, "-o", out, *SHAPE, "--matching", kept) == 130
    assert not out.exists()
    assert str(kept) in capsys.readouterr().err
    assert not Matching.load(kept).stats["interrupted"]
    monkeypatch.undo()
    assert run("merge", F + "mlp", *checkpoints, "-o", out, *SHAPE, "--resume", kept) == 0


def test_merge_reads_pt_files_and_takes_the_example_from_the_data(tmp_path: Path) -> None:
    paths = []
    for seed in range(2):
        torch.manual_seed(seed)
        paths.append(tmp_path / f"{seed}.pt")
        torch.save(_factories.batchnorm().state_dict(), paths[-1])
    out = tmp_path / "merged.safetensors"
    assert run("merge", F + "batchnorm", *paths, "-o", out, "--data", F + "batches", "--weights", "1,3") == 0
    assert "1.running_mean" in load_file(out)


def test_merge_replaces_only_with_force(
    checkpoints: Sequence[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged.safetensors"
    out.write_text("precious")
    message = fails(capsys, "merge", F + "mlp", *checkpoints, "-o", out, *SHAPE)
    assert "exists" in message
    assert "--force" in message
    assert out.read_text() == "precious"
    assert run("merge", F + "mlp", *checkpoints, "-o", out, *SHAPE, "--force") == 0
    assert load_file(out)


def test_the_output_is_checked_before_anything_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = fails(capsys, "merge", "no.such:factory", "a.pt", "b.pt", "-o", tmp_path / "absent" / "m.safetensors")
    assert "does not exist" in message


def unwritable(kind: str, folder: Path) -> Path:
    """An output path that nobody can write to, root included."""
    if kind == "parent is a file":
        (folder / "file").write_text("precious")
        return folder / "file" / "m.safetensors"
    if kind == "directory":
        (folder / "m.safetensors").mkdir()
        return folder / "m.safetensors"
    if kind == "name too long":
        return folder / ("m" * 300 + ".safetensors")
    if kind == "device":
        (folder / "m.safetensors").symlink_to("/dev/full")
        return folder / "m.safetensors"
    return Path("/proc/m.safetensors")


@pytest.mark.parametrize("kind", ["parent is a file", "directory", "name too long", "device", "file system"])
@pytest.mark.parametrize("force", [[], ["--force"]])
def test_an_output_that_cannot_be_written(
    kind: str, force: list[str], checkpoints: Sequence[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = unwritable(kind, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    message = fails(capsys, "merge", F + "mlp", *checkpoints, "-o", out, *SHAPE, *force)
    assert str(out) in message
    assert "infer" not in message
    message = fails(capsys, "inspect", F + "mlp", *SHAPE, "--json", out, *force)
    assert str(out) in message
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_directory_without_permission(
    checkpoints: Sequence[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        assert "cannot be written" in fails(
            capsys, "merge", F + "mlp", *checkpoints, "-o", folder / "m.safetensors", *SHAPE
        )
    finally:
        folder.chmod(stat.S_IRWXU)


def test_a_disk_that_fills_up_while_the_result_is_written(
    checkpoints: Sequence[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("automerge.io.save_file", full)
    out = tmp_path / "m.safetensors"
    assert "No space left" in fails(capsys, "merge", F + "mlp", *checkpoints, "-o", out, *SHAPE)
    assert sorted(tmp_path.iterdir()) == sorted(checkpoints)


def test_standard_output_that_is_full() -> None:
    call = [sys.executable, "-m", "automerge", "inspect", F + "mlp", *SHAPE, "--no-verify"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(call, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if not _is_progress(line)]
    assert lines == ["automerge inspect: standard output cannot be written: No space left on device"]


def test_output_with_another_suffix(
    checkpoints: Sequence[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ".safetensors" in fails(capsys, "merge", F + "mlp", *checkpoints, "-o", tmp_path / "m.bin", *SHAPE)


def test_a_merged_file_is_as_open_to_others_as_a_new_one(checkpoints: Sequence[Path], tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    before = os.umask(0o027)
    try:
        assert run("merge", F + "mlp", *checkpoints, "-o", out, *SHAPE) == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE(out.stat().st_mode) == 0o640


def test_a_merged_file_says_which_files_it_was_made_of(
    checkpoints: Sequence[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m.safetensors"
    assert run("merge", F + "mlp", *checkpoints, "-o", out, *SHAPE) == 0
    with safe_open(str(out), "pt") as handle:
        inputs = json.loads(handle.metadata()["automerge.provenance"])["inputs"]
    assert [i["file"] for i in inputs] == [str(p) for p in checkpoints]
    assert [i["sha256"] for i in inputs] == [hash_state_dict(load_file(p)) for p in checkpoints]
    printed = capsys.readouterr().out
    assert all(f"model {k}: {p}" in printed for k, p in enumerate(checkpoints))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_checkpoints_of_another_precision(
    dtype: torch.dtype, checkpoints: Sequence[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in checkpoints:
        save_file({k: v.to(dtype) for k, v in load_file(path).items()}, path)
    out = tmp_path / "m.safetensors"
    assert run("merge", F + "mlp", *checkpoints, "-o", out, *SHAPE) == 0
    assert {v.dtype for v in load_file(out).values()} == {dtype}
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Note: model")]
    assert notes == [f"Note: model {k}: 1.bias and 5 more are {dtype}, expected torch.float32" for k in range(3)]


@pytest.mark.parametrize("wrap", ["module", "compiled", "lightning style", "tutorial style"])
def test_checkpoints_as_people_save_them(wrap: str, checkpoints: Sequence[Path], tmp_path: Path) -> None:
    plain = load_file(checkpoints[1])
    saved: Any = {
        "module": {f"module.{k}": v for k, v in plain.items()},
        "compiled": {f"_orig_mod.{k}": v for k, v in plain.items()},
        "lightning style": {"state_dict": {f"module.{k}": v for k, v in plain.items()}, "epoch": 3},
        "tutorial style": {"epoch": 3, "model_state_dict": plain, "optimizer_state_dict": {"state": {}}},
    }[wrap]
    torch.save(saved, tmp_path / "b.pt")
    outs = [tmp_path / "m1.safetensors", tmp_path / "m2.safetensors"]
    for second, out in zip((checkpoints[1], tmp_path / "b.pt"), outs, strict=True):
        assert run("merge", F + "mlp", checkpoints[0], second, "-o", out, *SHAPE) == 0
    assert hash_state_dict(load_file(outs[0])) == hash_state_dict(load_file(outs[1]))


def test_averaged_weights_beside_a_checkpoint_are_named(
    checkpoints: Sequence[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = load_file(checkpoints[1])
    torch.save({"model": plain, "model_ema": {n: v + 1 for n, v in plain.items()}}, tmp_path / "b.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert run("merge", F + "mlp", checkpoints[0], tmp_path / "b.pt", "-o", tmp_path / "m.safetensors", *SHAPE) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "model_ema" in line]
    assert line.startswith(f"automerge merge: {tmp_path / 'b.pt'} holds weights under 'model' and under 'model_ema'")


BAD_CHECKPOINTS = {
    "shape": (lambda p: damaged(p, **{"1_bias": torch.zeros(13)}), ["1.bias", "(13,)", "(12,)"]),
    "missing": (lambda p: damaged(p, **{"3_bias": None}), ["3.bias", "no key"]),
    "extra": (lambda p: damaged(p, **{"9_bias": torch.zeros(1)}), ["9.bias", "extra"]),
    "nan": (lambda p: damaged(p, **{"1_bias": torch.full((12,), torch.nan)}), ["1.bias", "NaN"]),
    "inf": (lambda p: damaged(p, **{"1_bias": torch.full((12,), torch.inf)}), ["1.bias", "infinite"]),
    "integers": (lambda p: damaged(p, **{"1_bias": torch.zeros(12).int()}), ["1.bias", "torch.int32"]),
    "complex": (lambda p: damaged(p, **{"1_bias": torch.zeros(12).cfloat()}), ["1.bias", "torch.complex64"]),
    "float8": (lambda p: damaged(p, **{"1_bias": torch.zeros(12).to(torch.float8_e5m2)}), ["1.bias", "too narrow"]),
}


@pytest.mark.parametrize("kind", sorted(BAD_CHECKPOINTS))
def test_a_checkpoint_that_does_not_fit(
    kind: str, checkpoints: Sequence[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, words = BAD_CHECKPOINTS[kind]
    out = tmp_path / "m.safetensors"
    bad = make(checkpoints[1])
    message = fails(capsys, "merge", F + "mlp", checkpoints[0], bad, "-o", out, *SHAPE)
    assert not out.exists()
    for word in [*words, "damaged.safetensors"]:
        assert word in message


def test_what_could_not_be_written_is_said_before_the_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / "a.pt", tmp_path / "b.pt"]
    for file in files:
        torch.save(_factories.complex_filter().state_dict(), file)
    monkeypatch.setattr(_commands, "merge_models", lambda *_, **__: pytest.fail("work was begun"))
    message = fails(capsys, "merge", F + "complex_filter", *files, "-o", tmp_path / "m.safetensors", "--input", "2,4")
    assert "torch.complex128" in message


def test_two_checkpoints_of_another_architecture(
    checkpoints: Sequence[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = fails(
        capsys, "merge", F + "batchnorm", *checkpoints[:2], "-o", tmp_path / "m.safetensors", "--data", F + "batches"
    )
    assert "a.safetensors" in message


def test_files_that_are_no_checkpoints(
    checkpoints: Sequence[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m.safetensors"
    short = tmp_path / "short.safetensors"
    short.write_bytes(checkpoints[0].read_bytes()[:-100])
    code = tmp_path / "code.pt"
    code.write_bytes(pickle.dumps(_Evil()))
    empty = tmp_path / "empty.safetensors"
    empty.touch()
    numpy = tmp_path / "arrays.npz"
    np.savez(numpy, **{"1.bias": np.zeros(12)})
    folder = tmp_path / "folder.safetensors"
    folder.mkdir()
    whole = tmp_path / "whole.pt"
    torch.save(_factories.mlp(), whole)
    scalars = tmp_path / "scalars.pt"
    torch.save({"loss": 1.0}, scalars)
    sparse = tmp_path / "sparse.pt"
    torch.save({k: v.to_sparse() for k, v in load_file(checkpoints[1]).items()}, sparse)
    cases = (
        (short, "truncated"),
        (code, "pickle"),
        (whole, "pickle"),
        (tmp_path / "absent.pt", "does not exist"),
        (empty, "is empty"),
        (numpy, "unknown suffix '.npz'"),
        (folder, "is a directory"),
        (scalars, "the entry 'loss' is a float"),
        (sparse, "sparse"),
        (tmp_path / ("x" * 300 + ".pt"), "too long"),
    )
    for path, word in cases:
        message = fails(capsys, "merge", F + "mlp", checkpoints[0], path, "-o", out, *SHAPE)
        assert word in message
        assert path.name in message
    assert not out.exists()
    assert not (tmp_path / "executed").exists()


class _Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


def test_one_checkpoint(checkpoints: Sequence[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = fails(capsys, "merge", F + "mlp", checkpoints[0], "-o", tmp_path / "m.safetensors", *SHAPE)
    assert "two" in message


def test_one_checkpoint_twice(checkpoints: Sequence[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    link = tmp_path / "link.safetensors"
    link.symlink_to(checkpoints[0])
    for again in (checkpoints[0], link):
        call = ["merge", F + "mlp", *checkpoints[:2], again, "-o", tmp_path / "m.safetensors", *SHAPE]
        assert f"{again} is given twice" in fails(capsys, *call)


def test_a_hard_link_is_the_same_checkpoint(
    checkpoints: Sequence[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    link = tmp_path / "link.safetensors"
    link.hardlink_to(checkpoints[0])
    call = [F + "mlp", checkpoints[0], link]
    assert f"{link} is given twice" in fails(capsys, "merge", *call, "-o", tmp_path / "m.safetensors", *SHAPE)
    assert f"{link} is given twice" in fails(capsys, "compare", *call, "--data", F + "batches")


@pytest.mark.parametrize("option", ["-o", "--matching"])
def test_a_checkpoint_that_is_read_is_not_written_over(
    option: str, checkpoints: Sequence[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    link = tmp_path / "link.safetensors"
    link.symlink_to(checkpoints[1])
    before = checkpoints[1].read_bytes()
    for target in (checkpoints[1], link):
        outputs = {"-o": tmp_path / "m.safetensors", "--matching": tmp_path / "k.safetensors", option: target}
        call = [x for pair in outputs.items() for x in pair]
        message = fails(capsys, "merge", F + "mlp", *checkpoints, *SHAPE, "--force", *call)
        assert f"{option} {target} is one of the checkpoints" in message
    assert checkpoints[1].read_bytes() == before


def test_shards_of_a_checkpoint_that_is_read_are_not_written_over(
    checkpoints: Sequence[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = tmp_path / "s.safetensors.index.json"
    save_state_dict(index, load_file(checkpoints[1]), shard_bytes=100)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    shard = sorted(before)[0]
    alone = tmp_path / "x-00001-of-00001.safetensors"
    alone.write_bytes(checkpoints[1].read_bytes())
    out, call = tmp_path / "m.safetensors", ["merge", F + "mlp", *SHAPE, "--force", checkpoints[0]]
    for outputs in (["-o", shard], ["-o", out, "--matching", shard]):
        assert f"{shard} is one of the checkpoints that are read" in fails(capsys, *call, index, *outputs)
    assert "is one of the checkpoints" in fails(capsys, *call, alone, "-o", tmp_path / "x.safetensors.index.json")
    outputs = ["-o", tmp_path / "y.safetensors.index.json", "--matching", tmp_path / "y-00001-of-00001.safetensors"]
    assert "same file" in fails(capsys, *call, checkpoints[1], *outputs)
    assert "--resume and -o name the same file" in fails(capsys, *call, checkpoints[1], "-o", out, "--resume", out)
    assert all(file.read_bytes() == content for file, content in before.items())
    assert alone.read_bytes() == checkpoints[1].read_bytes()


def test_a_matching_that_cannot_be_written_costs_no_result(
    checkpoints: Sequence[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OutputError("k.safetensors cannot be written: the disk is full")

    monkeypatch.setattr(Matching, "save", full)
    out = tmp_path / "m.safetensors"
    call = ["merge", F + "mlp", *checkpoints, *SHAPE, "-o", out, "--matching", tmp_path / "k.safetensors"]
    assert "disk is full" in fails(capsys, *call)
    assert load_file(out).keys() == load_file(checkpoints[0]).keys()


@pytest.mark.parametrize(("size", "reason"), [("2", "RANK is not set"), ("x", "that is no number")])
def test_a_world_size_that_no_torchrun_has_set(
    size: str,
    reason: str,
    checkpoints: Sequence[Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.delenv("RANK", raising=False)
    message = fails(capsys, "merge", F + "mlp", *checkpoints, *SHAPE, "-o", checkpoints[0].with_name("m.safetensors"))
    assert f"WORLD_SIZE={size} is set, as by torchrun, but {reason}" in message


def test_linear_maps_are_not_gone_on_from(
    checkpoints: Sequence[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "k.safetensors"
    call = ["merge", F + "mlp", *checkpoints, "--data", F + "batches", "-o"]
    assert run(*call, tmp_path / "m.safetensors", "--matcher", "zipit", "--matching", kept) == 0
    capsys.readouterr()
    assert "ZipIt found linear maps" in fails(capsys, *call, tmp_path / "n.safetensors", "--resume", kept)


def test_two_outputs_under_one_name(
    checkpoints: Sequence[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.svg"
    assert "same file" in fails(capsys, "inspect", F + "mlp", *SHAPE, "--json", file, "--draw", file, "--force")
    call = ["compare", F + "mlp", *checkpoints, "--data", F + "batches"]
    assert "same file" in fails(capsys, *call, "--json", file, "--html", file, "--force")
    assert not file.exists()


def test_a_picture_format_is_checked_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("automerge._commands.infer", lambda *_, **__: pytest.fail("inference began"))
    json_file = tmp_path / "s.json"
    message = fails(capsys, "inspect", F + "mlp", *SHAPE, "--json", json_file, "--draw", tmp_path / "s.txt")
    assert "unknown picture format '.txt'" in message
    assert not json_file.exists()


def test_a_symmetry_of_another_architecture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "s.json"
    assert run("inspect", F + "mlp", *SHAPE, "--json", file) == 0
    capsys.readouterr()
    for factory, shape, words in (
        ("batchnorm", "2,1,4,4", "1.weight, of the shape (12, 16), has the shape (6,) in this"),
        ("table", "3,4", "1.weight, of the shape (12, 16), does not exist in this"),
    ):
        message = fails(capsys, "verify", F + factory, "--input", shape, "--symmetry", file)
        assert words in message
        assert "another architecture" in message


def test_integer_buffers_that_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for number, path in enumerate(paths):
        save_file({**_factories.table().state_dict(), "index": torch.arange(4) + number}, path)
    message = fails(capsys, "merge", F + "table", *paths, "-o", tmp_path / "m.safetensors", "--input", "3,4")
    assert "index" in message
    assert "model 1" in message


@pytest.mark.parametrize("weights", ["1", "1,x", "1,2,3,4", "0,0,0"])
def test_bad_weights(
    weights: str, checkpoints: Sequence[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = fails(
        capsys, "merge", F + "mlp", *checkpoints, "-o", tmp_path / "m.safetensors", *SHAPE, "--weights", weights
    )
    assert "weight" in message


def test_bad_reference_and_matcher(
    checkpoints: Sequence[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["merge", F + "mlp", *checkpoints, "-o", tmp_path / "m.safetensors", *SHAPE]
    for reference in (3, -1):
        assert "from 0 to 2" in fails(capsys, *call, f"--reference={reference}")
    assert "--data" in fails(capsys, *call, "--repair", "reset")
    assert "BatchNorm" in fails(capsys, *call, "--repair", "reset", "--data", F + "batches")
    assert "--data" in fails(capsys, *call, "--matcher", "activation-matching")
    assert "frank-wolfe" in fails(capsys, *call, "--matcher", "magic")


def test_neither_input_nor_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Said before any file is read."""
    message = fails(capsys, "merge", F + "mlp", "absent.pt", "gone.pt", "-o", tmp_path / "m.safetensors")
    assert "--input" in message
    assert "--data" in message


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("no_batches", "batch"),
        ("number", "iterable"),
        ("absent", "no 'absent'"),
        ("samples", "DataLoader"),
        ("words", "batch 0 of the data is a str"),
        ("wide", "does not run on the first batch"),
        ("broken_generator", "while giving batch 1 (OSError: disk gone)"),
        ("broken_later", "while giving batch 1 (OSError: disk gone)"),
        ("not_a_number", "batch 1 has values that are NaN"),
        ("no_iterator", "while giving batch 0 (OSError: disk gone)"),
        ("on_meta", "batch 0 of the data is on the meta device"),
        ("once", "read only once"),
    ],
)
def test_bad_data(
    name: str, word: str, checkpoints: Sequence[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["merge", F + "mlp", *checkpoints, "-o", tmp_path / "m.safetensors"]
    assert word in fails(capsys, *call, "--data", F + name)
    if name != "once":
        assert word in fails(capsys, *call, *SHAPE, "--data", F + name)
    compare = ["compare", F + "mlp", *checkpoints, "--matchers", "identity", "--repairs", "none"]
    if name != "wide":  # said in other words
        assert word in fails(capsys, *compare, "--data", F + name)


def test_data_that_never_end(
    checkpoints: Sequence[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("automerge._data.physical_memory", lambda: 2**20)
    message = fails(capsys, "merge", F + "mlp", *checkpoints, "-o", tmp_path / "m.safetensors", "--data", F + "endless")
    assert "first 2049 batches" in message  # of 256 bytes each: more than half of the memory
    assert "itertools.islice" in message


# ---------------------------------------------------------------- progress
def test_progress_is_plain_lines_where_nobody_watches(checkpoints: Sequence[Path], tmp_path: Path) -> None:
    call = [sys.executable, "-m", "automerge", "merge", F + "mlp", *checkpoints, "-o", tmp_path / "m.safetensors"]
    done = subprocess.run([*map(str, call), *SHAPE], cwd=ROOT, capture_output=True, text=True, check=True)
    assert [_is_progress(line) for line in done.stderr.splitlines()] == [True]
    assert "\x1b" not in done.stdout + done.stderr


def test_progress_is_a_bar_on_a_terminal(checkpoints: Sequence[Path], tmp_path: Path) -> None:
    call = [sys.executable, "-m", "automerge", "merge", F + "mlp", *checkpoints, "-o", tmp_path / "m.safetensors"]
    master, slave = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen(
        [*map(str, call), *SHAPE], cwd=ROOT, stdout=subprocess.PIPE, stderr=slave, env=env
    ) as process:
        os.close(slave)
        shown = b""
        with suppress(OSError):  # Linux says so when the other end is closed
            while part := os.read(master, 4096):
                shown += part
        assert process.stdout is not None
        printed = process.stdout.read()
    os.close(master)
    assert process.returncode == 0
    assert b"\x1b[" in shown
    assert "━".encode() in shown
    assert b"objective" in shown
    assert b"\x1b" not in printed
    assert b"written to" in printed


# ---------------------------------------------------------------- factories and inputs
@pytest.mark.parametrize("command", ["inspect", "verify"])
@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("no_colon", ["package.module:callable"]),
        ("no.such.module:build", ["does not import", "no"]),
        (F + "absent", ["has no 'absent'"]),
        (F + "VALUE", ["int", "callable"]),
        (F + "INSTANCE", ["Sequential", "a function that returns it"]),
        (F + "number", ["int", "torch.nn.Module"]),
        (F + "needs_argument", ["width"]),
        (F + "raises", ["no such weights"]),
        (F + "leaves", ["SystemExit"]),
        (F + "meta", ["1.weight", "meta device"]),
        (F + "lazy", ["0.weight", "lazy"]),
        ("tests._factories", ["package.module:callable"]),
        ("../x:build", ["package.module:callable"]),
        (":build", ["package.module:callable"]),
        ("tests._factories:", ["package.module:callable"]),
    ],
)
def test_bad_factory(command: str, factory: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    message = fails(capsys, command, factory, *SHAPE)
    for word in words:
        assert word in message


def test_a_factory_in_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "local_models_x1.py").write_text(
        "from torch import nn\nclass N:\n    build = lambda: nn.Linear(3, 2)\n"
    )
    (tmp_path / "local_models_x2.py").write_text("def broken(:\n")
    assert run("inspect", "local_models_x1:N.build", "--input", "1,3") == 0
    capsys.readouterr()
    assert "SyntaxError" in fails(capsys, "inspect", "local_models_x2:build", "--input", "1,3")


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_wrong_input_shape(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = fails(capsys, command, F + "mlp", "--input", "2,5")
    assert "shape" in message


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("3x4", "commas"),
        ("", "commas"),
        ("1,,2", "commas"),
        ("float7:2", "float7"),
        ("0,3", "zero"),
        ("2,3<9", "integers"),
        ("abc", "commas"),
        ("-1,3", "commas"),
        ("int:2,3<0", "zero"),
        ("99999999999999999999,3", "too large"),
        ("int:2,3<99999999999999999999", "too large"),
        ("9" * 5000, "5000 digits"),
        ("int:2,3<" + "9" * 5000, "5000 digits"),
    ],
)
def test_bad_shape_syntax(text: str, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert word in fails(capsys, "inspect", F + "mlp", f"--input={text}")


def test_a_keyword_given_twice(capsys: pytest.CaptureFixture[str]) -> None:
    call = ["inspect", F + "Keyword", "--input", "3,4", "--input", "scale=3,1", "--input", "scale=3,1"]
    assert "'scale' twice" in fails(capsys, *call)


@pytest.mark.parametrize("seed", ["-1", "x", "1.5", "99999999999999999999"])
@pytest.mark.parametrize(
    "command",
    [["demo"], ["inspect", F + "mlp", *SHAPE], ["compare", F + "mlp", "a.pt", "b.pt", "--data", F + "batches"]],
)
def test_bad_seed(seed: str, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "not a whole number from 0" in fails(capsys, *command, f"--seed={seed}")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_models_of_another_precision(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "same dtype" in fails(capsys, "inspect", F + dtype, *SHAPE)
    assert run("inspect", F + dtype, "--input", f"{dtype}:2,1,4,4") == 0
    assert "12 units" in capsys.readouterr().out


def test_what_cannot_be_verified_is_not_called_verified(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", F + "Dead", "--input", "3,4") == 0
    out = capsys.readouterr().out
    assert "Note: not verified" in out
    assert "\nverified" not in out
    assert "not verified" in fails(capsys, "verify", F + "Dead", "--input", "3,4")


def test_input_grammar() -> None:
    assert parse_input("1,3,32,32") == InputSpec((1, 3, 32, 32))
    assert parse_input("int64:2,16<100") == InputSpec((2, 16), torch.int64, 100)
    assert parse_input("mask=bool:2,4").name == "mask"
    args, kwargs = draw_inputs([parse_input("4"), parse_input("m=bool:3"), parse_input("int:50<7")], seed=0)
    assert args[0].shape == (4,)
    assert args[1].max() < 7
    assert kwargs["m"].dtype == torch.bool
    with pytest.raises(UsageError):
        parse_input("1;2")


# ---------------------------------------------------------------- the program itself
@pytest.mark.parametrize("argv", [[], ["nonsense"], ["inspect"], ["merge", "a:b"]])
def test_bad_usage_is_one_sentence(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*argv) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert "--help" in err


@pytest.mark.parametrize("argv", [["--help"], ["demo", "--help"], ["inspect", "-h"], ["verify", "-h"], ["merge", "-h"]])
def test_help_has_an_example(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*argv) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) > 5
    assert "automerge" in out


def test_an_interrupt_ends_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("automerge._commands.build_model", interrupt)
    assert run("inspect", F + "mlp", *SHAPE) == 130
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_termination_ends_with_its_code(
    number: int, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.signal(number, signal.SIG_DFL)  # (the tests themselves may run under nohup)
    monkeypatch.setattr("automerge._commands.build_model", lambda *_: os.kill(os.getpid(), number))
    assert run("inspect", F + "mlp", *SHAPE) == code
    assert capsys.readouterr().err == "automerge inspect: terminated; no half-written file is left\n"
    assert signal.getsignal(number) is signal.SIG_DFL
    signal.signal(number, before)


def test_a_termination_while_the_result_is_written(
    checkpoints: Sequence[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(_: object, name: str, **__: object) -> None:
        Path(name).write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("automerge.io.save_file", half)
    assert run("merge", F + "mlp", *checkpoints, "-o", tmp_path / "m.safetensors", *SHAPE) == 143
    assert sorted(tmp_path.iterdir()) == sorted(checkpoints)


def test_what_other_code_prints_is_no_result(
    checkpoints: Sequence[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("inspect", F + "Chatty", *SHAPE) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("Symmetry: 2 groups")
    assert "chatter" not in printed.out
    assert "chatter of the factory" in printed.err
    assert "chatter of the model" in printed.err
    for path in checkpoints:
        save_file({f"layers.{k}": v for k, v in load_file(path).items()}, path)
    out = tmp_path / "m.safetensors"
    assert run("merge", F + "Chatty", *checkpoints, "-o", out, "--data", F + "chatty_batches") == 0
    printed = capsys.readouterr()
    assert "chatter" not in printed.out
    assert "chatter of the data" in printed.err


def test_letters_that_the_terminal_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    Console().show("written to é.safetensors")
    assert raw.getvalue() == b"written to \\xe9.safetensors\n"


def test_a_defect_ends_with_1_and_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("automerge._commands.build_model", fail)
    assert run("inspect", F + "mlp", *SHAPE) == 1
    err = capsys.readouterr().err
    assert "defect" in err
    assert "Traceback" not in err
    monkeypatch.setenv("AUTOMERGE_TRACEBACK", "1")
    assert run("inspect", F + "mlp", *SHAPE) == 1
    assert "Traceback" in capsys.readouterr().err


def test_as_a_module_in_another_process() -> None:
    call = [sys.executable, "-m", "automerge"]
    done = subprocess.run([*call, "--version"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("automerge 0.")
    bad = subprocess.run(
        [*call, "inspect", "nope", "--input", "1"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert bad.returncode == 2
    assert bad.stderr.count("\n") == 1


# -------------------------------------------------------------------- work on disk, shards
def test_merge_on_disk_writes_what_merge_in_memory_does(
    tmp_path: Path, checkpoints: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    plain, index = tmp_path / "plain.safetensors", tmp_path / "m.safetensors.index.json"
    work = tmp_path / "work"
    work.mkdir()
    assert run("merge", F + "mlp", *checkpoints, "-o", plain, *SHAPE) == 0
    assert run("merge", F + "mlp", *checkpoints, "-o", index, *SHAPE, "--offload", work) == 0
    assert "written to" in capsys.readouterr().out
    one, two = load_state_dict(plain), load_state_dict(index)
    assert one.keys() == two.keys()
    assert all(torch.equal(v, two[n]) for n, v in one.items())
    assert not list(work.iterdir())
    assert run("merge", F + "mlp", *checkpoints[:2], index, "-o", tmp_path / "again.safetensors", *SHAPE) == 0


@pytest.mark.parametrize("factory", ["reads_values_when_built", "hidden_buffer"])
def test_offload_builds_with_values_what_cannot_be_built_without(
    factory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = []
    for seed in range(2):
        torch.manual_seed(seed)
        paths.append(tmp_path / f"{seed}.safetensors")
        save_file(getattr(_factories, factory)().state_dict(), paths[-1])
    outs = [tmp_path / "memory.safetensors", tmp_path / "disk.safetensors"]
    assert run("merge", F + factory, *paths, "-o", outs[0], "--input", "2,4") == 0
    assert run("merge", F + factory, *paths, "-o", outs[1], "--input", "2,4", "--offload", tmp_path) == 0
    one, two = (load_file(p) for p in outs)
    assert all(torch.equal(v, two[n]) for n, v in one.items())


def test_refusals_of_work_on_disk_and_of_shards(
    tmp_path: Path, checkpoints: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = ["merge", F + "mlp", *checkpoints, *SHAPE]
    out = ["-o", tmp_path / "out.safetensors"]
    monkeypatch.setattr("automerge._commands.merge_models", None)  # all of this comes before
    assert "--offload is for frank-wolfe" in fails(capsys, *call, *out, "--offload", tmp_path, "--matcher", "identity")
    shard = tmp_path / "m-00001-of-00004.safetensors"
    shard.write_text("mine")
    said = fails(capsys, *call, "-o", tmp_path / "m.safetensors.index.json")
    assert f"{shard} exists; pass --force" in said
    assert shard.read_text() == "mine"
    monkeypatch.undo()
    assert "is no directory; create it first" in fails(capsys, *call, *out, "--offload", tmp_path / "absent")
    assert run(*call, "-o", tmp_path / "m.safetensors.index.json", "--force") == 0
