"""What every experiment is, and the record that its page is made of."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.experiments._bench import Bench
from zoo.experiments._settings import SETTINGS, Setting
from zoo.train import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
FORMAT = "zoo.experiments/1"


@dataclass(frozen=True)
class Profile:
    """How much is run.

    Attributes:
        name: ``full``, ``quick`` (digits only) or ``smoke`` (two epochs, to see that everything runs).
        sets: how many disjoint sets of networks.
        most: the largest number of networks that are merged.
        short: whether networks are trained for two epochs only.
    """

    name: str
    sets: int = 3
    most: int = 10
    short: bool = False

    @property
    def full(self) -> bool:
        """Whether everything is run."""
        return self.name == "full"


PROFILES = {
    p.name: p for p in (Profile("full"), Profile("quick", most=4), Profile("smoke", sets=2, most=3, short=True))
}


@dataclass
class Lab:
    """Where experiments get their networks.

    Attributes:
        runs: the cache directory.
        profile: how much is run.
        benches: by setting, and whether BatchNorm is fused.
        used: the settings of the experiment that is running.
    """

    runs: Path
    profile: Profile
    benches: dict[tuple[str, bool], Bench] = field(default_factory=dict)
    used: dict[str, Setting] = field(default_factory=dict)

    def bench(self, setting: Setting | str, fused: bool = False) -> Bench:
        """A setting, ready to be merged; made once."""
        chosen = SETTINGS[setting] if isinstance(setting, str) else setting
        key = (chosen.name, fused)
        if key not in self.benches:
            self.benches[key] = Bench(self.use(chosen), self.runs, fused)
        self.use(chosen)
        return self.benches[key]

    def use(self, setting: Setting) -> Setting:
        """Note that a setting is used; as long as the profile says."""
        self.used[setting.name] = setting.shortened() if self.profile.short else setting
        return self.used[setting.name]


@dataclass(frozen=True)
class Unit:
    """A piece of work that is done or not.

    Attributes:
        key: what tells it from the others, the setting's name among it; part of each of its rows.
        work: gives the rows.
    """

    key: Mapping[str, Any]
    work: Callable[[], Iterable[Row]]


@dataclass(frozen=True)
class Experiment:
    """A question put to sets of networks.

    Attributes:
        name: of the command and the files.
        title: of the page.
        question: what it asks and how, for the page.
        units: what is to be done, in a laboratory.
        draw: a figure of the record.
        body: the page's tables, of the record alone.
    """

    name: str
    title: str
    question: str
    units: Callable[[Lab], Iterator[Unit]]
    draw: Callable[[Record], Figure]
    body: Callable[[Record], str]


@dataclass(frozen=True)
class Record:
    """What an experiment found: every raw number.

    Attributes:
        experiment: its name.
        profile: the name of the profile.
        rows: one dict of plain values per number that was measured.
        settings: setting -> title, data, recipe, number of parameters.
        runs: how the rows came about: command, date, seconds, versions, settings.
    """

    experiment: str
    profile: str
    rows: tuple[Row, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    runs: tuple[Mapping[str, Any], ...] = ()

    def where(self, **wanted: Any) -> list[Row]:
        """The rows with some values; a tuple or list stands for any of its members."""
        return [r for r in self.rows if all(_fits(r.get(k), v) for k, v in wanted.items())]

    def values(self, key: str, **wanted: Any) -> list[Any]:
        """The different values of a column, in order of appearance."""
        return list(dict.fromkeys(r[key] for r in self.where(**wanted) if r.get(key) is not None))

    def title(self, setting: str) -> str:
        """A setting's title, also where only parts of it were used."""
        known = SETTINGS[setting].title if setting in SETTINGS else setting
        return str(self.settings.get(setting, {}).get("title", known))

    def write(self, path: Path) -> None:
        """Write JSON with one line per row; in columns of texts a number stands for one of ``codes``."""
        columns = list(dict.fromkeys(k for r in self.rows for k in r))
        codes = {c: self.values(c) for c in columns if any(isinstance(r.get(c), str) for r in self.rows)}
        head: dict[str, Any] = {"format": FORMAT, "experiment": self.experiment, "profile": self.profile}
        head |= {"runs": list(self.runs), "settings": dict(self.settings), "columns": columns, "codes": codes}
        place = {c: {text: k for k, text in enumerate(texts)} for c, texts in codes.items()}
        lines = []
        for row in self.rows:
            cells = [place[c].get(row.get(c)) if c in place else _rounded(row.get(c), c) for c in columns]
            lines.append(json.dumps(cells, separators=(",", ":")))
        text = json.dumps(head, separators=(",", ":"), ensure_ascii=False).replace(',"', ',\n"')[:-1]
        text += ',\n"rows":[\n' + ",\n".join(lines) + "\n]}\n"
        write_atomically(path, lambda temporary: Path(temporary).write_text(text, "utf-8"))

    @staticmethod
    def read(path: Path) -> Record:
        """Read what `write` wrote.

        Raises:
            ValueError: if the file is something else.
        """
        data = json.loads(path.read_text("utf-8"))
        if data.get("format") != FORMAT:
            raise ValueError(f"{path} is no record of an experiment: expected the format {FORMAT!r}")
        codes = data.get("codes", {})
        rows = []
        for cells in data["rows"]:
            named = {c: v for c, v in zip(data["columns"], cells, strict=True) if v is not None}
            rows.append({c: codes[c][v] if c in codes else v for c, v in named.items()})
        return Record(data["experiment"], data["profile"], tuple(rows), data["settings"], tuple(data["runs"]))


def _fits(value: Any, wanted: Any) -> bool:
    return value in wanted if isinstance(wanted, tuple | list | set) else value == wanted


def _rounded(value: Any, column: str) -> Any:
    if not isinstance(value, float):
        return value
    return float(f"{value:.2g}" if column == "seconds" else f"{value:.5g}")


def disjoint(sets: int, stride: int, count: int) -> list[list[int]]:
    """The seeds of disjoint sets of ``count`` networks, each from its own ``stride`` seeds.

    Examples:
        >>> disjoint(2, 5, 3)
        [[0, 1, 2], [5, 6, 7]]
    """
    if count > stride:
        raise ValueError(f"sets of {count} networks do not fit {stride} seeds each")
    return [list(range(k * stride, k * stride + count)) for k in range(sets)]


def span(seeds: Sequence[int]) -> str:
    """Seeds in short.

    Examples:
        >>> span([5, 6, 7])
        '5-7'
    """
    return f"{seeds[0]}-{seeds[-1]}" if len(seeds) > 1 else str(seeds[0])


def each_set(
    lab: Lab, settings: Iterable[str], count: int, work: Callable[[Lab, str, list[int]], Iterable[Row]]
) -> Iterator[Unit]:
    """A unit for every disjoint set of ``count`` networks of every setting."""
    for setting in settings:
        for number, seeds in enumerate(disjoint(lab.profile.sets, count, count)):
            key = {"setting": setting, "n": count, "set": number, "seeds": span(seeds)}
            yield Unit(key, partial(work, lab, setting, seeds))


def each_length(
    lab: Lab, settings: Iterable[str], lengths: Iterable[int], work: Callable[[Lab, str, list[int]], Iterable[Row]]
) -> Iterator[Unit]:
    """A unit for every disjoint set of networks of every setting, for several numbers of networks."""
    wanted = [n for n in lengths if n <= lab.profile.most]
    stride = 5 if lab.profile.full else lab.profile.most
    for setting in settings:
        for length in wanted:
            for number, seeds in enumerate(disjoint(lab.profile.sets, stride, length)):
                key = {"setting": setting, "n": length, "set": number, "seeds": span(seeds)}
                yield Unit(key, partial(work, lab, setting, seeds))
