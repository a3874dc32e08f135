"""Constants as float64 makes them: two numbers that only rounding made equal are not the same number."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import fx

from automerge._double import double_precision

ROUNDING = 2.0**-44  # what float64 itself may leave of a number, as a share of the largest


def in_double(node: fx.Node, constant: Collection[fx.Node]) -> Any:
    """What a constant node computes in float64; its recorded value where it does not run so.

    Args:
        node: the node.
        constant: the nodes that depend on nothing but constants.
    """
    held: dict[fx.Node, Any] = {}  # gone with the call: tables are large
    todo = [node]
    while todo:
        last = todo[-1]
        missing = [n for n in last.all_input_nodes if n not in held] if last in constant else []
        if last in held or not missing:
            held.setdefault(todo.pop(), _computed(last, constant, held))
        else:
            todo += missing
    return held[node]


def _computed(node: fx.Node, constant: Collection[fx.Node], held: Mapping[fx.Node, Any]) -> Any:
    if node.op != "call_function" or node not in constant or "empty" in str(node.target):
        return node.meta["val"]  # (what was never written is another thing in every run)
    args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), lambda a: held[a] if isinstance(a, fx.Node) else a)
    try:
        with torch.no_grad(), double_precision():
            return node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception:  # an operator that float64 has not
        return node.meta["val"]


def entries(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's numbers, in a type that numpy has."""
    array = tensor.detach().to_dense().cpu() if tensor.layout is not torch.strided else tensor.detach().cpu()
    array = array.float() if array.dtype in (torch.bfloat16, torch.float16) else array
    return array.resolve_conj().resolve_neg().numpy()


def told_apart(rounded: np.ndarray, exact: Callable[[], np.ndarray]) -> np.ndarray:
    """The exact numbers, in which what is the same number but for its own rounding, and was equal in ``rounded``, is equal.

    They are asked for only where some of the rounded ones are equal.
    """
    old, kind = np.unique(rounded, return_inverse=True)
    if old.size == rounded.size or rounded.dtype.kind != "f":
        return rounded
    wide = exact()
    if rounded.shape != wide.shape or not np.isfinite(wide).all() or np.array_equal(rounded, wide):
        return rounded
    numbers, where = np.unique(wide, return_inverse=True)
    steps = np.diff(numbers) > ROUNDING * np.abs(numbers).max(initial=0.0)
    near = np.concatenate([[0], np.cumsum(steps)])[where.reshape(-1)]
    _, first, both = np.unique(kind.reshape(-1) * (near.max() + 1) + near, return_index=True, return_inverse=True)
    return wide.reshape(-1)[first][both.reshape(-1)].reshape(wide.shape)
