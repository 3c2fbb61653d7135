"""What an attention does between q.k and its weights, found by probing it as a function, in float64.

    weights[h, i, j] = softmax over j of  cap(scale * score[h, i, j]) + slope[h] * (j - i),  where the query i sees the key j

However it was written (scaled before or after the mask, masked by adding, by `where` or by a table), the facts come out of a
few calls with chosen scores, and are believed only if they reproduce the function on random ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

PROBE_TOKENS = 40
TOLERANCE = 1e-7  # float64 weights; constants of the model may have been rounded to float32
_FAR = 300.0  # a logit that leaves the other weights representable: exp(-300) = 5e-131

# raw scores [heads, tokens, tokens] float64 -> attention weights of the same shape
Weigh = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ScoreFacts:
    """scale, soft_cap, sliding_window, chunk_tokens, slopes: as in `kvc.attend`; None, and () for slopes, where there is none."""

    scale: float
    soft_cap: float | None
    sliding_window: int | None
    chunk_tokens: int | None
    slopes: tuple[float, ...]

    def weigh(self, scores_HST: Tensor, hidden_ST: Tensor | None = None, sinks_H: Tensor | None = None) -> Tensor:
        """The function that these facts describe; hidden_ST: keys that are not seen besides; sinks_H: learnt sinks' logits."""
        logits = scores_HST * self.scale
        if self.soft_cap is not None:
            logits = self.soft_cap * torch.tanh(logits / self.soft_cap)
        query, key = _query_and_key(scores_HST.shape[-1])
        if self.slopes:
            logits = logits + torch.tensor(self.slopes, dtype=torch.float64)[:, None, None] * (key - query)
        seen = visible(query, key, self.sliding_window, self.chunk_tokens)
        logits = logits.masked_fill(~seen if hidden_ST is None else ~seen | hidden_ST, -math.inf)
        if sinks_H is not None:
            logits = torch.cat([logits, sinks_H[:, None, None].expand(-1, logits.shape[1], 1)], -1)
        return logits.softmax(-1)[..., : scores_HST.shape[-1]]

    def agrees(self, other: ScoreFacts, tokens: int) -> bool:
        """Whether both describe one function of at most `tokens` tokens, up to the rounding of float64: a wider window is none."""
        numbers = [(facts.scale, facts.soft_cap or 0.0, *facts.slopes) for facts in (self, other)]
        bounds = [
            [bound if bound and bound < tokens else None for bound in (facts.sliding_window, facts.chunk_tokens)] for facts in (self, other)
        ]
        return (
            bounds[0] == bounds[1]
            and len(self.slopes) == len(other.slopes)
            and all(math.isclose(one, two, rel_tol=1e-6, abs_tol=1e-9) for one, two in zip(*numbers, strict=True))
        )

    @property
    def own_window(self) -> int | None:
        return self.sliding_window or self.chunk_tokens


class UnknownScores(Exception):
    """Why a function of the scores is not an attention that `kvc.attend` can do, in words."""


class LooksAhead(UnknownScores):
    """A query sees keys behind itself."""


def visible(query: Tensor, key: Tensor, window: int | None, chunk: int | None) -> Tensor:
    """Which key each query sees: causal, within the window, within the query's own chunk."""
    seen = key <= query
    if window is not None:
        seen = seen & (query - key < window)
    if chunk is not None:
        seen = seen & (key >= query // chunk * chunk)
    return seen


def probe_scores(weigh: Weigh, heads: int, tokens: int = PROBE_TOKENS) -> ScoreFacts:
    """The facts of a function of scores; raises UnknownScores where it is something else."""
    zero = torch.zeros(heads, tokens, tokens, dtype=torch.float64)
    weights = weigh(zero.clone())
    window, chunk = visible_set(weights)
    if float((weights.sum(-1) - 1).abs().max()) > TOLERANCE:
        raise UnknownScores("the weights of a query do not sum to one")
    slopes = _slopes(weights, tokens)
    scale, soft_cap = _scale_and_cap(weigh, zero, weights)
    facts = ScoreFacts(scale, soft_cap, window, chunk, slopes)
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(zero.shape, generator=generator, dtype=torch.float64) * (3.0 / abs(scale))
    difference = float((weigh(scores.clone()) - facts.weigh(scores)).abs().max())
    if not difference <= TOLERANCE:
        raise UnknownScores(f"what was recognised ({facts}) differs from it by {difference:.1e} on random scores")
    return facts


def _query_and_key(tokens: int) -> tuple[Tensor, Tensor]:
    positions = torch.arange(tokens)
    return positions[:, None], positions[None, :]


def visible_set(weights_HST: Tensor) -> tuple[int | None, int | None]:
    """(window, chunk): what bounds the keys that a query sees, from the weights of equal scores; raises UnknownScores."""
    tokens = weights_HST.shape[-1]
    seen_HST = weights_HST > 0
    if bool((seen_HST != seen_HST[0]).any()):
        raise UnknownScores("its heads see different keys")
    seen = seen_HST[0]
    query, key = _query_and_key(tokens)
    if bool((seen & (key > query)).any()):
        raise LooksAhead("a query sees keys behind itself: only causal models can be compiled")
    for window in (None, *range(1, tokens)):
        if torch.equal(seen, visible(query, key, window, None)):
            return window, None
    for chunk in range(1, tokens):
        if torch.equal(seen, visible(query, key, None, chunk)):
            return None, chunk
    raise UnknownScores("which keys a query sees is neither causal, nor a sliding window, nor a chunk")


def _slopes(weights_HST: Tensor, tokens: int) -> tuple[float, ...]:
    """One slope a head, from the weights of equal scores; () where all are 0."""
    query, key = _query_and_key(tokens)
    bias_HST = weights_HST.log() - weights_HST.diagonal(dim1=-2, dim2=-1).log()[..., None]
    seen = (weights_HST[0] > 0) & (key < query)
    if not bool(seen.any()):
        return ()  # a window of one token
    each = (bias_HST / (key - query))[:, seen]
    slopes = each.mean(-1)
    if bool(((each - slopes[:, None]).abs() > TOLERANCE).any()):
        raise UnknownScores("a bias depends on more than the distance of query and key")
    return tuple(slopes.tolist()) if bool((slopes.abs() > TOLERANCE).any()) else ()


def _scale_and_cap(weigh: Weigh, zero_HST: Tensor, weights_HST: Tensor) -> tuple[float, float | None]:
    """From what one raised score does to the last query's logits: little near 0, at most the cap far away."""
    seen = weights_HST[0, -1] > 0
    first = int(seen.nonzero()[0])
    last = zero_HST.shape[-1] - 1
    if first == last:
        raise UnknownScores("a query sees itself alone, so nothing can be said of its scale")

    def logit(score: float) -> float:
        """What `score` at the first visible key becomes, compared with 0 at the last; bias taken off."""
        scores = zero_HST.clone()
        scores[:, -1, first] = score
        found = weigh(scores)[:, -1]
        before = weights_HST[:, -1]
        per_head = (found[:, first] / found[:, last]).log() - (before[:, first] / before[:, last]).log()
        if float((per_head - per_head[0]).abs().max()) > 1e-6 * max(1.0, float(per_head.abs().max())):
            raise UnknownScores("its heads have different scales")
        return float(per_head[0])

    step = 1e-3
    scale = (logit(step) - logit(-step)) / (2 * step)  # a cap bends the second order only
    if not scale > 0:
        raise UnknownScores("the scores have no positive scale")
    far = logit(_FAR / scale)
    if far > _FAR * 0.999:
        return logit(1.0 / scale) * scale, None
    cap = logit(1e12 / scale)
    return scale, cap
