"""A store that keeps every token: append-only buffers of reserved address space, forked without copying.

Letters: H KV heads, C capacity of a buffer in tokens, S new tokens, D head_dim, E value_dim.

Rules:
1. Nothing is copied on growth: a full buffer is followed by a further one, and each is one span.
2. A fork leases the first tokens of its parent's buffers.  Only the store that made a buffer writes to it, and never
   below the longest lease that is alive; so a child never changes, whatever its parent does.
3. A lease dies with the store that holds it, and then its slots may be written again.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompile.ir.errors import Problem, SessionError
from kvcompile.runtime.address_space import PAGE_BYTES, release_tail, reserve
from kvcompile.runtime.spans import Span
from kvcompile.runtime.store import rollback_range_problem


class GrowableStore:
    """Every token of the past, for the KV heads of one group (policy zone `all`).

    capacity_tokens: address space reserved for the first buffer; a longer context opens further buffers, each at least
    as large.  dtype: what keys and values are kept in.
    Raises CapacityError (from `extend`, before anything changed) when the system refuses address space.
    """

    def __init__(self, kv_heads: int, head_dim: int, value_dim: int, dtype: torch.dtype, capacity_tokens: int) -> None:
        assert min(kv_heads, head_dim, value_dim, capacity_tokens) > 0
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.value_dim = value_dim
        self.dtype = dtype
        self.capacity_tokens = capacity_tokens
        self._parts: list[_Part] = []

    @property
    def tokens(self) -> int:
        return self._parts[-1].end if self._parts else 0

    def spans(self) -> tuple[Span, ...]:
        """All tokens in position order, views without a copy; () when there is none."""
        return tuple(part.span() for part in self._parts)

    def extend(self, key_HSD: Tensor, value_HSE: Tensor) -> tuple[Span, ...]:
        """Appends S tokens and returns spans over all tokens: one span unless capacity ran out or the store was forked.

        key_HSD: [H, S, D]; value_HSE: [H, S, E]; any strides and dtype; S = 0 appends nothing.
        """
        new = key_HSD.shape[1]
        assert key_HSD.shape == (self.kv_heads, new, self.head_dim), (key_HSD.shape, self.kv_heads, self.head_dim)
        assert value_HSE.shape == (self.kv_heads, new, self.value_dim), (value_HSE.shape, self.kv_heads, self.value_dim)
        room = min(new, self._room())
        further = self._open(self.tokens + room, new - room) if new > room else None  # may raise: nothing is written yet
        if room:
            self._parts[-1].append(key_HSD[:, :room], value_HSE[:, :room])
        if further is not None:
            further.append(key_HSD[:, room:], value_HSE[:, room:])
            self._parts.append(further)
        return self.spans()

    def can_rollback(self, tokens: int) -> Problem | None:
        """Any depth down to the empty store is possible."""
        return rollback_range_problem(tokens, self.tokens)

    def rollback(self, tokens: int) -> None:
        """Takes back the last `tokens` tokens and gives the whole pages that nobody reads any more to the system."""
        problem = self.can_rollback(tokens)
        if problem is not None:
            raise SessionError(problem)
        keep = self.tokens - tokens
        while self._parts and self._parts[-1].buffer.first >= keep:
            self._parts.pop()
        if self._parts:
            self._parts[-1].cut(keep - self._parts[-1].buffer.first)

    def fork(self) -> GrowableStore:
        """A store with the same tokens that reads them where they are: 0 bytes, until the child appends its own."""
        child = GrowableStore(self.kv_heads, self.head_dim, self.value_dim, self.dtype, self.capacity_tokens)
        child._parts = [part.lent() for part in self._parts]
        return child

    def nbytes(self) -> int:
        return self._token_bytes() * sum(part.tokens for part in self._parts if part.lease is None)

    def shared_nbytes(self) -> int:
        return self._token_bytes() * sum(part.tokens for part in self._parts if part.lease is not None)

    def _token_bytes(self) -> int:
        return self.kv_heads * (self.head_dim + self.value_dim) * self.dtype.itemsize

    def _room(self) -> int:
        """Tokens that fit in the last buffer behind the last token."""
        return self._parts[-1].room() if self._parts else 0

    def _open(self, first: int, tokens: int) -> _Part:
        capacity = max(self.capacity_tokens, tokens)
        return _Part(_Buffer(first, self.kv_heads, self.head_dim, self.value_dim, self.dtype, capacity), 0, None)


@dataclass(eq=False)
class _Lease:
    """A promise that the first `tokens` slots of a buffer stay as they are while this object lives."""

    tokens: int
    __weakref__: weakref.ReferenceType[_Lease] | None = None


class _Buffer:
    """Slots for positions [first, first + capacity): one region, the keys of every KV head, then the values.

    A head starts on a page, so that the tail of each head can be given back.
    """

    def __init__(self, first: int, kv_heads: int, head_dim: int, value_dim: int, dtype: torch.dtype, capacity: int) -> None:
        key_bytes, value_bytes = (_whole_pages(capacity * dim * dtype.itemsize) for dim in (head_dim, value_dim))
        region = reserve(kv_heads * (key_bytes + value_bytes))
        keys, values = region.split_with_sizes([kv_heads * key_bytes, kv_heads * value_bytes])
        self._heads = [*keys.view(kv_heads, -1).unbind(), *values.view(kv_heads, -1).unbind()]  # bytes of each head's keys, then values
        self._row_bytes = [head_dim * dtype.itemsize] * kv_heads + [value_dim * dtype.itemsize] * kv_heads
        self.first = first
        self.capacity = capacity
        self.key_HCD = keys.view(dtype).view(kv_heads, -1)[:, : capacity * head_dim].unflatten(1, (capacity, head_dim))
        self.value_HCE = values.view(dtype).view(kv_heads, -1)[:, : capacity * value_dim].unflatten(1, (capacity, value_dim))
        self.written = 0  # slots below it may hold memory
        self.leases: weakref.WeakSet[_Lease] = weakref.WeakSet()

    def frozen(self) -> int:
        """Slots that a living fork reads."""
        return max((lease.tokens for lease in self.leases), default=0)

    def release_from(self, slot: int) -> None:
        """Gives back the whole pages of every head from `slot` on, as far as they were written."""
        if slot >= self.written:
            return
        for head, row_bytes in zip(self._heads, self._row_bytes, strict=True):
            start, end = _whole_pages(slot * row_bytes), _whole_pages(self.written * row_bytes)
            if start < end:
                release_tail(head[start:end])
        self.written = slot


@dataclass
class _Part:
    """The first `tokens` slots of a buffer, as one store sees them.  lease None: this store made the buffer and writes it."""

    buffer: _Buffer
    tokens: int
    lease: _Lease | None

    @property
    def end(self) -> int:
        return self.buffer.first + self.tokens

    def span(self) -> Span:
        buffer = self.buffer
        return Span(buffer.first, buffer.key_HCD.narrow(1, 0, self.tokens), buffer.value_HCE.narrow(1, 0, self.tokens))

    def room(self) -> int:
        """Free slots behind the last token; none in a buffer of another store, none below a living lease (rule 2)."""
        if self.lease is not None or (self.buffer.leases and self.buffer.frozen() > self.tokens):
            return 0
        return self.buffer.capacity - self.tokens

    def append(self, key_HSD: Tensor, value_HSE: Tensor) -> None:
        new = key_HSD.shape[1]
        self.buffer.written = max(self.buffer.written, self.tokens + new)  # first: an interrupted copy took memory too
        self.buffer.key_HCD.narrow(1, self.tokens, new).copy_(key_HSD)
        self.buffer.value_HCE.narrow(1, self.tokens, new).copy_(value_HSE)
        self.tokens += new  # last: nobody reads beyond it

    def cut(self, tokens: int) -> None:
        """Keeps the first `tokens` slots."""
        self.tokens = tokens
        if self.lease is None:
            self.buffer.release_from(max(tokens, self.buffer.frozen()))
        else:
            self.lease = self.buffer_lease(tokens)

    def lent(self) -> _Part:
        """The same part for a child, which may not write to the buffer."""
        return _Part(self.buffer, self.tokens, self.buffer_lease(self.tokens))

    def buffer_lease(self, tokens: int) -> _Lease:
        lease = _Lease(tokens)
        self.buffer.leases.add(lease)
        return lease


def _whole_pages(nbytes: int) -> int:
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES
