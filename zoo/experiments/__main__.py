"""The command: `python -m zoo.experiments NAME [--quick]`."""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from zoo.experiments import (
    ablation,
    corruptions,
    cycle,
    landscape,
    many,
    modules,
    report,
    soups,
    stability,
    tasks,
    width,
    widths,
)
from zoo.experiments._experiment import PROFILES, Experiment, Lab
from zoo.experiments._run import render, run
from zoo.experiments._settings import SETTINGS

_MODULES = (many, width, cycle, landscape, ablation, stability, corruptions, tasks, widths, soups, modules)
EXPERIMENTS: dict[str, Experiment] = {m.EXPERIMENT.name: m.EXPERIMENT for m in _MODULES}
"""Name -> experiment."""


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m zoo.experiments", description=__doc__)
    known = ", ".join(EXPERIMENTS)
    parser.add_argument("names", nargs="+", metavar="NAME", help=f"{known}; all; or report, which runs nothing")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="digits only, fewer networks")
    size.add_argument("--smoke", action="store_true", help="networks of two epochs, to see that everything runs")
    parser.add_argument(
        "--out",
        type=Path,
        help="directory of the results (docs/experiments; runs/experiments-quick or -smoke otherwise)",
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), help="cache directory of the networks (default runs)"
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="SETTING", help="run these, keep the other settings' rows"
    )
    parser.add_argument("--render", action="store_true", help="make figures and pages again from the JSON; run nothing")
    return parser.parse_args(argv)


def _problem(options: argparse.Namespace, names: list[str]) -> str:
    """What is wrong with the command, before anything is done."""
    for name in options.names:
        if name not in (*EXPERIMENTS, "all", "report"):
            return f"there is no experiment {name!r}; choose one of {', '.join(EXPERIMENTS)}, all or report"
    if importlib.util.find_spec("matplotlib") is None:
        return "figures need matplotlib; install it with: pip install 'automerge[plot]'"
    if options.render:
        gone = [n for n in names if not (options.out / f"{n}.json").is_file()]
        return f"{options.out} holds no {gone[0]}.json to make a page of" if gone and "all" not in options.names else ""
    lab = Lab(options.runs, PROFILES[options.profile])
    settings = {u.key["setting"] for n in names for u in EXPERIMENTS[n].units(lab)}
    unknown = [s for s in options.only if s not in settings]
    if unknown:
        return f"nothing in {', '.join(names)} has the setting {unknown[0]!r}; there are {', '.join(sorted(settings))}"
    try:
        for setting in options.only or settings:
            if setting in SETTINGS:
                _ = SETTINGS[setting].dataset
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; returns the exit code."""
    options = _arguments(argv)
    options.profile = "quick" if options.quick else "smoke" if options.smoke else "full"
    if options.out is None:
        options.out = (
            Path("docs/experiments") if options.profile == "full" else Path(f"runs/experiments-{options.profile}")
        )
    names = [n for n in EXPERIMENTS if n in options.names or "all" in options.names]
    if problem := _problem(options, names):
        print(f"error: {problem}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)  # the last bits of a sum depend on their number, and these networks are small
    lab = Lab(options.runs, PROFILES[options.profile])
    try:
        for name in names:
            if options.render:
                if (options.out / f"{name}.json").is_file():
                    render(EXPERIMENTS[name], options.out)
                continue
            only = [s for s in options.only if any(u.key["setting"] == s for u in EXPERIMENTS[name].units(lab))]
            if options.only and not only:
                continue
            run(EXPERIMENTS[name], lab, options.out, command=_command(name, options), only=only, say=_say)
        print(report.write(options.out, tuple(EXPERIMENTS)))
    except KeyboardInterrupt:
        print(
            f"interrupted; what was in {options.out} is as it was. Units that are done are kept in {options.runs}, "
            "and the same command goes on from there",
            file=sys.stderr,
        )
        return 130
    return 0


def _command(name: str, options: argparse.Namespace) -> str:
    words = ["python", "-m", "zoo.experiments", name]
    words += [f"--{options.profile}"] if options.profile != "full" else []
    words += ["--only", *options.only] if options.only else []
    return shlex.join(words)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
