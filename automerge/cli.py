"""The command line: ``automerge demo``, ``inspect``, ``verify``, ``merge`` and ``compare``.

Results go to standard output, progress and what models print to standard error. Bad input ends with one sentence and
exit code 2, an interrupt with 130 (SIGTERM with 143, SIGHUP with 129); an error that is not the caller's ends with 1 and
names itself a defect.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from automerge import _commands
from automerge._compare_command import add_compare, run_compare
from automerge._console import drop_output
from automerge._errors import AutomergeError, CheckpointWarning
from automerge._factory import parse_seed
from automerge._version import __version__
from automerge.matchers import MATCHERS

_DESCRIPTION = """\
Find which neurons of a PyTorch model may be permuted, align independently trained checkpoints, and merge them.
"""

_EPILOG = """\
examples:
  automerge demo                                    train, merge and measure ten small networks on handwritten digits
  automerge inspect zoo.models.vit:build --input 1,1,8,8
  automerge inspect zoo.models.lm:build --input 'int:1,16<50'
  automerge verify torchvision.models:resnet18 --input 1,3,64,64
  automerge merge mine.model:build a.safetensors b.safetensors -o merged.safetensors --data mine.data:train_batches

FACTORY is package.module:callable; the current directory is importable, and the callable takes no argument and returns
a torch.nn.Module. Checkpoints are .safetensors (or their .safetensors.index.json), or .pt, .pth, .ckpt and .bin state dicts
read with weights_only=True.
"""

_INPUT_HELP = (
    "an example input, such as 1,3,32,32; 'int:2,16<100' gives integers below 100 (quote it), NAME=SHAPE a keyword "
    "input; repeat for several inputs"
)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        prog="automerge",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=raw,
    )
    parser.add_argument("--version", action="version", version=f"automerge {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    _add_demo(commands.add_parser("demo", help="train, merge and measure small networks on handwritten digits"))
    _add_inspect(commands.add_parser("inspect", help="report the symmetries of a model"))
    _add_verify(commands.add_parser("verify", help="test a model's symmetries with random group elements in float64"))
    _add_merge(commands.add_parser("merge", help="align checkpoints of one architecture and average them"))
    add_compare(
        commands.add_parser("compare", help="merge by every matcher with every repair, and choose"), _INPUT_HELP
    )
    for name, sub in commands.choices.items():
        sub.formatter_class = raw
        sub.set_defaults(run=_COMMANDS[name])
    return parser


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train N networks each of two architectures (a ReLU MLP; a residual CNN with BatchNorm) on scikit-learn's\n"
        "digits, infer and verify their symmetries, merge them in one universe, repair, and print one table for each.\n"
        "Run it from a checkout of the repository: the two architectures are in zoo/."
    )
    parser.epilog = (
        "Under three minutes on two cores. Networks already in --out that fit the settings are read, not trained."
    )
    parser.add_argument(
        "--out", type=Path, default=Path("demo"), metavar="DIR", help="where results go (default: demo)"
    )
    parser.add_argument("--models", type=int, default=5, metavar="N", help="networks per architecture (default: 5)")
    parser.add_argument(
        "--seed", type=parse_seed, default=0, metavar="S", help="the same seed gives the same table (default: 0)"
    )
    parser.add_argument("--quick", action="store_true", help="few images and epochs: a smoke test, no result")


def _add_model(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument("factory", metavar="FACTORY", help="package.module:callable that builds the model")
    parser.add_argument("--input", action="append", metavar="SHAPE", required=required, default=None, help=_INPUT_HELP)
    parser.add_argument(
        "--seed", type=parse_seed, default=0, metavar="S", help="of the weights, inputs and group elements"
    )


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Record one run of the model, infer which axes of which parameters may be permuted together, test the answer,\n"
        "and print it: the groups with their members, what is pinned and why. An operator without a rule pins what it\n"
        "touches and is listed."
    )
    parser.epilog = "example:\n  automerge inspect zoo.models.resnet:build --input 1,1,8,8 --json resnet.json"
    _add_model(parser, required=True)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the symmetry as JSON")
    parser.add_argument(
        "--draw", type=Path, metavar="FILE", help="also draw the groups (.svg, .png, .pdf; needs matplotlib)"
    )
    parser.add_argument("--force", action="store_true", help="replace FILE if it exists")
    parser.add_argument("--strict", action="store_true", help="fail on an operator without a rule")
    parser.add_argument("--no-verify", action="store_true", help="do not test the answer")


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Move the model's weights by random group elements, in float64 and with randomised weights, and compare\n"
        "outputs. Without --symmetry the inferred symmetry is tested."
    )
    parser.epilog = "example:\n  automerge verify zoo.models.vit:build --input 1,1,8,8"
    _add_model(parser, required=True)
    parser.add_argument(
        "--symmetry", type=Path, metavar="FILE", help="test this JSON instead (inspect --json writes one)"
    )


def _add_merge(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Align two or more checkpoints of one architecture in a common universe and average them there. With --data\n"
        "the statistics of the merged network are repaired: BatchNorm is reset, or activations are rescaled (REPAIR)."
    )
    parser.epilog = (
        "example:\n"
        "  automerge merge zoo.models.mlp:build a.safetensors b.safetensors -o merged.safetensors --input 1,1,8,8"
        "\n\nThe example input is --input, or else the first batch of --data: as many of its items as the model\n"
        "cannot do without."
    )
    _add_model(parser, required=False)
    parser.add_argument(
        "checkpoints",
        nargs="+",
        metavar="CHECKPOINT",
        help="two or more files: .safetensors, .safetensors.index.json, .pt, .pth, .ckpt, .bin",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help="the merged .safetensors, or .safetensors.index.json",
    )
    parser.add_argument("--force", action="store_true", help="replace the output if it exists")
    parser.add_argument(
        "--matcher",
        choices=list(MATCHERS),
        default="frank-wolfe",
        help="how to align (default: %(default)s)",
    )
    parser.add_argument(
        "--matching", type=Path, metavar="FILE", help="keep the alignment here, also of a search that Ctrl-C ended"
    )
    parser.add_argument(
        "--resume", type=Path, metavar="FILE", help="go on from an alignment of the same checkpoints that was kept"
    )
    parser.add_argument(
        "--offload", type=Path, metavar="DIR", help="hold the work in files there, for models that exceed the memory"
    )
    parser.add_argument("--data", metavar="FACTORY", help="package.module:callable that gives batches, for the repair")
    parser.add_argument(
        "--repair",
        choices=("auto", "none", "reset", "repair", "both"),
        default="auto",
        help="auto: with --data, reset BatchNorm where there is one, else REPAIR (default: %(default)s)",
    )
    parser.add_argument(
        "--reference", type=int, metavar="K", help="write the result in checkpoint K's coordinates (from 0)"
    )
    parser.add_argument("--weights", metavar="W,W,...", help="a weight per checkpoint (default: equal)")


_COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "demo": _commands.demo,
    "inspect": _commands.inspect,
    "verify": _commands.verify,
    "merge": _commands.merge,
    "compare": run_compare,
}


class _Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP; a class of its own because python may end with SIGINT's code after a plain KeyboardInterrupt."""


@contextmanager
def _ended_by(asked: list[int]) -> Iterator[None]:
    """SIGTERM and SIGHUP (a closed terminal) end the work as Ctrl-C does: temporary files go, and a search keeps its best.

    Several processes are left to their launcher: one that waits for another could not answer in time.

    Args:
        asked: gets the signal.
    """

    def end(number: int, _: object) -> None:
        asked.append(number)
        raise _Terminated

    mine = threading.current_thread() is threading.main_thread() and "WORLD_SIZE" not in os.environ
    known = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    # others stay with whoever handles them, or ignores them (nohup)
    heard = [number for number in known if mine and signal.getsignal(number) is signal.SIG_DFL]
    for number in heard:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in heard:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def _warning(name: str) -> Iterator[None]:
    """What is to be said of checkpoints is said in one line."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message: Any, category: type[Warning], *rest: Any, **more: Any) -> None:
            if issubclass(category, CheckpointWarning):
                print(f"{name}: {message}", file=sys.stderr)
            else:
                usual(message, category, *rest, **more)

        warnings.showwarning = show
        yield


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments; those of the process if None.

    Returns:
        0, or 2 for bad input, 130 for an interrupt, 143 for SIGTERM, 129 for SIGHUP, 1 for a defect of automerge.
    """
    options = _parser().parse_args(argv)
    name = f"automerge {options.command}"
    asked: list[int] = []
    try:
        with _ended_by(asked), _warning(name):
            options.run(options)
    except AutomergeError as error:
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        with suppress(OSError):  # a terminal that was closed
            print(f"{name}: {'terminated' if asked else 'interrupted'}; no half-written file is left", file=sys.stderr)
        return 128 + asked[0] if asked else 130
    except BrokenPipeError:
        drop_output()
        return 0
    except Exception as error:
        if os.environ.get("AUTOMERGE_TRACEBACK"):
            traceback.print_exc()
        text = " ".join(f"{type(error).__name__}: {error}".split())
        print(
            f"{name}: this is a defect of automerge, please report it ({text}); AUTOMERGE_TRACEBACK=1 shows more",
            file=sys.stderr,
        )
        return 1
    return 0
