"""Attention in which every KV head sees what its policy lets it see, over keys that somebody else keeps: a cache that is not ours.

    kvc::visible_places(mask) -> places
    kvc::attend_banded(query, key, value, mask, places, scale, sink_tokens, recent_tokens) -> out

query [B, query_heads, S, D]; key [B, kv_heads, T, D]; value [B, kv_heads, T, E]; out [B, query_heads, S, E]
mask           None, or what `scaled_dot_product_attention` takes: bool (True: visible) or a number that joins the logit, [B or 1,
               query_heads or 1, S, T]
places         None, or of a mask, int64 [B, S + 2]: the last key that each query sees (its own; -1 where it sees none), the
               first key that any query of the row sees, and whether a single query's keys have holes or numbers between the two
sink_tokens, recent_tokens   a number a KV head; recent_tokens 0: the head sees all that the mask lets it see

Keys lie in the order of their positions.  Without a mask one query sees all keys, and of several the query at s sees the keys up
to s (torch's is_causal).  Of these a streaming head sees j < sink_tokens and j > p - recent_tokens, where p is the query's own key
and j counts from the first visible key: what stands before it is padding.  A query that sees no key gets 0.  So a mask may hide
padding, later keys and keys between the two, but no window: what it hid at the front would move the sinks, which the caller rules out.

Rules:
1. A streaming head's work does not grow with T: one query reads the sinks and the window, a tile of queries the sinks and the union
   of their windows.
2. KV heads are read as they lie, for all their queries at once, never repeated; heads that stand together are one call.
Source: StreamingLLM (Xiao et al. 2023, section 3.2); DuoAttention (2024, section 3.3).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TILE_TOKENS = 256

_library = torch.library.Library("kvc", "FRAGMENT")
_library.define("visible_places(Tensor mask) -> Tensor")
_library.define(
    "attend_banded(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? places, float scale, "
    "int[] sink_tokens, int[] recent_tokens) -> Tensor"
)


def _visible(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _visible_places(mask: Tensor) -> Tensor:
    batch, _, queries, keys = mask.shape
    places = torch.full((batch, queries + 2), -1, dtype=torch.int64, device=mask.device)
    first_B = torch.full((batch,), keys, dtype=torch.int64, device=mask.device)
    for start in range(0, queries, TILE_TOKENS):
        rows = slice(start, min(start + TILE_TOKENS, queries))
        seen_BST = _visible(mask[:, :, rows]).any(1)
        some_BS = seen_BST.any(2)
        numbers_BST = seen_BST.to(torch.uint8)
        last_BS = keys - 1 - numbers_BST.flip(2).argmax(2) if keys else some_BS.long()
        places[:, rows] = torch.where(some_BS, last_BS, -1)
        first_BS = torch.where(some_BS, numbers_BST.argmax(2), keys) if keys else some_BS.long()
        first_B = torch.minimum(first_B, first_BS.amin(1))
    places[:, queries] = first_B
    places[:, queries + 1] = 1
    if queries == 1 and mask.shape[1] == 1:
        count_B = _visible(mask).sum((1, 2, 3))
        plain_B = count_B == places[:, 0] - first_B + 1
        if mask.dtype != torch.bool:
            plain_B &= torch.where(_visible(mask), mask, 0).eq(0).all(3).all(2).all(1)
        places[:, 2] = (~plain_B).long()
    return places


def _visible_places_fake(mask: Tensor) -> Tensor:
    return mask.new_empty(mask.shape[0], mask.shape[2] + 2, dtype=torch.int64)


def _runs(sink_tokens: Sequence[int], recent_tokens: Sequence[int]) -> Iterator[tuple[slice, int, int]]:
    """KV heads that stand together and share a policy."""
    policies = list(zip(sink_tokens, recent_tokens, strict=True))
    start = 0
    for head in range(1, len(policies) + 1):
        if head == len(policies) or policies[head] != policies[start]:
            yield slice(start, head), *policies[start]
            start = head


def _attend_banded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    places: Tensor | None,
    scale: float,
    sink_tokens: Sequence[int],
    recent_tokens: Sequence[int],
) -> Tensor:
    out = _attend_banded_fake(query, key, value, mask, places, scale, sink_tokens, recent_tokens)
    queries, keys, kv_heads = query.shape[2], key.shape[2], key.shape[1]
    assert mask is not None or queries == 1 or queries <= keys, (query.shape, key.shape)
    if mask is None and queries > 1:
        key, value = key[:, :, :queries], value[:, :, :queries]  # what lies behind them is written later
    for row in range(query.shape[0]):
        query_KGSD = query[row].unflatten(0, (kv_heads, -1))
        out_KGSE = out[row].unflatten(0, (kv_heads, -1))
        for heads, sinks, recent in _runs(sink_tokens, recent_tokens):
            part = query_KGSD[heads], key[row, heads], value[row, heads], out_KGSE[heads]
            if mask is None and queries == 1:
                _one_query(*part, None, scale, 0, keys, sinks, recent)
            elif mask is None and not recent:
                out_KGSE[heads] = F.scaled_dot_product_attention(
                    query[row, _queries_of(query_KGSD, heads)], *part[1:3], is_causal=True, scale=scale, enable_gqa=True
                ).unflatten(0, part[0].shape[:2])
            elif mask is None:
                _tiles(*part, None, None, scale, 0, sinks, recent)
            else:
                assert places is not None
                at = row if places.shape[0] > 1 else 0
                mask_HST = mask[row if mask.shape[0] > 1 else 0]
                mask_HST = mask_HST if mask.shape[1] == 1 else mask_HST[_queries_of(query_KGSD, heads)]
                first, holes = places[at, queries:].tolist()
                if queries == 1:
                    _one_query(*part, mask_HST if holes else None, scale, first, int(places[at, 0]) + 1, sinks, recent)
                else:
                    _tiles(*part, mask_HST, places[at, :queries], scale, first, sinks, recent)
    return out


def _queries_of(query_KGSD: Tensor, heads: slice) -> slice:
    group = query_KGSD.shape[1]
    return slice(heads.start * group, heads.stop * group)


def _one_query(
    query_KGSD: Tensor,
    key_KTD: Tensor,
    value_KTE: Tensor,
    out_KGSE: Tensor,
    mask_HST: Tensor | None,
    scale: float,
    first: int,
    end: int,
    sinks: int,
    recent: int,
) -> None:
    """One query that sees keys [first, end), with holes where a mask says so; the queries of a KV head are the rows of one call."""
    if end <= first:
        out_KGSE.zero_()
        return
    ranges = [(first, end)] if not recent or end - first <= sinks + recent else [(first, first + sinks), (end - recent, end)]
    key_KTD, value_KTE = _cut(key_KTD, ranges, 1), _cut(value_KTE, ranges, 1)
    if mask_HST is not None:
        heads = key_KTD.shape[0] if mask_HST.shape[0] > 1 else 1
        mask_HST = _cut(mask_HST, ranges, 2).reshape(heads, -1, key_KTD.shape[1])
    out = F.scaled_dot_product_attention(
        query_KGSD.squeeze(2)[None], key_KTD[None], value_KTE[None], None if mask_HST is None else mask_HST[None], scale=scale
    )
    out_KGSE.copy_(out[0].unsqueeze(2))


def _cut(tensor: Tensor, ranges: list[tuple[int, int]], dim: int) -> Tensor:
    views = [tensor.narrow(dim, start, end - start) for start, end in ranges if end > start]
    return views[0] if len(views) == 1 else torch.cat(views, dim)


def _tiles(
    query_KGSD: Tensor,
    key_KTD: Tensor,
    value_KTE: Tensor,
    out_KGSE: Tensor,
    mask_HST: Tensor | None,
    own_S: Tensor | None,
    scale: float,
    first: int,
    sinks: int,
    recent: int,
) -> None:
    """Several queries; own_S: the key of each of them, None: their numbers."""
    _, group, queries, _ = query_KGSD.shape
    own_S = torch.arange(queries, device=query_KGSD.device) if own_S is None else own_S
    for start in range(0, queries, TILE_TOKENS):
        rows = slice(start, min(start + TILE_TOKENS, queries))
        tile_S = own_S[rows]
        seeing = tile_S[tile_S >= first]
        if len(seeing) == 0:
            out_KGSE[:, :, rows] = 0
            continue
        oldest, end = int(seeing.min()) + 1 - recent if recent else first, int(seeing.max()) + 1
        ranges = [(first, end)] if oldest <= first + sinks else [(first, first + sinks), (oldest, end)]
        key_T = torch.cat([torch.arange(lo, hi, device=own_S.device) for lo, hi in ranges])
        shown_ST = key_T <= tile_S[:, None]
        if recent:
            shown_ST &= (key_T < first + sinks) | (key_T > tile_S[:, None] - recent)
        shown_HRT = _tile_mask(shown_ST, None if mask_HST is None else _cut(mask_HST[:, rows], ranges, 2), group)
        out = F.scaled_dot_product_attention(
            query_KGSD[:, :, rows].flatten(1, 2)[None],
            _cut(key_KTD, ranges, 1)[None],
            _cut(value_KTE, ranges, 1)[None],
            shown_HRT[None],
            scale=scale,
        )
        out_KGSE[:, :, rows] = out[0].unflatten(1, (group, -1))


def _tile_mask(shown_ST: Tensor, mask_HST: Tensor | None, group: int) -> Tensor:
    """[KV heads or 1, queries of one x S, T]: what the policy shows and the mask lets through."""
    if mask_HST is None:
        return shown_ST.repeat(group, 1)[None]
    both = mask_HST & shown_ST if mask_HST.dtype == torch.bool else mask_HST.masked_fill(~shown_ST, -torch.inf)
    return both.repeat(1, group, 1) if both.shape[0] == 1 else both.unflatten(0, (-1, group)).flatten(1, 2)


def _attend_banded_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    places: Tensor | None,
    scale: float,
    sink_tokens: Sequence[int],
    recent_tokens: Sequence[int],
) -> Tensor:
    batch, query_heads, queries, _ = query.shape
    # as torch's own kernel on the CPU lays it out: what models do next, transpose(1, 2).contiguous(), copies nothing
    return query.new_empty(batch, queries, query_heads, value.shape[3]).transpose(1, 2)


_library.impl("visible_places", _visible_places, "CompositeExplicitAutograd")
_library.impl("attend_banded", _attend_banded, "CompositeExplicitAutograd")
torch.library.register_fake("kvc::visible_places", _visible_places_fake, lib=_library)
torch.library.register_fake("kvc::attend_banded", _attend_banded_fake, lib=_library)

VISIBLE_PLACES = torch.ops.kvc.visible_places.default
ATTEND_BANDED = torch.ops.kvc.attend_banded.default
