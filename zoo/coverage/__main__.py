"""The command: `python -m zoo.coverage`."""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from zoo.coverage._case import NAMES, QUICK, catalogue, missing
from zoo.coverage._measure import Row
from zoo.coverage._table import page, runnable, summary, verified
from zoo.coverage._worker import Worker

Task = tuple[str, str]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m zoo.coverage", description=__doc__)
    parser.add_argument("--library", choices=NAMES, action="append", help="only this library; may be given again")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these models")
    parser.add_argument(
        "--quick", action="store_true", help="a few models; exit code 1 if one is not answered or not verified"
    )
    parser.add_argument("--resume", action="store_true", help="keep the rows that the JSON file has")
    parser.add_argument("--retry", action="store_true", help="with --resume, repeat what did not verify, or blindly")
    parser.add_argument("--jobs", type=int, default=1, help="models measured at a time (default 1)")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for one model (default 120)")
    parser.add_argument("--out", type=Path, help="the page to write (default docs/coverage.md; with --quick, none)")
    return parser.parse_args(argv)


def _tasks(options: argparse.Namespace) -> tuple[list[Task], list[str]]:
    tasks: list[Task] = []
    skipped: list[str] = []
    for library in options.library or NAMES:
        reason = missing(library)
        if reason:
            skipped.append(f"{library} skipped: {reason}")
            continue
        names = QUICK[library] if options.quick else catalogue(library).names()
        tasks += [
            (library, n) for n in names if not options.only or n in options.only or n.split(":")[0] in options.only
        ]
    return tasks, skipped


def _load(path: Path) -> dict[Task, Row]:
    if not path.exists():
        return {}
    return {(r["library"], r["name"]): Row(**r) for r in json.loads(path.read_text("utf-8"))["rows"]}


def _ordered(rows: dict[Task, Row]) -> list[Row]:
    return [rows[k] for k in sorted(rows, key=lambda k: (NAMES.index(k[0]), k[1]))]


def _write(rows: dict[Task, Row], path: Path) -> None:
    today = datetime.date.today().isoformat()
    ordered = _ordered(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(ordered, today), "utf-8")
    path.with_suffix(".json").write_text(
        json.dumps({"date": today, "rows": [r.to_dict() for r in ordered]}, indent=1), "utf-8"
    )


def _say(row: Row) -> None:
    verdict = f"{row.error:.0e}" if verified(row) else f"NOT VERIFIED {row.message[:200]}"
    if row.status != "ok":
        verdict = f"{row.status.upper()} {row.message[:200]}"
    unruled = f", {len(row.unruled)} operators without a rule" if row.unruled else ""
    answer = f"{row.cpu_seconds:.2f} s, {row.groups} groups, {row.free:.3f} free{unruled}"
    print(f"{row.library} {row.title}: {answer}, {verdict}", flush=True)


def _share(tasks: Sequence[Task], rows: dict[Task, Row], options: argparse.Namespace, out: Path | None) -> None:
    with Worker(options.timeout) as worker:
        for task in tasks:
            row = worker.measure(*task)
            rows[task] = row
            _say(row)
            if out:
                _write(dict(rows), out)


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; returns the exit code."""
    options = _arguments(argv)
    out: Path | None = options.out or (None if options.quick else Path("docs/coverage.md"))
    tasks, skipped = _tasks(options)
    rows: dict[Task, Row] = {}
    if out and (options.resume or options.only):
        rows = _load(out.with_suffix(".json"))
    if options.resume:
        tasks = [t for t in tasks if t not in rows or (options.retry and (not verified(rows[t]) or rows[t].blind))]
    for line in skipped:
        print(line)
    with ThreadPoolExecutor(max(1, options.jobs)) as pool:
        list(pool.map(lambda i: _share(tasks[i :: options.jobs], rows, options, out), range(max(1, options.jobs))))
    done = [rows[t] for t in tasks if t in rows] if options.quick else list(rows.values())
    print("\n".join(summary(done)))
    bad = [r.title for r in (done if options.quick else runnable(done)) if not verified(r)]
    if bad:
        print(f"not verified: {', '.join(bad)}")
    return 1 if options.quick and bad else 0


if __name__ == "__main__":
    sys.exit(main())
