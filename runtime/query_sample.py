"""What a session remembers of the queries that were asked: enough to learn which directions of the keys matter.

Letters: H KV heads, G queries per KV head, S new tokens, N queries of a KV head, C queries kept, D head_dim.

Which positions are sampled depends on the positions alone, so a prompt's sample does not depend on how it was cut, but for the order in
which its moment is summed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompile.ir.indexes import RECENT_POSITIONS, RECENT_STRIDE, TRAINING_FROM, training_stride
from kvcompile.runtime.indexes.index import RecentQueries
from kvcompile.runtime.store import StoreState

MOMENT_STRIDE = 4  # every so many positions join the second moment ...
_MOST_PARTS = 32  # of training queries, before they are joined
MOMENT_FROM = 64  # ... from here on: the first few queries of a text are unlike all later ones


class QuerySample:
    """Second moment of the queries of each KV head's group, and the last of them, thinned out; for an index that learns from queries also
    such of every part of the text.

    gram_HDD: float32, sum of q q^T of scaled queries; queries: over how many.
    training_positions: at most so many are kept for an index to learn from, in bfloat16, evenly spaced: every so many positions, twice as
        many whenever there would be more; 0: none.
    """

    def __init__(self, kv_heads: int, head_dim: int, training_positions: int = 0) -> None:
        self.gram_HDD = torch.zeros(kv_heads, head_dim, head_dim)
        self.queries = 0
        self._recent_HGCD: Tensor | None = None
        self._last = 0  # position of the last of them
        self.training_positions = training_positions
        self._training: list[tuple[Tensor, Tensor]] = []  # bfloat16 [H, G, C, D] and positions [C], one behind the other
        self._stride = 1

    def wants(self, first: int, new: int) -> bool:
        """Whether any of `new` positions from `first` on is sampled; of most tokens that are generated none is."""
        return -first % MOMENT_STRIDE < new or self._trains(first, first + new)  # RECENT_STRIDE is a multiple

    def add(self, query_HGSD: Tensor, first: int, scale: float) -> None:
        """Queries of positions from `first` on; scale: on q.k, in them from now on."""
        new = query_HGSD.shape[2]
        if not self.wants(first, new):
            return
        if self.training_positions:
            self._train(query_HGSD, first, scale)
        start = -first % MOMENT_STRIDE if first >= MOMENT_FROM else MOMENT_FROM - first
        if start < new:
            sampled_HND = query_HGSD[:, :, start::MOMENT_STRIDE].flatten(1, 2).float() * scale
            self.gram_HDD = self.gram_HDD + sampled_HND.transpose(1, 2) @ sampled_HND
            self.queries += sampled_HND.shape[1]
        last = (first + new - 1) // RECENT_STRIDE * RECENT_STRIDE - first
        start = max(-first % RECENT_STRIDE, last - RECENT_STRIDE * (RECENT_POSITIONS - 1))
        if start >= new:
            return
        kept_HGCD = query_HGSD[:, :, start::RECENT_STRIDE].float() * scale
        self._recent_HGCD = kept_HGCD if self._recent_HGCD is None else torch.cat([self._recent_HGCD, kept_HGCD], 2)
        self._recent_HGCD = self._recent_HGCD[:, :, -RECENT_POSITIONS:].contiguous()
        self._last = first + last

    def _trains(self, first: int, end: int) -> bool:
        """Whether a position is kept for training, or there would be too many of them."""
        if not self.training_positions:
            return False
        stride, start = training_stride(self.training_positions, end), max(first, TRAINING_FROM)
        return stride != self._stride or -start % stride < end - start

    def _train(self, query_HGSD: Tensor, first: int, scale: float) -> None:
        end = first + query_HGSD.shape[2]
        stride = training_stride(self.training_positions, end)
        kept = self._training
        if kept and (stride > self._stride or int(kept[-1][1][-1]) >= first):  # thinned out, or taken back
            query_HGCD, position_C = self._joined()
            stay_C = (position_C % stride == 0) & (position_C < first)
            self._training = kept = [(query_HGCD[:, :, stay_C], position_C[stay_C])] if stay_C.any() else []
        self._stride = stride
        start = -(-max(first, TRAINING_FROM) // stride) * stride
        if start < end:
            new_HGCD = (query_HGSD[:, :, start - first :: stride].float() * scale).to(torch.bfloat16)
            self._training = [*kept, (new_HGCD, torch.arange(start, end, stride))]
        if len(self._training) > _MOST_PARTS:
            self._training = [self._joined()]

    def _joined(self) -> tuple[Tensor, Tensor]:
        queries, positions = zip(*self._training, strict=True)
        return torch.cat(queries, 2), torch.cat(positions)

    def training(self) -> RecentQueries:
        """Queries of all parts of the text, those of one query head after those of another."""
        if not self._training:
            return RecentQueries(torch.zeros(len(self.gram_HDD), 0, self.gram_HDD.shape[2]), torch.zeros(0, dtype=torch.int64))
        query_HGCD, position_C = self._joined()
        return RecentQueries(query_HGCD.float().flatten(1, 2), position_C.repeat(query_HGCD.shape[1]))

    def recent(self) -> RecentQueries:
        """The last queries, those of one query head after those of another."""
        if self._recent_HGCD is None:
            return RecentQueries(torch.zeros(len(self.gram_HDD), 0, self.gram_HDD.shape[2]), torch.zeros(0, dtype=torch.int64))
        _, group, count, _ = self._recent_HGCD.shape
        position_C = self._last - RECENT_STRIDE * torch.arange(count).flip(0)
        return RecentQueries(self._recent_HGCD.flatten(1, 2), position_C.repeat(group))

    def fade(self) -> None:
        """Counts what was added so far for half, so that later queries weigh more."""
        self.gram_HDD = self.gram_HDD / 2
        self.queries //= 2

    def copy(self) -> QuerySample:
        """The same sample; tensors are replaced, never changed, so both may go on."""
        other = QuerySample.__new__(QuerySample)
        other.gram_HDD, other.queries = self.gram_HDD, self.queries
        other._recent_HGCD, other._last = self._recent_HGCD, self._last
        other.training_positions, other._stride = self.training_positions, self._stride
        other._training = self._training
        return other

    def state(self) -> StoreState:
        """As SavedStore."""
        tensors = {"gram": self.gram_HDD}
        if self._recent_HGCD is not None:
            tensors["recent"] = self._recent_HGCD
        if self._training:
            tensors["training"], tensors["training_positions"] = self._joined()
        return StoreState("queries", {"queries": self.queries, "last": self._last, "stride": self._stride}, tensors)

    def restore(self, state: StoreState) -> None:
        """As SavedStore; everything is copied."""
        heads, _, dim = self.gram_HDD.shape
        queries, last, stride = state.of_kind("queries").whole("queries"), state.whole("last"), state.whole("stride", 1)
        gram_HDD = state.tensor("gram", torch.float32, heads, dim, dim)
        if "recent" in state.tensors:
            self._recent_HGCD = state.tensor("recent", torch.float32, heads, None, None, dim).clone()
        if "training" in state.tensors:
            query_HGCD = state.tensor("training", torch.bfloat16, heads, None, None, dim)
            position_C = state.tensor("training_positions", torch.int64, query_HGCD.shape[2])
            if not self.training_positions or len(position_C) == 0 or bool((position_C.diff() <= 0).any()) or int(position_C[0]) < 0:
                raise ValueError("its training queries stand in no order")
            self._training = [(query_HGCD.clone(), position_C.clone())]
        self.gram_HDD, self.queries, self._last, self._stride = gram_HDD.clone(), queries, last, stride

    def nbytes(self) -> int:
        training = sum(query_HGCD.nbytes for query_HGCD, _ in self._training)
        return self.gram_HDD.nbytes + training + (0 if self._recent_HGCD is None else self._recent_HGCD.nbytes)
