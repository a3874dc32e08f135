"""Checkpoints in several safetensors files, listed by an index as Hugging Face reads and writes it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from automerge._errors import CheckpointError
from automerge._files import check_writable, replacement

SUFFIX = ".safetensors.index.json"


def read_shards(index: Path, read: Callable[[Path], Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """All tensors that an index lists, in its order.

    Args:
        index: a JSON file whose ``weight_map`` maps names to files beside it.
        read: reads one of those files.

    Raises:
        CheckpointError: if it is no such index, a file is missing, or index and files list different tensors.
    """
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        places = {str(name): str(file) for name, file in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f'{index} is not an index of safetensors files: expected {{"weight_map": {{name: file}}}}; download it again'
        ) from error
    found: dict[str, torch.Tensor] = {}
    for file in dict.fromkeys(places.values()):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{index} lists {file!r}; only .safetensors files beside the index are read")
        if not (index.parent / file).is_file():
            raise CheckpointError(f"{index} lists {file}, which is not there; download all files of the checkpoint")
        own = read(index.parent / file)
        odd = next((n for n in own if places.get(n) != file), None) or next(
            (n for n, f in places.items() if f == file and n not in own), None
        )
        if odd is not None:
            raise CheckpointError(
                f"{index} and {file} do not agree about {odd!r}; download all files of the checkpoint"
            )
        found |= own
    return {name: found[name] for name in places}


def check_index(index: Path, force: bool = False) -> None:
    """Find out before long work whether an index and its shards, however many, can be written.

    Raises:
        OutputError: see `automerge._files.check_writable`; also for shards that exist (without ``force``).
    """
    check_writable(index, force)
    for file in present_shards(index):
        check_writable(file, force)


def is_shard(file: Path, index: Path) -> bool:
    """Whether a file has a name and a place that a shard of this index could have."""
    stem = re.escape(index.name.removesuffix(SUFFIX))
    named = index.name.endswith(SUFFIX) and re.fullmatch(stem + r"-\d{5}-of-\d{5}\.safetensors", file.name)
    return bool(named) and os.path.realpath(file.parent) == os.path.realpath(index.parent)


def present_shards(index: Path) -> list[Path]:
    """The files beside an index that its shards, however many, could take the place of; none beside another file."""
    if not index.name.endswith(SUFFIX) or not index.parent.is_dir():
        return []
    return sorted(file for file in index.parent.iterdir() if is_shard(file, index))


def listed_shards(index: Path) -> list[Path]:
    """The files that an index lists; none for another file, or an index that cannot be read."""
    if not index.name.endswith(SUFFIX):
        return []
    try:
        return [
            index.parent / name for name in set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []  # what is wrong with it is said when it is read


def split_shards(sizes: Mapping[str, int], together: Mapping[str, str], limit: int) -> list[list[str]]:
    """Names by shard, in order, of at most so many bytes each; a tensor that is larger has one to itself.

    Args:
        sizes: bytes by name.
        together: names that go into the shard of another name.
        limit: bytes.

    Examples:
        >>> split_shards({"a": 3, "b": 3, "c": 9, "d": 1}, {"d": "a"}, 7)
        [['a', 'd', 'b'], ['c']]
    """
    groups: dict[str, list[str]] = {}
    for name in sizes:
        groups.setdefault(together.get(name, name), []).append(name)
    shards: list[list[str]] = []
    room = -1
    for names in groups.values():
        own = sum(sizes[n] for n in names)
        if own > room:
            shards.append([])
            room = limit
        shards[-1] += names
        room -= own
    return shards


def write_shards(
    index: Path,
    shards: Sequence[Sequence[str]],
    sizes: Mapping[str, int],
    metadata: Mapping[str, str],
    force: bool,
    write: Callable[[Path, Sequence[str]], None],
) -> None:
    """Write shards and then their index; each takes its name when all of them are on the disk.

    An index whose shards are replaced goes first: whoever is killed in between leaves no index, and never one that
    names old shards and new ones.

    Args:
        index: the path of the index.
        shards: the names in each.
        sizes: bytes by name.
        metadata: text for the index, beside the size.
        force: replace existing files.
        write: writes the tensors of some names to a file.
    """
    check_index(index, force)
    stem, count = index.name.removesuffix(SUFFIX), len(shards)
    files = [index.with_name(f"{stem}-{k:05d}-of-{count:05d}.safetensors") for k in range(1, count + 1)]
    listed = {name: file.name for file, names in zip(files, shards, strict=True) for name in names}
    with ExitStack() as stack:
        last = stack.enter_context(replacement(index))  # left last: an index never names what is not there
        for file, names in zip(files, shards, strict=True):
            write(stack.enter_context(replacement(file)), names)
        text = {"metadata": {"total_size": sum(sizes.values()), **metadata}, "weight_map": listed}
        last.write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")
        if not {file.name for file in files}.isdisjoint(file.name for file in listed_shards(index)):
            Path(os.path.realpath(index)).unlink()
