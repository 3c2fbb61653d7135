"""Keys at chosen positions, from where the session holds them.

Letters: H KV heads, X positions, T keys of a span, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcompile.runtime.spans import Span


def keys_at(spans: Sequence[Span], position_HX: Tensor) -> Tensor:
    """[H, X, D]; the spans cover every position."""
    parts = []
    for span in spans:
        place_HX = (position_HX - span.first).clamp(0, span.tokens - 1)
        parts.append((span.end, span.key_HTD.gather(1, place_HX[..., None].expand(*place_HX.shape, span.key_HTD.shape[2]))))
    found_HXD = parts[-1][1]
    for end, part_HXD in reversed(parts[:-1]):
        found_HXD = torch.where((position_HX < end)[..., None], part_HXD, found_HXD)
    return found_HXD
