"""Group linears: linear layers that read the same value become one `kvc.linears` node.

    q, k, v = linear(x, wq), linear(x, wk), linear(x, wv)  ->  out = linears(x, [wq, wk, wv], []);  q = out[:, :, :576]; ...

1. A linear layer is grouped if it reads [1, tokens, in_features] and its weight, and bias if it has one, are the model's own.
2. Layers share a group if they read the same value between the same two sites, all with a bias or all without.
   Over a site they do not: the result would be kept across it, and computed for tokens that the last segment leaves out.
3. The group stands where its first layer stood.  A layer alone is a group of one, without a slice.
4. Within a group the order is that of the operations that use the results, then the program's: layers whose code differs in
   the order of two lines stay equal segments.
5. A slice has other strides than a result of its own: what is computed from it is traced again, a `view` of it becomes a `reshape`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch

from kvcompile.ir.linear_op import LINEARS
from kvcompile.ir.site_operators import SITES
from kvcompile.ir.tokens import fake_value, token_dimensions
from kvcompile.ir.unit import Unit

_LINEAR = torch.ops.aten.linear.default
_VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)


@dataclass(frozen=True)
class GroupLinears:
    """Query, key and value, gate and up: one node, one kernel call, each weight read once."""

    name: str = "group_linears"
    requires: tuple[str, ...] = ("request_kernels",)

    def run(self, unit: Unit) -> Unit:
        graph = unit.graph.graph
        changed: set[torch.fx.Node] = set()
        for group in _groups(graph):
            changed |= _rewrite(graph, group)
        _trace_again(graph, changed)
        graph.lint()
        unit.graph.recompile()
        return unit

    def ensures(self, unit: Unit) -> None:
        nodes = unit.graph.graph.nodes
        assert not any(_is_ours(node) for node in nodes), "a linear layer was left out"
        assert all(token_dimensions(fake_value(node)) == (1,) for node in nodes if node.target is LINEARS)


def _is_ours(node: torch.fx.Node) -> bool:
    """Rule 1."""
    if node.target is not _LINEAR or node.kwargs:
        return False
    x, *parameters = node.args
    assert isinstance(x, torch.fx.Node)
    value = fake_value(x)
    return (
        value.dim() == 3
        and str(value.shape[0]) == "1"
        and token_dimensions(value) == (1,)
        and all(parameter is None or (isinstance(parameter, torch.fx.Node) and parameter.op == "get_attr") for parameter in parameters)
    )


def _groups(graph: torch.fx.Graph) -> list[list[torch.fx.Node]]:
    """Rule 2."""
    found: dict[tuple[Any, int, bool], list[torch.fx.Node]] = {}
    sites = 0
    for node in graph.nodes:
        if node.target in SITES:
            sites += 1
        elif _is_ours(node):
            found.setdefault((node.args[0], sites, _bias(node) is not None), []).append(node)
    return list(found.values())


def _bias(linear: torch.fx.Node) -> Any:
    return linear.args[2] if len(linear.args) > 2 else None


def _rewrite(graph: torch.fx.Graph, group: list[torch.fx.Node]) -> set[torch.fx.Node]:
    """Puts the group node and its slices in; returns the slices."""
    first = group[0]
    ordered = sorted(group, key=lambda linear: sorted(str(user.target) for user in linear.users))  # rule 4
    weights = [linear.args[1] for linear in ordered]
    biases = [_bias(linear) for linear in ordered if _bias(linear) is not None]
    for parameter in (*weights, *biases):
        assert isinstance(parameter, torch.fx.Node)
        if first < parameter:
            first.prepend(parameter)  # rule 3: its own layer stands further down
    with graph.inserting_before(first):
        out = graph.call_function(LINEARS, (first.args[0], weights, biases))
    out.meta = {**first.meta, **_shared_stack(group), "val": _run(out)}
    if len(group) == 1:
        first.replace_all_uses_with(out)
        graph.erase_node(first)
        return set()
    ends = list(itertools.accumulate(fake_value(linear).shape[2] for linear in ordered))
    slices = set()
    for linear in group:
        end = ends[ordered.index(linear)]
        with graph.inserting_before(linear):
            part = graph.call_function(torch.ops.aten.slice.Tensor, (out, 2, end - fake_value(linear).shape[2], end))
        part.meta = {**linear.meta, "val": _run(part)}
        linear.replace_all_uses_with(part)
        graph.erase_node(linear)
        slices.add(part)
    return slices


def _shared_stack(group: list[torch.fx.Node]) -> dict[str, Any]:
    """The modules around all layers of a group: the group belongs to the attention or the MLP, not to one projection."""
    stacks = [linear.meta.get("nn_module_stack") or {} for linear in group]
    return {"nn_module_stack": {key: entry for key, entry in stacks[0].items() if all(key in stack for stack in stacks)}}


def _run(node: torch.fx.Node) -> Any:
    """What a node computes from the values that the trace recorded for its inputs."""
    arguments, keywords = torch.fx.node.map_arg((node.args, node.kwargs), fake_value)
    return node.target(*arguments, **keywords)  # type: ignore[operator]


def _trace_again(graph: torch.fx.Graph, changed: set[torch.fx.Node]) -> None:
    """Rule 5: record the strides of all that is computed from changed values."""
    for node in graph.nodes:
        if node.op != "call_function" or node in changed or not changed.intersection(node.all_input_nodes):
            continue
        if node.target in _VIEWS:
            node.target = torch.ops.aten.reshape.default
        before, node.meta["val"] = fake_value(node), _run(node)
        if not isinstance(before, torch.Tensor) or _strides(before) != _strides(node.meta["val"]):
            changed.add(node)


def _strides(value: torch.Tensor) -> list[str]:
    return [str(stride) for stride in value.stride()]
