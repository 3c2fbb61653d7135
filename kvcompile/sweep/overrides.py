"""The one table of model types: fields that a tiny configuration needs and its class does not tell, each with its reason."""

from __future__ import annotations

from typing import Any

# model type: (fields, reason).  A list is a pattern over the layers of the real model, repeated; a mapping goes to a part of a
# composite configuration, or adds to a field's; a text chooses for the real model too; anything else is the tiny one's own value.
OVERRIDES: dict[str, tuple[dict[str, Any], str]] = {
    "bamba": ({"attn_layer_indices": [9, 18, 27]}, "the class's default has no attention layer; published ones attend in layers 9, 18, 27"),
    "big_bird": ({"attention_type": "original_full"}, "its block-sparse attention looks ahead: only the full one is causal"),
    "blt": (
        {
            "global_config": {"hidden_size": 128, "head_dim": 32},
            "encoder_config": {"hidden_size_global": 128},
            "decoder_config": {"hidden_size_global": 128},
        },
        "the middle model is twice as wide as the outer ones, as in the class's default",
    ),
    "cohere_compass_text": (
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
        "the class's default has no rotation for its full attention, and builds nothing",
    ),
    "dbrx": (
        {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8}},
        "the class's default has no rope_theta, and builds nothing",
    ),
    "deepseek_v2": ({"num_experts_per_tok": 2}, "None in the class; published ones take 6 of 64"),
    "dots1": (
        {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
        "None in the class; the published one takes 6 of 128, beside 2 shared",
    ),
    "dots3_note_text": ({"head_dim": 32}, "a sliding layer's head is its two parts, one of which is larger there"),
    "gemma4_assistant": (
        {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
        "the class's default refuses itself; its check asks for these",
    ),
    "granitemoehybrid": (
        {"layer_types": ["linear_attention", "linear_attention", "full_attention"]},
        "the class's default has no attention layer; published ones attend in every tenth",
    ),
    "hunyuan_v1_dense": ({"head_dim": 16, "num_key_value_heads": 2}, "None in the class; published ones have 128"),
    "hunyuan_v1_moe": (
        {"head_dim": 16, "num_key_value_heads": 2, "num_experts": 4, "moe_topk": 2},
        "None and one expert in the class; the published one has head_dim 128, 8 of 64 experts",
    ),
    "lfm2": (
        {"layer_types": ["conv", "conv", "full_attention"]},
        "the class's default has no convolution; published ones have 10 of 16 layers",
    ),
    "lfm2_moe": (
        {"layer_types": ["conv", "conv", "full_attention"]},
        "None in the class; published ones have 18 of 24 layers with convolutions",
    ),
    "mamba2": ({"head_dim": 32}, "heads times head_dim must be twice the hidden size"),
    "ministral": ({"head_dim": 16}, "None in the class; published ones have 128"),
    "musicgen": ({"decoder": {"num_codebooks": 1}}, "one row of ids is one codebook"),
    "musicgen_melody": ({"decoder": {"num_codebooks": 1}}, "one row of ids is one codebook"),
    "nemotron": ({"num_key_value_heads": 2}, "None in the class; published ones have 8 of 48"),
    "reformer": (
        {"axial_pos_embds_dim": (16, 48), "axial_pos_shape": (16, 32), "hash_seed": 0},
        "must sum and multiply to the hidden size and the positions; without a seed every call gives another result",
    ),
    "xlm": ({"causal": True}, "an encoder that is causal when it is told"),
    "xlnet": ({"attn_type": "uni"}, "a permutation model that is causal when it is told"),
    "xmod": ({"default_language": "en_XX"}, "None in the class, which then asks for a language in every call"),
    "qwen4_exp_text": (
        {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8, "indexer_compress_ratio": 4},
        "None in the class, which then builds nothing",
    ),
}
