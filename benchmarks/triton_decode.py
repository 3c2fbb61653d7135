"""The Triton decode kernel on a CUDA device: its error, its time, torch's SDPA beside it, and what the memory can give.

    python benchmarks/triton_decode.py [--tokens 4096 32768 131072] [--sessions 1] [--chunk-tokens 512] [--stages 3]

One layer's attention with 32 query heads, 8 KV heads, head_dim 128, bfloat16.  Times are medians of a replayed CUDA graph, which
goes through enough copies of the cache that no copy is still in L2 when it is read again.  `roof` is the fastest of three
ways to read memory once that torch has.  SDPA (flash) reads every token, also where the policy sees fewer: it is the
exact attention that the policy replaces.  Ratios are between numbers of one run.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kvcompile.codegen.triton import render_decode
from kvcompile.ir.policy import All, SinkRecent
from kvcompile.ir.request import KernelRequest
from kvcompile.runtime import reference
from kvcompile.runtime.spans import Span
from kvcompile.runtime.triton_attend import attend_work, load, plan_work

RESULTS = Path(__file__).parent / "results" / "triton_decode.json"
KV_HEADS, QUERIES_PER_KV, HEAD_DIM = 8, 4, 128
POLICIES = {"full": All(), "64 sinks + 256 recent": SinkRecent(64, 256)}
COLD_BYTES = 512 << 20  # read between two reads of the same copy: several times any L2
REPEATS = 30


def request_of(zone: All | SinkRecent) -> KernelRequest:
    sink, recent = (0, None) if isinstance(zone, All) else (zone.sink_tokens, zone.recent_tokens)
    return KernelRequest(
        kind="attend_spans",
        device="cuda",
        head_dim=HEAD_DIM,
        value_dim=HEAD_DIM,
        queries_per_kv=QUERIES_PER_KV,
        dtype="bfloat16",
        compute_dtype="float32",
        store_dtype="bfloat16",
        scale=HEAD_DIM**-0.5,
        soft_cap=None,
        learnt_sinks=False,
        sink_tokens=sink,
        recent_tokens=recent,
    )


def median_us(calls: list[Callable[[], object]]) -> float:
    """Of one call, from a graph of all of them."""
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(REPEATS + 5):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / len(calls))
    return statistics.median(times[5:])


def roof_bytes_per_us() -> float:
    buffer = torch.zeros(4 << 28, dtype=torch.float32, device="cuda")
    reads: list[Callable[[], object]] = [lambda: buffer.sum(), lambda: buffer.amax(), lambda: buffer.view(-1, 4096).sum(0)]
    return buffer.nbytes / min(median_us([read]) for read in reads)


def measure(name: str, tokens: int, sessions: int, chunk_tokens: int, stages: int, roof: float, folder: Path) -> dict[str, object]:
    zone = POLICIES[name]
    request = request_of(zone)
    kernel = load(render_decode(request), folder)
    kernel.NUM_STAGES = stages
    cache_bytes = sessions * KV_HEADS * tokens * HEAD_DIM * 2 * 2
    seen = tokens if isinstance(zone, All) else min(tokens, zone.sink_tokens + zone.recent_tokens)
    read_bytes = cache_bytes * seen // tokens
    options = {"dtype": torch.bfloat16, "device": "cuda"}
    query = torch.randn(sessions, KV_HEADS, QUERIES_PER_KV, HEAD_DIM, **options)
    caches, works, plan_ms = [], [], 0.0
    for _ in range(max(1, min(-(-COLD_BYTES // read_bytes), (32 << 30) // cache_bytes))):
        cache = torch.randn(2, sessions, KV_HEADS, tokens, HEAD_DIM, **options)
        caches.append(cache)
        spans = [[Span(0, cache[0, session], cache[1, session])] for session in range(sessions)]
        started = time.perf_counter()
        works.append(plan_work(request, spans, [tokens - 1] * sessions, chunk_tokens))
        plan_ms = (time.perf_counter() - started) * 1000
    error = 0.0
    state = attend_work(kernel, request, query, works[0])
    see = reference.visible(zone, torch.tensor([tokens - 1], device="cuda"), torch.arange(tokens, device="cuda"))
    for session in range(sessions):
        for head in range(KV_HEADS):  # one head at a time: float64 keys are large
            heads = slice(head, head + 1)
            key, value = caches[0][:, session, heads]
            right = reference.attend(query[session, heads][:, :, None], key, value, see, request.scale)
            error = max(error, float((state.out[session, heads][:, :, None] - right.out).abs().max()))
    ours = median_us([lambda work=work: attend_work(kernel, request, query, work) for work in works])
    queries = query.flatten(1, 2).unsqueeze(2)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        sdpa = median_us([lambda cache=cache: scaled_dot_product_attention(queries, *cache, enable_gqa=True) for cache in caches])
    return {
        "policy": name,
        "tokens": tokens,
        "sessions": sessions,
        "chunk_tokens": chunk_tokens,
        "stages": stages,
        "cache_copies": len(caches),
        "largest_error": error,
        "plan_on_host_ms": plan_ms,
        "kernel_us": ours,
        "sdpa_flash_every_token_us": sdpa,
        "floor_us": read_bytes / roof,
        "part_of_the_roof": read_bytes / roof / ours,
        "sdpa_over_kernel": sdpa / ours,
    }


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("benchmarks/triton_decode.py measures on a CUDA device, and torch sees none on this machine.")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 32768, 131072])
    parser.add_argument("--sessions", type=int, default=1)
    parser.add_argument("--chunk-tokens", type=int, default=512)
    parser.add_argument("--stages", type=int, default=3)
    chosen = parser.parse_args()
    torch.manual_seed(0)
    roof = roof_bytes_per_us()
    torch.cuda.empty_cache()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for tokens in chosen.tokens:
            for name in POLICIES:
                rows.append(measure(name, tokens, chosen.sessions, chosen.chunk_tokens, chosen.stages, roof, Path(folder)))
                print(json.dumps(rows[-1]), flush=True)
                torch.cuda.empty_cache()
    import triton

    versions = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
    result = {"gpu": torch.cuda.get_device_name(), **versions, "roof_TB_per_s": roof / 1e6, "runs": rows}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
