"""A store whose tokens lie in a file: every token of the past, in memory only the last ones and a few blocks while they are attended to.

Letters: H KV heads, S new tokens, T tokens, D head_dim, E value_dim.

Rules:
1. DISK_BLOCK_TOKENS tokens are one block of the file: the keys of every KV head, then the values, as `layout` says.  The tokens behind
   the last full block are kept in memory.
2. A fork holds its parent's blocks, and copies what is in memory; it writes what follows to a file of its own.
3. Blocks are read in the order of the context, which is the order of the file: the system reads ahead by itself.  Asking it to
   (posix_fadvise) and a thread that reads the next blocks were measured, and were slower (docs/disk_tier.md).
4. What is read is held against its checksum.  Damage is told as the tokens that are lost; the store then stays as it is, and every
   further read of them fails the same way.
Source: FlexGen (Sheng et al. 2023, section 4), which keeps the cache on a disk and reads it block by block.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NoReturn

import torch
from torch import Tensor

from kvcompile.ir.errors import Problem, SessionError
from kvcompile.ir.store_bytes import DISK_BLOCK_TOKENS, STAGED_BLOCKS, disk_block_bytes
from kvcompile.runtime.address_space import reserve
from kvcompile.runtime.block_file import Block, BlockFile, Bytes, checksum, runs_of
from kvcompile.runtime.descriptor import DescribedPart, Descriptor
from kvcompile.runtime.layout import KeyLayout, key_slots, token_bytes, value_slots
from kvcompile.runtime.spans import Span
from kvcompile.runtime.store import StoreState, rollback_range_problem

STAGED_TOKENS = STAGED_BLOCKS * DISK_BLOCK_TOKENS


class LostTokens(SessionError):
    """Tokens of `store` cannot be read back."""

    def __init__(self, store: DiskStore, problem: Problem) -> None:
        super().__init__(problem)
        self.store = store


@dataclass(frozen=True)
class BlockForm:
    """How the keys and values of a block lie."""

    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    layout: KeyLayout

    @functools.cached_property
    def bytes(self) -> int:
        return disk_block_bytes(self.kv_heads, self.head_dim, self.value_dim, self.dtype.itemsize)

    @property
    def head_bytes(self) -> tuple[int, int]:
        """Bytes from one head's keys to the next one's, and of values."""
        key, value = (DISK_BLOCK_TOKENS * token_bytes(self.layout, dim, self.dtype) for dim in (self.head_dim, self.value_dim))
        return key, value


class BlockMemory:
    """A block in memory.  memory: uint8 [at least form.bytes], seen as it is."""

    def __init__(self, form: BlockForm, memory: Tensor) -> None:
        key_bytes, value_bytes = (form.kv_heads * each for each in form.head_bytes)
        keys, values = memory[:key_bytes], memory[key_bytes : key_bytes + value_bytes]
        self.keys = key_slots(form.layout, keys.view(form.dtype).view(form.kv_heads, -1), form.head_dim, DISK_BLOCK_TOKENS)
        self.values = value_slots(form.layout, values.view(form.dtype).view(form.kv_heads, -1), form.value_dim, DISK_BLOCK_TOKENS)
        self.bytes: Bytes = memory.numpy()
        self.address = memory.data_ptr()

    def write(self, slot: int, key_HSD: Tensor, value_HSE: Tensor) -> None:
        self.keys.write(slot, key_HSD)
        self.values.write(slot, value_HSE)

    def span(self, first: int, slot: int, tokens: int) -> Span:
        return Span(first, self.keys.read(slot, tokens), self.values.read(slot, tokens))


class Staging:
    """Room for STAGED_BLOCKS blocks, which stores of one form read into by turns."""

    def __init__(self, form: BlockForm) -> None:
        memory = reserve(STAGED_BLOCKS * form.bytes)
        self.blocks = [BlockMemory(form, part) for part in memory.split(form.bytes)]
        self.bytes: Bytes = memory.numpy()


class _Pool:
    """The stagings of a form: one, unless several threads read at once."""

    def __init__(self, form: BlockForm) -> None:
        self._form = form
        self._free: list[Staging] = []

    @contextlib.contextmanager
    def lent(self) -> Iterator[Staging]:
        try:
            staging = self._free.pop()
        except IndexError:
            staging = Staging(self._form)
        try:
            yield staging
        finally:
            if not self._free:
                self._free.append(staging)


class _SavedBlocks(Mapping[str, Tensor]):
    """The blocks of a store by their numbers, uint8 [form.bytes]; the last one's unused slots are zeros."""

    def __init__(self, store: DiskStore) -> None:
        self._store = store

    def __len__(self) -> int:
        return -(-self._store.tokens // DISK_BLOCK_TOKENS)

    def __iter__(self) -> Iterator[str]:
        return map(str, range(len(self)))

    def __getitem__(self, key: str) -> Tensor:
        store, first = self._store, int(key) * DISK_BLOCK_TOKENS
        memory = torch.zeros(store.form.bytes, dtype=torch.uint8)
        (span,) = store.spans_between(first, min(first + DISK_BLOCK_TOKENS, store.tokens))
        BlockMemory(store.form, memory).write(0, span.key_HTD, span.value_HTE)
        return memory


_pools: weakref.WeakValueDictionary[BlockForm, _Pool] = weakref.WeakValueDictionary()


class DiskStore:
    """Every token of the past, for the KV heads of one group, in a file.

    folder: where the file lies; None: runtime/block_file.py says.  name: of the heads, for messages.
    Raises CapacityError (from `reserve`, `append` or `extend`, before anything changed) when the disk has no room.
    """

    copies_spans = True

    def __init__(
        self,
        kv_heads: int,
        head_dim: int,
        value_dim: int,
        dtype: torch.dtype,
        folder: str | None = None,
        layout: KeyLayout = "rows",
        name: str = "",
    ) -> None:
        assert min(kv_heads, head_dim, value_dim) > 0 and layout != "int8"
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.value_dim = value_dim
        self.dtype = dtype
        self.folder = folder
        self.name = name
        self.form = BlockForm(kv_heads, head_dim, value_dim, dtype, layout)
        self._pool = _pools.setdefault(self.form, _Pool(self.form))
        self._blocks: list[Block] = []
        self._waiting = 0  # tokens behind the last full block
        self._last: BlockMemory | None = None  # where they lie
        self._file: BlockFile | None = None

    @property
    def tokens(self) -> int:
        return len(self._blocks) * DISK_BLOCK_TOKENS + self._waiting

    # --- writing ---------------------------------------------------------------------------------------------------------------------

    def reserve(self, tokens: int) -> None:
        """Room on the disk for so many more tokens.  Raises CapacityError; then nothing changed."""
        full = (self._waiting + tokens) // DISK_BLOCK_TOKENS
        if full:
            self._own_file().reserve(full)

    def extend(self, key_HSD: Tensor, value_HSE: Tensor) -> tuple[Span, ...]:
        self.append(key_HSD, value_HSE)
        return self.spans()

    def append(self, key_HSD: Tensor, value_HSE: Tensor) -> None:
        """Appends S tokens, any strides and dtype; every block that is full then goes to the file."""
        before, new = self.tokens, key_HSD.shape[1]
        assert key_HSD.shape == (self.kv_heads, new, self.head_dim), (key_HSD.shape, self.kv_heads, self.head_dim)
        assert value_HSE.shape == (self.kv_heads, new, self.value_dim), (value_HSE.shape, self.kv_heads, self.value_dim)
        at = 0
        try:
            while at < new:
                if self._last is None:
                    self._last = BlockMemory(self.form, reserve(self.form.bytes))
                count = min(new - at, DISK_BLOCK_TOKENS - self._waiting)
                self._last.write(self._waiting, key_HSD[:, at : at + count], value_HSE[:, at : at + count])
                self._waiting += count
                at += count
                if self._waiting == DISK_BLOCK_TOKENS:
                    self._write_block(self._last)
        except BaseException:
            self.rollback(self.tokens - before)
            raise

    def _write_block(self, block: BlockMemory) -> None:
        for file in {each.file for each in self._blocks if each.file is not self._file}:
            file.reclaim(keep_reserved=True)  # the stores that wrote it may be gone: nobody else looks after it
        self._blocks.append(self._own_file().write(block.bytes))
        self._waiting = 0

    def _own_file(self) -> BlockFile:
        if self._file is None:
            self._file = BlockFile(self.folder, self.form.bytes)
        return self._file

    def advance(self, tokens: int) -> None:
        raise AssertionError("no kernel writes to a store on disk")

    def descriptor(self) -> int:
        raise AssertionError("no kernel reads the whole of a store on disk")

    # --- reading ---------------------------------------------------------------------------------------------------------------------

    def visible(self, first_query: int) -> list[tuple[int, int]]:
        """Positions that queries from `first_query` on may see, as (first, end): all."""
        return [(0, self.tokens)]

    def spans(self) -> tuple[Span, ...]:
        """All tokens as one span, copied to memory; () when there is none."""
        return self.spans_between(0, self.tokens)

    def spans_between(self, first: int, end: int) -> tuple[Span, ...]:
        """The tokens at positions [first, end) as one span, copied to memory."""
        if first >= end:
            return ()
        key_HTD, value_HTE = (torch.empty(self.kv_heads, end - first, dim, dtype=self.dtype) for dim in (self.head_dim, self.value_dim))
        for spans in self.walk(first, end):
            for span in spans:
                here = slice(span.first - first, span.end - first)
                key_HTD[:, here], value_HTE[:, here] = span.key_HTD, span.value_HTE
        return (Span(first, key_HTD, value_HTE),)

    def walk(self, first: int, end: int) -> Iterator[tuple[Span, ...]]:
        """The tokens at positions [first, end), STAGED_TOKENS at most at a time, cut at their multiples: each piece as spans over memory
        that the next piece takes the place of."""
        for begin, stop, blocks in self._pieces(first, end):
            yield tuple(
                block.span(max(begin, start), max(begin - start, 0), min(stop, start + DISK_BLOCK_TOKENS) - max(begin, start))
                for start, block in blocks
            )

    def parts(self) -> Iterator[tuple[int, int, Descriptor]]:
        """All tokens as `walk` gives them, but as the kernels see them: (first, end, where they lie)."""
        (key_bytes, value_bytes), heads = self.form.head_bytes, self.kv_heads
        for begin, stop, blocks in self._pieces(0, self.tokens):
            described = [
                DescribedPart(
                    block.address,
                    block.address + heads * key_bytes,
                    key_bytes,
                    value_bytes,
                    start,
                    min(stop, start + DISK_BLOCK_TOKENS),
                )
                for start, block in blocks
            ]
            yield begin, stop, Descriptor.growing(described)

    def _pieces(self, first: int, end: int) -> Iterator[tuple[int, int, list[tuple[int, BlockMemory]]]]:
        """(first, end, blocks) of each piece of `walk`; a block with its first position."""
        with self._pool.lent() as staging:
            for at in range(first // STAGED_TOKENS * STAGED_TOKENS, end, STAGED_TOKENS):
                begin, stop = max(at, first), min(at + STAGED_TOKENS, end)
                yield begin, stop, self._staged(begin, stop, staging)

    def _staged(self, first: int, end: int, staging: Staging) -> list[tuple[int, BlockMemory]]:
        """The blocks that hold positions [first, end), in memory, each with its first position."""
        begin, stop = first // DISK_BLOCK_TOKENS, -(-end // DISK_BLOCK_TOKENS)
        blocks = self._blocks[begin:stop]
        self._read(begin, blocks, staging)
        found = [((begin + place) * DISK_BLOCK_TOKENS, block) for place, block in enumerate(staging.blocks[: len(blocks)])]
        if stop > len(self._blocks):
            assert self._last is not None
            found.append((len(self._blocks) * DISK_BLOCK_TOKENS, self._last))
        return found

    def _read(self, begin: int, blocks: list[Block], staging: Staging) -> None:
        """Blocks from number `begin` on, whole and unharmed.  Raises LostTokens."""
        place = 0
        for file, slot, count in runs_of(blocks):
            fault = file.read(slot, staging.bytes[place * self.form.bytes : (place + count) * self.form.bytes])
            if fault is not None:
                self._lose(begin + place, begin + place + count, fault)
            place += count
        for place, block in enumerate(blocks):
            if checksum(staging.blocks[place].bytes) != block.checksum:
                self._lose(begin + place, begin + place + 1, "their checksum is not what was written")

    def _lose(self, begin: int, end: int, fault: str) -> NoReturn:
        first, last = begin * DISK_BLOCK_TOKENS, end * DISK_BLOCK_TOKENS - 1
        heads = f" of {self.name}" if self.name else ""
        what = f"the keys and values{heads} at positions {first} to {last} of {self.tokens} cannot be read back from the disk: {fault}."
        mend = f"These tokens are lost to this session, and to its forks of more than {first} tokens; read the text again in a new one."
        raise LostTokens(self, Problem("session", what, mend))

    # --- taking back, sharing, counting ----------------------------------------------------------------------------------------------

    def can_rollback(self, tokens: int) -> Problem | None:
        """Any depth is possible, where the block that is cut can still be read."""
        problem = rollback_range_problem(tokens, self.tokens)
        if problem is None and (cut := self._cut(tokens)) is not None:
            try:
                with self._pool.lent() as staging:
                    self._read(cut, self._blocks[cut : cut + 1], staging)
            except LostTokens as lost:
                return lost.problems[0]
        return problem

    def rollback(self, tokens: int) -> None:
        """Takes back the last `tokens` tokens, and gives back what of the file lies behind the rest."""
        problem = rollback_range_problem(tokens, self.tokens)
        if problem is not None:
            raise SessionError(problem)
        keep, cut = self.tokens - tokens, self._cut(tokens)
        if cut is not None:
            assert self._last is not None
            with self._pool.lent() as staging:
                self._read(cut, self._blocks[cut : cut + 1], staging)
                self._last.bytes[:] = staging.blocks[0].bytes
        del self._blocks[keep // DISK_BLOCK_TOKENS :]
        self._waiting = keep - len(self._blocks) * DISK_BLOCK_TOKENS
        if keep == 0:
            self._last = None
        for file in {*([self._file] if self._file else []), *(block.file for block in self._blocks)}:
            file.reclaim(keep_reserved=file is not self._file)

    def _cut(self, tokens: int) -> int | None:
        """The number of the block of the file that a rollback keeps a part of."""
        keep = self.tokens - tokens
        return keep // DISK_BLOCK_TOKENS if keep < self.tokens - self._waiting and keep % DISK_BLOCK_TOKENS else None

    def fork(self) -> DiskStore:
        """A store with the same tokens, which reads its parent's blocks and copies what is in memory."""
        child = DiskStore(self.kv_heads, self.head_dim, self.value_dim, self.dtype, self.folder, self.form.layout, self.name)
        child._blocks, child._waiting = list(self._blocks), self._waiting
        if self._last is not None:
            child._last = BlockMemory(self.form, reserve(self.form.bytes))
            child._last.bytes[:] = self._last.bytes
        return child

    def state(self) -> StoreState:
        """As SavedStore: each block as it lies, read back when it is asked for, so that no more than one is in memory at a time."""
        return StoreState("disk", {"tokens": self.tokens, "layout": self.form.layout}, _SavedBlocks(self))

    def restore(self, state: StoreState) -> None:
        """As SavedStore: the blocks are copied to a file of this store's own."""
        tokens, layout = state.of_kind("disk").whole("tokens"), state.numbers["layout"]
        if layout not in ("rows", "blocks"):
            raise ValueError(f"blocks of keys in the layout {layout!r}")
        form = replace(self.form, layout=layout)
        for number, first in enumerate(range(0, tokens, DISK_BLOCK_TOKENS)):
            block = BlockMemory(form, state.tensor(str(number), torch.uint8, form.bytes))
            span = block.span(first, 0, min(DISK_BLOCK_TOKENS, tokens - first))
            self.append(span.key_HTD, span.value_HTE)

    def nbytes(self) -> int:
        """Bytes of memory: one block, from the first token on."""
        return 0 if self._last is None else self.form.bytes

    def shared_nbytes(self) -> int:
        """Nothing that is in memory is shared."""
        return 0

    def disk_nbytes(self) -> int:
        """Bytes of its blocks on the disk; those that it shares with the store it was forked from, or its forks, count for each."""
        return len(self._blocks) * self.form.bytes
