"""Tokens a second while decoding SmolLM2-135M, against Hugging Face's SDPA with DynamicCache and StaticCache.

    python benchmarks/decode.py [--contexts 512,2048,8192,32768] [--dtype bfloat16]

Caches are filled with random keys and values.  The engines take turns, a step each.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from harness import median, smollm2, smollm2_spec, write
from torch import nn
from transformers import DynamicCache, StaticCache

import kvcompile
import kvcompile.runtime.model as runtime_model
from kvcompile.runtime.model import CompiledModel

ROUNDS = 24
TOKEN = 5


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def ours(model: CompiledModel, context: int) -> Callable[[], object]:
    session = model.session()
    for site, stores in zip(model.plan.sites, (session.stores(place) for place in range(len(model.plan.sites))), strict=True):
        for store in stores:
            for start in range(0, context, 1024):
                size = (store.kv_heads, min(1024, context - start))  # type: ignore[attr-defined]
                store.extend(torch.randn(*size, site.site.head_dim), torch.randn(*size, site.site.value_dim))
    session.tokens.extend([TOKEN] * context)
    return lambda: session.step(TOKEN)


def dynamic(model: nn.Module, context: int) -> Callable[[], object]:
    kept: Any = DynamicCache(config=model.config)
    model(torch.tensor([[TOKEN]]), past_key_values=kept, use_cache=True)
    for layer in kept.layers:
        shape = (*layer.keys.shape[:2], context, layer.keys.shape[3])
        layer.keys, layer.values = torch.randn(shape, dtype=layer.keys.dtype), torch.randn(shape, dtype=layer.keys.dtype)
    return lambda: model(torch.tensor([[TOKEN]]), past_key_values=kept, use_cache=True, logits_to_keep=1)


def static(model: nn.Module, context: int, steps: int) -> Callable[[], object]:
    kept: Any = StaticCache(config=model.config, max_cache_len=context + steps)
    model(torch.full((1, 2), TOKEN), past_key_values=kept, use_cache=True)
    for layer in kept.layers:
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(context)
    return lambda: model(torch.tensor([[TOKEN]]), past_key_values=kept, use_cache=True, logits_to_keep=1)


@contextmanager
def attention_time() -> Iterator[list[float]]:
    """Seconds spent in the attention operator, a number a call."""
    spent: list[float] = []
    real = runtime_model.attend_native

    def timed(*args: Any) -> None:
        started = time.perf_counter()
        real(*args)
        spent.append(time.perf_counter() - started)

    runtime_model.attend_native = timed
    try:
        yield spent
    finally:
        runtime_model.attend_native = real


def measure(engines: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    wall: dict[str, list[float]] = {name: [] for name in engines}
    attention: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(rounds + 3):
        for name, step in engines.items():
            with attention_time() as spent:
                started = time.perf_counter()
                step()
                seconds = time.perf_counter() - started
            if turn >= 3:
                wall[name].append(seconds)
                attention[name].append(sum(spent))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cpu: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(5):
        for name, step in engines.items():
            started = time.process_time()
            step()
            cpu[name].append(time.process_time() - started)
    torch.set_num_threads(threads)
    return {
        name: {
            "ms": 1e3 * median(wall[name]),
            "fastest ms": 1e3 * min(wall[name]),
            "tokens/s": 1 / median(wall[name]),
            "attention ms": 1e3 * median(attention[name]),
            "1-thread CPU ms": 1e3 * median(cpu[name]),
        }
        for name in engines
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", default="512,2048,8192,32768")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    options = parser.parse_args()
    compiled = {
        "ours, full": kvcompile.compile(smollm2_spec(options.dtype, None)),
        "ours, 50 % streaming": kvcompile.compile(smollm2_spec(options.dtype, "50%")),
        "ours, 75 % streaming": kvcompile.compile(smollm2_spec(options.dtype, "75%")),
    }
    peer = smollm2(options.dtype).load()
    peer.config._attn_implementation = "sdpa"
    result: dict[str, Any] = {}
    for context in map(int, options.contexts.split(",")):
        makers: dict[str, Callable[[], Callable[[], object]]] = {
            "HF DynamicCache": lambda context=context: dynamic(peer, context),
            "HF StaticCache": lambda context=context: static(peer, context, ROUNDS + 32),
            **{name: lambda model=model, context=context: ours(model, context) for name, model in compiled.items()},
        }
        engines, grown = {}, {}
        for name, make in makers.items():
            before = resident_bytes()
            engines[name] = make()
            engines[name]()
            grown[name] = (resident_bytes() - before) / 2**20
        found = measure(engines, ROUNDS)
        for name, row in found.items():
            row["process grew MiB"] = grown[name]
            planned = compiled[name].plan.stored_bytes(context) / 2**20 if name in compiled else None
            if planned is not None:
                row["stored MiB"] = planned
            print(f"{context:6} {name:22} {row['ms']:7.1f} ms {row['tokens/s']:6.1f} tokens/s  attention {row['attention ms']:6.1f} ms"
                  f"  1-thread CPU {row['1-thread CPU ms']:7.1f} ms  process grew {grown[name]:7.1f} MiB", flush=True)  # fmt: skip
        result[str(context)] = found
        del engines
    write(f"decode_{options.dtype}", torch.get_num_threads(), {"rounds": ROUNDS, "contexts": result})


if __name__ == "__main__":
    main()
