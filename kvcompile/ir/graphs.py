"""Any FX graph as a networkx graph, and the questions that passes ask of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import networkx as nx
import torch

from kvcompile.ir.show import node_text, shape_text
from kvcompile.ir.site_operators import SITES, site_name
from kvcompile.ir.tokens import fake_value, path_of


def slots(node: torch.fx.Node) -> Iterator[tuple[str, torch.fx.Node]]:
    """Each input of a node with the place where it stands: ("0", q), ("1.2", second argument's third item), ("dim", d)."""

    def walk(place: str, argument: Any) -> Iterator[tuple[str, torch.fx.Node]]:
        if isinstance(argument, torch.fx.Node):
            yield place, argument
        elif isinstance(argument, (list, tuple)):
            for index, item in enumerate(argument):
                yield from walk(f"{place}.{index}", item)

    for index, argument in enumerate(node.args):
        yield from walk(str(index), argument)
    for key, argument in node.kwargs.items():
        yield from walk(key, argument)


def constants(node: torch.fx.Node) -> str:
    """A node's arguments as text with every node input blanked: what must be equal for two nodes to do the same."""

    def blank(argument: Any) -> Any:
        if isinstance(argument, torch.fx.Node):
            return "%"
        if isinstance(argument, (list, tuple)):
            return [blank(item) for item in argument]
        return str(argument)

    return str([blank(argument) for argument in node.args] + sorted((key, blank(item)) for key, item in node.kwargs.items()))


def to_networkx(graph: torch.fx.Graph) -> nx.DiGraph:
    """A DiGraph of node names.

    Node attributes: op, target, shape, site (which site it is, or ""), path (the module it came from), label
    (everything that decides what the node computes).  Edge attribute: slots, where the value stands in its user.
    """
    result = nx.DiGraph()
    for node in graph.nodes:
        target = str(node.target) if node.op in ("call_function", "call_module") else ""
        shape = shape_text(fake_value(node))
        label = "|".join((node.op, target, shape, constants(node)))
        result.add_node(node.name, op=node.op, target=target, shape=shape, site=site_name(node), path=path_of(node), label=label)
        places: dict[str, list[str]] = {}
        for place, source in slots(node):
            places.setdefault(source.name, []).append(place)
        for source_name, found in places.items():
            result.add_edge(source_name, node.name, slots=" ".join(found))
    return result


def depends_only_on(node: Any, source: torch.fx.Node) -> bool:
    """Whether a node is computed from `source` and constants, and from `source` at all."""
    if not isinstance(node, torch.fx.Node):
        return False
    seen, queue, found = set(), [node], False
    while queue:
        current = queue.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.op == "placeholder":
            if current is not source:
                return False
            found = True
        queue += current.all_input_nodes
    return found


def write_graphml(module: torch.fx.GraphModule, path: Path) -> None:
    """The graph for Gephi, yEd or networkx itself."""
    nx.write_graphml(to_networkx(module.graph), path)


def write_svg(module: torch.fx.GraphModule, path: Path) -> None:
    """The graph as a picture: one row a topological generation, sites in another colour, the node's line as tooltip."""
    digraph = to_networkx(module.graph)
    by_name = {node.name: node for node in module.graph.nodes}
    digraph.remove_nodes_from([name for name, node in by_name.items() if node.op == "get_attr"])
    width, height = 230, 46
    place: dict[str, tuple[int, int]] = {}
    for row, generation in enumerate(nx.topological_generations(digraph)):
        for column, name in enumerate(generation):
            place[name] = (20 + column * width, 20 + row * height)
    right = max((x for x, _ in place.values()), default=0) + width
    bottom = max((y for _, y in place.values()), default=0) + height
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{right}" height="{bottom}" font-family="monospace" font-size="11">']
    for source, user in digraph.edges:
        (x1, y1), (x2, y2) = place[source], place[user]
        lines.append(f'<line x1="{x1 + 100}" y1="{y1 + 26}" x2="{x2 + 100}" y2="{y2}" stroke="#999"/>')
    for name, (x, y) in place.items():
        node = by_name[name]
        fill = "#f6c9a8" if node.target in SITES else "#c9def6" if node.op == "call_module" else "#eee"
        title = node.target if node.op == "call_module" else name
        lines.append(f'<g><title>{escape(node_text(node))}</title><rect x="{x}" y="{y}" width="200" height="26" rx="4" fill="{fill}"/>')
        lines.append(f'<text x="{x + 6}" y="{y + 17}">{escape(str(title))[:30]}</text></g>')
    path.write_text("\n".join([*lines, "</svg>"]) + "\n")
