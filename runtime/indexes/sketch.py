"""The index `sketch`: a few bytes a key that say, for any query like the prompt's, how large the logit will be.

Letters: H KV heads, G queries per KV head, T keys, R runs of BLOCK_TOKENS keys, S sixteens of runs, C coordinates, D head_dim, E value_dim.

The method (docs/sketch.md derives it and says where it fails):
1. Keys are centred: a shift of all logits changes no softmax.
2. With S S' the second moment of the prompt's queries, a logit is (S^-1 q) . (S' k).  The leading principal directions of S' k are what the
   prompt's queries can tell keys apart by (sketch_basis.py).
3. A key keeps `units` units of 4 bytes: 8 coordinates of 4 bits or 16 of 2 bits each, leading coordinates first; how many are of 4 bits is
   chosen per KV head by the squared error that is left (sketch_codes.py).
4. Keys are kept in an order whose runs of BLOCK_TOKENS have similar coordinates and similar values (balanced.py).  A run keeps its mean
   coordinates at 4 bits and the mean of its values in 8 (sketch_rows.py).
5. A query ranks the runs by their centres and looks at the keys of the best `scanned` of them only; query heads that share a KV head look
   at the same runs.
6. What is not read is estimated: a key that was looked at weighs exp(score + gap), a run that was not exp(its centre's score + gap), each
   times the mean of the values around it.  Gaps are what scores leave out of logits, guessed for each query from what it can see of
   them (sketch_gaps.py).

Keys that are added later are looked at by every query, until the index is made anew.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvcompile.ir.indexes import BLOCK_TOKENS, RUN_AXES, RUNS_TOGETHER, SketchFacts
from kvcompile.ir.policy import Select
from kvcompile.runtime import native_sketch
from kvcompile.runtime.indexes.index import Borrowed, Found, Keys, Prompt, RecentQueries
from kvcompile.runtime.indexes.restoring import MOST_TOKENS, borders, notes, permuted, shaped, share, soft_cap, whole
from kvcompile.runtime.indexes.select import select_keys
from kvcompile.runtime.indexes.sketch_basis import Basis, fit_basis
from kvcompile.runtime.indexes.sketch_codes import LANES, SLOTS, levels, to_slots, unpack
from kvcompile.runtime.indexes.sketch_gaps import QUERIES, Gap, Measured, guess_gap, low_runs, measure, near_runs
from kvcompile.runtime.indexes.sketch_rows import Centres, Rows, encode, encode_all
from kvcompile.runtime.merge import AttentionState, merge_states

_DRIFT = 1.5  # so many times the error of the prompt's queries, and the basis no longer fits
_KEYS_AT_ONCE = 16384  # of which the true logits are computed
MOST_UNITS = 64  # of a key, that kernels have room for (kMaxUnits)
_SMALL_ERROR = 0.05  # nats: an error below it is as good as none


class Ranked(NamedTuple):
    """What a query learns of the runs of the first part: score_HGR with biases; which are looked at, and which of these are low, [H, R]."""

    score_HGR: Tensor
    near_HR: Tensor
    low_HR: Tensor


class SketchIndex:
    """The sketch of one group of KV heads in one session.  `build_sketch` and `restore_sketch` make one.

    parts: the keys that were there when it was made, put in order together, whose runs have `centres`; and those added since, if any,
    batch after batch.  batch_ends: tokens of the second part at the end of each batch, each put in order by itself.
    gaps_HN: columns of Gap.  error_H: of a key's logit, with the prompt's queries.  scanned: share of runs whose keys are looked at.
    chosen: share of keys that a query reads.
    """

    def __init__(
        self,
        first: int,
        basis: Basis,
        soft_cap: float | None,
        notes: tuple[str, ...],
        scanned: float,
        chosen: float,
        parts: tuple[Rows, ...],
        centres: Centres,
        gaps_HN: Tensor,
        error_H: Tensor,
        batch_ends: tuple[int, ...] = (),
    ) -> None:
        self.basis = basis
        self.parts = parts
        self.centres = centres
        self.gaps_HN = gaps_HN
        self.error_H = error_H
        self.soft_cap = soft_cap
        self.scanned = scanned
        self.chosen = chosen
        self.batch_ends = batch_ends
        self._first = first
        self._notes = notes
        self._borrowed = Borrowed()

    @property
    def shape(self) -> tuple[int, int, int | None]:
        return *self.basis.centre_HD.shape, self.basis.value_centre_HE.shape[1]

    @property
    def first(self) -> int:
        return self._first

    @property
    def end(self) -> int:
        return self._first + sum(part.tokens for part in self.parts)

    @property
    def notes(self) -> tuple[str, ...]:
        return self._notes

    def add(self, key_HTD: Tensor, value_HTE: Tensor) -> None:
        new = encode(self.basis, self.end, key_HTD.float(), value_HTE.float())
        self.parts = (self.parts[0], self.parts[1].followed_by(new) if len(self.parts) > 1 else new)
        self.batch_ends += (self.parts[1].tokens,)

    def search(self, query_HGD: Tensor, k: int, select: Select, keys: Keys) -> Found:
        """As KeyIndex; the keys themselves are not looked at."""
        score_HGT = self.scores(query_HGD, k)
        chosen_HGK = select_keys(score_HGT, k, select)
        return Found(torch.where(chosen_HGK >= 0, chosen_HGK + self._first, -1), k, score_HGT)

    def scores(self, query_HGD: Tensor, k: int) -> Tensor:
        """The guess of the logit of every key that is looked at, -inf of the others: float32 [H, G, T], in the order of positions."""
        near_HR = self.rank(query_HGD, k).near_HR
        logit_HGT = self._row_scores(query_HGD, self.parts)
        base = self.parts[0].tokens
        logit_HGT[..., :base].masked_fill_(~near_HR.repeat_interleave(BLOCK_TOKENS, 1)[:, None], -torch.inf)
        return torch.empty_like(logit_HGT).scatter_(2, self._places()[:, None].expand_as(logit_HGT), logit_HGT)

    def rank(self, query_HGD: Tensor, k: int) -> Ranked:
        """Which runs of the first part are looked at: those with the largest softmax weight for one of the group's queries; of equal ones
        the earlier."""
        score_HGR = self._run_scores(query_HGD) + self.centres.bias_HR[:, None]
        rank_HR = (score_HGR - score_HGR.logsumexp(2, keepdim=True)).amax(1)
        near = near_runs(self.parts[0].runs, self.scanned, k)
        order_HR = rank_HR.sort(dim=1, descending=True, stable=True).indices
        near_HR, low_HR = (torch.zeros(rank_HR.shape, dtype=torch.bool) for _ in range(2))
        near_HR.scatter_(1, order_HR[:, :near], True)
        low_HR.scatter_(1, order_HR[:, near - low_runs(near) : near], True)
        return Ranked(score_HGR, near_HR, low_HR)

    def rest(self, query_HGD: Tensor, found: Found, read_lse_HG: Tensor) -> AttentionState:
        assert found.score_HGT is not None
        k = found.k
        base = self.parts[0].tokens
        ranked = self.rank(query_HGD, k)
        places_HT = self._places()
        place_HGK = found.position_HGK - self._first
        place_HGK = torch.where(place_HGK >= 0, place_HGK, place_HGK[..., :1])
        read_HGT = torch.zeros_like(found.score_HGT, dtype=torch.bool).scatter_(2, place_HGK, True)
        score_HGT, read_HGT = (each.gather(2, places_HT[:, None].expand_as(each)) for each in (found.score_HGT, read_HGT))
        x_HG = read_lse_HG - score_HGT.masked_fill(~read_HGT, -torch.inf).logsumexp(2)
        near_gap_HG = guess_gap(self.gaps_HN, Gap.NEAR_MEAN, x_HG)
        near = _weighed(score_HGT.masked_fill(read_HGT, -torch.inf) + near_gap_HG[..., None], self._means())

        low_HT = ranked.low_HR.repeat_interleave(BLOCK_TOKENS, 1)
        low_lse_HG = score_HGT[..., :base].masked_fill(~low_HT[:, None], -torch.inf).logsumexp(2)
        low_run_HG = ranked.score_HGR.masked_fill(~ranked.low_HR[:, None], -torch.inf).logsumexp(2)
        x_HG = low_lse_HG + self.gaps_HN[:, Gap.NEAR_MEAN, None] - low_run_HG
        far_gap_HG = guess_gap(self.gaps_HN, Gap.FAR_MEAN, x_HG)
        far_HGR = ranked.score_HGR.masked_fill(ranked.near_HR[:, None], -torch.inf) + far_gap_HG[..., None]
        far_HGR = torch.nn.functional.pad(far_HGR, (0, -far_HGR.shape[2] % RUNS_TOGETHER), value=-torch.inf)
        mean_HSE = self.centres.mean_HSE.float() * self.centres.mean_scale_HS[..., None]
        return merge_states(near, _weighed(far_HGR, mean_HSE))

    def recalibrate(self, recent: RecentQueries, keys: Keys, k: int) -> bool:
        """Measures biases and gaps anew; False where the error is _DRIFT times that of the prompt's queries, or more, on some KV head, and
        where more keys were added than it was made from."""
        if len(self.parts) > 1 and self.parts[1].tokens > self.parts[0].tokens:
            return False
        self.chosen = k / (self.end - self.first)
        spans = keys(self.first, self.first + self.parts[0].tokens)
        error_H = self.calibrate(recent, spans[0].key_HTD if len(spans) == 1 else torch.cat([span.key_HTD for span in spans], 1))
        return error_H is None or bool((error_H <= _DRIFT * self.error_H.clamp_min(_SMALL_ERROR)).all())

    def calibrate(self, recent: RecentQueries, key_HTD: Tensor) -> Tensor | None:
        """Measures biases and gaps; returns the error of guessed logits, or None without a query, and then nothing changes.  key_HTD: of
        the first part, in the order of positions."""
        measured = self._measured(recent, key_HTD)
        if measured is None:
            return None
        self.gaps_HN, self.centres = measured.gaps_HN, replace(self.centres, bias_HR=measured.run_bias_HR)
        return measured.error_H

    def _measured(self, recent: RecentQueries, key_HTD: Tensor) -> Measured | None:
        rows = self.parts[0]
        recent = recent.thinned(QUERIES).behind(self._first + rows.tokens // 2)
        if recent.count == 0:
            return None

        def logits(query_HCD: Tensor) -> Tensor:
            logit_HCT = torch.empty(*query_HCD.shape[:2], rows.tokens)
            for first in range(0, rows.tokens, _KEYS_AT_ONCE):
                part = slice(first, first + _KEYS_AT_ONCE)
                torch.matmul(query_HCD, key_HTD[:, part].float().transpose(1, 2), out=logit_HCT[..., part])
            return self._capped(logit_HCT)

        def scores(stride: int) -> Tensor:
            return self._row_scores(recent.query_HCD, (rows.every(stride),))

        run_score_HCR = self._run_scores(recent.query_HCD)
        place_HT, last_C = rows.position_HT - self._first, recent.position_C - self._first
        return measure(recent.query_HCD, place_HT, last_C, logits, scores, run_score_HCR, self.scanned, self.chosen)

    def rollback(self, end: int) -> None:
        """As KeyIndex; a batch that reaches beyond `end` is forgotten whole, and what was there when the index was made stays: their
        order forgets which came last."""
        kept = end - self._first - self.parts[0].tokens
        if self.batch_ends and kept < self.batch_ends[-1]:
            self.batch_ends = tuple(batch_end for batch_end in self.batch_ends if batch_end <= kept)
            self.parts = (self.parts[0], self.parts[1].cut(self.batch_ends[-1])) if self.batch_ends else self.parts[:1]

    def fork(self) -> SketchIndex:
        more = (self.parts, self.centres, self.gaps_HN, self.error_H, self.batch_ends)
        child = SketchIndex(self._first, self.basis, self.soft_cap, self._notes, self.scanned, self.chosen, *more)
        child._borrowed = Borrowed(child._held())
        return child

    def nbytes(self) -> int:
        return sum(each.nbytes for each in self._held())

    def borrowed_nbytes(self) -> int:
        return self._borrowed.nbytes(self._held())

    def _held(self) -> list[Tensor]:
        of_parts = [tensor for each in (self.basis, self.centres, *self.parts) for tensor in vars(each).values()]
        return [*of_parts, self.gaps_HN, self.error_H]

    def scanned_bytes(self, tail: bool, k: int) -> int:
        """As KeyIndex."""
        rows, centres = self.parts[0], self.centres
        near = near_runs(rows.runs, self.scanned, k)
        looked = [(rows, near / rows.runs), *((part, 1.0) for part in self.parts[1:])]
        total = self.basis.search_nbytes() + self.gaps_HN.nbytes + sum(share * part.codes_HNUB.nbytes for part, share in looked)
        if near < rows.runs:
            total += centres.codes_HSUB.nbytes + centres.bias_HR.nbytes
            total += centres.mean_HSE.nbytes + centres.mean_scale_HS.nbytes if tail else 0
        if tail:
            total += sum(share * (part.mean_HRE.nbytes + part.mean_scale_HR.nbytes) for part, share in looked)
        return math.ceil(total)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {**vars(self.basis), **{f"centres.{name}": tensor for name, tensor in vars(self.centres).items()}}
        tensors |= {"gaps_HN": self.gaps_HN, "error_H": self.error_H}
        for number, part in enumerate(self.parts):
            tensors |= {f"{name}.{number}": tensor for name, tensor in vars(part).items()}
        numbers = {
            "first": self._first,
            "soft_cap": self.soft_cap,
            "notes": list(self._notes),
            "scanned": self.scanned,
            "chosen": self.chosen,
            "batch_ends": list(self.batch_ends),
        }
        return {name: tensor.contiguous() for name, tensor in tensors.items()}, numbers

    def _places(self) -> Tensor:
        """Of each row its key's number, int64 [H, T]."""
        return torch.cat([part.position_HT for part in self.parts], 1).long() - self._first

    def _means(self) -> Tensor:
        return torch.cat([part.mean_HRE.float() * part.mean_scale_HR[..., None] for part in self.parts], 1)

    def _row_scores(self, query_HGD: Tensor, parts: tuple[Rows, ...]) -> Tensor:
        """The guess of the logit of each row."""
        return self._scores(query_HGD, [part.codes_HNUB for part in parts], self.basis.step_HS, self.basis.fine_H)

    def _run_scores(self, query_HGD: Tensor) -> Tensor:
        """The guess of each run's log-sum-exp before its bias: as if all its keys were at its centre."""
        basis, runs = self.basis, self.parts[0].runs
        score_HGR = self._scores(query_HGD, [self.centres.codes_HSUB], basis.run_step_HS, basis.run_fine_H)[..., :runs]
        return score_HGR + math.log(BLOCK_TOKENS)

    def _scores(self, query_HGD: Tensor, codes: list[Tensor], step_HS: Tensor, fine_H: Tensor) -> Tensor:
        """Logits guessed from codes.

        A query's coordinates are rounded to 8 bits, one scale a query, as the kernel does: products and sums are then whole numbers.
        """
        basis, query_HGD, units = self.basis, query_HGD.float(), step_HS.shape[1] // SLOTS
        query_HGS = to_slots(basis.query_coordinates(query_HGD), fine_H, units) * step_HS[:, None]
        scale_HG1 = (query_HGS.abs().amax(2, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        whole_HGS = (query_HGS / scale_HG1).round()
        unpacked = native_sketch.levels if native_sketch.ready() else unpack
        parts = [unpacked(each, fine_H).float() for each in codes]
        level_HTS = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        middle_HS1 = (levels(fine_H, units) - 1)[..., None] / 2
        logit_HGT = (whole_HGS @ level_HTS.transpose(1, 2)).sub_(whole_HGS @ middle_HS1).mul_(scale_HG1)
        return self._capped(logit_HGT.add_(query_HGD @ basis.centre_HD[..., None]))

    def _capped(self, logit_HGT: Tensor) -> Tensor:
        return logit_HGT if self.soft_cap is None else self.soft_cap * torch.tanh(logit_HGT / self.soft_cap)


def _weighed(score_HGX: Tensor, mean_HYE: Tensor) -> AttentionState:
    """Attention by scores to mean values, each of which stands for as many of them; the empty state where all are -inf."""
    peak_HG1 = score_HGX.amax(2, keepdim=True)
    seen_HG1 = peak_HG1 > -torch.inf
    weight_HGY = torch.where(seen_HG1, torch.exp(score_HGX - peak_HG1), 0.0).unflatten(2, (mean_HYE.shape[1], -1)).sum(3)
    total_HG1 = weight_HGY.sum(2, keepdim=True)
    out_HGE = torch.where(seen_HG1, weight_HGY @ mean_HYE / total_HG1, 0.0)
    return AttentionState(out_HGE, torch.where(seen_HG1, peak_HG1 + total_HG1.log(), -torch.inf).squeeze(2))


def build_sketch(first: int, prompt: Prompt, units: int, run_units: int, scanned: float) -> SketchIndex:
    """A sketch of the prompt's keys, whose first has position `first`; T is a multiple of BLOCK_TOKENS, at least one block."""
    key_HTD, value_HTE = prompt.key_HTD.float(), prompt.value_HTE.float()
    heads, tokens, _ = key_HTD.shape
    assert tokens and tokens % BLOCK_TOKENS == 0, key_HTD.shape
    basis, notes = fit_basis(first, key_HTD, value_HTE, prompt, units, run_units)
    basis, rows, centres = encode_all(basis, first, key_HTD, value_HTE)
    gaps_HN, error_H = torch.zeros(heads, len(Gap)), torch.zeros(heads)
    index = SketchIndex(first, basis, prompt.soft_cap, notes, scanned, prompt.k / tokens, (rows,), centres, gaps_HN, error_H)
    measured_H = index.calibrate(prompt.recent, key_HTD)
    if measured_H is not None:
        index.error_H = measured_H
    return index


def restore_sketch(tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> SketchIndex:
    """What `SketchIndex.state` gave; kernels read all of it, so every size, position and level is looked at."""
    basis = _checked_basis(tensors)
    (heads, _), value_dim = basis.centre_HD.shape, basis.value_centre_HE.shape[1]
    first, ends = whole(numbers, "first"), numbers["batch_ends"]
    parts: list[Rows] = []
    for number in range(2 if ends else 1):
        position_HT = shaped(tensors, f"position_HT.{number}", torch.int32, heads, None)
        tokens = position_HT.shape[1]
        at = first + sum(part.tokens for part in parts)
        borders({"first": at, "end": at + tokens})
        permuted(f"position_HT.{number}", position_HT, at)
        rows = Rows(
            shaped(tensors, f"codes_HNUB.{number}", torch.uint8, heads, tokens // LANES, basis.units, 4 * LANES),
            position_HT,
            shaped(tensors, f"mean_HRE.{number}", torch.int8, heads, tokens // BLOCK_TOKENS, value_dim),
            shaped(tensors, f"mean_scale_HR.{number}", torch.float32, heads, tokens // BLOCK_TOKENS),
        )
        if not tokens:
            raise ValueError("a part has no key")
        parts.append(rows)
    increasing = all(type(end) is int and end % BLOCK_TOKENS == 0 for end in ends) and sorted({0, *ends}) == [0, *ends]
    if not increasing or (ends and ends[-1] != parts[1].tokens):
        raise ValueError(f"its batches end at {ends}")
    runs = parts[0].runs
    together = -(-runs // RUNS_TOGETHER)
    centres = Centres(
        shaped(tensors, "centres.codes_HSUB", torch.uint8, heads, together * RUNS_TOGETHER // LANES, basis.run_units, 4 * LANES),
        shaped(tensors, "centres.bias_HR", torch.float32, heads, runs),
        shaped(tensors, "centres.mean_HSE", torch.int8, heads, together, value_dim),
        shaped(tensors, "centres.mean_scale_HS", torch.float32, heads, together),
    )
    gaps_HN, error_H = shaped(tensors, "gaps_HN", torch.float32, heads, len(Gap)), shaped(tensors, "error_H", torch.float32, heads)
    shares = share(numbers, "scanned"), share(numbers, "chosen", MOST_TOKENS)
    return SketchIndex(first, basis, soft_cap(numbers), notes(numbers), *shares, tuple(parts), centres, gaps_HN, error_H, tuple(ends))


def _checked_basis(tensors: Mapping[str, Tensor]) -> Basis:
    key_HDC = shaped(tensors, "key_HDC", torch.float32, None, None, None)
    heads, head_dim, coordinates = key_HDC.shape
    value_axes_HEP = shaped(tensors, "value_axes_HEP", torch.float32, heads, None, RUN_AXES)
    step_HS, run_step_HS = (shaped(tensors, name, torch.float32, heads, None) for name in ("step_HS", "run_step_HS"))
    fine_H = shaped(tensors, "fine_H", torch.int64, heads)
    slots = [step_HS.shape[1], run_step_HS.shape[1], coordinates]
    if any(size % SLOTS or not 0 < size <= MOST_UNITS * SLOTS for size in slots):
        raise ValueError(f"{slots} slots of keys, of runs, and coordinates")
    if bool((fine_H < 0).any()) or bool((fine_H * SLOTS > step_HS.shape[1]).any()):
        raise ValueError(f"{fine_H.tolist()} of {step_HS.shape[1] // SLOTS} units are fine")
    return Basis(
        shaped(tensors, "centre_HD", torch.float32, heads, head_dim),
        key_HDC,
        shaped(tensors, "query_HXC2", torch.bfloat16, heads, -(-head_dim // 2), coordinates, 2),
        step_HS,
        fine_H,
        run_step_HS,
        shaped(tensors, "value_centre_HE", torch.float32, heads, value_axes_HEP.shape[1]),
        shaped(tensors, "key_axes_HCP", torch.float32, heads, coordinates, RUN_AXES),
        value_axes_HEP,
    )


class Sketch(SketchFacts):
    """The kind `sketch`."""

    def build(self, first: int, prompt: Prompt, options: Mapping[str, Any]) -> SketchIndex:
        head_dim = prompt.key_HTD.shape[2]
        return build_sketch(first, prompt, self.units(head_dim, options), self.run_units(head_dim, options), self.scanned(options))

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> SketchIndex:
        return restore_sketch(tensors, numbers)
