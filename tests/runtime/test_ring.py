import pytest
import torch

from kvcompile.ir.errors import SessionError
from kvcompile.ir.policy import SinkRecent
from kvcompile.runtime import reference
from kvcompile.runtime.attend import attend_spans
from kvcompile.runtime.growable import GrowableStore
from kvcompile.runtime.ring import RingStore

HEADS, HEAD_DIM, VALUE_DIM = 2, 16, 24


def text(tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(HEADS, tokens, HEAD_DIM, generator=generator), torch.randn(HEADS, tokens, VALUE_DIM, generator=generator)


def ring(sink=4, recent=12, rollback=0, dtype=torch.float32):
    return RingStore(HEADS, HEAD_DIM, VALUE_DIM, dtype, sink, recent, rollback)


def feed(store, key, value, end, chunk):
    """Extends the store to `end` tokens, `chunk` at a time, and checks what every new query needs."""
    spans = ()
    while store.tokens < end:
        first, last = store.tokens, min(end, store.tokens + chunk)
        spans = store.extend(key[:, first:last], value[:, first:last])
        check_spans(store, spans, key, value, first, last)
    return spans


def check_spans(store, spans, key, value, first, last):
    held = set()
    at = 0
    for span in spans:
        assert span.first >= at
        assert span.tokens > 0
        at = span.end
        held |= set(range(span.first, span.end))
        assert torch.equal(span.key_HTD, key[:, span.first : span.end].to(store.dtype))
        assert torch.equal(span.value_HTE, value[:, span.first : span.end].to(store.dtype))
    assert at == last
    for p in range(first, last):
        assert held.issuperset(j for j in range(p + 1) if j < store.sink_tokens or j > p - store.recent_tokens)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 16, 17, 40, 100])
@pytest.mark.parametrize(("sink", "recent", "rollback"), [(4, 12, 0), (0, 12, 0), (4, 12, 5), (0, 1, 0), (3, 1, 2), (12, 2, 0), (30, 7, 1)])
def test_a_ring_holds_what_every_query_sees_through_many_rounds(sink, recent, rollback, chunk):
    key, value = text(150)
    store = ring(sink, recent, rollback)
    feed(store, key, value, 150, chunk)
    assert store.tokens == 150
    assert store.nbytes() == (sink + recent + rollback) * HEADS * (HEAD_DIM + VALUE_DIM) * 4
    assert store.shared_nbytes() == 0


def test_bytes_count_the_tokens_held_and_the_kv_heads():
    """Trap 11."""
    store = RingStore(3, 64, 32, torch.bfloat16, 4, 12)
    new = torch.randn(3, 10, 64)
    store.extend(new, new[..., :32])
    assert store.nbytes() == 10 * 3 * (64 + 32) * 2
    store.extend(new, new[..., :32])
    assert store.nbytes() == 16 * 3 * (64 + 32) * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_beyond_the_ring_reads_it_in_place(dtype):
    key, value = text(100)
    store = ring(dtype=dtype)
    feed(store, key, value, 16, 16)
    slots = store._keys.read(0, store._slots)
    start, end = slots.data_ptr(), slots.data_ptr() + slots.stride(0) * HEADS * dtype.itemsize
    shapes = set()
    for p in range(16, 60):
        spans = store.extend(key[:, p : p + 1], value[:, p : p + 1])
        assert all(start <= span.key_HTD.data_ptr() < end for span in spans)
        assert sum(span.tokens for span in spans) == 16
        shapes.add(len(spans))
        check_spans(store, spans, key, value, p, p + 1)
    assert shapes == {2, 3}


def test_a_short_chunk_within_the_rollback_slack_reads_in_place_too():
    key, value = text(100)
    store = ring(rollback=4)
    feed(store, key, value, 40, 40)
    spans = store.extend(key[:, 40:45], value[:, 40:45])
    check_spans(store, spans, key, value, 40, 45)
    start = store._keys.read(0, store._slots).data_ptr()
    assert all(span.key_HTD.data_ptr() < start + store._keys.read(0, store._slots).stride(0) * HEADS * 4 for span in spans)


@pytest.mark.parametrize("rollback", [0, 5])
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_below_overflow_a_ring_is_bit_equal_to_a_growable_store_that_sees_all(rollback, chunk):
    sink, recent = 16, 48
    key, value = text(sink + recent)
    streaming, full = ring(sink, recent, rollback), GrowableStore(HEADS, HEAD_DIM, VALUE_DIM, torch.float32, 128)
    for first in range(0, sink + recent, chunk):
        new = slice(first, min(first + chunk, sink + recent))
        query = torch.randn(HEADS, 3, new.stop - first, HEAD_DIM)
        spans = streaming.extend(key[:, new], value[:, new])
        assert [(span.first, span.tokens) for span in spans] == [(0, new.stop)]
        a = attend_spans(query, spans, first, sink_tokens=sink, recent_tokens=recent, scale=0.25)
        b = attend_spans(query, full.extend(key[:, new], value[:, new]), first, sink_tokens=0, recent_tokens=None, scale=0.25)
        assert torch.equal(a.out, b.out)
        assert torch.equal(a.lse, b.lse)


@pytest.mark.parametrize("chunk", [1, 7, 64, 300])
def test_a_ring_is_bit_equal_to_a_growable_store_that_looks_through_the_same_window(chunk):
    key, value = text(300)
    streaming, growable = ring(4, 37), GrowableStore(HEADS, HEAD_DIM, VALUE_DIM, torch.float32, 512)
    for first in range(0, 300, chunk):
        new = slice(first, min(first + chunk, 300))
        query = torch.randn(HEADS, 3, new.stop - first, HEAD_DIM)
        states = [
            attend_spans(query, store.extend(key[:, new], value[:, new]), first, sink_tokens=4, recent_tokens=37, scale=0.25)
            for store in (streaming, growable)
        ]
        assert torch.equal(states[0].out, states[1].out)
        assert torch.equal(states[0].lse, states[1].lse)
        see = reference.visible(SinkRecent(4, 37), torch.arange(first, new.stop), torch.arange(new.stop))
        right = reference.attend(query, key[:, : new.stop], value[:, : new.stop], see, 0.25)
        torch.testing.assert_close(states[0].out.double(), right.out, rtol=1e-5, atol=1e-6)


def test_a_rollback_within_the_promise_equals_never_having_appended():
    """Trap 28."""
    key, value = text(200)
    other_key, other_value = text(200, seed=1)
    for depth in (0, 1, 3, 6):  # rollback_tokens + 1: the next query needs one token less than the window
        for chunk in (1, 2, 30):
            store = ring(rollback=5)
            feed(store, key, value, 100, 30)
            store.rollback(depth)
            mixed = [torch.cat([old[:, : 100 - depth], new], 1) for old, new in ((key, other_key), (value, other_value))]
            feed(store, *mixed, 140, chunk)


def test_a_rollback_beyond_the_promise_is_refused_and_changes_nothing():
    """Trap 28."""
    key, value = text(120)
    store = ring(rollback=2)
    feed(store, key, value, 100, 9)
    before = store._keys.read(0, store._slots).clone()
    with pytest.raises(SessionError) as error:
        store.rollback(10)
    assert str(error.value) == (
        "rollback(10): a ring of 4 sink + 12 recent tokens that has held 100 tokens can take back 3 of its 100, not 10: "
        "what they would see is overwritten.\n"
        "  Write `rollback: 10` in the policy, which enlarges its rings by as many tokens, or fork the session before the tokens "
        "that may be taken back."
    )
    assert store.can_rollback(4) is not None
    assert store.can_rollback(3) is None
    assert store.tokens == 100
    assert torch.equal(store._keys.read(0, store._slots), before)
    feed(store, key, value, 120, 1)


def test_a_rollback_of_more_than_there_is_is_refused():
    store = ring()
    with pytest.raises(SessionError, match=r"rollback\(1\): the session has 0 tokens; 1 cannot be taken back"):
        store.rollback(1)
    with pytest.raises(SessionError, match=r"rollback\(-2\)"):
        store.rollback(-2)


def test_what_a_rollback_took_back_counts_as_overwritten_until_it_is_given_again():
    key, value = text(200)
    store = ring(rollback=5)
    feed(store, key, value, 100, 10)
    store.rollback(4)
    feed(store, key, value, 98, 1)
    problem = store.can_rollback(5)  # 93 is 7 below the 100 that were held
    assert problem is not None
    assert "has held 100 tokens can take back 4 of its 98, not 5" in problem.what
    store.rollback(4)
    assert store.tokens == 94
    feed(store, key, value, 200, 1)
    assert store.can_rollback(6) is None
    assert store.can_rollback(7) is not None


@pytest.mark.parametrize("rollback", [0, 5])
def test_before_overflow_any_depth_is_possible(rollback):
    key, value = text(100)
    for depth in range(17):
        store = ring(rollback=rollback)
        feed(store, key, value, 16, 16)
        store.rollback(depth)
        feed(store, key, value, 60, 1)


def test_after_overflow_the_way_back_to_the_sinks_stays_open():
    key, value = text(100)
    for keep in (0, 1, 4):
        store = ring()
        feed(store, key, value, 100, 100)
        store.rollback(100 - keep)
        assert store.tokens == keep
        spans = feed(store, key, value, 10, 1)
        assert [(span.first, span.tokens) for span in spans] == [(0, 10)]
        feed(store, key, value, 90, 7)
    assert store.can_rollback(85) is not None


def test_a_fork_is_a_copy_that_neither_side_disturbs():
    key, value = text(200)
    for tokens in (0, 3, 10, 16, 17, 50):
        parent = ring(rollback=2)
        feed(parent, key, value, tokens, 200)
        child = parent.fork()
        assert child.nbytes() == parent.nbytes()
        assert child.shared_nbytes() == 0
        child_text = [torch.cat([old[:, :tokens], new], 1) for old, new in zip((key, value), text(200, seed=2), strict=True)]
        for end in range(tokens + 1, tokens + 40, 3):
            feed(parent, key, value, end, 2)
            feed(child, *child_text, end, 3)
        assert child.can_rollback(3) is None


def test_strided_input_and_input_of_another_dtype():
    key, value = text(60)
    for dtype in (torch.bfloat16, torch.float16):
        store = ring(dtype=dtype)
        feed(store, key.transpose(0, 1).contiguous().transpose(0, 1), value, 60, 25)


class Interrupted:
    """A tensor whose copy into the ring fails at the `call`-th one."""

    def __init__(self, monkeypatch, call):
        real, count = torch.Tensor.copy_, iter(range(10**9))

        def copy(target, source, *rest):
            if next(count) == call:
                raise KeyboardInterrupt
            return real(target, source, *rest)

        monkeypatch.setattr(torch.Tensor, "copy_", copy)


@pytest.mark.parametrize("call", [0, 1])
@pytest.mark.parametrize(("new", "undone"), [(1, True), (6, True), (9, False)])
def test_a_ring_knows_what_an_interrupted_copy_may_have_overwritten(monkeypatch, new, undone, call):
    key, value = text(200)
    store = ring(rollback=5)
    feed(store, key, value, 40, 40)
    with monkeypatch.context() as patch:
        Interrupted(patch, call)
        with pytest.raises(KeyboardInterrupt):
            store.extend(key[:, 40 : 40 + new] + 1, value[:, 40 : 40 + new] + 1)
    assert store.tokens == 40 + new
    assert (store.can_rollback(new) is None) is undone
    if undone:
        store.rollback(new)
        feed(store, key, value, 100, 3)
