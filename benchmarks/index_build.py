"""How long indexes take to make, kind by kind, against the prompt that they are made from.

    python benchmarks/index_build.py [--models smollm2_8k,gemma_32k] [--kinds sketch,roargraph,...]

The prompt is real text, read by a session whose heads all look keys up (in Gemma those of its 3 global layers); the indexes of all layers
are made by the first token that is generated.  All kinds but the sketch are made from one prompt, read while it kept the queries that a
graph learns from (at most 4096 a KV head).  hnsw is left out where hnswlib is not installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import pydoc_data.topics
import time
from dataclasses import replace
from typing import Any

import torch
from harness import earlier, write
from needles import ids_of
from real_keys import SOURCES

import kvcompile
from kvcompile.runtime.lookup import LookupStore
from kvcompile.runtime.session import Session

REPEATS = 3
SKETCH = "sketch"
KINDS: dict[str, dict[str, Any]] = {
    "roargraph": {},
    "hnsw": {"m": 16, "ef": 200},
    "ivf": {"lists": 512, "probe": 32},
    "minmax": {"page_tokens": 16},
    "cuboid": {"page_tokens": 16},
    "representatives": {"page_tokens": 128},
    "mean": {"page_tokens": 16},
    "lsh": {"hash_bits": 10, "tables": 150},
}


def read(source: Any, index: str) -> tuple[Session, float]:
    """A session that has read the prompt and looks keys up by `index`, and how long that took."""
    top_k: dict[str, Any] = {"k": "1%", "index": SKETCH, "tail": True} if index == SKETCH else {"k": 100, "index": index}
    policy = {"zones": [{"sink_recent": {"sink_tokens": 64, "recent_tokens": 256}}, {"top_k": top_k}]}
    spec = {"kvcompile": 1, "model": {"path": source.model(), "dtype": "bfloat16"}, "verify": {"tokens": 16}}
    model = kvcompile.compile(spec=spec | {"policies": {"mine": policy}, "heads": [{"policy": "mine"}]})
    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    ids = (ids_of(model.tokenizer, "", special=True) + ids_of(model.tokenizer, text))[: source.tokens]
    session = model.session()
    started = time.perf_counter()
    session.prefill(ids)
    return session, time.perf_counter() - started


def build(session: Session, index: str | None = None) -> float:
    """Seconds that all indexes of a fork take, of another kind than the session's if it is named."""
    fork, seconds = session.fork(), 0.0
    for place in range(len(session.model.plan.sites)):
        for store in fork.stores(place):
            if not isinstance(store, LookupStore):
                continue
            if index is not None:
                store.zone = replace(store.zone, index=index, options=tuple(sorted(KINDS[index].items())))
            started = time.perf_counter()
            store.refresh()
            seconds += time.perf_counter() - started
            assert store.index is not None
    return seconds


def measure(source: Any, kinds: list[str]) -> dict[str, Any]:
    session, prompt = read(source, SKETCH)
    seconds = {SKETCH: sorted(build(session) for _ in range(REPEATS))[REPEATS // 2]} if SKETCH in kinds else {}
    others = [kind for kind in kinds if kind != SKETCH]
    if others:
        session, _ = read(source, "roargraph")  # keeps the queries that a graph learns from
    for kind in others:
        seconds[kind] = build(session, kind)
    return {"tokens": len(session), "prompt, seconds": prompt, "indexes, seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(source.name for source in SOURCES))
    parser.add_argument("--kinds", default=",".join((SKETCH, *KINDS)))
    given = parser.parse_args()
    kinds = [kind for kind in given.kinds.split(",") if kind != "hnsw" or importlib.util.find_spec("hnswlib")]
    results = {}
    for source in SOURCES:
        if source.name not in given.models.split(","):
            continue
        found = results[source.name] = measure(source, kinds)
        prompt = found["prompt, seconds"]
        for kind, seconds in found["indexes, seconds"].items():
            print(f"{source.title}: prompt {prompt:.1f} s, all indexes {kind} {seconds:.2f} s: {100 * seconds / prompt:.1f}%", flush=True)
    write("index_build", torch.get_num_threads(), earlier("index_build") | results)


if __name__ == "__main__":
    main()
