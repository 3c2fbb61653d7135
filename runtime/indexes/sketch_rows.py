"""What a sketch keeps of keys: codes in the order of runs, and of whole runs their centres.

Letters: H KV heads, T keys, N blocks of 16 keys, U units of a key, B = 64 bytes, R runs of BLOCK_TOKENS keys, S sixteens of runs,
D head_dim, E value_dim, C coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvcompile.ir.indexes import BLOCK_TOKENS, RUNS_TOGETHER
from kvcompile.runtime import native_sketch
from kvcompile.runtime.indexes.balanced import balanced_order
from kvcompile.runtime.indexes.sketch_basis import Basis
from kvcompile.runtime.indexes.sketch_codes import LANES, pack, quantise, steps, to_slots


@dataclass(frozen=True)
class Rows:
    """Some keys, in the order of their runs.  Never changed in place: forks share it.

    codes_HNUB: sketch_codes.py.  position_HT: int32.  mean_HRE int8, mean_scale_HR: of each run's values.
    """

    codes_HNUB: Tensor
    position_HT: Tensor
    mean_HRE: Tensor
    mean_scale_HR: Tensor

    @property
    def tokens(self) -> int:
        return self.position_HT.shape[1]

    @property
    def runs(self) -> int:
        return self.tokens // BLOCK_TOKENS

    def followed_by(self, other: Rows) -> Rows:
        return Rows(*(torch.cat(pair, 1) for pair in zip(vars(self).values(), vars(other).values(), strict=True)))

    def every(self, stride: int) -> Rows:
        """Every so many runs."""
        codes_HRNUB = self.codes_HNUB.unflatten(1, (-1, BLOCK_TOKENS // LANES))[:, ::stride]
        position_HRT = self.position_HT.unflatten(1, (-1, BLOCK_TOKENS))[:, ::stride]
        return Rows(codes_HRNUB.flatten(1, 2), position_HRT.flatten(1), self.mean_HRE[:, ::stride], self.mean_scale_HR[:, ::stride])

    def cut(self, tokens: int) -> Rows:
        """The first `tokens` rows: whole batches."""
        runs = tokens // BLOCK_TOKENS
        return Rows(
            self.codes_HNUB[:, : tokens // LANES].contiguous(),
            self.position_HT[:, :tokens].contiguous(),
            self.mean_HRE[:, :runs].contiguous(),
            self.mean_scale_HR[:, :runs].contiguous(),
        )

    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in vars(self).values())


@dataclass(frozen=True)
class Centres:
    """Where the runs of some rows lie: read to tell which of them are worth a look.

    codes_HSUB: the mean coordinates of each run, 16 runs a block, all units of 4 bits.  bias_HR: joins the logit of a run.
    mean_HSE int8, mean_scale_HS: of the values of 16 runs.
    """

    codes_HSUB: Tensor
    bias_HR: Tensor
    mean_HSE: Tensor
    mean_scale_HS: Tensor

    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in vars(self).values())


def encode(basis: Basis, first: int, key_HTD: Tensor, value_HTE: Tensor) -> Rows:
    """The rows of keys at positions from `first` on; T is a multiple of BLOCK_TOKENS."""
    return _encode(basis, first, basis.coordinates(key_HTD), value_HTE)[0]


def encode_all(basis: Basis, first: int, key_HTD: Tensor, value_HTE: Tensor) -> tuple[Basis, Rows, Centres]:
    """The rows of all keys and the centres of their runs, and the basis with the steps of centres; biases are 0."""
    rows, centre_HRC = _encode(basis, first, basis.coordinates(key_HTD), value_HTE)
    heads, runs, _ = centre_HRC.shape
    step_HC, _ = steps(centre_HRC, torch.ones(heads, runs), 4)
    basis = replace(basis, run_step_HS=to_slots(step_HC[:, None], basis.run_fine_H, basis.run_units, free=1.0)[:, 0])
    padding = (0, 0, 0, -runs % RUNS_TOGETHER)
    level_HRS = quantise(to_slots(centre_HRC, basis.run_fine_H, basis.run_units), basis.run_step_HS, basis.run_fine_H)
    mean_HRE = rows.mean_HRE.float() * rows.mean_scale_HR[..., None]
    counted_S = torch.full((-(-runs // RUNS_TOGETHER),), float(RUNS_TOGETHER))
    counted_S[-1] -= -runs % RUNS_TOGETHER
    mean_HSE = torch.nn.functional.pad(mean_HRE, padding).unflatten(1, (-1, RUNS_TOGETHER)).sum(2) / counted_S[:, None]
    centres = Centres(pack(torch.nn.functional.pad(level_HRS, padding), basis.run_fine_H), torch.zeros(heads, runs), *_in_bytes(mean_HSE))
    return basis, rows, centres


def _encode(basis: Basis, first: int, coordinate_HTC: Tensor, value_HTE: Tensor) -> tuple[Rows, Tensor]:
    """Rows, and the mean coordinates of their runs, [H, R, C]."""
    shift_H1P = basis.value_centre_HE[:, None] @ basis.value_axes_HEP
    points_HTP = torch.baddbmm(coordinate_HTC @ basis.key_axes_HCP - shift_H1P, value_HTE, basis.value_axes_HEP)
    if native_sketch.ready():
        order_HT = native_sketch.order(points_HTP)
        made = native_sketch.rows(coordinate_HTC, value_HTE, order_HT, basis.step_HS, basis.fine_H)
        return Rows(made.codes_HNUB, order_HT + first, made.mean_HRE, made.mean_scale_HR), made.centre_HRC
    order_HT = balanced_order(points_HTP)
    coordinate_HTC = coordinate_HTC.gather(1, order_HT[..., None].expand_as(coordinate_HTC))
    level_HTS = quantise(to_slots(coordinate_HTC, basis.fine_H, basis.units), basis.step_HS, basis.fine_H)
    mean_HRE = value_HTE.gather(1, order_HT[..., None].expand_as(value_HTE)).unflatten(1, (-1, BLOCK_TOKENS)).mean(2)
    rows = Rows(pack(level_HTS, basis.fine_H), (order_HT + first).int(), *_in_bytes(mean_HRE))
    return rows, coordinate_HTC.unflatten(1, (-1, BLOCK_TOKENS)).mean(2)


def _in_bytes(mean_HRE: Tensor) -> tuple[Tensor, Tensor]:
    """int8 and one scale a row."""
    scale_HR = (mean_HRE.abs().amax(2) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return (mean_HRE / scale_HR[..., None]).round().to(torch.int8), scale_HR
