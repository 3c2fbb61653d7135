"""A session: one sequence's memory.  All state lives here, none in modules."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, SupportsIndex, TypeAlias

import torch
from torch import Tensor

from kvcompile.ir.errors import CapacityError, Problem, SessionError
from kvcompile.runtime.convolution_state import ConvolutionState
from kvcompile.runtime.disk import DiskStore, LostTokens
from kvcompile.runtime.lookup import LookupStore
from kvcompile.runtime.native import NativeTable
from kvcompile.runtime.session_file import save_session
from kvcompile.runtime.store import KVStore, Settling

if TYPE_CHECKING:
    from kvcompile.runtime.model import CompiledModel

Tokens: TypeAlias = int | Sequence[int] | Tensor


def as_token_ids(tokens: Tokens, vocabulary: int | None = None) -> Tensor:
    """Token ids as a 1-D int64 tensor.

    Takes an int, a list or tuple of ints, or a 1-D integer tensor (a 0-D one and [1, n] are taken too).
    Raises SessionError for no token at all, another shape, fractions, or an id outside the vocabulary.
    """
    if type(tokens) is int and vocabulary is not None and 0 <= tokens < vocabulary:  # once a token: as quick as can be
        return torch.tensor([tokens])
    mend = "Give an int, a list or tuple of ints, or a 1-D integer tensor."
    try:
        ids = torch.as_tensor([tokens] if isinstance(tokens, int) else tokens)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SessionError(Problem("tokens", f"cannot be read as token ids ({error}).", mend)) from error
    if ids.dim() == 0 or (ids.dim() == 2 and ids.shape[0] == 1):
        ids = ids.reshape(-1)  # argmax gives a number, tokenizers a row
    if ids.numel() == 0:
        raise SessionError(Problem("tokens", "there is no token.", "Give at least one token."))
    if ids.dim() != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise SessionError(Problem("tokens", f"a tensor of shape {list(ids.shape)} and {ids.dtype} is not a list of token ids.", mend))
    ids = ids.to(torch.int64)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        wrong = low if low < 0 else high
        raise SessionError(Problem("tokens", f"token id {wrong} is not in the vocabulary (0 to {(vocabulary or 0) - 1}).", mend))
    return ids


def whole_number(where: str, value: SupportsIndex, mend: str) -> int:
    """The int that `value` is (an int, or what stands for one, such as numpy's).  Raises SessionError for anything else."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except (TypeError, ValueError) as error:
        raise SessionError(Problem(where, f"{value!r} is not a whole number.", mend)) from error


class Session:
    """One sequence's memory: a store for each group of KV heads at each attention, a state for each convolution.

    Made by `CompiledModel.session()` or `fork()`.  `tokens` holds the ids it has read.
    """

    def __init__(
        self, model: CompiledModel, stores: list[list[KVStore]], convolutions: tuple[ConvolutionState, ...], tokens: list[int]
    ) -> None:
        self.model = model
        self.convolutions = convolutions
        self.tokens = tokens
        self._stores = stores
        self.native = NativeTable(model.plan, model.kernels, stores)
        self._settling = [store for of_site in stores for store in of_site if isinstance(store, Settling)]
        self._on_disk = [store for of_site in stores for store in of_site if isinstance(store, DiskStore)]
        self._broken: str | None = None

    def __len__(self) -> int:
        """How many tokens the session has read."""
        return len(self.tokens)

    def prefill(self, tokens: Tokens, *, logits: str = "last", on_chunk: Callable[[int, int], None] | None = None) -> Tensor:
        """Read tokens, in chunks of `prefill.chunk_tokens`; the result does not depend on the chunk size, but over a KIVI store, whose
        earlier chunks are quantised when the next one is read.

        Returns the last position's logits, float32 `[vocabulary]`; with logits="all" every position's, float32
        `[tokens, vocabulary]`.  on_chunk(read, total) is called after each chunk.
        A call that fails in any chunk, or whose on_chunk raises, takes back all of its chunks; where a ring cannot follow,
        the session is broken and says so.
        Raises SessionError for no tokens, ids outside the vocabulary, too long a context.
        """
        if logits not in ("last", "all"):
            raise SessionError(Problem("logits", f"{logits!r} is not known.", 'Write "last" or "all".'))
        ids = as_token_ids(tokens, self.model.vocabulary)
        self.check_usable()
        self.check_room(len(ids))
        start, convolutions = len(self), self.convolutions
        try:
            return self._read(ids, logits, on_chunk)
        except BaseException as error:
            self.restore_after_failure(start, convolutions, error)
            raise

    def _read(self, ids: Tensor, logits: str, on_chunk: Callable[[int, int], None] | None) -> Tensor:
        parts: list[Tensor] = []
        read = 0
        for chunk in ids.split(self.model.chunk_tokens):
            parts.append(self.model.forward([(self, chunk)], logits_of="all" if logits == "all" else "last", prompt=True))
            read += len(chunk)
            if on_chunk is not None:
                on_chunk(read, len(ids))
        return torch.cat(parts) if logits == "all" else parts[-1][-1]

    def step(self, token: Tokens) -> Tensor:
        """Read one token; returns the next token's logits, float32 `[vocabulary]`."""
        ids = as_token_ids(token, self.model.vocabulary)
        if len(ids) != 1:
            raise SessionError(Problem("step", f"takes one token, not {len(ids)}.", "Use prefill for several tokens."))
        return self.model.forward([(self, ids)])[0]

    def make_indexes(self) -> int:
        """Makes the indexes of heads that look keys up, of all that the session has read: forks made after it share them.

        Otherwise the first generated token makes them, in each fork for itself, of all its past: behind one prefix the same work as often
        as there are forks, and the same bytes.  A fork adds its own tokens to what it shares, as they leave the window.
        What the index knows of queries comes from what was read before this call, and not from the fork's own prompt, until it is held
        against later ones, every 1024 tokens; a fork that reads more than the index was made from makes one of its own.
        A later call adds what was read since, or makes it anew by the same rule.

        Returns how many it made or extended: 0 without such heads, where too little lies between sinks and window (512 tokens), or where
        fewer than 32 tokens have left the window since.  `static` zones choose for each fork: by what its own prompt asks.
        Costs what the first token would.  Raises SessionError for a session that is broken.
        """
        self.check_usable()
        return sum(store.make_index() for stores in self._stores for store in stores if isinstance(store, LookupStore))

    def fork(self) -> Session:
        """A second session with the same past, which both may continue.

        Costs no bytes for growable stores, indexes and convolutions (the child reads the parent's) and a copy of the rings.
        """
        self.check_usable()
        stores = [[store.fork() for store in stores] for stores in self._stores]
        return Session(self.model, stores, self.convolutions, list(self.tokens))

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Neither copied nor pickled: two sessions would write to the same stores."""
        raise SessionError(
            Problem("session", "it can be neither copied nor pickled.", "Call fork() for a second one, save(path) for a file.")
        )

    def hand_over(self) -> Session:
        """A session that takes all that this one holds, and outlives it; this one goes on as a fork of it."""
        child = self.fork()
        taken = Session(self.model, self._stores, self.convolutions, list(self.tokens))
        self._stores, self.native = child._stores, child.native
        self._settling, self._on_disk = child._settling, child._on_disk
        return taken

    def can_rollback(self, tokens: int) -> Problem | None:
        """What stands against taking back the last `tokens` tokens; None if nothing does.  Changes nothing.

        Raises SessionError for what is not a whole number.
        """
        tokens = whole_number("rollback", tokens, "Give how many tokens to take back.")
        if not 0 <= tokens <= len(self):
            return Problem("rollback", f"cannot take back {tokens} of {len(self)} tokens.", f"Give a number from 0 to {len(self)}.")
        held: list[KVStore | ConvolutionState] = [*(store for stores in self._stores for store in stores), *self.convolutions]
        return next((problem for each in held if (problem := each.can_rollback(tokens))), None)

    def rollback(self, tokens: int) -> None:
        """Forget the last `tokens` tokens, as if they had never been read.

        Raises SessionError, and changes nothing, beyond the start or beyond what a ring or a convolution still holds
        (`rollback: n` in a streaming policy makes its rings hold n more tokens, in any policy the convolutions n more inputs).
        """
        self.check_usable()
        tokens = whole_number("rollback", tokens, "Give how many tokens to take back.")
        problem = self.can_rollback(tokens)
        if problem is not None:
            raise SessionError(problem)
        for stores in self._stores:
            for store in stores:
                store.rollback(tokens)
        self.convolutions = tuple(state.rolled_back(tokens) for state in self.convolutions)
        del self.tokens[len(self) - tokens :]

    def save(self, path: str | Path) -> None:
        """Writes the session to a file, from which `CompiledModel.restore` makes an equal one, in this process or another.

        Everything that it needs is in the file, what it shares with other sessions too.  The file appears whole or not at all: until it
        does, what stood at `path` is as it was.  Anybody who may read the file may read the text.
        Raises SessionError where the file cannot be written, and for a store of a kind that no file keeps.
        """
        if not isinstance(path, str | Path):
            raise SessionError(Problem("save", f"a {type(path).__name__} is no path.", "Give the file's name, a str or a Path."))
        save_session(self, path)

    def nbytes(self) -> int:
        """Bytes that this session holds itself: keys and values (0 for an empty one and for a fresh fork's shared past), indexes without
        what a fork has of its parent's, samples of queries (what a fork shares counts for both), and the inputs of its convolutions."""
        return sum(store.nbytes() for stores in self._stores for store in stores) + sum(state.nbytes() for state in self.convolutions)

    def disk_nbytes(self) -> int:
        """Bytes of keys and values that it reads from files (policies whose device is disk); what forks share counts for each."""
        return sum(store.disk_nbytes() for store in self._on_disk)

    def shared_nbytes(self) -> int:
        """Bytes of keys, values and indexes that it reads from the sessions it was forked from, and of keys and values from the file that
        it was restored from."""
        return sum(store.shared_nbytes() for stores in self._stores for store in stores)

    def stores(self, site: int) -> list[KVStore]:
        """The stores of a site, one for each of the plan's head groups."""
        return self._stores[site]

    def settle(self) -> None:
        """What stores do when a call has succeeded: those that quantise tokens do it now."""
        for store in self._settling:
            store.settle()

    def check_usable(self) -> None:
        """Raises SessionError when an interrupted call left the session without a consistent memory."""
        if self._broken:
            raise SessionError(Problem("session", self._broken, "Start a new session, or fork before risky calls."))

    def check_room(self, tokens: int) -> None:
        """Raises SessionError when a model with learnt positions has none left, CapacityError when the disk has no room."""
        plan, length = self.model.plan, len(self) + tokens
        if plan.position_rows is not None and length > plan.position_rows:
            raise SessionError(
                Problem(
                    "session",
                    f"{length} tokens do not fit: the model has learnt positions for {plan.position_rows}.",
                    "Start a new session, or roll back.",
                )
            )
        try:
            for store in self._on_disk:
                store.reserve(tokens)
        except CapacityError:
            self.release_room()
            raise

    def release_room(self) -> None:
        """Gives back what `check_room` reserved on the disk."""
        for store in self._on_disk:
            store.rollback(0)

    def warn_beyond_context(self, tokens: int) -> None:
        """Warns once, when the declared context is passed."""
        plan, length = self.model.plan, len(self) + tokens
        if plan.context_tokens is not None and len(self) <= plan.context_tokens < length:
            warnings.warn(f"beyond the {plan.context_tokens} tokens that the model was made for", stacklevel=5)

    def restore_after_failure(self, length: int, convolutions: tuple[ConvolutionState, ...], cause: BaseException) -> None:
        """Bring the session back to `length` tokens after a call that did not finish; break it if a ring cannot follow.

        convolutions: the states that it had then.
        """
        del self.tokens[length:]
        self.convolutions = convolutions
        if self._broken:
            return
        if isinstance(cause, LostTokens) and any(store is cause.store for store in self._on_disk):
            self._broken = cause.problems[0].what
            return
        for stores in self._stores:
            for store in stores:
                surplus = store.tokens - length
                problem = store.can_rollback(surplus) if surplus > 0 else None
                if problem is not None and isinstance(store, DiskStore):
                    self._broken = problem.what
                    return
                if problem is not None:
                    self._broken = f"a call was interrupted ({type(cause).__name__}) after it had overwritten part of a ring."
                    return
                if surplus > 0:
                    store.rollback(surplus)
