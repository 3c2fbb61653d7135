"""The indexes of published systems as methods of retrieval_error.py, with the bytes that their searches really read.

Letters as in retrieval_methods.py; R candidates.

Each query head chooses for itself, but for RetroInfer's clusters, which a group chooses together.  What an index compares and does not find
counts as read too: keys of ivf's lists, and keys that a search of hnsw's graph visits (its walk is repeated here, on the graph that the
library made, because the library does not tell), or one of roargraph's.  A key that the walks of several query heads read counts as often.
MagicPIG draws keys by chance, with several seeds; its hyperplanes, which all KV heads of a layer share, count by their share.
"""

from __future__ import annotations

import functools
import heapq
import importlib.util
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from retrieval_methods import POSITION_BYTES, Answer, Past, Search, rows_read
from torch import Tensor

from kvcompile.codegen.toolchain import find_toolchain, machine_isa
from kvcompile.ir.lsh_facts import drawn_probability
from kvcompile.ir.policy import Select
from kvcompile.link import build_graphs, build_lsh
from kvcompile.runtime.indexes.hnsw import HnswIndex
from kvcompile.runtime.indexes.index import KeyIndex, Prompt
from kvcompile.runtime.indexes.ivf import IvfIndex
from kvcompile.runtime.indexes.lsh import LshIndex
from kvcompile.runtime.indexes.registry import index_kind
from kvcompile.runtime.indexes.roargraph import RoarGraphIndex
from kvcompile.runtime.merge import AttentionState
from kvcompile.runtime.spans import Span

KEY_BYTES = 2  # a number of a key
PAGES, CUBOIDS, REPRESENTATIVES, MEANS = "min-max pages", "cuboid pages of 32", "representatives of 128", "mean pages of 8"
RETROINFER, IVF, HNSW, ROARGRAPH = "retroinfer", "ivf, 32 of 512 lists", "hnsw, m 16, ef 200", "roargraph"
MAGICPIG = "magicpig, mean of 3"
SEEDS = 3
TABLES = ((11, 150), (11, 220), (10, 150), (10, 220), (8, 75), (8, 120))  # hash_bits and tables, from few keys to many


def published(past: Past, graphs: bool) -> dict[str, Search]:
    """Every kind, with the options that its system is published with; of graphs, if they are wanted, hnsw with the library and roargraph
    with a compiler."""
    found = {
        PAGES: whole(past, "minmax", {"page_tokens": 16}),
        CUBOIDS: whole(past, "cuboid", {"page_tokens": 32}),
        REPRESENTATIVES: whole(past, "representatives", {"page_tokens": 128}),
        MEANS: whole(past, "mean", {"page_tokens": 8}),
        RETROINFER: whole(past, "clusters", {}, "sum", POSITION_BYTES),
        IVF: ivf(past),
    }
    found |= {HNSW: hnsw(past)} if graphs and importlib.util.find_spec("hnswlib") else {}
    return found | ({ROARGRAPH: roargraph(past)} if graphs and graphs_are_built() else {})


@functools.cache
def graphs_are_built() -> bool:
    """Whether the library of graphs is loaded now: it is where there is a compiler."""
    toolchain = find_toolchain()
    if toolchain is not None:
        build_graphs(machine_isa(), toolchain)
    return toolchain is not None


def make(past: Past, name: str, options: Mapping[str, Any]) -> KeyIndex:
    sample = past.sample
    keys, values = past.key_TD[None].bfloat16(), past.value_TE[None].bfloat16()
    k, training = len(keys[0]) // 100, sample.training()
    prompt = Prompt(keys, values, sample.gram_HDD, sample.queries, sample.recent(), past.queries_per_kv, k, None, training)
    return index_kind(name).build(past.first, prompt, options)


def magicpig(past: Past) -> list[Search]:
    """One search a seed.  It is not asked for k: of TABLES those are taken that draw nearest to k of keys at right angles to the query."""
    hash_tables_are_built()
    return [functools.partial(draw, past, {tables: drawn_by(past, tables, seed) for tables in TABLES}) for seed in range(SEEDS)]


@functools.cache
def hash_tables_are_built() -> bool:
    """Whether the library of hash tables is loaded now; torch does its work without a compiler."""
    toolchain = find_toolchain()
    if toolchain is not None:
        build_lsh(machine_isa(), toolchain)
    return toolchain is not None


def drawn_by(past: Past, tables: tuple[int, int], seed: int) -> LshIndex:
    index = make(past, "lsh", {"hash_bits": tables[0], "tables": tables[1], "seed": seed})
    assert isinstance(index, LshIndex)
    return index


def draw(past: Past, indexes: Mapping[tuple[int, int], LshIndex], query_GQD: Tensor, k: int) -> Answer:
    wanted = math.log(k / len(past.key_TD))
    index = indexes[min(TABLES, key=lambda tables: abs(math.log(drawn_probability(math.pi / 2, *tables)) - wanted))]
    index.asked = index.places = 0
    read_GQT, _ = _each_query(past, index, query_GQD, k, "per_query_head")
    log_weight_GQT = torch.zeros(read_GQT.shape)
    for head, query in np.ndindex(*query_GQD.shape[:2]):
        drawn_T = read_GQT[head, query]
        key_HGKD = past.key_TD[drawn_T].bfloat16()[None, None]
        log_weight_GQT[head, query, drawn_T] = -index.log_probability(query_GQD[None, head : head + 1, query], key_HGKD)[0, 0]
    scanned = len(query_GQD) * index.query_bytes() + index.planes.normal_BD16.nbytes / past.kv_heads
    return Answer(read_GQT, scanned, None, log_weight_GQT)


def whole(past: Past, name: str, options: Mapping[str, Any], select: Select = "per_query_head", row_bytes: int = 0) -> Search:
    """An index whose search reads the same bytes for any query, and row_bytes for each key that it finds."""
    index = make(past, name, options)

    def search(query_GQD: Tensor, k: int) -> Answer:
        read_GQT, rest = _each_query(past, index, query_GQD, k, select)
        return Answer(read_GQT, index.scanned_bytes(rest is not None, k) + row_bytes * rows_read(read_GQT), rest)

    return search


def ivf(past: Past) -> Search:
    index = make(past, "ivf", {"lists": 512, "probe": 32})
    assert isinstance(index, IvfIndex)

    def search(query_GQD: Tensor, k: int) -> Answer:
        read_GQT, _ = _each_query(past, index, query_GQD, k, "per_query_head")
        compared_GQT = torch.zeros_like(read_GQT)
        for query in range(query_GQD.shape[1]):
            for row_T, place_R in zip(compared_GQT[:, query], index.candidates(query_GQD[None, :, query])[0], strict=True):
                row_T[place_R[place_R >= 0]] = True
        fixed = index.centre_HLD.nbytes + index.start_HL.nbytes
        compared = rows_read(compared_GQT)
        return Answer(read_GQT, fixed + POSITION_BYTES * compared + _key_bytes(past) * (compared - rows_read(read_GQT)))

    return search


def hnsw(past: Past) -> Search:
    index = make(past, "hnsw", {"m": 16, "ef": 200})
    assert isinstance(index, HnswIndex)
    walk = Walk(index.base.graphs[0])

    def search(query_GQD: Tensor, k: int) -> Answer:
        read_GQT, _ = _each_query(past, index, query_GQD, k, "per_query_head")
        visited_GQT, expanded_GQT = torch.zeros_like(read_GQT), torch.zeros_like(read_GQT)
        for head, query in np.ndindex(*query_GQD.shape[:2]):
            visited, expanded = walk.search(query_GQD[head, query].numpy(), max(200, k))
            visited_GQT[head, query, visited] = True
            expanded_GQT[head, query, expanded] = True
        links = (2 * 16 + 1) * 4 * rows_read(expanded_GQT)
        return Answer(read_GQT, links + _key_bytes(past) * (rows_read(visited_GQT) - rows_read(read_GQT)))

    return search


def roargraph(past: Past) -> Search:
    index = make(past, "roargraph", {})
    assert isinstance(index, RoarGraphIndex)
    row_bytes = 4 * index.graphs.rows_THUS.shape[3]

    def search(query_GQD: Tensor, k: int) -> Answer:
        before = replace(index.walked)
        read_GQT, _ = _each_query(past, index, query_GQD, k, "per_query_head")
        keys, hops = index.walked.keys - before.keys, index.walked.hops - before.hops
        walked = row_bytes * hops + _key_bytes(past) * (keys - int(read_GQT.sum()))
        return Answer(read_GQT, walked / query_GQD.shape[1])

    return search


class Walk:
    """hnswlib's search (Malkov and Yashunin 2016, algorithms 2 and 5) on a graph that it made, telling which keys it compared."""

    def __init__(self, graph: Any) -> None:
        state = graph.__getstate__()[0]
        count, size = state["cur_element_count"], state["size_data_per_element"]
        rows = state["data_level0"].view(np.uint8)[: count * size].reshape(count, size)
        words = np.ascontiguousarray(rows[:, : state["offset_data"]]).view(np.uint32)
        self._links = [words[node, 1 : 1 + (words[node, 0] & 0xFFFF)].astype(np.int64) for node in range(count)]
        self._key_TD = np.ascontiguousarray(rows[:, state["offset_data"] : state["label_offset"]]).view(np.float32)
        assert (np.ascontiguousarray(rows[:, state["label_offset"] :]).view(np.uint64)[:, 0] == np.arange(count)).all()
        self._start, self._layers = state["enterpoint_node"], state["max_level"]
        self._upper: dict[tuple[int, int], np.ndarray] = {}
        upper, at, step = state["link_lists"].view(np.uint8), 0, state["size_links_per_element"]
        for node in np.nonzero(state["element_levels"][:count])[0]:
            for layer in range(1, state["element_levels"][node] + 1):
                words = np.ascontiguousarray(upper[at : at + step]).view(np.uint32)
                self._upper[int(node), layer] = words[1 : 1 + (words[0] & 0xFFFF)].astype(np.int64)
                at += step

    def search(self, query_D: np.ndarray, ef: int) -> tuple[list[int], list[int]]:
        """Keys that were compared with the query, and those of them whose neighbours were looked up."""
        node, visited = self._start, {self._start}
        best = self._far(query_D, [node])[0]
        for layer in range(self._layers, 0, -1):
            moved = True
            while moved:
                near = self._upper[int(node), layer]
                visited.update(near.tolist())
                far = self._far(query_D, near)
                moved = len(far) > 0 and bool(far.min() < best)
                if moved:
                    node, best = int(near[far.argmin()]), far.min()
        seen, expanded = {node}, []
        candidates, kept = [(best, node)], [(-best, node)]
        while candidates:
            far, node = heapq.heappop(candidates)
            if far > -kept[0][0] and len(kept) >= ef:
                break
            expanded.append(node)
            new = [each for each in self._links[node].tolist() if each not in seen]
            seen.update(new)
            for far, each in zip(self._far(query_D, new), new, strict=True):
                if len(kept) < ef or far < -kept[0][0]:
                    heapq.heappush(candidates, (far, each))
                    heapq.heappush(kept, (-far, each))
                    if len(kept) > ef:
                        heapq.heappop(kept)
        self.kept = {node for _, node in kept}
        return list(visited | seen), expanded

    def _far(self, query_D: np.ndarray, nodes: Any) -> np.ndarray:
        return 1 - self._key_TD[nodes] @ query_D


def _each_query(past: Past, index: KeyIndex, query_GQD: Tensor, k: int, select: Select) -> tuple[Tensor, AttentionState | None]:
    """What a session would ask, query by query: keys read, and the estimate of the others of an index that has one."""
    span = Span(past.first, past.key_TD[None], past.value_TE[None])
    group, queries, _ = query_GQD.shape
    read_GQT = torch.zeros(group, queries, len(past.key_TD), dtype=torch.bool)
    rests = []
    for query in range(queries):
        asked_HGD = query_GQD[None, :, query]
        found = index.search(asked_HGD, k, select, lambda first, end: (span.between(first, end),))
        for row_T, position_K in zip(read_GQT[:, query], found.position_HGK[0], strict=True):
            row_T[position_K[position_K >= 0] - past.first] = True
        rests.append(index.rest(asked_HGD, found, torch.zeros(1, group)))  # none of these asks what was read
    kept = [rest for rest in rests if rest is not None]
    if not kept:
        return read_GQT, None
    return read_GQT, AttentionState(torch.stack([rest.out[0] for rest in kept], 1), torch.stack([rest.lse[0] for rest in kept], 1))


def _key_bytes(past: Past) -> int:
    return KEY_BYTES * past.key_TD.shape[1]
