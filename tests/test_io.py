"""Checkpoints: every good file round-trips, every bad one gives one clear sentence."""

from __future__ import annotations

import os
import pickle
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from automerge import io
from automerge._errors import CheckpointError, CheckpointWarning, OutputError
from automerge._files import check_writable, write_text
from automerge.io import check_state_dict, hash_state_dict, load_state_dict, save_state_dict, tied_names

torch.set_num_threads(1)

_DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


@st.composite
def state_dicts(draw: Any) -> dict[str, torch.Tensor]:
    """Named tensors of every dtype and up to three axes, some empty, some transposed."""
    names = draw(st.lists(st.text("abw.01_", min_size=1, max_size=8), min_size=1, max_size=5, unique=True))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    out = {}
    for name in names:
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        value = torch.randint(0, 2, shape, generator=generator).to(draw(st.sampled_from(_DTYPES)))
        out[name] = value.T if value.ndim == 2 and draw(st.booleans()) else value
    return out


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(state=state_dicts())
def test_safetensors_round_trip(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    file = tmp_path / "a.safetensors"
    save_state_dict(file, state, {"note": "x"}, force=True)
    back = load_state_dict(file)
    assert set(back) == set(state)
    for name, value in state.items():
        assert back[name].dtype == value.dtype
        assert torch.equal(back[name], value)
    assert hash_state_dict(back) == hash_state_dict(state)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


@settings(max_examples=40, deadline=None)
@given(state=state_dicts(), data=st.data())
def test_hash_sees_values_names_shapes_and_dtypes_but_not_order(state: dict[str, torch.Tensor], data: Any) -> None:
    own = hash_state_dict(state)
    assert hash_state_dict(dict(reversed(list(state.items())))) == own
    name = data.draw(st.sampled_from(sorted(state)))
    value = state[name]
    assert hash_state_dict({**state, name: value[None]}) != own
    assert hash_state_dict({**state, name + "x": value}) != own
    other = torch.float32 if value.dtype != torch.float32 else torch.float64
    assert hash_state_dict({**state, name: value.to(other)}) != own
    if value.numel():
        flipped = value.clone(memory_format=torch.contiguous_format)
        flipped.view(-1)[0] = 1 - flipped.reshape(-1)[0].int()
        assert hash_state_dict({**state, name: flipped}) != own


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_torch_files_with_wrapper_and_prefix(tmp_path: Path, wrapper: str | None, prefix: str, suffix: str) -> None:
    state = {prefix + "a.weight": torch.randn(2, 3), prefix + "b": torch.arange(3)}
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / f"m{suffix}")
    back = load_state_dict(tmp_path / f"m{suffix}")
    assert set(back) == {"a.weight", "b"}
    assert torch.equal(back["a.weight"], state[prefix + "a.weight"])


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("of_the_average", [{}, {"n_averaged": torch.tensor(3)}])
def test_averaged_weights_beside_those_that_are_read(tmp_path: Path, prefix: str, of_the_average: Any) -> None:
    state = {"a.weight": torch.randn(2, 3), "b": torch.arange(3)}
    average = {**of_the_average, **{prefix + n: v + 1 for n, v in state.items()}}
    torch.save({"state_dict": state, "state_dict_ema": average, "epoch": 3}, tmp_path / "m.pt")
    with pytest.warns(CheckpointWarning, match=r"m\.pt .*'state_dict' and under 'state_dict_ema'") as said:
        back = load_state_dict(tmp_path / "m.pt")
    assert torch.equal(back["a.weight"], state["a.weight"])
    assert said[0].filename == __file__


def test_what_is_no_other_set_of_weights_is_not_named(tmp_path: Path) -> None:
    state = {"a.weight": torch.randn(2, 3), "b": torch.arange(3)}
    beside = {"optimizer": {"state": {0: state}, "param_groups": []}, "best": {"b": torch.ones(3)}, "args": {}}
    torch.save({"model": state, **beside, "scaler": {"n_averaged": torch.ones(1)}}, tmp_path / "m.pt")
    assert set(load_state_dict(tmp_path / "m.pt")) == set(state)


def test_a_prefix_where_the_first_name_is_tied_and_left_out(tmp_path: Path) -> None:
    weight = torch.randn(4, 3)
    torch.save({"model.head.weight": weight, "model.head.bias": torch.ones(4)}, tmp_path / "m.pt")
    expected = {"embed.weight": weight, "head.weight": weight, "head.bias": torch.ones(4)}
    assert set(load_state_dict(tmp_path / "m.pt", expected)) == set(expected)


def test_prefix_stays_if_not_on_every_key(tmp_path: Path) -> None:
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "m.pt")
    assert set(load_state_dict(tmp_path / "m.pt")) == {"module.a", "b"}


def test_prefix_stays_if_it_is_the_architecture_s_own(tmp_path: Path) -> None:
    torch.save({"module.module.a": torch.ones(1), "module.module.b": torch.ones(1)}, tmp_path / "m.pt")
    assert set(load_state_dict(tmp_path / "m.pt")) == {"a", "b"}
    for prefix in ("", "module.", "module.module."):
        names = {prefix + "a", prefix + "b"}
        assert set(load_state_dict(tmp_path / "m.pt", names)) == names
    assert set(load_state_dict(tmp_path / "m.pt", {"other"})) == {"a", "b"}


def test_tied_and_overlapping_tensors(tmp_path: Path) -> None:
    weight = torch.randn(4, 3)
    base = torch.arange(6.0)
    state = {"emb": weight, "head": weight, "first": base[:4], "second": base[2:], "t": weight.T}
    assert tied_names(state) == {"head": "emb"}
    save_state_dict(tmp_path / "a.safetensors", state)
    back = load_state_dict(tmp_path / "a.safetensors")
    assert all(torch.equal(back[n], state[n]) for n in state)
    assert back["emb"] is back["head"]
    assert back["first"].untyped_storage().nbytes() == 16
    with safe_open(str(tmp_path / "a.safetensors"), "pt") as handle:
        assert set(handle.keys()) == set(state)


# -------------------------------------------------------------------- bad files
class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("writer", ["torch", "torch-legacy", "pickle2", "pickle5"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, writer: str) -> None:
    trap, file = tmp_path / "trap", tmp_path / "m.pt"
    bomb = {"w": _Bomb(trap)}
    if writer.startswith("torch"):
        torch.save(bomb, file, _use_new_zipfile_serialization=writer == "torch")
    else:
        file.write_bytes(pickle.dumps(bomb, protocol=int(writer[-1])))
    with pytest.raises(CheckpointError, match=r"is refused: .* re-save the weights with safetensors"):
        load_state_dict(file)
    assert not trap.exists()


def _save(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path


def test_bad_paths(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"a\.safetensors does not exist; check the path"):
        load_state_dict(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"is a directory; give the checkpoint file inside"):
        load_state_dict(tmp_path)
    (tmp_path / "a.onnx").write_bytes(b"x")
    with pytest.raises(
        CheckpointError, match=r"unknown suffix '\.onnx'; expected \.safetensors, \.pt, \.pth, \.ckpt or \.bin"
    ):
        load_state_dict(tmp_path / "a.onnx")
    with pytest.raises(CheckpointError, match="File name too long"):
        load_state_dict(tmp_path / ("x" * 300 + ".pt"))
    os.mkfifo(tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="is no regular file"):
        load_state_dict(tmp_path / "a.pt")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_empty_truncated_and_corrupt(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a{suffix}"
    file.write_bytes(b"")
    with pytest.raises(CheckpointError, match="is empty"):
        load_state_dict(file)
    state = {"w": torch.randn(50, 50)}
    if suffix == ".pt":
        torch.save(state, file)
    else:
        save_state_dict(file, state, force=True)
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:20], b"hello, this is not a checkpoint"):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"truncated or not a .*; copy or download it again"):
            load_state_dict(file)


def test_not_a_mapping_of_tensors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds a list, not a mapping"):
        load_state_dict(_save(tmp_path / "a.pt", [torch.ones(1)]))
    with pytest.raises(CheckpointError, match="the entry 'epoch' is a int"):
        load_state_dict(_save(tmp_path / "b.pt", {"w": torch.ones(1), "epoch": 3}))
    with pytest.raises(CheckpointError, match="is empty: it holds no tensor"):
        load_state_dict(_save(tmp_path / "c.pt", {}))
    with pytest.raises(CheckpointError, match="is empty: it holds no tensor"):
        load_state_dict(_save(tmp_path / "d.pt", {"state_dict": {}}))


# -------------------------------------------------------------------- checks
def test_check_state_dict_messages() -> None:
    good = {"a.weight": torch.ones(2, 3), "n": torch.tensor(1)}
    assert check_state_dict(good, good, "model 0") == ()
    with pytest.raises(CheckpointError, match=r"model 2 has no key 'n'"):
        check_state_dict({"a.weight": torch.ones(2, 3)}, good, "model 2")
    with pytest.raises(CheckpointError, match=r"model 2 has the extra key 'z'"):
        check_state_dict({**good, "z": torch.ones(1)}, good, "model 2")
    with pytest.raises(CheckpointError, match=r"model 1: a\.weight has the shape \(3, 2\), expected \(2, 3\)"):
        check_state_dict({**good, "a.weight": torch.ones(3, 2)}, good, "model 1")
    for value, word in ((float("nan"), "NaN"), (float("inf"), "infinite")):
        bad = torch.ones(2, 3)
        bad[1, 1] = value
        with pytest.raises(CheckpointError, match=f"model 1: a.weight has 1 of 6 values that are {word}"):
            check_state_dict({**good, "a.weight": bad}, good, "model 1")
    with pytest.raises(CheckpointError, match=r"a\.weight is a torch\.int64, expected torch\.float32"):
        check_state_dict({**good, "a.weight": torch.ones(2, 3).long()}, good, "model 1")
    notes = check_state_dict({**good, "a.weight": torch.ones(2, 3).half()}, good, "model 1")
    assert notes == ("model 1: a.weight is torch.float16, expected torch.float32",)


def test_notes_on_dtypes_are_one_for_each_pair() -> None:
    want = {name: torch.ones(2) for name in "abcd"}
    have = {**{name: torch.ones(2).bfloat16() for name in "abc"}, "d": torch.ones(2).half()}
    assert check_state_dict(have, want, "model 1") == (
        "model 1: a and 2 more are torch.bfloat16, expected torch.float32",
        "model 1: d is torch.float16, expected torch.float32",
    )


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.ones(2, 3).to_sparse(), r"a is sparse \(torch.sparse_coo\); save it as a dense tensor"),
        (torch.ones(2, 3, device="meta"), "a is on the meta device and has no values"),
        (torch.ones(2, 3).to(torch.float8_e4m3fn), "a is torch.float8_e4m3fn, too narrow to be averaged"),
        (torch.ones(2, 3, dtype=torch.complex64), "a is a torch.complex64, expected torch.float32"),
        (torch.ones(2, 3, dtype=torch.int8), "a is a torch.int8, expected torch.float32"),
        ([1.0], "a is a list, expected torch.float32"),
    ],
)
def test_tensors_of_a_kind_that_cannot_be_averaged(value: Any, words: str) -> None:
    with pytest.raises(CheckpointError, match=f"model 1: {words}"):
        check_state_dict({"a": value}, {"a": torch.ones(2, 3)}, "model 1")
    with pytest.raises(CheckpointError, match=r"n is a torch\.complex64, expected torch\.int64"):
        check_state_dict({"n": torch.ones(1, dtype=torch.complex64)}, {"n": torch.ones(1).long()}, "model 1")


def test_a_prefix_too_much_is_named() -> None:
    want = {"a.weight": torch.ones(1), "b": torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"no key 'a.weight', 'b'; its names begin with 'model\.': remove that"):
        check_state_dict({f"model.{k}": v for k, v in want.items()}, want, "model 1")
    with pytest.raises(CheckpointError, match="is it a checkpoint of this architecture"):
        check_state_dict({"model.a.weight": torch.ones(1)}, want, "model 1")
    with pytest.raises(CheckpointError, match=r"its names lack 'model\.', as of a wrapper"):
        check_state_dict(want, {f"model.{k}": v for k, v in want.items()}, "model 1")


def test_where_the_missing_names_stand_is_said() -> None:
    want = {"a.weight": torch.ones(1), "b": torch.ones(1)}
    lightning = {f"model.{k}": v for k, v in want.items()} | {"loss.weight": torch.ones(1)}
    with pytest.raises(
        CheckpointError, match=r"it has them under 'model\.', beside others such as 'loss\.weight': keep"
    ):
        check_state_dict(lightning, want, "model 1")
    with pytest.raises(CheckpointError, match=r"its entry 'net' is a mapping that has it: give that"):
        check_state_dict({"net": want, "epoch": 3}, want, "model 1")  # type: ignore[dict-item]


def test_a_state_dict_under_an_unknown_name_in_a_file_is_named(tmp_path: Path) -> None:
    torch.save({"net": {"w": torch.ones(1)}, "epoch": 3}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"the entry 'net' is a dict; if the weights are in it, save that alone"):
        load_state_dict(tmp_path / "a.pt")


# -------------------------------------------------------------------- writing
def test_complex_numbers_that_safetensors_do_not_know(tmp_path: Path) -> None:
    save_state_dict(tmp_path / "a.safetensors", {"w": torch.ones(2, dtype=torch.complex64)})
    with pytest.raises(OutputError, match=r"w is torch\.complex128, and safetensors know complex64 only; convert it"):
        save_state_dict(tmp_path / "b.safetensors", {"w": torch.ones(2, dtype=torch.complex128)})


def test_an_existing_file_is_kept_without_force(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_state_dict(file, {"w": torch.zeros(1)})
    for call in (lambda: check_writable(file), lambda: save_state_dict(file, {"w": torch.ones(1)})):
        with pytest.raises(OutputError, match=r"exists; pass --force \(force=True\)"):
            call()
    assert load_state_dict(file)["w"].item() == 0
    save_state_dict(file, {"w": torch.ones(1)}, force=True)
    assert load_state_dict(file)["w"].item() == 1


def test_unwritable_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError, match="is a directory"):
        check_writable(tmp_path)
    with pytest.raises(OutputError, match=r"the directory .* does not exist; create it first"):
        save_state_dict(tmp_path / "no" / "a.safetensors", {"w": torch.ones(1)})
    with pytest.raises(OutputError, match="writes safetensors only"):
        save_state_dict(tmp_path / "a.pt", {"w": torch.ones(1)})
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match=r"the directory .*file is a file; choose another"):
        check_writable(tmp_path / "file" / "a.safetensors")
    with pytest.raises(OutputError, match="File name too long"):
        check_writable(tmp_path / ("x" * 300))
    os.mkfifo(tmp_path / "pipe")
    for force in (False, True):
        with pytest.raises(OutputError, match="is a device or a pipe"):
            check_writable(tmp_path / "pipe", force)
        with pytest.raises(OutputError, match="is a device or a pipe"):
            check_writable("/dev/null", force)
    for place in ("/proc", "/dev/fd"):  # there nobody may make files, root included
        with pytest.raises(OutputError, match="cannot be written"):
            check_writable(Path(place) / "a.safetensors")

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(OutputError, match="cannot be written: Permission denied; choose a directory"):
        check_writable(tmp_path / "a.safetensors")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    file = tmp_path / "a.safetensors"
    save_state_dict(file, {"w": torch.zeros(1)})

    def half(tensors: Any, path: str, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise error

    monkeypatch.setattr(io, "save_file", half)
    with pytest.raises((KeyboardInterrupt, OutputError)):
        save_state_dict(file, {"w": torch.ones(1)}, force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    assert load_state_dict(file)["w"].item() == 0


@pytest.fixture(params=[0o022, 0o027, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_modes_are_those_that_open_gives(tmp_path: Path, umask: int) -> None:
    plain, weights, text = (tmp_path / name for name in ("plain", "a.safetensors", "a.json"))
    plain.open("w").close()
    save_state_dict(weights, {"w": torch.zeros(1)})
    write_text(text, "{}")
    assert mode(plain) == 0o666 & ~umask
    assert mode(weights) == mode(text) == mode(plain)
    for path in (weights, text):  # and a file that is replaced keeps its own
        path.chmod(0o640)
    save_state_dict(weights, {"w": torch.ones(1)}, force=True)
    write_text(text, "[]", force=True)
    assert mode(weights) == mode(text) == 0o640
    assert load_state_dict(weights)["w"].item() == 1


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link, target = tmp_path / "a.safetensors", tmp_path / "there" / "b.safetensors"
    link.symlink_to(target)
    for value in (0.0, 1.0):
        save_state_dict(link, {"w": torch.full((1,), value)}, force=True)
        assert link.is_symlink()
        assert load_state_dict(target)["w"].item() == value
    assert [p.name for p in target.parent.iterdir()] == ["b.safetensors"]


# -------------------------------------------------------------------- what people have in place of checkpoints
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n", "is a pointer of Git LFS"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "is a web page"),
        (b"\n<html>", "is a web page"),
        (bytes(range(40, 250)), "truncated or not a"),
    ],
)
def test_what_is_no_checkpoint_is_named(content: bytes, message: str, suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"a{suffix}"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_state_dict(file)
    assert "code" not in str(caught.value)


def test_files_with_the_suffix_of_the_other_format(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    io.save_file({"a": torch.ones(2)}, tmp_path / "a.pt")
    with pytest.warns(DeprecationWarning, match="jit"):
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "b.pt"))
    for name, message in (
        ("a.safetensors", r"name it \.pt"),
        ("a.pt", r"name it \.safetensors"),
        ("b.pt", "TorchScript"),
    ):
        with pytest.raises(CheckpointError, match=message) as caught:
            load_state_dict(tmp_path / name)
        assert "download" not in str(caught.value)


def test_views_are_written_as_the_values_that_they_show(tmp_path: Path) -> None:
    conjugate = torch.tensor([1 + 2j, 3j]).conj()
    state = {"a": conjugate, "b": conjugate.imag, "c": torch.ones(3)._neg_view(), "d": torch.ones(2)}
    save_state_dict(tmp_path / "a.safetensors", state)
    back = load_state_dict(tmp_path / "a.safetensors")
    assert all(torch.equal(back[name], value) for name, value in state.items())
    assert io.hash_state_dict(state) == io.hash_state_dict(back)
    assert io.hash_state_dict({"c": state["c"]}) != io.hash_state_dict({"c": torch.ones(3)})


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": 1}', "3"])
def test_a_damaged_record_of_tied_names(text: str, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    io.save_file({"a": torch.ones(2)}, file, {"automerge.tied": text})
    with pytest.raises(CheckpointError, match=r"damaged entry automerge\.tied in its header; save it again"):
        load_state_dict(file)


def test_checkpoints_of_lightning_hugging_face_and_averaged_models(tmp_path: Path) -> None:
    net = torch.nn.Linear(3, 2)
    torch.save({"state_dict": net.state_dict(), "epoch": 3}, tmp_path / "a.ckpt")
    torch.save(net.state_dict(), tmp_path / "pytorch_model.bin")
    torch.save(torch.optim.swa_utils.AveragedModel(net).state_dict(), tmp_path / "swa.pt")
    for name in ("a.ckpt", "pytorch_model.bin", "swa.pt"):
        found = load_state_dict(tmp_path / name, net.state_dict())
        assert found.keys() == net.state_dict().keys(), name
        assert all(torch.equal(v, found[n]) for n, v in net.state_dict().items())


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": 1}, "the entry 'a' is a int; a state dict maps names to tensors"),
        ({1: torch.ones(1)}, "the entry 1 is a Tensor"),
        ({"a": torch.ones(2, 2).to_sparse()}, "a is sparse; safetensors hold dense tensors"),
        ({"a": torch.ones(2, device="meta")}, "a is on the meta device"),
    ],
)
def test_what_safetensors_cannot_hold(state: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=message):
        save_state_dict(tmp_path / "a.safetensors", state)
    assert not list(tmp_path.iterdir())


def test_a_file_that_another_process_writes_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, write = tmp_path / "a.safetensors", io.save_file

    def meanwhile(*args: Any, **kwargs: Any) -> None:
        write(*args, **kwargs)
        file.write_text("another's")

    monkeypatch.setattr(io, "save_file", meanwhile)
    with pytest.raises(OutputError, match="exists"):
        save_state_dict(file, {"a": torch.ones(2)})
    assert file.read_text() == "another's"
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    monkeypatch.undo()
    save_state_dict(file, {"a": torch.ones(2)}, force=True)
    assert torch.equal(load_state_dict(file)["a"], torch.ones(2))
