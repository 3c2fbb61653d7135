"""The parts of making a sketch that have a C++ operator (codegen/cpp/sketch_build.cpp), where the launcher is loaded.

Each does what a function in torch does, which serves where there is no launcher and is the oracle of the tests: `order` balanced_order
(another tree of the same kind), `rows` quantise, pack and the means of runs, `levels` unpack, `step_errors` that of
sketch_codes.py, `runs` and `gap_sums` those of sketch_gaps.py.

Letters: H KV heads, T keys, R runs of BLOCK_TOKENS of them, P dimensions that runs are formed in, C queries or coordinates, E value_dim,
N blocks of 16 keys, U units of a key, S = 16 U slots, F factors, B = 64 bytes, X keys of some runs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvcompile.ir.indexes import BLOCK_TOKENS

_LANES, _UNIT_BYTES, _SLOTS = 16, 64, 16


class NativeRows(NamedTuple):
    codes_HNUB: Tensor
    centre_HRC: Tensor
    mean_HRE: Tensor
    mean_scale_HR: Tensor


class RunSums(NamedTuple):
    """log_sum_HCR: of each run's logits that a query sees; seen_HCR: how many these are, float32; kept_HCX: the logits of the keys of
    every so many runs, whether seen or not."""

    log_sum_HCR: Tensor
    seen_HCR: Tensor
    kept_HCX: Tensor


class GapSums(NamedTuple):
    """Log-sums over keys that are looked at and not read, read, not looked at, and the lowest that are looked at, of true logits and of
    guesses; and the standard deviation of the errors of all guesses, of keys that a query does not see too.  All [H, C]."""

    left_true: Tensor
    left_guess: Tensor
    read_true: Tensor
    read_guess: Tensor
    far_true: Tensor
    far_runs: Tensor
    low_guess: Tensor
    low_runs: Tensor
    error: Tensor


def ready() -> bool:
    """Whether the launcher is loaded."""
    return hasattr(torch.ops.kvc_native, "sketch_rows")


def order(points_HTP: Tensor) -> Tensor:
    """int32 [H, T]."""
    order_HT = torch.empty(points_HTP.shape[:2], dtype=torch.int32)
    torch.ops.kvc_native.sketch_order.default(points_HTP.contiguous(), order_HT)
    return order_HT


def rows(coordinate_HTC: Tensor, value_HTE: Tensor, order_HT: Tensor, step_HS: Tensor, fine_H: Tensor) -> NativeRows:
    """What is kept of float32 keys in this order."""
    heads, tokens, coordinates = coordinate_HTC.shape
    runs, value_dim = tokens // BLOCK_TOKENS, value_HTE.shape[2]
    made = NativeRows(
        torch.empty(heads, tokens // _LANES, step_HS.shape[1] // _SLOTS, _UNIT_BYTES, dtype=torch.uint8),
        torch.empty(heads, runs, coordinates),
        torch.empty(heads, runs, value_dim, dtype=torch.int8),
        torch.empty(heads, runs),
    )
    torch.ops.kvc_native.sketch_rows.default(coordinate_HTC.contiguous(), value_HTE.contiguous(), order_HT, step_HS, fine_H, *made)
    return made


def levels(codes_HNUB: Tensor, fine_H: Tensor) -> Tensor:
    """float32 [H, T, S]."""
    heads, blocks, units, _ = codes_HNUB.shape
    level_HTS = torch.empty(heads, blocks * _LANES, units * _SLOTS)
    torch.ops.kvc_native.sketch_levels.default(codes_HNUB.contiguous(), fine_H, level_HTS)
    return level_HTS


def step_errors(sample_HTC: Tensor, weight_HT: Tensor, steps_FHC: Tensor, bits: int) -> Tensor:
    """[F, H, C]."""
    errors_FHC = torch.empty_like(steps_FHC)
    torch.ops.kvc_native.sketch_step_errors.default(sample_HTC.contiguous(), weight_HT.contiguous(), steps_FHC, bits, errors_FHC)
    return errors_FHC


def runs(logit_HCT: Tensor, place_HT: Tensor, last_C: Tensor, stride: int) -> RunSums:
    """logit_HCT: in the order of positions; place_HT int32: the keys of the runs, one behind another.  A query sees the keys up to place
    last_C; every stride-th run's logits are kept."""
    heads, queries, tokens = logit_HCT.shape
    count = tokens // BLOCK_TOKENS
    made = RunSums(
        torch.empty(heads, queries, count),
        torch.empty(heads, queries, count),
        torch.empty(heads, queries, -(-count // stride) * BLOCK_TOKENS),
    )
    torch.ops.kvc_native.sketch_runs.default(logit_HCT.contiguous(), place_HT, last_C, stride, *made)
    return made


def gap_sums(
    true_HCX: Tensor, guess_HCX: Tensor, run_HCR: Tensor, place_HX: Tensor, last_C: Tensor, near: int, low: int, k: int
) -> GapSums:
    """Of the runs [H, C, R] that have the keys X: as if the `near` best were looked at, and the k best of their keys read."""
    sums_HCN = torch.empty(*run_HCR.shape[:2], len(GapSums._fields))
    given = (each.contiguous() for each in (true_HCX, guess_HCX, run_HCR, place_HX))
    torch.ops.kvc_native.sketch_gaps.default(*given, last_C, near, low, k, sums_HCN)
    return GapSums(*sums_HCN.unbind(2))
