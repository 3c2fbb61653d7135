"""Which KV heads a pattern chooses: the lowest-scoring share, the same on every run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Selection:
    """chosen: (layer, KV head), sorted.  tie: what a warning should say when equal scores stand on both sides of the cut, or None."""

    chosen: tuple[tuple[int, int], ...]
    tie: str | None


def share_count(share: float, candidates: int) -> int:
    """floor(share * candidates), where 0.29 * 100 is 29 and not 28 (the product is 28.999999999999996)."""
    product = share * candidates
    nearest = round(product)
    return nearest if abs(product - nearest) < 1e-9 * max(1, candidates) else math.floor(product)


def select_lowest(scores: Sequence[Sequence[float]], candidates: Sequence[tuple[int, int]], share: float) -> Selection:
    """The floor(share * heads) candidates that score lowest, ties by (score, layer, KV head).

    scores [layers][kv_heads]; candidates (layer, KV head), each once; share 0 to 1.
    """
    assert 0 <= share <= 1
    assert len(set(candidates)) == len(candidates)
    ranked = sorted(candidates, key=lambda head: (scores[head[0]][head[1]], head))
    count = share_count(share, len(ranked))
    chosen = tuple(sorted(ranked[:count]))
    if not 0 < count < len(ranked):
        return Selection(chosen, None)
    (layer, head), (next_layer, next_head) = ranked[count - 1], ranked[count]
    cut = scores[layer][head]
    if cut != scores[next_layer][next_head]:
        return Selection(chosen, None)
    equal = sum(scores[layer][head] == cut for layer, head in ranked)
    taken = sum(scores[layer][head] == cut for layer, head in ranked[:count])
    tie = f"{equal} KV heads score {cut:g} where the share ends; {taken} of them covered, lowest layers and heads first"
    return Selection(chosen, tie)
