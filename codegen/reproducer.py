"""A traced graph as a Python file of its own: the same operators, random weights of the same shapes, one call to kvcompile."""

from __future__ import annotations

import torch

from kvcompile.ir.show import shape_text

_TEMPLATE = '''"""Repeats a failure of kvcompile's pass {failed}; runs without the original model.

python {{this file}}
"""

import torch
from torch import device, inf, nan  # names that generated code uses

import kvcompile
import kvcompile.ir.attend_op  # defines torch.ops.kvc.attend

WEIGHTS = {{
{weights}
}}


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        for name, (shape, dtype) in WEIGHTS.items():
            *path, leaf = name.split(".")
            owner = self
            for part in path:
                if not hasattr(owner, part):
                    owner.add_module(part, torch.nn.Module())
                owner = getattr(owner, part)
            owner.register_buffer(leaf, (torch.randn(shape) * 0.02).to(dtype))

{forward}

if __name__ == "__main__":
    kvcompile.compile(Model().eval(), spec={{"kvcompile": 1}})
'''


def reproducer_source(graph: torch.fx.GraphModule, failed: str) -> str:
    """The text of a Python file that compiles `graph` again up to where pass `failed` stopped."""
    weights = []
    for node in graph.graph.find_nodes(op="get_attr"):
        tensor: object = graph
        for part in node.target.split("."):
            tensor = getattr(tensor, part)
        assert isinstance(tensor, torch.Tensor), shape_text(tensor)
        weights.append(f'    "{node.target}": ({tuple(tensor.shape)}, {tensor.dtype}),')
    forward = graph.graph.python_code("self").src.strip()
    return _TEMPLATE.format(
        failed=failed,
        weights="\n".join(weights),
        forward="\n".join(f"    {line}" if line.strip() else "" for line in forward.splitlines()),
    )
