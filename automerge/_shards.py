"""Checkpoints in several safetensors files, listed by an index as Hugging Face writes it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from automerge._errors import CheckpointError

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
    except (ValueError, KeyError, TypeError, AttributeError) as error:
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
