"""A convolution's state against the oracle, however the tokens come; forked, rolled back, packed with other sessions'."""

from __future__ import annotations

import pytest
import torch

from kvcompile.ir.errors import SessionError
from kvcompile.ir.plan import ConvolutionPlan
from kvcompile.ir.sites import ConvolutionSite
from kvcompile.runtime.convolution_state import ConvolutionState, convolve_packed
from kvcompile.runtime.reference_convolution import convolve

CHANNELS = 6


def plan(taps: int = 4, rollback_tokens: int = 0, dtype: str = "float32") -> ConvolutionPlan:
    return ConvolutionPlan(ConvolutionSite(0, "conv", CHANNELS, taps, dtype), rollback_tokens)


def given(tokens: int, taps: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((CHANNELS, tokens), (CHANNELS, taps), (CHANNELS,))
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)  # type: ignore[return-value]


def read(state, x_CT, weight, bias, chunk):
    parts = []
    for part in x_CT.split(chunk, dim=1):
        out, (state,) = convolve_packed([state], [part.shape[1]], part[None], weight, bias, last_only=False)
        parts.append(out[0])
    return torch.cat(parts, 1), state


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("chunk", [1, 3, 7, 64])
@pytest.mark.parametrize("rollback", [0, 5])
def test_any_chunks_give_what_the_oracle_says(taps, chunk, rollback):
    """Trap 5; equal chunks or not, the bits are the same."""
    x, weight, bias = given(40, taps)
    out, state = read(ConvolutionState.empty(plan(taps, rollback)), x, weight, bias, chunk)
    torch.testing.assert_close(out.double(), convolve(x, weight, bias), rtol=0, atol=1e-5)
    whole, after = read(ConvolutionState.empty(plan(taps, rollback)), x, weight, bias, 40)
    assert torch.equal(out, whole) and torch.equal(state.inputs_CK, after.inputs_CK)
    assert state.tokens == after.tokens == 40


def test_only_the_inputs_that_the_plan_counts_are_kept():
    for rollback in (0, 5):
        state = ConvolutionState.empty(plan(4, rollback))
        assert state.nbytes() == 0
        for tokens in range(1, 20):
            state = state.extended(torch.randn(CHANNELS, 1))
            assert state.nbytes() == state.plan.stored_bytes(tokens) == CHANNELS * 4 * min(tokens, 3 + rollback)
        assert state.inputs_CK.untyped_storage().nbytes() == state.nbytes(), "a view of something larger"
    assert ConvolutionState.empty(plan(1, 5)).extended(torch.randn(CHANNELS, 9)).nbytes() == 0


@pytest.mark.parametrize("rollback", [0, 1, 5])
@pytest.mark.parametrize("tokens", [1, 3, 12])
def test_a_rollback_equals_never_having_read(rollback, tokens):
    """Trap 28: within the promise; beyond it only to the start."""
    x, weight, bias = given(tokens)
    _, state = read(ConvolutionState.empty(plan(4, rollback)), x, weight, bias, 2)
    for back in range(tokens + 1):
        if back > rollback and back < tokens:
            assert state.can_rollback(back) is not None
            continue
        assert state.can_rollback(back) is None
        earlier = state.rolled_back(back)
        assert earlier.tokens == tokens - back
        more, _, _ = given(6, seed=9)
        expected = convolve(torch.cat([x[:, : tokens - back], more], 1), weight, bias)[:, tokens - back :]
        torch.testing.assert_close(read(earlier, more, weight, bias, 2)[0].double(), expected, rtol=0, atol=1e-5)


def test_rollbacks_add_up_to_the_promise_and_no_further():
    x, weight, bias = given(30)
    _, state = read(ConvolutionState.empty(plan(4, 5)), x, weight, bias, 30)
    state = state.rolled_back(2).rolled_back(3)
    with pytest.raises(SessionError) as caught:
        state.rolled_back(2)
    assert str(caught.value) == (
        "rollback(2): a convolution of 4 taps that has read 25 tokens can take back 0 of them, not 2: the inputs that they would see "
        "are no longer kept.\n"
        "  Write `rollback: 7` in a policy of the model, which keeps as many inputs more, or fork the session before the tokens that "
        "may be taken back."
    )


@pytest.mark.parametrize("tokens", [-1, 31])
def test_a_rollback_beyond_the_start_is_refused(tokens):
    x, weight, bias = given(30)
    _, state = read(ConvolutionState.empty(plan()), x, weight, bias, 30)
    with pytest.raises(SessionError, match="the session has 30 tokens"):
        state.rolled_back(tokens)


def test_one_tap_needs_nothing_and_rolls_back_to_any_length():
    x, weight, bias = given(30, taps=1)
    _, state = read(ConvolutionState.empty(plan(1)), x, weight, bias, 30)
    assert state.rolled_back(17).tokens == 13 and state.inputs_CK.shape == (CHANNELS, 0)


def test_a_state_is_not_changed_by_those_made_from_it():
    x, weight, bias = given(20)
    _, state = read(ConvolutionState.empty(plan(4, 3)), x, weight, bias, 20)
    kept = state.inputs_CK.clone()
    read(state, x, weight, bias, 3)
    read(state.rolled_back(2), x, weight, bias, 1)
    assert torch.equal(state.inputs_CK, kept) and state.tokens == 20


@pytest.mark.parametrize("last_only", [True, False])
def test_packed_sessions_are_kept_apart(last_only):
    """Traps 13, 14: ragged, one of them new, one with a single token."""
    _, weight, bias = given(1)
    past, now = [5, 0, 9], [3, 4, 1]
    texts = [given(one + two, seed=seed)[0] for seed, (one, two) in enumerate(zip(past, now, strict=True))]
    states = [ConvolutionState.empty(plan()) for _ in texts]
    states = [state.extended(text[:, :length]) if length else state for state, text, length in zip(states, texts, past, strict=True)]
    packed = torch.cat([text[:, length:] for text, length in zip(texts, past, strict=True)], 1)[None]
    out, after = convolve_packed(states, now, packed, weight, bias, last_only)
    expected = [convolve(text, weight, bias)[:, -1 if last_only else length :] for text, length in zip(texts, past, strict=True)]
    torch.testing.assert_close(out[0].double(), torch.cat(expected, 1), rtol=0, atol=1e-5)
    assert all(torch.equal(state.inputs_CK, text[:, -3:]) for state, text in zip(after, texts, strict=True))


def test_half_precision_inputs_are_kept_as_they_are():
    x, weight, bias = (each.bfloat16() for each in given(20))
    out, state = read(ConvolutionState.empty(plan(dtype="bfloat16")), x, weight, bias, 3)
    assert out.dtype == state.inputs_CK.dtype == torch.bfloat16
    assert torch.equal(out, convolve(x, weight, bias).float().bfloat16())
