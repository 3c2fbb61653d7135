from __future__ import annotations

import pytest
import torch
import toys
from torch._subclasses.fake_tensor import FakeTensorMode

from kvcompile.ir.evaluate import FakeConstantError, ancestors, content_nodes, evaluate_nodes, opname, shape_at
from kvcompile.passes.trace import trace


@pytest.fixture(scope="module")
def graph() -> torch.fx.Graph:
    return trace(toys.sliced_table()).graph


def named(graph: torch.fx.Graph, name: str) -> torch.fx.Node:
    return next(node for node in graph.nodes if opname(node) == name)


def test_nodes_are_evaluated_for_any_number_of_tokens(graph):
    input_ids = next(iter(graph.find_nodes(op="placeholder")))
    rows = named(graph, "slice")
    for tokens in (3, 9):
        (found,) = evaluate_nodes([rows], {input_ids: torch.zeros(1, tokens, dtype=torch.long)})
        assert list(found.shape) == shape_at(rows, tokens) == [1, tokens, 16]


def test_everything_is_computed_in_the_dtype_asked_for(graph):
    input_ids = next(iter(graph.find_nodes(op="placeholder")))
    (found,) = evaluate_nodes([named(graph, "add")], {input_ids: torch.zeros(1, 3, dtype=torch.long)}, compute=torch.float64)
    assert found.dtype == torch.float64


def test_other_arguments_may_stand_for_a_nodes_own(graph):
    input_ids = next(iter(graph.find_nodes(op="placeholder")))
    rows = named(graph, "slice")
    arguments = {rows: ((rows.args[0], 1, 0, 2), {})}
    (found,) = evaluate_nodes([rows], {input_ids: torch.zeros(1, 9, dtype=torch.long)}, arguments=arguments)
    assert found.shape == (1, 2, 16)


def test_what_is_not_known_is_an_error(graph):
    with pytest.raises(LookupError, match="ids"):
        evaluate_nodes([named(graph, "embedding")], {})


def test_a_constant_without_numbers_is_an_error_of_its_own():
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = toys.sliced_table()
    graph = trace(model).graph
    with pytest.raises(FakeConstantError, match="table"):
        evaluate_nodes([named(graph, "slice")], {next(iter(graph.find_nodes(op="placeholder"))): torch.zeros(1, 4, dtype=torch.long)})


def test_content_and_ancestors(graph):
    input_ids, position_ids = graph.find_nodes(op="placeholder")
    content = content_nodes(graph, input_ids)
    assert named(graph, "embedding") in content
    assert named(graph, "slice") not in content  # how many tokens there are is no content
    assert {input_ids, named(graph, "embedding")} <= ancestors([named(graph, "add")], ())
    assert position_ids not in ancestors([named(graph, "add")], ())
