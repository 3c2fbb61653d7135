"""Indexes of published systems: each held against its definition in float64, and what all of them promise alike.

Letters as in runtime/indexes/index.py.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvcompile.ir.errors import SpecError, TargetError
from kvcompile.ir.indexes import BLOCK_TOKENS, RECENT_STRIDE, index_facts
from kvcompile.ir.policy import Select
from kvcompile.runtime.indexes import clusters
from kvcompile.runtime.indexes.hnsw import _asked
from kvcompile.runtime.indexes.index import KeyIndex, Prompt, RecentQueries
from kvcompile.runtime.indexes.registry import index_kind, load_index, save_index
from kvcompile.runtime.indexes.spherical import spherical_centres
from kvcompile.runtime.merge import AttentionState, merge_states
from kvcompile.runtime.spans import Span
from kvcompile.spec import load_spec

HEADS, GROUP, DIM, VALUE_DIM = 2, 3, 32, 24
NOTHING = torch.zeros(HEADS, GROUP)  # no estimate here looks at what was read
FIRST = 7  # sinks before the first key that an index covers


@dataclasses.dataclass
class Past:
    """Keys around topics, values that go with them, and queries that each look for one of the topics."""

    key_HTD: Tensor
    value_HTE: Tensor
    query_HND: Tensor

    def keys(self, first: int, end: int) -> list[Span]:
        """In two spans, as a fork has them."""
        spans = (Span(0, self.key_HTD[:, :600], self.value_HTE[:, :600]), Span(600, self.key_HTD[:, 600:], self.value_HTE[:, 600:]))
        parts = (span.between(first, end) for span in spans)
        return [part for part in parts if part.tokens]

    def prompt(self, first: int, end: int, recent: RecentQueries | None = None) -> Prompt:
        asked_HND = self.query_HND[:, :40]
        if recent is None:
            recent = RecentQueries(asked_HND, end + RECENT_STRIDE * torch.arange(40))
        return Prompt(
            self.key_HTD[:, first:end], self.value_HTE[:, first:end], asked_HND.transpose(1, 2) @ asked_HND, 40, recent, GROUP, 30
        )

    def asked(self, number: int = 0) -> Tensor:
        """A query of each query head, [H, G, D], that the index has not seen."""
        return self.query_HND[:, 40 + GROUP * number : 40 + GROUP * (number + 1)]


def past(tokens: int = 1200, seed: int = 0, dtype: torch.dtype = torch.float32) -> Past:
    generator = torch.Generator().manual_seed(seed)
    topic_HCD = torch.randn(HEADS, 30, DIM, generator=generator)
    which_HT = torch.randint(30, (HEADS, tokens // 16 + 1), generator=generator).repeat_interleave(16, 1)[:, :tokens]
    key_HTD = topic_HCD.gather(1, which_HT[..., None].expand(-1, -1, DIM)) + 0.5 * torch.randn(HEADS, tokens, DIM, generator=generator)
    value_HTE = torch.randn(HEADS, 30, VALUE_DIM, generator=generator).gather(1, which_HT[..., None].expand(-1, -1, VALUE_DIM))
    value_HTE = value_HTE + 0.3 * torch.randn(HEADS, tokens, VALUE_DIM, generator=generator)
    asked_HN = torch.randint(30, (HEADS, 200), generator=generator)
    query_HND = topic_HCD.gather(1, asked_HN[..., None].expand(-1, -1, DIM)) / 4 + 0.2 * torch.randn(HEADS, 200, DIM, generator=generator)
    return Past((key_HTD + 2).to(dtype), value_HTE.to(dtype), query_HND)


@dataclasses.dataclass(frozen=True)
class Case:
    """An index kind with options, and what of the keys it must find of the best 30 when it is asked for `k`."""

    name: str
    options: dict[str, Any]
    k: int
    recall: float

    def build(self, given: Past, first: int = FIRST, end: int = 1024 + FIRST) -> KeyIndex:
        return index_kind(self.name).build(first, given.prompt(first, end), self.options)

    @property
    def selects(self) -> tuple[Select, ...]:
        return ("per_query_head", "union", "sum", "max") if index_facts(self.name).scores else ("per_query_head", "union")


CASES = {
    "minmax": Case("minmax", {"page_tokens": 16}, 256, 0.85),
    "minmax of 128": Case("minmax", {"page_tokens": 128}, 512, 0.7),
    "cuboid": Case("cuboid", {"page_tokens": 16}, 256, 0.8),
    "cuboid, max": Case("cuboid", {"page_tokens": 32, "radius": "max"}, 256, 0.75),
    "representatives": Case("representatives", {"page_tokens": 16}, 256, 0.55),
    "representatives of 128": Case("representatives", {"page_tokens": 128, "keys": 8}, 512, 0.55),
    "mean": Case("mean", {"page_tokens": 16}, 256, 0.8),
    "mean of 48": Case("mean", {"page_tokens": 48}, 384, 0.8),
    "ivf": Case("ivf", {"lists": 32, "probe": 4}, 60, 0.7),
    "hnsw": Case("hnsw", {"m": 8, "ef": 64}, 60, 0.8),
    "clusters": Case("clusters", {"tokens_per_cluster": 16, "estimate": 0.25}, 160, 0.8),
}
NEEDS_HNSWLIB = pytest.mark.skipif(importlib.util.find_spec("hnswlib") is None, reason="hnswlib is not installed")
EVERY = pytest.mark.parametrize(
    "case", [pytest.param(case, id=name, marks=[NEEDS_HNSWLIB] if name == "hnsw" else []) for name, case in CASES.items()]
)


def positions(found: Tensor) -> list[set[int]]:
    """Of each query head of each KV head, found [H, G, K]; looks at order and padding too."""
    rows = []
    for row in found.flatten(0, 1).tolist():
        kept = [position for position in row if position >= 0]
        assert kept == sorted(set(kept)) and row == kept + [-1] * (len(row) - len(kept))
        rows.append(set(kept))
    return rows


# --- what every index promises -------------------------------------------------------------------------------------------------------


@EVERY
def test_most_of_what_matters_is_found(case):
    given = past()
    index = case.build(given)
    hits = total = 0
    for number in range(20):
        query_HGD = given.asked(number)
        found = positions(index.search(query_HGD, case.k, "per_query_head", given.keys).position_HGK)
        logit_HGT = query_HGD.double() @ given.key_HTD[:, FIRST : 1024 + FIRST].double().transpose(1, 2)
        for row, best in zip(found, (logit_HGT.topk(30, 2).indices + FIRST).flatten(0, 1).tolist(), strict=True):
            assert all(FIRST <= position < 1024 + FIRST for position in row)
            hits, total = hits + len(row & set(best)), total + 30
    assert hits > case.recall * total


@EVERY
def test_it_finds_fewer_than_all_and_with_a_large_k_all(case):
    given = past()
    index = case.build(given)
    for select in case.selects:
        assert all(len(row) < 1024 for row in positions(index.search(given.asked(), case.k, select, given.keys).position_HGK))
        found = index.search(given.asked(), 1024, select, given.keys)
        assert all(len(row) == 1024 for row in positions(found.position_HGK))


@EVERY
@pytest.mark.parametrize("tokens", [0, 1, 2, 5])
def test_of_a_few_keys_all_are_found(case, tokens):
    given = past()
    index = case.build(given, FIRST, FIRST + tokens)
    found = index.search(given.asked(), max(1, tokens), "union", given.keys)
    assert positions(found.position_HGK) == [set(range(FIRST, FIRST + tokens))] * (HEADS * GROUP)


@EVERY
def test_the_union_is_what_the_query_heads_choose_together(case):
    given = past()
    index = case.build(given)
    own, shared = (
        positions(index.search(given.asked(), case.k, select, given.keys).position_HGK) for select in ("per_query_head", "union")
    )
    for head in range(HEADS):
        rows = slice(head * GROUP, (head + 1) * GROUP)
        assert shared[rows] == [set.union(*own[rows])] * GROUP


@EVERY
def test_sum_and_max_choose_the_same_for_all_query_heads(case):
    given = past()
    index = case.build(given)
    for select in case.selects[2:]:
        found = positions(index.search(given.asked(), case.k, select, given.keys).position_HGK)
        assert found == [found[head * GROUP] for head in range(HEADS) for _ in range(GROUP)]
        assert found != positions(index.search(given.asked(), case.k, "per_query_head", given.keys).position_HGK)


@EVERY
def test_the_same_keys_give_the_same_index(case):
    given = past()
    first, second = (case.build(given) for _ in range(2))
    assert torch.equal(*(index.search(given.asked(), case.k, "union", given.keys).position_HGK for index in (first, second)))


@EVERY
def test_nothing_is_learnt_from_later_keys(case):
    """What an index of [first, end) finds depends on no key behind `end`, whatever is added later."""
    given, other = past(), past()
    other.key_HTD[:, 800:] *= 3
    other.value_HTE[:, 800:] = 0
    found = []
    for each in (given, other):
        index = case.build(each, FIRST, 672 + FIRST)
        index.add(each.key_HTD[:, 672 + FIRST : 768 + FIRST], each.value_HTE[:, 672 + FIRST : 768 + FIRST])
        found.append(index.search(given.asked(), case.k, "union", each.keys).position_HGK)
        index.add(each.key_HTD[:, 768 + FIRST : 1056 + FIRST], each.value_HTE[:, 768 + FIRST : 1056 + FIRST])
        index.search(given.asked(), case.k, "union", each.keys)
        index.rollback(768 + FIRST)
        found.append(index.search(given.asked(), case.k, "union", each.keys).position_HGK)
    assert all(torch.equal(found[0], each) for each in found[1:])


def grow(index: KeyIndex, given: Past, end: int, step: int = BLOCK_TOKENS) -> None:
    while index.end < end:
        until = min(end, index.end + step)
        index.add(given.key_HTD[:, index.end : until], given.value_HTE[:, index.end : until])


@EVERY
def test_keys_are_added_taken_back_and_added_again(case):
    given = past()
    index = case.build(given, FIRST, 512 + FIRST)
    before = index.search(given.asked(), case.k, "union", given.keys).position_HGK
    grow(index, given, 800 + FIRST)
    middle = index.search(given.asked(), case.k, "union", given.keys).position_HGK
    child = index.fork()
    grow(index, given, 1152 + FIRST)
    assert (index.first, index.end, child.end) == (FIRST, 1152 + FIRST, 800 + FIRST)
    assert max(map(max, positions(index.search(given.asked(1), case.k, "union", given.keys).position_HGK))) >= 800 + FIRST
    assert torch.equal(child.search(given.asked(), case.k, "union", given.keys).position_HGK, middle)
    index.rollback(800 + FIRST)
    assert index.end == 800 + FIRST
    assert torch.equal(index.search(given.asked(), case.k, "union", given.keys).position_HGK, middle)
    grow(child, given, 1152 + FIRST)
    grow(index, given, 1152 + FIRST)
    assert torch.equal(*(each.search(given.asked(1), case.k, "union", given.keys).position_HGK for each in (index, child)))
    index.rollback(512 + FIRST)
    assert torch.equal(index.search(given.asked(), case.k, "union", given.keys).position_HGK, before)


@EVERY
def test_added_keys_that_are_looked_for_are_found(case):
    given = past()
    direction_HD = torch.randn(HEADS, DIM, generator=torch.Generator().manual_seed(5))
    run = range(901, 965)
    given.key_HTD[:, run.start : run.stop] += 3 * direction_HD[:, None]
    index = case.build(given, FIRST, 512 + FIRST)
    grow(index, given, 1024 + FIRST)
    found = positions(index.search(direction_HD[:, None].expand(-1, GROUP, -1), case.k, "union", given.keys).position_HGK)
    assert all(len(row & set(run)) >= 48 for row in found)


@EVERY
def test_a_file_holds_an_equal_index(case, tmp_path):
    given = past(dtype=torch.bfloat16)
    index = case.build(given, FIRST, 512 + FIRST)
    grow(index, given, 800 + FIRST)
    index.search(given.asked(), case.k, "union", given.keys)
    save_index(tmp_path / "index", case.name, index)
    loaded = load_index(tmp_path / "index")
    assert (loaded.first, loaded.end, loaded.nbytes(), loaded.notes) == (index.first, index.end, index.nbytes(), index.notes)
    for each in (index, loaded):
        grow(each, given, 1024 + FIRST)
    assert torch.equal(*(each.search(given.asked(), case.k, "union", given.keys).position_HGK for each in (index, loaded)))


@EVERY
def test_a_damaged_state_is_refused(case):
    given = past()
    index = case.build(given)
    tensors, numbers = index.state()
    for name in tensors:
        with pytest.raises(KeyError):
            index_kind(case.name).restore({other: tensor for other, tensor in tensors.items() if other != name}, numbers)
        with pytest.raises(ValueError):
            index_kind(case.name).restore({**tensors, name: tensors[name].new_zeros(1)}, numbers)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_what_the_plan_counts(case, dtype):
    given = past(dtype=dtype)
    tokens = 48 * 16 if case.options.get("page_tokens") == 48 else 1024
    index = case.build(given, FIRST, tokens + FIRST)
    facts = index_facts(case.name)
    counted = facts.bytes_per_token(DIM, VALUE_DIM, dtype.itemsize, case.options)
    held = HEADS * (tokens * counted.held + facts.fixed_bytes(DIM, VALUE_DIM, case.options))
    assert index.nbytes() == (pytest.approx(held, rel=0.01) if case.name == "hnsw" else held)  # its upper layers are drawn by chance
    assert index.scanned_bytes(tail=False, k=case.k) == HEADS * (tokens * counted.searched + counted.search_fixed)


# --- pages -----------------------------------------------------------------------------------------------------------------------------


def pages(case: str) -> tuple[Past, KeyIndex, Tensor, int]:
    """Of bfloat16 keys: the index, its pages [H, N, P, D] in float64, and their size."""
    given = past(dtype=torch.bfloat16)
    index = CASES[case].build(given)
    size = CASES[case].options["page_tokens"]
    whole = 1024 // size
    return given, index, given.key_HTD[:, FIRST : FIRST + whole * size].double().unflatten(1, (whole, size)), size


def chosen(score_HGN: Tensor, count: int, size: int) -> list[set[int]]:
    """The positions of the best pages of each query head, and of what is in no full page."""
    pages_HGM = score_HGN.topk(count, 2).indices.flatten(0, 1)
    rest = set(range(FIRST + score_HGN.shape[2] * size, FIRST + 1024))
    return [{FIRST + page * size + place for page in row for place in range(size)} | rest for row in pages_HGM.tolist()]


def test_minmax_is_the_largest_logit_that_a_page_could_hold():
    given, index, page_HNPD, size = pages("minmax")
    query_HGD = given.asked().double()
    low_HND, high_HND = page_HNPD.amin(2), page_HNPD.amax(2)
    score_HGN = torch.maximum(query_HGD[:, :, None] * low_HND[:, None], query_HGD[:, :, None] * high_HND[:, None]).sum(3)
    best_HGN = torch.einsum("hgd,hnpd->hgnp", query_HGD, page_HNPD).amax(3)
    assert (score_HGN >= best_HGN).all()
    found = index.search(given.asked(), 160, "per_query_head", given.keys)
    assert positions(found.position_HGK) == chosen(score_HGN, 10, size)


def test_a_cuboid_reaches_as_far_as_the_keys_do_on_average():
    given, index, page_HNPD, size = pages("cuboid")
    middle_HND = (page_HNPD.amin(2) + page_HNPD.amax(2)) / 2
    radius_HND = (page_HNPD - middle_HND[:, :, None]).abs().mean(2)
    low, high = ((middle_HND + sign * radius_HND).bfloat16().double() for sign in (-1, 1))
    query_HGD = given.asked().double()
    score_HGN = torch.maximum(query_HGD[:, :, None] * low[:, None], query_HGD[:, :, None] * high[:, None]).sum(3)
    torch.testing.assert_close(index.page_scores(given.asked()).double(), score_HGN, rtol=1e-4, atol=1e-4)
    assert positions(index.search(given.asked(), 160, "per_query_head", given.keys).position_HGK) == chosen(score_HGN, 10, size)


def test_a_cuboid_of_the_largest_radius_is_minmax():
    given = past()
    box, bound = (index_kind(name).build(0, given.prompt(0, 1024), options) for name, options in (
        ("cuboid", {"page_tokens": 16, "radius": "max"}), ("minmax", {"page_tokens": 16})
    ))  # fmt: skip
    torch.testing.assert_close(box.page_scores(given.asked()), bound.page_scores(given.asked()))


@pytest.mark.parametrize("case", ["mean", "mean of 48"])
def test_mean_pages_are_chosen_by_their_mean_key(case):
    given, index, page_HNPD, size = pages(case)
    score_HGN = given.asked().double() @ page_HNPD.mean(2).bfloat16().double().transpose(1, 2)
    found = index.search(given.asked(), 5 * size, "per_query_head", given.keys)
    assert positions(found.position_HGK) == chosen(score_HGN, 5, size)


def test_representatives_are_the_keys_that_later_queries_ask_for():
    given, index, page_HNPD, size = pages("representatives")
    mean_HD = given.query_HND[:, :40].double().mean(1)
    best_HNR = torch.einsum("hd,hnpd->hnp", mean_HD, page_HNPD).topk(4, 2).indices
    key_HND = page_HNPD.gather(2, best_HNR[..., None].expand(-1, -1, -1, DIM)).mean(2).bfloat16().double()
    found = index.search(given.asked(), 160, "per_query_head", given.keys)
    assert positions(found.position_HGK) == chosen(given.asked().double() @ key_HND.transpose(1, 2), 10, size)


def test_representatives_are_judged_by_queries_that_came_after_them():
    given = past()
    position_C = torch.arange(0, 1024, 16)
    recent = RecentQueries(given.query_HND[:, : len(position_C)], position_C)
    changed = RecentQueries(recent.query_HCD.clone(), position_C)
    changed.query_HCD[:, position_C < 512] *= -5
    first, second = (index_kind("representatives").build(0, given.prompt(0, 1024, each), {"page_tokens": 16}) for each in (recent, changed))
    assert torch.equal(first.digest_HNVD[:, 32:], second.digest_HNVD[:, 32:])
    assert not torch.equal(first.digest_HNVD[:, :32], second.digest_HNVD[:, :32])


def test_pages_that_are_added_are_judged_by_the_last_queries():
    given = past()
    drifted = RecentQueries(-3 * given.query_HND[:, 60:80], torch.full((20,), 2000))
    found = []
    for shown in (False, True):
        index = CASES["representatives"].build(given, 0, 512)
        if shown:
            assert index.recalibrate(drifted, given.keys, 20)
        grow(index, given, 1024)
        index.search(given.asked(), 64, "union", given.keys)
        found.append(index.digest_HNVD)
    assert torch.equal(found[0][:, :32], found[1][:, :32])
    assert not torch.equal(found[0][:, 32:], found[1][:, 32:])


def test_without_a_query_representatives_are_the_first_keys():
    given = past()
    none = RecentQueries(torch.zeros(HEADS, 0, DIM), torch.zeros(0, dtype=torch.int64))
    index = index_kind("representatives").build(0, given.prompt(0, 1024, none), {"page_tokens": 16})
    torch.testing.assert_close(index.digest_HNVD[:, :, 0], given.key_HTD[:, :1024].unflatten(1, (64, 16))[:, :, :4].mean(2))


def test_keys_in_no_full_page_are_found_beside_the_pages():
    given = past()
    index = CASES["minmax of 128"].build(given, FIRST, 512 + FIRST)
    grow(index, given, 608 + FIRST)
    for row in positions(index.search(given.asked(), 128, "per_query_head", given.keys).position_HGK):
        assert set(range(512 + FIRST, 608 + FIRST)) < row and len(row) == 128 + 96
    for row in positions(index.search(given.asked(), 128, "union", given.keys).position_HGK):
        assert set(range(512 + FIRST, 608 + FIRST)) < row


# --- ivf -------------------------------------------------------------------------------------------------------------------------------


def test_a_key_is_in_the_list_of_its_nearest_centre_and_centres_are_means():
    given = past()
    index = CASES["ivf"].build(given)
    grow(index, given, 1152 + FIRST)
    mean_HD = given.key_HTD[:, FIRST : 1024 + FIRST].double().mean(1)
    point_HTD = given.key_HTD[:, FIRST : 1152 + FIRST].double() - mean_HD[:, None]
    score_HTL = point_HTD @ index.centre_HLD.double().transpose(1, 2)
    best = score_HTL.gather(2, index.list_HT.long()[..., None]).squeeze(2)
    torch.testing.assert_close(best, score_HTL.amax(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(index.centre_HLD.float().norm(dim=2), torch.ones(HEADS, 32), rtol=0, atol=5e-3)
    for head in range(HEADS):  # as good as converged: a centre points where the keys of its list do
        sums = torch.zeros(32, DIM, dtype=torch.float64).index_add_(0, index.list_HT[head, :1024].long(), point_HTD[head, :1024])
        alike = torch.nn.functional.cosine_similarity(sums, index.centre_HLD[head].double(), dim=1)
        assert alike.mean() > 0.98


def test_rounds_bring_keys_closer_to_their_centres():
    given = past()
    point_HTD = given.key_HTD - given.key_HTD.mean(1, keepdim=True)
    last = spherical_centres(point_HTD, 32)
    first = torch.nn.functional.normalize(point_HTD[:, torch.arange(32) * point_HTD.shape[1] // 32], dim=2)
    near, far = ((point_HTD @ centre_HLD.transpose(1, 2)).amax(2).mean() for centre_HLD in (last, first))
    assert near > 1.1 * far


def test_a_query_compares_all_keys_of_the_lists_it_reads_and_no_other():
    given = past()
    index = CASES["ivf"].build(given)
    query_HGD = given.asked().double()
    score_HGL = query_HGD @ index.centre_HLD.double().transpose(1, 2)
    probed_HGR = score_HGL.topk(4, 2).indices
    found = positions(index.search(given.asked(), 60, "per_query_head", given.keys).position_HGK)
    for head in range(HEADS):
        for group in range(GROUP):
            read = torch.isin(index.list_HT[head].long(), probed_HGR[head, group]).nonzero().squeeze(1)
            listed = index.candidates(given.asked())[head, group]
            assert sorted(listed[listed >= 0].tolist()) == read.tolist()
            logit = given.key_HTD[head, FIRST + read].double() @ query_HGD[head, group]
            assert found[head * GROUP + group] == set((read[logit.topk(min(60, len(read))).indices] + FIRST).tolist())


def test_more_lists_than_keys_leave_lists_empty_and_nothing_else():
    given = past()
    index = index_kind("ivf").build(0, given.prompt(0, 100), {"lists": 400, "probe": 30})
    assert len(index.list_HT.unique()) <= 100
    found = positions(index.search(given.asked(), 10, "per_query_head", given.keys).position_HGK)
    assert all(len(row) == 10 for row in found)


# --- hnsw ------------------------------------------------------------------------------------------------------------------------------


@NEEDS_HNSWLIB
def test_a_wide_search_of_a_graph_is_exact():
    given = past()
    index = index_kind("hnsw").build(FIRST, given.prompt(FIRST, 800 + FIRST), {"m": 32, "ef": 900})
    grow(index, given, 1024 + FIRST)
    logit_HGT = given.asked().double() @ given.key_HTD[:, FIRST : 1024 + FIRST].double().transpose(1, 2)
    found = index.search(given.asked(), 50, "per_query_head", given.keys).position_HGK
    best = (logit_HGT.topk(50, 2).indices + FIRST).flatten(0, 1).tolist()
    hits = [len(row & set(expected)) for row, expected in zip(positions(found), best, strict=True)]
    assert sum(hits) > 0.97 * 50 * len(hits)


@NEEDS_HNSWLIB
def test_keys_with_a_large_mean_are_found_because_they_are_centred():
    given = past()
    direction_HD = torch.nn.functional.normalize(torch.randn(HEADS, DIM, generator=torch.Generator().manual_seed(3)), dim=1)
    given.key_HTD += 30 * direction_HD[:, None] * (1 + 0.1 * torch.randn(HEADS, 1200, 1, generator=torch.Generator().manual_seed(4)))
    recalls = []
    for centred in (True, False):
        index = index_kind("hnsw").build(0, given.prompt(0, 1024), {"m": 8, "ef": 64, "centred": centred})
        hits = 0
        for number in range(10):
            query_HGD = given.asked(number)
            query_HGD = query_HGD - (query_HGD * direction_HD[:, None]).sum(2, keepdim=True) * direction_HD[:, None]
            best = (query_HGD @ given.key_HTD[:, :1024].transpose(1, 2)).topk(30, 2).indices.flatten(0, 1).tolist()
            found = positions(index.search(query_HGD, 60, "per_query_head", given.keys).position_HGK)
            hits += sum(len(row & set(expected)) for row, expected in zip(found, best, strict=True))
        recalls.append(hits / (10 * HEADS * GROUP * 30))
    assert recalls[0] > 0.9 and recalls[1] < 0.7


def test_a_graph_that_reaches_fewer_keys_says_which():
    class Graph:
        def knn_query(self, data, k, num_threads):
            if k > 13:
                raise RuntimeError("Cannot return the results in a contiguous 2D array. Probably ef or M is too small")
            return np.arange(k, dtype="uint64")[None], np.zeros((1, k))

    assert _asked(Graph(), np.zeros(4), 50).tolist() == list(range(13))
    assert _asked(Graph(), np.zeros(4), 8).tolist() == list(range(8))


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "hnswlib", None)
    told = "needs the library hnswlib, which is not installed.\\n  Install the extra: pip install 'kvcompile\\[hnsw\\]'"
    with pytest.raises(SpecError, match=f"zones\\[1\\].top_k.index: the index hnsw {told}"):
        load_spec(
            {
                "kvcompile": 1,
                "policies": {
                    "a": {"zones": [{"sink_recent": {"sink_tokens": 4, "recent_tokens": 8}}, {"top_k": {"k": 9, "index": "hnsw"}}]}
                },
                "heads": [{"policy": "a"}],
            }
        )
    with pytest.raises(TargetError, match=f"index hnsw: the index hnsw {told}"):
        index_kind("hnsw").build(0, past().prompt(0, 64), {})
    with pytest.raises(TargetError, match="hnswlib"):
        index_kind("hnsw").restore({}, {})


# --- clusters --------------------------------------------------------------------------------------------------------------------------


def members(index: KeyIndex, head: int) -> list[list[int]]:
    """The positions in each cluster of a KV head."""
    parts = index.order_HT[head].split(index.size_HN[head].tolist())
    return [[index.first + place for place in part.tolist()] for part in parts]


def by_definition(given: Past, index: KeyIndex, query_GD: Tensor, head: int, exact: int, estimated: int) -> tuple[set[int], Tensor, Tensor]:
    """Positions read, and out [G, E] and lse [G] of what is estimated: in float64, from the clusters' keys alone."""
    clusters = members(index, head)
    key_TD, value_TE = given.key_HTD[head].double(), given.value_HTE[head].double()
    centre_ND, mean_NE = (torch.stack([each[part].mean(0) for part in clusters]) for each in (key_TD, value_TE))
    logit_GN = query_GD.double() @ centre_ND.T
    ranked = torch.softmax(logit_GN, 1).sum(0).argsort(descending=True).tolist()
    read = {position for each in ranked[:exact] for position in clusters[each]}
    beside = ranked[exact : exact + estimated]
    size_N = torch.tensor([len(part) for part in clusters]).double()
    weight_GM = size_N[beside] * torch.exp(logit_GN[:, beside])
    return read, weight_GM @ mean_NE[beside] / weight_GM.sum(1, keepdim=True), weight_GM.sum(1).log()


def test_clusters_are_read_estimated_and_left_out_as_published():
    given = past()
    index = CASES["clusters"].build(given)
    assert (index.size_HN > 0).all() and index.size_HN.shape == (HEADS, 64)
    found = index.search(given.asked(), 160, "sum", given.keys)
    rest = index.rest(given.asked(), found, NOTHING)
    rows = positions(found.position_HGK)
    for head in range(HEADS):
        read, out_GE, lse_G = by_definition(given, index, given.asked()[head], head, 10, 16)
        assert rows[head * GROUP : (head + 1) * GROUP] == [read] * GROUP
        torch.testing.assert_close(rest.out[head].double(), out_GE, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(rest.lse[head].double(), lse_G, rtol=1e-5, atol=1e-5)


def test_an_estimate_is_never_more_than_the_keys_weigh():
    given = past()
    index = index_kind("clusters").build(FIRST, given.prompt(FIRST, 1024 + FIRST), {"estimate": 1.0})
    for number in range(10):
        query_HGD = 4 * given.asked(number)
        found = index.search(query_HGD, 32, "sum", given.keys)
        rest = index.rest(query_HGD, found, NOTHING)
        logit_HGT = query_HGD.double() @ given.key_HTD[:, FIRST : 1024 + FIRST].double().transpose(1, 2)
        read_HGK = torch.where(found.position_HGK >= 0, found.position_HGK - FIRST, 1024)
        read_HGT = torch.zeros(HEADS, GROUP, 1025, dtype=torch.bool).scatter_(2, read_HGK, True)[..., :1024]
        assert (rest.lse <= logit_HGT.masked_fill(read_HGT, -torch.inf).logsumexp(2) + 1e-5).all()


def test_the_estimate_lowers_the_error():
    given = past()
    index = CASES["clusters"].build(given)
    errors = []
    for number in range(10):
        query_HGD = given.asked(number)
        found = index.search(query_HGD, 64, "sum", given.keys)
        rest = index.rest(query_HGD, found, NOTHING)
        key_HTD, value_HTE = (each[:, FIRST : 1024 + FIRST].double() for each in (given.key_HTD, given.value_HTE))
        logit_HGT = query_HGD.double() @ key_HTD.transpose(1, 2)
        read_HGK = torch.where(found.position_HGK >= 0, found.position_HGK - FIRST, 1024)
        read_HGT = torch.zeros(HEADS, GROUP, 1025, dtype=torch.bool).scatter_(2, read_HGK, True)[..., :1024]
        read = AttentionState(
            torch.softmax(logit_HGT.masked_fill(~read_HGT, -torch.inf), 2) @ value_HTE,
            logit_HGT.masked_fill(~read_HGT, -torch.inf).logsumexp(2),
        )
        expected = torch.softmax(logit_HGT, 2) @ value_HTE
        both = merge_states(read, AttentionState(rest.out.double(), rest.lse.double()))
        errors.append([float((each.out - expected).norm() / expected.norm()) for each in (both, read)])
    with_it, without = torch.tensor(errors).mean(0)
    assert with_it < 0.6 * without


@pytest.mark.parametrize("tokens", [0, 1, 5, 64])
def test_where_all_is_read_nothing_is_estimated(tokens):
    given = past()
    for estimate in (0.0, 0.3, 1.0):
        index = index_kind("clusters").build(FIRST, given.prompt(FIRST, FIRST + tokens), {"estimate": estimate})
        rest = index.rest(given.asked(), index.search(given.asked(), max(1, tokens), "sum", given.keys), NOTHING)
        assert (rest.lse == -torch.inf).all() and (rest.out == 0).all() and rest.out.shape == (HEADS, GROUP, VALUE_DIM)


def test_added_tokens_wait_and_become_clusters_together():
    given = past(3000)
    index = CASES["clusters"].build(given, FIRST, 512 + FIRST)
    grow(index, given, 512 + 992 + FIRST)
    waiting = set(range(512 + FIRST, 512 + 992 + FIRST))
    found = index.search(given.asked(), 64, "sum", given.keys).position_HGK
    assert all(waiting <= row for row in positions(found)) and index.size_HN.shape[1] == 32
    child = index.fork()
    grow(index, given, 512 + 2080 + FIRST)
    later = index.search(given.asked(), 64, "sum", given.keys).position_HGK
    assert all(len(row) < 512 for row in positions(later)) and index.size_HN.shape[1] == 32 + 128
    covered = sorted(position for part in members(index, 0) for position in part)
    assert covered == list(range(FIRST, 512 + 2048 + FIRST))
    facts = index_facts("clusters").bytes_per_token(DIM, VALUE_DIM, 4, {"tokens_per_cluster": 16, "estimate": 0.25})
    assert index.nbytes() == HEADS * (512 + 2048) * facts.held
    assert index.scanned_bytes(tail=True, k=64) == HEADS * (512 + 2048) * (facts.searched + facts.estimated)
    index.rollback(512 + 992 + FIRST)
    assert torch.equal(index.search(given.asked(), 64, "sum", given.keys).position_HGK, found)
    for each in (index, child):
        grow(each, given, 512 + 2080 + FIRST, step=96)
        assert torch.equal(each.search(given.asked(), 64, "sum", given.keys).position_HGK, later)


def test_long_pasts_are_clustered_in_segments(monkeypatch):
    monkeypatch.setattr(clusters, "SEGMENT_TOKENS", 300)
    given = past()
    index = CASES["clusters"].build(given)
    assert index.size_HN.shape == (HEADS, 64) and (index.size_HN.sum(1) == 1024).all()
    for head in range(HEADS):  # a key may join a cluster of another segment
        part_of = {position: number for number, part in enumerate(members(index, head)) for position in part}
        assert any(abs(part_of[FIRST + place] // 21 - place // 341) >= 1 for place in range(1024))
    one = by_definition(given, index, given.asked()[0], 0, 10, 16)[0]
    assert positions(index.search(given.asked(), 160, "sum", given.keys).position_HGK)[0] == one


@pytest.mark.parametrize("name", ["mean", "clusters"])
def test_a_soft_cap_joins_what_the_group_adds_up(name):
    """Of logits far above the cap all weigh the same: the sums differ from those without it."""
    given = past()
    options = {"page_tokens": 16} if name == "mean" else {"estimate": 1.0}
    prompt = dataclasses.replace(given.prompt(FIRST, 1024 + FIRST), soft_cap=2.0)
    index = index_kind(name).build(FIRST, prompt, options)
    query_HGD = 3 * given.asked()
    score_HGN = index.page_scores(query_HGD) if name == "mean" else index.scores(query_HGD)
    vector_HND = index.digest_HNVD[:, :, 0] if name == "mean" else index.centre_HND
    raw_HGN = query_HGD.double() @ vector_HND.double().transpose(1, 2)
    torch.testing.assert_close(score_HGN.double(), 2 * torch.tanh(raw_HGN / 2), rtol=1e-4, atol=1e-4)
    if name == "clusters":
        found = index.search(query_HGD, 16, "sum", given.keys)
        weight_HGN = index.size_HN[:, None] * torch.exp(score_HGN.double())
        best_HN = torch.softmax(score_HGN.double(), 2).sum(1).argmax(1)
        left_HG = weight_HGN.sum(2) - weight_HGN.gather(2, best_HN[:, None, None].expand(-1, GROUP, 1)).squeeze(2)
        torch.testing.assert_close(index.rest(query_HGD, found, NOTHING).lse.double(), left_HG.log(), rtol=1e-4, atol=1e-4)
