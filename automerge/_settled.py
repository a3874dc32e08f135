"""Models whose first pass sets what they are made of."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from automerge._copies import copied
from automerge._extra_state import held_tensors
from automerge._gradients import as_needed
from automerge._random import forked
from automerge._tree_io import map_tensors
from automerge.trace import normalise_args, prepared


def settled(model: nn.Module, args: Any, kwargs: Mapping[str, Any] | None, graph: fx.GraphModule) -> nn.Module | None:
    """A copy of a model as a pass leaves it, where that pass writes to the model's parameters; else None.

    (Scales that the first batch sets, as a flag says that is part of the state.) Only what a checkpoint holds is kept.
    """
    rewritten = graph.meta["trace"].rewritten
    if not rewritten:
        return None
    positional, keywords = map_tensors(lambda _, t: t.clone(), normalise_args(args, kwargs))
    with contextlib.suppress(Exception), torch.no_grad():
        own = held_tensors(model)
        if not any(own[name].is_floating_point() or own[name].is_complex() for name in rewritten if name in own):
            return None
        out = copied(model)
        with prepared(out), forked(), as_needed(out):
            out(*positional, **keywords)
            left = {name: t.detach().clone() for name, t in held_tensors(out).items()}
        for name, tensor in held_tensors(out).items():
            tensor.copy_(left[name])  # a flag may have been replaced, which leaving undid
        return out
    return None
