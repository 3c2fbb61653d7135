"""Tiny models keep what is special about their families: module classes, kinds of layers, windows, groups of heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

from kvcompile.sweep.family import eager_logits
from kvcompile.sweep.overrides import OVERRIDES
from kvcompile.sweep.tiny import _LAYERS, build_tiny, causal_model_types, real_config, tiny_config


def _configured(name: str) -> bool:
    """Whether transformers takes the tiny configuration: older ones refuse some of what the table says."""
    try:
        tiny_config(name, 2)
    except Exception:  # transformers raises anything
        return False
    return True


TYPES = [name for name in causal_model_types() if _configured(name)]
NEWEST = len(causal_model_types()) == 189  # transformers 5.23, for which the table was written
HANDFUL = [
    *("llama", "gemma2", "gemma3", "gpt_neo", "lfm2", "deepseek_v3", "mixtral", "bloom", "falcon"),
    *("llama4_text", "gemma3n_text", "gemma4_text", "mllama", "jamba", "roberta", "musicgen", "cohere2"),
]
IDS = torch.randint(3, 200, (1, 40), generator=torch.Generator().manual_seed(1))


def _parts(config: Any) -> list[Any]:
    names = getattr(config, "sub_configs", {}) or {}
    return [config, *(getattr(config, name) for name in names if getattr(config, name, None) is not None)]


def _layers(config: Any) -> int:
    return next((value for name in _LAYERS if isinstance(value := vars(config).get(name), int)), 0)


def _kinds(config: Any) -> dict[str, set[str]]:
    """Of each list with an entry a layer, the entries that are words or truths; `layer_types`, `no_rope_layers`."""
    return {
        name: set(map(str, value))
        for name, value in vars(config).items()
        if isinstance(value, list) and len(value) == _layers(config) > 0 and (isinstance(value[0], (str, bool)) or set(value) <= {0, 1})
    }


@pytest.mark.parametrize("name", TYPES)
def test_every_kind_of_layer_is_kept(name: str) -> None:
    for real, tiny in zip(_parts(real_config(name)), _parts(tiny_config(name, 2)), strict=True):
        assert {field: _kinds(tiny).get(field) for field in _kinds(real)} == _kinds(real)


@pytest.mark.parametrize("name", TYPES)
def test_windows_and_chunks_are_overflowed_by_a_few_dozen_tokens(name: str) -> None:
    wide = {
        field: value
        for part in _parts(tiny_config(name, 2))
        for field, value in vars(part).items()
        if isinstance(value, int) and ("window" in field or field == "attention_chunk_size") and not field.startswith(("max_", "_", "use"))
        if value > 8
    }
    assert {field: value for field, value in wide.items() if field not in ("mask_window_size", "median_filter_width")} == {}


@pytest.mark.parametrize("name", [name for name in HANDFUL if name in TYPES])
def test_a_tiny_model_has_the_module_classes_of_the_real_one_and_tells_tokens_apart(name: str) -> None:
    tiny = build_tiny(name)
    assert tiny.lost == frozenset()
    assert not tiny.model.training
    assert sum(parameter.numel() for parameter in tiny.model.parameters()) < 2_000_000
    logits = eager_logits(tiny.model)
    first, other = logits(IDS), IDS.clone()
    other[0, 20] = (IDS[0, 20] + 7) % 200
    changed = (first - logits(other))[0].abs().amax(-1)
    assert first.isfinite().all()
    assert 0.05 < float(first.std()) < 4, "a tolerance of a logit means nothing for logits of another size"
    assert float(changed[:20].max()) < 1e-4, "it is causal"
    assert float(changed[21:28].max()) > 0.02, "the next tokens hear of it"


@pytest.mark.parametrize(
    ("name", "query_heads", "kv_heads"), [("llama", 4, 4), ("mistral", 4, 2), ("gemma", 4, 4), ("gemma3_text", 4, 2), ("granite", 4, 4)]
)
def test_heads_are_grouped_as_in_the_real_model(name: str, query_heads: int, kv_heads: int) -> None:
    config = tiny_config(name, 2)
    assert (config.num_attention_heads, config.num_key_value_heads) == (query_heads, kv_heads)


def test_a_key_that_is_rotated_in_a_part_keeps_its_own_head_dim() -> None:
    config = tiny_config("deepseek_v3", 2)
    assert config.head_dim == config.qk_rope_head_dim == 8
    assert config.qk_head_dim == 24 and config.v_head_dim == 16
    same = tiny_config("glm4_moe_lite", 2)
    assert same.qk_head_dim == same.v_head_dim == 16, "as large as each other in the real model"


def test_fields_of_single_layers_move_with_them_and_stay_in_proportion() -> None:
    config = tiny_config("gemma4_text", 2)
    assert config.layer_types == ["sliding_attention", "full_attention"]
    assert [config.per_layer_config[layer].head_dim for layer in range(2)] == [16, 32]


def test_layers_that_share_keys_still_find_a_layer_of_their_kind() -> None:
    config = tiny_config("gemma3n_text", 2)
    shared = config.num_hidden_layers - config.num_kv_shared_layers
    assert config.num_kv_shared_layers > 0
    assert set(config.layer_types[:shared]) == {"sliding_attention", "full_attention"}


def test_lists_of_layer_numbers_name_the_layers_that_were_kept() -> None:
    text = tiny_config("mllama", 2).text_config
    assert text.num_hidden_layers == 2 and text.cross_attention_layers == [1]


def test_a_model_is_the_same_each_time_and_leaves_the_callers_random_numbers_alone() -> None:
    torch.manual_seed(7)
    first = build_tiny("llama")
    after = torch.rand(1)
    torch.manual_seed(7)
    assert torch.rand(1) == after
    second = build_tiny("llama")
    assert torch.equal(eager_logits(first.model)(IDS), eager_logits(second.model)(IDS))
    assert not torch.equal(eager_logits(first.model)(IDS), eager_logits(build_tiny("llama", seed=1).model)(IDS))


@pytest.mark.parametrize("name", [name for name in OVERRIDES if name in TYPES])
def test_every_field_of_the_table_arrives_and_has_a_reason(name: str) -> None:
    fields, reason = OVERRIDES[name]
    config = tiny_config(name, 2)
    assert reason
    for field, value in fields.items():
        arrived = getattr(config, field)
        if isinstance(value, dict):
            got = {inner: (arrived if isinstance(arrived, dict) else arrived.to_dict())[inner] for inner in value}
            assert got == value
        elif isinstance(value, list):
            assert arrived, "a pattern over layers, or the numbers of some"
        else:
            assert arrived == value


def test_every_family_of_the_transformers_that_the_table_was_written_for_has_a_configuration() -> None:
    missing = set(causal_model_types()) - set(TYPES)
    assert missing == set() if NEWEST else len(missing) < 6, missing


def test_the_table_names_no_type_that_does_not_exist() -> None:
    assert [name for name in OVERRIDES if name not in CONFIG_MAPPING] == [] or not NEWEST
