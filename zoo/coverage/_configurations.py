"""Small configurations of transformers' model types, and the heads that are measured on them."""

from __future__ import annotations

from typing import Any

# Set wherever a configuration has a plain field of this name, and the type is not in `EXACT`.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "word_embed_proj_dim", "attention_hidden_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "encoder_layers", "decoder_layers", "n_layer", "num_layers", "n_layers"), 2),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(
        ("num_attention_heads", "encoder_attention_heads", "decoder_attention_heads", "n_head", "num_heads"), 4
    ),
    **dict.fromkeys(("n_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "hidden_dim", "ffn_dim"), 40),
    **dict.fromkeys(("d_inner", "ffn_hidden_size", "n_inner"), 40),
    **dict.fromkeys(
        ("head_dim", "d_kv", "kv_channels", "d_head", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8
    ),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "embedding_size"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "state_size", "time_step_rank"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "type_vocab_size"), 2),
    **dict.fromkeys(("first_k_dense_replace", "n_group", "topk_group"), 1),
    "vocab_size": 50,
    "max_position_embeddings": 40,
    "n_positions": 40,
    "moe_intermediate_size": 24,
    "image_size": 32,
    "patch_size": 8,
    "pad_token_id": 0,
    "attention_window": 8,
    "sliding_window": 16,
    "rotary_dim": 8,
}

_STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32]}
_PATCHED = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
_SPEECH = {"conv_dim": (16,) * 3, "conv_stride": (5, 2, 2), "conv_kernel": (10, 3, 3), "num_feat_extract_layers": 3}
_SPEECH |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4}

# Fields of one type, after `SMALL`.
FIELDS: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "funnel": {"block_sizes": [1, 1], "num_hidden_layers": None, "d_inner": 40, "num_labels": 3},
    "xlnet": {"max_position_embeddings": None},
    "squeezebert": {
        "embedding_size": 32,
        **dict.fromkeys(("q_groups", "k_groups", "v_groups", "intermediate_groups"), 2),
    },
    "reformer": {
        "axial_pos_embds_dim": (8, 24),
        "axial_pos_shape": (4, 4),
        "attn_layers": ["local", "lsh"],
        "hash_seed": 0,
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_buckets": 2,
        "attention_head_size": 8,
        "feed_forward_size": 40,
    },
    "swin": {"embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4, "patch_size": 2},
    "swinv2": {"embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4, "patch_size": 2},
    "rwkv": {"num_hidden_layers": 2, "hidden_size": 32},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2, "expand": 2},
    "whisper": {
        "max_source_positions": 20,
        "num_mel_bins": 10,
        "max_target_positions": 20,
        "decoder_start_token_id": 1,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "speech_to_text": {
        "conv_channels": 16,
        "input_feat_per_channel": 8,
        "max_source_positions": 60,
        "max_target_positions": 40,
    },
    "lilt": {"hidden_size": 48, "intermediate_size": 40, "num_attention_heads": 4},
    "prophetnet": {"num_hidden_layers": None, "num_encoder_layers": 2, "num_decoder_layers": 2, "ngram": 2},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "big_bird": {"attention_type": "original_full"},
    "vit_mae": {
        "decoder_hidden_size": 16,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 24,
    },
    "canine": {
        "num_hash_buckets": 40,
        "local_transformer_stride": 8,
        "downsampling_rate": 4,
        "max_position_embeddings": 64,
    },
    "perceiver": {
        "num_latents": 8,
        "d_latents": 32,
        "d_model": 24,
        "num_blocks": 1,
        "num_self_attends_per_block": 2,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4,
    },
    "deepseek_v2": {"num_key_value_heads": 4, "head_dim": None},
    "deepseek_v3": {"num_key_value_heads": 4, "head_dim": None},
    "deepseek_v32": {"num_key_value_heads": 4, "head_dim": None},
    "kimi_linear": {
        **dict.fromkeys(("linear_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
        **dict.fromkeys(("linear_num_heads", "num_key_value_heads", "qk_rope_head_dim"), 4),
        "num_experts_per_token": 2,
        "kv_lora_rank": 16,
        "qk_head_dim": 12,
        "layer_types": ["linear_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse"],
    },
    "falcon_h1": {
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_ssm": 64,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "bamba": {"mamba_n_heads": 8, "mamba_d_state": 8, "mamba_chunk_size": 8, "attn_layer_indices": [1]},
    "granitemoehybrid": {
        "mamba_n_heads": 8,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
        "layer_types": ["mamba", "attention"],
    },
    "fsmt": {"src_vocab_size": 50, "tgt_vocab_size": 50},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX", "de_DE"]},
    "luke": {"entity_vocab_size": 30, "entity_emb_size": 16},
    "roc_bert": {
        "pronunciation_vocab_size": 50,
        "shape_vocab_size": 50,
        "pronunciation_embed_dim": 16,
        "shape_embed_dim": 16,
    },
    "markuplm": {
        "max_depth": 5,
        "xpath_unit_hidden_size": 8,
        "max_xpath_tag_unit_embeddings": 20,
        "max_xpath_subs_unit_embeddings": 20,
        "tag_pad_id": 16,
        "subs_pad_id": 17,
    },
    "videomae": {"num_frames": 4, "tubelet_size": 2},
    "timesformer": {"num_frames": 4},
    "vivit": {"num_frames": 4, "tubelet_size": [2, 8, 8]},
    "audio-spectrogram-transformer": {
        "max_length": 32,
        "num_mel_bins": 16,
        "patch_size": 8,
        "frequency_stride": 8,
        "time_stride": 8,
    },
    "wav2vec2": _SPEECH,
    "hubert": _SPEECH,
    "wavlm": _SPEECH,
    "unispeech": _SPEECH,
    "unispeech-sat": _SPEECH,
    "data2vec-audio": {**_SPEECH, "num_conv_pos_embeddings": 2, "conv_pos_kernel_size": 5},
    "sew": {"conv_dim": (16,) * 3, "conv_stride": (5, 2, 2), "conv_kernel": (10, 3, 3), "num_feat_extract_layers": 3},
    "yolos": {"image_size": [32, 32], "num_detection_tokens": 5},
    "time_series_transformer": {
        "prediction_length": 4,
        "context_length": 8,
        "lags_sequence": [1, 2, 3],
        "num_time_features": 1,
    },
    "autoformer": {
        "input_size": 1,
        "label_length": 4,
        "moving_average": 3,
        "prediction_length": 4,
        "context_length": 8,
        "lags_sequence": [1, 2, 3],
        "num_time_features": 1,
    },
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
    },
    "beit": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "use_auxiliary_head": False, "pool_scales": [1, 2]},
}

# Fields of one type, and nothing of `SMALL`.
EXACT: dict[str, dict[str, Any]] = {
    "convnext": _STAGES,
    "convnextv2": _STAGES,
    "resnet": {"embedding_size": 8, "depths": [1, 2], "hidden_sizes": [16, 32], "layer_type": "bottleneck"},
    "regnet": {"embedding_size": 8, **_STAGES, "groups_width": 8},
    "bit": {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 2], "num_groups": 8},
    "efficientnet": {
        "image_size": 64,
        "width_coefficient": 0.3,
        "depth_coefficient": 0.3,
        "hidden_dim": 384,
        "depth_divisor": 8,
    },
    "mobilenet_v1": {"image_size": 64, "depth_multiplier": 0.25},
    "mobilenet_v2": {"image_size": 64, "depth_multiplier": 0.35},
    "mobilevit": {
        "image_size": 64,
        "hidden_sizes": [16, 24, 32],
        "neck_hidden_sizes": [8, 8, 16, 24, 24, 32, 48],
        "num_attention_heads": 4,
    },
    "mobilevitv2": {"image_size": 64, "width_multiplier": 0.25},
    "levit": {
        "image_size": 64,
        "hidden_sizes": [16, 24, 32],
        "num_attention_heads": [2, 3, 4],
        "depths": [1, 1, 1],
        "key_dim": [8, 8, 8],
        "attention_ratio": [2, 2, 2],
        "mlp_ratio": [2, 2, 2],
    },
    "cvt": {"embed_dim": [8, 16, 24], "num_heads": [1, 2, 4], "depth": [1, 2, 3], "image_size": 64},
    "pvt": {
        "image_size": 64,
        "hidden_sizes": [8, 16, 24, 32],
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 2, 2, 4],
        "mlp_ratios": [2, 2, 2, 2],
    },
    "pvt_v2": {
        "image_size": 64,
        "hidden_sizes": [8, 16, 24, 32],
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 2, 2, 4],
        "mlp_ratios": [2, 2, 2, 2],
    },
    "segformer": {
        "hidden_sizes": [8, 16, 24, 32],
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 2, 2, 4],
        "decoder_hidden_size": 16,
        "mlp_ratios": [2, 2, 2, 2],
        "image_size": 64,
    },
    "glpn": {
        "hidden_sizes": [8, 16, 24, 32],
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 2, 2, 4],
        "decoder_hidden_size": 16,
        "mlp_ratios": [2, 2, 2, 2],
        "image_size": 64,
    },
    "poolformer": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "image_size": 64},
    "focalnet": {
        "image_size": 64,
        "embed_dim": 16,
        "depths": [1, 1],
        "hidden_sizes": [16, 32],
        "focal_levels": [2, 2],
        "focal_windows": [3, 3],
    },
    "hiera": {
        "image_size": [64, 64],
        "embed_dim": 16,
        "depths": [1, 1, 1],
        "num_heads": [1, 2, 4],
        "num_query_pool": 2,
        "masked_unit_size": [4, 4],
        "patch_stride": [4, 4],
    },
    "swiftformer": {"image_size": 64, "depths": [1, 1, 1, 1], "embed_dims": [8, 16, 24, 32]},
    "dpt": {
        **_PATCHED,
        "image_size": 32,
        "patch_size": 8,
        "neck_hidden_sizes": [8, 8, 16, 16],
        "fusion_hidden_size": 16,
        "num_hidden_layers": 4,
        "backbone_out_indices": [0, 1, 2, 3],
    },
    "clip": {},
    "siglip": {},
    "vilt": {**_PATCHED, "image_size": 32, "patch_size": 8, "vocab_size": 50, "max_position_embeddings": 40},
    "encodec": {
        "num_filters": 4,
        "hidden_size": 16,
        "upsampling_ratios": [4, 2],
        "codebook_size": 16,
        "codebook_dim": 16,
    },
}

_DECODERS = (
    "gpt2 gpt_neo gpt_neox gptj opt bloom llama mistral mixtral qwen2 qwen3 qwen2_moe qwen3_moe gemma gemma2 "
    "gemma3_text phi phi3 falcon mpt stablelm starcoder2 olmo olmo2 cohere granite granitemoe mamba mamba2 "
    "falcon_mamba rwkv deepseek_v2 deepseek_v3 jamba recurrent_gemma persimmon codegen xglm biogpt nemotron glm "
    "glm4 smollm3 ernie4_5 bitnet olmoe minimax lfm2 dbrx gpt_bigcode ctrl openai-gpt cohere2 granitemoehybrid "
    "exaone4 gpt_neox_japanese helium arcee seed_oss bamba gpt_oss hunyuan_v1_dense phimoe jetmoe moshi xlstm "
    "afmoe apertus aria_text bert-generation cohere2_moe cwm deepseek_v32 diffllama doge ernie4_5_moe falcon_h1 "
    "flex_olmo glm4_moe granitemoeshared hunyuan_v1_moe llama4_text minimax_m2 ministral ministral3 nanochat olmo3 "
    "olmo_hybrid vaultgemma modernbert-decoder bailing_hybrid deepseek_v4 exaone_moe flint gpt-sw3 granite_swa "
    "granitemoe_swa hrm_text hy_v3 hy_v4 hyperclovax inkling_text inkling2_text internlm3 iquestcoder jais2 kimi_linear "
    "kolibri1 laguna lfm3 mellum mimo_v2_flash nemotron_h qwen3_5_moe_text qwen3_5_text qwen3_next qwen4_exp_text "
    "solar_open"
)
_ENCODERS = (
    "bert roberta distilbert albert electra deberta deberta-v2 xlm-roberta mpnet camembert roformer nystromformer "
    "convbert squeezebert fnet ibert layoutlm canine longformer big_bird funnel xlnet reformer megatron-bert "
    "rembert lilt markuplm ernie esm flaubert xlm xmod yoso mobilebert mra luke roc_bert data2vec-text modernbert "
    "roberta-prelayernorm nomic_bert eurobert gte xlm-roberta-xl"
)
_TRANSLATORS = (
    "t5 mt5 bart mbart pegasus m2m_100 blenderbot blenderbot-small marian led mvp plbart prophetnet bigbird_pegasus "
    "umt5 switch_transformers longt5 pegasus_x nllb-moe fsmt"
)
_IMAGES = (
    "vit deit beit dinov2 dinov2_with_registers swin swinv2 convnext convnextv2 resnet regnet mobilevit mobilevitv2 "
    "segformer poolformer levit cvt pvt pvt_v2 efficientnet mobilenet_v1 mobilenet_v2 bit focalnet vit_msn "
    "data2vec-vision hiera ijepa swiftformer siglip clip"
)
_SPEECHES = "wav2vec2 hubert wavlm unispeech unispeech-sat sew data2vec-audio"
_OTHERS = (
    "splinter perceiver vit_mae glpn dpt yolos whisper speech_to_text clip_text_model clip_vision_model "
    "siglip_vision_model time_series_transformer autoformer videomae timesformer vivit audio-spectrogram-"
    "transformer vilt encodec"
)

# Model type -> heads beside the base model.
HEADS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_DECODERS.split(), ("CausalLM",)),
    **dict.fromkeys(_ENCODERS.split(), ("SequenceClassification", "MaskedLM")),
    **dict.fromkeys(_TRANSLATORS.split(), ("Seq2SeqLM",)),
    **dict.fromkeys(_IMAGES.split(), ("ImageClassification",)),
    **dict.fromkeys(_SPEECHES.split(), ("CTC",)),
    **dict.fromkeys(_OTHERS.split(), ()),
    **dict.fromkeys(("canine", "xlnet", "lilt", "markuplm"), ("SequenceClassification",)),
    "clip": ("ImageClassification", "ZeroShotImageClassification"),
    "siglip": ("ImageClassification", "ZeroShotImageClassification"),
    "whisper": ("SpeechSeq2Seq",),
    "speech_to_text": ("SpeechSeq2Seq",),
    "segformer": ("ImageClassification", "SemanticSegmentation"),
    "beit": ("ImageClassification", "SemanticSegmentation"),
    "dpt": ("DepthEstimation",),
    "glpn": ("DepthEstimation",),
    "yolos": ("ObjectDetection",),
    "videomae": ("VideoClassification",),
    "timesformer": ("VideoClassification",),
    "vivit": ("VideoClassification",),
    "audio-spectrogram-transformer": ("AudioClassification",),
    "splinter": ("QuestionAnswering",),
    "vit_mae": ("PreTraining",),
}
# Mixtures of experts that are measured in each spelling of their experts.
EXPERTS = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "granitemoe", "jamba")
