"""KIVI and int8 as the papers' sentences say it: a token at a time, numbers in lists, float64 where nothing is rounded by the format.

Letters: D head_dim, E value_dim, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompile.ir.policy import Kivi


def rounded_group(group: Tensor, bits: int) -> Tensor:
    """What a group of numbers comes back as: scale and smallest number are kept in the numbers' dtype, the sums are float32's."""
    dtype, levels = group.dtype, 2**bits - 1
    low = group.float().min()
    scale = (group.float().max() / levels - low / levels).to(dtype).float()
    if scale == 0:
        return low.expand(len(group)).double()
    code = ((group.float() - low) / scale).round().clamp(0, levels)
    return (code * scale + low).double()


def int8_row(row: Tensor) -> Tensor:
    scale = (row.float().abs().max() / 127).to(row.dtype).float()
    return ((row.float() / scale).round().clamp(-127, 127) * scale).double() if scale else torch.zeros(len(row), dtype=torch.float64)


class PlainKivi:
    """One KV head.  `keys`, `values`: what a reader sees of each token, float64, in order."""

    def __init__(self, kivi: Kivi, residual: int | None = None) -> None:
        self.kivi, self.residual = kivi, residual or kivi.residual_tokens
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.exact_keys: list[Tensor] = []
        self.exact_values: list[Tensor] = []

    def append(self, key_D: Tensor, value_E: Tensor) -> None:
        self.exact_keys.append(key_D)
        self.exact_values.append(value_E)
        self.keys.append(key_D.double())
        self.values.append(value_E.double())
        if len(self.exact_keys) == self.residual:
            key_TD = torch.stack(self.exact_keys)
            for start in range(0, self.residual, self.kivi.group):
                block = key_TD[start : start + self.kivi.group]
                back = torch.stack([rounded_group(channel, self.kivi.bits) for channel in block.T], 1)
                first = len(self.keys) - self.residual + start
                self.keys[first : first + self.kivi.group] = list(back)
            self.exact_keys = []
        if len(self.exact_values) > self.residual:
            oldest = self.exact_values.pop(0)
            parts = [rounded_group(part, self.kivi.bits) for part in oldest.split(self.kivi.group)]
            self.values[len(self.values) - self.residual - 1] = torch.cat(parts)
