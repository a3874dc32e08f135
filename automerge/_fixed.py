"""Tensors that all models share and none learned: constants of the architecture, which no alignment may move apart.

These are float buffers and parameters that take no gradient. A group of one network moves its masks and tables along with
its weights. Between networks that hold the same mask (the ordering of an autoregressive network, say) such a move is none:
their average would hold parts of several masks. What differs between the models (a pruning mask, the state of a spectral
norm) belongs to each of them and moves with it.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from automerge._extra_state import weights_of
from automerge._trials import trial_elements
from automerge.infer import infer
from automerge.io import buffer_names
from automerge.symmetry import Symmetry


def shared_constants(network: nn.Module, states: Sequence[Mapping[str, torch.Tensor]]) -> set[str]:
    """State-dict names of the float buffers, and of the parameters without gradient, that are the same in all models."""
    first = states[0]
    frozen = {n for n, p in network.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {
        name
        for name in buffer_names(network) | frozen
        if name in first
        and (first[name].is_floating_point() or first[name].is_complex())
        and all(name in s and torch.equal(s[name].to(first[name]), first[name]) for s in states[1:])
    }


def moved_constants(symmetry: Symmetry, names: Collection[str], state: Mapping[str, torch.Tensor]) -> list[str]:
    """Those of some tensors that the group changes; statistics of a normalisation do not count."""
    touched = symmetry.moved - symmetry.statistics
    wanted = [n for n in sorted(names) if symmetry.aliases.get(n, n) in touched]
    elements = list(trial_elements(symmetry, 2, 0)) if wanted else []
    return [n for n in wanted if any(not torch.equal(e.take(n, state, symmetry.aliases), state[n]) for e in elements)]


def without_cache(model: nn.Module, kwargs: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Keyword inputs that ask a model of transformers not to return its keys and values.

    Their order is no part of what the model says, and as outputs they would pin the attention heads.
    """
    if not isinstance(kwargs, Mapping | None) or "use_cache" in (kwargs or {}):
        return kwargs
    if not getattr(getattr(model, "config", None), "use_cache", False):
        return kwargs
    try:
        known = "use_cache" in inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        return kwargs
    return {**(kwargs or {}), "use_cache": False} if known else kwargs


def infer_common(
    model: nn.Module,
    shared: Collection[str],
    args: Any,
    kwargs: Mapping[str, Any] | None = None,
    *,
    verify: bool = True,
) -> Symmetry:
    """The symmetry of several models: what they share stays.

    Args:
        model: one of them.
        shared: names of the constants that are the same in all.
        args: example inputs.
        kwargs: example keyword inputs; a cache of keys and values is not asked for.
        verify: as for `automerge.infer`.
    """
    kwargs = without_cache(model, kwargs)
    symmetry = infer(model, args, kwargs, verify=verify)
    fixed = moved_constants(symmetry, shared, weights_of(model))
    if not fixed:
        return symmetry
    again = infer(model, args, kwargs, verify=verify, constants=fixed)
    some = ", ".join(fixed[:3]) + (f" and {len(fixed) - 3} more" if len(fixed) > 3 else "")
    note = f"the same in all models, and so kept as constants with the order of what they tell apart: {some}"
    object.__setattr__(again, "notes", (*again.notes, note))
    return again
