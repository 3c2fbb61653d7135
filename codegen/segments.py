"""The distinct segments of an outlined graph as readable Python source."""

from __future__ import annotations

import torch

from kvcompile.ir.linear_op import LINEARS
from kvcompile.ir.show import shape_text

_HEADER = '''"""{name}: what the model computes between two attentions, called {calls} times.

Made by kvcompile from the traced graph; print it again with: kvcompile SPEC --show source
"""

import torch
from torch import device, inf, nan
'''
_LINEARS_IMPORT = "import kvcompile.ir.linear_op  # it defines torch.ops.kvc.linears\n"


def segment_sources(graph: torch.fx.GraphModule) -> dict[str, str]:
    """Source text by segment name, in order of first call; {} when nothing was outlined."""
    calls: dict[str, int] = {}
    for node in graph.graph.find_nodes(op="call_module"):
        calls[node.target] = calls.get(node.target, 0) + 1
    return {name: _source(name, count, graph.get_submodule(name)) for name, count in sorted(calls.items())}


def _source(name: str, calls: int, segment: torch.nn.Module) -> str:
    assert isinstance(segment, torch.fx.GraphModule)
    tensors = [f"# {node.name}: {shape_text(node.meta.get('val'))}" for node in segment.graph.find_nodes(op="placeholder")]
    code = segment.graph.python_code("self").src.strip().replace("def forward(self, ", f"def {name}(", 1)
    header = _HEADER.format(name=name, calls=calls)
    if segment.graph.find_nodes(op="call_function", target=LINEARS):
        header += "\n" + _LINEARS_IMPORT
    return "\n".join([header, "", *tensors, code, ""])
