"""Members of lists of keys.

Letters: H KV heads, G queries per KV head, T keys, L lists, R lists chosen, C members of these.
"""

from __future__ import annotations

import torch
from torch import Tensor


def listed(order_HT: Tensor, start_HL: Tensor, list_HGR: Tensor) -> Tensor:
    """The members of the chosen lists, one list behind the other, int64 [H, G, C]; -1 at the end of rows that have fewer.

    order_HT: keys by list.  start_HL: where each list starts in it, and last where the last ends: [H, L + 1].  list_HGR: -1 of none.
    """
    heads, group, lists = list_HGR.shape
    start_HL, wanted_HGR = start_HL.long(), list_HGR.clamp_min(0)
    start_HGR, size_HGR = (
        each_HL[:, None].expand(-1, group, -1).gather(2, wanted_HGR) for each_HL in (start_HL[:, :-1], start_HL.diff(dim=1))
    )
    size_HGR = size_HGR.masked_fill(list_HGR < 0, 0)
    end_HGR = size_HGR.cumsum(2)
    slot_HGC = torch.arange(int(end_HGR[..., -1].max())).expand(heads, group, -1).contiguous()
    turn_HGC = torch.searchsorted(end_HGR, slot_HGC, right=True).clamp_max(lists - 1)
    place_HGC = slot_HGC + (start_HGR - end_HGR + size_HGR).gather(2, turn_HGC)
    beyond_HGC = slot_HGC >= end_HGR[..., -1:]
    key_HGC = order_HT.long()[:, None].expand(-1, group, -1).gather(2, place_HGC.masked_fill(beyond_HGC, 0))
    return key_HGC.masked_fill(beyond_HGC, -1)
