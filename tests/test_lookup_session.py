"""Sessions whose heads look keys up, beside heads that do not, with the C++ kernels and in torch."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import toys
from units import some_ids

import kvcompile
from kvcompile.ir.errors import TargetError
from kvcompile.ir.indexes import MIN_INDEXED_TOKENS
from kvcompile.runtime.indexes.roargraph import RoarGraphIndex
from kvcompile.runtime.lookup import LookupStore
from kvcompile.runtime.model import CompiledModel
from kvcompile.runtime.native import Column, attend_native
from kvcompile.runtime.query_sample import MOMENT_STRIDE
from kvcompile.runtime.static import StaticStore

VOCABULARY = 256
SINKS = {"sink_recent": {"sink_tokens": 4, "recent_tokens": 12}}
ZONES: dict[str, dict[str, Any]] = {
    "sketch": {"top_k": {"k": 40, "index": "sketch", "tail": True}},
    "share": {"top_k": {"k": "10%", "index": {"sketch": {"bytes_per_key": 8}}, "select": "sum"}},
    "flat": {"top_k": {"k": 40, "index": "flat", "select": "per_query_head"}},
    "roargraph": {"top_k": {"k": 40, "index": {"roargraph": {"queries": 512, "neighbours": 50, "ef": 60}}}},
    "everything": {"top_k": {"k": "100%", "index": "sketch", "tail": True}},
    "static": {"static": {"keys": 24}},
}
PROMPT = MIN_INDEXED_TOKENS + 60


@functools.cache
def compiled(zone: str, kernels: str = "generated", rollback: int = 0) -> CompiledModel:
    """KV head 0 of layer 1 looks up, and both of layer 0; head 1 of layer 1 is full."""
    policy = {"zones": [SINKS, ZONES[zone]], "rollback": rollback}
    spec = {
        "kvcompile": 1,
        "verify": {"tokens": 16},
        "policies": {"mine": policy},
        "heads": [{"policy": "mine", "layers": 0}, {"policy": "mine", "layers": 1, "kv_heads": 0}],
        "target": {"segments": "eager", "kernels": kernels},
    }
    return kvcompile.compile(toys.llama(layers=2), spec=spec)


@functools.cache
def full() -> CompiledModel:
    return kvcompile.compile(toys.llama(layers=2), spec={"kvcompile": 1, "verify": {"tokens": 16}, "target": {"segments": "eager"}})


def ids(count: int, seed: int = 0) -> torch.Tensor:
    return some_ids(count, VOCABULARY, seed)


def steps(session, tokens) -> torch.Tensor:
    return torch.stack([session.step(token) for token in tokens.tolist()])


@pytest.mark.parametrize("kernels", ["generated", "torch"])
@pytest.mark.parametrize("zone", ZONES)
def test_a_prompt_is_read_with_all_its_past_whatever_its_chunks(zone, kernels):
    tokens = ids(PROMPT)
    expected = full().session().prefill(tokens, logits="all")
    for chunk in (1, 77, PROMPT) if zone == "sketch" else (77,):
        session = compiled(zone, kernels).session()
        found = torch.cat([session.prefill(part, logits="all") for part in tokens.split(chunk)])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("zone", ZONES)
def test_a_kernel_reads_the_prompts(monkeypatch, zone):
    model = compiled(zone)
    called: list[int] = []

    def counted(query: Any, key: Any, value: Any, learnt: Any, tables: Any, *rest: Any, **options: Any) -> None:
        called.extend(row[Column.KERNEL] for table in tables for row in table.tolist())
        attend_native(query, key, value, learnt, tables, *rest, **options)

    def fail(*arguments: Any, **options: Any) -> None:
        raise AssertionError("torch attends")

    monkeypatch.setattr(kvcompile.runtime.model, "attend_native", counted)
    monkeypatch.setattr(kvcompile.runtime.model._NewTokens, "attend", fail)
    session = model.session()
    session.prefill(ids(70))
    session.prefill(ids(1))
    number = model.kernels.number(model.plan.sites[0].groups[0].request)
    assert model.kernels.number(model.plan.sites[1].groups[1].request) != number
    assert called.count(number) == 4
    assert len(called) == 6


@pytest.mark.parametrize("zone", ["sketch", "flat", "static"])
def test_the_queries_of_a_prompt_are_sampled_whoever_reads_it(zone):
    tokens, found = ids(PROMPT), []
    for kernels in ("generated", "torch"):
        session = compiled(zone, kernels).session()
        for part in tokens.split(200):
            session.prefill(part)
        found.append([session.stores(site)[0].sample for site in (0, 1)])
    for sampled, other in zip(*found, strict=True):
        assert sampled.queries == other.queries > 0
        torch.testing.assert_close(sampled.gram_HDD, other.gram_HDD, rtol=1e-4, atol=1e-4)
        assert torch.equal(sampled.recent().position_C, other.recent().position_C)
        torch.testing.assert_close(sampled.recent().query_HCD, other.recent().query_HCD, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("zone", ["sketch", "flat", "static"])
def test_one_session_reads_a_prompt_while_another_steps(zone):
    model = compiled(zone)
    tokens, other = ids(PROMPT + 1), ids(PROMPT, seed=1)
    session, beside = model.session(), model.session()
    session.prefill(tokens[:PROMPT])
    beside.prefill(other[:100])
    alone, beside_alone = session.fork(), beside.fork()
    both = [(beside, other[100:]), (session, tokens[PROMPT:])]
    found = model.forward(both)
    torch.testing.assert_close(found[0], beside_alone.prefill(other[100:]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], alone.step(int(tokens[PROMPT])), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(beside.step(3), beside_alone.step(3), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("zone", ["sketch", "flat", "static"])
def test_forks_and_rollbacks_of_a_prompt_are_as_if_it_were_read_at_once(zone):
    model = compiled(zone, rollback=70)
    tokens, other = ids(PROMPT), ids(PROMPT, seed=2)
    whole = model.session().prefill(tokens, logits="all")
    session = model.session()
    session.prefill(tokens[:301])
    child = session.fork()
    session.prefill(other[:70])
    grandchild = child.fork()
    child.prefill(tokens[301:])
    session.rollback(70)
    for each in (session, grandchild):
        found = torch.cat([each.prefill(part, logits="all") for part in (tokens[301:308], tokens[308:])])
        torch.testing.assert_close(found, whole[301:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernels", ["generated", "torch"])
def test_choosing_everything_is_full_attention(kernels):
    tokens = ids(PROMPT + 40)
    session, expected = compiled("everything", kernels).session(), full().session()
    for each in (session, expected):
        each.prefill(tokens[:PROMPT])
    torch.testing.assert_close(steps(session, tokens[PROMPT:]), steps(expected, tokens[PROMPT:]), rtol=1e-4, atol=1e-4)
    assert session.stores(0)[0].index is not None


@pytest.mark.parametrize("zone", ["sketch", "share"])
def test_the_kernel_does_what_torch_does(zone):
    tokens = ids(PROMPT + 100)
    found = []
    for kernels in ("generated", "torch"):
        model = compiled(zone, kernels)
        assert any(model.kernels.look_up(group) for site in model.plan.sites for group in site.groups) == (kernels == "generated")
        session = model.session()
        session.prefill(tokens[:PROMPT])
        found.append(steps(session, tokens[PROMPT:]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("zone", ["sketch", "flat", "roargraph", "static"])
def test_something_is_forgotten_and_not_much(zone):
    tokens = ids(PROMPT + 30)
    session, exact = compiled(zone).session(), full().session()
    for each in (session, exact):
        each.prefill(tokens[:PROMPT])
    found, expected = (steps(each, tokens[PROMPT:]).log_softmax(1) for each in (session, exact))
    divergence = (expected.exp() * (expected - found)).sum(1).mean()
    assert 0 < divergence < 0.05


@pytest.mark.parametrize("zone", ["sketch", "flat", "roargraph", "static"])
def test_two_interleaved_sessions_are_each_as_alone(zone):
    model = compiled(zone)
    tokens, other = ids(PROMPT + 50), ids(PROMPT + 50, seed=1)
    alone = model.session()
    alone.prefill(tokens[:PROMPT])
    expected = steps(alone, tokens[PROMPT:])
    session, beside = model.session(), model.session()
    session.prefill(tokens[:PROMPT])
    beside.prefill(other[: PROMPT - 100])
    for place, (token, another) in enumerate(zip(tokens[PROMPT:].tolist(), other[PROMPT:].tolist(), strict=True)):
        found = model.step([session, beside], [token, another])[0]
        torch.testing.assert_close(found, expected[place], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("zone", ["sketch", "flat", "roargraph", "static"])
def test_forks_are_bit_equal_to_reading_anew(zone):
    model = compiled(zone)
    tokens = ids(PROMPT + 100)
    session = model.session()
    session.prefill(tokens[:PROMPT])
    steps(session, tokens[PROMPT : PROMPT + 40])
    child = session.fork()
    expected = steps(session, tokens[PROMPT + 40 :])
    assert torch.equal(steps(child, tokens[PROMPT + 40 :]), expected)
    assert child.shared_nbytes() > 0


@pytest.mark.parametrize("zone", ["sketch", "flat", "roargraph", "static"])
def test_a_rollback_is_bit_equal_to_never_having_read(zone):
    model = compiled(zone, rollback=70)
    tokens, other = ids(PROMPT + 100), ids(PROMPT + 100, seed=2)
    session, never = model.session(), model.session()
    for each in (session, never):
        each.prefill(tokens[:PROMPT])
        steps(each, tokens[PROMPT : PROMPT + 40])
    steps(session, other[:70])
    session.rollback(70)
    assert session.tokens == never.tokens
    assert torch.equal(steps(session, tokens[PROMPT + 40 :]), steps(never, tokens[PROMPT + 40 :]))


@pytest.mark.parametrize("kernels", ["generated", "torch"])
def test_a_failed_call_leaves_the_session_as_it_was(monkeypatch, kernels):
    model = compiled("sketch", kernels)
    tokens = ids(PROMPT + 40)
    session = model.session()
    session.prefill(tokens[:PROMPT])
    steps(session, tokens[PROMPT : PROMPT + 4])
    expected = steps(session.fork(), tokens[PROMPT + 4 :])

    def fail(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    assert (PROMPT + 4) % MOMENT_STRIDE == 0  # a position whose query is observed
    with monkeypatch.context() as patch:
        patch.setattr(LookupStore, "observe", fail)
        with pytest.raises(KeyboardInterrupt):
            session.step(3)
        with pytest.raises(KeyboardInterrupt):
            session.prefill(tokens[:30])
    assert len(session) == PROMPT + 4
    assert torch.equal(steps(session, tokens[PROMPT + 4 :]), expected)


@pytest.mark.parametrize("zone", ["sketch", "roargraph", "static"])
def test_bytes_are_those_of_the_plan(zone):
    model = compiled(zone)
    session = model.session()
    session.prefill(ids(PROMPT))
    session.step(1)
    planned = model.plan.stored_bytes(PROMPT + 1)
    assert abs(session.nbytes() - planned) <= 0.01 * planned  # centres are kept 16 runs at a time


def test_static_heads_let_go_what_they_did_not_choose():
    model = compiled("static")
    session = model.session()
    session.prefill(ids(PROMPT))
    before = session.nbytes()
    session.step(1)
    store = session.stores(0)[0]
    assert isinstance(store, StaticStore) and store.rows is None
    assert session.nbytes() < 0.6 * before


def test_a_second_prompt_is_read_with_all_the_past():
    tokens = ids(PROMPT + 100)
    session, exact = compiled("sketch").session(), full().session()
    session.prefill(tokens[:PROMPT])
    session.step(int(tokens[PROMPT]))
    exact.prefill(tokens[: PROMPT + 1])
    # the token between was read through the index, so that what stands behind it differs a little
    first, second = (each.prefill(tokens[PROMPT + 1 :], logits="all").log_softmax(1) for each in (session, exact))
    assert (second.exp() * (second - first)).sum(1).mean() < 0.01
    assert session.stores(0)[0].index.end < PROMPT
    session.step(1)


def test_verification_tells_what_looking_up_costs():
    report = compiled("sketch").verification.as_dict()
    assert report["spec"]["tokens"] == 64


def test_a_graph_runs_in_cpp_whatever_the_kernels_and_says_so_where_it_cannot(monkeypatch):
    spec = {
        "kvcompile": 1,
        "verify": {"tokens": 16},
        "policies": {"mine": {"zones": [SINKS, ZONES["roargraph"]]}},
        "heads": [{"policy": "mine"}],
        "target": {"segments": "eager", "kernels": "torch"},
    }
    session = kvcompile.compile(toys.llama(layers=2), spec=spec).session()
    session.prefill(ids(PROMPT))
    session.step(1)
    index = session.stores(0)[0].index
    assert isinstance(index, RoarGraphIndex) and index.walked.keys > 0
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(TargetError, match=r"policies: the index roargraph runs in C\+\+ only, and none of g\+\+") as caught:
        kvcompile.compile(toys.llama(layers=2), spec=spec)
    assert "Install g++, set CXX, or write index: sketch" in str(caught.value)
