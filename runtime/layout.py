"""How the keys of one token lie in a store: a row each, or in blocks of 16 tokens as the C++ kernels read them.

Letters: H KV heads, C slots, N blocks, S tokens, K slots that are asked for, D head_dim, E value_dim, L lanes of a block (16 tokens),
P numbers in 4 bytes.

    rows    [H, C, D]                     what torch multiplies
    blocks  [H, N, D / P, L, P]           one channel (two in bfloat16) of 16 tokens in one vector register: codegen/cpp/kernel.h
    int8    [H, N, D, L] bytes, then [L] scales, block after block; a byte is a code + 128 (runtime/quantise.py)

Values are rows: [H, C, E]; of int8 E bytes and a scale.
"""

from __future__ import annotations

from typing import Literal, Protocol, Self, TypeAlias

import torch
from torch import Tensor

from kvcompile.runtime.quantise import dequantise_int8, quantise_int8

KeyLayout: TypeAlias = Literal["rows", "blocks", "int8"]
BLOCK_TOKENS = 16
LANE_BYTES = 4


class Slots(Protocol):
    """The keys, or the values, of a buffer, by slot."""

    def read(self, slot: int, tokens: int) -> Tensor:
        """[H, tokens, D]; a view where the layout allows one.  Of int8 float32, or float64 if the scales are."""
        ...

    def gather(self, head_K: Tensor, slot_K: Tensor) -> Tensor:
        """[K, D], copies."""
        ...

    def write(self, slot: int, key_HSD: Tensor) -> None:
        """Converts to the store's dtype; any strides."""
        ...

    def copy(self, slot: int, other: Self, first: int, tokens: int) -> None:
        """Writes what another one of the same layout and dtype has at slots from `first` on, to the bit."""
        ...


class Rows:
    """Keys or values as rows.  memory_HB: the numbers of each head, [H, at least slots * D]."""

    def __init__(self, memory_HB: Tensor, head_dim: int, slots: int) -> None:
        self._key_HCD: Tensor = memory_HB[:, : slots * head_dim].unflatten(1, (slots, head_dim))

    def gather(self, head_K: Tensor, slot_K: Tensor) -> Tensor:
        return self._key_HCD[head_K, slot_K]

    def read(self, slot: int, tokens: int) -> Tensor:
        return self._key_HCD.narrow(1, slot, tokens)

    def write(self, slot: int, key_HSD: Tensor) -> None:
        self._key_HCD.narrow(1, slot, key_HSD.shape[1]).copy_(key_HSD)

    def copy(self, slot: int, other: Self, first: int, tokens: int) -> None:
        self.write(slot, other.read(first, tokens))


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

    def gather(self, head_K: Tensor, slot_K: Tensor) -> Tensor:
        return self._key_HNLDP[head_K, slot_K // BLOCK_TOKENS, slot_K % BLOCK_TOKENS].flatten(1)

    def write(self, slot: int, key_HSD: Tensor) -> None:
        slot_S = torch.arange(slot, slot + key_HSD.shape[1])
        shape = self._key_HNLDP.shape
        key_HSDP = key_HSD.to(self._key_HNLDP.dtype).unflatten(2, shape[3:])
        self._key_HNLDP[:, slot_S // BLOCK_TOKENS, slot_S % BLOCK_TOKENS] = key_HSDP

    def copy(self, slot: int, other: Self, first: int, tokens: int) -> None:
        _copy_lanes(self._key_HNLDP, slot, other._key_HNLDP, first, tokens)


class Int8Blocks:
    """Keys of 8 bits in blocks.  memory_HB: as many bytes as `token_bytes` says, seen as numbers of the scales' dtype."""

    def __init__(self, memory_HB: Tensor, head_dim: int, slots: int) -> None:
        self._dtype = memory_HB.dtype
        blocks, size = padded(slots) // BLOCK_TOKENS, BLOCK_TOKENS * token_bytes("int8", head_dim, memory_HB.dtype)
        byte_HNB = memory_HB.view(torch.uint8)[:, : blocks * size].unflatten(1, (blocks, size))
        codes = BLOCK_TOKENS * head_dim
        self._code_HNLD: Tensor = byte_HNB[:, :, :codes].unflatten(2, (head_dim, BLOCK_TOKENS)).transpose(2, 3)
        self._scale_HNL: Tensor = byte_HNB[:, :, codes:].view(memory_HB.dtype)

    def read(self, slot: int, tokens: int) -> Tensor:
        first, end = slot // BLOCK_TOKENS, padded(slot + tokens) // BLOCK_TOKENS
        key_HNLD = dequantise_int8(self._code_HNLD[:, first:end], self._scale_HNL[:, first:end])
        return key_HNLD.flatten(1, 2).narrow(1, slot - first * BLOCK_TOKENS, tokens)

    def gather(self, head_K: Tensor, slot_K: Tensor) -> Tensor:
        place = head_K, slot_K // BLOCK_TOKENS, slot_K % BLOCK_TOKENS
        return dequantise_int8(self._code_HNLD[place], self._scale_HNL[place])

    def write(self, slot: int, key_HSD: Tensor) -> None:
        slot_S = torch.arange(slot, slot + key_HSD.shape[1])
        code_HSD, scale_HS = quantise_int8(key_HSD, self._dtype)
        self._code_HNLD[:, slot_S // BLOCK_TOKENS, slot_S % BLOCK_TOKENS] = code_HSD
        self._scale_HNL[:, slot_S // BLOCK_TOKENS, slot_S % BLOCK_TOKENS] = scale_HS

    def copy(self, slot: int, other: Self, first: int, tokens: int) -> None:
        _copy_lanes(self._code_HNLD, slot, other._code_HNLD, first, tokens)
        _copy_lanes(self._scale_HNL, slot, other._scale_HNL, first, tokens)


class Int8Rows:
    """Values of 8 bits as rows.  memory_HB: as of `Int8Blocks`."""

    def __init__(self, memory_HB: Tensor, value_dim: int, slots: int) -> None:
        self._dtype, self._value_dim = memory_HB.dtype, value_dim
        size = token_bytes("int8", value_dim, memory_HB.dtype)
        self._byte_HCB: Tensor = memory_HB.view(torch.uint8)[:, : slots * size].unflatten(1, (slots, size))

    def read(self, slot: int, tokens: int) -> Tensor:
        return self._numbers(self._byte_HCB.narrow(1, slot, tokens))

    def gather(self, head_K: Tensor, slot_K: Tensor) -> Tensor:
        return self._numbers(self._byte_HCB[head_K, slot_K])

    def write(self, slot: int, value_HSE: Tensor) -> None:
        code_HSE, scale_HS = quantise_int8(value_HSE, self._dtype)
        byte_HSB = torch.cat([code_HSE, scale_HS[..., None].contiguous().view(torch.uint8)], -1)
        self._byte_HCB.narrow(1, slot, value_HSE.shape[1]).copy_(byte_HSB)

    def copy(self, slot: int, other: Self, first: int, tokens: int) -> None:
        self._byte_HCB.narrow(1, slot, tokens).copy_(other._byte_HCB.narrow(1, first, tokens))

    def _numbers(self, byte_XB: Tensor) -> Tensor:
        scale_X = byte_XB[..., self._value_dim :].clone(memory_format=torch.contiguous_format).view(self._dtype).squeeze(-1)
        return dequantise_int8(byte_XB[..., : self._value_dim], scale_X)


def _copy_lanes(to_HNL: Tensor, slot: int, from_HNL: Tensor, first: int, tokens: int) -> None:
    """Tokens of blocks, [H, N, L, ...]: whole blocks at once where they begin alike."""
    blocks = tokens // BLOCK_TOKENS if slot % BLOCK_TOKENS == first % BLOCK_TOKENS == 0 else 0
    block, at = slot // BLOCK_TOKENS, first // BLOCK_TOKENS
    to_HNL[:, block : block + blocks].copy_(from_HNL[:, at : at + blocks])
    left_S = torch.arange(blocks * BLOCK_TOKENS, tokens)
    to_S, from_S = left_S + slot, left_S + first
    to_HNL[:, to_S // BLOCK_TOKENS, to_S % BLOCK_TOKENS] = from_HNL[:, from_S // BLOCK_TOKENS, from_S % BLOCK_TOKENS]


_KEYS: dict[KeyLayout, type[Rows | KeyBlocks | Int8Blocks]] = {"rows": Rows, "blocks": KeyBlocks, "int8": Int8Blocks}


def key_slots(layout: KeyLayout, memory_HB: Tensor, head_dim: int, slots: int) -> Slots:
    """The keys in `memory_HB` [H, numbers of a head], laid out as asked."""
    return _KEYS[layout](memory_HB, head_dim, slots)


def value_slots(layout: KeyLayout, memory_HB: Tensor, value_dim: int, slots: int) -> Slots:
    """The values in `memory_HB` [H, numbers of a head]."""
    return (Int8Rows if layout == "int8" else Rows)(memory_HB, value_dim, slots)


def token_bytes(layout: KeyLayout, dim: int, dtype: torch.dtype) -> int:
    """Bytes of one token's key, or value, of `dim` numbers."""
    return dim + dtype.itemsize if layout == "int8" else dim * dtype.itemsize


def key_capacity(layout: KeyLayout, slots: int) -> int:
    """Tokens that the memory of `slots` slots must have room for."""
    return slots if layout == "rows" else padded(slots)


def padded(tokens: int) -> int:
    """The next multiple of a block."""
    return -(-tokens // BLOCK_TOKENS) * BLOCK_TOKENS
