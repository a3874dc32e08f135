"""What a recorded pass leaves on the model for the next one, which is recorded as well where it reads any of that.

A recurrence whose state is kept between calls shows in its first pass neither what multiplies that state nor that it moves.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import fx, nn

from automerge._readers import Readers
from automerge._recorder import Recorder
from automerge._restoring import kept_tensors
from automerge._tree_io import tensors_of


def end_first(recorder: Recorder, model: nn.Module, result: Any) -> bool:
    """Note the nodes of a pass's outputs and of what it leaves in the state; whether it left anything else on a module."""
    with torch.no_grad():
        recorder.outputs = tuple(map(recorder.node_of, tensors_of(result)))
    now = _end(recorder, model)
    recorder.replaced += [n.meta["name"] for t, n in recorder.states if now.get(n.meta["name"], t) is not t]
    own = {id(t) for t in now.values()} - {id(t) for m in model.modules() for t in _volatile(m)}
    held = (t for t in kept_tensors(model) if id(t) not in own and recorder.knows(t))
    return any(_computed(recorder, recorder.node_of(t)) for t in held)


def add_further(recorder: Recorder, model: nn.Module, args: Any, kwargs: Any) -> None:
    """Record a further pass; none of it stays if its outputs need nothing that the first one computed, or it fails."""
    first = set(recorder.graph.nodes)
    info = {f.name: len(getattr(recorder.info, f.name)) for f in fields(recorder.info) if f.name != "outputs"}
    nodes: list[fx.Node] = []
    with contextlib.suppress(Exception):  # a cache that is full, say
        with recorder, Readers(recorder):
            result = model(*args, **kwargs)
        nodes = [recorder.node_of(t) for t in tensors_of(result)]
    recorder.at.again()
    made = [n for n in recorder.graph.nodes if n not in first]
    looked = [n for n in made if n.name in recorder.info.reads]
    if nodes and any(n in first and _computed(recorder, n) for n in _behind([*nodes, *looked], first)):
        recorder.info.reads += [n.name for n in nodes]  # they must not change either
        _end(recorder, model)
        return
    for name, length in info.items():
        held = getattr(recorder.info, name)
        if isinstance(held, list):
            del held[length:]
    for node in reversed(made):
        recorder.graph.erase_node(node)


def _end(recorder: Recorder, model: nn.Module) -> dict[str, torch.Tensor]:
    """Note what is left in the state; all that the model holds under a name."""
    named = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    now: dict[str, torch.Tensor] = dict(itertools.chain(*named))
    with torch.no_grad():
        for tensor, node in recorder.states:
            after = recorder.node_of(now.get(node.meta["name"], tensor))
            if after is not node:
                recorder.after.append((node, after))
    return now


def _behind(nodes: list[fx.Node], first: set[fx.Node]) -> set[fx.Node]:
    """The nodes that some depend on, as far back as those of the first pass."""
    found: set[fx.Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += [] if node in first else node.all_input_nodes
    return found


def _computed(recorder: Recorder, node: fx.Node) -> bool:
    return node.op == "call_function" and node in recorder.varying


def _volatile(module: nn.Module) -> Iterator[torch.Tensor]:
    """Buffers that are no part of the state."""
    held = module._non_persistent_buffers_set
    return (t for name, t in module._buffers.items() if name in held and t is not None)
