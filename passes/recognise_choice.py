"""Keys that a model chooses itself: a `topk` over pairs of tokens, whose places become the only ones that a query sees.

    weight [1, S, 1, C] @ relu(scale * (asked [1, S, C, I] @ offered [1, 1, I, T]))  ->  masked  ->  topk(min(T, chosen_tokens))

1. The two products are found by the one way up from the `topk` that knows the tokens' content; what stands between them and around
   them is probed as a function, in float64: where a query sees a key it must be the choice of ir/choose_keys.py times a positive
   number, elsewhere too small to be chosen.
2. How many are chosen must be the smaller of a constant and the number of tokens, or a short sequence would have no meaning.
3. What the attention makes of the chosen places is probed as well: it must see those, of what it would see, and no other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvcompile.ir.evaluate import evaluate_nodes, opname
from kvcompile.ir.tokens import fake_value, token_dimensions
from kvcompile.passes.probe_scores import PROBE_TOKENS, TOLERANCE, ScoreFacts, UnknownScores, visible

_aten = torch.ops.aten
_PRODUCTS = (_aten.matmul.default, _aten.bmm.default)
_MANY = 1 << 20
_HIDDEN = -1e30


@dataclass(frozen=True)
class Choice:
    """asked [1, S, C, I], offered [1, 1, I, T], weight [1, S, 1, C]: the nodes; tokens: so many keys are chosen."""

    topk: torch.fx.Node
    asked: torch.fx.Node
    offered: torch.fx.Node
    weight: torch.fx.Node
    tokens: int


def choosing_nodes(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    """Every `topk` over pairs of tokens."""
    return [
        node
        for node in graph.find_nodes(op="call_function", target=_aten.topk.default)
        if len(token_dimensions(fake_value(node.all_input_nodes[0]))) > 1
    ]


def every_key(topk: torch.fx.Node, tokens: int) -> tuple[Tensor, Tensor]:
    """What a `topk` gives when every key is chosen: no numbers, and all places."""
    lead = [int(size) for size in fake_value(topk.args[0]).shape[:-2]]  # type: ignore[arg-type]
    places = torch.arange(tokens).expand(*lead, tokens, tokens)
    return torch.zeros(places.shape, dtype=torch.float64), places


def read_choice(
    topk: torch.fx.Node,
    content: set[torch.fx.Node],
    facts: ScoreFacts,
    weigh: Callable[..., Tensor],
    heads: int,
    at: Callable[[int], dict[torch.fx.Node, Any]],
) -> Choice:
    """The three rules; raises UnknownScores.  content: nodes that know tokens; weigh: of the attention, which takes `known` values;
    at: the graph's inputs for a number of tokens.
    """
    outer = _product_above(topk.args[0], content)
    inner = _product_above(outer.args[1], content)
    (asked, offered), weight = inner.all_input_nodes, outer.all_input_nodes[0]
    sizes = [[*fake_value(each).shape] for each in (asked, offered, weight)]
    if [len(size) for size in sizes] != [4, 4, 4] or sizes[0][2] != sizes[2][3] or sizes[1][1] != 1 or sizes[2][2] != 1:
        raise UnknownScores("keys are chosen in a way that is not known")
    _check_choice(topk, outer, inner, facts, at)
    tokens = _chosen_tokens(topk, at)
    _check_seen(topk, tokens, facts, weigh, heads)
    return Choice(topk, asked, offered, weight, tokens)


def _product_above(start: Any, content: set[torch.fx.Node]) -> torch.fx.Node:
    """Rule 1."""
    node = start
    while True:
        sources = [source for source in node.all_input_nodes if source in content]
        if opname(node) in ("type_as", "expand_as", "view_as", "reshape_as"):
            sources = sources[:1]
        if node.target in _PRODUCTS and len(sources) == 2:
            return node  # type: ignore[no-any-return]
        if len(sources) != 1:
            raise UnknownScores("keys are chosen in a way that is not known")
        node = sources[0]


def _check_choice(topk: torch.fx.Node, outer: torch.fx.Node, inner: torch.fx.Node, facts: ScoreFacts, at: Any) -> None:
    """Rule 1, on random products and weights."""
    tokens, heads = PROBE_TOKENS, int(fake_value(outer.args[0]).shape[3])  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(1, tokens, 1, heads, dtype=torch.float64, generator=generator)
    products = torch.randn(1, tokens, heads, tokens, dtype=torch.float64, generator=generator)
    (found,) = evaluate_nodes([topk.args[0]], {**at(tokens), outer.args[0]: weight, inner: products}, compute=torch.float64)  # type: ignore[list-item, dict-item]
    expected = (products[0].relu() * weight[0, :, 0, :, None]).sum(1)
    query, key = torch.arange(tokens)[:, None], torch.arange(tokens)[None, :]
    seen = visible(query, key, facts.sliding_window, facts.chunk_tokens)
    found = found.reshape(tokens, tokens)
    factor = float(found[-1, -1] / expected[-1, -1])
    if (
        not factor > 0
        or float((found - factor * expected)[seen].abs().max()) > TOLERANCE * max(1.0, factor)
        or bool((found[~seen] > _HIDDEN).any())
    ):
        raise UnknownScores("keys are chosen by something else than a weighed sum of relu(products)")


def _chosen_tokens(topk: torch.fx.Node, at: Any) -> int:
    """Rule 2."""
    arguments: tuple[Any, ...] = topk.args
    last = fake_value(arguments[0]).dim() - 1
    along = arguments[2] if len(arguments) > 2 else -1
    if along not in (-1, last) or (len(arguments) > 3 and not arguments[3]) or not isinstance(arguments[1], torch.fx.Node):
        raise UnknownScores("how many keys are chosen does not follow the number of tokens")

    def count(tokens: int) -> int:
        return int(evaluate_nodes([arguments[1]], at(tokens))[0])

    most = count(_MANY)
    if most >= _MANY or any(count(tokens) != min(tokens, most) for tokens in (1, most, most + 1, 2 * most)):
        raise UnknownScores("how many keys are chosen does not follow the number of tokens")
    return most


def _check_seen(topk: torch.fx.Node, chosen_tokens: int, facts: ScoreFacts, weigh: Callable[..., Tensor], heads: int) -> None:
    """Rule 3, on random scores and a random choice of fewer keys than there are."""
    tokens, few = PROBE_TOKENS, min(chosen_tokens, PROBE_TOKENS // 3)
    query, key = torch.arange(tokens)[:, None], torch.arange(tokens)[None, :]
    generator = torch.Generator().manual_seed(3)
    order = torch.rand(tokens, tokens, generator=generator).masked_fill(
        ~visible(query, key, facts.sliding_window, facts.chunk_tokens), -1.0
    )
    places = order.topk(few).indices
    hidden = torch.ones(tokens, tokens, dtype=torch.bool).scatter(1, places, False)
    scores = torch.randn(heads, tokens, tokens, dtype=torch.float64, generator=generator) * (2.0 / facts.scale)
    numbers, every = every_key(topk, tokens)
    known = {topk: (numbers[..., :few], places.expand(*every.shape[:-1], few))}
    found = weigh(scores.clone(), None, known)
    expected = facts.weigh(scores, hidden)
    if not float((found - expected).abs().max()) <= TOLERANCE:
        raise UnknownScores("what is made of the chosen keys is not that they alone are seen")
