"""Stored and published forms of data sets are read, and a download with another checksum is refused."""

import gzip
import hashlib
import io
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from zoo import data as zoo_data
from zoo import download as zoo_download
from zoo._formats import from_residuals, read_cifar, read_idx
from zoo.download import Source, download, unpack_idx, unpack_text


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def cifar(path: Path, labels: int) -> dict[str, np.ndarray]:
    """A small archive in CIFAR's form, and what it holds."""
    rng = np.random.default_rng(0)
    held = {}
    with tarfile.open(path, "w:gz") as tar:
        for split, names in (("train", ["data_batch_1", "data_batch_2"]), ("test", ["test_batch"])):
            images = rng.integers(0, 256, (2 * len(names), 32, 32, 3), dtype=np.uint8)
            tags = rng.integers(0, 10, (len(images), labels), dtype=np.uint8)
            held |= {f"x_{split}": images, f"y_{split}": tags[:, -1]}
            records = np.concatenate([tags, images.transpose(0, 3, 1, 2).reshape(len(images), -1)], axis=1)
            for k, name in enumerate(names):
                raw = records[2 * k : 2 * k + 2].tobytes()
                info = tarfile.TarInfo(f"folder/{name}.bin")
                info.size = len(raw)
                tar.addfile(info, io.BytesIO(raw))
    return held


def residuals(images: np.ndarray) -> np.ndarray:
    """An encoder, one pixel after the other, for what `from_residuals` undoes."""
    wide = images.astype(int)
    planes = [wide] if images.ndim == 3 else [wide[..., 1], wide[..., 0] - wide[..., 1], wide[..., 2] - wide[..., 1]]
    out = np.zeros((len(planes), *planes[0].shape), np.uint8)
    for k, plane in enumerate(p % 256 for p in planes):
        for n, i, j in np.ndindex(plane.shape):
            a = plane[n, i, j - 1] if j else 0
            b = plane[n, i - 1, j] if i else 0
            c = plane[n, i - 1, j - 1] if i and j else 0
            if not i or not j:
                guess = a if not i else b
            elif c >= max(a, b):
                guess = min(a, b)
            else:
                guess = max(a, b) if c <= min(a, b) else a + b - c
            out[k, n, i, j] = (plane[n, i, j] - guess) % 256
    return out


@pytest.mark.parametrize("shape", [(3, 5, 4), (2, 4, 6, 3)])
def test_residuals_are_undone(shape: tuple[int, ...]) -> None:
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    assert np.array_equal(from_residuals(residuals(images)), images)


def test_residual_files_are_found_and_standardised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (6, 4, 4, 3), dtype=np.uint8), np.arange(6) % 3
    made = residuals(images)
    np.savez(tmp_path / "tiny.res.npz", r_train=made, r_test=made[:, :2], y_train=labels, y_test=labels[:2])
    monkeypatch.setenv("AUTOMERGE_DATA", str(tmp_path))
    data = zoo_data.load("tiny")
    assert data.x_train.shape == (6, 3, 4, 4)
    wanted = (images.transpose(0, 3, 1, 2) - images.mean()) / images.std()
    torch.testing.assert_close(data.x_train, torch.from_numpy(wanted).float(), rtol=1e-5, atol=1e-5)


def test_halves_and_parts_of_data() -> None:
    data = zoo_data.digits()
    assert data.halved().x_train.shape[1:] == (1, 4, 4)
    assert abs(float(data.halved().x_train.std()) - 1) < 1e-4
    few = data.only([3, 1])
    assert set(few.y_train.tolist()) == {1, 3}
    assert few.name == "digits[1,3]"
    assert len(few.x_test) == int((data.y_test == 1).sum() + (data.y_test == 3).sum())
    assert torch.equal(data.tail(5).x_train, data.x_train[-5:])


def test_text_is_cut_into_pieces_with_the_next_character_as_label(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "to be or not to be, that is the question: " * 60
    arrays = unpack_text({"text": text.encode()})
    np.savez(tmp_path / "play.npz", **arrays)
    monkeypatch.setenv("AUTOMERGE_DATA", str(tmp_path))
    data = zoo_data.load("play")
    assert data.is_text
    assert data.classes == len(set(text))
    flat = "".join(arrays["chars"][data.x_train.flatten().numpy()])
    assert text.startswith(flat)
    following = "".join(arrays["chars"][data.y_train.flatten().numpy()])
    assert text[1:].startswith(following)
    assert not zoo_data.digits().is_text


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Where a server on the loopback interface gives the files of the directory."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(tmp_path))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_download_is_checked_unpacked_and_read(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    arrays = {"x_train": rng.integers(0, 256, (5, 4, 4), dtype=np.uint8), "y_train": np.arange(5, dtype=np.uint8)}
    arrays |= {"x_test": arrays["x_train"][:2], "y_test": arrays["y_train"][:2]}
    files = {}
    for key, array in arrays.items():
        path = tmp_path / f"{key}.gz"
        path.write_bytes(gzip.compress(idx(array)))
        files[key] = (f"{address}/{path.name}", hashlib.sha256(path.read_bytes()).hexdigest())
    out = tmp_path / "data"
    monkeypatch.setitem(zoo_download.SOURCES, "mnist", Source(files, unpack_idx))
    assert zoo_download.main(["mnist", "--out", str(out)]) == 0
    monkeypatch.setenv("AUTOMERGE_DATA", str(out))
    assert zoo_data.load("mnist").y_train.tolist() == [0, 1, 2, 3, 4]
    (tmp_path / "x_train.gz").unlink()  # what is there is not fetched again
    assert zoo_download.main(["mnist", "--out", str(out)]) == 0
    assert "there already" in capsys.readouterr().err


def test_another_checksum_is_refused_and_nothing_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.gz"
    path.write_bytes(b"something else")

    def never(_: object) -> dict[str, np.ndarray]:
        raise AssertionError("unpacked")

    source = Source({"a": (path.as_uri(), "0" * 64)}, never)
    with pytest.raises(ValueError, match="SHA-256"):
        download("a", source, tmp_path / "data")
    assert not (tmp_path / "data").exists()
    missing = Source({"a": ((tmp_path / "absent").as_uri(), "0" * 64)}, never)
    with pytest.raises(OSError, match="absent"):
        download("a", missing, tmp_path / "data")


def test_the_command_says_in_one_sentence_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Source({"text": ((tmp_path / "absent").as_uri(), "0" * 64)}, unpack_text)
    monkeypatch.setitem(zoo_download.SOURCES, "tinyshakespeare", source)
    assert zoo_download.main(["tinyshakespeare", "--out", str(tmp_path)]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(error) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_known_checksums_have_the_form_of_sha256() -> None:
    sums = [digest for source in zoo_download.SOURCES.values() for _, digest in source.files.values()]
    assert all(len(s) == 64 and int(s, 16) >= 0 for s in sums)
    assert len(set(sums)) == len(sums)


@pytest.mark.parametrize("labels", [1, 2])
def test_cifar_s_records_are_read_and_the_fine_label_is_taken(tmp_path: Path, labels: int) -> None:
    path = tmp_path / "cifar.tar.gz"
    held = cifar(path, labels)
    found = read_cifar(path.read_bytes(), labels, "data_batch", "test_batch")
    for key, array in held.items():
        assert np.array_equal(found[key], array), key
    with pytest.raises(ValueError, match="no whole number"):
        read_cifar(path.read_bytes(), labels, "absent", "test_batch")


def test_damaged_idx_files_are_refused() -> None:
    whole = idx(np.arange(12, dtype=np.uint8).reshape(3, 4))
    assert np.array_equal(read_idx(whole), np.arange(12).reshape(3, 4))
    with pytest.raises(ValueError, match="damaged"):
        read_idx(whole[:-1])
    with pytest.raises(ValueError, match="no idx file"):
        read_idx(b"GIF89a")


def test_halved_images_do_not_depend_on_the_number_of_threads():
    """Networks are trained by the images' bits."""
    images = torch.rand(4000, 1, 28, 28, generator=torch.Generator().manual_seed(0)) ** 3
    data = zoo_data.Dataset("some", images, torch.zeros(4000, dtype=torch.long), images[:5], torch.zeros(5).long())
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(data.halved().x_train)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
