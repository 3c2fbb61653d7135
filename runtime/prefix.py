"""Prefixes: texts of the spec that are read once, and that sessions start behind.

A session behind a prefix is a fork of the one that read it, so keys and values of every token are read where they lie, once for all, and a
ring is copied.  A prompt behind it gets no token that begins a text.  A prefix over a KIVI store is quantised when it was read, as an
earlier chunk of a prompt is.

Heads that look keys up have their indexes from the prefix too, made once when it was read (`Session.make_indexes`).  A prefix that
continues another adds to that one's indexes, which both then share; one longer than what those were made from makes its own, since an index
should not know most of its keys by the queries of others.

Behind a system message, a prompt in chat form is what the model's template writes behind the system message of a conversation.  This is
exact where the template writes the same tokens for a system message whatever follows, and the same tokens behind it whatever it says:
`system_ids` asks for both, and `chat_ids` for the first once more, of each prompt.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import EllipsisType
from typing import TYPE_CHECKING, Any

from kvcompile.ir.errors import Problem, SessionError
from kvcompile.ir.plan import PlannedPrefix

if TYPE_CHECKING:
    from kvcompile.runtime.model import CompiledModel
    from kvcompile.runtime.session import Session

OnChunk = Callable[[int, int], None]
_ASKED = ("Hello.", " \n", "1")  # probes: a word, white space that templates cut off, a digit


class ReadPrefixes:
    """The sessions that have read a model's prefixes; nobody but their forks sees them.  Safe to be asked by several threads."""

    def __init__(self) -> None:
        self._read: dict[str, Session] = {}
        self._lock = threading.RLock()

    def fork(self, model: CompiledModel, prefix: PlannedPrefix, on_chunk: OnChunk | None) -> Session:
        """A session behind a prefix, which is read now if it was not yet, with those that it continues."""
        with self._lock:
            return self._session(model, prefix, on_chunk).fork()

    def nbytes(self) -> int:
        """Bytes that the prefixes read so far hold."""
        return sum(session.nbytes() for session in list(self._read.values()))

    def _session(self, model: CompiledModel, prefix: PlannedPrefix, on_chunk: OnChunk | None) -> Session:
        chain, here = [prefix], prefix
        while here.after is not None and here.after not in self._read:
            here = named(model.plan.prefixes, here.after)
            chain.append(here)
        total, done = sum(len(each.ids) for each in chain if each.name not in self._read), 0
        for each in reversed(chain):
            if each.name not in self._read:
                session = model.session(prefix=None) if each.after is None else self._read[each.after].fork()
                session.prefill(each.ids, on_chunk=None if on_chunk is None else _counting(on_chunk, done, total))
                session.make_indexes()
                self._read[each.name] = session
                done += len(each.ids)
        return self._read[prefix.name]


def _counting(on_chunk: OnChunk, done: int, total: int) -> OnChunk:
    return lambda read, _: on_chunk(done + read, total)


def named(prefixes: Sequence[PlannedPrefix], name: str) -> PlannedPrefix:
    (found,) = (each for each in prefixes if each.name == name)
    return found


def choose_prefix(prefixes: Sequence[PlannedPrefix], asked: str | EllipsisType | None) -> PlannedPrefix | None:
    """What a session starts behind.  asked: a name, None for nothing, ... for the default.

    Raises SessionError for a name that is not declared, and where there are several and none is the default.
    """
    if asked is None or (asked is ... and not prefixes):
        return None
    names = ", ".join(each.name for each in prefixes)
    if asked is ...:
        found = next((each for each in prefixes if each.default), None)
        if found is None:
            what = f"the spec declares {len(prefixes)} prefixes, {names}, and none is the default."
            mend = f'Write prefix="{prefixes[0].name}", or prefix=None for none; or mark one in the spec with default: true.'
            raise SessionError(Problem("prefix", what, mend))
        return found
    found = next((each for each in prefixes if each.name == asked), None)
    if found is None:
        what = f"there is no prefix {asked!r} (there are {names})." if prefixes else f"{asked!r}: the spec declares no prefix."
        mend = "Name one of them, or write prefix=None." if prefixes else "Write prefix: {shared: [{name: ..., file: ...}]} in the spec."
        raise SessionError(Problem("prefix", what, mend))
    return found


# --- chat --------------------------------------------------------------------------------------------------------------------------------


def system_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a system message, as the model's template writes it before a conversation.

    Raises ValueError, with the reason, where they are not the beginning of every conversation that has it.
    """
    if not hasattr(tokenizer, "apply_chat_template") or getattr(tokenizer, "chat_template", "") is None:
        raise ValueError("this model has no chat template")
    other = "A" if text != "A" else "B"
    try:
        alone, others = (_conversation(tokenizer, [_system(each)], False) for each in (text, other))
        asked = [[_conversation(tokenizer, [_system(each), _user(user)], True) for user in _ASKED] for each in (text, other)]
    except Exception as error:  # a template raises what it likes, jinja2 what it finds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"the model's chat template refuses a system message ({reason})") from error
    if any(ids[: len(begun)] != begun for begun, all_ids in ((alone, asked[0]), (others, asked[1])) for ids in all_ids):
        raise ValueError("the model's chat template writes a system message otherwise before a prompt than alone")
    if any(mine[len(alone) :] != its[len(others) :] for mine, its in zip(*asked, strict=True)):
        raise ValueError("the model's chat template writes the system message, or part of it, into the prompt")
    return alone


def chat_ids(tokenizer: Any, prompt: str, prefixes: Sequence[PlannedPrefix], past: Sequence[int]) -> list[int]:
    """The tokens of a prompt in chat form behind what a session has read.

    Behind a system message of `prefixes`: what the template writes after that message.  Otherwise a conversation of its own, without the
    token that begins a text where there is a past.
    """
    behind = [each for each in prefixes if each.system is not None and tuple(past[: len(each.ids)]) == each.ids]
    if behind:
        prefix = max(behind, key=lambda each: len(each.ids))
        assert prefix.system is not None
        ids = _conversation(tokenizer, [_system(prefix.system), _user(prompt)], True)
        if tuple(ids[: len(prefix.ids)]) != prefix.ids:
            what = f"the chat template does not begin this conversation with the tokens of prefix {prefix.name}."
            mend = "Ask behind prefix=None; a template that writes the date changes with it: then start the model anew."
            raise SessionError(Problem("chat", what, mend))
        return ids[len(prefix.ids) :]
    ids = _conversation(tokenizer, [_user(prompt)], True)
    begin = getattr(tokenizer, "bos_token_id", None)
    return ids[1:] if past and begin is not None and ids[:1] == [begin] else ids


def _conversation(tokenizer: Any, messages: list[dict[str, str]], asks: bool) -> list[int]:
    """asks: the tokens that begin an answer stand at its end."""
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=asks)
    return list(ids["input_ids"] if hasattr(ids, "keys") else ids)


def _system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}
