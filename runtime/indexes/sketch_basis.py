"""The directions of the keys that a prompt's queries can tell apart, and how many bits each of them gets.

Letters: H KV heads, T keys, C coordinates, U units of a key, R units of a run's centre, D head_dim, E value_dim, P dimensions that runs are
formed in.  docs/sketch.md derives what is done here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompile.ir.indexes import RUN_AXES
from kvcompile.runtime.indexes.index import Prompt, RecentQueries
from kvcompile.runtime.indexes.sketch_codes import FINE_COORDINATES, SLOTS, fine_units, steps, to_slots

WEIGHT_RANGE = (0.01, 100.0)  # of a key's errors against another's
VALUE_WEIGHT = 0.6  # of values against coordinates when keys are ordered; both have unit mean square
WEIGHING_QUERIES = 64  # of a KV head, that keys are weighed with
_SAMPLE = 4096  # keys that steps are chosen on
_RIDGE = 1e-4  # of the queries' mean square: directions that no query has looked along


@dataclass(frozen=True)
class Basis:
    """How keys and queries become coordinates; fixed when the index is made.

    centre_HD: mean key.  key_HDC: centred key -> coordinates, the leading ones first.
    query_HXC2: query -> the same, bfloat16, two channels of a query side by side (X = D / 2, rounded up): as the kernel multiplies.
    step_HS [H, 16 U] and fine_H: of keys; 1 in free slots, and how many units are of 4 bits.
    run_step_HS [H, 16 R]: of the centres of runs, whose units are all of 4 bits.
    value_centre_HE; key_axes_HCP, value_axes_HEP: coordinates and centred values -> the P dimensions that runs are formed in.
    """

    centre_HD: Tensor
    key_HDC: Tensor
    query_HXC2: Tensor
    step_HS: Tensor
    fine_H: Tensor
    run_step_HS: Tensor
    value_centre_HE: Tensor
    key_axes_HCP: Tensor
    value_axes_HEP: Tensor

    @property
    def units(self) -> int:
        """Units of a key."""
        return self.step_HS.shape[1] // SLOTS

    @property
    def run_units(self) -> int:
        """Units of a run's centre."""
        return self.run_step_HS.shape[1] // SLOTS

    @property
    def run_fine_H(self) -> Tensor:
        return torch.full_like(self.fine_H, self.run_units)

    def coordinates(self, key_HTD: Tensor) -> Tensor:
        """[H, T, C]."""
        return torch.baddbmm(-self.centre_HD[:, None] @ self.key_HDC, key_HTD, self.key_HDC)

    def query_coordinates(self, query_HGD: Tensor) -> Tensor:
        """[H, G, C] of float32 queries."""
        map_HDC = self.query_HXC2.transpose(2, 3).flatten(1, 2)[:, : query_HGD.shape[2]].float()
        return query_HGD @ map_HDC

    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in vars(self).values())

    def search_nbytes(self) -> int:
        """Of what every search reads."""
        return sum(each.nbytes for each in (self.centre_HD, self.query_HXC2, self.step_HS, self.run_step_HS))


def fit_basis(first: int, key_HTD: Tensor, value_HTE: Tensor, prompt: Prompt, units: int, run_units: int) -> tuple[Basis, tuple[str, ...]]:
    """The basis for keys whose first has position `first`, and what its user should know of it."""
    head_dim = key_HTD.shape[2]
    centre_HD = key_HTD.mean(1)
    centred_HTD = key_HTD - centre_HD[:, None]
    moment_HDD, notes = _query_moment(centred_HTD, prompt)
    root_HDD = torch.linalg.cholesky(moment_HDD)
    key_moment_HDD = (centred_HTD.transpose(1, 2) @ centred_HTD).double() / key_HTD.shape[1]
    _, directions_HDD = torch.linalg.eigh(root_HDD.transpose(1, 2) @ key_moment_HDD @ root_HDD)
    directions_HDC = directions_HDD.flip(2)[..., : units * SLOTS]
    key_HDC = (root_HDD @ directions_HDC).float()
    query_HDC = torch.linalg.solve_triangular(root_HDD.transpose(1, 2), directions_HDC, upper=True).float()

    stride = -(-key_HTD.shape[1] // _SAMPLE)
    position_T = torch.arange(first, first + key_HTD.shape[1], stride)
    centred_HTD = centred_HTD[:, ::stride]
    sample_HTC = centred_HTD @ key_HDC
    weight_HT = key_weights(centred_HTD, position_T, prompt.recent)
    kinds = {bits: steps(sample_HTC, weight_HT, bits) for bits in (4, 2)}
    power_HC = (sample_HTC.square() * weight_HT[..., None]).mean(1)
    fine = [
        fine_units(power_HC[head], {bits: error_HC[head] for bits, (_, error_HC) in kinds.items()}, units) for head in range(len(key_HTD))
    ]
    fine_H = torch.tensor(fine, dtype=torch.int64)

    used = max(FINE_COORDINATES * each + SLOTS * (units - each) for each in fine)
    used = min(head_dim, SLOTS * units, max(used, FINE_COORDINATES * run_units))
    padding = (0, -used % SLOTS)
    sample_HTC, key_HDC, query_HDC = sample_HTC[..., :used], key_HDC[..., :used], query_HDC[..., :used]
    step_HS = _in_slots(kinds, fine_H, units, used)
    value_centre_HE = value_HTE.mean(1)
    key_axes, value_axes = _run_axes(sample_HTC, value_HTE[:, ::stride] - value_centre_HE[:, None])
    basis = Basis(
        centre_HD,
        torch.nn.functional.pad(key_HDC, padding),
        torch.nn.functional.pad(query_HDC, (*padding, 0, head_dim % 2)).unflatten(1, (-1, 2)).transpose(2, 3).bfloat16().contiguous(),
        step_HS,
        fine_H,
        torch.ones(len(key_HTD), run_units * SLOTS),
        value_centre_HE,
        torch.nn.functional.pad(key_axes, (0, 0, *padding)),
        value_axes,
    )
    return basis, notes


def _in_slots(kinds: dict[int, tuple[Tensor, Tensor]], fine_H: Tensor, units: int, used: int) -> Tensor:
    """The step of each slot, [H, 16 U]; 1 in free ones."""
    fine_HS, coarse_HS = (to_slots(kinds[bits][0][:, None, :used], fine_H, units, free=1.0)[:, 0] for bits in (4, 2))
    return torch.where(torch.arange(units * SLOTS) < fine_H[:, None] * SLOTS, fine_HS, coarse_HS)


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


def key_weights(centred_HTD: Tensor, position_T: Tensor, recent: RecentQueries) -> Tensor:
    """How much an error of each key's coordinates matters, [H, T]: the square root of its softmax weight among these, averaged over the
    prompt's last queries that came after it, as a multiple of the even one, within WEIGHT_RANGE.  The root: later queries attend to
    something else.
    """
    recent = recent.thinned(WEIGHING_QUERIES).behind(int(position_T[0]))
    if recent.count == 0:
        return torch.ones(centred_HTD.shape[:2])
    later_CT = position_T > recent.position_C[:, None]
    weight_HCT = torch.softmax((recent.query_HCD @ centred_HTD.transpose(1, 2)).masked_fill_(later_CT, -torch.inf), 2)
    seen_T = (~later_CT).sum(0).clamp_min(1)
    even = (~later_CT).sum(1, keepdim=True)  # keys that a query sees
    return ((weight_HCT * even).sum(1) / seen_T).sqrt().clamp(*WEIGHT_RANGE)


def _root_mean_square(x_HTX: Tensor) -> Tensor:
    """The root of the mean squared length of T vectors, [H]."""
    mean_H: Tensor = x_HTX.square().sum(2).mean(1)
    root_H: Tensor = mean_H.sqrt()
    return root_H.clamp_min(1e-12)
