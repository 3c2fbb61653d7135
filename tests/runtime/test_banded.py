"""The operator of the torch.compile backend against its meaning, row by row in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvcompile.ir.policy import All, SinkRecent
from kvcompile.runtime.banded import ATTEND_BANDED, TILE_TOKENS, VISIBLE_PLACES
from kvcompile.runtime.reference import attend, visible

HEADS = [(0, 0), (3, 8), (3, 8), (0, 5)]  # sink and recent tokens of four KV heads; recent 0: all
SCALE = 0.3


def inputs(batch: int, queries: int, keys: int, queries_per_kv: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    query = torch.randn(batch, queries, len(HEADS) * queries_per_kv, 16).transpose(1, 2)
    return query, torch.randn(batch, len(HEADS), keys, 16), torch.randn(batch, len(HEADS), keys, 8)


def banded(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    places = None if mask is None else VISIBLE_PLACES(mask)
    sinks, recents = zip(*HEADS, strict=True)
    return ATTEND_BANDED(query, key, value, mask, places, SCALE, list(sinks), list(recents))


def oracle(query: Tensor, key: Tensor, value: Tensor, padding: int) -> Tensor:
    """One row; the last query stands at the last key, the first `padding` keys are nobody's."""
    positions = torch.arange(key.shape[1] - padding)
    out = []
    for head, (sinks, recent) in enumerate(HEADS):
        shown = visible(SinkRecent(sinks, recent) if recent else All(), positions[-query.shape[1] :], positions)
        group = query.unflatten(0, (len(HEADS), -1))[head]
        out.append(attend(group[None], key[None, head, padding:], value[None, head, padding:], shown, SCALE).out[0])
    return torch.cat(out)


def causal(queries: int, keys: int, padding: tuple[int, ...]) -> Tensor:
    """bool [B, 1, S, T]."""
    key_T = torch.arange(keys)
    own_S1 = torch.arange(keys - queries, keys)[:, None]
    return torch.stack([(key_T <= own_S1) & (key_T >= first) for first in padding])[:, None]


@pytest.mark.parametrize(("queries", "keys"), [(1, 5), (1, 43), (40, 40), (TILE_TOKENS + 44, TILE_TOKENS + 44)])
def test_without_a_mask(queries: int, keys: int) -> None:
    query, key, value = inputs(2, queries, keys)
    got = banded(query, key, value, None)
    for row in range(2):
        assert (got[row] - oracle(query[row], key[row], value[row], 0)).abs().max() < 1e-6


@pytest.mark.parametrize(("queries", "keys"), [(1, 43), (7, 43), (43, 43), (TILE_TOKENS + 44, TILE_TOKENS + 60)])
@pytest.mark.parametrize("kind", ["bool", "number"])
def test_padding_is_none_of_the_sequence(queries: int, keys: int, kind: str) -> None:
    """TRAPS 14: a padded row equals the row alone, its sinks included."""
    query, key, value = inputs(2, queries, keys)
    mask = causal(queries, keys, (0, 9))
    given = mask if kind == "bool" else torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    got = banded(query, key, value, given)
    for row, padding in enumerate((0, 9)):
        seeing = max(0, padding - (keys - queries))  # queries that are padding themselves
        want = oracle(query[row, :, seeing:], key[row], value[row], padding)
        assert (got[row, :, seeing:] - want).abs().max() < 1e-6
        assert (got[row, :, :seeing] == 0).all()


def test_slots_that_are_not_written_yet_are_not_read() -> None:
    """As a static cache has them: the mask tells how many there are."""
    query, key, value = inputs(1, 1, 64)
    key[:, :, 40:] = value[:, :, 40:] = torch.nan
    mask = torch.arange(64)[None, None, None] < 40
    got = banded(query, key, value, mask)
    assert (got[0] - oracle(query[0], key[0, :, :40], value[0, :, :40], 0)).abs().max() < 1e-6


def test_streaming_heads_read_nothing_between_sinks_and_window() -> None:
    for queries, keys in ((1, 600), (TILE_TOKENS, 600)):
        query, key, value = inputs(1, queries, keys)
        mask = causal(queries, keys, (0,))
        whole = banded(query, key, value, mask)
        key[:, 1:, 3 : keys - queries - 8] = torch.nan
        value[:, 1:, 3 : keys - queries - 8] = torch.nan
        assert torch.equal(banded(query, key, value, mask)[:, 2:], whole[:, 2:])


@pytest.mark.parametrize("queries", [1, 9])
def test_numbers_of_a_mask_join_the_logits(queries: int) -> None:
    """A bias of each query head; and a query that sees nothing gets 0."""
    query, key, value = inputs(1, queries, 30)
    shown = causal(queries, 30, (0,))
    bias = torch.randn(1, query.shape[1], queries, 30)
    got = banded(query, key, value, torch.where(shown, bias, -torch.inf))
    for number in range(query.shape[1]):
        sinks, recent = HEADS[number // 2]
        own = torch.arange(30 - queries, 30)
        banded_ST = visible(SinkRecent(sinks, recent) if recent else All(), own, torch.arange(30))
        logits = query[0, number].double() @ key[0, number // 2].double().T * SCALE + bias[0, number].double()
        want = torch.softmax(logits.masked_fill(~banded_ST, -torch.inf), 1) @ value[0, number // 2].double()
        assert (got[0, number] - want).abs().max() < 1e-6
    assert (banded(query, key, value, torch.zeros(1, 1, queries, 30, dtype=torch.bool)) == 0).all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("queries", [1, 40])
def test_torch_can_trace_it(queries: int, masked: bool) -> None:
    query, key, value = inputs(1, queries, 40)
    mask = causal(queries, 40, (0,)) if masked else None
    places = None if mask is None else VISIBLE_PLACES(mask)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(ATTEND_BANDED, (query, key, value, mask, places, SCALE, [0, 3, 3, 0], [0, 8, 8, 5]), test_utils=checks)
    if mask is not None:
        torch.library.opcheck(VISIBLE_PLACES, (mask,), test_utils=checks)
