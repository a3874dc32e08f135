"""Whether a recorded graph computes what the model computes, on other inputs too."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from automerge._difference import relative_difference
from automerge._forward import preserving
from automerge._gradients import as_needed, copy_of
from automerge._random import forked
from automerge._subject import fresh_inputs, runnable
from automerge._tree_io import map_tensors, tensors_of
from automerge.trace import normalise_args, prepared


def check_replay(model: nn.Module, args: Any, kwargs: Any, graph: fx.GraphModule) -> str | None:
    """A note if the recorded graph and the model disagree on fresh inputs: the path depended on data."""
    positional, keywords = normalise_args(args, kwargs)
    info = graph.meta["trace"]
    if info.rewritten:
        names = list(dict.fromkeys(info.rewritten))[:3]
        return f"the forward pass writes to {', '.join(names)}; the trace holds for their present values"
    if any(word in str(n.target) for n in graph.graph.nodes for word in ("rand", "bernoulli", "normal")):
        return "the forward pass draws random numbers; the groups hold for any fixed draw"
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))

    def run(args: Any, kwargs: Any) -> Any:
        own = map_tensors(lambda _, t: copy_of(t), (args, kwargs))  # a model may write to them
        with as_needed(model):
            return model(*own[0], **own[1])

    try:
        with torch.no_grad(), prepared(model), preserving(model), forked():
            how, found = runnable(run, positional, keywords, 1)
            given = fresh_inputs(positional, keywords, 1, how)
            fed = [t.clone() for t in tensors_of_in_order(given)]
            replayed = graph(*(tensors[n].detach().clone() for n in info.names.values()), *fed)
            expected = tensors_of(run(*given) if found is None else found)
        same = (
            relative_difference(
                *([t.detach() if t.is_complex() else t.detach().double() for t in o] for o in (expected, replayed))
            )
            < 1e-2
        )
    except Exception as error:
        return (
            f"the recorded graph does not replay on other inputs ({type(error).__name__}); the groups hold for its path"
        )
    if same:
        return None
    return "on other inputs the model takes another path than the recorded one; the groups hold for the recorded path"


def tensors_of_in_order(given: tuple[Any, Any]) -> list[torch.Tensor]:
    """The input tensors in the order in which `trace` makes placeholders."""
    found: list[torch.Tensor] = []
    map_tensors(lambda _, t: found.append(t) or t, given[0])  # type: ignore[func-returns-value]
    map_tensors(lambda _, t: found.append(t) or t, given[1])  # type: ignore[func-returns-value]
    return found
