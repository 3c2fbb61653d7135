"""Traps 1 (base of the logarithm), 2 (empty sides), 3 (layout of lse), 4 (overflow)."""

import math

import pytest
import torch

from kvcompile.runtime import reference
from kvcompile.runtime.merge import AttentionState, apply_learnt_sinks, merge_all, merge_states


def attend_everything(query, key, value, dtype=torch.float32):
    visible = torch.ones(query.shape[2], key.shape[1], dtype=torch.bool)
    state = reference.attend(query, key, value, visible, scale=query.shape[-1] ** -0.5)
    return AttentionState(state.out.to(dtype), state.lse.to(dtype))


def problem(kv_heads, queries_per_kv, new, tokens, size=1.0):
    torch.manual_seed(kv_heads * 1000 + queries_per_kv * 100 + new)
    query = torch.randn(kv_heads, queries_per_kv, new, 16) * size
    return query, torch.randn(kv_heads, tokens, 16), torch.randn(kv_heads, tokens, 24)


@pytest.mark.parametrize("queries_per_kv", [1, 3, 4, 7, 8])
@pytest.mark.parametrize("new", [1, 2, 8])
def test_merged_parts_equal_one_softmax_lse_included(queries_per_kv, new):
    query, key, value = problem(2, queries_per_kv, new, 50)
    whole = attend_everything(query, key, value, torch.float64)
    parts = [attend_everything(query, key[:, a:b], value[:, a:b]) for a, b in ((0, 1), (1, 30), (30, 50))]
    merged = merge_states(merge_states(parts[0], parts[1]), parts[2])
    assert merged.out.dtype == merged.lse.dtype == torch.float32
    torch.testing.assert_close(merged.out.double(), whole.out, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(merged.lse.double(), whole.lse, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(merge_all(parts), merged, rtol=1e-6, atol=1e-6)


def test_the_logarithm_is_natural():
    one = AttentionState(torch.zeros(1, 4), torch.zeros(1))
    merged = merge_states(one, one)
    assert merged.lse.item() == pytest.approx(math.log(2))
    assert merge_states(merged, one).lse.item() == pytest.approx(math.log(3))


def test_merging_is_associative_to_rounding():
    torch.manual_seed(0)
    a, b, c = (AttentionState(torch.randn(5, 8), torch.randn(5) * 10) for _ in range(3))
    left, right = merge_states(merge_states(a, b), c), merge_states(a, merge_states(b, c))
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


def test_an_empty_side_changes_nothing():
    torch.manual_seed(0)
    state = AttentionState(torch.randn(2, 3, 8), torch.randn(2, 3) * 50)
    empty = AttentionState(torch.zeros(2, 3, 8), torch.full((2, 3), -torch.inf))
    for merged in (merge_states(state, empty), merge_states(empty, state)):
        assert torch.equal(merged.out, state.out)
        assert torch.equal(merged.lse, state.lse)


def test_two_empty_sides_are_empty_and_not_nan():
    empty = AttentionState(torch.zeros(2, 8), torch.full((2,), -torch.inf))
    for merged in (merge_states(empty, empty), reference.merge((empty, empty))):
        assert torch.equal(merged.out, torch.zeros(2, 8).to(merged.out.dtype))
        assert torch.equal(merged.lse, torch.full((2,), -torch.inf).to(merged.lse.dtype))


def test_rows_that_are_empty_stand_beside_rows_that_are_not():
    first = AttentionState(torch.tensor([[1.0], [0.0]]), torch.tensor([5.0, -torch.inf]))
    second = AttentionState(torch.zeros(2, 1), torch.full((2,), -torch.inf))
    merged = merge_states(first, second)
    assert merged.out.tolist() == [[1.0], [0.0]]
    assert merged.lse.tolist() == [5.0, -torch.inf]


@pytest.mark.parametrize("lse", [(200.0, 200.0), (200.0, -200.0), (-200.0, -200.0), (-200.0, 200.0), (3e4, -3e4)])
def test_large_logits_neither_overflow_nor_vanish(lse):
    states = [AttentionState(torch.tensor([[float(i + 1)]]), torch.tensor([value])) for i, value in enumerate(lse)]
    merged, right = merge_all(states), reference.merge(states)
    torch.testing.assert_close(merged.out.double(), right.out, rtol=1e-6, atol=0)
    torch.testing.assert_close(merged.lse.double(), right.lse, rtol=1e-6, atol=0)


def test_one_state_is_itself_and_none_is_our_mistake():
    state = AttentionState(torch.randn(2, 8), torch.randn(2))
    assert torch.equal(merge_all([state]).out, state.out)
    with pytest.raises(AssertionError, match="merging no state"):
        merge_all([])


def test_the_result_is_float32_or_float64():
    low = AttentionState(torch.randn(2, 8).bfloat16(), torch.randn(2))
    double = AttentionState(torch.randn(2, 8).double(), torch.randn(2).double())
    assert merge_states(low, low).out.dtype == torch.float32
    assert merge_states(low, double).out.dtype == merge_states(low, double).lse.dtype == torch.float64


@pytest.mark.parametrize("queries_per_kv", [1, 3])
def test_learnt_sinks_take_weight_and_give_no_value(queries_per_kv):
    query, key, value = problem(2, queries_per_kv, 4, 20)
    sinks = torch.randn(2, queries_per_kv) * 3
    state = attend_everything(query, key, value, torch.float64)
    right = reference.apply_learnt_sinks(state, sinks)
    logits = torch.cat([query.double() @ key.double()[:, None].mT / 4, sinks.double()[..., None, None].expand(-1, -1, 4, 1)], -1)
    weights = torch.softmax(logits, -1)[..., :-1]
    torch.testing.assert_close(right.out, weights @ value.double()[:, None], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(right.lse, torch.logsumexp(logits, -1), rtol=1e-12, atol=1e-12)
    low = apply_learnt_sinks(attend_everything(query, key, value), sinks)
    torch.testing.assert_close(low.out.double(), right.out, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(low.lse.double(), right.lse, rtol=1e-6, atol=1e-6)


def test_a_learnt_sink_of_an_empty_zone_is_the_whole_softmax():
    empty = AttentionState(torch.zeros(1, 2, 3, 8), torch.full((1, 2, 3), -torch.inf))
    sinks = torch.tensor([[1.5, -2.0]])
    for apply in (apply_learnt_sinks, reference.apply_learnt_sinks):
        state = apply(empty, sinks)
        assert not state.out.any()
        assert state.lse[0, :, 0].tolist() == [1.5, -2.0]
