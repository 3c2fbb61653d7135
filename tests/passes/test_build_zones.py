from __future__ import annotations

from dataclasses import replace

import pytest
import toys
from units import after, before, learnt, texts

from kvcompile.ir.plan import PlannedPrefix
from kvcompile.ir.policy import SinkRecent
from kvcompile.ir.show import difference
from kvcompile.passes.build_zones import BuildZones

RULES = [{"policy": "short"}, {"policy": "full", "layers": 0, "kv_heads": 1}, {"policy": "full", "layers": 2}]


def test_heads_with_equal_policies_form_a_group(golden):
    golden("build_zones", learnt("build_zones", toys.gated(), heads=RULES))


def test_the_graph_is_not_touched():
    assert difference(*texts("build_zones", toys.gated(), heads=RULES)) == ""


def test_a_group_may_be_of_heads_that_do_not_stand_together():
    rules = [{"policy": "short", "kv_heads": [0, 2]}]
    unit = after("build_zones", toys.llama(layers=1, query_heads=4, kv_heads=4), heads=rules)
    assert [group.kv_heads for group in unit.plan.sites[0].groups] == [(0, 2), (1, 3)]


def test_a_models_own_window_wins_and_is_told():
    unit = after("build_zones", toys.gemma2(), heads=[{"policy": "short", "kv_heads": 0}])
    sliding, full = unit.plan.sites
    assert [group.policy.zones for group in sliding.groups] == [(SinkRecent(0, 8),)] * len(sliding.groups)
    assert {group.policy.name for group in sliding.groups} == {"window 8"}
    assert [group.policy.name for group in full.groups] == ["short", "full"]
    assert unit.plan.notes == ("1 layers keep the model's own window or chunk whatever the policy",)


@pytest.mark.parametrize(("tied", "factor"), [(False, 2), (True, 1)])
def test_weights_are_counted_once(tied, factor):
    model = toys.llama(layers=1, tie_word_embeddings=tied)
    rest = sum(weight.numel() for name, weight in model.named_parameters() if "embed" not in name and "lm_head" not in name)
    rotary = model.model.rotary_emb.inv_freq.numel()
    assert after("build_zones", model).plan.weight_bytes == 4 * (rest + rotary + factor * 256 * 64)


def test_convolutions_keep_as_many_inputs_more_as_the_longest_rollback():
    rules = [{"policy": "back", "kv_heads": 0}]
    back = {"back": {"zones": [{"sink_recent": {"sink_tokens": 2, "recent_tokens": 4}}], "rollback": 5}}
    plan = after("build_zones", toys.lfm2("cac"), policies=back, heads=rules).plan
    assert [(each.site.path, each.kept_tokens) for each in plan.convolutions] == [("model.layers.0.conv", 8), ("model.layers.2.conv", 8)]
    assert [each.kept_tokens for each in after("build_zones", toys.lfm2("cac")).plan.convolutions] == [3, 3]
    assert after("build_zones", toys.gated()).plan.convolutions == ()


@pytest.mark.parametrize("relay", ["off", "auto", "always"])
def test_the_plan_carries_relay_and_prefixes(relay):
    unit = replace(before("build_zones", toys.gated(inner=(16,)), prefix={"relay": relay}), prefixes=(PlannedPrefix("a", (1, 2)),))
    plan = BuildZones().run(unit).plan
    assert (plan.relay, plan.prefixes) == (relay, unit.prefixes)
