"""Generating text: a prompt, then one token at a time, until enough."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import EllipsisType
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import Tensor

from kvcompile.ir.errors import CapacityError, KvcompileError, Problem, SessionError
from kvcompile.ir.texts import surrogate_problem
from kvcompile.runtime.prefix import chat_ids
from kvcompile.runtime.session import Session, Tokens, as_token_ids, whole_number

if TYPE_CHECKING:
    from kvcompile.runtime.model import CompiledModel

Prompt: TypeAlias = str | Tokens
Prompts: TypeAlias = list[str] | tuple[str, ...] | Sequence[Sequence[int]] | Sequence[Tensor]


_MIB = 1024 * 1024


@dataclass(frozen=True)
class Generation:
    """What `CompiledModel.complete` made.  Seconds are wall time, and of several prompts those of the passes that they shared;
    stored_bytes is the session's at the end."""

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    prefill_s: float
    decode_s: float
    stored_bytes: int
    stopped: bool

    @property
    def new_tokens(self) -> int:
        return len(self.tokens)

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens a second after the first, which the prefill gives; 0.0 when there is no second token."""
        return (len(self.tokens) - 1) / self.decode_s if len(self.tokens) > 1 and self.decode_s > 0 else 0.0


def complete(
    model: CompiledModel,
    prompt: Prompt | Prompts,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int | Sequence[int] | None = None,
    stop: Iterable[str] = (),
    chat: bool = False,
    on_text: Callable[..., None] | None = None,
    on_chunk: Callable[..., None] | None = None,
    session: Session | Sequence[Session] | None = None,
    prefix: str | EllipsisType | None = ...,
) -> Generation | list[Generation]:
    """Continue a prompt, or each of a list of prompts; the options are those of `CompiledModel.generate`.

    A session that was given has read the prompt and every token of the answer afterwards, the last one included; a stop
    token is no part of the answer and is not read.  max_new_tokens=0 reads the prompt into it and nothing else.
    Without a tokenizer, token ids can be continued and `text` is "".
    Prompts of a list are read one by one; then each pass gives every unfinished answer a token, and an answer that ends leaves.
    Raises SessionError for an empty prompt, options out of range, and a text, `stop` or `on_text` without a tokenizer; and, before the
    first prompt is read, for one longer than a model with learnt positions can read, CapacityError where the disk has no room for all of
    them, or `target.memory` none for them and answers of `max_new_tokens`.
    """
    max_new_tokens = whole_number("max_new_tokens", max_new_tokens, "Ask for at least one token.")
    if max_new_tokens < (1 if session is None else 0):
        mend = "Ask for at least one token, or give a session to read the prompt."
        raise SessionError(Problem("max_new_tokens", f"{max_new_tokens} is less than {1 if session is None else 0}.", mend))
    if not isinstance(temperature, int | float) or not 0 <= temperature < math.inf:
        mend = "0 is greedy; 1 samples the model's distribution."
        raise SessionError(Problem("temperature", f"{temperature!r} is not a number from 0 on.", mend))
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in stop:
        raise SessionError(Problem("stop", "an empty text ends every answer at once.", "Take it out."))
    if model.tokenizer is None:
        for option, given in (("stop", bool(stop)), ("on_text", on_text is not None)):
            if given:
                raise SessionError(Problem(option, "the model has no tokenizer, so there is no text.", _TOKENIZER_MEND))
    many = are_prompts(prompt)
    if isinstance(prompt, list | tuple) and not prompt:
        raise SessionError(Problem("prompt", "there is none.", "Give a text, token ids, or a list of prompts."))
    prompts: list[Any] = list(cast(Prompts, prompt)) if many else [prompt]
    sessions, seeds = (_one_each(name, given, len(prompts), many) for name, given in (("session", session), ("seed", seed)))
    if len({id(each) for each in sessions if each is not None}) < len(sessions) - sessions.count(None):
        raise SessionError(Problem("session", "a session stands twice.", "Fork it: each prompt is read by one of its own."))
    if session is not None and prefix is not ...:
        what = "a session was given too, which has a past of its own."
        raise SessionError(Problem("prefix", what, "Leave one of them out: session(prefix=...) makes a session behind a prefix."))
    answers: list[_Answer] = []
    for number, (each, own, its_seed) in enumerate(zip(prompts, sessions, seeds, strict=True)):
        reading = model.session(prefix=prefix) if own is None else own  # an empty session is false
        ids = _prompt_ids(model, each, chat, reading.tokens, f"prompts[{number}]" if many else None)
        generator = _generator(model.spec.seed if its_seed is None else its_seed)
        shown, told = (call if call is None or not many else partial(call, number) for call in (on_text, on_chunk))
        answers.append(_Answer(model, ids, own, reading, temperature, generator, TextWriter(model.tokenizer, stop, shown), told))
    _check_room(answers, many)
    _check_memory(model, answers, max_new_tokens, many)
    rows = [answer.read_prompt() for answer in answers]
    started = time.perf_counter()
    going = answers if max_new_tokens else []
    while going:
        for answer, logits in zip(going, rows, strict=True):
            answer.take(logits, max_new_tokens)
            if answer.ended:
                answer.leave(time.perf_counter() - started)
        going = [answer for answer in going if not answer.ended]
        rows = _step(model, going)
    _step(model, [answer for answer in answers if answer.own is not None and answer.unread is not None])
    done = [answer.generation() for answer in answers]
    return done if many else done[0]


def generate(model: CompiledModel, prompt: Prompt | Prompts, **options: Any) -> str | list[str]:
    """The text of `complete`, or the texts.  Raises SessionError without a tokenizer, before anything is read."""
    if model.tokenizer is None:
        what = "the model has no tokenizer, so there is no text."
        raise SessionError(Problem("generate", what, "Call complete, which returns tokens, or pass tokenizer= to kvcompile.compile."))
    done = complete(model, prompt, **options)
    return [each.text for each in done] if isinstance(done, list) else done.text


def are_prompts(prompt: object) -> bool:
    """Whether it is a list or tuple of prompts (texts, or rows of token ids), and no row of token ids itself."""
    if not isinstance(prompt, list | tuple):
        return False
    return any(isinstance(each, str | list | tuple) or getattr(each, "ndim", 0) > 0 for each in prompt)


class _Answer:
    """One prompt and what comes after it.

    own: the session that was given.  reading: that, or one made for it; None when it is let go.  unread: the last token, which no session
    has read.  ended: no further token comes.
    """

    def __init__(
        self,
        model: CompiledModel,
        ids: Tensor,
        own: Session | None,
        reading: Session,
        temperature: float,
        generator: torch.Generator,
        writer: TextWriter,
        on_chunk: Callable[[int, int], None] | None,
    ) -> None:
        self.own = own
        self.reading: Session | None = reading
        self.unread: int | None = None
        self.ended = self._stopped = False
        self._model = model
        self._ids = ids
        self._temperature = temperature
        self._generator = generator
        self._writer = writer
        self._on_chunk = on_chunk
        self._prefill_s = self._decode_s = 0.0
        self._stored_bytes = 0
        self._text = ""

    @property
    def prompt_tokens(self) -> int:
        return len(self._ids)

    @property
    def session(self) -> Session:
        assert self.reading is not None, "the answer has ended"
        return self.reading

    @property
    def last(self) -> int:
        assert self.unread is not None, "nothing is left to read"
        return self.unread

    def read_prompt(self) -> Tensor:
        started = time.perf_counter()
        logits = self.session.prefill(self._ids, on_chunk=self._on_chunk)
        self._prefill_s = time.perf_counter() - started
        return logits

    def take(self, logits: Tensor, max_new_tokens: int) -> None:
        """The next token."""
        token = choose(logits, self._temperature, self._generator)
        if token in self._model.stop_tokens:
            self.ended, self._stopped, self.unread = True, True, None
            return
        self._stopped, self.unread = self._writer.add(token), token
        self.ended = self._stopped or len(self._writer.tokens) >= max_new_tokens

    def leave(self, decode_s: float) -> None:
        """The answer is whole; a session that nobody gave is let go."""
        self._decode_s = decode_s
        self._text = self._writer.finish()
        if self.own is None:
            self._stored_bytes = self.session.nbytes()
            self.reading = None

    def generation(self) -> Generation:
        stored = self._stored_bytes if self.own is None else self.own.nbytes()
        tokens = tuple(self._writer.tokens)
        return Generation(self._text, tokens, self.prompt_tokens, self._prefill_s, self._decode_s, stored, self._stopped)


def _generator(seed: Any) -> torch.Generator:
    mend = "Give a whole number from 0 to 2^63 - 1."
    seed = whole_number("seed", seed, mend)
    if not 0 <= seed < 1 << 63:
        raise SessionError(Problem("seed", f"{seed} is out of range.", mend))
    return torch.Generator().manual_seed(seed)


def _check_room(answers: Sequence[_Answer], many: bool) -> None:
    """As Session.check_room, of all prompts together."""
    try:
        for number, answer in enumerate(answers):
            answer.session.check_usable()
            try:
                answer.session.check_room(answer.prompt_tokens)
            except KvcompileError as error:
                if many:
                    raise type(error)(replace(error.problems[0], where=f"prompts[{number}]")) from error
                raise
    finally:
        for answer in answers:
            answer.session.release_room()  # each prompt takes its own when it is read


def _check_memory(model: CompiledModel, answers: Sequence[_Answer], max_new_tokens: int, many: bool) -> None:
    """Weights, prefixes and the sessions of all prompts, at their largest, fit the declared memory.

    What sessions share with others counts once: as much as the one that shares most.
    """
    limit, plan = model.spec.target.memory_bytes, model.plan
    if limit is None:
        return
    shared = max(answer.session.shared_nbytes() for answer in answers)
    held = plan.weight_bytes + plan.staging_bytes + max(model.prefixes.nbytes(), shared)
    needed = held
    for number, answer in enumerate(answers):
        read = len(answer.session) + answer.prompt_tokens
        lent = min(plan.lent_bytes(len(answer.session)), answer.session.shared_nbytes())
        needed += max(plan.prompt_bytes(read), plan.stored_bytes(read + max_new_tokens)) - lent
        if needed > limit:
            up_to_it = f"{number + 1} prompts" if number else "a prompt"
            taken, beside, declared = (f"{size / _MIB:,.1f} MiB" for size in (needed - held, held, limit))
            what = f"{up_to_it} with answers of {max_new_tokens} tokens take {taken} beside {beside} of weights and prefixes, more than "
            what += f"the {declared} of target.memory."
            fewer = f"Give {number} prompts at a time" if number > 1 else "Give one prompt at a time" if number else "Shorten it"
            mend = f"{fewer}, ask for fewer new tokens, or declare more memory."
            raise CapacityError(Problem(f"prompts[{number}]" if many else "prompt", what, mend))


def _step(model: CompiledModel, answers: Sequence[_Answer]) -> list[Tensor]:
    """Every answer's session reads its last token, all of them in one pass.  The logits of each."""
    if not answers:
        return []
    if len(answers) == 1:
        return [answers[0].session.step(answers[0].last)]
    return list(model.step([answer.session for answer in answers], [answer.last for answer in answers]))


_TOKENIZER_MEND = "Leave it out, or pass tokenizer= to kvcompile.compile."


def _one_each(option: str, given: Any, prompts: int, many: bool) -> list[Any]:
    """An option's value for each prompt; None and a number are everybody's.  Raises SessionError where they are not as many."""
    if isinstance(given, list | tuple):
        if many and len(given) == prompts:
            return list(given)
        what = f"{len(given)} of them for {prompts if many else 'one'} prompt{'s' if many else ''}."
        raise SessionError(Problem(option, what, "Give one for each prompt of a list, or a single one for a single prompt."))
    if option == "session" and many and given is not None:
        raise SessionError(Problem(option, "one for a list of prompts.", "Give a list with a session for each, such as forks of this one."))
    return [given] * prompts


def _prompt_ids(model: CompiledModel, prompt: Prompt, chat: bool, past: Sequence[int], where: str | None) -> Tensor:
    """past: what the text stands behind; if it is any, the text does not get the token that begins one.  where: of a list's prompt."""
    if not isinstance(prompt, str):
        try:
            return as_token_ids(prompt, model.vocabulary)
        except SessionError as error:
            if where is None:
                raise
            raise SessionError(replace(error.problems[0], where=where)) from error
    if model.tokenizer is None:
        mend = "Give token ids, or pass tokenizer= to kvcompile.compile."
        raise SessionError(Problem(where or "prompt", "the model has no tokenizer.", mend))
    broken = surrogate_problem(prompt, where or "prompt")
    if broken is not None:
        raise SessionError(broken)
    if chat and getattr(model.tokenizer, "chat_template", "") is None:
        mend = "Write the prompt as the model was trained to read it."
        raise SessionError(Problem("chat", "this model has no chat template.", mend))
    if chat:
        ids = chat_ids(model.tokenizer, prompt, model.plan.prefixes, past)
    elif past:
        ids = model.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    else:
        ids = model.tokenizer(prompt)["input_ids"]
    if not ids:
        raise SessionError(Problem(where or "prompt", "the prompt is empty.", "Give at least one token."))
    return as_token_ids(ids, model.vocabulary)


def choose(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    weights = torch.softmax((logits - logits.max()).double() / temperature, dim=-1)
    return int(torch.multinomial(weights, 1, generator=generator))


class TextWriter:
    """Turns tokens into text as they come: whole characters only, stop strings cut off."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...], on_text: Callable[[str], None] | None) -> None:
        self.tokens: list[int] = []
        self._tokenizer = tokenizer
        self._stop = stop
        self._on_text = on_text
        self._shown = 0
        self._text = ""

    def add(self, token: int) -> bool:
        """Take one more token; True when a stop string ends the text here."""
        self.tokens.append(token)
        if self._tokenizer is None or not (self._stop or self._on_text):
            return False
        text: str = self._tokenizer.decode(self.tokens, skip_special_tokens=True)
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        self._text = text[: min(found)] if found else text
        held = 0 if found else self._held_back(self._text)
        self._show(len(self._text) - held)
        return bool(found)

    def finish(self) -> str:
        if self._tokenizer is None:
            return ""
        if not (self._stop or self._on_text):
            self._text = self._tokenizer.decode(self.tokens, skip_special_tokens=True)
        self._show(len(self._text))
        return self._text

    def _held_back(self, text: str) -> int:
        """Characters that may still change: half a character, or the beginning of a stop string."""
        whole = text.rstrip("�")
        begun = max((n for stop in self._stop for n in range(1, len(stop)) if whole.endswith(stop[:n])), default=0)
        return len(text) - len(whole) + begun

    def _show(self, upto: int) -> None:
        if self._on_text is not None and upto > self._shown:
            self._on_text(self._text[self._shown : upto])
            self._shown = upto
