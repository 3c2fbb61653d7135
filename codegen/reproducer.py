"""A traced graph as a Python file of its own: the same operators, random weights of the same shapes, the same spec, one call.

The spec is written as it was resolved: patterns with their scores, so that no file is needed.
"""

from __future__ import annotations

import pprint
from dataclasses import replace

import torch

from kvcompile.ir.show import shape_text
from kvcompile.ir.spec import Output, Prefix, Spec

_TEMPLATE = '''"""Repeats a failure of kvcompile's pass {failed}; runs without the original model.

python {{this file}}
"""

from types import SimpleNamespace

import torch
from torch import device, inf, nan  # names that generated code uses

import kvcompile.ir.attend_op  # defines torch.ops.kvc.attend
from kvcompile.compiler import run_passes
from kvcompile.ir.policy import All, HeadPolicy, Int8, Kivi, Sample, SinkRecent, Static, Store, TopK
from kvcompile.ir.spec import HeadRule, Output, Pattern, Prefix, Spec, Target

SPEC = {spec}

WEIGHTS = {{
{weights}
}}


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(max_position_embeddings={context_tokens})
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
    run_passes(SPEC, module=Model().eval())
'''


def captured(graph: torch.fx.GraphModule) -> tuple[str, str]:
    """The graph as text that later changes of it do not touch: its weights' shapes, and its forward."""
    weights = []
    for node in graph.graph.find_nodes(op="get_attr"):
        tensor: object = graph
        for part in node.target.split("."):
            tensor = getattr(tensor, part)
        assert isinstance(tensor, torch.Tensor), shape_text(tensor)
        weights.append(f'    "{node.target}": ({tuple(tensor.shape)}, {tensor.dtype}),')
    return "\n".join(weights), graph.graph.python_code("self").src.strip()


def _of_passes(spec: Spec) -> Spec:
    """What passes read of a spec: no model, no folder, no text to start behind, which needs a tokenizer."""
    return replace(spec, model=None, output=Output(), prefix=Prefix(spec.prefix.relay), lines=dict(spec.lines))


def reproducer_source(weights: str, forward: str, spec: Spec, context_tokens: int | None, failed: str) -> str:
    """The text of a Python file that compiles a captured graph again up to where pass `failed` stopped."""
    return _TEMPLATE.format(
        failed=failed,
        spec=pprint.pformat(_of_passes(spec), width=120, sort_dicts=False),
        weights=weights,
        context_tokens=context_tokens,
        forward="\n".join(f"    {line}" if line.strip() else "" for line in forward.splitlines()),
    )
