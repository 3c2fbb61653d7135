from __future__ import annotations

import re

import pytest
import torch
import toys
from plain_models import ParallelFused
from streaming import ROTARY, rotary_model
from torch import nn
from units import after, agrees_before_and_after, both, some_ids, texts

from kvcompile.ir.attend_op import ATTEND
from kvcompile.ir.errors import SpecError
from kvcompile.ir.show import difference, unit_text
from kvcompile.passes.rotate_sink_queries import check_shift_invariance

SINKS, RECENT = 2, 4


def policy(sinks: int = SINKS, recent: int = RECENT) -> dict:
    return {"zones": [{"sink_recent": {"sink_tokens": sinks, "recent_tokens": recent}}], "positions": "cache_index"}


ASKED = {"policies": {"mine": policy()}, "heads": [{"policy": "mine"}]}


def queries(graph: torch.fx.GraphModule, ids: torch.Tensor, positions: torch.Tensor) -> dict[int, tuple]:
    """Of each site, the query and what the sinks are shown."""
    found = {}

    class Keep(torch.fx.Interpreter):
        def call_function(self, target, args, kwargs):
            if target is ATTEND:
                found[args[4]] = (args[0], args[10] if len(args) > 10 else None)
            return super().call_function(target, args, kwargs)

    with torch.no_grad():
        Keep(graph).run(ids[None], positions[None])
    return found


def test_the_query_is_rotated_a_second_time(golden):
    """Of a plain module: transformers' versions write the same rotation differently."""
    torch.manual_seed(0)
    golden("rotate_sink_queries", difference(*texts("rotate_sink_queries", ParallelFused(windows=(0,)).eval(), **ASKED)))


def test_before_and_after_agree():
    agrees_before_and_after("rotate_sink_queries", toys.llama(layers=2), 256, **ASKED)


def test_without_cache_index_nothing_is_done():
    sections = {"policies": {"mine": {"zones": policy()["zones"]}}, "heads": [{"policy": "mine"}]}
    assert difference(*texts("rotate_sink_queries", toys.llama(layers=1), **sections)) == ""


@pytest.mark.parametrize("name", ROTARY)
def test_the_sinks_are_shown_the_models_own_rotation_at_the_place_in_the_cache(name):
    """Trap 9: cos and sin come from the model's own graph.  In the first layer nothing but the rotation knows positions."""
    one, two = both("rotate_sink_queries", rotary_model(name), **ASKED)
    ids, positions = some_ids(30, 256), torch.arange(30)
    query, sink_query = queries(two.graph, ids, positions)[0]
    at_cache_index, _ = queries(one.graph, ids, positions.clamp(max=SINKS + RECENT - 1))[0]
    assert torch.equal(sink_query, at_cache_index)
    assert torch.equal(query, queries(one.graph, ids, positions)[0][0])
    assert not torch.allclose(query, sink_query, atol=1e-2)


def test_below_overflow_both_queries_are_one():
    unit = after("rotate_sink_queries", toys.llama(layers=3), **ASKED)
    for query, sink_query in queries(unit.graph, some_ids(6, 256), torch.arange(6)).values():
        assert torch.equal(query, sink_query)


def test_only_what_knows_positions_is_computed_twice():
    one, two = both("rotate_sink_queries", rotary_model("normalised queries"), **ASKED)
    before, now = ([str(node.target) for node in unit.graph.graph.nodes] for unit in (one, two))
    for shared in ("aten.linear.default", "aten.rsqrt.default", "aten.neg.default"):
        assert before.count(shared) == now.count(shared) > 0
    assert now.count("aten.cos.default") == 2 * before.count("aten.cos.default") == 2  # once for all layers


def test_equal_layers_stay_equal_segments():
    def segments(**sections) -> int:
        graph = after("outline_segments", toys.llama(layers=5), **sections).graph.graph
        return len({node.target for node in graph.find_nodes(op="call_module")})

    assert segments(**ASKED) == segments() == 3


def test_layers_of_different_windows_have_a_clamp_each():
    sections = {"policies": {"a": policy(2, 4), "b": policy(2, 8)}, "heads": [{"policy": "a"}, {"policy": "b", "layers": 1}]}
    graph = after("rotate_sink_queries", toys.llama(layers=3), **sections).graph.graph
    clamps = graph.find_nodes(op="call_function", target=torch.ops.aten.clamp.default)
    assert sorted(node.args[2] for node in clamps) == [5, 9]


def test_a_layer_without_positions_or_with_its_own_window_is_left_alone_and_told():
    unit = after("rotate_sink_queries", rotary_model("a layer without positions"), **ASKED)
    assert [plan.groups[0].policy.positions for plan in unit.plan.sites] == ["cache_index", "absolute"]
    assert unit.plan.notes == ("positions: cache_index changes nothing in 1 layers without rotary positions",)
    unit = after("rotate_sink_queries", rotary_model("two thetas"), **ASKED)
    assert [plan.groups[0].policy.positions for plan in unit.plan.sites] == ["cache_index", "absolute"]
    assert unit.plan.notes[1:] == ("positions: cache_index changes nothing in 1 layers that have a window of their own",)
    assert "group 0: KV heads [0, 1] mine (sink 2 + recent 4) positions cache_index" in unit_text(unit)


def test_a_query_that_is_a_product_with_a_rotation_matrix():
    """A product with a pure matrix is a rotation, not a projection."""

    class Turned(toys.Mixed):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(16, 16)

        def forward(self, ids, position_ids):
            x = self.words(ids)
            angle = position_ids[0, :, None].float() * torch.tensor([1.0, 0.1])
            zero = torch.zeros_like(angle)
            rows = [torch.stack(row, -1) for row in ((angle.cos(), zero, -angle.sin(), zero), (zero, zero + 1, zero, zero))]
            rows += [torch.stack(row, -1) for row in ((angle.sin(), zero, angle.cos(), zero), (zero, zero, zero, zero + 1))]
            turn = torch.stack(rows, -2)[:, 0]  # [tokens, 4, 4]
            heads = self.project(x).unflatten(2, (4, 4)).transpose(1, 2)
            turned = (turn @ heads[..., None])[..., 0]
            mixed = nn.functional.scaled_dot_product_attention(turned, turned, heads, is_causal=True)
            return self.head(x + mixed.transpose(1, 2).flatten(2))

    one, two = both("rotate_sink_queries", Turned().eval(), **ASKED)
    ids, positions = some_ids(20, 32), torch.arange(20)
    at_cache_index, _ = queries(one.graph, ids, positions.clamp(max=5))[0]
    assert torch.equal(queries(two.graph, ids, positions)[0][1], at_cache_index)
    check_shift_invariance(after("outline_segments", Turned().eval(), **ASKED))


# --- refusals ------------------------------------------------------------------------------------------------------------------------


def refusal(model: nn.Module, **sections) -> str:
    with pytest.raises(SpecError) as caught:
        after("rotate_sink_queries", model, **sections)
    return str(caught.value)


def test_a_model_without_a_rotation_is_refused():
    assert refusal(toys.nanogpt(), **ASKED) == (
        "<spec>: policies.mine.positions: blocks.0 has no rotary positions, and no other layer has: "
        "there is nothing that cache_index could change.\n  Write positions: absolute."
    )


def test_windows_of_different_sizes_in_one_layer_are_refused():
    rules = [{"policy": "a", "kv_heads": 0}, {"policy": "b", "kv_heads": 1, "layers": 1}]
    text = refusal(toys.llama(layers=2), policies={"a": policy(2, 4), "b": policy(2, 8)}, heads=rules)
    assert "policies.a.positions: model.layers.1.self_attn has cache_index policies of different window sizes, a 6, b 10 tokens;" in text
    assert text.endswith("\n  Give them windows of the same sink + recent tokens.")


def test_windows_of_one_size_may_have_different_sinks():
    rules = [{"policy": "a", "kv_heads": 0}, {"policy": "b", "kv_heads": 1}]
    unit = after("rotate_sink_queries", toys.llama(layers=1), policies={"a": policy(2, 4), "b": policy(3, 3)}, heads=rules)
    assert [group.policy.positions for group in unit.plan.sites[0].groups] == ["cache_index"] * 2


class Sloped(nn.Module):
    """Attention with ALiBi slopes, and queries that are rotated besides."""

    def __init__(self, rotate: bool = True) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(32, 16), nn.Linear(16, 32)
        self.project, self.rotate = nn.Linear(16, 16), rotate

    def forward(self, ids, position_ids):
        x = self.words(ids)
        heads = self.project(x).unflatten(2, (2, 8)).transpose(1, 2)
        turned = heads * position_ids[:, None, :, None].float().cos() if self.rotate else heads
        return self.head(x + ATTEND(turned, turned, heads, None, -1, 0.3, 0, 0.0, 0, [0.5, 0.25]).flatten(2))


@pytest.mark.parametrize("rotate", [True, False])
def test_alibi_slopes_are_refused(rotate):
    assert refusal(Sloped(rotate).eval(), **ASKED) == (
        "<spec>: policies.mine.positions: site 0 tells distances by ALiBi slopes, which know no place in the cache.\n"
        "  Write positions: absolute."
    )


# --- shift invariance ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROTARY)
def test_rotations_of_real_models_are_relative(name):
    check_shift_invariance(after("outline_segments", rotary_model(name), **ASKED))


class Rotary(nn.Module):
    """Queries and keys turned by `angle(position)`, times `gain(position)`."""

    def __init__(self, angle, gain) -> None:
        super().__init__()
        self.words, self.head, self.project = nn.Embedding(32, 16), nn.Linear(16, 32), nn.Linear(16, 16)
        self.angle, self.gain = angle, gain

    def forward(self, ids, position_ids):
        x = self.words(ids)
        heads = self.project(x).unflatten(2, (2, 8)).transpose(1, 2)
        position = position_ids[:, None, :, None].float()
        cos, sin = self.angle(position).cos(), self.angle(position).sin()
        left, right = heads.chunk(2, dim=-1)
        turned = torch.cat([left * cos - right * sin, right * cos + left * sin], -1) * self.gain(position)
        mixed = nn.functional.scaled_dot_product_attention(turned, turned, heads, is_causal=True)
        return self.head(x + mixed.transpose(1, 2).flatten(2))


def plain(position):
    return 0.3 * position


def one(position):
    return 1.0


@pytest.mark.parametrize(
    ("angle", "gain"),
    [
        (lambda position: 0.3 * position.clamp(max=20000), one),  # wrong near the end of the context only
        (lambda position: 0.01 * position * position, one),
        (plain, lambda position: 1 + 0.1 * torch.floor(position / 8192)),  # scaled by the distance from the start
    ],
)
def test_what_is_not_relative_is_refused(angle, gain):
    unit = after("outline_segments", Rotary(angle, gain).eval(), **ASKED)
    with pytest.raises(SpecError) as caught:
        check_shift_invariance(unit)
    what = r"<spec>: policies\.mine\.positions: the rotation of site 0 is not relative: "
    assert re.match(what + r"q\.k changes by \S+ if both move \d+ tokens on\.\n  Write positions: absolute\.", str(caught.value))


def test_a_plain_rotation_is_relative():
    check_shift_invariance(after("outline_segments", Rotary(plain, one).eval(), **ASKED))


def test_half_precision_does_not_blur_the_check():
    check_shift_invariance(after("outline_segments", toys.llama(layers=1).bfloat16(), **ASKED))
