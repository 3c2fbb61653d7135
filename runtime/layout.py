"""How the keys of one token lie in a store: a row each, or in blocks of 16 tokens as the C++ kernels read them.

Letters: H KV heads, C slots, N blocks, S tokens, D head_dim, L lanes of a block (16 tokens), P numbers in 4 bytes.

    rows    [H, C, D]            what torch multiplies
    blocks  [H, N, D / P, L, P]  one channel (two in bfloat16) of 16 tokens in one vector register: codegen/cpp/kernel.h

Values are rows in both.
"""

from __future__ import annotations

from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor

KeyLayout: TypeAlias = Literal["rows", "blocks"]
BLOCK_TOKENS = 16
LANE_BYTES = 4


class KeySlots(Protocol):
    """The keys of a buffer, by slot."""

    def read(self, slot: int, tokens: int) -> Tensor:
        """[H, tokens, D]; a view where the layout allows one."""
        ...

    def write(self, slot: int, key_HSD: Tensor) -> None:
        """Converts to the store's dtype; any strides."""
        ...


class KeyRows:
    """Keys as rows.  memory_HB: the numbers of each head, [H, at least slots * D]."""

    def __init__(self, memory_HB: Tensor, head_dim: int, slots: int) -> None:
        self._key_HCD: Tensor = memory_HB[:, : slots * head_dim].unflatten(1, (slots, head_dim))

    def read(self, slot: int, tokens: int) -> Tensor:
        return self._key_HCD.narrow(1, slot, tokens)

    def write(self, slot: int, key_HSD: Tensor) -> None:
        self._key_HCD.narrow(1, slot, key_HSD.shape[1]).copy_(key_HSD)


class KeyBlocks:
    """Keys in blocks.  memory_HB: the numbers of each head, [H, at least `padded(slots)` * D]."""

    def __init__(self, memory_HB: Tensor, head_dim: int, slots: int) -> None:
        numbers = LANE_BYTES // memory_HB.dtype.itemsize
        assert numbers > 0 and head_dim % numbers == 0, (memory_HB.dtype, head_dim)
        blocks = padded(slots) // BLOCK_TOKENS
        shape = (blocks, head_dim // numbers, BLOCK_TOKENS, numbers)
        memory_HNDLP: Tensor = memory_HB[:, : blocks * BLOCK_TOKENS * head_dim].unflatten(1, shape)
        self._key_HNLDP: Tensor = memory_HNDLP.transpose(2, 3)
        self._head_dim = head_dim

    def read(self, slot: int, tokens: int) -> Tensor:
        first, end = slot // BLOCK_TOKENS, padded(slot + tokens) // BLOCK_TOKENS
        key_HTD: Tensor = self._key_HNLDP[:, first:end].reshape(self._key_HNLDP.shape[0], (end - first) * BLOCK_TOKENS, self._head_dim)
        return key_HTD.narrow(1, slot - first * BLOCK_TOKENS, tokens)

    def write(self, slot: int, key_HSD: Tensor) -> None:
        slot_S = torch.arange(slot, slot + key_HSD.shape[1])
        shape = self._key_HNLDP.shape
        key_HSDP = key_HSD.to(self._key_HNLDP.dtype).unflatten(2, shape[3:])
        self._key_HNLDP[:, slot_S // BLOCK_TOKENS, slot_S % BLOCK_TOKENS] = key_HSDP


def key_slots(layout: KeyLayout, memory_HB: Tensor, head_dim: int, slots: int) -> KeySlots:
    """The keys in `memory_HB` [H, numbers of a head], laid out as asked."""
    return (KeyRows if layout == "rows" else KeyBlocks)(memory_HB, head_dim, slots)


def key_capacity(layout: KeyLayout, slots: int) -> int:
    """Tokens that the memory of `slots` slots must have room for."""
    return slots if layout == "rows" else padded(slots)


def padded(tokens: int) -> int:
    """The next multiple of a block."""
    return -(-tokens // BLOCK_TOKENS) * BLOCK_TOKENS
