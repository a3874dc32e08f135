"""Compare every matcher with every repair on one's own models.

Three sets of data are kept apart: *calibration* (matchers look at activations, repairs measure them; labels are not used),
*selection* (the best combination is chosen there), and *report* (the numbers that are quoted; nothing is chosen by them).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from automerge._comparison import Comparison, Row, Score
from automerge._data import Batch, Batches, device_of
from automerge._errors import AutomergeError, MatchingError
from automerge._merge_checks import Model, check_models, check_weights
from automerge._repair_report import Renormaliser
from automerge._split import split_batches
from automerge.datafree import GaussianRepair, RowNorms
from automerge.evaluate import Source, barrier, evaluate, predictions
from automerge.fitting import LeastSquares
from automerge.infer import infer
from automerge.io import tied_names
from automerge.landscape import plane
from automerge.matchers import MATCHERS, Matcher, match
from automerge.merge import average, renormalise
from automerge.renormalise import Repair, batchnorm_names
from automerge.symmetry import Symmetry

Report = Callable[[int, int, str], None]
State = Mapping[str, torch.Tensor]

REPAIRS: Mapping[str, str | Renormaliser] = {
    "none": "none",
    "reset": "reset",
    "repair": "repair",
    "both": "both",
    "rescale": Repair(shift=False),
    "row norms": RowNorms(),
    "gaussian": GaussianRepair(),
    "least squares": LeastSquares(),
}
"""Name -> how a merged network is repaired, as `automerge.merge` takes it."""

_NORMED = ("reset", "both")


def compare(
    models: Sequence[Model],
    args: Any,
    data: Any,
    *,
    select: Any = None,
    report: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    architecture: nn.Module | None = None,
    symmetry: Symmetry | None = None,
    matchers: Mapping[str, Matcher] | None = None,
    repairs: Mapping[str, str | Renormaliser] | None = None,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    pictures: bool = False,
    progress: Report | None = None,
) -> Comparison:
    """Merge by every matcher with every repair, and say which to use.

    Args:
        models: modules or state dicts of one architecture, two or more; not changed.
        args: example inputs, as for `automerge.infer`.
        data: batches for calibration. With ``select`` and ``report`` missing they are dealt, sample by sample, to
            calibration (a quarter), selection (a quarter) and report (a half); with ``report`` alone given to calibration and
            selection by halves.
        select: labelled batches by which the best is chosen.
        report: labelled batches on which everything is reported.
        kwargs: keyword example inputs.
        architecture: the module that state dicts belong to.
        symmetry: skip inference and use this one.
        matchers: name -> matcher; all of them with their defaults by default. The plain average (``identity``) is always in.
        repairs: name -> repair as `automerge.merge` takes it; by default all that fit the architecture (and the matcher).
        weights: of the models in the average.
        seed: of the deal.
        pictures: draw the path between the first two models, and the plane through the first three (needs matplotlib).
        progress: called with (done, of, what is being done).

    Returns:
        The table, best first. A combination that fails is listed with its error.

    Raises:
        MatchingError, CheckpointError: for models that do not belong together.
        AutomergeError: for empty data, data that cannot be cut, or labels that are no classes.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> nets = [nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2)) for _ in range(2)]
        >>> x = torch.randn(200, 4)
        >>> found = compare(nets, x[:2], [(x, (x[:, 0] > 0).long())], repairs={"none": "none"})
        >>> len(found.rows), dict(found.samples)
        (9, {'calibrate': 50, 'select': 50, 'report': 100})
    """
    network, dicts, notes = check_models(models, architecture)
    share = check_weights(weights, len(dicts))
    sets = _Sets.make(data, select, report, args, kwargs, network, seed)
    if symmetry is None:
        own = deepcopy(network)
        own.load_state_dict(dict(dicts[0]))
        symmetry = infer(own, args, kwargs)
    chosen = {"identity": MATCHERS["identity"]()} | dict(matchers or {n: make() for n, make in MATCHERS.items()})
    fixes: dict[str, str | Renormaliser] = dict(repairs or REPAIRS)
    if not batchnorm_names(network):
        fixes = {n: r for n, r in fixes.items() if r not in _NORMED}
    fixes = {"none": "none", **fixes}
    work = _Work(network, [dict(d) for d in dicts], symmetry, share, sets, chosen, fixes, progress)
    rows, merged = work.run()
    models_scores = tuple(work.score((network, d), "report") for d in dicts)
    ensemble = replace(work.score([(network, d) for d in dicts], "report"), agreement=1.0)
    drawn: dict[str, bytes] = {}
    if pictures:
        drawn = work.draw(rows, merged)
    settings: dict[str, Any] = {"matchers": {n: repr(m) for n, m in chosen.items()}}
    settings["repairs"] = {n: repr(r) for n, r in fixes.items()}
    settings |= {"weights": list(share), "seed": seed, "data": sets.how}
    return Comparison(tuple(rows), models_scores, ensemble, sets.counts(), (*notes, *sets.notes()), drawn, settings)


# -------------------------------------------------------------------- data
@dataclass(frozen=True)
class _Sets:
    """Three disjoint sets of batches."""

    calibrate: list[Batch]
    select: list[Batch]
    report: list[Batch]
    how: str

    @staticmethod
    def make(data: Any, select: Any, report: Any, args: Any, kwargs: Any, network: nn.Module, seed: int) -> _Sets:
        arity = len(args) if isinstance(args, tuple | list) else 1
        given = [
            None if d is None else list(Batches(d, arity, kwargs, device_of(network))) for d in (data, select, report)
        ]
        first, second, third = given
        if first is None:
            raise MatchingError("comparing needs data: batches for calibration (data=)")
        if second is not None and third is None:
            calibrate, third = split_batches(first, [1, 1], seed)
            return _Sets(calibrate, second, third, "data cut into calibration and report")
        if second is None and third is not None:
            calibrate, second = split_batches(first, [1, 1], seed)
            return _Sets(calibrate, second, third, "data cut into calibration and selection")
        if second is None or third is None:
            calibrate, second, third = split_batches(first, [1, 1, 2], seed)
            return _Sets(calibrate, second, third, "data cut into calibration, selection and report")
        return _Sets(first, second, third, "separate data for calibration, selection and report")

    def counts(self) -> dict[str, int]:
        return {name: sum(_length(b) for b in getattr(self, name)) for name in ("calibrate", "select", "report")}

    def notes(self) -> list[str]:
        out = [self.how]
        if any(b.labels is None for b in (*self.select, *self.report)):
            out.append("without labels, combinations are chosen by their agreement with the ensemble")
        return out


def _length(batch: Batch) -> int:
    tensors = [t for t in (*batch.args, *batch.kwargs.values(), batch.labels) if isinstance(t, torch.Tensor) and t.ndim]
    return tensors[0].shape[0] if tensors else 1


def _as_items(batches: Sequence[Batch], labels: Sequence[torch.Tensor] | None = None) -> list[Any]:
    """Batches as `automerge.evaluate` takes them; with other labels, or with their own."""
    out: list[Any] = []
    for k, batch in enumerate(batches):
        label = batch.labels if labels is None else labels[k]
        if batch.args:
            out.append((*batch.args, label))
        else:
            out.append({**batch.kwargs, "labels": label})
    return out


def _brief(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, AutomergeError) else f"{type(error).__name__}: {text}"


# -------------------------------------------------------------------- work
@dataclass
class _Work:
    """One comparison."""

    network: nn.Module
    dicts: list[dict[str, torch.Tensor]]
    symmetry: Symmetry
    share: list[float]
    sets: _Sets
    matchers: Mapping[str, Matcher]
    repairs: Mapping[str, str | Renormaliser]
    progress: Report | None

    def __post_init__(self) -> None:
        ensemble: Source = [(self.network, d) for d in self.dicts]
        self.pseudo: dict[str, list[torch.Tensor]] = {}
        for name in ("select", "report"):
            batches: list[Batch] = getattr(self.sets, name)
            self.pseudo[name] = predictions(
                ensemble, _as_items(batches, [torch.zeros(0)] * len(batches)), **self._shape(batches)
            )
        self.average_loss: float | None = None

    def _shape(self, batches: Sequence[Batch]) -> dict[str, Any]:
        batch = batches[0]
        return {"inputs": max(len(batch.args), 1), "kwargs": dict(batch.kwargs) if batch.args else None}

    def score(self, source: Source, name: str) -> Score:
        """A network on the selection's or the report's data."""
        batches: list[Batch] = getattr(self.sets, name)
        shape = self._shape(batches)
        same = evaluate(source, _as_items(batches, self.pseudo[name]), **shape)
        assert same.accuracy is not None
        if any(b.labels is None for b in batches):
            return Score(None, None, same.accuracy, same.samples)
        own = evaluate(source, _as_items(batches), **shape)
        if own.accuracy is None:
            raise AutomergeError("comparing needs labels that are classes, or none at all")
        return Score(own.accuracy, own.loss, same.accuracy, own.samples)

    def run(self) -> tuple[list[Row], dict[str, tuple[State, list[dict[str, torch.Tensor]]]]]:
        """All rows, best first by the selection's data, and the merged weights with the aligned models by row."""
        losses = [self.score((self.network, d), "report").loss for d in self.dicts]
        known = [v for v in losses if v is not None]
        self.average_loss = (
            sum(w * v for w, v in zip(self.share, known, strict=True)) if len(known) == len(losses) else None
        )
        rows: list[Row] = []
        merged: dict[str, tuple[State, list[dict[str, torch.Tensor]]]] = {}
        for k, (name, matcher) in enumerate(self.matchers.items()):
            self._tell(k * len(self.repairs), name)
            start = time.perf_counter()
            try:
                moved, drift = self._moved(matcher)
            except Exception as error:  # one that fails must not take the others' results with it; the table says why
                rows.append(Row(name, "all", error=_brief(error), seconds=time.perf_counter() - start))
                continue
            plain = average(
                moved, self.share, aliases={**self.symmetry.aliases, **tied_names(self.network.state_dict())}
            )
            matched = time.perf_counter() - start
            fit = {n: r for n, r in self.repairs.items() if matcher.separable or r in ("none", "reset")}
            for j, (repair, mode) in enumerate(fit.items()):
                self._tell(k * len(self.repairs) + j, f"{name} + {repair}")
                row, state = self._row(name, repair, mode, plain, moved, drift, matched)
                rows.append(row)
                if state is not None:
                    merged[row.name] = (state, moved)
        naive = next((r.report for r in rows if (r.matcher, r.repair) == ("identity", "none")), None)
        if naive is not None:
            rows = [replace(r, worse_than_naive=r.report is not None and r.report.worse_than(naive)) for r in rows]
        rows.sort(key=lambda r: (-1.0, 0.0) if r.select is None else r.select.key, reverse=True)
        return rows, merged

    def _tell(self, done: int, text: str) -> None:
        if self.progress is not None:
            self.progress(done, len(self.matchers) * len(self.repairs), text)

    def _moved(self, matcher: Matcher) -> tuple[list[dict[str, torch.Tensor]], float]:
        models: list[Model] = [*self.dicts]
        if matcher.needs_data:
            own = deepcopy(self.network)
            own.load_state_dict(self.dicts[0])
            models[0] = own
        found = match(models, self.symmetry, matcher, data=self._calibration())
        if found.stats.get("interrupted"):
            raise KeyboardInterrupt
        drifts = found.stats.get("drift", [0.0])
        kept = [d for m, d in enumerate(drifts) if m not in found.stats.get("fell_back", ())]
        return found.apply(self.dicts), float(max(kept, default=0.0))

    def _calibration(self) -> Batches:
        batches = self.sets.calibrate
        return Batches(_as_items(batches), arity=self._shape(batches)["inputs"], kwargs=self._shape(batches)["kwargs"])

    def _row(
        self,
        name: str,
        repair: str,
        mode: str | Renormaliser,
        plain: dict[str, torch.Tensor],
        moved: list[dict[str, torch.Tensor]],
        drift: float,
        matched: float,
    ) -> tuple[Row, State | None]:
        start = time.perf_counter()
        row = Row(name, repair, isinstance(mode, Renormaliser) and mode.fits, drift=drift)
        try:
            state, _ = renormalise(mode, self.network, plain, moved, self.share, self._calibration(), self.symmetry)
            row = replace(row, seconds=matched + time.perf_counter() - start)
            select, report = (self.score((self.network, state), name) for name in ("select", "report"))
        except Exception as error:
            return replace(row, error=_brief(error)), None
        above = None
        if report.loss is not None and self.average_loss is not None:
            above = report.loss - self.average_loss
        return replace(row, select=select, report=report, barrier=above), state

    # ---------------------------------------------------------------- pictures
    def draw(
        self, rows: Sequence[Row], merged: Mapping[str, tuple[State, list[dict[str, torch.Tensor]]]]
    ) -> dict[str, bytes]:
        """The path and the plane of the models as they are and as the best row's matcher aligns them, as PNG."""
        best = next((r for r in rows if r.name in merged), None)
        if best is None or any(b.labels is None for b in self.sets.report):
            return {}
        items, shape = _as_items(self.sets.report), self._shape(self.sets.report)
        out: dict[str, bytes] = {}
        kinds = {"as trained": self.dicts, f"aligned by {best.matcher}": merged[best.name][1]}
        with TemporaryDirectory() as folder:
            file = Path(folder) / "picture.png"
            for title, states in kinds.items():
                path = barrier(self.network, states[0], states[1], items, 9, **shape)
                out[f"From model 0 to model 1, {title}"] = path.plot(file, force=True).read_bytes()
                if len(states) > 2:
                    a, b, c = states[:3]
                    spanned = plane(self.network, a, b, c, items, 9, **shape)
                    out[f"The plane through models 0 to 2, {title}"] = spanned.plot(file, force=True).read_bytes()
        return out
