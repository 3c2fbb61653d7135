"""`kvc::linears` as an operator against torch's own linear layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kvcompile.ir.linear_op import LINEARS


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("widths", [(3,), (4, 2, 5)])
@pytest.mark.parametrize("bias", [False, True])
def test_the_operator_is_linear_layers_side_by_side(tokens, widths, bias):
    torch.manual_seed(0)
    x, weights = torch.randn(1, tokens, 6), [torch.randn(width, 6) for width in widths]
    biases = [torch.randn(width) for width in widths] if bias else []
    expected = [F.linear(x, weight, biases[place] if bias else None) for place, weight in enumerate(weights)]
    out = LINEARS(x, weights, biases)
    assert out.is_contiguous()
    assert torch.equal(out, torch.cat(expected, dim=2))


def test_tracing_it_knows_its_shape():
    torch.library.opcheck(LINEARS, (torch.randn(1, 5, 6), [torch.randn(3, 6), torch.randn(2, 6)], []))
