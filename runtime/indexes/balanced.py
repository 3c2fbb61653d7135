"""Clusters of equal size: points put in an order whose runs of BLOCK_TOKENS are close together.

Letters: H heads, T points, S slots for them, N nodes of a level, M slots of a node, D dimensions.

A tree of cuts at the median: each node's points are ordered along the direction in which they spread most (three steps of the power
method) and cut in two halves of whole blocks, level by level, all nodes of all heads at once.  Clusters of k-means are 3 to 5 % better
per cluster for the sketch's tail, and cost an id a key, sequential reads and a fixed cluster size (docs/sketch.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompile.ir.indexes import BLOCK_TOKENS

_POWER_STEPS = 3
_SAMPLE_POINTS = 128  # of a node, which its direction is found from


def balanced_order(points_HTD: Tensor) -> Tensor:
    """An order of the T points (a multiple of BLOCK_TOKENS) of each head, int64 [H, T]; its runs of BLOCK_TOKENS are the clusters.

    So that all nodes of a level are equally large, points that do not exist fill up the next power of two; they sort behind all others,
    and a node's left half is filled first.
    """
    heads, tokens, dims = points_HTD.shape
    assert tokens and tokens % BLOCK_TOKENS == 0, tokens
    slots = BLOCK_TOKENS << (tokens // BLOCK_TOKENS - 1).bit_length()
    order_HS = torch.arange(slots).repeat(heads, 1)
    points_HSD = torch.nn.functional.pad(points_HTD, (0, 0, 0, slots - tokens))
    size = slots
    while size > BLOCK_TOKENS:
        points_NMD = points_HSD.reshape(-1, size, dims)
        missing_NM = (order_HS >= tokens).view(-1, size)
        stride = max(1, size // _SAMPLE_POINTS)
        direction_ND1 = _leading_direction(points_NMD[:, ::stride], ~missing_NM[:, ::stride])
        along_NM = (points_NMD @ direction_ND1).squeeze(2).masked_fill_(missing_NM, torch.inf)
        place_NM = along_NM.sort(dim=1, stable=True).indices
        order_HS = order_HS.view(-1, size).gather(1, place_NM).view(heads, slots)
        points_HSD = points_NMD.gather(1, place_NM[..., None].expand_as(points_NMD)).view(heads, slots, dims)
        size //= 2
    return order_HS[:, :tokens] if slots == tokens else order_HS[order_HS < tokens].view(heads, tokens)


def _leading_direction(points_NMD: Tensor, real_NM: Tensor) -> Tensor:
    """The direction [N, D, 1] in which each node's points spread most."""
    weight_NM1 = real_NM.to(points_NMD.dtype)[..., None]
    mean_N1D = (points_NMD * weight_NM1).sum(1, keepdim=True) / weight_NM1.sum(1, keepdim=True).clamp_min(1.0)
    centred_NMD = (points_NMD - mean_N1D) * weight_NM1
    spread_ND = centred_NMD.square().sum(1)
    direction_ND1 = torch.zeros_like(spread_ND).scatter_(1, spread_ND.argmax(1, keepdim=True), 1.0)[..., None]
    for _ in range(_POWER_STEPS):
        direction_ND1 = centred_NMD.transpose(1, 2) @ (centred_NMD @ direction_ND1)
        direction_ND1 = direction_ND1 / direction_ND1.norm(dim=1, keepdim=True).clamp_min(1e-30)
    return direction_ND1
