"""KIVI stores against a reference that handles one token at a time, and what they promise of chunks, forks, rollbacks and bytes."""

from __future__ import annotations

import random

import pytest
import torch
from quantised import PlainKivi
from torch import Tensor

from kvcompile.ir.errors import CapacityError, SessionError
from kvcompile.ir.policy import Kivi, SinkRecent, Store
from kvcompile.ir.store_bytes import ring_residual, stored_bytes
from kvcompile.runtime.kivi import KiviStore

HEADS, HEAD_DIM, VALUE_DIM = 2, 24, 32
KIVIS = [Kivi(2, 16, 32), Kivi(4, 16, 48), Kivi(4, 32, 32), Kivi(2, 16, 16)]


def new_store(kivi: Kivi, dtype=torch.float32, capacity=64, layout="rows", **ring) -> KiviStore:
    return KiviStore(HEADS, HEAD_DIM, VALUE_DIM, dtype, kivi, None if ring else capacity, layout, **ring)


def numbers(tokens: int, dtype=torch.float32, seed=0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    key = torch.randn(HEADS, tokens, HEAD_DIM, generator=generator) * torch.rand(HEAD_DIM, generator=generator) * 9 + 2
    return key.to(dtype), torch.randn(HEADS, tokens, VALUE_DIM, generator=generator).to(dtype)


def read(store: KiviStore, key: Tensor, value: Tensor, first: int, end: int, chunk: int) -> None:
    for start in range(first, end, chunk):
        store.append(key[:, start : min(end, start + chunk)], value[:, start : min(end, start + chunk)])
    store.settle()


def oracle(kivi: Kivi, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    plain = [PlainKivi(kivi) for _ in range(HEADS)]
    for head, one in enumerate(plain):
        for key_D, value_E in zip(key[head], value[head], strict=True):
            one.append(key_D, value_E)
    return torch.stack([torch.stack(one.keys) for one in plain]), torch.stack([torch.stack(one.values) for one in plain])


def contents(store: KiviStore) -> tuple[Tensor, Tensor]:
    (span,) = store.spans()
    assert span.first == 0 and span.tokens == store.tokens
    return span.key_HTD, span.value_HTE


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def format_of(store: KiviStore) -> Store:
    return Store(quantised=store.kivi)


def formula(store: KiviStore, tokens: int) -> int:
    name = str(store.dtype).removeprefix("torch.")
    window = None if store.recent_tokens is None else SinkRecent(store.sink_tokens, store.recent_tokens)
    return stored_bytes(format_of(store), name, HEADS, HEAD_DIM, VALUE_DIM, tokens, window, store.rollback_tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kivi", KIVIS, ids=Kivi.describe)
@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_keys_fill_and_flush_and_values_slide(kivi, dtype, rounds):
    """Trap 27: T mod R in {0, 1, R - 1}, token by token."""
    residual = kivi.residual_tokens
    for tokens in {max(1, rounds * residual), rounds * residual + 1, rounds * residual + residual - 1}:
        key, value = numbers(tokens, dtype, tokens)
        store = new_store(kivi, dtype)
        read(store, key, value, 0, tokens, 1)
        right_key, right_value = oracle(kivi, key, value)
        held_key, held_value = contents(store)
        assert held_key.dtype == held_value.dtype == torch.float32
        torch.testing.assert_close(held_key.double(), right_key, rtol=2e-7, atol=0)  # a product and a sum, each rounded once
        torch.testing.assert_close(held_value.double(), right_value, rtol=2e-7, atol=1e-7)
        exact = slice(tokens - tokens % residual, None)
        assert torch.equal(held_key[:, exact], key[:, exact].float())
        assert torch.equal(held_value[:, -residual:], value[:, -residual:].float())
        assert store.nbytes() == formula(store, tokens)


@pytest.mark.parametrize("kivi", KIVIS, ids=Kivi.describe)
def test_no_bit_of_a_store_depends_on_the_chunks(kivi):
    key, value = numbers(300, torch.bfloat16)
    whole = new_store(kivi, torch.bfloat16)
    read(whole, key, value, 0, 300, 300)
    for chunk in (1, 7, 16, 47, 129):
        for layout in ("rows", "blocks"):
            store = new_store(kivi, torch.bfloat16, layout=layout)
            read(store, key, value, 0, 300, chunk)
            assert same(contents(store), contents(whole))
            assert store.nbytes() == whole.nbytes() == formula(whole, 300)


def test_a_call_sees_its_own_tokens_exactly_and_earlier_ones_as_they_are_kept():
    kivi = KIVIS[0]
    key, value = numbers(100)
    store = new_store(kivi)
    read(store, key, value, 0, 40, 40)
    before = contents(store)
    (span,) = store.extend(key[:, 40:100], value[:, 40:100])
    assert torch.equal(span.key_HTD, torch.cat([before[0], key[:, 40:]], 1))
    assert torch.equal(span.value_HTE, torch.cat([before[1], value[:, 40:]], 1))
    store.settle()
    assert not torch.equal(contents(store)[0], span.key_HTD)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_numbers_come_back_exactly(bits, dtype):
    """Trap 26."""
    kivi = Kivi(bits, 16, 16)
    for number in (0.0, 3.14159, -1234.5, 1e-20, 60000.0):
        store = new_store(kivi, dtype)
        key = torch.full((HEADS, 64, HEAD_DIM), number, dtype=dtype)
        value = torch.full((HEADS, 64, VALUE_DIM), number, dtype=dtype)
        read(store, key, value, 0, 64, 64)
        assert same(contents(store), (key.float(), value.float()))


@pytest.mark.parametrize("kivi", KIVIS, ids=Kivi.describe)
def test_any_positions_are_gathered_and_cut_out(kivi):
    key, value = numbers(200, torch.bfloat16)
    store = new_store(kivi, torch.bfloat16)
    read(store, key, value, 0, 150, 150)
    store = store.fork()
    read(store, key, value, 150, 200, 9)
    held_key, held_value = contents(store)
    position_HK = torch.stack([torch.randperm(200)[:70] for _ in range(HEADS)])
    key_HKD, value_HKE = store.gather(position_HK)
    head_H1 = torch.arange(HEADS)[:, None]
    assert same((key_HKD, value_HKE), (held_key[head_H1, position_HK], held_value[head_H1, position_HK]))
    for first, end in ((0, 200), (0, 1), (5, 6), (17, 130), (120, 200), (199, 200), (50, 50)):
        spans = store.spans_between(first, end)
        assert sum(span.tokens for span in spans) == end - first
        for span in spans:
            assert torch.equal(span.key_HTD, held_key[:, span.first : span.end])
            assert torch.equal(span.value_HTE, held_value[:, span.first : span.end])


def test_a_fork_shares_what_is_quantised():
    kivi = KIVIS[0]
    key, value = numbers(300, torch.bfloat16)
    parent = new_store(kivi, torch.bfloat16)
    read(parent, key, value, 0, 150, 150)
    child = parent.fork()
    held = tuple(part.clone() for part in contents(child))
    exact = formula(new_store(kivi, torch.bfloat16), 150) - child.shared_nbytes()
    assert child.nbytes() == exact == HEADS * (150 % 32 * HEAD_DIM + 32 * VALUE_DIM) * 2
    assert child.shared_nbytes() + child.nbytes() == parent.nbytes() == formula(parent, 150)
    other_key, other_value = numbers(150, torch.bfloat16, 1)
    read(parent, other_key, other_value, 0, 150, 150)
    parent.rollback(280)
    read(parent, other_key, other_value, 0, 100, 7)
    assert same(contents(child), held)
    read(child, key, value, 150, 300, 11)
    alone = new_store(kivi, torch.bfloat16)
    read(alone, key, value, 0, 300, 300)
    del parent
    assert same(contents(child), contents(alone))
    assert child.nbytes() + child.shared_nbytes() == formula(child, 300)


@pytest.mark.parametrize("kivi", KIVIS, ids=Kivi.describe)
def test_a_rollback_keeps_the_form_and_what_was_never_quantised(kivi):
    key, value = numbers(200, torch.bfloat16)
    for taken in (0, 1, 5, kivi.residual_tokens, 61, 199, 200):
        store, alone = new_store(kivi, torch.bfloat16), new_store(kivi, torch.bfloat16)
        read(store, key, value, 0, 200, 50)
        quantised_keys, quantised_values = 200 - 200 % kivi.residual_tokens, 200 - kivi.residual_tokens
        held = tuple(part.clone() for part in store.spans_between(0, 200)[0][1:])
        store.rollback(taken)
        keep = 200 - taken
        read(alone, key, value, 0, keep, 50)
        assert store.tokens == keep and store.nbytes() == alone.nbytes() == formula(store, keep)
        if not keep:
            continue
        found, right = contents(store), contents(alone)
        coded = keep - keep % kivi.residual_tokens
        assert torch.equal(found[0][:, :coded], right[0][:, :coded])
        if keep >= quantised_keys:
            assert torch.equal(found[0], right[0])
        assert torch.equal(found[0], torch.cat([held[0][:, :coded], held[0][:, coded:keep].bfloat16().float()], 1))
        first = max(0, keep - kivi.residual_tokens)
        assert torch.equal(found[1][:, :first], right[1][:, :first])
        assert torch.equal(found[1][:, quantised_values:], right[1][:, quantised_values:])
        assert torch.equal(found[1][:, first:], held[1][:, first:keep].bfloat16().float())
        read(store, key, value, keep, 200, 9)
        assert store.nbytes() == formula(store, 200)
        size = held[0].abs().max()
        levels = 2**kivi.bits - 1
        assert (contents(store)[0] - key.float()).abs().max() <= 3 * size / levels  # quantised twice at most


def test_a_call_that_is_taken_back_before_it_settled_leaves_every_bit():
    key, value = numbers(300)
    for first, new in ((0, 40), (31, 1), (32, 40), (100, 1), (100, 200)):
        store, alone = new_store(KIVIS[0]), new_store(KIVIS[0])
        read(store, key, value, 0, first, 50)
        read(alone, key, value, 0, first, 50)
        store.append(key[:, first : first + new], value[:, first : first + new])
        store.rollback(new)
        read(store, key, value, first, 300, 300)
        read(alone, key, value, first, 300, 300)
        assert same(contents(store), contents(alone))


def test_an_interrupted_copy_appends_nothing(monkeypatch):
    key, value = numbers(100)
    store, alone = new_store(KIVIS[0]), new_store(KIVIS[0])
    for each in (store, alone):
        read(each, key, value, 0, 70, 70)
    with monkeypatch.context() as patch:

        def interrupted(*_):
            raise KeyboardInterrupt

        patch.setattr(KiviStore, "_write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.append(key[:, 70:], value[:, 70:])
    assert store.tokens == 70
    for each in (store, alone):
        read(each, key, value, 70, 100, 30)
    assert same(contents(store), contents(alone))


def test_refused_address_space_leaves_the_store_as_it_was(monkeypatch):
    key, value = numbers(300)
    store = new_store(KIVIS[0])
    read(store, key, value, 0, 70, 70)
    held = contents(store)

    def refuse(nbytes):
        raise CapacityError.at("address space", "refused", "")

    monkeypatch.setattr("kvcompile.runtime.kivi.reserve", refuse)
    with pytest.raises(CapacityError, match="refused"):
        store.append(key[:, 70:], value[:, 70:])
    assert store.tokens == 70 and same(contents(store), held)


@pytest.mark.parametrize("taken", [-1, 31])
def test_a_rollback_beyond_the_start_is_refused(taken):
    store = new_store(KIVIS[0])
    read(store, *numbers(30), 0, 30, 30)
    with pytest.raises(SessionError, match=f"the session has 30 tokens; {taken} cannot be taken back"):
        store.rollback(taken)
    assert store.tokens == 30


# --- rings ---------------------------------------------------------------------------------------------------------------------------

RINGS = [(0, 40, 0), (4, 64, 0), (20, 50, 9), (3, 32, 0), (5, 200, 16), (0, 16, 0)]


@pytest.mark.parametrize("ring", RINGS, ids=str)
@pytest.mark.parametrize("kivi", KIVIS[:2], ids=Kivi.describe)
def test_a_ring_holds_what_the_next_token_sees(kivi, ring):
    """Sinks exact; behind them a KIVI of their own, whose residual is at most the window."""
    sink, recent, rollback = ring
    key, value = numbers(400, torch.bfloat16)
    residual = ring_residual(kivi, recent + rollback)
    own = Kivi(kivi.bits, kivi.group, residual)
    for chunk in (1, 7, 130):
        store = new_store(kivi, torch.bfloat16, sink_tokens=sink, recent_tokens=recent, rollback_tokens=rollback)
        for first in range(0, 390, chunk):
            end = min(390, first + chunk)
            store.append(key[:, first:end], value[:, first:end])
            store.settle()
            assert store.nbytes() == formula(store, end), end
        right_key, right_value = oracle(own, key[:, sink:390], value[:, sink:390])
        spans = store.extend(key[:, 390:], value[:, 390:])
        assert [(span.first, span.end) for span in spans] == ([(0, sink)] if sink else []) + [(391 - recent, 400)]
        if sink:
            assert torch.equal(spans[0].key_HTD, key[:, :sink].float()) and torch.equal(spans[0].value_HTE, value[:, :sink].float())
        right_key = torch.cat([right_key, key[:, 390:].double()], 1)[:, 391 - recent - sink :]
        right_value = torch.cat([right_value, value[:, 390:].double()], 1)[:, 391 - recent - sink :]
        torch.testing.assert_close(spans[-1].key_HTD.double(), right_key, rtol=2e-7, atol=0)
        torch.testing.assert_close(spans[-1].value_HTE.double(), right_value, rtol=2e-7, atol=1e-7)


def test_a_ring_takes_back_what_it_promises_and_no_more():
    kivi, (sink, recent, rollback) = KIVIS[0], (4, 50, 9)
    key, value = numbers(400, torch.bfloat16)
    for length in (3, 30, 64, 100, 300):
        store = new_store(kivi, torch.bfloat16, sink_tokens=sink, recent_tokens=recent, rollback_tokens=rollback)
        read(store, key, value, 0, length, 13)
        held = [tuple(span) for span in store.spans_between(0, min(sink, length)) + store.spans_between(max(sink, length - recent), length)]
        taken = min(rollback, length)
        assert store.can_rollback(taken) is None
        store.rollback(taken)
        keep = length - taken
        spans = store.extend(key[:, keep : keep + 1], value[:, keep : keep + 1])
        assert spans[-1].end == keep + 1 and torch.equal(spans[-1].key_HTD[:, -1], key[:, keep].float())
        for span in spans:  # what is still there is what was there, but for one rounding
            for first, old_key, old_value in held:
                lo, hi = max(first, span.first), min(first + old_key.shape[1], span.end - 1)
                if lo < hi:
                    for new, old in ((span.key_HTD, old_key), (span.value_HTE, old_value)):
                        torch.testing.assert_close(
                            new[:, lo - span.first : hi - span.first], old[:, lo - first : hi - first], rtol=2.0**-8, atol=1e-6
                        )
        if length == 300:
            with pytest.raises(SessionError, match="a ring of 4 sink \\+ 50 recent tokens holds 292 tokens and cannot take back 60"):
                store.rollback(60)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ring", [None, *RINGS], ids=str)
def test_random_histories_never_change_what_another_store_holds(ring, seed):
    chance = random.Random(seed)
    kivi = chance.choice([Kivi(4, 16, 48), Kivi(4, 32, 32), Kivi(4, 16, 16)])
    options = {} if ring is None else dict(zip(("sink_tokens", "recent_tokens", "rollback_tokens"), ring, strict=True))
    if ring is not None and not ring_residual(kivi, ring[1] + ring[2]):
        kivi = Kivi(4, 16, 16)
    torch.manual_seed(seed)
    family = [new_store(kivi, torch.bfloat16, capacity=chance.choice([16, 40, 1000]), **options)]
    texts = [[]]
    for _ in range(80):
        at = chance.randrange(len(family))
        store, text = family[at], texts[at]
        match chance.choice(["step", "step", "chunk", "rollback", "fork", "drop"]):
            case "step" | "chunk" as what:
                new = 1 if what == "step" else chance.randint(0, 60)
                key, value = (torch.rand(HEADS, new, dim).bfloat16() for dim in (HEAD_DIM, VALUE_DIM))
                store.extend(key, value)
                if chance.random() < 0.7:
                    store.settle()
                text += list(zip(key.unbind(1), value.unbind(1), strict=True))
            case "rollback":
                taken = chance.randint(0, min(30, len(text)))
                if store.can_rollback(taken) is None:
                    store.rollback(taken)
                    del text[len(text) - taken :]
            case "fork" if len(family) < 4:
                family.append(store.fork())
                texts.append(list(text))
            case "drop" if len(family) > 1:
                del family[at], texts[at]
        for store, text in zip(family, texts, strict=True):
            assert store.tokens == len(text)
            for first, end in store.visible(store.tokens):
                for span in store.spans_between(first, end):
                    for place in range(span.tokens):
                        for found, given in zip((span.key_HTD, span.value_HTE), text[span.first + place], strict=True):
                            error = (found[:, place] - given.float()).abs().max()
                            assert error <= 0.2  # a range of 1 in 15 steps, quantised up to six times
