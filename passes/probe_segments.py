"""Probe segments: each distinct segment is run on chosen numbers, to see that it is a function of one token.

`check_token_wise` reads the graph and knows its operators; this looks at what they compute, with the model's weights:

1. Another token in one place, early among the others, changes no other token's result.
2. The first tokens alone give what they give among the others (a routing or a maximum over the call would show).
3. So do positions: one token far away, at the other end of the declared context, changes nothing for the rest.

In float32, whatever the model's dtype, and up to TOLERANCE: a mixture of experts that batches its tokens differently differs by
1e-7, what leaks differs by 1e-3.  Source of the threshold: measurements on 40 families, DESIGN.md.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from kvcompile.ir.errors import Problem, UnsupportedGraphError
from kvcompile.ir.evaluate import evaluate_nodes, size_at
from kvcompile.ir.show import node_text
from kvcompile.ir.tokens import fake_value, place_of, token_dimensions

TOKENS, PREFIX, CHANGED = 8, 5, 1
TOLERANCE = 1e-5  # of a result's largest value
_FAR = 32767  # a position, where no context is declared


def probe_segments(module: torch.fx.GraphModule, positions: int | None) -> None:
    """Probes every distinct segment of an outlined graph whose weights are loaded.

    positions: how many the model has, learnt or declared; None: unknown.
    Raises UnsupportedGraphError naming the first node whose result for one token depends on another one.
    """
    input_ids, position_ids = module.graph.find_nodes(op="placeholder")
    probed = set()
    for call in module.graph.find_nodes(op="call_module"):
        if call.target in probed:
            continue
        probed.add(call.target)
        segment = module.get_submodule(str(call.target))
        assert isinstance(segment, torch.fx.GraphModule)
        inputs = segment.graph.find_nodes(op="placeholder")
        sources: list[torch.fx.Node] = [source for source in call.args if isinstance(source, torch.fx.Node)]
        _Probe(segment, inputs, sources, input_ids, position_ids, (positions or _FAR + 1) - 1).run()


class _Probe:
    """One segment and the numbers that it is given.  sources: where each input comes from in the outlined graph."""

    def __init__(
        self,
        segment: torch.fx.GraphModule,
        inputs: Sequence[torch.fx.Node],
        sources: Sequence[torch.fx.Node],
        input_ids: torch.fx.Node,
        position_ids: torch.fx.Node,
        last_position: int,
    ) -> None:
        self.segment = segment
        generator = torch.Generator().manual_seed(0)
        self.weights: dict[torch.fx.Node, Tensor] = {}
        self.rows: dict[torch.fx.Node, Tensor] = {}
        self.others: dict[torch.fx.Node, Tensor] = {}  # the same, with another token in place CHANGED
        (self.output,) = segment.graph.find_nodes(op="output")
        vocabulary = self._vocabulary(inputs, sources, input_ids)
        for node, source in zip(inputs, sources, strict=True):
            if source.op == "get_attr":
                self.weights[node] = _weight(source)
                continue
            value = fake_value(node)
            shape = [size_at(size, TOKENS) for size in value.shape]
            if source is position_ids:
                one = torch.arange(TOKENS)[None]
                other = one.clone()
                other[0, CHANGED] = last_position
            elif value.is_floating_point() or value.is_complex():
                one, other = (torch.randn(shape, generator=generator, dtype=value.dtype) for _ in range(2))
            else:
                high = vocabulary if source is input_ids else 2
                one = torch.randint(high, shape, generator=generator).to(value.dtype)
                other = (one + 1) % high
            self.rows[node] = one
            self.others[node] = other if source is position_ids else _exchanged(one, other, token_dimensions(value))

    @staticmethod
    def _vocabulary(inputs: Sequence[torch.fx.Node], sources: Sequence[torch.fx.Node], input_ids: torch.fx.Node) -> int:
        """Rows of the tables that token ids look up; 2 where they look up none."""
        ids = [node for node, source in zip(inputs, sources, strict=True) if source is input_ids]
        tables = [user.args[0] for node in ids for user in node.users if user.target is torch.ops.aten.embedding.default]
        return min((int(fake_value(table).shape[0]) for table in tables if isinstance(table, torch.fx.Node)), default=2)

    def run(self) -> None:
        nodes = [node for node in self.segment.graph.nodes if node.op == "call_function" and token_dimensions(fake_value(node))]
        results = self.output.args[0]
        assert isinstance(results, (tuple, list))
        wanted = [node for node in results if isinstance(node, torch.fx.Node) and token_dimensions(fake_value(node))]
        if not wanted:
            return
        together = self._values(wanted, self.rows)
        changed = self._values(wanted, self.others)
        alone = self._values(wanted, {node: _first(rows, token_dimensions(fake_value(node))) for node, rows in self.rows.items()})
        for node in wanted:
            (dim,) = token_dimensions(fake_value(node))
            size = together[node].shape[dim] // TOKENS
            if size * TOKENS != together[node].shape[dim] or size != 1:
                continue
            keep = [token for token in range(TOKENS) if token != CHANGED]
            if _differ(together[node].index_select(dim, torch.tensor(keep)), changed[node].index_select(dim, torch.tensor(keep))):
                raise self._refusal(nodes, self.others, "a result changes with what stands in another token's place")
            if _differ(together[node].narrow(dim, 0, PREFIX), alone[node]):
                raise self._refusal(nodes, None, "a token's result changes with how many tokens stand beside it")

    def _values(self, nodes: Sequence[torch.fx.Node], rows: dict[torch.fx.Node, Tensor]) -> dict[torch.fx.Node, Tensor]:
        found = evaluate_nodes(nodes, {**self.weights, **rows}, compute=torch.float32)
        return dict(zip(nodes, found, strict=True))

    def _refusal(self, nodes: list[torch.fx.Node], others: dict[torch.fx.Node, Tensor] | None, what: str) -> UnsupportedGraphError:
        """Names the first node that shows it: everything before it was still a function of one token."""
        first = nodes[-1]
        if others is None:
            others = {node: _first(rows, token_dimensions(fake_value(node))) for node, rows in self.rows.items()}
        for node in nodes:
            dims = token_dimensions(fake_value(node))
            if len(dims) != 1 or node.target is operator.getitem:
                continue
            one, two = self._values([node], self.rows)[node], self._values([node], others)[node]
            if one.shape == two.shape:
                keep = torch.tensor([token for token in range(one.shape[dims[0]]) if token != CHANGED])
                one, two = one.index_select(dims[0], keep), two.index_select(dims[0], keep)
            else:
                one = one.narrow(dims[0], 0, two.shape[dims[0]])
            if _differ(one, two):
                first = node
                break
        return UnsupportedGraphError(
            Problem(
                f"probe_segments: {place_of(first)}",
                f"{what}: {node_text(first).strip()}",
                "Between two attentions every token must be computed from itself alone.",
            )
        )


def _weight(source: torch.fx.Node) -> Tensor:
    (value,) = evaluate_nodes([source], {}, compute=torch.float32)
    assert isinstance(value, Tensor)
    return value


def _exchanged(one: Tensor, other: Tensor, dims: tuple[int, ...]) -> Tensor:
    """`one` with `other` in place CHANGED; a table, which has no token dimension, stays."""
    if not dims:
        return one
    made = one.clone()
    made.select(dims[0], CHANGED).copy_(other.select(dims[0], CHANGED))
    return made


def _first(rows: Tensor, dims: tuple[int, ...]) -> Tensor:
    return rows.narrow(dims[0], 0, PREFIX).contiguous() if dims else rows


def _differ(one: Tensor, two: Tensor) -> bool:
    if not one.is_floating_point():
        return not torch.equal(one, two)
    alike = (one == two) | (one.isnan() & two.isnan())  # a masked word is -inf in both
    finite = torch.where(one.isfinite(), one, 0.0)
    return not float(torch.where(alike, 0.0, one - two).abs().max()) <= TOLERANCE * max(1.0, float(finite.abs().max()))
