"""The stage that repairs a merged state dict, and what it did to the outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from automerge._copies import copied
from automerge._data import Batches
from automerge._drift import drifts
from automerge._errors import AutomergeError
from automerge._extra_state import load_weights, weights_of
from automerge._repair_plan import UNRESET
from automerge._repair_report import Renormaliser, RepairReport
from automerge.io import StateDict, tied_names
from automerge.renormalise import Repair, batchnorm_names, reset_batchnorm
from automerge.symmetry import Symmetry


def renormalise(
    mode: str | Renormaliser,
    network: nn.Module,
    merged: StateDict,
    moved: Sequence[Mapping[str, torch.Tensor]],
    share: Sequence[float],
    batches: Batches | None,
    symmetry: Symmetry,
    *,
    watched: bool = False,
) -> tuple[StateDict, RepairReport]:
    """Repair a merged state dict by a mode other than ``auto``, see `automerge.merge`; nothing that is given is written.

    Args:
        mode: what to do.
        network: the architecture.
        merged: the average of ``moved``.
        moved: the aligned models.
        share: their weights.
        batches: data, or one example input.
        symmetry: which channels may be corrected.
        watched: measure how far the outputs are from the models' before and after (`RepairReport.drift`).

    Raises:
        AutomergeError: if the repaired values do not fit into the type of ``merged``.
    """
    fixed, report = _repaired(mode, network, merged, moved, share, batches, symmetry)
    if report.mode != "none":
        _check_range(merged, fixed)
    if watched and batches is not None and report.mode != "none":
        found = drifts(network, (merged, fixed), moved, share, batches)
        report = replace(report, drift=None if found is None else (found[0], found[1]))
    return fixed, report


def _repaired(
    mode: str | Renormaliser,
    network: nn.Module,
    merged: StateDict,
    moved: Sequence[Mapping[str, torch.Tensor]],
    share: Sequence[float],
    batches: Batches | None,
    symmetry: Symmetry,
) -> tuple[StateDict, RepairReport]:
    if isinstance(mode, Renormaliser):
        return mode(network, merged, moved, batches, symmetry=symmetry, weights=share)
    if mode == "none" or batches is None:
        return merged, RepairReport()
    report = RepairReport(mode)
    if mode in ("reset", "both"):
        own = copied(network)
        load_weights(own, merged)
        names = reset_batchnorm(own, batches)
        missed = {n: UNRESET for n in batchnorm_names(own) if n not in names}
        report = RepairReport(mode, reset=names, skipped=missed)
        fresh = weights_of(own)
        ties = tied_names(fresh)
        merged = {n: fresh[n].detach().to(merged[n].dtype).to(merged[n].device) for n in merged}
        merged.update({alias: merged[name] for alias, name in ties.items()})
    if mode in ("repair", "both"):
        repair = Repair(reset=mode == "both")
        before = report
        merged, report = repair(network, merged, moved, batches, symmetry=symmetry, weights=share)
        done = tuple(dict.fromkeys((*before.reset, *report.reset)))  # a repair plans for what the first batch runs
        skipped = {n: why for n, why in before.skipped.items() if n not in report.reset}
        report = replace(report, reset=done, skipped={**skipped, **report.skipped})
    return merged, report


def _check_range(merged: Mapping[str, torch.Tensor], fixed: Mapping[str, torch.Tensor]) -> None:
    """What was measured fits into the checkpoints' type; a variance of 70,000 is infinite as a float16.

    Raises:
        AutomergeError: if not.
    """
    for name, value in fixed.items():
        if bool((merged[name].isfinite() & ~value.isfinite()).any()):
            raise AutomergeError(
                f"{name} of the repaired network has values that {value.dtype} cannot hold; give checkpoints in float32, or "
                "repair='none'"
            )
