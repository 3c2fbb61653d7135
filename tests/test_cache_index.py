"""Positions in the cache and positions in the text, beyond overflow: sessions against StreamingLLM run by the model's own modules."""

from __future__ import annotations

import functools

import pytest
import torch
from streaming import ROTARY, longrope_model, rotary_model, streaming_logits
from units import some_ids

import kvcompile
from kvcompile.diagnose import original_logits
from kvcompile.runtime.model import CompiledModel

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_cache")]  # every test traces and verifies a model
SINKS, RECENT, TOKENS = 3, 9, 40
ZONE = {"sink_recent": {"sink_tokens": SINKS, "recent_tokens": RECENT}}


@functools.cache
def model(name: str):
    return rotary_model(name)


@functools.cache
def compiled(name: str, positions: str, kernels: str = "torch", kv_head: int | None = None) -> CompiledModel:
    """kv_head: the one that streams; None: all."""
    spec = {
        "kvcompile": 1,
        "target": {"kernels": kernels, "segments": "eager"},
        "policies": {"mine": {"zones": [ZONE], "positions": positions}},
        "heads": [{"policy": "mine", **({} if kv_head is None else {"kv_heads": kv_head})}],
        "verify": {"tokens": 16},
    }
    return kvcompile.compile(model(name), spec=spec)


def difference(one: torch.Tensor, two: torch.Tensor) -> float:
    """Of the largest logit."""
    return float((one - two).abs().max() / two.abs().max())


@pytest.mark.parametrize("name", ROTARY)
@pytest.mark.parametrize("positions", ["absolute", "cache_index"])
def test_sessions_agree_with_streaming_by_the_models_own_modules(name, positions):
    """Traps 9 and 10: both modes beyond overflow, and they are two."""
    ids = some_ids(TOKENS, 256)
    expected = {mode: streaming_logits(model(name), ids, SINKS, RECENT, mode) for mode in ("absolute", "cache_index")}
    logits = compiled(name, positions).session().prefill(ids, logits="all")
    assert difference(logits, expected.pop(positions)) < 1e-5
    (other,) = expected.values()
    assert difference(logits, other) > 1e-3
    assert difference(logits[: SINKS + RECENT], other[: SINKS + RECENT]) < 1e-5  # nothing was dropped yet


@pytest.mark.parametrize("kernels", ["torch", "generated"])
def test_steps_chunks_and_one_prefill_agree(kernels):
    ids = some_ids(TOKENS, 256)
    expected = streaming_logits(model("llama"), ids, SINKS, RECENT, "cache_index")
    sessions = [compiled("llama", "cache_index", kernels).session() for _ in range(3)]
    whole = sessions[0].prefill(ids, logits="all")
    chunks = torch.cat([sessions[1].prefill(part, logits="all") for part in ids.split(7)])
    steps = torch.stack([sessions[2].step(int(token)) for token in ids])
    for found in (whole, chunks, steps):
        assert difference(found, expected) < 1e-5


@pytest.mark.parametrize("kernels", ["torch", "generated"])
def test_below_overflow_it_is_the_original(kernels):
    ids = some_ids(SINKS + RECENT, 256)
    logits = compiled("llama", "cache_index", kernels).session().prefill(ids, logits="all")
    assert difference(logits, original_logits(model("llama"), ids)) < 1e-5


@pytest.mark.parametrize("kernels", ["torch", "generated"])
@pytest.mark.parametrize("positions", ["absolute", "cache_index"])
def test_a_streaming_head_beside_a_full_one(positions, kernels):
    ids = some_ids(TOKENS, 256)
    logits = compiled("llama", positions, kernels, kv_head=1).session().prefill(ids, logits="all")
    expected = {mode: streaming_logits(model("llama"), ids, SINKS, RECENT, mode, kv_head=1) for mode in ("absolute", "cache_index")}
    assert difference(logits, expected.pop(positions)) < 1e-5
    assert difference(logits, *expected.values()) > 1e-3


def test_a_fork_and_a_rollback_keep_their_place_in_the_cache():
    ids = some_ids(TOKENS, 256)
    session = compiled("llama", "cache_index").session()
    expected = session.prefill(ids, logits="all")[-1]
    other = compiled("llama", "cache_index").session()
    other.prefill(ids[:-1])
    fork = other.fork()
    assert torch.equal(fork.step(int(ids[-1])), other.step(int(ids[-1])))
    assert difference(fork.prefill(ids[:1]), session.prefill(ids[:1])) < 1e-5
    assert difference(expected, original_logits(model("llama"), ids)[-1]) > 1e-3


def test_the_plan_tells_the_positions():
    plan = compiled("llama", "cache_index").explain()
    assert "2 mine (sink 3 + recent 9, positions cache_index)" in plan
    notes = compiled("a layer without positions", "cache_index").plan.notes
    assert notes == ("positions: cache_index changes nothing in 1 layers without rotary positions",)


# --- frequencies chosen by the length of a call ----------------------------------------------------------------------------------------


@functools.cache
def longrope(context: int = 256) -> tuple[torch.nn.Module, CompiledModel]:
    original = longrope_model(context)
    target = {"kernels": "torch", "segments": "eager"}
    return original, kvcompile.compile(original, spec={"kvcompile": 1, "target": target, "verify": {"tokens": 40}})


def test_a_long_session_does_not_change_a_short_one():
    """Trap 37."""
    _, ours = longrope()
    long, short, alone = ours.session(), ours.session(), ours.session()
    long.prefill(some_ids(120, 256))
    short.prefill(some_ids(20, 256, seed=1))
    alone.prefill(some_ids(20, 256, seed=1))
    assert difference(ours.step([long, short], [5, 6])[1], alone.step(6)) < 1e-5


def test_steps_and_one_prefill_choose_the_same_frequencies():
    _, ours = longrope()
    ids = some_ids(90, 256)
    session = ours.session()
    steps = torch.stack([session.step(int(token)) for token in ids])
    assert difference(steps, ours.session().prefill(ids, logits="all")) < 1e-5


def test_beyond_the_first_training_it_is_the_original_and_below_it_the_original_at_its_full_context():
    original, ours = longrope()
    long, short = some_ids(120, 256), some_ids(40, 256)
    assert difference(ours.session().prefill(long, logits="all"), original_logits(original, long)) < 1e-5
    found = ours.session().prefill(short, logits="all")
    assert difference(found, original_logits(original, short, 256)) < 1e-5
    assert difference(found, original_logits(original, short)) > 1e-3
    assert ours.verification.full.max_logit_difference < 1e-4
    (warning,) = ours.warnings
    assert "those of the declared context, 256 tokens" in warning


def test_a_context_within_the_first_training_keeps_its_frequencies():
    original, ours = longrope(64)
    ids = some_ids(40, 256)
    assert difference(ours.session().prefill(ids, logits="all"), original_logits(original, ids)) < 1e-5


def test_a_trace_leaves_the_model_as_it_was():
    """torch.export leaves fake tensors where a forward keeps tensors in attributes of its own."""
    original = longrope_model()
    ids = some_ids(40, 256)
    kvcompile.trace(original)
    after = original_logits(original, ids, 256)
    assert difference(after, original_logits(longrope_model(), ids, 256)) == 0
