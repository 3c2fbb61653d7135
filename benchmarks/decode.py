"""Tokens a second while decoding SmolLM2-135M, against Hugging Face's SDPA with DynamicCache and StaticCache.

    python benchmarks/decode.py [--contexts 512,2048,8192,32768] [--dtype bfloat16]

Caches are filled with random keys and values.  The engines take turns, a step each.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
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


SHARES: dict[str, str | None] = {"ours, full": None, "ours, 50 % streaming": "50%", "ours, 75 % streaming": "75%"}
PEERS = ("HF DynamicCache", "HF StaticCache")


def engine(name: str, model: Any, context: int) -> Callable[[], object]:
    """A function that decodes one token after `context` others."""
    if name == "HF DynamicCache":
        return dynamic(model, context)
    return static(model, context, ROUNDS + 32) if name == "HF StaticCache" else ours(model, context)


def load(name: str, dtype: str) -> Any:
    if name in SHARES:
        return kvcompile.compile(smollm2_spec(dtype, SHARES[name]))
    peer = smollm2(dtype).load()
    peer.config._attn_implementation = "sdpa"
    return peer


def memory(name: str, dtype: str, context: int) -> tuple[float, float]:
    """MiB that a process of its own holds while it decodes, and how many of them the context and its steps took."""
    ran = subprocess.run(
        [sys.executable, __file__, "--memory-of", name, "--dtype", dtype, "--contexts", str(context)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    held, grown = ran.stdout.split()[-2:]
    return float(held), float(grown)


def print_memory(name: str, dtype: str, context: int) -> None:
    model = load(name, dtype)
    before = resident_bytes()
    step = engine(name, model, context)
    for _ in range(3):
        step()
    print(resident_bytes() / 2**20, (resident_bytes() - before) / 2**20)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", default="512,2048,8192,32768")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--memory-of", choices=[*PEERS, *SHARES], help=argparse.SUPPRESS)
    options = parser.parse_args()
    contexts = [int(word) for word in options.contexts.split(",")]
    if options.memory_of:
        return print_memory(options.memory_of, options.dtype, contexts[0])
    peer = load(PEERS[0], options.dtype)
    models = {**dict.fromkeys(PEERS, peer), **{name: load(name, options.dtype) for name in SHARES}}
    result: dict[str, Any] = {}
    for context in contexts:
        engines = {name: engine(name, model, context) for name, model in models.items()}
        found = measure(engines, ROUNDS)
        del engines
        for name, row in found.items():
            row["process MiB"], row["of which context MiB"] = memory(name, options.dtype, context)
            if name in SHARES:
                row["stored MiB"] = models[name].plan.stored_bytes(context) / 2**20
            print(f"{context:6} {name:22} {row['ms']:7.1f} ms {row['tokens/s']:6.1f} tokens/s  attention {row['attention ms']:6.1f} ms"
                  f"  1-thread CPU {row['1-thread CPU ms']:7.1f} ms  process {row['process MiB']:6.0f} MiB, context"
                  f" {row['of which context MiB']:6.1f} MiB", flush=True)  # fmt: skip
        result[str(context)] = found
    return write(f"decode_{options.dtype}", torch.get_num_threads(), {"rounds": ROUNDS, "contexts": result})


if __name__ == "__main__":
    main()
