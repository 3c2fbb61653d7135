"""A program: the outlined graph as a flat list of steps, segments and sites in turn, and what runs it.

Batch is 1 and all sessions' tokens are packed along the token dimension, each with its own position.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from kvcompile.ir.attend_op import ATTEND
from kvcompile.ir.convolve_op import CONVOLVE
from kvcompile.ir.tokens import fake_value, token_dimensions


class Segment(Protocol):
    """What runs between two sites."""

    def bind(self, weights: Sequence[Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        """The segment with one layer's weights: a function of the activations alone."""
        ...


@dataclass(frozen=True)
class EagerSegment:
    """A segment that torch runs node by node."""

    module: torch.fx.GraphModule

    def bind(self, weights: Sequence[Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        forward: Callable[..., tuple[Tensor, ...]] = self.module.forward
        return lambda *activations: forward(*activations, *weights)


@dataclass(frozen=True)
class CallSegment:
    """Run a segment: values in slots `inputs` to values in slots `outputs`; `frees` are not needed afterwards.

    run:        the segment with this call's weights.
    token_dims: for each input the dimension that counts tokens, or None (a table).
    """

    name: str
    run: Callable[..., tuple[Tensor, ...]]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    frees: tuple[int, ...]
    token_dims: tuple[int | None, ...]


@dataclass(frozen=True)
class Attend:
    """Attend at a site: slots of query, key, value, and, None when there is none, of learnt sinks, sink query and what chooses keys;
    of the result.

    frees: those that are not needed afterwards; layers that share keys or values still need theirs.
    """

    site: int
    query: int
    key: int
    value: int
    learnt_sinks: int | None
    sink_query: int | None
    choosing: int | None
    output: int
    frees: tuple[int, ...]


@dataclass(frozen=True)
class Convolve:
    """Convolve at a site: slots of input, weight, bias (None when there is none) and of the result; frees: as of `Attend`."""

    site: int
    input: int
    weight: int
    bias: int | None
    output: int
    frees: tuple[int, ...]


class Memory(Protocol):
    """What sites remember of earlier tokens: the sessions of one call.  `final`: only the wanted rows are asked for."""

    def attend(
        self,
        site: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        sink_query: Tensor | None,
        final: bool,
        choosing: Tensor | None = None,
    ) -> Tensor:
        """[1, rows, query_heads, value_dim] of query [1, query_heads, tokens, head_dim], key and value."""
        ...

    def convolve(self, site: int, input: Tensor, weight: Tensor, bias: Tensor | None, final: bool) -> Tensor:
        """[1, channels, rows] of input [1, channels, tokens]."""
        ...


@dataclass(frozen=True)
class Program:
    """Steps over numbered slots; slots 0 and 1 are input_ids and position_ids.

    weights: slot to tensor.  Segments are bound to theirs; sites read their learnt sinks and their filters here.
    """

    steps: tuple[CallSegment | Attend | Convolve, ...]
    weights: Mapping[int, Tensor]
    result: int

    @classmethod
    def from_graph(cls, module: torch.fx.GraphModule, segments: Mapping[str, Segment] | None = None) -> Program:
        """The steps of a graph that `outline_segments` made.  segments: what to run for each name; None: the graph's own, eagerly."""
        if segments is None:
            names = {str(node.target) for node in module.graph.find_nodes(op="call_module")}
            segments = {name: EagerSegment(_submodule(module, name)) for name in names}
        slots = {node: slot for slot, node in enumerate(module.graph.find_nodes(op="placeholder"))}
        weights: dict[int, Tensor] = {}
        steps: list[CallSegment | Attend | Convolve] = []
        last_use = {source: node for node in module.graph.nodes for source in node.all_input_nodes}
        for node in module.graph.nodes:
            if node.op == "output" or node in slots:
                continue
            slots[node] = len(slots)
            if node.op == "get_attr":
                weights[slots[node]] = _attribute(module, node.target)
            elif node.op == "call_module":
                parts = {user.args[1]: user for user in node.users if user.target is operator.getitem}
                for place in range(len(parts)):
                    slots[parts[place]] = len(slots)
                arguments: tuple[Any, ...] = node.args
                constants = [argument for argument in arguments if argument.op == "get_attr"]  # behind the activations
                arguments = arguments[: len(arguments) - len(constants)]
                assert not any(argument.op == "get_attr" for argument in arguments), node
                steps.append(
                    CallSegment(
                        name=node.target,
                        run=segments[node.target].bind([weights[slots[constant]] for constant in constants]),
                        inputs=tuple(slots[argument] for argument in arguments),
                        outputs=tuple(slots[parts[place]] for place in range(len(parts))),
                        frees=tuple(slots[a] for a in _last_used(node, last_use)),
                        token_dims=tuple(_token_dim(argument) for argument in arguments),
                    )
                )
            elif node.target is ATTEND:
                query, key, value, sinks, site = node.args[:5]
                sink_query, choosing = [*node.args[10:12], None, None][:2]
                learnt, shown, chosen = (slots[each] if each is not None else None for each in (sinks, sink_query, choosing))
                frees = tuple(slots[a] for a in _last_used(node, last_use))
                steps.append(Attend(site, slots[query], slots[key], slots[value], learnt, shown, chosen, slots[node], frees))
            elif node.target is CONVOLVE:
                arguments = node.args
                source, weight, bias, site = arguments
                frees = tuple(slots[a] for a in _last_used(node, last_use))
                steps.append(Convolve(site, slots[source], slots[weight], None if bias is None else slots[bias], slots[node], frees))
        (output,) = module.graph.find_nodes(op="output")
        return cls(tuple(steps), weights, slots[output.args[0]])

    @functools.cached_property
    def final_site(self) -> int:
        """The place of the last site among the steps; -1 when there is none."""
        return max((place for place, step in enumerate(self.steps) if not isinstance(step, CallSegment)), default=-1)

    @functools.cached_property
    def ends_with_attention(self) -> bool:
        """Whether the last site is an attention."""
        return self.final_site >= 0 and isinstance(self.steps[self.final_site], Attend)

    def run(self, input_ids: Tensor, position_ids: Tensor, memory: Memory, wanted: Tensor | None) -> Tensor:
        """Logits [1, rows, vocabulary] of the tokens numbered by `wanted` [rows] (None: of all tokens).

        input_ids, position_ids: [1, tokens] int64.  The last site is asked for the wanted rows only, and the last
        segment runs on them only: logits of 8,192 tokens over 49,152 words would be 1.6 GB.
        """
        values: dict[int, Tensor] = {0: input_ids, 1: position_ids}
        final_site = self.final_site
        for place, step in enumerate(self.steps):
            if isinstance(step, Attend):
                sinks = self.weights[step.learnt_sinks] if step.learnt_sinks is not None else None
                query, key, value = values[step.query], values[step.key], values[step.value]
                sink_query = values[step.sink_query] if step.sink_query is not None else None
                choosing = values[step.choosing] if step.choosing is not None else None
                for slot in step.frees:
                    del values[slot]
                values[step.output] = memory.attend(step.site, query, key, value, sinks, sink_query, place == final_site, choosing)
                continue
            if isinstance(step, Convolve):
                source = values[step.input]
                weight, bias = (None if slot is None else self.weights.get(slot, values.get(slot)) for slot in (step.weight, step.bias))
                assert weight is not None
                for slot in step.frees:
                    del values[slot]
                values[step.output] = memory.convolve(step.site, source, weight, bias, place == final_site)
                continue
            inputs = [values[slot] for slot in step.inputs]
            if wanted is not None and place > final_site:
                attended = self.steps[final_site].output  # type: ignore[union-attr]
                for number, (slot, dim) in enumerate(zip(step.inputs, step.token_dims, strict=True)):
                    if dim is not None and slot != attended:
                        inputs[number] = inputs[number].index_select(dim, wanted)
            for slot, out in zip(step.outputs, step.run(*inputs), strict=True):
                values[slot] = out
            for slot in step.frees:
                del values[slot]
        return values[self.result]


def _last_used(node: torch.fx.Node, last_use: Mapping[torch.fx.Node, torch.fx.Node]) -> list[torch.fx.Node]:
    """The computed inputs of a node that no later node needs."""
    return [source for source in node.all_input_nodes if last_use[source] is node and source.op == "call_function"]


def _token_dim(node: torch.fx.Node) -> int | None:
    dims = token_dimensions(fake_value(node))
    return dims[0] if dims else None


def _submodule(module: torch.fx.GraphModule, name: str) -> torch.fx.GraphModule:
    segment = module.get_submodule(name)
    assert isinstance(segment, torch.fx.GraphModule)
    return segment


def _attribute(module: torch.fx.GraphModule, target: str) -> Tensor:
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    assert isinstance(value, Tensor)
    return value
