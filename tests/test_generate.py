"""Generating: what is chosen, when it ends, and the text that a callback sees."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import toys
from units import some_ids

import kvcompile
from kvcompile.ir.errors import SessionError
from kvcompile.runtime import generation


class Bytes:
    """A tokenizer whose ids are bytes of UTF-8."""

    bos_token_id = 1

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [*([1] if add_special_tokens and text else []), *text.encode()]}

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return bytes(ids).decode(errors="replace")

    def apply_chat_template(self, messages, add_generation_prompt):
        assert add_generation_prompt
        return [1, *"".join(f"<{message['role']}>{message['content']}" for message in messages).encode()]


@pytest.fixture(scope="module")
def model():
    spec = {"kvcompile": 1, "verify": {"tokens": 16}, "seed": 3, "target": {"segments": "eager"}}
    return kvcompile.compile(toys.llama(layers=1), spec=spec, tokenizer=Bytes())


@pytest.fixture
def says(monkeypatch):
    """says(text): the model generates these bytes, then zeros."""

    def script(text: str) -> None:
        tokens = iter([*text.encode(), *[0] * 100])
        monkeypatch.setattr(generation, "choose", lambda *rest: next(tokens))

    return script


def greedy(model, ids, new: int) -> tuple[int, ...]:
    session, found = model.session(), []
    logits = session.prefill(ids)
    for _ in range(new):
        found.append(int(logits.argmax()))
        logits = session.step(found[-1])
    return tuple(found)


def test_greedy_generation_is_a_loop_of_steps(model):
    ids = some_ids(20, 256)
    done = model.complete(ids, max_new_tokens=12)
    assert done.tokens == greedy(model, ids, 12)
    assert (done.prompt_tokens, done.new_tokens, done.stopped) == (20, 12, False)
    assert done.stored_bytes == model.plan.stored_bytes(20 + 11)  # the last token was never read
    assert done.text == model.generate(ids, max_new_tokens=12) == Bytes().decode(done.tokens, True)


def test_one_token_needs_no_step(model):
    done = model.complete([1, 2, 3], max_new_tokens=1)
    assert (done.new_tokens, done.decode_tokens_per_s) == (1, 0.0)


def test_a_seed_repeats_and_another_differs(model):
    def sample(**options):
        return model.complete([1, 2, 3], max_new_tokens=24, **options).tokens

    assert sample(temperature=1.0, seed=5) == sample(temperature=1.0, seed=5)
    assert sample(temperature=1.0, seed=5) != sample(temperature=1.0, seed=6)
    assert sample(temperature=1.0) == sample(temperature=1.0, seed=3)  # the spec's seed
    assert sample(temperature=0.0, seed=5) == sample(temperature=0.0, seed=6) == greedy(model, [1, 2, 3], 24)
    torch.manual_seed(0)
    first = sample(temperature=1.0, seed=5)
    torch.manual_seed(1)
    assert sample(temperature=1.0, seed=5) == first, "sampling looks at torch's global generator"


def test_a_small_temperature_is_nearly_greedy(model):
    assert model.complete([9, 9], max_new_tokens=8, temperature=1e-6).tokens == greedy(model, [9, 9], 8)


def test_stop_tokens_end_the_text_and_are_no_part_of_it(model):
    whole = greedy(model, [1, 2, 3], 10)
    stopping = replace(model, stop_tokens=frozenset({whole[4]}))
    done = stopping.complete([1, 2, 3], max_new_tokens=10)
    first = whole.index(whole[4])
    assert (done.tokens, done.stopped) == (whole[:first], True)
    at_once = replace(model, stop_tokens=frozenset({whole[0]})).complete([1, 2, 3])
    assert (at_once.tokens, at_once.text, at_once.stopped) == ((), "", True)


@pytest.mark.parametrize(
    ("said", "stop", "text"),
    [
        ("one. two. three", [". t"], "one"),
        ("one. two. three", ["three", "two"], "one. "),
        ("one. two. three", ". two", "one"),
        ("aab aabc", ["aabc"], "aab "),
        ("prix: 3 €.", ["€"], "prix: 3 "),
        ("xa€y", ["a€"], "x"),
    ],
)
def test_stop_strings_end_the_text_and_are_never_shown(model, says, said, stop, text):
    says(said)
    shown: list[str] = []
    done = model.complete("go", stop=stop, on_text=shown.append)
    assert (done.text, "".join(shown), done.stopped) == (text, text, True)
    says(said)
    assert model.generate("go", stop=stop) == text


@pytest.mark.parametrize("said", ["naïve café", "日本語 text", "🙂 and 👩‍👩‍👧", "sto st s"])
def test_pieces_of_streamed_text_are_whole_and_join_to_the_text(model, says, said):
    says(said)
    shown: list[str] = []
    text = model.generate("go", max_new_tokens=len(said.encode()), on_text=shown.append, stop=["stop"])
    assert text == said == "".join(shown)
    assert all(shown) and "�" not in "".join(shown)
    assert len(shown) > 1


def test_half_a_character_at_the_end_is_shown_at_last(model, says):
    says("aé")
    shown: list[str] = []
    assert model.generate("go", max_new_tokens=2, on_text=shown.append) == "a�" == "".join(shown)


def test_a_session_can_be_continued_even_an_empty_one(model):
    session = model.session()
    done = model.complete([1, 2, 3], max_new_tokens=4, session=session)
    assert session.tokens == [1, 2, 3, *done.tokens]
    one = model.complete([7], max_new_tokens=1, session=session)
    assert session.tokens == [1, 2, 3, *done.tokens, 7, *one.tokens]


def test_a_session_may_only_read_the_prompt(model):
    session = model.session()
    done = model.complete([1, 2, 3], max_new_tokens=0, session=session)
    assert (done.tokens, done.text, done.prompt_tokens, done.stopped, session.tokens) == ((), "", 3, False, [1, 2, 3])
    with pytest.raises(SessionError, match="max_new_tokens: 0 is less than 1"):
        model.complete([1], max_new_tokens=0)


def test_two_calls_on_a_session_equal_one_long_call(model):
    session, ids = model.session(), some_ids(12, 256).tolist()
    first = model.complete(ids, max_new_tokens=5, session=session).tokens
    second = model.complete([7, 8], max_new_tokens=6, session=session).tokens
    assert second == model.complete([*ids, *first, 7, 8], max_new_tokens=6).tokens
    assert session.tokens == [*ids, *first, 7, 8, *second]


def test_a_stop_token_is_not_read_and_a_stop_string_is(model, says):
    session = model.session()
    token = greedy(model, [1, 2, 3], 1)[0]
    replace(model, stop_tokens=frozenset({token})).complete([1, 2, 3], session=session)
    assert session.tokens == [1, 2, 3]
    says("a. b")
    done = model.complete([4], stop=".", session=session)
    assert (done.text, session.tokens) == ("a", [1, 2, 3, 4, *b"a."])


@pytest.mark.parametrize("chat", [False, True])
def test_a_text_begins_once_in_a_session(model, chat):
    session = model.session()
    model.complete("hi", max_new_tokens=1, session=session, chat=chat)
    begun = [1, *(b"<user>hi" if chat else b"hi")]
    assert session.tokens[:-1] == begun
    before = list(session.tokens)
    model.complete("so", max_new_tokens=1, session=session, chat=chat)
    assert session.tokens[:-1] == [*before, *(b"<user>so" if chat else b"so")]


@pytest.mark.parametrize("option", ["stop", "on_text"])
def test_what_needs_a_text_is_refused_without_a_tokenizer(model, option):
    session = model.session()
    with pytest.raises(SessionError) as caught:
        replace(model, tokenizer=None).complete([1], session=session, **{option: print if option == "on_text" else ["x"]})
    assert str(caught.value) == (
        f"{option}: the model has no tokenizer, so there is no text.\n  Leave it out, or pass tokenizer= to kvcompile.compile."
    )
    assert len(session) == 0


def test_generate_without_a_tokenizer_is_refused(model):
    with pytest.raises(SessionError) as caught:
        generation.generate(replace(model, tokenizer=None), [1])
    assert str(caught.value) == (
        "generate: the model has no tokenizer, so there is no text.\n"
        "  Call complete, which returns tokens, or pass tokenizer= to kvcompile.compile."
    )
    assert generation.generate(model, [1, 2], max_new_tokens=3) == model.complete([1, 2], max_new_tokens=3).text


def test_a_chat_goes_through_the_models_template(model):
    session = model.session()
    model.generate("hi", chat=True, max_new_tokens=1, session=session)
    assert bytes(session.tokens[:-1]) == b"\x01<user>hi"


def test_each_chunk_of_the_prompt_is_told(model):
    told = []
    model.generate([1, 2, 3], max_new_tokens=1, on_chunk=lambda done, total: told.append((done, total)))
    assert told == [(3, 3)]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens: -1 is less than 0.\n  Ask for at least one token, or give a session to read the prompt."),
        ({"temperature": -0.5}, "temperature: -0.5 is not a number from 0 on.\n  0 is greedy; 1 samples the model's distribution."),
    ],
)
def test_wrong_options_are_refused_before_anything_is_read(model, options, told):
    session = model.session()
    with pytest.raises(SessionError) as caught:
        model.generate([1], session=session, **options)
    assert str(caught.value) == told
    assert len(session) == 0


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(SessionError) as caught:
        model.generate("")
    assert str(caught.value) == "prompt: the prompt is empty.\n  Give at least one token."
    with pytest.raises(SessionError, match="tokens: there is no token"):
        model.generate([])


def test_text_needs_a_tokenizer(model):
    bare = replace(model, tokenizer=None)
    with pytest.raises(SessionError) as caught:
        bare.complete("text")
    assert str(caught.value) == "prompt: the model has no tokenizer.\n  Give token ids, or pass tokenizer= to kvcompile.compile."
    assert bare.complete([1, 2], max_new_tokens=3).text == ""


def test_an_empty_stop_text_is_refused(model):
    with pytest.raises(SessionError) as caught:
        model.generate("a", stop=["END", ""])
    assert str(caught.value) == "stop: an empty text ends every answer at once.\n  Take it out."


def test_a_chat_without_a_template_is_refused(model):
    class Plain(Bytes):
        chat_template = None

    with pytest.raises(SessionError) as caught:
        replace(model, tokenizer=Plain()).generate("a", chat=True)
    assert str(caught.value) == "chat: this model has no chat template.\n  Write the prompt as the model was trained to read it."
