"""Front ends: however an attention is spelt, it becomes one `kvc.attend` node, or is refused by its node and reason."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
import toys
from torch import nn
from units import after, logits, some_ids, traced

from kvcompile.ir.errors import UnsupportedGraphError
from kvcompile.passes.canonicalise_attention import CanonicaliseAttention

HEADS, DIM = 4, 8


class Attention(nn.Module):
    """One attention of 4 query heads and `kv_heads` KV heads, computed by `attend(q, k, v)` on [1, heads, tokens, 8]."""

    def __init__(self, attend, kv_heads: int = HEADS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attend, self.kv_heads = attend, kv_heads
        self.words, self.head = nn.Embedding(32, HEADS * DIM), nn.Linear(HEADS * DIM, 32)
        self.q, self.k, self.v = nn.Linear(HEADS * DIM, HEADS * DIM), *(nn.Linear(HEADS * DIM, kv_heads * DIM) for _ in range(2))
        self.register_buffer("table", torch.tril(torch.ones(300, 300)).bool())
        self.register_buffer("short", self.table & ~torch.tril(self.table, -200))
        self.register_buffer("long", torch.tril(torch.ones(2500, 2500)).bool() & ~torch.tril(torch.ones(2500, 2500), -2400).bool())
        self.register_buffer("bound", torch.tensor(300))

    def forward(self, ids):
        x = self.words(ids)
        q, k, v = (
            part(x).unflatten(2, (heads, DIM)).transpose(1, 2)
            for part, heads in ((self.q, HEADS), (self.k, self.kv_heads), (self.v, self.kv_heads))
        )
        return self.head(x + self.attend(self, q, k, v).transpose(1, 2).reshape(x.shape))


def _hidden(tokens):
    return torch.ones(tokens, tokens, dtype=torch.bool).triu(1)


def _by_hand(self, q, k, v):
    return (q @ k.transpose(-1, -2) / 3.0).masked_fill(_hidden(q.shape[2]), -math.inf).softmax(-1) @ v


def _added(self, q, k, v):
    scores = torch.matmul(q * DIM**-0.5, k.transpose(2, 3))
    return (
        F.softmax(scores + torch.full(scores.shape[-2:], torch.finfo(scores.dtype).min).triu(1), dim=-1, dtype=torch.float32).to(q.dtype)
        @ v
    )


def _table(self, q, k, v):
    scores = torch.where(self.table[: q.shape[2], : q.shape[2]], q @ k.transpose(-1, -2), -1e9)
    return F.dropout((scores * 0.4).softmax(-1), 0.3, self.training) @ v


def _folded(self, q, k, v):
    q, k, v = (each.flatten(0, 1) for each in (q, k, v))
    bias = torch.arange(q.shape[1]) * 2.0 ** -torch.arange(1, HEADS + 1)[:, None, None]
    scores = torch.baddbmm(bias.expand(HEADS, 1, -1), q, k.transpose(1, 2), beta=1.0, alpha=0.5)
    return (scores.masked_fill(_hidden(q.shape[1]), -1e9).softmax(-1) @ v)[None]


def _capped(self, q, k, v):
    scores = torch.tanh(q @ k.transpose(-1, -2) * 0.3 / 4.0) * 4.0
    where = torch.arange(q.shape[2])
    distance = where[:, None] - where
    return scores.masked_fill((distance < 0) | (distance >= 5), -math.inf).softmax(-1) @ v


def _chunked(self, q, k, v):
    where = torch.arange(q.shape[2])
    seen = (where <= where[:, None]) & (where // 6 == where[:, None] // 6)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=0.7)


def _repeated(self, q, k, v):
    k, v = (each[:, :, None].expand(-1, -1, HEADS // each.shape[1], -1, -1).reshape(1, HEADS, -1, DIM) for each in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _interleaved(self, q, k, v):
    return _by_hand(self, q, k.repeat_interleave(HEADS // k.shape[1], 1), v.repeat_interleave(HEADS // v.shape[1], 1))


def _einsum(self, q, k, v):
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * 0.2
    return torch.einsum("bhij,bhjd->bhid", scores.masked_fill(_hidden(q.shape[2]), -math.inf).softmax(-1), v)


def _float_mask(self, q, k, v):
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=torch.zeros(q.shape[2], q.shape[2]).masked_fill(_hidden(q.shape[2]), -math.inf)
    )


def _shallow(self, q, k, v):
    seen = self.table[: q.shape[2], : q.shape[2]].float()
    return ((q @ k.transpose(-1, -2)) * seen + -1e4 * (1 - seen)).softmax(-1) @ v


FORMS = {
    "masked by -10000": (_shallow, 4, {"scale": 1.0}),
    "by hand": (_by_hand, 4, {"scale": 1 / 3}),
    "a mask added, softmax in float32": (_added, 4, {"scale": 1.0}),
    "a table as mask, a dropout": (_table, 4, {"scale": 0.4}),
    "heads in the batch, ALiBi in baddbmm": (_folded, 4, {"scale": 0.5, "slopes": (0.5, 0.25, 0.125, 0.0625)}),
    "a soft cap and a window": (_capped, 4, {"scale": 0.3, "soft_cap": 4.0, "sliding_window": 5}),
    "sdpa under chunks": (_chunked, 4, {"scale": 0.7, "chunk_tokens": 6}),
    "sdpa under a float mask": (_float_mask, 4, {"scale": DIM**-0.5}),
    "KV heads expanded": (_repeated, 2, {"kv_heads": 2}),
    "KV heads interleaved": (_interleaved, 2, {"kv_heads": 2, "scale": 1 / 3}),
    "one KV head, broadcast": (_by_hand, 1, {"kv_heads": 1, "scale": 1 / 3}),
    "einsum": (_einsum, 4, {"scale": 0.2}),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_spelling_becomes_a_site(form):
    attend, kv_heads, facts = FORMS[form]
    model = Attention(attend, kv_heads).eval()
    unit = after("canonicalise_attention", model)
    (site,) = unit.sites
    for name, value in facts.items():
        assert getattr(site, name) == pytest.approx(value, rel=1e-6), name
    for tokens in (1, 7, 50):
        ids = some_ids(tokens, 32)
        with torch.no_grad():
            torch.testing.assert_close(logits(unit.graph, ids), model(ids[None])[0], rtol=1e-5, atol=1e-5)


def refusal(attend, kv_heads: int = HEADS) -> str:
    with pytest.raises(UnsupportedGraphError) as caught:
        CanonicaliseAttention().run(traced(Attention(attend, kv_heads).eval()))
    return str(caught.value)


def _content_mask(self, q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(k[..., 0] > 0)[:, :, None] & ~_hidden(q.shape[2]))


def _content_bias(self, q, k, v):
    return ((q @ k.transpose(-1, -2)).masked_fill(_hidden(q.shape[2]), -math.inf) + v.sum(-1)[:, :, None]).softmax(-1) @ v


def _twice(self, q, k, v):
    weights = (q @ k.transpose(-1, -2)).masked_fill(_hidden(q.shape[2]), -math.inf).softmax(-1)
    return weights @ v + weights @ (weights @ v)


def _two_bounds(self, q, k, v):
    where = torch.arange(q.shape[2])
    distance = where[:, None] - where
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(distance >= 0) & (distance < 100) & (distance < 90))


def _of_memory(self, q, k, v):
    return F.scaled_dot_product_attention(
        q, self.words.weight[None, None, :5, :DIM], self.words.weight[None, None, :5, :DIM], is_causal=True
    )


def _clamped_alibi(self, q, k, v):
    where = torch.arange(q.shape[2])
    bias = -0.05 * (where[:, None] - where).clamp(0, 100)
    return ((q @ k.transpose(-1, -2)) + bias).masked_fill(_hidden(q.shape[2]), -math.inf).softmax(-1) @ v


def _scaled_far_away(self, q, k, v):
    factor = (torch.arange(q.shape[2]) / 300).clamp(1.0)
    return ((q @ k.transpose(-1, -2)) * factor[:, None]).masked_fill(_hidden(q.shape[2]), -math.inf).softmax(-1) @ v


def _of_the_first_token(self, q, k, v):
    factor = 1.0 + 0.5 * (k[0, 0, 0, 0] > 0)
    return (q @ k.transpose(-1, -2) * factor).masked_fill(_hidden(q.shape[2]), -math.inf).softmax(-1) @ v


def _by_table(name):
    def attend(self, q, k, v):
        table = getattr(self, name)
        return torch.where(table[: q.shape[2], : q.shape[2]], q @ k.transpose(-1, -2), -1e9).softmax(-1) @ v

    return attend


REFUSED = {
    "without a causal mask": lambda self, q, k, v: F.scaled_dot_product_attention(q, k, v),
    "with dropout": lambda self, q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1),
    "with a mask that depends on the tokens": _content_mask,
    "because add mixes its scores with something else that depends on the tokens": _content_bias,
    "because mul_1 mixes its scores with something else that depends on the tokens": _of_the_first_token,
    "has 3 uses": _twice,
    "several constants bound what it sees": _two_bounds,
    "holds other keys or values than the call's own tokens'": _of_memory,
    "a query sees keys behind itself": lambda self, q, k, v: (q @ k.transpose(-1, -2)).softmax(-1) @ v,
    "is not what it does at 300 tokens": _by_table("short"),
    "its table of 2500 rows says more than can be read from its first": _by_table("long"),
    "a bias depends on more than the distance of query and key": _clamped_alibi,
    "on random scores": _scaled_far_away,
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_is_not_understood_is_refused_by_its_node(why):
    text = refusal(REFUSED[why])
    assert text.startswith("canonicalise_attention: ")
    assert ": an attention that kvcompile does not recognise, " in text
    assert "test_rewrite_attention.py:" in text.splitlines()[0], "the line of the model's own code"
    assert why in text
    assert text.endswith("\n  Recognised: softmax(scale * q @ k^T, capped, with ALiBi, under a causal, sliding or chunked mask) @ v.")


@pytest.mark.parametrize(
    "bounded",
    [
        lambda self, distance: distance < 300,
        lambda self, distance: distance.float() < 300.0,
        lambda self, distance: distance < self.bound,
        lambda self, distance: ~(distance >= torch.full((1, 1), 300)),
        lambda self, distance: -distance > -300,
        lambda self, distance: distance.clamp(max=1000) <= 299,
    ],
)
def test_a_far_window_is_found_however_it_is_written(bounded):
    def attend(self, q, k, v):
        where = torch.arange(q.shape[2])
        distance = where[:, None] - where
        return F.scaled_dot_product_attention(q, k, v, attn_mask=(distance >= 0) & bounded(self, distance))

    (site,) = after("canonicalise_attention", Attention(attend).eval()).sites
    assert site.sliding_window == 300


@pytest.mark.parametrize("window", [39, 40, 41, 43, 46, 47, 48])
def test_windows_near_the_number_of_tokens_probed_are_found(window):
    def attend(self, q, k, v):
        where = torch.arange(q.shape[2])
        distance = where[:, None] - where
        return F.scaled_dot_product_attention(q, k, v, attn_mask=(distance >= 0) & (distance < window))

    (site,) = after("canonicalise_attention", Attention(attend).eval()).sites
    assert site.sliding_window == window


def test_keys_and_values_of_different_groups_keep_both_apart():
    class Uneven(Attention):
        def __init__(self):
            super().__init__(None, kv_heads=2)
            self.v = nn.Linear(HEADS * DIM, HEADS * DIM)

        def forward(self, ids):
            x = self.words(ids)
            q, k, v = (part(x).unflatten(2, (-1, DIM)).transpose(1, 2) for part in (self.q, self.k, self.v))
            return self.head(x + _by_hand(self, q, k.repeat_interleave(2, 1), v).transpose(1, 2).reshape(x.shape))

    (site,) = after("canonicalise_attention", Uneven().eval()).sites
    assert site.kv_heads == 4


def test_a_mask_of_one_length_is_refused_when_it_is_traced():
    class Fixed(toys.Mixed):
        def mix(self, x):
            return ((x @ x.transpose(1, 2)) + torch.zeros(24, 24).masked_fill(_hidden(24), -math.inf)).softmax(-1) @ x

    with pytest.raises(UnsupportedGraphError, match="it is fixed to one number of tokens"):
        traced(Fixed().eval())
