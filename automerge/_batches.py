"""Whether a model takes the entries of a batch for each other's on inputs of another size.

``h.view(-1, channels)`` after pooling to one pixel (WideResNet, DenseNet) lays pixels out as further rows of the batch where
an image is larger. A model does not mean such inputs, though it runs on them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from automerge._tree_io import map_tensors, tensors_of

Given = tuple[Any, Any]


def mixes_rows(
    run: Callable[[Given], Sequence[torch.Tensor]], example: Given, given: Given, outputs: Sequence[torch.Tensor]
) -> bool:
    """Whether outputs have a row for every row of the inputs on the example, but not on other inputs.

    Only where no axis of length one was made longer: what such a length hides must show.

    Args:
        run: the outputs for some inputs.
        example: positional and keyword inputs.
        given: the same of other sizes.
        outputs: for these.
    """
    rows, others = _rows(example), _rows(given)
    pairs = list(zip(tensors_of(example), tensors_of(given), strict=True))
    if rows is None or others is None or any(t.dim() != u.dim() for t, u in pairs):
        return False
    if any(n == 1 != m for t, u in pairs for n, m in zip(t.shape[1:], u.shape[1:], strict=True)):
        return False
    twice = map_tensors(lambda _, t: torch.cat([t, t]) if t.dim() else t, example)
    try:
        each = _lengths(run(example)) == {rows} and _lengths(run(twice)) == {2 * rows}
    except Exception:  # a model for batches of one length
        return False
    return each and _lengths(outputs) != {others}


def _rows(given: Given) -> int | None:
    """The length of the batch: of the first axis of all inputs."""
    lengths = _lengths(tensors_of(given))
    return lengths.pop() if len(lengths) == 1 else None


def _lengths(tensors: Sequence[torch.Tensor]) -> set[int]:
    return {t.shape[0] if t.dim() else 0 for t in tensors}
