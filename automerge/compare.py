"""Compare every matcher with every repair on one's own models.

Three sets of data are kept apart: *calibration* (matchers look at activations, repairs measure them; labels are not used),
*selection* (the best combination is chosen there), and *report* (the numbers that are quoted; nothing is chosen by them).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import nn

from automerge._canvas import new_figure
from automerge._compare_data import DataSets, about, as_items
from automerge._comparison import Comparison, Row, Score
from automerge._copies import carrying, copied, is_empty, loaded
from automerge._data import Batch, Batches
from automerge._double import own_modes
from automerge._errors import AutomergeError
from automerge._evaluation import Network, Source
from automerge._extra_state import load_weights
from automerge._fixed import infer_common, shared_constants
from automerge._forward import evaluating, logits_of, preserving, run_batch
from automerge._merge_checks import Model, check_inseparable, check_models, check_weights, listed_models
from automerge._offload import MEMORY
from automerge._repair_report import Renormaliser
from automerge._repair_stage import renormalise
from automerge._scores import IGNORED, class_axis, counted, likely_axis
from automerge._singular import agreed, marks, measured_again
from automerge.datafree import GaussianRepair, RowNorms
from automerge.evaluate import barrier, evaluate, predictions
from automerge.fitting import LeastSquares
from automerge.io import tied_names
from automerge.landscape import plane
from automerge.matchers import MATCHERS, Matcher, match
from automerge.merge import average
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


@own_modes()
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
        AutomergeError: for empty data, data that cannot be cut, labels or outputs that are no classes, data on which the
            model does not run; for matchers or repairs of another kind; for pictures without matplotlib.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> nets = [nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2)) for _ in range(2)]
        >>> x = torch.randn(200, 4)
        >>> found = compare(nets, x[:2], [(x, (x[:, 0] > 0).long())], repairs={"none": "none"})
        >>> len(found.rows) == len(MATCHERS), dict(found.samples)
        (True, {'calibrate': 50, 'select': 50, 'report': 100})
    """
    if pictures:
        new_figure(1.0, 1.0)  # fails now and not after the work
    chosen, fixes = _choices(matchers, repairs)
    network, dicts, notes = check_models(listed_models(models), architecture)
    network = carrying(network, dicts[0], MEMORY) if is_empty(network) else network
    share = check_weights(weights, len(dicts))
    sets = DataSets.make(data, select, report, args, kwargs, network, seed)
    if not batchnorm_names(network):
        fixes = {n: r for n, r in fixes.items() if r not in _NORMED}
    fixes = {"none": "none", **fixes}
    work = _Work(network, [dict(d) for d in dicts], share, sets, chosen, fixes, progress)  # runs on all data
    if symmetry is None:
        symmetry = infer_common(loaded(network, dicts[0]), shared_constants(network, dicts), args, kwargs)
    work.symmetry = symmetry
    rows = work.run()
    models_scores = tuple(work.score((network, d), "report") for d in dicts)
    ensemble = replace(work.score([(network, d) for d in dicts], "report"), agreement=1.0)
    drawn: dict[str, bytes] = {}
    if pictures:
        try:
            drawn = work.draw()
        except Exception as error:  # the numbers are there; pictures must not take them along
            notes = [*notes, f"the pictures could not be drawn: {_brief(error)}"]
    settings: dict[str, Any] = {"matchers": {n: repr(m) for n, m in chosen.items()}}
    settings["repairs"] = {n: repr(r) for n, r in fixes.items()}
    settings |= {"weights": list(share), "seed": seed, "data": sets.how}
    return Comparison(tuple(rows), models_scores, ensemble, sets.counts(), (*notes, *sets.notes()), drawn, settings)


def _choices(
    matchers: Mapping[str, Matcher] | None, repairs: Mapping[str, str | Renormaliser] | None
) -> tuple[dict[str, Matcher], dict[str, str | Renormaliser]]:
    """What is compared, by name; the plain average is always in."""
    for option, given in (("matchers", matchers), ("repairs", repairs)):
        if given is not None and not isinstance(given, Mapping):
            raise AutomergeError(f"{option} maps names to what they stand for, as a dict; got a {type(given).__name__}")
    chosen = {"identity": MATCHERS["identity"]()} | dict(matchers or {n: make() for n, make in MATCHERS.items()})
    fixes = dict(repairs or REPAIRS)
    for name, matcher in chosen.items():
        if not isinstance(matcher, Matcher):
            raise AutomergeError(f"matchers[{name!r}] is {matcher!r}, not a matcher such as FrankWolfe()")
    for name, repair in fixes.items():
        if not isinstance(repair, Renormaliser) and repair not in ("none", "reset", "repair", "both"):
            raise AutomergeError(f"repairs[{name!r}] is {repair!r}; give none, reset, repair, both or such as Repair()")
    return chosen, fixes


def _brief(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, AutomergeError) else f"{type(error).__name__}: {text}"


def _at_points(mode: str | Renormaliser) -> Renormaliser | Literal["reset"] | None:
    """A repair as `automerge.barrier` takes it."""
    if isinstance(mode, Renormaliser):
        return mode
    known: dict[str, Renormaliser | Literal["reset"]] = {
        "reset": "reset",
        "repair": Repair(),
        "both": Repair(reset=True),
    }
    return known.get(mode)


# -------------------------------------------------------------------- work
@dataclass
class _Work:
    """One comparison."""

    network: nn.Module
    dicts: list[dict[str, torch.Tensor]]
    share: list[float]
    sets: DataSets
    matchers: Mapping[str, Matcher]
    repairs: Mapping[str, str | Renormaliser]
    progress: Report | None
    symmetry: Symmetry = field(init=False)
    best: tuple[Row, list[dict[str, torch.Tensor]]] | None = None
    axis: int = 1
    """Of the classes in the scores."""

    def __post_init__(self) -> None:
        ensemble: list[Network] = [(self.network, d) for d in self.dicts]
        # before any long work: the network runs on all data, and its outputs are classes
        with about("data"):
            predictions(ensemble[:1], self._calibration())
        for name, batch in (("select", self.sets.select[0]), ("report", self.sets.report[0])):
            with about(name), evaluating(self.network), preserving(self.network):
                self._check_classes(logits_of(run_batch(self.network, None, batch)), batch)
        self.pseudo: dict[str, list[torch.Tensor]] = {}
        for name in ("select", "report"):
            batches: list[Batch] = getattr(self.sets, name)
            items = as_items(batches, [torch.zeros(0)] * len(batches))
            with about(name):
                made = predictions(ensemble, items, **self._shape(batches), class_axis=self.axis)
                if not any(bool((p != IGNORED).any()) for p in made):
                    raise AutomergeError("the models' outputs are NaN on all of it; are there infinite inputs?")
                self.pseudo[name] = [
                    p.masked_fill(~counted(b.labels, p), IGNORED) for p, b in zip(made, batches, strict=True)
                ]
                self.score(ensemble, name)
        self.average_loss: float | None = None

    def _check_classes(self, scores: torch.Tensor, batch: Batch) -> None:
        labels = batch.labels
        found = class_axis(scores, labels) if isinstance(labels, torch.Tensor) else None
        self.axis = likely_axis(scores, batch) if found is None else found
        if scores.ndim == 0 or scores.shape[self.axis if scores.ndim > 1 else -1] < 2:
            raise AutomergeError(
                f"the model gives one score per sample (outputs {tuple(scores.shape)}), and comparing needs classes; for "
                "other outputs use merge() with each matcher, and evaluate(metrics=...)"
            )
        if isinstance(labels, torch.Tensor) and found is None:
            raise AutomergeError(
                f"comparing needs labels that are classes, or none at all: labels {tuple(labels.shape)} of type "
                f"{labels.dtype} do not fit scores {tuple(scores.shape)}"
            )

    def _shape(self, batches: Sequence[Batch]) -> dict[str, Any]:
        batch = batches[0]
        return {"inputs": max(len(batch.args), 1), "kwargs": dict(batch.kwargs) if batch.args else None}

    def score(self, source: Source, name: str) -> Score:
        """A network on the selection's or the report's data."""
        batches: list[Batch] = getattr(self.sets, name)
        shape = {**self._shape(batches), "class_axis": self.axis}
        same = evaluate(source, as_items(batches, self.pseudo[name]), **shape)
        assert same.accuracy is not None
        if any(b.labels is None for b in batches):
            return Score(None, None, same.accuracy, same.samples)
        own = evaluate(source, as_items(batches), **shape)
        if own.accuracy is None:
            raise AutomergeError("comparing needs labels that are classes, or none at all")
        return Score(own.accuracy, own.loss, same.accuracy, own.samples)

    def run(self) -> list[Row]:
        """All rows, best first by the selection's data; no weights are kept but the aligned models of the best."""
        losses = [self.score((self.network, d), "report").loss for d in self.dicts]
        known = [v for v in losses if v is not None]
        self.average_loss = (
            sum(w * v for w, v in zip(self.share, known, strict=True)) if len(known) == len(losses) else None
        )
        rows: list[Row] = []
        for k, (name, matcher) in enumerate(self.matchers.items()):
            self._tell(k * len(self.repairs), name)
            start = time.perf_counter()
            try:
                if not matcher.separable:
                    check_inseparable(type(matcher).__name__, "none", "none", self.share, "universe", self.network)
                moved, drift = self._moved(matcher)
            except Exception as error:  # one that fails must not take the others' results with it; the table says why
                rows.append(Row(name, "all", error=_brief(error), seconds=time.perf_counter() - start))
                continue
            aliases = {**self.symmetry.aliases, **tied_names(self.network.state_dict())}
            kept = agreed([marks(self.network, m) for m in moved], self.share)
            plain, _ = measured_again(self.network, average(moved, self.share, aliases=aliases), kept)
            matched = time.perf_counter() - start
            fit = {n: r for n, r in self.repairs.items() if matcher.separable or r in ("none", "reset")}
            for j, (repair, mode) in enumerate(fit.items()):
                self._tell(k * len(self.repairs) + j, f"{name} + {repair}")
                row = self._row(name, repair, mode, plain, moved, drift, matched)
                rows.append(row)
                # a path between moved models needs models that are networks of their own
                if matcher.separable and row.select and (self.best is None or row.key > self.best[0].key):
                    self.best = row, moved
        naive = next((r.report for r in rows if (r.matcher, r.repair) == ("identity", "none")), None)
        if naive is not None:
            rows = [replace(r, worse_than_naive=r.report is not None and r.report.worse_than(naive)) for r in rows]
        return sorted(rows, key=lambda r: r.key, reverse=True)

    def _tell(self, done: int, text: str) -> None:
        if self.progress is not None:
            self.progress(done, len(self.matchers) * len(self.repairs), text)

    def _moved(self, matcher: Matcher) -> tuple[list[dict[str, torch.Tensor]], float | None]:
        models: list[Model] = [*self.dicts]
        if matcher.needs_data:
            own = copied(self.network)
            load_weights(own, self.dicts[0])
            models[0] = own
        found = match(models, self.symmetry, matcher, data=self._calibration())
        if found.stats.get("interrupted"):
            raise KeyboardInterrupt
        if not matcher.separable:
            return found.apply(self.dicts), None
        drifts = found.stats.get("drift", [0.0])
        kept = [d for m, d in enumerate(drifts) if m not in found.stats.get("fell_back", ())]
        return found.apply(self.dicts), float(max(kept, default=0.0))

    def _calibration(self) -> Batches:
        batches = self.sets.calibrate
        return Batches(as_items(batches), arity=self._shape(batches)["inputs"], kwargs=self._shape(batches)["kwargs"])

    def _row(
        self,
        name: str,
        repair: str,
        mode: str | Renormaliser,
        plain: dict[str, torch.Tensor],
        moved: list[dict[str, torch.Tensor]],
        drift: float | None,
        matched: float,
    ) -> Row:
        start = time.perf_counter()
        row = Row(name, repair, isinstance(mode, Renormaliser) and mode.fits, drift=drift)
        try:
            state, _ = renormalise(mode, self.network, plain, moved, self.share, self._calibration(), self.symmetry)
            row = replace(row, seconds=matched + time.perf_counter() - start)
            select, report = (self.score((self.network, state), name) for name in ("select", "report"))
        except Exception as error:
            return replace(row, error=_brief(error))
        above = None
        if report.loss is not None and self.average_loss is not None:
            above = report.loss - self.average_loss
        return replace(row, select=select, report=report, barrier=above)

    # ---------------------------------------------------------------- pictures
    def draw(self) -> dict[str, bytes]:
        """The path and the plane of the models as they are and as the best row's matcher aligns them, as PNG."""
        if self.best is None or any(b.labels is None for b in self.sets.report):
            return {}
        best, aligned = self.best
        items, shape = as_items(self.sets.report), self._shape(self.sets.report)
        out: dict[str, bytes] = {}
        kinds = {"as trained": self.dicts, f"aligned by {best.matcher}": aligned}
        with TemporaryDirectory() as folder:
            file = Path(folder) / "picture.png"
            for title, states in kinds.items():
                path = barrier(self.network, states[0], states[1], items, 9, **shape)
                out[f"From model 0 to model 1, {title}"] = path.plot(file, force=True).read_bytes()
                fix = _at_points(self.repairs[best.repair])
                if fix is not None and states is not self.dicts:
                    data = as_items(self.sets.calibrate)
                    path = barrier(self.network, states[0], states[1], items, 9, fix, repair_data=data, **shape)
                    name = f"From model 0 to model 1, {title}, {best.repair} at every point"
                    out[name] = path.plot(file, force=True).read_bytes()
                if len(states) > 2:
                    a, b, c = states[:3]
                    spanned = plane(self.network, a, b, c, items, 9, **shape)
                    out[f"The plane through models 0 to 2, {title}"] = spanned.plot(file, force=True).read_bytes()
        return out
