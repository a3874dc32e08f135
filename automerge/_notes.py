"""What a reader of a symmetry must know of how it was found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx
from torch.utils._pytree import keystr, tree_flatten_with_path

from automerge.rules import Analysis
from automerge.trace import TraceInfo


def of_numbers(positional: Any, keywords: Any) -> str | None:
    """What a reader must know of inputs that are numbers of Python: the recorded pass holds their values."""
    found = []
    for what, given in (("args", positional), ("kwargs", keywords)):
        leaves, _ = tree_flatten_with_path(given)
        found += [f"{what}{keystr(path)} = {value!r}" for path, value in leaves if type(value) in (int, float)]
    return f"the groups hold for the numbers that were given as inputs ({some(found)})" if found else None


def of_writes(recorded: list[fx.GraphModule]) -> str | None:
    """What the recorded pass set, where one after it was recorded, too."""
    if len(recorded) < 2:
        return None
    names = some(recorded[0].meta["trace"].rewritten)
    return f"the first pass writes to {names}; the groups hold for that pass and for later ones"


def of_reach(analysis: Analysis, unused: list[str]) -> list[str]:
    """What the inputs did not reach."""
    notes = []
    if analysis.unread:
        cut = [f"{name} ({int(m.sum()):,} of {m.size:,} numbers)" for name, m in analysis.unread.items()]
        notes.append(
            f"these inputs do not read all of {some(cut)}; the positions left out stay in place, and their other axes "
            "move with what is read"
        )
    if unused:
        notes.append(
            f"the output on these inputs does not depend on {some(unused)}; these stay as they are while the rest moves, so "
            "give inputs that reach them if others do"
        )
    return notes


def of_reads(reads: Mapping[str, str]) -> list[str]:
    """What python reads, and no output depends on: the place of each read, and what the values are of."""
    return [
        f"python reads what is computed with {name} ({where}), and no output depends on that: it stays as it is while the "
        "rest moves, so give inputs for which one does if others do"
        for where, name in reads.items()
    ]


def some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def of_trace(info: TraceInfo) -> list[str]:
    notes = []
    if info.data_dependent:
        places = ", ".join(dict.fromkeys(info.data_dependent[:3]))
        notes.append(
            f"python read values that depend on the data ({places}); the groups hold for the path that these inputs took"
        )
    if info.unregistered:
        places = ", ".join(list(dict.fromkeys(info.unregistered))[:3])
        notes.append(
            f"the model computes with weights that its state dict does not hold ({places}); they are neither matched nor "
            "merged, so keep their modules in an nn.ModuleList, or run the model once if its first pass makes them"
        )
    if info.carried:
        notes.append(
            f"the model holds tensors of an earlier pass ({some(info.carried)}), which were taken as constants: the units "
            "that meet them stay in place; reset them, or give a model that has not run"
        )
    return notes


def of_mixed(shapes: str) -> str | None:
    """On which inputs the groups were not asked to hold."""
    if not shapes:
        return None
    return (
        f"on inputs of the shapes {shapes} the model mixes the entries of a batch (its output has other rows than the input): "
        "the groups hold for inputs like the example"
    )


def of_precision(dtype: str) -> str | None:
    """In what the groups were checked, if that is not float64."""
    if dtype == "float64":
        return None
    return (
        f"the model does not run in float64: the groups were verified in {dtype}, which shows changes of 1e-4 and more"
    )
