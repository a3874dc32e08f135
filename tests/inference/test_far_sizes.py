"""What is alike on a short example, and on one twice as long: windows, neighbours and pools that are larger than both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from automerge import infer
from tests.inference.networks_hostile import Program
from tests.inference.test_networks import worst_change
from tests.inference.test_other_inputs import lin

WIDE = (16, 32, 64)


def _heads(s: Any, x: torch.Tensor) -> torch.Tensor:
    """Three heads, each of which looks back as far as a window of its own."""
    at = torch.arange(x.shape[1])
    back = at[:, None] - at
    masks = torch.stack([(back >= 0) & (back < w) for w in WIDE])
    q, k, v = s.qkv(x).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
    return s.out(F.scaled_dot_product_attention(q, k, v, masks).transpose(1, 2).flatten(2))


def _neighbours(s: Any, x: torch.Tensor) -> torch.Tensor:
    near, out = torch.cdist(x, x), torch.zeros(())
    for count, layer in zip(WIDE, s.layers, strict=True):
        chosen = near.topk(min(count, x.shape[1]), largest=False).indices
        around = x.gather(1, chosen.flatten(1)[..., None].expand(-1, -1, 5)).view(*chosen.shape, 5)
        out = out + layer(around).relu().amax(2)
    return s.out(out.mean(1))


def _memories(s: Any, x: torch.Tensor) -> torch.Tensor:
    parts = (layer(x[:, max(0, x.shape[1] - w) :].mean(1)).relu() for w, layer in zip(WIDE, s.layers, strict=True))
    return s.out(sum(parts))


def _pools(s: Any, x: torch.Tensor) -> torch.Tensor:
    x, out = x[:, None].expand(-1, 5, -1, -1), torch.zeros(())
    for size, layer in zip(WIDE, s.layers, strict=True):
        pooled = F.avg_pool2d(x, (min(size, x.shape[2]), min(size, x.shape[3]))) ** 3
        out = out + layer(pooled.mean((2, 3))).relu()
    return s.out(out)


def _layers(n: int) -> Callable[[], nn.Module]:
    return lambda: nn.ModuleList(nn.Linear(n, 4) for _ in WIDE)


CASES: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...], dict[str, Callable[[], Any]]]] = {
    "windows of heads": (_heads, (2, 8, 5), (1, 90, 5), {"qkv": lin(5, 36), "out": lin(12, 2)}),
    "neighbours": (_neighbours, (2, 8, 5), (1, 90, 5), {"layers": _layers(5), "out": lin(4, 2)}),
    "memories": (_memories, (2, 8, 5), (1, 90, 5), {"layers": _layers(5), "out": lin(4, 2)}),
    "pools": (_pools, (1, 8, 8), (1, 96, 96), {"layers": _layers(5), "out": lin(4, 2)}),
}


@pytest.mark.parametrize("name", CASES)
def test_what_only_long_inputs_tell_apart(name: str) -> None:
    forward, short, long, parts = CASES[name]

    def make() -> nn.Module:
        torch.manual_seed(0)
        return Program(forward, parts)

    x = torch.randn(short)
    symmetry = infer(make(), x)
    assert symmetry.sets
    assert symmetry.exchanges == ()
    assert not any("report" in note for note in symmetry.notes)
    if name == "windows of heads":
        assert 3 not in {g.size for g in symmetry.sets}
    assert worst_change(make, (torch.randn(long),), {}, symmetry) < 1e-9
    # what is told apart is what windows do, not that there are several
    same = infer(_without_windows(make()), x)
    assert same.exchanges or any(g.size == 3 for g in same.sets)


def _without_windows(net: nn.Module) -> nn.Module:
    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        if hasattr(s, "layers"):
            return s.out(
                sum(
                    layer(x.mean(1) if x.shape[-1] == 5 else x.mean((1, 2))[:, None].expand(-1, 5)).relu()
                    for layer in s.layers
                )
            )
        q, k, v = s.qkv(x).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
        return s.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    net.program = forward
    return net
