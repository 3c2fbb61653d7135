"""The index `flat`: every key is read.  Exact, and what the recall of all others is measured against.

Letters: H KV heads, G queries per KV head, T keys, D head_dim, E value_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kvcompile.ir.indexes import FlatFacts
from kvcompile.ir.policy import Select
from kvcompile.runtime.indexes.index import Found, Keys, Prompt, RecentQueries
from kvcompile.runtime.indexes.restoring import borders, soft_cap, whole
from kvcompile.runtime.indexes.select import select_keys
from kvcompile.runtime.merge import AttentionState

_BLOCK_TOKENS = 4096  # keys that are widened at once: what a core's cache holds


class FlatIndex:
    """Holds nothing but its borders.  key_bytes: of the keys of one token in all KV heads."""

    notes: tuple[str, ...] = ()

    def __init__(self, first: int, end: int, soft_cap: float | None, key_bytes: int) -> None:
        self._first, self._end = first, end
        self._soft_cap = soft_cap
        self._key_bytes = key_bytes

    @property
    def first(self) -> int:
        return self._first

    @property
    def end(self) -> int:
        return self._end

    def add(self, key_HTD: Tensor, value_HTE: Tensor) -> None:
        self._end += key_HTD.shape[1]

    def search(self, query_HGD: Tensor, k: int, select: Select, keys: Keys) -> Found:
        blocks = [block_HTD for span in keys(self._first, self._end) for block_HTD in span.key_HTD.split(_BLOCK_TOKENS, 1)]
        parts = [query_HGD.float() @ block_HTD.float().transpose(1, 2) for block_HTD in blocks]
        score_HGT = torch.cat(parts, 2)
        if self._soft_cap is not None:
            score_HGT = self._soft_cap * torch.tanh(score_HGT / self._soft_cap)
        chosen_HGK = select_keys(score_HGT, k, select)
        return Found(torch.where(chosen_HGK >= 0, chosen_HGK + self._first, -1), k, score_HGT)

    def rest(self, query_HGD: Tensor, found: Found, read_lse_HG: Tensor) -> AttentionState | None:
        return None

    def recalibrate(self, recent: RecentQueries, keys: Keys, k: int) -> bool:
        return True

    def rollback(self, end: int) -> None:
        self._end = min(self._end, end)

    def fork(self) -> FlatIndex:
        return FlatIndex(self._first, self._end, self._soft_cap, self._key_bytes)

    def nbytes(self) -> int:
        return 0

    def scanned_bytes(self, tail: bool, k: int) -> int:
        return (self._end - self._first) * self._key_bytes

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {"first": self._first, "end": self._end, "soft_cap": self._soft_cap, "key_bytes": self._key_bytes}


class Flat(FlatFacts):
    """The kind `flat`."""

    def build(self, first: int, prompt: Prompt, options: Mapping[str, Any]) -> FlatIndex:
        heads, tokens, head_dim = prompt.key_HTD.shape
        return FlatIndex(first, first + tokens, prompt.soft_cap, heads * head_dim * prompt.key_HTD.dtype.itemsize)

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> FlatIndex:
        return FlatIndex(*borders(numbers), soft_cap(numbers), whole(numbers, "key_bytes"))
