"""Spectral norms of merged weights: the vectors by which they are measured belong to one weight and cannot be averaged.

``torch.nn.utils.parametrizations.spectral_norm`` and the older ``torch.nn.utils.spectral_norm`` divide a weight by
``u^T W v``, with vectors that training keeps near the first singular vectors and evaluation takes as they are. Their sign
is an accident, ``(-u, -v)`` serves as well, so the mean of two models' may be nothing at all. Where all models agree on
weight and vectors nothing is mixed, and they stay: training leaves the vectors some way off, and that is part of the model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from automerge.io import hash_state_dict


def measured_again(
    model: nn.Module, state: Mapping[str, torch.Tensor], kept: Collection[str] = ()
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """A state dict whose spectral norms are those of its own weights.

    Args:
        model: the architecture; only its modules matter.
        state: merged weights; not changed.
        kept: weights whose vectors stay, see `agreed`.

    Returns:
        The state dict, and the names of the weights whose vectors are new.

    Examples:
        >>> net = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2, bias=False))
        >>> state = {**net.state_dict(), "parametrizations.weight.original": torch.diag(torch.tensor([3.0, 1.0]))}
        >>> fixed, names = measured_again(net, state)
        >>> _ = net.load_state_dict(fixed)
        >>> net.eval().weight.detach().diagonal()
        tensor([1.0000, 0.3333])
    """
    out = dict(state)
    names = []
    for weight, left, right, axis in _places(model):
        if weight in kept or not {weight, left, right} <= out.keys() or out[weight].ndim < 2:
            continue
        found = _first_singular(out[weight].movedim(axis, 0).flatten(1).detach().double())
        if found is not None:
            for name, vector in zip((left, right), found, strict=True):
                out[name] = vector.to(out[name])
            names.append(weight)
    return out, names


def marks(model: nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Hashes of every normalised weight with its vectors."""
    out = {}
    for weight, *vectors, _ in _places(model):
        if {weight, *vectors} <= state.keys():
            out[weight] = hash_state_dict({name: state[name] for name in (weight, *vectors)})
    return out


def agreed(found: Sequence[Mapping[str, str]], weights: Sequence[float] | None = None) -> set[str]:
    """The weights that are one and the same, with their vectors, in all models that count.

    Args:
        found: per model its `marks`, in the common coordinates.
        weights: of the models; one of weight zero does not count. All count if None.

    Examples:
        >>> sorted(agreed([{"a": "1", "b": "1"}, {"a": "1", "b": "2"}]))
        ['a']
    """
    counted = [m for m, w in zip(found, weights or [1.0] * len(found), strict=True) if w]
    return {name for name, value in counted[0].items() if all(m.get(name) == value for m in counted[1:])}


def _places(model: nn.Module) -> Iterator[tuple[str, str, str, int]]:
    """The names of weight, left and right vector, and the axis of the matrix's rows."""
    for path, module in model.named_modules():
        if isinstance(module, _SpectralNorm) and path.endswith(".0"):  # a later one normalises what others computed
            yield f"{path[:-2]}.original", f"{path}._u", f"{path}._v", module.dim
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                name = f"{path}.{hook.name}" if path else hook.name
                yield f"{name}_orig", f"{name}_u", f"{name}_v", hook.dim


def _first_singular(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The left and right vector of the largest singular value; None of a zero matrix."""
    wide = matrix.shape[0] <= matrix.shape[1]
    one = torch.linalg.eigh(matrix @ matrix.T if wide else matrix.T @ matrix).eigenvectors[:, -1]
    other = (matrix.T if wide else matrix) @ one
    size = other.norm()
    if not bool(size > 0):
        return None
    return (one, other / size) if wide else (other / size, one)
