"""For other people's test suites: random networks with known symmetry, group elements, checkpoints, and assertions.

Importing this module has no side effects on pytest or hypothesis; the strategies (`networks`, `elements`, `checkpoints`)
need hypothesis and import it when they are first used, the assertions need nothing beyond automerge.

Examples:
    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
    >>> symmetry = assert_sound(net, torch.randn(4, 3))
    >>> [g.size for g in symmetry.generators()]
    [5]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from automerge.testing._assertions import (
    assert_cycle_consistent,
    assert_invariant,
    assert_same_symmetry,
    assert_sound,
)
from automerge.testing._networks import Network, free_positions, rebuild

if TYPE_CHECKING:
    from automerge.testing._strategies import Checkpoints, checkpoints, elements, networks

__all__ = [
    "Checkpoints",
    "Network",
    "assert_cycle_consistent",
    "assert_invariant",
    "assert_same_symmetry",
    "assert_sound",
    "checkpoints",
    "elements",
    "free_positions",
    "networks",
    "rebuild",
]

_LAZY = ("Checkpoints", "checkpoints", "elements", "networks")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from automerge.testing import _strategies

        return getattr(_strategies, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
