"""Keys drawn by chance: tables against their definition, probabilities against exact arithmetic, and what is drawn against its mean.

Letters: H KV heads, G queries per KV head, T keys, L tables, D head_dim, E value_dim, K keys drawn, R runs with other seeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from kvcompile.codegen.toolchain import Isa, find_toolchain, machine_isa
from kvcompile.ir.errors import SessionError
from kvcompile.ir.indexes import BLOCK_TOKENS, MIN_INDEXED_TOKENS, index_facts
from kvcompile.ir.lsh_facts import LSH, PART_TOKENS, drawn_probability
from kvcompile.ir.policy import HeadPolicy, Kivi, Sample, SinkRecent, Store
from kvcompile.link import build_lsh
from kvcompile.runtime import native_lsh, reference
from kvcompile.runtime.growable import GrowableStore
from kvcompile.runtime.indexes import lsh, lsh_tables
from kvcompile.runtime.indexes.index import Prompt, RecentQueries
from kvcompile.runtime.indexes.lsh import LshIndex, centred, log_drawn
from kvcompile.runtime.indexes.registry import index_kind, load_index, save_index
from kvcompile.runtime.kivi import KiviStore
from kvcompile.runtime.lookup import LookupStore, attend_found, attend_lookup, look_up
from kvcompile.runtime.merge import AttentionState
from kvcompile.runtime.native_lsh import Part, load_lsh

HEADS, GROUP = 2, 3
FIRST = 7  # sinks before the first key that an index covers
ISAS: tuple[Isa, ...] = ("portable", "avx2", "avx512")
HERE = ISAS[: ISAS.index(machine_isa()) + 1]


def use(isa: str) -> None:
    """The library of an instruction set; of "torch" none."""
    native_lsh._library = None
    if isa != "torch":
        toolchain = find_toolchain()
        assert toolchain is not None
        build_lsh(isa, toolchain)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _library() -> Iterator[None]:
    use(machine_isa())
    yield
    use(machine_isa())


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(key_HTD: Tensor, bits: int = 5, tables: int = 40, seed: int = 0, group: int = GROUP) -> LshIndex:
    heads, _, dim = key_HTD.shape
    none = RecentQueries(torch.zeros(heads, 0, dim), torch.zeros(0, dtype=torch.int64))
    prompt = Prompt(key_HTD, key_HTD, torch.zeros(heads, dim, dim), 0, none, group, 0)
    made = index_kind("lsh").build(FIRST, prompt, {"hash_bits": bits, "tables": tables, "seed": seed})
    assert isinstance(made, LshIndex)
    return made


def search(index: LshIndex, query_HGD: Tensor) -> Tensor:
    return index.search(query_HGD, 0, "per_query_head", lambda first, end: ()).position_HGK


def by_definition(key_HTD: Tensor, mean_HD: Tensor, query_HGD: Tensor, bits: int, tables: int, seed: int) -> list[set[int]]:
    """Of each query head the positions of keys that share its bucket in two tables; hyperplanes as the index makes them."""
    planes = lsh_tables.hyperplanes(bits, tables, seed, key_HTD.shape[2])
    normal_ND = planes.normal_BD16.transpose(1, 2).flatten(0, 1)[: bits * tables].double()
    rows = []
    for head in range(len(key_HTD)):
        vectors = (key_HTD[head] - mean_HD[head], query_HGD[head])
        sides = [(each.double() @ normal_ND.T >= 0).unflatten(1, (tables, bits)) for each in vectors]
        for query in range(query_HGD.shape[1]):
            met_TL = (sides[0] == sides[1][query]).all(2)
            rows.append({FIRST + place for place in range(len(met_TL)) if int(met_TL[place].sum()) >= 2})
    return rows


def sets(position_HGK: Tensor) -> list[set[int]]:
    """Of each query head; looks at order and padding too."""
    rows = []
    for row in position_HGK.flatten(0, 1).tolist():
        kept = [position for position in row if position >= 0]
        assert kept == sorted(set(kept)) and row == kept + [-1] * (len(row) - len(kept))
        rows.append(set(kept))
    return rows


# --- tables ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ["torch", *HERE])
@pytest.mark.parametrize(
    ("bits", "tables", "dim", "tokens"),
    [(5, 40, 64, 900), (1, 2, 33, 100), (16, 30, 80, 300), (10, 150, 128, 200), (3, 7, 256, 1), (4, 1024, 17, 40), (7, 20, 96, 128)],
)
def test_what_shares_a_bucket_in_two_tables_is_drawn(isa, bits, tables, dim, tokens):
    use(isa)
    key_HTD, query_HGD = normal(HEADS, tokens, dim) + 1, normal(HEADS, GROUP, dim, seed=1)
    key_HTD[:, : tokens // 2] += 2 * query_HGD[:, :1]
    index = build(key_HTD, bits, tables, seed=4)
    assert sets(search(index, query_HGD)) == by_definition(key_HTD, index.mean_HD, query_HGD, bits, tables, seed=4)


@pytest.mark.parametrize("dim", [64, 200])
@pytest.mark.parametrize(("bits", "tokens"), [(10, 1500), (10, 700), (16, 700), (1, 65)])
def test_every_instruction_set_fills_the_tables_that_torch_fills(dim, bits, tokens):
    key_HTD = normal(HEADS, tokens, dim)
    key_HTD[0, 3] = 0
    key_HTD[1, 5, 2] = torch.nan
    planes = lsh_tables.hyperplanes(bits, 21, 0, dim)
    use("torch")
    (expected,) = lsh_tables.parts_of(planes, key_HTD, 5)
    assert torch.equal(lsh_tables.buckets_of(expected, bits), lsh_tables.hashed(planes, key_HTD))
    for isa in HERE:
        use(isa)
        (found,) = lsh_tables.parts_of(planes, key_HTD, 5)
        assert torch.equal(found.order_HLT, expected.order_HLT) and torch.equal(found.border_HLX, expected.border_HLX)
        assert found.first == 5


def test_a_product_near_zero_has_the_side_that_it_has_in_double():
    """In float32 half of these products would come out on the wrong side, or at 0."""
    dim = 64
    planes = lsh_tables.hyperplanes(4, 8, 0, dim)
    normal_ND = planes.normal_BD16.transpose(1, 2).flatten(0, 1).double()
    vector_ND = normal(len(normal_ND), dim).double()
    vector_ND -= normal_ND * ((vector_ND * normal_ND).sum(1) / (normal_ND**2).sum(1))[:, None]
    vector_1ND = vector_ND.float()[None]
    product_NP = vector_1ND[0].double() @ normal_ND.T
    assert product_NP.diagonal().abs().max() < 1e-6
    expected_LN = ((product_NP >= 0).unflatten(1, (8, 4)) << torch.arange(4)).sum(2).T
    for isa in ("torch", *HERE):
        use(isa)
        assert torch.equal(lsh_tables.hashed(planes, vector_1ND)[0].long(), expected_LN)


def test_threads_change_nothing():
    key_HTD, query_HGD = normal(HEADS, 5000, 64), normal(HEADS, GROUP, 64, seed=1)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            index = build(key_HTD, 4, 60)
            found.append((*(each for part in index.parts for each in part[1:]), search(index, query_HGD)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(*pair) for other in found[1:] for pair in zip(found[0], other, strict=True))


@pytest.mark.parametrize("isa", ["torch", "native"])
def test_more_keys_than_a_part_holds_are_drawn_alike(isa, monkeypatch):
    use("torch" if isa == "torch" else machine_isa())
    key_HTD, query_HGD = normal(HEADS, 900, 48), normal(HEADS, GROUP, 48, seed=1)
    whole = build(key_HTD)
    for module in (lsh, lsh_tables):
        monkeypatch.setattr(module, "PART_TOKENS", 256)
    parted = build(key_HTD)
    assert [part.tokens for part in parted.parts] == [256, 256, 256, 132] and len(whole.parts) == 1
    assert torch.equal(search(parted, query_HGD), search(whole, query_HGD))
    parted.rollback(FIRST + 300)
    assert [part.tokens for part in parted.parts] == [256, 44]
    assert torch.equal(search(parted, query_HGD), search(build_cut(whole, 300), query_HGD))


def build_cut(index: LshIndex, tokens: int) -> LshIndex:
    child = index.fork()
    child.rollback(FIRST + tokens)
    return child


def test_a_part_of_as_many_keys_as_places_have_numbers():
    key_HTD, query_HGD = normal(1, PART_TOKENS, 16), normal(1, 1, 16, seed=1)
    index = build(key_HTD, 3, 2)
    assert len(index.parts) == 1
    assert sets(search(index, query_HGD)) == by_definition(key_HTD, index.mean_HD, query_HGD, 3, 2, seed=0)
    buckets = lsh_tables.buckets_of(index.parts[0], 3)
    use("torch")
    assert torch.equal(buckets, lsh_tables.buckets_of(index.parts[0], 3)) and buckets.max() == 7


# --- an index --------------------------------------------------------------------------------------------------------------------------


def grow(index: LshIndex, key_HTD: Tensor, end: int) -> None:
    while index.end < end:
        here = index.end
        index.add(key_HTD[:, here - FIRST : here - FIRST + BLOCK_TOKENS], key_HTD[:, here - FIRST : here - FIRST + BLOCK_TOKENS])


@pytest.mark.parametrize("isa", ["torch", "native"])
def test_keys_are_added_taken_back_and_added_again(isa):
    use("torch" if isa == "torch" else machine_isa())
    key_HTD, query_HGD = normal(HEADS, 1600, 48) + 1, normal(HEADS, GROUP, 48, seed=1)
    index = build(key_HTD[:, :512])
    before = search(index, query_HGD)
    grow(index, key_HTD, 800 + FIRST)
    middle = search(index, query_HGD)
    child = index.fork()
    grow(index, key_HTD, 1600 + FIRST)
    assert (index.first, index.end, child.end) == (FIRST, 1600 + FIRST, 800 + FIRST)
    assert len(index.parts) < 8  # of 35 pieces that came
    assert sets(search(index, query_HGD)) == by_definition(key_HTD, index.mean_HD, query_HGD, 5, 40, seed=0)
    assert torch.equal(search(child, query_HGD), middle)
    index.rollback(800 + FIRST)
    assert index.end == 800 + FIRST and torch.equal(search(index, query_HGD), middle)
    for each in (index, child):
        grow(each, key_HTD, 1600 + FIRST)
    assert torch.equal(search(index, query_HGD), search(child, query_HGD))
    index.rollback(512 + FIRST)
    assert torch.equal(search(index, query_HGD), before)
    index.rollback(FIRST)
    assert index.end == FIRST and search(index, query_HGD).shape == (HEADS, GROUP, 0)


@pytest.mark.parametrize("isa", ["torch", "native"])
@pytest.mark.parametrize("tokens", [0, 1, 2, 5])
def test_a_few_keys(isa, tokens):
    use("torch" if isa == "torch" else machine_isa())
    key_HTD, query_HGD = normal(HEADS, tokens, 64), normal(HEADS, GROUP, 64, seed=1)
    index = build(key_HTD, 2, 30)
    assert index.end == FIRST + tokens and index.nbytes() > 0
    drawn = search(index, query_HGD)
    assert sets(drawn) == by_definition(key_HTD, index.mean_HD, query_HGD, 2, 30, seed=0)
    chosen = key_HTD[:, None].expand(-1, GROUP, -1, -1)
    assert (index.log_probability(query_HGD, chosen) <= 0).all()
    index.add(normal(HEADS, BLOCK_TOKENS, 64, seed=2), normal(HEADS, BLOCK_TOKENS, 64, seed=2))
    assert index.end == FIRST + tokens + BLOCK_TOKENS


def test_the_same_seed_draws_the_same_keys_and_another_one_others():
    key_HTD, query_HGD = normal(HEADS, 600, 64), normal(HEADS, GROUP, 64, seed=1)
    first, again, other = (search(build(key_HTD, seed=seed), query_HGD) for seed in (1, 1, 2))
    assert torch.equal(first, again) and sets(first) != sets(other)


def test_hyperplanes_are_held_once():
    first, second = build(normal(1, 40, 64)), build(normal(1, 80, 64, seed=1))
    assert first.planes.normal_BD16 is second.planes.normal_BD16
    assert first.planes.normal_BD16 is not build(normal(1, 40, 64), seed=1).planes.normal_BD16


@pytest.mark.parametrize(("bits", "tables", "tokens"), [(10, 150, 512), (6, 30, 1024), (16, 20, 640)])
def test_bytes_are_what_the_plan_counts(bits, tables, tokens):
    index = build(normal(HEADS, tokens, 64).bfloat16(), bits, tables)
    facts, options = LSH.for_group(GROUP), {"hash_bits": bits, "tables": tables}
    assert index.nbytes() == HEADS * (facts.held_bytes(tokens, options) + facts.fixed_bytes(64, 64, options))
    counted = facts.bytes_per_token(64, 64, 2, options)
    if tokens >= 1 << bits:
        expected = HEADS * (tokens * counted.searched + counted.search_fixed) + counted.search_shared
        assert index.scanned_bytes(False, 0) == expected
    search(index, normal(HEADS, GROUP, 64, seed=1))
    assert index.asked == HEADS * GROUP
    met = HEADS * GROUP * tables * tokens / 2**bits
    assert index.places == pytest.approx(met, rel=0.2 if met > 1000 else 1)
    assert PART_TOKENS == 1 << 15 and facts.held_bytes(PART_TOKENS + 9, options) > facts.held_bytes(PART_TOKENS, options)


def test_a_file_holds_an_equal_index(tmp_path):
    key_HTD, query_HGD = normal(HEADS, 1024, 64), normal(HEADS, GROUP, 64, seed=1)
    index = build(key_HTD[:, :512])
    grow(index, key_HTD, 800 + FIRST)
    save_index(tmp_path / "index.safetensors", "lsh", index)
    loaded = load_index(tmp_path / "index.safetensors")
    assert (loaded.first, loaded.end, loaded.nbytes(), loaded.notes) == (index.first, index.end, index.nbytes(), index.notes)
    for each in (index, loaded):
        grow(each, key_HTD, 1024 + FIRST)  # type: ignore[arg-type]
    assert torch.equal(search(index, query_HGD), search(loaded, query_HGD))  # type: ignore[arg-type]


def test_a_damaged_state_is_refused(tmp_path):
    key_HTD = normal(HEADS, 700, 64)
    for bits in (5, 12):  # borders of buckets, and buckets of places
        index = build(key_HTD[:, :640], bits)
        grow(index, key_HTD, 672 + FIRST)
        tensors, numbers = index.state()
        assert "order 1" in tensors
        for name in tensors:
            with pytest.raises(KeyError):
                index_kind("lsh").restore({other: tensor for other, tensor in tensors.items() if other != name}, numbers)
            with pytest.raises(ValueError):
                index_kind("lsh").restore({**tensors, name: tensors[name].new_zeros(1)}, numbers)
        for name, value in (("order 0", 641), ("order 1", 3), ("border 0", -1), ("border 1", 9999)):
            damaged = tensors[name].clone()
            damaged[1, 7, 3] = value
            with pytest.raises(ValueError):
                index_kind("lsh").restore({**tensors, name: damaged}, numbers)
        if bits == 5:
            damaged = tensors["border 1"].clone()
            damaged[1, 7, 0] = 1  # keys before the first bucket
            with pytest.raises(ValueError, match="in no order"):
                index_kind("lsh").restore({**tensors, "border 1": damaged}, numbers)
        again = [index_kind("lsh").restore({name: each.clone() for name, each in tensors.items()}, numbers) for _ in range(2)]
        assert again[0].planes.normal_BD16 is again[1].planes.normal_BD16
        for wrong in ({"parts": "2"}, {"first": -1}, {"group": 1.5}, {"hash_bits": 17}, {"tables": 1}, {"tables": 41}):
            with pytest.raises(ValueError):
                index_kind("lsh").restore(tensors, {**numbers, **wrong})
    path = tmp_path / "index.safetensors"
    save_index(path, "lsh", index)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SessionError):
        load_index(path)


def test_a_library_that_cannot_be_loaded_is_named(tmp_path):
    from kvcompile.ir.errors import TargetError

    (tmp_path / "no.so").write_text("nothing")
    with pytest.raises(TargetError, match=r"no\.so: the library of hash tables cannot be loaded: .*\n  `kvcompile cache --clear`"):
        load_lsh(tmp_path / "no.so")


# --- probabilities ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "tables"), [(1, 2), (1, 1024), (5, 40), (10, 150), (16, 1024), (16, 2)])
def test_the_probability_is_that_of_two_collisions_or_more(bits, tables):
    for same in (1.0, 0.999, 0.75, 0.5, 0.3, 0.05):
        angle = math.pi * (1 - same)
        one = Fraction(1 - angle / math.pi) ** bits
        exact = 1 - (1 - one) ** tables - tables * one * (1 - one) ** (tables - 1)
        found = float(log_drawn(torch.tensor(angle, dtype=torch.float64), bits, tables))
        assert found == pytest.approx(_log(exact), rel=1e-8, abs=1e-12)
        assert drawn_probability(angle, bits, tables) == pytest.approx(float(exact), rel=1e-8)
    assert float(log_drawn(torch.tensor(math.pi, dtype=torch.float64), bits, tables)) == -math.inf


def _log(exact: Fraction) -> float:
    return math.log(exact.numerator) - math.log(exact.denominator)


@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_parallel_vectors_are_drawn_for_certain(dim):
    """A cosine of 1.0000001 is one of 1 (trap 24)."""
    query_HGD = normal(1, 50, dim) * 1e3
    index = LshIndex(0, 50, lsh_tables.hyperplanes(10, 150, 0, dim), torch.zeros(1, dim), ())
    for sign, expected in ((1.0, 0.0), (-1.0, -torch.inf)):
        key_HGKD = query_HGD[:, :, None] * (sign * torch.tensor([0.1, 1.0, 7.3]))[:, None]
        found = index.log_probability(query_HGD, key_HGKD)
        assert not found.isnan().any()
        assert (found == expected).all() if expected == 0.0 else (found < -50).all()


def test_zeros_have_the_probability_that_they_are_drawn_with():
    """A zero lies on one side of all hyperplanes, and so does another zero."""
    index = LshIndex(0, 2, lsh_tables.hyperplanes(3, 10, 0, 64), torch.zeros(1, 64), ())
    query_HGD = torch.stack([normal(64), torch.zeros(64)])[None]
    key_HGKD = torch.stack([torch.zeros(64), normal(64, seed=1)]).expand(1, 2, -1, -1)
    half = math.log(drawn_probability(math.pi / 2, 3, 10))
    found = index.log_probability(query_HGD, key_HGKD)
    assert found[0, 0, 0] == pytest.approx(half) and found[0, 1, 1] == pytest.approx(half) and found[0, 1, 0] == 0.0
    drawn = [0, 0]
    for seed in range(1000):
        planes = lsh_tables.hyperplanes(3, 10, seed, 64)
        parts = lsh_tables.parts_of(planes, torch.stack([torch.zeros(64), normal(64, seed=1)])[None], 0)
        rows = sets(lsh_tables.met(parts, lsh_tables.hashed(planes, query_HGD), 3).position_HNK)
        drawn[0] += 0 in rows[0]
        drawn[1] += 1 in rows[1]
        assert 0 in rows[1]
    spread = math.sqrt(1000 * math.exp(half) * (1 - math.exp(half)))
    assert all(abs(times - 1000 * math.exp(half)) < 4 * spread for times in drawn)


@pytest.mark.parametrize(("bits", "tables", "published"), [(10, 150, 0.0097), (8, 75, 0.0351)])
def test_the_share_that_is_drawn_is_the_published_one(bits, tables, published):
    """At right angles, as MagicPIG counts (trap 25): in many dimensions nearly all keys stand so."""
    assert drawn_probability(math.pi / 2, bits, tables) == pytest.approx(published, rel=0.01)
    dim, tokens, queries = 2048, 4000, 48
    index = build(normal(1, tokens, dim), bits, tables, group=queries)
    drawn = (search(index, normal(1, queries, dim, seed=1)) >= 0).sum() / (tokens * queries)
    assert float(drawn) == pytest.approx(published, rel=0.1)


@pytest.mark.parametrize(("bits", "tables"), [(10, 150), (8, 75)])
def test_the_share_that_the_plan_counts_is_drawn_of_isotropic_keys(bits, tables):
    tokens, queries = 8000, 60
    shares = []
    for seed in range(4):
        index = build(normal(1, tokens, 64, seed=seed), bits, tables, seed=seed, group=queries)
        shares.append(float((search(index, normal(1, queries, 64, seed=9 + seed)) >= 0).sum() / (tokens * queries)))
    expected = index_facts("lsh").sampled_share(64, {"hash_bits": bits, "tables": tables})  # type: ignore[attr-defined]
    assert sum(shares) / 4 == pytest.approx(expected, rel=0.1)


def test_keys_are_centred():
    """Keys far from the origin stand all in one direction: without centring none of them is drawn, or all (trap 25)."""
    key_HTD, query_HGD = normal(1, 2000, 64), normal(1, GROUP, 64, seed=1)
    far = build(key_HTD + 50, 10, 150)
    assert sets(search(far, query_HGD)) == by_definition(key_HTD + 50, far.mean_HD, query_HGD, 10, 150, seed=0)
    assert 0.01 < float((search(far, query_HGD) >= 0).sum()) / (2000 * GROUP) < 0.05
    chosen = normal(1, GROUP, 5, 64, seed=3)
    near = build(key_HTD, 10, 150)
    torch.testing.assert_close(far.log_probability(query_HGD, chosen + 50), near.log_probability(query_HGD, chosen), rtol=1e-3, atol=1e-3)


# --- attention -------------------------------------------------------------------------------------------------------------------------

WINDOW = SinkRecent(FIRST, 16)
SCALE = 0.4


def store(zone: Sample, key_HTD: Tensor, value_HTE: Tensor, soft_cap: float | None = None) -> LookupStore:
    """Has read all these tokens."""
    heads, tokens, dim = key_HTD.shape
    rows = GrowableStore(heads, dim, value_HTE.shape[2], key_HTD.dtype, tokens + 64)
    held = LookupStore(rows, WINDOW, zone, GROUP, SCALE, soft_cap)
    held.append(key_HTD, value_HTE)
    return held


def test_sums_above_and_below_the_fraction_are_right_in_the_mean():
    """Of 9 keys, over many seeds: none of the 15 sums lies 4 standard errors away, as these are measured, which of normal numbers one in
    1000 tries would show.  Without probabilities, or with those of keys that are not centred, most lie further away in a tenth of the runs.
    """
    runs, bits, tables, cap = 2000, 2, 16, 1.5
    key_HTD, value_HTE = normal(1, 9, 5) + 1.5, normal(1, 9, 4, seed=1)
    query_HGD = 1.5 * normal(1, GROUP, 5, seed=2)
    held = store(Sample(bits, tables), key_HTD, value_HTE, cap)
    logit_GT = cap * torch.tanh((query_HGD[0].double() * SCALE) @ key_HTD[0].double().T / cap)
    exact_GE = torch.cat([logit_GT.exp() @ value_HTE[0].double(), logit_GT.exp().sum(1, keepdim=True)], 1)
    sums: dict[str, list[Tensor]] = {"right": [], "no probability": [], "not centred": []}
    for seed in range(runs):
        index = build(key_HTD, bits, tables, seed)
        index.parts = tuple(part._replace(first=0) for part in index.parts)
        if seed == 0:
            least = index.log_probability(query_HGD, key_HTD[:, None].expand(-1, GROUP, -1, -1)).exp().min()
            assert least * runs > 20  # every key is drawn often, or no error could be measured
        found = look_up(held, query_HGD[:, :, None], index)
        raw = index.fork()
        raw.mean_HD = torch.zeros_like(index.mean_HD)
        wrong = (("no probability", None), ("not centred", raw.log_probability)) if seed < runs // 10 else ()
        for name, probability in (("right", index.log_probability), *wrong):
            state = lookup_chosen(held, query_HGD, found.position_HGK, probability)
            total_G1 = state.lse[0].double().exp()[:, None]
            sums[name].append(torch.cat([state.out[0].double() * total_G1, total_G1], 1))
    far = {}
    for name, each in sums.items():
        sum_RGE = torch.stack(each)
        far[name] = ((sum_RGE.mean(0) - exact_GE).abs() * math.sqrt(len(each)) / sum_RGE.std(0)).flatten()
    assert far["right"].max() < 4, far
    assert all(far[name].median() > 4 for name in ("no probability", "not centred")), far


def lookup_chosen(held: LookupStore, query_HGD: Tensor, position_HGK: Tensor, probability) -> AttentionState:
    from kvcompile.runtime.lookup import attend_chosen

    return attend_chosen(held, query_HGD * SCALE, position_HGK, probability)


@pytest.mark.parametrize("isa", ["torch", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_that_of_the_oracle_over_what_was_drawn(isa, dtype):
    """Each key that was drawn has a logit that is larger by -log of its probability, which here is computed in float64 from its angle."""
    use("torch" if isa == "torch" else machine_isa())
    tokens, dim = MIN_INDEXED_TOKENS + 100, 64
    key_HTD, value_HTE = (normal(HEADS, tokens, dim) + 1).to(dtype), normal(HEADS, tokens, 40, seed=1).to(dtype)
    query_HG1D = normal(HEADS, GROUP, 1, dim, seed=2)
    held = store(Sample(4, 20, seed=3), key_HTD, value_HTE, soft_cap=4.0)
    index = held.refresh()
    assert isinstance(index, LshIndex) and index.first == FIRST
    found = look_up(held, query_HG1D, index)
    drawn = sets(found.position_HGK)
    seen_HGT = torch.zeros(HEADS, GROUP, tokens, dtype=torch.bool)
    seen_HGT[:, :, : index.first] = seen_HGT[:, :, index.end :] = True
    for row, positions in zip(seen_HGT.flatten(0, 1), drawn, strict=True):
        row[list(positions)] = True
    centred_HTD = (key_HTD.double() - key_HTD[:, index.first : index.end].double().mean(1, keepdim=True))[:, None]
    cosine_HGT = torch.nn.functional.cosine_similarity(query_HG1D.double(), centred_HTD, dim=3)
    same_HGT = (1 - torch.arccos(cosine_HGT) / math.pi) ** 4
    probability_HGT = 1 - (1 - same_HGT) ** 20 - 20 * same_HGT * (1 - same_HGT) ** 19
    probability_HGT[:, :, : index.first] = probability_HGT[:, :, index.end :] = 1.0
    state = attend_found(held, query_HG1D, index, found)
    for head in range(HEADS):
        for query in range(GROUP):
            asked = query_HG1D[head : head + 1, query : query + 1]
            keys, values = key_HTD[head : head + 1], value_HTE[head : head + 1]
            bias = -probability_HGT[head, query].log()[None, None, None]
            expected = reference.attend(asked, keys, values, seen_HGT[head, query][None], SCALE, 4.0, bias_HGST=bias)
            torch.testing.assert_close(state.out[head, query].double(), expected.out[0, 0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(state.lse[head, query].double(), expected.lse[0, 0], rtol=1e-5, atol=1e-5)
    assert all(drawn)


def test_where_nothing_is_drawn_the_window_alone_is_attended_to():
    tokens, dim = MIN_INDEXED_TOKENS + 100, 64
    key_HTD, value_HTE = normal(HEADS, tokens, dim), normal(HEADS, tokens, 40, seed=1)
    query_HG1D = normal(HEADS, GROUP, 1, dim, seed=2)
    held = store(Sample(16, 2), key_HTD, value_HTE)
    index = held.refresh()
    assert index is not None
    found = look_up(held, query_HG1D, index)
    assert found.position_HGK.shape == (HEADS, GROUP, 0)
    seen_1T = torch.ones(1, tokens, dtype=torch.bool)
    seen_1T[:, index.first : index.end] = False
    expected = reference.attend(query_HG1D, key_HTD, value_HTE, seen_1T, SCALE)
    for empty in (found, found._replace(position_HGK=torch.full((HEADS, GROUP, 3), -1))):
        state = attend_found(held, query_HG1D, index, empty)
        torch.testing.assert_close(state.out.double(), expected.out, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state.lse.double(), expected.lse, rtol=1e-5, atol=1e-5)
        chosen = lookup_chosen(held, query_HG1D[:, :, 0], empty.position_HGK, index.log_probability)  # type: ignore[attr-defined]
        assert (chosen.out == 0).all() and (chosen.lse == -torch.inf).all()


@pytest.mark.parametrize("prompt", [0, 1, 2, 5, 30, MIN_INDEXED_TOKENS + WINDOW.window_tokens - 5])
def test_what_is_short_is_full_attention(prompt):
    key_HTD, value_HTE = normal(HEADS, prompt + 4, 64), normal(HEADS, prompt + 4, 40, seed=1)
    held = store(Sample(), key_HTD[:, :prompt], value_HTE[:, :prompt])
    for position in range(prompt, prompt + 4):
        held.append(key_HTD[:, position : position + 1], value_HTE[:, position : position + 1])
        assert held.refresh() is None


def test_nothing_is_learnt_from_later_keys():
    key_HTD = normal(HEADS, 1200, 64)
    other_HTD = torch.cat([key_HTD[:, :700], 5 * normal(HEADS, 500, 64, seed=9) + 3], 1)
    query_HG1D = normal(HEADS, GROUP, 1, 64, seed=2)
    states = []
    for keys in (key_HTD, other_HTD):
        held = store(Sample(4, 20), keys[:, :690], keys[:, :690])
        for position in range(690, 700):
            held.append(keys[:, position : position + 1], keys[:, position : position + 1])
            index = held.refresh()
            assert index is not None
            state = attend_lookup(held, query_HG1D, index)
        states.append(state)
        for position in range(700, 1200):
            held.append(keys[:, position : position + 1], keys[:, position : position + 1])
            held.refresh()
        held.rollback(500)
        index = held.refresh()
        assert index is not None
        states.append(attend_lookup(held, query_HG1D, index))
    assert all(torch.equal(states[0].out, each.out) and torch.equal(states[0].lse, each.lse) for each in states[1:])


def test_keys_that_kivi_will_still_quantise_are_in_no_table():
    """Else the angle that a key was hashed with would not be its angle later."""
    policy = HeadPolicy("kivi", (SinkRecent(4, 32), Sample(5, 20)), store=Store(quantised=Kivi(4, 16, 128)))
    assert policy.waiting_tokens == 96
    assert HeadPolicy("plain", (SinkRecent(4, 32), Sample(5, 20)), rollback_tokens=7).waiting_tokens == 7
    rows = KiviStore(HEADS, 64, 64, torch.float32, Kivi(4, 16, 128), 2048)
    held = LookupStore(rows, SinkRecent(4, 32), Sample(5, 20), GROUP, SCALE, None, policy.waiting_tokens)
    key_HTD = normal(HEADS, 1300, 64)
    held.append(key_HTD[:, :800], key_HTD[:, :800])
    held.settle()
    hashed_again = 0
    taken_back = iter((13, 40, 60, 63))
    for position in range(800, 1300):
        if position % 110 == 0:
            held.rollback(next(taken_back))  # keys that were quantised are exact again, and join other groups
        held.append(key_HTD[:, position : position + 1], key_HTD[:, position : position + 1])
        index = held.refresh()
        held.settle()
        if position % 25 == 0 and isinstance(index, LshIndex):
            now_HTD, _ = rows.gather(torch.arange(index.first, index.end).expand(HEADS, -1))
            buckets = lsh_tables.hashed(index.planes, centred(now_HTD, index.mean_HD))
            assert torch.equal(buckets, torch.cat([lsh_tables.buckets_of(part, 5) for part in index.parts], 2))
            hashed_again += 1
    assert hashed_again == 20 and index is not None and index.end > 900


def test_a_part_tells_its_bytes():
    part = Part(3, torch.zeros(2, 5, 9, dtype=torch.int16), torch.zeros(2, 5, 4, dtype=torch.int16))
    assert (part.tokens, part.end, part.nbytes) == (9, 12, 2 * 2 * 5 * 13)
