"""Clusters of equal size: points put in an order whose runs of BLOCK_TOKENS are close together.

Letters: H heads, T points, N nodes of a level, M points of a node, D dimensions.

A tree of cuts at the median: each node's points are ordered along the direction in which they spread most (three steps of the power
method) and cut in two halves of whole blocks, level by level, all nodes of a level at once.  Clusters of k-means are 3 to 5 % better
per cluster for the sketch's tail, and cost an id a key, sequential reads and a fixed cluster size (docs/sketch.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompile.ir.indexes import BLOCK_TOKENS

_POWER_STEPS = 3
_SAMPLE_POINTS = 128  # of a node, which its direction is found from


def balanced_order(points_HTD: Tensor) -> Tensor:
    """An order of the T points (a multiple of BLOCK_TOKENS) of each head, int64 [H, T]; its runs of BLOCK_TOKENS are the clusters."""
    heads, tokens, _ = points_HTD.shape
    assert tokens % BLOCK_TOKENS == 0, tokens
    order_HT = torch.arange(tokens).repeat(heads, 1)
    sizes = [tokens // BLOCK_TOKENS]  # blocks of each node, in order
    while sizes and max(sizes) > 1:
        order_HT = _sorted_within(points_HTD, order_HT, sizes)
        sizes = [half for size in sizes for half in ((size - size // 2, size // 2) if size > 1 else (size,))]
    return order_HT


def _sorted_within(points_HTD: Tensor, order_HT: Tensor, sizes: list[int]) -> Tensor:
    """The order with each node's points sorted along their leading direction."""
    blocks_N = torch.tensor(sizes)
    widest = int(blocks_N.max()) * BLOCK_TOKENS
    start_N1 = ((blocks_N.cumsum(0) - blocks_N) * BLOCK_TOKENS)[:, None]
    real_NM = torch.arange(widest) < blocks_N[:, None] * BLOCK_TOKENS
    place_NM = torch.where(real_NM, start_N1 + torch.arange(widest), 0)
    stride = max(1, widest // _SAMPLE_POINTS)
    sorted_HT = torch.empty_like(order_HT)
    for points_TD, order_T, sorted_T in zip(points_HTD, order_HT, sorted_HT, strict=True):
        ordered_TD = points_TD[order_T]
        direction_ND1 = _leading_direction(ordered_TD[place_NM[:, ::stride]], real_NM[:, ::stride])
        node_T = torch.arange(len(sizes)).repeat_interleave(blocks_N * BLOCK_TOKENS)
        along_T = (ordered_TD * direction_ND1.squeeze(2)[node_T]).sum(1)
        along_NM = torch.where(real_NM, along_T[place_NM], torch.inf)  # what is no point sorts behind all
        sorted_T.copy_(order_T[(along_NM.sort(dim=1, stable=True).indices + start_N1)[real_NM]])
    return sorted_HT


def _leading_direction(points_NMD: Tensor, real_NM: Tensor) -> Tensor:
    """The direction [N, D, 1] in which each node's points spread most."""
    weight_NM1 = real_NM.to(points_NMD.dtype)[..., None]
    centred_NMD = (points_NMD - (points_NMD * weight_NM1).sum(1, keepdim=True) / weight_NM1.sum(1, keepdim=True)) * weight_NM1
    spread_ND = centred_NMD.square().sum(1)
    direction_ND1 = torch.zeros_like(spread_ND).scatter_(1, spread_ND.argmax(1, keepdim=True), 1.0)[..., None]
    for _ in range(_POWER_STEPS):
        direction_ND1 = centred_NMD.transpose(1, 2) @ (centred_NMD @ direction_ND1)
        direction_ND1 = direction_ND1 / direction_ND1.norm(dim=1, keepdim=True).clamp_min(1e-30)
    return direction_ND1
