"""Transformers: small random models of many types, as base models and with heads; nothing comes from a hub."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from zoo.coverage._case import Case
from zoo.coverage._configurations import EXACT, EXPERTS, FIELDS, HEADS, SMALL
from zoo.coverage._operators import import_torchvision

with contextlib.suppress(ImportError):
    import_torchvision()  # transformers imports it if it is there

import transformers

from zoo.coverage import _multimodal

_HEAD_OUTPUTS = ("logits", "logits_per_image", "predicted_depth", "prediction_logits")
_TOKENS, _TARGETS, _BATCH = 16, 8, 2


class _Head(nn.Module):
    """A model with a head, of whose outputs only the head's counts: the others show the residual stream."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **kwargs: Any) -> Any:
        result = self.model(**kwargs)
        return next((result[key] for key in _HEAD_OUTPUTS if result.get(key) is not None), result)


def names() -> Sequence[str]:
    """``type``, ``type:Head`` and ``type:Head@experts``; ``type:*`` where a model has several parts."""
    known = transformers.CONFIG_MAPPING
    found = [t for t in HEADS if t in known]
    found += [f"{t}:{head}" for t in HEADS if t in known for head in HEADS[t]]
    found += [f"{t}:CausalLM@{how}" for t in EXPERTS if t in known for how in ("eager", "batched_mm")]
    return [*found, *_multimodal.names()]


def configuration(kind: str) -> Any:
    """A small configuration of a model type."""
    cls = transformers.CONFIG_MAPPING[kind]
    fields: dict[str, Any] = {}
    if kind not in EXACT:
        base = cls()
        for key, value in SMALL.items():
            now = getattr(base, key, None)
            settable = not isinstance(getattr(cls, key, None), property) or getattr(cls, key).fset is not None
            if hasattr(base, key) and settable and not isinstance(now, list | tuple | dict):
                fields[key] = value
        fields |= FIELDS.get(kind, {})
        fields = {k: v for k, v in fields.items() if v is not None}
    else:
        fields = dict(EXACT[kind])
    return _composite(kind, cls) or cls(**fields)


def _composite(kind: str, cls: Any) -> Any:
    """Configurations that hold one for text and one for images."""
    if kind not in ("clip", "siglip"):
        return None
    shared = {
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "projection_dim": 24,
    }
    text = {**shared, "vocab_size": 50, "max_position_embeddings": 40, "eos_token_id": 49, "projection_size": 32}
    return cls(text_config=text, vision_config={**shared, "image_size": 32, "patch_size": 8}, projection_dim=24)


def _model(kind: str, head: str, experts: str) -> nn.Module:
    config = configuration(kind)
    config._attn_implementation = "eager"
    if experts:
        config._experts_implementation = experts
    torch.manual_seed(0)
    auto = getattr(transformers, f"AutoModelFor{head}" if head else "AutoModel")
    classes = auto._model_mapping[type(config)]
    if isinstance(classes, tuple | list):
        config.architectures = [classes[0].__name__]
    return auto.from_config(config).eval()


def _image(config: Any) -> torch.Tensor:
    config = getattr(config, "vision_config", config)
    size = getattr(config, "image_size", None) or 64
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return torch.randn(_BATCH, getattr(config, "num_channels", 3), height, width)


def _series(config: Any) -> dict[str, torch.Tensor]:
    past, future = config.context_length + max(config.lags_sequence), config.prediction_length
    return {
        "past_values": torch.randn(_BATCH, past),
        "past_time_features": torch.randn(_BATCH, past, config.num_time_features),
        "past_observed_mask": torch.ones(_BATCH, past),
        "future_values": torch.randn(_BATCH, future),
        "future_time_features": torch.randn(_BATCH, future, config.num_time_features),
    }


def _speech(kind: str, config: Any) -> dict[str, torch.Tensor]:
    if kind == "whisper":
        return {"input_features": torch.randn(_BATCH, config.num_mel_bins, 2 * config.max_source_positions)}
    if kind == "audio-spectrogram-transformer":
        return {"input_values": torch.randn(_BATCH, config.max_length, config.num_mel_bins)}
    if kind == "encodec":
        return {"input_values": torch.randn(1, 1, 320)}
    if kind == "speech_to_text":
        return {"input_features": torch.randn(_BATCH, 40, config.input_feat_per_channel)}
    return {"input_values": torch.randn(_BATCH, 1000)}


def _inputs(kind: str, config: Any, main: str) -> dict[str, Any]:
    ids = torch.randint(3, 45, (_BATCH, _TOKENS))
    given: dict[str, Any] = {}
    if main == "past_values":
        return _series(config)
    if kind in ("clip", "siglip", "vilt"):
        given = {"input_ids": ids, "pixel_values": _image(config)}
    elif kind in ("videomae", "timesformer", "vivit"):
        given = {"pixel_values": _image(config).unsqueeze(1).repeat(1, config.num_frames, 1, 1, 1)}
    elif main == "pixel_values":
        given = {"pixel_values": _image(config)}
    elif main in ("input_values", "input_features"):
        given = _speech(kind, config)
    elif kind == "perceiver":
        given = {"inputs": torch.randn(_BATCH, _TOKENS, config.d_model)}
    else:
        given = {"input_ids": ids}
    if kind == "vit_mae":
        given["noise"] = torch.rand(_BATCH, (config.image_size // config.patch_size) ** 2)
    if getattr(config, "is_encoder_decoder", False) and main != "pixel_values":
        given["decoder_input_ids"] = ids[:, :_TARGETS]
    return given


def build(name: str) -> Case:
    """``type``, or ``type:Head``, or ``type:Head@experts`` with how the experts are computed, or ``type:*``."""
    kind, _, rest = name.partition(":")
    if rest == "*":
        return _multimodal.build(kind)
    head, _, experts = rest.partition("@")
    model = _model(kind, head, experts)
    given = _inputs(kind, model.config, str(model.main_input_name))
    if "input_ids" in given:
        try:
            with torch.no_grad():
                model(**given, use_cache=False)
            given["use_cache"] = False
        except TypeError:
            pass
    title = kind if not head else f"{kind}: {head}" + (f" ({experts} experts)" if experts else "")
    return Case(_Head(model) if head else model, (), given, title=title)
