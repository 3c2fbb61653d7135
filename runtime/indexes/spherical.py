"""Spherical k-means of centred keys, as IVF and RetroInfer form their clusters.

Letters: H KV heads, T keys, L clusters, D head_dim.

1. A key goes to the centre with the largest inner product; centres have length 1, keys their own.
2. The first centres are keys evenly spread over the positions: no chance enters.
3. A centre that loses all its keys stays where it was.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 10
_SCORES = 1 << 22  # at a time


def spherical_centres(point_HTD: Tensor, count: int) -> Tensor:
    """Centres of length 1, float32 [H, L, D], after ROUNDS rounds; 1 <= count <= T."""
    tokens = point_HTD.shape[1]
    assert 1 <= count <= tokens, (count, tokens)
    centre_HLD = _unit(point_HTD[:, torch.arange(count) * tokens // count])
    for _ in range(ROUNDS):
        sum_HLD, size_HL = cluster_sums(point_HTD, nearest_centre(point_HTD, centre_HLD), count)
        centre_HLD = torch.where(size_HL[..., None] > 0, _unit(sum_HLD), centre_HLD)
    return centre_HLD


def nearest_centre(point_HTD: Tensor, centre_HLD: Tensor) -> Tensor:
    """The centre with the largest inner product, int64 [H, T]; of equal ones the first."""
    step = max(1, _SCORES // centre_HLD.shape[1])
    heads = [
        torch.cat([(part_TD @ centre_LD.T).argmax(1) for part_TD in point_TD.split(step)])
        for point_TD, centre_LD in zip(point_HTD, centre_HLD, strict=True)
    ]
    return torch.stack(heads)


def cluster_sums(point_HTX: Tensor, cluster_HT: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The sum of each cluster's points [H, L, X], and how many they are, int64 [H, L]."""
    sum_HLX = point_HTX.new_zeros(len(point_HTX), count, point_HTX.shape[2])
    for sum_LX, point_TX, cluster_T in zip(sum_HLX, point_HTX, cluster_HT, strict=True):
        sum_LX.index_add_(0, cluster_T, point_TX)
    size_HL = torch.stack([torch.bincount(cluster_T, minlength=count) for cluster_T in cluster_HT])
    return sum_HLX, size_HL


def _unit(point_HLD: Tensor) -> Tensor:
    unit_HLD: Tensor = torch.nn.functional.normalize(point_HLD, dim=2)
    return unit_HLD
