"""Data sets as tensors: scikit-learn's handwritten digits, or files that the user names.

``AUTOMERGE_DATA=DIR`` makes ``load("mnist")`` read ``DIR/mnist.npz`` with the arrays ``x_train``, ``y_train``, ``x_test``
and ``y_test``; ``DIR/cifar10.res.npz`` with prediction residuals (``r_train``, ``r_test``) for the images; and for a text
``DIR/NAME.npz`` with ``train``, ``test`` (codes) and ``chars``. `zoo.download` writes such files. Nothing is downloaded here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from zoo._formats import from_residuals

KEYS = ("x_train", "y_train", "x_test", "y_test")
TEXT_KEYS = ("train", "test", "chars")
CONTEXT = 64


@dataclass(frozen=True)
class Dataset:
    """A labelled set of images, or of pieces of text, in memory.

    Attributes:
        name: what it is, for the checkpoint's card.
        x_train: images ``(n, channels, height, width)`` float32, standardised by the training set's mean and deviation; or
            texts ``(n, tokens)`` int64.
        y_train: labels int64: ``(n,)``, or the next token of each, ``(n, tokens)``.
        x_test: held out, standardised alike.
        y_test: their labels.
    """

    name: str
    x_train: torch.Tensor
    y_train: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor

    @property
    def classes(self) -> int:
        """The number of labels, or of tokens."""
        return int(max(self.y_train.max(), self.y_test.max())) + 1

    @property
    def is_text(self) -> bool:
        """Whether it holds tokens."""
        return not self.x_train.is_floating_point()

    def head(self, train: int, test: int | None = None) -> Dataset:
        """The first ``train`` training and ``test`` held-out samples."""
        return replace(
            self,
            x_train=self.x_train[:train],
            y_train=self.y_train[:train],
            x_test=self.x_test[:test],
            y_test=self.y_test[:test],
        )

    def tail(self, train: int) -> Dataset:
        """The last ``train`` training samples, and all that is held out."""
        return replace(self, x_train=self.x_train[-train:], y_train=self.y_train[-train:])

    def only(self, labels: Sequence[int]) -> Dataset:
        """The samples with some labels, which keep their numbers."""
        wanted = torch.tensor(sorted(labels))
        here, there = (torch.isin(y, wanted) for y in (self.y_train, self.y_test))
        name = f"{self.name}[{','.join(map(str, sorted(labels)))}]"
        return Dataset(name, self.x_train[here], self.y_train[here], self.x_test[there], self.y_test[there])

    def halved(self) -> Dataset:
        """Images of half the height and width: means over two by two pixels, standardised again."""
        train, test = (F.avg_pool2d(x, 2) for x in (self.x_train, self.x_test))
        wide = train.numpy().astype(np.float64)  # torch's sums depend on the number of threads in their last bits
        mean, deviation = float(wide.mean()), float(wide.std())
        small, held = (train - mean) / deviation, (test - mean) / deviation
        return replace(self, name=f"{self.name}/2", x_train=small, x_test=held)


def digits(test_share: float = 0.3, seed: int = 0) -> Dataset:
    """The 1,797 handwritten 8x8 digits that scikit-learn ships, in one fixed random split.

    Args:
        test_share: the share held out.
        seed: of the split; the same seed gives the same split everywhere.
    """
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    images, labels = images[order].reshape(-1, 1, 8, 8), labels[order]
    cut = len(labels) - round(len(labels) * test_share)
    return _standardised("digits", images[:cut], labels[:cut], images[cut:], labels[cut:])


def load(name: str = "digits") -> Dataset:
    """A data set by its name: ``digits``, or a file in the directory that ``AUTOMERGE_DATA`` names.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file lacks an array.
    """
    if name == "digits":
        return digits()
    folder = os.environ.get("AUTOMERGE_DATA")
    if not folder:
        raise FileNotFoundError(
            f"no built-in data set {name!r}: set AUTOMERGE_DATA to a directory that holds {name}.npz "
            f"(with a network: python -m zoo.download {name} --out DIR)"
        )
    path = next((p for s in ("npz", "res.npz") if (p := Path(folder) / f"{name}.{s}").is_file()), None)
    if path is None:
        raise FileNotFoundError(f"AUTOMERGE_DATA={folder} holds no {name}.npz")
    with np.load(path, allow_pickle=False) as file:
        if "chars" in file:
            return _text(name, *(_array(file, key, path, TEXT_KEYS) for key in ("train", "test")))
        images = (
            [from_residuals(_array(file, k, path, ("r_train", "r_test"))) for k in ("r_train", "r_test")]
            if "r_train" in file
            else [_array(file, k, path, KEYS) for k in ("x_train", "x_test")]
        )
        y_train, y_test = (_array(file, k, path, KEYS) for k in ("y_train", "y_test"))
    return _standardised(name, _images(images[0]), y_train, _images(images[1]), y_test)


def _array(file: np.lib.npyio.NpzFile, key: str, path: Path, all_keys: Sequence[str]) -> np.ndarray:
    if key not in file:
        raise ValueError(f"{path} has no array {key!r}; it needs {', '.join(all_keys)}")
    return np.asarray(file[key])


def _text(name: str, train: np.ndarray, test: np.ndarray) -> Dataset:
    """Pieces of `CONTEXT` codes, each with the codes that follow."""
    parts: list[torch.Tensor] = []
    for codes in (train, test):
        count = (len(codes) - 1) // CONTEXT
        if count < 1:
            raise ValueError(f"the text {name} has {len(codes)} characters; it needs more than {CONTEXT}")
        values = torch.from_numpy(codes[: count * CONTEXT + 1].astype(np.int64))
        parts += [values[:-1].view(count, CONTEXT), values[1:].view(count, CONTEXT)]
    return Dataset(name, *parts)


def _images(array: np.ndarray) -> np.ndarray:
    """``(n, h, w)`` or ``(n, h, w, c)`` or ``(n, c, h, w)`` to the last form."""
    if array.ndim == 3:
        return array[:, None]
    if array.ndim == 4 and array.shape[-1] in (1, 3) and array.shape[1] not in (1, 3):
        return np.ascontiguousarray(array.transpose(0, 3, 1, 2))
    return array


def _standardised(
    name: str, x_train: np.ndarray, y_train: np.ndarray, x_test: np.ndarray, y_test: np.ndarray
) -> Dataset:
    mean, deviation = float(x_train.mean()), float(x_train.std())
    train, test = (torch.from_numpy((x.astype(np.float32) - mean) / deviation) for x in (x_train, x_test))
    return Dataset(
        name, train, torch.from_numpy(y_train.astype(np.int64)), test, torch.from_numpy(y_test.astype(np.int64))
    )
