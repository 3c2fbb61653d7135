"""Sessions that were forked from one prefix step together: the same logits with and without relay, and a count of what was shared."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
import toys
from units import some_ids

import kvcompile
from kvcompile.ir.errors import CapacityError, Problem
from kvcompile.ir.relaying import relay_remark
from kvcompile.ir.spec import Relay, Target
from kvcompile.runtime import relay as runtime_relay
from kvcompile.runtime.model import CompiledModel
from kvcompile.runtime.native import NO_KERNELS, NO_RELAY, RelayRule
from kvcompile.runtime.relay import Timed, chosen

VOCABULARY = 256
LAYERS = 2
WINDOW = {"sink_recent": {"sink_tokens": 4, "recent_tokens": 12}}
POLICIES: dict[str, dict[str, Any]] = {  # of KV head 0; the other one keeps everything
    "streaming": {"zones": [WINDOW]},
    "lookup": {"zones": [WINDOW, {"top_k": {"k": 40, "index": "sketch"}}]},
    "int8": {"zones": ["all"], "store": "int8"},
}
ROWS = {"full": 1, "streaming": 1, "lookup": 1, "int8": 2}  # of a session at a site that may be shared


@functools.cache
def compiled(policy: str = "full", relay: Relay = "always", **target: Any) -> CompiledModel:
    spec: dict[str, Any] = {"kvcompile": 1, "verify": {"tokens": 16}, "target": {"segments": "eager", **target}}
    if policy in POLICIES:
        spec |= {"policies": {"mine": POLICIES[policy]}, "heads": [{"policy": "mine", "kv_heads": 0}]}
    model = kvcompile.compile(toys.llama(layers=LAYERS), spec=spec)
    return model.with_plan(replace(model.plan, relay=relay))


def family(model: CompiledModel, prefix: int = 600, tails: tuple[int, ...] = (0, 3, 20)) -> list[Any]:
    base = model.session()
    base.prefill(some_ids(prefix, VOCABULARY))
    sessions = [base.fork() for _ in tails]
    for number, (session, tail) in enumerate(zip(sessions, tails, strict=True)):
        if tail:
            session.prefill(some_ids(tail, VOCABULARY, number + 1))
    return sessions


@pytest.mark.parametrize("policy", ROWS)
def test_logits_are_the_same_bits_and_what_was_shared_is_counted(policy):
    apart, together = (family(compiled(policy, relay)) for relay in ("off", "always"))
    for token in (1, 2, 3):
        expected, found = (compiled(policy, relay).step(each, [token] * 3) for relay, each in (("off", apart), ("always", together)))
        assert torch.equal(expected, found)
    relay = compiled(policy, "always").relay
    assert relay.calls == 3 * LAYERS and relay.shared == 3 * LAYERS * 3 * ROWS[policy]  # steps, sites, sessions, rows
    assert compiled(policy, "off").relay.shared == 0


def test_explain_says_when_and_how_often():
    model = compiled("int8")
    model.step(family(model), [1, 2, 3])
    said = f"; so far {model.relay.shared} of {model.relay.rows} rows in {model.relay.calls} calls"
    assert f"relay always, as the spec says: from 2 sessions and 256 shared tokens on{said}" in model.explain().splitlines()


@pytest.mark.parametrize(
    ("policy", "relay", "heads"),
    [("full", "always", "4 of 4"), ("full", "auto", "4 of 4"), ("streaming", "auto", "2 of 4"), ("lookup", "always", "2 of 4")],
)
def test_a_plan_says_on_which_heads_and_what_decides(policy, relay, heads):
    """A ring is a session's own, and of keys that are found no kernel sees several sessions' together."""
    told = relay_remark(compiled(policy, relay).plan, Target())
    on = f"on {heads} KV heads, those that keep all their past"
    if relay == "auto":
        assert told == f"relay auto, {on}: measured on the machine when several sessions first step together (model.relay.reason)"
    else:
        assert told == f"relay always, as the spec says: from 2 sessions and 256 shared tokens on, {on}"


def test_a_plan_says_why_nothing_is_relayed_as_the_model_does():
    for model in (compiled(relay="off"), compiled(deterministic=True), compiled(kernels="torch")):
        assert relay_remark(model.plan, model.spec.target) == f"relay {model.relay.reason}"
        assert model.relay.reason.startswith("off: ")
    plan = compiled("streaming").plan
    ring = next(group for group in plan.sites[0].groups if group.policy.window)
    streaming = replace(plan, sites=(replace(plan.sites[0], groups=(replace(ring, kv_heads=(0, 1)),)),))
    none = "relay off: no KV head keeps all its past where a C++ kernel reads it"
    assert relay_remark(streaming, Target()) == none
    assert relay_remark(compiled().plan, Target(), NO_KERNELS.serve) == none  # as where there is no compiler


def test_a_session_alone_never_relays():
    model = compiled()
    session, calls = family(model)[0], model.relay.calls
    session.step(1)
    model.step([session], [2])
    assert model.relay.calls == calls


def test_short_prefixes_are_read_by_each():
    model = compiled()
    sessions, shared = family(model, 255), model.relay.shared
    model.step(sessions, [1, 2, 3])
    assert model.relay.shared == shared


def test_sessions_of_a_deterministic_model_step_one_after_the_other():
    model = compiled(deterministic=True)
    model.step(family(model), [1, 2, 3])
    assert model.relay.shared == 0 and "target.deterministic" in model.relay.reason


def test_bfloat16_is_near_what_it_is_without():
    """Weights over what is shared may be rounded to bfloat16: 2**-9 of each."""
    model = kvcompile.compile(toys.llama(layers=LAYERS, head_dim=32).bfloat16(), spec={"kvcompile": 1, "verify": {"tokens": 16}})
    off, on = (model.with_plan(replace(model.plan, relay=relay)) for relay in ("off", "always"))
    apart, together = family(off), family(on)
    for token in (1, 2, 3):
        expected, found = off.step(apart, [token] * 3), on.step(together, [token] * 3)
        assert float((expected - found).abs().max()) <= 2.0**-6 * float(expected.abs().max())
    assert on.relay.shared == 3 * LAYERS * 3 and off.relay.shared == 0


def test_without_memory_to_measure_in_nothing_is_relayed(monkeypatch):
    def refuse(*_):
        raise CapacityError(Problem("address space", "none left.", "Raise the limit."))

    model = compiled(relay="auto")
    model = model.with_plan(replace(model.plan))
    with monkeypatch.context() as patch:
        patch.setattr(runtime_relay, "_timed", refuse)
        model.step(family(model), [1, 2, 3])
    assert model.relay.rule == NO_RELAY and "no memory" in model.relay.reason


def test_both_ways_are_timed(monkeypatch):
    rules, real = [], runtime_relay.attend_native

    def seen(*arguments, relay, **options):
        shared = real(*arguments, relay=relay, **options)
        rules.append((relay == NO_RELAY, shared > 0))
        return shared

    monkeypatch.setattr(runtime_relay, "attend_native", seen)
    model = compiled(relay="auto")
    assert model.with_plan(replace(model.plan)).relay.calls == 0
    assert set(rules) == {(True, False), (False, True)}


def test_without_kernels_there_is_nothing_to_share():
    model = compiled(kernels="torch")
    model.step(family(model), [1, 2, 3])
    assert model.relay.rule == NO_RELAY and "no KV head" in model.relay.reason


def test_auto_measures_and_says_what():
    relay = compiled(relay="auto").relay
    assert relay.reason.startswith(("off: ", "from ")) and "measured" in relay.reason
    assert relay.rule == NO_RELAY or (relay.rule.sessions >= 2 and relay.rule.tokens >= 256)


def test_the_rule_follows_from_the_times():
    def times(**paying: bool) -> dict[int, Timed]:
        return {int(sessions[1:]): Timed(1.0 if pays else 2.0, 1.5) for sessions, pays in paying.items()}

    def from_512(_sessions: int, tokens: int) -> Timed:
        return Timed(1.0, 1.5 if tokens >= 512 else 1.0)

    assert chosen(times(_2=True, _3=True, _4=True), from_512).rule == RelayRule(2, 512)
    assert chosen(times(_2=True, _3=False, _4=True), from_512).rule == RelayRule(4, 512)  # what pays once by chance does not count
    assert chosen(times(_2=True, _3=False), from_512).rule == NO_RELAY
    assert chosen(times(_2=True), lambda *_: Timed(2.0, 1.0)).rule == RelayRule(2, 2048)
    assert "2 sessions over 512 shared tokens" in chosen(times(_2=True), from_512).reason
