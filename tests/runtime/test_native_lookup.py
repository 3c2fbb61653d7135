"""The operator kvc_native.lookup against an oracle in float64, and its promises about bits and messages.

Letters: H KV heads, G queries per KV head, N blocks of 16 keys, L their lanes, T keys, C coordinates, U units of 64 bytes B, D head_dim.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from native_lookup import FIRST, SITES, WINDOW, Reader, assert_right, look_up, right

from kvcompile.codegen.build import Build
from kvcompile.codegen.cpp.render import library_sources
from kvcompile.codegen.toolchain import BASE_FLAGS, Isa, find_toolchain, isa_flags, machine_isa, why_none
from kvcompile.ir.policy import Select
from kvcompile.link import build_kernels
from kvcompile.runtime.indexes.sketch import unpack
from kvcompile.runtime.native import NativeKernels
from kvcompile.runtime.native_lookup import SELECTS, Column, lookup_native, sketch_words

ISAS: tuple[Isa, ...] = ("avx512", "avx2", "portable")
SEEN: dict[Select, int] = {"per_query_head": 24, "union": 24, "sum": 40, "max": 40}
EVERYWHERE = ("bf16", "tails", "odd", "capped")  # the sites that every instruction set runs
MORE_ISAS = [(isa, name) for isa in ISAS for name in SITES if isa == machine_isa() or name in EVERYWHERE]
Kernels = Callable[[Isa], NativeKernels]


@pytest.fixture(scope="session")
def kernels() -> Kernels:
    """One library an instruction set, kept in the cache folder from run to run."""
    compiler = find_toolchain()
    if compiler is None:
        pytest.skip(f"no C++ compiler: {why_none()}")
    built: dict[Isa, NativeKernels] = {}

    def loaded(isa: Isa) -> NativeKernels:
        if ISAS.index(isa) < ISAS.index(machine_isa()):
            pytest.skip(f"this processor does not run {isa}")
        if isa not in built:
            built[isa] = build_kernels([SITES[name].request for each, name in MORE_ISAS if each == isa], isa, compiler)
        return built[isa]

    return loaded


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("select", SELECTS)
@pytest.mark.parametrize(("isa", "name"), MORE_ISAS)
def test_the_result_is_the_oracles(kernels: Kernels, isa: Isa, name: str, select: Select) -> None:
    for tokens, added, tail, sinks in ((1024, 0, True, False), (1056, 96, True, True), (640, 32, False, False), (512, 0, False, True)):
        reader = Reader(SITES[name], tokens, added, seed=tokens)
        out = look_up([reader], kernels(isa), SEEN[select], select, tail, sinks)[0]
        assert_right(out, right(reader, SEEN[select], select, tail, sinks))


@pytest.mark.parametrize("select", SELECTS)
@pytest.mark.parametrize("k", [1, 2, 31, 200, 511, 512, 600])
def test_any_number_of_keys_may_be_chosen(kernels: Kernels, select: Select, k: int) -> None:
    reader = Reader(SITES["plain"], 512, 128)
    for tail in (False, True):
        assert_right(look_up([reader], kernels(machine_isa()), k, select, tail)[0], right(reader, k, select, tail))


@pytest.mark.parametrize("select", SELECTS)
def test_keys_of_many_chunks_are_found_and_two_threads_change_no_bit(kernels: Kernels, select: Select) -> None:
    for name in ("bf16", "widest"):
        reader = Reader(SITES[name], 9216, 160)
        results = []
        for count in (1, 2):
            with threads(count):
                results.append(look_up([reader], kernels(machine_isa()), 90, select, tail=True)[0])
        assert torch.equal(*results)
        assert_right(results[0], right(reader, 90, select, True))


@pytest.mark.parametrize("select", SELECTS)
def test_of_equal_keys_the_earlier_ones_are_chosen(kernels: Kernels, select: Select) -> None:
    """Every score is the same, and values tell which keys were chosen."""
    reader = Reader(SITES["plain"], 512, 64, same_keys=True)
    assert_right(look_up([reader], kernels(machine_isa()), 70, select, tail=False)[0], right(reader, 70, select, False))


@pytest.mark.parametrize("select", ["per_query_head", "union"])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["bf16", "capped"])
def test_keys_of_many_blocks_are_the_oracles(kernels: Kernels, name: str, isa: Isa, select: Select) -> None:
    """So many keys that the largest of blocks bound the choice; of equal keys the earlier ones are chosen."""
    for k, tail, same_keys in ((1, True, False), (40, True, False), (300, False, False), (70, False, True)):
        reader = Reader(SITES[name], 4608, 96, same_keys=same_keys)
        assert_right(look_up([reader], kernels(isa), k, select, tail)[0], right(reader, k, select, tail))


@pytest.mark.parametrize("forked_at", [1, FIRST + 100, FIRST + 512 + WINDOW])
def test_a_fork_reads_what_its_parent_keeps(kernels: Kernels, forked_at: int) -> None:
    whole, forked = Reader(SITES["bf16"], 512), Reader(SITES["bf16"], 512, forked_at=forked_at)
    results = [look_up([reader], kernels(machine_isa()), 24, "union", tail=True) for reader in (whole, forked)]
    assert torch.equal(*results)


def test_sessions_of_one_call_change_nothing_for_each_other(kernels: Kernels) -> None:
    readers = [Reader(SITES["tails"], tokens, seed=tokens) for tokens in (512, 4800, 544)]
    together = look_up(readers, kernels(machine_isa()), 24, "union", tail=True)
    for at, reader in enumerate(readers):
        assert torch.equal(together[at], look_up([reader], kernels(machine_isa()), 24, "union", tail=True)[0])


def test_without_a_sketch_every_token_is_seen(kernels: Kernels) -> None:
    reader = Reader(SITES["plain"], 512)
    out = look_up([reader], kernels(machine_isa()), 1, "union", tail=True, sketched=False)[0]
    assert_right(out, right(reader, 1, "union", True, sketched=False))


@pytest.mark.parametrize("name", ["plain", "bf16"])
def test_the_new_token_is_in_the_store(kernels: Kernels, name: str) -> None:
    reader = Reader(SITES[name], 512)
    look_up([reader], kernels(machine_isa()), 24, "union", tail=True)
    key_HTD, value_HTE = reader.store.gather(torch.full((reader.site.kv_heads, 1), reader.read))
    assert torch.equal(key_HTD[:, 0], reader.key_HTD[:, -1]) and torch.equal(value_HTE[:, 0], reader.value_HTE[:, -1])


@pytest.mark.parametrize(
    ("column", "number", "words"),
    [
        (Column.KERNEL, 1, "no kernel is loaded for this lookup"),
        (Column.START, 1, "the table names rows that are not there"),
        (Column.OUT_ROW, -1, "the table names rows that are not there"),
        (Column.HEAD_COUNT, 3, "the table names rows that are not there"),
        (Column.BEFORE, 10**6, "the store has no room for the new token"),
        (Column.BEFORE, 100, "the sketch's words are wrong"),
        (Column.K, 0, "k or select is not allowed"),
        (Column.SELECT, 4, "k or select is not allowed"),
    ],
)
def test_a_wrong_row_is_refused(kernels: Kernels, column: Column, number: int, words: str) -> None:
    reader = Reader(SITES["plain"], 512)
    sketch = sketch_words(reader.index)
    row = reader.row(kernels(machine_isa()), 24, "union", True, 0, sketch)
    row[0, column] = number
    query, key, value = reader.query_HGD.flatten(0, 1)[None, :, None], reader.key_HTD[None, :, -1:], reader.value_HTE[None, :, -1:]
    with pytest.raises(RuntimeError, match=words):
        lookup_native(query, key, value, None, [row], torch.arange(2), torch.empty(1, 1, 6, 64))


class _Coded(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("whole", "start", "scale", "base")]


class _Query(ctypes.Structure):
    _fields_ = [("query", ctypes.c_void_p), ("keys", _Coded), ("centres", _Coded)]


class _Codes(ctypes.Structure):
    _fields_ = [("step", ctypes.c_void_p), ("units", ctypes.c_int64), ("fine", ctypes.c_int64)]


class _Sketch(ctypes.Structure):
    _fields_ = [
        ("centre", ctypes.c_void_p),
        ("map", ctypes.c_void_p),
        ("coordinates", ctypes.c_int64),
        ("keys", _Codes),
        ("centres", _Codes),
    ]


class _Run(ctypes.Structure):
    _fields_ = [
        ("codes", ctypes.c_void_p),
        ("position", ctypes.c_void_p),
        ("mean", ctypes.c_void_p),
        ("mean_scale", ctypes.c_float),
        ("low", ctypes.c_int32),
    ]


class _Kernels(ctypes.Structure):
    _fields_ = [("before", ctypes.c_int64 * 5), ("lookup", ctypes.POINTER(ctypes.c_void_p)), ("lookups", ctypes.c_int64)]


SCAN_WORD = 7  # of KvcLookupKernel: after key, five numbers of 4 bytes, append, prepare and rank


@pytest.mark.parametrize("flags", [("avx512", True), ("avx512", False), ("avx2", True), ("portable", True)])
def test_scores_are_the_same_whole_numbers_on_every_instruction_set(tmp_path: Path, flags: tuple[Isa, bool]) -> None:
    """The scan itself, of random codes for random queries, with the machine's instructions for whole numbers and without."""
    isa, extras = flags
    compiler = find_toolchain()
    if compiler is None or ISAS.index(isa) < ISAS.index(machine_isa()):
        pytest.skip(f"no C++ compiler: {why_none()}" if compiler is None else f"this processor does not run {isa}")
    site, units, runs = SITES["wide"], 5, 11
    used = tuple(flag for flag in isa_flags(isa) if extras or flag != "-mavx512vnni")
    build = Build("kvc_kernels", library_sources([site.request]), BASE_FLAGS + used, compiler)
    build.into(tmp_path, keep=tmp_path / "failed")
    list_kernels: Any = ctypes.CDLL(str(tmp_path / build.library)).kvc_kernels
    list_kernels.restype = ctypes.POINTER(_Kernels)
    kernel = ctypes.cast(list_kernels().contents.lookup[0], ctypes.POINTER(ctypes.c_void_p))
    pointer = ctypes.c_void_p
    scan = ctypes.CFUNCTYPE(None, pointer, pointer, pointer, ctypes.c_int64, pointer, pointer)(kernel[SCAN_WORD])
    generator = torch.Generator().manual_seed(0)
    blocks = 2 * runs
    for fine in (0, 2, 5):
        codes_NUB = torch.randint(0, 256, (blocks, units, 64), dtype=torch.uint8, generator=generator)
        whole_GC = torch.randint(-127, 128, (site.queries_per_kv, 16 * units), dtype=torch.int8, generator=generator)
        start_G = torch.randint(-999, 999, (site.queries_per_kv,), dtype=torch.int32, generator=generator)
        score_NGL = torch.empty(blocks, site.queries_per_kv, 16, dtype=torch.int32)
        top_NGL = torch.full((16, site.queries_per_kv, 16), torch.iinfo(torch.int32).min, dtype=torch.int32)
        query = _Query(None, _Coded(whole_GC.data_ptr(), start_G.data_ptr(), None, None), _Coded())
        sketch = _Sketch(None, None, 16, _Codes(None, units, fine), _Codes())
        lie = (_Run * runs)(*(_Run(codes_NUB[2 * run].data_ptr(), None, None, 0.0, 0) for run in range(runs)))
        scan(ctypes.addressof(query), ctypes.addressof(sketch), lie, runs, score_NGL.data_ptr(), top_NGL.data_ptr())
        level_TC = unpack(codes_NUB[None], torch.tensor([fine]))[0]
        right_GT = whole_GC.long() @ level_TC.long().T + start_G[:, None]
        assert torch.equal(score_NGL.transpose(0, 1).flatten(1).long(), right_GT)
        for top in range(16):
            of_NGL = score_NGL[[block for block in range(blocks) if block % 16 == top]]
            assert torch.equal(top_NGL[top], of_NGL.amax(0))


def test_a_lookup_of_another_site_is_another_kernel() -> None:
    assert replace(SITES["plain"], units=3).request == SITES["plain"].request  # units are told at run time
    assert replace(SITES["plain"], soft_cap=8.0).request.key != SITES["plain"].request.key
