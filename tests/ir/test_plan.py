"""The plan's bytes are formulas over KV heads; a session's measured bytes are compared with them in test_compile.py."""

from __future__ import annotations

import pytest

from kvcompile.ir.plan import ConvolutionPlan, HeadGroup, Plan, SitePlan, zone_read_tokens, zone_stored_tokens
from kvcompile.ir.policy import All, HeadPolicy, SinkRecent, Store
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
    assert zone_stored_tokens(SinkRecent(16, 256), context, rollback_tokens=8) == stored
    assert zone_read_tokens(SinkRecent(16, 256), context) == read


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
