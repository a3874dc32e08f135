"""``automerge compare``: every matcher with every repair on one's own checkpoints."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from automerge._comparison import COLUMNS, Comparison
from automerge._comparison_page import page
from automerge._console import Console
from automerge._factory import (
    UsageError,
    build_model,
    check_apart,
    check_checkpoints,
    draw_inputs,
    example_of,
    load_batches,
    parse_input,
    parse_seed,
)
from automerge._files import check_writable, write_text
from automerge._loading import read_checkpoint
from automerge.compare import REPAIRS, compare
from automerge.matchers import MATCHERS

T = TypeVar("T")


def add_compare(parser: argparse.ArgumentParser, input_help: str) -> None:
    """The options of ``automerge compare``."""
    parser.description = (
        "Merge checkpoints by every matcher with every repair, and say which to use. What matchers and repairs look at,\n"
        "what chooses the best, and what is reported are three disjoint sets of data: --data, --select and --report. What\n"
        "is not given is cut out of --data."
    )
    parser.epilog = (
        "example:\n"
        "  automerge compare zoo.models.mlp:build a.safetensors b.safetensors --data mine.data:validation_batches "
        "--html table.html\n\nThe example input is --input, or else the first batch of --data: as many of its items "
        "as the model cannot do without."
    )
    parser.add_argument("factory", metavar="FACTORY", help="package.module:callable that builds the model")
    parser.add_argument(
        "checkpoints",
        nargs="+",
        metavar="CHECKPOINT",
        help="two or more files: .safetensors, .safetensors.index.json, .pt, .pth, .ckpt, .bin",
    )
    parser.add_argument(
        "--data", metavar="FACTORY", required=True, help="package.module:callable that gives batches (inputs, labels)"
    )
    parser.add_argument(
        "--select", metavar="FACTORY", help="batches by which the best is chosen (default: part of --data)"
    )
    parser.add_argument("--report", metavar="FACTORY", help="batches that are reported (default: part of --data)")
    parser.add_argument("--input", action="append", metavar="SHAPE", default=None, help=input_help)
    parser.add_argument("--matchers", metavar="A,B,...", help=f"only these (default: all): {', '.join(MATCHERS)}")
    parser.add_argument("--repairs", metavar="A,B,...", help=f"only these (default: all): {', '.join(REPAIRS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table as JSON")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="also write one page with table and pictures (needs matplotlib)"
    )
    parser.add_argument("--force", action="store_true", help="replace FILE if it exists")
    parser.add_argument(
        "--seed", type=parse_seed, default=0, metavar="S", help="of the weights, inputs and cuts of the data"
    )


def run_compare(options: argparse.Namespace) -> None:
    """Compare, print the table, and write the files."""
    console = Console()
    for path in (options.json, options.html):
        if path is not None:
            check_writable(path, options.force)
    check_apart({"--json": options.json, "--html": options.html}, options.checkpoints)
    matchers = {n: make() for n, make in _picked(options.matchers, MATCHERS, "--matchers").items()}
    repairs = _picked(options.repairs, REPAIRS, "--repairs")
    check_checkpoints(options.checkpoints, "comparing")
    specs = [parse_input(text) for text in options.input or ()]
    model = build_model(options.factory, options.seed)
    states = [read_checkpoint(file, model) for file in options.checkpoints]
    asked = {"--data": options.data, "--select": options.select, "--report": options.report}
    data, select, report = (None if text is None else load_batches(text, option) for option, text in asked.items())
    args, kwargs = draw_inputs(specs, options.seed) if specs else example_of(data, model)
    with console.stage("compare") as advance:
        found = compare(
            states,
            args,
            data,
            select=select,
            report=report,
            kwargs=kwargs,
            architecture=model,
            matchers=matchers,
            repairs=repairs,
            seed=options.seed,
            pictures=options.html is not None,
            progress=advance,
        )
    _show(found, console, options)


def _show(found: Comparison, console: Console, options: argparse.Namespace) -> None:
    """Print the table and write the files."""
    rows = [*found.ends(), *(r.cells() for r in found.rows)]
    console.table(f"{len(found.models)} models of {options.factory}", COLUMNS, rows, found.footnotes())
    console.show(found.recommendation())
    if options.json is not None:
        settings = {**found.settings, "factory": options.factory, "checkpoints": list(options.checkpoints)}
        text = json.dumps({**found.to_dict(), "settings": settings}, indent=2)
        write_text(options.json, text + "\n", options.force)
        console.show(f"written to {options.json}")
    if options.html is not None:
        write_text(options.html, page(found), options.force)
        console.show(f"written to {options.html}")


def _picked(text: str | None, known: Mapping[str, T], option: str) -> dict[str, T]:
    """Some of the known names, in the order given; all of them without a text."""
    if text is None:
        return dict(known)
    names = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [n for n in names if n not in known]
    if unknown or not names:
        raise UsageError(f"{option} {text!r}: choose from {', '.join(known)}")
    return {n: known[n] for n in names}
