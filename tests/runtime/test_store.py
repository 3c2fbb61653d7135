"""Random extend, rollback, fork and drop on both stores, against a plain list of tensors."""

import random

import pytest
import torch

from kvcompile.runtime.growable import GrowableStore
from kvcompile.runtime.ring import RingStore
from kvcompile.runtime.store import KVStore

HEADS, HEAD_DIM, VALUE_DIM = 2, 8, 12


class Naive:
    """All tokens as they were given, and which position each slot of a ring was written for last."""

    def __init__(self, key, value, slots):
        self.key, self.value, self.slots = key, value, dict(slots)

    @property
    def tokens(self):
        return self.key.shape[1]


def new_naive():
    return Naive(torch.empty(HEADS, 0, HEAD_DIM), torch.empty(HEADS, 0, VALUE_DIM), {})


def sees(p, sink, recent):
    return [j for j in range(p + 1) if recent is None or j < sink or j > p - recent]


def extend(store: KVStore, naive, new, sink, recent, window):
    key, value = torch.randn(HEADS, new, HEAD_DIM), torch.randn(HEADS, new, VALUE_DIM)
    first = naive.tokens
    naive.key, naive.value = torch.cat([naive.key, key], 1), torch.cat([naive.value, value], 1)
    spans = store.extend(key, value)
    assert store.tokens == naive.tokens
    at, held = 0, set()
    for span in spans:
        assert at <= span.first < span.end
        at = span.end
        held |= set(range(span.first, span.end))
        assert torch.equal(span.key_HTD, naive.key[:, span.first : span.end])
        assert torch.equal(span.value_HTE, naive.value[:, span.first : span.end])
    for p in range(first, naive.tokens):
        assert held.issuperset(sees(p, sink, recent))
        naive.slots[p if window is None or p < sink else sink + (p - sink) % window] = p


def may_roll_back(naive, taken, sink, recent, window):
    keep = naive.tokens - taken
    needed = [j for j in sees(keep, sink, recent) if j < keep]
    return all(naive.slots[j if window is None or j < sink else sink + (j - sink) % window] == j for j in needed)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("shape", [None, (0, 5, 0), (3, 6, 4), (2, 1, 0), (5, 9, 20), (10, 3, 1)])
def test_random_histories_equal_a_list_of_tensors(shape, seed):
    chance = random.Random(seed)
    torch.manual_seed(seed)
    first: KVStore
    if shape is None:
        sink, recent, window = 0, None, None
        first = GrowableStore(HEADS, HEAD_DIM, VALUE_DIM, torch.float32, chance.choice([1, 7, 40, 1000]))
    else:
        sink, recent, rollback = shape
        window = recent + rollback
        first = RingStore(HEADS, HEAD_DIM, VALUE_DIM, torch.float32, sink, recent, rollback)
    family = [(first, new_naive())]
    refused = 0
    for _ in range(150):
        store, naive = chance.choice(family)
        match chance.choice(["step", "step", "chunk", "rollback", "rollback", "fork", "drop"]):
            case "step":
                extend(store, naive, 1, sink, recent, window)
            case "chunk":
                extend(store, naive, chance.randint(0, 25), sink, recent, window)
            case "rollback":
                taken = chance.choice([chance.randint(0, 4), chance.randint(0, 30), naive.tokens])
                possible = 0 <= taken <= naive.tokens and may_roll_back(naive, taken, sink, recent, window)
                assert (store.can_rollback(taken) is None) == possible, (taken, naive.tokens)
                refused += not possible
                if possible:
                    store.rollback(taken)
                    keep = naive.tokens - taken
                    naive.key, naive.value = naive.key[:, :keep], naive.value[:, :keep]
            case "fork" if len(family) < 5:
                family.append((store.fork(), Naive(naive.key, naive.value, naive.slots)))
            case "drop" if len(family) > 1:
                family.remove((store, naive))
        for other, truth in family:
            assert other.tokens == truth.tokens
            if isinstance(other, GrowableStore):
                assert other.nbytes() + other.shared_nbytes() == truth.tokens * HEADS * (HEAD_DIM + VALUE_DIM) * 4
                for span in other.spans():
                    assert torch.equal(span.key_HTD, truth.key[:, span.first : span.end])
                    assert torch.equal(span.value_HTE, truth.value[:, span.first : span.end])
    assert refused
