"""Canonicalise attention: every attention of the model is one `kvc.attend` node, numbered, with its facts.

1. `scaled_dot_product_attention` with a causal flag and no mask of its own becomes `kvc.attend` (plain modules).
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
from kvcompile.ir.tokens import fake_value, path_of, token_dimensions
from kvcompile.ir.unit import Unit

_SDPA = torch.ops.aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class CanonicaliseAttention:
    """All attentions become numbered `kvc.attend` nodes; whatever else mixes tokens pairwise is refused."""

    name: str = "canonicalise_attention"
    requires: tuple[str, ...] = ()

    def run(self, unit: Unit) -> Unit:
        graph = unit.graph.graph
        for node in graph.find_nodes(op="call_function", target=_SDPA):
            _rewrite_sdpa(graph, node)
        graph.eliminate_dead_code()
        sites = []
        for index, node in enumerate(graph.find_nodes(op="call_function", target=ATTEND)):
            node.update_arg(4, index)
            sites.append(_describe(index, node))
        left = [node for node in graph.nodes if len(token_dimensions(fake_value(node))) > 1]
        if left:
            first = left[0]
            raise UnsupportedGraphError(
                Problem(
                    f"{self.name}: {path_of(first) or first.name}",
                    f"an attention is spelt out that kvcompile does not recognise: {node_text(first).strip()}",
                    "Built: transformers' attention interface and scaled_dot_product_attention(is_causal=True).",
                )
            )
        if not sites:
            raise UnsupportedGraphError(
                Problem(self.name, "the model has no attention.", "kvcompile compiles transformers; this graph has nothing for it to do.")
            )
        unit.graph.recompile()
        return replace(unit, sites=tuple(sites))

    def ensures(self, unit: Unit) -> None:
        nodes = unit.graph.graph.find_nodes(op="call_function", target=ATTEND)
        assert [node.args[4] for node in nodes] == list(range(len(unit.sites)))
        assert all(len(token_dimensions(fake_value(node))) <= 1 for node in unit.graph.graph.nodes)


def _rewrite_sdpa(graph: torch.fx.Graph, node: torch.fx.Node) -> None:
    """query [1, H, s, D] and key, value [1, K, s, .] under a causal flag: out [1, H, s, E] from `kvc.attend`'s [1, s, H, E]."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    problem = None
    if given.get("attn_mask") is not None:
        problem = "with a mask tensor of its own"
    elif not given.get("is_causal", False):
        problem = "without is_causal=True"
    elif given.get("dropout_p", 0.0):
        problem = "with dropout"
    elif fake_value(given["query"]).dim() != 4:
        problem = f"on {fake_value(given['query']).dim()}-dimensional tensors"
    elif any(str(fake_value(given[name]).shape[0]) != "1" for name in names[:3]):
        problem = "with heads or tokens in the batch dimension"
    elif len({str(fake_value(given[name]).shape[2]) for name in names[:3]}) > 1:
        problem = "with keys that are not the call's own tokens"
    if problem:
        raise UnsupportedGraphError(
            Problem(
                f"canonicalise_attention: {path_of(node) or node.name}",
                f"scaled_dot_product_attention is called {problem}.",
                "Built: is_causal=True on [batch, heads, tokens, head_dim], no mask, no dropout.",
            )
        )
    scale = given.get("scale")
    if scale is None:
        scale = fake_value(given["query"]).shape[-1] ** -0.5
    with graph.inserting_before(node):
        site = graph.call_function(ATTEND, (given["query"], given["key"], given["value"], None, -1, float(scale), 0, 0.0))
        out = graph.call_function(torch.ops.aten.transpose.int, (site, 1, 2))
    value = fake_value(node)
    site.meta = dict(node.meta, val=value.new_empty(value.shape[0], value.shape[2], value.shape[1], value.shape[3]))
    out.meta = dict(node.meta, val=site.meta["val"].transpose(1, 2))
    node.replace_all_uses_with(out)
    graph.erase_node(node)
    for user in _views_after(out):
        user.target = torch.ops.aten.reshape.default  # the trace relied on sdpa's strides


def _views_after(node: torch.fx.Node) -> list[torch.fx.Node]:
    found, queue = [], list(node.users)
    while queue:
        user = queue.pop()
        if user.target is torch.ops.aten.view.default:
            found.append(user)
        elif user.target in (torch.ops.aten.transpose.int, torch.ops.aten.permute.default):
            queue += list(user.users)
    return found


def _describe(index: int, node: torch.fx.Node) -> AttentionSite:
    arguments: tuple[Any, ...] = node.args
    query, key, value, sinks, _, scale, window, soft_cap, chunk_tokens, slopes, _ = (*arguments, *(0, (), None)[len(arguments) - 8 :])
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
    )
