"""Least squares: refit each layer of a merged network so that it gives what the merged models give on average.

This is training, in closed form, on a few hundred unlabelled samples; it is a tier of its own and is reported as ``fit``.

Source: Nasery, Hayase, Koh, Oh, *PLeaS: Merging Models with Permutations and Least Squares*, CVPR 2025 (arXiv 2407.02447),
section 4.2.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from automerge._data import Batch, Batches
from automerge._errors import AutomergeError
from automerge._forward import bind, device_of, run_batch
from automerge._observe import Event, Observer
from automerge._repair import Reached, Tensors, make_plan, measure_one, watching
from automerge._repair_plan import UNRESET, Norm, Site
from automerge._repair_report import LayerRepair, Renormaliser, RepairReport, as_merged, shares
from automerge.symmetry import Symmetry

_ROUNDING = 1e3  # what the layers before make of the last digit, in units of it


@dataclass(frozen=True)
class LeastSquares(Renormaliser):
    """Refit every linear map and convolution, one after the other, to the mean of the aligned endpoints' outputs.

    For each layer in the order of execution, with X its inputs in the merged network whose earlier layers are refitted
    already, and Y the weighted mean of the aligned endpoints' outputs of that layer on the same samples, the new weights
    minimise ``||X W^T + b - Y||^2 / samples + ridge * (trace S_xx / fan_in) ||W - W_merged||^2``: where the data say
    little, the merged weights stay. (So do those of an input that is the same in all samples: every weight is held a little
    more, by what rounding may make of its input's mean square.) All layers are refitted, the last one too, so the result
    approaches the ensemble's mean output. BatchNorm statistics are measured again on the way. Grouped, transposed and
    three-dimensional convolutions, and weights that are used twice, are left alone and reported.

    **This is fitting**: the weights adapt to the data given. Report it as such, and never on those data.

    Memory is ``fan_in^2`` numbers per layer; every layer runs the merged network and all endpoints up to itself.

    Attributes:
        ridge: how strongly the merged weights hold, relative to the inputs' mean variance.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> same = net.state_dict()
        >>> fixed, report = LeastSquares()(net, same, [same, same], [torch.randn(50, 3)])
        >>> all(torch.allclose(fixed[n], same[n], atol=1e-5) for n in same)
        True
        >>> report.mode, [layer.name for layer in report.layers]
        ('fit', ['0.weight', '2.weight'])
    """

    fits: ClassVar[bool] = True

    ridge: float = 1e-3

    def __post_init__(self) -> None:
        if not self.ridge > 0:
            raise AutomergeError(f"LeastSquares(ridge={self.ridge}): expected a positive number")

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
        """See `Renormaliser`; the symmetry is not needed."""
        share = shares(weights, len(endpoints))
        batches = Batches(data, inputs, kwargs, device_of(model))
        layers: list[LayerRepair] = []
        reset: list[str] = []
        with watching(model):
            tensors = bind(model, merged, copy=True)
            ends = [bind(model, e, copy=True) for e in endpoints]
            plan = make_plan(model, tensors, next(iter(batches)), None, True, whole=True)
            skipped = dict(plan.skipped)
            for step in plan.steps:
                if isinstance(step, Norm):
                    moments = measure_one(model, tensors, batches, step, plan.written)
                    if moments.count > 1:
                        tensors[step.names[0]].copy_(moments.mean)
                        tensors[step.names[1]].copy_(moments.variance(unbiased=True))
                        reset.append(step.name)
                    else:
                        skipped[step.name] = UNRESET
                    continue
                sums = _Sums(plan.written)
                reason = sums.gather(model, tensors, ends, share, batches, step)
                if reason:
                    skipped[step.name] = reason
                else:
                    layers.append(self._refit(step, sums, tensors))
        return as_merged(tensors, merged, plan.written), RepairReport("fit", tuple(layers), tuple(reset), skipped)

    def _refit(self, site: Site, sums: _Sums, tensors: Tensors) -> LayerRepair:
        weight, view = tensors[site.weight.name], site.weight
        part = weight.narrow(view.axis, view.start, view.stop - view.start).movedim(view.axis, 0)
        old = part.reshape(part.shape[0], -1).double()
        own, cross, x, y = sums.second(centred=site.shiftable)
        hold = self.ridge * own.trace() / len(own) + self._rounding(weight.dtype) * sums.squares
        if not bool((hold > 0).any()):  # nothing comes in: any weights do
            new = old
        else:
            hold = hold.clamp(min=torch.finfo(hold.dtype).tiny)
            new = torch.linalg.solve(own + hold.diag(), cross + hold[:, None] * old.T).T
        part.copy_(new.reshape(part.shape))
        if site.bias is not None:
            bias = site.bias
            target = tensors[bias.name].narrow(bias.axis, bias.start, bias.stop - bias.start)
            target.copy_((y - new @ x).reshape(target.shape))
        wanted = sums.spread(centred=site.shiftable)
        left = wanted - 2 * (new * cross.T).sum() + ((new @ own) * new).sum()
        ratio = (new.norm(dim=1) / old.norm(dim=1).clamp(min=torch.finfo(torch.float64).tiny))[old.norm(dim=1) > 0]
        span = (float(ratio.min()), float(ratio.max())) if ratio.numel() else (1.0, 1.0)
        seen = wanted > self._rounding(weight.dtype) * sums.spread(centred=False)
        error = float((left / wanted).clamp(min=0)) if seen else 0.0
        return LayerRepair(site.name, site.channels, site.channels, 0, site.shiftable, span, error)

    def _rounding(self, dtype: torch.dtype) -> float:
        """Below which part of its mean square the variance of an input says nothing: it may be rounding."""
        return min(
            self.ridge, max((_ROUNDING * torch.finfo(dtype).eps) ** 2, _ROUNDING * torch.finfo(torch.float64).eps)
        )


class _Sums:
    """Sums of products of a layer's inputs with themselves and with the outputs it shall give, float64."""

    def __init__(self, written: Collection[str]) -> None:
        self.written = written
        self.count = 0
        self.parts: list[torch.Tensor] = []

    def gather(
        self,
        model: nn.Module,
        tensors: Tensors,
        ends: Sequence[Tensors],
        share: Sequence[float],
        batches: Batches,
        site: Site,
    ) -> str | None:
        """One pass over the data; the reason if the layer cannot be refitted."""
        for batch in batches:
            rows, _ = _at(model, tensors, batch, site, self.written)
            outputs = [_at(model, end, batch, site, self.written, rows_too=False)[1] for end in ends]
            if isinstance(rows, str):
                return rows
            if rows is None or any(o is None or o.shape[0] != rows.shape[0] for o in outputs):
                return "not every model and batch runs it"
            x = rows.double()
            y = torch.stack([w * o.double() for w, o in zip(share, outputs, strict=True) if o is not None]).sum(0)
            fresh = [x.sum(0), y.sum(0), x.T @ x, x.T @ y, y.square().sum(0)]
            if not all(bool(torch.isfinite(part).all()) for part in fresh):
                raise AutomergeError(
                    f"activations at {site.name} are NaN or infinite, or too large to square; check the data and the models"
                )
            self.parts = [a + b for a, b in zip(self.parts, fresh, strict=True)] if self.count else fresh
            self.count += len(x)
        return None if self.count else "the data give it no sample"

    def second(self, *, centred: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """``S_xx``, ``S_xy`` and the means of x and y."""
        x, y = self.parts[0] / self.count, self.parts[1] / self.count
        own, cross = self.parts[2] / self.count, self.parts[3] / self.count
        if centred:
            own, cross = own - torch.outer(x, x), cross - torch.outer(x, y)
        return own, cross, x, y

    @property
    def squares(self) -> torch.Tensor:
        """The mean square of every input."""
        return self.parts[2].diagonal() / self.count

    def spread(self, *, centred: bool) -> torch.Tensor:
        """The summed variance (or second moment) of the wanted outputs."""
        total = self.parts[4] / self.count
        return (total - (self.parts[1] / self.count).square() if centred else total).sum()


def _at(
    model: nn.Module,
    tensors: Tensors,
    batch: Batch,
    site: Site,
    written: Collection[str],
    *,
    rows_too: bool = True,
) -> tuple[torch.Tensor | str | None, torch.Tensor | None]:
    """Inputs ``(samples, fan_in)`` and complete outputs ``(samples, channels)`` of a layer; a sentence if there are none."""
    found: list[Any] = [None, None]

    def listen(event: Event) -> None:
        if event.key == site.key and rows_too:
            found[0] = _rows(event)
        if site.sees(event):
            found[1] = event.value.movedim(event.channel, -1).reshape(-1, event.value.shape[event.channel]).clone()
            raise Reached

    try:
        with Observer(tensors, listen):
            run_batch(model, tensors, batch, written)
    except Reached:
        pass
    return found[0], found[1]


def _rows(event: Event) -> torch.Tensor | str:
    """What each output position of a linear map or convolution reads."""
    source = event.source
    assert source is not None
    assert event.weight is not None
    if event.kernel is None:
        return source.reshape(-1, source.shape[-1]).clone()
    stride, padding, dilation, transposed, groups = event.kernel
    if transposed or groups > 1 or source.ndim not in (3, 4):
        return "least squares knows no grouped, transposed or three-dimensional convolutions"
    size = event.size
    if source.ndim == 3:
        source, size = source.unsqueeze(2), (1, *size)
        stride, padding, dilation = (1, *stride), (0, *padding), (1, *dilation)
    patches = F.unfold(source, size, dilation, padding, stride)
    return patches.mT.reshape(-1, patches.shape[1])
