from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
import toys
from torch import nn
from units import after, agrees_before_and_after, texts

from kvcompile.ir.errors import UnsupportedGraphError
from kvcompile.ir.show import difference

MEND = "\n  Only attention and causal convolutions may carry anything from one token to another; this layer is not supported yet."


@pytest.mark.parametrize("name", ["planted", "nanogpt", "gated", "sliced_table", "shared_values", "convolution"])
def test_a_transformer_passes_unchanged(name):
    assert difference(*texts("check_token_wise", getattr(toys, name)())) == ""


def test_before_and_after_agree():
    agrees_before_and_after("check_token_wise", toys.nanogpt(), 64)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_models_of_transformers_pass(name):
    after("check_token_wise", toys.llama(layers=1) if name == "llama" else getattr(toys, name)())


def refusal(model: nn.Module) -> str:
    with pytest.raises(UnsupportedGraphError) as caught:
        after("check_token_wise", model)
    return str(caught.value)


def test_what_mixes_tokens_is_refused(golden):
    golden("check_token_wise", re.sub(r"toys\.py:\d+", "toys.py", refusal(toys.running_sum())))


def test_a_running_sum_is_refused_by_its_node():
    text = refusal(toys.running_sum())
    assert re.match(r"check_token_wise: cumsum \(toys\.py:\d+\): cumsum works along the token dimension: f32\[1, s, 16\] ", text)
    assert text.endswith(MEND)


NORM = nn.GroupNorm(2, 16)
MIXINGS = {
    "a shift by slices": (lambda x: torch.cat([x[:, :1], x[:, :-1]], 1), "slice works along the token dimension"),
    "a shift by padding": (lambda x: F.pad(x, (0, 0, 1, -1)), "pad shifts tokens"),
    "a roll": (lambda x: x.roll(1, 1), "roll works along the token dimension"),
    "a flip": (lambda x: x.flip(1), "flip works along the token dimension"),
    "gathering": (
        lambda x: x.gather(1, (torch.arange(x.shape[1]) - 1).clamp(min=0)[None, :, None].expand(1, -1, 16)),
        "gather works along the token dimension",
    ),
    "picking by number": (lambda x: x[:, (torch.arange(x.shape[1]) - 1).clamp(min=0)], "index picks tokens by number"),
    "softmax over tokens": (lambda x: x.softmax(1), "softmax works along the token dimension"),
    "a mean over tokens": (lambda x: x - x.mean(1, keepdim=True), "mean works along the token dimension"),
    "a maximum over tokens": (lambda x: x - x.max(1, keepdim=True).values, "max works along the token dimension"),
    "a norm of everything": (lambda x: x / x.norm(), "linalg_vector_norm works on the flattened tensor"),
    "numbers dealt out to other tokens": (
        lambda x: x.transpose(1, 2).reshape(1, x.shape[1], 16),
        "reshape deals a token's numbers out to others",
    ),
    "the last token": (lambda x: x + x[:, -1:], "slice works along the token dimension"),
    "a product over tokens": (lambda x: x @ (x.transpose(1, 2) @ x), "matmul sums over tokens"),
    "an einsum over tokens": (lambda x: x @ torch.einsum("bsd,bse->bde", x, x), "matmul sums over tokens"),
    "an einsum of three": (lambda x: torch.einsum("bsd,bsd,bte->bse", x, x, x), "einsum is not known to be token-wise"),
    "tokens repeated, whatever the dimension": (
        lambda x: x.transpose(1, 2).repeat_interleave(2).view(1, 16, -1, 2)[..., 0].transpose(1, 2),
        "repeat_interleave works on the flattened tensor",
    ),
    "copies in another order": (
        lambda x: (x[0].repeat(3, 1).view(3, -1, 16) + x[0].repeat_interleave(3, 0).view(3, -1, 16)).sum(0, keepdim=True),
        "view deals a token's numbers out to others",
    ),
    "tokens repeated one by one, taken as copies": (
        lambda x: x[0].repeat_interleave(3, 0).view(3, -1, 16).sum(0, keepdim=True),
        "view deals a token's numbers out to others",
    ),
    "copies taken as tokens repeated one by one": (
        lambda x: x[0].repeat(3, 1).view(-1, 3, 16).sum(1)[None],
        "view deals a token's numbers out to others",
    ),
    "a write by number": (
        lambda x: x.index_put((torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long)), x[:, 0]),
        "select works along the token dimension",
    ),
    "a group norm over tokens": (lambda x: NORM(x.transpose(1, 2)).transpose(1, 2), "group_norm is not known to be token-wise"),
    "pooling": (lambda x: F.avg_pool1d(x.transpose(1, 2), 3, 1, 1).transpose(1, 2), "avg_pool1d is not known to be token-wise"),
}


@pytest.mark.parametrize("kind", MIXINGS)
def test_whatever_else_mixes_tokens_is_refused(kind):
    mixing, why = MIXINGS[kind]

    class Model(toys.Mixed):
        def __init__(self):
            super().__init__()
            self.norm = NORM

        def mix(self, x):
            return mixing(x)

    text = refusal(Model().eval())
    assert f": {why}: " in text
    assert text.endswith(MEND)


def _filled(x):
    x = x.clone()
    x[x > 0.5] = 0.25
    return x


FEATURE_WISE = {
    "softmax over features": lambda x: x.softmax(-1),
    "a sum over features": lambda x: x * x.sum(-1, keepdim=True),
    "padded features": lambda x: F.pad(x, (2, 0))[:, :, 2:],
    "sorted features": lambda x: x.sort(-1).values,
    "half of the features": lambda x: torch.cat([x[..., 8:], x[..., :8]], -1),
    "a slice of all tokens": lambda x: x[:, :],
    "copies for experts, laid one behind the other": lambda x: x[0].repeat(3, 1).view(3, -1, 16).sum(0)[None] * x,
    "copies weighed by what was computed for each": lambda x: (
        (x[0].repeat(3, 1) * x[0, :, :3].transpose(0, 1).reshape(-1, 1)).reshape(3, -1, 16).sum(0)[None]
    ),
    "a number written under a mask": lambda x: x.masked_fill(x > 0, 1.0) + _filled(x),
    "the larger of two": lambda x: torch.max(x, x.flip(2)) - torch.min(x, x * 2),
    "a product with itself": lambda x: (x.unsqueeze(2) @ x.unsqueeze(3)).squeeze(3) * x,
}


@pytest.mark.parametrize("kind", FEATURE_WISE)
def test_what_works_along_features_passes(kind):
    class Model(toys.Mixed):
        def mix(self, x):
            return FEATURE_WISE[kind](x)

    after("check_token_wise", Model().eval())


def test_at_most_eight_nodes_are_listed():
    class Model(toys.Mixed):
        def mix(self, x):
            for _ in range(12):
                x = x.cumsum(1)
            return x

    assert refusal(Model().eval()).count("cumsum works along") == 8
