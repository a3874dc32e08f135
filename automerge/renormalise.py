"""Repair the statistics of a merged network: BatchNorm reset, and REPAIR for any network.

Averaging aligned weights shrinks the variance of the activations (*variance collapse*). `reset_batchnorm` measures the
BatchNorm statistics again; `Repair` rescales every linear map's and convolution's output channels to the statistics of
the networks that were merged, and folds that into weights and biases, so that the architecture stays as it is.

Source: Jordan, Sedghi, Saukh, Entezari, Neyshabur, *REPAIR: REnormalizing Permuted Activations for Interpolation
Repair*, ICLR 2023 (arXiv 2211.08403), section 4 and equations 3-4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from automerge._data import Batches
from automerge._double import own_modes
from automerge._errors import AutomergeError
from automerge._forward import bind, device_of, preserving, run_batch
from automerge._moments import Moments
from automerge._observe import Key
from automerge._repair import (
    Tensors,
    channel_change,
    correct,
    fold,
    make_plan,
    measure,
    watching,
)
from automerge._repair_plan import UNRESET, Norm, Site
from automerge._repair_report import LayerRepair, Renormaliser, RepairReport, as_merged, shares
from automerge.symmetry import Symmetry


# -------------------------------------------------------------------- BatchNorm
def check_reset(model: nn.Module, repair: object) -> None:
    """A reset finds something to reset.

    Raises:
        AutomergeError: if not.
    """
    if repair == "reset" and not batchnorm_names(model):
        raise AutomergeError("repair='reset' needs BatchNorm statistics, and this model has none; leave repair= out")


def batchnorm_names(model: nn.Module) -> tuple[str, ...]:
    """The module paths of the BatchNorms that keep running statistics."""
    return tuple(name for name, _ in _norms(model))


def _norms(model: nn.Module) -> list[tuple[str, _BatchNorm]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None
    ]


@own_modes()
def reset_batchnorm(
    model: nn.Module, data: Any, *, inputs: int = 1, kwargs: Mapping[str, Any] | None = None
) -> tuple[str, ...]:
    """Measure the statistics of every BatchNorm again, **in place**, in one pass over the data.

    Each layer sees its batch normalised by the batch's own statistics, as in training, while everything else (dropout)
    is in eval mode. The running mean becomes the mean over all samples, and the running variance the unbiased variance
    over all samples (batches pooled with their sizes, so unequal batches are exact). Momentum and ``num_batches_tracked``
    stay as they are; the model is left in eval mode, where the statistics are used. BatchNorm1d, 2d, 3d and SyncBatchNorm (on
    any device).

    Args:
        model: the network; only its running statistics are written, and after an error nothing is changed.
        data: batches, see `automerge.merge`.
        inputs: how many of a batch's items are positional inputs.
        kwargs: keyword inputs for every batch.

    Returns:
        The module paths that were reset; empty if the model has no such layer. Not those of which the data give fewer than
        two values per channel (an expert to which a single row is sent): these keep their statistics.

    Raises:
        AutomergeError: if the data are empty, or all batches give every layer one value per channel only.

    Examples:
        >>> model = nn.Sequential(nn.BatchNorm1d(1)).eval()
        >>> reset_batchnorm(model, [torch.tensor([[0.], [2.]]), torch.tensor([[4.]])])
        ('0',)
        >>> model[0].running_mean, model[0].running_var
        (tensor([2.]), tensor([4.]))
    """
    if not isinstance(model, nn.Module):
        raise AutomergeError(f"reset_batchnorm takes a module, got a {type(model).__name__}; load its weights into one")
    norms = _norms(model)
    batches = Batches(data, inputs, kwargs, device_of(model))
    if not norms:
        model.eval()
        return ()
    pooled = {module: Moments() for _, module in norms}
    names = {module: name for name, module in norms}
    largest = dict.fromkeys(pooled, 0)
    before = {module: (_copy(module.running_mean), _copy(module.running_var)) for module in pooled}

    def hook(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        assert isinstance(module, _BatchNorm)
        value = args[0] if args else keywords["input"]
        batch = Moments()
        batch.update(value, 1)
        pooled[module].update(value, 1)
        largest[module] = max(largest[module], batch.count)
        chosen = batch if batch.count > 1 else pooled[module]
        if chosen.count > 1:
            _write(module, chosen.mean, chosen.variance())

    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in pooled]
    done = False
    try:
        with watching(model), preserving(model):  # compiled modules would not call hooks
            for batch in batches:
                run_batch(model, None, batch)
        for module, moments in pooled.items():
            moments.check(names[module])
        if max(largest.values()) == 1:
            raise AutomergeError(
                f"every batch gives the BatchNorm {norms[0][0]!r} one value per channel, which "
                "has no variance; use batches of two samples or more"
            )
        done = True
    finally:
        for handle in handles:
            handle.remove()
        for module, moments in pooled.items():
            new = (moments.mean, moments.variance(unbiased=True)) if done and moments.count > 1 else before[module]
            _write(module, *new)
    model.eval()
    return tuple(names[module] for module, moments in pooled.items() if moments.count > 1)


def _copy(value: torch.Tensor | None) -> torch.Tensor:
    assert value is not None
    return value.detach().clone()


def _write(module: _BatchNorm, mean: torch.Tensor, variance: torch.Tensor) -> None:
    assert module.running_mean is not None
    assert module.running_var is not None
    with torch.no_grad():
        module.running_mean.copy_(mean)
        module.running_var.copy_(variance)


# -------------------------------------------------------------------- REPAIR
@dataclass(frozen=True)
class Repair(Renormaliser):
    """REPAIR: give the merged network's channels the mean and standard deviation that the endpoints have on average.

    For every linear map and convolution whose output channels are free in the symmetry (without a symmetry: all but
    those that make the final output), the targets are the weighted means of the aligned endpoints' per-channel means
    and standard deviations. Layers are corrected in the order of execution, each measured with all earlier ones already
    corrected, and the correction is folded into weight and bias, or, without a bias, into the running mean of the
    BatchNorm that follows. Where there is neither, only the scale is corrected; dead
    channels are left alone; a weight that is used twice, or for something else as well, is skipped and reported.
    Pixels, tokens and samples all count as samples. The merged network is corrected in one pass over the data: the runs of
    several batches wait for each other at every layer, which holds the activations of all of them. Where there are more
    than 64 batches, or they would take more than a quarter of the memory, or the model cannot be copied, every layer runs
    the network up to itself instead, in the memory of one batch.

    Attributes:
        shift: correct the means too; False keeps the merged network's own means (RESCALE).
        reset: measure BatchNorm statistics again on the way; layers that feed a BatchNorm are then left to it.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> same = net.state_dict()
        >>> fixed, report = Repair()(net, same, [same, same], [torch.randn(8, 3)])
        >>> all(torch.allclose(fixed[n], same[n], atol=1e-6) for n in same)
        True
        >>> print(report)
        Repair (repair): 1 layers rescaled, 0 BatchNorms reset
          0.weight: 4 of 4 channels by 1 to 1
          2.weight: left alone, it makes the model's final output
    """

    shift: bool = True
    reset: bool = False

    def __call__(
        self,
        model: nn.Module,
        merged: Mapping[str, torch.Tensor],
        endpoints: Sequence[Mapping[str, torch.Tensor]],
        data: Any,
        *,
        symmetry: Symmetry | None = None,
        weights: Sequence[float] | None = None,
        inputs: int = 1,
        kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[Tensors, RepairReport]:
        """See `Renormaliser`."""
        share = shares(weights, len(endpoints))
        batches = Batches(data, inputs, kwargs, device_of(model))
        with watching(model):
            tensors = bind(model, merged, copy=True)
            plan = make_plan(model, tensors, next(iter(batches)), symmetry, self.reset)
            skipped = dict(plan.skipped)
            targets = _targets([measure(model, bind(model, e, copy=True), batches, plan) for e in endpoints], share)
            layers: list[LayerRepair] = []
            reset: list[str] = []

            def change(step: Site | Norm, moments: Moments) -> tuple[torch.Tensor, torch.Tensor] | None:
                if isinstance(step, Norm):
                    if moments.count > 1:
                        tensors[step.names[0]].copy_(moments.mean)
                        tensors[step.names[1]].copy_(moments.variance(unbiased=True))
                        reset.append(step.name)
                    else:
                        skipped[step.name] = UNRESET
                    return None
                if moments.count == 0 or step.key not in targets:
                    skipped[step.name] = "not every model and batch runs it"
                    return None
                if moments.count < 2:
                    skipped[step.name] = "the data give it one sample, which has no variance; give a few hundred"
                    return None
                return self._fold(step, moments, targets[step.key], tensors, layers)

            correct(model, tensors, batches, plan, change)
        mode = "both" if self.reset else "repair" if self.shift else "rescale"
        return as_merged(tensors, merged, plan.written), RepairReport(mode, tuple(layers), tuple(reset), skipped)

    def _fold(
        self,
        site: Site,
        moments: Moments,
        target: tuple[torch.Tensor, torch.Tensor],
        tensors: Tensors,
        layers: list[LayerRepair],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        eps = torch.finfo(tensors[site.weight.name].dtype).eps
        scale, offset, dead = channel_change(moments, *target, site, shift=self.shift, eps=eps)
        fold(tensors, site, scale, offset)
        active = site.free.to(dead.device) & ~dead
        used = scale[active]
        span = (float(used.min()), float(used.max())) if used.numel() else (1.0, 1.0)
        count, flat = int(active.sum()), int((dead & site.free.to(dead.device)).sum())
        layers.append(LayerRepair(site.name, site.channels, count, flat, site.shiftable, span))
        return scale, (offset if site.norm is None else torch.zeros_like(offset))


def _targets(
    measured: Sequence[Mapping[Key, Moments]], share: Sequence[float]
) -> dict[Key, tuple[torch.Tensor, torch.Tensor]]:
    """The weighted means of the endpoints' means and standard deviations, where every endpoint has them."""
    for number, found in enumerate(measured):
        for key, moments in found.items():
            moments.check(f"{key[1]} of endpoint {number}")
    out = {}
    for key in measured[0]:
        parts = [m[key] for m in measured]
        if all(p.count for p in parts):
            mean = torch.stack([w * p.mean for w, p in zip(share, parts, strict=True)]).sum(0)
            std = torch.stack([w * p.std() for w, p in zip(share, parts, strict=True)]).sum(0)
            out[key] = (mean, std)
    return out
