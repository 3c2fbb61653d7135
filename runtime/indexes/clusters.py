"""The index `clusters`: RetroInfer's wave index (Chen et al. 2025): the best clusters are read, the next ones estimated, others left out.

Letters: H KV heads, G queries per KV head, T keys, N clusters, M clusters found, K keys found, D head_dim, E value_dim.

1. Keys are centred and clustered by spherical k-means, each segment of about SEGMENT_TOKENS by itself, into one cluster for
   tokens_per_cluster keys.  Then every key goes to the nearest centre of any segment, and a cluster's centre is the mean of its keys.
2. A search ranks clusters by the logit of their centre, and finds all keys of the first.
3. The rest is estimated from the next `estimate` of all clusters, by the sum over the query heads of their softmax weight: a cluster weighs
   size x exp(q . centre), which is never more than its keys do (Jensen), and answers with its mean value.
4. Tokens that are added wait until they are UPDATE_TOKENS, and are found by every search; then the next search makes clusters of them, from
   the session's own keys.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kvcompile.ir.policy import Select
from kvcompile.ir.published_indexes import ClustersFacts
from kvcompile.runtime.indexes.index import Borrowed, Found, Keys, Prompt, RecentQueries
from kvcompile.runtime.indexes.lists import listed
from kvcompile.runtime.indexes.restoring import borders, permuted, shaped, share, soft_cap, whole
from kvcompile.runtime.indexes.select import select_keys
from kvcompile.runtime.indexes.spherical import cluster_sums, nearest_centre, spherical_centres
from kvcompile.runtime.merge import AttentionState

SEGMENT_TOKENS, UPDATE_TOKENS = 8192, 1024


class ClustersIndex:
    """Clusters of the tokens [first, first + T) of [first, end); those behind wait.

    centre_HND: the mean key of a cluster, in the keys' dtype; mean_HNE: its mean value; size_HN: how many it has, int32; order_HT: keys by
    cluster, int32, counted from `first`.  made_from: tokens that were there when the index was made.  Tensors are replaced, never changed.
    """

    notes: tuple[str, ...] = ()

    def __init__(
        self,
        first: int,
        end: int,
        made_from: int,
        tokens_per_cluster: int,
        estimate: float,
        soft_cap: float | None,
        parts: tuple[Tensor, ...],
    ) -> None:
        self.centre_HND, self.mean_HNE, self.size_HN, self.order_HT = parts
        self._first, self._end, self._made_from = first, end, made_from
        self._tokens_per_cluster, self._estimate, self._soft_cap = tokens_per_cluster, estimate, soft_cap
        self._borrowed = Borrowed()

    @property
    def shape(self) -> tuple[int, int, int | None]:
        heads, _, head_dim = self.centre_HND.shape
        return heads, head_dim, self.mean_HNE.shape[2]

    @property
    def first(self) -> int:
        return self._first

    @property
    def end(self) -> int:
        return self._end

    @property
    def _parts(self) -> tuple[Tensor, ...]:
        return self.centre_HND, self.mean_HNE, self.size_HN, self.order_HT

    def add(self, key_HTD: Tensor, value_HTE: Tensor) -> None:
        self._end += key_HTD.shape[1]

    def search(self, query_HGD: Tensor, k: int, select: Select, keys: Keys) -> Found:
        """As KeyIndex; as many clusters as k keys fill on average, whole."""
        self._cluster_waiting(keys)
        heads, group, _ = query_HGD.shape
        tokens, clustered = self._end - self._first, self.order_HT.shape[1]
        wanted = max(1, math.ceil(k / self._tokens_per_cluster))
        if k >= tokens or wanted >= self.size_HN.shape[1]:
            return Found(torch.arange(self._first, self._end).expand(heads, group, tokens), k)
        chosen_HGM = select_keys(self.scores(query_HGD), wanted, select)
        place_HGK = listed(self.order_HT, self._starts(), chosen_HGM)
        waiting_K = torch.arange(clustered, tokens).expand(heads, group, -1)
        place_HGK = torch.cat([torch.where(place_HGK >= 0, place_HGK, tokens), waiting_K], 2).sort(2).values
        return Found(torch.where(place_HGK < tokens, place_HGK + self._first, -1), k)

    def scores(self, query_HGD: Tensor) -> Tensor:
        """The logit of each cluster's centre, float32 [H, G, N]; -inf of those without a key."""
        score_HGN = query_HGD.float() @ self.centre_HND.float().transpose(1, 2)
        if self._soft_cap is not None:
            score_HGN = self._soft_cap * torch.tanh(score_HGN / self._soft_cap)
        return score_HGN.masked_fill(self.size_HN[:, None] == 0, -torch.inf)

    def rest(self, query_HGD: Tensor, found: Found, read_lse_HG: Tensor) -> AttentionState:
        heads, group, _ = query_HGD.shape
        clusters, tokens = self.size_HN.shape[1], self._end - self._first
        score_HGN = self.scores(query_HGD)
        place_HGK = torch.where(found.position_HGK >= 0, found.position_HGK - self._first, tokens)
        read_HGT = torch.zeros(heads, group, tokens + 1, dtype=torch.bool).scatter_(2, place_HGK, True)
        member_HN = self.order_HT.long().gather(1, self._starts()[:, :-1].clamp_max(self.order_HT.shape[1] - 1))
        left_HGN = ~read_HGT.gather(2, member_HN[:, None].expand(-1, group, -1)) & (self.size_HN > 0)[:, None]
        weight_HGN = torch.softmax(score_HGN.double(), 2).sum(1, keepdim=True).expand(-1, group, -1).masked_fill(~left_HGN, -1.0)
        next_HGM = weight_HGN.topk(math.ceil(self._estimate * clusters), 2).indices
        logit_HGN = score_HGN + self.size_HN[:, None].log()
        logit_HGM = logit_HGN.gather(2, next_HGM).masked_fill(~left_HGN.gather(2, next_HGM), -torch.inf)
        lse_HG = logit_HGM.logsumexp(2)
        share_HGM = torch.where(lse_HG[..., None] > -torch.inf, torch.exp(logit_HGM - lse_HG[..., None]), 0.0)
        share_HGN = torch.zeros_like(logit_HGN).scatter_(2, next_HGM, share_HGM)
        return AttentionState(share_HGN @ self.mean_HNE.float(), lse_HG)

    def recalibrate(self, recent: RecentQueries, keys: Keys, k: int) -> bool:
        return True

    def rollback(self, end: int) -> None:
        """As KeyIndex; what was there when the index was made stays, and clusters of later tokens that reach behind `end` are unmade."""
        self._end = min(self._end, max(end, self._first + self._made_from))
        updates = (self._end - self._first - self._made_from) // UPDATE_TOKENS
        clustered = self._made_from + updates * UPDATE_TOKENS
        if clustered < self.order_HT.shape[1]:
            clusters = self._clusters_of(self._made_from) + updates * self._clusters_of(UPDATE_TOKENS)
            self.centre_HND, self.mean_HNE, self.size_HN = (each[:, :clusters].contiguous() for each in self._parts[:3])
            self.order_HT = self.order_HT[:, :clustered].contiguous()

    def fork(self) -> ClustersIndex:
        sizes = self._made_from, self._tokens_per_cluster, self._estimate, self._soft_cap
        child = ClustersIndex(self._first, self._end, *sizes, self._parts)
        child._borrowed = Borrowed(child._parts)
        return child

    def nbytes(self) -> int:
        return sum(part.nbytes for part in self._parts)

    def borrowed_nbytes(self) -> int:
        """All, until clusters of tokens that were added make its own ones."""
        return self._borrowed.nbytes(self._parts)

    def scanned_bytes(self, tail: bool, k: int) -> int:
        heads, clusters, value_dim = self.mean_HNE.shape
        means = heads * math.ceil(self._estimate * clusters) * value_dim * self.mean_HNE.dtype.itemsize
        return self.centre_HND.nbytes + self.size_HN.nbytes + (means if tail else 0)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = dict(zip(("centre", "mean", "size", "order"), (part.contiguous() for part in self._parts), strict=True))
        return tensors, {
            "first": self._first,
            "end": self._end,
            "made_from": self._made_from,
            "tokens_per_cluster": self._tokens_per_cluster,
            "estimate": self._estimate,
            "soft_cap": self._soft_cap,
        }

    def _starts(self) -> Tensor:
        """Where each cluster starts in `order`, and where the last ends, int64 [H, N + 1]."""
        return torch.nn.functional.pad(self.size_HN.long().cumsum(1), (1, 0))

    def _clusters_of(self, tokens: int) -> int:
        return -(-tokens // self._tokens_per_cluster)

    def _cluster_waiting(self, keys: Keys) -> None:
        clustered = self.order_HT.shape[1]
        for at in range(clustered, self._end - self._first - UPDATE_TOKENS + 1, UPDATE_TOKENS):
            spans = keys(self._first + at, self._first + at + UPDATE_TOKENS)
            key_HTD, value_HTE = (torch.cat(parts, 1) for parts in zip(*((span.key_HTD, span.value_HTE) for span in spans), strict=True))
            new = make_clusters(key_HTD, value_HTE, self._tokens_per_cluster, at)
            self.centre_HND, self.mean_HNE, self.size_HN, self.order_HT = (
                torch.cat(pair, 1) for pair in zip(self._parts, new, strict=True)
            )


def make_clusters(key_HTD: Tensor, value_HTE: Tensor, tokens_per_cluster: int, at: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """centre, mean, size and order of ClustersIndex of T keys, the first of which is number `at`; one cluster at least."""
    tokens = key_HTD.shape[1]
    count, segments = -(-tokens // tokens_per_cluster), max(1, round(tokens / SEGMENT_TOKENS))
    floats_HTD, values_HTE = key_HTD.float(), value_HTE.float()
    point_HTD = floats_HTD - floats_HTD.mean(1, keepdim=True)
    tokens_at, clusters_at = ([number * many // segments for number in range(segments + 1)] for many in (tokens, count))
    centre_HND = torch.cat(
        [
            spherical_centres(point_HTD[:, tokens_at[each] : tokens_at[each + 1]], clusters_at[each + 1] - clusters_at[each])
            for each in range(segments)
        ],
        1,
    )
    cluster_HT = nearest_centre(point_HTD, centre_HND)
    key_sum_HND, size_HN = cluster_sums(floats_HTD, cluster_HT, count)
    value_sum_HNE, _ = cluster_sums(values_HTE, cluster_HT, count)
    size_HN1 = size_HN.clamp_min(1)[..., None]
    order_HT = cluster_HT.sort(dim=1, stable=True).indices + at
    return (key_sum_HND / size_HN1).to(key_HTD.dtype), (value_sum_HNE / size_HN1).to(value_HTE.dtype), size_HN.int(), order_HT.int()


class Clusters(ClustersFacts):
    """The kind `clusters`."""

    def build(self, first: int, prompt: Prompt, options: Mapping[str, Any]) -> ClustersIndex:
        key_HTD, value_HTE = prompt.key_HTD, prompt.value_HTE
        heads, tokens, head_dim = key_HTD.shape
        tokens_per_cluster, estimate = self.sizes(options)
        if tokens:
            parts = make_clusters(key_HTD, value_HTE, tokens_per_cluster, 0)
        else:
            nothing = torch.zeros(heads, 0, dtype=torch.int32)
            parts = key_HTD.new_zeros(heads, 0, head_dim), value_HTE.new_zeros(heads, 0, value_HTE.shape[2]), nothing, nothing
        return ClustersIndex(first, first + tokens, tokens, tokens_per_cluster, estimate, prompt.soft_cap, parts)

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> ClustersIndex:
        centre_HND = shaped(tensors, "centre", None, None, None, None)
        heads, clusters, _ = centre_HND.shape
        mean_HNE, size_HN = shaped(tensors, "mean", None, heads, clusters, None), shaped(tensors, "size", torch.int32, heads, clusters)
        order_HT = shaped(tensors, "order", torch.int32, heads, None)
        clustered = order_HT.shape[1]
        if bool((size_HN < 0).any()) or bool((size_HN.sum(1) != clustered).any()):
            raise ValueError(f"clusters of {size_HN.sum(1).tolist()} keys, and an order of {clustered}")
        permuted("order", order_HT, 0)
        first, end = borders(numbers)
        made_from, of_each = whole(numbers, "made_from", 0, clustered), whole(numbers, "tokens_per_cluster", 1)
        updates, waiting = (clustered - made_from) % UPDATE_TOKENS, end - first - clustered
        if updates or waiting < 0:
            raise ValueError(f"{clustered} of {end - first} keys are in clusters, {made_from} of them from the beginning")
        sizes = first, end, made_from, of_each, share(numbers, "estimate")
        return ClustersIndex(*sizes, soft_cap(numbers), (centre_HND, mean_HNE, size_HN, order_HT))
