from __future__ import annotations

import pytest
import torch
import toys
from units import after, agrees_before_and_after, logits, some_ids, texts

from kvcompile.ir.errors import UnsupportedGraphError
from kvcompile.ir.show import difference


def test_arange_becomes_the_position_input(golden):
    golden("make_positions_explicit", difference(*texts("make_positions_explicit", toys.nanogpt(layers=1))))


def test_the_first_rows_of_a_table_become_rows_of_positions(golden):
    golden("make_positions_explicit_table", difference(*texts("make_positions_explicit", toys.sliced_table())))


@pytest.mark.parametrize(("name", "vocabulary"), [("nanogpt", 64), ("sliced_table", 32)])
def test_before_and_after_agree(name, vocabulary):
    agrees_before_and_after("make_positions_explicit", getattr(toys, name)(), vocabulary)


@pytest.mark.parametrize("name", ["nanogpt", "sliced_table"])
def test_a_token_alone_gets_its_own_position(name):
    """One token at position 7 alone is what it is behind seven others, as far as no attention is concerned."""
    graph = after("make_positions_explicit", getattr(toys, name)()).graph
    ids = torch.full((8,), 3)
    with torch.no_grad():
        alone = graph(ids[None, :1], torch.tensor([[7]]))
        first = graph(ids[None, :1], torch.tensor([[0]]))
    assert not torch.allclose(alone, first, atol=1e-3)
    assert torch.allclose(logits(graph, ids)[:1], first[0], atol=1e-5)


def test_a_table_of_positions_bounds_every_session():
    assert after("make_positions_explicit", toys.nanogpt(rows=64)).position_rows == 64
    assert after("make_positions_explicit", toys.sliced_table()).position_rows == toys.SlicedTable.ROWS
    assert after("make_positions_explicit", toys.llama(layers=1)).position_rows is None


def refusal(mix) -> str:
    class Model(toys.SlicedTable):
        def forward(self, ids):
            x = self.words(ids)
            heads = x.unflatten(2, (2, -1)).transpose(1, 2)
            x = x + torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True).transpose(1, 2).flatten(2)
            return self.head(mix(self, x))

    with pytest.raises(UnsupportedGraphError) as caught:
        after("make_positions_explicit", Model().eval())
    return str(caught.value)


def test_positions_that_start_elsewhere_are_refused():
    text = refusal(lambda self, x: x + torch.arange(5, x.shape[1] + 5)[:, None])
    assert text.startswith("make_positions_explicit: arange: positions do not run from 0 in steps of 1, one a token: i64[s] ")
    assert text.endswith("\n  Let the model take position_ids as its second argument.")


@pytest.mark.parametrize("cut", [lambda table, n: table[:, 1 : n + 1], lambda table, n: table[:, -n:]])
def test_another_cut_of_a_table_is_refused(cut):
    text = refusal(lambda self, x: x + cut(self.table, x.shape[1]))
    assert text.startswith("make_positions_explicit: slice_1: the number of tokens decides where a table is cut: f32[1, s, 16] ")
    assert text.endswith("\n  Let the model take position_ids as its second argument.")


def test_the_number_of_tokens_as_a_value_is_refused():
    text = refusal(lambda self, x: x * x.shape[1])
    assert text.startswith("make_positions_explicit: mul: the number of tokens in the call is used as a value: f32[1, s, 16] ")
    assert text.endswith("\n  A token's result may depend on its position, never on how many tokens stand beside it.")


def test_the_number_of_tokens_may_shape_a_tensor():
    class Shaped(toys.Mixed):
        def mix(self, x):
            return x.reshape(1, x.shape[1], 4, 4).flatten(2) + x.new_zeros(1, x.shape[1], 16)

    agrees_before_and_after("make_positions_explicit", Shaped().eval(), 32)
    assert logits(after("make_positions_explicit", Shaped().eval()).graph, some_ids(3, 32)).shape == (3, 32)
