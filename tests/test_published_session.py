"""Sessions whose heads look keys up in the indexes of published systems, and their specs as the systems are usually written."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import pytest
import torch
import toys
from units import some_ids

import kvcompile
from kvcompile import link
from kvcompile.codegen.reproducer import reproducer_source
from kvcompile.ir.errors import BuildError
from kvcompile.ir.indexes import MIN_INDEXED_TOKENS
from kvcompile.ir.policy import HeadPolicy, Sample, SinkRecent, TopK
from kvcompile.ir.spec import HeadRule, Output, Pattern, Prefix, Spec, Target
from kvcompile.runtime import native_lsh
from kvcompile.runtime.model import CompiledModel
from kvcompile.spec import load_spec

VOCABULARY = 256
SINKS = {"sink_recent": {"sink_tokens": 4, "recent_tokens": 12}}
PROMPT = MIN_INDEXED_TOKENS + 60
# Each kind as it chooses, and as it chooses everything.
ZONES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "minmax": tuple({"top_k": {"pages": pages, "page_tokens": 16, "index": "minmax"}} for pages in (4, 99)),
    "cuboid": tuple({"top_k": {"pages": pages, "page_tokens": 8, "index": "cuboid", "select": "per_query_head"}} for pages in (4, 99)),
    "representatives": tuple({"top_k": {"pages": pages, "page_tokens": 128, "index": "representatives"}} for pages in (1, 9)),
    "mean": tuple({"top_k": {"pages": pages, "page_tokens": 32, "index": "mean", "select": "sum"}} for pages in (4, 99)),
    "ivf": tuple({"top_k": {"k": k, "index": {"ivf": {"lists": 16, "probe": 4}}}} for k in (40, "100%")),
    "clusters": (
        {"clusters": {"exact": "5%", "estimate": "20%"}},
        {"clusters": {"tokens_per_cluster": 8, "exact": "100%", "estimate": "0%"}},
    ),
    "sample": ({"sample": {"lsh": {"hash_bits": 4, "tables": 40}}}, {"sample": {"lsh": {"hash_bits": 1, "tables": 1024}}}),
    "hnsw": tuple({"top_k": {"k": k, "index": {"hnsw": {"m": 8, "ef": 50}}}} for k in (40, "100%")),
}
NEEDS_HNSWLIB = pytest.mark.skipif(importlib.util.find_spec("hnswlib") is None, reason="hnswlib is not installed")
EVERY = pytest.mark.parametrize("kind", [pytest.param(kind, marks=[NEEDS_HNSWLIB] if kind == "hnsw" else []) for kind in ZONES])


@functools.cache
def compiled(kind: str, everything: bool = False, rollback: int = 0) -> CompiledModel:
    """KV head 0 of layer 1 looks up, and both of layer 0; head 1 of layer 1 is full."""
    spec = {
        "kvcompile": 1,
        "verify": {"tokens": 16},
        "policies": {"mine": {"zones": [SINKS, ZONES[kind][everything]], "rollback": rollback}},
        "heads": [{"policy": "mine", "layers": 0}, {"policy": "mine", "layers": 1, "kv_heads": 0}],
        "target": {"segments": "eager"},
    }
    return kvcompile.compile(toys.llama(layers=2), spec=spec)


@functools.cache
def full() -> CompiledModel:
    return kvcompile.compile(toys.llama(layers=2), spec={"kvcompile": 1, "verify": {"tokens": 16}, "target": {"segments": "eager"}})


def ids(count: int, seed: int = 0) -> torch.Tensor:
    return some_ids(count, VOCABULARY, seed)


def steps(session, tokens) -> torch.Tensor:
    return torch.stack([session.step(token) for token in tokens.tolist()])


@EVERY
def test_choosing_everything_is_full_attention(kind):
    tokens = ids(PROMPT + 40)
    session, expected = compiled(kind, everything=True).session(), full().session()
    for each in (session, expected):
        each.prefill(tokens[:PROMPT])
    torch.testing.assert_close(steps(session, tokens[PROMPT:]), steps(expected, tokens[PROMPT:]), rtol=1e-4, atol=1e-4)
    assert session.stores(0)[0].index is not None


@EVERY
def test_something_is_forgotten_and_not_much(kind):
    tokens = ids(PROMPT + 60)
    session, exact = compiled(kind).session(), full().session()
    for each in (session, exact):
        each.prefill(tokens[:PROMPT])
    found, expected = (steps(each, tokens[PROMPT:]).log_softmax(1) for each in (session, exact))
    assert 0 < (expected.exp() * (expected - found)).sum(1).mean() < 0.05


@EVERY
def test_forks_are_bit_equal_to_reading_anew(kind):
    tokens = ids(PROMPT + 100)
    session = compiled(kind).session()
    session.prefill(tokens[:PROMPT])
    steps(session, tokens[PROMPT : PROMPT + 40])
    child = session.fork()
    expected = steps(session, tokens[PROMPT + 40 :])
    assert torch.equal(steps(child, tokens[PROMPT + 40 :]), expected)


@EVERY
def test_a_rollback_is_bit_equal_to_never_having_read(kind):
    model = compiled(kind, rollback=70)
    tokens, other = ids(PROMPT + 100), ids(PROMPT + 100, seed=2)
    session, never = model.session(), model.session()
    for each in (session, never):
        each.prefill(tokens[:PROMPT])
        steps(each, tokens[PROMPT : PROMPT + 40])
    steps(session, other[:70])
    session.rollback(70)
    assert torch.equal(steps(session, tokens[PROMPT + 40 :]), steps(never, tokens[PROMPT + 40 :]))


@EVERY
def test_bytes_are_those_of_the_plan(kind):
    model = compiled(kind)
    session = model.session()
    session.prefill(ids(MIN_INDEXED_TOKENS + 16))
    session.step(1)
    assert session.stores(0)[0].index.end == 4 + MIN_INDEXED_TOKENS
    counted = model.plan.stored_bytes(MIN_INDEXED_TOKENS + 17)
    assert session.nbytes() == (pytest.approx(counted, rel=0.01) if kind == "hnsw" else counted)


# --- as written ------------------------------------------------------------------------------------------------------------------------

WINDOW = "{sink_recent: {sink_tokens: 128, recent_tokens: 512}}"
WRITTEN = {
    "{top_k: {pages: 16, page_tokens: 128, index: representatives}}": TopK(2048, "representatives", (("page_tokens", 128),)),
    "{top_k: {pages: 64, page_tokens: 16, index: minmax}}": TopK(1024, "minmax", (("page_tokens", 16),)),
    "{top_k: {pages: 64, page_tokens: 16, index: {cuboid: {radius: max}}}}": TopK(1024, "cuboid", (("page_tokens", 16), ("radius", "max"))),
    "{top_k: {pages: 512, page_tokens: 8, index: mean, select: sum}}": TopK(4096, "mean", (("page_tokens", 8),), "sum"),
    "{top_k: {k: 100, index: {hnsw: {m: 16, ef: 200}}}}": TopK(100, "hnsw", (("ef", 200), ("m", 16))),
    "{clusters: {tokens_per_cluster: 16, exact: 1.8%, estimate: 23.2%}}": TopK(
        1.8 / 100, "clusters", (("estimate", 23.2 / 100), ("tokens_per_cluster", 16)), "sum", tail=True
    ),
    "{clusters: {tokens_per_cluster: 8, exact: 5%, estimate: 0%}}": TopK(
        0.05, "clusters", (("estimate", 0.0), ("tokens_per_cluster", 8)), "sum", tail=False
    ),
    "{sample: {lsh: {hash_bits: 8, tables: 75}}}": Sample(8, 75),
    "{top_k: {k: 100, index: {ivf: {lists: 512, probe: 32}}}}": TopK(100, "ivf", (("lists", 512), ("probe", 32))),
}
EVERY_WRITTEN = pytest.mark.parametrize("zone", [pytest.param(zone, marks=[NEEDS_HNSWLIB] if "hnsw" in zone else []) for zone in WRITTEN])


def written(tmp_path, zone: str) -> Spec:
    file = tmp_path / "s.yaml"
    file.write_text(f"kvcompile: 1\npolicies: {{mine: {{zones: [{WINDOW}, {zone}]}}}}\nheads: [{{policy: mine}}]\n")
    return load_spec(file)


@EVERY_WRITTEN
def test_a_zone_is_read_as_it_is_written(tmp_path, zone):
    spec = written(tmp_path, zone)
    assert spec.policies["mine"] == HeadPolicy("mine", (SinkRecent(128, 512), WRITTEN[zone]))


@EVERY_WRITTEN
def test_a_reproducer_repeats_the_spec(tmp_path, zone):
    spec = written(tmp_path, zone)
    source = reproducer_source("", "pass", spec, None, "place")
    text = source[source.index("SPEC = ") + len("SPEC = ") : source.index("WEIGHTS = ")]
    names = {kind.__name__: kind for kind in (HeadPolicy, HeadRule, Output, Pattern, Prefix, Sample, SinkRecent, Spec, Target, TopK)}
    from kvcompile.ir.policy import All, Store

    assert eval(text, {**names, "All": All, "Store": Store}).policies == spec.policies


def test_a_zone_says_how_many_pages_it_finds():
    assert WRITTEN["{top_k: {pages: 64, page_tokens: 16, index: minmax}}"].describe() == "top 64 pages of 16 by minmax, union"


def test_policies_that_are_built_in():
    names = ("quest", "infllm", "retroinfer", "magicpig")
    spec = load_spec({"kvcompile": 1, "seed": 3, "heads": [{"policy": name, "layers": layer} for layer, name in enumerate(names)]})
    assert spec.policies["magicpig"] == HeadPolicy("magicpig", (SinkRecent(4, 64), Sample(10, 150, seed=3)))
    assert spec.policies["quest"].found == TopK(1024, "minmax", (("page_tokens", 16),))
    assert spec.policies["infllm"].found == TopK(2048, "representatives", (("page_tokens", 128),))
    assert spec.policies["retroinfer"].found == TopK(0.018, "clusters", (("estimate", 0.232), ("tokens_per_cluster", 16)), "sum", tail=True)


@pytest.mark.parametrize("way", ["torch", "no compiler", "a build that fails"])
def test_keys_are_drawn_in_torch_as_in_cpp(way, monkeypatch):
    tokens = ids(PROMPT + 60)
    expected = compiled("sample").session()
    expected.prefill(tokens[:PROMPT])
    with_library = steps(expected, tokens[PROMPT:])
    monkeypatch.setattr(native_lsh, "_library", None)
    if way == "no compiler":
        monkeypatch.setenv("PATH", "/nonexistent")
        monkeypatch.delenv("CXX", raising=False)
    if way == "a build that fails":

        def fail(*_: object, **__: object) -> None:
            raise BuildError.at("kept/folder", "lsh.cpp:1: error: no such thing.", "Repeat it with: g++ ...")

        monkeypatch.setattr(link, "build_lsh", fail)
    spec = {
        "kvcompile": 1,
        "verify": {"tokens": 16},
        "policies": {"mine": {"zones": [SINKS, ZONES["sample"][0]]}},
        "heads": [{"policy": "mine", "layers": 0}, {"policy": "mine", "layers": 1, "kv_heads": 0}],
        "target": {"segments": "eager", "kernels": "torch" if way == "torch" else "generated"},
    }
    model = kvcompile.compile(toys.llama(layers=2), spec=spec)
    assert native_lsh.lsh_library() is None
    assert ["of hash tables could not be built" in warning for warning in model.warnings] == {"a build that fails": [True]}.get(
        way, [False] * len(model.warnings)
    )
    session = model.session()
    session.prefill(tokens[:PROMPT])
    torch.testing.assert_close(steps(session, tokens[PROMPT:]), with_library, rtol=1e-3, atol=1e-3)
