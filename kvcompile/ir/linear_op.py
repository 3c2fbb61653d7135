"""`kvc::linears`: several linear layers of one input as one node, so that one kernel can read all their weights.

    linears(x, weights, biases) -> out

    x        [1, tokens, in_features]
    weights  each [out_features_i, in_features], of x's dtype; at least one
    biases   none, or one [out_features_i] for each weight
    out      [1, tokens, sum of out_features_i], contiguous: the results of `linear(x, weights[i], biases[i])` side by side

Called as an operator it runs torch's own `linear` once a weight.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

_library = torch.library.Library("kvc", "FRAGMENT")
_library.define("linears(Tensor x, Tensor[] weights, Tensor[] biases) -> Tensor")


def _linears(x: Tensor, weights: list[Tensor], biases: list[Tensor] | None) -> Tensor:
    biases = biases or []  # AOTInductor's proxy executor (torch 2.13) hands an empty list over as None
    assert weights and len(biases) in (0, len(weights))
    parts = [F.linear(x, weight, bias) for weight, bias in itertools.zip_longest(weights, biases)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _linears_fake(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    return x.new_empty(1, x.shape[1], sum(weight.shape[0] for weight in weights))


_library.impl("linears", _linears, "CompositeExplicitAutograd")
torch.library.register_fake("kvc::linears", _linears_fake, lib=_library)

LINEARS = torch.ops.kvc.linears.default
