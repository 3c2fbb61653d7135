from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
import toys
from streaming import longrope_model
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from units import both, logits, some_ids, traced

from kvcompile.diagnose import original_logits
from kvcompile.ir.errors import UnsupportedGraphError
from kvcompile.ir.show import difference, graph_text
from kvcompile.ir.unit import Unit
from kvcompile.passes.fix_frequency_branch import _frequency_update
from kvcompile.passes.trace import trace
from kvcompile.pipeline import Pipeline


def fixed(model: nn.Module, context: int | None, stop_after: str = "fix_frequency_branch") -> tuple[Unit, Unit]:
    """The unit before the pass and after it, or after a later one."""
    unit = replace(traced(model), context_tokens=context)
    before = Pipeline().run(replace(unit, graph=trace(model)), stop_after="make_positions_explicit")
    return before, Pipeline().run(unit, stop_after=stop_after)


def test_the_longest_position_becomes_the_declared_contexts(golden):
    text = difference(*(graph_text(unit.graph) for unit in fixed(longrope_model(), 256)))
    golden("fix_frequency_branch", re.sub(r"%add_\d+", "%add", text))  # its number depends on transformers' version


@pytest.mark.parametrize(("context", "tokens"), [(256, 65), (256, 200), (64, 64), (64, 7)])
def test_calls_of_the_declared_branch_compute_what_they_did(context, tokens):
    one, two = fixed(longrope_model(context), context)
    ids = some_ids(tokens, 256)
    torch.testing.assert_close(logits(two.graph, ids), logits(one.graph, ids), rtol=1e-5, atol=1e-5)


def test_a_short_call_gets_the_declared_branch():
    one, two = fixed(longrope_model(), 256)
    ids, positions = some_ids(20, 256), torch.arange(20)
    positions[-1] = 255  # the last token's own position lies in the long branch
    with torch.no_grad():
        long = one.graph(ids[None], positions[None])[0, :19]
    assert torch.allclose(logits(two.graph, ids)[:19], long, atol=1e-5)
    assert not torch.allclose(logits(one.graph, ids), logits(two.graph, ids), atol=1e-3)


def test_the_branch_is_told_and_known():
    _, unit = fixed(longrope_model(), 256)
    assert unit.frequency_tokens == 256
    assert unit.warnings == (
        "the original chooses rotary frequencies by the longest sequence of a call; here they are always those of the declared "
        "context, 256 tokens, and it is compared under these",
    )
    Pipeline().run(replace(traced(longrope_model()), context_tokens=256))  # nothing is left that mixes tokens


def branching(module, position_ids, device, layer_type=None):
    """How transformers chooses until 5.17."""
    chosen = module.original_inv_freq
    if torch.max(position_ids) + 1 > module.config.rope_parameters["original_max_position_embeddings"]:
        chosen, _ = ROPE_INIT_FUNCTIONS["longrope"](module.config, device, seq_len=65)
    module.register_buffer("inv_freq", chosen, persistent=False)


def test_a_choice_that_branches_is_traced_and_the_model_keeps_its_own(monkeypatch):
    model = longrope_model()
    rotary, ids = model.model.rotary_emb, some_ids(80, 256)
    update = _frequency_update(type(rotary).forward)
    monkeypatch.setattr(update, "cell_contents", branching)
    before = original_logits(model, ids[:7])  # from here on the chosen frequencies are the short ones themselves
    buffers = dict(rotary._buffers)
    graph = trace(model)
    assert update.cell_contents is branching
    assert dict(rotary._buffers) == buffers and rotary.inv_freq is rotary.original_inv_freq
    for length in (7, 80):  # short frequencies, then long ones
        torch.testing.assert_close(logits(graph, ids[:length]), original_logits(model, ids[:length]), rtol=1e-5, atol=1e-5)
    assert torch.equal(original_logits(model, ids[:7]), before)


def test_the_graph_is_not_touched_without_a_branch():
    one, two = both("fix_frequency_branch", toys.llama(layers=1))
    assert difference(graph_text(one.graph), graph_text(two.graph)) == ""
    assert two.frequency_tokens is None


def test_without_a_declared_context_it_is_refused():
    with pytest.raises(UnsupportedGraphError) as caught:
        fixed(longrope_model(), None)
    text = str(caught.value)
    assert text.startswith(
        "fix_frequency_branch: model.rotary_emb: the largest position of a call chooses what is computed for all its tokens: i64[] "
    )
    assert text.endswith("\n  Declare the context in the model's configuration: max_position_embeddings.")


class Longest(toys.Mixed):
    """The largest position as a number, not as a choice."""

    def __init__(self, use) -> None:
        super().__init__()
        self.use = use

    def forward(self, ids, position_ids):
        x = self.words(ids)
        heads = x.unflatten(2, (2, -1)).transpose(1, 2)
        x = x + nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True).transpose(1, 2).flatten(2)
        return self.head(self.use(x, position_ids.max()))


@pytest.mark.parametrize(
    "use",
    [
        lambda x, longest: x * longest,
        lambda x, longest: torch.where(longest > 9, x * longest, x),
        lambda x, longest: torch.where(longest > x.sum(-1, keepdim=True), x, -x) * (longest + 1),
    ],
)
def test_a_longest_position_that_does_more_than_choose_is_left_to_the_token_wise_check(use):
    with pytest.raises(UnsupportedGraphError, match=r"check_token_wise: .*max works on the flattened tensor"):
        fixed(Longest(use).eval(), 64, "check_token_wise")


@pytest.mark.parametrize("parameters", [{"factor": 2.0}, {"factor": 2.0, "rope_theta": 1e6}])
def test_frequencies_that_grow_with_what_was_seen_are_refused_by_name(parameters):
    with pytest.raises(UnsupportedGraphError) as caught:
        trace(toys.llama(layers=1, rope_scaling={"rope_type": "dynamic", "rope_theta": 1e4, **parameters}))
    assert str(caught.value) == (
        "trace: the model has rope_type: dynamic, whose frequencies depend on the longest sequence that it has seen.\n"
        "  Choose rope_type linear, yarn or longrope in the model's configuration, as its weights allow."
    )


def test_the_frequencies_of_one_kind_of_layer_are_refused_too():
    model = toys.gemma3()
    model.config.rope_parameters = {**model.config.rope_parameters, "full_attention": {"rope_type": "dynamic", "factor": 2.0}}
    with pytest.raises(UnsupportedGraphError, match="rope_type: dynamic"):
        trace(model)
