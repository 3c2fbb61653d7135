from __future__ import annotations

import networkx as nx
import torch
import toys
from units import after

from kvcompile.ir.attend_op import ATTEND
from kvcompile.ir.graphs import constants, depends_only_on, slots, to_networkx, write_graphml, write_svg


def unit():
    return after("make_positions_explicit", toys.nanogpt(layers=1))


def test_the_export_has_a_node_for_each_node_and_an_edge_for_each_use():
    graph = unit().graph.graph
    digraph = to_networkx(graph)
    assert set(digraph.nodes) == {node.name for node in graph.nodes}
    assert set(digraph.edges) == {(source.name, node.name) for node in graph.nodes for source in node.all_input_nodes}
    assert nx.is_directed_acyclic_graph(digraph)


def test_the_export_says_what_a_node_is():
    digraph = to_networkx(unit().graph.graph)
    (site,) = [data for _, data in digraph.nodes(data=True) if data["site"]]
    assert (site["site"], site["shape"], site["path"], site["target"]) == ("0", "f32[1, s, 2, 16]", "blocks.0", "kvc.attend.default")


def test_an_edge_says_where_the_value_stands():
    graph = torch.fx.Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    product = graph.call_function(torch.ops.aten.cat.default, ([a, b, a], 1))
    assert list(slots(product)) == [("0.0", a), ("0.1", b), ("0.2", a)]
    assert to_networkx(graph).edges["a", product.name]["slots"] == "0.0 0.2"
    assert constants(product) == "[['%', '%', '%'], '1']"


def test_keyword_inputs_have_their_names_as_places():
    graph = torch.fx.Graph()
    a = graph.placeholder("a")
    node = graph.call_function(torch.ops.aten.add.Tensor, (a, 1), {"alpha": a})
    assert list(slots(node)) == [("0", a), ("alpha", a)]


def test_depends_only_on():
    """Of its source and constants; a constant alone does not depend on it, and numbers depend on nothing."""
    graph = torch.fx.Graph()
    positions, ids, table = graph.placeholder("positions"), graph.placeholder("ids"), graph.get_attr("table")
    shifted = graph.call_function(torch.ops.aten.add.Tensor, (positions, 1))
    rows = graph.call_function(torch.ops.aten.embedding.default, (table, shifted))
    mixed = graph.call_function(torch.ops.aten.add.Tensor, (rows, ids))
    assert all(depends_only_on(node, positions) for node in (positions, shifted, rows))
    assert not any(depends_only_on(node, positions) for node in (mixed, table, 3))


def test_graphml_can_be_read_again(tmp_path):
    graph = unit().graph
    write_graphml(graph, tmp_path / "g.graphml")
    again, now = nx.read_graphml(tmp_path / "g.graphml"), to_networkx(graph.graph)
    assert (dict(again.nodes(data=True)), list(again.edges(data=True))) == (dict(now.nodes(data=True)), list(now.edges(data=True)))


def test_the_picture_is_well_formed_and_colours_sites(tmp_path):
    from xml.etree import ElementTree

    graph = after("outline_segments", toys.nanogpt(layers=2)).graph
    write_svg(graph, tmp_path / "g.svg")
    text = (tmp_path / "g.svg").read_text()
    ElementTree.fromstring(text)
    assert text.count("#f6c9a8") == len(graph.graph.find_nodes(op="call_function", target=ATTEND)) == 2
    assert text.count("#c9def6") == 3
