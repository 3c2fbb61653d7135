"""A prefix that many sessions share: attention and whole steps of three ways to keep and read it.

    python benchmarks/relay.py [--batches 1,4,16,64] [--prefixes 256,1024,4096] [--tail 64] [--rounds 7]

copies: every session has the prefix for itself.  shared: sessions are forks and read one prefix, each in its turn (`relay: off`).
relay: they read it together (`relay: auto`: where the machine's own measurement says that it pays).  The model is SmolLM2-135M in bfloat16
with policy `full`; a session has read --tail tokens of its own behind the prefix.

Attention time is what the operator takes at all 30 sites, appending included; what is left of a step is the segments' share.  Keys and
values of the prefix are filled in with random numbers (what they are changes no time), the same for all ways.  The ways take turns,
medians.  A row whose copies would not fit in half of the machine's free memory is left out, and says so.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from harness import SMOLLM2, median, write
from torch import Tensor

import kvcompile
from kvcompile.runtime import model as runtime_model
from kvcompile.runtime.model import CompiledModel
from kvcompile.runtime.session import Session

Way = Literal["copies", "shared", "relay"]
WAYS: tuple[Way, ...] = ("copies", "shared", "relay")


def free_bytes() -> int:
    words = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(words["MemAvailable"].split()[0]) * 1024


def compiled(relay: str) -> CompiledModel:
    spec: dict[str, Any] = {
        "kvcompile": 1,
        "model": {"path": SMOLLM2, "dtype": "bfloat16"},
        "prefix": {"relay": relay},
        "verify": {"tokens": 16},
    }
    return kvcompile.compile(spec=spec)


@functools.lru_cache(maxsize=64)
def numbers(heads: int, tokens: int, dim: int, seed: int) -> Tensor:
    return torch.randn(heads, tokens, dim, generator=torch.Generator().manual_seed(seed)).bfloat16()


def filled(model: CompiledModel, session: Session, tokens: int, seed: int) -> Session:
    """`tokens` more tokens of random keys and values at every site."""
    for site in model.plan.sites:
        for group, store in zip(site.groups, session.stores(site.site.index), strict=True):
            heads, place = len(group.kv_heads), seed * 1000 + 2 * site.site.index
            store.append(numbers(heads, tokens, site.site.head_dim, place), numbers(heads, tokens, site.site.value_dim, place + 1))
    session.tokens.extend([0] * tokens)
    return session


def sessions_of(model: CompiledModel, way: Way, batch: int, prefix: int, tail: int) -> list[Session]:
    if way == "copies":
        return [filled(model, filled(model, model.session(), prefix, 0), tail, number + 1) for number in range(batch)]
    base = filled(model, model.session(), prefix, 0)
    return [filled(model, base.fork(), tail, number + 1) for number in range(batch)]


class Clock:
    """Seconds in the attention operator since it was last asked."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def take(self) -> float:
        seconds, self.seconds = self.seconds, 0.0
        return seconds


@contextmanager
def timed_attention() -> Iterator[Clock]:
    clock, real = Clock(), runtime_model.attend_native

    def timed(*arguments: Any, **options: Any) -> int:
        began = time.perf_counter()
        shared = real(*arguments, **options)
        clock.seconds += time.perf_counter() - began
        return shared

    runtime_model.attend_native = timed
    try:
        yield clock
    finally:
        runtime_model.attend_native = real


def compare(models: dict[Way, CompiledModel], batch: int, prefix: int, tail: int, rounds: int) -> dict[str, Any]:
    token_bytes = sum(site.stored_bytes(1) for site in models["copies"].plan.sites)
    if batch * (prefix + tail) * token_bytes > free_bytes() / 2:
        row = {"batch": batch, "prefix": prefix, "left out": "the copies do not fit in half of the free memory"}
        print(row, flush=True)
        return row
    sessions = {way: sessions_of(model, way, batch, prefix, tail) for way, model in models.items()}
    attention: dict[Way, list[float]] = {way: [] for way in WAYS}
    steps: dict[Way, list[float]] = {way: [] for way in WAYS}
    before = models["relay"].relay.shared
    with timed_attention() as clock:
        for turn in range(rounds + 2):
            for way, model in models.items():
                clock.take()
                began = time.perf_counter()
                model.step(sessions[way], [turn] * batch)
                seconds = time.perf_counter() - began
                if turn >= 2:
                    attention[way].append(clock.take())
                    steps[way].append(seconds)
    row: dict[str, Any] = {"batch": batch, "prefix": prefix, "tail": tail, "rows relayed": models["relay"].relay.shared - before}
    for way in WAYS:
        own, whole = median(attention[way]), median(steps[way])
        row[way] = {
            "attention, ms": own * 1e3,
            "step, ms": whole * 1e3,
            "tokens a second": batch / whole,
            "segments' share": 1 - own / whole,
        }
        row[way]["MiB"] = sum(session.nbytes() for session in sessions[way]) / 2**20
    for way in ("copies", "shared"):
        row[f"attention of {way} / of relay"] = row[way]["attention, ms"] / row["relay"]["attention, ms"]
        row[f"step of {way} / of relay"] = row[way]["step, ms"] / row["relay"]["step, ms"]
    shown = "  ".join(f"{way} {row[way]['attention, ms']:8.2f} ms of {row[way]['step, ms']:8.1f}" for way in WAYS)
    ratios = f"{row['attention of copies / of relay']:.2f}x below copies, {row['attention of shared / of relay']:.2f}x below shared"
    print(f"batch {batch:3d}  prefix {prefix:5,d}  {shown}  {ratios}", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default="1,4,16,64")
    parser.add_argument("--prefixes", default="256,1024,2048,4096")
    parser.add_argument("--tail", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    models: dict[Way, CompiledModel] = {way: compiled("auto" if way == "relay" else "off") for way in WAYS}
    print(models["relay"].relay.reason, flush=True)
    rows = [
        compare(models, batch, prefix, options.tail, options.rounds)
        for prefix in map(int, options.prefixes.split(","))
        for batch in map(int, options.batches.split(","))
    ]
    write("relay", torch.get_num_threads(), {"rule": models["relay"].relay.reason, "rows": rows})


if __name__ == "__main__":
    main()
