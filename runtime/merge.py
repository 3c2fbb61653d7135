"""Merging attentions over parts of the past by log-sum-exp.

Letters: P parts, E value_dim; "..." any leading shape, the same for out and lse (H KV heads, G queries per KV head,
S new tokens in this package).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class AttentionState(NamedTuple):
    """The answer of one zone to some queries.

    out: [..., E] the softmax-weighted mean of the zone's values; 0 where the zone holds no visible key.
    lse: [...] NATURAL logarithm of the sum of exp(logits) over the zone's visible keys; -inf where there is none.
         Never base 2 (FlashInfer and MagicPIG keep base 2: multiply theirs by ln 2 first).
    """

    out: Tensor
    lse: Tensor


def merge_states(first: AttentionState, second: AttentionState) -> AttentionState:
    """The attention over the union of two disjoint sets of keys; see `merge_all`."""
    return merge_all((first, second))


def merge_all(states: Sequence[AttentionState]) -> AttentionState:
    """The attention over the union of disjoint sets of keys, from the attentions over each.

    states: at least one, out [..., E] and lse [...] (natural logarithm), all of the same shapes.
    Returns float32, or float64 if an input is.  Shifted by the maximum, so logits of any finite size are safe.  An
    empty part (0, -inf) changes nothing; if all are empty the result is (0, -inf), without NaN.  Associative and
    commutative up to rounding.
    Source: FlashAttention-2 (Dao 2023, section 3.1.1); Cascade inference (Ye et al. 2024), merge_state.
    """
    assert states, "merging no state: the empty state's shape is unknown"
    dtype = torch.float32
    for state in states:
        dtype = torch.promote_types(dtype, torch.promote_types(state.out.dtype, state.lse.dtype))
    if len(states) == 1:
        return AttentionState(states[0].out.to(dtype), states[0].lse.to(dtype))
    lse_P = torch.stack([state.lse.to(dtype) for state in states])
    out_PE = torch.stack([state.out.to(dtype) for state in states])
    peak = lse_P.amax(0)
    peak = peak.masked_fill(peak == -torch.inf, 0.0)  # -inf - -inf would be NaN where every part is empty
    weight_P = (lse_P - peak).exp_()
    total = weight_P.sum(0)
    lse = peak + total.log()
    weight_P /= total.masked_fill(total == 0, 1.0)
    return AttentionState((weight_P.unsqueeze(-1) * out_PE).sum(0), lse)


def apply_learnt_sinks(state: AttentionState, sinks_HG: Tensor) -> AttentionState:
    """One extra logit per query head in the softmax's denominator, whose value is zero (gpt-oss).

    state: out [H, G, S, E], lse [H, G, S]; sinks_HG: [H, G] logits, already scaled.  Apply once, after the zones of
    the head were merged.  Equal to merging with the state (0, sink); an empty state gives out 0 and lse = sink.
    """
    sinks_HGS = sinks_HG.unsqueeze(-1).expand_as(state.lse)
    return merge_states(state, AttentionState(torch.zeros_like(state.out), sinks_HGS))
