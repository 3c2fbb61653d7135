"""A batch of sequences as transformers counts them: rows of equal length, some of which have padding that no session reads.

Letters: B rows, T tokens that every row has read (padding included), S new ones, K of them whose logits are wanted, N tokens of one
session, V vocabulary.

real [B, T] or [B, S], bool: False where a row has padding.  None: nowhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvcompile.ir.errors import Problem, SessionError
from kvcompile.ir.policy import Kivi
from kvcompile.ir.relaying import CHUNK_TOKENS
from kvcompile.runtime.model import CompiledModel
from kvcompile.runtime.session import Session, as_token_ids


class SessionRows:
    """A session a row, made by the first call."""

    def __init__(self, model: CompiledModel) -> None:
        self.model = model
        self._tokens = 0
        self._sessions: list[Session] = []
        self._real_BT: Tensor | None = None

    @property
    def rows(self) -> int:
        """Sequences; 0 before the first call."""
        return len(self._sessions)

    @property
    def tokens(self) -> int:
        """Tokens that every row has read, padding included."""
        return self._tokens

    def nbytes(self) -> int:
        """Bytes of keys and values held."""
        return sum(session.nbytes() for session in self._sessions)

    def note(self, real_BS: Tensor | None, new: int) -> None:
        """Counts `new` tokens that every row has read."""
        if self._real_BT is not None or real_BS is not None:
            before_BT = torch.ones(self.rows, self.tokens, dtype=torch.bool) if self._real_BT is None else self._real_BT
            new_BS = torch.ones(self.rows, new, dtype=torch.bool) if real_BS is None else real_BS
            self._real_BT = torch.cat([before_BT, new_BS], 1)
        self._tokens += new

    def crop(self, tokens: int) -> None:
        """Takes back the last `tokens` tokens of every row.  Raises SessionError, and changes nothing, where a ring cannot follow."""
        if not 0 <= tokens <= self.tokens:
            raise SessionError(Problem("crop", f"cannot take back {tokens} of {self.tokens} tokens.", f"Give 0 to {self.tokens}."))
        keep = self.tokens - tokens
        counts = [tokens] * self.rows if self._real_BT is None else self._real_BT[:, keep:].sum(1).tolist()
        spare = [session.fork() for session in self._sessions[:-1]]  # the last one changes nothing when it refuses
        try:
            for session, count in zip(self._sessions, counts, strict=True):
                session.rollback(count)
        except SessionError:
            self._sessions[: len(spare)] = spare
            raise
        self._real_BT = None if self._real_BT is None else self._real_BT[:, :keep]
        self._tokens = keep

    def select(self, rows: Sequence[int]) -> None:
        """Row i becomes what row rows[i] was: a fork where one is taken twice, and itself, for nothing, where it is taken once."""
        strange = [row for row in rows if not 0 <= row < self.rows]
        if strange:
            what = f"there is no row {strange[0]} among {self.rows}."
            raise SessionError(Problem("past_key_values", what, f"Choose rows from 0 to {self.rows - 1}."))
        taken: set[int] = set()
        chosen = []
        for row in rows:
            chosen.append(self._sessions[row].fork() if row in taken else self._sessions[row])
            taken.add(row)
        self._sessions = chosen
        self._real_BT = None if self._real_BT is None else self._real_BT[list(rows)]

    def reset(self) -> None:
        """Empty, for a batch of any size."""
        self._sessions, self._real_BT, self._tokens = [], None, 0


class ReadRows(SessionRows):
    """Rows that the whole compiled model reads: token ids go in, logits come out.

    sessions: what the rows have read already, which goes on in place; shorter ones count as padded on the left.
    Raises SessionError where one stands there twice.
    """

    def __init__(self, model: CompiledModel, sessions: Sequence[Session] = ()) -> None:
        super().__init__(model)
        if len(set(map(id, sessions))) != len(sessions):
            raise SessionError(Problem("sessions", "a session stands there twice.", "Fork it: each row is a sequence of its own."))
        self._sessions = list(sessions)
        lengths = torch.tensor([len(session) for session in sessions])
        self._tokens = max(lengths.tolist(), default=0)
        if sessions and int(lengths.min()) < self._tokens:
            self._real_BT = torch.arange(self._tokens) >= self._tokens - lengths[:, None]

    def forked(self) -> ReadRows:
        """The same rows, each a fork."""
        child = ReadRows(self.model)
        child._sessions = [session.fork() for session in self._sessions]
        child._tokens, child._real_BT = self._tokens, self._real_BT
        return child

    def real(self) -> Tensor:
        """bool [B, T]"""
        return torch.ones(self.rows, self.tokens, dtype=torch.bool) if self._real_BT is None else self._real_BT

    def read(self, ids_BS: Tensor, real_BS: Tensor | None, keep: int) -> Tensor:
        """Reads S more tokens of each row; float32 [B, K, V], the logits of the last `keep` ones (0: of all), 0 where there is padding.

        Rows that are equal are read once and forked, and so is what all rows of a new batch begin with (`_common_tokens`); no more tokens
        are in one call than `prefill.chunk_tokens`.
        A call that fails leaves every row as it was, or its session broken with a message.
        Raises SessionError for another number of rows, ids outside the vocabulary, a session of another model, too long a context;
        CapacityError where memory is refused.
        """
        rows, new = ids_BS.shape
        if self._sessions and rows != self.rows:
            what = f"{rows} rows for a cache of {self.rows}."
            mend = "Give it the batch that it began with, call batch_repeat_interleave or batch_select_indices, or reset it."
            raise SessionError(Problem("past_key_values", what, mend))
        ids = [ids_BS[row] if real_BS is None else ids_BS[row][real_BS[row]] for row in range(rows)]
        ids = list(as_token_ids(torch.cat(ids), self.model.vocabulary).split([len(each) for each in ids]))
        kept = new if keep == 0 else min(keep, new)
        wants = [kept] * rows if real_BS is None else real_BS[:, new - kept :].sum(1).tolist()
        prompt = new > 1 or self.tokens == 0
        owners = list(range(rows)) if self._sessions else _first_alike(ids)
        sessions = self._sessions or [self.model.session(prefix=None) for _ in range(rows)]
        reading = [row for row, owner in enumerate(owners) if owner == row and len(ids[row])]
        alike = 0 if self._sessions else _common_tokens(self.model, [ids[row] for row in reading], [wants[row] for row in reading])
        if alike:
            begun = sessions[reading[0]]
            _check_room([_Asked(sessions[row], ids[row], wants[row]) for row in reading])
            for row in reading:
                sessions[row].release_room()
            begun.prefill(ids[reading[0]][:alike])
            for row in reading:
                sessions[row] = begun if row == reading[0] else begun.fork()
                ids[row] = ids[row][alike:]
        found = _read_packed(self.model, [_Asked(sessions[row], ids[row], wants[row]) for row in reading], prompt)
        logits_of = dict(zip(reading, found, strict=True))
        if not self._sessions:
            self._sessions = [sessions[row] if owner == row else sessions[owner].fork() for row, owner in enumerate(owners)]
        self.note(real_BS, new)
        if real_BS is None:
            return found[0][None] if rows == 1 else torch.stack([logits_of[owner] for owner in owners])
        out_BKV = torch.zeros(rows, kept, self.model.vocabulary)
        for row, owner in enumerate(owners):
            if owner in logits_of:
                out_BKV[row, real_BS[row, new - kept :]] = logits_of[owner]
        return out_BKV


def _first_alike(ids: Sequence[Tensor]) -> list[int]:
    """Of each row the first one with the same tokens."""
    first: dict[tuple[int, ...], int] = {}
    return [first.setdefault(tuple(row.tolist()), number) for number, row in enumerate(ids)]


def _common_tokens(model: CompiledModel, ids: Sequence[Tensor], wanted: Sequence[int]) -> int:
    """How many first tokens are the same in all of several rows and of no row's wanted ones: whole chunks, as relay sees them together.

    None where KIVI would quantise them for being read in a call of their own, and under target.deterministic, where a row runs the calls
    that it runs alone.
    """
    kivi = any(isinstance(group.policy.store.quantised, Kivi) for site in model.plan.sites for group in site.groups)
    if len(ids) < 2 or kivi or model.spec.target.deterministic:
        return 0
    most = max(0, min(len(row) - max(1, want) for row, want in zip(ids, wanted, strict=True)))
    same_N = torch.stack([row[:most] == ids[0][:most] for row in ids]).all(0)
    return int(same_N.long().cumprod(0).sum()) // CHUNK_TOKENS * CHUNK_TOKENS


class _Asked(NamedTuple):
    """What a session is to read, and of how many of its last tokens the logits are wanted."""

    session: Session
    ids: Tensor
    wanted: int

    @property
    def split(self) -> int:
        """How many tokens are read without logits: one token's cost nothing beside the last token, so they are split off for more."""
        return len(self.ids) - self.wanted if self.wanted > 1 else 0


def _read_packed(model: CompiledModel, asked: Sequence[_Asked], prompt: bool) -> list[Tensor]:
    """float32 [wanted, V] of each, or no session has read anything."""
    before = [(len(each.session), each.session.convolutions) for each in asked]
    _check_room(asked)
    found: list[list[Tensor]] = [[] for _ in asked]
    try:
        for call in _packed([each.ids[: each.split] for each in asked], model.chunk_tokens):
            model.forward([(asked[number].session, ids) for number, ids in call], prompt=prompt)
        for call in _packed([each.ids[each.split :] for each in asked], model.chunk_tokens):
            every = any(asked[number].wanted > 1 for number, _ in call)
            batch = [(asked[number].session, ids) for number, ids in call]
            logits = model.forward(batch, logits_of="all" if every else "last", prompt=prompt)
            parts = logits.split([len(ids) if every else 1 for _, ids in call])
            for (number, _), part in zip(call, parts, strict=True):
                found[number] = [*found[number], part] if asked[number].wanted > 1 else [part[-1:]]
    except BaseException as error:
        for each, (length, convolutions) in zip(asked, before, strict=True):
            each.session.restore_after_failure(length, convolutions, error)
        raise
    return [torch.cat(parts)[: each.wanted] for each, parts in zip(asked, found, strict=True)]


def _check_room(asked: Sequence[_Asked]) -> None:
    """Before anything is read.  Raises SessionError, CapacityError."""
    for number, each in enumerate(asked):
        each.session.check_usable()
        try:
            each.session.check_room(len(each.ids))
        except BaseException:
            for earlier in asked[:number]:
                earlier.session.release_room()
            raise


def _packed(asked: Sequence[Tensor], room: int) -> Iterator[list[tuple[int, Tensor]]]:
    """Calls of at most `room` tokens, row after row: [(number of the row, its next ids)]."""
    call: list[tuple[int, Tensor]] = []
    left = room
    for number, ids in enumerate(asked):
        start = 0
        while start < len(ids):
            call.append((number, ids[start : start + left]))
            taken = len(call[-1][1])
            start, left = start + taken, left - taken
            if left == 0:
                yield call
                call, left = [], room
    if call:
        yield call
