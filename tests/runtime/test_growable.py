import gc
import weakref

import pytest
import torch

from kvcompile.ir.errors import CapacityError, SessionError
from kvcompile.runtime.growable import GrowableStore


def store_of(tokens=0, capacity=100, kv_heads=2, head_dim=16, value_dim=24, dtype=torch.float32):
    store = GrowableStore(kv_heads, head_dim, value_dim, dtype, capacity)
    if tokens:
        append(store, tokens)
    return store


def append(store, tokens):
    key = torch.randn(store.kv_heads, tokens, store.head_dim)
    value = torch.randn(store.kv_heads, tokens, store.value_dim)
    return key, value, store.extend(key, value)


def contents(store):
    spans = store.spans()
    at = 0
    for span in spans:
        assert span.first == at
        assert span.key_HTD.shape[1] == span.value_HTE.shape[1] == span.tokens > 0
        at = span.end
    assert at == store.tokens
    if not spans:
        return torch.empty(store.kv_heads, 0, store.head_dim), torch.empty(store.kv_heads, 0, store.value_dim)
    return torch.cat([span.key_HTD for span in spans], 1), torch.cat([span.value_HTE for span in spans], 1)


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_below_capacity_there_is_one_span_that_is_never_copied():
    store = store_of()
    pointers, keys = set(), []
    for tokens in (1, 7, 64, 28):
        key, _, spans = append(store, tokens)
        keys.append(key)
        assert len(spans) == 1
        pointers.add((spans[0].key_HTD.data_ptr(), spans[0].value_HTE.data_ptr()))
    assert store.tokens == 100
    assert len(pointers) == 1
    assert torch.equal(contents(store)[0], torch.cat(keys, 1))


def test_beyond_capacity_a_further_span_opens_and_nothing_moves():
    store = store_of(90)
    before = contents(store)
    pointer = store.spans()[0].key_HTD.data_ptr()
    key, value, spans = append(store, 30)
    assert [(span.first, span.tokens) for span in spans] == [(0, 100), (100, 20)]
    assert spans[0].key_HTD.data_ptr() == pointer
    append(store, 80)
    assert [span.tokens for span in store.spans()] == [100, 100]  # the further one is at least as large
    append(store, 250)
    assert [span.tokens for span in store.spans()] == [100, 100, 250]
    for held, old, new in zip(contents(store), before, (key, value), strict=True):
        assert torch.equal(held[:, :120], torch.cat([old, new], 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_are_kept_in_the_stores_dtype(dtype):
    store = store_of(dtype=dtype)
    key, value, _ = append(store, 9)
    assert same(contents(store), (key.to(dtype), value.to(dtype)))


def test_strided_input_and_no_input_are_taken():
    store = store_of()
    key, value = torch.randn(5, 2, 16).transpose(0, 1), torch.randn(5, 2, 24).transpose(0, 1)
    store.extend(key, value)
    assert same(contents(store), (key, value))
    assert len(store.extend(key[:, :0], value[:, :0])) == 1
    assert store_of().extend(key[:, :0], value[:, :0]) == ()


def test_bytes_count_kv_heads_and_not_query_heads():
    """Trap 11."""
    store = store_of(50, kv_heads=3, head_dim=64, value_dim=32, dtype=torch.bfloat16)
    assert store.nbytes() == 50 * 3 * (64 + 32) * 2
    assert store.shared_nbytes() == 0
    assert store_of().nbytes() == 0


@pytest.mark.parametrize("taken", [0, 1, 29, 30, 31, 129, 130])
def test_a_rollback_equals_never_having_appended(taken):
    torch.manual_seed(1)
    store = store_of(130)
    key, value = (part.clone() for part in contents(store))
    store.rollback(taken)
    assert store.tokens == 130 - taken
    assert same(contents(store), (key[:, : 130 - taken], value[:, : 130 - taken]))
    new_key, new_value, _ = append(store, 200)
    assert same(contents(store), (torch.cat([key[:, : 130 - taken], new_key], 1), torch.cat([value[:, : 130 - taken], new_value], 1)))


@pytest.mark.parametrize("taken", [-1, 31])
def test_a_rollback_beyond_the_start_is_refused_and_changes_nothing(taken):
    store = store_of(30)
    assert store.can_rollback(30) is None
    with pytest.raises(SessionError) as error:
        store.rollback(taken)
    assert str(error.value) == (
        f"rollback({taken}): the session has 30 tokens; {taken} cannot be taken back.\n  Take back between 0 and 30 tokens."
    )
    assert store.tokens == 30


def test_a_fork_reads_its_parents_tokens_where_they_are():
    parent = store_of(60)
    child = parent.fork()
    assert child.tokens == 60
    assert child.nbytes() == 0
    assert child.shared_nbytes() == parent.nbytes() == 60 * 2 * 40 * 4
    assert child.spans()[0].key_HTD.data_ptr() == parent.spans()[0].key_HTD.data_ptr()
    append(child, 5)
    assert [(span.first, span.tokens) for span in child.spans()] == [(0, 60), (60, 5)]
    assert child.nbytes() == 5 * 2 * 40 * 4


def test_a_child_never_sees_what_its_parent_does():
    parent = store_of(60)
    child = parent.fork()
    before = tuple(part.clone() for part in contents(child))
    append(parent, 30)
    assert len(parent.spans()) == 1  # behind the lease the parent goes on in place
    parent.rollback(70)
    append(parent, 40)  # below the lease it must not
    assert [(span.first, span.tokens) for span in parent.spans()] == [(0, 20), (20, 40)]
    assert same(contents(child), before)
    parent.rollback(60)
    append(parent, 100)
    del parent
    assert same(contents(child), before)
    key, _, _ = append(child, 3)
    assert torch.equal(contents(child)[0], torch.cat([before[0], key], 1))


def test_a_parent_never_sees_what_its_child_does():
    parent = store_of(60)
    before = tuple(part.clone() for part in contents(parent))
    child = parent.fork()
    append(child, 50)
    child.rollback(80)
    append(child, 90)
    assert same(contents(parent), before)


def test_forks_of_forks_rolled_back_into_the_first_ones_tokens():
    first = store_of(50)
    second = first.fork()
    append(second, 20)
    third = second.fork()
    append(third, 10)
    everything = tuple(part.clone() for part in contents(third))
    assert [span.first for span in third.spans()] == [0, 50, 70]
    assert third.shared_nbytes() == 70 * 2 * 40 * 4
    del first, second
    third.rollback(45)
    assert same(contents(third), tuple(part[:, :35] for part in everything))
    assert third.nbytes() == 0
    key, _, _ = append(third, 4)
    assert torch.equal(contents(third)[0], torch.cat([everything[0][:, :35], key], 1))


def test_a_dead_child_gives_its_lease_back():
    parent = store_of(60)
    child = parent.fork()
    del child
    parent.rollback(10)
    append(parent, 10)
    assert len(parent.spans()) == 1


def test_a_child_that_rolled_back_shortens_its_lease():
    parent = store_of(60)
    child = parent.fork()
    child.rollback(40)
    before = contents(child)[0].clone()
    parent.rollback(30)
    append(parent, 30)
    assert len(parent.spans()) == 1
    assert torch.equal(contents(child)[0], before)


def test_stores_die_without_the_garbage_collector():
    gc.disable()
    try:
        store = store_of(10)
        child = store.fork()
        gone = [weakref.ref(store), weakref.ref(child), weakref.ref(store._parts[0].buffer)]
        del store, child
        assert [ref() for ref in gone] == [None] * 3
    finally:
        gc.enable()


def test_refused_address_space_leaves_the_store_as_it_was(monkeypatch):
    store = store_of(90)
    before = tuple(part.clone() for part in contents(store))

    def refuse(nbytes):
        raise CapacityError.at("address space", "refused", "")

    monkeypatch.setattr("kvcompile.runtime.growable.reserve", refuse)
    with pytest.raises(CapacityError, match="refused"):
        append(store, 20)
    assert same(contents(store), before)


def test_an_interrupted_copy_appends_nothing_and_its_memory_is_given_back(monkeypatch):
    store = store_of(3)
    held = contents(store)
    with monkeypatch.context() as patch:

        def interrupted(target, source):
            raise KeyboardInterrupt

        patch.setattr(torch.Tensor, "copy_", interrupted)
        with pytest.raises(KeyboardInterrupt):
            append(store, 50)
    assert store.tokens == 3
    assert all(torch.equal(one, two) for one, two in zip(contents(store), held, strict=True))
    assert store._parts[0].buffer.written == 3  # taken back at once
    store.rollback(1)
    assert store._parts[0].buffer.written == 2


def test_huge_pages_change_no_token_and_no_count():
    store = GrowableStore(2, 64, 64, torch.float32, 16384)
    generator = torch.Generator().manual_seed(1)
    key, value = (torch.randn(2, 16384 + 9000, 64, generator=generator) for _ in range(2))
    store.append(key[:, :16384], value[:, :16384])  # a full buffer, and one in part
    store.append(key[:, 16384:], value[:, 16384:])
    child, bytes_before = store.fork(), store.nbytes()
    store.use_huge_pages()
    child.use_huge_pages()  # its parent's memory is not its own to move
    assert store.nbytes() == bytes_before
    for each in (store, child):
        assert torch.cat([span.key_HTD for span in each.spans()], 1).equal(key)
        assert torch.cat([span.value_HTE for span in each.spans()], 1).equal(value)
    store.rollback(20000)
    store.append(key[:, 5384:], value[:, 5384:])
    assert torch.cat([span.key_HTD for span in store.spans()], 1).equal(key)
    assert torch.cat([span.key_HTD for span in child.spans()], 1).equal(key)
