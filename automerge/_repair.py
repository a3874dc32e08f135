"""The parts of REPAIR: channel moments, the plan of what can be folded, and folding.

`automerge.renormalise.Repair` is the public face.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from automerge._data import Batch, Batches
from automerge._forward import evaluating, run_batch
from automerge._lockstep import Held, replicas, run_together, several
from automerge._moments import Moments
from automerge._observe import Event, Key, Observer, View
from automerge._repair_plan import Norm, Plan, Site
from automerge.symmetry import Symmetry

Tensors = dict[str, torch.Tensor]
_DEAD = 1e-6


@contextmanager
def watching(model: nn.Module) -> Iterator[None]:
    """`evaluating` for an `Observer`: what a compiler makes of a model shows no operators, and in inference mode tensors do
    not tell whether they were written to.
    """
    with torch.inference_mode(False), evaluating(model):
        yield


# -------------------------------------------------------------------- planning
class _Record:
    """Everything one run showed."""

    def __init__(self) -> None:
        self.sites: dict[Key, Site] = {}
        self.norms: dict[Key, Norm] = {}
        self.order: list[Key] = []
        self.reasons: dict[Key, str] = {}
        self.normalised: dict[Key, str] = {}

    def __call__(self, event: Event) -> None:
        if event.names is not None:
            self._norm(event, event.names)
        elif event.weight is not None:
            channels = event.value.shape[event.channel]
            free = torch.ones(channels, dtype=torch.bool)
            site = Site(event.key, event.weight, event.bias, channels, event.groups, free)
            if event.value.is_complex():
                self.reasons[event.key] = "its activations are complex numbers, which have no single standard deviation"
            elif not event.foldable:
                self.reasons[event.key] = "what is added to its output is not a parameter of one value per channel"
            self.sites[event.key] = site
            self.order.append(event.key)
        elif event.bias is not None:
            for key in event.follows:
                site_ = self.sites.get(key)
                if site_ is not None and site_.bias is None and event.bias.stop - event.bias.start == site_.channels:
                    self.sites[key] = replace(site_, bias=event.bias)

    def _norm(self, event: Event, names: tuple[str, str]) -> None:
        if event.key in self.norms:
            self.reasons[event.key] = "the normalisation is used more than once"
        self.norms[event.key] = Norm(event.key, names)
        self.order.append(event.key)
        for key, site in self.sites.items():
            if not {key, *site.bias_key()}.isdisjoint(event.follows):
                self.normalised[key] = names[0]


def make_plan(
    model: nn.Module, tensors: Tensors, batch: Batch, symmetry: Symmetry | None, reset: bool, *, whole: bool = False
) -> Plan:
    """Run the model once and decide what can be corrected.

    Args:
        model: in eval mode, without gradients.
        tensors: its weights, each tensor with memory of its own.
        batch: one batch.
        symmetry: restricts the correction to channels that are free; None: all but the final output's.
        reset: whether normalisation statistics are measured again on the way.
        whole: plan for whole weights and not for channels: also the final output's, and those that a reset norm follows.
    """
    record = _Record()
    observer = Observer(tensors, record)
    before = {name: (tensor._version, tensor.clone()) for name, tensor in tensors.items()}
    with Held() as held, observer:
        output = run_batch(model, tensors, batch)
    written = frozenset(  # what is written to `.data` is seen by its values only
        name
        for name, (version, old) in before.items()
        if tensors[name]._version != version or not old.equal(tensors[name])
    )
    for name in written:
        tensors[name].copy_(before[name][1])
    del before
    reasons = record.reasons
    for site in record.sites.values():
        if not written.isdisjoint({site.weight.name, *([site.bias.name] if site.bias else ())}):
            reasons.setdefault(site.key, "the network itself writes to it")
    _mark_shared(record, observer)
    if symmetry is None and not whole:
        _mark_final(record, observer, output)
    names = _names_by_tensor(tensors)
    steps: list[Site | Norm] = []
    for key in dict.fromkeys(record.order):
        if key in record.norms:
            if reset and key not in reasons:
                steps.append(record.norms[key])
            continue
        site = record.sites[key]
        if symmetry is not None and not whole:
            site = replace(site, free=free_channels(site, symmetry, names[site.weight.name]))
        if key not in reasons and not bool(site.free.any()):
            reasons[key] = "the symmetry pins its output channels"
        if key not in reasons and reset and key in record.normalised and not whole:
            reasons[key] = f"its output is normalised by {record.normalised[key]}, whose reset does the same"
        follower = record.normalised.get(key)
        alone = observer.uses.outputs.get(key) == 1
        if site.bias is None and follower is not None and alone and ("norm", follower, 0, 0) not in reasons:
            site = replace(site, norm=follower)
        if key not in reasons:
            steps.append(site)
    skipped = {record.sites[k].name: r for k, r in reasons.items() if k in record.sites}
    return Plan(tuple(steps), {**skipped, **_unseen(record, observer, tensors, names)}, written, held.peak)


def _mark_shared(record: _Record, observer: Observer) -> None:
    """Give the reason for every site whose weight or bias something else reads as well."""
    by_tensor: dict[str, list[tuple[Site, View]]] = {}
    for site in record.sites.values():
        by_tensor.setdefault(site.weight.name, []).append((site, site.weight))
        if site.bias is not None:
            by_tensor.setdefault(site.bias.name, []).append((site, site.bias))
    for name, uses in by_tensor.items():
        spans = sorted((view.start, view.stop) for _, view in uses)
        apart = all(a[1] <= b[0] for a, b in pairwise(spans))
        one_axis = len({view.axis for _, view in uses}) == 1
        if observer.uses.count.get(name, 0) != len(uses) or not apart or not one_axis:
            by = ", ".join(dict.fromkeys(observer.uses.operators.get(name, ())))
            for site, view in uses:
                what = "it" if view is site.weight else f"its bias {name}"
                record.reasons.setdefault(
                    site.key, f"{what} is used more than once (by {by}), so no single correction fits every use"
                )


def _mark_final(record: _Record, observer: Observer, output: object) -> None:
    """Give the reason for the sites that make the model's output: the last one, and any whose output is returned."""
    points = {own: key for key, site in record.sites.items() for own in (key, *site.bias_key())}
    final = [key for key in record.order if key in record.sites][-1:]
    for leaf in tree_leaves(output):
        if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided:
            final += [points[key] for key in observer.made(leaf) if key in points]
    for key in final:
        record.reasons.setdefault(key, "it makes the model's final output")


def _unseen(record: _Record, observer: Observer, tensors: Tensors, names: Mapping[str, list[str]]) -> dict[str, str]:
    """Matrices and kernels that no watched call used."""
    seen = {name for site in record.sites.values() for name in names[site.weight.name]}
    out = {}
    for name, tensor in tensors.items():
        if tensor.ndim > 1 and tensor.is_floating_point() and name not in seen and names[name][0] == name:
            by = ", ".join(dict.fromkeys(observer.uses.operators.get(name, ())))
            what = f"it is no plain linear or convolution weight (used by {by})"
            out[name] = what if by else "the merged network does not use it on the first batch"
    return out


def _names_by_tensor(tensors: Tensors) -> dict[str, list[str]]:
    groups: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(id(tensor), []).append(name)
    return {name: groups[id(tensor)] for name, tensor in tensors.items()}


def free_channels(site: Site, symmetry: Symmetry, names: list[str]) -> torch.Tensor:
    """Which output channels of a site belong to a set of interchangeable units.

    Returns:
        bool, ``(channels,)``.
    """
    view = site.weight
    wanted = {symmetry.aliases.get(name, name) for name in names}
    axes: dict[int, np.ndarray] = {}
    for generator in symmetry.sets:
        for slot in generator.slots:
            if slot.param in wanted:
                mask = axes.setdefault(slot.axis, np.zeros(symmetry.shapes[slot.param][slot.axis], dtype=bool))
                mask[slot.index.reshape(-1)] = True
    own = axes.get(view.axis)
    free = torch.zeros(view.stop - view.start, dtype=torch.bool)
    if own is not None:
        free = torch.from_numpy(own[view.start : view.stop])
    return free.repeat(site.groups) if site.groups > 1 else free


# -------------------------------------------------------------------- measuring
class Reached(BaseException):
    """Ends a forward pass early; no `Exception`, so that a model's own handlers let it through."""


def measure(model: nn.Module, tensors: Tensors, batches: Batches, plan: Plan) -> dict[Key, Moments]:
    """The moments at every site of a plan, in one pass over the data."""
    moments = {step.key: Moments() for step in plan.steps if isinstance(step, Site)}

    def listen(event: Event) -> None:
        step = plan.find(event)
        if isinstance(step, Site):
            moments[step.key].update(event.value, event.channel)

    for batch in batches:
        with Observer(tensors, listen):
            run_batch(model, tensors, batch, plan.written)
    return moments


Correction = Callable[[Site | Norm, Moments], tuple[torch.Tensor, torch.Tensor] | None]


def correct(model: nn.Module, tensors: Tensors, batches: Batches, plan: Plan, correction: Correction) -> None:
    """Correct the steps of a plan one after the other, each measured with everything before it already corrected.

    The running output is corrected along with the weights, so that one pass over the data is enough: the runs of several
    batches wait for each other at every step. Where they cannot be held at once (`automerge._lockstep`), every step runs
    the model up to itself on all of them instead.

    Args:
        model: in eval mode, without gradients.
        tensors: its weights; written in place.
        batches: the data.
        plan: the steps.
        correction: gets a step and its moments, writes the weights, and returns scale and shift of the output, or None.
    """

    def meet(step: Site | Norm, events: Sequence[Event]) -> None:
        moments = Moments()
        for event in events:
            moments.update(event.value, event.channel)
        moments.check(f"{step.name} of the merged network")
        change = correction(step, moments)
        for event in events if change is not None else ():
            view = [1] * event.value.ndim
            view[event.channel] = -1
            scale, shift = (c.to(event.value.dtype).view(view) for c in change or ())
            event.value.mul_(scale).add_(shift)

    held = several(batches, plan.held)
    copies = replicas(model, len(held)) if held is not None else None
    if held is None or copies is None:
        for step in plan.steps:
            correction(step, measure_one(model, tensors, batches, step, plan.written))
        return
    met: set[int] = set()

    def at(number: int, events: Sequence[Event]) -> None:
        met.add(number)
        meet(plan.steps[number], events)

    run_together(copies, tensors, held, plan, at)
    for number in range(len(plan.steps)):
        if number not in met:
            meet(plan.steps[number], [])


def measure_one(
    model: nn.Module, tensors: Tensors, batches: Batches, step: Site | Norm, written: Collection[str] = ()
) -> Moments:
    moments = Moments()

    def listen(event: Event) -> None:
        if step.sees(event):
            moments.update(event.value, event.channel)
            raise Reached

    for batch in batches:
        try:
            with Observer(tensors, listen):
                run_batch(model, tensors, batch, written)
        except Reached:
            pass
    moments.check(f"{step.name} of the merged network")
    return moments


# -------------------------------------------------------------------- folding
def channel_change(
    measured: Moments, mean: torch.Tensor, std: torch.Tensor, site: Site, *, shift: bool, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scale and shift that give a site's output the wanted mean and standard deviation, ``y' = scale * y + shift``.

    Args:
        measured: the moments of the present output.
        mean: float64, ``(channels,)``: the wanted mean.
        std: float64, ``(channels,)``: the wanted standard deviation.
        site: where; without a bias there is only the scale.
        shift: whether the mean is corrected; if not, it is kept.
        eps: machine epsilon of the weights; a channel whose deviation is rounding of its mean is dead.

    Returns:
        Scale and shift, float64 ``(channels,)``, identity on channels that are dead or not free; and which are dead.
    """
    now = measured.std()
    dead = _flat(now, measured.mean, eps) | _flat(std, mean, eps)
    active = site.free.to(now.device) & ~dead
    scale = torch.where(active, std / torch.where(dead, torch.ones_like(now), now), torch.ones_like(now))
    offset = (mean - scale * measured.mean) if shift else measured.mean * (1 - scale)
    if not site.shiftable:
        offset = torch.zeros_like(offset)
    return scale, torch.where(active, offset, torch.zeros_like(offset)), dead


def _flat(std: torch.Tensor, mean: torch.Tensor, eps: float) -> torch.Tensor:
    biggest = std.max() if std.numel() else std.new_zeros(())
    return (std <= _DEAD * biggest) | (std <= 8 * eps * mean.abs()) | ~torch.isfinite(std)


def fold(tensors: Tensors, site: Site, scale: torch.Tensor, shift: torch.Tensor) -> None:
    """Write ``y' = scale * y + shift`` into weight and bias, or the running mean that follows, in place."""
    view, weight = site.weight, tensors[site.weight.name]
    if site.groups > 1:
        part = weight.view(site.groups, -1, *weight.shape[1:])
        shape = [site.groups, 1, weight.shape[1]] + [1] * (weight.ndim - 2)
    else:
        part = weight.narrow(view.axis, view.start, view.stop - view.start)
        shape = [1] * weight.ndim
        shape[view.axis] = -1
    part.copy_(part.double() * scale.view(shape))
    if site.bias is not None:
        bias = site.bias
        own = tensors[bias.name].narrow(bias.axis, bias.start, bias.stop - bias.start)
        own.copy_(own.double() * scale.view(own.shape) + shift.view(own.shape))
    elif site.norm is not None:
        tensors[site.norm].copy_(tensors[site.norm].double() - shift)
