"""Rotary models of many kinds, and StreamingLLM as its paper writes it: an oracle that runs a model's own modules, token by token."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 256,
    "max_position_embeddings": 4096,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "linear scaling": ("llama", {"rope_scaling": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama3 scaling": ("llama", {"rope_scaling": {**_LLAMA3, "rope_theta": 5e5, "original_max_position_embeddings": 16}}),
    "yarn scaling": (
        "llama",
        {"rope_scaling": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 1024}},
    ),
    "partial rotary": ("phi", {"partial_rotary_factor": 0.5}),
    "fused projections": ("gpt_neox", {}),
    "interleaved pairs": ("glm4", {"partial_rotary_factor": 0.5}),
    "normalised queries": ("qwen3", {}),
    "two thetas": ("gemma3_text", {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 5}),
    "a layer without positions": ("smollm3", {"no_rope_layers": [1, 0]}),
}
ROTARY = tuple(_OPTIONS)


def rotary_model(name: str, **config: Any) -> nn.Module:
    """A random model of 256 words and two layers of 4 query heads; attention is far from uniform."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, options = _OPTIONS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**_SIZES, **options, **config})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    return model


def longrope_model(context: int = 256, original: int = 64) -> nn.Module:
    """A Phi-3 with LongRoPE: other frequencies from `original` positions on."""
    from transformers import Phi3Config, Phi3ForCausalLM

    scaling = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": original}
    scaling |= {"short_factor": [1.0] * 8, "long_factor": [4.0 + i for i in range(8)]}
    sizes = {name: value for name, value in _SIZES.items() if name != "head_dim"}
    lengths = {"max_position_embeddings": context, "original_max_position_embeddings": original}
    torch.manual_seed(0)
    model = Phi3ForCausalLM(Phi3Config(**{**sizes, **lengths, "rope_scaling": scaling})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    return model


Positions = Literal["absolute", "cache_index"]


def streaming_logits(
    model: nn.Module, ids: Tensor, sink_tokens: int, recent_tokens: int, positions: Positions, kv_head: int | None = None
) -> Tensor:
    """Logits [tokens, vocabulary] when heads keep `sink_tokens` sinks and `recent_tokens` recent tokens, the own included.

    kv_head: the one KV head that does, beside full ones; None: all do.
    Each layer keeps what it attends to before anything is projected or rotated.  At each token the model's own attention
    runs over what is kept, at the places in the cache 0, 1, 2, ... (cache_index: StreamingLLM, section 3.2) or at the
    positions that the tokens had (absolute); only the last row is used.  A layer's own sliding window is kept instead,
    at absolute positions.
    """
    with _streaming(model, sink_tokens, recent_tokens, positions, kv_head), torch.no_grad():
        return torch.cat([model(input_ids=token[None, None], use_cache=False).logits[0] for token in ids])


@contextlib.contextmanager
def _streaming(model: nn.Module, sink_tokens: int, recent_tokens: int, positions: Positions, kv_head: int | None) -> Iterator[None]:
    (rotary,) = [module for name, module in model.named_modules() if name.endswith("rotary_emb")]
    layers = [module for name, module in model.named_modules() if name.split(".")[-1] in ("self_attn", "attention")]
    for layer in layers:
        window = getattr(layer, "sliding_window", None)
        kept = (0, window, "absolute") if window else (sink_tokens, recent_tokens, positions)
        forward = _over_the_cache(layer, rotary, *kept)
        if kv_head is not None:
            forward = _beside(layer, forward, _over_the_cache(layer, rotary, 0, 1 << 30, "absolute"), kv_head)
        layer.forward = forward
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _over_the_cache(layer: nn.Module, rotary: nn.Module, sink_tokens: int, recent_tokens: int, positions: str) -> Any:
    attention = type(layer).forward
    kept: list[tuple[int, Tensor]] = []  # position, what the attention reads [1, 1, width]
    read = 0

    def forward(hidden_states: Tensor, **given: Any) -> Any:
        nonlocal kept, read
        kept.append((read, hidden_states))
        kept = [each for each in kept if each[0] < sink_tokens or each[0] > read - recent_tokens]
        read += 1
        states = torch.cat([state for _, state in kept], dim=1)
        places = torch.arange(len(kept)) if positions == "cache_index" else torch.tensor([position for position, _ in kept])
        kind = {"layer_type": layer.layer_type} if "layer_type" in inspect.signature(rotary.forward).parameters else {}
        given |= {"position_embeddings": rotary(states, places[None], **kind), "attention_mask": None, "position_ids": places[None]}
        out, *rest = attention(layer, states, **given)
        return out[:, -1:], *rest

    return forward


def _beside(layer: nn.Module, one: Any, others: Any, kv_head: int) -> Any:
    """An attention in which the query heads of `kv_head` do as `one`, the others as `others`."""

    def forward(hidden_states: Tensor, **given: Any) -> Any:
        found: list[Tensor] = []
        hook = layer.o_proj.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0][:, -1:]))
        _, *rest = one(hidden_states, **given)
        others(hidden_states, **given)
        hook.remove()
        streaming, full = (heads.unflatten(2, (-1, layer.num_key_value_groups, layer.head_dim)) for heads in found)
        mixed = full.clone()
        mixed[:, :, kv_head] = streaming[:, :, kv_head]
        return layer.o_proj(mixed.flatten(2)), *rest

    return forward
