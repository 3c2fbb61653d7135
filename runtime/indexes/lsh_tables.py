"""Hash tables over keys: the library of runtime/native_lsh.py fills them and looks into them where it is loaded, else torch, with equal
results.

Letters: H KV heads, N vectors or queries, T keys, L tables, X borders, B blocks of 16 hyperplanes, D head_dim, M places in a bucket.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from kvcompile.ir.lsh_facts import LEAST_COLLISIONS, PART_TOKENS, padded_planes
from kvcompile.runtime.native_lsh import Met, Part, Planes, lsh_library

_read: weakref.WeakSet[Tensor] = weakref.WeakSet()  # normals that no process of this seed made
_kept: weakref.WeakValueDictionary[tuple[int, int, int, int], Tensor] = weakref.WeakValueDictionary()


def hyperplanes(bits: int, tables: int, seed: int, head_dim: int) -> Planes:
    """With normals from a normal distribution.  The same ones serve all indexes of a process that ask for them alike."""
    key = (bits, tables, seed, head_dim)
    normal_BD16 = _kept.get(key)
    if normal_BD16 is None:
        blocks = padded_planes(bits, tables) // 16
        normal_ND = torch.randn(16 * blocks, head_dim, generator=torch.Generator().manual_seed(seed))
        _kept[key] = normal_BD16 = normal_ND.unflatten(0, (blocks, 16)).transpose(1, 2).contiguous()
    return planes_of(normal_BD16, bits, tables)


def interned(normal_BD16: Tensor) -> Tensor:
    """Normals that were read, or the same ones that the process has already."""
    for kept_BD16 in (*_kept.values(), *_read):
        if torch.equal(kept_BD16, normal_BD16):
            return kept_BD16
    _read.add(normal_BD16)
    return normal_BD16


def planes_of(normal_BD16: Tensor, bits: int, tables: int) -> Planes:
    return Planes(normal_BD16, bits, tables, float(normal_BD16.double().norm(dim=1).max()))


def hashed(planes: Planes, vector_HND: Tensor) -> Tensor:
    """The bucket of each vector (float32) in each table, int16 [H, L, N]; not a number lies on no side."""
    library = lsh_library()
    if library is not None:
        return library.hash(planes, vector_HND)
    normal_DP = planes.normal_BD16.transpose(0, 1).flatten(1)[:, : planes.bits * planes.tables].double()
    # in double no rounding chooses a side, but of products that are 0
    side_HNLK = (vector_HND.double() @ normal_DP >= 0).unflatten(2, (planes.tables, planes.bits))
    code_HNL: Tensor = (side_HNLK.int() << torch.arange(planes.bits, dtype=torch.int32)).sum(3)
    return code_HNL.to(torch.int16).transpose(1, 2).contiguous()


def parts_of(planes: Planes, key_HTD: Tensor, first: int) -> tuple[Part, ...]:
    """The tables over keys (centred, float32) at positions from `first` on."""
    chunks = key_HTD.split(PART_TOKENS, 1) if key_HTD.shape[1] else ()
    return tuple(filled(first + number * PART_TOKENS, hashed(planes, chunk_HTD), planes.bits) for number, chunk_HTD in enumerate(chunks))


def filled(first: int, code_HLT: Tensor, bits: int) -> Part:
    """The tables over keys in these buckets, PART_TOKENS at most."""
    library = lsh_library()
    if library is not None:
        return Part(first, *library.sort(code_HLT, bits))
    tokens = code_HLT.shape[2]
    sorted_HLT, order_HLT = _unsigned(code_HLT).sort(dim=2, stable=True)
    border_HLX = sorted_HLT
    if tokens >= 1 << bits:
        every_HLX = torch.arange(1 << bits, dtype=torch.int32).expand(*code_HLT.shape[:2], -1).contiguous()
        border_HLX = torch.searchsorted(sorted_HLT, every_HLX)
    return Part(first, order_HLT.to(torch.int16), border_HLX.to(torch.int16))


def buckets_of(part: Part, bits: int) -> Tensor:
    """The bucket of each key, int16 [H, L, T]: what `filled` was given."""
    sorted_HLT = part.border_HLX
    if part.tokens >= 1 << bits:
        begin_HLX = _unsigned(part.border_HLX)
        place_HLT = torch.arange(part.tokens, dtype=torch.int32).expand_as(part.order_HLT).contiguous()
        sorted_HLT = (torch.searchsorted(begin_HLX, place_HLT, right=True) - 1).to(torch.int16)
    return torch.empty_like(part.order_HLT).scatter_(2, _unsigned(part.order_HLT).long(), sorted_HLT)


def joined(first: Part, second: Part, bits: int) -> Part:
    """One part of two that lie one behind the other."""
    return filled(first.first, torch.cat([buckets_of(first, bits), buckets_of(second, bits)], 2), bits)


def cut(part: Part, tokens: int, bits: int) -> Part:
    """The part's first keys."""
    return filled(part.first, buckets_of(part, bits)[..., :tokens], bits)


def met(parts: tuple[Part, ...], code_HLN: Tensor, bits: int) -> Met:
    """What queries in these buckets meet in two tables or more."""
    library = lsh_library()
    if library is not None:
        return library.search(parts, code_HLN, bits)
    heads, _, queries = code_HLN.shape
    places_HN = torch.zeros(heads, queries, dtype=torch.int64)
    position_HNK = torch.empty(heads, queries, 0, dtype=torch.int64)
    none = torch.iinfo(torch.int64).max
    for part in parts:
        begin_HLN, end_HLN = _ranges(part, _unsigned(code_HLN), bits)
        places_HN += (end_HLN - begin_HLN).sum(1)
        longest = int((end_HLN - begin_HLN).max())
        place_HLNM = begin_HLN[..., None] + torch.arange(longest)
        beyond_HLNM = place_HLNM >= end_HLN[..., None]
        order_HLT = _unsigned(part.order_HLT).long()
        key_HLX = order_HLT.gather(2, place_HLNM.masked_fill(beyond_HLNM, 0).flatten(2))
        key_HNX = key_HLX.view_as(place_HLNM).masked_fill(beyond_HLNM, part.tokens).transpose(1, 2).flatten(2)
        times_HNT = torch.zeros(heads, queries, part.tokens + 1, dtype=torch.int32)
        times_HNT.scatter_add_(2, key_HNX, torch.ones_like(key_HNX, dtype=torch.int32))
        drawn_HNT = times_HNT[..., : part.tokens] >= LEAST_COLLISIONS
        part_HNT = torch.where(drawn_HNT, torch.arange(part.first, part.end), none)
        most = int(drawn_HNT.sum(2).max())
        position_HNK = torch.cat([position_HNK, part_HNT.sort(2).values[..., :most]], 2)
    position_HNK = position_HNK.sort(2).values
    most = int((position_HNK < none).sum(2).max()) if position_HNK.numel() else 0
    position_HNK = position_HNK[..., :most]
    return Met(torch.where(position_HNK < none, position_HNK, -1), places_HN)


def _ranges(part: Part, code_HLN: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Where the buckets' places begin and end, int64."""
    border_HLX = _unsigned(part.border_HLX)
    if part.tokens >= 1 << bits:
        border_HLX = torch.nn.functional.pad(border_HLX, (0, 1), value=part.tokens).long()
        return border_HLX.gather(2, code_HLN.long()), border_HLX.gather(2, code_HLN.long() + 1)
    code_HLN = code_HLN.contiguous()
    return torch.searchsorted(border_HLX, code_HLN), torch.searchsorted(border_HLX, code_HLN, right=True)


def _unsigned(numbers: Tensor) -> Tensor:
    """16 bits without a sign, that stand in int16, as int32."""
    return numbers.int() & 0xFFFF
