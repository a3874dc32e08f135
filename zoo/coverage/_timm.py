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
_DEPTHS = ("vit", "aim")  # in the names of models that take their depth as an option
_LARGE = 400  # pixels; beyond, the first of these that a model accepts
_SMALLER = (256, 252, 224)
_CLASSES = 1000  # everywhere: with none, some models return their features, which pins them
_FAMILIES = 3  # of a module, at most
_SIZES: tuple[str, ...] = (
    "atto",
    "femto",
    "pico",
    "zepto",
    "nano",
    "xxs",
    "xx_small",
    "xxtiny",
    "micro",
    "xxsmall",
    "xsmall",
    "x_small",
)
_SIZES += ("xs", "xtiny", "tiny", "mini", "_t", "small", "_s", "s12", "lite", "b0", "_0", "m0", "050", "")
_BIG = (
    "_base",
    "_b_",
    "_m_",
    "medium",
    "large",
    "_l_",
    "huge",
    "giant",
    "xl",
    "gigantic",
    "so400m",
    "so150m",
    "enormous",
    "1b_",
    "3b_",
)


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


def _model(name: str) -> tuple[torch.nn.Module, str]:
    """A model with random weights, and what is special about it."""
    count = _count(name)
    options: dict[str, Any] = {"pretrained": False, "num_classes": _CLASSES}
    note = ""
    if count > MOST and any(word in name for word in _DEPTHS):
        options["depth"] = depth = _DEPTH if count < 5 * MOST else _DEPTH // 2
        note = f"{depth} blocks: the whole model has {count / 1e6:.0f} M parameters"
    config = timm.get_pretrained_cfg(name)
    if config is not None and config.fixed_input_size and config.input_size[1] > _LARGE:
        options["img_size"] = _SMALLER[0]
    torch.manual_seed(0)
    return timm.create_model(name, **options).eval(), note


def build(name: str) -> Case:
    """One model at its default input size, or a smaller one where that is large; verification takes the smallest."""
    module, _, model_name = name.partition(":")
    model, note = _model(model_name)
    config: Any = model.pretrained_cfg
    channels, height, width = config["input_size"]
    full = torch.randn(1, channels, height, width)
    fixed = bool(config.get("fixed_input_size"))

    def accepted(sizes: Sequence[int]) -> torch.Tensor | None:
        smaller = (full[..., :s, :s].contiguous() for s in sizes if s < height)
        return next((x for x in smaller if _accepts(model, x)), None)

    image = accepted(_SMALLER) if height > _LARGE else None
    small = None if fixed else accepted((96, 128))
    return Case(
        model,
        (full if image is None else image,),
        small=None if small is None else (small,),
        title=f"{module}: {model_name}",
        note=note,
    )
