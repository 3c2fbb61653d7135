from __future__ import annotations

import re

import pytest
import torch
import toys
from units import after, agrees_before_and_after, texts, traced

from kvcompile.ir.errors import UnsupportedGraphError
from kvcompile.ir.show import difference
from kvcompile.passes.canonicalise_attention import CanonicaliseAttention


def test_sdpa_becomes_a_numbered_site(golden):
    golden("canonicalise_attention", difference(*texts("canonicalise_attention", toys.nanogpt(layers=1))))


@pytest.mark.parametrize(("name", "vocabulary"), [("nanogpt", 64), ("planted", 128)])
def test_before_and_after_agree(name, vocabulary):
    agrees_before_and_after("canonicalise_attention", getattr(toys, name)(), vocabulary)


def test_sites_are_described():
    """GQA counts KV heads, never query heads; the default scale is head_dim ** -0.5."""
    (site,) = after("canonicalise_attention", toys.planted(queries_per_kv=3)).sites
    assert (site.query_heads, site.kv_heads, site.queries_per_kv, site.head_dim, site.scale, site.dtype) == (6, 2, 3, 16, 1.0, "float32")
    sites = after("canonicalise_attention", toys.nanogpt(layers=2)).sites
    assert [(site.index, site.path, site.scale) for site in sites] == [(0, "blocks.0", 0.25), (1, "blocks.1", 0.25)]
    (site,) = after("canonicalise_attention", toys.nanogpt(layers=1).to(torch.bfloat16)).sites
    assert site.dtype == "bfloat16"


def test_a_models_windows_caps_and_sinks_are_described():
    found = [(s.sliding_window, s.soft_cap, s.learnt_sinks) for s in after("canonicalise_attention", toys.gemma2()).sites]
    assert found == [(8, 5.0, False), (None, 5.0, False)]
    found = [(s.sliding_window, s.soft_cap, s.learnt_sinks) for s in after("canonicalise_attention", toys.gpt_oss()).sites]
    assert found == [(8, None, True), (None, None, True)]


def refusal(model) -> str:
    with pytest.raises(UnsupportedGraphError) as caught:
        CanonicaliseAttention().run(traced(model.eval()))
    return str(caught.value)


def test_what_else_compares_tokens_pairwise_is_refused():
    class Pairs(toys.Mixed):
        def mix(self, x):
            return x + (x @ x.transpose(1, 2)).tril().sum(-1, keepdim=True)

    text = refusal(Pairs())
    assert re.match(r"canonicalise_attention: matmul \(toys\.py:\d+\): tokens meet in a way that kvcompile does not recognise: ", text)
    assert text.endswith("\n  Only softmax attention and elementwise work may see two tokens at once.")


def test_a_model_without_attention_is_refused():
    class Bigram(toys.Mixed):
        def forward(self, ids):
            return self.head(self.words(ids))

    assert refusal(Bigram()) == (
        "canonicalise_attention: the model has no attention.\n  kvcompile compiles transformers; this graph has nothing for it to do."
    )
