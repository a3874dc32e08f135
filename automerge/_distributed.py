"""``torchrun --nproc-per-node=R -m automerge merge ...``: many processes, each with its own models only.

Every process reads its share of the checkpoints (`Ranks.shares`), the matcher's sums over models go through
`torch.distributed`, and so do those of the average. All end with the same universe; process 0 writes the result.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from automerge._copies import carrying, is_empty, loaded
from automerge._errors import MatchingError
from automerge._fixed import infer_common, shared_constants
from automerge._loading import read_checkpoint
from automerge._merge_checks import merge_integers
from automerge._merge_task import Moved
from automerge._offload import Store
from automerge._ranks import Ranks
from automerge._singular import agreed, marks, measured_again
from automerge.io import StateDict, hash_state_dict, tied_names
from automerge.matchers import FrankWolfe, Matching, Progress
from automerge.matchers._crossing import Crossing
from automerge.symmetry import Symmetry


@dataclass(frozen=True, eq=False)
class Shared:
    """What every process has at the end.

    Attributes:
        state_dict: the merged weights, on process 0; elsewhere, and after an interrupted search, nothing.
        matching: of all models.
        hashes: SHA-256 of every checkpoint's tensors.
        seconds: per stage.
    """

    state_dict: StateDict
    matching: Matching
    hashes: list[str]
    seconds: Mapping[str, float]


def merge_share(
    ranks: Ranks,
    network: nn.Module,
    paths: Sequence[str],
    args: Any,
    kwargs: Mapping[str, Any] | None = None,
    *,
    matcher: FrankWolfe,
    weights: Sequence[float] | None = None,
    reference: int | None = None,
    progress: Progress | None = None,
) -> Shared:
    """Merge checkpoints of which each process reads only its own.

    Args:
        ranks: the processes; all of them make this call with the same arguments.
        network: a module of the architecture; not changed.
        paths: of all checkpoints, at least one per process.
        args: example inputs.
        kwargs: example keyword inputs.
        matcher: its options. What it offloads (``offload``), this process's share of the rest goes to as well; then the
            network may be on the meta device.
        weights: one per checkpoint; equal if None.
        reference: the checkpoint in whose coordinates the result is written; the universe's if None.
        progress: as for `automerge.match`.

    Raises:
        MatchingError: for fewer checkpoints than processes, or fewer than two.
        CheckpointError: if a checkpoint cannot be read or does not fit.
        RankError: if another process failed, ended or does not answer.
    """
    begin = time.perf_counter()
    seconds: dict[str, float] = {}
    states: list[StateDict] = []
    with ranks.together():
        store = Store(matcher.offload)
        if len(paths) < max(2, ranks.size):
            raise MatchingError(
                f"{len(paths)} checkpoints for {ranks.size} processes: give at least two, and one per process"
            )
        for m in ranks.shares(len(paths))[ranks.rank]:
            states.append(read_checkpoint(paths[m], network))
        network = carrying(network, states[0], store) if is_empty(network) else network
    hashes = [h for share in ranks.gather([hash_state_dict(s) for s in states]) for h in share]
    seconds["read"] = time.perf_counter() - begin
    symmetry = _symmetry(ranks, network, states, args, kwargs, store)
    seconds["infer"] = time.perf_counter() - begin - seconds["read"]
    crossing = Crossing.of(symmetry)
    if crossing is None:
        matching = matcher.match_share(states, symmetry, progress, ranks)
    else:
        matching = crossing.match(matcher, states, progress, ranks)
    seconds["match"] = matching.stats["seconds"]["total"]
    share = [1.0 / len(paths)] * len(paths) if weights is None else [w / sum(weights) for w in weights]
    merged: StateDict = {}
    if not matching.stats["interrupted"]:
        with store.working():
            merged = _average(ranks, states, matching, share, reference, network, store)
    seconds["total"] = time.perf_counter() - begin
    return Shared(merged, matching, hashes, seconds)


def _symmetry(
    ranks: Ranks,
    network: nn.Module,
    states: Sequence[StateDict],
    args: Any,
    kwargs: Mapping[str, Any] | None,
    store: Store,
) -> Symmetry:
    """Process 0 infers, and tells the others; buffers that are the same in all models stay."""
    text: str | None = None
    mine = {name: hash_state_dict({name: states[0][name]}) for name in sorted(shared_constants(network, states))}
    everywhere = ranks.gather(mine)
    with ranks.together():
        if ranks.rank == 0:
            shared = {n for n, value in mine.items() if all(other.get(n) == value for other in everywhere)}
            own = loaded(network, states[0]) if store.folder is None else carrying(network, states[0], store)
            text = infer_common(own, shared, args, kwargs).to_json()
    return Symmetry.from_json(next(t for t in ranks.gather(text) if t is not None))


def _average(
    ranks: Ranks,
    states: Sequence[StateDict],
    matching: Matching,
    share: Sequence[float],
    reference: int | None,
    network: nn.Module,
    store: Store,
) -> StateDict:
    """The weighted mean of all models, tensor by tensor, in float64; for process 0."""
    elements = matching.to_universe
    if reference is not None:
        back = elements[reference].inverse()
        elements = tuple(e.then(back) for e in elements)
    mine = ranks.shares(len(share))[ranks.rank]
    symmetry = matching.symmetry
    out: StateDict = {}
    for name, first in states[0].items():
        if not (first.is_floating_point() or first.is_complex()):
            with ranks.together():
                whole = merge_integers(name, [v for vs in ranks.gather([s[name] for s in states]) for v in vs])
            if ranks.rank == 0:
                out[name] = whole
            continue
        wide = torch.complex128 if first.is_complex() else torch.float64
        total = torch.zeros(first.shape, dtype=wide)
        for m, state in zip(mine, states, strict=True):
            total.add_(elements[m].take(name, state, symmetry.aliases).to(wide), alpha=share[m])
        dtypes = ranks.gather(str(first.dtype))
        whole = ranks.sum(total).to(getattr(torch, dtypes[0].removeprefix("torch.")))
        if ranks.rank == 0:
            out[name] = store.keep(whole)
    for alias, name in {**symmetry.aliases, **tied_names(network.state_dict())}.items():
        if alias in out and name in out:
            out[alias] = out[name]
    own = [marks(network, Moved(symmetry, state, elements[m])) for m, state in zip(mine, states, strict=True)]
    kept = agreed([found for part in ranks.gather(own) for found in part], share)
    return measured_again(network, out, kept)[0] if ranks.rank == 0 else out
