"""Where a store's positions lie in memory, as the words that the kernels' launcher reads (codegen/cpp/stores.h).

    growing   0, parts, and of each part: key, value, bytes from one head's keys to the next one's, the same of values, first
              position, end of its positions
    ring      1, key, value, the two strides in bytes, sink tokens, slots of the window
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

_GROWING, _RING = 0, 1


class DescribedPart(NamedTuple):
    """Positions [first, end) at slots [0, end - first) of a buffer; addresses and strides in bytes."""

    key: int
    value: int
    key_stride: int
    value_stride: int
    first: int
    end: int


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
        return cls(torch.tensor(words, dtype=torch.int64), torch.iinfo(torch.int64).max)

    @property
    def address(self) -> int:
        return self.words.data_ptr()
