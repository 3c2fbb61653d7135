"""Generating text: a prompt, then one token at a time, until enough."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvcompile.ir.errors import Problem, SessionError
from kvcompile.runtime.session import Session, Tokens, as_token_ids

if TYPE_CHECKING:
    from kvcompile.runtime.model import CompiledModel


@dataclass(frozen=True)
class Generation:
    """What `CompiledModel.complete` made.  Seconds are wall time; stored_bytes is the session's at the end."""

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
    prompt: str | Tokens,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int | None = None,
    stop: Iterable[str] = (),
    chat: bool = False,
    on_text: Callable[[str], None] | None = None,
    on_chunk: Callable[[int, int], None] | None = None,
    session: Session | None = None,
) -> Generation:
    """Continue a prompt; the options are those of `CompiledModel.generate`.

    A session that was given has read the prompt and every token of the answer afterwards, the last one included; a stop
    token is no part of the answer and is not read.  max_new_tokens=0 reads the prompt into it and nothing else.
    Without a tokenizer, token ids can be continued and `text` is "".
    Raises SessionError for an empty prompt, options out of range, and a text, `stop` or `on_text` without a tokenizer.
    """
    if max_new_tokens < (1 if session is None else 0):
        mend = "Ask for at least one token, or give a session to read the prompt."
        raise SessionError(Problem("max_new_tokens", f"{max_new_tokens} is less than {1 if session is None else 0}.", mend))
    if not 0 <= temperature < math.inf:
        mend = "0 is greedy; 1 samples the model's distribution."
        raise SessionError(Problem("temperature", f"{temperature} is not a number from 0 on.", mend))
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in stop:
        raise SessionError(Problem("stop", "an empty text ends every answer at once.", "Take it out."))
    if model.tokenizer is None:
        for option, given in (("stop", bool(stop)), ("on_text", on_text is not None)):
            if given:
                raise SessionError(Problem(option, "the model has no tokenizer, so there is no text.", _TOKENIZER_MEND))
    keeps = session is not None
    session = model.session() if session is None else session  # an empty session is false
    ids = _prompt_ids(model, prompt, chat, continued=len(session) > 0)
    generator = torch.Generator().manual_seed(model.spec.seed if seed is None else seed)
    started = time.perf_counter()
    logits = session.prefill(ids, on_chunk=on_chunk)
    prefilled = time.perf_counter()
    writer = TextWriter(model.tokenizer, stop, on_text)
    stopped, unread = False, None
    while max_new_tokens:
        token = choose(logits, temperature, generator)
        if token in model.stop_tokens:
            stopped, unread = True, None
            break
        stopped, unread = writer.add(token), token
        if stopped or len(writer.tokens) >= max_new_tokens:
            break
        logits = session.step(token)
    finished = time.perf_counter()
    if keeps and unread is not None:  # whoever gave a session goes on behind the whole answer
        session.step(unread)
    text = writer.finish()
    return Generation(text, tuple(writer.tokens), len(ids), prefilled - started, finished - prefilled, session.nbytes(), stopped)


def generate(model: CompiledModel, prompt: str | Tokens, **options: Any) -> str:
    """The text of `complete`.  Raises SessionError without a tokenizer, before anything is read."""
    if model.tokenizer is None:
        what = "the model has no tokenizer, so there is no text."
        raise SessionError(Problem("generate", what, "Call complete, which returns tokens, or pass tokenizer= to kvcompile.compile."))
    return complete(model, prompt, **options).text


_TOKENIZER_MEND = "Leave it out, or pass tokenizer= to kvcompile.compile."


def _prompt_ids(model: CompiledModel, prompt: str | Tokens, chat: bool, continued: bool) -> Tensor:
    """continued: the text stands behind another one, so that it does not get the token that begins a text."""
    if not isinstance(prompt, str):
        return as_token_ids(prompt, model.vocabulary)
    if model.tokenizer is None:
        raise SessionError(Problem("prompt", "the model has no tokenizer.", "Give token ids, or pass tokenizer= to kvcompile.compile."))
    if chat and getattr(model.tokenizer, "chat_template", "") is None:
        mend = "Write the prompt as the model was trained to read it."
        raise SessionError(Problem("chat", "this model has no chat template.", mend))
    if chat:
        ids = model.tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
        ids = list(ids["input_ids"] if hasattr(ids, "keys") else ids)
        begin = getattr(model.tokenizer, "bos_token_id", None)
        if continued and begin is not None and ids[:1] == [begin]:
            ids = ids[1:]
    elif continued:
        ids = model.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    else:
        ids = model.tokenizer(prompt)["input_ids"]
    if not ids:
        raise SessionError(Problem("prompt", "the prompt is empty.", "Give at least one token."))
    return as_token_ids(ids, model.vocabulary)


def choose(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    weights = torch.softmax(logits / temperature, dim=-1)
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
