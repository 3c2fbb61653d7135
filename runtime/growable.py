"""A store that keeps every token: append-only buffers of reserved address space, forked without copying.

Letters: H KV heads, C capacity of a buffer in tokens, S new tokens, D head_dim, E value_dim.

Rules:
1. Nothing is copied on growth: a full buffer is followed by a further one, and each is one span.
2. A fork leases the first tokens of its parent's buffers.  Only the store that made a buffer writes to it, and never
   below the longest lease that is alive; so a child never changes, whatever its parent does.
3. A lease dies with the store that holds it, and then its slots may be written again.
4. A restored store leases its past from a file, as a fork does from its parent: nobody writes to it, and new tokens go to a buffer.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompile.ir.errors import Problem, SessionError
from kvcompile.runtime.address_space import PAGE_BYTES, collapse, release_tail, reserve
from kvcompile.runtime.descriptor import DescribedPart, Descriptor, PackedPart
from kvcompile.runtime.layout import KeyLayout, key_capacity, key_slots, token_bytes, value_slots
from kvcompile.runtime.spans import Span
from kvcompile.runtime.store import StoreState, rollback_range_problem

FILE_PAGE_BYTES = 4096  # of a head's keys in a file, whatever the machine's pages are


class GrowableStore:
    """Every token of the past, for the KV heads of one group (policy zone `all`).

    capacity_tokens: address space reserved for the first buffer; a longer context opens further buffers, each at least
    as large.  dtype: what keys and values are kept in, or of int8 their scales.  layout: how keys lie in memory.
    Raises CapacityError (from `extend` or `advance`, before anything changed) when the system refuses address space.
    """

    def __init__(
        self,
        kv_heads: int,
        head_dim: int,
        value_dim: int,
        dtype: torch.dtype,
        capacity_tokens: int,
        layout: KeyLayout = "rows",
    ) -> None:
        assert min(kv_heads, head_dim, value_dim, capacity_tokens) > 0
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.value_dim = value_dim
        self.dtype = dtype
        self.capacity_tokens = capacity_tokens
        self.layout = layout
        self._parts: list[_Part] = []
        self._descriptor: Descriptor | None = None

    @property
    def tokens(self) -> int:
        return self._parts[-1].end if self._parts else 0

    @property
    def copies_spans(self) -> bool:
        """Whether spans are copies, made of fewer bits."""
        return self.layout == "int8"

    def spans(self) -> tuple[Span, ...]:
        """All tokens in position order, views without a copy; () when there is none."""
        return tuple(part.span() for part in self._parts)

    def visible(self, first_query: int) -> list[tuple[int, int]]:
        """Positions that queries from `first_query` on may see, as (first, end): all."""
        return [(0, self.tokens)]

    def spans_between(self, first: int, end: int) -> tuple[Span, ...]:
        """The tokens at positions [first, end), as `spans` gives them."""
        return tuple(span for part in self._parts if (span := part.between(first, end)) is not None)

    def gather(self, position_HK: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [H, K, D] and values [H, K, E] at positions of each head's own, which the store holds; copies."""
        dtype = torch.promote_types(self.dtype, torch.float32) if self.layout == "int8" else self.dtype
        key_HKD, value_HKE = (position_HK.new_empty(*position_HK.shape, dim, dtype=dtype) for dim in (self.head_dim, self.value_dim))
        for part in self._parts:
            here_HK = (position_HK >= part.buffer.first) & (position_HK < part.end)
            head_N, place_N = here_HK.nonzero(as_tuple=True)
            slot_N = position_HK[here_HK] - part.buffer.first
            key_HKD[head_N, place_N] = part.buffer.keys.gather(head_N, slot_N)
            value_HKE[head_N, place_N] = part.buffer.values.gather(head_N, slot_N)
        return key_HKD, value_HKE

    def extend(self, key_HSD: Tensor, value_HSE: Tensor) -> tuple[Span, ...]:
        """Appends S tokens and returns spans over all tokens: one span unless capacity ran out or the store was forked.

        key_HSD: [H, S, D]; value_HSE: [H, S, E]; any strides and dtype; S = 0 appends nothing.
        """
        self.append(key_HSD, value_HSE)
        return self.spans()

    def append(self, key_HSD: Tensor, value_HSE: Tensor) -> None:
        """What `extend` does, without spans, which of int8 are copies."""
        first, new = self.tokens, key_HSD.shape[1]
        assert key_HSD.shape == (self.kv_heads, new, self.head_dim), (key_HSD.shape, self.kv_heads, self.head_dim)
        assert value_HSE.shape == (self.kv_heads, new, self.value_dim), (value_HSE.shape, self.kv_heads, self.value_dim)
        self.advance(new)
        try:
            for part in self._parts:
                part.write(first, key_HSD, value_HSE)
        except BaseException:
            self.rollback(new)
            raise

    def advance(self, tokens: int) -> None:
        """Counts `tokens` more tokens, which the caller writes: where, `descriptor()` says."""
        if self._descriptor is not None and self._parts and self._parts[-1].end + tokens <= self._descriptor.end:
            self._parts[-1].count(tokens)  # the way of nearly every step
            return
        room = min(tokens, self._room())
        further = self._open(self.tokens + room, tokens - room) if tokens > room else None  # may raise: nothing is counted yet
        if room:
            self._parts[-1].count(room)
        if further is not None:
            further.count(tokens - room)
            self._parts.append(further)
        if self._descriptor is not None and self.tokens > self._descriptor.end:
            self._descriptor = None

    def descriptor(self) -> int:
        """Address of the words that tell the kernels where each position lies; good until the store is rolled back or longer."""
        if self._descriptor is None:
            last = len(self._parts) - 1
            self._descriptor = Descriptor.growing(
                [part.described(part.room() if index == last else 0) for index, part in enumerate(self._parts)]
            )
        return self._descriptor.address

    def parts(self) -> list[PackedPart]:
        """Where the slots lie, for a store that keeps codes and scales in them."""
        return [PackedPart(*part.buffer.addresses, part.buffer.first, part.end, 0) for part in self._parts]

    def can_rollback(self, tokens: int) -> Problem | None:
        """Any depth down to the empty store is possible."""
        return rollback_range_problem(tokens, self.tokens)

    def rollback(self, tokens: int) -> None:
        """Takes back the last `tokens` tokens and gives the whole pages that nobody reads any more to the system."""
        problem = self.can_rollback(tokens)
        if problem is not None:
            raise SessionError(problem)
        keep = self.tokens - tokens
        self._descriptor = None
        while self._parts and self._parts[-1].buffer.first >= keep:
            self._parts.pop()
        if self._parts:
            self._parts[-1].cut(keep - self._parts[-1].buffer.first)

    def fork(self) -> GrowableStore:
        """A store with the same tokens that reads them where they are: 0 bytes, until the child appends its own."""
        child = GrowableStore(self.kv_heads, self.head_dim, self.value_dim, self.dtype, self.capacity_tokens, self.layout)
        child._parts = [part.lent() for part in self._parts]
        return child

    def use_huge_pages(self) -> None:
        """Puts the whole huge pages that this store's tokens fill into huge pages: for reads of rows wherever they lie."""
        for part in self._parts:
            if part.lease is None:
                part.buffer.collapse()

    def state(self) -> StoreState:
        """As SavedStore: keys and values of all parts, one behind the other as in a buffer of their own."""
        keys, values = (torch.zeros(nbytes, dtype=torch.uint8) for nbytes in self._file_bytes(self.tokens, self.layout))
        numbers = {"tokens": self.tokens, "layout": self.layout}
        if self.tokens:
            whole = self._buffer(0, self.tokens, (keys, values), self.layout)
            for part in self._parts:
                whole.keys.copy(part.buffer.first, part.buffer.keys, 0, part.tokens)
                whole.values.copy(part.buffer.first, part.buffer.values, 0, part.tokens)
        return StoreState("growable", numbers, {"keys": keys, "values": values})

    def restore(self, state: StoreState) -> None:
        """As SavedStore: keys are read where the file has them if they lie there as this store's kernels want them, else copied."""
        tokens, layout = state.of_kind("growable").whole("tokens"), state.numbers["layout"]
        if layout != self.layout and {layout, self.layout} != {"rows", "blocks"}:
            raise ValueError(f"keys in the layout {layout!r} cannot become {self.layout!r}")
        key_bytes, value_bytes = self._file_bytes(tokens, layout)
        memory = state.tensor("keys", torch.uint8, key_bytes), state.tensor("values", torch.uint8, value_bytes)
        if tokens == 0:
            return
        past = self._buffer(0, tokens, memory, layout)
        if layout == self.layout:
            self._parts = [_Part(past, tokens, None).lent()]
        else:
            self.append(past.keys.read(0, tokens), past.values.read(0, tokens))

    def nbytes(self) -> int:
        return self._token_bytes() * sum(part.tokens for part in self._parts if part.lease is None)

    def shared_nbytes(self) -> int:
        """Bytes that forks' parents own, and those that lie in a file."""
        return self._token_bytes() * sum(part.tokens for part in self._parts if part.lease is not None)

    def _token_bytes(self) -> int:
        return self.kv_heads * sum(token_bytes(self.layout, dim, self.dtype) for dim in (self.head_dim, self.value_dim))

    def _room(self) -> int:
        """Tokens that fit in the last buffer behind the last token."""
        return self._parts[-1].room() if self._parts else 0

    def _open(self, first: int, tokens: int) -> _Part:
        return _Part(self._buffer(first, max(self.capacity_tokens, tokens), None, self.layout), 0, None)

    def _buffer(self, first: int, capacity: int, memory: tuple[Tensor, Tensor] | None, layout: KeyLayout) -> _Buffer:
        return _Buffer(first, self.kv_heads, self.head_dim, self.value_dim, self.dtype, capacity, layout, memory)

    def _file_bytes(self, tokens: int, layout: KeyLayout) -> tuple[int, int]:
        """Of keys and of values in a file: each head's begin on a page."""
        dims = (self.head_dim, key_capacity(layout, tokens)), (self.value_dim, tokens)
        keys, values = (self.kv_heads * _whole(slots * token_bytes(layout, dim, self.dtype), FILE_PAGE_BYTES) for dim, slots in dims)
        return keys, values


@dataclass(eq=False)
class _Lease:
    """A promise that the first `tokens` slots of a buffer stay as they are while this object lives."""

    tokens: int
    __weakref__: weakref.ReferenceType[_Lease] | None = None


class _Buffer:
    """Slots for positions [first, first + capacity): the keys of every KV head, and the values.

    A head starts on a page, so that the tail of each head can be given back.
    memory: where keys and values lie, uint8, as much for one head as for another; None: a region of its own.
    """

    def __init__(
        self,
        first: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int,
        dtype: torch.dtype,
        capacity: int,
        layout: KeyLayout,
        memory: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        key_row, value_row = (token_bytes(layout, dim, dtype) for dim in (head_dim, value_dim))
        if memory is None:
            sizes = [kv_heads * _whole(key_capacity(layout, capacity) * key_row), kv_heads * _whole(capacity * value_row)]
            region = reserve(sum(sizes))
            keys, values = region.split_with_sizes(sizes)
        else:
            region, (keys, values) = None, memory
        self._region = region  # None of a file's
        key_bytes, value_bytes = keys.nbytes // kv_heads, values.nbytes // kv_heads
        self._row_bytes = (key_row, value_row)
        self._kv_heads = kv_heads
        self._key_tokens = key_capacity(layout, 1)
        self.first = first
        self.capacity = capacity
        self.keys = key_slots(layout, keys.view(dtype).view(kv_heads, -1), head_dim, capacity)
        self.values = value_slots(layout, values.view(dtype).view(kv_heads, -1), value_dim, capacity)
        self.addresses = (keys.data_ptr(), values.data_ptr(), key_bytes, value_bytes)
        self.written = 0  # slots below it may hold memory
        self.leases: weakref.WeakSet[_Lease] | None = None  # made by the first fork: a kilobyte, and most tails are never forked

    def _heads(self) -> Iterator[tuple[Tensor, int]]:
        """The bytes of each head's keys, then of its values, and how many of them a token takes.

        Made when asked for: kept, they would be a third of what a fork's tail takes beside its keys and values.
        """
        assert self._region is not None
        head_bytes = self.addresses[2:]
        sizes = [self._kv_heads * nbytes for nbytes in head_bytes]
        for memory, row_bytes in zip(self._region.split_with_sizes(sizes), self._row_bytes, strict=True):
            for head in memory.view(self._kv_heads, -1):
                yield head, row_bytes

    def frozen(self) -> int:
        """Slots that a living fork reads."""
        return max((lease.tokens for lease in self.leases or ()), default=0)

    def collapse(self) -> None:
        """Puts what is written into huge pages, where it fills them."""
        if self._region is None:
            return
        if self.written == self.capacity:
            collapse(self._region)
            return
        for head, row_bytes in self._heads():
            collapse(head[: self.written * row_bytes])

    def release_from(self, slot: int) -> None:
        """Gives back the whole pages of every head from `slot` on, as far as they were written."""
        if slot >= self.written:
            return
        whole = -(-slot // self._key_tokens) * self._key_tokens  # a block of keys is kept as long as one of its slots is
        for head, row_bytes in self._heads():
            start, end = _whole(whole * row_bytes), min(head.nbytes, _whole((self.written + self._key_tokens) * row_bytes))
            if start < end:
                release_tail(head[start:end])
        self.written = slot


@dataclass
class _Part:
    """The first `tokens` slots of a buffer, as one store sees them.  lease None: this store made the buffer and writes it; else another
    store did, or it lies in a file."""

    buffer: _Buffer
    tokens: int
    lease: _Lease | None

    @property
    def end(self) -> int:
        return self.buffer.first + self.tokens

    def span(self) -> Span:
        buffer = self.buffer
        return Span(buffer.first, buffer.keys.read(0, self.tokens), buffer.values.read(0, self.tokens))

    def between(self, first: int, end: int) -> Span | None:
        """The tokens at positions [first, end); None where none of them lies here."""
        first, end = max(first, self.buffer.first), min(end, self.end)
        if first >= end:
            return None
        slot = first - self.buffer.first
        return Span(first, self.buffer.keys.read(slot, end - first), self.buffer.values.read(slot, end - first))

    def described(self, room: int) -> DescribedPart:
        return DescribedPart(*self.buffer.addresses, self.buffer.first, self.end + room)

    def room(self) -> int:
        """Free slots behind the last token; none in a buffer of another store, none below a living lease (rule 2)."""
        if self.lease is not None or (self.buffer.leases and self.buffer.frozen() > self.tokens):
            return 0
        return self.buffer.capacity - self.tokens

    def count(self, new: int) -> None:
        """`new` more slots are in use, and hold memory from now on even if the write that follows is interrupted."""
        self.tokens += new
        self.buffer.written = max(self.buffer.written, self.tokens)

    def write(self, first: int, key_HSD: Tensor, value_HSE: Tensor) -> None:
        """The tokens that lie in this part; the first one given has position `first`."""
        skip = max(0, self.buffer.first - first)
        new = min(self.end, first + key_HSD.shape[1]) - max(first, self.buffer.first)
        if new > 0 and self.lease is None:
            slot = first + skip - self.buffer.first
            self.buffer.keys.write(slot, key_HSD[:, skip : skip + new])
            self.buffer.values.write(slot, value_HSE[:, skip : skip + new])

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
        if self.buffer.leases is None:
            self.buffer.leases = weakref.WeakSet()
        self.buffer.leases.add(lease)
        return lease


def _whole(nbytes: int, page: int = PAGE_BYTES) -> int:
    """Whole pages."""
    return -(-nbytes // page) * page
