"""A store of constant size: the first tokens and the last ones (attention sinks and a recent window).

Letters: H KV heads, S new tokens, C slots, D head_dim, E value_dim.
Source: StreamingLLM (Xiao et al. 2023, section 3.2), with absolute positions as in DuoAttention (2024, section 3.3).

Position p has slot p while p < sink_tokens, and otherwise sink_tokens + (p - sink_tokens) mod window, where window =
recent_tokens + rollback_tokens.  So as long as no more than C tokens were given, slot = position.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompile.ir.errors import Problem, SessionError
from kvcompile.runtime.address_space import reserve
from kvcompile.runtime.descriptor import Descriptor, PackedPart
from kvcompile.runtime.layout import KeyLayout, key_capacity, key_slots, token_bytes, value_slots
from kvcompile.runtime.quantise import dequantise_int8, quantise_int8
from kvcompile.runtime.spans import Span
from kvcompile.runtime.store import StoreState, rollback_range_problem

HEAD_ALIGNMENT_BYTES = 64  # a cache line; not a page, which would round a small ring up by several per cent


class RingStore:
    """The tokens that a sink + recent policy can still see, for the KV heads of one group.

    sink_tokens: the first ones, kept for ever (0 is allowed).  recent_tokens: the window, the query's own token
    included.  rollback_tokens: how many slots more there are, so that a rollback finds what it needs.
    dtype: what keys and values are kept in, or of int8 their scales.  layout: how keys lie in memory.
    Raises CapacityError when the system refuses address space.
    """

    def __init__(
        self,
        kv_heads: int,
        head_dim: int,
        value_dim: int,
        dtype: torch.dtype,
        sink_tokens: int,
        recent_tokens: int,
        rollback_tokens: int = 0,
        layout: KeyLayout = "rows",
    ) -> None:
        assert min(kv_heads, head_dim, value_dim, recent_tokens) > 0
        assert min(sink_tokens, rollback_tokens) >= 0
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.value_dim = value_dim
        self.dtype = dtype
        self.sink_tokens = sink_tokens
        self.recent_tokens = recent_tokens
        self.rollback_tokens = rollback_tokens
        self.layout = layout
        self._window = recent_tokens + rollback_tokens
        self._slots = sink_tokens + self._window
        self._tokens = 0
        # The largest `tokens` since which nothing was forgotten: position p >= sink_tokens still has its slot exactly
        # when p >= _high - _window.  A rollback does not lower it once the ring has wrapped.
        self._high = 0
        key_bytes = _aligned(key_capacity(layout, self._slots) * token_bytes(layout, head_dim, dtype))
        value_bytes = _aligned(self._slots * token_bytes(layout, value_dim, dtype))
        region = reserve(kv_heads * (key_bytes + value_bytes))
        keys, values = (part.view(dtype) for part in region.split_with_sizes([kv_heads * key_bytes, kv_heads * value_bytes]))
        self._byte_HB = [part.view(torch.uint8).view(kv_heads, -1) for part in (keys, values)]
        self._keys = key_slots(layout, keys.view(kv_heads, -1), head_dim, self._slots)
        self._values = value_slots(layout, values.view(kv_heads, -1), value_dim, self._slots)
        self._addresses = (keys.data_ptr(), values.data_ptr(), key_bytes, value_bytes)
        self._descriptor = Descriptor.ring(*self._addresses, sink_tokens, self._window)

    @property
    def tokens(self) -> int:
        return self._tokens

    def extend(self, key_HSD: Tensor, value_HSE: Tensor) -> tuple[Span, ...]:
        """Appends S tokens and returns spans over every key that one of them may see, in position order.

        key_HSD: [H, S, D]; value_HSE: [H, S, E]; any strides and dtype.
        1. While nothing was overwritten: one span from position 0, a view laid out as in a growable store.
        2. Else, if S <= rollback_tokens + 1: the sinks and one or two window spans, views of the ring.
        3. Else: the sinks, a copy of the window before the chunk, and the chunk.
        The spans are valid until the store changes again.
        """
        first, new = self._tokens, key_HSD.shape[1]
        end = first + new
        assert key_HSD.shape == (self.kv_heads, new, self.head_dim), (key_HSD.shape, self.kv_heads, self.head_dim)
        assert value_HSE.shape == (self.kv_heads, new, self.value_dim), (value_HSE.shape, self.kv_heads, self.value_dim)
        oldest = max(self.sink_tokens, first + 1 - self.recent_tokens)  # what the first new query sees behind the sinks
        if max(self._high, end) <= self._slots:  # rule 1
            self._write(first, key_HSD, value_HSE)
            return self._views(0, end)
        if new <= self.rollback_tokens + 1:  # rule 2: the new tokens overwrite only what the first query cannot see
            self._write(first, key_HSD, value_HSE)
            return self._views(0, min(self.sink_tokens, end)) + self._views(oldest, end)
        before = tuple(Span(span.first, span.key_HTD.clone(), span.value_HTE.clone()) for span in self._views(oldest, first))
        key_HSD, value_HSE = (self._as_kept(part) for part in (key_HSD, value_HSE))
        self._write(first, key_HSD, value_HSE)
        skip = max(0, self.sink_tokens - first)  # new tokens that are sinks
        chunk = Span(first + skip, key_HSD[:, skip:], value_HSE[:, skip:])
        return self._views(0, self.sink_tokens) + before + (chunk,)

    def advance(self, tokens: int) -> None:
        """Counts `tokens` more tokens, which the caller writes: where, `descriptor()` says."""
        self._tokens += tokens
        self._high = max(self._high, self._tokens)

    def descriptor(self) -> int:
        """Address of the words that tell the kernels where each position lies; good as long as the store lives."""
        return self._descriptor.address

    def can_rollback(self, tokens: int) -> Problem | None:
        """Possible when everything that the next query would see is still held.

        That is: always while the ring has not overflowed; then down to rollback_tokens + 1 below the longest length
        reached; and always to sink_tokens or less.
        """
        problem = rollback_range_problem(tokens, self._tokens)
        if problem is not None:
            return problem
        keep = self._tokens - tokens
        oldest = max(self.sink_tokens, keep + 1 - self.recent_tokens)  # what the next query sees behind the sinks
        if oldest >= keep or oldest >= self._high - self._window:
            return None
        lowest = self._high - self.rollback_tokens - 1
        return Problem(
            f"rollback({tokens})",
            f"a ring of {self.sink_tokens} sink + {self.recent_tokens} recent tokens that has held {self._high} tokens can take back "
            f"{self._tokens - lowest} of its {self._tokens}, not {tokens}: what they would see is overwritten.",
            f"Write `rollback: {self._high - keep}` in the policy, which enlarges its rings by as many tokens, or fork the session "
            "before the tokens that may be taken back.",
        )

    def rollback(self, tokens: int) -> None:
        """Takes back the last `tokens` tokens; raises SessionError, before anything changed, where can_rollback objects."""
        problem = self.can_rollback(tokens)
        if problem is not None:
            raise SessionError(problem)
        self._tokens -= tokens
        if self._high <= self._slots or self._tokens <= self.sink_tokens:
            self._high = self._tokens  # everything below is held, so the ring starts anew from here

    def fork(self) -> RingStore:
        """A store with a copy of the slots in use."""
        child = RingStore(
            self.kv_heads,
            self.head_dim,
            self.value_dim,
            self.dtype,
            self.sink_tokens,
            self.recent_tokens,
            self.rollback_tokens,
            self.layout,
        )
        for used, mine_HB, its_HB in zip(self._used_bytes(self._high, self.layout), self._byte_HB, child._byte_HB, strict=True):
            its_HB[:, :used].copy_(mine_HB[:, :used])
        child._tokens, child._high = self._tokens, self._high
        return child

    def _used_bytes(self, high: int, layout: KeyLayout) -> tuple[int, int]:
        """Bytes of a head's keys, and of its values, that hold something when so many tokens were given."""
        used = min(high, self._slots)
        key_bytes, value_bytes = (token_bytes(layout, dim, self.dtype) for dim in (self.head_dim, self.value_dim))
        return key_capacity(layout, used) * key_bytes, used * value_bytes

    def state(self) -> StoreState:
        """As SavedStore."""
        parts = [each_HB[:, :used] for used, each_HB in zip(self._used_bytes(self._high, self.layout), self._byte_HB, strict=True)]
        numbers = {"tokens": self._tokens, "high": self._high, "layout": self.layout}
        return StoreState("ring", numbers, {name: part.clone() for name, part in zip(("keys", "values"), parts, strict=True)})

    def restore(self, state: StoreState) -> None:
        """As SavedStore; a ring is copied."""
        high, layout = state.of_kind("ring").whole("high"), state.numbers["layout"]
        tokens = state.whole("tokens", 0, high)
        if layout != self.layout and {layout, self.layout} != {"rows", "blocks"}:
            raise ValueError(f"keys in the layout {layout!r} cannot become {self.layout!r}")
        key_bytes, value_bytes = self._used_bytes(high, layout)
        key_HB = state.tensor("keys", torch.uint8, self.kv_heads, key_bytes)
        value_HB = state.tensor("values", torch.uint8, self.kv_heads, value_bytes)
        self._byte_HB[1][:, :value_bytes].copy_(value_HB)
        if layout == self.layout:
            self._byte_HB[0][:, :key_bytes].copy_(key_HB)
        elif used := min(high, self._slots):
            self._keys.write(0, key_slots(layout, key_HB.view(self.dtype), self.head_dim, used).read(0, used))
        self._tokens, self._high = tokens, high

    def nbytes(self) -> int:
        row_bytes = sum(token_bytes(self.layout, dim, self.dtype) for dim in (self.head_dim, self.value_dim))
        return min(self._high, self._slots) * self.kv_heads * row_bytes

    def shared_nbytes(self) -> int:
        return 0

    def spans_between(self, first: int, end: int) -> tuple[Span, ...]:
        """The tokens at positions [first, end), which the ring must hold, in position order."""
        return self._views(first, end)

    @property
    def oldest(self) -> int:
        """The first position behind the sinks that is still held, if any is."""
        return max(self.sink_tokens, self._high - self._window)

    def parts(self) -> list[PackedPart]:
        """Where the slots lie, for a store that keeps codes and scales in them and has no sinks."""
        return [PackedPart(*self._addresses, 0, self._tokens, self._window)]

    def append(self, key_HSD: Tensor, value_HSE: Tensor) -> None:
        """What `extend` does, without spans."""
        self._write(self._tokens, key_HSD, value_HSE)

    def _as_kept(self, number_HSX: Tensor) -> Tensor:
        """New keys or values as a reader of the ring would see them."""
        if self.layout == "int8":
            return dequantise_int8(*quantise_int8(number_HSX, self.dtype))
        return number_HSX.to(self.dtype).contiguous()

    def _write(self, first: int, key_HSD: Tensor, value_HSE: Tensor) -> None:
        """Writes the tokens that keep a slot: the sinks among them and the last `window` of the others.

        What is counted comes first: an interrupt between two copies leaves a ring that knows what it may have lost.
        """
        end = first + key_HSD.shape[1]
        self.advance(key_HSD.shape[1])
        for lo, hi in ((first, min(end, self.sink_tokens)), (max(first, self.sink_tokens, end - self._window), end)):
            for slot, at, count in self._runs(lo, hi):
                self._keys.write(slot, key_HSD.narrow(1, at - first, count))
                self._values.write(slot, value_HSE.narrow(1, at - first, count))

    def _views(self, first: int, end: int) -> tuple[Span, ...]:
        return tuple(Span(at, self._keys.read(slot, count), self._values.read(slot, count)) for slot, at, count in self._runs(first, end))

    def _runs(self, first: int, end: int) -> list[tuple[int, int, int]]:
        """Positions [first, end), at most one round of the ring, as (slot, first position, tokens) of contiguous slots."""
        if end <= first:
            return []
        if end <= self._slots:
            return [(first, first, end - first)]
        assert self.sink_tokens <= first < end <= first + self._window, (first, end)
        slot = self.sink_tokens + (first - self.sink_tokens) % self._window
        count = min(end - first, self._slots - slot)
        runs = [(slot, first, count)]
        if count < end - first:
            runs.append((self.sink_tokens, first + count, end - first - count))
        return runs


def _aligned(nbytes: int) -> int:
    return -(-nbytes // HEAD_ALIGNMENT_BYTES) * HEAD_ALIGNMENT_BYTES
