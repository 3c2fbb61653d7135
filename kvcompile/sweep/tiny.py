"""Tiny random models of transformers' causal language models, made from the fields of their own configuration classes.

1. Sizes are shrunk by the names that transformers gives them; what a table says of a model type (`overrides.py`) wins.
2. Lists with an entry a layer keep the entries of the layers that are kept.
3. A tiny model holds the same module classes as the model of the default configuration: of several numbers of layers the
   first is taken that keeps them all.
4. Weights are drawn so that attention is far from uniform: transformers' own initialisation hides a wrong scale or window.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kvcompile.sweep.overrides import OVERRIDES

_HIDDEN, _FFN, _HEADS, _VOCABULARY, _WINDOW, _HEAD_DIM = 64, 96, 4, 320, 8, 16
_SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim_model", "embedding_size", "emb_dim", "word_embed_proj_dim"), _HIDDEN),
    **dict.fromkeys(
        (
            *("intermediate_size", "ffn_dim", "n_inner", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim", "dim_ff", "ffn_hidden_size", "dff"),
            *("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size", "d_inner", "feed_forward_size"),
            *("expert_ffn_hidden_size", "moe_shared_expert_intermediate_size", "intermediate_size_mlp", "dense_intermediate_size"),
        ),
        _FFN,
    ),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads"), _HEADS),
    **dict.fromkeys(("num_decoder_attention_heads", "num_encoder_attention_heads"), _HEADS),
    **dict.fromkeys(("head_dim", "v_head_dim", "kv_channels", "attention_head_dim", "global_head_dim", "dim_head"), _HEAD_DIM),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "n_vocab"), _VOCABULARY),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "local_attention", "window_size", "attention_chunk_size"), _WINDOW),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("rotary_dim",), 8),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("hidden_size_per_layer_input",), 16),
    **dict.fromkeys(("query_pre_attn_scalar",), _HEAD_DIM),
}
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "encoder_layers", "num_decoder_layers", "num_encoder_layers")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num", "num_global_key_value_heads")
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_sequence_length", "max_target_positions")
_LAYER_COUNTS = (2, 3, 4, 6, 8, 12)


@dataclass(frozen=True)
class TinyModel:
    """model: in float32, eval, eager attention.  lost: module classes of the real model that the tiny one lacks ({} is right)."""

    model: nn.Module
    config: Any
    lost: frozenset[str]


def causal_model_types() -> list[str]:
    """Every model type of the installed transformers that has a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def build_tiny(model_type: str, seed: int = 0) -> TinyModel:
    """A tiny random model of `model_type`.  Raises what transformers raises where none can be built."""
    with _quiet():
        wanted = _classes(_model(_config(model_type, {}), device="meta"))
        best: tuple[Any, frozenset[str]] | None = None
        for layers in _LAYER_COUNTS:
            config = _shrunk(model_type, layers)
            lost = frozenset(wanted - _classes(_model(config, device="meta")))
            if best is None or len(lost) < len(best[1]):
                best = (config, lost)
            if not lost:
                break
        assert best is not None
        torch.manual_seed(seed)
        model = _model(best[0], device=None).to(torch.float32).eval()
        _draw_weights(model)
    return TinyModel(model, best[0], best[1])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.set_verbosity(before)


def _config(model_type: str, fields: dict[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING

    decoder = OVERRIDES.get(model_type, ({}, ""))[0]
    return CONFIG_MAPPING[model_type](**{**_decoder_only(CONFIG_MAPPING[model_type]), **fields, **decoder})


def _decoder_only(config_class: Any) -> dict[str, Any]:
    """Encoders that can be causal are so when `is_decoder` is set."""
    return {"is_decoder": True} if hasattr(config_class(), "is_decoder") else {}


def _model(config: Any, device: str | None) -> nn.Module:
    from transformers import AutoModelForCausalLM

    with torch.device(device) if device else contextlib.nullcontext():
        model: nn.Module = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model


def _classes(model: nn.Module) -> set[str]:
    return {type(module).__name__ for module in model.modules()}


def _shrunk(model_type: str, layers: int) -> Any:
    """The configuration with `layers` layers; composite configurations shrink their parts."""
    default = _config(model_type, {})
    return _config(model_type, _fields(default, layers))


def _fields(config: Any, layers: int) -> dict[str, Any]:
    parts = getattr(config, "sub_configs", {}) or {}
    given: dict[str, Any] = {}
    values = {name: value for name, value in vars(config).items() if not name.startswith("_") and name not in parts}
    real_layers = next((values[name] for name in _LAYERS if isinstance(values.get(name), int)), None)
    query_heads = next((values[name] for name in _SIZES if "heads" in name and isinstance(values.get(name), int)), None)
    kept: list[int] = []
    for name, value in values.items():
        if name in _SIZES and isinstance(value, int) and not isinstance(value, bool) and value > 0:
            given[name] = _SIZES[name]
        elif name in _LAYERS and isinstance(value, int):
            given[name] = min(layers, value)
        elif name in _KV_HEADS and isinstance(value, int) and not isinstance(value, bool):
            given[name] = 1 if value == 1 else _HEADS if value == query_heads else 2
        elif name in _POSITIONS and isinstance(value, int):
            given[name] = min(value, 512)
        elif name.endswith("_token_id") and isinstance(value, int) and value >= _VOCABULARY:
            given[name] = 1 + len(name) % 5
        elif isinstance(value, list) and real_layers and len(value) == real_layers:
            kept = kept or _kept_layers(values, real_layers, min(layers, real_layers))
            given[name] = [value[layer] for layer in kept]
    for name in parts:
        part = getattr(config, name, None)
        if part is not None:
            given[name] = {**part.to_dict(), **_fields(part, layers)}
    return given


def _kept_layers(values: dict[str, Any], real_layers: int, layers: int) -> list[int]:
    """Layers of every kind that the lists tell of, in order: the first of each kind, then the earliest others."""
    rows = list(zip(*(map(str, v) for v in values.values() if isinstance(v, list) and len(v) == real_layers), strict=True))
    kinds = sorted({row: layer for layer, row in reversed(list(enumerate(rows)))}.values())[:layers]
    others = [layer for layer in range(real_layers) if layer not in kinds][: layers - len(kinds)]
    return sorted(kinds + others)


def _draw_weights(model: nn.Module) -> None:
    """Rule 4: matrices keep the size of what they multiply, vectors vary by a tenth."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, 1.5 / math.sqrt(parameter.shape[-1]))
            elif parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * 0.1)
