"""Whether a model attends, and whether tokens meet elsewhere too, is seen at its operators."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kvcompile.sweep.attention_seen import attends, looks_ahead, mixes_otherwise

IDS = torch.arange(3, 35)[None]
TABLE = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
EXPERTS = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(1))
Logits = Callable[[Tensor], Tensor]


def _spelt_out(ids: Tensor) -> Tensor:
    x = TABLE[ids]
    hidden = torch.ones(ids.shape[1], ids.shape[1]).triu(1).bool()
    scores = (x @ x.transpose(1, 2)).masked_fill(hidden, -torch.inf)
    return x + torch.softmax(scores, -1).to(x.dtype)[..., :] @ x


def _fused(ids: Tensor) -> Tensor:
    x = TABLE[ids][:, None]
    return torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)[:, 0]


def _by_log_sum_exp(ids: Tensor) -> Tensor:
    x = TABLE[ids]
    scores = (x @ x.transpose(1, 2)).tril()
    return x + torch.exp(scores - torch.logsumexp(scores, -1, keepdim=True)) @ x


def _decaying(ids: Tensor) -> Tensor:
    """A recurrence as a product with exponentials: no softmax."""
    distance = torch.arange(ids.shape[1])[:, None] - torch.arange(ids.shape[1])
    return torch.exp(-distance.float()).tril() @ TABLE[ids]


def _router(ids: Tensor) -> Tensor:
    x = TABLE[ids]
    weights = torch.softmax(x[..., :4], -1)
    return torch.einsum("bte,betd->btd", weights, torch.einsum("btd,edf->betf", x, EXPERTS))


def _running_mean(ids: Tensor) -> Tensor:
    return TABLE[ids].cumsum(1) / torch.arange(1, ids.shape[1] + 1)[:, None]


@pytest.mark.parametrize(
    ("model", "expected"),
    [(_spelt_out, True), (_fused, True), (_by_log_sum_exp, True), (_decaying, False), (_router, False), (_running_mean, False)],
)
def test_an_attention_is_a_softmax_over_tokens_that_weighs_them(model: Logits, expected: bool) -> None:
    assert attends(model, IDS) is expected


def test_an_attention_over_a_few_layers_is_none_over_tokens() -> None:
    """Hidden states of earlier layers, weighed for each token."""

    def model(ids: Tensor) -> Tensor:
        layers = torch.stack([TABLE[ids][0], TABLE[ids][0].flip(-1)], 1)[:, None]
        return torch.nn.functional.scaled_dot_product_attention(layers[:, :, :1], layers, layers)[None, :, 0, 0]

    assert not attends(model, IDS)


def test_a_softmax_over_the_vocabulary_is_no_attention() -> None:
    assert not attends(lambda ids: torch.softmax(TABLE[ids], -1), IDS)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (_spelt_out, False),
        (_fused, False),
        (_router, False),
        (lambda ids: _spelt_out(ids) + _running_mean(ids), True),
        (lambda ids: _fused(ids) + torch.roll(TABLE[ids], 1, 1), True),
    ],
)
def test_another_mixer_shows_when_attention_is_silent(model: Logits, expected: bool) -> None:
    assert mixes_otherwise(model, IDS) is expected


def _both_ways(ids: Tensor) -> Tensor:
    x = TABLE[ids]
    return x + torch.softmax(x @ x.transpose(1, 2), -1) @ x


def _counted_from_the_end(ids: Tensor) -> Tensor:
    return TABLE[ids] * torch.arange(ids.shape[1], 0, -1)[:, None]


@pytest.mark.parametrize(
    ("model", "expected"), [(_spelt_out, False), (_fused, False), (_running_mean, False), (_both_ways, True), (_counted_from_the_end, True)]
)
def test_a_model_looks_ahead_where_logits_change_with_what_stands_behind(model: Logits, expected: bool) -> None:
    assert looks_ahead(model, IDS) is expected
