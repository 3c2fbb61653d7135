"""The graph over keys: what its walks find is held against a plain scan, what it is made of against the rules it was made by.

Queries lie elsewhere than keys (out of distribution), in directions that few of the keys' dimensions show.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from kvcompile.codegen.toolchain import Isa, find_toolchain, machine_isa
from kvcompile.ir.errors import SessionError, TargetError
from kvcompile.ir.graph_facts import ROARGRAPH
from kvcompile.ir.indexes import sample_bytes, training_stride
from kvcompile.link import build_graphs
from kvcompile.runtime import native_graph
from kvcompile.runtime.indexes.index import Prompt, RecentQueries
from kvcompile.runtime.indexes.registry import index_kind, load_index, save_index
from kvcompile.runtime.indexes.roargraph import RoarGraphIndex
from kvcompile.runtime.query_sample import QuerySample
from kvcompile.runtime.spans import Span

HEADS, GROUP = 2, 3
ISAS: tuple[Isa, ...] = ("portable", "avx2", "avx512")


def use(isa: Isa) -> None:
    toolchain = find_toolchain()
    assert toolchain is not None
    build_graphs(isa, toolchain)


@pytest.fixture(autouse=True)
def _library() -> None:
    use(machine_isa())


@dataclasses.dataclass
class Past:
    key_HTD: Tensor
    query_HGTD: Tensor  # a query of every query head at every position, scaled

    def keys(self, first: int, end: int) -> list[Span]:
        """In two spans, as of a store that was forked: rows of the second lie in a wider table."""
        half = (first + end) // 2
        wide_HTD = torch.zeros(*self.key_HTD.shape[:2], self.key_HTD.shape[2] + 5, dtype=self.key_HTD.dtype)
        wide_HTD[..., : self.key_HTD.shape[2]] = self.key_HTD
        second_HTD = wide_HTD[..., : self.key_HTD.shape[2]]
        spans = [Span(0, self.key_HTD, self.key_HTD).between(first, half), Span(0, second_HTD, second_HTD).between(half, end)]
        return [span for span in spans if span.tokens]

    def prompt(self, first: int, end: int, asked: Tensor | None = None) -> Prompt:
        """asked: positions of training queries; every fourth one before `end` unless given."""
        position_C = torch.arange(0, end, 4) if asked is None else asked
        query_HCD = self.query_HGTD[:, :, position_C].flatten(1, 2)
        training = RecentQueries(query_HCD, position_C.repeat(GROUP))
        none = RecentQueries(query_HCD[:, :0], position_C[:0])
        key_HTD = self.key_HTD[:, first:end]
        return Prompt(key_HTD, key_HTD, torch.zeros(HEADS, 1, 1), 0, none, GROUP, 20, None, training)


def past(tokens: int = 1024, dim: int = 48, dtype: torch.dtype = torch.float32, seed: int = 0) -> Past:
    generator = torch.Generator().manual_seed(seed)
    key_HTD = torch.randn(HEADS, tokens, dim, generator=generator) * torch.logspace(0, -1, dim) + 2.0
    look_DD = (
        torch.randn(dim, dim, generator=generator)
        * torch.logspace(-1.5, 0, dim)[:, None]
        @ torch.eye(dim)[:, : dim // 4].repeat(1, 5)[:, :dim]
    )
    query_HGTD = torch.randn(HEADS, GROUP, tokens, dim, generator=generator) @ look_DD.T
    return Past(key_HTD.to(dtype), query_HGTD)


def build(given: Past, first: int, end: int, asked: Tensor | None = None, **options: Any) -> RoarGraphIndex:
    return index_kind("roargraph").build(first, given.prompt(first, end, asked), options)  # type: ignore[return-value]


def recall(index: RoarGraphIndex, given: Past, k: int, positions: range) -> float:
    shares = []
    for position in positions:
        query_HGD = given.query_HGTD[:, :, position]
        found_HGK = index.search(query_HGD, k, "per_query_head", given.keys).position_HGK
        right_HGK = (query_HGD @ given.key_HTD[:, index.first : index.end].float().transpose(1, 2)).topk(k, 2).indices + index.first
        shares.append((right_HGK[..., None] == found_HGK[..., None, :]).any(3).float().mean())
    return float(torch.stack(shares).mean())


# --- what is found -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("dim", "dtype"), [(48, torch.float32), (64, torch.bfloat16), (80, torch.float16), (33, torch.bfloat16), (16, torch.float64)]
)
def test_queries_find_their_keys_and_read_few(isa, dim, dtype):
    if ISAS.index(isa) > ISAS.index(machine_isa()):
        pytest.skip(f"this processor does not run {isa}")
    use(isa)
    given = past(2048, dim, dtype)
    index = build(given, 64, 1792, neighbours=64, ef=80)
    assert recall(index, given, 20, range(1792, 2048, 16)) > 0.9
    assert index.walked.walks == 16 * HEADS * GROUP
    assert 80 < index.walked.keys_per_walk < 0.5 * 1728
    assert index.scanned_bytes(False, 20) > HEADS * GROUP * 80 * index._key_bytes


def test_a_wider_beam_finds_more_and_reads_more():
    given = past(2048)
    narrow, wide = (build(given, 0, 1792, neighbours=64, ef=ef) for ef in (20, 100))
    assert recall(narrow, given, 20, range(1792, 2048, 32)) < recall(wide, given, 20, range(1792, 2048, 32))
    assert narrow.walked.keys_per_walk < wide.walked.keys_per_walk


def test_each_query_head_may_have_its_graph():
    given = past(2048)
    index = build(given, 0, 1792, per="query_head", ef=60)
    assert index.graphs.rows_THUS.shape == (1792, HEADS, GROUP, 24)
    assert not torch.equal(index.graphs.rows_THUS[:, :, 0], index.graphs.rows_THUS[:, :, 1])
    assert recall(index, given, 20, range(1792, 2048, 16)) > 0.9


@pytest.mark.parametrize("per", ["kv_head", "query_head"])
@pytest.mark.parametrize("tokens", [0, 1, 2, 5])
def test_tiny_sets_are_found_whole(tokens, per):
    given = past(40)
    index = build(given, 3, 3 + tokens, per=per)
    for k in (1, 2, 5, 9):
        found = index.search(given.query_HGTD[:, :, 30], k, "per_query_head", given.keys).position_HGK
        right_HGK = (given.query_HGTD[:, :, 30] @ given.key_HTD[:, 3 : 3 + tokens].transpose(1, 2)).topk(min(k, tokens), 2).indices
        assert torch.equal(found, right_HGK.sort(2).values + 3)
    index.add(given.key_HTD[:, 3 + tokens : 35 + tokens], given.key_HTD[:, 3 + tokens : 35 + tokens])
    assert recall(index, given, 1, range(35, 40)) == 1.0


def test_as_many_as_there_are_is_all():
    given = past(600)
    index = build(given, 8, 600)
    found = index.search(given.query_HGTD[:, :, 599], 592, "union", given.keys)
    assert torch.equal(found.position_HGK, torch.arange(8, 600).expand(HEADS, GROUP, 592))


def test_the_union_is_shared_ascending_and_ends_in_minus_one():
    given = past(1024)
    index = build(given, 0, 1024)
    query_HGD = given.query_HGTD[:, :, 1000]
    own_HGK = index.search(query_HGD, 10, "per_query_head", given.keys).position_HGK
    united_HGK = index.search(query_HGD, 10, "union", given.keys).position_HGK
    for head in range(HEADS):
        right = sorted(set(own_HGK[head].flatten().tolist()))
        for row in united_HGK[head].tolist():
            assert row == right + [-1] * (len(row) - len(right))


def test_equal_keys_zeros_and_no_number_are_survived():
    given = past(700)
    given.key_HTD[:, 100:400] = 1.0
    given.key_HTD[0, 500] = torch.nan
    given.key_HTD[:, 600:] = 0.0
    index = build(given, 0, 700)
    found_HGK = index.search(given.query_HGTD[:, :, 650], 50, "per_query_head", given.keys).position_HGK
    assert ((found_HGK >= 0) & (found_HGK < 700)).all() and (found_HGK.diff(dim=2) > 0).all()


# --- what it is made of --------------------------------------------------------------------------------------------------------------


def test_a_walk_can_come_to_every_node_and_rows_are_whole():
    given = past(1500)
    index = build(given, 0, 1500, torch.arange(900, 1000), neighbours=8)  # most keys are found by none of the training queries
    rows_THUS = index.graphs.rows_THUS
    assert (rows_THUS < 1500).all() and (rows_THUS >= -1).all()
    for head in range(HEADS):
        links = [[node for node in row if node >= 0] for row in rows_THUS[:, head, 0].tolist()]
        assert all(len(set(row)) == len(row) and node not in row for node, row in enumerate(links))
        reached = set(index.graphs.entries_HUX[head, 0].tolist())
        way = list(reached)
        while way:
            new = set(links[way.pop()]) - reached
            reached |= new
            way += new
        assert len(reached) == 1500


def test_the_same_graph_for_any_number_of_threads():
    given = past(1500, dtype=torch.bfloat16)
    graphs = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        index = build(given, 0, 1440)
        index.add(given.key_HTD[:, 1440:1472], given.key_HTD[:, 1440:1472])
        found = index.search(given.query_HGTD[:, :, 1480], 30, "per_query_head", given.keys)
        graphs.append((index.graphs.rows_THUS.clone(), index.graphs.entries_HUX, found.position_HGK, index.walked))
    for other in graphs[1:]:
        assert all(torch.equal(one, two) for one, two in zip(graphs[0][:3], other[:3], strict=True))
        assert graphs[0][3] == other[3]


def test_a_training_query_is_not_asked_about_later_keys():
    given = past(800)
    asked = torch.arange(200, 400)
    later = dataclasses.replace(given, key_HTD=given.key_HTD.clone())
    later.key_HTD[:, 400:] *= 9  # they would be found by every query
    spans = [Span(0, each.key_HTD, each.key_HTD) for each in (given, later)]
    library, query_HND = native_graph.graph_library(), given.query_HGTD[:, :, asked].flatten(1, 2)
    nearest = [library.exact([span], query_HND, (asked + 1).repeat(GROUP), 30) for span in spans]
    assert torch.equal(nearest[0], nearest[1])
    for n in (0, 57, 199):
        right = (query_HND[:, n] @ given.key_HTD[0, : int(asked[n]) + 1].T).topk(30).indices
        assert torch.equal(nearest[0][0, n].long(), right[0])
    assert nearest[0].max() < 400


def test_fewer_keys_than_neighbours_end_in_minus_one():
    given = past(100)
    nearest = native_graph.graph_library().exact(
        [Span(0, given.key_HTD, given.key_HTD)], given.query_HGTD[:, 0, :5], torch.tensor([0, 1, 3, 100, 2]), 4
    )
    assert (nearest[0] >= 0).sum(1).tolist() == [0, 1, 3, 4, 2]


def test_few_queries_are_said_and_keys_stand_in():
    given = past(1024)
    index = build(given, 0, 1024, torch.arange(1000, 1004))
    assert "12 queries" in index.notes[0]
    assert recall(index, given, 20, range(1000, 1024)) > 0.5


# --- growth --------------------------------------------------------------------------------------------------------------------------


def grown(given: Past, index: RoarGraphIndex, end: int) -> None:
    for at in range(index.end, end, 32):
        index.add(given.key_HTD[:, at : at + 32], given.key_HTD[:, at : at + 32])
        index.search(given.query_HGTD[:, :, at], 10, "union", given.keys)


def test_keys_that_come_later_are_found():
    given = past(2048)
    index = build(given, 0, 1024, ef=100)
    grown(given, index, 1984)
    assert index.end == 1984 and len(index.graphs.rows_THUS) == 1984
    assert recall(index, given, 20, range(1984, 2048)) > 0.9


def test_a_rollback_leaves_the_graph_as_it_was():
    given = past(1400)
    index = build(given, 0, 1024)
    grown(given, index, 1120)
    before = index.graphs.rows_THUS.clone()
    grown(given, index, 1280)
    assert not torch.equal(before, index.graphs.rows_THUS[:1120])
    index.rollback(1120)
    assert index.end == 1120 and torch.equal(before, index.graphs.rows_THUS)
    grown(given, index, 1152)
    index.add(given.key_HTD[:, 1152:1184], given.key_HTD[:, 1152:1184])
    index.rollback(1152)  # what has not joined yet
    assert index.end == 1152
    index.rollback(64)  # into what it was made from
    assert index.end == 1024 and torch.equal(index.graphs.rows_THUS, build(given, 0, 1024).graphs.rows_THUS)


def test_forks_go_their_own_ways():
    given, other = past(1280), past(1280, seed=3)
    other.key_HTD[:, :1056] = given.key_HTD[:, :1056]
    index = build(given, 0, 1024)
    grown(given, index, 1056)
    child = index.fork()
    before = index.graphs.rows_THUS.clone()
    assert child.graphs.rows_THUS.data_ptr() == index.graphs.rows_THUS.data_ptr()
    grown(other, child, 1120)
    assert torch.equal(index.graphs.rows_THUS, before)
    grown(given, index, 1120)
    alone = build(given, 0, 1024)
    grown(given, alone, 1120)
    assert torch.equal(index.graphs.rows_THUS, alone.graphs.rows_THUS) and not torch.equal(child.graphs.rows_THUS, alone.graphs.rows_THUS)
    second = index.fork()
    second.rollback(1056)
    assert torch.equal(second.graphs.rows_THUS, before) and torch.equal(index.graphs.rows_THUS, alone.graphs.rows_THUS)


def test_queries_that_drift_are_noticed():
    given, other = past(2048), past(2048, seed=5)
    asked = torch.arange(1800, 2048, 8)
    prompt = given.prompt(0, 1792)
    behind = [RecentQueries(each[:, :, asked].flatten(1, 2), asked.repeat(GROUP)) for each in (given.query_HGTD, other.query_HGTD)]
    index = index_kind("roargraph").build(0, dataclasses.replace(prompt, recent=behind[0]), {"neighbours": 32, "ef": 100})
    assert isinstance(index, RoarGraphIndex) and index._recall is not None and index._recall > 0.9
    assert index.recalibrate(behind[0], given.keys, 20)
    assert not index.recalibrate(behind[1], given.keys, 20)
    assert index.recalibrate(RecentQueries(behind[0].query_HCD[:, :0], asked[:0]), given.keys, 20)


# --- bytes and files -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"degree": 8, "per": "query_head"}])
def test_bytes_are_those_of_the_facts(options):
    given = past(1280)
    index = build(given, 0, 1024, **options)
    facts = ROARGRAPH.for_group(GROUP)
    for end in (1024, 1152):
        held = HEADS * (facts.fixed_bytes(48, 48, options) + end * facts.bytes_per_token(48, 48, 4, options).held)
        assert index.nbytes() == held
        grown(given, index, 1152)


def test_a_file_holds_an_equal_index(tmp_path):
    given = past(1280)
    index = build(given, 64, 1024, per="query_head")
    grown(given, index, 1120)
    index.add(given.key_HTD[:, 1088:1120], given.key_HTD[:, 1088:1120])
    save_index(tmp_path / "index", "roargraph", index)
    loaded = load_index(tmp_path / "index")
    for each in (index, loaded):
        each.add(given.key_HTD[:, 1120:1152], given.key_HTD[:, 1120:1152])
    found = [each.search(given.query_HGTD[:, :, 1200], 25, "union", given.keys).position_HGK for each in (index, loaded)]
    assert torch.equal(found[0], found[1])
    assert (loaded.first, loaded.end, loaded.nbytes(), loaded.notes) == (index.first, index.end, index.nbytes(), index.notes)


@pytest.mark.parametrize("damage", ["link", "beyond", "gap", "short", "type", "degree", "text", "missing"])
def test_a_damaged_state_is_refused(damage, tmp_path):
    given = past(640)
    kind = index_kind("roargraph")
    tensors, numbers = build(given, 0, 640).state()
    kind.restore(tensors, numbers)
    rows_THUS = tensors["rows_THUS"].clone()
    match damage:
        case "link":
            rows_THUS[5, 0, 0, 0] ^= 1
        case "beyond":
            rows_THUS[5, 0, 0, 0] = 640
        case "gap":
            rows_THUS[5, 0, 0, 0] = -1
        case "short":
            rows_THUS = rows_THUS[:-1]
        case "type":
            rows_THUS = rows_THUS.to(torch.int16)
        case "degree":
            numbers["shape"]["degree"] = 400
        case "text":
            numbers["tokens"] = "640"
        case "missing":
            del numbers["made"]
    with pytest.raises((ValueError, KeyError)):
        kind.restore({**tensors, "rows_THUS": rows_THUS}, numbers)


@pytest.mark.parametrize("damage", ["beyond", "gap", "alone", "full"])
def test_a_forged_checksum_does_not_lead_out_of_the_graph(damage, monkeypatch):
    kind = index_kind("roargraph")
    tensors, numbers = build(past(640), 0, 640).state()
    monkeypatch.setattr("kvcompile.runtime.indexes.roargraph._digest", lambda tensors: numbers["sha256"])
    tensors["rows_THUS"] = tensors["rows_THUS"].clone()
    rows_THUS = tensors["rows_THUS"]
    match damage:
        case "alone":  # nobody leads to a node: each row that did leads to another one in its place
            tensors["entries_HUX"] = torch.zeros_like(tensors["entries_HUX"])
            rows_THUS[rows_THUS == 5] = 0
        case "full":
            rows_THUS[rows_THUS < 0] = 0
        case _:
            rows_THUS[5, 0, 0, 0] = 640 if damage == "beyond" else -1
    told = {"beyond": "not there", "gap": "gap", "alone": "no walk comes to 1 of 640 nodes", "full": "no node has room for a link"}
    with pytest.raises(ValueError, match=told[damage]):
        kind.restore(tensors, numbers)


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "index"
    save_index(path, "roargraph", build(past(640), 0, 640))
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(SessionError, match="damaged"):
        load_index(path)


def test_without_the_library_it_says_so(monkeypatch):
    monkeypatch.setattr(native_graph, "_library", None)
    with pytest.raises(TargetError, match=r"not loaded"):
        build(past(640), 0, 640)


def test_a_library_that_is_none_is_refused(tmp_path):
    (tmp_path / "kvc_graphs.so").write_bytes(b"nothing")
    with pytest.raises(TargetError, match="cannot be loaded"):
        native_graph.load_graphs(tmp_path / "kvc_graphs.so")


# --- options and the sample ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"queries": 10}, "from 64 to 65536"),
        ({"neighbours": True}, "from 4 to 1024"),
        ({"degree": 65}, "from 4 to 64"),
        ({"ef": 0}, "from 1 to 65536"),
        ({"per": "layer"}, "kv_head or query_head"),
        ({"m": 3}, "no option of roargraph"),
    ],
)
def test_wrong_options_are_named(options, told):
    (fault,) = ROARGRAPH.check(options)
    assert fault.option in options and told in fault.what
    assert ROARGRAPH.check({"queries": 512, "neighbours": 100, "degree": 8, "ef": 300, "per": "query_head"}) == []


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_training_queries_are_evenly_spaced_whatever_the_chunks(chunk):
    query_HGSD = past(1000).query_HGTD
    sample = QuerySample(HEADS, 48, 100)
    for first in range(0, 1000, chunk):
        sample.add(query_HGSD[:, :, first : first + chunk], first, 0.5)
        end = min(1000, first + chunk)
        assert sample.nbytes() == HEADS * sample_bytes(GROUP, 48, end, 100 * GROUP)
    training = sample.training()
    assert training_stride(100, 1000) == 16
    assert training.position_C.tolist() == list(range(64, 1000, 16)) * GROUP
    right_HGCD = (query_HGSD[:, :, 64::16] * 0.5).bfloat16().float()
    assert torch.equal(training.query_HCD, right_HGCD.flatten(1, 2))


def test_training_queries_that_were_taken_back_are_replaced():
    query_HGSD = past(1000).query_HGTD
    sample = QuerySample(HEADS, 48, 1000)
    sample.add(query_HGSD, 0, 1.0)
    child = sample.copy()
    sample.add(-query_HGSD[:, :, 500:600], 500, 1.0)
    assert sample.training().position_C[:536].tolist() == list(range(64, 600))
    assert torch.equal(sample.training().query_HCD[:, 436], -query_HGSD[:, 0, 500].bfloat16().float())
    assert child.training().count == GROUP * 936


def test_a_sample_without_training_keeps_none():
    sample = QuerySample(HEADS, 48)
    sample.add(past(1000).query_HGTD, 0, 1.0)
    assert sample.training().count == 0
    assert sample.nbytes() == HEADS * sample_bytes(GROUP, 48, 1000)
