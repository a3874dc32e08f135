"""What the command line's arguments stand for: a model, a source of batches, example inputs."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import itertools
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset, IterableDataset

from automerge._copies import lacking
from automerge._data import Batches, check_pair, listed
from automerge._errors import AutomergeError
from automerge._random import forked
from automerge._shards import is_shard, listed_shards, present_shards
from automerge._tree_io import stored

_DTYPES = {
    "float": torch.float32,
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int": torch.int64,
    "int64": torch.int64,
    "long": torch.int64,
    "int32": torch.int32,
    "bool": torch.bool,
}
_INPUT = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?:(?P<dtype>[a-z]+\d*):)?(?P<shape>\d+(?:,\d+)*)(?:<(?P<high>\d+))?")
_HIGH = 10
_MOST = 2**32  # numbers in one input; torch would fail on more in less clear words
_HIGHEST = 2**31
_DIGITS = 1000  # of a number on the command line


class UsageError(AutomergeError):
    """An argument of the command line does not say what it should; the message is one sentence."""


@dataclass(frozen=True)
class InputSpec:
    """One example input.

    Attributes:
        shape: of the tensor.
        dtype: of the tensor.
        high: integers are drawn below this.
        name: the keyword to pass it by; positional if empty.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    high: int = _HIGH
    name: str = ""

    def draw(self, generator: torch.Generator) -> torch.Tensor:
        """A random tensor: normal for floats, uniform below ``high`` for integers."""
        if self.dtype.is_floating_point:
            wide = torch.promote_types(self.dtype, torch.float32)
            return torch.randn(self.shape, dtype=wide, generator=generator).to(self.dtype)
        high = 2 if self.dtype == torch.bool else self.high
        return torch.randint(0, high, self.shape, generator=generator).to(self.dtype)


def parse_input(text: str) -> InputSpec:
    """Read ``[NAME=][DTYPE:]SHAPE[<HIGH]``.

    >>> parse_input("1,3,32,32").shape
    (1, 3, 32, 32)
    >>> parse_input("int64:2,16<100").high
    100

    Raises:
        UsageError: if the text has another form.
    """
    match = _INPUT.fullmatch(text.replace(" ", ""))
    if match is None:
        raise UsageError(
            f"--input {text!r} is not a shape: write sizes with commas, such as 1,3,32,32, "
            "or 'int:2,16<100' for integers below 100, or NAME=1,3,32,32 for a keyword input"
        )
    dtype = match["dtype"] or "float"
    if dtype not in _DTYPES:
        raise UsageError(f"--input {text!r} names the type {dtype!r}, which is not one of {', '.join(_DTYPES)}")
    digits = max(map(len, (*match["shape"].split(","), match["high"] or "")))
    if digits > _DIGITS:  # python itself refuses to read thousands of them
        raise UsageError(f"--input has a number of {digits} digits; give sizes that fit into memory")
    shape = tuple(int(n) for n in match["shape"].split(","))
    high = int(match["high"]) if match["high"] else _HIGH
    if 0 in shape or high < 1:
        raise UsageError(f"--input {text!r} has a size of zero: every size must be at least one")
    if match["high"] and _DTYPES[dtype].is_floating_point:
        raise UsageError(
            f"--input {text!r} bounds a float input: '<{high}' belongs to integers, as in 'int:2,16<{high}'"
        )
    if math.prod(shape) > _MOST or high > _HIGHEST:
        raise UsageError(f"--input {text!r} is too large: at most {_MOST:,} numbers, and integers below {_HIGHEST:,}")
    return InputSpec(shape, _DTYPES[dtype], high, match["name"] or "")


def draw_inputs(specs: Iterable[InputSpec], seed: int) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """Random positional and keyword inputs.

    Args:
        specs: what to draw, in order.
        seed: of the draw.

    Raises:
        UsageError: if a keyword is given twice, or an input does not fit into memory.
    """
    specs = list(specs)
    names = [spec.name for spec in specs if spec.name]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UsageError(f"--input gives the keyword {twice!r} twice")
    generator = torch.Generator().manual_seed(seed)
    try:
        drawn = [(spec.name, spec.draw(generator)) for spec in specs]
    except RuntimeError as error:
        shapes = ", ".join(str(spec.shape) for spec in specs)
        raise UsageError(f"inputs of the shapes {shapes} do not fit into memory; use a smaller --input") from error
    return tuple(value for name, value in drawn if not name), {name: value for name, value in drawn if name}


def parse_seed(text: str) -> int:
    """A seed, as the type of an option.

    Raises:
        argparse.ArgumentTypeError: if it is no whole number that every generator takes.
    """
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {2**32 - 1}")
    return int(text)


def add_current_directory() -> None:
    """Let modules be imported from the current directory."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def _call(text: str, option: str) -> Any:
    """Import ``package.module:callable`` and call it.

    Raises:
        UsageError: with one sentence that says which of the steps failed.
    """
    module_name, colon, attribute = text.partition(":")
    if module_name.endswith(".py"):
        module = module_name.removesuffix(".py").strip("./").replace("/", ".")
        raise UsageError(f"{option} {text!r} names a file; name its module: {module}:{attribute or 'build'}")
    if not colon or not attribute or not all(part.isidentifier() for part in module_name.split(".")):
        raise UsageError(f"{option} {text!r} is not of the form package.module:callable")
    add_current_directory()
    try:
        with redirect_stdout(sys.stderr):  # what a module prints is no result
            target: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise UsageError(f"{option} {text!r}: the module {module_name!r} does not import ({_brief(error)})") from error
    for part in attribute.split("."):
        if not hasattr(target, part):
            raise UsageError(f"{option} {text!r}: the module {module_name!r} has no {attribute!r}")
        target = getattr(target, part)
    if not callable(target) or isinstance(target, nn.Module):
        raise UsageError(
            f"{option} {text!r} is a {type(target).__name__}, not a callable without arguments; give a function that returns it"
        )
    try:
        with redirect_stdout(sys.stderr):
            return target()
    except (Exception, SystemExit) as error:
        raise UsageError(f"{option} {text!r} failed when called without arguments ({_brief(error)})") from error


def build_model(text: str, seed: int, empty: bool = False) -> nn.Module:
    """The model that a factory builds, in evaluation mode and on the CPU.

    Args:
        text: ``package.module:callable``.
        seed: of torch's random state while the factory runs.
        empty: build it on the meta device, without values for what checkpoints hold, if the factory works there.

    Raises:
        UsageError: if it does not import, cannot be called, or returns no module, or one whose weights have no values.
    """
    if empty:
        with contextlib.suppress(UsageError), torch.device("meta"):
            model = _built(text, seed)
            if lacking(model) is None:
                return model.eval()
    model = _built(text, seed)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor) or tensor.is_meta:
            what = "is not initialised yet (a lazy module)" if is_lazy(tensor) else "is on the meta device"
            raise UsageError(
                f"FACTORY {text!r}: {name} {what}; let the factory return a model whose weights have values"
            )
    return model.eval().cpu()


def _built(text: str, seed: int) -> nn.Module:
    with forked(seed):
        model = _call(text, "FACTORY")
    if not isinstance(model, nn.Module):
        raise UsageError(f"FACTORY {text!r} returned a {type(model).__name__}, not a torch.nn.Module")
    return model


class _Source:
    """Batches of a user's iterable; what goes wrong while it gives them is said in one sentence."""

    def __init__(self, text: str, source: Iterable[Any]) -> None:
        self.text = text  # the option and what it was given
        self.source = source

    def __iter__(self) -> Iterator[Any]:
        items: Iterator[Any] | None = None
        for number in itertools.count():
            try:
                with redirect_stdout(sys.stderr):
                    items = iter(self.source) if items is None else items
                    item = next(items)
            except StopIteration:
                return
            except Exception as error:
                raise UsageError(f"{self.text} failed while giving batch {number} ({_brief(error)})") from error
            tensors = [t for t in tree_leaves(item) if isinstance(t, torch.Tensor) and not t.is_meta]
            if any(bool(torch.isnan(stored(t)).any()) for t in tensors):
                raise UsageError(f"{self.text}: batch {number} has values that are NaN")
            yield item


def load_batches(text: str, option: str = "--data") -> Iterable[Any]:
    """The batches that the factory of an option gives; an iterator is listed, so that they can be read more than once.

    Of batches that are there already, all are looked at before anything else is done.

    Raises:
        UsageError: if it does not import, cannot be called, or gives no iterable; if it fails or a batch holds a NaN, here or
            on iteration.
    """
    source, name = _call(text, option), f"{option} {text!r}"
    if isinstance(source, Dataset) and not isinstance(source, IterableDataset):
        raise UsageError(
            f"{name} returned a {type(source).__name__} of single samples, not batches; "
            "return torch.utils.data.DataLoader(dataset, batch_size=256)"
        )
    if isinstance(source, torch.Tensor | str | dict) or not isinstance(source, Iterable):
        raise UsageError(f"{name} returned a {type(source).__name__}, not an iterable of batches")
    try:
        check_pair(source)
    except AutomergeError as error:
        raise UsageError(f"{name}: {error}") from error
    batches = _Source(name, source)
    return listed(batches) if isinstance(source, Iterator | list | tuple) else batches


def example_of(data: Any, model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs of the first batch: as many of its items as the model cannot do without, or keyword inputs."""
    batch = next(iter(Batches(data, _needed(model))))
    return batch.args, dict(batch.kwargs)


def _needed(model: nn.Module) -> int:
    """The number of positional inputs without a default, at least one."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return 1
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return max(1, sum(p.kind in kinds and p.default is p.empty for p in parameters))


def check_checkpoints(files: Sequence[str], verb: str, hint: str = "") -> None:
    """There are two or more files, and none is given twice, under another name neither.

    Raises:
        UsageError: if not.
    """
    if len(files) < 2:
        raise UsageError(f"{verb} needs at least two checkpoints, and only {files[0]} was given")
    seen = [_identity(file) for file in files]
    twice = next((file for k, file in enumerate(files) if seen[k] in seen[:k]), None)
    if twice is not None:
        raise UsageError(f"{twice} is given twice{hint}")


def check_apart(outputs: Mapping[str, os.PathLike[str] | None], inputs: Sequence[str] = ()) -> None:
    """No two outputs are one file, and none of them is an input or a shard of one, which would be lost.

    An index stands for the shards that it lists; one that is written, for all shards that it could have.

    Args:
        outputs: option -> path.
        inputs: files that are read.

    Raises:
        UsageError: if not.
    """
    read = {_identity(part) for file in inputs for part in (Path(file), *listed_shards(Path(file)))}
    given = {option: Path(path) for option, path in outputs.items() if path is not None}
    for k, (option, path) in enumerate(given.items()):
        for other in list(given)[:k]:
            pair = (path, given[other])
            if len(set(map(_identity, pair))) == 1 or is_shard(*pair) or is_shard(*reversed(pair)):
                raise UsageError(f"{other} and {option} name the same file, {path}")
        if any(_identity(file) in read for file in (path, *present_shards(path))):
            raise UsageError(f"{option} {path} is one of the checkpoints that are read; choose another name")


def _identity(path: str | os.PathLike[str]) -> object:
    """What two names of one file share."""
    try:
        status = os.stat(path)
    except OSError:
        return os.path.realpath(path)
    except ValueError:  # a NUL in the name
        return os.fspath(path)
    return status.st_dev, status.st_ino


def _brief(error: BaseException) -> str:
    """The error's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
