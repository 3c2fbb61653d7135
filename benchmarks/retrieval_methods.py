"""Ways to answer a query from a few of the keys, each with the bytes that one decode step of a KV head reads for it.

Letters: G query heads of the KV head, Q queries, T keys that may be left out, P pages or clusters, D head_dim, E value_dim.

A method learns from `Past` and gives a `Search`: queries and k, the number of keys to read -> `Answer`.  Keys and values are counted as
bfloat16 whoever reads them.  Exact keys and values are counted by the caller, from `read_GQT`; `scanned` is everything else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kvcompile.ir.indexes import BLOCK_TOKENS, SCANNED, SketchFacts
from kvcompile.ir.policy import Select
from kvcompile.runtime.indexes.index import Prompt
from kvcompile.runtime.indexes.select import select_keys
from kvcompile.runtime.indexes.sketch import SketchIndex, build_sketch
from kvcompile.runtime.merge import AttentionState
from kvcompile.runtime.query_sample import QuerySample

POSITION_BYTES = 4  # of a key that is read, where the index does not hold keys in the order of their positions
_ROUNDS = 10  # of k-means


@dataclass(frozen=True)
class Past:
    """What a KV head has when it is done reading: float32; queries are multiplied by the attention's scale.

    key_TD, value_TE: only those that may be left out.  first: position of the first.  sample: what a session remembers of the queries.
    kv_heads: of the layer, which share what is read once for all of them.
    """

    key_TD: Tensor
    value_TE: Tensor
    first: int
    sample: QuerySample
    queries_per_kv: int
    kv_heads: int = 1


class Answer(NamedTuple):
    """read_GQT: which keys are read exactly.  rest: an estimate of the attention over the others, [G, Q].  scanned: bytes.
    log_weight_GQT: joins the logits of keys that are read.
    """

    read_GQT: Tensor
    scanned: float
    rest: AttentionState | None = None
    log_weight_GQT: Tensor | None = None


Search = Callable[[Tensor, int], Answer]


def exact_top_k(past: Past, select: Select = "per_query_head") -> Search:
    """The keys with the largest logits; finding them costs nothing."""

    def search(query_GQD: Tensor, k: int) -> Answer:
        score_QGT = (query_GQD @ past.key_TD.T).transpose(0, 1)
        return Answer(_mask(select_keys(score_QGT, k, select), score_QGT.shape[2]), 0.0)

    return search


def sketch(past: Past, index: SketchIndex, select: Select = "per_query_head", tail: bool = True) -> Search:
    """Ours.  Without its tail neither mean values nor their scales are read."""

    def search(query_GQD: Tensor, k: int) -> Answer:
        index.chosen = k / len(past.key_TD)
        index.calibrate(past.sample.recent(), past.key_TD[None])  # for as many keys as are read
        group, queries, _ = query_GQD.shape
        read_GQT = torch.zeros(group, queries, len(past.key_TD), dtype=torch.bool)
        rests = []
        for at in range(queries):
            query_HGD = query_GQD[None, :, at]
            found = index.search(query_HGD, k, select, lambda first, end: ())
            place_1GK = torch.where(found.position_HGK >= 0, found.position_HGK, found.position_HGK[..., :1]) - past.first
            read_GQT[:, at].scatter_(1, place_1GK[0], True)
            true_GT = (query_HGD[0] @ past.key_TD.T).masked_fill(~read_GQT[:, at], -torch.inf)
            if tail:
                rests.append(index.rest(query_HGD, found, true_GT.logsumexp(1)[None]))
        scanned = index.scanned_bytes(tail, k) + POSITION_BYTES * rows_read(read_GQT)
        if not tail:
            return Answer(read_GQT, scanned)
        return Answer(
            read_GQT,
            scanned,
            AttentionState(torch.stack([rest.out[0] for rest in rests], 1), torch.stack([rest.lse[0] for rest in rests], 1)),
        )

    return search


def make_sketch(past: Past, units: int, scanned: float = SCANNED) -> SketchIndex:
    """T is a multiple of BLOCK_TOKENS."""
    sample = past.sample
    prompt = Prompt(
        past.key_TD[None],
        past.value_TE[None],
        sample.gram_HDD,
        sample.queries,
        sample.recent(),
        past.queries_per_kv,
        len(past.key_TD) // 100,
    )
    return build_sketch(past.first, prompt, units, SketchFacts().run_units(past.key_TD.shape[1], {"bytes_per_key": 4 * units}), scanned)


def clusters(past: Past, tokens_per_cluster: int, tail: bool) -> Search:
    """Whole clusters, by their centre's logit, until k keys are read; the others weigh as their centres do and answer with their mean
    value.  A centre, a mean value and a size are read of each.  Source: RetroInfer (Chen et al. 2025)."""
    tokens = len(past.key_TD)
    cluster_T = _k_means(past.key_TD - past.key_TD.mean(0), tokens // tokens_per_cluster)
    size_P = torch.bincount(cluster_T)
    centre_PD, mean_PE = (
        (torch.zeros(len(size_P), x.shape[1]).index_add_(0, cluster_T, x) / size_P[:, None]).bfloat16().float()
        for x in (past.key_TD, past.value_TE)
    )
    scanned = float(2 * centre_PD.numel() + 4 * len(size_P) + (2 * mean_PE.numel() if tail else 0))

    def search(query_GQD: Tensor, k: int) -> Answer:
        score_GQP = query_GQD @ centre_PD.T
        order_GQP = score_GQP.argsort(2, descending=True)
        before_GQP = size_P[order_GQP].cumsum(2) - size_P[order_GQP]
        chosen_GQP = torch.zeros_like(score_GQP, dtype=torch.bool).scatter_(2, order_GQP, before_GQP < k)
        read_GQT = chosen_GQP[..., cluster_T]
        if not tail:
            return Answer(read_GQT, scanned)
        logit_GQP = (score_GQP + size_P.log()).masked_fill(chosen_GQP, -torch.inf)
        return Answer(read_GQT, scanned, AttentionState(torch.softmax(logit_GQP, 2) @ mean_PE, logit_GQP.logsumexp(2)))

    return search


def int4_scan(past: Past) -> Search:
    """All keys at 4 bits, evenly spaced between the smallest and the largest coordinate of each key, which are kept in bfloat16."""
    low_T1, high_T1 = (edge.bfloat16().float() for edge in past.key_TD.aminmax(dim=1, keepdim=True))
    step_T1 = ((high_T1 - low_T1) / 15).clamp_min(1e-12)
    key_TD = ((past.key_TD - low_T1) / step_T1).round().clamp(0, 15) * step_T1 + low_T1
    scanned = key_TD.numel() / 2 + 4 * len(key_TD)

    def search(query_GQD: Tensor, k: int) -> Answer:
        return Answer(_mask((query_GQD @ key_TD.T).topk(k, 2).indices.transpose(0, 1), len(key_TD)), scanned)

    return search


def streaming(past: Past) -> Search:
    """No index: the recent window is k tokens longer."""

    def search(query_GQD: Tensor, k: int) -> Answer:
        tokens = len(past.key_TD)
        return Answer((torch.arange(tokens) >= tokens - k).expand(*query_GQD.shape[:2], tokens), 0.0)

    return search


def static_keys(past: Past) -> Search:
    """The k keys that the prompt's last queries gave the most weight, whatever is asked later.  Source: SnapKV (Li et al. 2024)."""
    recent = past.sample.recent()
    later_CT = past.first + torch.arange(len(past.key_TD)) > recent.position_C[:, None]
    weight_T = torch.softmax((recent.query_HCD[0] @ past.key_TD.T).masked_fill(later_CT, -torch.inf), 1).sum(0)

    def search(query_GQD: Tensor, k: int) -> Answer:
        chosen_T = torch.zeros(len(weight_T), dtype=torch.bool).scatter_(0, weight_T.topk(k).indices, True)
        return Answer(chosen_T.expand(*query_GQD.shape[:2], -1), 0.0)

    return search


OURS = "lookup"
OURS_WITHOUT_TAIL = "lookup, no tail"
EXACT = "exact top-k"
CLUSTERS = "clusters of 16"
CLUSTERS_TAIL = "clusters of 16, tail"
LARGE_CLUSTERS_TAIL = "clusters of 32, tail"
INT4 = "int4 scan"
STREAMING = "streaming"
STATIC = "static keys"
SELECT: tuple[Select, ...] = ("union", "sum", "max")


def searches(past: Past, group: bool) -> dict[str, Search]:
    """Every method; with `group` also the ways in which the query heads of a KV head can choose together."""
    units = SketchFacts().units(past.key_TD.shape[1], {})
    index = make_sketch(past, units)
    found = {
        EXACT: exact_top_k(past),
        OURS: sketch(past, index),
        OURS_WITHOUT_TAIL: sketch(past, index, tail=False),
    }
    for other in (units // 2, units * 3 // 2):
        found[f"{OURS}, {4 * other} bytes a key"] = sketch(past, make_sketch(past, other))
    for share in (SCANNED / 2, 2 * SCANNED, 1.0):
        found[f"{OURS}, {share:.3g} of the runs looked at"] = sketch(past, make_sketch(past, units, share))
    found |= {
        CLUSTERS: clusters(past, 16, False),
        CLUSTERS_TAIL: clusters(past, 16, True),
        LARGE_CLUSTERS_TAIL: clusters(past, 32, True),
        INT4: int4_scan(past),
        STREAMING: streaming(past),
        STATIC: static_keys(past),
    }
    if group:
        found |= {f"{OURS}, {select}": sketch(past, index, select) for select in SELECT}
        found |= {f"{EXACT}, {select}": exact_top_k(past, select) for select in SELECT}
    return found


def whole_blocks(tokens: int) -> int:
    """How many of `tokens` an index can cover."""
    return tokens // BLOCK_TOKENS * BLOCK_TOKENS


def rows_read(read_GQT: Tensor) -> float:
    """Keys that a query's group reads, on average over the queries: once each."""
    return float(read_GQT.any(0).sum(1).double().mean())


def _mask(chosen_QGK: Tensor, tokens: int) -> Tensor:
    """Indices, -1 of none, as bool [G, Q, T]."""
    mask_QGT = torch.zeros(*chosen_QGK.shape[:2], tokens + 1, dtype=torch.bool)
    return mask_QGT.scatter_(2, torch.where(chosen_QGK >= 0, chosen_QGK, tokens), True)[..., :tokens].transpose(0, 1)


def _k_means(points_TD: Tensor, count: int) -> Tensor:
    """The cluster of each point, int64 [T]; every cluster has one at least."""
    generator = torch.Generator().manual_seed(0)
    centre_PD = points_TD[torch.randperm(len(points_TD), generator=generator)[:count]]
    for _ in range(_ROUNDS):
        cluster_T = (points_TD @ centre_PD.T - centre_PD.square().sum(1) / 2).argmax(1)
        _, cluster_T = cluster_T.unique(return_inverse=True)
        size_P = torch.bincount(cluster_T)
        centre_PD = torch.zeros(len(size_P), points_TD.shape[1]).index_add_(0, cluster_T, points_TD) / size_P[:, None]
    return cluster_T
