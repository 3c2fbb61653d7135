"""What a sketch's guesses leave out of logits, as the prompt's last queries find it: the biases that estimates need.

Letters: H KV heads, C queries, T keys, X the keys of some runs, R runs of BLOCK_TOKENS keys, D head_dim, N columns of gaps.

A query is asked only about keys before it.  Logarithms are natural.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from kvcompile.ir.indexes import BLOCK_TOKENS
from kvcompile.runtime import native_sketch
from kvcompile.runtime.native_sketch import GapSums, RunSums

QUERIES = 64  # of a KV head, that gaps are measured with
LOW_SHARE = 0.75  # of the runs that are looked at: those of lowest rank, which tell most about the ones below them
_RUNS = 256  # that gaps are measured with, at most; biases are of every run
_LOGITS = 2**24  # at once
_RIDGE = 1e-4  # of the variance, for slopes


class Gap(IntEnum):
    """Columns of gaps_HN.  The near gap is that of keys that are looked at and not read, log-sum-exp of true logits less that of guesses:
    it is near its base + slope x, within bounds, where x is the same difference over the keys that are read.  The far gap is that of runs
    whose keys are not looked at; its x is the difference between keys' and runs' guesses over the lowest runs that are."""

    NEAR_MEAN = 0
    NEAR_BASE = 1
    NEAR_SLOPE = 2
    NEAR_LEAST = 3
    NEAR_MOST = 4
    FAR_MEAN = 5
    FAR_BASE = 6
    FAR_SLOPE = 7
    FAR_LEAST = 8
    FAR_MOST = 9


class Measured(NamedTuple):
    """error_H: standard deviation of a key's guessed logit, over keys."""

    run_bias_HR: Tensor
    gaps_HN: Tensor
    error_H: Tensor


def guess_gap(gaps_HN: Tensor, mean: Gap, x_HC: Tensor) -> Tensor:
    """The gap [H, C] of queries with this x; the mean where there is no x.  mean: the first of the gap's columns."""
    average, base, slope, least, most = gaps_HN[:, mean : mean + 5, None].unbind(1)
    return torch.where(x_HC.isfinite(), (base + slope * x_HC).clamp(least, most), average)


def near_runs(runs: int, scanned: float, k: int) -> int:
    """How many runs are looked at; twice the keys that are wanted at least."""
    return min(runs, max(math.ceil(scanned * runs), -(-2 * k // BLOCK_TOKENS)))


def low_runs(near: int) -> int:
    """How many of the runs that are looked at count as low."""
    return max(1, math.floor(LOW_SHARE * near))


def measure(
    query_HCD: Tensor,
    place_HT: Tensor,
    last_C: Tensor,
    logits: Callable[[Tensor], Tensor],
    scores: Callable[[int], Tensor],
    run_score_HCR: Tensor,
    scanned: float,
    chosen: float,
) -> Measured:
    """Measures biases and gaps with some queries.

    place_HT: int32, the keys of each run, one run behind another.  A query sees the keys up to place last_C.  logits: true ones of some
    queries, of all keys in the order of places.  scores: guesses of all queries, of the keys of every so many runs.
    run_score_HCR: of a run's centre with log(BLOCK_TOKENS).  chosen: share of keys that a query reads.
    """
    heads, tokens = place_HT.shape
    runs = tokens // BLOCK_TOKENS
    stride = -(-runs // _RUNS)
    run_sums = native_sketch.runs if native_sketch.ready() else runs_of
    at_once = max(1, _LOGITS // (heads * tokens))
    parts = [
        run_sums(logits(query_HxD), place_HT, last_x, stride)
        for query_HxD, last_x in zip(query_HCD.split(at_once, 1), last_C.split(at_once), strict=True)
    ]
    sums = parts[0] if len(parts) == 1 else RunSums(*(torch.cat(each, 1) for each in zip(*parts, strict=True)))
    run_score_HCR = run_score_HCR + (sums.seen_HCR / BLOCK_TOKENS).log()  # -inf of a run without a visible key
    run_bias_HR = _mean(sums.log_sum_HCR - run_score_HCR, 1)

    run_HCR = (run_score_HCR + run_bias_HR[:, None])[:, :, ::stride]
    place_HX = place_HT.unflatten(1, (-1, BLOCK_TOKENS))[:, ::stride].flatten(1)
    some = run_HCR.shape[2]
    k = min(max(1, round(chosen * some * BLOCK_TOKENS)), some * BLOCK_TOKENS // 2)  # something is left to measure
    near = near_runs(some, scanned, k)
    gap_sums = native_sketch.gap_sums if native_sketch.ready() else gap_sums_of
    gaps = gap_sums(sums.kept_HCX, scores(stride), run_HCR, place_HX, last_C, near, low_runs(near), k)
    near_gap_HC = gaps.left_true - gaps.left_guess
    near_HC = gaps.read_true - gaps.read_guess
    far_HC = gaps.low_guess + _mean(near_gap_HC, 1)[:, None] - gaps.low_runs
    gaps_HN = torch.cat([_line(near_HC, near_gap_HC), _line(far_HC, gaps.far_true - gaps.far_runs)], 1)
    return Measured(run_bias_HR, gaps_HN, gaps.error.mean(1))


def runs_of(logit_HCT: Tensor, place_HT: Tensor, last_C: Tensor, stride: int) -> RunSums:
    """As native_sketch.runs."""
    true_HCT = logit_HCT.gather(2, place_HT.long()[:, None].expand_as(logit_HCT))
    later_HCT = place_HT[:, None] > last_C[:, None]
    kept_HCX = true_HCT.unflatten(2, (-1, BLOCK_TOKENS))[:, :, ::stride].flatten(2)
    seen_true_HCT = true_HCT.masked_fill(later_HCT, -torch.inf).unflatten(2, (-1, BLOCK_TOKENS))
    seen_HCR = BLOCK_TOKENS - later_HCT.unflatten(2, (-1, BLOCK_TOKENS)).sum(3)
    return RunSums(seen_true_HCT.logsumexp(3), seen_HCR.float(), kept_HCX)


def gap_sums_of(
    true_HCX: Tensor, guess_HCX: Tensor, run_HCR: Tensor, place_HX: Tensor, last_C: Tensor, near: int, low: int, k: int
) -> GapSums:
    """As native_sketch.gap_sums."""
    error_HC = (true_HCX - guess_HCX).std(2)
    later_HCX = place_HX[:, None] > last_C[:, None]
    true_HCX, guess_HCX = (each.masked_fill(later_HCX, -torch.inf) for each in (true_HCX, guess_HCX))
    ranked_HCR = run_HCR.sort(dim=2, descending=True, stable=True).indices
    is_near, is_low = (torch.zeros_like(run_HCR, dtype=torch.bool) for _ in range(2))
    is_near.scatter_(2, ranked_HCR[..., :near], True)
    is_low.scatter_(2, ranked_HCR[..., near - low : near], True)
    near_key, low_key = (each.repeat_interleave(BLOCK_TOKENS, 2) for each in (is_near, is_low))
    read = torch.zeros_like(near_key).scatter_(2, guess_HCX.masked_fill(~near_key, -torch.inf).topk(k, 2).indices, True) & near_key
    left = near_key & ~read
    return GapSums(
        _log_sum(true_HCX, left),
        _log_sum(guess_HCX, left),
        _log_sum(true_HCX, read),
        _log_sum(guess_HCX, read),
        _log_sum(true_HCX, ~near_key),
        _log_sum(run_HCR, ~is_near),
        _log_sum(guess_HCX, low_key),
        _log_sum(run_HCR, is_low),
        error_HC,
    )


def _line(x_HC: Tensor, gap_HC: Tensor) -> Tensor:
    """Mean, base, slope and bounds of what is measured: [H, 5]; zeros of nothing."""
    seen_HC = x_HC.isfinite() & gap_HC.isfinite()
    x_HC, gap_HC = (torch.where(seen_HC, each, torch.nan) for each in (x_HC, gap_HC))
    x_H1, gap_H1 = _mean(x_HC, 1)[:, None], _mean(gap_HC, 1)[:, None]
    spread_HC, gap_spread_HC = ((each - mean).nan_to_num(0.0) for each, mean in ((x_HC, x_H1), (gap_HC, gap_H1)))
    count_H = seen_HC.sum(1)
    slope_H = (spread_HC * gap_spread_HC).sum(1) / (spread_HC.square().sum(1) + _RIDGE * count_H).clamp_min(1e-12)
    most_H, least_H = ((sign * (sign * gap_HC).nan_to_num(-torch.inf).amax(1)) for sign in (1, -1))
    least_H, most_H = (torch.where(count_H > 0, each, 0.0) for each in (least_H, most_H))
    gap_H, x_H = gap_H1[:, 0], x_H1[:, 0]
    return torch.stack([gap_H, gap_H - slope_H * x_H, slope_H, least_H, most_H], 1)


def _log_sum(logit: Tensor, of: Tensor) -> Tensor:
    return logit.masked_fill(~of, -torch.inf).logsumexp(2)


def _mean(x: Tensor, dim: int) -> Tensor:
    """The mean of finite numbers; 0 of none."""
    finite = x.isfinite()
    return torch.where(finite, x, 0.0).sum(dim) / finite.sum(dim).clamp_min(1)
