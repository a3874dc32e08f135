"""What a library hands to the measurement: a model, its example inputs, and inputs to verify on."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Protocol

from torch import nn

NAMES = ("torchvision", "timm", "transformers")
QUICK = {
    "torchvision": (
        "resnet18",
        "mobilenet_v3_small",
        "vit_b_32",
        "densenet121",
        "shufflenet_v2_x0_5",
        "swin_t",
        "lraspp_mobilenet_v3_large",
    ),
    "timm": (
        "efficientvit_mit:efficientvit_b0",
        "mlp_mixer:mixer_s16_224",
        "convnext:convnext_atto",
        "mobilevit:mobilevit_xxs",
        "pvt_v2:pvt_v2_b0",
    ),
    "transformers": (
        "bert:SequenceClassification",
        "llama:CausalLM",
        "t5:Seq2SeqLM",
        "mamba:CausalLM",
        "mixtral:CausalLM",
        "whisper:SpeechSeq2Seq",
        "deberta-v2:SequenceClassification",
        "vit:ImageClassification",
    ),
}


@dataclass
class Case:
    """One row to measure.

    Attributes:
        model: with random weights.
        args: positional example inputs, for tracing.
        kwargs: keyword inputs.
        small: positional inputs for verification where they may be smaller than ``args``.
        title: how the row calls the model.
        note: what is special about it.
    """

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    small: tuple[Any, ...] | None = None
    title: str = ""
    note: str = ""


class Catalogue(Protocol):
    """What each library's module offers."""

    def names(self) -> Sequence[str]:
        """The rows, in order."""

    def build(self, name: str) -> Case:
        """Make one of them."""


def missing(library: str) -> str | None:
    """Why a library cannot be used here; None if it can."""
    return None if importlib.util.find_spec(library) else f"{library} is not installed"


def catalogue(library: str) -> Any:
    """The module that lists and builds a library's models; it imports the library."""
    module: ModuleType = importlib.import_module(f"zoo.coverage._{library}")
    return module


def short(text: str) -> str:
    """Text without the paths of the machine that it was made on."""
    text = re.sub(r"(?:/[\w.+-]+)+/(?:site|dist)-packages/", "", text)
    return re.sub(r"(?:/[\w.+-]+)+/(zoo|automerge|tests)/", r"\1/", text)
