"""The torch kernel "attend over spans": the reference implementation of KernelRequest(kind="attend_spans").

Letters: H KV heads, G queries per KV head, S new tokens, T keys, B keys of a block, D head_dim, E value_dim,
R = G x S rows of one KV head.

Rules, all of them about the bits of a result:
1. The visible keys of a tile of queries are put in position order and cut into blocks of BLOCK_TOKENS counted from the
   first; a block that several spans share is gathered into one tensor.  So a result depends on positions, never on how
   the spans were cut (fork, ring, capacity).  For a head that sees everything the borders are positions 0, 1024, ...
2. Matrix products and elementwise functions handle one KV head at a time, so that their shapes never depend on how many
   heads share a group.  Several heads at once only go through copies, maxima, differences and softmax, which works row
   by row.
3. Tiles of queries end at multiples of TILE_TOKENS, so temporary memory is bounded, and a banded tile reads only the
   sinks and (first - recent_tokens, last].
4. A tile of queries lies in one attention chunk (chunk_tokens), and its blocks are counted from the chunk's first
   position: the borders are positions, wherever a prompt was cut.
5. With a query of its own for the sinks, a block ends at the last sink, so that each block is multiplied with one query.
6. Operands start at multiples of 64 bytes, as BLAS needs for equal bits (oneMKL guide, "Conditional Numerical
   Reproducibility"); a view that does not is copied.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kvcompile.runtime.merge import AttentionState, merge_states
from kvcompile.runtime.spans import Span

BLOCK_TOKENS = 1024
TILE_TOKENS = 256
PANEL_BLOCKS = 16  # blocks of keys under one softmax, at most
PANEL_LOGITS = 1 << 20  # logits held at once (4 MiB), where that is more than one block of one head
ALIGNMENT_BYTES = 64


def attend_spans(
    query_HGSD: Tensor,
    spans: Sequence[Span],
    first_query: int,
    *,
    sink_tokens: int,
    recent_tokens: int | None,
    scale: float,
    soft_cap: float | None = None,
    chunk_tokens: int | None = None,
    slopes_HG: Tensor | None = None,
    sink_query_HGSD: Tensor | None = None,
) -> AttentionState:
    """Attention of new tokens at positions first_query, first_query + 1, ... over the keys of `spans`.

    query_HGSD: [H, G, S, D].  spans: in position order, not overlapping; a position in no span is not attended to (so a
    shared prefix and a session's own tokens are two calls and a merge).
    The query at p sees the key at j when j <= p and (recent_tokens is None or j < sink_tokens or j > p - recent_tokens)
    and (chunk_tokens is None or j >= p // chunk_tokens * chunk_tokens).
    scale: factor on q.k.  soft_cap: logits become soft_cap * tanh(logits / soft_cap).
    slopes_HG: [H, G]; slope * (j - p) joins the capped logit (ALiBi: Press et al. 2022, section 3).
    sink_query_HGSD: like query_HGSD; what keys at positions below sink_tokens are multiplied with in place of it (StreamingLLM,
    section 3.2: positions within the cache).
    Returns out [H, G, S, E] and lse [H, G, S] (natural logarithm), in float32, or float64 if the query or the keys are;
    (0, -inf) for a query that sees no key, no span or no token included.
    Source: FlashAttention-2 (Dao 2023), section 3.1: blocks merged by log-sum-exp.
    """
    kv_heads, queries_per_kv, new, _ = query_HGSD.shape
    assert spans, "attending over no span at all: the value's size is unknown"
    double = torch.float64 in (query_HGSD.dtype, spans[0].key_HTD.dtype)
    dtype = torch.float64 if double else torch.float32
    logit_scale = scale if soft_cap is None else scale / soft_cap
    query_HGSD = query_HGSD.to(dtype) * logit_scale
    if sink_query_HGSD is not None:
        sink_query_HGSD = sink_query_HGSD.to(dtype) * logit_scale
    out_HGSE = query_HGSD.new_empty(kv_heads, queries_per_kv, new, spans[0].value_HTE.shape[2])
    lse_HGS = query_HGSD.new_empty(kv_heads, queries_per_kv, new)
    own_sinks = sink_query_HGSD is not None
    for tile in plan_tiles(spans, first_query, new, sink_tokens, recent_tokens, chunk_tokens, own_sinks):
        hidden = [tile.hidden(block, query_HGSD.device) if block.masked else None for block in tile.blocks]
        queries, rows = slice(tile.first - first_query, tile.end - first_query), queries_per_kv * (tile.end - tile.first)
        for heads in _heads_at_once(kv_heads, rows, tile):
            asked = _Queries(
                _operand(query_HGSD[heads, :, queries].flatten(1, 2), dtype),
                None if sink_query_HGSD is None else _operand(sink_query_HGSD[heads, :, queries].flatten(1, 2), dtype),
                None if slopes_HG is None else slopes_HG[heads].to(dtype),
            )
            keys, values = [span.key_HTD[heads] for span in spans], [span.value_HTE[heads] for span in spans]
            state = _attend_tile(asked, tile, hidden, keys, values, soft_cap)
            out_HGSE[heads, :, queries] = state.out.unflatten(1, (queries_per_kv, -1))
            lse_HGS[heads, :, queries] = state.lse.unflatten(1, (queries_per_kv, -1))
    return AttentionState(out_HGSE, lse_HGS)


class Piece(NamedTuple):
    """`tokens` tokens of span number `span`, from its token `start`; `first` is the first one's position."""

    span: int
    start: int
    tokens: int
    first: int


@dataclass(frozen=True)
class Block:
    """Keys that are multiplied at once.

    masked: some query of the tile may not see some key of the block.  sinks: they are sinks with a query of their own.
    """

    pieces: tuple[Piece, ...]
    masked: bool
    sinks: bool = False

    @property
    def tokens(self) -> int:
        return sum(piece.tokens for piece in self.pieces)


@dataclass(frozen=True)
class Tile:
    """Queries at positions [first, end) and the blocks of keys that at least one of them sees."""

    first: int
    end: int
    sink_tokens: int
    recent_tokens: int | None
    blocks: tuple[Block, ...]

    @property
    def touched_tokens(self) -> int:
        """Keys read for this tile: the work, in units of G x (end - first) rows."""
        return sum(block.tokens for block in self.blocks)

    def hidden(self, block: Block, device: torch.device) -> Tensor:
        """bool [S, T]: True where the query may not see the key."""
        query_S1, key_T = self._positions(block, device)
        hidden_ST = key_T > query_S1
        if self.recent_tokens is not None:
            hidden_ST |= (key_T >= self.sink_tokens) & (key_T <= query_S1 - self.recent_tokens)
        return hidden_ST

    def distance(self, block: Block, device: torch.device) -> Tensor:
        """Key position - query position, int64 [S, T]."""
        query_S1, key_T = self._positions(block, device)
        return key_T - query_S1

    def _positions(self, block: Block, device: torch.device) -> tuple[Tensor, Tensor]:
        query_S1 = torch.arange(self.first, self.end, device=device)[:, None]
        return query_S1, torch.cat([torch.arange(piece.first, piece.first + piece.tokens, device=device) for piece in block.pieces])


class _Queries(NamedTuple):
    """What one tile asks: scaled queries, those for the sinks (None: the same), one slope a query head (None: no ALiBi)."""

    query_HRD: Tensor
    sink_query_HRD: Tensor | None
    slopes_HG: Tensor | None


def plan_tiles(
    spans: Sequence[Span],
    first_query: int,
    new_tokens: int,
    sink_tokens: int,
    recent_tokens: int | None,
    chunk_tokens: int | None = None,
    own_sinks: bool = False,
) -> list[Tile]:
    """Cuts the queries into tiles and finds what each reads; [] for no new token.

    chunk_tokens: as in `attend_spans`.  own_sinks: the sinks are shown another query (rule 5).
    """
    tiles = []
    first, last = first_query, first_query + new_tokens
    while first < last:
        end = min(last, (first // TILE_TOKENS + 1) * TILE_TOKENS)
        start = 0  # what no query of the tile sees the keys before
        if chunk_tokens is not None:
            start = first // chunk_tokens * chunk_tokens
            end = min(end, start + chunk_tokens)
        recent = start if recent_tokens is None else max(start, first + 1 - recent_tokens)
        parts = [[(start, end)]]
        if own_sinks:
            parts = [[(start, min(sink_tokens, end))], [(max(recent, sink_tokens), end)]]
        elif recent > max(start, sink_tokens):
            parts = [[(start, sink_tokens), (recent, end)]]
        blocks = tuple(
            Block(pieces, any(_partly_hidden(piece, first, end, sink_tokens, recent_tokens) for piece in pieces), own_sinks and not part)
            for part, ranges in enumerate(parts)
            for pieces in _cut_into_blocks(spans, ranges)
        )
        tiles.append(Tile(first, end, sink_tokens, recent_tokens, blocks))
        first = end
    return tiles


def _cut_into_blocks(spans: Sequence[Span], ranges: list[tuple[int, int]]) -> list[tuple[Piece, ...]]:
    """The keys of the ranges, in blocks counted from the first one; an empty range is (from, to) with from >= to."""
    blocks: list[tuple[Piece, ...]] = []
    pieces: list[Piece] = []
    room = BLOCK_TOKENS
    for lo, hi in ranges:
        for index, span in enumerate(spans):
            at, end = max(lo, span.first), min(hi, span.end)
            while at < end:
                tokens = min(room, end - at)
                pieces.append(Piece(index, at - span.first, tokens, at))
                at += tokens
                room -= tokens
                if room == 0:
                    blocks.append(tuple(pieces))
                    pieces, room = [], BLOCK_TOKENS
    if pieces:
        blocks.append(tuple(pieces))
    return blocks


def _partly_hidden(piece: Piece, first: int, end: int, sink_tokens: int, recent_tokens: int | None) -> bool:
    piece_end = piece.first + piece.tokens
    if piece_end > first + 1:  # its last key lies behind the first query
        return True
    if recent_tokens is None or piece_end <= sink_tokens:
        return False
    return max(piece.first, sink_tokens) <= end - 1 - recent_tokens  # the last query's window starts behind its first key


def _panel_blocks(rows: int) -> int:
    """Blocks under one softmax; decided by the rows of one head alone (rule 2)."""
    return max(1, min(PANEL_BLOCKS, PANEL_LOGITS // (rows * BLOCK_TOKENS)))


def _heads_at_once(kv_heads: int, rows: int, tile: Tile) -> list[slice]:
    """As many KV heads together as PANEL_LOGITS allows: all in a decode step, one in a long prefill.  Changes no bits."""
    logits = rows * min(tile.touched_tokens, _panel_blocks(rows) * BLOCK_TOKENS)
    step = max(1, PANEL_LOGITS // max(1, logits))
    return [slice(head, min(head + step, kv_heads)) for head in range(0, kv_heads, step)]


def _attend_tile(
    asked: _Queries, tile: Tile, hidden: list[Tensor | None], keys: list[Tensor], values: list[Tensor], soft_cap: float | None
) -> AttentionState:
    """out [H, R, E], lse [H, R].  keys, values: [H, T, D] and [H, T, E] of each span."""
    heads, rows, _ = asked.query_HRD.shape
    step = _panel_blocks(rows)
    states: list[AttentionState] = []  # one a KV head
    for at in range(0, len(tile.blocks), step):
        panel = _attend_panel(asked, tile, tile.blocks[at : at + step], hidden[at : at + step], keys, values, soft_cap)
        if len(tile.blocks) <= step:
            return panel
        panels = [AttentionState(out_RE, lse_R) for out_RE, lse_R in zip(panel.out.unbind(), panel.lse.unbind(), strict=True)]
        states = [merge_states(*pair) for pair in zip(states, panels, strict=True)] if states else panels
    if not states:
        empty = asked.query_HRD.new_zeros(heads, rows, values[0].shape[2])
        return AttentionState(empty, empty.new_full((heads, rows), -torch.inf))
    return AttentionState(torch.stack([state.out for state in states]), torch.stack([state.lse for state in states]))


def _attend_panel(
    asked: _Queries,
    tile: Tile,
    blocks: tuple[Block, ...],
    masks: list[Tensor | None],
    keys: list[Tensor],
    values: list[Tensor],
    soft_cap: float | None,
) -> AttentionState:
    """A few blocks under one softmax: out [H, R, E], lse [H, R]."""
    query_HRD, sink_query_HRD, slopes_HG = asked
    heads, rows, _ = query_HRD.shape
    dtype = query_HRD.dtype
    places = list(itertools.accumulate((_padded(block.tokens) for block in blocks), initial=0))
    logits_HRT = query_HRD.new_empty(heads, rows, places[-1])  # every row of every block aligned (rule 6)
    for block, mask, at, end in zip(blocks, masks, places, places[1:], strict=False):
        logits_HRB = logits_HRT.narrow(2, at, block.tokens)
        logits_HRT[:, :, at + block.tokens : end] = -torch.inf
        key_HDB = _gather(keys, block, dtype).transpose(1, 2)
        shown_HRD = sink_query_HRD if block.sinks and sink_query_HRD is not None else query_HRD
        for query_RD, key_DB, logits_RB in zip(shown_HRD.unbind(), key_HDB.unbind(), logits_HRB.unbind(), strict=True):
            torch.mm(query_RD, key_DB, out=logits_RB)
            if soft_cap is not None:
                logits_RB.tanh_().mul_(soft_cap)
        if slopes_HG is not None:
            distance_SB = tile.distance(block, query_HRD.device).to(dtype)
            for slopes_G, logits_RB in zip(slopes_HG.unbind(), logits_HRB.unbind(), strict=True):
                logits_RB.unflatten(0, (len(slopes_G), -1)).add_(slopes_G[:, None, None] * distance_SB)  # each number by itself, no FMA
        if mask is not None:
            logits_HRB.unflatten(1, (-1, mask.shape[0])).masked_fill_(mask, -torch.inf)
    peak_HR = logits_HRT.amax(2)
    weights_HRT = torch.softmax(logits_HRT, 2)
    top_HR = weights_HRT.amax(2)  # exp(peak - lse)
    for top_R in top_HR.unbind():
        top_R.log_()
    lse_HR = peak_HR - top_HR
    if any(mask is not None for mask in masks):
        blind_HR = peak_HR == -torch.inf  # sees no key here: its softmax is 0/0
        weights_HRT.masked_fill_(blind_HR.unsqueeze(2), 0.0)
        lse_HR.masked_fill_(blind_HR, -torch.inf)
    out_HRE = _empty_operand(heads, rows, values[0].shape[2], dtype, query_HRD.device)
    for block, at in zip(blocks, places, strict=False):
        value_HBE = _gather(values, block, dtype)
        weights_HRB = weights_HRT.narrow(2, at, block.tokens)
        for weights_RB, value_BE, out_RE in zip(weights_HRB.unbind(), value_HBE.unbind(), out_HRE.unbind(), strict=True):
            if at == 0:
                torch.mm(weights_RB, value_BE, out=out_RE)
            else:
                out_RE.addmm_(weights_RB, value_BE)
    return AttentionState(out_HRE, lse_HR)


def _padded(tokens: int) -> int:
    return -(-tokens // 16) * 16


def _gather(parts: list[Tensor], block: Block, dtype: torch.dtype) -> Tensor:
    """The block's tokens [H, B, D] as an operand; a view where one span holds them."""
    views = [parts[piece.span].narrow(1, piece.start, piece.tokens) for piece in block.pieces]
    return _operand(views[0] if len(views) == 1 else torch.cat(views, dim=1), dtype)


def _operand(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrices [H, rows, columns] in `dtype`, each contiguous and aligned (rule 6); themselves if they are so already."""
    heads, rows, columns = matrices.shape
    if (
        matrices.dtype == dtype
        and matrices.stride()[1:] == (columns, 1)
        and matrices.data_ptr() % ALIGNMENT_BYTES == 0
        and (heads == 1 or matrices.stride(0) * dtype.itemsize % ALIGNMENT_BYTES == 0)
    ):
        return matrices
    return _empty_operand(heads, rows, columns, dtype, matrices.device).copy_(matrices)


def _empty_operand(heads: int, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    lanes = ALIGNMENT_BYTES // dtype.itemsize
    stride = -(-rows * columns // lanes) * lanes
    return torch.empty(heads * stride, dtype=dtype, device=device).as_strided((heads, rows, columns), (stride, columns, 1))
