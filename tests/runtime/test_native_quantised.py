"""The C++ kernels over quantised stores: against float64 attention over the numbers that a store in torch holds.

Letters: Q query heads, H KV heads, G queries per KV head, S new tokens, T tokens, D head_dim, E value_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from native import Attention, Reader, Text, read_together
from torch import Tensor

from kvcompile.codegen.toolchain import Isa, find_toolchain, machine_isa, why_none
from kvcompile.ir.policy import All, Int8, Kivi, SinkRecent
from kvcompile.link import build_kernels
from kvcompile.runtime import reference
from kvcompile.runtime.model import make_store
from kvcompile.runtime.native import NativeKernels
from kvcompile.runtime.store import KVStore

ISAS: tuple[Isa, ...] = ("avx512", "avx2", "portable")
BOTH = (((1,), All()), ((0,), SinkRecent(4, 300)))
SITES: dict[str, Attention] = {
    "kivi_4": Attention("bfloat16", "bfloat16", 64, 64, 3, BOTH, quantised=Kivi(4, 32, 128)),
    "kivi_2": Attention("float32", "bfloat16", 128, 128, 1, BOTH, quantised=Kivi(2, 64, 64), rollback_tokens=8),
    "kivi_4_wide": Attention("float32", "float32", 256, 256, 8, BOTH, quantised=Kivi(4, 128, 128)),
    "kivi_2_odd": Attention("float32", "float32", 80, 48, 2, (((0, 2), SinkRecent(3, 40)), ((1,), All())), quantised=Kivi(2, 16, 32)),
    "kivi_alibi": Attention("float32", "float32", 32, 32, 2, BOTH, alibi=True, soft_cap=30.0, quantised=Kivi(4, 16, 48)),
    "kivi_chunked": Attention("float32", "bfloat16", 32, 32, 2, (((0,), SinkRecent(0, 70)),), chunk_tokens=70, quantised=Kivi(4, 16, 32)),
    "int8": Attention("bfloat16", "bfloat16", 64, 64, 3, BOTH, quantised=Int8()),
    "int8_odd": Attention("float32", "float32", 15, 21, 1, (((0,), All()), ((1,), SinkRecent(5, 30))), quantised=Int8(), learnt_sinks=True),
    "int8_wide": Attention("float32", "bfloat16", 128, 256, 8, BOTH, quantised=Int8(), rollback_tokens=8),
    "int8_cache_index": Attention("float32", "float32", 64, 64, 2, (((0,), SinkRecent(4, 100)),), cache_index=True, quantised=Int8()),
    "kivi_cache_index": Attention(
        "float32", "float32", 64, 64, 2, (((0,), SinkRecent(4, 100)),), cache_index=True, quantised=Kivi(4, 32, 64)
    ),
}
EVERY = [(isa, name) for isa in ISAS for name in SITES]
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
            requests = {request.key: request for site in SITES.values() for request in site.requests(isa)}
            built[isa] = build_kernels(list(requests.values()), isa, compiler)
        return built[isa]

    return loaded


def plain_text(site: Attention, isa: Isa, tokens: int) -> Text:
    """Without the planted logits of 200, whose spacing would be the tolerance."""
    text = Text(site, isa, tokens)
    generator = torch.Generator().manual_seed(1)
    text.query_QSD[..., 0] = torch.randn(text.query_QSD.shape[:2], generator=generator).to(text.query_QSD.dtype)
    text.key_HSD[..., 0] = torch.randn(text.key_HSD.shape[:2], generator=generator).to(text.key_HSD.dtype) + 2
    return text


class Twin:
    """What a reader should answer: stores in torch, and float64 attention over what they hold."""

    def __init__(self, text: Text, stores: list[KVStore] | None = None, read: int = 0) -> None:
        (self.plan,) = text.attention.plan(text.isa).sites
        self.text, self.read = text, read
        self.stores = [make_store(self.plan, group, False) for group in self.plan.groups] if stores is None else stores

    def take(self, tokens: int) -> Tensor:
        """float64 [S, Q, E]."""
        text, site, first, end = self.text, self.text.attention, self.read, self.read + tokens
        out_SHGE = torch.empty(tokens, site.kv_heads, site.queries_per_kv, site.value_dim, dtype=torch.float64)
        for (heads, zone), store in zip(site.groups, self.stores, strict=True):
            index = list(heads)
            spans = store.extend(text.key_HSD[index, first:end], text.value_HSE[index, first:end])
            key_HTD, value_HTE = (torch.cat([span[part].double() for span in spans], 1) for part in (1, 2))
            positions_T = torch.cat([torch.arange(span.first, span.end) for span in spans])
            positions_S = torch.arange(first, end)
            query_HGSD, sink_query_HGSD = (
                part[:, first:end].unflatten(0, (site.kv_heads, site.queries_per_kv))[index]
                for part in (text.query_QSD, text.sink_query_QSD)
            )
            more: dict[str, Tensor] = {}
            if site.alibi:
                slopes_HG = torch.tensor(site.slopes).unflatten(0, (site.kv_heads, site.queries_per_kv))[index]
                more["bias_HGST"] = reference.alibi(slopes_HG, positions_S, positions_T)
            if isinstance(zone, SinkRecent) and site.cache_index:
                more.update(sink_query_HGSD=sink_query_HGSD, sinks_T=positions_T < zone.sink_tokens)
            see_ST = reference.visible(zone, positions_S, positions_T, site.chunk_tokens)
            state = reference.attend(query_HGSD, key_HTD, value_HTE, see_ST, site.scale(text.isa), site.soft_cap, **more)
            if text.sinks_Q is not None:
                state = reference.apply_learnt_sinks(state, text.sinks_Q.unflatten(0, (site.kv_heads, site.queries_per_kv))[index])
            out_SHGE[:, index] = state.out.permute(2, 0, 1, 3)
        self.read = end
        return out_SHGE.flatten(1, 2)

    def rollback(self, tokens: int) -> None:
        for store in self.stores:
            store.rollback(tokens)
        self.read -= tokens

    def fork(self) -> Twin:
        return Twin(self.text, [store.fork() for store in self.stores], self.read)


def assert_same(found_SQE: Tensor, right_SQE: Tensor) -> None:
    """Sums in float32 of at most 256 products, and one rounding of the result to its dtype."""
    rounding = 2.0**-8 * right_SQE.abs() if found_SQE.dtype == torch.bfloat16 else 0
    error = (found_SQE.double() - right_SQE).abs()
    assert (error <= 2e-5 + rounding).all(), error.max()


def assert_holds_the_same(reader: Reader, twin: Twin) -> None:
    """The stores, to the bit: keys and values as they are kept."""
    for mine, other in zip(reader.stores, twin.stores, strict=True):
        assert mine.tokens == other.tokens and mine.nbytes() == other.nbytes()
        nothing = [torch.empty(mine.kv_heads, 0, dim) for dim in (mine.head_dim, mine.value_dim)]  # type: ignore[attr-defined]
        for one, two in zip(mine.extend(*nothing), other.extend(*nothing), strict=True):
            assert one.first == two.first and torch.equal(one.key_HTD, two.key_HTD) and torch.equal(one.value_HTE, two.value_HTE)


@pytest.mark.parametrize(("isa", "name"), EVERY)
def test_prompts_and_steps_equal_the_oracle(kernels: Kernels, isa: Isa, name: str) -> None:
    tokens = 700
    text = plain_text(SITES[name], isa, tokens)
    for chunks in ([1] * 70, [7] * 20 + [1] * 5, [300, 1, 1, 47, 300, 1], [127, 1, 1, 128, 1, 129, 2, 311]):
        reader, twin = Reader(text, kernels(isa)), Twin(text)
        for chunk in chunks:
            assert_same(reader.take(chunk), twin.take(chunk))
        assert_holds_the_same(reader, twin)


@pytest.mark.parametrize("name", SITES)
def test_forks_and_rollbacks_equal_the_oracle(kernels: Kernels, name: str) -> None:
    text = plain_text(replace(SITES[name], rollback_tokens=8, capacity_tokens=64), machine_isa(), 600)
    reader, twin = Reader(text, kernels(machine_isa())), Twin(text)
    assert_same(reader.take(150), twin.take(150))
    child, other = reader.fork(), twin.fork()
    for chunk in (1, 90, 1):
        assert_same(child.take(chunk), other.take(chunk))
        assert_same(reader.take(3), twin.take(3))
    for each, its_twin in ((child, other), (reader, twin)):
        each.rollback(5)
        its_twin.rollback(5)
        for chunk in (1, 1, 40, 9):
            assert_same(each.take(chunk), its_twin.take(chunk))
    grandchild, its_twin = child.fork(), other.fork()
    del child, reader
    for chunk in (130, 1, 1):
        assert_same(grandchild.take(chunk), its_twin.take(chunk))
    assert_holds_the_same(grandchild, its_twin)


@pytest.mark.parametrize("name", ["kivi_4", "int8"])
def test_sessions_of_one_call_are_each_as_alone(kernels: Kernels, name: str) -> None:
    text = plain_text(SITES[name], machine_isa(), 600)
    readers, twins = [], []
    for length in (1, 130, 400):
        readers.append(Reader(text, kernels(machine_isa())))
        twins.append(Twin(text))
        assert_same(readers[-1].take(length), twins[-1].take(length))
    for counts in ((1, 1, 1), (5, 1, 60), (130, 2, 1)):
        found = read_together(list(zip(readers, counts, strict=True)))
        for out, twin, count in zip(found, twins, counts, strict=True):
            assert_same(out, twin.take(count))


def test_no_thread_and_no_fork_changes_a_bit(kernels: Kernels) -> None:
    text = plain_text(SITES["kivi_4"], machine_isa(), 600)
    one, two = Reader(text, kernels(machine_isa())), Reader(text, kernels(machine_isa()))
    one.take(500)
    two.take(500)
    three = two.fork()
    before = torch.get_num_threads()
    try:
        for _ in range(20):
            torch.set_num_threads(1)
            right = one.take(1)
            torch.set_num_threads(2)
            assert torch.equal(two.take(1), right) and torch.equal(three.take(1), right)
    finally:
        torch.set_num_threads(before)
