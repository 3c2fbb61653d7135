"""Whole numbers of few bits, sixteen vectors at a time: how a sketch keeps coordinates, and how the C++ kernel reads them.

Letters: H KV heads, T keys (or runs of them), N blocks of L = 16 keys, U units of a key, C = 16 U slots of coordinates, B = 64 bytes.

A unit of a key has 4 bytes: 8 coordinates of 4 bits (it is fine) or 16 of 2 bits; a fine one leaves its last 8 slots free.  The fine
units of a key come first.  Byte 4 * lane + j of a block's unit holds
   4 bits   coordinate j in its low half, 4 + j in its high half
   2 bits   coordinates j, 4 + j, 8 + j, 12 + j from the lowest bits up
Levels are evenly spaced around 0, one step a coordinate.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from kvcompile.runtime import native_sketch

LANES = 16
FINE_COORDINATES, SLOTS = 8, 16  # of a unit: coordinates at 4 bits; at 2 bits as many as there are slots
_EVEN_STEP = {4: 0.3352, 2: 0.9957}  # best for a normal distribution of unit variance (Max 1960, table II)
_STEP_FACTORS = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.4, 1.6, 2.0)


def pack(level_HTC: Tensor, fine_H: Tensor) -> Tensor:
    """Levels, uint8 [H, T, 16 U] (a fine unit uses its first 8), as codes [H, T / 16, U, 64]."""
    level_HNLUSJ = level_HTC.unflatten(2, (-1, 4, 4)).unflatten(1, (-1, LANES))  # S groups of J = 4 coordinates
    coarse = level_HNLUSJ[..., 0, :] | level_HNLUSJ[..., 1, :] << 2 | level_HNLUSJ[..., 2, :] << 4 | level_HNLUSJ[..., 3, :] << 6
    fine = level_HNLUSJ[..., 0, :] | level_HNLUSJ[..., 1, :] << 4
    codes_HNLUJ = torch.where(_is_fine(fine_H, coarse.shape[3])[:, None, None, :, None], fine, coarse)
    return codes_HNLUJ.transpose(2, 3).flatten(3).contiguous()


def unpack(codes_HNUB: Tensor, fine_H: Tensor) -> Tensor:
    """The levels [H, T, 16 U] that `pack` was given; 0 in the slots that a fine unit leaves free."""
    codes_HNLUJ = codes_HNUB.unflatten(3, (LANES, 4)).transpose(2, 3)
    coarse = torch.stack([codes_HNLUJ >> shift & 3 for shift in (0, 2, 4, 6)], 4)
    fine = torch.stack([codes_HNLUJ & 15, codes_HNLUJ >> 4, torch.zeros_like(codes_HNLUJ), torch.zeros_like(codes_HNLUJ)], 4)
    return torch.where(_is_fine(fine_H, coarse.shape[3])[:, None, None, :, None, None], fine, coarse).flatten(3).flatten(1, 2)


def to_slots(coordinate_HXC: Tensor, fine_H: Tensor, units: int, free: float = 0.0) -> Tensor:
    """Coordinates [H, X, C'] where the units keep them, [H, X, 16 U]; `free` in slots without a coordinate."""
    source_HS = _sources(tuple(fine_H.tolist()), units, coordinate_HXC.shape[2])
    padded_HXC = torch.nn.functional.pad(coordinate_HXC, (0, 1), value=free)
    return padded_HXC.gather(2, source_HS[:, None].expand(-1, coordinate_HXC.shape[1], -1))


@functools.lru_cache(maxsize=256)
def _sources(fine: tuple[int, ...], units: int, coordinates: int) -> Tensor:
    """Which coordinate each slot holds, int64 [H, 16 U]; `coordinates` of a free one."""
    source_HS = torch.full((len(fine), units * SLOTS), coordinates)
    for head, count in enumerate(fine):
        for _, source, place in slots(count, units, coordinates):
            source_HS[head, place] = torch.arange(source.start, source.stop)
    return source_HS


def quantise(coordinate_HTC: Tensor, step_HC: Tensor, fine_H: Tensor) -> Tensor:
    """Levels, uint8, of coordinates that stand in their slots already."""
    top_H1C = (levels(fine_H, step_HC.shape[1] // SLOTS) - 1)[:, None]
    return (coordinate_HTC / step_HC[:, None] + top_H1C / 2).round().clamp(min=torch.zeros(()), max=top_H1C).to(torch.uint8)


def levels(fine_H: Tensor, units: int) -> Tensor:
    """How many levels each slot has, float32 [H, 16 U]; 1 in those that a fine unit leaves free."""
    return _levels(tuple(fine_H.tolist()), units)


@functools.lru_cache(maxsize=256)
def _levels(fine: tuple[int, ...], units: int) -> Tensor:
    free = torch.tensor([16.0] * FINE_COORDINATES + [1.0] * (SLOTS - FINE_COORDINATES))
    return torch.where(_is_fine(torch.tensor(fine), units)[..., None], free, torch.full((SLOTS,), 4.0)).flatten(1)


def slots(fine: int, units: int, coordinates: int) -> Iterator[tuple[int, slice, slice]]:
    """Bits, which coordinates, and the slots where they stand, of each unit; coordinates that do not exist leave slots free."""
    at = 0
    for unit in range(units):
        bits, wide = (4, FINE_COORDINATES) if unit < fine else (2, SLOTS)
        take = min(wide, coordinates - at)
        if take > 0:
            yield bits, slice(at, at + take), slice(unit * SLOTS, unit * SLOTS + take)
        at += take


def steps(sample_HTC: Tensor, weight_HT: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The step of each coordinate with the least weighted mean squared error, and that error, [H, C]."""
    even_HC = sample_HTC.square().mean(1).sqrt().clamp_min(1e-12) * _EVEN_STEP[bits]
    steps_FHC = torch.stack([even_HC * factor for factor in _STEP_FACTORS])
    errors_FHC = (native_sketch.step_errors if native_sketch.ready() else step_errors)(sample_HTC, weight_HT, steps_FHC, bits)
    best_1HC = errors_FHC.argmin(0, keepdim=True)
    return steps_FHC.gather(0, best_1HC)[0], errors_FHC.gather(0, best_1HC)[0]


def step_errors(sample_HTC: Tensor, weight_HT: Tensor, steps_FHC: Tensor, bits: int) -> Tensor:
    """The weighted mean squared error with each of these steps, [F, H, C]."""
    misses = (_rounded(sample_HTC, step_HC, bits) - sample_HTC for step_HC in steps_FHC)
    return torch.stack([(miss_HTC.square() * weight_HT[..., None]).mean(1) for miss_HTC in misses])


def fine_units(power_C: Tensor, errors: Mapping[int, Tensor], units: int) -> int:
    """How many units of 4 bits leave the least squared error; the first of equals.  power_C: of a coordinate that is left out; errors: of
    one that is kept, by its bits."""
    left = []
    for fine in range(units + 1):
        error_C = power_C.clone()
        for bits, source, _ in slots(fine, units, len(power_C)):
            error_C[source] = errors[bits][source]
        left.append(float(error_C.sum()))
    return left.index(min(left))


def _is_fine(fine_H: Tensor, units: int) -> Tensor:
    """bool [H, U]."""
    return torch.arange(units) < fine_H[:, None]


def _rounded(sample_HTC: Tensor, step_HC: Tensor, bits: int) -> Tensor:
    middle = (2**bits - 1) / 2
    step_H1C = step_HC[:, None]
    levels_HTC = (sample_HTC / step_H1C + middle).round().clamp(0, 2 * middle)
    rounded_HTC: Tensor = (levels_HTC - middle) * step_H1C
    return rounded_HTC
