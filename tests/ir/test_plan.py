"""The plan's bytes are formulas over KV heads; a session's measured bytes are compared with them in test_compile.py."""

from __future__ import annotations

import pytest

from kvcompile.ir.plan import ConvolutionPlan, HeadGroup, Plan, SitePlan
from kvcompile.ir.policy import All, HeadPolicy, SinkRecent, Static, Store, TopK
from kvcompile.ir.sites import AttentionSite, ConvolutionSite

SITE = AttentionSite(0, "layers.0", query_heads=9, kv_heads=3, head_dim=64, value_dim=32, scale=0.125, dtype="bfloat16")
FULL = HeadPolicy("full", (All(),))
STREAMING = HeadPolicy("streaming", (SinkRecent(16, 256),), rollback_tokens=8)


def site(*groups: HeadGroup) -> SitePlan:
    return SitePlan(SITE, groups)


def test_a_token_costs_keys_and_values_of_its_kv_heads_only():
    """Trap 11: 3 KV heads, not 9 query heads."""
    plan = site(HeadGroup((0, 1, 2), FULL))
    assert plan.stored_bytes(1000) == plan.read_bytes(1000) == plan.full_bytes(1000) == 1000 * 3 * (64 + 32) * 2


@pytest.mark.parametrize(("context", "stored", "read"), [(0, 0, 0), (1, 1, 1), (272, 272, 272), (276, 276, 272), (8192, 280, 272)])
def test_a_ring_stops_growing_and_holds_what_a_rollback_needs(context, stored, read):
    plan, token = site(HeadGroup((0, 1, 2), STREAMING)), 3 * (64 + 32) * 2
    assert (plan.stored_bytes(context), plan.read_bytes(context)) == (stored * token, read * token)


@pytest.mark.parametrize(
    ("select", "k", "context", "read"),
    [
        ("union", 50, 8192, 8192 - 7840 + 3 * 50),  # 352 are sinks, window, and what waits for a whole block
        ("per_query_head", 0.01, 8192, 8192 - 7840 + 3 * 82),
        ("sum", 50, 8192, 8192 - 7840 + 50),
        ("max", 9000, 8192, 8192),  # everything is chosen
        ("union", 50, 863, 863),  # too short for an index
        ("union", 50, 864, 864 - 512 + 3 * 50),
    ],
)
def test_a_policy_that_looks_keys_up_reads_window_scan_and_chosen_keys(select, k, context, read):
    policy = HeadPolicy("lookup", (SinkRecent(64, 256), TopK(k, "sketch", select=select, tail=True)))
    indexed = (context - 352) // 32 * 32 if read < context else 0
    mean = (32 + 4) / 32
    scanned = 0.25 * (16 + mean) + (8 + 4) / 32 + mean / 16  # codes and means of a quarter, every run's centre, means of 16 runs
    search = 4 * 64 + 4 * 32 * 64 + 4 * 16 * (4 + 2) + 40 if indexed else 0  # centre, map, steps, gaps
    expected = 3 * (read * (64 + 32) * 2 + indexed * scanned + search)
    assert site(HeadGroup((0, 1, 2), policy)).read_bytes(context) == pytest.approx(expected, abs=3)


def test_a_policy_that_looks_keys_up_keeps_everything_its_index_and_a_sample_of_queries():
    plan = site(HeadGroup((0, 1, 2), HeadPolicy("lookup", (SinkRecent(64, 256), TopK(50, "sketch")))))
    mean = (32 + 4) / 32
    search = 4 * 64 + 4 * 32 * 64 + 4 * 16 * (4 + 2) + 40
    basis = 4 * (64 * 64 + 24 * (64 + 32) + 32) + 8 + 4 + search
    sample = 4 * 64 * (64 + 64 * 3)
    held = 16 + 4 + mean + (8 + 4) / 32 + mean / 16
    assert plan.stored_bytes(8192) == pytest.approx(3 * (8192 * (64 + 32) * 2 + 7872 * held + basis + sample), abs=3)
    assert plan.stored_bytes(0) == 3 * 4 * 64 * 64


@pytest.mark.parametrize(("context", "stored"), [(336, 336), (337, 337), (384, 384), (385, 328 + 64), (8192, 328 + 64)])
def test_chosen_keys_stand_beside_the_ring(context, stored):
    policy = HeadPolicy("vertical", (SinkRecent(64, 256), Static(64)), rollback_tokens=8)
    plan, token = site(HeadGroup((0, 1, 2), policy)), 3 * (64 + 32) * 2
    sample = 3 * 4 * 64 * (64 + min(64, -(-context // 16)) * 3)
    assert plan.stored_bytes(context) == stored * token + sample


def test_groups_add_up_and_full_bytes_ignore_policies():
    plan = Plan((site(HeadGroup((0, 2), STREAMING), HeadGroup((1,), FULL)),) * 2, weight_bytes=7)
    token = (64 + 32) * 2
    assert plan.stored_bytes(8192) == 2 * token * (2 * 280 + 8192)
    assert plan.read_bytes(8192) == 2 * token * (2 * 272 + 8192)
    assert plan.full_bytes(8192) == 2 * token * 3 * 8192


def test_a_store_of_another_dtype_costs_its_own_bytes():
    group = HeadGroup((0, 1, 2), HeadPolicy("wide", (All(),), store=Store("float32")))
    assert group.bytes_per_token(SITE) == 3 * (64 + 32) * 4
    assert site(group).full_bytes(10) == 10 * 3 * (64 + 32) * 2


def test_every_kv_head_is_in_exactly_one_group():
    for groups in ([HeadGroup((0, 1), FULL)], [HeadGroup((0, 1), FULL), HeadGroup((1, 2), FULL)]):
        with pytest.raises(AssertionError, match=r"layers\.0: KV heads covered"):
            site(*groups)


@pytest.mark.parametrize(
    ("context", "stored", "read", "full"), [(0, 0, 0, 0), (1, 1, 1, 1), (3, 3, 3, 3), (5, 5, 3, 3), (8, 8, 3, 3), (8192, 8, 3, 3)]
)
def test_a_convolution_costs_its_last_inputs_however_long_the_context(context, stored, read, full):
    """4 taps look back 3 inputs; 5 more are kept for a rollback, which a plain cache does not have."""
    state = ConvolutionPlan(ConvolutionSite(0, "layers.1.conv", channels=64, taps=4, dtype="bfloat16"), rollback_tokens=5)
    token = 64 * 2
    assert (state.stored_bytes(context), state.read_bytes(context)) == (stored * token, read * token)
    plan, without = (Plan((site(HeadGroup((0, 1, 2), FULL)),), convolutions=each) for each in ((state, state), ()))
    for name, columns in (("stored_bytes", stored), ("read_bytes", read), ("full_bytes", full)):
        assert getattr(plan, name)(context) == getattr(without, name)(context) + 2 * columns * token


def test_a_filter_of_one_tap_keeps_nothing():
    state = ConvolutionPlan(ConvolutionSite(0, "conv", channels=64, taps=1, dtype="bfloat16"), rollback_tokens=5)
    assert state.stored_bytes(100) == state.read_bytes(100) == 0
