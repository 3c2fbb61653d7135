"""What every store of keys and values can do.

Letters: H KV heads, S new tokens, D head_dim, E value_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from kvcompile.ir.errors import Problem, SessionError
from kvcompile.runtime.spans import Span


class KVStore(Protocol):
    """Keys and values of the KV heads that share a policy, for one session.

    tokens: how many tokens the session has given, whether or not the store still holds them.
    """

    @property
    def tokens(self) -> int: ...

    def extend(self, key_HSD: Tensor, value_HSE: Tensor) -> tuple[Span, ...]:
        """Appends S tokens (converted to the store's dtype) and returns spans, in position order, that cover every
        key the S new queries may see, themselves included.  The spans are valid until the store changes again."""
        ...

    def advance(self, tokens: int) -> None:
        """Counts `tokens` more tokens, which a kernel writes: where, `descriptor()` says.  Raises CapacityError, counting none."""
        ...

    def descriptor(self) -> int:
        """Address of the words that tell kernels where each position lies (runtime/descriptor.py)."""
        ...

    def can_rollback(self, tokens: int) -> Problem | None:
        """What stands against taking back the last `tokens` tokens; None if nothing does.  Changes nothing."""
        ...

    def rollback(self, tokens: int) -> None:
        """Takes back the last `tokens` tokens: as if they had never been appended.

        Raises SessionError, before anything changed, when `can_rollback` names a problem.
        """
        ...

    def fork(self) -> KVStore:
        """An independent store with the same tokens; neither sees what the other does later."""
        ...

    def nbytes(self) -> int:
        """Bytes of the tokens held in memory that this store writes."""
        ...

    def shared_nbytes(self) -> int:
        """Bytes of the tokens that this store reads from memory of the stores it was forked from."""
        ...


@runtime_checkable
class Settling(Protocol):
    """A store that has something left to do when a call has succeeded; its next change does it otherwise."""

    def settle(self) -> None: ...


@runtime_checkable
class Paged(Protocol):
    """A store whose memory can lie in huge pages."""

    def use_huge_pages(self) -> None:
        """Moves what is written to huge pages, as far as it fills them: no memory is added."""
        ...


@dataclass(frozen=True)
class StoreState:
    """All that a store, or a part of it, needs to go on elsewhere, and nothing that the plan says: what a file keeps of it.

    kind: what wrote it.  numbers: as JSON has them.  tensors: of a state that was read, views of the file, which are never written to.
    inner: states of its parts.
    """

    kind: str
    numbers: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    inner: Mapping[str, StoreState] = field(default_factory=dict)

    def of_kind(self, kind: str) -> StoreState:
        """Itself.  Raises ValueError where another kind of store wrote it."""
        if self.kind != kind:
            raise ValueError(f"it is the state of another kind of store: {self.kind}, not {kind}")
        return self

    def whole(self, name: str, least: int = 0, most: int | None = None) -> int:
        """A number.  Raises ValueError where it is no whole one, or none from `least` to `most`."""
        number = self.numbers[name]
        if type(number) is not int or number < least or number > (_MOST if most is None else most):
            raise ValueError(f"{name} is {number!r}")
        return number

    def tensor(self, name: str, dtype: torch.dtype, *shape: int | None) -> Tensor:
        """A tensor.  Raises ValueError where its dtype or shape is another; None: any size."""
        found = self.tensors[name]
        fits = len(shape) == found.dim() and all(want in (None, size) for want, size in zip(shape, found.shape, strict=True))
        if found.dtype != dtype or not fits:
            raise ValueError(f"{name} is {found.dtype} {list(found.shape)}, not {dtype} {list(shape)}")
        return found


_MOST = 1 << 40  # of any number of tokens or bytes that a state tells


@runtime_checkable
class SavedStore(Protocol):
    """A store that can be kept in a file (runtime/session_file.py)."""

    def state(self) -> StoreState:
        """What `restore` makes an equal store from; what was forked is in it too.  Tensors are copies, or never change."""
        ...

    def restore(self, state: StoreState) -> None:
        """Makes an empty store equal to the one that gave the state: to the bit, but where keys lie otherwise in memory.

        Where it can it reads the state's tensors where they are.  Raises KeyError, TypeError or ValueError for what `state` never gives,
        and the store is then of no use.
        """
        ...


class RowStore(KVStore, Protocol):
    """A store that keeps every token, and gives any of them."""

    kv_heads: int
    head_dim: int

    @property
    def copies_spans(self) -> bool:
        """Whether spans are copies, made of fewer bits."""
        ...

    def append(self, key_HSD: Tensor, value_HSE: Tensor) -> None:
        """What `extend` does, without spans."""
        ...

    def spans(self) -> tuple[Span, ...]:
        """All tokens in position order; () when there is none."""
        ...

    def spans_between(self, first: int, end: int) -> tuple[Span, ...]:
        """The tokens at positions [first, end), in position order."""
        ...

    def gather(self, position_HK: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [H, K, D] and values [H, K, E] at positions of each head's own, int64 [H, K], which the store holds."""
        ...

    def fork(self) -> RowStore: ...


def saved(store: object) -> SavedStore:
    """The store itself.  Raises SessionError where it is of a kind that no file keeps."""
    if isinstance(store, SavedStore):
        return store
    what = f"{type(store).__name__} cannot be kept in a session file."
    raise SessionError(Problem("save", what, "Take the policies that use it out, or keep the tokens and read them again."))


def rollback_range_problem(tokens: int, held_tokens: int) -> Problem | None:
    """The problem that every store has with taking back a negative number of tokens, or more than there are."""
    if 0 <= tokens <= held_tokens:
        return None
    return Problem(
        f"rollback({tokens})",
        f"the session has {held_tokens} tokens; {tokens} cannot be taken back.",
        f"Take back between 0 and {held_tokens} tokens.",
    )
