"""Families that cover every front end and every feature, compiled and compared as the sweep does; the sweep itself takes an hour."""

from __future__ import annotations

import pytest

from kvcompile.sweep.family import check_family
from kvcompile.sweep.tiny import causal_model_types

# model type: what its table row must tell of it
WORKS: dict[str, set[str]] = {
    "bart": set(),  # a decoder of an encoder-decoder, learnt positions
    "bloom": {"ALiBi"},  # in baddbmm's first operand
    "codegen": {"partial rotary"},  # ignores the attention interface
    "cohere2": {"window", "NoPE"},
    "deepseek_v3": {"MLA", "partial rotary", "MoE"},
    "deepseek_v32": {"MLA", "chosen keys", "partial rotary", "MoE"},
    "diffllama": set(),  # two attentions a layer
    "falcon": {"MQA"},
    "gemma2": {"GQA", "window", "soft cap"},
    "gemma3_text": {"GQA", "window"},  # two rotations
    "glm4": {"GQA", "partial rotary"},
    "gpt2": set(),
    "gpt_bigcode": {"MQA"},
    "gpt_neo": {"window"},  # spelt out, by layer
    "gpt_oss": {"GQA", "window", "learnt sinks", "MoE"},
    "jetmoe": {"MoE"},  # rows sorted by expert
    "lfm2": {"GQA", "convolution"},
    "llama": set(),
    "llama4_text": {"GQA", "chunks", "NoPE", "MoE"},
    "mixtral": {"GQA", "MoE"},
    "modernbert-decoder": {"window"},
    "mpt": {"ALiBi"},
    "opt": set(),  # positions from a mask
    "qwen3_moe": {"GQA", "MoE"},
    "roberta": set(),  # positions from the padding token
    "smollm3": {"GQA", "NoPE"},
    "xlm": set(),  # a mask of what is no padding, an empty cache
}
# the others: the attention interface
FRONT_ENDS = {
    **dict.fromkeys(("bart", "deepseek_v32"), "sdpa"),
    **dict.fromkeys(("bloom", "codegen", "falcon", "gpt_neo", "mpt", "xlm"), "products"),
}
OLDER_FRONT_ENDS = {("opt", "sdpa")}  # of transformers 5.17, where it gives its attention a mask of ones itself
FEATURES = {
    *("MLA", "MQA", "GQA", "window", "chunks", "chosen keys", "ALiBi", "soft cap", "learnt sinks", "partial rotary", "NoPE", "MoE"),
    "convolution",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in WORKS if name in causal_model_types()])
def test_the_family_works(name: str) -> None:
    found = check_family(name)
    assert (found.status, found.reason) == ("works", "")
    assert set(found.features) == WORKS[name]
    assert found.front_end == FRONT_ENDS.get(name, "interface") or (name, found.front_end) in OLDER_FRONT_ENDS
    assert found.lost == ()


@pytest.mark.slow
def test_a_family_whose_tokens_look_ahead_is_refused_by_node() -> None:
    found = check_family("cpmant")
    assert found.status == "refused"
    assert found.front_end == "" and found.full_error is None
    assert found.reason.startswith(("trace: ", "canonicalise_attention: ", "check_token_wise: "))


def test_the_sample_covers_every_feature_and_front_end() -> None:
    assert set().union(*WORKS.values()) == FEATURES
    assert {FRONT_ENDS.get(name, "interface") for name in WORKS} == {"interface", "sdpa", "products"}
