"""What a trace knows beside its graph."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from functools import cache

import torch

_TORCH_DIR = os.path.dirname(torch.__file__) + os.sep  # torchvision's files are a model's own
_HERE = os.path.dirname(__file__) + os.sep


@dataclass
class TraceInfo:
    """What a trace knows beside its graph; found at ``graph_module.meta["trace"]``.

    Attributes:
        names: placeholder name -> state-dict name, for parameters and persistent buffers.
        aliases: further state-dict names of tied tensors -> the first name.
        inputs: placeholder name -> path of the tensor in ``(args, kwargs)``.
        outputs: the number of output tensors.
        data_dependent: where a python value was read from a tensor that depends on inputs or parameters.
        reads: nodes whose values python read (``.item()``, ``.tolist()``, ``if tensor``); they must not change either.
        again: those of them that are the change of a parameter that the pass writes to -> its state-dict name.
        rewritten: state-dict names that the forward pass writes to (they are put back).
        unknown: places where a tensor of unknown provenance entered (treated as a constant).
        unregistered: places where one of them is a parameter, which the state dict does not hold.
        carried: attributes that held tensors of an earlier pass, which this pass read as constants and replaced.
        buffers: state-dict name -> the model's own buffer, for the persistent ones.
        overlaps: ``(name, other, places)``: state-dict tensors in one memory under several shapes; entry i of ``name`` is
            entry ``places[i]`` of ``other``, or none of its entries where that is -1.
    """

    names: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    outputs: int = 0
    data_dependent: list[str] = field(default_factory=list)
    reads: list[str] = field(default_factory=list)
    again: dict[str, str] = field(default_factory=dict)
    rewritten: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    unregistered: list[str] = field(default_factory=list)
    carried: list[str] = field(default_factory=list)
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)
    overlaps: list[tuple[str, str, torch.Tensor]] = field(default_factory=list)


def source_line() -> str:
    """``file:line`` of the model's own code that is running; empty if none is."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not _between(name):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


@cache
def _between(filename: str) -> bool:
    """Whether code stands between a model and its operators: this package's, PyTorch's, generated code."""
    return filename.startswith((_TORCH_DIR, _HERE, "<"))
