"""Small definitions of the architectures people merge, without a line of merging code.

Every module has a ``build()`` that takes no argument, so that ``zoo.models.mlp:build`` is a factory for the command
line. `ZOO` lists them all with example inputs.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from zoo.models import densenet, lm, lstm, mixer, mlp, mobilenet, moe, resnet, unet, vgg, vit


class Entry(NamedTuple):
    """One architecture.

    Attributes:
        factory: builds a fresh model, without arguments.
        example_args: positional inputs that the model runs on.
    """

    factory: Callable[[], nn.Module]
    example_args: tuple[torch.Tensor, ...]


def _image(channels: int = 1, side: int = 8) -> tuple[torch.Tensor, ...]:
    return (torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(0)),)


def _tokens() -> tuple[torch.Tensor, ...]:
    return (torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(0)),)


ZOO: dict[str, Entry] = {
    "mlp": Entry(mlp.build, _image()),
    "mlp_batchnorm": Entry(mlp.build_batchnorm, _image()),
    "resnet": Entry(resnet.build, _image()),
    "resnet_layernorm": Entry(resnet.build_layernorm, _image()),
    "resnet_bottleneck": Entry(resnet.build_bottleneck, _image()),
    "resnet20": Entry(resnet.build_resnet20, _image(3, 16)),
    "resnet20_layernorm": Entry(resnet.build_resnet20_layernorm, _image(3, 16)),
    "vgg": Entry(vgg.build, _image()),
    "vgg_batchnorm": Entry(vgg.build_batchnorm, _image()),
    "vgg11": Entry(partial(vgg.build_vgg11, width=0.125), _image(3, 32)),
    "vgg16": Entry(vgg.build_vgg16, _image(3, 32)),
    "vit": Entry(vit.build, _image()),
    "lm": Entry(lm.build, _tokens()),
    "mobilenet": Entry(mobilenet.build, _image()),
    "densenet": Entry(densenet.build, _image()),
    "unet": Entry(unet.build, _image()),
    "lstm": Entry(lstm.build, _image()),
    "mixer": Entry(mixer.build, _image()),
    "moe": Entry(moe.build, _image()),
}
"""Name -> how to build it, and what it runs on."""
