from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import toys
from units import after, agrees_before_and_after, texts, traced

from kvcompile.ir.errors import UnsupportedGraphError
from kvcompile.ir.show import difference
from kvcompile.passes.canonicalise_attention import CanonicaliseAttention

BUILT = "\n  Built: is_causal=True on [batch, heads, tokens, head_dim], no mask, no dropout."


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


class Second(toys.Mixed):
    """A second attention, called in another way."""

    def __init__(self, **options):
        super().__init__()
        self.options = options

    def mix(self, x):
        heads = x.unflatten(2, (2, -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads, **self.options).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    ("options", "how"),
    [
        ({"attn_mask": torch.zeros(1, 1)}, "with a mask tensor of its own"),
        ({}, "without is_causal=True"),
        ({"is_causal": True, "dropout_p": 0.1}, "with dropout"),
    ],
)
def test_other_calls_of_sdpa_are_refused(options, how):
    where = "canonicalise_attention: scaled_dot_product_attention_1: "
    assert refusal(Second(**options)) == f"{where}scaled_dot_product_attention is called {how}.{BUILT}"


def test_sdpa_without_a_head_dimension_is_refused():
    class Flat(toys.Mixed):
        def mix(self, x):
            return F.scaled_dot_product_attention(x, x, x, is_causal=True)

    assert refusal(Flat()).endswith(f"scaled_dot_product_attention is called on 3-dimensional tensors.{BUILT}")


def test_heads_or_tokens_in_the_batch_dimension_are_refused():
    class Folded(toys.Mixed):
        def mix(self, x):
            heads = x.unflatten(2, (2, -1)).transpose(1, 2).transpose(0, 1)
            return F.scaled_dot_product_attention(heads, heads, heads, is_causal=True).transpose(0, 1).transpose(1, 2).flatten(2)

    assert refusal(Folded()).endswith(f"scaled_dot_product_attention is called with heads or tokens in the batch dimension.{BUILT}")


def test_keys_of_other_tokens_are_refused():
    class Memory(toys.Mixed):
        def __init__(self):
            super().__init__()
            self.register_buffer("memory", torch.randn(1, 2, 5, 8))

        def mix(self, x):
            heads = x.unflatten(2, (2, -1)).transpose(1, 2)
            return F.scaled_dot_product_attention(heads, self.memory, self.memory, is_causal=True).transpose(1, 2).flatten(2)

    assert refusal(Memory()).endswith(f"scaled_dot_product_attention is called with keys that are not the call's own tokens.{BUILT}")


def test_a_spelt_out_attention_is_refused_by_its_node():
    assert refusal(toys.spelt_out()).startswith(
        "canonicalise_attention: ones: an attention is spelt out that kvcompile does not recognise: bool[s, s]"
    )
    assert refusal(toys.spelt_out()).endswith("Built: transformers' attention interface and scaled_dot_product_attention(is_causal=True).")


def test_a_model_without_attention_is_refused():
    class Bigram(toys.Mixed):
        def forward(self, ids):
            return self.head(self.words(ids))

    assert refusal(Bigram()) == (
        "canonicalise_attention: the model has no attention.\n"
        "  kvcompile compiles transformers; this graph has nothing for it to do."
    )
