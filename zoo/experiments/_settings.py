"""The settings: which networks are trained, on what, and how. Chosen by test accuracy of single networks, not by merges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import nn

from zoo.data import Dataset, load
from zoo.models.lm import LM
from zoo.models.mlp import MLP
from zoo.models.moe import MoE
from zoo.models.resnet import ChannelNorm, ResNet
from zoo.models.vgg import VGG
from zoo.models.vit import ViT
from zoo.train import Recipe, Trained, bar, train

_VGG = (16, 16, "M", 32, 32, "M", 64, 64, "M")
_KIND = Recipe(epochs=12, rate=1e-2, decay=1e-1)


@dataclass(frozen=True)
class Setting:
    """Networks that differ by their seeds only.

    Attributes:
        name: of the folder and in the tables.
        title: for a reader.
        factory: builds an untrained network.
        data: name of the data set, as `dataset` takes it.
        recipe: how they are trained.
    """

    name: str
    title: str
    factory: Callable[[], nn.Module]
    data: str
    recipe: Recipe

    @property
    def dataset(self) -> Dataset:
        """The data, read once."""
        return dataset(self.data)

    def shortened(self) -> Setting:
        """Two epochs, for a test that everything runs; its networks get a folder of their own."""
        return replace(self, name=f"{self.name}~short", recipe=replace(self.recipe, epochs=2))

    def network(self, seed: int, runs: Path) -> Trained:
        """One network, trained or read from the cache, where it belongs if its card is the same."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        path = runs / self.name / f"seed{seed:03d}.safetensors"
        with bar(f"training {self.name}, seed {seed}") as report:
            return train(self.factory, self.dataset, self.recipe, seed, path=path, report=report, device=device)


@lru_cache(maxsize=8)
def dataset(name: str) -> Dataset:
    """Data by a short name: a data set's name, ``/2`` for half the resolution, ``:N`` for the first N training samples.

    Of everything but the digits at most 2,000 samples are held out.
    """
    base, _, count = name.partition(":")
    base, _, half = base.partition("/")
    data = load(base)
    data = data.head(int(count) if count else len(data.y_train), 2000)
    return data.halved() if half else data


def _mlp(name: str, title: str, sizes: tuple[int, ...], data: str, recipe: Recipe) -> Setting:
    return Setting(name, title, partial(MLP, sizes), data, recipe)


def mlp_of_width(width: int) -> Setting:
    """The digits' MLP with another number of units in its three hidden layers."""
    name = "digits-mlp" if width == 64 else f"digits-mlp-w{width}"
    return _mlp(name, f"MLP, 3 hidden layers of {width}, digits", (64, width, width, width, 10), "digits", Recipe(20))


def resnet_of_width(width: float) -> Setting:
    """The digits' residual network with ``16 * width`` channels at first."""
    name = "digits-resnet" if width == 1 else f"digits-resnet-w{width:g}"
    title = f"ResNet8 ×{width:g}, BatchNorm, digits"
    return Setting(name, title, partial(ResNet, round(16 * width)), "digits", _KIND)


_ALL = (
    mlp_of_width(64),
    resnet_of_width(1),
    Setting(
        "digits-resnet-plain",
        "ResNet8 ×1, BatchNorm, digits, plain recipe",
        partial(ResNet, 16),
        "digits",
        Recipe(epochs=12),
    ),
    Setting(
        "digits-resnet-layernorm",
        "ResNet8 ×1, LayerNorm, digits",
        partial(ResNet, 16, norm=ChannelNorm),
        "digits",
        Recipe(epochs=12),
    ),
    _mlp(
        "mnist-mlp", "MLP, 3 hidden layers of 256, MNIST", (784, 256, 256, 256, 10), "mnist:10000", Recipe(5, rate=1e-3)
    ),
    _mlp(
        "fashion-mlp",
        "MLP, 3 hidden layers of 256, Fashion-MNIST",
        (784, 256, 256, 256, 10),
        "fashion_mnist:10000",
        Recipe(8, rate=1e-3),
    ),
    Setting(
        "digits-experts",
        "2 layers of 4 experts, one module each, digits",
        partial(MoE, 64, 64, 64, listed=True),
        "digits",
        Recipe(epochs=20, rate=1e-3),
    ),
    Setting(
        "mnist-experts",
        "2 layers of 4 experts, one module each, MNIST",
        partial(MoE, 784, 64, 64, listed=True),
        "mnist:10000",
        Recipe(epochs=5, rate=1e-3),
    ),
    Setting("digits-vit", "ViT, 2 blocks of 32, digits", ViT, "digits", Recipe(epochs=40, rate=3e-3)),
    Setting(
        "fashion-resnet",
        "ResNet8 ×1, BatchNorm, Fashion-MNIST at 14×14",
        partial(ResNet, 16),
        "fashion_mnist/2:10000",
        replace(_KIND, epochs=8),
    ),
    Setting(
        "fashion-vgg",
        "VGG of 6 convolutions, BatchNorm, Fashion-MNIST at 14×14",
        partial(VGG, _VGG, True, 64),
        "fashion_mnist/2:10000",
        replace(_KIND, epochs=8),
    ),
    Setting(
        "shakespeare-lm",
        "language model, 2 blocks of 64, tiny Shakespeare",
        partial(LM, 65, 64, 4, 2, 2, 96),
        "tinyshakespeare",
        Recipe(epochs=4, batch=32, rate=3e-3),
    ),
    Setting(
        "cifar-resnet",
        "ResNet8 ×1, BatchNorm, CIFAR-10 at 16×16",
        partial(ResNet, 16, channels=3),
        "cifar10/2:10000",
        replace(_KIND, epochs=12, flip=True),
    ),
)

SETTINGS: dict[str, Setting] = {s.name: s for s in _ALL}
"""Name -> setting; the widths are made by `mlp_of_width` and `resnet_of_width`."""
