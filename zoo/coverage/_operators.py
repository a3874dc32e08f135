"""Imports torchvision where its compiled operators do not load (another build of torch): their signatures suffice."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

_BOXES = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_POOL = "Tensor input, Tensor rois, float spatial_scale, int pooled_height, int pooled_width"
SIGNATURES = (
    f"nms{_BOXES}",
    f"qnms{_BOXES}",
    f"roi_align({_POOL}, int sampling_ratio, bool aligned) -> Tensor",
    f"roi_pool({_POOL}) -> (Tensor, Tensor)",
    f"ps_roi_align({_POOL}, int sampling_ratio) -> (Tensor, Tensor)",
    f"ps_roi_pool({_POOL}) -> (Tensor, Tensor)",
    "deform_conv2d(Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, int stride_h, int stride_w, "
    "int pad_h, int pad_w, int dil_h, int dil_w, int groups, int offset_groups, bool use_mask) -> Tensor",
)
_defined: list[torch.library.Library] = []


def import_torchvision() -> ModuleType:
    """Torchvision, with its operators declared first if its own compiled ones do not load.

    Raises:
        ImportError: if torchvision is not installed.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error) or _defined:
            raise
    for name in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    _defined.append(library)
    for signature in SIGNATURES:
        library.define(signature)
    return importlib.import_module("torchvision")
