"""The index `hnsw`: a hierarchical navigable small world graph of the library hnswlib, one for each KV head, by inner product.

Letters: H KV heads, G queries per KV head, T keys, C candidates, K keys found, D head_dim.

The library holds keys of its own, in float32, centred by the mean of those that the index was made from.  Queries do not care, the graph
does: inner products are no distance, and keys share a large mean.  On real queries of SmolLM2 at 8K (m 16, ef 200) recall@100 is 0.99 and
0.89 on layers 28 and 20, and 0.23 and 0.60 with `centred: false`.  What the library cannot do:
1. Forget.  So keys that were there when the index was made are one graph, those that were added since another, the tail.  A search asks
   both; the best of what they found are compared by the session's own keys.  A rollback makes the tail anew from its first keys.
2. Be copied: a copy goes on with other random layers than the original.  So forks share the graphs until one of them adds keys, which then
   makes a tail of its own from the same keys.
3. Say what it found where that is fewer than k: it raises RuntimeError.  Then fewer are asked for.
4. Be read from a file that is damaged without a crash.  So a file holds the keys, and reading it inserts them again, in the same order:
   the same graph.
Keys are inserted one after the other on one thread, so that the same keys give the same graph.
"""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvcompile.ir.errors import Problem, TargetError
from kvcompile.ir.policy import Select
from kvcompile.ir.published_indexes import HnswFacts
from kvcompile.runtime.indexes.gather import keys_at
from kvcompile.runtime.indexes.index import Found, Keys, Prompt, RecentQueries
from kvcompile.runtime.indexes.restoring import borders, shaped, whole
from kvcompile.runtime.indexes.select import share_chosen
from kvcompile.runtime.merge import AttentionState

_SEED = 100  # of the layers; the library's own default


class Sizes(NamedTuple):
    """m: neighbours of a key; ef, ef_construction: candidates that a search, an insertion keeps."""

    m: int
    ef: int
    ef_construction: int


class Graphs:
    """The graphs of the KV heads over the same tokens.  They are added to, and never shrink."""

    def __init__(self, heads: int, head_dim: int, sizes: Sizes) -> None:
        library = _library()
        self._sizes, self._room, self._head_dim = sizes, 1, head_dim
        self.tokens = 0
        self.graphs = [library.Index("ip", head_dim) for _ in range(heads)]
        for graph in self.graphs:
            graph.init_index(1, M=sizes.m, ef_construction=sizes.ef_construction, random_seed=_SEED)

    def add(self, key_HTD: Tensor) -> None:
        """Keys already centred."""
        tokens = self.tokens + key_HTD.shape[1]
        if tokens > self._room:
            self._room = tokens if not self.tokens else max(tokens, 2 * self._room)
        label_T = torch.arange(self.tokens, tokens).numpy()
        for graph, key_TD in zip(self.graphs, key_HTD, strict=True):
            if graph.get_max_elements() < self._room:
                graph.resize_index(self._room)
            if len(label_T):
                graph.add_items(key_TD.contiguous().numpy(), label_T, num_threads=1)
        self.tokens = tokens

    def keys(self, tokens: int) -> Tensor:
        """The first keys as they were added, float32 [H, T, D]."""
        if not tokens:
            return torch.zeros(len(self.graphs), 0, self._head_dim)
        label_T = torch.arange(tokens).numpy()
        return torch.stack([torch.from_numpy(graph.get_items(label_T)) for graph in self.graphs])

    def remade(self, tokens: int) -> Graphs:
        """Graphs of the first keys, as they were when there were no others."""
        other = Graphs(len(self.graphs), self._head_dim, self._sizes)
        other.add(self.keys(tokens))
        return other

    def near(self, query_HGD: Tensor, k: int) -> Tensor:
        """What searches for k keys found, int64 [H, G, C], in any order; -1 where they found fewer; all where there are no more."""
        heads, group, _ = query_HGD.shape
        if self.tokens <= k:
            return torch.arange(self.tokens).expand(heads, group, -1)
        found_HGC = torch.full((heads, group, k), -1)
        for found_GC, graph, query_GD in zip(found_HGC, self.graphs, query_HGD.float().contiguous().numpy(), strict=True):
            graph.set_ef(max(self._sizes.ef, k))
            for found_C, query_D in zip(found_GC, query_GD, strict=True):
                label_C = _asked(graph, query_D, k)
                found_C[: len(label_C)] = label_C
        return found_HGC

    def nbytes(self) -> int:
        """As the library writes them: keys, labels, neighbours."""
        return sum(int(graph.index_file_size()) for graph in self.graphs) if self.tokens else 0


def _asked(graph: Any, query_D: Any, k: int) -> Tensor:
    """At most k labels, int64, as many as the graph can reach: found by halving where they are fewer than k."""
    found = torch.zeros(0, dtype=torch.int64)
    few, many, ask = 0, k + 1, k
    while few < ask < many:
        try:
            labels, _ = graph.knn_query(query_D, k=ask, num_threads=1)
        except RuntimeError:
            many = ask
        else:
            few, found = ask, torch.from_numpy(labels[0].astype("int64"))
        ask = (few + many) // 2
    return found


class HnswIndex:
    """base: of the keys that were there when it was made; tail: of those added since.  Others may hold both: `shared` tells that a fork
    has the same tail."""

    notes: tuple[str, ...] = ()

    def __init__(self, first: int, mean_HD: Tensor, sizes: Sizes, base: Graphs, tail: Graphs) -> None:
        self.mean_HD, self.base, self.tail = mean_HD, base, tail
        self._first, self._sizes = first, sizes
        self._shared = False
        self._borrowed: list[weakref.ref[Graphs]] = []

    @property
    def shape(self) -> tuple[int, int, int | None]:
        return *self.mean_HD.shape, None

    @property
    def first(self) -> int:
        return self._first

    @property
    def end(self) -> int:
        return self._first + self.base.tokens + self.tail.tokens

    def add(self, key_HTD: Tensor, value_HTE: Tensor) -> None:
        if self._shared:
            self.tail, self._shared = self.tail.remade(self.tail.tokens), False
        self.tail.add(key_HTD.float() - self.mean_HD[:, None])

    def search(self, query_HGD: Tensor, k: int, select: Select, keys: Keys) -> Found:
        heads, group, _ = query_HGD.shape
        tokens = self.end - self._first
        if k >= tokens:
            return Found(torch.arange(self._first, self.end).expand(heads, group, tokens), k)
        place_HGC, late_HGC = self.base.near(query_HGD, k), self.tail.near(query_HGD, k)
        if late_HGC.shape[2]:
            place_HGC = torch.cat([place_HGC, torch.where(late_HGC >= 0, late_HGC + self.base.tokens, -1)], 2)
        position_HGC = torch.where(place_HGC >= 0, place_HGC + self._first, -1)
        if position_HGC.shape[2] > k:
            asked_HX = position_HGC.clamp_min(self._first).flatten(1)
            key_HGCD = keys_at(keys(self._first, self.end), asked_HX).float().unflatten(1, position_HGC.shape[1:])
            logit_HGC = (key_HGCD @ query_HGD.float()[..., None]).squeeze(3).masked_fill(position_HGC < 0, -torch.inf)
            position_HGC = position_HGC.gather(2, logit_HGC.topk(k, 2).indices)
        return Found(share_chosen(position_HGC, select), k)

    def rest(self, query_HGD: Tensor, found: Found, read_lse_HG: Tensor) -> AttentionState | None:
        return None

    def recalibrate(self, recent: RecentQueries, keys: Keys, k: int) -> bool:
        return True

    def rollback(self, end: int) -> None:
        kept = max(0, end - self._first)
        if kept < self.base.tokens:
            self.base = self.base.remade(kept)
        if kept < self.base.tokens + self.tail.tokens:
            self.tail, self._shared = self.tail.remade(max(0, kept - self.base.tokens)), False

    def fork(self) -> HnswIndex:
        child = HnswIndex(self._first, self.mean_HD, self._sizes, self.base, self.tail)
        self._shared = child._shared = True
        child._borrowed = [weakref.ref(self.base), weakref.ref(self.tail)]
        return child

    def nbytes(self) -> int:
        return self.mean_HD.nbytes + self.base.nbytes() + self.tail.nbytes()

    def borrowed_nbytes(self) -> int:
        """Mean and base, and the tail until keys are added."""
        graphs = sum(each.nbytes() for each in (self.base, self.tail) if any(each is other() for other in self._borrowed))
        return graphs + (self.mean_HD.nbytes if self._borrowed else 0)

    def scanned_bytes(self, tail: bool, k: int) -> int:
        """As the facts guess for one query head; what a search really reads, the library does not say."""
        heads, head_dim = self.mean_HD.shape
        sizes = self._sizes._replace(ef=max(self._sizes.ef, k))
        return heads * HnswFacts().bytes_per_token(head_dim, 0, 4, sizes._asdict()).search_fixed

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {"mean": self.mean_HD, "base": self.base.keys(self.base.tokens), "tail": self.tail.keys(self.tail.tokens)}
        return tensors, {"first": self._first, "sizes": self._sizes._asdict()}


def _library() -> Any:
    try:
        return importlib.import_module("hnswlib")
    except ModuleNotFoundError:
        fault = HnswFacts().check({})[-1]
        raise TargetError(Problem("index hnsw", fault.what, fault.mend)) from None


class Hnsw(HnswFacts):
    """The kind `hnsw`."""

    def build(self, first: int, prompt: Prompt, options: Mapping[str, Any]) -> HnswIndex:
        heads, tokens, head_dim = prompt.key_HTD.shape
        key_HTD = prompt.key_HTD.float()
        mean_HD = key_HTD.mean(1) if tokens and options.get("centred", True) else key_HTD.new_zeros(heads, head_dim)
        sizes = Sizes(*(self.value(options, name) for name in Sizes._fields))
        base = Graphs(heads, head_dim, sizes)
        base.add(key_HTD - mean_HD[:, None])
        return HnswIndex(first, mean_HD, sizes, base, Graphs(heads, head_dim, sizes))

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> HnswIndex:
        _library()  # a file is not damaged because it is missing
        mean_HD = shaped(tensors, "mean", torch.float32, None, None)
        heads, head_dim = mean_HD.shape
        base_HTD, tail_HTD = (shaped(tensors, name, torch.float32, heads, None, head_dim) for name in ("base", "tail"))
        first = whole(numbers, "first")
        borders({"first": first, "end": first + base_HTD.shape[1] + tail_HTD.shape[1]})
        faults = self.check(numbers["sizes"])
        if faults:
            raise ValueError(f"{faults[0].option} {faults[0].what}")
        sizes = Sizes(**numbers["sizes"])
        base, tail = (Graphs(heads, head_dim, sizes) for _ in range(2))
        base.add(base_HTD)
        tail.add(tail_HTD)
        return HnswIndex(first, mean_HD, sizes, base, tail)
