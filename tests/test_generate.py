"""Generating: what is chosen, when it ends, and the text that a callback sees."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import toys
from units import some_ids

import kvcompile
from kvcompile.ir.errors import CapacityError, SessionError
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
        ({"temperature": "1"}, "temperature: '1' is not a number from 0 on.\n  0 is greedy; 1 samples the model's distribution."),
        ({"max_new_tokens": 2.5}, "max_new_tokens: 2.5 is not a whole number.\n  Ask for at least one token."),
        ({"max_new_tokens": None}, "max_new_tokens: None is not a whole number.\n  Ask for at least one token."),
        ({"max_new_tokens": True}, "max_new_tokens: True is not a whole number.\n  Ask for at least one token."),
        ({"seed": "a"}, "seed: 'a' is not a whole number.\n  Give a whole number from 0 to 2^63 - 1."),
        ({"seed": -1}, "seed: -1 is out of range.\n  Give a whole number from 0 to 2^63 - 1."),
        ({"seed": 1 << 70}, f"seed: {1 << 70} is out of range.\n  Give a whole number from 0 to 2^63 - 1."),
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
    with pytest.raises(SessionError) as caught:
        model.generate([])
    assert str(caught.value) == "prompt: there is none.\n  Give a text, token ids, or a list of prompts."


def test_half_a_character_is_refused_by_its_place(model):
    with pytest.raises(SessionError) as caught:
        model.generate(["whole", "caf\ud83d ok"])
    told = "prompts[1]: character 3 is half of a character (a surrogate, U+D83D).\n  Write the whole character, or leave it out."
    assert str(caught.value) == told


def test_the_smallest_temperature_is_greedy(model):
    assert model.generate("ab", max_new_tokens=6, temperature=5e-324) == model.generate("ab", max_new_tokens=6)


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


# --- several prompts -----------------------------------------------------------------------------------------------------------------

PROMPTS = [some_ids(tokens, 256, seed).tolist() for seed, tokens in enumerate((20, 1, 70, 33, 4))]


@pytest.fixture(scope="module")
def duo():
    """KV head 0 forgets, head 1 does not; C++ kernels where there is a compiler."""
    heads = [{"policy": "near", "kv_heads": 0}]
    policies = {"near": {"zones": [{"sink_recent": {"sink_tokens": 4, "recent_tokens": 12}}]}}
    spec = {"kvcompile": 1, "verify": {"tokens": 16}, "policies": policies, "heads": heads, "target": {"segments": "eager"}}
    return kvcompile.compile(toys.llama(layers=2), spec=spec)


def assert_each_equals_itself_alone(model, prompts, **options):
    together = model.complete(prompts, **options)
    alone = [model.complete(prompt, **options) for prompt in prompts]
    for one, other in zip(together, alone, strict=True):
        assert (one.tokens, one.text, one.prompt_tokens, one.stopped) == (other.tokens, other.text, other.prompt_tokens, other.stopped)
        assert one.stored_bytes == other.stored_bytes
    return together


@pytest.mark.parametrize("deterministic", [False, True])
def test_each_of_unequal_prompts_gets_the_text_that_it_gets_alone(duo, deterministic):
    """Trap 14.  Float32."""
    model = replace(duo, spec=replace(duo.spec, target=replace(duo.spec.target, deterministic=deterministic)))
    done = assert_each_equals_itself_alone(model, PROMPTS, max_new_tokens=24)
    assert len({one.tokens for one in done}) == len(PROMPTS), "all answers are the same"


def test_samples_are_drawn_for_each_prompt_as_alone(duo):
    done = assert_each_equals_itself_alone(duo, [*PROMPTS, PROMPTS[0]], max_new_tokens=16, temperature=1.0, seed=5)
    assert done[0].tokens == done[-1].tokens
    seeded = duo.complete([PROMPTS[0]] * 2, max_new_tokens=16, temperature=1.0, seed=[5, 6])
    assert seeded[0].tokens == done[0].tokens != seeded[1].tokens
    assert seeded[1].tokens == duo.complete(PROMPTS[0], max_new_tokens=16, temperature=1.0, seed=6).tokens


def test_a_list_gives_a_list_of_texts(model):
    texts = model.generate(["one", "and another"], max_new_tokens=6)
    assert texts == [model.generate("one", max_new_tokens=6), model.generate("and another", max_new_tokens=6)]
    assert model.generate(["one"], max_new_tokens=6) == texts[:1]
    assert model.generate(("one",), max_new_tokens=6) == texts[:1]
    rows = [torch.tensor([1, *b"one"]), [1, *b"and another"]]
    assert model.generate(rows, max_new_tokens=6) == texts
    assert isinstance(model.generate([1, 2, 3], max_new_tokens=1), str)
    assert isinstance(model.generate([torch.tensor(1), torch.tensor(2)], max_new_tokens=1), str)


def test_each_step_is_one_pass_and_who_has_ended_is_in_none(model, monkeypatch):
    alone = [greedy(model, prompt, 8) for prompt in PROMPTS[:3]]
    stopping = replace(model, stop_tokens=frozenset({alone[0][3], alone[1][5]}))
    whole = stopping.complete(PROMPTS[:3], max_new_tokens=8)
    assert [len(one.tokens) for one in whole] == [len(stopping.complete(prompt, max_new_tokens=8).tokens) for prompt in PROMPTS[:3]]
    rows = []
    real = type(model).forward
    monkeypatch.setattr(
        type(model), "forward", lambda self, batch, **how: rows.append([len(ids) for _, ids in batch]) or real(self, batch, **how)
    )
    stopping.complete(PROMPTS[:3], max_new_tokens=8)
    last = [min(len(one.tokens), 7) for one in whole]  # tokens of each that are read
    assert rows[:3] == [[20], [1], [70]]
    assert rows[3:] == [[1] * sum(step < read for read in last) for step in range(max(last))]
    assert len(set(map(len, rows[3:]))) > 1, "nobody left early"


def test_prompts_continue_sessions_of_their_own(duo):
    base = duo.session()
    base.prefill(some_ids(40, 256, 9))
    sessions = [base.fork() for _ in PROMPTS]
    done = duo.complete(PROMPTS, max_new_tokens=6, session=sessions)
    for prompt, one, session in zip(PROMPTS, done, sessions, strict=True):
        alone = base.fork()
        assert one.tokens == duo.complete(prompt, max_new_tokens=6, session=alone).tokens
        assert session.tokens == alone.tokens == [*base.tokens, *prompt, *one.tokens]
    read = duo.complete([[1], [2]], max_new_tokens=0, session=sessions[:2])
    assert [one.tokens for one in read] == [(), ()]


def test_callbacks_are_told_whose_they_are(model):
    shown: dict[int, str] = {}
    told = []
    texts = model.generate(
        ["one", "and another"],
        max_new_tokens=8,
        on_text=lambda number, piece: shown.__setitem__(number, shown.get(number, "") + piece),
        on_chunk=lambda *chunk: told.append(chunk),
    )
    assert [shown[0], shown[1]] == texts
    assert told == [(0, 4, 4), (1, 12, 12)]


@pytest.mark.parametrize(
    ("prompts", "options", "told"),
    [
        (["a", ""], {}, "prompts[1]: the prompt is empty.\n  Give at least one token."),
        ([[1], []], {}, "prompts[1]: there is no token.\n  Give at least one token."),
        ([[1], [256]], {}, "prompts[1]: token id 256 is not in the vocabulary (0 to 255)."),
        (
            [[1], [2]],
            {"seed": [1]},
            "seed: 1 of them for 2 prompts.\n  Give one for each prompt of a list, or a single one for a single prompt.",
        ),
        ([1, 2], {"seed": [1, 2]}, "seed: 2 of them for one prompt."),
    ],
)
def test_a_wrong_prompt_of_many_is_named_before_any_is_read(model, monkeypatch, prompts, options, told):
    monkeypatch.setattr(type(model), "forward", None)
    with pytest.raises(SessionError) as caught:
        model.generate(prompts, **options)
    assert str(caught.value).startswith(told)


def test_sessions_of_many_prompts_are_one_for_each(model):
    session = model.session()
    with pytest.raises(SessionError) as caught:
        model.generate(["a", "b"], session=session)
    assert str(caught.value) == ("session: one for a list of prompts.\n  Give a list with a session for each, such as forks of this one.")
    with pytest.raises(SessionError) as caught:
        model.generate(["a", "b"], session=[session, session])
    assert str(caught.value) == "session: a session stands twice.\n  Fork it: each prompt is read by one of its own."
    assert len(session) == 0


def test_a_text_among_many_needs_a_tokenizer(model):
    bare = replace(model, tokenizer=None)
    with pytest.raises(SessionError) as caught:
        bare.complete([[1], "text"])
    assert str(caught.value) == "prompts[1]: the model has no tokenizer.\n  Give token ids, or pass tokenizer= to kvcompile.compile."
    assert [one.text for one in bare.complete([[1], [2]], max_new_tokens=3)] == ["", ""]


def test_prompts_that_do_not_fit_the_memory_together_are_refused_before_any_is_read(model, monkeypatch):
    prompts, mib = [[1] * 400] * 5, 1024 * 1024
    of_one = model.plan.stored_bytes(400 + 64)
    limit = model.plan.weight_bytes + 3 * of_one
    small = replace(model, spec=replace(model.spec, target=replace(model.spec.target, memory_bytes=limit)))
    assert len(small.complete(prompts[:3])) == 3
    session = small.session()
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "forward", None)
        with pytest.raises(CapacityError) as caught:
            small.complete(prompts)
        with pytest.raises(CapacityError, match=r"^prompt: a prompt with answers of 9000 tokens take .*\n  Shorten it, ask for fewer"):
            small.complete(prompts[0], max_new_tokens=9000, session=session)
        with pytest.raises(CapacityError, match=r"^prompts\[1\]: 2 prompts .*\n  Give one prompt at a time, ask for fewer"):
            small.complete(prompts, max_new_tokens=600)
    assert len(session) == 0
    assert str(caught.value) == (
        f"prompts[3]: 4 prompts with answers of 64 tokens take {4 * of_one / mib:,.1f} MiB beside {model.plan.weight_bytes / mib:,.1f} MiB "
        f"of weights and prefixes, more than the {limit / mib:,.1f} MiB of target.memory.\n"
        "  Give 3 prompts at a time, ask for fewer new tokens, or declare more memory."
    )


def test_what_sessions_share_needs_its_memory_once(model):
    base = model.session()
    base.prefill([1] * 3000)
    tails = model.plan.stored_bytes(3000 + 10 + 64) - model.plan.stored_bytes(3000)
    limit = model.plan.weight_bytes + model.plan.stored_bytes(3000) + 4 * tails
    small = replace(model, spec=replace(model.spec, target=replace(model.spec.target, memory_bytes=limit)))
    assert len(small.complete([[1] * 10] * 4, session=[base.fork() for _ in range(4)])) == 4
    with pytest.raises(CapacityError, match=r"prompts\[4\]: "):
        small.complete([[1] * 10] * 5, session=[base.fork() for _ in range(5)])


def test_a_prompt_beyond_learnt_positions_is_named_before_any_is_read(model, monkeypatch):
    short = model.with_plan(replace(model.plan, position_rows=30))
    monkeypatch.setattr(type(model), "forward", None)
    with pytest.raises(SessionError, match=r"^prompts\[1\]: 31 tokens do not fit: the model has learnt positions for 30"):
        short.complete([[1] * 20, [1] * 31, [1] * 10])
    with pytest.raises(SessionError, match=r"^session: 31 tokens do not fit"):
        short.complete([1] * 31)
