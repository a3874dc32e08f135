"""Repair without data: keep the rows' norms, or match the moments that Gaussian inputs would give.

Both need one example input, for the shapes; its values do not matter. They know less than `automerge.Repair`, which
measures: use them where there are no data at all, and look at what the report skips.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx, nn

from automerge._data import Batch, Batches
from automerge._errors import AutomergeError
from automerge._forward import bind, device_of
from automerge._gauss import Gaussian
from automerge._moments import Moments
from automerge._propagation import propagate
from automerge._repair import Tensors, channel_change, fold, make_plan, watching
from automerge._repair_plan import Site
from automerge._repair_report import LayerRepair, Renormaliser, RepairReport, as_merged, shares
from automerge.symmetry import Symmetry
from automerge.trace import trace


@dataclass(frozen=True)
class RowNorms(Renormaliser):
    """Give every free output channel's weights the norm that the endpoints' have on average.

    Averages of vectors that do not agree are shorter than the vectors; for white inputs the norm of a row is its
    output's standard deviation. With ``bias`` the bias is scaled along. For N models, without data.

    Attributes:
        bias: scale the bias by the same factor; else it stays.

    Examples:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> a = net.state_dict()
        >>> b = {n: -v if n == "0.weight" else v for n, v in a.items()}
        >>> merged = {n: 0.75 * a[n] + 0.25 * b[n] for n in a}
        >>> fixed, report = RowNorms()(net, merged, [a, b], torch.ones(1, 2))
        >>> torch.allclose(fixed["0.weight"], a["0.weight"])
        True
    """

    needs_data: ClassVar[bool] = False

    bias: bool = False

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
        batch = next(iter(Batches(data, inputs, kwargs, device_of(model))))
        layers = []
        with watching(model):
            tensors = bind(model, merged, copy=True)
            ends = [bind(model, e) for e in endpoints]
            plan = make_plan(model, tensors, batch, symmetry, False)
            for site in plan.steps:
                assert isinstance(site, Site)
                wanted = sum(w * _norms(e, site) for w, e in zip(share, ends, strict=True))
                now = _norms(tensors, site)
                dead = (now <= 0) | (torch.as_tensor(wanted) <= 0)
                active = site.free.to(now.device) & ~dead
                scale = torch.where(active, wanted / torch.where(dead, 1.0, now), 1.0)
                before = None if self.bias or site.bias is None else tensors[site.bias.name].clone()
                fold(tensors, site, scale, torch.zeros_like(scale))
                if before is not None and site.bias is not None:
                    tensors[site.bias.name].copy_(before)
                layers.append(_layer(site, scale, active, dead, site.bias is not None))
        return as_merged(tensors, merged, plan.written), RepairReport("row norms", tuple(layers), (), plan.skipped)


def _norms(tensors: Tensors, site: Site) -> torch.Tensor:
    """The norm of each output channel's weights, float64."""
    view, weight = site.weight, tensors[site.weight.name]
    if site.groups > 1:
        part = weight.view(site.groups, -1, *weight.shape[1:]).movedim(2, 1).reshape(site.channels, -1)
    else:
        part = weight.narrow(view.axis, view.start, view.stop - view.start).movedim(view.axis, 0).flatten(1)
    return part.reshape(site.channels, -1).double().norm(dim=1)


@dataclass(frozen=True)
class GaussianRepair(Renormaliser):
    """REPAIR against predicted moments: no data, only the weights and the shape of an input.

    Means and covariances of a Gaussian input are propagated through the traced graph of every endpoint and of the merged
    network (`automerge._propagation`: exact per channel for linear maps, ReLU and smooth activations, covariances to first
    order). Layer after layer, scale and shift (a calibrated bias) of each free channel match the endpoints' weighted mean.
    A layer is left alone if its mean predicted variance in the merged network is at least ``gate`` of the endpoints': a
    prediction is no reason to touch what has not collapsed. Layers whose moments cannot be predicted are skipped with the
    reason.

    Attributes:
        gate: between 0 (touch nothing) and 1.
        shift: calibrate biases too.
        mean: of the inputs' entries.
        std: of the inputs' entries, taken as independent.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> nets = [nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2)).state_dict() for _ in range(2)]
        >>> merged = {n: (nets[0][n] + nets[1][n]) / 2 for n in nets[0]}
        >>> model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2))
        >>> fixed, report = GaussianRepair()(model, merged, nets, torch.ones(1, 8))
        >>> [(layer.name, layer.corrected) for layer in report.layers]
        [('0.weight', 64)]
    """

    needs_data: ClassVar[bool] = False

    gate: float = 0.95
    shift: bool = True
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.gate <= 1 or not self.std > 0:
            raise AutomergeError(f"{self}: gate must be from 0 to 1, and std positive")

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
        batch = next(iter(Batches(data, inputs, kwargs, device_of(model))))
        with watching(model):
            tensors = bind(model, merged, copy=True)
            plan = make_plan(model, tensors, batch, symmetry, False)
            graph = trace(model, batch.args, batch.kwargs, values=False)
            run = _Prediction(self, graph, {s.weight.name: s for s in plan.steps if isinstance(s, Site)}, batch)
            targets = run.targets([bind(model, e) for e in endpoints], share)
            layers, kept, unknown = run.correct(tensors, targets)
        skipped = {**plan.skipped, **kept}
        done = {layer.name for layer in layers}
        for step in plan.steps:
            if isinstance(step, Site) and step.name not in done and step.name not in skipped:
                skipped[step.name] = f"its moments cannot be predicted ({unknown or 'it reads no whole weight'})"
        return as_merged(tensors, merged, plan.written), RepairReport("gaussian", tuple(layers), (), skipped)


@dataclass
class _Prediction:
    """Moments at the sites of one graph."""

    options: GaussianRepair
    graph: fx.GraphModule
    sites: dict[str, Site]
    batch: Batch
    seen: dict[str, int] = field(default_factory=dict)

    def _propagate(self, tensors: Tensors, on_site: Any) -> str:
        state = {n: t.cpu() for n, t in tensors.items()}
        lost = propagate(self.graph, state, on_site, (self.options.mean, self.options.std))
        return next(iter(lost.values()), "")

    def targets(self, ends: Sequence[Tensors], share: Sequence[float]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """The weighted means of the endpoints' predicted means and standard deviations, where every endpoint has them."""
        found: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for end, weight in zip(ends, share, strict=True):

            def note(_: fx.Node, name: str, value: Gaussian, weight: float = weight) -> None:
                std = value.variance.clamp(min=0).sqrt()
                found.setdefault(name, []).append((weight * value.mean, weight * std))

            self._propagate(end, note)
        out = {}
        for name, parts in found.items():
            if len(parts) == len(ends):
                out[name] = (torch.stack([p[0] for p in parts]).sum(0), torch.stack([p[1] for p in parts]).sum(0))
        return out

    def correct(
        self, tensors: Tensors, targets: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[list[LayerRepair], dict[str, str], str]:
        """Fold the corrections in, layer after layer; what was changed, what was kept, and what could not be predicted."""
        layers: list[LayerRepair] = []
        kept: dict[str, str] = {}

        def change(_: fx.Node, name: str, value: Gaussian) -> tuple[torch.Tensor, torch.Tensor] | None:
            site = self.sites.get(name)
            if site is None or name not in targets or len(value.mean) != site.channels:
                return None
            mean, std = targets[name]
            ratio = float(value.variance.sum() / std.square().sum().clamp(min=torch.finfo(torch.float64).tiny))
            if ratio >= self.options.gate:
                kept[site.name] = f"its predicted variance is {ratio:.1%} of the endpoints'"
                return None
            moments = Moments()
            moments.count, moments.mean, moments.square = 1, value.mean, value.variance.clamp(min=0)
            eps = torch.finfo(tensors[name].dtype).eps
            scale, offset, dead = channel_change(moments, mean, std, site, shift=self.options.shift, eps=eps)
            device = tensors[name].device
            fold(tensors, site, scale.to(device), offset.to(device))
            active = site.free.cpu() & ~dead
            layers.append(_layer(site, scale, active, dead, site.shiftable))
            return scale, (offset if site.norm is None else torch.zeros_like(offset))

        return layers, kept, self._propagate(tensors, change)


def _layer(site: Site, scale: torch.Tensor, active: torch.Tensor, dead: torch.Tensor, shifted: bool) -> LayerRepair:
    used = scale[active]
    span = (float(used.min()), float(used.max())) if used.numel() else (1.0, 1.0)
    flat = int((dead & site.free.to(dead.device)).sum())
    return LayerRepair(site.name, site.channels, int(active.sum()), flat, shifted, span)
