"""Sessions of models that mix tokens by short convolutions as well as attention, through `kvcompile.compile`."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
import toys
from units import some_ids

import kvcompile
from kvcompile.diagnose import original_logits
from kvcompile.ir.errors import SessionError, VerificationError
from kvcompile.runtime.model import CompiledModel, PackedCall
from kvcompile.runtime.program import Convolve

VOCABULARY = 256
WINDOW = 16
POLICIES = {
    "full": {},
    "streaming": {
        "policies": {"short": {"zones": [{"sink_recent": {"sink_tokens": 4, "recent_tokens": 12}}]}},
        "heads": [{"policy": "short"}],
    },
    "back": {"policies": {"full": {"zones": ["all"], "rollback": 5}}},
}
LAYERS = ["caacc", "cca"]  # the last site is a convolution, an attention


@functools.cache
def model(layers: str) -> torch.nn.Module:
    return toys.lfm2(layers)


@functools.cache
def compiled(layers: str = "caacc", rule: str = "full", chunk_tokens: int = 2048, kernels: str = "generated") -> CompiledModel:
    target = {"segments": "eager", "kernels": kernels}
    spec = {"kvcompile": 1, "verify": {"tokens": 16}, "prefill": {"chunk_tokens": chunk_tokens}, "target": target, **POLICIES[rule]}
    return kvcompile.compile(model(layers), spec=spec)


def original(layers: str, ids: torch.Tensor) -> torch.Tensor:
    return original_logits(model(layers), ids)


def read(session, ids, chunk: int) -> torch.Tensor:
    return torch.cat([session.prefill(part, logits="all") for part in ids.split(chunk)])


def steps(session, ids) -> torch.Tensor:
    return torch.stack([session.step(int(token)) for token in ids])


def close(found, expected) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_toys_have_both_kinds_of_layer():
    """Trap 42."""
    for layers in LAYERS:
        names = [type(module).__name__ for module in model(layers).modules()]
        assert (names.count("Lfm2ShortConv"), names.count("Lfm2Attention")) == (layers.count("c"), layers.count("a"))
        plan = compiled(layers).plan
        assert (len(plan.convolutions), len(plan.sites)) == (layers.count("c"), layers.count("a"))


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("kernels", ["generated", "torch"])
def test_full_equals_the_original_in_prefill_and_steps(layers, kernels):
    full = compiled(layers, kernels=kernels)
    ids = some_ids(70, VOCABULARY)
    expected = original(layers, ids)
    for chunk in (1, 7, 64):
        close(read(full.session(), ids, chunk), expected)
    close(steps(full.session(), ids[:20]), expected[:20])
    session = full.session()
    close(torch.cat([read(session, ids[:50], 50), steps(session, ids[50:])]), expected)


@pytest.mark.parametrize("layers", LAYERS)
def test_only_the_wanted_rows_leave_the_last_site(layers):
    """The last site is once a convolution and once an attention; the last token's logits are those of all."""
    full = compiled(layers)
    assert isinstance(full.program.steps[full.program.final_site], Convolve) == (layers[-1] == "c")
    assert full.program.ends_with_attention == (layers[-1] == "a")
    ids = some_ids(40, VOCABULARY)
    close(full.session().prefill(ids), original(layers, ids)[-1])
    sessions = [full.session() for _ in range(3)]
    texts = [some_ids(tokens, VOCABULARY, tokens) for tokens in (9, 1, 14)]
    for _ in range(2):  # empty sessions, then ones with a past
        rows = full.forward(list(zip(sessions, texts, strict=True)))
    for row, text in zip(rows, texts, strict=True):
        close(row, original(layers, torch.cat([text, text]))[-1])


def test_rows_that_are_not_wanted_are_not_computed(monkeypatch):
    """Of a prompt of 40 tokens the last convolution gives one row, the others all."""
    rows = {}
    real = PackedCall.convolve

    def told(self, site, *rest):
        out = real(self, site, *rest)
        rows[site] = out.shape[2]
        return out

    monkeypatch.setattr(PackedCall, "convolve", told)
    compiled("caacc").session().prefill(some_ids(40, VOCABULARY))
    assert rows == {0: 40, 1: 40, 2: 1}


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_do_not_change_streaming_results(layers, chunk):
    """Trap 5."""
    streaming = compiled(layers, "streaming")
    ids = some_ids(130, VOCABULARY)
    close(read(streaming.session(), ids, chunk), read(streaming.session(), ids, 512))


@pytest.mark.parametrize("layers", LAYERS)
def test_streaming_equals_full_until_something_is_forgotten(layers):
    """The convolutions keep what they need under every policy."""
    ids = some_ids(4 * WINDOW, VOCABULARY)
    found, expected = (read(compiled(layers, rule).session(), ids, 512) for rule in ("streaming", "full"))
    close(found[:WINDOW], expected[:WINDOW])
    assert not torch.allclose(found[-1], expected[-1], atol=1e-4)


@pytest.mark.parametrize("rule", ["full", "streaming"])
def test_two_interleaved_sessions_are_each_as_alone(rule):
    """Trap 13."""
    kvc = compiled(rule=rule)
    texts = [some_ids(40, VOCABULARY, 1), some_ids(35, VOCABULARY, 2)]
    alone = [read(kvc.session(), text, 64) for text in texts]
    first, second = kvc.session(), kvc.session()
    first.prefill(texts[0][:12]), second.prefill(texts[1][:7])
    for step in range(28):
        together = kvc.step([first, second], [int(texts[0][12 + step]), int(texts[1][7 + step])])
        close(together[0], alone[0][12 + step])
        close(together[1], alone[1][7 + step])


@pytest.mark.parametrize("rule", ["full", "streaming"])
def test_a_fork_goes_its_own_way(rule):
    kvc = compiled(rule=rule)
    ids, other = some_ids(30, VOCABULARY, 1), some_ids(12, VOCABULARY, 2)
    session = kvc.session()
    session.prefill(ids[:20])
    child = session.fork()
    close(read(child, other, 5), read(kvc.session(), torch.cat([ids[:20], other]), 64)[20:])
    close(read(session, ids[20:], 3), read(kvc.session(), ids, 64)[20:])
    assert child.nbytes() >= sum(each.stored_bytes(20) for each in kvc.plan.convolutions)


def test_a_rollback_within_the_promise_is_as_if_never_read():
    kvc = compiled(rule="back")
    ids, other = some_ids(40, VOCABULARY, 1), some_ids(6, VOCABULARY, 2)
    for back in (1, 3, 5, 40):
        session = kvc.session()
        session.prefill(ids)
        session.rollback(back)
        assert len(session) == 40 - back
        expected = original("caacc", torch.cat([ids[: 40 - back], other]))[40 - back :]
        close(torch.cat([read(session, other[:4], 2), steps(session, other[4:])]), expected)


def test_a_rollback_beyond_the_promise_changes_nothing():
    kvc = compiled()
    ids = some_ids(40, VOCABULARY)
    session = kvc.session()
    session.prefill(ids)
    with pytest.raises(SessionError) as caught:
        session.rollback(2)
    assert str(caught.value).startswith("rollback(2): a convolution of 4 taps that has read 40 tokens can take back 0 of them, not 2: ")
    assert "Write `rollback: 2` in a policy of the model" in str(caught.value)
    assert len(session) == 40
    close(session.step(3), original("caacc", torch.cat([ids, torch.tensor([3])]))[-1])


@pytest.mark.parametrize("rule", POLICIES)
def test_a_session_holds_what_the_plan_says(rule):
    kvc = compiled(rule=rule)
    session = kvc.session()
    assert session.nbytes() == 0
    for tokens in (1, 2, 5, 60):
        session.prefill(some_ids(tokens - len(session), VOCABULARY))
        assert session.nbytes() == kvc.plan.stored_bytes(tokens)
    kept = 3 + (5 if rule == "back" else 0)
    assert sum(state.nbytes() for state in session.convolutions) == 3 * 64 * 4 * kept


def test_a_call_that_fails_takes_all_of_its_chunks_back(monkeypatch):
    kvc = compiled(chunk_tokens=7)
    ids = some_ids(40, VOCABULARY)
    session = kvc.session()
    session.prefill(ids[:10])

    def stop(done, total):
        if done >= 14:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.prefill(ids[10:], on_chunk=stop)
    assert len(session) == 10
    close(read(session, ids[10:], 64), original("caacc", ids)[10:])


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_call_interrupted_at_a_convolution_leaves_every_session_as_it_was(monkeypatch, failing):
    kvc = compiled()
    texts = [some_ids(30, VOCABULARY, 1), some_ids(25, VOCABULARY, 2)]
    sessions = [kvc.session(), kvc.session()]
    for session, text in zip(sessions, texts, strict=True):
        session.prefill(text[:20])
    real = PackedCall.convolve

    def interrupted(self, site, *rest):
        out = real(self, site, *rest)
        if site == failing:
            raise KeyboardInterrupt
        return out

    batch = [(session, text[20:]) for session, text in zip(sessions, texts, strict=True)]
    monkeypatch.setattr(PackedCall, "convolve", interrupted)
    with pytest.raises(KeyboardInterrupt):
        kvc.forward(batch)
    monkeypatch.undo()
    for session, text in zip(sessions, texts, strict=True):
        assert len(session) == 20
        close(read(session, text[20:], 64), original("caacc", text)[20:])


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_failure_in_a_later_session_takes_the_earlier_ones_back(monkeypatch, deterministic):
    """Deterministic calls run one session after the other: the first is done when the second fails."""
    spec = {"kvcompile": 1, "verify": {"tokens": 16}, "target": {"segments": "eager", "kernels": "torch", "deterministic": deterministic}}
    kvc = kvcompile.compile(model("cca"), spec=spec)
    texts = [some_ids(12, VOCABULARY, 1), some_ids(12, VOCABULARY, 2)]
    sessions = [kvc.session(), kvc.session()]
    for session, text in zip(sessions, texts, strict=True):
        session.prefill(text[:8])
    real, calls = PackedCall.convolve, []

    def interrupted(self, site, *rest):
        calls.append(site)
        if calls == ([0, 1, 0] if deterministic else [0, 1]):
            raise KeyboardInterrupt
        return real(self, site, *rest)

    batch = [(session, text[8:]) for session, text in zip(sessions, texts, strict=True)]
    monkeypatch.setattr(PackedCall, "convolve", interrupted)
    with pytest.raises(KeyboardInterrupt):
        kvc.forward(batch)
    monkeypatch.undo()
    for session, text in zip(sessions, texts, strict=True):
        close(read(session, text[8:], 64), original("cca", text)[8:])


@pytest.mark.parametrize("write", [toys.convolution, functools.partial(toys.lfm2, "a")])
def test_a_plain_module_whose_last_site_is_a_convolution(write):
    module = write()
    kvc = kvcompile.compile(module, spec={"kvcompile": 1, "verify": {"tokens": 16}, "target": {"segments": "eager", "kernels": "torch"}})
    ids = some_ids(20, 32)
    for chunk in (1, 3, 20):
        close(read(kvc.session(), ids, chunk), original_logits(module, ids))
    close(kvc.session().prefill(ids), original_logits(module, ids)[-1])


def test_bfloat16_is_verified_and_equals_itself_in_chunks():
    module = toys.lfm2("cac").to(torch.bfloat16)
    kvc = kvcompile.compile(module, spec={"kvcompile": 1, "verify": {"tokens": 32}, "target": {"segments": "eager"}})
    assert {each.site.dtype for each in kvc.plan.convolutions} == {"bfloat16"}
    ids = some_ids(30, VOCABULARY)
    torch.testing.assert_close(read(kvc.session(), ids, 7), read(kvc.session(), ids, 30), rtol=0, atol=0.1)


@pytest.mark.slow
@pytest.mark.families
def test_compiled_segments_equal_the_original():
    kvc = kvcompile.compile(model("cca"), spec={"kvcompile": 1, "verify": {"tokens": 16}})
    assert kvc.warnings == ()
    ids = some_ids(40, VOCABULARY)
    session = kvc.session()
    close(torch.cat([read(session, ids[:30], 13), steps(session, ids[30:])]), original("cca", ids))


def test_a_wrong_convolution_is_named_by_its_site(monkeypatch):
    real = PackedCall.convolve

    def wrong(self, site, *rest):
        out = real(self, site, *rest)
        return out * 1.5 if site == 1 else out

    monkeypatch.setattr(PackedCall, "convolve", wrong)
    with pytest.raises(VerificationError) as caught:
        kvcompile.compile(model("caacc"), spec={"kvcompile": 1, "verify": {"tokens": 16}, "target": {"segments": "eager"}})
    told = str(caught.value)
    assert "First difference: model.layers.3.conv (convolution 1): the runtime's convolution differs by " in told
    assert " of the traced convolution's largest value." in told


def test_a_convolution_that_forgets_between_calls_is_noticed(monkeypatch):
    """Every site alone is right in one call; the logits of the second one are not."""
    real = PackedCall.begin

    def forgetful(*rest, **named):
        call = real(*rest, **named)
        for states in call.convolutions:
            states[:] = [replace(state, inputs_CK=torch.zeros_like(state.inputs_CK)) for state in states]
        return call

    monkeypatch.setattr(PackedCall, "begin", forgetful)
    with pytest.raises(VerificationError, match="policy full differs from the original model"):
        kvcompile.compile(model("caacc"), spec={"kvcompile": 1, "verify": {"tokens": 16}, "target": {"segments": "eager"}})


def test_the_plan_tells_of_the_convolutions():
    text = compiled(rule="back").explain()
    assert "short convolutions: 3 of 64 channels and 4 taps; a session keeps their last 8 inputs, 6.0 KiB in all" in text
    assert "short convolutions" not in kvcompile.compile(toys.planted(), spec={"kvcompile": 1, "target": {"segments": "eager"}}).explain()
