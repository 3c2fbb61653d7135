"""What a sketch's guesses leave out of logits, as the prompt's last queries find it: the biases that estimates need.

Letters: H KV heads, C queries, T keys, R runs of BLOCK_TOKENS keys, D head_dim, N columns of gaps.

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
from kvcompile.runtime.indexes.index import RecentQueries

QUERIES = 64  # of a KV head, that gaps are measured with
LOW_SHARE = 0.75  # of the runs that are looked at: those of lowest rank, which tell most about the ones below them
_RUNS_AT_ONCE = 256
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
    recent: RecentQueries,
    position_HT: Tensor,
    logits: Callable[[Tensor, slice], Tensor],
    scores: Callable[[Tensor, slice], Tensor],
    run_score_HCR: Tensor,
    scanned: float,
    chosen: float,
) -> Measured:
    """Measures biases and gaps with queries behind the first key; without any they are 0.

    position_HT: of keys in the order of runs.  logits, scores: true ones, and guesses, of some queries for the keys of some runs.
    run_score_HCR: of a run's centre with log(BLOCK_TOKENS), for all of `recent`.  chosen: share of keys that a query reads.
    """
    heads, runs = len(position_HT), position_HT.shape[1] // BLOCK_TOKENS
    stride = -(-runs // _RUNS_AT_ONCE)
    query_HCD = recent.query_HCD
    if recent.count == 0:
        return Measured(torch.zeros(heads, runs), torch.zeros(heads, len(Gap)), torch.zeros(heads))
    later = _later(recent, position_HT)
    visible_HCR = BLOCK_TOKENS - later.unflatten(2, (-1, BLOCK_TOKENS)).sum(3)
    run_score_HCR = run_score_HCR + (visible_HCR / BLOCK_TOKENS).log()  # -inf of a run without a visible key
    biases = []
    for first in range(0, runs, _RUNS_AT_ONCE):
        part = slice(first, min(runs, first + _RUNS_AT_ONCE))
        true_HCT = logits(query_HCD, part).masked_fill_(later[:, :, first * BLOCK_TOKENS : part.stop * BLOCK_TOKENS], -torch.inf)
        true_HCR = true_HCT.unflatten(2, (-1, BLOCK_TOKENS)).logsumexp(3)
        biases.append(_mean(true_HCR - run_score_HCR[:, :, part], 1))
    run_bias_HR = torch.cat(biases, 1)

    some = slice(0, runs, stride)
    later = later.unflatten(2, (-1, BLOCK_TOKENS))[:, :, some].flatten(2)
    true_HCT = logits(query_HCD, some)
    guess_HCT = scores(query_HCD, some)
    error_H = (true_HCT - guess_HCT).std(2).mean(1)
    true_HCT, guess_HCT = true_HCT.masked_fill_(later, -torch.inf), guess_HCT.masked_fill_(later, -torch.inf)
    run_HCR = (run_score_HCR + run_bias_HR[:, None])[:, :, some]
    gaps_HN = _gaps(true_HCT, guess_HCT, run_HCR, scanned, chosen)
    return Measured(run_bias_HR, gaps_HN, error_H)


def _gaps(true_HCT: Tensor, guess_HCT: Tensor, run_HCR: Tensor, scanned: float, chosen: float) -> Tensor:
    runs = run_HCR.shape[2]
    k = min(max(1, round(chosen * runs * BLOCK_TOKENS)), runs * BLOCK_TOKENS)
    near = near_runs(runs, scanned, k)
    ranked_HCR = run_HCR.argsort(2, descending=True)
    is_near, is_low = (torch.zeros_like(run_HCR, dtype=torch.bool) for _ in range(2))
    is_near.scatter_(2, ranked_HCR[..., :near], True)
    is_low.scatter_(2, ranked_HCR[..., near - low_runs(near) : near], True)
    near_key, low_key = (each.repeat_interleave(BLOCK_TOKENS, 2) for each in (is_near, is_low))
    near_guess_HCT = guess_HCT.masked_fill(~near_key, -torch.inf)
    read = torch.zeros_like(near_key).scatter_(2, near_guess_HCT.topk(k, 2).indices, True) & near_key
    left = near_key & ~read

    near_gap_HC = _log_sum(true_HCT, left) - _log_sum(guess_HCT, left)
    near_HC = _log_sum(true_HCT, read) - _log_sum(guess_HCT, read)
    near_mean_H1 = _mean(near_gap_HC, 1)[:, None]
    far_gap_HC = _log_sum(true_HCT, ~near_key) - _log_sum(run_HCR, ~is_near)
    far_HC = _log_sum(guess_HCT, low_key) + near_mean_H1 - _log_sum(run_HCR, is_low)
    return torch.cat([_line(near_HC, near_gap_HC), _line(far_HC, far_gap_HC)], 1)


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


def _later(recent: RecentQueries, position_HT: Tensor) -> Tensor:
    """Which keys come after which query, bool [H, C, T]."""
    return position_HT[:, None] > recent.position_C[:, None]


def _log_sum(logit: Tensor, of: Tensor) -> Tensor:
    return logit.masked_fill(~of, -torch.inf).logsumexp(2)


def _mean(x: Tensor, dim: int) -> Tensor:
    """The mean of finite numbers; 0 of none."""
    finite = x.isfinite()
    return torch.where(finite, x, 0.0).sum(dim) / finite.sum(dim).clamp_min(1)
