"""One segment of a toy model as AOTInductor compiled it: made once a run, for it takes about 10 s."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
import toys
from units import after

from kvcompile.codegen.segment_binary import can_compile, compile_segment
from kvcompile.codegen.toolchain import Toolchain, find_toolchain, why_none
from kvcompile.ir.segment_description import TOKENS, SegmentDescription

TOOLCHAIN = find_toolchain() or Toolchain("/no/compiler", "none", "gcc")


def segment(dtype: torch.dtype = torch.bfloat16, layers: int = 2, **sizes: int) -> torch.fx.GraphModule:
    """What a Llama computes between two attentions: inputs attended, residual, cos, sin, then 9 weights."""
    found = after("outline_segments", toys.llama(layers=layers, **sizes).to(dtype)).graph.get_submodule("segment_1")
    assert isinstance(found, torch.fx.GraphModule)
    return found


@cache
def compiled() -> tuple[torch.fx.GraphModule, Path, SegmentDescription]:
    """The segment, its package and description; skips the test where there is no compiler."""
    if find_toolchain() is None:
        pytest.skip(f"no C++ compiler: {why_none()}")
    assert can_compile(TOOLCHAIN) is None
    folder = Path(tempfile.mkdtemp(prefix="kvcompile-test-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    graph = segment()
    return graph, folder / "toy.pt2", compile_segment(graph, folder / "toy.pt2", TOOLCHAIN, threads=1)


def inputs(description: SegmentDescription, tokens: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Random activations and weights of the described shapes."""
    generator = torch.Generator().manual_seed(tokens)

    def random(layouts, scale: float) -> list[torch.Tensor]:
        sizes = [[tokens if size == TOKENS else size for size in layout.sizes] for layout in layouts]
        return [
            (torch.randn(size, generator=generator) * scale).to(getattr(torch, layout.dtype))
            for size, layout in zip(sizes, layouts, strict=True)
        ]

    return random(description.activations, 1.0), random(description.weights, 0.2)
