"""The forms in which data sets are published or stored: idx, CIFAR's binary records, prediction residuals."""

from __future__ import annotations

import io
import tarfile
from pathlib import PurePosixPath

import numpy as np


def read_idx(raw: bytes) -> np.ndarray:
    """An array of bytes in the idx format of MNIST: two zeros, type 8, the number of axes, their lengths, the values.

    Raises:
        ValueError: if the header is another one, or the length does not fit it.

    Examples:
        >>> read_idx(bytes([0, 0, 8, 1, 0, 0, 0, 2, 7, 9]))
        array([7, 9], dtype=uint8)
    """
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise ValueError("this is no idx file of bytes: it must begin with 0, 0, 8")
    axes = raw[3]
    shape = [int.from_bytes(raw[4 + 4 * k : 8 + 4 * k], "big") for k in range(axes)]
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * axes)
    if values.size != np.prod(shape, dtype=np.int64):
        raise ValueError(f"this idx file says {shape} and holds {values.size} values; it is damaged")
    return values.reshape(shape).copy()


def read_cifar(archive: bytes, labels: int, train: str, test: str) -> dict[str, np.ndarray]:
    """CIFAR's archive of binary records: label bytes, of which the last is the fine one, then 3 x 32 x 32 pixels.

    Args:
        archive: a ``.tar.gz``.
        labels: how many label bytes a record has.
        train: how the names of the training files begin; they are read in the order of their names.
        test: how that of the test file begins.

    Returns:
        ``x_train``, ``y_train``, ``x_test`` and ``y_test``, images as ``(n, 32, 32, 3)``.

    Raises:
        ValueError: if a file is missing or is no whole number of records.
    """
    size = labels + 3072
    out: dict[str, np.ndarray] = {}
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        files = {PurePosixPath(m.name).name: m for m in tar.getmembers() if m.isfile()}
        for split, start in (("train", train), ("test", test)):
            names = sorted(n for n in files if n.startswith(start) and n.endswith(".bin"))
            parts = [handle.read() for n in names if (handle := tar.extractfile(files[n])) is not None]
            raw = np.frombuffer(b"".join(parts), np.uint8)
            if not raw.size or raw.size % size:
                raise ValueError(f"the archive's {start}*.bin hold {raw.size} bytes, no whole number of {size}")
            records = raw.reshape(-1, size)
            out[f"x_{split}"] = records[:, labels:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1).copy()
            out[f"y_{split}"] = records[:, labels - 1].copy()
    return out


def from_residuals(residuals: np.ndarray) -> np.ndarray:
    """Images from their prediction residuals.

    Every pixel was predicted by the median edge detector of LOCO-I from its neighbours to the left (a), above (b) and
    above left (c), borders by the one neighbour they have; what is stored is the difference modulo 256. Three planes are green,
    red - green and blue - green.

    Args:
        residuals: uint8 ``(planes, n, height, width)``, one plane or three.

    Returns:
        uint8 ``(n, height, width)`` or ``(n, height, width, 3)``.

    Examples:
        >>> from_residuals(np.array([[[[5, 1], [2, 0]]]], dtype=np.uint8))
        array([[[5, 6],
                [7, 7]]], dtype=uint8)
    """
    planes, count, height, width = residuals.shape
    grid = np.ascontiguousarray(residuals.transpose(2, 3, 0, 1)).reshape(height, width, planes * count).astype(np.int16)
    for i in range(height):
        for j in range(width):
            grid[i, j] = (grid[i, j] + _predicted(grid, i, j)) & 255
    pixels = grid.astype(np.uint8).reshape(height, width, planes, count).transpose(2, 3, 0, 1)
    if planes == 1:
        return np.ascontiguousarray(pixels[0])
    return np.ascontiguousarray(np.stack([pixels[1] + pixels[0], pixels[0], pixels[2] + pixels[0]], axis=-1))


def _predicted(grid: np.ndarray, i: int, j: int) -> np.ndarray | int:
    if not (i and j):
        return grid[i, j - 1] if j else grid[i - 1, j] if i else 0
    a, b, c = grid[i, j - 1], grid[i - 1, j], grid[i - 1, j - 1]
    low, high = np.minimum(a, b), np.maximum(a, b)
    return np.where(c >= high, low, np.where(c <= low, high, a + b - c))
