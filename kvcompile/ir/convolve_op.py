"""`kvc::convolve`: a causal short convolution, each channel with a filter of its own, and its cache-less meaning.

    convolve(input, weight, bias, site) -> out

    input   [1, channels, tokens]
    weight  [channels, taps], or [channels, 1, taps] as `Conv1d` keeps it; the last tap is the token's own
    bias    [channels] or None
    site    index of the convolution site, -1 before `canonicalise_convolution` numbers them
    out     [1, channels, tokens]

    out[c, t] = bias[c] + sum over k of weight[c, k] * input[c, t - (taps - 1) + k],  input is 0 before the first token

Called as an operator it reads the tokens of the call as one sequence.  A session never calls it: it keeps the last
taps - 1 inputs (runtime/convolution_state.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_library = torch.library.Library("kvc", "FRAGMENT")
_library.define("convolve(Tensor input, Tensor weight, Tensor? bias, int site) -> Tensor")


def causal_filter(input_CT: Tensor, weight: Tensor, bias_C: Tensor | None) -> Tensor:
    """out [channels, tokens] of input_CT [channels, taps - 1 + tokens], whose first taps - 1 columns stand before the tokens.

    Taps are added one after the other in float32 (float64 stays), so a token's result has the same bits in every call.
    """
    taps = weight.shape[-1]
    compute = torch.float64 if input_CT.dtype == torch.float64 else torch.float32
    input_CT, weight_CL = input_CT.to(compute), weight.reshape(-1, taps).to(compute)
    tokens = input_CT.shape[1] - (taps - 1)
    out_CT = torch.zeros_like(input_CT[:, :tokens]) if bias_C is None else bias_C.to(compute)[:, None].expand(-1, tokens)
    for tap in range(taps):
        out_CT = out_CT + input_CT[:, tap : tap + tokens] * weight_CL[:, tap, None]
    return out_CT


def _convolve(input: Tensor, weight: Tensor, bias: Tensor | None, site: int) -> Tensor:
    return causal_filter(F.pad(input[0], (weight.shape[-1] - 1, 0)), weight, bias)[None].to(input.dtype)


def _convolve_fake(input: Tensor, weight: Tensor, bias: Tensor | None, site: int) -> Tensor:
    return input.new_empty(input.shape)


_library.impl("convolve", _convolve, "CompositeExplicitAutograd")
torch.library.register_fake("kvc::convolve", _convolve_fake, lib=_library)

CONVOLVE = torch.ops.kvc.convolve.default
