"""Attention known by what it computes: every fact from a function of scores, and what is none is refused in words."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from kvcompile.passes.probe_scores import ScoreFacts, UnknownScores, probe_scores, visible_set

PLAIN = ScoreFacts(0.25, None, None, None, ())


@pytest.mark.parametrize(
    "facts",
    [
        PLAIN,
        ScoreFacts(0.08838834764831845, 50.0, None, None, ()),
        ScoreFacts(1.0, 2.0, 5, None, ()),
        ScoreFacts(0.3, None, None, 7, ()),
        ScoreFacts(0.125, None, None, None, (0.5, 0.25, 2.0**-8)),
        ScoreFacts(0.125, 5.0, 9, None, (0.5, 0.0, -0.25)),
        ScoreFacts(4.0, None, 1 + 38, None, ()),
    ],
    ids=str,
)
def test_the_facts_of_a_function_are_found(facts):
    assert probe_scores(facts.weigh, heads=3).agrees(facts, 40)


def test_how_it_is_written_does_not_matter():
    """Scaled behind the mask, masked by adding a large number, the bias measured from the first key: one and the same."""

    def weigh(scores):
        tokens = scores.shape[-1]
        where = torch.arange(tokens)
        bias = torch.tensor([0.5, 0.125], dtype=torch.float64)[:, None, None] * where
        hidden = torch.where(where[None] > where[:, None], -1e9, 0.0).double()
        return ((scores + bias / 0.25 + hidden) / 4.0).exp().nan_to_num() / ((scores + bias / 0.25 + hidden) / 4.0).exp().sum(
            -1, keepdim=True
        )

    assert probe_scores(weigh, heads=2).agrees(replace(PLAIN, slopes=(0.5, 0.125)), 40)


def _two_scales(scores):
    return PLAIN.weigh(scores * torch.tensor([1.0, 2.0]).double()[:, None, None])


def _sink(scores):
    return PLAIN.weigh(scores) * 0.5


def _two_windows(scores):
    return torch.cat([PLAIN.weigh(scores[:1]), replace(PLAIN, sliding_window=5).weigh(scores[1:])])


def _squared_distance(scores):
    where = torch.arange(scores.shape[-1])
    return PLAIN.weigh(scores - 0.01 * (where[:, None] - where).double() ** 2)


def _not_causal(scores):
    return scores.softmax(-1)


def _strided(scores):
    where = torch.arange(scores.shape[-1])
    hidden = ((where[:, None] - where) % 3 != 0) | (where > where[:, None])
    return scores.masked_fill(hidden, -math.inf).softmax(-1)


def _gated(scores):
    return PLAIN.weigh(scores + 0.3 * scores.abs().sqrt())


def _negative(scores):
    return PLAIN.weigh(-scores)


@pytest.mark.parametrize(
    ("weigh", "why"),
    [
        (_two_scales, "its heads have different scales"),
        (_sink, "the weights of a query do not sum to one"),
        (_two_windows, "its heads see different keys"),
        (_squared_distance, "a bias depends on more than the distance of query and key"),
        (_not_causal, "a query sees keys behind itself: only causal models can be compiled"),
        (_strided, "which keys a query sees is neither causal, nor a sliding window, nor a chunk"),
        (_negative, "the scores have no positive scale"),
    ],
)
def test_what_is_no_such_attention_is_refused_in_words(weigh, why):
    with pytest.raises(UnknownScores) as caught:
        probe_scores(weigh, heads=2)
    assert str(caught.value) == why


def test_facts_that_do_not_reproduce_the_function_are_not_believed():
    with pytest.raises(UnknownScores, match=r"differs from it by .* on random scores"):
        probe_scores(_gated, heads=2)


def test_a_visible_set_is_a_window_or_a_chunk():
    zero = torch.zeros(1, 20, 20, dtype=torch.float64)
    assert visible_set(PLAIN.weigh(zero)) == (None, None)
    assert visible_set(replace(PLAIN, sliding_window=6).weigh(zero)) == (6, None)
    assert visible_set(replace(PLAIN, chunk_tokens=6).weigh(zero)) == (None, 6)


def test_windows_wider_than_the_tokens_compared_are_none():
    wide, wider = replace(PLAIN, sliding_window=43), replace(PLAIN, sliding_window=44)
    assert wide.agrees(PLAIN, 40) and wide.agrees(wider, 40)
    assert not wide.agrees(PLAIN, 44)
