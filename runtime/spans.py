"""A span: keys and values of contiguous positions.  An exact zone is a list of spans, in position order.

Letters: H KV heads, T tokens of the span, D head_dim, E value_dim.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Span(NamedTuple):
    """Positions [first, first + T) of every KV head of a group.

    first:     absolute position of the span's first token.
    key_HTD:   [H, T, D], usually a view of a store that is valid until the store's next extend or rollback.
    value_HTE: [H, T, E].
    """

    first: int
    key_HTD: Tensor
    value_HTE: Tensor

    @property
    def tokens(self) -> int:
        return self.key_HTD.shape[1]

    @property
    def end(self) -> int:
        """The position after the span's last token."""
        return self.first + self.key_HTD.shape[1]

    def between(self, first: int, end: int) -> Span:
        """The part at positions [first, end), a view; no token where none lies there."""
        lo = min(max(first, self.first), self.end)
        tokens = max(0, min(end, self.end) - lo)
        return Span(lo, self.key_HTD.narrow(1, lo - self.first, tokens), self.value_HTE.narrow(1, lo - self.first, tokens))
