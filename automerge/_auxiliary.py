"""Parts that a model runs only while it is trained: auxiliary heads (GoogLeNet, deep supervision)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from types import MethodType

from torch import nn

from automerge.symmetry import Symmetry

_CONTAINERS = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@contextlib.contextmanager
def trained(model: nn.Module) -> Iterator[None]:
    """Within, what is made of other modules believes that it is trained when it is told to evaluate.

    Layers evaluate: nothing is dropped, and statistics are those of the state.

    Examples:
        >>> model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(3))
        >>> with trained(model):
        ...     [m.training for m in model.eval().modules()]
        [True, False, False]
        >>> [m.training for m in model.eval().modules()]
        [False, False, False]
    """
    before = vars(model).get("train")
    vars(model)["train"] = MethodType(_partly, model)  # what eval() calls; copies made within have one of their own
    try:
        yield
    finally:
        del vars(model)["train"]
        if before is not None:
            vars(model)["train"] = before


def _partly(self: nn.Module, mode: bool = True) -> nn.Module:
    for module in self.modules():
        module.training = any(True for _ in module.children()) and not any(
            base.__module__.startswith("torch.nn.modules") and base not in _CONTAINERS for base in type(module).__mro__
        )
    return self


def keeps(larger: Symmetry, symmetry: Symmetry) -> bool:
    """Whether a symmetry has as many elements as another, and moves more positions."""
    return _order(larger) >= _order(symmetry) and _moving(larger) > _moving(symmetry)


def _order(symmetry: Symmetry) -> float:
    """The logarithm of the number of elements, what is nested counted apart."""
    sizes = [g.size for g in symmetry.sets] + [e.size for e in symmetry.exchanges]
    return sum(math.lgamma(size + 1) for size in sizes)


def _moving(symmetry: Symmetry) -> int:
    return sum(slot.index.size for g in symmetry.sets for slot in g.slots)
