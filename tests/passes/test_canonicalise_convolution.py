from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn.functional as F
import toys
from torch import nn
from units import after, agrees_before_and_after, learnt, texts

from kvcompile.ir.convolve_op import CONVOLVE
from kvcompile.ir.errors import UnsupportedGraphError
from kvcompile.ir.show import difference
from kvcompile.ir.sites import ConvolutionSite

BUILT = "\n  Built: a filter for each channel (groups = channels), causal, stride 1, dilation 1, zeros before the first token."


def test_a_causal_convolution_becomes_a_numbered_site(golden):
    golden("canonicalise_convolution", difference(*texts("canonicalise_convolution", toys.convolution())))


@pytest.mark.parametrize(("name", "vocabulary"), [("convolution", 32), ("lfm2", 256)])
def test_before_and_after_agree(name, vocabulary):
    agrees_before_and_after("canonicalise_convolution", getattr(toys, name)(), vocabulary)


def test_a_model_without_convolutions_is_not_touched():
    assert difference(*texts("canonicalise_convolution", toys.nanogpt())) == ""
    assert learnt("canonicalise_convolution", toys.nanogpt()) == ""


def test_sites_are_described_and_numbered_apart_from_attentions():
    unit = after("canonicalise_convolution", toys.lfm2("cac"))
    assert unit.convolutions == (
        ConvolutionSite(0, "model.layers.0.conv", channels=64, taps=4, dtype="float32"),
        ConvolutionSite(1, "model.layers.2.conv", channels=64, taps=4, dtype="float32"),
    )
    assert [(site.index, site.path) for site in unit.sites] == [(0, "model.layers.1.self_attn")]


class Convolved(toys.Mixed):
    """A convolution as `write` calls it, x [1, tokens, channels] to the same, with its own `options`."""

    def __init__(self, write, **options):
        super().__init__()
        self.write = write
        self.conv = nn.Conv1d(16, 16, **{"kernel_size": 3, "groups": 16, **options})

    def mix(self, x):
        return self.write(self.conv, x)


def convolved(write, **options) -> nn.Module:
    torch.manual_seed(1)
    return Convolved(write, **options).eval()


def chunked(conv, x):
    """Zeros as a tensor of their own, as kernels of short convolutions keep them."""
    x = x.transpose(1, 2)
    return conv(torch.cat([x.new_zeros(1, 16, 2), x], dim=2)).transpose(1, 2)


CAUSAL = {
    "padded on both sides and cut by a number": (lambda conv, x: conv(x.transpose(1, 2))[..., :-2].transpose(1, 2), {"padding": 2}),
    "padded on both sides and cut to the tokens": (
        lambda conv, x: conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2),
        {"padding": 2},
    ),
    "padded before": (lambda conv, x: conv(F.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2), {}),
    "padded while tokens stand before channels": (lambda conv, x: conv(F.pad(x, (0, 0, 2, 0)).transpose(1, 2)).transpose(1, 2), {}),
    "cut while tokens stand before channels": (lambda conv, x: conv(x.transpose(1, 2)).transpose(1, 2)[:, : x.shape[1]], {"padding": 2}),
    "zeros put in front": (chunked, {}),
    "padding given by name": (lambda conv, x: conv(F.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2), {"padding": "valid"}),
    "without a bias": (lambda conv, x: conv(F.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2), {"bias": False}),
    "padded further and cut on both sides": (lambda conv, x: conv(x.transpose(1, 2))[..., 1:-3].transpose(1, 2), {"padding": 3}),
    "of one tap": (lambda conv, x: conv(x.transpose(1, 2)).transpose(1, 2), {"kernel_size": 1}),
    "padded twice and cut on both sides": (
        lambda conv, x: conv(F.pad(x, (0, 0, 2, 0)).transpose(1, 2))[..., 1:-1].transpose(1, 2),
        {"padding": 1},
    ),
    "with a weight that is computed": (
        lambda conv, x: F.conv1d(F.pad(x.transpose(1, 2), (2, 0)), torch.tanh(conv.weight), conv.bias, groups=16).transpose(1, 2),
        {},
    ),
}


@pytest.mark.parametrize("kind", CAUSAL)
def test_it_is_recognised_however_it_is_padded_and_cut(kind):
    write, options = CAUSAL[kind]
    model = convolved(write, **options)
    agrees_before_and_after("canonicalise_convolution", copy.deepcopy(model), 32)
    unit = after("outline_segments", model)
    assert [(site.channels, site.taps) for site in unit.convolutions] == [(16, options.get("kernel_size", 3))]


def test_the_weight_is_the_models_own_and_no_segment_turns_it():
    unit = after("outline_segments", toys.lfm2("ca"))
    (node,) = unit.graph.graph.find_nodes(op="call_function", target=CONVOLVE)
    assert [argument.target for argument in node.args[1:3]] == ["model.layers.0.conv.conv.weight", "model.layers.0.conv.conv.bias"]


def refusal(model) -> str:
    with pytest.raises(UnsupportedGraphError) as caught:
        after("canonicalise_convolution", model)
    return str(caught.value)


OTHERS = {
    "that looks ahead": (lambda conv, x: conv(x.transpose(1, 2)).transpose(1, 2), {"padding": 1}, "that is not a causal filter"),
    "that looks back too far": (
        lambda conv, x: conv(x.transpose(1, 2))[..., :-4].transpose(1, 2),
        {"padding": 3},
        "that is not a causal filter",
    ),
    "that starts with the first token repeated": (
        lambda conv, x: conv(F.pad(x.transpose(1, 2), (2, 0), mode="replicate")).transpose(1, 2),
        {},
        "that is not a causal filter",
    ),
    "with something else before it is cut": (
        lambda conv, x: F.silu(conv(x.transpose(1, 2)))[..., :-2].transpose(1, 2),
        {"padding": 2},
        "that is not a causal filter",
    ),
    "with a stride": (
        lambda conv, x: conv(F.pad(x.transpose(1, 2), (2, 0))).repeat_interleave(2, dim=2)[..., : x.shape[1]].transpose(1, 2),
        {"stride": 2},
        "with a stride",
    ),
    "with a dilation": (lambda conv, x: conv(F.pad(x.transpose(1, 2), (4, 0))).transpose(1, 2), {"dilation": 2}, "with a dilation"),
    "of all channels": (lambda conv, x: conv(F.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2), {"groups": 1}, "that mixes channels"),
    "of pairs of channels": (lambda conv, x: conv(F.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2), {"groups": 8}, "that mixes channels"),
    "of several sequences": (
        lambda conv, x: conv(F.pad(torch.cat([x, x]).transpose(1, 2), (2, 0))).transpose(1, 2)[:1],
        {},
        "of several sequences at once",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_any_other_convolution_over_tokens_is_refused_by_its_node(kind):
    write, options, why = OTHERS[kind]
    text = refusal(convolved(write, **options))
    assert re.match(rf"canonicalise_convolution: conv \(\w+\.py:\d+\): a convolution over the tokens {why}: f32\[", text)
    assert " = aten.conv1d.default(" in text
    assert text.endswith(BUILT)


def test_a_transposed_convolution_is_refused():
    class Transposed(toys.Mixed):
        def __init__(self):
            super().__init__()
            self.conv = nn.ConvTranspose1d(16, 16, 3, groups=16)

        def mix(self, x):
            return torch.convolution(x.transpose(1, 2), self.conv.weight, None, [1], [0], [1], True, [0], 16)[..., :-2].transpose(1, 2)

    assert "a convolution over the tokens that is transposed: " in refusal(Transposed().eval())


def test_every_convolution_that_is_refused_is_named():
    class Two(toys.CentredConvolution):
        def mix(self, x):
            return super().mix(super().mix(x))

    assert refusal(Two().eval()).count("that is not a causal filter") == 2


def test_a_convolution_over_features_is_left_to_the_token_wise_check():
    class Features(toys.Mixed):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(1, 1, 3, padding=1)

        def mix(self, x):
            return self.conv(x.transpose(0, 1)).transpose(0, 1)

    assert after("canonicalise_convolution", Features().eval()).convolutions == ()
    with pytest.raises(UnsupportedGraphError, match="conv1d is not known to be token-wise"):
        after("check_token_wise", Features().eval())
