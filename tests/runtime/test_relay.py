"""What sessions see together: each gets the bits that it gets alone, and the operator says how many rows saw something together.

Where bfloat16 numbers are multiplied in pairs the weights are rounded to bfloat16: there each gets what the oracle says, to that.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from native import SITES, Attention, Reader, Text, assert_right, read_relayed, with_text
from torch import Tensor

from kvcompile.codegen.toolchain import Isa, cpu_flags, find_toolchain, machine_isa, why_none
from kvcompile.ir.policy import All, Int8, SinkRecent
from kvcompile.link import build_kernels
from kvcompile.runtime.native import NO_RELAY, NativeKernels, RelayRule

ISAS: tuple[Isa, ...] = ("avx512", "avx2", "portable")
MORE = {
    "int8": Attention("bfloat16", "bfloat16", 64, 64, 3, (((0, 1), All()),), quantised=Int8()),
    "pairs": Attention("bfloat16", "bfloat16", 64, 64, 3, (((0, 2), All()), ((1,), SinkRecent(4, 16)))),
    "pairs_of_one": Attention("bfloat16", "bfloat16", 22, 96, 1, (((0, 1), All()),), soft_cap=30.0),
    "pairs_of_many": Attention("bfloat16", "bfloat16", 128, 32, 71, (((0,), All()),), learnt_sinks=True),
    "two_groups": Attention("float32", "float32", 32, 32, 2, (((1,), All()), ((0, 2), All()), ((3,), SinkRecent(4, 300)))),
}
NAMES = (
    "plain",
    "bf16_store",
    "tails",
    "narrow_values",
    "capped",
    "all_options",
    "wide_values",
    "learnt_sinks",
    "cache_index",
    "alibi_mqa",
)
EVERY = {**{name: SITES[name] for name in (*NAMES, "alibi_mqa")}, **MORE}
ALWAYS = RelayRule(2, 0)
Kernels = Callable[[Isa], NativeKernels]


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    compiler = find_toolchain()
    if compiler is None:
        pytest.skip(f"no C++ compiler: {why_none()}")
    built: dict[Isa, NativeKernels] = {}

    def loaded(isa: Isa) -> NativeKernels:
        if ISAS.index(isa) < ISAS.index(machine_isa()):
            pytest.skip(f"this processor does not run {isa}")
        if isa not in built:
            requests = {request.key: request for site in EVERY.values() for request in site.requests(isa)}
            built[isa] = build_kernels(list(requests.values()), isa, compiler)
        return built[isa]

    return loaded


class Family:
    """Sessions of one site that were forked from others, each with a text that goes on as its own."""

    def __init__(self, name: str, kernels: Kernels, prefix: int, isa: Isa | None = None, room: int = 700) -> None:
        self.isa = isa or machine_isa()
        self.site, self.room = EVERY[name], room
        self.text = Text(self.site, self.isa, prefix + room)
        self.base = Reader(self.text, kernels(self.isa))
        if prefix:
            self.base.take(prefix)
        self.seeds = 0

    def fork(self, parent: Reader | None = None, tail: int = 0) -> Reader:
        """A session that has read `tail` tokens of its own behind what the parent has."""
        parent = parent or self.base
        self.seeds += 1
        other = Text(self.site, self.isa, self.text.key_HSD.shape[1], seed=self.seeds)
        child = parent.fork(with_text(parent.text, other, parent.read))
        if tail:
            child.take(tail)
        return child

    @property
    def see_all(self) -> int:
        """Rows of a session's table whose past may be seen together."""
        return 0 if self.site.alibi else sum(isinstance(zone, All) for _, zone in self.site.groups)


def in_pairs(reader: Reader) -> bool:
    site = reader.text.attention
    plain = site.dtype == site.store_dtype == "bfloat16" and site.quantised is None and site.value_dim % 32 == 0
    return plain and reader.text.isa == "avx512" and "avx512_bf16" in cpu_flags()


def assert_near(out_SQE: Tensor, text: Text, first: int) -> None:
    """The oracle's but for weights of 2**-9 more or less: so much of the attention over the values' sizes, and as `assert_right`."""
    end = first + len(out_SQE)
    sizes = copy.copy(text)
    sizes.value_HSE = text.value_HSE.abs()
    right, size = text.right(first, end), text.value_HSE.abs().max()
    bound = 2.0**-9 * sizes.right(first, end) + 5e-5 * size + 2.0**-8 * right.abs()
    assert ((out_SQE.double() - right).abs() <= bound).all(), ((out_SQE.double() - right).abs() / bound).max()


def step(readers: Sequence[Reader], rule: RelayRule = ALWAYS, new: Sequence[int] | None = None) -> int:
    """One more token each (or `new` each), together and alone: the same bits, and right.  Returns how many rows saw something together."""
    batch = list(zip(readers, new or [1] * len(readers), strict=True))
    copies = [(Reader(each.text, each.kernels, [store.fork() for store in each.stores], each.read), tokens) for each, tokens in batch]
    positions = [each.read for each in readers]
    alone, none = read_relayed(copies, NO_RELAY)
    together, shared = read_relayed(batch, rule)
    assert none == 0
    for reader, one, other, position in zip(readers, alone, together, positions, strict=True):
        if in_pairs(reader):
            assert_near(other, reader.text, position)
            continue
        assert torch.equal(one, other)
        if reader.text.attention.quantised is None:  # of what is quantised the oracle knows nothing
            assert_right(other, reader.text, position)
    return shared


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", EVERY)
def test_the_bits_are_those_of_each_alone(kernels, name, isa):
    family = Family(name, kernels, 600, isa)
    readers = [family.fork(tail=tail) for tail in (0, 1, 40, 256, 300)]
    assert step(readers) == 5 * family.see_all
    assert step(readers) == 5 * family.see_all


@pytest.mark.parametrize(("prefix", "together"), [(0, 0), (255, 0), (256, 3), (257, 3), (511, 3), (512, 3), (1030, 3)])
def test_whole_chunks_are_shared(kernels, prefix, together):
    family = Family("bf16_store", kernels, prefix)
    assert step([family.fork(tail=tail) for tail in (0, 3, 17)]) == together


def test_nothing_is_shared_by_sessions_that_read_the_same_tokens_each_for_itself(kernels):
    text = Text(EVERY["bf16_store"], machine_isa(), 600)
    readers = [Reader(text, kernels(machine_isa())) for _ in range(3)]
    for reader in readers:
        reader.take(550)
    assert step(readers) == 0


def test_the_rule_decides(kernels):
    family = Family("bf16_store", kernels, 600)
    readers = [family.fork() for _ in range(3)]
    for rule, shared in ((RelayRule(3, 512), 3), (RelayRule(4, 0), 0), (RelayRule(2, 513), 0), (RelayRule(0, 0), 0), (RelayRule(1, 0), 3)):
        assert step(readers, rule) == shared
    assert step(readers[:1], RelayRule(1, 0)) == 0  # alone, nothing is shared


@pytest.mark.parametrize("name", ["bf16_store", "two_groups"])
def test_prefixes_nest(kernels, name):
    family = Family(name, kernels, 300, room=1400)
    children = [family.fork(tail=tail) for tail in (260, 600)]
    grandchildren = [family.fork(child, tail) for child in children for tail in (0, 5, 260)]
    others = [family.fork(), family.fork(tail=20)]
    assert step([*grandchildren, *others]) == 8 * family.see_all
    mixed = [grandchildren[0], others[0], grandchildren[4], family.base, grandchildren[1], children[0], others[1], grandchildren[5]]
    assert step(mixed) == 8 * family.see_all  # in any order, parents among them
    assert step(mixed, RelayRule(4, 0)) == 8 * family.see_all  # what few share is left to each
    assert step(mixed, RelayRule(2, 300)) == 5 * family.see_all  # 256 are too few, the 512 of one family and the 768 of the other are not


def test_a_parent_that_reads_on_shares_what_its_children_saw(kernels):
    family = Family("bf16_store", kernels, 300)
    early = family.fork()
    family.base.take(300)
    late = [family.fork(), family.fork(tail=7)]
    assert step([early, family.base, *late]) == 4


def test_sessions_that_were_rolled_back_share_what_is_left(kernels):
    family = Family("int8", kernels, 600)
    readers = [family.fork(tail=20), family.fork(), family.fork()]
    readers[0].rollback(20)
    readers[1].rollback(90)  # into what it shares
    assert step(readers) == 3
    readers[2].rollback(readers[2].read - 200)
    assert step(readers) == 2


def test_prompts_are_read_beside_those_that_share(kernels):
    family = Family("all_options", kernels, 600)
    readers = [family.fork(tail=tail) for tail in (0, 9, 1, 2)]
    assert step(readers, new=[1, 50, 1, 1]) == 3


def test_sessions_may_have_several_buffers(kernels):
    """A prefix of more buffers than one, and tails too."""
    site = EVERY["bf16_store"]
    EVERY["small buffers"] = Attention(site.dtype, site.store_dtype, 64, 64, 3, site.groups, capacity_tokens=100)
    try:
        family = Family("small buffers", kernels, 650)
        assert step([family.fork(tail=tail) for tail in (0, 150, 320)]) == 3
    finally:
        del EVERY["small buffers"]


def test_values_that_are_no_numbers_stay_with_their_session(kernels):
    """A NaN in one session's query is in no other's result, and one in the prefix is in all."""
    family = Family("pairs", kernels, 600)
    readers = [family.fork() for _ in range(3)]
    readers[1].text.query_QSD = readers[1].text.query_QSD.clone()
    readers[1].text.query_QSD[:, 600] = torch.nan
    outs, _ = read_relayed([(reader, 1) for reader in readers], ALWAYS)
    assert outs[1].isnan().all()
    assert_near(outs[0], readers[0].text, 600)
    assert_near(outs[2], readers[2].text, 600)


@pytest.mark.parametrize("name", ["pairs", "bf16_store"])
def test_a_value_that_is_no_number_in_the_prefix_is_in_all(kernels, name):
    site = EVERY[name]
    text = Text(site, machine_isa(), 700)
    text.key_HSD[:, 40] = torch.nan
    base = Reader(text, kernels(machine_isa()))
    base.take(600)
    outs, shared = read_relayed([(base.fork(), 1) for _ in range(3)], ALWAYS)
    heads = [head for heads, zone in site.groups if isinstance(zone, All) for head in heads]
    assert shared == 3
    for out_SQE in outs:
        assert out_SQE.unflatten(1, (site.kv_heads, -1))[:, heads].isnan().all()


@pytest.mark.parametrize("name", ["bf16_store", "pairs"])
@pytest.mark.parametrize("count", [2, 3, 16, 17, 33])
def test_any_number_of_sessions_on_any_number_of_threads(kernels, name, count):
    family = Family(name, kernels, 520, room=80)
    readers = [family.fork(tail=number % 5) for number in range(count)]
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        assert step(readers) == count
