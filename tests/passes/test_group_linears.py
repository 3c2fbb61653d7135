from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import toys
from torch import nn
from units import after, agrees_before_and_after, texts

from kvcompile.ir.attend_op import ATTEND
from kvcompile.ir.graphs import to_networkx
from kvcompile.ir.linear_op import LINEARS
from kvcompile.ir.show import difference
from kvcompile.ir.tokens import fake_value, path_of


def groups(model, name: str = "group_linears") -> list[torch.fx.Node]:
    return after(name, model).graph.graph.find_nodes(op="call_function", target=LINEARS)


def test_layers_of_one_input_become_one_node(golden):
    golden("group_linears", difference(*texts("group_linears", toys.gated(inner=(16,)))))


TOYS = {"planted": 128, "nanogpt": 64, "gated": 32, "shared_values": 32, "llama": 256, "gemma2": 256}


@pytest.mark.parametrize(("name", "vocabulary"), [*TOYS.items(), pytest.param("gpt_oss", 256, marks=pytest.mark.slow)])
def test_before_and_after_agree(name, vocabulary):
    agrees_before_and_after("group_linears", getattr(toys, name)(), vocabulary)


def test_the_groups_of_a_llama():
    found = [
        (path_of(node).removeprefix("model."), len(node.args[1]), len(node.args[2]), fake_value(node).shape[2])
        for node in groups(toys.llama(layers=1))
    ]
    assert found == [
        ("layers.0.self_attn", 3, 0, 128),
        ("layers.0.self_attn.o_proj", 1, 0, 64),
        ("layers.0.mlp", 2, 0, 128),
        ("layers.0.mlp.down_proj", 1, 0, 64),
        ("lm_head", 1, 0, 256),
    ]


class Layers(toys.Mixed):
    """Layers of one value: two with a bias, one without, one behind the attention; a `view` of a result."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16, bias=bias) for bias in (True, True, False, True))

    def forward(self, ids):
        x = self.words(ids)
        first, second, third = (layer(x) for layer in self.layers[:3])
        mixed = super().forward(ids)
        return mixed + self.head(first.view(1, -1, 4, 4).flatten(2) + second.view(1, -1).view(1, -1, 16) * third + self.layers[3](x))


def test_a_bias_or_a_site_between_parts_a_group():
    found = [(len(node.args[1]), len(node.args[2])) for node in groups(Layers().eval())]
    assert found == [(2, 2), (1, 0), (1, 1), (1, 1), (1, 1)]


def test_views_of_a_slice_become_reshapes():
    """first.view(1, -1) of a slice would stop the graph: its rows do not stand behind each other."""
    agrees_before_and_after("group_linears", Layers().eval(), 32)


def test_what_is_computed_from_a_slice_is_recorded_with_its_strides():
    """Segments are compiled for the strides that are recorded."""
    graph = after("group_linears", toys.llama(layers=1)).graph.graph
    (site,) = graph.find_nodes(op="call_function", target=ATTEND)
    assert fake_value(site.args[2]).stride()[1:] == (16, 128, 1)


def test_a_layer_with_another_shape_of_input_or_a_computed_weight_stays():
    class Computed(toys.Mixed):
        def mix(self, x):
            flat = F.linear(x[0], self.head.weight[:16])
            return F.linear(x, self.head.weight[:16] * 2) + flat

    assert [path_of(node) for node in groups(Computed().eval())] == ["head"]
    agrees_before_and_after("group_linears", Computed().eval(), 32)


def test_groups_with_swapped_weights_are_no_equal_segments():
    """The place in a list tells an input: `linears(x, [a, b])` is not `linears(x, [b, a])` under the same names."""
    ab, ba = torch.fx.Graph(), torch.fx.Graph()
    for graph, order in ((ab, (1, 2)), (ba, (2, 1))):
        inputs = [graph.placeholder(name) for name in ("x", "a", "b")]
        graph.call_function(LINEARS, (inputs[0], [inputs[place] for place in order], []))
    one, two = to_networkx(ab), to_networkx(ba)
    assert [one.edges[name, "linears_default"]["slots"] for name in ("a", "b")] == ["1.0", "1.1"]
    assert [two.edges[name, "linears_default"]["slots"] for name in ("a", "b")] == ["1.1", "1.0"]
