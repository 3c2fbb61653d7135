"""Stores whose keys are found: held against the oracle, token by token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvcompile.ir.errors import SessionError
from kvcompile.ir.indexes import BLOCK_TOKENS, MIN_INDEXED_TOKENS
from kvcompile.ir.policy import LookedUp, Sample, SinkRecent, Static, TopK
from kvcompile.runtime import lookup, reference
from kvcompile.runtime.growable import GrowableStore
from kvcompile.runtime.indexes.sketch import SketchIndex
from kvcompile.runtime.lookup import LATE_TOKENS, LookupStore, attend_chosen, attend_lookup, attend_prompt
from kvcompile.runtime.merge import AttentionState
from kvcompile.runtime.query_sample import QuerySample
from kvcompile.runtime.ring import RingStore
from kvcompile.runtime.static import StaticStore

HEADS, GROUP, DIM, SCALE = 2, 3, 32, 0.3
WINDOW = SinkRecent(4, 20)
SKETCH = TopK(40, "sketch", select="union", tail=True)
FLAT = TopK(40, "flat", select="union")


def store(zone: LookedUp = SKETCH, soft_cap: float | None = None, turn: int = 0, capacity: int = 4096) -> LookupStore:
    return LookupStore(GrowableStore(HEADS, DIM, DIM, torch.float32, capacity), WINDOW, zone, GROUP, SCALE, soft_cap, turn=turn)


def tokens(count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [H, G, S, D], keys and values [H, S, D] whose leading channels matter most."""
    generator = torch.Generator().manual_seed(seed)
    size_D = torch.logspace(0.5, -1.5, DIM)
    query_HGSD = torch.randn(HEADS, GROUP, count, DIM, generator=generator) * size_D
    key_HSD, value_HSD = (torch.randn(HEADS, count, DIM, generator=generator) for _ in range(2))
    return query_HGSD, key_HSD, value_HSD


def read_prompt(held: LookupStore | StaticStore, query_HGSD: Tensor, key_HSD: Tensor, value_HSD: Tensor) -> None:
    first = held.tokens
    held.extend(key_HSD, value_HSD)
    held.observe(query_HGSD, first)


def step(held: LookupStore, query_HGSD: Tensor, key_HSD: Tensor, value_HSD: Tensor) -> AttentionState:
    """One generated token, as PackedCall does it."""
    held.extend(key_HSD, value_HSD)
    index = held.refresh()
    held.observe(query_HGSD, held.tokens - 1)
    return attend_prompt(held, query_HGSD, held.tokens - 1) if index is None else attend_lookup(held, query_HGSD, index)


def at(given: tuple[Tensor, Tensor, Tensor], first: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
    query_HGSD, key_HSD, value_HSD = given
    return query_HGSD[:, :, first:end], key_HSD[:, first:end], value_HSD[:, first:end]


def oracle(given: tuple[Tensor, Tensor, Tensor], position: int, seen_HT: Tensor, soft_cap: float | None = None) -> AttentionState:
    query_HGSD, key_HSD, value_HSD = at(given, 0, position + 1)
    parts = [
        reference.attend(query_HGSD[h : h + 1, :, -1:], key_HSD[h : h + 1], value_HSD[h : h + 1], seen_HT[h : h + 1], SCALE, soft_cap)
        for h in range(HEADS)
    ]
    return AttentionState(torch.cat([part.out for part in parts]), torch.cat([part.lse for part in parts]))


@pytest.mark.parametrize("soft_cap", [None, 3.0])
@pytest.mark.parametrize("select", ["per_query_head", "union", "sum", "max"])
def test_window_and_found_keys_are_attended_to_exactly(select, soft_cap):
    given = tokens(700)
    held = store(replace(FLAT, select=select), soft_cap)
    read_prompt(held, *at(given, 0, 690))
    for position in range(690, 700):
        state = step(held, *at(given, position, position + 1))
        index = held.index
        scaled_HGD = given[0][:, :, position] * SCALE
        found_HGK = index.search(scaled_HGD, 40, select, held.rows.spans_between).position_HGK
        for group in range(GROUP):
            seen_HT = torch.zeros(HEADS, position + 2, dtype=torch.bool)
            seen_HT[:, : index.first] = seen_HT[:, index.end : position + 1] = True
            seen_HT.scatter_(1, found_HGK[:, group] % (position + 2), True)
            expected = oracle(given, position, seen_HT[:, : position + 1], soft_cap)
            torch.testing.assert_close(state.out[:, group].double(), expected.out[:, group], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(state.lse[:, group].double(), expected.lse[:, group], rtol=1e-5, atol=1e-5)


def test_a_tail_comes_nearer_to_full_attention():
    given = tokens(900)
    errors = []
    for tail in (False, True):
        held = store(replace(SKETCH, tail=tail))
        read_prompt(held, *at(given, 0, 890))
        error = 0.0
        for position in range(890, 900):
            state = step(held, *at(given, position, position + 1))
            expected = oracle(given, position, torch.ones(HEADS, position + 1, dtype=torch.bool))
            error += float((state.out - expected.out).norm() / expected.out.norm())
        errors.append(error)
    assert errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize("zone", [SKETCH, FLAT, replace(SKETCH, k=1.0), replace(FLAT, k=5000)])
@pytest.mark.parametrize("prompt", [0, 1, 2, 5, 30, 540])
def test_what_is_short_or_chosen_whole_is_full_attention(zone, prompt):
    given = tokens(prompt + 8)
    held = store(zone)
    if prompt:
        read_prompt(held, *at(given, 0, prompt))
    for position in range(prompt, prompt + 8):
        if position + 1 - WINDOW.window_tokens >= MIN_INDEXED_TOKENS and zone.k == 40:
            break
        state = step(held, *at(given, position, position + 1))
        expected = oracle(given, position, torch.ones(HEADS, position + 1, dtype=torch.bool))
        torch.testing.assert_close(state.out.double(), expected.out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("turn", [0, 7])
def test_every_token_is_in_the_window_in_the_index_or_waiting(turn):
    given = tokens(900)
    held = store(turn=turn)
    read_prompt(held, *at(given, 0, 600))
    for position in range(600, 900):
        step(held, *at(given, position, position + 1))
        index = held.index
        assert index.first == WINDOW.sink_tokens
        assert WINDOW.recent_tokens <= held.tokens - index.end < WINDOW.recent_tokens + 2 * BLOCK_TOKENS
    covered = torch.cat([part.position_HT for part in index.parts], 1).sort(1).values
    assert torch.equal(covered, torch.arange(index.first, index.end, dtype=torch.int32).expand(HEADS, -1))


@pytest.mark.parametrize("zone", [SKETCH, FLAT, Sample()])
def test_a_needle_in_generated_text_is_found_2000_tokens_later(zone):
    query_HGSD, key_HSD, value_HSD = tokens(2800)
    needle, asked = 640, 2790
    direction_D = torch.nn.functional.normalize(torch.randn(DIM, generator=torch.Generator().manual_seed(5)), dim=0)
    key_HSD[:, needle], value_HSD[:, needle], query_HGSD[:, :, asked] = 6 * direction_D, 50.0, 12 * direction_D
    given = (query_HGSD, key_HSD, value_HSD)
    held = store(zone)
    read_prompt(held, *at(given, 0, 600))
    for position in range(600, asked + 1):
        state = step(held, *at(given, position, position + 1))
    assert held.tokens - 1 - needle > 2000
    assert (state.out > 40).all()


def test_nothing_that_comes_later_changes_what_a_prompt_taught():
    first, second = tokens(720), tokens(720, seed=1)
    indexes = []
    for later in (first, second):
        held = store()
        read_prompt(held, *at(first, 0, 700))
        for position in range(700, 720):
            step(held, *at(later, position, position + 1))
        indexes.append(held.index)
    one, other = (index.state()[0] for index in indexes)
    assert not [name for name in one if not name.endswith(".1") and not torch.equal(one[name], other[name])]  # .1: added since


def test_forks_go_their_own_ways():
    given, other = tokens(800), tokens(800, seed=3)
    held = store()
    read_prompt(held, *at(given, 0, 700))
    step(held, *at(given, 700, 701))
    child, alone = held.fork(), store()
    read_prompt(alone, *at(given, 0, 700))
    step(alone, *at(given, 700, 701))
    for position in range(701, 800):
        step(child, *at(other, position, position + 1))
        state = step(held, *at(given, position, position + 1))
        expected = step(alone, *at(given, position, position + 1))
        assert torch.equal(state.out, expected.out)


@pytest.mark.parametrize("back", [1, 30, 100, 300])
def test_a_rollback_is_as_if_the_tokens_had_never_been(back):
    given, other = tokens(1200), tokens(1200, seed=3)
    held, never = store(replace(SKETCH, tail=False)), store(replace(SKETCH, tail=False))
    for each in (held, never):
        read_prompt(each, *at(given, 0, 700))
        for position in range(700, 780):
            step(each, *at(given, position, position + 1))
    for position in range(780, 780 + back):
        step(held, *at(other, position, position + 1))
    held.rollback(back)
    assert held.tokens == 780
    for position in range(780, 900):
        state, expected = (step(each, *at(given, position, position + 1)) for each in (held, never))
    assert torch.equal(held.rows.spans()[0].key_HTD, never.rows.spans()[0].key_HTD)
    assert held.index.end == never.index.end
    torch.testing.assert_close(state.out, expected.out, rtol=1e-4, atol=1e-4)


def test_a_rollback_into_a_second_prompt_forgets_all_of_its_batch():
    given = tokens(1600)
    held, never = store(), store()
    for each in (held, never):
        read_prompt(each, *at(given, 0, 600))
        for position in range(600, 610):
            step(each, *at(given, position, position + 1))
    read_prompt(held, *at(given, 610, 1110))
    for position in range(1110, 1150):
        step(held, *at(given, position, position + 1))
    held.rollback(440)
    read_prompt(never, *at(given, 610, 710))
    for position in range(710, 780):
        state, expected = (step(each, *at(given, position, position + 1)) for each in (held, never))
        covered = torch.cat([part.position_HT for part in held.index.parts], 1).sort(1).values
        assert torch.equal(covered, torch.arange(held.index.first, held.index.end, dtype=torch.int32).expand(HEADS, -1))
    assert torch.equal(state.out, expected.out)


@pytest.mark.parametrize("zone", [SKETCH, FLAT])
def test_a_prompt_longer_than_what_the_index_was_made_from_makes_it_anew(zone):
    given = tokens(1900)
    held = store(zone)
    read_prompt(held, *at(given, 0, 600))
    step(held, *at(given, 600, 601))
    made = held.index
    read_prompt(held, *at(given, 601, 1100))
    step(held, *at(given, 1100, 1101))
    assert held.index is made, "500 tokens joined 576"
    read_prompt(held, *at(given, 1101, 1300))
    step(held, *at(given, 1300, 1301))
    assert held.index is not made and held.index.end == WINDOW.sink_tokens + 1248
    made = held.index
    read_prompt(held, *at(given, 1301, 1800))
    step(held, *at(given, 1800, 1801))
    assert held.index is made


def test_an_index_that_is_made_early_is_the_one_of_the_first_token():
    given = tokens(700)
    early, late = store(), store()
    for each in (early, late):
        read_prompt(each, *at(given, 0, 640))
    assert early.make_index() and not early.make_index() and late.index is None
    for position in range(640, 700):
        assert torch.equal(*(step(each, *at(given, position, position + 1)).out for each in (early, late)))


def test_generated_tokens_are_added_and_make_no_new_index():
    """However many of them: only a further prompt outgrows an index."""
    given = tokens(1400)
    held = store()
    read_prompt(held, *at(given, 0, 600))
    assert held.make_index()
    made = held.index
    for position in range(600, 1290):
        step(held, *at(given, position, position + 1))
    held.make_index()
    assert held.index is made and held.index.end - held.index.first > 1000


@pytest.mark.parametrize("zone", [SKETCH, FLAT, Sample()])
def test_a_needle_of_a_fork_is_found_in_what_it_reads_and_in_what_it_generates(zone):
    """Trap 19, behind an index that was made before."""
    query_HGSD, key_HSD, value_HSD = tokens(1400)
    needles, asked = (650, 1000), (1390, 1395)
    generator = torch.Generator().manual_seed(5)
    for needle, position in zip(needles, asked, strict=True):
        direction_D = torch.nn.functional.normalize(torch.randn(DIM, generator=generator), dim=0)
        key_HSD[:, needle], value_HSD[:, needle], query_HGSD[:, :, position] = 6 * direction_D, 50.0, 12 * direction_D
    given = (query_HGSD, key_HSD, value_HSD)
    base = store(zone)
    read_prompt(base, *at(given, 0, 600))
    assert base.make_index()
    held, base_end = base.fork(), base.index.end
    read_prompt(held, *at(given, 600, 750))
    found = {}
    for position in range(750, 1400):
        found[position] = step(held, *at(given, position, position + 1)).out
    assert all((found[position] > 40).all() for position in asked)
    assert held.index.end > needles[1] and base.index.end == base_end


def test_a_rollback_into_the_prompt_makes_the_index_anew():
    given = tokens(900)
    held = store()
    read_prompt(held, *at(given, 0, 800))
    step(held, *at(given, 800, 801))
    held.rollback(150)
    assert held.index is None
    step(held, *at(given, 651, 652))
    assert held.index.end <= held.tokens - WINDOW.recent_tokens
    held.rollback(600)
    step(held, *at(given, 60, 61))
    assert held.index is None
    with pytest.raises(SessionError, match="cannot be taken back"):
        held.rollback(1000)


def test_a_row_that_found_fewer_keys_attends_to_those():
    given = tokens(100)
    held = store()
    read_prompt(held, *at(given, 0, 100))
    position_HGK = torch.tensor([[[3, 9, -1]] * GROUP, [[1, 2, 3]] * GROUP])
    state = attend_chosen(held, given[0][:, :, 0] * SCALE, position_HGK)
    seen_HT = torch.zeros(HEADS, 100, dtype=torch.bool)
    seen_HT[0, [3, 9]] = seen_HT[1, 1:4] = True
    query_HGSD, key_HSD, value_HSD = given
    expected = [
        reference.attend(query_HGSD[h : h + 1, :, :1], key_HSD[h : h + 1], value_HSD[h : h + 1], seen_HT[h : h + 1], SCALE) for h in (0, 1)
    ]
    torch.testing.assert_close(state.out.double(), torch.cat([each.out for each in expected]).squeeze(2), rtol=1e-5, atol=1e-5)


# --- the sample of queries -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 5, 16, 64, 700])
def test_what_is_sampled_does_not_depend_on_chunks(chunk):
    query_HGSD, _, _ = tokens(700)
    whole, parts = QuerySample(HEADS, DIM), QuerySample(HEADS, DIM)
    whole.add(query_HGSD, 0, SCALE)
    for first in range(0, 700, chunk):
        parts.add(query_HGSD[:, :, first : first + chunk], first, SCALE)
    for one, other in zip(
        (whole.recent().query_HCD, whole.recent().position_C), (parts.recent().query_HCD, parts.recent().position_C), strict=True
    ):
        assert torch.equal(one, other)
    assert whole.queries == parts.queries == 159 * GROUP
    torch.testing.assert_close(whole.gram_HDD, parts.gram_HDD, rtol=1e-4, atol=1e-4)
    expected_HGSD = query_HGSD[:, :, 64::4] * SCALE  # the first ones are unlike all others
    torch.testing.assert_close(whole.gram_HDD, torch.einsum("hgsd,hgse->hde", expected_HGSD, expected_HGSD), rtol=1e-4, atol=1e-4)


def test_the_last_queries_are_kept():
    query_HGSD, _, _ = tokens(2000)
    sample = QuerySample(HEADS, DIM)
    sample.add(query_HGSD, 0, 1.0)
    assert torch.equal(sample.recent().query_HCD, query_HGSD[:, :, 976::16].flatten(1, 2))
    assert sample.recent().position_C.tolist() == list(range(976, 2000, 16)) * GROUP


# --- chosen once -----------------------------------------------------------------------------------------------------------------------


def static(keys: int = 16, rollback_tokens: int = 0) -> StaticStore:
    ring = RingStore(HEADS, DIM, DIM, torch.float32, WINDOW.sink_tokens, WINDOW.recent_tokens, rollback_tokens)
    return StaticStore(GrowableStore(HEADS, DIM, DIM, torch.float32, 4096), ring, Static(keys), SCALE, None)


def static_step(held: StaticStore, query_HGSD: Tensor, key_HSD: Tensor, value_HSD: Tensor) -> AttentionState:
    held.choose()
    first = held.tokens
    return held.attend(query_HGSD, held.extend(key_HSD, value_HSD), first)


def test_static_keys_are_those_that_the_last_queries_attend_to():
    given = tokens(400)
    query_HGSD, key_HSD, _ = given
    held = static()
    read_prompt(held, *at(given, 0, 300))
    recent_HCD = query_HGSD[:, :, 0:300:16].flatten(1, 2).double() * SCALE
    later_CT = torch.arange(300) > torch.arange(0, 300, 16).repeat(GROUP)[:, None]
    logit_HCT = (recent_HCD @ key_HSD[:, :300].double().transpose(1, 2)).masked_fill(later_CT, -torch.inf)
    votes_HT = torch.softmax(logit_HCT, 2).sum(1)[:, 4:281]
    chosen_HK = votes_HT.topk(16, 1).indices + 4
    for position in range(300, 400):
        state = static_step(held, *at(given, position, position + 1))
        seen_HT = (
            reference.visible(WINDOW, torch.tensor([position]), torch.arange(position + 1)).repeat(HEADS, 1).scatter(1, chosen_HK, True)
        )
        expected = oracle(given, position, seen_HT)
        torch.testing.assert_close(state.out.double(), expected.out, rtol=1e-5, atol=1e-5)
    assert held.nbytes() == HEADS * (24 + 16) * 2 * DIM * 4 + held.sample.nbytes()


def test_a_short_prompt_is_kept_whole():
    given = tokens(60)
    held = static()
    read_prompt(held, *at(given, 0, 10))
    for position in range(10, 40):
        state = static_step(held, *at(given, position, position + 1))
        expected = oracle(given, position, torch.ones(HEADS, position + 1, dtype=torch.bool))
        torch.testing.assert_close(state.out.double(), expected.out, rtol=1e-5, atol=1e-5)


def test_static_forks_and_rollbacks():
    given = tokens(400)
    held = static(rollback_tokens=8)
    read_prompt(held, *at(given, 0, 300))
    before = held.fork()
    expected = [static_step(held, *at(given, position, position + 1)) for position in range(300, 320)]
    held.rollback(8)
    again = [static_step(held, *at(given, position, position + 1)) for position in range(312, 320)]
    for one, other in zip(expected[-8:], again, strict=True):
        assert torch.equal(one.out, other.out)
    other = static_step(before, *at(given, 300, 301))
    assert torch.equal(other.out, expected[0].out)
    with pytest.raises(SessionError, match="ring"):
        held.rollback(40)
    with pytest.raises(SessionError, match="static zone has chosen"):
        held.rollback(held.tokens - 2)


def test_a_static_rollback_never_lets_the_window_reach_chosen_keys():
    given = tokens(400)
    held = static(keys=200, rollback_tokens=60)
    read_prompt(held, *at(given, 0, 300))
    for position in range(300, 310):
        static_step(held, *at(given, position, position + 1))
    for back in range(60):
        if held.can_rollback(back) is None:
            assert held.tokens - back + 1 - WINDOW.recent_tokens >= held._chosen_end


def test_after_a_further_prompt_the_index_does_not_wait_for_its_turn():
    """Turns of one generated token behind a prompt each: no single token ever falls on the site's turn."""
    given = tokens(3700)
    held = store(turn=5)
    read_prompt(held, *at(given, 0, 800))
    step(held, *at(given, 800, 801))
    for start in range(801, 3300, 401):
        read_prompt(held, *at(given, start, start + 400))
        step(held, *at(given, start + 400, start + 401))
        assert held.tokens - held.index.end <= WINDOW.recent_tokens + LATE_TOKENS + BLOCK_TOKENS


def test_an_index_is_held_against_queries_after_enough_tokens_however_they_came(monkeypatch):
    given = tokens(3000)
    held, asked = store(), []
    monkeypatch.setattr(SketchIndex, "recalibrate", lambda index, recent, keys, k: asked.append(held.tokens) or True)
    read_prompt(held, *at(given, 0, 1400))
    step(held, *at(given, 1400, 1401))
    read_prompt(held, *at(given, 1401, 2600))
    step(held, *at(given, 2600, 2601))
    assert asked == [2601]


def test_rows_of_a_long_context_move_to_huge_pages_when_their_index_is_made(monkeypatch):
    moved = []
    monkeypatch.setattr(GrowableStore, "use_huge_pages", lambda rows: moved.append(rows.tokens))
    given = tokens(900)
    for least, expected in ((900, []), (890, [891])):
        monkeypatch.setattr(lookup, "HUGE_TOKENS", least)
        held = store()
        read_prompt(held, *at(given, 0, 890))
        step(held, *at(given, 890, 891))
        assert held.index is not None and moved == expected
