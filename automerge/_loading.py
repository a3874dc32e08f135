"""State dicts under the names that the architecture's own loading gives them.

Modules translate what older versions of theirs saved: ``torch.nn.utils.parametrizations.weight_norm`` takes ``weight_g`` and
``weight_v``, BatchNorm keeps its counter where there is none, and hooks of custom modules rename. What
``load_state_dict`` takes as complete is complete here, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from automerge._errors import CheckpointError
from automerge._extra_state import extras, is_extra, load_weights, weights_of, without_extras
from automerge._reading import without_prefix
from automerge.io import StateDict, buffer_names, check_state_dict, load_state_dict, with_ties


def as_loaded(state_dict: Mapping[str, torch.Tensor], model: nn.Module) -> StateDict:
    """A state dict with the model's names where the model itself would load it; else as it is, for a check to refuse.

    Args:
        state_dict: name -> tensor; those that fit keep their memory and dtype. Names that the model ties may be left out.
        model: the architecture; it stays as it is.
    """
    expected = weights_of(model)
    state_dict = without_extras(state_dict, extras(model))
    if state_dict and expected and all(isinstance(name, str) for name in state_dict):
        state_dict = without_prefix(state_dict, expected)  # of a model that was wrapped when it gave this
    out = with_ties(state_dict, expected)
    if out.keys() != expected.keys():
        out = _translated(out, expected, model)
    return {n: _counted(v, expected[n]) if n in expected else v for n, v in out.items()}


def read_checkpoint(path: str, model: nn.Module) -> StateDict:
    """Read a checkpoint of a model, and check that it fits.

    Raises:
        CheckpointError: see `load_state_dict` and `check_state_dict`.
    """
    expected = weights_of(model)
    state = as_loaded(load_state_dict(path, model.state_dict()), model)
    check_state_dict(state, expected, path, buffer_names(model))
    return state


def check_values(network: nn.Module) -> None:
    """A module that is to run, or to be written to, has values.

    Raises:
        CheckpointError: if a parameter or buffer is on the meta device, where nothing is computed or kept.
    """
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if tensor.is_meta:
            raise CheckpointError(f"{name} of the module is on the meta device and has no values; build it on the CPU")


def checked_state(value: Any) -> Mapping[str, torch.Tensor]:
    """A state dict as it was given, without entries that are no tensors and hold none.

    Raises:
        CheckpointError: if it is something else, such as the module itself, or holds something else than tensors that
            may hold weights.
    """
    if not isinstance(value, Mapping):
        raise CheckpointError(
            f"expected a state dict, got a {type(value).__name__}; give the weights of a module as module.state_dict()"
        )
    others = {n: v for n, v in value.items() if not isinstance(v, torch.Tensor)}
    if odd := next((n for n, v in others.items() if not is_extra(v)), None):
        raise CheckpointError(
            f"{odd} is a {type(value[odd]).__name__} that may hold weights, and only tensors can be merged or measured; merge "
            "before the model is quantised, or let its get_extra_state give a tensor"
        )
    return value if not others else {n: v for n, v in value.items() if n not in others}


def check_tied(state_dict: Mapping[str, torch.Tensor], ties: Mapping[str, str], label: str) -> None:
    """Names of one tensor hold equal values.

    Args:
        state_dict: name -> tensor.
        ties: further names of a tensor -> its first name, as from `tied_names` of the architecture's state dict.
        label: how messages call the state dict.

    Raises:
        CheckpointError: if two differ; which of them is meant is not known.
    """
    for alias, name in ties.items():
        one, other = state_dict.get(alias), state_dict.get(name)
        if one is None or other is None or one is other or one.is_meta or other.is_meta or one.shape != other.shape:
            continue
        if one.layout is not torch.strided or one.untyped_storage()._cdata == other.untyped_storage()._cdata:
            continue
        there = other.to(one.device)
        if not (torch.equal(one, there) or bool(((one == there) | ((one != one) & (there != there))).all())):
            raise CheckpointError(
                f"{label}: {alias} and {name} are one tensor in the architecture, but differ here; "
                "leave out the one that is not meant"
            )


def _translated(state: StateDict, expected: Mapping[str, torch.Tensor], model: nn.Module) -> StateDict:
    """What a copy of the model holds after it has loaded a state dict strictly; the same one if it does not."""
    try:
        own = deepcopy(model)
        load_weights(own, state, assign=True)
    except Exception:  # a key that is missing, another shape; a module that cannot be copied
        return state
    made = weights_of(own)
    new = [n for n in expected if n not in state]
    # a load that does not mind missing weights leaves those of the beginning
    if any(made[n].is_meta or (made[n].is_floating_point() and _same(made[n], expected[n])) for n in new):
        return state
    return {n: state[n] if n in state else made[n] for n in expected}


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.device == b.device and a.dtype == b.dtype and torch.equal(a, b)


def _counted(value: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """A counter or an index that was converted to floats along with the weights, as whole numbers again."""
    both = isinstance(value, torch.Tensor) and isinstance(want, torch.Tensor)
    if not both or not value.is_floating_point() or want.is_floating_point() or want.is_complex():
        return value
    if value.is_meta or value.layout is not torch.strided:
        return value
    whole = value.to(want.dtype)
    return whole if torch.equal(whole.to(value.dtype), value) else value
