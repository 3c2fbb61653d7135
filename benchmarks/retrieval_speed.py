"""How long a search for keys takes, kind by kind, at the recall that it has.

    python benchmarks/retrieval_speed.py [--keep DIR] [--tokens 8192,32768,131072] [--layer 11]

Keys, values and queries are those of one global layer of Gemma-3-270M reading a text of 32K tokens (one KV head, 4 query heads, head_dim
256); of longer contexts keys and values are drawn from these with replacement, each with noise of a tenth of its channel's standard
deviation.  Of N tokens an index covers the first seven eighths from token 64 on; positions of the text's last eighth ask for 100 keys with
their 4 query heads.  Every kind is asked with growing effort (`ef`, `probe`) until it finds 95 % of the right keys, or has no more to give;
what is timed is the search of one position, `KeyIndex.search`, kinds taking turns, medians.  flat, ivf and sketch search in torch,
roargraph and hnsw in C++; so beside them stands a plain scan of all keys in C++, which finds them exactly.  What the sketch's C++
kernel takes with attention and all is in the last line of each size: the kernel's call at this layer, window, chosen rows and tail
included, beside the same of full attention.  hnsw is left out where hnswlib is not installed.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from graph_recall import recall, truth
from harness import median, write
from lookup_decode import NOISE
from real_keys import SOURCES, Site, gemma_path, sites
from torch import Tensor

import kvcompile
from kvcompile.codegen.toolchain import find_toolchain, machine_isa
from kvcompile.ir.graph_facts import ROARGRAPH
from kvcompile.link import build_graphs
from kvcompile.runtime.indexes.index import KeyIndex, Prompt
from kvcompile.runtime.indexes.registry import index_kind
from kvcompile.runtime.model import PackedCall
from kvcompile.runtime.native_graph import graph_library
from kvcompile.runtime.query_sample import QuerySample
from kvcompile.runtime.spans import Span

K, WANTED = 100, 0.95
FIRST, ASKED, ROUNDS = 64, 64, 3
EFFORT: dict[str, tuple[str, tuple[int, ...]]] = {
    "roargraph": ("ef", (100, 150, 200, 300, 400, 600, 1000)),
    "hnsw": ("ef", (100, 200, 400, 800, 1600, 3200)),
    "ivf": ("probe", (8, 16, 32, 64, 128, 256, 512)),
}
SCAN = "scan in C++"
OPTIONS: dict[str, dict[str, Any]] = {
    "flat": {},
    "roargraph": {},
    "hnsw": {"m": 16, "ef": 200},
    "ivf": {"lists": 512, "probe": 32},
    "sketch": {},
}


class Past:
    """The keys that are covered at one size, and who asks."""

    def __init__(self, site: Site, tokens: int) -> None:
        real = min(tokens, site.key_HTD.shape[1])
        key_HTD, value_HTE, query_QTD = (each[:, : real * 7 // 8] for each in (site.key_HTD, site.value_HTE, site.query_QTD))
        if tokens > real:
            generator = torch.Generator().manual_seed(tokens)
            chosen_T = torch.randint(key_HTD.shape[1], (tokens * 7 // 8,), generator=generator)
            query_QTD = query_QTD[:, chosen_T]
            key_HTD, value_HTE = (_drawn(each, chosen_T, generator) for each in (key_HTD, value_HTE))
        self.group = len(site.query_QTD) // len(site.key_HTD)
        self.scale = site.scale
        self.spans = [Span(0, key_HTD, value_HTE)]
        self.covered = self.spans[0].between(FIRST, key_HTD.shape[1])
        self.query_QTD = query_QTD
        position_N = torch.linspace(real * 7 // 8, real - 1, ASKED).long()
        self.asked_HGND = (site.query_QTD[:, position_N].float() * site.scale).unflatten(0, (len(key_HTD), -1))
        self.new = tuple(each[:, position_N] for each in (site.query_QTD, site.key_HTD, site.value_HTE))
        self.right_HNK = truth(self.asked_HGND.flatten(1, 2), self.covered.key_HTD)

    def keys(self, first: int, end: int) -> list[Span]:
        return [self.spans[0].between(first, end)]

    def build(self, name: str) -> tuple[KeyIndex, float]:
        options = OPTIONS[name]
        heads, _, dim = self.covered.key_HTD.shape
        training = ROARGRAPH.training_queries(options) // self.group if name == "roargraph" else 0
        sample = QuerySample(heads, dim, training)
        sample.add(self.query_QTD.unflatten(0, (heads, self.group)), 0, self.scale)
        prompt = Prompt(
            self.covered.key_HTD,
            self.covered.value_HTE,
            sample.gram_HDD,
            sample.queries,
            sample.recent(),
            self.group,
            K,
            None,
            sample.training() if training else None,
        )
        started = time.perf_counter()
        return index_kind(name).build(FIRST, prompt, options), time.perf_counter() - started

    def search(self, index: KeyIndex, number: int) -> Tensor:
        """Nodes that one position finds, counted from FIRST, [H, G, K]."""
        return index.search(self.asked_HGND[:, :, number], K, "per_query_head", self.keys).position_HGK - FIRST

    def recall(self, index: KeyIndex) -> float:
        found_HGNK = torch.stack([self.search(index, number) for number in range(ASKED)], 2)
        return recall(found_HGNK.flatten(1, 2), self.right_HNK)


def _drawn(each_HTD: Tensor, chosen_T: Tensor, generator: torch.Generator) -> Tensor:
    deviation = each_HTD.float().std(1, keepdim=True) * NOISE
    parts = [
        (
            each_HTD[:, part_T].float() + deviation * torch.randn(len(each_HTD), len(part_T), each_HTD.shape[2], generator=generator)
        ).bfloat16()
        for part_T in chosen_T.split(4096)
    ]
    return torch.cat(parts, 1)


def with_effort(name: str, index: KeyIndex, option: str, number: int) -> KeyIndex:
    """The same index, searched with another width."""
    tensors, numbers = index.state()
    changed = {**numbers, "sizes": {**numbers["sizes"], option: number}} if "sizes" in numbers else {**numbers, option: number}
    return index_kind(name).restore(tensors, changed)


def least_effort(past: Past, name: str, index: KeyIndex) -> tuple[KeyIndex, str, float]:
    """The index at the least effort that finds what is WANTED, or at the most; what that is; and its recall."""
    if name not in EFFORT:
        return index, "", past.recall(index)
    option, numbers = EFFORT[name]
    for number in numbers:
        tried = with_effort(name, index, option, number)
        found = past.recall(tried)
        if found >= WANTED:
            break
    return tried, f"{option} {number}", found


def search_times(past: Past, indexes: Mapping[str, KeyIndex]) -> dict[str, float]:
    """Median milliseconds of a search of one position; SCAN: of a plain scan of all keys in C++."""
    limit_N = torch.full((past.group,), past.covered.tokens)
    searches: dict[str, Callable[[int], object]] = {name: functools.partial(past.search, index) for name, index in indexes.items()}
    searches[SCAN] = lambda number: graph_library().exact([past.covered], past.asked_HGND[:, :, number], limit_N, K)
    seconds: dict[str, list[float]] = {name: [] for name in searches}
    for turn in range(ROUNDS):
        for name, search in searches.items():
            for number in range(turn % 2, ASKED, 2):
                started = time.perf_counter()
                search(number)
                seconds[name].append(time.perf_counter() - started)
    return {name: median(each) * 1e3 for name, each in seconds.items()}


def attention_times(layer: int, past: Past) -> dict[str, float]:
    """Median milliseconds of one layer's attention with one new token in the C++ kernels."""
    zones = [{"sink_recent": {"sink_tokens": FIRST, "recent_tokens": 256}}, {"top_k": {"k": K, "index": "sketch", "tail": True}}]
    asks: dict[str, Callable[[int], float]] = {}
    for name, policy in (("full", None), ("lookup", {"zones": zones})):
        spec: dict[str, Any] = {"kvcompile": 1, "model": {"path": gemma_path(), "dtype": "bfloat16"}, "verify": {"tokens": 16}}
        if policy is not None:
            spec |= {"policies": {"mine": policy}, "heads": [{"policy": "mine"}]}
        model = kvcompile.compile(spec=spec)
        session = model.session()
        span = past.spans[0]
        for store in session.stores(layer):
            store.extend(span.key_HTD, span.value_HTE)
            if hasattr(store, "observe"):
                store.observe(past.query_QTD.unflatten(0, (-1, past.group)), 0)
        session.tokens.extend([0] * span.tokens)

        def ask(number: int, model: Any = model, session: Any = session) -> float:
            query, key, value = (each[None, :, number : number + 1].clone() for each in past.new)
            call = PackedCall.begin(model, [session], [len(session)], [1], only_last=False)
            started = time.perf_counter()
            call.attend(layer, query, key, value, None, None, False)
            session.tokens.append(0)
            return time.perf_counter() - started

        ask(0)  # makes the index
        asks[name] = ask
    seconds: dict[str, list[float]] = {name: [] for name in asks}
    for number in range(ASKED):
        for name, ask in asks.items():
            seconds[name].append(ask(number))
    return {name: median(each[3:]) * 1e3 for name, each in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="a folder where the model's tensors stay for the next run")
    parser.add_argument("--tokens", default="8192,32768,131072")
    parser.add_argument("--layer", type=int, default=11, choices=(5, 11, 17))
    given = parser.parse_args()
    toolchain = find_toolchain()
    if toolchain is None:
        raise SystemExit("a C++ compiler is needed: install g++, or set CXX")
    build_graphs(machine_isa(), toolchain)
    names = [name for name in OPTIONS if name != "hnsw" or importlib.util.find_spec("hnswlib")]
    site = sites(next(source for source in SOURCES if source.name == "gemma_32k"), given.keep)[given.layer]
    results: dict[str, Any] = {"layer": given.layer, "k": K}
    for tokens in map(int, given.tokens.split(",")):
        past = Past(site, tokens)
        rows: dict[str, Any] = {}
        indexes: dict[str, KeyIndex] = {}
        for name in names:
            index, built = past.build(name)
            indexes[name], effort, found = least_effort(past, name, index)
            rows[name] = {"effort": effort, "recall@100": round(found, 4), "build, seconds": round(built, 2)}
        times = search_times(past, indexes)
        rows[SCAN] = {"effort": "", "recall@100": 1.0, "build, seconds": 0.0}
        for name, row in rows.items():
            row |= {"search, milliseconds": times[name], **{f"times below {other}": times[other] / times[name] for other in ("flat", SCAN)}}
            print(
                f"{tokens:7,d} tokens  {name:11s} {row['effort']:10s} recall@100 {row['recall@100']:.3f}  {times[name]:8.3f} ms  "
                f"{times['flat'] / times[name]:5.1f} times below flat, {times[SCAN] / times[name]:5.2f} below the {SCAN}  "
                f"built in {row['build, seconds']:.1f} s",
                flush=True,
            )
        attention = attention_times(given.layer, past)
        print(
            f"{tokens:7,d} tokens  attention of the layer: full {attention['full']:.3f} ms, lookup {attention['lookup']:.3f} ms", flush=True
        )
        results[str(tokens)] = {**rows, "attention of the layer, milliseconds": attention}
    write("retrieval_speed", torch.get_num_threads(), results)


if __name__ == "__main__":
    main()
