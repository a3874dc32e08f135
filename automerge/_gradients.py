"""Models that differentiate inside their forward pass, and leave it to the caller that gradients are on.

(The residual of a differential equation, forces as the derivative of an energy.) automerge runs models without gradients,
which takes less memory; a model whose pass fails for that is run with them from then on.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import nn

_WITHOUT = "does not require grad"  # in the errors of torch.autograd.grad and of backward
_needing: dict[int, weakref.ref[nn.Module]] = {}
T = TypeVar("T")


def needs_gradients(model: nn.Module) -> bool:
    """Whether a pass of this very module has failed without gradients."""
    known = _needing.get(id(model))
    return known is not None and known() is model


@contextmanager
def as_needed(model: nn.Module) -> Iterator[None]:
    """Gradients for a pass of a model that needs them; others run as the caller has it."""
    with torch.enable_grad() if needs_gradients(model) else nullcontext():
        try:
            yield
        except RuntimeError as error:
            if _WITHOUT in str(error) and not torch.is_grad_enabled():
                _note(model)
            raise


def _note(model: nn.Module) -> None:
    key = id(model)
    _needing[key] = weakref.ref(model, lambda _: _needing.pop(key, None))


def as_original(copy: nn.Module, model: nn.Module) -> None:
    """A copy of a model needs what the model needs."""
    if needs_gradients(model):
        _note(copy)


def copy_of(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of an input, of which a gradient can be taken where it can of the input itself."""
    return asking(tensor.detach().clone(), tensor)


def asking(new: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """An input in the place of another one, of which gradients are asked if they were of that one."""
    return new.requires_grad_() if like.requires_grad and new.is_leaf else new


def passed(model: nn.Module, run: Callable[[], T]) -> T:
    """What a function gives that runs a model `as_needed`: called again where that shows that the model needs gradients."""
    known = needs_gradients(model)
    try:
        return run()
    except Exception:
        if known or not needs_gradients(model):
            raise
    return run()
