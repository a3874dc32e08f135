"""The commands of `automerge.cli`, from parsed options to printed results."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from automerge import _demo
from automerge._console import Console
from automerge._data import Batches
from automerge._errors import InvarianceError
from automerge._factory import UsageError, build_model, draw_inputs, load_batches, parse_input
from automerge._files import write_text
from automerge._verify import verify as verify_symmetry
from automerge.infer import infer
from automerge.io import StateDict, check_state_dict, check_writable, load_state_dict
from automerge.matchers import FrankWolfe, Identity, Matcher
from automerge.merge import merge as merge_models
from automerge.symmetry import Symmetry

MATCHERS: Mapping[str, Callable[[], Matcher]] = {"frank-wolfe": FrankWolfe, "identity": Identity}
"""Name on the command line -> the matcher."""


def demo(options: argparse.Namespace) -> None:
    """``automerge demo``."""
    settings = _demo.Settings(options.out, options.models, options.seed, options.quick)
    _demo.run(settings, Console())


def inspect(options: argparse.Namespace) -> None:
    """``automerge inspect``: infer, verify and print."""
    console = Console()
    for path in (options.json, options.draw):
        if path is not None:
            check_writable(path, options.force)
    specs = [parse_input(text) for text in options.input]
    model = build_model(options.factory, options.seed)
    args, kwargs = draw_inputs(specs, options.seed)
    with console.stage("infer" if options.no_verify else "infer and verify"):
        symmetry = infer(model, args, kwargs, verify=not options.no_verify, strict=options.strict)
    console.show(str(symmetry))
    if not options.no_verify:
        console.show("verified: random group elements leave the float64 output unchanged")
    if options.json is not None:
        write_text(options.json, symmetry.to_json(), options.force)
        console.show(f"written to {options.json}")
    if options.draw is not None:
        console.show(f"drawn to {symmetry.draw(options.draw, options.force)}")


def verify(options: argparse.Namespace) -> None:
    """``automerge verify``: test the inferred or a given symmetry."""
    console = Console()
    specs = [parse_input(text) for text in options.input]
    given = None if options.symmetry is None else Symmetry.from_json(_read(options.symmetry))
    model = build_model(options.factory, options.seed)
    args, kwargs = draw_inputs(specs, options.seed)
    symmetry = given
    if symmetry is None:
        with console.stage("infer"):
            symmetry = infer(model, args, kwargs, verify=False)
    with console.stage("verify"):
        outcome = _verified(model, args, symmetry, kwargs, options)
    console.show(
        f"the symmetry holds: {len(symmetry.sets)} groups, {symmetry.free_share:.1%} of the parameter axes' positions "
        f"are free\n{outcome}"
    )


def _verified(model: Any, args: Any, symmetry: Symmetry, kwargs: Any, options: argparse.Namespace) -> Any:
    """The outcome of the test; a file that fails it is bad input and not a defect of a rule."""
    try:
        return verify_symmetry(model, args, symmetry, kwargs, seed=options.seed)
    except InvarianceError as error:
        if options.symmetry is None:
            raise
        raise InvarianceError(f"{options.symmetry} is no symmetry of {options.factory}: {error}") from error


def merge(options: argparse.Namespace) -> None:
    """``automerge merge``: align checkpoints and write their average."""
    console = Console()
    _check_output(options.output, options.force)
    if len(options.checkpoints) < 2:
        raise UsageError(f"merging needs at least two checkpoints, and only {options.checkpoints[0]} was given")
    weights = None if options.weights is None else _weights(options.weights)
    specs = [parse_input(text) for text in options.input or ()]
    model = build_model(options.factory, options.seed)
    states = _read_checkpoints(options.checkpoints, model.state_dict())
    data = None if options.data is None else load_batches(options.data)
    args, kwargs = draw_inputs(specs, options.seed) if specs else _example(data)
    with console.stage("merge"):
        result = merge_models(
            states,
            args,
            kwargs,
            architecture=model,
            matcher=MATCHERS[options.matcher](),
            weights=weights,
            data=data,
            repair=options.repair,
            coordinates="universe" if options.reference is None else options.reference,
        )
    if result.matching.stats.get("interrupted"):
        raise KeyboardInterrupt
    result.save(options.output, options.force)
    console.show(result.report())
    console.show(f"written to {options.output}")


def _check_output(path: Path, force: bool) -> None:
    check_writable(path, force)
    if path.suffix.lower() != ".safetensors":
        raise UsageError(f"-o {path}: automerge writes safetensors only; give a name that ends in .safetensors")


def _weights(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(
            f"--weights {text!r} is not a list of numbers with commas, one weight per checkpoint"
        ) from error


def _read_checkpoints(paths: Sequence[str], expected: Mapping[str, Any]) -> list[StateDict]:
    states = []
    for path in paths:
        state = load_state_dict(path)
        check_state_dict(state, expected, str(path))
        states.append(state)
    return states


def _example(data: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs of the first batch: one positional input, or keyword inputs."""
    if data is None:
        raise UsageError(
            "the model must run once: give an example input with --input SHAPE, or batches with --data FACTORY"
        )
    batch = next(iter(Batches(data)))
    return batch.args, dict(batch.kwargs)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise UsageError(f"--symmetry {path} cannot be read ({reason})") from error
