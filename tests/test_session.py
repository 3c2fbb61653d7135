"""Sessions of a toy model: one sequence's memory, however it is read, forked, rolled back or interrupted."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import warnings

import pytest
import torch
import toys
from units import some_ids

import kvcompile
from kvcompile.ir.errors import SessionError
from kvcompile.runtime import model as runtime_model
from kvcompile.runtime.model import CompiledModel

VOCABULARY = 256
POLICIES = {
    "short": {"zones": [{"sink_recent": {"sink_tokens": 4, "recent_tokens": 12}}]},
    "back": {"zones": [{"sink_recent": {"sink_tokens": 4, "recent_tokens": 12}}], "rollback": 5},
    "int8": {"zones": ["all"], "store": "int8"},
    "int8_ring": {"zones": [{"sink_recent": {"sink_tokens": 4, "recent_tokens": 12}}], "store": "int8"},
    "kivi": {"zones": ["all"], "store": {"kivi": {"bits": 4, "group": 16, "residual_tokens": 16}}},
    "kivi_ring": {
        "zones": [{"sink_recent": {"sink_tokens": 4, "recent_tokens": 40}}],
        "store": {"kivi": {"bits": 2, "group": 16, "residual_tokens": 32}},
    },
}
RULES = {"full": "full", "duo": "short", "back": "back", "streaming": "short"}
QUANTISED = ("int8", "int8_ring", "kivi", "kivi_ring")  # KV head 0; head 1 is full
WINDOW = 16  # tokens that a `short` head holds


@functools.cache
def compiled(rule: str, chunk_tokens: int = 2048, deterministic: bool = False, kernels: str = "generated") -> CompiledModel:
    """full: everything; duo, back: KV head 0 streams, head 1 is full; streaming: every head streams."""
    target = {"deterministic": deterministic, "segments": "eager", "kernels": kernels}
    sections = {"prefill": {"chunk_tokens": chunk_tokens}, "target": target}
    name = RULES.get(rule, rule)
    heads = [{"policy": name, **({} if rule in ("full", "streaming") else {"kv_heads": 0})}]
    policies = {name: POLICIES[name]} if name in POLICIES else {}
    spec = {"kvcompile": 1, "verify": {"tokens": 16}, "policies": policies, "heads": heads, **sections}
    return kvcompile.compile(toys.llama(layers=2), spec=spec)


@pytest.fixture(scope="module")
def full():
    return compiled("full")


@pytest.fixture(scope="module")
def duo():
    return compiled("duo")


@pytest.fixture(scope="module")
def back():
    return compiled("back")


@pytest.fixture(params=["full", "duo", "back"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["full", "duo", "back", *QUANTISED])
def any_model(request):
    """Also those that quantise: what they keep depends on the tokens alone, what a prompt's tokens see on its chunks too."""
    return compiled(request.param)


def read(session, ids, chunk: int) -> torch.Tensor:
    return torch.cat([session.prefill(part, logits="all") for part in ids.split(chunk)])


def steps(session, ids) -> torch.Tensor:
    return torch.stack([session.step(int(token)) for token in ids])


# --- reading -------------------------------------------------------------------------------------------------------------------------


def test_prefill_equals_step_by_step(model):
    ids = some_ids(40, VOCABULARY)
    torch.testing.assert_close(steps(model.session(), ids), read(model.session(), ids, 40), rtol=0, atol=1e-5)


def test_the_last_logits_are_the_last_row_of_all(model):
    ids = some_ids(40, VOCABULARY)
    last = model.session().prefill(ids)
    assert last.shape == (VOCABULARY,) and last.dtype == torch.float32
    torch.testing.assert_close(last, model.session().prefill(ids, logits="all")[-1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("rule", ["duo", "streaming"])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_do_not_change_streaming_results(rule, chunk, duo):
    """Trap 5."""
    model = duo if rule == "duo" else compiled("streaming")
    ids = some_ids(130, VOCABULARY)
    torch.testing.assert_close(read(model.session(), ids, chunk), read(model.session(), ids, 512), rtol=0, atol=1e-5)


def test_the_spec_says_the_chunk_and_each_is_told(duo):
    small = compiled("duo", chunk_tokens=7)
    ids = some_ids(30, VOCABULARY)
    told = []
    logits = small.session().prefill(ids, logits="all", on_chunk=lambda done, total: told.append((done, total)))
    assert told == [(7, 30), (14, 30), (21, 30), (28, 30), (30, 30)]
    torch.testing.assert_close(logits, read(duo.session(), ids, 512), rtol=0, atol=1e-5)


def test_streaming_equals_full_bit_for_bit_while_nothing_is_forgotten(full):
    streaming = compiled("streaming")
    ids = some_ids(WINDOW, VOCABULARY)
    for chunk in (1, 5, WINDOW):
        assert torch.equal(read(streaming.session(), ids, chunk), read(full.session(), ids, chunk))


def test_streaming_differs_from_full_once_something_is_forgotten(full):
    """Trap 17: the policy is not ignored."""
    ids = some_ids(4 * WINDOW, VOCABULARY)
    assert not torch.allclose(compiled("streaming").session().prefill(ids), full.session().prefill(ids), atol=1e-5)


# --- one session does not see another ------------------------------------------------------------------------------------------------


def test_two_interleaved_sessions_are_each_as_alone(any_model):
    """Trap 13."""
    model = any_model
    one, two = some_ids(40, VOCABULARY, 1), some_ids(35, VOCABULARY, 2)
    alone = [(session := model.session()).prefill(ids[:20]) is not None and steps(session, ids[20:]) for ids in (one, two)]
    first, second = model.session(), model.session()
    first.prefill(one[:20])
    second.prefill(two[:20])
    mixed = [[], []]
    for place in range(20, 40):
        mixed[0].append(first.step(int(one[place])))
        if place < 35:
            mixed[1].append(second.step(int(two[place])))
    assert torch.equal(torch.stack(mixed[0]), alone[0])
    assert torch.equal(torch.stack(mixed[1]), alone[1])


def test_forks_and_forks_of_forks_are_bit_equal_to_reading_anew(any_model):
    model = any_model
    ids = some_ids(60, VOCABULARY)
    tails = [some_ids(10, VOCABULARY, seed) for seed in (1, 2, 3)]

    def alone(tail):
        session = model.session()
        steps(session, ids)
        return steps(session, tail)

    parent = model.session()
    steps(parent, ids[:50])
    child = parent.fork()
    steps(child, ids[50:])
    grandchild = child.fork()
    steps(parent, ids[50:])
    found = [[], [], []]
    for place in range(10):  # all three at once
        for session, tail, out in zip((parent, child, grandchild), tails, found, strict=True):
            out.append(session.step(int(tail[place])))
    for tail, out in zip(tails, found, strict=True):
        assert torch.equal(torch.stack(out), alone(tail))
    assert parent.tokens == [*ids.tolist(), *tails[0].tolist()]


def test_a_fork_outlives_its_parent(any_model):
    model = any_model
    ids = some_ids(30, VOCABULARY)
    parent, whole = model.session(), model.session()
    parent.prefill(ids)
    whole.prefill(ids)
    child = parent.fork()
    del parent
    gc.collect()
    assert torch.equal(child.step(5), whole.step(5))


def test_several_sessions_in_one_step_equal_each_alone(any_model):
    """Ragged lengths, no padding (trap 14).  What is quantised may round to another step where a linear layer's bits differ."""
    model = any_model
    tolerance = 1e-5 if model in map(compiled, RULES) else 1e-3
    prompts = [some_ids(tokens, VOCABULARY, tokens) for tokens in (1, 9, 33)]
    together, alone = ([model.session() for _ in prompts] for _ in range(2))
    for session, other, ids in zip(together, alone, prompts, strict=True):
        session.prefill(ids)
        other.prefill(ids)
    for token in (3, 200):
        logits = model.step(together, [token, token + 1, token + 2])
        expected = torch.stack([session.step(token + place) for place, session in enumerate(alone)])
        torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance)
    assert [len(session) for session in together] == [3, 11, 35]


def test_several_sessions_are_bit_equal_where_the_target_is_deterministic():
    model = compiled("duo", deterministic=True)
    sessions, alone = ([model.session() for _ in range(3)] for _ in range(2))
    for place in range(3):
        for session in (sessions[place], alone[place]):
            session.prefill(some_ids(10 * place + 3, VOCABULARY))
    for token in range(5):
        logits = model.step(sessions, [token] * 3)
        assert torch.equal(logits, torch.stack([session.step(token) for session in alone]))


# --- rollback ------------------------------------------------------------------------------------------------------------------------


def test_a_rollback_is_bit_equal_to_never_having_read(back):
    """Trap 28: within what the policy promises, before and beyond the overflow of its rings."""
    for length in (6, 14, 40):
        ids = some_ids(length, VOCABULARY)
        session, other = back.session(), back.session()
        steps(session, ids)
        steps(other, ids)
        steps(session, some_ids(5, VOCABULARY, 9))
        session.rollback(5)
        assert session.tokens == ids.tolist()
        tail = some_ids(8, VOCABULARY, 3)
        assert torch.equal(steps(session, tail), steps(other, tail))


def test_reading_again_what_was_taken_back_changes_nothing(back):
    ids = some_ids(45, VOCABULARY)
    session, other = back.session(), back.session()
    assert torch.equal(steps(session, ids), steps(other, ids))
    session.rollback(4)
    steps(session, ids[41:])
    assert torch.equal(session.step(1), other.step(1))


def test_full_heads_roll_back_to_any_length(full):
    ids = some_ids(50, VOCABULARY)
    session, other = full.session(), full.session()
    session.prefill(ids)
    session.rollback(43)
    other.prefill(ids[:7])
    torch.testing.assert_close(session.step(5), other.step(5), rtol=0, atol=1e-5)
    session.rollback(8)
    assert (len(session), session.nbytes()) == (0, 0)


def test_a_rollback_beyond_the_promise_changes_nothing(duo, back):
    session, other = duo.session(), duo.session()
    ids = some_ids(40, VOCABULARY)
    steps(session, ids)
    steps(other, ids)
    with pytest.raises(SessionError) as caught:
        session.rollback(3)
    assert str(caught.value) == (
        "rollback(3): a ring of 4 sink + 12 recent tokens that has held 40 tokens can take back 1 of its 40, not 3: "
        "what they would see is overwritten.\n"
        "  Write `rollback: 3` in the policy, which enlarges its rings by as many tokens, or fork the session "
        "before the tokens that may be taken back."
    )
    assert len(session) == 40
    assert torch.equal(session.step(7), other.step(7))
    with pytest.raises(SessionError, match="not 7: what they would see is overwritten"):
        (longer := back.session()).prefill(ids) is not None and longer.rollback(7)


@pytest.mark.parametrize("tokens", [-1, 41])
def test_a_rollback_beyond_the_start_is_refused(full, tokens):
    session = full.session()
    session.prefill(some_ids(40, VOCABULARY))
    with pytest.raises(SessionError) as caught:
        session.rollback(tokens)
    assert str(caught.value) == f"rollback: cannot take back {tokens} of 40 tokens.\n  Give a number from 0 to 40."


# --- memory --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [0, 1, 16, 17, 21, 22, 31, 32, 33, 300])
def test_nbytes_equals_the_plan(any_model, tokens):
    for chunk in (9, 300):
        session = any_model.session()
        if tokens:
            read(session, some_ids(tokens, VOCABULARY), chunk)
        assert session.nbytes() == any_model.plan.stored_bytes(tokens)
        assert session.shared_nbytes() == 0


@pytest.mark.parametrize("rule", QUANTISED)
@pytest.mark.parametrize("kernels", ["generated", "torch"])
def test_quantised_heads_differ_from_exact_ones_a_little(rule, kernels, full, duo):
    """Trap 17.  Quantised keys and values are read a token at a time; the first ones are read as they are, but by int8."""
    ids = some_ids(60, VOCABULARY)
    exact = {"int8_ring": duo}.get(rule, full)
    if rule == "kivi_ring":
        policy = {"zones": POLICIES[rule]["zones"]}
        spec = {"kvcompile": 1, "verify": {"tokens": 16}, "policies": {"kept": policy}, "heads": [{"policy": "kept", "kv_heads": 0}]}
        exact = kvcompile.compile(toys.llama(layers=2), spec={**spec, "target": {"segments": "eager"}})
    found, right = steps(compiled(rule, kernels=kernels).session(), ids), steps(exact.session(), ids)
    difference = (found - right).abs().amax(1)
    early = 0 if rule.startswith("int8") else 16
    assert (difference[:early] <= 1e-5).all()
    assert 1e-4 < difference[early:].max() < 0.3


@pytest.mark.parametrize("rule", QUANTISED)
def test_kernels_and_torch_agree_over_quantised_stores(rule):
    ids = some_ids(150, VOCABULARY)
    found, right = (read(compiled(rule, kernels=kernels).session(), ids, 1) for kernels in ("generated", "torch"))
    assert (found - right).abs().quantile(0.5) < 1e-5  # a step of a code apart, here and there
    assert (found - right).abs().max() < 0.1


@pytest.mark.parametrize("rule", QUANTISED)
def test_a_failed_call_leaves_quantised_stores_as_they_were(monkeypatch, rule):
    """Nothing is quantised before the call has succeeded."""
    model = compiled(rule)
    session, other = model.session(), model.session()
    steps(session, some_ids(35, VOCABULARY))
    steps(other, some_ids(35, VOCABULARY))
    with monkeypatch.context() as patch:
        fail_at(patch, 1)
        with pytest.raises(MemoryError):
            session.prefill(some_ids(1, VOCABULARY, 5))
    assert torch.equal(steps(session, some_ids(20, VOCABULARY, 2)), steps(other, some_ids(20, VOCABULARY, 2)))


@pytest.mark.parametrize("rule", ["int8", "kivi"])
def test_quantised_stores_roll_back_to_any_length(rule):
    model = compiled(rule)
    for taken in (1, 5, 50, 60):
        session, other = model.session(), model.session()
        read(session, some_ids(60, VOCABULARY), 13)
        session.rollback(taken)
        assert session.nbytes() == model.plan.stored_bytes(60 - taken)
        if taken < 60:
            read(other, some_ids(60, VOCABULARY)[: 60 - taken], 13)
        torch.testing.assert_close(session.step(5), other.step(5), rtol=0, atol=0.05)


def test_a_fresh_fork_of_a_kivi_session_shares_what_is_quantised():
    model = compiled("kivi")
    session = model.session()
    read(session, some_ids(100, VOCABULARY), 25)
    child = session.fork()
    assert child.nbytes() == 2 * 4 * 16 * (100 % 16 + 16)  # 2 layers; floats of 4 bytes, 16 channels: exact keys, exact values
    assert child.nbytes() + child.shared_nbytes() == session.nbytes()


def test_a_fresh_fork_holds_only_its_rings(full, duo):
    for model in (full, duo):
        session = model.session()
        session.prefill(some_ids(100, VOCABULARY))
        child = session.fork()
        ring = 2 * WINDOW * (16 + 16) * 4 if model is duo else 0  # 2 layers, one KV head
        assert (child.nbytes(), child.shared_nbytes()) == (ring, session.nbytes() - ring)


def test_no_state_is_left_in_the_program(model):
    """Trap 13: what a step makes belongs to the session."""
    program = model.program
    weights = {slot: tensor.clone() for slot, tensor in program.weights.items()}
    model.session().prefill(some_ids(50, VOCABULARY))
    assert all(torch.equal(tensor, program.weights[slot]) for slot, tensor in weights.items())
    assert len(program.weights) == len(weights)


def test_nothing_is_compiled_while_stepping(duo, monkeypatch):
    """Trap 15: a length that is a Python number must not make a new program for each step."""
    import torch._dynamo.utils

    made = []
    monkeypatch.setattr(torch.fx.GraphModule, "recompile", lambda module: made.append(module))
    monkeypatch.setattr("builtins.compile", lambda *args, **keywords: made.append(args))
    session = duo.session()
    session.prefill(some_ids(10, VOCABULARY))
    frames = dict(torch._dynamo.utils.counters["frames"])
    for token in range(100):
        session.step(token)
    assert made == []
    assert dict(torch._dynamo.utils.counters["frames"]) == frames


# --- failures ------------------------------------------------------------------------------------------------------------------------


def fail_at(monkeypatch, call: int) -> None:
    """The kernel fails at its `call`-th call from now: C++ is called once a layer, torch once a group."""
    count = iter(range(10**9))

    def failing(real):
        def attend(*args, **keywords):
            if next(count) == call:
                raise MemoryError("no more")
            return real(*args, **keywords)

        return attend

    for name in ("attend_spans", "attend_native"):
        monkeypatch.setattr(runtime_model, name, failing(getattr(runtime_model, name)))


@pytest.mark.parametrize(("kernels", "call"), [("generated", 0), ("generated", 1), ("torch", 0), ("torch", 1), ("torch", 2), ("torch", 3)])
@pytest.mark.parametrize("new", [1, 6])
def test_a_failed_call_leaves_the_session_as_it_was(monkeypatch, kernels, call, new):
    """2 layers of 2 groups; 6 new tokens and one more is what `rollback: 5` can undo."""
    back = compiled("back", kernels=kernels)
    ids = some_ids(40, VOCABULARY)
    session, other = back.session(), back.session()
    steps(session, ids)
    steps(other, ids)
    with monkeypatch.context() as patch:
        fail_at(patch, call)
        with pytest.raises(MemoryError):
            session.prefill(some_ids(new, VOCABULARY, 5))
    assert session.tokens == ids.tolist()
    assert torch.equal(session.step(3), other.step(3))


def test_a_failed_first_call_leaves_an_empty_session(monkeypatch, full):
    session = full.session()
    with monkeypatch.context() as patch:
        fail_at(patch, 1)
        with pytest.raises(MemoryError):
            session.prefill(some_ids(20, VOCABULARY))
    assert (len(session), session.nbytes()) == (0, 0)
    assert torch.equal(session.prefill(some_ids(20, VOCABULARY)), full.session().prefill(some_ids(20, VOCABULARY)))


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_failed_call_of_several_sessions_advances_none(monkeypatch, deterministic):
    model = compiled("full", deterministic=deterministic)
    sessions = [model.session() for _ in range(2)]
    for session in sessions:
        session.prefill([1, 2, 3])
    fail_at(monkeypatch, 3 if deterministic else 1)  # the last layer of the second session, or of both at once
    with pytest.raises(MemoryError):
        model.step(sessions, [4, 5])
    assert [session.tokens for session in sessions] == [[1, 2, 3]] * 2
    assert [store.tokens for session in sessions for site in (0, 1) for store in session.stores(site)] == [3] * 4


def test_a_session_whose_ring_was_overwritten_is_broken_with_a_message(monkeypatch, duo):
    session = duo.session()
    session.prefill(some_ids(40, VOCABULARY))
    with monkeypatch.context() as patch:
        fail_at(patch, 1)  # the second layer
        with pytest.raises(MemoryError):
            session.prefill(some_ids(20, VOCABULARY))
    told = (
        "session: a call was interrupted (MemoryError) after it had overwritten part of a ring.\n"
        "  Start a new session, or fork before risky calls."
    )
    for use in (lambda: session.step(1), lambda: session.prefill([1]), session.fork, lambda: session.rollback(1)):
        with pytest.raises(SessionError) as caught:
            use()
        assert str(caught.value) == told


@pytest.mark.parametrize("call", [0, 2, 4])
def test_a_prefill_that_fails_in_a_later_chunk_reads_nothing(monkeypatch, call):
    """2 layers of 1 group, chunks of 7: call 2 is in the second chunk, call 4 in the third."""
    model = compiled("full", chunk_tokens=7)
    session, other = model.session(), model.session()
    for each in (session, other):
        each.prefill([1, 2, 3])
    with monkeypatch.context() as patch:
        fail_at(patch, call)
        with pytest.raises(MemoryError):
            session.prefill(some_ids(30, VOCABULARY))
    assert session.tokens == [1, 2, 3]
    assert session.nbytes() == other.nbytes()
    assert torch.equal(session.step(5), other.step(5))


def stop_at(tokens: int):
    def on_chunk(done, total):
        if done >= tokens:
            raise KeyboardInterrupt

    return on_chunk


def test_a_prefill_whose_listener_raises_reads_nothing():
    session = compiled("full", chunk_tokens=7).session()
    with pytest.raises(KeyboardInterrupt):
        session.prefill(some_ids(30, VOCABULARY), on_chunk=stop_at(14))
    assert (len(session), session.nbytes()) == (0, 0)


def test_a_prefill_into_an_empty_session_can_always_be_taken_back():
    model = compiled("duo", chunk_tokens=7)
    session = model.session()
    with pytest.raises(KeyboardInterrupt):
        session.prefill(some_ids(60, VOCABULARY), on_chunk=stop_at(56))
    assert len(session) == 0
    ids = some_ids(40, VOCABULARY)
    assert torch.equal(session.prefill(ids), model.session().prefill(ids))


def test_a_prefill_that_a_ring_cannot_take_back_breaks_the_session_and_says_so():
    session = compiled("duo", chunk_tokens=7).session()
    session.prefill(some_ids(20, VOCABULARY))
    with pytest.raises(KeyboardInterrupt):
        session.prefill(some_ids(30, VOCABULARY), on_chunk=stop_at(14))
    told = (
        "session: a call was interrupted (KeyboardInterrupt) after it had overwritten part of a ring.\n"
        "  Start a new session, or fork before risky calls."
    )
    for _ in range(2):
        with pytest.raises(SessionError) as caught:
            session.prefill([1])
        assert str(caught.value) == told


def test_an_interrupt_while_a_ring_is_written_is_never_silent(monkeypatch):
    """The first copy into the first ring has happened, the second has not."""
    duo = compiled("duo", kernels="torch")
    session, other = duo.session(), duo.session()
    ids = some_ids(40, VOCABULARY)
    for each in (session, other):
        each.prefill(ids)
    real, count = torch.Tensor.copy_, iter(range(10**9))

    def copy(target, source, *rest):
        if next(count) == 1:
            raise KeyboardInterrupt
        return real(target, source, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", copy)
        with pytest.raises(KeyboardInterrupt):
            session.prefill(some_ids(9, VOCABULARY, 1))
    with pytest.raises(SessionError, match=r"a call was interrupted \(KeyboardInterrupt\) after it had overwritten part of a ring"):
        session.step(3)


# --- wrong uses ----------------------------------------------------------------------------------------------------------------------

MEND = "\n  Give an int, a list or tuple of ints, or a 1-D integer tensor."


@pytest.mark.parametrize(
    ("tokens", "told"),
    [
        ([], "tokens: there is no token.\n  Give at least one token."),
        (torch.zeros(0, dtype=torch.int64), "tokens: there is no token.\n  Give at least one token."),
        ([1, 256], f"tokens: token id 256 is not in the vocabulary (0 to 255).{MEND}"),
        ([1, -2], f"tokens: token id -2 is not in the vocabulary (0 to 255).{MEND}"),
        (torch.tensor([1.0]), f"tokens: a tensor of shape [1] and torch.float32 is not a list of token ids.{MEND}"),
        ([1.5], f"tokens: a tensor of shape [1] and torch.float32 is not a list of token ids.{MEND}"),
        (True, f"tokens: a tensor of shape [1] and torch.bool is not a list of token ids.{MEND}"),
        (torch.zeros(2, 3, dtype=torch.int64), f"tokens: a tensor of shape [2, 3] and torch.int64 is not a list of token ids.{MEND}"),
    ],
)
def test_wrong_tokens_are_refused_and_read_nothing(full, tokens, told):
    session = full.session()
    for use in (session.prefill, session.step):
        with pytest.raises(SessionError) as caught:
            use(tokens)
        assert str(caught.value) == told
    assert (len(session), session.nbytes()) == (0, 0)


@pytest.mark.parametrize("tokens", ["text", [[1], [2, 3]], None])
def test_what_is_no_list_of_numbers_is_refused(full, tokens):
    with pytest.raises(SessionError, match=r"tokens: cannot be read as token ids \("):
        full.session().prefill(tokens)


@pytest.mark.parametrize("tokens", [[5], (5,), 5, torch.tensor([5]), torch.tensor([[5]], dtype=torch.int32)])
def test_every_spelling_of_one_token_is_taken(full, tokens):
    assert torch.equal(full.session().step(tokens), full.session().step(5))


def test_a_step_takes_one_token(full):
    with pytest.raises(SessionError) as caught:
        full.session().step([1, 2])
    assert str(caught.value) == "step: takes one token, not 2.\n  Use prefill for several tokens."


def test_unknown_logits_are_refused(full):
    with pytest.raises(SessionError) as caught:
        full.session().prefill([1], logits="first")
    assert str(caught.value) == 'logits: \'first\' is not known.\n  Write "last" or "all".'


def test_a_session_twice_in_one_call_is_refused(full):
    session = full.session()
    with pytest.raises(SessionError) as caught:
        full.step([session, session], [1, 2])
    assert str(caught.value) == "step: a session stands twice in one call.\n  Fork it, or call once for each token."
    assert len(session) == 0


def test_a_session_of_another_model_or_plan_is_refused(full, duo):
    for other in (duo, full.with_plan(duo.plan)):
        with pytest.raises(SessionError) as caught:
            full.step([other.session()], [1])
        assert str(caught.value) == "step: a session of another model.\n  Use sessions that this model made."


def test_as_many_tokens_as_sessions(full):
    with pytest.raises(SessionError) as caught:
        full.step([full.session()], [1, 2])
    assert str(caught.value) == "step: 2 tokens for 1 sessions.\n  Give one token for each session."


STEP_MEND = "Give a list of sessions, and one token for each of them."


def test_a_step_of_many_wants_sessions(full):
    read = full.session()
    read.prefill([1, 2, 3])
    for wrong, told in (
        (read, "a Session stands where a list of sessions is wanted."),
        ([read, None], "a NoneType stands where a list of sessions is wanted."),
        ("ab", "a str stands where a list of sessions is wanted."),
        ([], "there is no session."),
    ):
        with pytest.raises(SessionError) as caught:
            full.step(wrong, [1, 2])
        assert str(caught.value) == f"step: {told}\n  {STEP_MEND}"
    with pytest.raises(SessionError) as caught:
        full.step([read, full.session()], [[1], [2]])
    assert str(caught.value) == f"step: a list of tokens stands where one token of a session is wanted.\n  {STEP_MEND}"
    assert len(read) == 3


@pytest.mark.parametrize("count", [1.0, 1.5, "1", None, True, torch.tensor([1, 2])])
def test_a_rollback_by_what_is_no_whole_number_changes_nothing(duo, count):
    base = duo.session()
    base.prefill(some_ids(40, VOCABULARY))
    for session in (base, base.fork()):
        session.prefill([5, 6, 7])
        for call in (session.rollback, session.can_rollback):
            with pytest.raises(SessionError) as caught:
                call(count)
            assert str(caught.value) == f"rollback: {count!r} is not a whole number.\n  Give how many tokens to take back."
        twin = duo.session()
        twin.prefill(some_ids(40, VOCABULARY))
        twin.prefill([5, 6, 7])
        assert torch.equal(session.step(9), twin.step(9))


def test_any_whole_number_is_taken_back(full):
    session = full.session()
    session.prefill([1, 2, 3, 4])
    session.rollback(torch.tensor(1))
    assert session.tokens == [1, 2, 3]


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickle.dumps], ids=["copy", "deepcopy", "pickle"])
def test_what_holds_stores_is_neither_copied_nor_pickled(full, way):
    session = full.session()
    with pytest.raises(SessionError) as caught:
        way(session)
    assert str(caught.value).startswith("session: it can be neither copied nor pickled.\n  Call fork()")
    with pytest.raises(SessionError, match=r"^compiled model: it can be neither copied nor pickled\."):
        way(full)


def test_a_model_shows_itself_in_a_line(full):
    assert repr(full) == f"CompiledModel({full.name!r}, {len(full.plan.sites)} attention sites, {full.plan.weight_bytes} bytes of weights)"


@pytest.mark.parametrize("chunk", [8, 2048])
def test_learnt_positions_run_out_before_anything_is_read(chunk):
    spec = {"kvcompile": 1, "verify": {"tokens": 16}, "prefill": {"chunk_tokens": chunk}, "target": {"segments": "eager"}}
    model = kvcompile.compile(toys.nanogpt(rows=32), spec=spec)
    session = model.session()
    session.prefill(some_ids(30, 64))
    told = "session: 33 tokens do not fit: the model has learnt positions for 32.\n  Start a new session, or roll back."
    with pytest.raises(SessionError) as caught:
        session.prefill([1, 2, 3])
    assert str(caught.value) == told
    assert len(session) == 30
    session.prefill([1, 2])
    with pytest.raises(SessionError, match="33 tokens do not fit"):
        session.step(1)
    with pytest.raises(SessionError, match="40 tokens do not fit"):
        (other := model.session()).prefill(some_ids(40, 64))
    assert len(other) == 0


def test_beyond_the_declared_context_there_is_one_warning():
    spec = {"kvcompile": 1, "verify": {"tokens": 16}, "target": {"segments": "eager"}}
    model = kvcompile.compile(toys.llama(layers=1, max_position_embeddings=32), spec=spec)
    session = model.session()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        session.prefill(some_ids(32, VOCABULARY))
    with pytest.warns(UserWarning, match="beyond the 32 tokens that the model was made for") as told:
        session.step(1)
    assert [each.filename for each in told] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        session.step(2)


def test_the_number_that_argmax_gives_is_a_token(full):
    one, two = full.session(), full.session()
    logits = one.prefill([1, 2, 3])
    assert torch.equal(one.step(logits.argmax()), (two.prefill([1, 2, 3]), two.step(int(logits.argmax())))[1])
