"""How long the sketch takes to make, against the prompt that it is made from.

    python benchmarks/index_build.py [--models smollm2_8k,gemma_32k]

The prompt is real text, read by a session whose heads all look keys up (in Gemma those of its 3 global layers); the indexes of all layers
are made by the first token that is generated.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import time
from typing import Any
from unittest.mock import patch

import torch
from harness import write
from needles import ids_of
from real_keys import SOURCES

import kvcompile
from kvcompile.runtime.lookup import LookupStore

REPEATS = 3


def measure(source: Any) -> dict[str, float]:
    policy = {
        "zones": [{"sink_recent": {"sink_tokens": 64, "recent_tokens": 256}}, {"top_k": {"k": "1%", "index": "sketch", "tail": True}}]
    }
    model = kvcompile.compile(
        spec={
            "kvcompile": 1,
            "model": {"path": source.model(), "dtype": "bfloat16"},
            "verify": {"tokens": 16},
            "policies": {"mine": policy},
            "heads": [{"policy": "mine"}],
        }
    )
    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    ids = (ids_of(model.tokenizer, "", special=True) + ids_of(model.tokenizer, text))[: source.tokens]
    session = model.session()
    started = time.perf_counter()
    session.prefill(ids)
    prompt = time.perf_counter() - started
    builds: list[float] = []
    build = LookupStore._built

    def timed(store: LookupStore, first: int, end: int) -> Any:
        begun = time.perf_counter()
        index = build(store, first, end)
        builds[-1] += time.perf_counter() - begun
        return index

    with patch.object(LookupStore, "_built", timed):
        for _ in range(REPEATS):
            builds.append(0.0)
            session.fork().step(ids[0])
    return {"tokens": len(ids), "prompt, seconds": prompt, "indexes, seconds": sorted(builds)[REPEATS // 2]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(source.name for source in SOURCES))
    wanted = parser.parse_args().models.split(",")
    results = {}
    for source in SOURCES:
        if source.name in wanted:
            found = results[source.name] = measure(source)
            prompt, made = found["prompt, seconds"], found["indexes, seconds"]
            print(f"{source.title}: prompt {prompt:.1f} s, all indexes {made:.2f} s: {100 * made / prompt:.1f}%", flush=True)
    write("index_build", torch.get_num_threads(), results)


if __name__ == "__main__":
    main()
