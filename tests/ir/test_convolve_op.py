"""The operator's cache-less meaning against the float64 oracle."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kvcompile.ir.convolve_op import CONVOLVE, causal_filter
from kvcompile.runtime.reference_convolution import convolve


@pytest.mark.parametrize("taps", [1, 2, 3, 4])
@pytest.mark.parametrize("tokens", [1, 2, 7])
@pytest.mark.parametrize("biased", [True, False])
def test_the_operator_means_what_the_oracle_says(taps, tokens, biased):
    torch.manual_seed(taps)
    x, weight, bias = torch.randn(1, 5, tokens), torch.randn(5, taps), torch.randn(5) if biased else None
    expected = convolve(x[0], weight, bias)
    torch.testing.assert_close(CONVOLVE(x.double(), weight.double(), None if bias is None else bias.double(), 0)[0], expected)
    torch.testing.assert_close(CONVOLVE(x, weight, bias, 0)[0].double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(CONVOLVE(x, weight[:, None], bias, 0), CONVOLVE(x, weight, bias, 0), rtol=0, atol=0)


def test_the_oracle_is_a_padded_convolution():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(5, 9).double(), torch.randn(5, 3).double(), torch.randn(5).double()
    expected = F.conv1d(x[None], weight[:, None], bias, padding=2, groups=5)[0, :, :9]
    torch.testing.assert_close(convolve(x, weight, bias), expected)
    assert convolve(x[:, :0], weight, bias).shape == (5, 0)


def test_half_precision_is_rounded_once():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(1, 5, 9).bfloat16(), torch.randn(5, 4).bfloat16(), torch.randn(5).bfloat16()
    out = CONVOLVE(x, weight, bias, 0)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out[0], convolve(x[0], weight, bias).float().bfloat16())


def test_a_tokens_bits_do_not_depend_on_its_neighbours():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(37, 3 + 50), torch.randn(37, 4), torch.randn(37)
    whole = causal_filter(x, weight, bias)
    for tokens in (1, 7, 16):
        parts = [causal_filter(x[:, first : first + 3 + tokens], weight, bias) for first in range(0, 50 - tokens + 1, tokens)]
        assert torch.equal(torch.cat(parts, 1), whole[:, : len(parts) * tokens])


def test_torch_accepts_the_operator():
    torch.library.opcheck(CONVOLVE, (torch.randn(1, 3, 5), torch.randn(3, 2), torch.randn(3), 0))
    torch.library.opcheck(CONVOLVE, (torch.randn(1, 3, 5), torch.randn(3, 1, 2), None, 0))
