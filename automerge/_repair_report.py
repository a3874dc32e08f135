"""What every way of renormalising shares: the abstract class, and its report."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch

from automerge._errors import AutomergeError
from automerge.io import tied_names
from automerge.symmetry import Symmetry


@dataclass(frozen=True)
class LayerRepair:
    """What was done to one layer.

    Attributes:
        name: the weight.
        channels: its number of output channels.
        corrected: how many of them were changed.
        dead: how many were left alone because they are constant in the merged network or in the endpoints.
        shifted: whether the mean could be corrected as well; False where nothing holds a bias.
        scale: the smallest and the largest factor; for a fit, of the new rows' norms to the old ones'.
        error: for a fit, the share of the wanted outputs' variance that is left over, on the data of the fit.
    """

    name: str
    channels: int
    corrected: int
    dead: int
    shifted: bool
    scale: tuple[float, float]
    error: float | None = None


@dataclass(frozen=True)
class RepairReport:
    """What was repaired, what was not, and why.

    Attributes:
        mode: ``none``, ``reset``, ``repair``, ``both``, ``rescale``, ``row norms``, ``gaussian`` or ``fit``.
        layers: the layers that could be changed, in the order of execution.
        reset: the BatchNorms whose statistics were measured again.
        skipped: layer -> why it was left alone.
        drift: how far the merged network's outputs are from the weighted mean of the models' own, before and after the repair:
            the root mean square of the difference, in standard deviations of that mean over the samples (every output about
            its own mean), on the first 512 samples of the data. 0: as the models' mean; 1: no nearer than a constant. None
            if `merge` did not measure it, or the outputs are no finite real numbers of one shape.
    """

    mode: str = "none"
    layers: tuple[LayerRepair, ...] = ()
    reset: tuple[str, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    drift: tuple[float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        if self.mode == "none":
            return "Repair: none"
        verb = "fitted (trained on the data, in closed form)" if self.mode == "fit" else "rescaled"
        changed = sum(layer.corrected > 0 for layer in self.layers)
        lines = [f"Repair ({self.mode}): {changed} layers {verb}, {len(self.reset)} BatchNorms reset"]
        if not changed and any(layer.dead for layer in self.layers):
            lines.append("  nothing varies on these data, so nothing was measured; give samples that differ")
        for layer in self.layers:
            low, high = layer.scale
            dead = f", {layer.dead} dead" if layer.dead else ""
            note = "" if layer.shifted else ", scale only: it has no bias"
            left = "" if layer.error is None else f", {layer.error:.1%} of the variance left"
            lines.append(
                f"  {layer.name}: {layer.corrected} of {layer.channels} channels by {low:.3g} to {high:.3g}{dead}{note}{left}"
            )
        lines += [f"  {name}: left alone, {reason}" for name, reason in self.skipped.items()]
        if self.drift is not None:
            before, after = self.drift
            lines.append(f"  outputs: {before:.3g} standard deviations from the models' mean before, {after:.3g} after")
        return "\n".join(lines)


class Renormaliser(ABC):
    """Repairs a merged network; implementations are frozen dataclasses of their options.

    Attributes:
        needs_data: whether it measures activations; else one example input says how the network runs.
        fits: whether it adapts weights to the data beyond scales and shifts of channels: then it is training.
    """

    needs_data: ClassVar[bool] = True
    fits: ClassVar[bool] = False

    @abstractmethod
    def __call__(
        self,
        model: torch.nn.Module,
        merged: Mapping[str, torch.Tensor],
        endpoints: Sequence[Mapping[str, torch.Tensor]],
        data: Any,
        *,
        symmetry: Symmetry | None = None,
        weights: Sequence[float] | None = None,
        inputs: int = 1,
        kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[dict[str, torch.Tensor], RepairReport]:
        """Repair ``merged``.

        Args:
            model: the architecture; its weights and mode flags do not change.
            merged: the merged state dict; not written.
            endpoints: the state dicts that were merged, aligned to the coordinates of ``merged``; not written.
            data: batches, see `automerge.merge`; a few hundred samples suffice. One example input without `needs_data`.
            symmetry: which channels may be corrected; without it all but those of the final output.
            weights: the endpoints' weights in the merge; uniform by default.
            inputs: how many of a batch's items are positional inputs.
            kwargs: keyword inputs for every batch.

        Returns:
            The repaired state dict and what was done.

        Raises:
            AutomergeError: if the data are empty or there is no endpoint.
        """


def shares(weights: Sequence[float] | None, count: int) -> list[float]:
    """The endpoints' weights, with the sum one.

    Raises:
        AutomergeError: if there is no endpoint, or their number is another one.
    """
    if count == 0:
        raise AutomergeError("Repair needs the endpoints' state dicts; give at least one")
    given = [1.0] * count if weights is None else [float(w) for w in weights]
    total = sum(given)
    if len(given) != count or total <= 0:
        raise AutomergeError(f"Repair got {len(given)} weights for {count} endpoints, with the sum {total:g}")
    return [w / total for w in given]


def as_merged(
    tensors: dict[str, torch.Tensor], merged: Mapping[str, torch.Tensor], written: Collection[str] = ()
) -> dict[str, torch.Tensor]:
    """The repaired tensors on the devices and in the types of the merged ones; what was tied stays so.

    But for buffers that the network writes to: those are merged.
    """
    out = {n: merged[n].detach().clone() if n in written else t.to(merged[n]) for n, t in tensors.items()}
    return out | {alias: out[name] for alias, name in tied_names(tensors).items()}
