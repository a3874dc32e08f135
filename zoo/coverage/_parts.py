"""Pieces of small transformers of several parts: configurations, inputs, outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers

Inputs = Mapping[str, Any]
BATCH, WORDS, IMAGE = 2, 6, 46  # the last is the token that stands for an image's patches

SIZE: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
WORD = {**SIZE, "vocab_size": 50, "max_position_embeddings": 64}
TEXT = {**WORD, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 44, "pad_token_id": 0}
VIEW = {**SIZE, "image_size": 32, "patch_size": 8, "projection_dim": 24}
LLAMA = {"model_type": "llama", **TEXT, "head_dim": 8}
OPT = {"model_type": "opt", **TEXT, "word_embed_proj_dim": 32, "ffn_dim": 40}
T5 = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4}
FORMER: dict[str, Any] = {
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 40),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
}
DETR = {
    **FORMER,
    "d_model": 32,
    "num_queries": 5,
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
}
POINTS = {"encoder_n_points": 2, "decoder_n_points": 2}
STAGES: dict[str, Any] = {
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [8, 16, 24, 32],
    "embedding_size": 8,
    "layer_type": "basic",
}
SWIN: dict[str, Any] = {"image_size": 64, "patch_size": 4, "embed_dim": 8, "window_size": 2}
SWIN |= {"depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4]}
SPEECH = {"conv_dim": (16,) * 3, "conv_stride": (5, 2, 2), "conv_kernel": (10, 3, 3), "num_feat_extract_layers": 3}
SPEECH |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4}
CODEC = {"num_filters": 4, "hidden_size": 16, "upsampling_ratios": [4, 2], "codebook_size": 16, "codebook_dim": 16}
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
RT_DETR = {
    **dict.fromkeys(("d_model", "encoder_hidden_dim"), 32),
    "encoder_in_channels": [16, 24, 32],
    "decoder_in_channels": [32] * 3,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "num_queries": 5,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_n_points": 2,
}
SERIES = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2, 3], "num_time_features": 1}
PATCHES = {"context_length": 16, "patch_length": 4, "patch_stride": 4, "num_input_channels": 3, "d_model": 16}
PATCHES |= {"prediction_length": 4}


def ids(length: int = WORDS, batch: int = BATCH) -> torch.Tensor:
    return torch.randint(3, 44, (batch, length))


def image(size: int = 32) -> torch.Tensor:
    return torch.randn(BATCH, 3, size, size)


def pair() -> Inputs:
    return {"input_ids": ids(), "pixel_values": image()}


def inside(patches: int) -> Callable[[], Inputs]:
    """A text within which a run of tokens stands for the patches of an image."""

    def inputs() -> Inputs:
        words = ids(WORDS + patches)
        words[:, 2 : 2 + patches] = IMAGE
        return {"input_ids": words, "pixel_values": image()}

    return inputs


def packed() -> Inputs:
    """Patches of all images in one sequence, with their grids."""
    words = ids(WORDS + 4)
    words[:, 1], words[:, 2:6] = 47, IMAGE
    grid = torch.tensor([[1, 4, 4]] * BATCH)
    kinds = (words == IMAGE).long()
    return {
        "input_ids": words,
        "pixel_values": torch.randn(16 * BATCH, 384),
        "image_grid_thw": grid,
        "mm_token_type_ids": kinds,
    }


def detected() -> Inputs:
    return {"pixel_values": image(64)}


def spoken() -> Inputs:
    return {"input_values": torch.randn(BATCH, 1000), "decoder_input_ids": ids(5)}


def heard() -> Inputs:
    return {"input_values": torch.randn(1, 1, 160)}


def page() -> Inputs:
    boxes = torch.tensor([10, 20, 30, 50]).expand(BATCH, WORDS, 4) + torch.arange(WORDS)[None, :, None]
    return {**pair(), "bbox": boxes}


def series() -> Inputs:
    return {
        "past_values": torch.randn(BATCH, 11),
        "past_time_features": torch.randn(BATCH, 11, 1),
        "past_observed_mask": torch.ones(BATCH, 11),
        "future_values": torch.randn(BATCH, 4),
        "future_time_features": torch.randn(BATCH, 4, 1),
    }


def backbone(kind: str, **fields: Any) -> Any:
    return transformers.CONFIG_MAPPING[kind](**fields)


def resnet(*stages: str) -> Any:
    return backbone("resnet", **STAGES, out_features=list(stages))


def swin(*stages: str) -> Any:
    return backbone("swin", **SWIN, out_features=list(stages))


BOXES, MASKS = ("logits", "pred_boxes"), ("class_queries_logits", "masks_queries_logits")
QFORMER = {**TEXT, "encoder_hidden_size": 32, "cross_attention_frequency": 1}
TOWERS = {"text_config": TEXT, "vision_config": VIEW, "projection_dim": 24}
VISION = {"depth": 2, "num_heads": 2, "patch_size": 8, "hidden_size": 32}
TOKENS = {"image_token_id": IMAGE, "vision_start_token_id": 47, "vision_end_token_id": 48, "video_token_id": 45}
MASK = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 40}
MASK |= {"dim_feedforward": 40, "encoder_layers": 1, "decoder_layers": 3, "num_attention_heads": 4, "num_queries": 5}
ALL_STAGES = ("stage1", "stage2", "stage3", "stage4")
