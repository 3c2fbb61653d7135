"""Attention in torch over a store whose tokens are in full precision only while they are attended to.

Letters: H KV heads, G queries per KV head, S new tokens, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from kvcompile.runtime.attend import BLOCK_TOKENS, attend_spans
from kvcompile.runtime.merge import AttentionState, merge_states
from kvcompile.runtime.spans import Span


@runtime_checkable
class Walked(Protocol):
    """A store that gives what it holds piece by piece."""

    def walk(self, first: int, end: int) -> Iterator[tuple[Span, ...]]:
        """The tokens at positions [first, end) in position order; spans are good until the next ones are asked for."""
        ...


class Held(Protocol):
    @property
    def copies_spans(self) -> bool:
        """Whether spans are copies, made of fewer bits."""
        ...

    def spans_between(self, first: int, end: int) -> tuple[Span, ...]: ...


def attend_held(query_HGSD: Tensor, store: Held, visible: Sequence[tuple[int, int]], first_query: int, **options: Any) -> AttentionState:
    """`attend_spans` with its options over what the store holds at the positions `visible`: ranges (first, end), in order.

    Copies are made of BLOCK_TOKENS tokens at a time, or as the store itself cuts them, and their attentions merged: the borders are
    positions, so no result depends on how the store came to hold them.
    """
    if not store.copies_spans:
        spans = [span for first, end in visible for span in store.spans_between(first, end)]
        return attend_spans(query_HGSD, spans, first_query, **options)
    state: AttentionState | None = None
    for first, end in visible:
        for spans_of_block in _pieces(store, first, end):
            part = attend_spans(query_HGSD, spans_of_block, first_query, **options)
            state = part if state is None else merge_states(state, part)
    assert state is not None, "attending over no token at all"
    return state


def _pieces(store: Held, first: int, end: int) -> Iterator[tuple[Span, ...]]:
    if isinstance(store, Walked):
        return store.walk(first, end)
    return (store.spans_between(at, min(end, at + BLOCK_TOKENS)) for at in range(first, end, BLOCK_TOKENS))
