"""The index `sketch`: a few bytes a key that say, for any query like the prompt's, how large the logit will be.

Letters: H KV heads, G queries per KV head, T keys, B blocks of BLOCK_TOKENS keys, N half blocks of L = 16 keys, U units of a key,
C = 16 U slots of coordinates, D head_dim, E value_dim.

The method (docs/sketch.md derives it and says where it fails):
1. Keys are centred: a shift of all logits changes no softmax.
2. With S S' the second moment of the prompt's queries, a logit is (S^-1 q) . (S' k).  The leading principal directions of S' k are what the
   prompt's queries can tell keys apart by.
3. A key keeps `units` units of 4 bytes: 8 coordinates of 4 bits or 16 of 2 bits each, leading coordinates first; how many are of 4 bits is
   chosen per KV head by the squared error that is left.  Levels are evenly spaced, one step a coordinate, found by trying.
4. Keys are kept in an order whose runs of BLOCK_TOKENS have similar coordinates and similar values (balanced.py); a run keeps the
   mean of its values in 8 bits.
5. What is not read is estimated: each key's weight is exp(score + bias), each run adds its weights' sum times its mean value.  The
   bias, one number a KV head, is what the prompt's last queries were wrong by: what the sketch leaves out of a logit would add weight.

Memory, as the C++ kernel reads it too (codegen/cpp/lookup.h):
   codes      uint8 [H, T / 16, U, 64]   of 16 keys; byte 4 * lane + j of a unit holds
                                          4 bits: coordinate j in its low half, 4 + j in its high half
                                          2 bits: coordinates j, 4 + j, 8 + j, 12 + j from the lowest bits up
   position   int32 [H, T]
   mean       int8  [H, B, E], mean_scale float32 [H, B]
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from kvcompile.ir.indexes import BLOCK_TOKENS, RUN_AXES, SketchFacts
from kvcompile.ir.policy import Select
from kvcompile.runtime.indexes.balanced import balanced_order
from kvcompile.runtime.indexes.index import Found, Keys, Prompt, RecentQueries
from kvcompile.runtime.indexes.select import select_keys
from kvcompile.runtime.merge import AttentionState

LANES = 16
FINE_COORDINATES, COARSE_COORDINATES = 8, 16  # of a unit: at 4 bits, at 2
WEIGHT_RANGE = (0.01, 100.0)  # of a key's errors against another's
VALUE_WEIGHT = 0.6  # of values against coordinates when keys are ordered; both have unit mean square
_EVEN_STEP = {4: 0.3352, 2: 0.9957}  # best for a normal distribution of unit variance (Max 1960, table II)
_STEP_FACTORS = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.4, 1.6, 2.0)
_STEP_SAMPLE = 4096  # keys that steps are chosen on
_RIDGE = 1e-4  # of the queries' mean square: directions that no query has looked along
_LEFT_OUT = 0.02  # share of keys that are thought read when the bias is measured
_CALIBRATION_QUERIES, _CALIBRATION_KEYS = 64, 4096  # of a KV head, that weights, bias and error are measured with
_DRIFT = 1.5  # so many times the error of the prompt's queries, and the basis no longer fits
_SMALL_ERROR = 0.05  # nats: an error below it is as good as none


@dataclass(frozen=True)
class Basis:
    """How keys and queries become coordinates; fixed when the index is made.

    centre_HD: mean key.  key_HDC: centred key -> coordinates.  query_HDC: query -> the same, times each coordinate's step.  step_HC.
    fine_H: how many units are of 4 bits; the others of 2.  bias_H: natural logarithm, joins the logit of a key that is not read.
    error_H: standard deviation of a guessed logit, over keys.
    key_axes_HDP, value_axes_HEP: centred keys and values -> the P dimensions that runs are formed in.
    """

    centre_HD: Tensor
    key_HDC: Tensor
    query_HDC: Tensor
    step_HC: Tensor
    fine_H: Tensor
    bias_H: Tensor
    error_H: Tensor
    value_centre_HE: Tensor
    key_axes_HDP: Tensor
    value_axes_HEP: Tensor

    @property
    def units(self) -> int:
        """Units of a key."""
        return int(self.key_HDC.shape[2]) // COARSE_COORDINATES


class SketchIndex:
    """The sketch of one group of KV heads in one session.  `build_sketch` and `restore_sketch` make one.

    parts: the keys that were there when it was made, put in order together; and those added since, if any, batch after batch.
    batch_ends: tokens of the second part at the end of each batch, each put in order by itself.
    """

    def __init__(
        self,
        first: int,
        basis: Basis,
        soft_cap: float | None,
        notes: tuple[str, ...],
        parts: tuple[Rows, ...],
        batch_ends: tuple[int, ...] = (),
    ) -> None:
        self.basis = basis
        self.parts = parts
        self.soft_cap = soft_cap
        self.batch_ends = batch_ends
        self._first = first
        self._notes = notes

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
        score_HGT = self.scores(query_HGD)
        chosen_HGK = select_keys(score_HGT, k, select)
        return Found(torch.where(chosen_HGK >= 0, chosen_HGK + self._first, -1), score_HGT)

    def scores(self, query_HGD: Tensor) -> Tensor:
        """The guess of every logit, float32 [H, G, T], in the order of positions."""
        logit_HGT = self._row_scores(query_HGD, self.parts)
        place_HT = torch.cat([part.position_HT for part in self.parts], 1).long() - self._first
        return torch.empty_like(logit_HGT).scatter_(2, place_HT[:, None].expand_as(logit_HGT), logit_HGT)

    def _row_scores(self, query_HGD: Tensor, parts: tuple[Rows, ...]) -> Tensor:
        """The guess of the logit of each row.

        A query's coordinates are rounded to 8 bits, one scale a query, as the kernel does: products and sums are then whole numbers.
        """
        basis, query_HGD = self.basis, query_HGD.float()
        query_HGC = query_HGD @ basis.query_HDC
        scale_HG1 = (query_HGC.abs().amax(2, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        whole_HGC = (query_HGC / scale_HG1).round()
        level_HTC = torch.cat([unpack(part.codes_HNUB, basis.fine_H) for part in parts], 1).float()
        middle_HC1 = (_levels(basis.fine_H, basis.units) - 1)[..., None] / 2
        logit_HGT = (whole_HGC @ level_HTC.transpose(1, 2) - whole_HGC @ middle_HC1) * scale_HG1
        logit_HGT = logit_HGT + query_HGD @ basis.centre_HD[..., None]
        return logit_HGT if self.soft_cap is None else self.soft_cap * torch.tanh(logit_HGT / self.soft_cap)

    def rest(self, query_HGD: Tensor, found: Found) -> AttentionState:
        assert found.score_HGT is not None
        score_HGT = found.score_HGT + self.basis.bias_H[:, None, None]
        place_HGK = found.position_HGK - self._first
        place_HGK = torch.where(place_HGK >= 0, place_HGK, place_HGK[..., :1])
        score_HGT = score_HGT.scatter(2, place_HGK, -torch.inf)
        place_HT = torch.cat([part.position_HT for part in self.parts], 1).long() - self._first
        score_HGT = score_HGT.gather(2, place_HT[:, None].expand_as(score_HGT))
        peak_HG1 = score_HGT.amax(2, keepdim=True)
        seen_HG1 = peak_HG1 > -torch.inf
        weight_HGB = torch.where(seen_HG1, torch.exp(score_HGT - peak_HG1), 0.0).unflatten(2, (-1, BLOCK_TOKENS)).sum(3)
        mean_HBE = torch.cat([part.mean_HBE.float() * part.mean_scale_HB[..., None] for part in self.parts], 1)
        total_HG1 = weight_HGB.sum(2, keepdim=True)
        out_HGE = torch.where(seen_HG1, weight_HGB @ mean_HBE / total_HG1, 0.0)
        return AttentionState(out_HGE, torch.where(seen_HG1, peak_HG1 + total_HG1.log(), -torch.inf).squeeze(2))

    def recalibrate(self, recent: RecentQueries, keys: Keys) -> bool:
        """Measures the bias anew; False where the error is _DRIFT times that of the prompt's queries, or more, on some KV head."""
        spans = keys(self.first, self.end)
        key_HTD = spans[0].key_HTD if len(spans) == 1 else torch.cat([span.key_HTD for span in spans], 1)
        measured = self.calibrated(recent, key_HTD)
        self.basis = replace(self.basis, bias_H=measured.bias_H)
        return bool((measured.error_H <= _DRIFT * self.basis.error_H.clamp_min(_SMALL_ERROR)).all())

    def calibrated(self, recent: RecentQueries, key_HTD: Tensor) -> Basis:
        """The basis with bias and error as the queries find them, on runs evenly spread; without any query they stay as they are."""
        base = self.parts[0]
        runs = base.every(-(-base.tokens // _CALIBRATION_KEYS))
        left_out = math.ceil(_LEFT_OUT * runs.tokens)
        recent = recent.thinned(_CALIBRATION_QUERIES).behind(int(runs.position_HT.min()) + 2 * left_out)
        if recent.count == 0 or left_out >= runs.tokens:
            return self.basis
        guess_HCT = self._row_scores(recent.query_HCD, (runs,))
        place_HT = runs.position_HT.long() - self._first
        true_HCT = recent.query_HCD @ key_HTD.gather(1, place_HT[..., None].expand(-1, -1, key_HTD.shape[2])).float().transpose(1, 2)
        if self.soft_cap is not None:
            true_HCT = self.soft_cap * torch.tanh(true_HCT / self.soft_cap)
        error_H = (true_HCT - guess_HCT).std(2).mean(1)
        later_HCT = runs.position_HT[:, None] > recent.position_C[:, None]  # no query is asked about keys that come after it
        read_HCK = guess_HCT.masked_fill_(later_HCT, -torch.inf).topk(left_out, 2).indices
        left = (each.scatter_(2, read_HCK, -torch.inf).logsumexp(2) for each in (true_HCT.masked_fill_(later_HCT, -torch.inf), guess_HCT))
        true_HC, guess_HC = left
        seen_HC = (true_HC > -torch.inf) & (guess_HC > -torch.inf)
        gap_HC = torch.where(seen_HC, true_HC - guess_HC, 0.0)
        return replace(self.basis, bias_H=gap_HC.sum(1) / seen_HC.sum(1).clamp_min(1), error_H=error_H)

    def rollback(self, end: int) -> None:
        """As KeyIndex; a batch that reaches beyond `end` is forgotten whole, and what was there when the index was made stays: their
        order forgets which came last."""
        kept = end - self._first - self.parts[0].tokens
        if self.batch_ends and kept < self.batch_ends[-1]:
            self.batch_ends = tuple(batch_end for batch_end in self.batch_ends if batch_end <= kept)
            self.parts = (self.parts[0], self.parts[1].cut(self.batch_ends[-1])) if self.batch_ends else self.parts[:1]

    def fork(self) -> SketchIndex:
        return SketchIndex(self._first, self.basis, self.soft_cap, self._notes, self.parts, self.batch_ends)

    def nbytes(self) -> int:
        basis = sum(tensor.nbytes for tensor in vars(self.basis).values())
        return int(basis) + sum(part.nbytes() for part in self.parts)

    def scanned_bytes(self, tail: bool) -> int:
        means = sum(part.mean_HBE.nbytes + part.mean_scale_HB.nbytes for part in self.parts)
        maps = self.basis.query_HDC.nbytes + self.basis.centre_HD.nbytes
        return sum(part.codes_HNUB.nbytes for part in self.parts) + (means if tail else 0) + maps

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {name: tensor.contiguous() for name, tensor in vars(self.basis).items()}
        for number, part in enumerate(self.parts):
            tensors |= {f"{name}.{number}": tensor.contiguous() for name, tensor in vars(part).items()}
        return tensors, {
            "first": self._first,
            "soft_cap": self.soft_cap,
            "notes": list(self._notes),
            "batch_ends": list(self.batch_ends),
        }


@dataclass(frozen=True)
class Rows:
    """What is kept of some keys, in the order of their clusters.  Never changed in place: forks share it."""

    codes_HNUB: Tensor
    position_HT: Tensor
    mean_HBE: Tensor
    mean_scale_HB: Tensor

    @property
    def tokens(self) -> int:
        return self.position_HT.shape[1]

    def followed_by(self, other: Rows) -> Rows:
        return Rows(*(torch.cat(pair, 1) for pair in zip(vars(self).values(), vars(other).values(), strict=True)))

    def every(self, stride: int) -> Rows:
        """Every so many runs."""
        codes_HBNUB = self.codes_HNUB.unflatten(1, (-1, BLOCK_TOKENS // LANES))[:, ::stride]
        position_HBT = self.position_HT.unflatten(1, (-1, BLOCK_TOKENS))[:, ::stride]
        return Rows(codes_HBNUB.flatten(1, 2), position_HBT.flatten(1), self.mean_HBE[:, ::stride], self.mean_scale_HB[:, ::stride])

    def cut(self, tokens: int) -> Rows:
        """The first `tokens` rows: whole batches."""
        blocks = tokens // BLOCK_TOKENS
        return Rows(
            self.codes_HNUB[:, : tokens // LANES].contiguous(),
            self.position_HT[:, :tokens].contiguous(),
            self.mean_HBE[:, :blocks].contiguous(),
            self.mean_scale_HB[:, :blocks].contiguous(),
        )

    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in vars(self).values())


def build_sketch(first: int, prompt: Prompt, units: int) -> SketchIndex:
    """A sketch of the prompt's keys, whose first has position `first`; T is a multiple of BLOCK_TOKENS, at least one block."""
    key_HTD, value_HTE = prompt.key_HTD.float(), prompt.value_HTE.float()
    assert key_HTD.shape[1] and key_HTD.shape[1] % BLOCK_TOKENS == 0, key_HTD.shape
    basis, notes = fit_basis(first, key_HTD, value_HTE, prompt, units)
    index = SketchIndex(first, basis, prompt.soft_cap, notes, (encode(basis, first, key_HTD, value_HTE),))
    index.basis = index.calibrated(prompt.recent, key_HTD)
    return index


def restore_sketch(tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> SketchIndex:
    """What `SketchIndex.state` gave."""
    basis = Basis(**{field.name: tensors[field.name] for field in fields(Basis)})
    parts = tuple(
        Rows(**{field.name: tensors[f"{field.name}.{number}"] for field in fields(Rows)})
        for number in range(sum(name.startswith("codes_HNUB.") for name in tensors))
    )
    return SketchIndex(numbers["first"], basis, numbers["soft_cap"], tuple(numbers["notes"]), parts, tuple(numbers["batch_ends"]))


def fit_basis(first: int, key_HTD: Tensor, value_HTE: Tensor, prompt: Prompt, units: int) -> tuple[Basis, tuple[str, ...]]:
    """Directions, steps and how many units are fine, for each KV head; the bias is still 0."""
    heads, _, head_dim = key_HTD.shape
    slots = units * COARSE_COORDINATES
    centre_HD = key_HTD.mean(1)
    centred_HTD = key_HTD - centre_HD[:, None]
    moment_HDD, notes = _query_moment(centred_HTD, prompt)
    root_HDD = torch.linalg.cholesky(moment_HDD)
    key_moment_HDD = (centred_HTD.transpose(1, 2) @ centred_HTD).double() / key_HTD.shape[1]
    _, directions_HDD = torch.linalg.eigh(root_HDD.transpose(1, 2) @ key_moment_HDD @ root_HDD)
    directions_HDC = directions_HDD.flip(2)[..., :slots]
    key_HDC = (root_HDD @ directions_HDC).float()
    query_HDC = torch.linalg.solve_triangular(root_HDD.transpose(1, 2), directions_HDC, upper=True).float()
    stride = -(-key_HTD.shape[1] // _STEP_SAMPLE)
    sample_HTC = centred_HTD[:, ::stride] @ key_HDC
    position_T = torch.arange(first, first + key_HTD.shape[1], stride)
    weight_HT = _key_weights(centred_HTD[:, ::stride], position_T, prompt.recent)
    steps = {bits: _steps(sample_HTC, weight_HT, bits) for bits in (4, 2)}
    to_key = key_HTD.new_zeros(heads, head_dim, slots)
    to_query, step_HC = torch.zeros_like(to_key), key_HTD.new_ones(heads, slots)
    fine = []
    for head in range(heads):
        errors = {bits: error_HC[head] for bits, (_, error_HC) in steps.items()}
        fine.append(_fine_units((sample_HTC[head].square() * weight_HT[head, :, None]).mean(0), errors, units))
        for bits, source, place in _slots(fine[-1], units, key_HDC.shape[2]):
            to_key[head, :, place] = key_HDC[head, :, source]
            step_HC[head, place] = steps[bits][0][head, source]
            to_query[head, :, place] = query_HDC[head, :, source] * step_HC[head, place]
    centred_HTE = value_HTE - value_HTE.mean(1, keepdim=True)
    key_axes, value_axes = _run_axes(sample_HTC, centred_HTE[:, ::stride])
    fine_H, zero_H = torch.tensor(fine, dtype=torch.int64), torch.zeros(heads)
    basis = Basis(centre_HD, to_key, to_query, step_HC, fine_H, zero_H, zero_H, value_HTE.mean(1), key_HDC @ key_axes, value_axes)
    return basis, notes


def _run_axes(coordinate_HTC: Tensor, centred_HTE: Tensor) -> tuple[Tensor, Tensor]:
    """The leading RUN_AXES directions of coordinates beside values, both of unit mean square, values times VALUE_WEIGHT: [H, C, P] and
    [H, E, P]; zeros where there are fewer."""
    spread_H11 = _root_mean_square(coordinate_HTC)[:, None, None]
    value_spread_H11 = _root_mean_square(centred_HTE)[:, None, None] / VALUE_WEIGHT
    points_HTX = torch.cat([coordinate_HTC / spread_H11, centred_HTE / value_spread_H11], 2)
    directions_HXP = torch.linalg.eigh(points_HTX.transpose(1, 2) @ points_HTX)[1].flip(2)[..., :RUN_AXES]
    directions_HXP = torch.nn.functional.pad(directions_HXP, (0, RUN_AXES - directions_HXP.shape[2]))
    channels = coordinate_HTC.shape[2]
    return directions_HXP[:, :channels] / spread_H11, directions_HXP[:, channels:] / value_spread_H11


def encode(basis: Basis, first: int, key_HTD: Tensor, value_HTE: Tensor) -> Rows:
    """The rows of keys at positions from `first` on; T is a multiple of BLOCK_TOKENS."""
    centred_HTD, centred_HTE = key_HTD - basis.centre_HD[:, None], value_HTE - basis.value_centre_HE[:, None]
    coordinate_HTC = centred_HTD @ basis.key_HDC
    order_HT = balanced_order(centred_HTD @ basis.key_axes_HDP + centred_HTE @ basis.value_axes_HEP)
    coordinate_HTC = coordinate_HTC.gather(1, order_HT[..., None].expand_as(coordinate_HTC))
    top_H1C = (_levels(basis.fine_H, basis.units) - 1)[:, None]
    level_HTC = (coordinate_HTC / basis.step_HC[:, None] + top_H1C / 2).round().clamp(min=torch.zeros(()), max=top_H1C).to(torch.uint8)
    mean_HBE = value_HTE.gather(1, order_HT[..., None].expand_as(value_HTE)).unflatten(1, (-1, BLOCK_TOKENS)).mean(2)
    scale_HB = (mean_HBE.abs().amax(2) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return Rows(
        pack(level_HTC, basis.fine_H),
        (order_HT + first).int(),
        (mean_HBE / scale_HB[..., None]).round().to(torch.int8),
        scale_HB,
    )


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


def _is_fine(fine_H: Tensor, units: int) -> Tensor:
    """bool [H, U]."""
    return torch.arange(units) < fine_H[:, None]


def _levels(fine_H: Tensor, units: int) -> Tensor:
    """How many levels each slot has, float32 [H, 16 U]; 1 in those that a fine unit leaves free."""
    free = torch.tensor([16.0] * FINE_COORDINATES + [1.0] * (COARSE_COORDINATES - FINE_COORDINATES))
    return torch.where(_is_fine(fine_H, units)[..., None], free, torch.full((COARSE_COORDINATES,), 4.0)).flatten(1)


def _slots(fine: int, units: int, coordinates: int) -> Iterator[tuple[int, slice, slice]]:
    """Bits, which coordinates, and the slots where they stand, of each unit; coordinates that do not exist leave slots free."""
    at = 0
    for unit in range(units):
        bits, wide = (4, FINE_COORDINATES) if unit < fine else (2, COARSE_COORDINATES)
        take = min(wide, coordinates - at)
        if take > 0:
            yield bits, slice(at, at + take), slice(unit * COARSE_COORDINATES, unit * COARSE_COORDINATES + take)
        at += take


def _query_moment(centred_HTD: Tensor, prompt: Prompt) -> tuple[Tensor, tuple[str, ...]]:
    """Second moment of the queries, float64 [H, D, D], positive definite.

    Where the prompt asked fewer queries than twice head_dim, the keys' own moment stands in for the missing ones.
    """
    head_dim = centred_HTD.shape[2]
    wanted = 2 * head_dim
    moment_HDD = prompt.gram_HDD.double()
    notes: tuple[str, ...] = ()
    if prompt.queries < wanted:
        key_HDD = (centred_HTD.transpose(1, 2) @ centred_HTD).double()
        trace_H11 = key_HDD.diagonal(dim1=1, dim2=2).sum(1)[:, None, None].clamp_min(1e-30)
        size_H11 = moment_HDD.diagonal(dim1=1, dim2=2).sum(1)[:, None, None] / max(1, prompt.queries)
        size_H11 = torch.where(size_H11 > 0, size_H11, 1.0)
        moment_HDD = moment_HDD + (wanted - prompt.queries) * size_H11 * key_HDD / trace_H11
        notes = (f"the prompt asked {prompt.queries} queries, fewer than {wanted}: statistics of the keys stand in for the others.",)
    size_H11 = moment_HDD.diagonal(dim1=1, dim2=2).mean(1)[:, None, None].clamp_min(1e-30)
    return moment_HDD / size_H11 + _RIDGE * torch.eye(head_dim, dtype=torch.float64), notes


def _key_weights(centred_HTD: Tensor, position_T: Tensor, recent: RecentQueries) -> Tensor:
    """How much an error of each key's coordinates matters, [H, T]: the square root of its softmax weight among these, averaged over the
    prompt's last queries that came after it, as a multiple of the even one, within WEIGHT_RANGE.  The root: later queries attend to
    something else.
    """
    recent = recent.thinned(_CALIBRATION_QUERIES).behind(int(position_T[0]))
    if recent.count == 0:
        return torch.ones(centred_HTD.shape[:2])
    later_CT = position_T > recent.position_C[:, None]
    weight_HCT = torch.softmax((recent.query_HCD @ centred_HTD.transpose(1, 2)).masked_fill_(later_CT, -torch.inf), 2)
    seen_T = (~later_CT).sum(0).clamp_min(1)
    even = (~later_CT).sum(1, keepdim=True)  # keys that a query sees
    return ((weight_HCT * even).sum(1) / seen_T).sqrt().clamp(*WEIGHT_RANGE)


def _steps(sample_HTC: Tensor, weight_HT: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The step of each coordinate with the least weighted mean squared error, and that error, [H, C]."""
    even_HC = sample_HTC.square().mean(1).sqrt().clamp_min(1e-12) * _EVEN_STEP[bits]
    steps_FHC = torch.stack([even_HC * factor for factor in _STEP_FACTORS])
    misses = (_rounded(sample_HTC, step_HC, bits) - sample_HTC for step_HC in steps_FHC)
    errors_FHC = torch.stack([(miss_HTC.square() * weight_HT[..., None]).mean(1) for miss_HTC in misses])
    best_1HC = errors_FHC.argmin(0, keepdim=True)
    return steps_FHC.gather(0, best_1HC)[0], errors_FHC.gather(0, best_1HC)[0]


def _rounded(sample_HTC: Tensor, step_HC: Tensor, bits: int) -> Tensor:
    middle = (2**bits - 1) / 2
    step_H1C = step_HC[:, None]
    levels_HTC = (sample_HTC / step_H1C + middle).round().clamp(0, 2 * middle)
    rounded_HTC: Tensor = (levels_HTC - middle) * step_H1C
    return rounded_HTC


def _fine_units(power_C: Tensor, errors: Mapping[int, Tensor], units: int) -> int:
    """How many units of 4 bits leave the least squared error; the first of equals.  power_C: of a coordinate that is left out; errors: of
    one that is kept, by its bits."""
    left = []
    for fine in range(units + 1):
        error_C = power_C.clone()
        for bits, source, _ in _slots(fine, units, len(power_C)):
            error_C[source] = errors[bits][source]
        left.append(float(error_C.sum()))
    return left.index(min(left))


def _root_mean_square(x_HTX: Tensor) -> Tensor:
    """The root of the mean squared length of T vectors, [H]."""
    mean_H: Tensor = x_HTX.square().sum(2).mean(1)
    root_H: Tensor = mean_H.sqrt()
    return root_H.clamp_min(1e-12)


class Sketch(SketchFacts):
    """The kind `sketch`."""

    def build(self, first: int, prompt: Prompt, options: Mapping[str, Any]) -> SketchIndex:
        return build_sketch(first, prompt, self.units(prompt.key_HTD.shape[2], options))

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> SketchIndex:
        return restore_sketch(tensors, numbers)
