"""Attention in torch over the keys that a model chooses itself, of those that a policy keeps.

Letters: H KV heads, G queries per KV head, S new tokens, T keys, D head_dim, E value_dim; C and J as in ir/choose_keys.py.

The last numbers of a key, as many as are compared, are what it offers to the choice; a query has zeros there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcompile.ir.choose_keys import hidden_by_choice
from kvcompile.runtime.merge import AttentionState
from kvcompile.runtime.spans import Span

TILE_TOKENS = 64  # queries at once: their choices are held for every key


def attend_chosen(
    query_HGSD: Tensor,
    spans: Sequence[Span],
    first_query: int,
    *,
    choosing_CSJ: Tensor,
    chosen_tokens: int,
    sink_tokens: int,
    recent_tokens: int | None,
    scale: float,
    soft_cap: float | None = None,
    chunk_tokens: int | None = None,
) -> AttentionState:
    """`attend_spans` over the chosen keys: of those that the query at p sees, the `chosen_tokens` with the largest choice.

    spans: as of `attend_spans`, which has the other options too.  Float32, or float64 if the query or the keys are.
    """
    double = torch.float64 in (query_HGSD.dtype, spans[0].key_HTD.dtype)
    dtype = torch.float64 if double else torch.float32
    key_HTD = torch.cat([span.key_HTD for span in spans], 1).to(dtype)
    value_HTE = torch.cat([span.value_HTE for span in spans], 1).to(dtype)
    key_T = torch.cat([torch.arange(span.first, span.end, device=key_HTD.device) for span in spans])
    offered_TI = key_HTD[0, :, key_HTD.shape[2] - choosing_CSJ.shape[2] + 1 :]
    states = []
    for at in range(0, query_HGSD.shape[2], TILE_TOKENS):
        query = query_HGSD[:, :, at : at + TILE_TOKENS].to(dtype)
        query_S1 = torch.arange(first_query + at, first_query + at + query.shape[2], device=key_T.device)[:, None]
        hidden_ST = key_T > query_S1
        if recent_tokens is not None:
            hidden_ST |= (key_T >= sink_tokens) & (key_T <= query_S1 - recent_tokens)
        if chunk_tokens is not None:
            hidden_ST |= key_T < query_S1 // chunk_tokens * chunk_tokens
        hidden_ST = hidden_by_choice(choosing_CSJ[:, at : at + TILE_TOKENS].to(dtype), offered_TI, hidden_ST, chosen_tokens)
        logits_HGST = query @ key_HTD[:, None].transpose(-1, -2) * scale
        if soft_cap is not None:
            logits_HGST = soft_cap * torch.tanh(logits_HGST / soft_cap)
        logits_HGST = logits_HGST.masked_fill(hidden_ST, -torch.inf)
        lse_HGS = logits_HGST.logsumexp(-1)
        weights_HGST = torch.exp(logits_HGST - lse_HGS[..., None])
        states.append(AttentionState(weights_HGST @ value_HTE[:, None], lse_HGS))
    return AttentionState(torch.cat([state.out for state in states], 2), torch.cat([state.lse for state in states], 2))
