from __future__ import annotations

from dataclasses import replace

import pytest
import toys
from units import after, before, learnt, spec, texts

from kvcompile.ir.errors import SpecError
from kvcompile.ir.policy import All, HeadPolicy, SinkRecent
from kvcompile.ir.show import difference
from kvcompile.ir.spec import HeadRule, Pattern, Spec
from kvcompile.passes.assign_policies import AssignPolicies

SHORT = HeadPolicy("short", (SinkRecent(2, 4),))
FULL = HeadPolicy("full", (All(),))


@pytest.fixture(scope="module")
def three_layers():
    """A unit of 3 layers of 2 KV heads, up to this pass."""
    return before("assign_policies", toys.llama(layers=3))


def assigned(unit, *rules: HeadRule):
    policies = {"full": FULL, "short": SHORT}
    return AssignPolicies().run(replace(unit, spec=Spec(None, policies, rules)))


def names(unit) -> list[str]:
    return [" ".join(policy.name for policy in site) for site in unit.policies]


def pattern(*scores: tuple[float, ...]) -> Pattern:
    return Pattern("some.yaml", scores)


def test_the_policies_of_each_head(golden):
    heads = [{"policy": "short"}, {"policy": "full", "layers": 0}, {"policy": "full", "layers": 1, "kv_heads": 1}]
    golden("assign_policies", learnt("assign_policies", toys.gated(), heads=heads))


def test_the_graph_is_not_touched():
    assert difference(*texts("assign_policies", toys.gated(), heads=[{"policy": "short"}])) == ""


def test_without_rules_every_head_is_full(three_layers):
    assert names(assigned(three_layers)) == ["full full"] * 3


def test_later_rules_win(three_layers):
    unit = assigned(three_layers, HeadRule("short"), HeadRule("full", layers=(1,)), HeadRule("short", kv_heads=(0,)))
    assert names(unit) == ["short short", "short full", "short short"]


def test_a_full_policy_of_the_spec_is_the_default():
    unit = after("assign_policies", toys.gated(inner=(16,)), policies={"full": {"zones": ["all"], "store": "bfloat16"}})
    assert unit.policies[0][0].store.dtype == "bfloat16"


def test_a_pattern_covers_the_lowest_share_of_the_named_heads(three_layers):
    scores = pattern((0.9, 0.1), (0.2, 0.8), (0.0, 0.0))
    unit = assigned(three_layers, HeadRule("short", pattern=scores, share=0.5))
    assert names(unit) == ["full short", "full full", "short short"]
    unit = assigned(three_layers, HeadRule("short", layers=(0, 1), pattern=scores, share=0.5))
    assert names(unit) == ["full short", "short full", "full full"]


@pytest.mark.parametrize(("share", "expected"), [(0.0, "full full"), (1.0, "short short")])
def test_layers_without_a_full_or_without_a_streaming_head(three_layers, share, expected):
    """Trap 6."""
    unit = assigned(three_layers, HeadRule("short", pattern=pattern(*[(0.5, 0.5)] * 3), share=share))
    assert names(unit) == [expected] * 3


def test_ties_are_decided_alike_on_every_run_and_told(three_layers):
    """Trap 7."""
    rule = HeadRule("short", pattern=pattern(*[(0.5, 0.5)] * 3), share=0.5, where="duo.yaml:9: heads[0]")
    first, second = assigned(three_layers, rule), assigned(three_layers, rule)
    assert names(first) == names(second) == ["short short", "short full", "full full"]
    assert first.warnings == (
        "duo.yaml:9: heads[0]: 6 KV heads score 0.5 where the share ends; 3 of them covered, lowest layers and heads first",
    )


def test_every_wrong_rule_is_named_at_once(three_layers):
    rules = (
        HeadRule("short", layers=(1, 3), where="duo.yaml:7: heads[0]"),
        HeadRule("short", kv_heads=(0, 2), where="duo.yaml:8: heads[1]"),
        HeadRule("short", pattern=pattern((0.1,) * 3), share=0.5, where="duo.yaml:9: heads[2]"),
    )
    with pytest.raises(SpecError) as caught:
        assigned(three_layers, *rules)
    assert str(caught.value).splitlines() == [
        "duo.yaml:7: heads[0].layers: layer 3 does not exist (3 attention layers, 0 to 2).",
        "  Write numbers from 0 to 2, a range such as 0-1, or leave `layers` out.",
        "duo.yaml:8: heads[1].kv_heads: KV head 2 does not exist in model.layers.0.self_attn (2 KV heads, 0 to 1).",
        '  Write numbers from 0 to 1, a range such as 0-1, or "all".',
        "duo.yaml:9: heads[2].pattern: some.yaml scores 1 layers of 3 KV heads; the model has 3 of 2.",
        "  Use a pattern computed for this model.",
    ]


def test_the_spec_helper_gives_a_spec():
    assert spec(heads=[{"policy": "short"}]).policies["short"].zones == (SinkRecent(2, 4),)
