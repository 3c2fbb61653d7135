from __future__ import annotations

import pytest
import torch.nn.functional as F
import toys
from units import after, agrees_before_and_after, texts, traced

from kvcompile.codegen.segments import segment_sources
from kvcompile.ir.errors import UnsupportedGraphError
from kvcompile.ir.show import difference
from kvcompile.pipeline import PASSES, Pipeline


def calls(model) -> list[str]:
    return [node.target for node in after("outline_segments", model).graph.graph.find_nodes(op="call_module")]


def test_the_model_becomes_segments_and_sites(golden):
    golden("outline_segments", difference(*texts("outline_segments", toys.gated(inner=(16, 16)))))


TOYS = {"planted": 128, "nanogpt": 64, "gated": 32, "shared_values": 32, "llama": 256, "gemma2": 256}


@pytest.mark.parametrize(("name", "vocabulary"), [*TOYS.items(), pytest.param("gpt_oss", 256, marks=pytest.mark.slow)])
def test_before_and_after_agree(name, vocabulary):
    agrees_before_and_after("outline_segments", getattr(toys, name)(), vocabulary)


@pytest.mark.parametrize("layers", [2, 5])
def test_equal_layers_are_three_segments(layers):
    """First, between two attentions, last: however many layers (SmolLM2: 30)."""
    assert calls(toys.llama(layers=layers)) == ["segment_0", *["segment_1"] * (layers - 1), "segment_2"]
    assert calls(toys.nanogpt(layers=layers)) == ["segment_0", *["segment_1"] * (layers - 1), "segment_2"]


def test_a_layer_of_another_shape_is_another_segment():
    assert calls(toys.gated(inner=(16, 16, 24, 16, 16))) == [f"segment_{n}" for n in (0, 1, 1, 2, 1, 3)]


def test_layers_that_take_their_weights_in_another_order_are_matched():
    """The isomorphism says which input is which: gate and up weights have one shape, so swapping them would not be seen otherwise."""
    model = toys.gated(inner=(16, 16, 16), up_first=(False, True, False))
    assert calls(model) == ["segment_0", "segment_1", "segment_1", "segment_2"]
    ungrouped = Pipeline(tuple(each for each in PASSES if each.name != "group_linears"))  # a group has an order of its own
    graph = ungrouped.run(traced(model)).graph
    first, second = (node for node in graph.graph.find_nodes(op="call_module") if node.target == "segment_1")
    weights = [[node.target for node in call.args if node.op == "get_attr"] for call in (first, second)]
    assert [name.replace("blocks.0", "blocks.N").replace("blocks.1", "blocks.M") for name in weights[0]] == [
        name.replace("blocks.1", "blocks.N").replace("blocks.2", "blocks.M") for name in weights[1]
    ]
    assert weights[1].index("blocks.1.gate.weight") < weights[1].index("blocks.1.up.weight")
    agrees_before_and_after("outline_segments", model, 32)


class Rows(toys.Mixed):
    """Two rows a token, before an attention and behind it."""

    def __init__(self, of_rows):
        super().__init__()
        self.of_rows = of_rows

    def forward(self, ids):
        x = self.words(ids)
        rows = self.of_rows(x.unflatten(2, (2, -1)).flatten(1, 2))
        heads = x.unflatten(2, (2, -1)).transpose(1, 2)
        out = F.scaled_dot_product_attention(heads, heads, heads, is_causal=True).transpose(1, 2).flatten(2)
        return self.head(out + rows.unflatten(1, (-1, 2)).flatten(2))


def test_a_view_of_several_rows_a_token_is_made_again_behind_an_attention():
    agrees_before_and_after("outline_segments", Rows(lambda rows: rows).eval(), 32)


def test_several_rows_a_token_across_an_attention_are_refused():
    """The last segment runs on the wanted tokens only: it could not tell which rows are theirs."""
    with pytest.raises(UnsupportedGraphError) as caught:
        after("outline_segments", Rows(lambda rows: rows * 2).eval())
    assert ": a value with several rows a token is kept across an attention: " in str(caught.value)
    assert str(caught.value).endswith("\n  Keep it as [1, tokens, ...].")


def test_weights_are_inputs_of_segments_not_parts():
    graph = after("outline_segments", toys.nanogpt()).graph
    for name in ("segment_0", "segment_1", "segment_2"):
        assert not graph.get_submodule(name).graph.find_nodes(op="get_attr")


def test_segments_are_readable_source_that_runs():
    graph = after("outline_segments", toys.gated(inner=(16, 16))).graph
    sources = segment_sources(graph)
    assert sorted(sources) == ["segment_0", "segment_1", "segment_2"]
    assert "segment_1: what the model computes between two attentions, called 1 times." in sources["segment_1"]
    assert "# weight_2: f32[16, 8]" in sources["segment_1"]
    for name, source in sources.items():
        namespace: dict = {}
        exec(compile(source, name, "exec"), namespace)
        assert callable(namespace[name])
    assert "import kvcompile.ir.linear_op  # it defines torch.ops.kvc.linears" in sources["segment_1"]


def test_nothing_is_outlined_before_this_pass():
    assert segment_sources(after("request_kernels", toys.gated()).graph) == {}
