"""The oracle: what every zone and merge means, in float64 and without cleverness.  Kernels are held against it.

Letters: H KV heads, G queries per KV head, S new tokens, T keys, D head_dim, E value_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcompile.ir.policy import All, Sample, SinkRecent, Static, TopK, Zone
from kvcompile.runtime.merge import AttentionState


def visible(zone: Zone, query_positions: Tensor, key_positions: Tensor, chunk_tokens: int | None = None) -> Tensor:
    """Which key each query may see: bool [S, T] from absolute positions [S] and [T].

    All: every key at or before the query.  SinkRecent(s, r): of those, the first s positions and the last r, the
    query's own included (StreamingLLM, section 3.2).
    chunk_tokens: of these, only keys of the query's own chunk of so many positions; None: no such chunks.
    """
    query_S1 = query_positions[:, None]
    key_1T = key_positions[None, :]
    past_ST = key_1T <= query_S1
    if chunk_tokens is not None:
        past_ST &= key_1T >= query_S1 // chunk_tokens * chunk_tokens
    match zone:
        case All():
            return past_ST
        case SinkRecent(sink_tokens, recent_tokens):
            return past_ST & ((key_1T < sink_tokens) | (key_1T > query_S1 - recent_tokens))
        case TopK() | Sample() | Static():
            raise ValueError(f"which keys {zone} shows is found at run time")


def attend(
    query_HGSD: Tensor,
    key_HTD: Tensor,
    value_HTE: Tensor,
    visible_ST: Tensor,
    scale: float,
    soft_cap: float | None = None,
    bias_HGST: Tensor | None = None,
    sink_query_HGSD: Tensor | None = None,
    sinks_T: Tensor | None = None,
) -> AttentionState:
    """Softmax attention of every query over its visible keys, in float64.

    scale: factor on q.k.  soft_cap: logits become soft_cap * tanh(logits / soft_cap).
    bias_HGST: joins the capped logits; `alibi` makes one.
    sink_query_HGSD, sinks_T (bool [T], True at a sink): the query that the sinks are shown in place of the other one
    (StreamingLLM, section 3.2: positions within the cache); both or none.
    Returns out [H, G, S, E] and lse [H, G, S], natural logarithm; a query that sees no key gets (0, -inf), T = 0
    included.
    """
    logits_HGST = query_HGSD.double() @ key_HTD.double()[:, None].transpose(-1, -2) * scale
    assert (sink_query_HGSD is None) == (sinks_T is None), "a query for the sinks goes with what says which keys are sinks"
    if sink_query_HGSD is not None and sinks_T is not None:
        sink_logits_HGST = sink_query_HGSD.double() @ key_HTD.double()[:, None].transpose(-1, -2) * scale
        logits_HGST = torch.where(sinks_T, sink_logits_HGST, logits_HGST)
    if soft_cap is not None:
        logits_HGST = soft_cap * torch.tanh(logits_HGST / soft_cap)
    if bias_HGST is not None:
        logits_HGST = logits_HGST + bias_HGST.double()
    logits_HGST = logits_HGST.masked_fill(~visible_ST, -torch.inf)
    lse_HGS = torch.logsumexp(logits_HGST, dim=-1)
    sees_HGS1 = (lse_HGS > -torch.inf)[..., None]
    weights_HGST = torch.where(sees_HGS1, torch.exp(logits_HGST - lse_HGS[..., None]), 0.0)
    return AttentionState(weights_HGST @ value_HTE.double()[:, None], lse_HGS)


def alibi(slopes_HG: Tensor, query_positions: Tensor, key_positions: Tensor) -> Tensor:
    """slope * (key position - query position), float64 [H, G, S, T], from one slope a query head (Press et al. 2022, section 3)."""
    distance_ST = (key_positions[None, :] - query_positions[:, None]).double()
    return slopes_HG.double()[:, :, None, None] * distance_ST


def merge(states: Sequence[AttentionState]) -> AttentionState:
    """The attention over the union of disjoint sets of keys: out [..., E], lse [...] natural logarithm, float64.

    Empty parts are (0, -inf); all parts empty gives (0, -inf).
    """
    lse_P = torch.stack([state.lse.double() for state in states])
    out_PE = torch.stack([state.out.double() for state in states])
    lse = torch.logsumexp(lse_P, dim=0)
    weights_P = torch.where(lse > -torch.inf, torch.exp(lse_P - lse), 0.0)
    return AttentionState((weights_P[..., None] * out_PE).sum(0), lse)


def apply_learnt_sinks(state: AttentionState, sinks_HG: Tensor) -> AttentionState:
    """One extra logit per query head in the denominator, with a value of zero (gpt-oss): sinks_HG [H, G], float64."""
    sinks_HGS = sinks_HG.double()[..., None].expand_as(state.lse)
    return merge((state, AttentionState(torch.zeros_like(state.out), sinks_HGS)))
