"""What may be permuted in a constant tensor, from its values.

Where a constant was computed, values may be equal by chance: all distances are 0 in a sequence of one, and so are slopes times
distances; the first row of a table of cosines holds nothing but ones. With longer inputs they differ. Such a constant is
*veiled*: its structure is that of the constants it was made from.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx

from automerge.rules._reads import partly_read

_MAX_ENTRIES = 5_000_000


@dataclass(frozen=True, eq=False)
class Pattern:
    """Two axes of a constant that can be permuted together: an identity, a permutation, blocks on a diagonal.

    Positions with equal slices are one class; besides a background, every class has one entry at most.

    Attributes:
        axes: the two axes.
        classes: for each of them, the class of every position.
        rows: the class along the first axis of every entry that is not the background.
        columns: its class along the second axis.
        kinds: a number for its value (its slice along all other axes).
    """

    axes: tuple[int, int]
    classes: tuple[np.ndarray, np.ndarray]
    rows: np.ndarray
    columns: np.ndarray
    kinds: np.ndarray

    @property
    def of_a_kind(self) -> bool:
        """Whether all entries have the same value."""
        return bool((self.kinds == self.kinds[0]).all())


def slice_classes(array: np.ndarray, axis: int) -> np.ndarray:
    """Number the distinct slices along an axis: equal slices get equal numbers."""
    n = array.shape[axis]
    rows = np.moveaxis(array, axis, 0).reshape(n, -1)
    if rows.dtype.kind in "fc":
        rows = rows + 0.0  # one zero
    if bool((rows == rows[:1]).all()):
        return np.zeros(n, np.int64)
    rows = np.ascontiguousarray(rows)
    numbers: dict[bytes, int] = {}
    return np.array([numbers.setdefault(row.tobytes(), len(numbers)) for row in rows], np.int64)


def pattern(array: np.ndarray) -> Pattern | None:
    """The first two axes of which distinct slices can be permuted together; None if there are none."""
    if array.ndim < 2 or array.size > _MAX_ENTRIES or min(array.shape) == 0:
        return None
    classes = {k: slice_classes(array, k) for k, n in enumerate(array.shape) if n > 1}
    several = {k: c for k, c in classes.items() if c.max() > 0}
    for a, b in itertools.combinations(several, 2):
        first, second = (np.unique(several[k], return_index=True)[1] for k in (a, b))
        cells = array.take(first, axis=a).take(second, axis=b)
        n, m = first.size, second.size
        kinds = _kinds(np.moveaxis(cells, (a, b), (0, 1)).reshape(n * m, -1)).reshape(n, m)
        background = int(np.bincount(kinds.reshape(-1)).argmax())
        rows, columns = np.nonzero(kinds != background)
        one_to_one = np.unique(rows).size == rows.size == np.unique(columns).size
        found = kinds[rows, columns]
        if one_to_one and np.unique(found).size < found.size:
            return Pattern((a, b), (several[a], several[b]), rows, columns, found)
    return None


def _kinds(cells: np.ndarray) -> np.ndarray:
    """Number the distinct rows of a table."""
    if cells.shape[1] == 1:
        return np.unique(cells, return_inverse=True)[1].reshape(-1)
    cells = np.ascontiguousarray(cells + 0.0 if cells.dtype.kind in "fc" else cells)
    one = cells.view(np.dtype((np.void, cells.dtype.itemsize * cells.shape[1]))).reshape(-1)
    return np.unique(one, return_inverse=True)[1].reshape(-1)


_ONE_TO_ONE = frozenset(  # but for rounding, and for a factor or exponent of 0
    f"aten::{name}"
    for name in (
        "mul", "div", "pow", "add", "sub", "rsub", "neg", "reciprocal", "sqrt", "rsqrt", "sin", "cos", "tan", "polar",
        "complex", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sigmoid", "tanh", "atan", "erf", "softplus",
    )
)  # fmt: skip


_THRESHOLDS = frozenset(
    f"aten::{name}" for name in ("lt", "le", "gt", "ge", "eq", "ne", "clamp", "clamp_min", "clamp_max", "relu")
)


def veils(node: fx.Node, live: Collection[fx.Node], by_size: bool = False) -> bool:
    """Whether a constant is equal where one that it was made from differs, be it by the sizes of these inputs.

    A function of several constants may hide one (slopes times distances of 0), and so may a cut of a table of which other
    rows are not read, and rounding (cosines of small angles). Other functions of one constant (``arange(n) // 4``) are meant
    so.

    Args:
        node: a node whose value is a constant.
        live: the nodes that the output depends on.
        by_size: whether what is computed is known to depend on the sizes of the inputs; then the number that a constant is
            compared with may be one of them (``arange(8) < n``).
    """
    value = node.meta["val"]
    if node.op != "call_function" or not isinstance(value, torch.Tensor) or value.numel() < 2:
        return False
    for source, axis, mine in _kept_axes(node, live, by_size):
        new = slice_classes(_array(value), mine)
        old = slice_classes(_array(source), axis)[: new.size]  # (a gather may leave out the end of an axis)
        if np.unique(np.stack([old, new]), axis=1).shape[1] > new.max() + 1:
            return True
    return False


def _kept_axes(node: fx.Node, live: Collection[fx.Node], by_size: bool) -> Iterator[tuple[torch.Tensor, int, int]]:
    """The operands' axes that are axes of a constant: ``(operand, axis, axis of the constant)``."""
    name, value = getattr(node.target, "_schema", node).name, node.meta["val"]
    operands = [t for n in node.all_input_nodes if isinstance(t := n.meta["val"], torch.Tensor) and t.numel() > 1]
    if name in ("aten::mm", "aten::bmm"):
        for k, gone in ((0, -1), (1, -2)):
            tensor = node.args[k].meta["val"]
            kept = [axis for axis in range(tensor.dim()) if axis != tensor.dim() + gone]
            yield from ((tensor, axis, axis) for axis in kept if tensor.shape[axis] > 1)
    elif (
        name in _ONE_TO_ONE
        or _rounds(node)
        or (by_size and name in _THRESHOLDS)
        or (len(operands) > 1 and torch.Tag.pointwise in getattr(node.target, "tags", ()))
    ):
        for tensor in operands:
            for axis in range(tensor.dim()):
                if tensor.shape[axis] > 1:
                    yield tensor, axis, axis + value.dim() - tensor.dim()
    else:
        table = partly_read(node, live)
        if table is None:
            return
        source, dim, rank = table
        for axis in range(source.dim()):
            if axis != dim and source.shape[axis] > 1:
                yield source, axis, axis if axis < dim else axis - 1 + rank


def _rounds(node: fx.Node) -> bool:
    """Whether a constant is another one in a type of lower precision."""
    if getattr(node.target, "_schema", node).name not in ("aten::_to_copy", "aten::to"):
        return False
    return all(
        isinstance(t := n.meta["val"], torch.Tensor) and t.is_floating_point() for n in (node, *node.all_input_nodes)
    )


def _array(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().to_dense().cpu() if tensor.layout is not torch.strided else tensor.detach().cpu()
    tensor = tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
    return tensor.resolve_conj().resolve_neg().numpy()
