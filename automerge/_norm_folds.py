"""BatchNorm folded into the linear map or convolution before it, the architecture as it is: a gauge.

``BN(W x + b) = gamma (W x + b - mean) / sqrt(var + eps) + beta`` is computed as well by ``W' = s W``, ``s = gamma / sqrt(var +
eps)``, with the statistics at 0 and 1 - eps and gamma at 1; what is constant goes into b or, without one, into beta or the
running mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from automerge._observe import Event, Key, Observer, View


@dataclass(frozen=True)
class NormFold:
    """A BatchNorm whose only input is the output of a linear map or convolution.

    Attributes:
        norm: its module path.
        eps: its epsilon.
        weight: the output channels of the map before it.
        bias: that map's bias, if it has one.
        mean: the name of the running mean.
        variance: the name of the running variance.
        gain: the name of gamma, if there is one.
        shift: the name of beta, if there is one.
    """

    norm: str
    eps: float
    weight: View
    bias: View | None
    mean: str
    variance: str
    gain: str | None
    shift: str | None

    def apply(self, state: Mapping[str, torch.Tensor]) -> None:
        """Fold, in place, in a state dict of float64 tensors."""
        mean, variance = state[self.mean], state[self.variance]
        scale = (variance + self.eps).rsqrt()
        if self.gain is not None:
            scale *= state[self.gain]
            state[self.gain].fill_(1.0)
        weight = _part(state, self.weight)
        weight.mul_(scale.view([-1 if k == self.weight.axis else 1 for k in range(weight.ndim)]))
        constant = -mean * scale
        mean.zero_()
        variance.fill_(1.0 - self.eps)
        if self.bias is not None:
            own = _part(state, self.bias)
            own.mul_(scale.view(own.shape)).add_(constant.view(own.shape))
            if self.shift is not None:
                own.add_(state[self.shift].view(own.shape))
                state[self.shift].zero_()
        elif self.shift is not None:
            state[self.shift].add_(constant)
        else:
            mean.sub_(constant)


def _part(state: Mapping[str, torch.Tensor], view: View) -> torch.Tensor:
    return state[view.name].narrow(view.axis, view.start, view.stop - view.start)


class NormFinder:
    """Watches a run of a model and collects the folds that its calls suggest; whether they hold is for a test."""

    def __init__(self, model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
        self.found: dict[str, NormFold] = {}
        self.observer = Observer(tensors, self._listen)
        self._modules = dict(model.named_modules())
        self._tensors = tensors
        self._maps: dict[Key, tuple[View, View | None]] = {}

    def _listen(self, event: Event) -> None:
        if event.names is not None:
            before = next((self._maps[key] for key in reversed(event.follows) if key in self._maps), None)
            if before is not None:
                self._add(*before, *event.names)
        elif event.weight is not None:
            if event.foldable and event.groups == 1:
                self._maps[event.key] = (event.weight, event.bias)
        elif event.bias is not None:
            for key in event.follows:
                if key in self._maps and self._maps[key][1] is None:
                    self._maps[event.key] = (self._maps[key][0], event.bias)

    def _add(self, weight: View, bias: View | None, mean: str, variance: str) -> None:
        path = mean.rpartition(".")[0]
        module: Any = self._modules.get(path)
        if isinstance(module, _BatchNorm):
            gain, shift = (f"{path}.{n}" if path else n for n in ("weight", "bias"))
            self.found[path] = NormFold(
                path,
                module.eps,
                weight,
                bias,
                mean,
                variance,
                gain if gain in self._tensors else None,
                shift if shift in self._tensors else None,
            )
