"""What every kind of index asks of tensors and numbers that come from a file, before it believes them.

All raise ValueError, or KeyError for what is missing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kvcompile.ir.indexes import BLOCK_TOKENS

MOST_TOKENS = 1 << 31  # positions stand in int32


def whole(numbers: Mapping[str, Any], name: str, least: int = 0, most: int = MOST_TOKENS) -> int:
    """A whole number from `least` to `most`."""
    number = numbers[name]
    if type(number) is not int or not least <= number <= most:
        raise ValueError(f"{name} is {number!r}, no number from {least} to {most}")
    return number


def share(numbers: Mapping[str, Any], name: str, most: float = 1.0) -> float:
    """A number from 0 to `most`."""
    number = numbers[name]
    if type(number) not in (int, float) or not 0 <= number <= most:  # not of NaN
        raise ValueError(f"{name} is {number!r}, no number from 0 to {most:g}")
    return float(number)


def soft_cap(numbers: Mapping[str, Any]) -> float | None:
    cap = numbers["soft_cap"]
    if cap is not None and (type(cap) not in (int, float) or not 0 < cap < math.inf):
        raise ValueError(f"soft_cap is {cap!r}")
    return None if cap is None else float(cap)


def notes(numbers: Mapping[str, Any]) -> tuple[str, ...]:
    found = numbers["notes"]
    if not isinstance(found, list) or not all(isinstance(note, str) for note in found):
        raise ValueError("its notes are no texts")
    return tuple(found)


def borders(numbers: Mapping[str, Any]) -> tuple[int, int]:
    """`first` and `end` of what it covers."""
    first = whole(numbers, "first")
    end = whole(numbers, "end", first)
    if (end - first) % BLOCK_TOKENS:
        raise ValueError(f"it covers {end - first} tokens, no multiple of {BLOCK_TOKENS}")
    return first, end


def shaped(tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype | None, *shape: int | None) -> Tensor:
    """A tensor of this dtype (None: any kept in full precision) and shape (None: any size), of finite numbers."""
    tensor = tensors[name]
    known = tensor.dtype == dtype if dtype is not None else tensor.is_floating_point()
    if not known or tensor.dim() != len(shape) or any(want not in (None, size) for want, size in zip(shape, tensor.shape, strict=True)):
        wanted = " x ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, not {dtype or 'of floating point'} {wanted}")
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise ValueError(f"{name} holds what is no number")
    return tensor


def permuted(name: str, position_HT: Tensor, first: int) -> None:
    """Every position from `first` on stands once in each head's row."""
    heads, tokens = position_HT.shape
    if not torch.equal(position_HT.long().sort(1).values, torch.arange(first, first + tokens).expand(heads, tokens)):
        raise ValueError(f"{name} does not hold each position from {first} to {first + tokens - 1} once")
