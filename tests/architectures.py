"""Tiny random models of every causal-LM architecture that transformers knows."""

from __future__ import annotations

import math
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

MAX_PARAMETERS = 5_000_000
VOCAB = 96

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN = 32, 4, 2, 8, 48


def _fields(value: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


TINY: dict[str, Any] = {
    **_fields(HIDDEN, "hidden_size d_model n_embd emb_dim embedding_dim dim_model embedding_size word_embed_proj_dim"),
    **_fields(HIDDEN, "input_embedding_size output_embedding_size attention_hidden_size lru_width hidden_size_global"),
    **_fields(HIDDEN, "backbone_hidden_size out_hidden_size"),
    **_fields(HEADS, "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads"),
    **_fields(HEADS, "encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads"),
    **_fields(HEADS, "swa_num_attention_heads num_query_groups linear_num_heads linear_num_value_heads"),
    **_fields(KV_HEADS, "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads linear_num_key_heads"),
    **_fields(
        HEAD_DIM, "head_dim d_head dim_head d_kv attention_head_dim attention_head_size kv_channels swa_head_dim"
    ),
    **_fields(HEAD_DIM, "qk_nope_head_dim qk_rope_head_dim v_head_dim linear_head_dim linear_key_head_dim"),
    **_fields(HEAD_DIM, "linear_value_head_dim index_head_dim query_pre_attn_scalar swa_head_dim global_head_dim"),
    **_fields(2 * HEAD_DIM, "qk_head_dim q_lora_rank kv_lora_rank o_lora_rank"),
    **_fields(FFN, "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim dff d_ff dim_ff d_inner n_inner"),
    **_fields(FFN, "ffn_hidden_size feed_forward_size intermediate_size_mlp dense_intermediate_size mlp_dim"),
    **_fields(FFN, "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size"),
    **_fields(FFN, "shared_experts_intermediate_size shared_intermediate_size moe_shared_expert_intermediate_size"),
    **_fields(2, "decoder_layers encoder_layers n_layer n_layers num_layers num_decoder_layers num_encoder_layers"),
    **_fields(2, "num_blocks num_layers_per_stack depth"),
    **_fields(4, "num_experts n_routed_experts num_local_experts moe_num_experts num_local_experts zero_expert_num"),
    **_fields(2, "num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k top_k_experts"),
    **_fields(1, "n_group topk_group num_expert_group n_shared_experts num_shared_experts moe_num_shared_experts"),
    **_fields(1, "first_k_dense_replace num_dense_layers moe_layer_start_index"),
    **_fields(4, "chunk_size mamba_chunk_size block_size index_block_size"),
    **_fields(4, "patch_size image_size"),
    **_fields(128, "max_position_embeddings n_positions n_ctx max_seq_len model_max_length max_target_positions"),
    **_fields(128, "context_length max_source_positions"),
    **_fields(VOCAB, "vocab_size decoder_vocab_size vocab_size_per_layer_input unpadded_vocab_size"),
    **_fields(0, "pad_token_id"),
    **_fields(1, "bos_token_id"),
    **_fields(2, "eos_token_id decoder_start_token_id sep_token_id cls_token_id eod_token_id"),
    **_fields(None, "forced_eos_token_id forced_bos_token_id begin_suppress_tokens suppress_tokens"),
    **_fields(True, "is_decoder"),
    **_fields(False, "tie_word_embeddings"),
    **_fields(8, "state_size ssm_state_size mamba_d_state time_step_rank mamba_dt_rank n_mamba_heads mamba_n_heads"),
    **_fields(8, "mamba_num_heads mamba_d_head mamba_head_dim mamba_headdim hidden_size_per_layer_input laurel_rank"),
    **_fields(8, "adapter_rank gated_norm_rank d_rel hc_lowrank router_hidden_size rotary_dim rel_extent"),
    **_fields(64, "mamba_d_ssm"),
    **_fields(32, "index_n_heads"),  # with few, many scores are zero and the sparse indexer picks among ties
    **_fields(1, "n_groups mamba_n_groups mamba_ngroups"),
}

WINDOWS = tuple(
    _fields(None, "sliding_window sliding_window_size local_attention attention_window_size window_size")
    | _fields(None, "attention_chunk_size local_attention_window_len keep_window_size index_topk index_topk_blocks")
)
"""Fields that limit how far back a layer looks, or how many tokens it looks at."""

_LLAMA4 = {"num_hidden_layers": 2, "layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0]}
_SHARED = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}
_INDEXER = {
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "indexed_attention"],
    **_fields(1, "indexer_kv_heads"),
    "indexer_n_heads": 32,
    "indexer_head_dim": 8,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
    "hc_count": 2,
}
_HYBRID = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}

OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"num_hidden_layers": 2, "attn_layer_indices": [1]},
    "big_bird": {"attention_type": "original_full"},  # or it changes itself, randomly, in its first forward
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        }
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": FFN, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots3_note_text": {"per_layer_config": {"2": {"head_dim": 16, "v_head_dim": 16}}},
    "gemma3n_text": {**_SHARED, "activation_sparsity_pattern": [0.5, 0.0] * 2},
    "gemma4_text": _SHARED,
    "gemma4_unified_text": _SHARED,
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"num_hidden_layers": 1, "num_layers_per_stack": None},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": {**_HYBRID, "mlp_layer_types": ["dense", "sparse"], "num_attention_heads_per_layer": [4, 4]},
    "lfm2": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "llama4_text": {**_LLAMA4, "moe_layers": [1]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "mellum": {**_HYBRID, "mlp_layer_types": ["sparse", "sparse"]},
    "minimax_m3_vl_text": {
        "num_hidden_layers": 2,
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "mlp_layer_types": ["sparse", "sparse"],
        "index_n_heads": HEADS,
    },
    "mllama_text_model": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
    "qwen4_exp_text": _INDEXER,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds_dim": (16, 16), "axial_pos_shape": (8, 16)},
    "roc_bert": {"pronunciation_vocab_size": 10, "shape_vocab_size": 10},
    "xlstm": {"num_hidden_layers": 2, **_fields(128, "hidden_size embedding_dim")},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        **_fields(None, "attention_hidden_size attention_head_dim"),
        "n_mamba_heads": 2,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        **_fields(None, "attention_hidden_size attention_head_dim kv_channels"),
        "num_key_value_heads": HEADS,
    },
    "zaya": {"num_experts_per_tok": 1, "num_hidden_layers": 2, "layer_types": ["hybrid", "hybrid_sliding"]},
}
"""What the table above does not get right, by model type. None: leave it to the config."""


def _nested(config: PreTrainedConfig) -> dict[str, PreTrainedConfig]:
    return {name: value for name, value in vars(config).items() if isinstance(value, PreTrainedConfig)}


def _shrunk(default: PreTrainedConfig, model_type: str, window: int) -> dict[str, Any]:
    """Arguments of a tiny config of the same class as `default`."""
    fields = vars(default)
    kwargs = {key: value for key, value in (TINY | dict.fromkeys(WINDOWS, window)).items() if key in fields}
    if "kv_lora_rank" in kwargs and "num_key_value_heads" in kwargs:
        kwargs["num_key_value_heads"] = HEADS
    depth = fields.get("num_hidden_layers")
    if isinstance(depth, int) and depth > 0:
        lists = {k: v for k, v in fields.items() if k not in TINY and isinstance(v, (list, tuple)) and len(v) == depth}
        first: dict[str, int] = {}  # one layer of each kind, in the order of the model, and two at least
        for i in range(depth):
            first.setdefault(repr([value[i] for value in lists.values()]), i)
        chosen = list(first.values()) if len(first) > 1 else [0, depth - 1]
        kwargs["num_hidden_layers"] = len(chosen)
        kwargs |= {key: [value[i] for i in chosen] for key, value in lists.items()}
    for key, value in _nested(default).items():
        kwargs[key] = _shrunk(value, value.model_type, window)
    kwargs |= OVERRIDES.get(model_type, {})
    return {key: value for key, value in kwargs.items() if value is not None or (key in TINY and TINY[key] is None)}


def tiny_config(name: str, window: int = 6, **overrides: Any) -> PreTrainedConfig:
    """A config of the architecture with everything small.

    Args:
        name: A key of `NAMES`.
        window: Length of every kind of attention window.
        overrides: Fields to set otherwise.
    """
    config_class: type[PreTrainedConfig] = getattr(transformers, NAMES[name]).config_class
    if config_class is not CONFIG_MAPPING[name]:  # a composite whose causal LM is its text part
        name = config_class.model_type
    return config_class(**_shrunk(config_class(), name, window) | overrides)


def tiny_model(name: str, window: int = 6, **overrides: Any) -> PreTrainedModel:
    """A random model in fp32, in eval mode, that generates until a length limit. Arguments as of `tiny_config`.

    Raises:
        MemoryError: It would have more than `MAX_PARAMETERS`.
    """
    model_class = getattr(transformers, NAMES[name])
    with torch.device("meta"):
        shell = model_class(tiny_config(name, window, **overrides))
    count = sum(parameter.numel() for parameter in shell.parameters())
    if count > MAX_PARAMETERS:
        raise MemoryError(f"{count / 1e6:.0f} M parameters")
    torch.manual_seed(0)
    model: PreTrainedModel = model_class(tiny_config(name, window, **overrides)).float().eval()
    _randomize(model)
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1)
    return model


@torch.no_grad()
def _randomize(model: PreTrainedModel) -> None:
    """Weights under which attention has its say, so that the most likely token changes from step to step."""
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            is_embedding = any(word in name for word in ("embed", "wte", "wpe"))
            parameter.normal_(0, 1 if is_embedding else 2.5 / math.sqrt(parameter.shape[-1]))
