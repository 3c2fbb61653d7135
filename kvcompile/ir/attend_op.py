"""`kvc::attend`: the one node that every front end ends in, and its cache-less meaning.

    attend(query, key, value, learnt_sinks, site, scale, sliding_window, soft_cap, chunk_tokens, slopes, sink_query,
           choosing, chosen_tokens) -> out

    query         [1, query_heads, tokens, head_dim]
    key           [1, kv_heads, tokens, head_dim]
    value         [1, kv_heads, tokens, value_dim]
    learnt_sinks  [query_heads] or None: one logit a query head that joins the softmax's denominator
    site          index of the attention site, -1 before `canonicalise_attention` numbers them
    sliding_window, soft_cap   0 means none
    chunk_tokens  0, or: position p sees only positions of its own chunk, from p // chunk_tokens * chunk_tokens on
    slopes        one number a query head, or none at all: slope * (key position - query position) joins the logit (ALiBi)
    sink_query    like query, or None: the query as a policy with `positions: cache_index` shows it to the sinks; only a
                  session knows sinks, so the operator itself ignores it
    choosing      [1, choosing heads, tokens, compared + 1] or None: of the keys that a query sees otherwise, it sees the
                  chosen_tokens with the largest choice (choose_keys.py); a key's last `compared` numbers are what it offers,
                  and a query has zeros there
    out           [1, tokens, query_heads, value_dim]

    logit = cap(scale * q.k) + slope * (j - p),  cap(x) = soft_cap * tanh(x / soft_cap)

Called as an operator it attends causally over the tokens of the call, all of them one sequence: a traced graph runs
as it stands and is what passes are compared against.  A session never calls it; it attends over its stores instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcompile.ir.choose_keys import hidden_by_choice

_SCHEMA = (
    "attend(Tensor query, Tensor key, Tensor value, Tensor? learnt_sinks, int site, float scale, "
    "int sliding_window, float soft_cap, int chunk_tokens=0, float[] slopes=[], Tensor? sink_query=None, "
    "Tensor? choosing=None, int chosen_tokens=0) -> Tensor"
)
_QUERY_TILE = 256

_library = torch.library.Library("kvc", "DEF")
_library.define(_SCHEMA)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    learnt_sinks: Tensor | None,
    site: int,
    scale: float,
    sliding_window: int,
    soft_cap: float,
    chunk_tokens: int = 0,
    slopes: Sequence[float] = (),
    sink_query: Tensor | None = None,
    choosing: Tensor | None = None,
    chosen_tokens: int = 0,
) -> Tensor:
    _, query_heads, tokens, _ = query.shape
    queries_per_kv = query_heads // key.shape[1]
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    key_HTD = key[0].to(compute).repeat_interleave(queries_per_kv, 0)
    value_HTE = value[0].to(compute).repeat_interleave(queries_per_kv, 0)
    out = query.new_empty(1, tokens, query_heads, value.shape[3])
    positions = torch.arange(tokens, device=query.device)
    for start in range(0, tokens, _QUERY_TILE):
        rows = positions[start : start + _QUERY_TILE]
        logits_HST = query[0, :, start : start + _QUERY_TILE].to(compute) @ key_HTD.transpose(1, 2) * scale
        if soft_cap:
            logits_HST = soft_cap * torch.tanh(logits_HST / soft_cap)
        if slopes:
            distance_ST = (positions - rows[:, None]).to(compute)
            logits_HST = logits_HST + torch.tensor(slopes, dtype=compute, device=query.device)[:, None, None] * distance_ST
        hidden_ST = positions > rows[:, None]
        if sliding_window:
            hidden_ST |= positions <= rows[:, None] - sliding_window
        if chunk_tokens:
            hidden_ST |= positions < rows[:, None] // chunk_tokens * chunk_tokens
        if choosing is not None:
            choosing_CSJ, compared = choosing[0, :, start : start + _QUERY_TILE].to(compute), choosing.shape[3] - 1
            hidden_ST = hidden_by_choice(choosing_CSJ, key_HTD[0, :, key_HTD.shape[2] - compared :], hidden_ST, chosen_tokens)
        logits_HST = logits_HST.masked_fill(hidden_ST, float("-inf"))
        if learnt_sinks is not None:
            sink_H11 = learnt_sinks.to(compute)[:, None, None].expand(-1, len(rows), 1)
            logits_HST = torch.cat([logits_HST, sink_H11], dim=2)
        weights_HST = torch.softmax(logits_HST, dim=2)[:, :, :tokens]
        out[0, start : start + _QUERY_TILE] = (weights_HST @ value_HTE).transpose(0, 1)
    return out


def _attend_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    learnt_sinks: Tensor | None,
    site: int,
    scale: float,
    sliding_window: int,
    soft_cap: float,
    chunk_tokens: int = 0,
    slopes: Sequence[float] = (),
    sink_query: Tensor | None = None,
    choosing: Tensor | None = None,
    chosen_tokens: int = 0,
) -> Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


_library.impl("attend", _attend, "CompositeExplicitAutograd")
torch.library.register_fake("kvc::attend", _attend_fake, lib=_library)

ATTEND = torch.ops.kvc.attend.default
