"""The oracle of a causal short convolution, in float64 and without cleverness.

Letters: C channels, T tokens, L taps.
"""

from __future__ import annotations

import torch
from torch import Tensor


def convolve(input_CT: Tensor, weight_CL: Tensor, bias_C: Tensor | None = None) -> Tensor:
    """out [C, T], float64: each channel's own filter over the token and the L - 1 before it, zeros before the first; [C, 0] of no token."""
    channels, tokens = input_CT.shape
    taps = weight_CL.shape[1]
    out_CT = torch.zeros(channels, tokens, dtype=torch.float64)
    for token in range(tokens):
        for tap in range(taps):
            seen = token - (taps - 1) + tap
            if seen >= 0:
                out_CT[:, token] += weight_CL[:, tap].double() * input_CT[:, seen].double()
    return out_CT if bias_C is None else out_CT + bias_C.double()[:, None]
