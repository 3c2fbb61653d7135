"""Rotate sink queries: under `positions: cache_index` the sinks are shown a second query, rotated to its place in the cache.

    query at p      = R(x, p)                            x: what the model rotates, R: its own operators
    sink_query at p = R(x, min(p, sink_tokens + recent_tokens - 1))

StreamingLLM (section 3.2) counts positions within the cache: the sinks stay where they are, the recent window moves to stand
behind them, the query stands last.  Rotations are relative, so keys keep their own positions and only the query's place among
the sinks differs.

1. A pure node depends on `position_ids` and not on `input_ids`.  Between a site's query and the nearest projections or sites
   above it, the rotation is every node that a pure value enters, and what is computed from those.  Where none enters, the
   query knows no position, and cache_index changes nothing.
2. The rotation is copied with each pure value computed again from the clamped positions: no formula is rebuilt.  What knows no
   position (the projection, its norm, its swapped halves) is not copied but shared.
3. One copy of a pure value serves all sites of equal windows, so equal layers stay equal segments.
4. A layer with a window of its own keeps it, and with it absolute positions.
5. A rotation must be relative: `check_shift_invariance` looks at its numbers once the weights are read.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kvcompile.ir.attend_op import ATTEND
from kvcompile.ir.errors import Problem, SpecError
from kvcompile.ir.evaluate import content_nodes, evaluate_nodes, opname, shape_at, size_at
from kvcompile.ir.linear_op import LINEARS
from kvcompile.ir.plan import Plan, SitePlan
from kvcompile.ir.policy import SinkRecent
from kvcompile.ir.site_operators import SITES
from kvcompile.ir.tokens import fake_value, is_size
from kvcompile.ir.unit import Unit

TOLERANCE = 1e-5  # of the largest q.k, in float64: rotations that are computed differ by 1e-12, what is not relative by more than 1e-3
ANGLE_ROUNDING = 2.0**-24  # of a position: a table of sines was made from angles in float32, and is kept in the model's dtype
UNDECLARED_CONTEXT_TOKENS = 32768  # a model that declares no context is looked at up to here
_PROJECTIONS = frozenset({"linear", "matmul", "mm", "bmm", "mv", "addmm", "baddbmm", "einsum", "embedding", "convolution"})
_SINK_QUERY = 10  # its place among kvc.attend's arguments
_DEFAULTS: tuple[Any, ...] = (0, [], None)  # of the three arguments up to it: with what chooses keys behind, no site is rotated


@dataclass(frozen=True)
class RotateSinkQueries:
    """Sites with a policy of `positions: cache_index` get a `sink_query`; a model without rotations is refused."""

    name: str = "rotate_sink_queries"
    requires: tuple[str, ...] = ("check_token_wise", "build_zones")

    def run(self, unit: Unit) -> Unit:
        assert unit.plan is not None
        asked = [site.index for site in unit.sites if any(policy.positions == "cache_index" for policy in unit.policies[site.index])]
        limits, problems = _limits(unit)
        graph = unit.graph.graph
        flow = _Flow.of(graph)
        rotations: dict[int, list[torch.fx.Node]] = {}
        nodes = graph.find_nodes(op="call_function", target=ATTEND)
        for node in nodes:
            site = int(node.args[4])
            if site not in limits:
                continue
            if unit.sites[site].slopes:
                what = f"{_path(unit, site)} tells distances by ALiBi slopes, which know no place in the cache."
                problems.append(Problem(_where(unit, site), what, "Write positions: absolute."))
            elif rotation := flow.rotation(node.args[0]):
                rotations[site] = rotation
        if limits and not problems and not any(flow.rotation(node.args[0]) for node in nodes):
            site = min(limits)
            what = f"{_path(unit, site)} has no rotary positions, and no other layer has: there is nothing that cache_index could change."
            problems.append(Problem(_where(unit, site), what, "Write positions: absolute."))
        if problems:
            raise SpecError(*problems)
        copies = _Copies(graph, flow)
        for node in nodes:
            if (site := int(node.args[4])) in rotations:
                arguments = node.args + _DEFAULTS[len(node.args) - 8 :]
                node.args = (*arguments[:_SINK_QUERY], copies.rotated(rotations[site], node, limits[site]))
        graph.lint()
        unit.graph.recompile()
        return replace(unit, plan=_with_positions(unit.plan, asked, limits, set(rotations)))

    def ensures(self, unit: Unit) -> None:
        assert unit.plan is not None
        for node in unit.graph.graph.find_nodes(op="call_function", target=ATTEND):
            groups = unit.plan.sites[int(node.args[4])].groups
            wanted = any(group.policy.positions == "cache_index" for group in groups)
            assert wanted == (_sink_query(node) is not None), f"{node}: a sink query without a policy, or a policy without one"


def _limits(unit: Unit) -> tuple[dict[int, int], list[Problem]]:
    """Of each site with cache_index in its plan (rule 4), the tokens of its cache; and what is wrong with them."""
    assert unit.plan is not None
    limits: dict[int, int] = {}
    problems = []
    for plan in unit.plan.sites:
        windows = {
            group.policy.name: zone.window_tokens
            for group in plan.groups
            for zone in group.policy.zones
            if group.policy.positions == "cache_index" and isinstance(zone, SinkRecent)
        }
        if len(set(windows.values())) > 1:
            told = ", ".join(f"{name} {tokens}" for name, tokens in sorted(windows.items()))
            what = f"{plan.site.path} has cache_index policies of different window sizes, {told} tokens; a layer's queries take one place."
            problems.append(Problem(_where(unit, plan.site.index), what, "Give them windows of the same sink + recent tokens."))
        if windows:
            limits[plan.site.index] = max(windows.values())
    return limits, problems


def _where(unit: Unit, site: int) -> str:
    """The place in the spec that asks for cache_index at a site."""
    name = next(policy.name for policy in unit.policies[site] if policy.positions == "cache_index")
    return unit.spec.where(f"policies.{name}.positions")


def _path(unit: Unit, site: int) -> str:
    return unit.sites[site].path


def _with_positions(plan: Plan, asked: list[int], limits: dict[int, int], rotated: set[int]) -> Plan:
    """The plan as it is now: a group whose queries are not rotated has absolute positions; notes say where and why."""

    def settled(site: SitePlan) -> SitePlan:
        if site.site.index in rotated:
            return site
        return replace(site, groups=tuple(replace(g, policy=replace(g.policy, positions="absolute")) for g in site.groups))

    notes = list(plan.notes)
    if own := len([site for site in asked if site not in limits]):
        notes.append(f"positions: cache_index changes nothing in {own} layers that have a window of their own")
    if flat := len([site for site in limits if site not in rotated]):
        notes.append(f"positions: cache_index changes nothing in {flat} layers without rotary positions")
    return replace(plan, sites=tuple(map(settled, plan.sites)), notes=tuple(notes))


def _sink_query(site: torch.fx.Node) -> torch.fx.Node | None:
    found = site.args[_SINK_QUERY] if len(site.args) > _SINK_QUERY else site.kwargs.get("sink_query")
    assert found is None or isinstance(found, torch.fx.Node)
    return found


# --- dataflow ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cone:
    """What lies between a value and the projections (or sites) it comes from.

    starts: the projections.  nodes: the others, the value included unless it is a projection itself; unordered.
    """

    starts: set[torch.fx.Node] = field(default_factory=set)
    nodes: set[torch.fx.Node] = field(default_factory=set)


@dataclass(frozen=True)
class _Flow:
    """What depends on which tokens there are, and what on nothing but where they stand (rule 1)."""

    positions: torch.fx.Node
    content: set[torch.fx.Node]
    pure: set[torch.fx.Node]

    @classmethod
    def of(cls, graph: torch.fx.Graph) -> _Flow:
        input_ids, positions = graph.find_nodes(op="placeholder")
        content = content_nodes(graph, input_ids)
        pure = {node for node in content_nodes(graph, positions) - content if not is_size(node)}
        return cls(positions, content, pure | {positions})

    def cone(self, *values: torch.fx.Node) -> _Cone:
        cone = _Cone()
        queue = list(values)
        while queue:
            node = queue.pop()
            if node in cone.nodes or node in cone.starts:
                continue
            if self._begins(node):
                cone.starts.add(node)
            else:
                cone.nodes.add(node)
                queue += [source for source in node.all_input_nodes if source in self.content]
        return cone

    def _begins(self, node: torch.fx.Node) -> bool:
        """A projection, a site or the tokens themselves; a product with a pure matrix is a rotation."""
        if node.op == "placeholder" or node.target in SITES or node.target is LINEARS:
            return True
        return opname(node) in _PROJECTIONS and not self.pure.intersection(node.all_input_nodes)

    def rotation(self, query: torch.fx.Node) -> list[torch.fx.Node]:
        """Rule 1: in program order, the query last; [] where no position enters."""
        cone = self.cone(query).nodes
        found: dict[torch.fx.Node, None] = {}
        for node in query.graph.nodes:
            if node in cone and any(source in self.pure or source in found for source in node.all_input_nodes):
                found[node] = None
        return list(found)


@dataclass(frozen=True)
class _Copies:
    """Rules 2 and 3.  pure: the copy of a pure node for a number of tokens in the cache, made once."""

    graph: torch.fx.Graph
    flow: _Flow
    pure: dict[tuple[torch.fx.Node, int], torch.fx.Node] = field(default_factory=dict)

    def rotated(self, rotation: list[torch.fx.Node], site: torch.fx.Node, limit: int) -> torch.fx.Node:
        """The query for a cache of `limit` tokens."""
        copies: dict[torch.fx.Node, torch.fx.Node] = {}

        def take(node: torch.fx.Node) -> torch.fx.Node:
            return self._at_cache_index(node, limit) if node in self.flow.pure else copies.get(node, node)

        for node in rotation:
            with self.graph.inserting_before(site):
                copies[node] = self.graph.node_copy(node, take)
        return copies[rotation[-1]]

    def _at_cache_index(self, node: torch.fx.Node, limit: int) -> torch.fx.Node:
        """A pure node from positions of at most limit - 1; it stands behind the original, in the same segment."""
        missing = [node]
        while missing:
            here = missing[-1]
            needed = [each for each in here.all_input_nodes if each in self.flow.pure and (each, limit) not in self.pure]
            if (here, limit) in self.pure:
                missing.pop()
            elif needed:
                missing += needed
            else:
                self.pure[here, limit] = self._copied(missing.pop(), limit)
        return self.pure[node, limit]

    def _copied(self, node: torch.fx.Node, limit: int) -> torch.fx.Node:
        if node is self.flow.positions:
            with self.graph.inserting_after(node):
                clamped = self.graph.call_function(torch.ops.aten.clamp.default, (node, None, limit - 1))
            clamped.meta = {**node.meta, "val": fake_value(node).clamp(max=limit - 1)}
            return clamped
        with self.graph.inserting_after(node):
            return self.graph.node_copy(node, lambda each: self.pure.get((each, limit), each))


# --- numbers -------------------------------------------------------------------------------------------------------------------------


def check_shift_invariance(unit: Unit) -> None:
    """Rule 5: <R(q, p), R(k, j)> must equal <R(q, p + d), R(k, j + d)>; in float64, on random content, over the declared context.

    unit: after the last pass, its graph outlined and its weights real.  Query and key are followed up to their projections,
    whose outputs are drawn, so a key of two projections (multi-head latent attention) is looked at as a whole.
    Raises SpecError with the first layer whose rotation is not relative.
    """
    assert unit.plan is not None
    wanted = {site.site.index for site in unit.plan.sites for group in site.groups if group.policy.positions == "cache_index"}
    if not wanted:
        return
    graph = _inlined(unit.graph)
    flow = _Flow.of(graph)
    context = unit.position_rows or unit.context_tokens or UNDECLARED_CONTEXT_TOKENS
    for node in graph.find_nodes(op="call_function", target=ATTEND):
        site = int(node.args[4])
        if site not in wanted:
            continue
        for shift in _shifts(context):
            apart = _apart(flow, node, shift, context)
            if not apart <= _tolerance(_positions(context)[-1] + shift, fake_value(node).dtype):
                what = f"the rotation of {_path(unit, site)} is not relative: q.k changes by {apart:.1e} if both move {shift} tokens on."
                raise SpecError(Problem(_where(unit, site), what, "Write positions: absolute."))


def _tolerance(position: int, dtype: torch.dtype) -> float:
    """What tables of sines up to a position may be apart."""
    return max(TOLERANCE, position * ANGLE_ROUNDING, 2 * torch.finfo(dtype).eps)


def _positions(context: int) -> list[int]:
    """Where queries and keys stand at first: in the first half of the context, near and far from each other."""
    return [position for position in (0, 1, 2, 5, 11, 23, 47, 63) if 2 * position < context]


def _shifts(context: int) -> Iterator[int]:
    """How far to move: to the next token, over the first thousands, to the end of the context."""
    longest = context - 1 - _positions(context)[-1]
    for shift in (1, 7, 1000, longest // 2, longest):
        if 0 < shift <= longest:
            yield shift


def _apart(flow: _Flow, site: torch.fx.Node, shift: int, context: int) -> float:
    """The largest change of q.k by a shift, of the largest q.k."""
    at = torch.tensor([_positions(context)])
    before, after = _products(flow, site, at), _products(flow, site, at + shift)
    return float((before - after).abs().max() / before.abs().max())


def _products(flow: _Flow, site: torch.fx.Node, positions: Tensor) -> Tensor:
    """q.k of every query and key, float64 [query_heads, tokens, tokens], for the same random content at other positions.

    positions: [1, tokens].
    """
    query, key = site.args[:2]
    assert isinstance(query, torch.fx.Node) and isinstance(key, torch.fx.Node)
    tokens = positions.shape[1]
    cone = flow.cone(query, key)
    generator = torch.Generator().manual_seed(0)
    known: dict[torch.fx.Node, Tensor | int | list[Tensor]] = {flow.positions: positions}
    for start in sorted(cone.starts, key=lambda node: node.name):
        known[start] = torch.randn(shape_at(start, tokens), generator=generator, dtype=torch.float64)
    known |= {node: size_at(fake_value(node), tokens) for node in site.graph.nodes if is_size(node)}
    query_1HSD, key_1KSD = evaluate_nodes([query, key], known, compute=torch.float64)
    query_HSD, key_KSD = query_1HSD[0], key_1KSD[0]
    products: Tensor = query_HSD @ key_KSD.repeat_interleave(len(query_HSD) // len(key_KSD), 0).transpose(1, 2)
    return products


def _inlined(outlined: torch.fx.GraphModule) -> torch.fx.Graph:
    """The graph before it was outlined: every segment's nodes in place of its calls."""
    graph = torch.fx.Graph(owning_module=outlined)
    values: dict[torch.fx.Node, torch.fx.Node] = {}
    results: dict[torch.fx.Node, list[torch.fx.Node]] = {}
    for node in outlined.graph.nodes:
        if node.op == "call_module":
            results[node] = _inline(graph, outlined.get_submodule(node.target), [values[each] for each in node.args])
        elif node.target is operator.getitem:
            values[node] = results[node.args[0]][node.args[1]]
        elif node.op != "output":
            values[node] = graph.node_copy(node, values.__getitem__)
    return graph


def _inline(graph: torch.fx.Graph, segment: torch.nn.Module, inputs: list[torch.fx.Node]) -> list[torch.fx.Node]:
    """Copies a segment's nodes to the end of `graph`; what it gives out."""
    assert isinstance(segment, torch.fx.GraphModule)
    values = dict(zip(segment.graph.find_nodes(op="placeholder"), inputs, strict=True))
    for node in segment.graph.nodes:
        if node.op == "call_function":
            values[node] = graph.node_copy(node, values.__getitem__)
    (output,) = segment.graph.find_nodes(op="output")
    return [values[result] for result in output.args[0]]
