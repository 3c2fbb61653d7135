"""Canonicalise attention: every attention of the model is one `kvc.attend` node, numbered, with its facts.

1. Attention that is spelt out, as `scaled_dot_product_attention` or as products and a softmax, becomes `kvc.attend`
   (`rewrite_attention`); transformers' attention interface has become so while it was traced (`huggingface`).
2. Sites are numbered in execution order and described (`AttentionSite`).
3. An attention that is still spelt out (a value with two token dimensions) is refused by its node.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from kvcompile.ir.attend_op import ATTEND
from kvcompile.ir.errors import Problem, UnsupportedGraphError
from kvcompile.ir.show import node_text
from kvcompile.ir.sites import AttentionSite
from kvcompile.ir.tokens import fake_value, path_of, place_of, token_dimensions
from kvcompile.ir.unit import Unit
from kvcompile.passes.rewrite_attention import rewrite_attention


@dataclass(frozen=True)
class CanonicaliseAttention:
    """All attentions become numbered `kvc.attend` nodes; whatever else mixes tokens pairwise is refused."""

    name: str = "canonicalise_attention"
    requires: tuple[str, ...] = ()

    def run(self, unit: Unit) -> Unit:
        graph = unit.graph.graph
        found = {"interface"} if graph.find_nodes(op="call_function", target=ATTEND) else set()
        found |= rewrite_attention(graph)
        sites = []
        for index, node in enumerate(graph.find_nodes(op="call_function", target=ATTEND)):
            node.update_arg(4, index)
            sites.append(_describe(index, node))
        left = [node for node in graph.nodes if len(token_dimensions(fake_value(node))) > 1]
        if left:
            first = left[0]
            raise UnsupportedGraphError(
                Problem(
                    f"{self.name}: {place_of(first)}",
                    f"tokens meet in a way that kvcompile does not recognise: {node_text(first).strip()}",
                    "Only softmax attention and elementwise work may see two tokens at once.",
                )
            )
        if not sites:
            raise UnsupportedGraphError(
                Problem(self.name, "the model has no attention.", "kvcompile compiles transformers; this graph has nothing for it to do.")
            )
        unit.graph.recompile()
        return replace(unit, sites=tuple(sites), front_end=" and ".join(sorted(found)))

    def ensures(self, unit: Unit) -> None:
        nodes = unit.graph.graph.find_nodes(op="call_function", target=ATTEND)
        assert [node.args[4] for node in nodes] == list(range(len(unit.sites)))
        assert all(len(token_dimensions(fake_value(node))) <= 1 for node in unit.graph.graph.nodes)


def _describe(index: int, node: torch.fx.Node) -> AttentionSite:
    arguments: tuple[Any, ...] = node.args
    query, key, value, sinks, _, scale, window, soft_cap = arguments[:8]
    chunk_tokens = arguments[8] if len(arguments) > 8 else 0
    slopes = arguments[9] if len(arguments) > 9 else ()
    choosing, chosen_tokens = arguments[11:13] if len(arguments) > 11 else (None, 0)
    shapes = [fake_value(tensor).shape for tensor in (query, key, value)]
    return AttentionSite(
        index=index,
        path=path_of(node) or f"site {index}",
        query_heads=int(shapes[0][1]),
        kv_heads=int(shapes[1][1]),
        head_dim=int(shapes[0][3]),
        value_dim=int(shapes[2][3]),
        scale=float(scale),
        dtype=str(fake_value(query).dtype).removeprefix("torch."),
        sliding_window=int(window) or None,
        soft_cap=float(soft_cap) or None,
        learnt_sinks=sinks is not None,
        chunk_tokens=int(chunk_tokens) or None,
        slopes=tuple(slopes),
        chosen_tokens=int(chosen_tokens) or None,
        compared=0 if choosing is None else int(fake_value(choosing).shape[3]) - 1,
    )
