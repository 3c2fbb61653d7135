from __future__ import annotations

import torch
import toys
from units import after

from kvcompile.ir.show import difference, graph_text, node_text, shape_text


def test_shapes():
    assert shape_text(torch.zeros(2, 3, dtype=torch.bfloat16)) == "bf16[2, 3]"
    assert shape_text(torch.zeros(1, dtype=torch.int8)) == "int8[1]"
    assert shape_text((torch.zeros(1), None)) == "(f32[1], -)"


def test_a_node_is_one_line_with_its_shape_first_and_its_module_last():
    graph = after("canonicalise_attention", toys.nanogpt(layers=1)).graph
    lines = [node_text(node) for node in graph.graph.nodes]
    assert all("\n" not in line for line in lines)
    weight = "%model_blocks_0_qkv"
    assert f"f32[1, s, 96]           %linear = aten.linear.default(%layer_norm, {weight}_weight, {weight}_bias)" in str(lines)
    assert lines[-1].startswith("return ")
    assert any(line.endswith("# blocks.0.qkv") for line in lines)


def test_the_text_is_the_same_on_every_run_and_holds_no_path_of_this_machine():
    model = toys.nanogpt(layers=1)
    first, second = (graph_text(after("outline_segments", model).graph) for _ in range(2))
    assert first == second
    assert "site-packages" not in first and "/" not in first


def test_segments_stand_behind_the_graph_each_once():
    text = graph_text(after("outline_segments", toys.nanogpt(layers=3)).graph)
    assert [line for line in text.splitlines() if line.endswith(":")] == ["segment_0:", "segment_1:", "segment_2:"]


def test_a_difference_is_what_changed():
    assert difference("a\nb\nc\n", "a\nx\nc\n") == "-b\n+x"
    assert difference("a\n", "a\n") == ""
