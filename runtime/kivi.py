"""A store that keeps keys and values in 2 or 4 bits, but for the last tokens: KIVI.

Letters: H KV heads, S new tokens, T tokens, K positions that are asked for, D head_dim, E value_dim.
Source: KIVI (Liu et al. 2024, section 3.2, Algorithm 1); the arithmetic is in runtime/quantise.py.

With R = residual_tokens, after n tokens:
  keys     are gathered in full precision; as soon as R are there, they are quantised, in groups of `group` tokens of a channel.  The
           last n mod R are exact.
  values   the last R are exact; one that leaves them is quantised, in groups of `group` channels.

1. A call attends over what the store held before it and its own tokens in full precision; what is to be quantised is quantised
   afterwards (`settle`).  So what the store holds depends on the tokens alone, never on how a prompt was cut.  What a prompt's queries see
   does: its later chunks see earlier ones quantised, as KIVI's own decoding does.
2. A ring keeps its sinks in full precision: every query sees them.  KIVI begins behind them, with R at most the window.  Groups of keys
   leave the ring whole, when their last token has left the window.
3. A rollback gives a store of the same form as one that never had the tokens, exact tokens included.  What had not been quantised is the
   same to the bit.  What had been (keys of a group that the cut falls into or behind, back to the last multiple of R; values that
   the residual now covers again) comes back as its quantised value, rounded to the store's dtype.  A call that fails before it
   settled loses nothing.
4. A fork shares the quantised tokens (0 bytes) and copies the exact ones; a ring is copied in its quantised form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompile.ir.errors import Problem, SessionError
from kvcompile.ir.policy import Kivi
from kvcompile.ir.store_bytes import code_bytes, key_group_bytes, ring_residual, value_token_bytes
from kvcompile.runtime.address_space import PAGE_BYTES, reserve
from kvcompile.runtime.descriptor import Descriptor
from kvcompile.runtime.growable import GrowableStore
from kvcompile.runtime.layout import KeyLayout, key_capacity, key_slots, token_bytes, value_slots
from kvcompile.runtime.quantise import dequantise_keys, dequantise_some_keys, dequantise_values, quantise_keys, quantise_values
from kvcompile.runtime.ring import RingStore
from kvcompile.runtime.spans import Span
from kvcompile.runtime.store import StoreState, rollback_range_problem

SPARE_TOKENS = 16  # exact tokens that a call may bring without larger buffers
BLOCK_TOKENS = 1024  # positions that are in full precision at once where torch attends


class KiviStore:
    """The KV heads of one group: every token of the past, or with recent_tokens a ring.

    dtype: of exact tokens and of scales.  capacity_tokens: address space of a store of every token.  layout: how exact keys lie.
    """

    def __init__(
        self,
        kv_heads: int,
        head_dim: int,
        value_dim: int,
        dtype: torch.dtype,
        kivi: Kivi,
        capacity_tokens: int | None = None,
        layout: KeyLayout = "rows",
        *,
        sink_tokens: int = 0,
        recent_tokens: int | None = None,
        rollback_tokens: int = 0,
    ) -> None:
        assert (capacity_tokens is None) != (recent_tokens is None)
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.value_dim = value_dim
        self.dtype = dtype
        self.kivi = kivi
        self.capacity_tokens = capacity_tokens
        self.layout: KeyLayout = layout
        self.sink_tokens = sink_tokens
        self.recent_tokens = recent_tokens
        self.rollback_tokens = rollback_tokens
        self.residual_tokens = kivi.residual_tokens
        if recent_tokens is not None:
            self.residual_tokens = ring_residual(kivi, recent_tokens + rollback_tokens)
            assert self.residual_tokens, "a ring that no group fits in keeps everything in full precision: RingStore"
        self._groups: GrowableStore | RingStore = self._packed_keys()
        self._values: GrowableStore | RingStore | None = self._packed_values()
        self._sinks = _Exact(self, max(1, sink_tokens), max(1, sink_tokens))
        self._exact = self._residual()
        self._tokens = 0
        self._coded_keys = 0  # tokens behind the sinks whose keys are quantised
        self._coded_values = 0
        self._descriptor: Descriptor | None = None
        self._dropped_values = 0  # places below it lie nowhere, in a ring that quantises no value

    @property
    def tokens(self) -> int:
        return self._tokens

    @property
    def copies_spans(self) -> bool:
        """Spans are copies, made of fewer bits."""
        return True

    @property
    def _behind_sinks(self) -> int:
        return max(0, self._tokens - self.sink_tokens)

    # --- appending -----------------------------------------------------------------------------------------------------------------

    def extend(self, key_HSD: Tensor, value_HSE: Tensor) -> tuple[Span, ...]:
        """Appends S tokens and returns spans over all that they may see: copies, in full precision."""
        first = self._tokens
        self.append(key_HSD, value_HSE)
        return tuple(span for start, end in self.visible(first) for span in self.spans_between(start, end))

    def append(self, key_HSD: Tensor, value_HSE: Tensor) -> None:
        """What `extend` does, without spans."""
        first, new = self._tokens, key_HSD.shape[1]
        assert key_HSD.shape == (self.kv_heads, new, self.head_dim), (key_HSD.shape, self.kv_heads, self.head_dim)
        assert value_HSE.shape == (self.kv_heads, new, self.value_dim), (value_HSE.shape, self.kv_heads, self.value_dim)
        self.advance(new)
        try:
            self._write(first, key_HSD, value_HSE)
        except BaseException:
            self.rollback(new)
            raise

    def _write(self, first: int, key_HSD: Tensor, value_HSE: Tensor) -> None:
        new = key_HSD.shape[1]
        sinks = min(new, max(0, self.sink_tokens - first))
        if sinks:
            self._sinks.keys.write(first, key_HSD[:, :sinks])
            self._sinks.write_values(first, value_HSE[:, :sinks])
        if new > sinks:
            place = first + sinks - self.sink_tokens
            self._exact.keys.write(place - self._coded_keys, key_HSD[:, sinks:])
            self._exact.write_values(place, value_HSE[:, sinks:])

    def advance(self, tokens: int) -> None:
        """Counts `tokens` more tokens, which a kernel writes in full precision: where, `descriptor()` says.

        Quantises first what the last call left.  Raises CapacityError, counting none.
        """
        self.settle()
        places = max(0, self._tokens + tokens - self.sink_tokens)
        keys, values = places - self._coded_keys, places - self._coded_values
        if keys > self._exact.key_slots or values > self._exact.value_slots:
            room = self.residual_tokens + SPARE_TOKENS
            self._move_to(_Exact(self, max(keys, room), max(values, room)))
        self._tokens += tokens

    def settle(self) -> None:
        """Quantises what no longer belongs to the last tokens; done after a call, or by the next one."""
        places = self._behind_sinks
        keys_end, values_end = places - places % self.residual_tokens, max(0, places - self.residual_tokens)
        if values_end > self._coded_values:
            values = self._exact.read_values(self._coded_values, values_end)
            if self._values is None:
                self._dropped_values = values_end
            else:
                self._values.append(*quantise_values(values, self.kivi))
            self._coded_values = values_end
        if keys_end > self._coded_keys:
            left = self._exact.keys.read(keys_end - self._coded_keys, places - keys_end).clone()
            keys = self._exact.keys.read(0, keys_end - self._coded_keys)
            self._groups.append(*quantise_keys(keys, self.kivi))
            self._coded_keys = keys_end
            self._exact.keys.write(0, left)
        if max(self._exact.key_slots, self._exact.value_slots) > self.residual_tokens + SPARE_TOKENS:
            self._move_to(self._residual())

    def _move_to(self, exact: _Exact) -> None:
        """Exact tokens lie elsewhere from now on."""
        places = self._behind_sinks
        exact.keys.write(0, self._exact.keys.read(0, places - self._coded_keys))
        exact.write_values(self._coded_values, self._exact.read_values(self._coded_values, places))
        self._exact = exact

    def descriptor(self) -> int:
        """Address of the words that tell the kernels where each position lies; the same one as long as no further buffer is opened."""
        values = [] if self._values is None else self._values.parts()
        codes = code_bytes(self.value_dim, self.kivi.bits)
        words = [
            [self.sink_tokens, *self._sinks.addresses, *self._exact.addresses, self._coded_keys, self._coded_values],
            [self._exact.value_slots, self.sink_tokens + self._coded_keys + self._exact.key_slots, self.kivi.group],
            [self.value_dim * self.dtype.itemsize, codes, value_token_bytes(self.kivi, self.value_dim, self.dtype.itemsize) - codes],
        ]
        self._descriptor = Descriptor.quantised([*words[0], *words[1], *words[2]], self._groups.parts(), values, self._descriptor)
        return self._descriptor.address

    # --- reading -------------------------------------------------------------------------------------------------------------------

    def visible(self, first_query: int) -> list[tuple[int, int]]:
        """Positions that queries from `first_query` on may see, in order, as (first, end)."""
        if self.recent_tokens is None:
            return [(0, self._tokens)]
        recent = max(self.sink_tokens, first_query + 1 - self.recent_tokens)
        return [(0, min(self.sink_tokens, self._tokens)), (recent, self._tokens)]

    def spans(self) -> tuple[Span, ...]:
        """All tokens of a store that keeps them all; copies."""
        assert self.recent_tokens is None
        return self.spans_between(0, self._tokens)

    def spans_between(self, first: int, end: int) -> tuple[Span, ...]:
        """The tokens at positions [first, end), which the store must hold: copies in float32, or float64 if the store's dtype is."""
        first, end = max(first, 0), min(end, self._tokens)
        sinks = min(end, self.sink_tokens)
        spans = []
        if first < sinks:
            key_HTD, value_HTE = self._sinks.keys.read(first, sinks - first), self._sinks.read_values(first, sinks)
            spans.append(Span(first, _wide(key_HTD), _wide(value_HTE)))
        if max(first, sinks) < end:
            lo, hi = max(first, sinks) - self.sink_tokens, end - self.sink_tokens
            spans.append(Span(max(first, sinks), self._keys_between(lo, hi), self._values_between(lo, hi)))
        return tuple(spans)

    def _keys_between(self, first: int, end: int) -> Tensor:
        """Of the places [first, end) behind the sinks."""
        group, parts = self.kivi.group, []
        coded = min(end, self._coded_keys)
        if first < coded:
            at = first // group
            spans = self._groups.spans_between(at, -(-coded // group))
            packed = [dequantise_keys(span.key_HTD, span.value_HTE, self.head_dim, self.dtype, self.kivi) for span in spans]
            parts.append(torch.cat(packed, 1).narrow(1, first - at * group, coded - first))
        exact = max(first, self._coded_keys)
        if exact < end:
            parts.append(_wide(self._exact.keys.read(exact - self._coded_keys, end - exact)))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _values_between(self, first: int, end: int) -> Tensor:
        parts = []
        coded = min(end, self._coded_values)
        if first < coded:
            assert self._values is not None
            spans = self._values.spans_between(first, coded)
            parts += [dequantise_values(span.key_HTD, span.value_HTE, self.value_dim, self.dtype, self.kivi) for span in spans]
        exact = max(first, self._coded_values)
        if exact < end:
            parts.append(_wide(self._exact.read_values(exact, end)))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def gather(self, position_HK: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [H, K, D] and values [H, K, E] at positions of each head's own, of a store that keeps all tokens: only these are
        dequantised, in float32 or float64."""
        assert self.recent_tokens is None and isinstance(self._groups, GrowableStore) and isinstance(self._values, GrowableStore)
        dtype = torch.promote_types(self.dtype, torch.float32)
        key_HKD, value_HKE = (position_HK.new_empty(*position_HK.shape, dim, dtype=dtype) for dim in (self.head_dim, self.value_dim))
        coded_HK, group = position_HK < self._coded_keys, self.kivi.group
        code_HKB, scale_HKB = self._groups.gather(torch.where(coded_HK, position_HK // group, -1))
        key_HKD[coded_HK] = dequantise_some_keys(
            code_HKB[coded_HK], scale_HKB[coded_HK], position_HK[coded_HK] % group, self.head_dim, self.dtype, self.kivi
        )
        head_N, place_N = (~coded_HK).nonzero(as_tuple=True)
        key_HKD[head_N, place_N] = _wide(self._exact.keys.gather(head_N, position_HK[head_N, place_N] - self._coded_keys))
        coded_HK = position_HK < self._coded_values
        code_HKB, scale_HKB = self._values.gather(torch.where(coded_HK, position_HK, -1))
        value_HKE[coded_HK] = dequantise_values(code_HKB[coded_HK], scale_HKB[coded_HK], self.value_dim, self.dtype, self.kivi)
        head_N, place_N = (~coded_HK).nonzero(as_tuple=True)
        value_HKE[head_N, place_N] = _wide(self._exact.gather_values(head_N, position_HK[head_N, place_N]))
        return key_HKD, value_HKE

    # --- rollback, fork, bytes -----------------------------------------------------------------------------------------------------

    def can_rollback(self, tokens: int) -> Problem | None:
        """Any depth where all tokens are kept; a ring as far as what the next query would see is held."""
        problem = rollback_range_problem(tokens, self._tokens)
        if problem is not None or self.recent_tokens is None:
            return problem
        keep = self._tokens - tokens - self.sink_tokens
        oldest = max(0, keep + 1 - self.recent_tokens)  # what the next query sees behind the sinks
        if oldest >= keep or oldest >= self._oldest():
            return None
        return Problem(
            f"rollback({tokens})",
            f"a ring of {self.sink_tokens} sink + {self.recent_tokens} recent tokens holds {self._tokens} tokens and cannot take back "
            f"{tokens}: what they would see is overwritten.",
            f"Write `rollback: {tokens}` in the policy, which enlarges its rings by as many tokens, or fork the session "
            "before the tokens that may be taken back.",
        )

    def _oldest(self) -> int:
        """The first place behind the sinks that a ring still holds."""
        assert isinstance(self._groups, RingStore) and not isinstance(self._values, GrowableStore)
        return max(self._groups.oldest * self.kivi.group, self._dropped_values if self._values is None else self._values.oldest)

    def rollback(self, tokens: int) -> None:
        """Takes back the last `tokens` tokens (rule 3).  Raises SessionError, before anything changed, where can_rollback objects."""
        problem = self.can_rollback(tokens)
        if problem is not None:
            raise SessionError(problem)
        keep = max(0, self._tokens - tokens - self.sink_tokens)
        oldest = 0 if self.recent_tokens is None else min(keep, self._oldest())
        keys_end = min(self._coded_keys, keep - keep % self.residual_tokens)
        if keys_end < self._coded_keys:
            from_place = max(keys_end, oldest)
            if from_place < keep:
                self._exact.keys.write(from_place - keys_end, self._keys_between(from_place, keep))
            self._groups.rollback((self._coded_keys - keys_end) // self.kivi.group)
            self._coded_keys = keys_end
        values_end = min(self._coded_values, max(0, keep - self.residual_tokens))
        if values_end < self._coded_values:
            from_place, end = max(values_end, oldest), min(keep, self._coded_values)
            if from_place < end:
                self._exact.write_values(from_place, self._values_between(from_place, end))
            if self._values is not None:
                self._values.rollback(self._coded_values - values_end)
            self._coded_values = values_end
        if keep == 0:
            self._dropped_values = 0
        self._tokens -= tokens

    def fork(self) -> KiviStore:
        """Rule 4."""
        self.settle()
        child = KiviStore(
            self.kv_heads,
            self.head_dim,
            self.value_dim,
            self.dtype,
            self.kivi,
            self.capacity_tokens,
            self.layout,
            sink_tokens=self.sink_tokens,
            recent_tokens=self.recent_tokens,
            rollback_tokens=self.rollback_tokens,
        )
        child._groups = self._groups.fork()
        child._values = None if self._values is None else self._values.fork()
        child._tokens, child._coded_keys, child._coded_values = self._tokens, self._coded_keys, self._coded_values
        child._dropped_values = self._dropped_values
        sinks, places = min(self._tokens, self.sink_tokens), self._behind_sinks
        if sinks:
            child._sinks.keys.write(0, self._sinks.keys.read(0, sinks))
            child._sinks.write_values(0, self._sinks.read_values(0, sinks))
        child._exact.keys.write(0, self._exact.keys.read(0, places - self._coded_keys))
        child._exact.write_values(self._coded_values, self._exact.read_values(self._coded_values, places))
        return child

    def state(self) -> StoreState:
        """As SavedStore: quantised tokens as the stores of codes have them, exact ones a token a row."""
        self.settle()
        sinks, places = min(self._tokens, self.sink_tokens), self._behind_sinks
        tensors = {
            "sink_keys": self._sinks.keys.read(0, sinks),
            "sink_values": self._sinks.read_values(0, sinks),
            "exact_keys": self._exact.keys.read(0, places - self._coded_keys),
            "exact_values": self._exact.read_values(self._coded_values, places),
        }
        inner = {"groups": self._groups.state()} | ({} if self._values is None else {"values": self._values.state()})
        numbers = {"tokens": self._tokens, "dropped_values": self._dropped_values}
        return StoreState("kivi", numbers, {name: tensor.clone() for name, tensor in tensors.items()}, inner)

    def restore(self, state: StoreState) -> None:
        """As SavedStore; quantised tokens of a store of every token are read where the file has them, the rest is copied."""
        tokens = state.of_kind("kivi").whole("tokens")
        sinks, places = min(tokens, self.sink_tokens), max(0, tokens - self.sink_tokens)
        coded_keys, coded_values = places - places % self.residual_tokens, max(0, places - self.residual_tokens)  # as `settle` leaves them
        dropped = state.whole("dropped_values", 0, places if self._values is None else 0)
        heads, dims = self.kv_heads, (self.head_dim, self.value_dim)
        sink = [state.tensor(f"sink_{name}", self.dtype, heads, sinks, dim) for name, dim in zip(("keys", "values"), dims, strict=True)]
        key_HTD = state.tensor("exact_keys", self.dtype, heads, places - coded_keys, self.head_dim)
        value_HTE = state.tensor("exact_values", self.dtype, heads, places - coded_values, self.value_dim)
        self._groups.restore(state.inner["groups"])
        held = [self._groups.tokens * self.kivi.group]
        if self._values is not None:
            self._values.restore(state.inner["values"])
            held.append(self._values.tokens)
        if held != [coded_keys, coded_values][: len(held)]:
            raise ValueError(f"of {tokens} tokens {held} are quantised")
        if sinks:
            self._sinks.keys.write(0, sink[0])
            self._sinks.write_values(0, sink[1])
        self._exact.keys.write(0, key_HTD)
        self._exact.write_values(coded_values, value_HTE)
        self._tokens, self._coded_keys, self._coded_values, self._dropped_values = tokens, coded_keys, coded_values, dropped

    def nbytes(self) -> int:
        """Codes, scales and exact tokens."""
        sinks, places = min(self._tokens, self.sink_tokens), self._behind_sinks
        keys, values = sinks + places - self._coded_keys, sinks + places - self._coded_values
        exact = self.kv_heads * (keys * self.head_dim + values * self.value_dim) * self.dtype.itemsize
        return exact + self._groups.nbytes() + (0 if self._values is None else self._values.nbytes())

    def shared_nbytes(self) -> int:
        return self._groups.shared_nbytes() + (0 if self._values is None else self._values.shared_nbytes())

    # --- memory --------------------------------------------------------------------------------------------------------------------

    def _packed_keys(self) -> GrowableStore | RingStore:
        """Codes and scales of groups of keys: a group stands where other stores have a token."""
        codes = code_bytes(self.kivi.group * self.head_dim, self.kivi.bits)
        scales = key_group_bytes(self.kivi, self.head_dim, self.dtype.itemsize) - codes
        if self.recent_tokens is None:
            assert self.capacity_tokens is not None
            return GrowableStore(self.kv_heads, codes, scales, torch.uint8, -(-self.capacity_tokens // self.kivi.group))
        held = -(-(self.recent_tokens + self.rollback_tokens) // self.kivi.group)
        return RingStore(self.kv_heads, codes, scales, torch.uint8, 0, 1, held - 1)  # `can_rollback` knows what is missed

    def _packed_values(self) -> GrowableStore | RingStore | None:
        """Codes and scales of values; none in a ring that is no longer than its residual."""
        codes = code_bytes(self.value_dim, self.kivi.bits)
        scales = value_token_bytes(self.kivi, self.value_dim, self.dtype.itemsize) - codes
        if self.recent_tokens is None:
            assert self.capacity_tokens is not None
            return GrowableStore(self.kv_heads, codes, scales, torch.uint8, self.capacity_tokens)
        held = self.recent_tokens + self.rollback_tokens - self.residual_tokens
        return RingStore(self.kv_heads, codes, scales, torch.uint8, 0, 1, held - 1) if held else None

    def _residual(self) -> _Exact:
        return _Exact(self, self.residual_tokens + SPARE_TOKENS, self.residual_tokens + SPARE_TOKENS)


class _Exact:
    """Room for keys at slots from 0, and for values at slots that go round: the value of place p has slot p mod value_slots."""

    def __init__(self, store: KiviStore, keys: int, values: int) -> None:
        heads, dtype = store.kv_heads, store.dtype
        self.key_slots, self.value_slots = keys, values
        key_bytes = _aligned(key_capacity(store.layout, keys) * token_bytes(store.layout, store.head_dim, dtype))
        value_bytes = _aligned(values * token_bytes(store.layout, store.value_dim, dtype))
        nbytes = heads * (key_bytes + value_bytes)
        region = reserve(nbytes) if nbytes >= PAGE_BYTES else torch.empty(nbytes, dtype=torch.uint8)
        key, value = (part.view(dtype) for part in region.split_with_sizes([heads * key_bytes, heads * value_bytes]))
        self.addresses = (key.data_ptr(), value.data_ptr(), key_bytes, value_bytes)
        self.keys = key_slots(store.layout, key.view(heads, -1), store.head_dim, keys)
        self._values = value_slots(store.layout, value.view(heads, -1), store.value_dim, values)

    def write_values(self, place: int, value_HSE: Tensor) -> None:
        for start, count in self._runs(place, place + value_HSE.shape[1]):
            self._values.write(start % self.value_slots, value_HSE.narrow(1, start - place, count))

    def read_values(self, place: int, end: int) -> Tensor:
        """A view, or a copy where they go round."""
        parts = [self._values.read(start % self.value_slots, count) for start, count in self._runs(place, end)]
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0] if parts else self._values.read(0, 0)

    def gather_values(self, head_K: Tensor, place_K: Tensor) -> Tensor:
        return self._values.gather(head_K, place_K % self.value_slots)

    def _runs(self, first: int, end: int) -> list[tuple[int, int]]:
        runs = []
        while first < end:
            count = min(end - first, self.value_slots - first % self.value_slots)
            runs.append((first, count))
            first += count
        return runs


def _wide(number: Tensor) -> Tensor:
    return number if number.dtype == torch.float64 else number.float()


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 64) * 64
