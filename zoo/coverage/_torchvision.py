"""Torchvision: classification, segmentation, video, optical flow, and the backbones and heads of the detectors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from zoo.coverage._case import Case
from zoo.coverage._operators import import_torchvision

tv = import_torchvision().models

_FIXED = ("vit_", "maxvit", "mvit")  # these accept one input size only

_DEEP = {"vit_h_14": ("encoder.layers", 6), "vit_l_16": ("encoder.layers", 12), "vit_l_32": ("encoder.layers", 12)}
_DEEP["regnet_y_128gf"] = ("trunk_output.block3", 3)


class _Detector(nn.Module):
    """A detector's backbone, and its convolutional head where it has one that needs no boxes."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone: Any = detector.backbone
        rpn = getattr(detector, "rpn", None)
        self.head: Any = getattr(rpn, "head", None) if rpn is not None else getattr(detector, "head", None)

    def forward(self, x: torch.Tensor) -> Any:
        features = self.backbone(x)
        features = list(features.values()) if isinstance(features, dict) else [features]
        return features if self.head is None else (features, self.head(features))


def names() -> Sequence[str]:
    """Every registered model that is not quantised."""
    return [n for n in tv.list_models() if "quantized" not in n]


def _kwargs(name: str) -> dict[str, Any]:
    kwargs: dict[str, Any] = {"weights": None}
    if name in tv.list_models(module=tv.detection) + tv.list_models(module=tv.segmentation):
        kwargs["weights_backbone"] = None
    if name in ("inception_v3", "googlenet"):
        kwargs["init_weights"] = False
    return kwargs


def _cut(model: nn.Module, name: str) -> str:
    """Shorten what would not fit into memory four times in float64; returns a note."""
    if name not in _DEEP:
        return ""
    path, keep = _DEEP[name]
    parent, _, last = path.rpartition(".")
    stack = model.get_submodule(path)
    blocks = dict(list(stack.named_children())[:keep])
    count = len(list(stack.children()))
    note = f"the first {keep} of {count} blocks of {path}: the whole does not fit into memory for verification"
    setattr(model.get_submodule(parent), last, nn.Sequential(OrderedDict(blocks)))
    return note


def build(name: str) -> Case:
    """One model with inputs of the size that its weights were trained at; verification takes smaller ones."""
    model = tv.get_model(name, **_kwargs(name)).eval()
    note = _cut(model, name)
    fixed = name.startswith(_FIXED)
    if name in tv.list_models(module=tv.video):
        size, frames = (224, 16) if fixed or name.startswith(("s3d", "swin3d")) else (112, 16)
        clip = torch.randn(1, 3, frames, size, size)
        return Case(model, (clip,), small=None if fixed or name == "s3d" else (clip[..., :8, :64, :64],))
    if name in tv.list_models(module=tv.optical_flow):
        return Case(model, (torch.randn(1, 3, 128, 128), torch.randn(1, 3, 128, 128)))
    if name in tv.list_models(module=tv.detection):
        image = torch.randn(1, 3, 320, 320) if name.startswith("ssd") else torch.randn(1, 3, 128, 128)
        return Case(_Detector(model).eval(), (image,), title=f"{name} (backbone, head)")
    if name in tv.list_models(module=tv.segmentation):
        return Case(model, (torch.randn(1, 3, 96, 96),))
    size = 299 if name == "inception_v3" else 224
    image = torch.randn(1, 3, size, size)
    return Case(model, (image,), small=None if fixed else (image[..., :96, :96],), note=note)
