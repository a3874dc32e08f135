"""Image sets as tensors: scikit-learn's handwritten digits, or npz files that the user names.

``AUTOMERGE_DATA=DIR`` makes ``load("mnist")`` read ``DIR/mnist.npz`` with the arrays ``x_train``, ``y_train``,
``x_test`` and ``y_test``. Nothing is downloaded.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits

KEYS = ("x_train", "y_train", "x_test", "y_test")


@dataclass(frozen=True)
class Dataset:
    """A labelled image set in memory.

    Attributes:
        name: what it is, for the checkpoint's card.
        x_train: ``(n, channels, height, width)`` float32, standardised by the training set's mean and deviation.
        y_train: ``(n,)`` int64 labels.
        x_test: held-out images, standardised alike.
        y_test: their labels.
    """

    name: str
    x_train: torch.Tensor
    y_train: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor

    @property
    def classes(self) -> int:
        """The number of labels."""
        return int(max(self.y_train.max(), self.y_test.max())) + 1

    def head(self, train: int, test: int | None = None) -> Dataset:
        """The first ``train`` training and ``test`` held-out images."""
        return Dataset(self.name, self.x_train[:train], self.y_train[:train], self.x_test[:test], self.y_test[:test])


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
    """A data set by its name: ``digits``, or ``NAME.npz`` in the directory that ``AUTOMERGE_DATA`` names.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file lacks one of the four arrays.
    """
    if name == "digits":
        return digits()
    folder = os.environ.get("AUTOMERGE_DATA")
    if not folder:
        raise FileNotFoundError(
            f"no built-in data set {name!r}: set AUTOMERGE_DATA to a directory that holds {name}.npz"
        )
    path = Path(folder) / f"{name}.npz"
    if not path.is_file():
        raise FileNotFoundError(f"AUTOMERGE_DATA={folder} holds no {name}.npz")
    with np.load(path, allow_pickle=False) as file:
        missing = [key for key in KEYS if key not in file]
        if missing:
            raise ValueError(f"{path} has no array {missing[0]!r}; it needs {', '.join(KEYS)}")
        x_train, y_train, x_test, y_test = (file[key] for key in KEYS)
    return _standardised(name, _images(x_train), y_train, _images(x_test), y_test)


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
