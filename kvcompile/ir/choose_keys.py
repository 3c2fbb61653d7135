"""Keys that a model chooses itself: of those that a query sees, the ones with the largest choice (DeepSeek-V3.2, section 2.1).

    choice(query s, key t) = sum over c of weight[c, s] * relu(asked[c, s] . offered[t])

Letters: C heads that choose, S queries, T keys, I numbers that a head compares, J = I + 1: what it asks, and behind it its weight.
"""

from __future__ import annotations

import torch
from torch import Tensor


def choices(choosing_CSJ: Tensor, offered_TI: Tensor) -> Tensor:
    """[S, T], in the dtype of its inputs."""
    asked_CSI, weight_CS1 = choosing_CSJ[..., :-1], choosing_CSJ[..., -1:]
    return ((asked_CSI @ offered_TI.T).relu() * weight_CS1).sum(0)


def hidden_by_choice(choosing_CSJ: Tensor, offered_TI: Tensor, hidden_ST: Tensor, chosen_tokens: int) -> Tensor:
    """bool [S, T]: True where the query does not see the key, which hidden_ST hides already or which is not chosen.

    A query that sees at most `chosen_tokens` keys sees them all.  Of equal choices, which relu makes often, the earlier key is chosen: what
    a query sees does not depend on how many keys come after it.
    """
    if hidden_ST.shape[1] <= chosen_tokens:
        return hidden_ST
    choice_ST = choices(choosing_CSJ, offered_TI).masked_fill(hidden_ST, -torch.inf)
    chosen = choice_ST.sort(dim=1, descending=True, stable=True).indices[:, :chosen_tokens]
    return hidden_ST | torch.ones_like(hidden_ST).scatter(1, chosen, False)
