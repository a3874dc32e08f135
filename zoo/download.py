"""Download data sets, check them, and write them as ``NAME.npz``: ``python -m zoo.download mnist --out DIR``.

A file whose SHA-256 is another one than written here is refused, and nothing of it is kept or unpacked. Then set
``AUTOMERGE_DATA=DIR``.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from zoo._formats import read_cifar, read_idx
from zoo.train import write_atomically

Arrays = Mapping[str, np.ndarray]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Source:
    """Where a data set comes from.

    Attributes:
        files: key -> (URL, SHA-256 of the file there).
        unpack: from the files' bytes by their keys to the arrays of the npz file.
    """

    files: Mapping[str, tuple[str, str]]
    unpack: Callable[[Mapping[str, bytes]], Arrays]


def unpack_idx(files: Mapping[str, bytes]) -> Arrays:
    """Four gzipped idx files."""
    return {key: read_idx(gzip.decompress(raw)) for key, raw in files.items()}


def unpack_text(files: Mapping[str, bytes]) -> Arrays:
    """A text: codes by the sorted characters; the last tenth is held out."""
    text = files["text"].decode("utf-8")
    chars = sorted(set(text))
    if len(chars) > 256:
        raise ValueError(f"the text has {len(chars)} different characters; at most 256 fit a byte each")
    number = {c: k for k, c in enumerate(chars)}
    codes = np.array([number[c] for c in text], dtype=np.uint8)
    cut = len(codes) * 9 // 10
    return {"train": codes[:cut], "test": codes[cut:], "chars": np.array(chars)}


def _four(base: str, *sums: str) -> Source:
    names = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    keys = ("x_train", "y_train", "x_test", "y_test")
    places = {k: (f"{base}{n}-ubyte.gz", s) for k, n, s in zip(keys, names, sums, strict=True)}
    return Source(places, unpack_idx)


def _cifar(name: str, digest: str, labels: int, train: str, test: str) -> Source:
    url = f"https://www.cs.toronto.edu/~kriz/{name}-binary.tar.gz"
    return Source({"archive": (url, digest)}, lambda files: read_cifar(files["archive"], labels, train, test))


SOURCES: dict[str, Source] = {
    "mnist": _four(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    ),
    "fashion_mnist": _four(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    ),
    "cifar10": _cifar(
        "cifar-10", "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd", 1, "data_batch", "test_batch"
    ),
    "cifar100": _cifar(
        "cifar-100", "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec", 2, "train", "test"
    ),
    "tinyshakespeare": Source(
        {
            "text": (
                "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
                "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
            )
        },
        unpack_text,
    ),
}
"""Name -> where it comes from."""


def download(name: str, source: Source, folder: Path, say: Say = lambda _: None) -> Path:
    """Fetch, check and write one data set; a file that is there already is left alone.

    Args:
        name: of the file, without its ending.
        source: where it comes from.
        folder: where it goes.
        say: is told what is being done.

    Returns:
        The file.

    Raises:
        OSError: if a URL cannot be read.
        ValueError: if a file's checksum is another one, or it cannot be unpacked.
    """
    path = folder / f"{name}.npz"
    if path.is_file():
        say(f"{path} is there already")
        return path
    files = {}
    for key, (url, digest) in source.files.items():
        say(f"fetching {url}")
        with urllib.request.urlopen(url) as answer:
            raw = answer.read()
        found = hashlib.sha256(raw).hexdigest()
        if found != digest:
            raise ValueError(
                f"{url} has the SHA-256 {found}, expected {digest}; it is damaged or another file, not kept"
            )
        files[key] = raw
    arrays = source.unpack(files)
    write_atomically(path, lambda temporary: _save(temporary, arrays))
    return path


def _save(temporary: str, arrays: Arrays) -> None:
    with open(temporary, "wb") as handle:  # numpy would append .npz to a name
        np.savez_compressed(handle, **dict(arrays))  # type: ignore[arg-type] # numpy 2 names a flag among them


def main(argv: list[str] | None = None) -> int:
    """Download each named data set."""
    parser = argparse.ArgumentParser(prog="python -m zoo.download", description=__doc__)
    parser.add_argument(
        "name", nargs="+", choices=sorted(SOURCES), metavar="NAME", help=f"of {', '.join(sorted(SOURCES))}"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/data"))
    options = parser.parse_args(argv)
    try:
        for name in options.name:
            print(download(name, SOURCES[name], options.out, lambda text: print(text, file=sys.stderr)))
    except (urllib.error.URLError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
