"""A context on disk under a memory limit that the same context in memory exceeds.

    python benchmarks/disk_tier.py [--tokens 65536] [--steps 16]

The model is Gemma-3-270M in bfloat16: its 3 global layers lie on disk (`all: {device: disk}`), or in memory (`full`); the 15 others have
windows of their own.  A session reads 2,048 tokens of Python's documentation; then every store is filled up to --tokens with keys and
values drawn from its own, with replacement, each with noise of a tenth of its channel's standard deviation, the same for both.  From
there --steps tokens are generated greedily.

Each variant runs in a process of its own.  Without a limit both tell their largest address space from the session's beginning on, when
the model is compiled; the limit (RLIMIT_AS) is half-way between, and both run again under it.  Logits are compared between `full` without
a limit and `disk` under it.  `cold`: the system's page cache is emptied of the files before the token, so that the disk itself is read.
"""

from __future__ import annotations

import argparse
import json
import os
import pydoc_data.topics
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from harness import median, write
from real_keys import gemma_path

import kvcompile
from kvcompile.ir.errors import KvcompileError
from kvcompile.runtime.block_file import BlockFile, Bytes, default_folder
from kvcompile.runtime.disk import DiskStore
from kvcompile.runtime.session import Session

NOISE = 0.1
PIECE = 1024  # tokens that are drawn at a time
READ_TOKENS = 2048
COLD_STEPS = 3
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "disk": {"policies": {"flexgen": {"zones": [{"all": {"device": "disk"}}]}}, "heads": [{"policy": "flexgen"}]},
}


def address_space() -> int:
    """Bytes of address space that this process has now (VmSize)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmSize"))
    return int(line.split()[1]) * 1024


def fill(session: Session, tokens: int) -> int:
    """Draws what is missing up to `tokens`; the largest address space on the way."""
    before, largest = len(session), 0
    for site in range(len(session.model.plan.sites)):
        for store in session.stores(site):
            generator = torch.Generator().manual_seed(site)
            window = 512 if session.model.plan.sites[site].site.own_window else before
            spans = store.extend(torch.empty(1, 0, 256), torch.empty(1, 0, 256))
            own = [torch.cat([getattr(span, name) for span in spans], 1)[:, -window:].float() for name in ("key_HTD", "value_HTE")]
            deviations = [each.std(1, keepdim=True) * NOISE for each in own]
            for first in range(before, tokens, PIECE):
                chosen_T = torch.randint(own[0].shape[1], (min(PIECE, tokens - first),), generator=generator)
                key, value = (
                    each[:, chosen_T] + deviation * torch.randn(len(each), len(chosen_T), each.shape[2], generator=generator)
                    for each, deviation in zip(own, deviations, strict=True)
                )
                append = getattr(store, "append", store.extend)
                append(key, value)
                largest = max(largest, address_space())
    session.tokens.extend([0] * (tokens - before))
    return largest


class Reads:
    """Bytes and seconds of BlockFile.read."""

    def __init__(self) -> None:
        self.bytes, self.seconds = 0, 0.0

    def counted(self) -> Any:
        read = BlockFile.read

        def timed(file: BlockFile, slot: int, memory: Bytes) -> str | None:
            started = time.perf_counter()
            fault = read(file, slot, memory)
            self.seconds += time.perf_counter() - started
            self.bytes += memory.nbytes
            return fault

        return patch.object(BlockFile, "read", timed)


def drop_from_cache(session: Session) -> None:
    """The disk must be asked again for what lies there."""
    for site in range(len(session.model.plan.sites)):
        for store in session.stores(site):
            if isinstance(store, DiskStore) and store._file is not None:
                os.fdatasync(store._file._descriptor)
                os.posix_fadvise(store._file._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def run(variant: str, tokens: int, steps: int, limit: int, logits_file: str) -> dict[str, Any]:
    """What one process does, as a record; {"error": ...} where it was refused memory."""
    path = gemma_path()
    base = {"kvcompile": 1, "model": {"path": path, "dtype": "bfloat16"}, "verify": {"tokens": 16}, "prefill": {"chunk_tokens": 512}}
    model = kvcompile.compile(spec=base | VARIANTS[variant])
    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    ids = list(model.tokenizer(text)["input_ids"])[: min(READ_TOKENS, tokens)]
    compiled = address_space()
    if limit:
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    try:
        session = model.session()
        token = int(session.prefill(ids).argmax())
        largest = max(address_space(), fill(session, tokens))
        rows, greedy, seconds = [], [], []
        warm, cold = Reads(), Reads()
        with warm.counted():
            for _ in range(steps):
                started = time.perf_counter()
                row = session.step(token)
                seconds.append(time.perf_counter() - started)
                token = int(row.argmax())
                rows.append(row)
                greedy.append(token)
                largest = max(largest, address_space())
    except (KvcompileError, MemoryError, RuntimeError) as error:
        return {"error": f"{type(error).__name__}: {error}", "clear": isinstance(error, KvcompileError)}
    torch.save(torch.stack(rows), logits_file)
    record = {
        "address space when compiled, MiB": compiled / 2**20,
        "largest address space, MiB": largest / 2**20,
        "tokens": len(session),
        "keys and values in memory, MiB": session.nbytes() / 2**20,
        "keys and values on disk, MiB": session.disk_nbytes() / 2**20,
        "plan: stored, on disk, MiB": [model.plan.stored_bytes(len(session)) / 2**20, model.plan.disk_bytes(len(session)) / 2**20],
        "plan: read a token, MiB": model.plan.read_bytes(len(session)) / 2**20,
        "decode, milliseconds a token": median(seconds[1:]) * 1e3,
        "greedy": greedy,
    }
    if variant == "disk" and warm.bytes:
        record["read from the page cache, MiB a token"] = warm.bytes / steps / 2**20
        record["from the page cache, GB/s"] = warm.bytes / warm.seconds / 1e9
        taken = []
        with cold.counted():
            for _ in range(COLD_STEPS):
                drop_from_cache(session)
                started = time.perf_counter()
                session.step(token)
                taken.append(time.perf_counter() - started)
        record["cold decode, milliseconds a token"] = median(taken) * 1e3
        record["cold, from the disk, GB/s"] = cold.bytes / cold.seconds / 1e9
    return record


def child(variant: str, tokens: int, steps: int, limit: int, folder: Path) -> dict[str, Any]:
    """`run` in a process of its own."""
    name = f"{variant}-{'limited' if limit else 'unlimited'}"
    out = folder / f"{name}.json"
    command = [sys.executable, __file__, "--child", variant, "--tokens", str(tokens), "--steps", str(steps), "--limit", str(limit)]
    done = subprocess.run([*command, "--folder", str(folder), "--out", str(out)])
    record = json.loads(out.read_text()) if out.exists() else {"error": f"the process ended with {done.returncode}", "clear": False}
    shown = {key: value for key, value in record.items() if key != "greedy"}
    print(name, json.dumps(shown, indent=1), flush=True)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--child", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        logits = str(options.folder / f"{options.child}-{bool(options.limit)}.pt")
        options.out.write_text(json.dumps(run(options.child, options.tokens, options.steps, options.limit, logits)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        records = {variant: child(variant, options.tokens, options.steps, 0, folder) for variant in VARIANTS}
        spaces = {variant: records[variant]["largest address space, MiB"] for variant in VARIANTS}
        limit = int(sum(spaces.values()) / 2 * 2**20)
        print(f"full {spaces['full']:.0f} MiB, disk {spaces['disk']:.0f} MiB: the limit is {limit / 2**20:.0f} MiB", flush=True)
        limited = {variant: child(variant, options.tokens, options.steps, limit, folder) for variant in VARIANTS}
        passed = "error" not in limited["disk"] and limited["full"].get("clear", False)
        result: dict[str, Any] = {"tokens": options.tokens, "files in": str(default_folder()), "limit, MiB": limit / 2**20}
        if "error" not in limited["disk"]:
            full, disk = torch.load(folder / "full-False.pt"), torch.load(folder / "disk-True.pt")
            result["largest difference of a logit, full without a limit against disk under it"] = float((full - disk).abs().max())
            result["largest logit"] = float(full.abs().max())
            result["greedy tokens are equal"] = records["full"]["greedy"] == limited["disk"]["greedy"]
        result |= {"without a limit": records, "under the limit": limited, "full refuses, disk runs": passed}
    print(json.dumps({key: value for key, value in result.items() if not isinstance(value, dict)}, indent=1))
    if options.tokens == parser.get_default("tokens"):
        write("disk_tier", torch.get_num_threads(), result)
    if not passed:
        raise SystemExit("the limit did not tell them apart")


if __name__ == "__main__":
    main()
