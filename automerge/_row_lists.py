"""Lists of positions that a program takes from a tensor and uses as an index: ``h[None, rows.tolist()]``.

As an index such a list says what its tensor does, so the tensor takes its place and nothing was read. Whatever else is done
with it reads its numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch

_INDEXING = (torch.Tensor.__getitem__, torch.Tensor.__setitem__)
_TELLING_NOTHING = ("__len__", "__class__", "__getattribute__", "__new__", "__init__", "__init_subclass__", "__hash__",
                    "__subclasshook__", "__class_getitem__", "__setattr__", "__delattr__", "__dir__", "__sizeof__")  # fmt: skip


class RowList(list[int]):
    """The numbers of a vector, which notes where they are used.

    Attributes:
        tensor: the vector.
        note: told once where the numbers were read.
        place: where the program is now.
        used: whether the list was an index.
        looks: the instructions that looked at the numbers -> where they are.
    """

    tensor: torch.Tensor
    note: Callable[[str], None]
    place: Callable[[], str]
    used: bool
    looks: dict[Any, str]

    def look(self, frame: FrameType) -> None:
        """Note a look at the numbers; an index is looked at before the tensor that it is for is asked."""
        self.looks.setdefault((frame.f_code, frame.f_lasti), self.place())

    def as_index(self, frame: FrameType) -> torch.Tensor:
        """The vector, where the list is an index."""
        self.looks.pop((frame.f_code, frame.f_lasti), None)
        self.used = True
        return self.tensor


def _looking(name: str) -> Callable[..., Any]:
    def method(self: RowList, *args: Any, **kwargs: Any) -> Any:
        self.look(sys._getframe(1))
        return getattr(list, name)(self, *args, **kwargs)

    return method


for _name in dir(list):
    if _name not in _TELLING_NOTHING and callable(getattr(list, _name)):
        setattr(RowList, _name, _looking(_name))


def row_list(
    tensor: torch.Tensor, values: list[int], note: Callable[[str], None], place: Callable[[], str]
) -> RowList | None:
    """The list of a vector of whole numbers; None for another tensor."""
    if tensor.dim() != 1 or tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool:
        return None
    out = RowList(values)
    out.tensor, out.note, out.place, out.used, out.looks = tensor, note, place, False, {}
    return out


def as_tensors(func: Any, args: Any, kwargs: Any, frame: FrameType) -> tuple[Any, Any]:
    """The arguments of a function with tensors in the place of lists that are indices; all others are looked at.

    Args:
        func: the function.
        args: its positional arguments.
        kwargs: its keyword arguments.
        frame: that calls it.
    """
    indexing = func in _INDEXING
    args = tuple(_taken(a, indexing and k == 1, frame) for k, a in enumerate(args))
    return args, {k: _taken(v, False, frame) for k, v in kwargs.items()} if kwargs else kwargs


def _taken(value: Any, index: bool, frame: FrameType) -> Any:  # (a closure would keep the frame, and its lists, alive)
    if isinstance(value, RowList):
        return value.as_index(frame) if index else list(value)
    if type(value) in (tuple, list) and any(isinstance(v, RowList | tuple | list) for v in value):
        return type(value)(_taken(v, index and type(value) is tuple, frame) for v in value)
    return value


def end(lists: list[RowList]) -> None:
    """Note which lists were read: looked at, returned or kept, or no index."""
    while lists:
        one = lists.pop()
        if one.looks or not one.used or sys.getrefcount(one) > 2:
            one.note(next(iter(one.looks.values()), "where it is returned or kept"))
