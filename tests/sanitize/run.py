"""Kernels and launcher under AddressSanitizer and UndefinedBehaviorSanitizer, over stores that end at the last number they hold.

python tests/sanitize/run.py            everything: what must be clean, then what must be reported (`make test-sanitize`)
python tests/sanitize/run.py --part X --isa I   one part of it, in this process, which must have been started with the sanitizers' libraries
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from kvcompile.codegen.toolchain import Isa, Toolchain, find_toolchain, machine_isa, why_none
from kvcompile.ir.policy import All, SinkRecent
from kvcompile.ir.request import LinearRequest, Request
from kvcompile.link import GEMV_TOKENS, build_graphs, build_kernels, build_lsh
from kvcompile.runtime import growable, native_lsh, ring
from kvcompile.runtime.descriptor import DescribedPart, Descriptor
from kvcompile.runtime.indexes import lsh_tables, roargraph
from kvcompile.runtime.layout import padded
from kvcompile.runtime.native import NativeKernels
from kvcompile.runtime.spans import Span

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))
import native_lookup
import test_relay
import test_roargraph
from native import Attention, Reader, Text, assert_right

FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-O1", "-g")
TIMEOUT_S = 480.0
LONG = 4096  # tokens that are appended at once, and of which only the last one attends
FIRST, SECOND = (0,), (1,)
ISAS: tuple[Isa, ...] = ("avx512", "avx2", "portable")
# One head a group, so that each head's keys and values end where their memory does.
SITES = {
    "float": Attention("float32", "float32", 24, 20, 3, ((FIRST, All()), (SECOND, SinkRecent(4, 16)))),
    "float, soft cap": Attention("float32", "float32", 80, 16, 1, ((FIRST, SinkRecent(0, 300)), (SECOND, All())), soft_cap=30.0),
    "bfloat16": Attention("bfloat16", "bfloat16", 24, 40, 4, ((FIRST, All()), (SECOND, SinkRecent(4, 300)))),
    "bfloat16, all options": Attention(
        "bfloat16", "bfloat16", 64, 64, 8, ((FIRST, SinkRecent(4, 16)), (SECOND, All())), soft_cap=50.0, learnt_sinks=True
    ),
    "many queries": Attention("float32", "bfloat16", 16, 16, 71, ((FIRST, All()), (SECOND, SinkRecent(0, 1)))),
    "float, slopes": Attention("float32", "float32", 15, 17, 5, ((FIRST, All()), (SECOND, SinkRecent(4, 16))), alibi=True),
    "bfloat16, chunks": Attention(
        "bfloat16", "bfloat16", 72, 24, 3, ((FIRST, SinkRecent(0, 20)), (SECOND, SinkRecent(0, 20))), chunk_tokens=20
    ),
    "float, chunks of 300": Attention("float32", "bfloat16", 40, 40, 1, ((FIRST, SinkRecent(0, 300)),), chunk_tokens=300),
    "bfloat16, own sinks": Attention(
        "bfloat16", "bfloat16", 40, 16, 4, ((FIRST, SinkRecent(4, 16)), (SECOND, SinkRecent(270, 1))), learnt_sinks=True, cache_index=True
    ),
    "bfloat16, rows": Attention("bfloat16", "bfloat16", 22, 20, 3, ((FIRST, All()), (SECOND, All())), key_layout="rows"),
    "float, rows": Attention("bfloat16", "float32", 17, 40, 1, ((FIRST, All()),), key_layout="rows"),
}
RELAYED = ("bf16_store", "pairs", "pairs_of_one", "int8")
LINEARS = [LinearRequest("linears", "cpu", dtype, GEMV_TOKENS) for dtype in ("float32", "bfloat16")]


class ExactStore:
    """One head's keys and values in two blocks of memory that AddressSanitizer guards to the byte.

    claimed: how many tokens more than there is memory for the descriptor says.  zone: a ring for sinks and window, else it grows.
    """

    def __init__(self, site: Attention, zone: All | SinkRecent, capacity: int, claimed: int = 0) -> None:
        slots = capacity
        if isinstance(zone, SinkRecent):
            slots = zone.window_tokens + site.rollback_tokens
        dtype = getattr(torch, site.store_dtype)
        self.tokens = 0
        key_slots = padded(slots) if site.key_layout == "blocks" else slots
        self._key = torch.full((key_slots * site.head_dim,), torch.nan, dtype=dtype)
        self._value = torch.full((slots * site.value_dim,), torch.nan, dtype=dtype)
        addresses = self._key.data_ptr(), self._value.data_ptr(), self._key.nbytes, self._value.nbytes
        if isinstance(zone, SinkRecent):
            self._descriptor = Descriptor.ring(*addresses, zone.sink_tokens, slots - zone.sink_tokens + claimed)
        else:
            self._descriptor = Descriptor.growing([DescribedPart(*addresses, 0, capacity + claimed)])

    def advance(self, tokens: int) -> None:
        self.tokens += tokens

    def descriptor(self) -> int:
        return self._descriptor.address


def exact_reader(text: Text, kernels: NativeKernels, capacity: int, claimed: int = 0) -> Reader:
    stores = [ExactStore(text.attention, zone, capacity, claimed) for _, zone in text.attention.groups]
    return Reader(text, kernels, stores)  # type: ignore[arg-type]


def lengths(site: Attention) -> list[int]:
    """Where sinks, windows and chunks of keys end, and one long context."""
    found = {1, 2, 15, 16, 17, 255, 256, 257, 511, 512, 513, LONG}
    for _, zone in site.groups:
        if isinstance(zone, SinkRecent):
            found |= {zone.sink_tokens - 1, zone.sink_tokens, zone.window_tokens - 1, zone.window_tokens, zone.window_tokens + 1}
    if site.chunk_tokens is not None:
        found |= {2 * site.chunk_tokens, 2 * site.chunk_tokens + 1}
    return sorted(length for length in found if length > 0)


def read_in(reader: Reader, length: int, chunk: int, last_only: bool = False) -> Tensor:
    out = torch.empty(0)
    while reader.read < length:
        out = reader.take(min(chunk, length - reader.read), last_only=last_only, strides="tokens")
    return out


def attention(kernels: NativeKernels, isa: Isa) -> None:
    """Every length, read at once, with a last step, and in chunks, into stores with room for just that."""
    for name, site in SITES.items():
        text = Text(site, isa, LONG)
        for length in lengths(site):
            ways = ((0, length), (1, length), (3, 64 if length > 40 else 7)) if length < LONG else ((0, LONG), (1, LONG))
            for steps, chunk in ways:
                reader = exact_reader(text, kernels, length)
                read_in(reader, length - min(steps, length), chunk, last_only=length == LONG or chunk == 64)
                out = read_in(reader, length, 1, last_only=length == LONG) if steps else None
                if out is not None and length < LONG:
                    assert_right(out, text, length - 1)
        print(f"  {name}: {len(lengths(site))} lengths", flush=True)


def stores(kernels: NativeKernels, isa: Isa) -> None:
    """The stores themselves, their memory made as long as they ask for: forks, rollbacks, further buffers."""
    for name, site in SITES.items():
        for capacity, rollback in ((1, 0), (33, 5), (600, 5)):
            text = Text(replace(site, capacity_tokens=capacity, rollback_tokens=rollback), isa, 360)
            reader = Reader(text, kernels)
            read_in(reader, 290, 70)
            reader.rollback(rollback)
            fork = reader.fork()
            for each in (reader, fork):
                read_in(each, 310, 1)
                assert_right(read_in(each, 345, 35)[-4:], text, 341)
        print(f"  {name}: forks, rollbacks and further buffers", flush=True)


def parts(kernels: NativeKernels, isa: Isa) -> None:
    """The same stores seen in parts of 256 and more keys, and states that end at their last number: the bits of the whole."""
    for name, site in SITES.items():
        seeing = [(row, heads) for row, (heads, zone) in enumerate(site.groups) if isinstance(zone, All) and site.key_layout == "blocks"]
        for row, heads in seeing:
            text = Text(site, isa, LONG)
            for length, new in ((1, 1), (17, 17), (256, 1), (257, 60), (513, 1), (1030, 50)):
                reader = exact_reader(text, kernels, length)
                read_in(reader, length - new, max(1, length - new))
                whole = reader.take(new)
                query, key, value = (getattr(text, part)[None, :, length - new : length] for part in ("query_QSD", "key_HSD", "value_HSE"))
                out = torch.zeros(1, *whole.shape, dtype=whole.dtype)
                table = reader.table.sites[0][row : row + 1].clone()
                states = torch.full((len(heads) * new * site.queries_per_kv * (site.value_dim + 2),), torch.nan)
                given = query, key, value, text.sinks_Q, reader.site.slopes, table, reader.heads, out, states
                for first in range(0, length, 512):
                    torch.ops.kvc_native.attend_part(*given, first, min(length, first + 512), first + 512 >= length)
                shown_SHGE, whole_SHGE = (
                    each.unflatten(1, (site.kv_heads, site.queries_per_kv))[:, list(heads)] for each in (out[0], whole)
                )
                assert torch.equal(shown_SHGE, whole_SHGE), (name, length, new)
        print(f"  {name}: {len(seeing)} groups in parts", flush=True)


def linears(kernels: NativeKernels, _isa: Isa) -> None:
    for request in LINEARS:
        dtype, kernel = getattr(torch, request.dtype), kernels.name(request.key)
        for features in (1, 15, 16, 24, 32, 50, 576):
            for outs in ((1,), (3,), (8, 1, 40), (1000,)):
                weights = [torch.randn(out, features).to(dtype) for out in outs]
                for biases in ([], [torch.randn(out).to(dtype) for out in outs]):
                    for tokens in range(GEMV_TOKENS + 2):
                        torch.ops.kvc_native.linears(torch.randn(1, tokens, features).to(dtype), weights, biases, kernel)
    print("  linear layers", flush=True)


def lookups(kernels: NativeKernels, _isa: Isa) -> None:
    """Stores and sketches that end where their memory does."""
    for name, site in native_lookup.SITES.items():
        for tokens, added, forked_at in ((512, 0, None), (544, 32, 300)):
            reader = native_lookup.Reader(site, tokens, added, forked_at)
            for select in native_lookup.SELECTS:
                for k in (1, 60, 400):
                    out = native_lookup.look_up([reader], kernels, k, select, tail=True)[0]
                    native_lookup.assert_right(out, native_lookup.right(reader, k, select, True))
        print(f"  lookup, {name}", flush=True)


def hash_tables(_kernels: NativeKernels, isa: Isa) -> None:
    """Vectors, tables and what is found end where their memory does; torch finds the same."""
    for bits, tables, dim, tokens in ((10, 150, 64, 1100), (16, 3, 17, 300), (1, 2, 80, 1), (5, 1024, 33, 65), (15, 7, 16, 32768)):
        planes = lsh_tables.hyperplanes(bits, tables, 0, dim)
        key_HTD, query_HGD = torch.randn(2, tokens, dim), torch.randn(2, 3, dim)
        found = []
        for library in (None, build_lsh(isa, _toolchain(), FLAGS)):
            native_lsh._library = library
            parts = lsh_tables.parts_of(planes, key_HTD, 9)
            parts += (lsh_tables.joined(parts[0], parts[0], bits)._replace(first=9 + tokens),) if tokens < 20000 else ()
            found.append(lsh_tables.met(parts, lsh_tables.hashed(planes, query_HGD), bits))
        assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    print("  hash tables", flush=True)


def relays(kernels: NativeKernels, isa: Isa) -> None:
    """Sessions that see together what they share, in buffers that end with their last token, and in several of them."""
    for name in RELAYED:
        for prefix, tails in ((257, (0, 1, 9)), (600, (0, 40, 300)), (1030, (3, 3, 256))):
            family = test_relay.Family(name, lambda _: kernels, prefix, isa, room=400)
            readers = [family.fork(tail=tail) for tail in tails]
            readers.append(family.fork(readers[2], 3))
            assert test_relay.step(readers) == len(readers) * family.see_all, (name, prefix)
    print("  relays", flush=True)


class ExactPast(test_roargraph.Past):
    """Keys that end where their memory does, in two spans."""

    def keys(self, first: int, end: int) -> list[Span]:
        ends = first, min(max(400, first), end), end
        exact = [(a, self.key_HTD[:, a:b].clone()) for a, b in itertools.pairwise(ends) if b > a]
        return [Span(a, key_HTD, key_HTD) for a, key_HTD in exact]


def graphs(_kernels: NativeKernels, isa: Isa) -> None:
    """Graphs are built, grow, are cut, grow again, and find what was asked for; keys, queries and graphs end where their memory does."""
    build_graphs(isa, _toolchain(), FLAGS)
    for per, dim, dtype in (("kv_head", 48, torch.float32), ("query_head", 33, torch.bfloat16), ("kv_head", 80, torch.float16)):
        given = test_roargraph.past(832, dim, dtype)
        text = ExactPast(given.key_HTD, given.query_HGTD)
        for first, end in ((3, 3), (3, 8), (64, 704)):
            index = test_roargraph.build(text, first, end, neighbours=64, ef=80, per=per)
            for kept in (1000, end):
                index.rollback(kept)
                while index.end + 32 <= 800:
                    new_HTD = text.key_HTD[:, index.end : index.end + 32].clone()
                    index.add(new_HTD, new_HTD)
                    index.search(text.query_HGTD[:, :, index.end - 1].clone(), 20, "per_query_head", text.keys)
            found = test_roargraph.recall(index, text, 20, range(800, 832, 4))
            assert found > (0.85 if first == 64 else 0.4), (per, first, end, found)
    print("  graphs", flush=True)


def beyond_keys(kernels: NativeKernels, isa: Isa) -> None:
    """Must be reported: a descriptor of one token more than there is memory for; the 17th key is in a block of its own."""
    read_in(exact_reader(Text(SITES["float"], isa, 17), kernels, 16, claimed=1), 17, 17)


def beyond_values(kernels: NativeKernels, isa: Isa) -> None:
    """Must be reported: the same where the block of keys has room for the token, and the values have not."""
    read_in(exact_reader(Text(SITES["bfloat16"], isa, 18), kernels, 17, claimed=1), 18, 1)


def beyond_ring(kernels: NativeKernels, isa: Isa) -> None:
    """Must be reported: a ring whose window is described as one slot longer."""
    read_in(exact_reader(Text(SITES["bfloat16, all options"], isa, 21), kernels, 21, claimed=1), 21, 1)


CLEAN = {
    "attention": attention,
    "stores": stores,
    "parts": parts,
    "linears": linears,
    "lookups": lookups,
    "hash_tables": hash_tables,
    "graphs": graphs,
    "relays": relays,
}
REPORTED = {"beyond_keys": beyond_keys, "beyond_values": beyond_values, "beyond_ring": beyond_ring}
Part = Callable[[NativeKernels, Isa], None]


def run_part(name: str, isa: Isa) -> None:
    os.environ.pop("LD_PRELOAD", None)  # the compiler runs without
    toolchain = _toolchain()
    torch.set_num_threads(2)
    # memory as long as it is asked for, and no page of it given away: a page of the heap may hold other things
    exact = {
        "reserve": lambda nbytes: torch.empty(nbytes, dtype=torch.uint8),
        "_whole_pages": lambda nbytes: nbytes,
        "_aligned": lambda nbytes: nbytes,
        "release_tail": lambda _tail: 0,
    }
    for module in (growable, ring, roargraph):
        for word, function in exact.items():
            if hasattr(module, word):
                setattr(module, word, function)
    wanted: dict[str, Request] = {request.key: request for site in SITES.values() for request in site.requests(isa)}
    wanted |= {request.key: request for each in RELAYED for request in test_relay.EVERY[each].requests(isa)}
    wanted.update({request.key: request for request in (*LINEARS, *(site.request for site in native_lookup.SITES.values()))})
    kernels = build_kernels(list(wanted.values()), isa, toolchain, FLAGS)
    part: Part = {**CLEAN, **REPORTED}[name]
    part(kernels, isa)


def start(name: str, isa: Isa) -> subprocess.CompletedProcess[str]:
    libraries = [_library(each) for each in ("libasan.so", "libubsan.so")]
    options = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1", "LD_PRELOAD": " ".join(libraries)}
    command = [sys.executable, __file__, "--part", name, "--isa", isa]
    return subprocess.run(
        command, env={**os.environ, **options}, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S, check=False
    )


def _library(name: str) -> str:
    asked = [_toolchain().command, f"-print-file-name={name}"]
    return str(Path(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()).resolve())


def _toolchain() -> Toolchain:
    found = find_toolchain()
    if found is None or found.kind != "gcc":
        sys.exit(f"test-sanitize needs g++: {why_none() or 'the compiler is another'}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=[*CLEAN, *REPORTED])
    parser.add_argument("--isa", choices=ISAS, default=machine_isa())
    given = parser.parse_args(arguments)
    if given.part:
        run_part(given.part, given.isa)
        return 0
    failed = []
    isas = ISAS[ISAS.index(machine_isa()) :]
    for name, isa in [*((name, isa) for isa in isas for name in CLEAN), *((name, machine_isa()) for name in REPORTED)]:
        begin = time.monotonic()
        ran = start(name, isa)
        found = "ERROR: AddressSanitizer: heap-buffer-overflow" in ran.stderr
        right = ran.returncode == 0 if name in CLEAN else ran.returncode != 0 and found
        what = "clean" if ran.returncode == 0 else "reported" if found else f"ended with {ran.returncode}"
        print(f"{name}, {isa}: {what} {'' if right else ', WRONG'}({time.monotonic() - begin:.0f} s)\n{ran.stdout}", end="", flush=True)
        if not right:
            failed.append(f"{name} ({isa})")
            print(ran.stderr[-6000:])
    print(f"sanitizers: {'FAILED ' + ', '.join(failed) if failed else 'passed'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
