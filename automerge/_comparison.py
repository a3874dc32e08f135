"""What `automerge.compare` returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import inf, isfinite, isnan
from typing import Any

COLUMNS = ("matcher", "repair", "select", "accuracy", "loss", "agreement", "barrier", "drift", "seconds")


@dataclass(frozen=True)
class Score:
    """A network on one set of data.

    Attributes:
        accuracy: 0 to 1; None without labels.
        loss: mean cross-entropy in nats; None without labels.
        agreement: the share of its predictions that the ensemble of the models shares; needs no labels.
        samples: how many predictions were compared.
    """

    accuracy: float | None
    loss: float | None
    agreement: float
    samples: int

    @property
    def key(self) -> tuple[float, float]:
        """Larger is better: accuracy, then loss (NaN is the worst); agreement without labels."""
        if self.accuracy is None or self.loss is None:
            return self.agreement, 0.0
        return self.accuracy, -_known(self.loss)

    def worse_than(self, other: Score) -> bool:
        """Whether accuracy or loss is worse; agreement without labels."""
        if self.accuracy is None or other.accuracy is None or self.loss is None or other.loss is None:
            return self.agreement < other.agreement
        return self.accuracy < other.accuracy or _known(self.loss) > _known(other.loss)


@dataclass(frozen=True)
class Row:
    """One matcher with one repair.

    Attributes:
        matcher: its name.
        repair: its name.
        fits: whether the repair fits weights to data (`LeastSquares`).
        select: on the data that choose; None if it failed.
        report: on the data that are reported; nothing was chosen by them.
        barrier: the loss of the merged network above the mean loss of the models, on the report's data.
        drift: the largest relative change of a model's own output by its map; 0 for permutations, None where moved models
            are no networks of their own.
        seconds: matching, averaging and repairing.
        worse_than_naive: whether accuracy or loss is worse than that of the plain average, on the report's data.
        error: why it failed.
    """

    matcher: str
    repair: str
    fits: bool = False
    select: Score | None = None
    report: Score | None = None
    barrier: float | None = None
    drift: float | None = 0.0
    seconds: float = 0.0
    worse_than_naive: bool = False
    error: str = ""

    @property
    def name(self) -> str:
        """Matcher and repair."""
        return f"{self.matcher} + {self.repair}"

    @property
    def key(self) -> tuple[float, float]:
        """Larger is better, by the data that choose; what failed comes last."""
        return (-1.0, 0.0) if self.select is None else self.select.key

    def cells(self) -> list[str]:
        """What the table shows, in the order of ``COLUMNS``."""
        if self.report is None or self.select is None:
            return [self.matcher, self.repair, "failed", *[""] * (len(COLUMNS) - 4), f"{self.seconds:.1f}"]
        mark = " !" if self.worse_than_naive else ""
        accuracy, loss, select = self.report.accuracy, self.report.loss, self.select
        chosen = select.agreement if select.accuracy is None else select.accuracy
        return [
            self.matcher,
            self.repair + (" *" if self.fits else ""),
            f"{chosen:.2%}",
            ("-" if accuracy is None else f"{accuracy:.2%}") + mark,
            "-" if loss is None else f"{loss:.4f}",
            f"{self.report.agreement:.2%}",
            "-" if self.barrier is None else f"{self.barrier:+.4f}",
            "-" if self.drift is None else f"{self.drift:.3f}",
            f"{self.seconds:.1f}",
        ]


@dataclass(frozen=True)
class Comparison:
    """Every matcher with every repair, best first by the data that select.

    Attributes:
        rows: the table.
        models: each model's score on the report's data.
        ensemble: that of the mean of their probabilities.
        samples: how many samples were used: ``calibrate``, ``select``, ``report``.
        notes: what a reader must know.
        pictures: title -> PNG, for the page.
        settings: what was compared, plain data.
    """

    rows: tuple[Row, ...]
    models: tuple[Score, ...]
    ensemble: Score
    samples: Mapping[str, int]
    notes: tuple[str, ...] = ()
    pictures: Mapping[str, bytes] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def best(self, *, fitting: bool = True) -> Row | None:
        """The first row; the first that fits no weights to data without ``fitting``. None if all failed."""
        return next((r for r in self.rows if r.select is not None and (fitting or not r.fits)), None)

    def recommendation(self) -> str:
        """What to use, and on how many samples that rests."""
        best, modest = self.best(), self.best(fitting=False)
        if best is None:
            return "No combination worked; the table says why."
        text = f"Recommended: {self._words(best)}."
        if best.fits and modest is not None:
            text += f" Without fitting weights to data: {self._words(modest)}."
        text += f" Chosen on {self.samples['select']} samples and reported on {self.samples['report']} others"
        text += f" (95% interval of an accuracy there: give or take {self._error(best):.1%})."
        naive = next((r for r in self.rows if (r.matcher, r.repair) == ("identity", "none") and r.report), None)
        reports = [r.report for r in (best, naive) if r is not None and r.report is not None]
        if best is not naive and len(reports) == 2 and reports[0].key <= reports[1].key:
            text += " There it is no better than the plain average."
        return text

    def _words(self, row: Row) -> str:
        assert row.report is not None
        if row.report.accuracy is None:
            return f"{row.name}, {row.report.agreement:.2%} agreement with the ensemble"
        return f"{row.name}, accuracy {row.report.accuracy:.2%}, loss {row.report.loss:.4f}"

    def _error(self, row: Row) -> float:
        assert row.report is not None
        share = row.report.agreement if row.report.accuracy is None else row.report.accuracy
        # Agresti and Coull (1998): two successes and two failures more, so that 100 % is not certain
        n = row.report.samples + 4
        share = (share * row.report.samples + 2) / n
        return float(2 * (share * (1 - share) / n) ** 0.5)

    def footnotes(self) -> list[str]:
        """What the marks of the table mean, the models themselves, and the notes."""
        out = [
            "select: on the data that choose (accuracy; agreement without labels); all other columns on the report's data",
            "barrier: loss above the mean loss of the models; drift: change of a model's own output by its map",
        ]
        if any(r.worse_than_naive for r in self.rows):
            out.append(
                "! accuracy or loss is worse than that of the plain average of the models as they are (identity + none)"
            )
        if any(r.fits for r in self.rows):
            out.append("* fits weights to the calibration data, in closed form: this is training")
        out += [f"{r.name} failed: {r.error}" for r in self.rows if r.error]
        return [*out, *self.notes]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, without the pictures; numbers that are NaN or infinite, which JSON has not, are None."""
        best, modest = self.best(), self.best(fitting=False)
        out = {
            "format": "automerge.comparison/1",
            "recommendation": self.recommendation(),
            "best": None if best is None else best.name,
            "best_without_fitting": None if modest is None else modest.name,
            "samples": dict(self.samples),
            "rows": [asdict(r) for r in self.rows],
            "models": [asdict(m) for m in self.models],
            "ensemble": asdict(self.ensemble),
            "notes": list(self.notes),
            "settings": dict(self.settings),
        }
        return {key: _finite(value) for key, value in out.items()}

    def ends(self) -> list[list[str]]:
        """The models and their ensemble as rows of the table."""
        scores = [("ensemble", self.ensemble), *((f"model {k}", m) for k, m in enumerate(self.models))]
        out = []
        for name, s in scores:
            accuracy = "-" if s.accuracy is None else f"{s.accuracy:.2%}"
            loss = "-" if s.loss is None else f"{s.loss:.4f}"
            out.append([name, "", "", accuracy, loss, f"{s.agreement:.2%}", "", "", ""])
        return out

    def __str__(self) -> str:
        cells = [list(COLUMNS), *self.ends(), *(r.cells() for r in self.rows)]
        widths = [max(len(row[k]) for row in cells) for k in range(len(COLUMNS))]
        lines = []
        for row in cells:
            parts = [c.ljust(w) if k < 2 else c.rjust(w) for k, (c, w) in enumerate(zip(row, widths, strict=True))]
            lines.append("  ".join(parts).rstrip())
        return "\n".join([*lines, *self.footnotes(), "", self.recommendation()])


def _known(loss: float) -> float:
    """A loss that is NaN counts as the worst."""
    return inf if isnan(loss) else loss


def _finite(value: Any) -> Any:
    """Plain data without numbers that are none."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not isfinite(value) else value
