"""Builds a tiny random model of any family of causal language models that transformers has."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from semalign_harness import build_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

DEPTH = 4
"""Layers, of two kinds where a family has two."""
WINDOW = 8
"""Positions of a sliding window or chunk, fewer than a checked sequence has."""
ENCODERS = ("bert-generation", "musicgen", "musicgen_melody", "trocr", "whisper")
"""Encoders, and decoders of an encoder, that transformers lists under no other kind of language model."""
SMALL: dict[str, Any] = {
    # width and depth
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "emb_dim": 32,
    "embedding_dim": 32,
    "embedding_size": 32,
    "word_embed_proj_dim": 32,
    "num_hidden_layers": DEPTH,
    "n_layer": DEPTH,
    "n_layers": DEPTH,
    "num_layers": DEPTH,
    "num_blocks": DEPTH,
    "decoder_layers": DEPTH,
    "hidden_size_global": 32,
    "encoder_hash_byte_group_vocab": 64,
    # attention
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "kv_channels": 8,
    "dim_head": 8,
    "rotary_dim": 4,
    "sliding_window": WINDOW,
    "sliding_window_size": WINDOW,
    "attention_window_size": WINDOW,
    "attention_chunk_size": WINDOW,
    "local_attention": WINDOW,
    "window_size": WINDOW,
    "block_size": WINDOW,
    "use_sliding_window": True,
    "max_window_layers": 2,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "d_rel": 4,
    "rel_extent": 16,
    "query_pre_attn_scalar": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "o_lora_rank": 8,
    "o_groups": 2,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": WINDOW,
    # feed-forward
    "intermediate_size": 48,
    "ffn_hidden_size": 48,
    "expert_ffn_hidden_size": 24,
    "dense_intermediate_size": 48,
    "intermediate_size_mlp": 48,
    "shared_intermediate_size": 32,
    "ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "dim_ff": 48,
    "dff": 48,
    "d_inner": 48,
    # experts
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "shared_experts_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "prefix_dense_intermediate_size": 48,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "zero_expert_num": 2,
    "router_hidden_size": 16,
    # state spaces and linear attention
    "mamba_d_state": 8,
    "mamba_d_head": 8,
    "mamba_n_heads": 8,
    "mamba_d_ssm": 64,
    "mamba_dt_rank": 4,
    "mamba_chunk_size": WINDOW,
    "mamba_expand": 2,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "state_size": 8,
    "time_step_rank": 4,
    "chunk_size": WINDOW,
    "n_mamba_heads": 2,
    "n_groups": 1,
    "mamba_n_groups": 1,
    "mamba_ngroups": 1,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_num_heads": 4,
    "linear_head_dim": 8,
    "lru_width": 32,
    "attention_hidden_size": 32,
    # lengths
    "max_position_embeddings": 128,
    "n_positions": 128,
    "n_ctx": 128,
    "max_seq_len": 128,
    "context_length": 128,
    "dropout": 0.0,
    # extra predictions of later tokens, which are no part of the model proper
    "num_nextn_predict_layers": 0,
    "num_mtp_layers": 0,
}
"""Size of each field of a configuration that has the field."""
SLIDING = ["sliding_attention", "full_attention"] * (DEPTH // 2)
LINEAR = ["linear_attention", "full_attention"] * (DEPTH // 2)
HYBRID = ["linear_attention", "hybrid"] * (DEPTH // 2)
CONVOLUTION = ["conv", "full_attention"] * (DEPTH // 2)
OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": LINEAR},
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        "layer_types": SLIDING,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]} for kind in SLIDING
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_qk_rope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "gemma3": {
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 56,
        },
        "mm_tokens_per_image": 4,
    },
    "gemma3_text": {"layer_types": SLIDING},
    "gemma3n_text": {
        "layer_types": SLIDING,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "vocab_size_per_layer_input": 310,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
    },
    "gemma4_text": {"layer_types": SLIDING, "vocab_size_per_layer_input": 310, "hidden_size_per_layer_input": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], DEPTH // 2]]},
    "granitemoehybrid": {"layer_types": LINEAR},
    "hrm_text": {"num_layers_per_stack": 2, "H_cycles": 1, "L_cycles": 1},
    "inkling2_text": {"layer_types": ["hybrid_sliding", "hybrid"] * (DEPTH // 2)},
    "inkling_text": {"layer_types": ["hybrid_sliding", "hybrid"] * (DEPTH // 2)},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "kimi_linear": {"layer_types": LINEAR},
    "kolibri1": {"layer_types": SLIDING},
    "laguna": {"layer_types": SLIDING},
    "lfm2": {"layer_types": CONVOLUTION},
    "lfm2_moe": {"layer_types": CONVOLUTION},
    "mamba2": {"num_heads": 8},
    "mellum": {"layer_types": SLIDING},
    "ministral": {"layer_types": SLIDING},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]},
    "qwen2_moe": {"layer_types": SLIDING},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": WINDOW,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 8,
        "layer_types": ["linear_attention", "indexed_attention"] * (DEPTH // 2),
    },
    "zamba": {"layers_block_type": HYBRID, "attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {"layers_block_type": HYBRID},
    "zaya": {"num_experts_per_tok": 1},
}
"""Fields that a family needs otherwise."""


def families() -> list[str]:
    """Model types of decoder-only causal language models, in the order of the alphabet."""
    others = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    left_out = {*ENCODERS}.union(*others)
    return sorted(name for name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in left_out)


def tiny_config(family: str) -> PreTrainedConfig:
    """A configuration of few small layers, for the vocabulary of the tiny tokenizer."""
    return _config(CONFIG_MAPPING[family])


def tiny_model(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model in evaluation mode, each of whose weights matters; a seed gives one model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32)
    perturb(model, scale=0.2, seed=seed)
    return model.to(dtype).eval()


def build(family: str, folder: Path) -> None:
    """Save a tiny model of a family with the tiny tokenizer."""
    tiny_model(family).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)


@torch.no_grad()
def perturb(model: PreTrainedModel, *, scale: float, seed: int) -> None:
    """Add noise to every weight, in the order of their names."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(model.named_parameters()):
        parameter += scale * torch.randn(parameter.shape, generator=generator)


def _config(kind: type[PreTrainedConfig]) -> PreTrainedConfig:
    known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    tokenizer = build_tokenizer()
    values = {name: value for name, value in SMALL.items() if name in known} | {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if "kv_lora_rank" in known:  # keys and values are unfolded for every query head
        values["num_key_value_heads"] = values["num_attention_heads"]
    for name, part in kind.sub_configs.items():
        if part is not AutoConfig:
            values[name] = _config(part).to_dict()
        elif name == "text_config":
            values[name] = _config(CONFIG_MAPPING["llama"]).to_dict()
    return kind(**(values | OWN.get(kind.model_type, {})))
