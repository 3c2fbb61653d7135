"""Sessions that were saved and restored: to the bit what they were, in this process and in others, whatever their stores are."""

from __future__ import annotations

import dataclasses
import functools
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from damage import description, forged, section, with_section
from units import some_ids

import kvcompile
from kvcompile.ir.errors import SessionError
from kvcompile.ir.indexes import MIN_INDEXED_TOKENS
from kvcompile.ir.policy import SinkRecent
from kvcompile.runtime import lookup
from kvcompile.runtime import model as runtime_model
from kvcompile.runtime.growable import GrowableStore
from kvcompile.runtime.lookup import LookupStore
from kvcompile.runtime.model import CompiledModel
from kvcompile.runtime.session_file import first_difference, plan_facts

SINKS = {"sink_recent": {"sink_tokens": 4, "recent_tokens": 12}}
KIVI = {"kivi": {"bits": 4, "group": 16, "residual_tokens": 16}}
LONG = {"sink_recent": {"sink_tokens": 4, "recent_tokens": 40}}
WHOLE = {"sink_recent": {"sink_tokens": 4, "recent_tokens": 32}}  # no longer than a residual
POLICIES: dict[str, dict[str, Any]] = {
    "full": {"zones": ["all"]},
    "bfloat16": {"zones": ["all"], "store": {"dtype": "bfloat16"}},
    "ring": {"zones": [SINKS], "rollback": 5},
    "int8": {"zones": ["all"], "store": "int8"},
    "int8 ring": {"zones": [SINKS], "store": "int8", "rollback": 5},
    "kivi": {"zones": ["all"], "store": KIVI},
    "kivi ring": {"zones": [LONG], "store": {"kivi": {"bits": 2, "group": 16, "residual_tokens": 32}}, "rollback": 8},
    "kivi ring of residuals": {"zones": [WHOLE], "store": {"kivi": {"bits": 2, "group": 16, "residual_tokens": 32}}},
    "sketch": {"zones": [SINKS, {"top_k": {"k": 40, "index": "sketch", "tail": True}}]},
    "flat": {"zones": [SINKS, {"top_k": {"k": 40, "index": "flat"}}], "store": "int8"},
    "ivf": {"zones": [SINKS, {"top_k": {"k": 40, "index": "ivf"}}], "store": KIVI},
    "quest": {"zones": [SINKS, {"top_k": {"pages": 4, "page_tokens": 16, "index": "minmax"}}]},
    "infllm": {"zones": [SINKS, {"top_k": {"pages": 4, "page_tokens": 16, "index": "representatives"}}]},
    "clusters": {"zones": [SINKS, {"clusters": {"tokens_per_cluster": 16, "exact": "5%", "estimate": "20%"}}]},
    "roargraph": {"zones": [SINKS, {"top_k": {"k": 40, "index": {"roargraph": {"queries": 512, "neighbours": 50, "ef": 60}}}}]},
    "sample": {"zones": [SINKS, {"sample": {"lsh": {"hash_bits": 4, "tables": 20}}}]},
    "disk": {"zones": [{"all": {"device": "disk"}}]},
    "static": {"zones": [SINKS, {"static": {"keys": 24}}]},
    "static of few bits": {"zones": [LONG, {"static": {"keys": 24}}], "store": KIVI},
}
FOUND = ("sketch", "flat", "ivf", "quest", "infllm", "clusters", "roargraph", "sample", "static", "static of few bits")
EVERY = pytest.mark.parametrize("policy", POLICIES)
VOCABULARY = 256


@functools.cache
def compiled(policy: str, kernels: str = "generated", **sizes: int) -> CompiledModel:
    """KV head 0 of each layer has the policy, head 1 is full."""
    heads = [{"policy": "full"}, {"policy": "mine", "kv_heads": 0}]
    target = {"segments": "eager", "kernels": kernels}
    spec = {"kvcompile": 1, "verify": {"tokens": 16}, "policies": {"mine": POLICIES[policy]}, "heads": heads, "target": target}
    return kvcompile.compile(toys.llama(**{"layers": 2, **sizes}), spec=spec)


def ids(count: int, seed: int = 0) -> torch.Tensor:
    return some_ids(count, VOCABULARY, seed)


def steps(session: kvcompile.Session, tokens: torch.Tensor) -> torch.Tensor:
    return torch.stack([session.step(token) for token in tokens.tolist()])


def prompt_of(policy: str) -> torch.Tensor:
    return ids(MIN_INDEXED_TOKENS + 60 if policy in (*FOUND, "disk") else 100)


def read(policy: str, kernels: str = "generated") -> kvcompile.Session:
    """With generated tokens behind the prompt: indexes are made, static keys are chosen."""
    session = compiled(policy, kernels).session()
    session.prefill(prompt_of(policy))
    steps(session, ids(5, 1))
    return session


def saved(session: kvcompile.Session, folder: Path) -> kvcompile.Session:
    session.save(folder / "session")
    return session.model.restore(folder / "session")


def same_ways(first: kvcompile.Session, second: kvcompile.Session) -> None:
    """Steps, a fork, a rollback, a further prompt: all to the bit."""
    for tokens in (ids(45, 2), ids(3, 3)):
        assert torch.equal(*(steps(each, tokens) for each in (first, second)))
    forks = [each.fork() for each in (first, second)]
    assert torch.equal(*(steps(each, ids(3, 4)) for each in forks))
    assert torch.equal(*(each.prefill(ids(30, 5), logits="all") for each in (first, second)))
    for each in (first, second):
        each.rollback(1)
    assert torch.equal(*(steps(each, ids(20, 6)) for each in (first, second)))
    assert torch.equal(*(each.prefill(ids(9, 7)) for each in forks))
    assert first.tokens == second.tokens


@pytest.mark.parametrize("kernels", ["generated", "torch"])
@EVERY
def test_a_restored_session_goes_on_as_the_saved_one_does(policy, kernels, tmp_path):
    session = read(policy, kernels)
    restored = saved(session, tmp_path)
    assert restored.tokens == session.tokens
    assert restored.nbytes() + restored.shared_nbytes() == session.nbytes()
    same_ways(session, restored)


@EVERY
def test_a_prompt_that_nothing_was_generated_for_is_kept_too(policy, tmp_path):
    session = compiled(policy).session()
    session.prefill(prompt_of(policy))
    same_ways(session, saved(session, tmp_path))


@EVERY
def test_an_empty_session_is_kept(policy, tmp_path):
    restored = saved(compiled(policy).session(), tmp_path)
    assert len(restored) == restored.nbytes() == 0 or policy in FOUND
    assert torch.equal(restored.prefill(ids(40)), compiled(policy).session().prefill(ids(40)))


@EVERY
def test_what_a_fork_shares_is_written_whole_and_saved_again(policy, tmp_path):
    """The past lies in three parts: the parent's, the fork's, and what a restored fork has read since."""
    fork = read(policy).fork()
    steps(fork, ids(7, 8))
    again = fork.fork()
    steps(again, ids(6, 9))
    restored = saved(again, tmp_path)
    same_ways(again, restored)
    fork = restored.fork()
    steps(fork, ids(2, 10))
    same_ways(fork, saved(fork, tmp_path))


@EVERY
def test_a_rollback_into_the_file_is_one_into_the_session(policy, tmp_path):
    session = read(policy)
    restored = saved(session, tmp_path)
    for each in (session, restored):
        each.rollback(1 if "ring" in policy or "static" in policy else 4)
    same_ways(session, restored)
    same_ways(session, saved(session, tmp_path))


def test_convolutions_are_kept(tmp_path):
    spec = {"kvcompile": 1, "verify": {"tokens": 16}, "target": {"segments": "eager"}}
    model = kvcompile.compile(toys.lfm2("caacc"), spec=spec)
    for read_tokens in (0, 1, 30):
        session = model.session()
        if read_tokens:
            session.prefill(ids(read_tokens))
        restored = saved(session, tmp_path)
        assert [each.tokens for each in restored.convolutions] == [read_tokens] * 3
        assert torch.equal(session.prefill(ids(20, 1)), restored.prefill(ids(20, 1)))
        assert torch.equal(steps(session, ids(5, 2)), steps(restored, ids(5, 2)))


def test_a_session_under_other_kernels_is_converted(tmp_path):
    """Keys lie in blocks where C++ kernels read them and in rows where torch does."""
    for policy in ("full", "ring", "int8", "kivi", "static", "sketch"):
        for one, other in (("generated", "torch"), ("torch", "generated")):
            session = read(policy, one)
            session.save(tmp_path / "session")
            restored = compiled(policy, other).restore(tmp_path / "session")
            torch.testing.assert_close(steps(session, ids(8, 2)), steps(restored, ids(8, 2)), rtol=1e-4, atol=1e-4)
            back = restored.model.restore(tmp_path / "session")
            back.save(tmp_path / "back")
            again = session.model.restore(tmp_path / "back")  # to and fro changes no bit
            assert torch.equal(steps(again, ids(8, 2)), steps(session.model.restore(tmp_path / "session"), ids(8, 2)))


# --- the file ----------------------------------------------------------------------------------------------------------------------------


def test_keys_are_read_where_the_file_lies_and_nothing_is_written_to_it(tmp_path):
    session = read("full")
    restored = saved(session, tmp_path)
    whole = (tmp_path / "session").read_bytes()
    assert restored.nbytes() == 0 and restored.shared_nbytes() == session.nbytes() > 0
    store = restored.stores(0)[0]
    assert isinstance(store, GrowableStore)
    store.spans()[0].value_HTE.sum()
    kept = mapped_from("session")
    assert kept["Size"] * 1024 >= len(whole)
    same_ways(session, restored)
    assert mapped_from("session")["Private_Dirty"] == 0
    assert (tmp_path / "session").read_bytes() == whole
    assert restored.shared_nbytes() == session.fork().shared_nbytes() - restored.nbytes()


def mapped_from(name: str) -> dict[str, int]:
    """KiB of this process's mappings of a file, as Linux counts them."""
    found: dict[str, int] = {}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith((f"/{name}", f"/{name} (deleted)"))
        elif inside and line.endswith(" kB"):
            key, number, _ = line.split()
            found[key.rstrip(":")] = found.get(key.rstrip(":"), 0) + int(number)
    return found


def test_the_mapping_goes_with_the_session(tmp_path):
    restored = saved(read("full"), tmp_path)
    assert mapped_from("session")
    fork = restored.fork()
    del restored
    assert mapped_from("session")
    del fork
    assert not mapped_from("session")


def test_a_file_may_vanish_or_be_replaced_below_a_restored_session(tmp_path):
    session = read("sketch")
    first, second = (saved(session, tmp_path) for _ in range(2))
    first.save(tmp_path / "session")  # over what it reads
    same_ways(session.fork(), first)
    (tmp_path / "session").unlink()
    same_ways(session, second)


def test_neither_a_prompt_is_read_nor_an_index_made(tmp_path, monkeypatch):
    session = read("sketch")
    session.save(tmp_path / "session")
    expected = steps(session, ids(8, 2))

    def never(*given: Any, **more: Any) -> Any:
        raise AssertionError("built again")

    monkeypatch.setattr(lookup.LookupStore, "_build", never)
    forward = runtime_model.CompiledModel.forward
    lengths: list[int] = []

    def counted(self: CompiledModel, batch: Any, **options: Any) -> Any:
        lengths.extend(len(tokens) for _, tokens in batch)
        return forward(self, batch, **options)

    monkeypatch.setattr(runtime_model.CompiledModel, "forward", counted)
    restored = session.model.restore(tmp_path / "session")
    assert torch.equal(steps(restored, ids(8, 2)), expected)
    assert lengths == [1] * 8
    stores = [store for site in range(2) for store in restored.stores(site) if isinstance(store, LookupStore)]
    assert len(stores) == 2 and all(store.index is not None for store in stores)


def test_equal_sessions_have_equal_files(tmp_path):
    session = read("kivi")
    saved(session, tmp_path).save(tmp_path / "again")
    assert (tmp_path / "session").read_bytes() == (tmp_path / "again").read_bytes()


def test_what_was_taken_back_is_not_in_the_file(tmp_path):
    session = read("full")
    session.rollback(3)
    session.save(tmp_path / "session")
    shorter = compiled("full").session()
    shorter.prefill(prompt_of("full"))
    steps(shorter, ids(5, 1)[:2])
    shorter.save(tmp_path / "shorter")
    assert (tmp_path / "session").read_bytes() == (tmp_path / "shorter").read_bytes()


OTHER_PROCESS = """
    import sys
    sys.path.insert(0, "tests")
    import torch
    from test_session_file import compiled, ids, steps
    torch.set_num_threads(int(sys.argv[3]))
    torch.save(steps(compiled("sketch").restore(sys.argv[1]), ids(8, 2)), sys.argv[2])
"""


@pytest.mark.slow
def test_another_process_goes_on(tmp_path, request):
    session = read("sketch")
    session.save(tmp_path / "session")
    script = [sys.executable, "-c", textwrap.dedent(OTHER_PROCESS), str(tmp_path / "session")]
    threads = str(torch.get_num_threads())
    running = [subprocess.Popen([*script, str(tmp_path / name), threads], cwd=request.config.rootpath) for name in ("one", "two")]
    assert [each.wait() for each in running] == [0, 0]
    expected = steps(session, ids(8, 2))
    assert all(torch.equal(torch.load(tmp_path / name), expected) for name in ("one", "two"))


# --- what is refused ---------------------------------------------------------------------------------------------------------------------


def test_another_model_is_named(tmp_path):
    read("ring").save(tmp_path / "session")
    with pytest.raises(SessionError, match=r"saved by another model: LlamaForCausalLM \(hash [0-9a-f]{12}\); this one is Llama") as caught:
        compiled("ring", seed=1).restore(tmp_path / "session")
    assert "\n  Restore it with the model that saved it" in str(caught.value)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (
            "full",
            r"sites\[0\]\.groups\[0\]\.policy\.zones\[0\] \(.*\) is \{\"SinkRecent\": .* and \{\"All\": \{\}\} here",
        ),
        ("sketch", r"policy\.zones \(model\.layers\.0\.self_attn\) is \[\{\"SinkRecent\".* in the file and \[\{\"SinkRecent\""),
        ("int8 ring", r"policy\.store\.quantised \(model\.layers\.0\.self_attn\) is null in the file and \{\"Int8\": \{\}\} here"),
    ],
)
def test_another_plan_is_named_by_what_differs(other, told, tmp_path):
    read("ring").save(tmp_path / "session")
    with pytest.raises(SessionError, match=f"saved under another plan: {'' if other == 'full' else '.*'}{told}") as caught:
        compiled(other).restore(tmp_path / "session")
    assert "\n  Compile with the policies that it was saved under" in str(caught.value)


def test_another_window_is_named_by_its_numbers(tmp_path):
    session = read("ring")
    session.save(tmp_path / "session")
    plan = session.model.plan

    def wider(group: Any) -> Any:
        zones = tuple(dataclasses.replace(each, recent_tokens=16) if isinstance(each, SinkRecent) else each for each in group.policy.zones)
        return dataclasses.replace(group, policy=dataclasses.replace(group.policy, zones=zones))

    site = dataclasses.replace(plan.sites[1], groups=tuple(map(wider, plan.sites[1].groups)))
    model = session.model.with_plan(dataclasses.replace(plan, sites=(plan.sites[0], site)))
    told = r"zones\[0\]\.SinkRecent\.recent_tokens \(model\.layers\.1\.self_attn\) is 12 in the file and 16 here"
    with pytest.raises(SessionError, match=told):
        model.restore(tmp_path / "session")


def test_another_dtype_is_named(tmp_path):
    read("ring").save(tmp_path / "session")
    spec = {"kvcompile": 1, "verify": {"tokens": 16}, "target": {"segments": "eager"}}
    model = kvcompile.compile(toys.llama(layers=2).bfloat16(), spec=spec)
    with pytest.raises(SessionError, match="by a model that computes in float32; this one computes in bfloat16") as caught:
        model.restore(tmp_path / "session")
    assert "dtype: float32" in str(caught.value)


def test_names_of_policies_and_budgets_are_no_part_of_the_plan(tmp_path):
    session = read("ring")
    session.save(tmp_path / "session")
    plan = session.model.plan

    def renamed(group: Any) -> Any:
        return dataclasses.replace(group, policy=dataclasses.replace(group.policy, name="another"), capacity_tokens=77)

    sites = tuple(dataclasses.replace(site, groups=tuple(map(renamed, site.groups))) for site in plan.sites)
    model = session.model.with_plan(dataclasses.replace(plan, sites=sites))
    assert torch.equal(steps(model.restore(tmp_path / "session"), ids(3, 2)), steps(session, ids(3, 2)))


def test_the_first_difference_is_found():
    assert first_difference({"a": [1, {"b": 2}]}, {"a": [1, {"b": 2}]}) is None
    assert first_difference({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}) == (".a[1].b", 2, 3)
    assert first_difference({"a": [1]}, {"a": [1, 2]}) == (".a", [1], [1, 2])
    assert first_difference({"a": 1}, {"b": 1}) == ("", {"a": 1}, {"b": 1})
    assert first_difference([1], 1) == ("", [1], 1)


def test_facts_of_a_plan_are_what_json_keeps_of_them():
    import json

    facts = plan_facts(compiled("sketch").plan)
    assert json.loads(json.dumps(facts)) == facts


def changed(name: str, value: Any) -> Any:
    """Numbers of that name in a store's state become another value."""

    def change(found: Any) -> None:
        def walk(state: Any) -> None:
            if name in state["numbers"]:
                state["numbers"][name] = value
            for inner in state["inner"].values():
                walk(inner)

        for of_site in found["content"]["stores"]:
            for state in of_site:
                walk(state)

    return change


@pytest.mark.parametrize(
    ("policy", "name", "value", "told"),
    [
        ("full", "tokens", 104, "model.layers.0.self_attn, KV heads 0 1 does not fit|104 of 105 tokens|keys is"),
        ("full", "tokens", -1, "tokens is -1"),
        ("full", "tokens", 1.5, "tokens is 1.5"),
        ("full", "tokens", "105", "tokens is '105'"),
        ("full", "layout", "int8", "keys in the layout 'int8' cannot become"),
        ("ring", "high", 3, "tokens is 105"),
        ("ring", "high", 1 << 50, "high is"),
        ("ring", "layout", [1], "does not fit"),
        ("kivi", "tokens", 40, "exact_keys is|tokens"),
        ("kivi ring", "dropped_values", 4, "dropped_values is 4"),
        ("sketch", "first", 36, "position_HT.0 does not hold each position"),
        ("sketch", "queries", -2, "queries is -2"),
        ("sketch", "stride", 0, "stride is 0"),
        ("sketch", "growths", 3, "growths is 3"),
        ("sketch", "growths", [[5, 4]], "growths is"),
        ("sketch", "growths", [[5, 4, -1]], "growths is"),
        ("sketch", "growths", [[600, 36, 600]], "growths is .* of an index that ends at"),
        ("sketch", "growths", [], "growths is .* of an index that ends at"),
        ("sketch", "growths", [[600, 36, 610]], "growths is"),
        ("sketch", "growths", [[600, 36, 600], [590, 68, 590]], "growths is"),
        ("sketch", "growths", [[600, 36, 600], [700, 5, 700]], "growths is"),
        ("static", "chosen_end", None, "chosen_end is None"),
    ],
)
def test_numbers_that_no_store_writes_are_refused(policy, name, value, told, tmp_path):
    """With checksums that are right: who reads the file believes no number because of them."""
    read(policy).save(tmp_path / "session")
    (tmp_path / "session").write_bytes(forged((tmp_path / "session").read_bytes(), changed(name, value)))
    with pytest.raises(SessionError, match=f"damaged: what it says of model.layers.0.self_attn.*({told})"):
        compiled(policy).restore(tmp_path / "session")


def test_tokens_outside_the_vocabulary_and_another_number_of_them_are_refused(tmp_path):
    read("full").save(path := tmp_path / "session")
    whole = path.read_bytes()
    wrong = torch.full((105,), VOCABULARY).numpy().tobytes()
    path.write_bytes(with_section(whole, "the token ids", wrong))
    with pytest.raises(SessionError, match=r"what it says of the tokens does not fit \(ids from 256 to 256 of a vocabulary of 256"):
        compiled("full").restore(path)
    half = compiled("full").session()
    half.prefill(ids(50))
    half.save(path)
    other = description(path.read_bytes())["content"]["stores"]

    def mixed(found: Any) -> None:
        found["content"]["tokens"] = {**found["content"]["tokens"], "shape": [105]}

    path.write_bytes(forged(whole, lambda found: found["content"].update(stores=other) or found))
    with pytest.raises(SessionError, match="damaged"):
        compiled("full").restore(path)


@pytest.mark.parametrize("kind", ["kind", "index"])
def test_a_store_of_another_kind_is_refused(kind, tmp_path):
    read("sketch").save(path := tmp_path / "session")

    def change(found: Any) -> None:
        state = found["content"]["stores"][0][0]
        state = state if state["kind"] == "lookup" else found["content"]["stores"][0][1]
        (state if kind == "kind" else state["inner"]["index"])["kind"] = "ring"

    path.write_bytes(forged(path.read_bytes(), change))
    with pytest.raises(SessionError, match=r"another kind of store: ring, not (lookup|sketch)"):
        compiled("sketch").restore(path)


def test_an_index_of_keys_of_another_shape_is_refused(tmp_path):
    """Kernels read the index by the shape of the keys."""
    wide = compiled("sketch", head_dim=32).session()
    wide.prefill(prompt_of("sketch"))
    wide.step(1)
    store = next(each for each in wide.stores(0) if isinstance(each, LookupStore))
    narrow = next(each for each in read("sketch").stores(0) if isinstance(each, LookupStore))
    assert store.index is not None
    with pytest.raises(ValueError, match=r"an index of the shape \(1, 32, 32\) over 1 heads of \(16, 16\)"):
        narrow._check_index(store.index)


def test_a_broken_session_is_not_saved(tmp_path):
    session = read("full")
    session._broken = "something was overwritten."
    with pytest.raises(SessionError, match="something was overwritten"):
        session.save(tmp_path / "session")
    assert not list(tmp_path.iterdir())


class Forgetful:
    """A store without `state`."""


def test_a_store_that_no_file_keeps_is_named(tmp_path):
    session = read("full").fork()
    session.stores(0)[0] = Forgetful()
    with pytest.raises(SessionError, match="Forgetful cannot be kept in a session file"):
        session.save(tmp_path / "session")
    assert not list(tmp_path.iterdir())


def test_a_bit_of_an_index_in_a_session_is_named_by_its_place(tmp_path):
    read("sketch").save(path := tmp_path / "session")
    whole = path.read_bytes()
    offset, _ = section(whole, "index: position_HT.0")
    path.write_bytes(whole[:offset] + bytes([whole[offset] ^ 1]) + whole[offset + 1 :])
    with pytest.raises(SessionError, match=r"model\.layers\.0\.self_attn, KV heads 0: index: position_HT\.0 .* checksum"):
        compiled("sketch").restore(path)
