"""Outline segments: cut the graph at its sites, attentions and convolutions alike; equal pieces become one sub-graph, called many times.

    input_ids, position_ids -> segment_0 -> attend 0 -> segment_1 -> attend 1 -> ... -> logits

1. A node belongs to the segment between the sites that stand before and behind it in program order.
2. Weights are inputs of a segment, not parts: layers of equal shape are then equal segments.
3. A view with several rows a token is made again behind a cut, from what it views: what crosses a cut has one row a token.
4. No size crosses a cut: each segment takes the number of tokens from its own inputs, and its size arithmetic with it.
5. Equal segments are found by Weisfeiler-Lehman hash and confirmed by isomorphism, which also tells how inputs match.
"""

from __future__ import annotations

import operator
import warnings
from dataclasses import dataclass, field

import networkx as nx
import torch

from kvcompile.ir.errors import Problem, UnsupportedGraphError
from kvcompile.ir.graphs import to_networkx
from kvcompile.ir.show import node_text
from kvcompile.ir.site_operators import SITES, site_nodes
from kvcompile.ir.tokens import fake_value, is_size, place_of, token_dimensions
from kvcompile.ir.unit import Unit

_VIEWS = frozenset({"view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "alias", "clone"})


@dataclass(frozen=True)
class OutlineSegments:
    """Between two sites the model is a function of one token: that function becomes a segment, shared by equals."""

    name: str = "outline_segments"
    requires: tuple[str, ...] = ("check_token_wise", "request_kernels")

    def run(self, unit: Unit) -> Unit:
        _remake_views(unit.graph.graph)
        pieces = _cut(unit.graph.graph)
        _refuse_uneven_cuts(self.name, unit.graph.graph, pieces)
        distinct = _Distinct()
        top = torch.fx.Graph()
        values: dict[torch.fx.Node, torch.fx.Node] = {}
        for node in unit.graph.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                values[node] = top.node_copy(node)
        for piece, site in zip(pieces, [*site_nodes(unit.graph.graph), None], strict=True):
            if piece.outputs:
                _call(top, values, piece, *distinct.find(piece.build()))
            if site is not None:
                values[site] = top.node_copy(site, lambda node: values[node])
        (output,) = unit.graph.graph.find_nodes(op="output")
        top.output(values[output.args[0]])
        for index, segment in enumerate(distinct.segments):
            unit.graph.add_submodule(f"segment_{index}", segment)
        unit.graph.graph = top
        unit.graph.recompile()
        return unit

    def ensures(self, unit: Unit) -> None:
        nodes = unit.graph.graph.nodes
        assert not any(is_size(node) for node in nodes), "a size crosses a cut"
        assert all(node.target in (*SITES, operator.getitem) for node in nodes if node.op == "call_function")
        assert len(site_nodes(unit.graph.graph)) == len(unit.sites) + len(unit.convolutions)


@dataclass
class _Piece:
    """The nodes between two sites, the tensors they take from outside and those that others take from them."""

    nodes: list[torch.fx.Node] = field(default_factory=list)
    inputs: list[torch.fx.Node] = field(default_factory=list)
    outputs: list[torch.fx.Node] = field(default_factory=list)

    def build(self) -> torch.fx.GraphModule:
        graph = torch.fx.Graph()
        local: dict[torch.fx.Node, torch.fx.Node] = {}
        for number, node in enumerate(self.inputs):
            local[node] = graph.placeholder(f"{'weight' if node.op == 'get_attr' else 'value'}_{number}")
            local[node].meta = {key: node.meta[key] for key in ("val",) if key in node.meta}
        tokens = next((node, dims[0]) for node in self.inputs if (dims := token_dimensions(fake_value(node))))

        def take(node: torch.fx.Node) -> torch.fx.Node:
            if node not in local:
                assert is_size(node), f"{node} is defined outside its segment"
                if node.target is torch.ops.aten.sym_size.int:
                    source, dim = tokens
                    local[node] = graph.call_function(torch.ops.aten.sym_size.int, (local[source], dim))
                else:
                    local[node] = graph.node_copy(node, take)
                local[node].meta = dict(node.meta)
            return local[node]

        for node in self.nodes:
            local[node] = graph.node_copy(node, take)
        graph.output(tuple(local[node] for node in self.outputs))
        return torch.fx.GraphModule({}, graph, class_name="Segment")


def _remake_views(graph: torch.fx.Graph) -> None:
    """Rule 3."""
    tokens = str(fake_value(graph.find_nodes(op="placeholder")[0]).shape[1])
    piece = 0
    home: dict[torch.fx.Node, int] = {}
    for node in graph.nodes:
        piece += node.target in SITES
        home[node] = piece
    for node in reversed(list(graph.nodes)):
        if getattr(node.target, "_opname", "") not in _VIEWS or _is_even(node, tokens):
            continue
        for user in [user for user in node.users if home[user] != home[node]]:
            with graph.inserting_before(user):
                copy = graph.node_copy(node)
            home[copy] = home[user]
            user.replace_input_with(node, copy)
    graph.eliminate_dead_code()


def _is_even(node: torch.fx.Node, tokens: str) -> bool:
    """Whether a value has one row, or none, a token."""
    value = fake_value(node)
    return all(str(value.shape[dim]) == tokens for dim in token_dimensions(value))


def _cut(graph: torch.fx.Graph) -> list[_Piece]:
    pieces = [_Piece()]
    home: dict[torch.fx.Node, int] = {}
    for node in graph.nodes:
        if node.target in SITES:
            pieces.append(_Piece())
        elif node.op == "call_function" and not is_size(node):
            home[node] = len(pieces) - 1
            pieces[-1].nodes.append(node)
    for index, piece in enumerate(pieces):
        queue = list(piece.nodes)
        while queue:
            node = queue.pop(0)
            for source in node.all_input_nodes:
                if is_size(source):
                    queue.append(source) if source.target is not torch.ops.aten.sym_size.int else None
                elif home.get(source) != index and source not in piece.inputs:
                    piece.inputs.append(source)
        piece.inputs.sort(key=lambda node: node.op == "get_attr")  # activations first, weights behind, each by first use
        outside = [node for node in piece.nodes if any(home.get(user) != index and not is_size(user) for user in node.users)]
        piece.outputs = outside
    return pieces


def _refuse_uneven_cuts(pass_name: str, graph: torch.fx.Graph, pieces: list[_Piece]) -> None:
    """The last segment runs on the wanted tokens only, so every value that crosses a cut has one row, or none, a token."""
    tokens = str(fake_value(graph.find_nodes(op="placeholder")[0]).shape[1])
    for node in (node for piece in pieces for node in piece.outputs):
        if not _is_even(node, tokens):
            raise UnsupportedGraphError(
                Problem(
                    f"{pass_name}: {place_of(node)}",
                    f"a value with several rows a token is kept across an attention: {node_text(node).strip()}",
                    "Keep it as [1, tokens, ...].",
                )
            )


class _Distinct:
    """The distinct segments found so far."""

    def __init__(self) -> None:
        self.segments: list[torch.fx.GraphModule] = []
        self._graphs: list[nx.DiGraph] = []
        self._by_hash: dict[str, list[int]] = {}

    def find(self, segment: torch.fx.GraphModule) -> tuple[int, list[int]]:
        """The number of the equal segment, and for each of *its* inputs the index of this segment's input."""
        graph = to_networkx(segment.graph)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # networkx 3.5 tells of a change in the hash, which is not kept anywhere here
            key = nx.weisfeiler_lehman_graph_hash(graph, node_attr="label", edge_attr="slots", iterations=4)
        names = [node.name for node in segment.graph.find_nodes(op="placeholder")]
        for index in self._by_hash.get(key, []):
            matcher = nx.isomorphism.DiGraphMatcher(
                self._graphs[index],
                graph,
                node_match=lambda one, other: one["label"] == other["label"],
                edge_match=lambda one, other: one["slots"] == other["slots"],
            )
            if matcher.is_isomorphic():
                known = [node.name for node in self.segments[index].graph.find_nodes(op="placeholder")]
                return index, [names.index(matcher.mapping[name]) for name in known]
        self.segments.append(segment)
        self._graphs.append(graph)
        self._by_hash.setdefault(key, []).append(len(self.segments) - 1)
        return len(self.segments) - 1, list(range(len(names)))


def _call(top: torch.fx.Graph, values: dict[torch.fx.Node, torch.fx.Node], piece: _Piece, index: int, order: list[int]) -> None:
    call = top.call_module(f"segment_{index}", tuple(values[piece.inputs[place]] for place in order))
    call.meta = {"val": tuple(fake_value(node) for node in piece.outputs)}
    for place, node in enumerate(piece.outputs):
        values[node] = top.call_function(operator.getitem, (call, place))
        values[node].meta = {"val": fake_value(node)}
