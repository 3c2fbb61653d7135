"""The index `ivf`: keys in lists around centres, of which a query reads those with the nearest centres.

Letters: H KV heads, G queries per KV head, T keys, L lists, R lists read, C candidates, K keys found, D head_dim.

As Faiss does for inner products (IndexIVFFlat, Johnson et al. 2017): spherical k-means, a key in the list of the centre with the largest
inner product, a query reads the `probe` lists whose centres have the largest inner product with it and compares all their keys.  Keys are
centred first, by the mean of those that the index was made from: queries do not care, lists do.  Keys that are added join their nearest
centre; centres stay.  Keys are read where the session holds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kvcompile.ir.policy import Select
from kvcompile.ir.published_indexes import IvfFacts
from kvcompile.runtime.indexes.gather import keys_at
from kvcompile.runtime.indexes.index import Borrowed, Found, Keys, Prompt, RecentQueries
from kvcompile.runtime.indexes.lists import listed
from kvcompile.runtime.indexes.restoring import borders, shaped, whole
from kvcompile.runtime.indexes.select import share_chosen
from kvcompile.runtime.indexes.spherical import nearest_centre, spherical_centres
from kvcompile.runtime.merge import AttentionState


class IvfIndex:
    """centre_HLD: of the lists, bfloat16; mean_HD: what keys are centred by, float32; list_HT: the list of each key, int16.

    order_HT: keys by list, in each by position, int32; start_HL: where each list starts in it, int32 [H, L + 1].
    row_bytes: of one key.  Tensors are replaced, never changed: forks share them.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, first: int, probe: int, row_bytes: int, centre_HLD: Tensor, mean_HD: Tensor, list_HT: Tensor) -> None:
        self.centre_HLD, self.mean_HD = centre_HLD, mean_HD
        self._first, self._probe, self._row_bytes = first, probe, row_bytes
        self._borrowed = Borrowed()
        self._put(list_HT)

    def _put(self, list_HT: Tensor) -> None:
        self.list_HT = list_HT
        sorted_HT, order_HT = list_HT.sort(dim=1, stable=True)
        self.order_HT = order_HT.int()
        lists = self.centre_HLD.shape[1]
        every_HL = torch.arange(lists + 1, dtype=list_HT.dtype).expand(len(list_HT), -1).contiguous()
        self.start_HL = torch.searchsorted(sorted_HT, every_HL).int()

    @property
    def shape(self) -> tuple[int, int, int | None]:
        return *self.mean_HD.shape, None

    @property
    def first(self) -> int:
        return self._first

    @property
    def end(self) -> int:
        return self._first + self.list_HT.shape[1]

    def add(self, key_HTD: Tensor, value_HTE: Tensor) -> None:
        new_HT = nearest_centre(key_HTD.float() - self.mean_HD[:, None], self.centre_HLD.float())
        self._put(torch.cat([self.list_HT, new_HT.to(torch.int16)], 1))

    def search(self, query_HGD: Tensor, k: int, select: Select, keys: Keys) -> Found:
        heads, group, _ = query_HGD.shape
        tokens = self.list_HT.shape[1]
        if k >= tokens:
            return Found(torch.arange(self._first, self.end).expand(heads, group, tokens), k)
        place_HGC = self.candidates(query_HGD)
        read_HGC = place_HGC >= 0
        key_HXD = keys_at(keys(self._first, self.end), place_HGC.clamp_min(0).flatten(1) + self._first)
        logit_HGC = (key_HXD.float().unflatten(1, place_HGC.shape[1:]) @ query_HGD.float()[..., None]).squeeze(3)
        best_HGK = logit_HGC.masked_fill(~read_HGC, -torch.inf).topk(min(k, place_HGC.shape[2]), 2).indices
        chosen_HGK = place_HGC.gather(2, best_HGK)
        return Found(share_chosen(torch.where(chosen_HGK >= 0, chosen_HGK + self._first, -1), select), k)

    def candidates(self, query_HGD: Tensor) -> Tensor:
        """Keys of the lists that each query reads, counted from `first`, int64 [H, G, C]; -1 at the end of rows that read fewer."""
        empty_HL = self.start_HL.diff(dim=1) == 0
        score_HGL = (query_HGD.float() @ self.centre_HLD.float().transpose(1, 2)).masked_fill(empty_HL[:, None], -torch.inf)
        return listed(self.order_HT, self.start_HL, score_HGL.topk(self._probe, 2).indices)

    def rest(self, query_HGD: Tensor, found: Found, read_lse_HG: Tensor) -> AttentionState | None:
        return None

    def recalibrate(self, recent: RecentQueries, keys: Keys, k: int) -> bool:
        return True

    def rollback(self, end: int) -> None:
        if end < self.end:
            self._put(self.list_HT[:, : max(0, end - self._first)].contiguous())

    def fork(self) -> IvfIndex:
        child = IvfIndex.__new__(IvfIndex)  # whose lists are not sorted again
        vars(child).update(vars(self))
        child._borrowed = Borrowed(child._held())
        return child

    def nbytes(self) -> int:
        return sum(each.nbytes for each in self._held())

    def borrowed_nbytes(self) -> int:
        """All, until keys are added: then centres and mean."""
        return self._borrowed.nbytes(self._held())

    def _held(self) -> list[Tensor]:
        return [self.centre_HLD, self.mean_HD, self.list_HT, self.order_HT, self.start_HL]

    def scanned_bytes(self, tail: bool, k: int) -> int:
        """Lists are counted as equally long."""
        heads, lists, _ = self.centre_HLD.shape
        read = heads * self.list_HT.shape[1] * self._probe * (self._row_bytes + self.order_HT.dtype.itemsize) // lists
        return self.centre_HLD.nbytes + self.start_HL.nbytes + read

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {"centre": self.centre_HLD, "mean": self.mean_HD, "list": self.list_HT}
        return {name: tensor.contiguous() for name, tensor in tensors.items()}, {
            "first": self._first,
            "probe": self._probe,
            "row_bytes": self._row_bytes,
        }


class Ivf(IvfFacts):
    """The kind `ivf`."""

    def build(self, first: int, prompt: Prompt, options: Mapping[str, Any]) -> IvfIndex:
        key_HTD = prompt.key_HTD.float()
        heads, tokens, head_dim = key_HTD.shape
        lists, probe = self.lists(options)
        mean_HD = key_HTD.mean(1) if tokens else key_HTD.new_zeros(heads, head_dim)
        centre_HLD = torch.zeros(heads, lists, head_dim, dtype=torch.bfloat16)
        list_HT = torch.zeros(heads, tokens, dtype=torch.int64)
        if tokens:
            used = min(lists, tokens)
            centre_HLD[:, :used] = spherical_centres(key_HTD - mean_HD[:, None], used)
            list_HT = nearest_centre(key_HTD - mean_HD[:, None], centre_HLD[:, :used].float())
        row_bytes = head_dim * prompt.key_HTD.dtype.itemsize
        return IvfIndex(first, probe, row_bytes, centre_HLD, mean_HD, list_HT.to(torch.int16))

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> IvfIndex:
        centre_HLD = shaped(tensors, "centre", torch.bfloat16, None, None, None)
        heads, lists, head_dim = centre_HLD.shape
        mean_HD, list_HT = shaped(tensors, "mean", torch.float32, heads, head_dim), shaped(tensors, "list", torch.int16, heads, None)
        first, probe, row_bytes = whole(numbers, "first"), whole(numbers, "probe", 1, lists), whole(numbers, "row_bytes")
        borders({"first": first, "end": first + list_HT.shape[1]})
        if list_HT.numel() and not 0 <= int(list_HT.min()) <= int(list_HT.max()) < lists:
            raise ValueError(f"keys are in the lists {int(list_HT.min())} to {int(list_HT.max())} of {lists}")
        return IvfIndex(first, probe, row_bytes, centre_HLD, mean_HD, list_HT)
