"""Attention kernels alone: stepping through as many sites as hold 1 GiB of distinct keys and values.

    python benchmarks/kernels.py [--quick]

For each dtype, head_dim and context: GB/s, the share of a pure read of the same buffers in the same run, and the ratio to
torch's SDPA over contiguous keys and values of the same sizes.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from harness import in_turn, median, pure_read, write
from torch import Tensor

from kvcompile.codegen.toolchain import find_toolchain, machine_isa
from kvcompile.ir.plan import HeadGroup, Plan, SitePlan
from kvcompile.ir.policy import All, HeadPolicy
from kvcompile.ir.request import KernelRequest
from kvcompile.ir.sites import AttentionSite
from kvcompile.link import build_kernels
from kvcompile.runtime.growable import GrowableStore
from kvcompile.runtime.native import NativeKernels, NativeTable, attend_native, native_sites

BYTES = 1 << 30
SHAPES = [(64, 3, 3), (128, 8, 4)]  # head_dim, KV heads, queries a KV head: SmolLM2-135M, Llama-3.1-8B
CONTEXTS = [2048, 8192, 32768]
ROUNDS = 9


class Sites:
    """Stores of equal sites, filled with random keys and values, and one query that is asked of all of them in turn."""

    def __init__(
        self, dtype: str, head_dim: int, kv_heads: int, group: int, context: int, kernels: NativeKernels, request: KernelRequest
    ) -> None:
        number = getattr(torch, dtype)
        self.context = context
        self.bytes_a_site = 2 * kv_heads * head_dim * number.itemsize * context
        count = -(-BYTES // self.bytes_a_site)
        site = AttentionSite(0, "site", kv_heads * group, kv_heads, head_dim, head_dim, request.scale, dtype)
        heads = HeadGroup(tuple(range(kv_heads)), HeadPolicy("full", (All(),)), context + 64, request=request)
        plan = Plan((SitePlan(site, (heads,)),))
        self.stores = [GrowableStore(kv_heads, head_dim, head_dim, number, context + 64, "blocks") for _ in range(count)]
        for store in self.stores:
            for _ in range(context // 1024):  # a piece at a time: the copies would double the memory
                store.extend(*torch.randn(2, kv_heads, 1024, head_dim).to(number))
        self.tables = [NativeTable(plan, kernels, [[store]]) for store in self.stores]
        self.heads = native_sites(plan, kernels)[0].kv_heads
        self.query = torch.randn(1, kv_heads * group, 1, head_dim).to(number)
        self.new = torch.randn(1, kv_heads, 1, head_dim).to(number)
        self.out = self.query.new_empty(1, 1, kv_heads * group, head_dim)
        self.bytes = self.bytes_a_site * count

    def step(self) -> None:
        for store, table in zip(self.stores, self.tables, strict=True):
            before = store.tokens
            table.count_growing(1)
            table.count_rings(1, 0, before)
            attend_native(self.query, self.new, self.new, None, table.sites, self.heads, self.out)

    def buffers(self) -> list[Tensor]:
        """The memory that a step reads."""
        return [
            memory[: store.tokens * rows]
            for store in self.stores
            for part in store._parts
            for memory, rows in zip(part.buffer._heads, part.buffer._row_bytes, strict=True)
        ]


def sdpa(sites: Sites, context: int) -> Any:
    """Peer: contiguous keys and values, one call a site."""
    number, kv_heads, head_dim = sites.query.dtype, sites.new.shape[1], sites.query.shape[3]
    memory = [torch.randn(2, 1, kv_heads, context, head_dim, dtype=number) for _ in sites.stores]

    def step() -> None:
        for key, value in memory:
            F.scaled_dot_product_attention(sites.query, key, value, enable_gqa=True)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one context")
    quick = parser.parse_args().quick
    threads, toolchain = torch.get_num_threads(), find_toolchain()
    assert toolchain is not None, "a C++ compiler is needed"
    rows = []
    print("dtype     head_dim  context   GB/s  of a pure read  times SDPA")
    for dtype in ("bfloat16", "float32"):
        for head_dim, kv_heads, group in SHAPES:
            request = KernelRequest(
                "attend_spans", "cpu", head_dim, head_dim, group, dtype, "float32", dtype, head_dim**-0.5, None, False, 0, None
            )
            kernels = build_kernels([request], machine_isa(), toolchain)
            for context in [8192] if quick else CONTEXTS:
                sites = Sites(dtype, head_dim, kv_heads, group, context, kernels, request)
                with torch.no_grad():
                    engines = {"read": pure_read(sites.buffers(), threads), "ours": sites.step, "sdpa": sdpa(sites, context)}
                    seconds = in_turn(engines, 5 if quick else ROUNDS)
                ours = median(seconds["ours"])
                row = {
                    "dtype": dtype, "head_dim": head_dim, "kv_heads": kv_heads, "queries_per_kv": group, "context": context,
                    "sites": len(sites.stores), "GB/s": sites.bytes / ours / 1e9, "share of pure read": median(seconds["read"]) / ours,
                    "times SDPA": median(seconds["sdpa"]) / ours,
                }  # fmt: skip
                rows.append(row)
                print(
                    f"{dtype:9} {head_dim:8} {context:8} {row['GB/s']:6.1f} {row['share of pure read']:15.0%} {row['times SDPA']:11.1f}",
                    flush=True,
                )
                del sites, engines
    write("kernels", threads, {"bytes": BYTES, "rounds": ROUNDS, "rows": rows})


if __name__ == "__main__":
    main()
