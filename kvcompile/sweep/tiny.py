"""Tiny random models of transformers' causal language models, made from the fields of their own configuration classes.

1. Sizes are shrunk by the names that transformers gives them; what a table says of a model type (`overrides.py`) wins.
2. What is told of single layers (a list with an entry a layer, a list of layer numbers, a configuration of its own for some
   layers, the number of layers that share keys) stays with the layers that are kept, and a layer of every kind is kept.
3. A tiny model holds the same module classes as the model of the default configuration: of several numbers of layers the
   first is taken that keeps them all.
4. Sliding windows, chunks and numbers of selected keys are so small that a few dozen tokens overflow them.
5. Weights are drawn so that attention is far from uniform: transformers' own initialisation hides a wrong scale or window.
"""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kvcompile.sweep.overrides import OVERRIDES

_HIDDEN, _FFN, _HEADS, _VOCABULARY, _WINDOW, _HEAD_DIM = 64, 96, 4, 320, 8, 16
_ROTARY_DIM = 8  # of a key that is rotated in a part of its own
_SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim_model", "embedding_size", "emb_dim", "word_embed_proj_dim"), _HIDDEN),
    **dict.fromkeys(
        ("lru_width", "ple_embed_dim", "d_embed", "hidden_size_global", "adapter_in_dim", "adapter_input_size", "adapter_out_dim"), _HIDDEN
    ),
    **dict.fromkeys(
        (
            *("intermediate_size", "ffn_dim", "n_inner", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim", "dim_ff", "ffn_hidden_size", "dff"),
            *("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size", "d_inner", "feed_forward_size"),
            *("expert_ffn_hidden_size", "moe_shared_expert_intermediate_size", "intermediate_size_mlp", "dense_intermediate_size"),
            *("shared_experts_intermediate_size", "router_hidden_size"),
        ),
        _FFN,
    ),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads"), _HEADS
    ),
    **dict.fromkeys(("num_decoder_attention_heads", "num_encoder_attention_heads", "swa_num_attention_heads", "attention_heads"), _HEADS),
    **dict.fromkeys(("linear_num_heads", "linear_num_value_heads", "mamba_n_heads", "mamba_num_heads"), _HEADS),
    **dict.fromkeys(("linear_num_key_heads", "n_groups"), 2),
    # with 2 heads a quarter of the keys has the choice relu(..) + relu(..) = 0, and which of equals are taken is not defined
    **dict.fromkeys(("index_n_heads",), 16),
    **dict.fromkeys(("head_dim", "v_head_dim", "kv_channels", "attention_head_dim", "global_head_dim", "dim_head", "d_head"), _HEAD_DIM),
    **dict.fromkeys(("swa_head_dim", "attention_head_size", "index_head_dim"), _HEAD_DIM),
    **dict.fromkeys(("linear_head_dim", "linear_key_head_dim", "linear_value_head_dim"), _HEAD_DIM),
    **dict.fromkeys(("qk_rope_head_dim",), _ROTARY_DIM),
    **dict.fromkeys(("qk_nope_head_dim",), _HEAD_DIM),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "n_vocab", "pronunciation_vocab_size", "shape_vocab_size"), _VOCABULARY),
    **dict.fromkeys(("encoder_hash_byte_group_vocab",), _VOCABULARY),
    **dict.fromkeys(("dim_model_base",), 32),  # half the hidden size: logits are divided by the ratio
    **dict.fromkeys(("sliding_window", "sliding_window_size", "local_attention", "window_size", "attention_chunk_size"), _WINDOW),
    **dict.fromkeys(("attention_window_size", "keep_window_size", "local_attention_window_len"), _WINDOW),
    **dict.fromkeys(("lsh_attn_chunk_length", "local_attn_chunk_length", "index_topk"), _WINDOW),
    **dict.fromkeys(("rel_extent",), 2 * _WINDOW),
    **dict.fromkeys(("index_block_size", "block_size"), 4),
    **dict.fromkeys(("index_topk_blocks",), 2),
    **dict.fromkeys(("num_random_blocks",), 1),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 16),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts"), 4),
    **dict.fromkeys(("zero_expert_num",), 2),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "num_expert_group"), 2),
    **dict.fromkeys(("topk_group",), 1),
    **dict.fromkeys(("rotary_dim",), _ROTARY_DIM),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("hidden_size_per_layer_input",), 16),
    **dict.fromkeys(("query_pre_attn_scalar",), _HEAD_DIM),
}
# of these a smaller number than the table's is another architecture
_AT_MOST = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k", "top_k_experts", "n_group", "num_expert_group")
_LAYERS = (
    "num_hidden_layers",
    "n_layer",
    "num_layers",
    "n_layers",
    "decoder_layers",
    "encoder_layers",
    "num_decoder_layers",
    "num_encoder_layers",
)
_LAYER_NUMBERS = ("_ids", "_idxs", "_indices", "_layers")  # endings of fields that list numbers of layers
_SHARED_LAYERS = "num_kv_shared_layers"  # so many of the last layers have no keys of their own
_OWN_FIELDS = "per_layer_config"  # {layer: fields} of layers that differ
_KV_HEADS = (
    "num_key_value_heads",
    "num_kv_heads",
    "n_head_kv",
    "multi_query_group_num",
    "num_global_key_value_heads",
    "swa_num_key_value_heads",
)
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
        wanted, best, failure = _real_classes(model_type), None, None
        for layers in _LAYER_COUNTS:
            try:
                config = tiny_config(model_type, layers)
                lost = frozenset(wanted - _classes(_model(model_type, config, device="meta")))
            except Exception as error:  # too few layers for what ties them; transformers raises anything
                failure = failure or error
                continue
            if best is None or len(lost) < len(best[1]):
                best = (config, lost)
            if not lost:
                break
        if best is None:
            assert failure is not None
            raise failure
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _model(model_type, best[0], device=None).to(torch.float32).eval()
            _draw_weights(model)
    return TinyModel(model, best[0], best[1])


def tiny_config(model_type: str, layers: int) -> Any:
    """The configuration with `layers` layers, or more where there are more kinds of them; composite ones shrink their parts."""
    return _config(model_type, _fields(real_config(model_type), layers))


def _overrides(model_type: str) -> dict[str, Any]:
    """The table's, copied: a configuration may write into what it is given (transformers 5.17 does)."""
    return copy.deepcopy(OVERRIDES.get(model_type, ({}, ""))[0])


def real_config(model_type: str) -> Any:
    """The class's default configuration, with what the table says of lists with an entry a layer, of parts, and in words."""
    from transformers import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    fields: dict[str, Any] = {}
    for name, value in _overrides(model_type).items():
        if isinstance(value, list):
            real_layers = _first(vars(config_class()), _LAYERS)
            listed = _is_list_of_layers(name, value, real_layers)
            fields[name] = value if listed else [value[layer % len(value)] for layer in range(real_layers)]
        elif isinstance(value, (dict, str)):
            fields[name] = value
    return config_class(**_causal(config_class), **fields)


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
    """Of `fields` and what the table says."""
    from transformers import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    return config_class(**_causal(config_class), **_overridden(model_type, fields))


def _causal(config_class: Any) -> dict[str, Any]:
    """Encoders that can be causal are so when they are told."""
    return {"is_decoder": True} if hasattr(config_class, "is_decoder") else {}


def _overridden(model_type: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields with what the table says of them, but for its lists, which the real model's layers already follow."""
    given = dict(fields)
    for name, value in _overrides(model_type).items():
        if isinstance(value, dict):
            given[name] = {**(given.get(name) or {}), **value}
        elif not isinstance(value, list):
            given[name] = value
    return given


def _model_class(model_type: str) -> Any:
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    found = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]]
    return found[0] if isinstance(found, (list, tuple)) else found


def _model(model_type: str, config: Any, device: str | None) -> nn.Module:
    """The causal language model; of a composite configuration it takes its own part, as transformers does for text."""
    model_class = _model_class(model_type)
    for name in getattr(config, "sub_configs", {}) or {}:
        if type(getattr(config, name, None)) is model_class.config_class:
            config = getattr(config, name)
            break
    with torch.device(device) if device else contextlib.nullcontext():
        model: nn.Module = model_class._from_config(config, attn_implementation="eager")
    return model


def _classes(model: nn.Module) -> set[str]:
    return {type(module).__name__ for module in model.modules()}


def _real_classes(model_type: str) -> set[str]:
    """Module classes of the real model; where the class's default builds nothing, of the default with all that the table says."""
    with contextlib.suppress(Exception):  # transformers raises anything
        return _classes(_model(model_type, real_config(model_type), device="meta"))
    with contextlib.suppress(Exception):
        return _classes(_model(model_type, _config(model_type, {}), device="meta"))
    return set()


def _fields(config: Any, layers: int) -> dict[str, Any]:
    """What a tiny configuration of the class of `config` is given."""
    parts = [name for name in getattr(config, "sub_configs", {}) or {} if getattr(config, name, None) is not None]
    values = {name: value for name, value in vars(config).items() if not name.startswith("_") and name not in parts}
    values[_OWN_FIELDS] = {int(layer): own for layer, own in (config.to_dict().get(_OWN_FIELDS) or {}).items()}
    real_layers = _first(values, _LAYERS)
    query_heads = _first(values, tuple(name for name in _SIZES if "heads" in name))
    kept = _kept_layers(values, real_layers, layers)
    given: dict[str, Any] = {}
    for name, value in values.items():
        if name in _LAYERS and _is_number(value):
            given[name] = len(kept) if value == real_layers else min(layers, value)
        elif name == _SHARED_LAYERS:
            given[name] = sum(layer >= real_layers - value for layer in kept)
        elif name == _OWN_FIELDS and value:
            own = {kept.index(layer): fields for layer, fields in value.items() if layer in kept}
            given[name] = {
                layer: {field: _in_proportion(field, fields[field], values.get(field)) for field in fields} for layer, fields in own.items()
            }
        elif _is_list_of_layers(name, value, real_layers):
            given[name] = [place for place, layer in enumerate(kept) if layer in value]
        elif isinstance(value, list) and len(value) == real_layers:
            given[name] = [_SIZES.get(name, value[layer]) for layer in kept]
        elif name in _SIZES and _is_number(value) and value > 0:
            given[name] = min(value, _SIZES[name]) if name in _AT_MOST else _SIZES[name]
        elif name in _KV_HEADS and _is_number(value):
            given[name] = 1 if value == 1 else _HEADS if value == query_heads else 2
        elif name in _POSITIONS and _is_number(value):
            given[name] = min(value, 512)
        elif name.endswith("_token_id") and _is_number(value) and value >= _VOCABULARY:
            given[name] = 1 + len(name) % 5
    if values.get("qk_rope_head_dim") and values.get("head_dim") == values["qk_rope_head_dim"]:
        given["head_dim"] = _ROTARY_DIM  # the part of a head that is rotated, not the head
    if values.get("qk_rope_head_dim") and values.get("qk_nope_head_dim", 0) + values["qk_rope_head_dim"] == values.get("v_head_dim"):
        given["qk_nope_head_dim"] = _HEAD_DIM - _ROTARY_DIM  # keys and values of one size stay so
    for name in parts:
        part = getattr(config, name)
        given[name] = {**part.to_dict(), **_overridden(part.model_type, _fields(part, layers))}
    return given


def _first(values: dict[str, Any], names: tuple[str, ...]) -> int:
    return next((values[name] for name in names if _is_number(values.get(name))), 0)


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_list_of_layers(name: str, value: Any, real_layers: int) -> bool:
    """Whether a field lists numbers of layers, as `cross_attention_layers=[3, 8]` does."""
    if not (isinstance(value, list) and value and name.endswith(_LAYER_NUMBERS) and all(map(_is_number, value))):
        return False
    return value == sorted(set(value)) and value[-1] < real_layers


def _in_proportion(name: str, value: Any, usual: Any) -> Any:
    """A layer's own size, as much larger or smaller than the other layers' as in the real model."""
    if name in _KV_HEADS:
        return 1 if value == 1 else 2 if usual != value else _HEADS
    if name not in _SIZES or not _is_number(value) or not usual:
        return value
    return max(1, _SIZES[name] * value // usual)


def _kept_layers(values: dict[str, Any], real_layers: int, layers: int) -> list[int]:
    """Rule 2: the first layer of every kind, then the second of each, and so on, in their order."""
    columns: list[list[Any]] = []
    for name, value in values.items():
        if _is_list_of_layers(name, value, real_layers):
            columns.append([layer in value for layer in range(real_layers)])
        elif isinstance(value, list) and len(value) == real_layers:
            columns.append(value)
    if values.get(_OWN_FIELDS):
        columns.append([values[_OWN_FIELDS].get(layer) for layer in range(real_layers)])
    if values.get(_SHARED_LAYERS):
        columns.append([layer >= real_layers - values[_SHARED_LAYERS] for layer in range(real_layers)])
    seen: dict[str, int] = {}
    turns = []
    for layer in range(real_layers):
        kind = str([column[layer] for column in columns])
        turns.append((seen.get(kind, 0), layer))
        seen[kind] = seen.get(kind, 0) + 1
    return sorted(layer for _, layer in sorted(turns)[: max(layers, len(seen))])


def _draw_weights(model: nn.Module) -> None:
    """Rule 5: matrices keep the size of what they multiply, vectors vary by a tenth."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, 1.5 / math.sqrt(parameter.shape[-1]))
            elif parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * 0.1)
