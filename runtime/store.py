"""What every store of keys and values can do.

Letters: H KV heads, S new tokens, D head_dim, E value_dim.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from kvcompile.ir.errors import Problem
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


def rollback_range_problem(tokens: int, held_tokens: int) -> Problem | None:
    """The problem that every store has with taking back a negative number of tokens, or more than there are."""
    if 0 <= tokens <= held_tokens:
        return None
    return Problem(
        f"rollback({tokens})",
        f"the session has {held_tokens} tokens; {tokens} cannot be taken back.",
        f"Take back between 0 and {held_tokens} tokens.",
    )
