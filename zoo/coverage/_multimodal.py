"""Small transformers of several parts (towers, backbones, codecs), each with its usual head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from zoo.coverage._case import Case
from zoo.coverage._parts import (
    ALL_STAGES,
    BATCH,
    BOXES,
    CODEC,
    DETR,
    FORMER,
    IMAGE,
    LLAMA,
    MASK,
    MASKS,
    MROPE,
    OPT,
    PATCHES,
    POINTS,
    QFORMER,
    RT_DETR,
    SERIES,
    SIZE,
    SPEECH,
    STAGES,
    SWIN,
    T5,
    TEXT,
    TOKENS,
    TOWERS,
    VIEW,
    VISION,
    WORD,
    WORDS,
    Inputs,
    backbone,
    detected,
    heard,
    ids,
    image,
    inside,
    packed,
    page,
    pair,
    resnet,
    series,
    spoken,
    swin,
)


@dataclass(frozen=True)
class Composite:
    """A model class, what its configuration takes (made when it is built), its inputs, and the outputs that count."""

    cls: str
    fields: Callable[[], dict[str, Any]]
    inputs: Callable[[], Inputs]
    outputs: Sequence[str] = ("logits",)


MODELS: dict[str, Composite] = {
    "blip": Composite(
        "BlipForConditionalGeneration",
        lambda: {**TOWERS, "text_config": {**TEXT, "encoder_hidden_size": 32}},
        pair,
    ),
    "blip-2": Composite(
        "Blip2ForConditionalGeneration",
        lambda: (
            {"vision_config": VIEW, "qformer_config": QFORMER, "text_config": OPT, "num_query_tokens": 4}
            | {"image_token_index": IMAGE}
        ),
        inside(4),
    ),
    "llava": Composite(
        "LlavaForConditionalGeneration",
        lambda: (
            {"text_config": LLAMA, "vision_config": {"model_type": "clip_vision_model", **VIEW}}
            | {"image_token_index": IMAGE, "vision_feature_layer": -1}
        ),
        inside(16),
    ),
    "paligemma": Composite(
        "PaliGemmaForConditionalGeneration",
        lambda: (
            {"text_config": {**LLAMA, "model_type": "gemma"}, "projection_dim": 32, "image_token_index": IMAGE}
            | {"vision_config": {"model_type": "siglip_vision_model", **VIEW}}
        ),
        lambda: {**inside(16)(), "token_type_ids": torch.zeros(BATCH, WORDS + 16, dtype=torch.long)},
    ),
    "idefics2": Composite(
        "Idefics2ForConditionalGeneration",
        lambda: (
            {"text_config": {**LLAMA, "model_type": "mistral"}, "vision_config": VIEW, "image_token_id": IMAGE}
            | {
                "perceiver_config": {"hidden_size": 32, "resampler_n_latents": 4, "resampler_depth": 1}
                | {"resampler_n_heads": 4, "num_key_value_heads": 2, "resampler_head_dim": 8}
            }
        ),
        lambda: {k: v.unsqueeze(1) if k == "pixel_values" else v for k, v in inside(4)().items()},
    ),
    "qwen2_vl": Composite(
        "Qwen2VLForConditionalGeneration",
        lambda: (
            {"text_config": {**TEXT, **MROPE}, "vision_config": {**VISION, "embed_dim": 32, "mlp_ratio": 2}} | TOKENS
        ),
        packed,
    ),
    "qwen2_5_vl": Composite(
        "Qwen2_5_VLForConditionalGeneration",
        lambda: (
            {
                "text_config": {**TEXT, **MROPE},
                "vision_config": {**VISION, "out_hidden_size": 32, "intermediate_size": 40, "window_size": 32}
                | {"fullatt_block_indexes": [1]},
            }
            | TOKENS
        ),
        packed,
    ),
    "git": Composite("GitForCausalLM", lambda: {**WORD, "vision_config": VIEW}, pair),
    "altclip": Composite(
        "AltCLIPModel",
        lambda: {**TOWERS, "text_config": {**TEXT, "project_dim": 24}},
        pair,
        ("logits_per_image",),
    ),
    "clipseg": Composite(
        "CLIPSegForImageSegmentation",
        lambda: (
            {**TOWERS, "extract_layers": [0, 1], "reduce_dim": 16, "decoder_num_attention_heads": 4}
            | {"decoder_intermediate_size": 24}
        ),
        pair,
    ),
    "groupvit": Composite(
        "GroupViTModel",
        lambda: (
            {**TOWERS, "projection_intermediate_dim": 16}
            | {
                "vision_config": {**VIEW, "depths": [1, 1, 1], "num_group_tokens": [4, 2, 0]}
                | {"num_output_groups": [4, 2, 0]}
            }
        ),
        pair,
        ("logits_per_image",),
    ),
    "owlvit": Composite("OwlViTForObjectDetection", lambda: {**TOWERS, "projection_dim": 32}, pair, BOXES),
    "visual_bert": Composite(
        "VisualBertForPreTraining",
        lambda: {**WORD, "visual_embedding_dim": 20},
        lambda: {"input_ids": ids(), "visual_embeds": torch.randn(BATCH, 4, 20)},
        ("prediction_logits",),
    ),
    "lxmert": Composite(
        "LxmertForQuestionAnswering",
        lambda: (
            {k: v for k, v in WORD.items() if k != "num_hidden_layers"}
            | {"l_layers": 1, "x_layers": 2, "r_layers": 1, "visual_feat_dim": 20, "num_qa_labels": 5}
        ),
        lambda: {
            "input_ids": ids(),
            "visual_feats": torch.randn(BATCH, 4, 20),
            "visual_pos": torch.rand(BATCH, 4, 4),
        },
        ("question_answering_score",),
    ),
    "layoutlmv3": Composite(
        "LayoutLMv3ForTokenClassification",
        lambda: (
            {**WORD, "max_2d_position_embeddings": 128, "coordinate_size": 5, "shape_size": 6, "input_size": 32}
            | {"patch_size": 8, "rel_2d_pos_bins": 8, "rel_pos_bins": 8, "max_rel_pos": 16, "max_rel_2d_pos": 32}
        ),
        page,
    ),
    "udop": Composite(
        "UdopForConditionalGeneration",
        lambda: {**T5, "image_size": 32, "patch_size": 8, "max_2d_position_embeddings": 128},
        lambda: {**page(), "bbox": page()["bbox"] / 128, "decoder_input_ids": ids(4)},
    ),
    "tapas": Composite(
        "TapasForQuestionAnswering",
        lambda: {**WORD, "type_vocab_sizes": [3, 8, 8, 2, 8, 8, 4], "num_aggregation_labels": 4},
        lambda: {"input_ids": ids(), "token_type_ids": torch.arange(2).repeat(3)[None, :, None].expand(BATCH, -1, 7)},
        ("logits", "logits_aggregation"),
    ),
    "detr": Composite("DetrForObjectDetection", lambda: {**DETR, "backbone_config": resnet("stage4")}, detected, BOXES),
    "deformable_detr": Composite(
        "DeformableDetrForObjectDetection",
        lambda: {**DETR, **POINTS, "num_feature_levels": 4, "backbone_config": resnet(*ALL_STAGES[1:])},
        detected,
        BOXES,
    ),
    "rt_detr": Composite(
        "RTDetrForObjectDetection",
        lambda: {
            **RT_DETR,
            "backbone_config": backbone("rt_detr_resnet", **STAGES, out_features=list(ALL_STAGES[1:])),
        },
        detected,
        BOXES,
    ),
    "grounding-dino": Composite(
        "GroundingDinoForObjectDetection",
        lambda: (
            {**DETR, **POINTS, "num_feature_levels": 3, "backbone_config": swin(*ALL_STAGES[2:])}
            | {"text_config": {"model_type": "bert", **TEXT}, "max_text_len": 16}
        ),
        lambda: {"input_ids": ids(), **detected()},
        BOXES,
    ),
    "maskformer": Composite(
        "MaskFormerForInstanceSegmentation",
        lambda: (
            {"backbone_config": swin(*ALL_STAGES), "fpn_feature_size": 32, "mask_feature_size": 32}
            | {"decoder_config": backbone("detr", **FORMER, d_model=32, num_queries=5)}
        ),
        detected,
        MASKS,
    ),
    "mask2former": Composite(
        "Mask2FormerForUniversalSegmentation",
        lambda: {**MASK, "backbone_config": swin(*ALL_STAGES)},
        detected,
        MASKS,
    ),
    "upernet": Composite(
        "UperNetForSemanticSegmentation",
        lambda: (
            {"backbone_config": swin(*ALL_STAGES), "hidden_size": 16, "pool_scales": [1, 2]}
            | {"use_auxiliary_head": False}
        ),
        detected,
    ),
    "sam": Composite(
        "SamModel",
        lambda: {
            "vision_config": {**VIEW, "mlp_dim": 40, "output_channels": 16, "window_size": 2}
            | {"global_attn_indexes": [1], "num_pos_feats": 8},
            "prompt_encoder_config": {"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 4},
            "mask_decoder_config": {"hidden_size": 16, "mlp_dim": 24, "num_hidden_layers": 2}
            | {"num_attention_heads": 4, "iou_head_hidden_dim": 16},
        },
        lambda: {"pixel_values": image(), "input_points": 32 * torch.rand(BATCH, 1, 2, 2)},
        ("pred_masks", "iou_scores"),
    ),
    "depth_anything": Composite(
        "DepthAnythingForDepthEstimation",
        lambda: (
            {"reassemble_hidden_size": 32, "patch_size": 8, "reassemble_factors": [2, 1]}
            | {"neck_hidden_sizes": [8, 16], "fusion_hidden_size": 16, "head_hidden_size": 8}
            | {
                "backbone_config": backbone(
                    "dinov2",
                    **SIZE,
                    image_size=32,
                    patch_size=8,
                    out_features=["stage1", "stage2"],
                    reshape_hidden_states=False,
                )
            }
        ),
        lambda: {"pixel_values": image()},
        ("predicted_depth",),
    ),
    "swin2sr": Composite(
        "Swin2SRForImageSuperResolution",
        lambda: {
            **SWIN,
            "image_size": 16,
            "patch_size": 1,
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [2, 2],
            "window_size": 4,
        },
        lambda: {"pixel_values": image(16)},
        ("reconstruction",),
    ),
    "speecht5": Composite(
        "SpeechT5ForSpeechToText",
        lambda: {**FORMER, **SPEECH, "vocab_size": 50, "hidden_size": 32, "max_text_positions": 40},
        spoken,
    ),
    "wav2vec2-conformer": Composite(
        "Wav2Vec2ConformerForCTC",
        lambda: {**SIZE, **SPEECH, "vocab_size": 50, "max_source_positions": 100},
        lambda: {"input_values": torch.randn(BATCH, 1000)},
    ),
    "sew-d": Composite(
        "SEWDForCTC",
        lambda: {**SIZE, **SPEECH, "vocab_size": 50, "squeeze_factor": 2},
        lambda: {"input_values": torch.randn(BATCH, 1000)},
    ),
    "musicgen": Composite(
        "MusicgenForConditionalGeneration",
        lambda: {
            "text_encoder": {"model_type": "t5", **T5},
            "audio_encoder": {"model_type": "encodec", **CODEC},
            "decoder": {**SIZE, "vocab_size": 40, "ffn_dim": 40, "num_codebooks": 2, "max_position_embeddings": 40}
            | {"model_type": "musicgen_decoder", "pad_token_id": 39},
        },
        lambda: {"input_ids": ids(), "decoder_input_ids": ids(5, 2 * BATCH) % 39},
    ),
    "dac": Composite(
        "DacModel",
        lambda: (
            {"encoder_hidden_size": 8, "downsampling_ratios": [2, 4], "decoder_hidden_size": 16, "hidden_size": 16}
            | {"upsampling_ratios": [4, 2], "n_codebooks": 2, "codebook_size": 16, "codebook_dim": 4}
        ),
        heard,
        ("audio_values",),
    ),
    "informer": Composite("InformerForPrediction", lambda: {**FORMER, **SERIES, "d_model": 32}, series, ("loss",)),
    "patchtst": Composite(
        "PatchTSTForPrediction",
        lambda: {**PATCHES, "num_attention_heads": 4, "num_hidden_layers": 2, "ffn_dim": 24},
        lambda: {"past_values": torch.randn(BATCH, 16, 3)},
        ("prediction_outputs",),
    ),
    "pix2struct": Composite(
        "Pix2StructForConditionalGeneration",
        lambda: {
            "text_config": {**T5, "hidden_size": 32},
            "vision_config": {**SIZE, "patch_embed_hidden_size": 20, "d_ff": 40, "d_kv": 8, "seq_len": 16},
        },
        lambda: {
            "flattened_patches": torch.cat(
                [
                    torch.arange(8.0).view(1, 8, 1).expand(BATCH, 8, 1),
                    torch.ones(BATCH, 8, 1),
                    torch.randn(BATCH, 8, 20),
                ],
                -1,
            ),
            "decoder_input_ids": ids(5),
        },
    ),
}


class _Outputs(nn.Module):
    """A model of whose outputs only some count."""

    def __init__(self, model: nn.Module, outputs: Sequence[str]) -> None:
        super().__init__()
        self.model, self.outputs = model, tuple(outputs)

    def forward(self, **kwargs: Any) -> Any:
        result = self.model(**kwargs)
        return tuple(result[key] for key in self.outputs if result.get(key) is not None)


def names() -> Sequence[str]:
    """``type:*``, of those that the installed library has."""
    return [f"{kind}:*" for kind, model in MODELS.items() if hasattr(transformers, model.cls)]


def build(kind: str) -> Case:
    """A model of a type, for its usual head."""
    made = MODELS[kind]
    cls = getattr(transformers, made.cls)
    torch.manual_seed(0)
    config = cls.config_class(**made.fields())
    model = cls._from_config(config, attn_implementation="eager").eval()
    return Case(_Outputs(model, made.outputs), (), made.inputs(), title=f"{kind}: {made.cls.rpartition('For')[2]}")
