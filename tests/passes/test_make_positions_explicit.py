from __future__ import annotations

import re

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


COUNTS = {
    "from elsewhere": lambda ids: torch.arange(5, ids.shape[1] + 5),
    "in steps": lambda ids: torch.arange(3, 2 * ids.shape[1] + 3, 2),
    "of another dtype": lambda ids: torch.arange(ids.shape[1], dtype=torch.float32),
    "backwards from a constant": lambda ids: 59 - torch.arange(ids.shape[1]),
    "a running sum of ones": lambda ids: torch.ones_like(ids).cumsum(1) - 1,
    "a running sum of what is no padding": lambda ids: (ids != 1).long().cumsum(1) * (ids != 1) + 1,
}


class Counting(toys.SlicedTable):
    """Positions of its own making."""

    def __init__(self, count):
        super().__init__()
        torch.manual_seed(0)
        self.count = count

    def forward(self, ids):
        where = self.count(ids).float().reshape(1, -1, 1)
        x = self.words(ids) + torch.sin(where * 0.3)
        heads = x.unflatten(2, (2, -1)).transpose(1, 2)
        attended = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        return self.head(x + attended.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("how", COUNTS)
def test_whatever_counts_tokens_becomes_positions(how):
    model = Counting(COUNTS[how]).eval()
    graph = after("make_positions_explicit", model).graph
    ids = some_ids(12, 30) + 2
    with torch.no_grad():
        torch.testing.assert_close(logits(graph, ids), model(ids[None])[0], rtol=1e-5, atol=1e-5)
        here, there = (graph(ids[None, :1], torch.tensor([[position]])) for position in (0, 7))
    assert not torch.allclose(here, there, atol=1e-3), "a token alone knows its position"


@pytest.mark.parametrize("count", [lambda ids: (ids == 7).long().cumsum(1), lambda ids: (ids < 20).long().cumsum(1)])
def test_a_running_count_of_some_tokens_is_no_position(count):
    """A document counter is a constant wherever no separator stands."""
    with pytest.raises(UnsupportedGraphError) as caught:
        after("check_token_wise", Counting(count).eval())
    assert "cumsum works along the token dimension" in str(caught.value)


def test_positions_that_skip_padding_come_with_a_warning():
    unit = after("make_positions_explicit", Counting(COUNTS["a running sum of what is no padding"]).eval())
    assert unit.warnings == ("the model's positions skip token 1; a session counts it like any other token",)
    assert after("make_positions_explicit", Counting(COUNTS["a running sum of ones"]).eval()).warnings == ()


def test_positions_counted_from_the_end_are_refused():
    text = refusal(lambda self, x: x + torch.arange(x.shape[1] - 1, -1, -1)[:, None])
    assert re.match(r"make_positions_explicit: arange \(.*\): positions are not a \* position \+ b, one a token: i64\[s\] ", text)
    assert text.endswith("\n  Let the model take position_ids as its second argument.")


@pytest.mark.parametrize("cut", [lambda table, n: table[:, 1 : n + 1], lambda table, n: table[:, -n:]])
def test_another_cut_of_a_table_is_refused(cut):
    text = refusal(lambda self, x: x + cut(self.table, x.shape[1]))
    assert re.match(r"make_positions_explicit: slice_1 \(.*\): the number of tokens decides where a table is cut: f32\[1, s, 16\] ", text)
    assert text.endswith("\n  Let the model take position_ids as its second argument.")


def test_the_number_of_tokens_as_a_value_is_refused():
    text = refusal(lambda self, x: x * x.shape[1])
    assert re.match(r"make_positions_explicit: mul \(.*\): the number of tokens in the call is used as a value: f32\[1, s, 16\] ", text)
    assert text.endswith("\n  A token's result may depend on its position, never on how many tokens stand beside it.")


def test_the_number_of_tokens_may_shape_a_tensor():
    class Shaped(toys.Mixed):
        def mix(self, x):
            return x.reshape(1, x.shape[1], 4, 4).flatten(2) + x.new_zeros(1, x.shape[1], 16)

    agrees_before_and_after("make_positions_explicit", Shaped().eval(), 32)
    assert logits(after("make_positions_explicit", Shaped().eval()).graph, some_ids(3, 32)).shape == (3, 32)


class Masked(toys.SlicedTable):
    """Tokens behind as many as are counted are set to zero."""

    def __init__(self, count):
        super().__init__()
        self.count = count

    def forward(self, ids):
        held = torch.arange(ids.shape[1]) < self.count(ids)[:, None]
        heads = (self.words(ids) * held[..., None]).unflatten(2, (2, -1)).transpose(1, 2)
        attended = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        return self.head(attended.transpose(1, 2).flatten(2) * held[..., None])


def test_a_mask_of_what_is_no_padding_holds_and_comes_with_a_warning():
    model = Masked(lambda ids: (ids != 2).sum(1)).eval()
    unit = after("check_token_wise", model)
    assert unit.warnings == ("the model hides as many of its last tokens as it reads tokens 2; a session hides none",)
    ids = some_ids(12, 29) + 3
    with torch.no_grad():
        torch.testing.assert_close(logits(unit.graph, ids), model(ids[None])[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [lambda ids: (ids == 2).sum(1), lambda ids: (ids != 2).sum(1) - 2, lambda ids: (ids < 20).sum(1)])
def test_a_mask_that_hides_tokens_is_refused(count):
    with pytest.raises(UnsupportedGraphError) as caught:
        after("check_token_wise", Masked(count).eval())
    assert "sum works along the token dimension" in str(caught.value)
