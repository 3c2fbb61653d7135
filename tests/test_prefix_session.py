"""Prefixes of the spec: read once, shared by every session that starts behind them, and to the bit what a session of its own would read."""

from __future__ import annotations

import functools
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
import toys
from units import some_ids

import kvcompile
from kvcompile.compiler import make_plan
from kvcompile.ir.errors import SessionError, SpecError
from kvcompile.ir.indexes import MIN_INDEXED_TOKENS
from kvcompile.prefixes import plan_prefixes
from kvcompile.report import plan_dict, plan_remarks
from kvcompile.runtime.model import CompiledModel
from kvcompile.spec import load_spec

NEAR = {"zones": [{"sink_recent": {"sink_tokens": 4, "recent_tokens": 12}}], "rollback": 4}
FOUND = {"sink_recent": {"sink_tokens": 4, "recent_tokens": 12}}
KIVI = {"zones": ["all"], "store": {"kivi": {"bits": 4, "group": 16, "residual_tokens": 16}}}
POLICIES: dict[str, dict[str, Any]] = {
    "full": {},
    "near": {"near": NEAR},
    "kivi": {"kivi": KIVI},
    "int8": {"int8": {"zones": ["all"], "store": "int8"}},
    "flat": {"flat": {"zones": [FOUND, {"top_k": {"k": 40, "index": "flat"}}]}},
    "static": {"static": {"zones": [FOUND, {"static": {"keys": 24}}]}},
    "disk": {"disk": {"zones": [{"all": {"device": "disk"}}]}},
}
SYSTEM, RULES, OTHER = "Be brief. " * 9, "Rule one: none. " * 3, "Speak freely."
SHARED = [
    {"name": "rules", "text": RULES, "after": "system"},
    {"name": "system", "text": SYSTEM, "default": True},
    {"name": "other", "text": OTHER},
]


class Bytes:
    """A tokenizer whose ids are bytes; 1 begins a text, 2 ends a message, and a template that writes messages one behind the other."""

    bos_token_id = 1

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [*([1] if add_special_tokens else []), *text.encode()]}

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return bytes(ids).decode(errors="replace")

    def apply_chat_template(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> list[int]:
        written = [token for each in messages for token in self.message(each["role"], each["content"])]
        return [1, *written, *(b"<assistant>" if add_generation_prompt else b"")]

    @staticmethod
    def message(role: str, text: str) -> list[int]:
        return [*f"<{role}>{text.strip()}".encode(), 2]


class Merging(Bytes):
    """A template that puts the system message into the prompt, as Mistral's does."""

    def apply_chat_template(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> list[int]:
        text = "\n\n".join(each["content"] for each in messages)
        return [1, *self.message("user", text)] if messages[-1]["role"] == "user" else [1]


class Refusing(Bytes):
    """A template that knows no system message, as Gemma's does."""

    def apply_chat_template(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> list[int]:
        if messages[0]["role"] == "system":
            raise ValueError("System role not supported")
        return super().apply_chat_template(messages, add_generation_prompt)


class Counting(Bytes):
    """A template that says at the beginning how many messages there are."""

    def apply_chat_template(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> list[int]:
        return [1, len(messages), *super().apply_chat_template(messages, add_generation_prompt)[1:]]


class Ending(Bytes):
    """A tokenizer that ends a text too."""

    eos_token_id = 2

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = super().__call__(text, add_special_tokens)["input_ids"]
        return {"input_ids": ids + [2] * (add_special_tokens and ids[-1:] != [2])}


def spec_of(policy: str, **prefix: Any) -> dict[str, Any]:
    """KV head 0 has the policy, head 1 is full."""
    policies = POLICIES[policy]
    heads = [{"policy": "full"}, *({"policy": name, "kv_heads": 0} for name in policies)]
    base = {"kvcompile": 1, "verify": {"tokens": 16}, "target": {"segments": "eager"}, "policies": policies, "heads": heads}
    return base | ({"prefix": prefix} if prefix else {})


@functools.cache
def compiled(policy: str = "full") -> CompiledModel:
    return kvcompile.compile(toys.llama(layers=2), spec=spec_of(policy, shared=SHARED), tokenizer=Bytes())


def fresh(policy: str = "full") -> CompiledModel:
    """The same model, of whose prefixes nothing was read yet."""
    return compiled(policy).with_plan(compiled(policy).plan)


def with_prefixes(tokenizer: Any, *shared: dict[str, Any], relay: str = "auto") -> CompiledModel:
    """The model of policy full with other prefixes: their texts become tokens as in a compile."""
    model, prefix = compiled(), load_spec(spec_of("full", shared=shared, relay=relay)).prefix
    plan = replace(model.plan, prefixes=plan_prefixes(prefix, tokenizer), relay=prefix.relay)
    return replace(model.with_plan(plan), tokenizer=tokenizer)


def with_prefix(tokenizer: Any = None, **entry: Any) -> CompiledModel:
    return with_prefixes(tokenizer or Bytes(), {"name": "system", **entry})


SYSTEM_IDS = [1, *SYSTEM.encode()]
CHAINS = {"system": [SYSTEM_IDS], "rules": [SYSTEM_IDS, list(RULES.encode())], "other": [[1, *OTHER.encode()]]}


def alone(model: CompiledModel, name: str) -> kvcompile.Session:
    """A session that reads the prefix itself, as the model does."""
    session = model.session(prefix=None)
    for part in CHAINS[name]:
        session.prefill(part)
    return session


def steps(session: kvcompile.Session, seed: int = 0, count: int = 12) -> torch.Tensor:
    return torch.stack([session.step(token) for token in some_ids(count, 256, seed).tolist()])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", CHAINS)
def test_a_session_behind_a_prefix_is_one_that_has_read_it(policy, name):
    model = compiled(policy)
    behind, own = model.session(prefix=name), alone(model, name)
    assert behind.tokens == own.tokens == [token for part in CHAINS[name] for token in part]
    prompt = some_ids(MIN_INDEXED_TOKENS if policy in ("flat", "static") else 30, 256, 5)
    assert torch.equal(behind.prefill(prompt), own.prefill(prompt))
    assert torch.equal(steps(behind), steps(own))
    behind.rollback(1)
    own.rollback(1)
    assert torch.equal(steps(behind, 1), steps(own, 1))


def test_a_prefix_is_read_once_whatever_starts_behind_it():
    model = fresh()
    calls: list[tuple[int, int]] = []
    sessions = [model.session(prefix="rules", on_chunk=lambda *call: calls.append(call)) for _ in range(3)]
    assert calls == [(len(SYSTEM_IDS), len(SYSTEM_IDS) + len(RULES)), (len(SYSTEM_IDS) + len(RULES),) * 2]
    sessions.append(model.session(on_chunk=lambda *call: calls.append(call)))
    assert len(calls) == 2, "system was read with rules"
    assert model.with_plan(model.plan).session().tokens == SYSTEM_IDS
    assert [len(session) for session in sessions] == [len(SYSTEM_IDS) + len(RULES)] * 3 + [len(SYSTEM_IDS)]


def test_sessions_behind_one_prefix_know_nothing_of_each_other():
    """Trap 13."""
    model = fresh("near")
    first, second = model.session(), model.session()
    together = [torch.stack(model.step([first, second], pair).unbind()) for pair in ([3, 4], [5, 6], [7, 8])]
    for row, tokens in ((0, [3, 5, 7]), (1, [4, 6, 8])):
        own = model.session()
        torch.testing.assert_close(torch.stack([own.step(token) for token in tokens]), torch.stack(together)[:, row], rtol=1e-4, atol=1e-5)
    first.rollback(3 + 1)  # into the prefix
    assert torch.equal(model.session().step(9), alone(model, "system").step(9))


def test_threads_that_ask_at_once_share_one_prefix(monkeypatch):
    model, read = fresh(), []
    forward = CompiledModel.forward

    def counting(self: CompiledModel, batch: Any, **how: Any) -> torch.Tensor:
        read.append(len(batch[0][1]))
        return forward(self, batch, **how)

    monkeypatch.setattr(CompiledModel, "forward", counting)
    found: list[kvcompile.Session] = []
    threads = [threading.Thread(target=lambda: found.append(model.session())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read == [len(SYSTEM_IDS)] and [each.tokens for each in found] == [SYSTEM_IDS] * 4


def test_a_prefix_whose_reading_failed_is_read_again():
    model = fresh()

    def interrupt(read: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.session(prefix="rules", on_chunk=interrupt)
    assert torch.equal(model.session(prefix="rules").step(3), alone(model, "rules").step(3))


# --- bytes -------------------------------------------------------------------------------------------------------------------------------


def test_the_bytes_of_a_prefix_are_counted_once():
    model = fresh()
    sessions = [model.session() for _ in range(8)]
    (system,) = (each for each in model.plan.prefixes if each.name == "system")
    shared = model.plan.stored_bytes(len(SYSTEM_IDS))
    assert [each.nbytes() for each in sessions] == [0] * 8
    assert {each.shared_nbytes() for each in sessions} == {shared} == {model.plan.prefix_bytes(system)}
    for session in sessions:
        session.prefill(some_ids(6, 256))
    assert sum(each.nbytes() for each in sessions) == 8 * model.plan.stored_bytes(6)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_plan_knows_what_a_prefix_holds(policy):
    model = fresh(policy)
    for prefix in model.plan.prefixes:
        model.session(prefix=prefix.name)
    held = {name: session.nbytes() for name, session in model.prefixes._read.items()}
    assert {each.name: model.plan.prefix_bytes(each) for each in model.plan.prefixes} == held


def test_the_plan_names_its_prefixes_with_their_tokens_and_bytes():
    plan = make_plan(spec_of("full", shared=SHARED, relay="off"), module=toys.llama(layers=2), tokenizer=Bytes())
    assert plan == make_plan(spec_of("full", shared=SHARED, relay="off"), module=toys.llama(layers=2), tokenizer=Bytes())
    assert [line for line in plan_remarks(plan, [1024]) if line.startswith("prefix")] == [
        "prefix system (the default): 91 tokens, read once, 45.5 KiB for all sessions",
        "prefix rules (after system): 48 tokens behind 91, read once, 24.0 KiB for all sessions",
        "prefix other: 14 tokens, read once, 7.0 KiB for all sessions",
    ]
    found = plan_dict(plan, [1024])["prefix"]
    assert found["relay"] == "off"
    assert found["shared"][1] == {
        "name": "rules", "after": "system", "tokens": 139, "own_tokens": 48, "bytes": 24 * 1024, "chat": False, "default": False,
    }  # fmt: skip
    assert "prefix rules" in compiled().explain()


def test_a_prefix_needs_a_tokenizer():
    with pytest.raises(SpecError, match=r"prefix\.shared\[1\]: the model comes without a tokenizer, so a text has no tokens\.\n  Pass tok"):
        kvcompile.compile(toys.llama(layers=1), spec=spec_of("full", shared=SHARED))


# --- which one ---------------------------------------------------------------------------------------------------------------------------


def test_one_prefix_is_the_default_and_of_several_the_one_that_is_marked():
    assert with_prefix(text="abc").session().tokens == [1, *b"abc"]
    assert compiled().session().tokens == SYSTEM_IDS
    assert compiled().session(prefix=None).tokens == []
    without = kvcompile.compile(toys.llama(layers=1), spec=spec_of("full", relay="always"), tokenizer=Bytes())
    assert without.session().tokens == [] and without.plan.relay == "always"
    with pytest.raises(SessionError, match=r"prefix: 'x': the spec declares no prefix\.\n  Write prefix: \{shared"):
        without.session(prefix="x")


def test_several_without_a_default_and_unknown_names_are_refused():
    unmarked = [{**entry, "default": False} for entry in SHARED]
    model = with_prefixes(Bytes(), *unmarked)
    with pytest.raises(SessionError) as caught:
        model.session()
    assert str(caught.value) == (
        "prefix: the spec declares 3 prefixes, system, rules, other, and none is the default.\n"
        '  Write prefix="system", or prefix=None for none; or mark one in the spec with default: true.'
    )
    with pytest.raises(SessionError, match=r"prefix: there is no prefix 'rulse' \(there are system, rules, other\)\.\n  Name one of them"):
        model.session(prefix="rulse")
    assert model.session(prefix="other").tokens == CHAINS["other"][0]


def test_texts_are_continued_without_a_second_beginning_and_without_an_end():
    model = compiled()
    done = model.complete("Hi", max_new_tokens=3)
    assert done.prompt_tokens == 2
    session = alone(model, "system")
    assert model.complete("Hi", max_new_tokens=3, session=session).tokens == done.tokens
    assert session.tokens == [*SYSTEM_IDS, *b"Hi", *done.tokens]
    assert model.complete("Hi", max_new_tokens=3, prefix=None).prompt_tokens == 3
    other = model.session(prefix="other")
    assert model.generate("Hi", max_new_tokens=3, prefix="other") == model.generate("Hi", max_new_tokens=3, session=other)
    with pytest.raises(SessionError, match="prefix: a session was given too, which has a past of its own"):
        model.complete("Hi", session=other, prefix="other")
    assert with_prefix(Ending(), text="abc").session().tokens == [1, *b"abc"]
    assert with_prefix(Ending(), text="abc\x02").session().tokens == [1, *b"abc\x02"]


# --- chat --------------------------------------------------------------------------------------------------------------------------------


def test_a_prompt_behind_a_system_message_is_its_conversation_to_the_token():
    model = with_prefix(text=" Be kind. ", chat=True)
    begun = [1, *Bytes.message("system", " Be kind. ")]
    assert model.session().tokens == begun
    session = model.session()
    model.complete("Hi?", max_new_tokens=0, chat=True, session=session)
    messages = [{"role": "system", "content": " Be kind. "}, {"role": "user", "content": "Hi?"}]
    assert session.tokens == Bytes().apply_chat_template(messages, True)
    assert model.complete("Hi?", max_new_tokens=2, chat=True).prompt_tokens == len(session) - len(begun)
    model.complete("And?", max_new_tokens=0, chat=True, session=session)
    assert bytes(session.tokens).endswith(b"<assistant><user>And?\x02<assistant>")
    assert "prefix system (a system message, the default): " in model.explain()


def test_a_restored_session_still_stands_behind_its_system_message(tmp_path):
    model = with_prefix(text="Be kind.", chat=True)
    model.session().save(tmp_path / "begun")
    restored = model.restore(tmp_path / "begun")
    assert model.generate("Hi?", chat=True, session=restored) == model.generate("Hi?", chat=True)


@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [
        (Merging(), "the model's chat template writes the system message, or part of it, into the prompt"),
        (Refusing(), r"the model's chat template refuses a system message \(System role not supported\)"),
        (Counting(), "the model's chat template writes a system message otherwise before a prompt than alone"),
    ],
)
def test_a_template_that_does_not_begin_with_the_system_message_is_refused(tokenizer, reason):
    with pytest.raises(SpecError, match=rf"prefix\.shared\[0\]\.chat: {reason}, so it cannot be read ahead of its conversations\.\n  Take"):
        with_prefix(tokenizer, text="Be kind.", chat=True)


def test_chat_without_a_template_is_refused():
    tokenizer = Bytes()
    tokenizer.chat_template = None
    with pytest.raises(SpecError, match=r"\.chat: this model has no chat template, so it cannot be read ahead"):
        with_prefix(tokenizer, text="Be kind.", chat=True)


def test_a_conversation_that_begins_otherwise_today_is_refused(monkeypatch):
    model = with_prefix(text="Be kind.", chat=True)
    monkeypatch.setattr(Bytes, "message", staticmethod(lambda role, text: [*f"<{role}, Tuesday>{text}".encode(), 2]))
    with pytest.raises(SessionError, match=r"chat: the chat template does not begin this conversation with the tokens of prefix system\."):
        model.complete("Hi?", chat=True)


# --- files -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_a_session_file_holds_its_prefix_and_fits_any_spec_of_the_same_stores(policy, tmp_path):
    """Neither prefixes nor relay are part of what a file belongs to."""
    model = compiled(policy)
    session = model.session(prefix="rules")
    session.prefill(some_ids(9, 256))
    session.save(tmp_path / "session")
    whole = session.nbytes() + session.shared_nbytes()
    plain = model.with_plan(replace(model.plan, prefixes=(), relay="off"))
    for other in (model, plain):
        restored = other.restore(tmp_path / "session")
        assert restored.tokens == session.tokens and restored.nbytes() + restored.shared_nbytes() == whole
        assert torch.equal(steps(restored.fork()), steps(session.fork()))
        restored.save(tmp_path / "again")
        assert torch.equal(steps(model.restore(tmp_path / "again")), steps(session.fork()))
