"""Indexes: what they find is held against a plain scan in float64, what they estimate against the attention itself."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from kvcompile.ir.errors import SessionError
from kvcompile.ir.indexes import BLOCK_TOKENS, SKETCH, index_facts, index_names
from kvcompile.runtime.indexes import registry
from kvcompile.runtime.indexes.balanced import balanced_order
from kvcompile.runtime.indexes.index import KeyIndex, Prompt, RecentQueries
from kvcompile.runtime.indexes.registry import index_kind, load_index, save_index
from kvcompile.runtime.indexes.select import select_keys
from kvcompile.runtime.indexes.sketch import SketchIndex, build_sketch
from kvcompile.runtime.indexes.sketch_basis import key_weights
from kvcompile.runtime.indexes.sketch_codes import pack, unpack
from kvcompile.runtime.indexes.sketch_gaps import Gap, guess_gap, low_runs, near_runs
from kvcompile.runtime.spans import Span

HEADS, GROUP = 2, 3
K = 20  # keys that an index is made for


@dataclasses.dataclass
class Past:
    """Keys, values and queries with directions that matter: queries look along few of the keys' dimensions."""

    key_HTD: Tensor
    value_HTE: Tensor
    query_HND: Tensor

    def span(self, first: int = 0) -> Span:
        return Span(first, self.key_HTD, self.value_HTE)

    def keys(self, first: int, end: int) -> list[Span]:
        return [self.span().between(first, end)]

    def prompt(self, first: int, end: int, queries: int | None = None) -> Prompt:
        asked_HND = self.query_HND[:, :queries]
        gram_HDD = asked_HND.transpose(1, 2) @ asked_HND
        return Prompt(
            self.key_HTD[:, first:end],
            self.value_HTE[:, first:end],
            gram_HDD,
            asked_HND.shape[1],
            RecentQueries(asked_HND[:, -64:], torch.full((len(asked_HND[0, -64:]),), 1 << 20)),
            GROUP,
            K,
        )


def past(tokens: int = 1024, dim: int = 64, seed: int = 0) -> Past:
    generator = torch.Generator().manual_seed(seed)
    mix_HDD = torch.randn(HEADS, dim, dim, generator=generator) * torch.logspace(0, -2, dim)[:, None]
    topics_HCD = torch.randn(HEADS, 24, dim, generator=generator) @ mix_HDD
    which_HT = torch.randint(24, (HEADS, tokens), generator=generator)
    noise_HTD = 0.4 * torch.randn(HEADS, tokens, dim, generator=generator) @ mix_HDD
    key_HTD = topics_HCD.gather(1, which_HT[..., None].expand(-1, -1, dim)) + noise_HTD + 3.0
    value_topics_HCE = torch.randn(HEADS, 24, dim, generator=generator)
    value_HTE = value_topics_HCE.gather(1, which_HT[..., None].expand(-1, -1, dim)) + 0.3 * torch.randn(
        HEADS, tokens, dim, generator=generator
    )
    query_HND = torch.randn(HEADS, 600, dim, generator=generator) @ mix_HDD / dim**0.5
    return Past(key_HTD, value_HTE, query_HND)


def attention(query_HGD: Tensor, key_HTD: Tensor, value_HTE: Tensor) -> tuple[Tensor, Tensor]:
    logit_HGT = query_HGD.double() @ key_HTD.double().transpose(1, 2)
    return torch.softmax(logit_HGT, 2) @ value_HTE.double(), logit_HGT.logsumexp(2)


# --- selection -----------------------------------------------------------------------------------------------------------------------


def test_each_query_head_chooses_its_own():
    score_HGT = torch.tensor([[[5.0, 1.0, 4.0, 0.0], [0.0, 3.0, 2.0, 9.0]]])
    assert select_keys(score_HGT, 2, "per_query_head").tolist() == [[[0, 2], [1, 3]]]


def test_the_union_is_shared_and_rows_that_find_fewer_end_in_minus_one():
    score_HGT = torch.tensor([[[5.0, 1.0, 4.0, 0.0], [5.0, 3.0, 4.0, 1.0]], [[5.0, 1.0, 4.0, 0.0], [0.0, 3.0, 2.0, 9.0]]])
    assert select_keys(score_HGT, 2, "union").tolist() == [[[0, 2, -1, -1]] * 2, [[0, 1, 2, 3]] * 2]


@pytest.mark.parametrize("select", ["sum", "max"])
def test_sum_and_max_choose_by_weight_not_by_logit(select):
    score_HGT = torch.tensor([[[100.0, 99.0, 98.0, 0.0], [0.0, 0.0, 0.0, 2.0]]])  # the first head's logits are all large
    chosen = select_keys(score_HGT, 2, select)
    assert chosen.tolist() == [[[0, 3], [0, 3]]]


def test_of_equal_keys_the_earlier_is_chosen():
    assert select_keys(torch.zeros(1, 1, 9), 3, "per_query_head").tolist() == [[[0, 1, 2]]]


@pytest.mark.parametrize("select", ["per_query_head", "union", "sum", "max"])
def test_more_than_there_are_is_all(select):
    assert select_keys(torch.randn(1, 2, 5), 7, select).tolist() == [[[0, 1, 2, 3, 4]] * 2]


# --- balanced runs -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 2, 3, 5, 8, 33])
def test_every_point_stands_once_in_the_order(blocks):
    points_HTD = torch.randn(2, blocks * BLOCK_TOKENS, 5, generator=torch.Generator().manual_seed(1))
    order_HT = balanced_order(points_HTD)
    assert torch.equal(order_HT.sort(1).values, torch.arange(blocks * BLOCK_TOKENS).expand(2, -1))


def test_runs_are_closer_together_than_positions_are():
    given = past()
    order_HT = balanced_order(given.key_HTD)
    ordered_HTD = given.key_HTD.gather(1, order_HT[..., None].expand_as(given.key_HTD))
    within = [each.unflatten(1, (-1, BLOCK_TOKENS)).var(2).sum() for each in (ordered_HTD, given.key_HTD)]
    assert within[0] < 0.6 * within[1]


# --- codes ---------------------------------------------------------------------------------------------------------------------------


def test_codes_are_unpacked_as_they_were_packed():
    generator = torch.Generator().manual_seed(0)
    fine_H = torch.tensor([0, 1, 3])
    is_fine = torch.arange(3) < fine_H[:, None]
    level_HTUC = torch.randint(4, (3, 64, 3, 16), generator=generator)
    fine_HTUC = torch.randint(16, (3, 64, 3, 16), generator=generator) * (torch.arange(16) < 8)
    level_HTC = torch.where(is_fine[:, None, :, None], fine_HTUC, level_HTUC).flatten(2).to(torch.uint8)
    codes = pack(level_HTC, fine_H)
    assert codes.shape == (3, 4, 3, 64)
    assert torch.equal(unpack(codes, fine_H), level_HTC)


# --- what is found and estimated -----------------------------------------------------------------------------------------------------


def test_flat_finds_the_best_keys():
    given = past()
    index = index_kind("flat").build(64, given.prompt(64, 960), {})
    query_HGD = given.query_HND[:, :GROUP]
    found = index.search(query_HGD, 20, "per_query_head", given.keys)
    logit_HGT = query_HGD.double() @ given.key_HTD[:, 64:960].double().transpose(1, 2)
    assert torch.equal(found.position_HGK, logit_HGT.topk(20, 2).indices.sort(2).values + 64)


def sketch(given: Past, first: int, end: int, **other: float) -> SketchIndex:
    prompt, dim = given.prompt(first, end), given.key_HTD.shape[2]
    return build_sketch(first, prompt, SKETCH.units(dim, other), SKETCH.run_units(dim, other), SKETCH.scanned(other))


@pytest.mark.parametrize(("scanned", "least"), [(0.25, 0.75), (1.0, 0.9)])
@pytest.mark.parametrize("dim", [16, 64, 80, 96, 128, 256])
def test_a_sketch_finds_what_matters(dim, scanned, least):
    given = past(dim=dim)
    index = sketch(given, 64, 960, scanned=scanned)
    query_HGD = given.query_HND[:, 500 : 500 + GROUP]
    found_HGK = index.search(query_HGD, 200, "per_query_head", given.keys).position_HGK
    best_HGK = (query_HGD @ given.key_HTD[:, 64:960].transpose(1, 2)).topk(50, 2).indices + 64
    recall = (best_HGK[..., None] == found_HGK[..., None, :]).any(3).float().mean()
    assert recall > least


@pytest.mark.parametrize(("scanned", "most"), [(0.25, 0.35), (1.0, 0.25)])
def test_what_is_found_and_the_estimate_of_the_rest_are_nearly_the_attention(scanned, most):
    given = past()
    given.query_HND /= 8  # flat: most of the weight is not read
    index = sketch(given, 0, 1024, scanned=scanned)
    query_HGD = given.query_HND[:, 500 : 500 + GROUP]
    found = index.search(query_HGD, 20, "union", given.keys)
    expected, expected_lse = attention(query_HGD, given.key_HTD, given.value_HTE)
    seen_HT = torch.zeros(HEADS, 1025, dtype=torch.bool).scatter_(1, found.position_HGK[:, 0] % 1025, True)[:, :1024]
    logit_HGT = (query_HGD.double() @ given.key_HTD.double().transpose(1, 2)).masked_fill(~seen_HT[:, None], -torch.inf)
    rest = index.rest(query_HGD, found, logit_HGT.logsumexp(2).float())
    lse_HG = torch.logaddexp(logit_HGT.logsumexp(2), rest.lse.double())
    out = torch.exp(logit_HGT - lse_HG[..., None]) @ given.value_HTE.double() + torch.exp(rest.lse - lse_HG)[..., None] * rest.out
    without = torch.softmax(logit_HGT, 2) @ given.value_HTE.double()
    error, error_without = ((each - expected).norm(dim=2).mean() / expected.norm(dim=2).mean() for each in (out, without))
    assert error < most * error_without
    assert (lse_HG - expected_lse).abs().max() < 0.2  # as measured: the estimate is no bound


def test_the_estimate_of_nothing_is_empty():
    given = past()
    index = sketch(given, 0, 512)
    query_HGD = given.query_HND[:, :GROUP]
    rest = index.rest(query_HGD, index.search(query_HGD, 512, "union", given.keys), torch.zeros(HEADS, GROUP))
    assert (rest.lse == -torch.inf).all() and (rest.out == 0).all()


def test_a_bias_that_was_not_measured_is_zero():
    given = past()
    prompt = dataclasses.replace(given.prompt(0, 512), recent=RecentQueries(torch.zeros(HEADS, 0, 64), torch.zeros(0, dtype=torch.int64)))
    index = build_sketch(0, prompt, 2, 2, 0.25)
    assert (index.gaps_HN == 0).all() and (index.centres.bias_HR == 0).all()


def test_few_queries_are_said_and_still_serve():
    given = past()
    few = build_sketch(0, given.prompt(0, 1024, queries=5), 2, 2, 0.25)
    assert "5 queries" in few.notes[0]
    assert not sketch(given, 0, 1024).notes
    none = build_sketch(0, given.prompt(0, 1024, queries=0), 2, 2, 0.25)
    query_HGD = given.query_HND[:, 500 : 500 + GROUP]
    best_HGK = (query_HGD @ given.key_HTD.transpose(1, 2)).topk(20, 2).indices
    for index in (few, none):
        found_HGK = index.search(query_HGD, 200, "per_query_head", given.keys).position_HGK
        assert (best_HGK[..., None] == found_HGK[..., None, :]).any(3).float().mean() > 0.7


def test_equal_keys_and_no_value_give_finite_numbers():
    prompt = Prompt(
        torch.ones(1, 64, 16),
        torch.zeros(1, 64, 16),
        torch.zeros(1, 16, 16),
        0,
        RecentQueries(torch.ones(1, 4, 16), torch.full((4,), 99)),
        2,
        3,
    )
    index = build_sketch(0, prompt, 1, 1, 0.25)
    query_HGD = torch.randn(1, 2, 16)
    found = index.search(query_HGD, 3, "union", lambda first, end: ())
    rest = index.rest(query_HGD, found, torch.zeros(1, 2))
    assert rest.out.isfinite().all() and rest.lse.isfinite().all()


# --- growth ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flat", "sketch"])
def test_added_keys_are_found_and_taken_back(name):
    given = past()
    index = index_kind(name).build(64, given.prompt(64, 576), {})
    before = index.search(given.query_HND[:, :GROUP], 30, "union", given.keys)
    child = index.fork()
    for at in range(576, 832, 64):
        index.add(given.key_HTD[:, at : at + 64], given.value_HTE[:, at : at + 64])
    assert (index.first, index.end, child.end) == (64, 832, 576)
    centred_HTD = given.key_HTD - given.key_HTD[:, 64:576].mean(1, keepdim=True)
    query_HGD = 40 * centred_HTD[:, 800:801] / centred_HTD[:, 800:801].square().sum(2, keepdim=True)  # looks for one of the new keys
    assert (index.search(query_HGD.expand(-1, GROUP, -1), 40, "union", given.keys).position_HGK == 800).any(2).all()
    index.rollback(576)
    assert index.end == 576
    for each in (index, child):
        after = each.search(given.query_HND[:, :GROUP], 30, "union", given.keys)
        assert torch.equal(after.position_HGK, before.position_HGK)


def test_a_sketch_keeps_what_it_was_made_from():
    given = past()
    index = sketch(given, 0, 512)
    index.rollback(480)
    assert index.end == 512
    for first, end in ((512, 544), (544, 768), (768, 800)):
        index.add(given.key_HTD[:, first:end], given.value_HTE[:, first:end])
    query_HGD = given.query_HND[:, :GROUP]
    index.rollback(768)
    assert index.end == 768
    index.rollback(700)  # into a batch whose order forgot which came last
    assert index.end == 544
    fresh = sketch(given, 0, 512)
    fresh.add(given.key_HTD[:, 512:544], given.value_HTE[:, 512:544])
    assert torch.equal(index.scores(query_HGD, K), fresh.scores(query_HGD, K))
    index.rollback(480)
    assert index.end == 512


def test_what_is_learnt_of_a_key_comes_from_later_queries():
    given = past()
    early = RecentQueries(given.query_HND[:, 500:564], torch.full((64,), 700))
    changed = dataclasses.replace(given, key_HTD=given.key_HTD.clone())
    changed.key_HTD[:, 701:] *= 7
    weights = [key_weights(each.key_HTD, torch.arange(1024), early) for each in (given, changed)]
    assert torch.equal(weights[0][:, :701], weights[1][:, :701])


def test_added_one_block_at_a_time_or_all_the_same_keys_are_covered():
    given = past()
    one = sketch(given, 0, 512)
    one.add(given.key_HTD[:, 512:544], given.value_HTE[:, 512:544])
    one.add(given.key_HTD[:, 544:576], given.value_HTE[:, 544:576])
    both = sketch(given, 0, 512)
    both.add(given.key_HTD[:, 512:576], given.value_HTE[:, 512:576])
    query_HGD = given.query_HND[:, :GROUP]
    torch.testing.assert_close(one.scores(query_HGD, K), both.scores(query_HGD, K))


def test_queries_that_drift_are_noticed():
    given, other = past(), past(seed=9)
    index = sketch(given, 0, 1024)
    behind = torch.full((64,), 2000)
    assert index.recalibrate(RecentQueries(given.query_HND[:, 500:564], behind), given.keys, K)
    for _ in range(2):  # again: it is held against the prompt's queries, not against the last ones
        assert not index.recalibrate(RecentQueries(20 * other.query_HND[:, :64], behind), given.keys, K)


# --- files -----------------------------------------------------------------------------------------------------------------------------


def indexes() -> list[tuple[str, KeyIndex]]:
    given = past()
    grown = sketch(given, 0, 512)
    grown.add(given.key_HTD[:, 512:544], given.value_HTE[:, 512:544])
    return [("flat", index_kind("flat").build(0, given.prompt(0, 512), {})), ("sketch", sketch(given, 0, 512)), ("sketch", grown)]


@pytest.mark.parametrize("case", range(3))
def test_a_file_holds_an_equal_index(case, tmp_path):
    name, index = indexes()[case]
    save_index(tmp_path / "index", name, index)
    loaded = load_index(tmp_path / "index")
    given = past()
    query_HGD = given.query_HND[:, :GROUP]
    first, second = (each.search(query_HGD, 25, "union", given.keys) for each in (index, loaded))
    assert torch.equal(first.position_HGK, second.position_HGK)
    assert (loaded.first, loaded.end, loaded.nbytes(), loaded.notes) == (index.first, index.end, index.nbytes(), index.notes)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_an_index_of_a_kind_that_is_not_installed_is_named(tmp_path, monkeypatch):
    _, index = indexes()[1]
    with monkeypatch.context() as patch:  # there it was
        patch.setattr(registry, "index_kind", lambda _: index_kind("flat"))
        save_index(tmp_path / "index", "elsewhere", index)
    with pytest.raises(SessionError, match=r"holds an index of a kind that is not installed .*elsewhere.*sketch.*\n  Install the package"):
        load_index(tmp_path / "index")


# --- names -----------------------------------------------------------------------------------------------------------------------------


def test_others_indexes_come_by_entry_points(monkeypatch):
    class Point:
        name, value = "mine", "package:kind"

        def load(self):
            return index_kind("flat")

    def points(group, name=None):
        return [Point()] if name in (None, "mine") else []

    monkeypatch.setattr("importlib.metadata.entry_points", points)
    assert "mine" in index_names()
    assert index_facts("mine") is index_kind("mine") is index_kind("flat")
    with pytest.raises(LookupError):
        index_facts("yours")


def test_bytes_are_what_the_plan_counts():
    given = past(dim=64)
    index = sketch(given, 0, 512)
    counted = SKETCH.bytes_per_token(64, 64, 2, {})
    fewer = 64 - index.basis.key_HDC.shape[2]  # coordinates that the plan counts and this prompt has no use for
    fixed = counted.search_fixed - 4 * 32 * fewer
    assert index.scanned_bytes(False, K) == HEADS * (512 * counted.searched + fixed)
    assert index.scanned_bytes(True, K) == HEADS * (512 * (counted.searched + counted.estimated) + fixed)
    assert index.nbytes() == HEADS * (512 * counted.held + SKETCH.fixed_bytes(64, 64, {}) - 4 * (64 + 24 + 32) * fewer)


# --- the estimate, by its definition -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("added", [0, 64])
def test_the_rest_is_what_its_definition_says(added):
    """One query at a time, in float64, from the index's own numbers."""
    given = past(1600)
    index = sketch(given, 0, 1280)
    if added:
        index.add(given.key_HTD[:, 1280 : 1280 + added], given.value_HTE[:, 1280 : 1280 + added])
    query_HGD = given.query_HND[:, :GROUP]
    found = index.search(query_HGD, K, "per_query_head", given.keys)
    read_lse_HG = torch.randn(HEADS, GROUP)
    rest = index.rest(query_HGD, found, read_lse_HG)
    ranked = index.rank(query_HGD, K)
    near = near_runs(40, 0.25, K)
    assert near == 10 and (ranked.near_HR.sum(1) == near).all() and (ranked.low_HR.sum(1) == low_runs(near)).all()
    for head in range(HEADS):
        gaps_1N = index.gaps_HN[head : head + 1]
        rows = torch.cat([part.position_HT[head] for part in index.parts]).unflatten(0, (-1, BLOCK_TOKENS))
        means = torch.cat([part.mean_HRE[head].double() * part.mean_scale_HR[head][:, None] for part in index.parts])
        together = index.centres.mean_HSE[head].double() * index.centres.mean_scale_HS[head][:, None]
        low = rows[:40][ranked.low_HR[head]].flatten().long()
        for query in range(GROUP):
            score_T, run_R = found.score_HGT[head, query].double(), ranked.score_HGR[head, query].double()
            chosen_K = found.position_HGK[head, query]
            x = read_lse_HG[head, query] - score_T[chosen_K].logsumexp(0)
            gap = guess_gap(gaps_1N, Gap.NEAR_MEAN, x.float().view(1, 1)).item()
            terms = []  # (logit, value)
            for run, positions in enumerate(rows.tolist()):
                if run >= 40 or ranked.near_HR[head, run]:
                    terms += [(score_T[at] + gap, means[run]) for at in positions if at not in chosen_K]
            x = score_T[low].logsumexp(0) + gaps_1N[0, Gap.NEAR_MEAN] - run_R[ranked.low_HR[head]].logsumexp(0)
            gap = guess_gap(gaps_1N, Gap.FAR_MEAN, x.float().view(1, 1)).item()
            terms += [(run_R[run] + gap, together[run // 16]) for run in range(40) if not ranked.near_HR[head, run]]
            logits, values = torch.stack([logit for logit, _ in terms]), torch.stack([value for _, value in terms])
            torch.testing.assert_close(rest.lse[head, query].double(), logits.logsumexp(0), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(rest.out[head, query].double(), torch.softmax(logits, 0) @ values, rtol=1e-4, atol=1e-5)


def test_runs_that_are_not_looked_at_hold_no_chosen_key():
    given = past()
    index = sketch(given, 0, 1024)
    query_HGD = given.query_HND[:, :GROUP]
    found = index.search(query_HGD, K, "union", given.keys)
    looked_HT = (found.score_HGT > -torch.inf)[:, 0]
    assert (looked_HT.sum(1) == 8 * BLOCK_TOKENS).all()
    assert all(looked_HT[head, at] for head in range(HEADS) for at in found.position_HGK[head, 0].tolist() if at >= 0)
    everything = sketch(given, 0, 1024, scanned=1.0)
    assert (everything.search(query_HGD, K, "union", given.keys).score_HGT > -torch.inf).all()


def test_what_is_learnt_of_runs_comes_from_later_queries():
    """TRAPS 22: a query is asked only about keys before it."""
    given = past()
    changed = dataclasses.replace(given, key_HTD=given.key_HTD.clone())
    changed.key_HTD[:, 901:] *= 7
    index = sketch(given, 0, 1024)
    recent = RecentQueries(given.query_HND[:, 500:564], torch.full((64,), 900))
    index.calibrate(recent, given.key_HTD)
    gaps_HN, bias_HR = index.gaps_HN, index.centres.bias_HR
    index.calibrate(recent, changed.key_HTD)
    assert torch.equal(index.gaps_HN, gaps_HN) and torch.equal(index.centres.bias_HR, bias_HR)
