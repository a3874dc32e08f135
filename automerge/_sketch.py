"""A few numbers of a model, by which it is known again without reading all of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch

_ENTRIES = 16


def sketch(state: Mapping[str, torch.Tensor], names: Iterable[str]) -> str:
    """A hash of some entries of each tensor, spread evenly; other weights have another one.

    Args:
        state: name -> tensor, on any device.
        names: which tensors count; their order does not matter.

    Examples:
        >>> a = {"w": torch.arange(100.0).reshape(20, 5)}
        >>> sketch(a, ["w"]) == sketch({"w": a["w"].clone(), "b": torch.ones(1)}, ["w"])
        True
        >>> sketch(a, ["w"]) == sketch({"w": -a["w"]}, ["w"])
        False
    """
    digest = hashlib.sha256()
    for name in sorted(names):
        flat = state[name].detach().reshape(-1)
        at = torch.linspace(0, max(flat.numel() - 1, 0), min(_ENTRIES, flat.numel()), dtype=torch.float64).long()
        chosen = flat[at.to(flat.device)].cpu().resolve_conj().resolve_neg()
        values = torch.view_as_real(chosen) if chosen.is_complex() else chosen
        digest.update(f"{name}:{values.double().flatten().tolist()};".encode())
    return digest.hexdigest()[:16]
