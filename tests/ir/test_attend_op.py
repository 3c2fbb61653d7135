"""`kvc::attend` as an operator against softmax written out in float64."""

from __future__ import annotations

import pytest
import torch

from kvcompile.ir.attend_op import ATTEND


def written_out(query, key, value, sinks, scale, window, cap, chunk=0, slopes=()):
    heads, tokens = query.shape[1], query.shape[2]
    key, value = (part[0].double().repeat_interleave(heads // part.shape[1], 0) for part in (key, value))
    scores = query[0].double() @ key.mT * scale
    scores = cap * torch.tanh(scores / cap) if cap else scores
    positions = torch.arange(tokens)
    gap = torch.arange(tokens)[:, None] - torch.arange(tokens)
    if slopes:
        scores = scores - torch.tensor(slopes, dtype=torch.float64)[:, None, None] * gap
    if chunk:
        scores = scores.masked_fill(positions // chunk != positions[:, None] // chunk, -torch.inf)
    scores = scores.masked_fill((gap < 0) | ((gap >= window) if window else False), -torch.inf)
    top = scores.amax(-1, keepdim=True)
    weights = (scores - top).exp()
    below = weights.sum(-1, keepdim=True) + ((sinks.double()[:, None, None] - top).exp() if sinks is not None else 0)
    return (weights / below @ value).transpose(0, 1)[None]


@pytest.mark.parametrize("tokens", [1, 7, 300])
@pytest.mark.parametrize(("window", "cap", "sinks"), [(0, 0.0, False), (5, 0.0, False), (0, 2.0, False), (0, 0.0, True), (5, 2.0, True)])
def test_the_operator_is_causal_softmax_attention(tokens, window, cap, sinks):
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, tokens, 8), torch.randn(1, 2, tokens, 8), torch.randn(1, 2, tokens, 6)
    logits = torch.randn(4) if sinks else None
    out = ATTEND(query, key, value, logits, 0, 0.5, window, cap)
    assert out.shape == (1, tokens, 4, 6)
    torch.testing.assert_close(out.double(), written_out(query, key, value, logits, 0.5, window, cap), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 7, 300])
@pytest.mark.parametrize(("chunk", "slopes"), [(8, ()), (1, ()), (0, (0.5, 0.25, 0.125, 0.0625)), (100, (0.5, 0.25, 0.0, -0.01))])
@pytest.mark.parametrize(("window", "cap", "sinks"), [(0, 0.0, False), (5, 2.0, True)])
def test_chunks_and_slopes_are_its_own_too(tokens, window, cap, sinks, chunk, slopes):
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, tokens, 8), torch.randn(1, 2, tokens, 8), torch.randn(1, 2, tokens, 6)
    logits = torch.randn(4) if sinks else None
    out = ATTEND(query, key, value, logits, 0, 0.5, window, cap, chunk, slopes, torch.full_like(query, torch.nan))  # no sinks here
    right = written_out(query, key, value, logits, 0.5, window, cap, chunk, slopes)
    torch.testing.assert_close(out.double(), right, rtol=1e-5, atol=1e-5)


def test_tracing_it_knows_its_shape():
    torch.library.opcheck(ATTEND, (torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 6), None, 0, 0.5, 0, 0.0))
