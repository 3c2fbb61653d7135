"""What every index of keys can do, how one is made, and how it is kept in a file.

Letters: H KV heads, G queries per KV head, T keys, C queries kept of the prompt, K keys found, D head_dim, E value_dim.

An index serves the KV heads of one site that share a policy, in one session.  It covers the positions [first, end), a multiple of
BLOCK_TOKENS of them, and is never asked about others.  Queries come multiplied by the attention's scale, so that q.k is the logit
(before a soft cap), in natural units.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

from kvcompile.ir.indexes import IndexFacts
from kvcompile.ir.policy import Select
from kvcompile.runtime.merge import AttentionState
from kvcompile.runtime.spans import Span


@dataclass(frozen=True)
class RecentQueries:
    """Some queries, thinned out, the last ones or others: query_HCD float32, scaled, in the order of position_C (int64); C may be 0.
    Those of one query head stand behind those of another."""

    query_HCD: Tensor
    position_C: Tensor

    @property
    def count(self) -> int:
        return self.query_HCD.shape[1]

    def thinned(self, most: int) -> RecentQueries:
        """At most `most` of them, evenly spaced; an odd stride, so that those of one query head stand between those of another, whose count
        is a power of two as soon as the text is long."""
        stride = max(1, -(-self.count // most))
        stride += stride % 2 == 0
        return RecentQueries(self.query_HCD[:, ::stride], self.position_C[::stride])

    def behind(self, position: int) -> RecentQueries:
        """Those asked behind a position."""
        kept_C = self.position_C > position
        return RecentQueries(self.query_HCD[:, kept_C], self.position_C[kept_C])


@dataclass(frozen=True)
class Prompt:
    """What an index may learn from: the keys and values that it covers, and the queries that were asked before it was made.

    key_HTD, value_HTE: any dtype.  gram_HDD: float32, sum of q q^T over `queries` queries of each KV head; zeros and 0 of none.
    recent: the last queries.  training: queries over all positions, for a kind that asks for them (ir/indexes.py: LearningFacts).
    k: how many keys a query will choose.
    soft_cap: logits become soft_cap * tanh(logits / soft_cap).
    """

    key_HTD: Tensor
    value_HTE: Tensor
    gram_HDD: Tensor
    queries: int
    recent: RecentQueries
    queries_per_kv: int
    k: int
    soft_cap: float | None = None
    training: RecentQueries | None = None


Keys: TypeAlias = Callable[[int, int], Sequence[Span]]  # the session's keys and values at positions [from, to)


class Found(NamedTuple):
    """position_HGK: absolute positions, int64, ascending, -1 at the end of rows that found fewer.  k: how many keys were asked for.
    score_HGT: the index's guess of every logit, of an index that has one; -inf of keys that it did not look at."""

    position_HGK: Tensor
    k: int
    score_HGT: Tensor | None = None


class KeyIndex(Protocol):
    """An index over positions [first, end)."""

    @property
    def first(self) -> int: ...

    @property
    def end(self) -> int: ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What its user should know of how it was made: sentences."""
        ...

    def add(self, key_HTD: Tensor, value_HTE: Tensor) -> None:
        """Covers T more tokens, a multiple of BLOCK_TOKENS, behind the others."""
        ...

    def search(self, query_HGD: Tensor, k: int, select: Select, keys: Keys) -> Found:
        """The keys that matter most; k >= end - first finds all.  keys: the session's, should the index want to look at them."""
        ...

    def rest(self, query_HGD: Tensor, found: Found, read_lse_HG: Tensor) -> AttentionState | None:
        """An estimate of the attention over everything covered and not found; None of an index that cannot tell.  read_lse_HG: natural
        log-sum-exp of the true logits of what was found."""
        ...

    def recalibrate(self, recent: RecentQueries, keys: Keys, k: int) -> bool:
        """Corrects what it learnt from queries by the last ones, which choose k keys.  False where they have moved so far that it
        should be made anew."""
        ...

    def rollback(self, end: int) -> None:
        """Forgets positions from `end` (a multiple of BLOCK_TOKENS behind `first`) on, or as many of them as it can."""
        ...

    def fork(self) -> KeyIndex:
        """An independent index; what does not change is shared."""
        ...

    def nbytes(self) -> int:
        """Bytes that the index holds beside the keys and values themselves."""
        ...

    def scanned_bytes(self, tail: bool, k: int) -> int:
        """Bytes that one search for k keys, and with `tail` one `rest`, read for all KV heads before any key is looked at."""
        ...

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and numbers that `IndexKind.restore` makes an equal index from."""
        ...


@runtime_checkable
class Shaped(Protocol):
    """An index whose tensors must fit the keys: kernels read both without asking."""

    @property
    def shape(self) -> tuple[int, int, int | None]:
        """KV heads, head_dim, and value_dim if it knows values."""
        ...


@runtime_checkable
class Borrowing(Protocol):
    """An index that knows what it shares.  One that does not counts all of it, in every fork."""

    def borrowed_nbytes(self) -> int:
        """Of `nbytes` those in memory of the index that it was forked from."""
        ...


class Borrowed:
    """Tensors that an index has from the one that it was forked from: they are replaced, never changed, and then are its own.  They do not
    live any longer for it."""

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        self._tensors = {id(tensor): weakref.ref(tensor) for tensor in tensors}

    def nbytes(self, held: Iterable[Tensor]) -> int:
        """Bytes of those that are still held."""
        return sum(tensor.nbytes for tensor in held if (known := self._tensors.get(id(tensor))) is not None and known() is tensor)


class SamplingIndex(KeyIndex, Protocol):
    """An index that draws keys by chance: `search` gives those that it drew, for each query head its own, as many as it happens to."""

    def log_probability(self, query_HGD: Tensor, key_HGKD: Tensor) -> Tensor:
        """With which a search by these queries draws these keys: natural logarithm, float32 [H, G, K]."""
        ...


class IndexKind(IndexFacts, Protocol):
    """One kind of index: what makes them."""

    def build(self, first: int, prompt: Prompt, options: Mapping[str, Any]) -> KeyIndex:
        """An index over the prompt's keys, whose first has position `first`."""
        ...

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> KeyIndex:
        """What `KeyIndex.state` gave.  Raises KeyError, TypeError or ValueError for what it did not give, before anything reads it that
        would go astray.  It keeps the tensors."""
        ...
