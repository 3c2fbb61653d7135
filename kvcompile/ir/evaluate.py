"""What nodes of a traced graph compute, for a given number of tokens: passes look at functions, not at how they were written."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from kvcompile.ir.tokens import fake_value

_CONTENT_FREE = frozenset(
    {
        *("sym_size", "sym_numel", "sym_stride", "empty_like", "zeros_like", "ones_like", "full_like"),
        *("new_empty", "new_zeros", "new_ones", "new_full"),
    }
)
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class FakeConstantError(Exception):
    """A constant that decides something has no numbers yet: the model was traced before its weights were read."""


def content_nodes(graph: torch.fx.Graph, input_ids: torch.fx.Node, known: Container[torch.fx.Node] = ()) -> set[torch.fx.Node]:
    """The nodes whose values depend on which tokens there are, not only on how many and where; and not through `known` ones."""
    found = {input_ids}
    for node in graph.nodes:
        computes = node.op == "call_function" and node not in known and opname(node) not in _CONTENT_FREE
        if computes and found.intersection(node.all_input_nodes):
            found.add(node)
    return found


def opname(node: torch.fx.Node) -> str:
    """ "softmax" of `aten.softmax.int`, whatever the overload; the function's name for anything else."""
    target: Any = node.target
    return target._opname if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", str(target))


def size_at(size: int | torch.SymInt, tokens: int) -> int:
    """A size of a fake tensor for `tokens` tokens."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    return int(size.node.expr.subs(dict.fromkeys(size.node.expr.free_symbols, tokens)))


def shape_at(node: torch.fx.Node, tokens: int) -> list[int]:
    """The shape of what a node computes for `tokens` tokens."""
    return [size_at(size, tokens) for size in fake_value(node).shape]


def evaluate_nodes(
    nodes: Sequence[torch.fx.Node],
    known: Mapping[torch.fx.Node, Any],
    *,
    compute: torch.dtype | None = None,
    arguments: Mapping[torch.fx.Node, tuple[tuple[Any, ...], dict[str, Any]]] | None = None,
) -> list[Any]:
    """The values of `nodes` from those of `known` nodes and the graph's own constants.

    arguments: other arguments and keywords for some nodes, to see what a constant does.
    compute: every floating number is of this dtype, whatever the graph casts to: rounding would blur a scale.
    Raises LookupError where an input is needed that is not known, FakeConstantError where a constant has no numbers.
    """
    values: dict[torch.fx.Node, Any] = dict(known)
    needed = ancestors(nodes, values)
    for node in nodes[0].graph.nodes if nodes else ():
        if node in values or node not in needed:
            continue
        if node.op == "get_attr":
            values[node] = _constant(node)
        elif node.op != "call_function":
            raise LookupError(node.name)
        else:
            given = (arguments or {}).get(node, (node.args, dict(node.kwargs)))
            positional, keywords = torch.fx.node.map_aggregate(given, lambda item: _argument(item, values, compute))
            values[node] = node.target(*positional, **keywords)
        if compute is not None:
            values[node] = _as_dtype(values[node], compute)
    return [values[node] for node in nodes]


def ancestors(nodes: Iterable[torch.fx.Node], known: Container[torch.fx.Node]) -> set[torch.fx.Node]:
    """`nodes` and all that they are computed from, up to `known` ones."""
    found: set[torch.fx.Node] = set()
    queue = list(nodes)
    while queue:
        node = queue.pop()
        if node not in found and node not in known:
            found.add(node)
            queue += node.all_input_nodes
    return found


def _argument(item: Any, values: Mapping[torch.fx.Node, Any], compute: torch.dtype | None) -> Any:
    if isinstance(item, torch.fx.Node):
        return values[item]
    if compute is not None and item in _FLOATS:
        return compute
    return item


def _as_dtype(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor) and value.dtype in _FLOATS:
        return value.to(dtype)
    if isinstance(value, (list, tuple)):
        return type(value)(_as_dtype(item, dtype) for item in value)
    return value


def _constant(node: torch.fx.Node) -> Tensor:
    owner: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        owner = getattr(owner, part)
    if isinstance(owner, FakeTensor) or owner.device.type == "meta":
        raise FakeConstantError(str(node.target))
    tensor: Tensor = owner.detach()
    return tensor
