"""The commands of `automerge.cli`, from parsed options to printed results."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from automerge import _demo
from automerge._canvas import check_picture, new_figure
from automerge._console import Console, follow
from automerge._distributed import Shared, merge_share
from automerge._errors import InvarianceError, SymmetryError
from automerge._factory import (
    UsageError,
    build_model,
    check_apart,
    check_checkpoints,
    draw_inputs,
    example_of,
    load_batches,
    parse_input,
)
from automerge._files import check_writable, write_text
from automerge._loading import read_checkpoint
from automerge._merge_checks import check_weights
from automerge._ranks import Group, Ranks
from automerge._shards import SUFFIX as SHARDS
from automerge._shards import check_index
from automerge._verify import verify as verify_symmetry
from automerge.infer import infer
from automerge.io import check_savable, save_state_dict
from automerge.matchers import MATCHERS, FrankWolfe, Matcher, Matching
from automerge.merge import MergeResult
from automerge.merge import merge as merge_models
from automerge.symmetry import Symmetry


def demo(options: argparse.Namespace) -> None:
    """``automerge demo``."""
    settings = _demo.Settings(options.out, options.models, options.seed, options.quick)
    _demo.run(settings, Console())


def inspect(options: argparse.Namespace) -> None:
    """``automerge inspect``: infer, verify and print."""
    console = Console()
    check_apart({"--json": options.json, "--draw": options.draw})
    if options.json is not None:
        check_writable(options.json, options.force)
    if options.draw is not None:
        check_picture(new_figure(1, 1), options.draw, options.force)
    specs = [parse_input(text) for text in options.input]
    model = build_model(options.factory, options.seed)
    args, kwargs = draw_inputs(specs, options.seed)
    with console.stage("infer" if options.no_verify else "infer and verify"):
        symmetry = infer(model, args, kwargs, verify=not options.no_verify, strict=options.strict)
    console.show(str(symmetry))
    unseen = any(note.startswith("not verified") for note in symmetry.notes)
    if symmetry.moved and not options.no_verify and not unseen:
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
    given = None if options.symmetry is None else _read_symmetry(options.symmetry)
    model = build_model(options.factory, options.seed)
    args, kwargs = draw_inputs(specs, options.seed)
    symmetry = given
    if symmetry is None:
        with console.stage("infer"):
            symmetry = infer(model, args, kwargs)
    with console.stage("verify"):
        outcome = _verified(model, args, symmetry, kwargs, options)
    if not outcome.reacted:
        raise UsageError(f"{options.factory}: {outcome}; try another --input or --seed")
    console.show(
        f"the symmetry holds: {symmetry.counted}, {symmetry.free_share:.1%} of the parameter axes' positions "
        f"are free\n{outcome}"
    )


def _verified(model: Any, args: Any, symmetry: Symmetry, kwargs: Any, options: argparse.Namespace) -> Any:
    """The outcome of the test; a file that fails it is bad input and not a defect of a rule."""
    try:
        return verify_symmetry(model, args, symmetry, kwargs, seed=options.seed)
    except SymmetryError as error:
        raise UsageError(f"--symmetry {options.symmetry} does not fit {options.factory}: {error}") from error
    except InvarianceError as error:
        if options.symmetry is None:
            raise
        raise InvarianceError(f"{options.symmetry} is no symmetry of {options.factory}: {error}") from error


def merge(options: argparse.Namespace) -> None:
    """``automerge merge``: align checkpoints and write their average."""
    if _processes() > 1:
        return _merge_shared(options)
    console = Console()
    _check_output(options.output, options.force)
    _check_merge(options)
    if options.matching is not None:
        _check_output(options.matching, options.force, "--matching")
    matcher: Matcher = MATCHERS[options.matcher]()
    if options.resume is not None:
        matcher = FrankWolfe(resume=Matching.load(options.resume))
    weights = None if options.weights is None else _weights(options.weights)
    specs = [parse_input(text) for text in options.input or ()]
    data = None if options.data is None else load_batches(options.data)
    model = build_model(options.factory, options.seed, empty=options.offload is not None and data is None)
    states = [read_checkpoint(path, model) for path in options.checkpoints]
    check_savable(states[0])
    args, kwargs = draw_inputs(specs, options.seed) if specs else example_of(data, model)
    with _kept(options, console), console.stage("merge") as advance:
        result = merge_models(
            states,
            args,
            kwargs,
            architecture=model,
            matcher=matcher,
            weights=weights,
            data=data,
            repair=options.repair,
            coordinates="universe" if options.reference is None else options.reference,
            offload=options.offload,
            progress=follow(advance),
        )
    try:
        if options.matching is not None:
            result.matching.save(options.matching, options.force)
    finally:  # a disk that is too full for the one may have room for the other
        if not result.matching.stats.get("interrupted"):
            _save(result, options)
    if result.matching.stats.get("interrupted"):
        if options.matching is not None:
            console.show(f"the search was interrupted; go on with --resume {options.matching}")
        raise KeyboardInterrupt
    for number, file in enumerate(options.checkpoints):
        console.show(f"model {number}: {file}")
    console.show(result.report())
    console.show(f"written to {options.output}")


@contextmanager
def _kept(options: argparse.Namespace, console: Console) -> Iterator[None]:
    """Of a merge that ends after its search (an interrupt, a repair that fails) the alignment is written all the same."""
    try:
        yield
    except BaseException as error:
        found = getattr(error, "matching", None)
        if found is not None and options.matching is not None:
            found.save(options.matching, options.force)
            console.note(f"the search had ended, and its alignment is in {options.matching}; go on with --resume")
        raise


def _processes() -> int:
    """How many processes share the merge, as torchrun says."""
    size = os.environ.get("WORLD_SIZE", "1")
    absent = next((name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ), None)
    if size.isdecimal() and len(size) < 7 and (int(size) <= 1 or absent is None):
        return int(size)
    wrong = "that is no number" if absent is None or not size.isdecimal() else f"{absent} is not set"
    raise UsageError(f"WORLD_SIZE={size} is set, as by torchrun, but {wrong}; start with torchrun, or unset WORLD_SIZE")


def _save(result: MergeResult, options: argparse.Namespace) -> None:
    """Write the merged network, with the names of the files that it was made of."""
    files = zip(options.checkpoints, result.provenance["inputs"], strict=True)
    named = [{"file": file, **item} for file, item in files]
    replace(result, provenance={**result.provenance, "inputs": named}).save(options.output, options.force)


def _merge_shared(options: argparse.Namespace) -> None:
    """``torchrun ... -m automerge merge``: every process holds its own checkpoints, process 0 writes."""
    console = Console()
    seconds = os.environ.get("AUTOMERGE_TIMEOUT", "600")
    if not seconds.isdecimal() or len(seconds) > 7:
        raise UsageError(f"AUTOMERGE_TIMEOUT={seconds!r} is not a number of seconds, of at most seven digits")
    ranks = Group(float(seconds))
    try:
        shared = _share(options, ranks, console)
        with ranks.together():
            if ranks.rank == 0:
                _write_shared(options, ranks, shared)
    finally:
        ranks.close()
    interrupted = bool(shared.matching.stats["interrupted"])
    if ranks.rank == 0 and interrupted and options.matching is not None:
        console.show(f"the search was interrupted; go on with --resume {options.matching}")
    if interrupted:
        raise KeyboardInterrupt
    if ranks.rank == 0:
        console.show(f"merged {len(options.checkpoints)} checkpoints in {ranks.size} processes\n{shared.matching}")
        console.show(f"written to {options.output}")


def _share(options: argparse.Namespace, ranks: Ranks, console: Console) -> Shared:
    """Check everything on all processes, then merge."""
    with ranks.together():
        if ranks.rank == 0:
            _check_output(options.output, options.force)
            if options.matching is not None:
                _check_output(options.matching, options.force, "--matching")
        _check_merge(options)
        if options.matcher != "frank-wolfe" or options.data is not None:
            raise UsageError("with several processes --matcher is frank-wolfe, and --data and its repair come after")
        resume = None if options.resume is None else Matching.load(options.resume)
        args, kwargs = draw_inputs([parse_input(text) for text in options.input], options.seed)
        model = build_model(options.factory, options.seed, empty=options.offload is not None)
        weights = (
            None if options.weights is None else check_weights(_weights(options.weights), len(options.checkpoints))
        )
    with console.stage("merge") if ranks.rank == 0 else nullcontext() as advance:
        return merge_share(
            ranks,
            model,
            options.checkpoints,
            args,
            kwargs,
            matcher=FrankWolfe(resume=resume, offload=options.offload),
            weights=weights,
            reference=options.reference,
            progress=None if advance is None else follow(advance),
        )


def _write_shared(options: argparse.Namespace, ranks: Ranks, shared: Shared) -> None:
    """What process 0 writes: the matching if asked for, and the result of a search that was not interrupted."""
    if options.matching is not None:
        shared.matching.save(options.matching, options.force)
    if shared.matching.stats["interrupted"]:
        return
    inputs = [{"file": f, "sha256": h} for f, h in zip(options.checkpoints, shared.hashes, strict=True)]
    made = {"inputs": inputs, "processes": ranks.size, "matcher": shared.matching.matcher}
    save_state_dict(options.output, shared.state_dict, {"automerge.provenance": json.dumps(made)}, options.force)


def _check_output(path: Path, force: bool, option: str = "-o") -> None:
    check_writable(path, force)
    if option == "-o" and path.name.endswith(SHARDS):
        check_index(path, force)
    elif path.suffix.lower() != ".safetensors":
        raise UsageError(f"{option} {path}: automerge writes safetensors only; give a name that ends in .safetensors")


def _check_merge(options: argparse.Namespace) -> None:
    """What the options say about each other; before any long work."""
    count = len(options.checkpoints)
    hint = "; --weights is the way to make one checkpoint count more than another"
    check_checkpoints(options.checkpoints, "merging", hint)
    check_apart({"-o": options.output, "--matching": options.matching}, options.checkpoints)
    check_apart({"--resume": options.resume, "-o": options.output})
    if options.data is None and not options.input:
        raise UsageError(
            "the model must run once: give an example input with --input SHAPE, or batches with --data FACTORY"
        )
    if options.reference is not None and not 0 <= options.reference < count:
        raise UsageError(f"--reference {options.reference}: give the number of a checkpoint, from 0 to {count - 1}")
    if options.offload is not None and options.matcher != "frank-wolfe":
        raise UsageError(f"--offload is for frank-wolfe, not for --matcher {options.matcher}")
    if options.resume is not None and options.matcher != "frank-wolfe":
        raise UsageError(f"--resume goes on with frank-wolfe, not with --matcher {options.matcher}")
    if options.data is None and options.repair not in ("auto", "none"):
        raise UsageError(f"--repair {options.repair} measures activations: give batches with --data FACTORY")
    if options.data is None and MATCHERS[options.matcher]().needs_data:
        raise UsageError(f"--matcher {options.matcher} looks at activations: give batches with --data FACTORY")


def _weights(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(
            f"--weights {text!r} is not a list of numbers with commas, one weight per checkpoint"
        ) from error


def _read_symmetry(path: Path) -> Symmetry:
    try:
        return Symmetry.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise UsageError(f"--symmetry {path} cannot be read ({reason})") from error
    except SymmetryError as error:
        raise UsageError(f"--symmetry {path}: {error}") from error
