"""The C++ kernels over what lies on disk, part by part: the bits of the same tokens in memory, on every instruction set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from native import ALL, SITES, Text
from torch import Tensor

from kvcompile.codegen.toolchain import Isa, find_toolchain, machine_isa, why_none
from kvcompile.link import build_kernels
from kvcompile.runtime.descriptor import Descriptor
from kvcompile.runtime.disk import DiskStore
from kvcompile.runtime.growable import GrowableStore
from kvcompile.runtime.native import NativeKernels, attend_native, attend_parts

ISAS: tuple[Isa, ...] = ("avx512", "avx2", "portable")
NAMES = ("plain", "bf16_store", "tails", "narrow_values", "capped", "all_options", "learnt_sinks", "alibi_capped", "alibi_mqa")
Kernels = Callable[[Isa], NativeKernels]


@pytest.fixture(scope="session")
def kernels() -> Kernels:
    compiler = find_toolchain()
    if compiler is None:
        pytest.skip(f"no C++ compiler: {why_none()}")
    built: dict[Isa, NativeKernels] = {}

    def loaded(isa: Isa) -> NativeKernels:
        if ISAS.index(isa) < ISAS.index(machine_isa()):
            pytest.skip(f"this processor does not run {isa}")
        if isa not in built:
            requests = {request.key: request for name in NAMES for request in SITES[name].requests(isa)}
            built[isa] = build_kernels(list(requests.values()), isa, compiler)
        return built[isa]

    return loaded


class Both:
    """The KV heads of a site that see everything, in memory and on disk; each reads the same text."""

    def __init__(self, loaded: NativeKernels, isa: Isa, name: str, tokens: int) -> None:
        self.text, self.loaded, self.read = Text(SITES[name], isa, tokens), loaded, 0
        site = SITES[name]
        plan = site.plan(isa).sites[0]
        (self.group,) = [group for group in plan.groups if group.policy.zones == (ALL,)]
        dtype = getattr(torch, site.store_dtype)
        shape = (len(self.group.kv_heads), site.head_dim, site.value_dim, dtype)
        self.memory, self.disk = GrowableStore(*shape, tokens, "blocks"), DiskStore(*shape, None, "blocks")
        self.slopes = torch.tensor(site.slopes) if site.alibi else None
        self.heads = torch.tensor(self.group.kv_heads)

    def take(self, tokens: int, skip: int = 0) -> tuple[Tensor, Tensor]:
        """The next tokens, of which the first `skip` ask for nothing: [1, rows, Q, E] in memory and on disk."""
        site, new = self.text.attention, slice(self.read, self.read + tokens)
        query, key, value = (getattr(self.text, part)[None, :, new] for part in ("query_QSD", "key_HSD", "value_HSE"))
        outs = [torch.full((1, tokens - skip, site.query_heads, site.value_dim), -7.0, dtype=query.dtype) for _ in range(2)]
        row = [self.loaded.number(self.group.request), 0, 0, len(self.heads), 0, tokens, skip, 0, self.read]
        self.memory.advance(tokens)
        table = torch.tensor([[row[0], self.memory.descriptor(), *row[2:]]])
        attend_native(query, key, value, self.text.sinks_Q, [table], self.heads, outs[0], slopes=self.slopes)
        self.disk.append(key[0, self.heads], value[0, self.heads])
        self.read += tokens
        parts = self.disk.parts()
        attend_parts(query, key, value, self.text.sinks_Q, row, parts, self.read, self.heads, outs[1], self.slopes)
        return outs[0], outs[1]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", NAMES)
def test_parts_give_the_bits_of_the_whole(kernels: Kernels, name: str, isa: Isa) -> None:
    long = SITES[name].queries_per_kv < 16
    both = Both(kernels(isa), isa, name, 2400)
    for tokens, skip in [(1, 0), (254, 0), (1, 0), (1, 0), (3, 1), (760, 700), *([(1, 0)] * 6), *([(1100, 1090), (1, 0)] if long else [])]:
        memory, disk = both.take(tokens, skip)
        assert torch.equal(memory, disk), (both.read, (memory - disk).abs().max())


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("name", ["bf16_store", "tails", "alibi_capped"])
def test_threads_do_not_change_a_bit(kernels: Kernels, name: str, count: int) -> None:
    both = Both(kernels(machine_isa()), machine_isa(), name, 2400)
    torch.set_num_threads(count)  # which tests/runtime/conftest.py takes back
    for tokens in (1300, 1, 700, 1):
        assert torch.equal(*both.take(tokens))


def changed(place: int, value: Any) -> Callable[[list[Any]], None]:
    def make(arguments: list[Any]) -> None:
        arguments[place] = value(arguments[place]) if callable(value) else value

    return make


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (changed(5, lambda table: torch.cat([table, table])), "parts are attended to for one row of the table at a time"),
        (changed(8, lambda states: states[1:]), "states must be contiguous float32"),
        (changed(8, Tensor.double), "states must be contiguous float32"),
        (changed(9, 1), "the store does not show these positions"),
        (changed(9, 512), "the store does not show these positions"),
        (changed(10, 0), "the store does not show these positions"),
        (changed(10, 301), "the store does not show these positions"),
        (changed(5, lambda table: table.index_fill(1, torch.tensor([1]), 0)), "the store has no room"),
    ],
)
def test_a_wrong_call_is_refused_before_anything_is_written(kernels: Kernels, change: Callable[[list[Any]], None], text: str) -> None:
    both = Both(kernels(machine_isa()), machine_isa(), "bf16_store", 400)
    both.take(300)
    site, group = both.text.attention, both.group
    query, key, value = (getattr(both.text, part)[None, :, 300:301] for part in ("query_QSD", "key_HSD", "value_HSE"))
    out = torch.full((1, 1, site.query_heads, site.value_dim), -7.0)
    ((_, end, descriptor),) = both.disk.parts()
    row = [both.loaded.number(group.request), descriptor.address, 0, len(both.heads), 0, 1, 0, 0, 300]
    states = torch.zeros(len(both.heads) * site.queries_per_kv * (site.value_dim + 2))
    arguments = [query, key, value, None, None, torch.tensor([row]), both.heads, out, states, 0, end, True]
    change(arguments)
    with pytest.raises(RuntimeError, match=text):
        torch.ops.kvc_native.attend_part(*arguments)
    assert (out == -7).all()


def test_a_kernel_with_a_window_and_a_ring_are_refused(kernels: Kernels) -> None:
    both = Both(kernels(machine_isa()), machine_isa(), "bf16_store", 400)
    site = both.text.attention
    windowed = next(group for group in site.plan(machine_isa()).sites[0].groups if group.policy.window is not None)
    query, key, value = (getattr(both.text, part)[None, :, :1] for part in ("query_QSD", "key_HSD", "value_HSE"))
    out, states = torch.zeros(1, 1, site.query_heads, site.value_dim), torch.zeros(2 * site.queries_per_kv * (site.value_dim + 2))
    ring = Descriptor.ring(1, 1, 0, 0, 4, 16)
    for group, text in (
        (windowed, "parts are attended to by kernels that see all the past"),
        (both.group, "the store does not show these"),
    ):
        table = torch.tensor([[both.loaded.number(group.request), ring.address, 0, 2, 0, 1, 0, 0, 0]])
        with pytest.raises(RuntimeError, match=text):
            torch.ops.kvc_native.attend_part(query, key, value, None, None, table, both.heads, out, states, 0, 1, True)
