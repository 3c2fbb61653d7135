"""Where a store's positions lie in memory, as the words that the kernels' launcher reads (codegen/cpp/stores.h).

growing   0, parts, and of each part: key, value, bytes from one head's keys to the next one's, the same of values, first
          position, end of its positions
ring      1, key, value, the two strides in bytes, sink tokens, slots of the window
kivi      2, sink tokens, key, value and the strides of sinks, the same four of exact tokens, quantised keys, quantised values,
          slots of exact values, end of the positions that there is room for, tokens of a group, bytes of an exact value, of a
          value's codes and of its scales, parts of keys, parts of values, and of each part: codes, scales, their strides, first,
          end, slots of a ring or 0.  What is quantised is counted behind the sinks; first and end of keys are counted in groups.
          The exact value of place p has slot p mod slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

_GROWING, _RING, _KIVI = 0, 1, 2
_EVERY = torch.iinfo(torch.int64).max


class DescribedPart(NamedTuple):
    """Positions [first, end) at slots [0, end - first) of a buffer; addresses and strides in bytes."""

    key: int
    value: int
    key_stride: int
    value_stride: int
    first: int
    end: int


class PackedPart(NamedTuple):
    """Units [first, end) of a buffer of codes and scales, or the ring of `slots` units that all of them lie in."""

    codes: int
    scales: int
    code_stride: int
    scale_stride: int
    first: int
    end: int
    slots: int


@dataclass(frozen=True)
class Descriptor:
    """The words, and the position behind the last one that they have room for."""

    words: Tensor = field(repr=False)
    end: int

    @classmethod
    def growing(cls, parts: Sequence[DescribedPart]) -> Descriptor:
        """Buffers one after another; () is an empty store."""
        words = [_GROWING, len(parts), *(word for part in parts for word in part)]
        return cls(torch.tensor(words, dtype=torch.int64), parts[-1].end if parts else 0)

    @classmethod
    def ring(cls, key: int, value: int, key_stride: int, value_stride: int, sink_tokens: int, window_tokens: int) -> Descriptor:
        """A ring, which has room for every position."""
        words = [_RING, key, value, key_stride, value_stride, sink_tokens, window_tokens]
        return cls(torch.tensor(words, dtype=torch.int64), _EVERY)

    @classmethod
    def quantised(
        cls, facts: Sequence[int], keys: Sequence[PackedPart], values: Sequence[PackedPart], before: Descriptor | None
    ) -> Descriptor:
        """Of a KIVI store; `before` itself, with other words, where they are as many: its address is then known already."""
        words = [_KIVI, *facts, len(keys), len(values), *(word for part in (*keys, *values) for word in part)]
        if before is None or len(before.words) != len(words):
            return cls(torch.tensor(words, dtype=torch.int64), _EVERY)
        before.words.copy_(torch.tensor(words, dtype=torch.int64))
        return before

    @property
    def address(self) -> int:
        return self.words.data_ptr()
