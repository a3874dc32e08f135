"""Running experiments: units one after the other, kept as they are done; at the end JSON, a figure and a page."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import automerge
from zoo.experiments._experiment import Experiment, Lab, Record, Row, Unit
from zoo.experiments._figures import save
from zoo.experiments._settings import Setting
from zoo.train import write_atomically

Say = Callable[[str], None]
_PACKAGES = ("torch", "numpy", "scipy", "scikit-learn")


def run(
    experiment: Experiment, lab: Lab, out: Path, *, command: str, only: Sequence[str] = (), say: Say = lambda _: None
) -> Record:
    """Run an experiment and write its JSON, figure and page, which stay as they were until everything is done.

    Units that are done are noted in a file in the cache directory, so that an interrupted run goes on where it stopped.

    Args:
        experiment: which.
        lab: where its networks come from, and how much is run.
        out: the directory of the results.
        command: what was typed, for the record.
        only: names of settings; the other settings' rows are taken from the record that is there.
        say: is told about every unit.
    """
    begin = time.perf_counter()
    notes = _Notes(lab.runs / "rows" / f"{experiment.name}-{lab.profile.name}.jsonl")
    lab.used.clear()
    units = [u for u in experiment.units(lab) if not only or u.key["setting"] in only]
    rows: list[Row] = []
    for number, unit in enumerate(units):
        label = ", ".join(f"{k} {v}" for k, v in unit.key.items())
        rows += notes.rows(unit)
        say(f"{experiment.name} {number + 1}/{len(units)}: {label} ({time.perf_counter() - begin:.0f} s)")
    names = list(dict.fromkeys(u.key["setting"] for u in units))
    now = {
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "seconds": round(time.perf_counter() - begin, 1),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "settings": names,
    }
    settings = {name: described(setting, lab.runs) for name, setting in lab.used.items()}
    record = Record(experiment.name, lab.profile.name, tuple(rows), settings, (now,))
    path = out / f"{experiment.name}.json"
    if only and path.is_file():
        record = _joined(Record.read(path), record, names)
    publish(experiment, record, out)
    notes.path.unlink(missing_ok=True)
    return record


def publish(experiment: Experiment, record: Record, out: Path) -> None:
    """Write the JSON, and from it the figure and the page."""
    record.write(out / f"{experiment.name}.json")
    render(experiment, out)


def render(experiment: Experiment, out: Path) -> None:
    """Make figure and page again from the JSON; nothing is run."""
    record = Record.read(out / f"{experiment.name}.json")
    save(experiment.draw(record), out / f"{experiment.name}.svg")
    text = page(experiment, record)
    write_atomically(out / f"{experiment.name}.md", lambda temporary: Path(temporary).write_text(text, "utf-8"))


def page(experiment: Experiment, record: Record) -> str:
    """The page of a record."""
    commands = "\n".join(dict.fromkeys(str(r["command"]) for r in record.runs))
    seconds = sum(float(r["seconds"]) for r in record.runs)
    last = record.runs[-1]
    made = " and ".join(dict.fromkeys(r["versions"]["automerge"] for r in record.runs if "automerge" in r["versions"]))
    packages = ", ".join(f"{k} {v}" for k, v in {**last["versions"], "automerge": made or "-"}.items())
    sizes = "; ".join(
        f"{s['title']}: {s['parameters']:,} parameters, {s['samples']:,} training samples, single networks "
        f"{100 * s['accuracy']:.1f} %"
        for s in record.settings.values()
    )
    parts = [
        f"# {experiment.title}\n",
        experiment.question + "\n",
        f"![{experiment.title}]({experiment.name}.svg)\n",
        experiment.body(record).rstrip() + "\n",
        "## How this was made\n",
        f"```bash\n{commands}\n```\n",
        f"{len(record.rows):,} measurements (profile *{record.profile}*), {seconds:,.0f} s on {last['threads']} "
        f"thread(s); {packages}. Every number is in [{experiment.name}.json]({experiment.name}.json).\n",
        f"Settings: {sizes}. Data other than the digits are read from the directory `AUTOMERGE_DATA` (`python -m "
        "zoo.download`).\n",
    ]
    return "\n".join(parts)


def versions() -> dict[str, str]:
    """This package with its commit, Python, and the packages that matter."""
    found = {"automerge": "+".join([automerge.__version__, *_commit()]), "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> list[str]:
    """The commit that is checked out, ``dirty`` behind it if files differ; nothing outside a repository."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return [subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()]
    except (OSError, subprocess.CalledProcessError):
        return []


def described(setting: Setting, runs: Path) -> dict[str, Any]:
    """A setting and its networks that are in the cache, for the record."""
    cards = [json.loads(p.read_text("utf-8")) for p in sorted((runs / setting.name).glob("seed*.json"))]
    scores = [card["metrics"]["test_accuracy"] for card in cards]
    return {
        "title": setting.title,
        "model": cards[0]["model"] if cards else "",
        "data": setting.data,
        "recipe": asdict(setting.recipe),
        "parameters": sum(p.numel() for p in setting.factory().parameters()),
        "samples": len(setting.dataset.y_train),
        "seeds": [card["seed"] for card in cards],
        "accuracy": sum(scores) / max(len(scores), 1),
    }


def _joined(old: Record, new: Record, names: Sequence[str]) -> Record:
    """The new settings' rows in the place of the old ones'."""
    kept = [r for r in old.rows if r["setting"] not in names]
    order = list(dict.fromkeys([*(r["setting"] for r in old.rows), *names]))
    rows = sorted([*kept, *new.rows], key=lambda r: order.index(r["setting"]))
    runs = [{**r, "settings": [s for s in r["settings"] if s not in names]} for r in old.runs]
    runs = [r for r in runs if r["settings"]]
    return replace(new, rows=tuple(rows), settings={**old.settings, **new.settings}, runs=(*runs, *new.runs))


class _Notes:
    """The units that an interrupted run had done."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: dict[str, list[Row]] = {}
        if path.is_file():
            for line in path.read_text("utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:  # the line that was being written
                    continue
                self.done[entry["key"]] = entry["rows"]

    def rows(self, unit: Unit) -> list[Row]:
        """A unit's rows: read, or worked out and noted."""
        key = json.dumps(dict(unit.key), sort_keys=True)
        if key not in self.done:
            found = [{**unit.key, **row} for row in unit.work()]
            self.done[key] = json.loads(json.dumps(found))
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps({"key": key, "rows": found}) + "\n")
        return self.done[key]
