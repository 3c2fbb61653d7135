"""Segments by their numbers: what the graph check cannot see, a leak of 1e-3, a maximum over the call, is found and named."""

from __future__ import annotations

import pytest
import torch
import toys
from units import after, spec

from kvcompile.ir.errors import UnsupportedGraphError
from kvcompile.ir.unit import Unit
from kvcompile.passes.outline_segments import OutlineSegments
from kvcompile.passes.probe_segments import probe_segments
from kvcompile.passes.trace import trace
from kvcompile.pipeline import PASSES, Pipeline


def outlined(model) -> torch.fx.GraphModule:
    """The outlined graph without the graph's own check, as if it had let everything pass."""
    unseen = ("check_token_wise", "fix_frequency_branch")
    passes = tuple(each for each in PASSES if each.name not in unseen)
    unit = Unit(trace(model.eval()), spec(), passed=unseen)
    return Pipeline(passes).run(unit).graph


@pytest.mark.parametrize("name", ["nanogpt", "planted", "gated", "sliced_table", "llama", "gemma3", "gpt_oss"])
def test_a_transformers_segments_pass(name):
    probe_segments(after(OutlineSegments().name, getattr(toys, name)()).graph, 60)


def test_half_precision_is_probed_in_float32():
    probe_segments(after("outline_segments", toys.llama(layers=1).to(torch.bfloat16)).graph, None)


def test_words_that_are_masked_out_pass():
    class Masked(toys.Mixed):
        def forward(self, ids):
            return super().forward(ids).masked_fill(torch.arange(32) > 20, -torch.inf)

    torch.manual_seed(0)
    probe_segments(outlined(Masked()), None)


def refusal(mix) -> str:
    class Model(toys.Mixed):
        def mix(self, x):
            return mix(x)

    with pytest.raises(UnsupportedGraphError) as caught:
        probe_segments(outlined(Model()), None)
    return str(caught.value)


@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_a_leak_to_later_tokens_is_found_and_named(size):
    text = refusal(lambda x: x + size * x.cumsum(1))
    assert text.startswith("probe_segments: cumsum (")
    assert ": a result changes with what stands in another token's place: f32[1, s, 16] " in text
    assert text.endswith("\n  Between two attentions every token must be computed from itself alone.")


def test_a_leak_to_earlier_tokens_is_found():
    assert "a result changes with what stands in another token's place" in refusal(lambda x: x + 0.1 * x.flip(1))


def test_a_scale_by_how_many_there_are_is_found():
    text = refusal(lambda x: x * torch.ones_like(x).cumsum(1).amax(1, keepdim=True))
    assert "a token's result changes with how many tokens stand beside it" in text


def test_a_choice_by_the_farthest_position_is_found():
    """Trap 37: longrope's branch."""

    class Far(toys.Mixed):
        def forward(self, ids, position_ids):
            angle = torch.where(position_ids.max() > 1000, 0.1, 1.0) * position_ids
            x = self.words(ids) + angle.sin()[..., None]
            heads = x.unflatten(2, (2, -1)).transpose(1, 2)
            out = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
            return self.head(x + out.transpose(1, 2).flatten(2))

    with pytest.raises(UnsupportedGraphError) as caught:
        probe_segments(outlined(Far()), 4096)
    assert "a result changes with what stands in another token's place" in str(caught.value)
