"""Trace: the model's own numbers for any number of tokens, and what it says when it cannot."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import toys
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from units import logits, some_ids

from kvcompile.ir.attend_op import ATTEND
from kvcompile.ir.errors import UnsupportedGraphError
from kvcompile.ir.show import graph_text
from kvcompile.passes.trace import _check_windows, bind_weights, trace


def test_the_graph_of_a_plain_module(golden):
    golden("trace", graph_text(trace(toys.planted())))


@pytest.mark.parametrize("name", ["planted", "nanogpt", "sliced_table", "shared_values"])
def test_a_plain_graph_computes_what_the_module_does(name):
    model = getattr(toys, name)()
    graph = trace(model)
    for tokens in (2, 24, 33):
        ids = some_ids(tokens, 32)
        with torch.no_grad():
            torch.testing.assert_close(logits(graph, ids), model(ids[None])[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_a_transformers_graph_computes_what_the_model_does(name):
    """Windows, soft caps and learnt sinks too: 33 tokens are far beyond the windows of 8."""
    model = toys.llama(layers=1) if name == "llama" else getattr(toys, name)()
    graph = trace(model)
    ids = some_ids(33, 256)
    with torch.no_grad():
        torch.testing.assert_close(logits(graph, ids), model(input_ids=ids[None]).logits[0], rtol=1e-4, atol=1e-5)


def test_the_weights_are_the_models_own_under_their_own_names():
    model = toys.nanogpt(layers=1)
    graph = trace(model)
    assert {name for name, _ in graph.named_parameters()} == {name for name, _ in model.named_parameters()}
    assert all(graph.get_parameter(name) is weight for name, weight in model.named_parameters())


def test_an_in_place_operator_is_made_functional():
    """Trap 39: dataflow questions about a graph with in-place operators are silently wrong."""

    class InPlace(toys.Mixed):
        def mix(self, x):
            y = x.clone()
            y.add_(1)
            return y

    graph = trace(InPlace().eval())
    assert not any("add_" in str(node.target) for node in graph.graph.nodes)


def test_fake_weights_are_replaced_by_name():
    with FakeTensorMode(allow_non_fake_inputs=True):
        empty = toys.nanogpt(layers=1)
    real = toys.nanogpt(layers=1)
    graph = trace(empty)
    assert bind_weights(graph, real)
    ids = some_ids(9, 64)
    torch.testing.assert_close(logits(graph, ids), real(ids[None])[0])


def test_weights_of_another_model_are_not_bound():
    graph = trace(toys.nanogpt(layers=1))
    before = graph.get_parameter("words.weight")
    for other in (toys.gated(), toys.nanogpt(layers=1, rows=32), toys.nanogpt(layers=1).double(), toys.llama(layers=1)):
        assert not bind_weights(graph, other)
    assert graph.get_parameter("words.weight") is before


def test_training_mode_is_refused():
    with pytest.raises(UnsupportedGraphError) as caught:
        trace(toys.planted().train())
    assert str(caught.value) == "trace: the model is in training mode.\n  Call model.eval() first."


def test_a_module_that_export_cannot_trace_is_refused_with_its_reason():
    class Branches(toys.Mixed):
        def mix(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(UnsupportedGraphError) as caught:
        trace(Branches().eval())
    text = str(caught.value)
    assert text.startswith("trace: torch.export could not trace Branches: GuardOnDataDependentSymNode: Could not guard on data-dependent")
    assert text.endswith("\n  Its forward must be traceable for a varying number of tokens, without a KV cache.")


def test_a_graph_inside_the_graph_is_refused():
    class Autocast(toys.Mixed):
        def mix(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.head(x)[..., :16]

    with pytest.raises(UnsupportedGraphError) as caught:
        trace(Autocast().eval())
    assert "the model's forward uses wrap_with_autocast, which holds a graph of its own." in str(caught.value)
    assert str(caught.value).endswith("\n  Take autocast, enable_grad, checkpointing and data-dependent control flow out of forward.")


def test_a_window_that_no_attention_has_is_refused():
    class Export:
        graph = trace(toys.planted()).graph

    Export.graph.call_function(ATTEND, (None, None, None, None, -1, 1.0, 8, 0.0))
    _check_windows(Export, {8})
    with pytest.raises(UnsupportedGraphError) as caught:
        _check_windows(Export, {8, 32})
    assert str(caught.value) == (
        "trace: the model masks with a sliding window of [32] tokens but does not tell its attention.\n"
        "  The window would be lost; the model cannot be compiled yet."
    )


def test_a_module_may_take_positions_and_return_a_tuple():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.places = nn.Embedding(16, 8), nn.Embedding(40, 8)

        def forward(self, ids, position_ids):
            x = (self.words(ids) + self.places(position_ids))[:, None]
            return F.scaled_dot_product_attention(x, x, x, is_causal=True)[:, 0], None

    model = Positions().eval()
    ids = some_ids(11, 16)
    torch.testing.assert_close(logits(trace(model), ids), model(ids[None], torch.arange(11)[None])[0][0])


def test_a_graph_that_draws_a_dropout_is_refused():
    class Dropped(toys.Mixed):
        def mix(self, x):
            return F.dropout(x, 0.1, True)

    with pytest.raises(UnsupportedGraphError) as caught:
        trace(Dropped().eval())
    assert "the graph draws a dropout." in str(caught.value)
    assert str(caught.value).endswith("\n  Trace or export the model after model.eval().")


def test_a_loop_over_tokens_is_refused_by_the_node_that_mixes_them():
    class Loop(toys.Mixed):
        def mix(self, x):
            state, found = torch.zeros_like(x[:, 0]), []
            for token in range(x.shape[1]):
                state = 0.9 * state + x[:, token]
                found.append(state)
            return torch.stack(found, 1)

    with pytest.raises(UnsupportedGraphError) as caught:
        trace(Loop().eval())
    (first,) = caught.value.problems
    assert first.where.startswith("check_token_wise: select (")
    assert first.what.startswith("select works along the token dimension: f32[1, 16]")


def test_a_cache_that_begins_empty_is_no_part():
    class Cached(toys.Mixed):
        def mix(self, x):
            return torch.cat([torch.tensor([]), x], dim=-2)

    graph = trace(Cached().eval())
    assert not graph.graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)
