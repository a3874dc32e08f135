"""Timm: the smallest model, by its name, of every family of every module of `timm.models`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

from zoo.coverage._case import Case
from zoo.coverage._operators import import_torchvision

import_torchvision()

import timm  # noqa: E402  (it imports torchvision, which must have its operators)

MOST = 200_000_000  # parameters; deeper models are cut
_DEPTH = 4
_FAMILIES = 3  # of a module, at most
_SIZES = ("atto", "femto", "pico", "zepto", "nano", "xxs", "xx_small", "xxtiny", "micro", "xxsmall", "xsmall", "x_small")
_SIZES += ("xs", "xtiny", "tiny", "mini", "_t", "small", "_s", "s12", "lite", "b0", "_0", "m0", "050", "")
_BIG = ("_base", "_b_", "_m_", "medium", "large", "_l_", "huge", "giant", "xl", "gigantic", "so400m", "so150m", "enormous", "1b_")


def _rank(name: str) -> tuple[Any, ...]:
    """Small names first: a word for small, then small numbers, then short names."""
    big = any(word in f"{name}_" for word in _BIG)
    size = min(i for i, word in enumerate(_SIZES) if word in name)
    digits = [int(d) for d in re.findall(r"\d+", name)]
    return big, size, digits[:1], len(name), name


def _family(name: str) -> str:
    return re.match(r"[a-z]+", name).group()  # type: ignore[union-attr]


def chosen(module: str) -> list[str]:
    """The smallest models of a module's families, without those that are made for tests."""
    ranked = sorted(timm.list_models(module=module), key=_rank)
    ranked = [n for n in ranked if not n.startswith("test_")] or ranked
    first: dict[str, str] = {}
    for name in ranked:
        first.setdefault(_family(name), name)
    return list(first.values())[:_FAMILIES]


def names() -> Sequence[str]:
    """``module:model``, the smallest of every module first."""
    table = {m: chosen(m) for m in timm.list_modules()}
    return [f"{m}:{models[i]}" for i in range(_FAMILIES) for m, models in table.items() if i < len(models)]


def _accepts(model: torch.nn.Module, image: torch.Tensor) -> bool:
    try:
        with torch.no_grad():
            return bool(torch.isfinite(model(image)).all())
    except Exception:
        return False


def _count(name: str) -> int:
    try:
        with torch.device("meta"):
            return sum(p.numel() for p in timm.create_model(name, pretrained=False).parameters())
    except Exception:  # some models make tables that meta tensors cannot hold
        return 0


def build(name: str) -> Case:
    """One model with random weights at its default input size; verification takes a smaller one where it may."""
    module, _, model_name = name.partition(":")
    count = _count(model_name)
    torch.manual_seed(0)
    note = ""
    if count > MOST and "vit" in model_name:
        note = f"{_DEPTH} blocks: the whole model has {count / 1e6:.0f} M parameters"
        model = timm.create_model(model_name, pretrained=False, depth=_DEPTH).eval()
    else:
        model = timm.create_model(model_name, pretrained=False).eval()
    channels, height, width = model.pretrained_cfg["input_size"]
    image = torch.randn(1, channels, height, width)
    small = None
    if not model.pretrained_cfg.get("fixed_input_size"):
        sizes = [s for s in (96, 128) if s < height]
        small = next(((image[..., :s, :s],) for s in sizes if _accepts(model, image[..., :s, :s])), None)
    return Case(model, (image,), small=small, title=f"{module}: {model_name}", note=note)
