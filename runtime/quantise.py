"""Keys and values of fewer bits: the arithmetic of quantised stores, and how their numbers lie in memory.

Letters: H KV heads, S tokens, U groups of tokens, C tokens of a group, N blocks of 16 tokens, D head_dim, E value_dim, V vectors,
L lanes of a vector (16), B bytes.

    code = round((x - low) / scale), x' = code * scale + low     low: the group's smallest number; scale: its range / (2^bits - 1)

KIVI (Liu et al. 2024, section 3.2): a key's group is `group` tokens of one channel, a value's is `group` channels of one token.
Everything is computed in float32 with scale and low as they are kept, in the dtype of the numbers; low is one of them, so a group of equal
numbers has scale 0 and comes back exactly.

Sixteen codes that a kernel reads at once (16 tokens of a channel, 16 channels of a token) are a vector; byte l of a run of 16 bytes holds
lane l of 8 / bits vectors, the first one in the lowest bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompile.ir.policy import Kivi

LANES = 16
INT8_LEVELS = 127
INT8_OFFSET = 128  # a code of 8 bits is kept as code + 128


def pack(code_VL: Tensor, bits: int) -> Tensor:
    """uint8 [..., V, 16], codes below 2**bits -> uint8 [..., B / 16, 16]; vectors that fill no byte are filled up with zeros."""
    vectors = 8 // bits
    missing = -code_VL.shape[-2] % vectors
    if missing:
        code_VL = torch.nn.functional.pad(code_VL, (0, 0, 0, missing))
    parts: Tensor = code_VL.unflatten(-2, (-1, vectors))
    packed = parts[..., 0, :].clone()
    for part in range(1, vectors):
        packed |= parts[..., part, :] << (bits * part)
    return packed


def unpack(packed_BL: Tensor, bits: int, vectors: int) -> Tensor:
    """The inverse of `pack`: uint8 [..., V, 16]."""
    mask = (1 << bits) - 1
    parts = [(packed_BL >> (bits * part)) & mask for part in range(8 // bits)]
    return torch.stack(parts, -2).flatten(-3, -2).narrow(-2, 0, vectors)


def quantise_keys(key_HSD: Tensor, kivi: Kivi) -> tuple[Tensor, Tensor]:
    """Whole groups of tokens -> codes uint8 [H, U, B], and scales and smallest numbers of all channels, [H, U, 2, D] as uint8 [H, U, B]."""
    key_HUCD = key_HSD.unflatten(1, (-1, kivi.group))
    code_HUCD, low_HUD, scale_HUD = _quantise(key_HUCD, 2, kivi.bits)
    code_HUNDL = code_HUCD.unflatten(2, (-1, LANES)).transpose(3, 4)
    return pack(code_HUNDL, kivi.bits).flatten(2), _bytes(torch.stack([scale_HUD, low_HUD], 2))


def dequantise_keys(code_HUB: Tensor, scale_HUB: Tensor, head_dim: int, dtype: torch.dtype, kivi: Kivi) -> Tensor:
    """[H, U * group, D], float32 or float64.  dtype: of the scales."""
    code_HUNBL = code_HUB.unflatten(2, (kivi.group // LANES, -1, LANES))
    code_HUNLD = unpack(code_HUNBL, kivi.bits, head_dim).transpose(3, 4)
    scale_HUD, low_HUD = _numbers(scale_HUB, dtype).unflatten(2, (2, head_dim)).unbind(2)
    key_HUNLD: Tensor = code_HUNLD.to(scale_HUD.dtype) * scale_HUD[:, :, None, None] + low_HUD[:, :, None, None]
    return key_HUNLD.flatten(1, 3)


def dequantise_some_keys(code_KB: Tensor, scale_KB: Tensor, place_K: Tensor, head_dim: int, dtype: torch.dtype, kivi: Kivi) -> Tensor:
    """One key of each of K groups, [K, D]: that of token place_K in its group."""
    code_KNBL = code_KB.unflatten(1, (kivi.group // LANES, -1, LANES))
    lane_KB1 = code_KNBL[torch.arange(len(place_K)), place_K // LANES, :, place_K % LANES].unsqueeze(2)
    scale_KD, low_KD = _numbers(scale_KB, dtype).unflatten(1, (2, head_dim)).unbind(1)
    key_KD: Tensor = unpack(lane_KB1, kivi.bits, head_dim).squeeze(2).to(scale_KD.dtype) * scale_KD + low_KD
    return key_KD


def quantise_values(value_HSE: Tensor, kivi: Kivi) -> tuple[Tensor, Tensor]:
    """Codes uint8 [H, S, B], and scales and smallest numbers of a token's groups, [H, S, 2, groups] as uint8 [H, S, B]."""
    code, low_HSU, scale_HSU = _quantise(value_HSE.unflatten(2, (-1, kivi.group)), 3, kivi.bits)
    code_HSVL = code.flatten(2).unflatten(2, (-1, LANES))
    return pack(code_HSVL, kivi.bits).flatten(2), _bytes(torch.stack([scale_HSU, low_HSU], 2))


def dequantise_values(code_XB: Tensor, scale_XB: Tensor, value_dim: int, dtype: torch.dtype, kivi: Kivi) -> Tensor:
    """[..., E], float32 or float64; X: any leading dimensions."""
    code_XVL = unpack(code_XB.unflatten(-1, (-1, LANES)), kivi.bits, value_dim // LANES)
    scale_XU, low_XU = _numbers(scale_XB, dtype).unflatten(-1, (2, value_dim // kivi.group)).unbind(-2)
    code_XUC = code_XVL.flatten(-2).unflatten(-1, (-1, kivi.group))
    value_XUC: Tensor = code_XUC.to(scale_XU.dtype) * scale_XU[..., None] + low_XU[..., None]
    return value_XUC.flatten(-2)


def quantise_int8(number_XD: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes + 128, uint8 [..., D], and one scale a row, `dtype` [...]: the largest size / 127, kept in `dtype`."""
    number_XD = _wide(number_XD.to(dtype))
    scale_X = (number_XD.abs().amax(-1) / INT8_LEVELS).to(dtype)
    step_X1 = _wide(scale_X)[..., None]
    code_XD = torch.where(step_X1 > 0, number_XD / step_X1, 0).round_().clamp_(-INT8_LEVELS, INT8_LEVELS)
    return (code_XD + INT8_OFFSET).to(torch.uint8), scale_X


def dequantise_int8(code_XD: Tensor, scale_X: Tensor) -> Tensor:
    """[..., D], float32 or float64."""
    step_X1 = _wide(scale_X)[..., None]
    return (code_XD.to(step_X1.dtype) - INT8_OFFSET) * step_X1


def _quantise(number: Tensor, dim: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8, and without the dimension `dim` the smallest numbers and scales, in the dtype of the numbers."""
    dtype, levels = number.dtype, (1 << bits) - 1
    wide = _wide(number)
    low, high = wide.amin(dim, keepdim=True), wide.amax(dim, keepdim=True)
    scale = (high / levels - low / levels).to(dtype)
    step = _wide(scale)
    code = torch.where(step > 0, (wide - low) / step, 0).round_().clamp_(0, levels)
    return code.to(torch.uint8), low.to(dtype).squeeze(dim), scale.squeeze(dim)


def _wide(number: Tensor) -> Tensor:
    return number if number.dtype == torch.float64 else number.float()


def _bytes(number_XUD: Tensor) -> Tensor:
    """The last two dimensions as bytes."""
    return number_XUD.flatten(-2).view(torch.uint8)


def _numbers(byte_XB: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers that were kept as bytes, wherever they lie: float32 or float64."""
    return _wide(byte_XB.contiguous().view(dtype))
