"""recall@100 of graphs over keys against the share of keys that a search reads, on real queries of text that the graph has not seen.

    python benchmarks/graph_recall.py [--keep DIR] [--tokens 4096,8192,16384,32768]

Gemma-3-270M reads a text; of each of its 3 global layers the first N tokens are taken.  The index covers the keys from 64 up to seven
eighths of them and learns from the queries that a session would have kept of these positions (roargraph, at most 4096 a KV head).  128
positions of the last eighth, evenly spaced, ask with their 4 query heads; truth is the plain product in float32.  hnsw is hnswlib (m 16,
ef_construction 200, inner product), asked by the same queries and by the keys of these positions; it does not count what it reads.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import write
from real_keys import SOURCES, Site, sites
from torch import Tensor

from kvcompile.codegen.toolchain import find_toolchain, machine_isa
from kvcompile.ir.graph_facts import ROARGRAPH
from kvcompile.link import build_graphs
from kvcompile.runtime.indexes.index import Prompt
from kvcompile.runtime.indexes.registry import index_kind
from kvcompile.runtime.indexes.roargraph import RoarGraphIndex
from kvcompile.runtime.native_graph import graph_library
from kvcompile.runtime.query_sample import QuerySample
from kvcompile.runtime.spans import Span

K, WANTED = 100, 0.95
FIRST, ASKED = 64, 128
WIDTHS = (100, 120, 150, 180, 220, 260, 320, 400, 520, 700, 1000)
HNSW_WIDTHS = (100, 200, 400, 800, 1600, 3200)


def roargraph(site: Site, tokens: int, per: str) -> dict[str, Any]:
    cache, asked_HND, keys_HTD = parts(site, tokens)
    heads, group = len(site.key_HTD), len(site.query_QTD) // len(site.key_HTD)
    options = {"per": per}
    sample = QuerySample(heads, site.key_HTD.shape[2], ROARGRAPH.training_queries(options) // group)
    sample.add(site.query_QTD[:, :cache].unflatten(0, (heads, group)), 0, site.scale)
    prompt = Prompt(keys_HTD, keys_HTD, sample.gram_HDD, sample.queries, sample.recent(), group, K, None, sample.training())
    index = index_kind("roargraph").build(FIRST, prompt, options)
    assert isinstance(index, RoarGraphIndex)
    span, best_HNK = [Span(FIRST, keys_HTD, keys_HTD)], truth(asked_HND, keys_HTD)
    curve = []
    for width in WIDTHS:
        walks = graph_library().search(span, asked_HND, K, min(width, keys_HTD.shape[1]), index.graphs)
        curve.append((recall(walks.node_HNK, best_HNK), float(walks.keys_HN.float().mean())))
    return {
        "keys": keys_HTD.shape[1],
        "training queries": sample.training().count,
        "links a key": round(float((index.graphs.rows_THUS >= 0).sum() / index.graphs.norm_THU.numel()), 1),
        "curve: ef, recall, keys read": [
            (width, round(found, 4), round(read, 1)) for width, (found, read) in zip(WIDTHS, curve, strict=True)
        ],
        "keys read at 0.95": reached(curve),
    }


def hnsw(site: Site, tokens: int) -> dict[str, Any]:
    import hnswlib

    cache, asked_HND, keys_HTD = parts(site, tokens)
    key_TD = keys_HTD[0].float()
    index = hnswlib.Index(space="ip", dim=key_TD.shape[1])
    index.init_index(len(key_TD), M=16, ef_construction=200)
    index.add_items(key_TD.numpy(), num_threads=torch.get_num_threads())
    own_ND = site.key_HTD[0, torch.linspace(cache, tokens - 1, ASKED).long()].float()
    curves: dict[str, Any] = {}
    for name, query_ND in (("queries", asked_HND[0]), ("keys as queries", own_ND)):
        best_NK = truth(query_ND[None], keys_HTD)
        curves[name] = []
        for width in HNSW_WIDTHS:
            index.set_ef(width)
            found_NK = torch.from_numpy(index.knn_query(query_ND.numpy(), K)[0].astype("int64"))
            curves[name].append((width, round(recall(found_NK[None], best_NK), 4)))
    return {name: {"curve: ef, recall": curve, "best recall": max(found for _, found in curve)} for name, curve in curves.items()}


def parts(site: Site, tokens: int) -> tuple[int, Tensor, Tensor]:
    """Tokens of the cache, the queries that ask (of one query head behind those of another), and the keys that are covered."""
    cache = tokens * 7 // 8
    position_N = torch.linspace(cache, tokens - 1, ASKED).long()
    asked_QND = site.query_QTD[:, position_N].float() * site.scale
    return cache, asked_QND.unflatten(0, (len(site.key_HTD), -1)).flatten(1, 2), site.key_HTD[:, FIRST:cache]


def truth(query_HND: Tensor, key_HTD: Tensor) -> Tensor:
    return (query_HND @ key_HTD.float().transpose(1, 2)).topk(K, 2).indices


def recall(found_HNK: Tensor, best_HNK: Tensor) -> float:
    return float((best_HNK[..., None] == found_HNK[..., None, :]).any(3).float().mean())


def reached(curve: list[tuple[float, float]]) -> float | None:
    """Keys read where the recall is WANTED, between two widths; None where it never is."""
    for (low, few), (high, many) in itertools.pairwise(curve):
        if low < WANTED <= high:
            return round(few + (many - few) * (WANTED - low) / (high - low), 1)
    return curve[0][1] if curve[0][0] >= WANTED else None


def exponent(sizes: list[dict[str, Any]]) -> float | None:
    """Of the number of keys, in the growth of what is read for WANTED: between the smallest and the largest."""
    first, last = sizes[0], sizes[-1]
    if first is last or not first["keys read at 0.95"] or not last["keys read at 0.95"]:
        return None
    return round(math.log(last["keys read at 0.95"] / first["keys read at 0.95"]) / math.log(last["keys"] / first["keys"]), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="a folder where the model's tensors stay for the next run")
    parser.add_argument("--tokens", default="4096,8192,16384,32768")
    given = parser.parse_args()
    toolchain = find_toolchain()
    if toolchain is None:
        raise SystemExit("a C++ compiler is needed: install g++, or set CXX")
    build_graphs(machine_isa(), toolchain)
    kinds: dict[str, Callable[[Site, int], dict[str, Any]]] = {
        "roargraph": lambda site, tokens: roargraph(site, tokens, "kv_head"),
        "roargraph, a graph a query head": lambda site, tokens: roargraph(site, tokens, "query_head"),
    }
    if importlib.util.find_spec("hnswlib"):
        kinds["hnsw"] = hnsw
    else:
        print("hnswlib is missing: its curves are left out")
    source = next(source for source in SOURCES if source.name == "gemma_32k")
    results: dict[str, Any] = {}
    for layer, site in sites(source, given.keep).items():
        for name, measure in kinds.items():
            sizes = {}
            for tokens in map(int, given.tokens.split(",")):
                found = sizes[str(tokens)] = measure(site, tokens)
                if "curve: ef, recall, keys read" in found:
                    at = found["keys read at 0.95"]
                    told = f"{at:.0f} keys read at 0.95, {100 * at / found['keys']:.2f}%" if at else "0.95 is never reached"
                    print(f"layer {layer}, {tokens} tokens, {name}: {told}", flush=True)
                else:
                    told = ", ".join(f"{who} {100 * each['best recall']:.1f}%" for who, each in found.items())
                    print(f"layer {layer}, {tokens} tokens, {name}: best recall of {told}", flush=True)
            results.setdefault(f"layer {layer}", {})[name] = sizes
            if name.startswith("roargraph"):
                sizes["exponent"] = exponent(list(sizes.values()))  # type: ignore[assignment]
                print(f"layer {layer}, {name}: keys read grow as N^{sizes['exponent']}", flush=True)
    write("graph_recall", torch.get_num_threads(), results)


if __name__ == "__main__":
    main()
