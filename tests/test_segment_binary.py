"""Segments as binaries: what they compute, what is told of them, and the keys they are kept under."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toy_segment import TOOLCHAIN, compiled, inputs, segment

from kvcompile.codegen import segment_binary
from kvcompile.codegen.segment_binary import MAX_TOKENS, can_compile, compile_segment, segment_key, segment_text
from kvcompile.ir.errors import UnsupportedGraphError
from kvcompile.ir.segment_description import SegmentDescription, cpu_features
from kvcompile.runtime.segment import load_segment


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 2, 7, 300])
def test_a_binary_computes_what_the_segment_does(tokens):
    """In bfloat16 too, rounded where the original rounds."""
    graph, path, description = compiled()
    activations, weights = inputs(description, tokens)
    found = load_segment(path, description)(*activations, *weights)
    with torch.no_grad():
        expected = graph(*activations, *weights)
    assert [out.shape for out in found] == [out.shape for out in expected]
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.slow
def test_the_description_survives_json():
    _, _, description = compiled()
    kept = json.loads(json.dumps(description.as_dict()))
    assert SegmentDescription.from_dict(kept) == description
    assert [layout.sizes for layout in description.activations] == [
        (1, "tokens", 4, 16),
        (1, "tokens", 64),
        (1, "tokens", 16),
        (1, "tokens", 16),
    ]
    assert len(description.weights) == 9 and len(description.outputs) == 4
    assert (description.torch, description.most_tokens, description.threads) == (torch.__version__, MAX_TOKENS, 1)


@pytest.mark.slow
def test_a_key_is_the_same_in_another_process():
    script = (
        "from toy_segment import TOOLCHAIN, segment; from kvcompile.codegen.segment_binary import segment_key; "
        "print(segment_key(segment(), TOOLCHAIN, 1))"
    )
    tests = str(Path(__file__).parent)
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tests)
    assert ran.stdout.split()[-1] == segment_key(segment(), TOOLCHAIN, 1)


def test_a_key_knows_no_names_and_no_layers():
    graph = segment()
    key = segment_key(graph, TOOLCHAIN)
    assert key == segment_key(segment(layers=3), TOOLCHAIN)
    for number, node in enumerate(graph.graph.nodes):
        if node.op == "call_function":
            node.name = f"other_{number}"
            node.meta.pop("nn_module_stack", None)
    assert segment_key(graph, TOOLCHAIN) == key
    assert "0x" not in segment_text(graph)


def one_op(op=torch.ops.aten.mul.Tensor, width: int = 8, dtype=torch.float32, number: float = 2.0, swapped: bool = False) -> str:
    graph = torch.fx.Graph()
    value = graph.placeholder("value_0")
    weights = [graph.placeholder(f"weight_{place}") for place in (1, 2)]
    for node in (value, *weights):
        node.meta["val"] = torch.empty(width, dtype=dtype)
    first, second = weights[::-1] if swapped else weights
    graph.output((graph.call_function(op, (graph.call_function(op, (value, first)), second)), graph.call_function(op, (value, number))))
    return segment_key(torch.fx.GraphModule({}, graph), TOOLCHAIN, 1)


@pytest.mark.parametrize(
    "change", [{"op": torch.ops.aten.add.Tensor}, {"width": 9}, {"dtype": torch.bfloat16}, {"number": 2.0000001}, {"swapped": True}]
)
def test_a_key_differs_with_whatever_decides_the_binary(change):
    assert one_op() == one_op()
    assert one_op(**change) != one_op()


def test_a_key_differs_with_threads_torch_and_processor(monkeypatch):
    graph = segment()
    keys = [segment_key(graph, TOOLCHAIN, 1), segment_key(graph, TOOLCHAIN, 2)]
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    keys.append(segment_key(graph, TOOLCHAIN, 1))
    monkeypatch.setattr(segment_binary, "cpu_features", lambda: ("sse",))
    keys.append(segment_key(graph, TOOLCHAIN, 1))
    assert len(set(keys)) == 4


def test_what_cannot_compile_is_told(monkeypatch):
    assert can_compile(replace(TOOLCHAIN, command="/usr/bin/ccache", options=("g++",))) == (
        "AOTInductor takes a compiler without options, not CXX=/usr/bin/ccache g++"
    )
    assert can_compile(TOOLCHAIN) is None
    monkeypatch.setattr(sys, "platform", "win32")
    assert str(can_compile(TOOLCHAIN)).startswith("segments are compiled on Linux and macOS only, this is ")


def test_another_compiler_is_another_key():
    graph = segment()
    assert segment_key(graph, TOOLCHAIN) != segment_key(graph, replace(TOOLCHAIN, version="g++ 99"))


def test_a_segment_that_torch_cannot_export_is_refused(tmp_path):
    graph = torch.fx.Graph()
    value = graph.placeholder("value_0")
    value.meta["val"] = torch.empty(1, 4)
    graph.output((graph.call_function(torch.ops.aten.view.default, (value, [3])),))
    with pytest.raises(UnsupportedGraphError) as caught:
        compile_segment(torch.fx.GraphModule({}, graph), tmp_path / "toy.pt2", TOOLCHAIN)
    assert str(caught.value).startswith("segment toy: AOTInductor cannot compile it: RuntimeError: ")
    assert str(caught.value).endswith("\n  It runs without being compiled, more slowly.")


def test_the_processors_instruction_sets_are_read_from_cpuinfo(tmp_path):
    (tmp_path / "x86").write_text("processor : 0\nflags\t\t: fpu smep sse2 avx2 fma hypervisor avx512f bmi1\nbugs : spectre\n")
    (tmp_path / "arm").write_text("processor : 0\nFeatures\t: fp asimd evtstrm sve bf16\n")
    assert cpu_features(tmp_path / "x86") == ("avx2", "avx512f", "bmi1", "fma", "sse2")
    assert cpu_features(tmp_path / "arm") == ("asimd", "bf16", "fp", "sve")
    assert len(cpu_features(tmp_path / "missing")) == 1
