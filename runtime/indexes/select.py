"""How query heads that share a KV head choose keys.

Letters: H KV heads, G queries per KV head, T keys, K keys chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompile.ir.policy import Select


def select_keys(score_HGT: Tensor, k: int, select: Select) -> Tensor:
    """Indices of the chosen keys, ascending, int64 [H, G, K]; -1 at the end of a row that has fewer (union only).

    score_HGT: logits.  per_query_head: each head's k largest.  union: every key that one head of the group chose so, for all of them.
    sum, max: the k keys with the largest sum, or maximum, over the group of their softmax weights.  k >= T: all keys.
    Ties: the earlier key.
    """
    heads, group, keys = score_HGT.shape
    if k >= keys:
        return torch.arange(keys).expand(heads, group, keys)
    match select:
        case "per_query_head":
            return _largest(score_HGT, k)
        case "union":
            chosen_HT = torch.zeros(heads, keys, dtype=torch.bool).scatter_(1, _largest(score_HGT, k).flatten(1), True)
            most = int(chosen_HT.sum(1).max())
            order_HT = torch.where(chosen_HT, torch.arange(keys), keys).sort(1).values[:, :most]
            return torch.where(order_HT < keys, order_HT, -1)[:, None].expand(heads, group, most)
        case "sum":
            shared_HT = torch.softmax(score_HGT.double(), 2).sum(1)
        case "max":
            shared_HT = torch.softmax(score_HGT.double(), 2).amax(1)
    return _largest(shared_HT[:, None], k).expand(heads, group, k)


def share_chosen(position_HGK: Tensor, select: Select) -> Tensor:
    """Positions that each query head chose (-1 of none, in any order) as `Found` wants them.

    per_query_head: each row ascending.  union: every position of the group, for all of its rows.
    """
    assert select in ("per_query_head", "union"), select
    group = position_HGK.shape[1]
    none = torch.iinfo(position_HGK.dtype).max
    if select == "per_query_head":
        order_HGK = torch.where(position_HGK < 0, none, position_HGK).sort(2).values
    else:
        order_HK = torch.where(position_HGK < 0, none, position_HGK).flatten(1).sort(1).values
        again_HK = torch.nn.functional.pad(order_HK[:, 1:] == order_HK[:, :-1], (1, 0))
        order_HK = order_HK.masked_fill(again_HK, none).sort(1).values
        order_HGK = order_HK[:, None].expand(-1, group, -1)
    most = int((order_HGK < none).sum(2).max()) if order_HGK.numel() else 0
    order_HGK = order_HGK[..., :most]
    return torch.where(order_HGK < none, order_HGK, -1)


def _largest(score: Tensor, k: int) -> Tensor:
    """Indices of the k largest of the last dimension, ascending; of equal ones the earlier."""
    return score.sort(dim=-1, descending=True, stable=True).indices[..., :k].sort(dim=-1).values
