"""Indexes that forks share: made once where the past that they share ends, added to by each fork, and of no other effect."""

from __future__ import annotations

import functools
import importlib.util
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import toys
from test_prefix_session import Bytes
from torch import Tensor
from units import some_ids

import kvcompile
from kvcompile.ir.errors import SessionError
from kvcompile.ir.indexes import BLOCK_TOKENS, MIN_INDEXED_TOKENS
from kvcompile.prefixes import plan_prefixes
from kvcompile.runtime import lookup
from kvcompile.runtime.lookup import LookupStore
from kvcompile.runtime.model import CompiledModel
from kvcompile.runtime.static import StaticStore
from kvcompile.spec import load_spec

VOCABULARY = 256
WINDOW = {"sink_recent": {"sink_tokens": 4, "recent_tokens": 12}}
PAGES = {"pages": 4, "page_tokens": 16}
KINDS: dict[str, dict[str, Any]] = {
    "sketch": {"top_k": {"k": 40, "index": "sketch", "tail": True}},
    "flat": {"top_k": {"k": 40, "index": "flat"}},
    "roargraph": {"top_k": {"k": 40, "index": {"roargraph": {"queries": 512, "neighbours": 50, "ef": 60}}}},
    "minmax": {"top_k": {**PAGES, "index": "minmax"}},
    "cuboid": {"top_k": {**PAGES, "index": "cuboid"}},
    "representatives": {"top_k": {**PAGES, "index": "representatives"}},
    "mean": {"top_k": {**PAGES, "index": "mean"}},
    "ivf": {"top_k": {"k": 40, "index": {"ivf": {"lists": 16, "probe": 4}}}},
    "hnsw": {"top_k": {"k": 40, "index": {"hnsw": {"m": 8, "ef": 50}}}},
    "clusters": {"clusters": {"exact": "5%", "estimate": "20%"}},
    "sample": {"sample": {"lsh": {"hash_bits": 4, "tables": 40}}},
}
HNSWLIB = importlib.util.find_spec("hnswlib") is not None
NEEDS_HNSWLIB = pytest.mark.skipif(not HNSWLIB, reason="hnswlib is not installed")
EVERY = pytest.mark.parametrize("kind", [pytest.param(kind, marks=[NEEDS_HNSWLIB] if kind == "hnsw" else []) for kind in KINDS])
PREFIX = MIN_INDEXED_TOKENS + 60  # of which an index covers 544 tokens
COVERED = 4 + 544


@functools.cache
def compiled(*zones: str, k: Any = None, kernels: str = "generated") -> CompiledModel:
    """Two layers of two KV heads; head 0 of each layer is full, and heads 1 look up, each by its own zone."""
    policies = {f"{name} of mine": {"zones": [WINDOW, zone(name, k)]} for name in zones}
    heads: list[dict[str, Any]] = [{"policy": "full"}]
    heads += [{"policy": f"{name} of mine", "layers": layer, "kv_heads": 1} for layer, name in enumerate((*zones, *zones)[:2])]
    target = {"segments": "eager", "deterministic": True, "kernels": kernels}
    spec = {"kvcompile": 1, "verify": {"tokens": 16}, "policies": policies, "heads": heads, "target": target}
    return kvcompile.compile(toys.llama(layers=2), spec=spec, tokenizer=Bytes())


def zone(name: str, k: Any) -> dict[str, Any]:
    if name == "static":
        return {"static": {"keys": 24}}
    return KINDS[name] if k is None else {"top_k": {**KINDS[name]["top_k"], "k": k}}


def ids(count: int, seed: int = 0) -> Tensor:
    return some_ids(count, VOCABULARY, seed)


def steps(session: kvcompile.Session, tokens: Tensor) -> Tensor:
    return torch.stack([session.step(token) for token in tokens.tolist()])


def read(model: CompiledModel, tokens: int = PREFIX, index: bool = True) -> kvcompile.Session:
    session = model.session(prefix=None)
    session.prefill(ids(tokens))
    if index:
        session.make_indexes()
    return session


def lookups(session: kvcompile.Session) -> list[LookupStore]:
    return [store for site in (0, 1) for store in session.stores(site) if isinstance(store, LookupStore)]


@pytest.fixture
def builds(monkeypatch) -> Iterator[Counter[str]]:
    """How many indexes of each kind were made."""
    made: Counter[str] = Counter()
    real = lookup.index_kind

    class Counted:
        def __init__(self, name: str) -> None:
            self.name = name

        def build(self, *given: Any) -> Any:
            made[self.name] += 1
            return real(self.name).build(*given)

        def restore(self, *given: Any) -> Any:
            return real(self.name).restore(*given)

    monkeypatch.setattr(lookup, "index_kind", Counted)
    return made


# --- what sessions answer ----------------------------------------------------------------------------------------------------------------


@EVERY
def test_a_fork_behind_a_shared_index_answers_as_one_session_that_did_the_same(kind, builds):
    """Trap 13: two forks by turns, each over own tokens of more than a window and a turn."""
    model = compiled(kind)
    builds.clear()  # of the compile
    base = read(model)
    made = Counter({"lsh" if kind == "sample" else kind: 2})
    assert builds == made and [store.index.end for store in lookups(base)] == [COVERED] * 2
    forks = [base.fork(), base.fork()]
    for number, fork in enumerate(forks):
        fork.prefill(ids(50, seed=number + 1))
    found = [torch.stack(model.step(forks, pair).unbind()) for pair in zip(ids(90, seed=3).tolist(), ids(90, seed=4).tolist(), strict=True)]
    assert builds == made
    for number in range(2):
        alone = read(model)
        alone.prefill(ids(50, seed=number + 1))
        assert torch.equal(torch.stack(found)[:, number], steps(alone, ids(90, seed=number + 3)))
    assert all(store.index.end > PREFIX + 50 for store in lookups(forks[0])), "its own tokens are in the index"
    assert [store.index.end for store in lookups(base)] == [COVERED] * 2, "and in no other's"
    assert torch.equal(steps(base, ids(40, seed=5)), steps(read(model), ids(40, seed=5)))


@pytest.mark.parametrize(("kind", "kernels"), [("sketch", "generated"), ("flat", "torch"), ("roargraph", "generated")])
def test_choosing_everything_behind_a_shared_index_is_full_attention(kind, kernels):
    base, full = read(compiled(kind, k="100%", kernels=kernels)), read(compiled())
    for seed in (1, 2):
        fork, expected = base.fork(), full.fork()
        for each in (fork, expected):
            each.prefill(ids(60, seed))
        torch.testing.assert_close(steps(fork, ids(60, seed + 2)), steps(expected, ids(60, seed + 2)), rtol=1e-4, atol=1e-4)
        assert all(store.index.end > PREFIX for store in lookups(fork))


def test_the_index_of_eight_forks_is_made_once(builds):
    model = compiled("sketch")
    builds.clear()
    base = read(model)
    forks = [base.fork() for _ in range(8)]
    for number, fork in enumerate(forks):
        fork.prefill(ids(20 + 10 * number, seed=number))
    for token in range(60):
        model.step(forks, [token] * 8)
    assert builds == {"sketch": 2}
    without = read(model, index=False)
    forks = [without.fork() for _ in range(8)]
    model.step(forks, [1] * 8)
    assert builds == {"sketch": 2 + 2 * 8}


def test_a_shared_index_is_the_one_that_the_first_token_would_have_made():
    """To the bit: it learns from the same queries, and where nothing was read behind it covers the same tokens."""
    model = compiled("sketch")
    assert torch.equal(steps(read(model).fork(), ids(70, seed=1)), steps(read(model, index=False), ids(70, seed=1)))


# --- going back --------------------------------------------------------------------------------------------------------------------------


@EVERY
def test_a_fork_that_goes_back_to_the_prefix_is_a_new_fork(kind):
    base = read(compiled(kind))
    fork = base.fork()
    fork.prefill(ids(30, seed=1))
    steps(fork, ids(55, seed=2))
    fork.rollback(85)
    again = base.fork()
    assert [store.index.end for store in lookups(fork)] == [COVERED] * 2
    for each in (fork, again):
        each.prefill(ids(30, seed=3))
    assert torch.equal(steps(fork, ids(40, seed=4)), steps(again, ids(40, seed=4)))


@pytest.mark.parametrize("kind", ["sketch", "roargraph"])
def test_a_fork_that_goes_back_into_the_prefix_makes_an_index_of_its_own(kind, builds):
    model = compiled(kind)
    base = read(model)
    expected = steps(base.fork(), ids(40, seed=4))
    fork, alone = base.fork(), read(model)
    for each in (fork, alone):
        each.prefill(ids(10, seed=1))
        each.rollback(10 + 30)
    assert [store.index for store in lookups(fork)] == [None] * 2
    before = builds[kind]
    assert torch.equal(steps(fork, ids(40, seed=4)), steps(alone, ids(40, seed=4)))
    assert builds[kind] == before + 2 * 2
    assert torch.equal(steps(base.fork(), ids(40, seed=4)), expected), "the shared one is as it was"


@pytest.mark.parametrize("kind", ["sketch", "flat"])
@pytest.mark.parametrize("late", [7, 15, 23])
def test_a_rollback_behind_further_prompts_is_bit_equal_to_never_having_read(kind, late):
    """What a prompt brought entered the index at once, at no turn of the site: a rollback to then keeps it."""
    sessions = [read(compiled(kind)), read(compiled(kind))]
    for session in sessions:
        session.prefill(ids(80 + late, seed=1))
        steps(session, ids(3, seed=2))
    steps(sessions[0], ids(70, seed=5))
    sessions[0].rollback(70)
    ends = [[store.index.end for store in lookups(session)] for session in sessions]
    assert ends[0] == ends[1] and min(ends[0]) > COVERED
    assert torch.equal(*(steps(session, ids(40, seed=3)) for session in sessions))


@EVERY
def test_a_saved_fork_goes_on_as_the_fork_does(kind, tmp_path, builds):
    model = compiled(kind)
    builds.clear()
    fork = read(model).fork()
    fork.prefill(ids(40, seed=1))
    steps(fork, ids(40, seed=2))
    fork.save(tmp_path / "fork")
    restored = model.restore(tmp_path / "fork")
    for each in (fork, restored):
        each.rollback(33)
    assert torch.equal(steps(restored, ids(70, seed=3)), steps(fork, ids(70, seed=3)))
    assert builds.total() == 2


# --- when it is made, and made anew ------------------------------------------------------------------------------------------------------


def test_nothing_is_made_where_there_is_nothing_to_look_up():
    assert read(compiled()).make_indexes() == 0
    short = read(compiled("sketch"), 300)
    assert short.make_indexes() == 0 and [store.index for store in lookups(short)] == [None] * 2
    session = read(compiled("sketch"), index=False)
    assert (session.make_indexes(), session.make_indexes()) == (2, 0)
    session.prefill(ids(60, seed=1))
    before = session.tokens.copy()
    assert session.make_indexes() == 2 and session.tokens == before
    assert [store.index.end for store in lookups(session)] == [COVERED + 64] * 2


def test_static_zones_choose_for_each_fork():
    model = compiled("static")
    base = read(model, index=False)
    assert base.make_indexes() == 0
    (store,) = (store for store in base.stores(0) if isinstance(store, StaticStore))
    assert store.rows is not None, "nothing was let go"
    fork = base.fork()
    fork.prefill(ids(60, seed=1))
    alone = read(model, index=False)
    alone.prefill(ids(60, seed=1))
    assert torch.equal(steps(fork, ids(30, seed=2)), steps(alone, ids(30, seed=2)))


def test_a_broken_session_makes_none():
    session = read(compiled("sketch"), index=False)
    session._broken = "a call was interrupted."
    with pytest.raises(SessionError, match="a call was interrupted"):
        session.make_indexes()


@pytest.mark.parametrize(("own", "anew"), [(500, False), (620, True)])
def test_a_fork_that_reads_more_than_the_index_was_made_from_makes_its_own(own, anew, builds):
    model = compiled("sketch")
    builds.clear()
    fork = read(model).fork()
    fork.prefill(ids(own, seed=1))
    steps(fork, ids(2, seed=2))
    assert builds == {"sketch": 4 if anew else 2}
    assert [len(store.index.parts) for store in lookups(fork)] == [1 if anew else 2] * 2
    own_alone = read(model, index=False)
    own_alone.prefill(ids(own, seed=1))
    own_steps = steps(own_alone, ids(2, seed=2))
    again = read(model).fork()
    again.prefill(ids(own, seed=1))
    assert torch.equal(steps(again, ids(2, seed=2)), own_steps) == anew


# --- bytes -------------------------------------------------------------------------------------------------------------------------------

# Bytes of its own that an index has when tokens were added to it, as a share of all: those that are not said here share most.
COPIED = {"roargraph", "minmax", "cuboid", "representatives", "mean", "ivf", "flat"}


@EVERY
def test_bytes_of_a_shared_index_count_for_the_session_that_made_it(kind):
    base = read(compiled(kind))
    bare = read(compiled(kind), index=False)
    of_index = sum(store.index.nbytes() for store in lookups(base))
    assert base.nbytes() == bare.nbytes() + of_index
    fork, bare_fork = base.fork(), bare.fork()
    assert fork.nbytes() == bare_fork.nbytes() and fork.shared_nbytes() == bare_fork.shared_nbytes() + of_index
    steps(fork, ids(70, seed=1))
    for store in lookups(fork):
        held = store.index.nbytes()
        shared = store.shared_nbytes() - store.rows.shared_nbytes()
        assert store.nbytes() == store.rows.nbytes() + store.sample.nbytes() + held - shared
        assert 0 <= shared <= held
        assert (shared > 0.7 * held) == (kind not in COPIED), (shared, held)
    grandchild = fork.fork()
    assert grandchild.nbytes() < fork.nbytes()


# --- prefixes of the spec ----------------------------------------------------------------------------------------------------------------

SYSTEM, RULES, LONG = "Be brief. " * 60, "Rule one: none. " * 8, "There was a time. " * 40
SHARED = [
    {"name": "system", "text": SYSTEM, "default": True},
    {"name": "rules", "text": RULES, "after": "system"},
    {"name": "long", "text": LONG, "after": "system"},
]


def with_prefixes(kind: str) -> CompiledModel:
    model = compiled(kind)
    prefix = load_spec({"kvcompile": 1, "prefix": {"shared": SHARED}}).prefix
    return model.with_plan(replace(model.plan, prefixes=plan_prefixes(prefix, Bytes())))


def test_sessions_behind_a_prefix_share_the_index_that_was_made_when_it_was_read(builds):
    model = with_prefixes("sketch")
    builds.clear()
    sessions = [model.session() for _ in range(3)]
    assert builds == {"sketch": 2} and {session.nbytes() for session in sessions} == {sessions[0].nbytes()}
    for number, session in enumerate(sessions):
        session.prefill(ids(30, seed=number))
    found = torch.stack([model.step(sessions, [token] * 3) for token in ids(40).tolist()])
    assert builds == {"sketch": 2}
    alone = model.session(prefix=None)
    alone.prefill([1, *SYSTEM.encode()])
    alone.make_indexes()
    alone.prefill(ids(30, seed=2))
    assert torch.equal(found[:, 2], steps(alone, ids(40)))


@pytest.mark.parametrize(("name", "made"), [("rules", 2), ("long", 4)])
def test_a_prefix_behind_another_adds_to_its_index_or_makes_its_own_where_it_is_longer(name, made, builds):
    model = with_prefixes("sketch")
    builds.clear()
    session = model.session(prefix=name)
    assert builds == {"sketch": made}
    ends = [store.index.end for store in lookups(session)]
    assert min(ends) > len(session) - 12 - BLOCK_TOKENS
    steps(session, ids(40))
    assert builds == {"sketch": made}
    steps(model.session(prefix="system"), ids(3))
    assert builds == {"sketch": made}


@pytest.mark.parametrize("kind", ["sketch", "flat", "roargraph"])
def test_the_plan_counts_the_index_of_a_prefix(kind):
    model = with_prefixes(kind)
    for prefix in model.plan.prefixes:
        model.session(prefix=prefix.name)
    for prefix in model.plan.prefixes:
        planned, held = model.plan.prefix_bytes(prefix), model.prefixes._read[prefix.name].nbytes()
        if prefix.name == "rules":  # it adds to the index of system
            assert held <= planned
        else:
            assert abs(held - planned) <= 0.01 * planned
        assert model.plan.lent_bytes(prefix.tokens) <= model.session(prefix=prefix.name).shared_nbytes()
