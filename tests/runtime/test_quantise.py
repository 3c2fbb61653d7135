"""Codes, scales and how they lie: against plain loops; and stores of 8 bits."""

from __future__ import annotations

import pytest
import torch
from quantised import int8_row, rounded_group

from kvcompile.ir.policy import Kivi
from kvcompile.runtime.growable import GrowableStore
from kvcompile.runtime.quantise import (
    dequantise_keys,
    dequantise_values,
    pack,
    quantise_keys,
    quantise_values,
    unpack,
)
from kvcompile.runtime.ring import RingStore

HEADS = 2


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("vectors", [1, 3, 4, 8])
def test_packed_codes_come_back_and_lie_where_the_kernels_look(bits, vectors):
    code_VL = torch.randint(0, 2**bits, (5, vectors, 16), dtype=torch.uint8)
    packed = pack(code_VL, bits)
    assert packed.shape == (5, -(-vectors * bits // 8), 16)
    assert torch.equal(unpack(packed, bits, vectors), code_VL)
    for vector in range(vectors):
        byte = packed[:, vector * bits // 8]
        assert torch.equal(byte >> (vector * bits % 8) & (2**bits - 1), code_VL[:, vector])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kivi", [Kivi(2, 16, 16), Kivi(4, 32, 32)], ids=Kivi.describe)
def test_groups_are_tokens_of_keys_and_channels_of_values(kivi, dtype):
    torch.manual_seed(0)
    key_HSD, value_HSE = (torch.randn(HEADS, 64, dim).mul(3).to(dtype) for dim in (24, 96))
    codes, scales = quantise_keys(key_HSD, kivi)
    back = dequantise_keys(codes, scales, 24, dtype, kivi)
    for first in range(0, 64, kivi.group):
        for channel in (0, 7, 23):
            group = key_HSD[1, first : first + kivi.group, channel]
            right = rounded_group(group, kivi.bits)
            torch.testing.assert_close(back[1, first : first + kivi.group, channel].double(), right, rtol=2e-7, atol=1e-6)
    back = dequantise_values(*quantise_values(value_HSE, kivi), 96, dtype, kivi)
    for first in range(0, 96, kivi.group):
        right = rounded_group(value_HSE[0, 5, first : first + kivi.group], kivi.bits)
        torch.testing.assert_close(back[0, 5, first : first + kivi.group].double(), right, rtol=2e-7, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_stores_hold_one_scale_a_token(dtype):
    """Growable, behind a fork and a rollback, and gathered; equal numbers and zeros stay finite."""
    key, value = (torch.randn(HEADS, 100, dim).mul(5).to(dtype) for dim in (15, 21))
    key[:, 3], value[:, 4], key[:, 5] = 0, 0, 2.5
    store = GrowableStore(HEADS, 15, 21, dtype, 40, "int8")
    store.extend(key[:, :70], value[:, :70])
    store = store.fork()
    store.extend(key[:, 70:], value[:, 70:])
    store.rollback(10)
    spans = store.spans()
    held_key, held_value = (torch.cat([span[part] for span in spans], 1) for part in (1, 2))
    assert held_key.dtype == torch.float32 and held_key.shape == (HEADS, 90, 15)
    for token in (0, 3, 4, 5, 39, 40, 89):
        torch.testing.assert_close(held_key[1, token].double(), int8_row(key[1, token]), rtol=2e-7, atol=0)
        torch.testing.assert_close(held_value[0, token].double(), int8_row(value[0, token]), rtol=2e-7, atol=0)
    assert store.nbytes() + store.shared_nbytes() == HEADS * 90 * (15 + 21 + 2 * dtype.itemsize)
    position_HK = torch.stack([torch.randperm(90)[:30] for _ in range(HEADS)])
    head_H1 = torch.arange(HEADS)[:, None]
    for found, right in zip(store.gather(position_HK), (held_key, held_value), strict=True):
        assert torch.equal(found, right[head_H1, position_HK])
    for first, end in ((0, 90), (17, 18), (30, 71)):
        for span in store.spans_between(first, end):
            assert torch.equal(span.key_HTD, held_key[:, span.first : span.end])


@pytest.mark.parametrize("new", [1, 3, 50])
def test_int8_rings_hold_what_int8_stores_do(new):
    ring, full = RingStore(HEADS, 16, 24, torch.bfloat16, 4, 30, 2, "int8"), GrowableStore(HEADS, 16, 24, torch.bfloat16, 500, "int8")
    for step in range(120 // new + 1):
        if step == 20:
            ring = ring.fork()
        key, value = torch.randn(HEADS, new, 16), torch.randn(HEADS, new, 24)
        spans = ring.extend(key, value)
        full.append(key, value)
        assert sum(span.tokens for span in spans) >= min(full.tokens, 34)
        for span in spans:
            (right,) = full.spans_between(span.first, span.end)
            assert torch.equal(span.key_HTD, right.key_HTD) and torch.equal(span.value_HTE, right.value_HTE)
    assert ring.nbytes() == HEADS * 36 * (16 + 24 + 4)


@pytest.mark.parametrize("layout", ["rows", "blocks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_stores_gather_and_cut_out_too(layout, dtype):
    store = GrowableStore(HEADS, 16, 24, dtype, 40, layout)
    for tokens in (30, 70):
        store.extend(torch.randn(HEADS, tokens, 16), torch.randn(HEADS, tokens, 24))
    spans = store.spans()
    held_key, held_value = (torch.cat([span[part] for span in spans], 1) for part in (1, 2))
    position_HK = torch.stack([torch.randperm(100)[:30] for _ in range(HEADS)])
    head_H1 = torch.arange(HEADS)[:, None]
    for found, right in zip(store.gather(position_HK), (held_key, held_value), strict=True):
        assert torch.equal(found, right[head_H1, position_HK])
    assert [(span.first, span.end) for span in store.spans_between(30, 70)] == [(30, 40), (40, 70)]
    for span in store.spans_between(30, 70):
        assert torch.equal(span.value_HTE, held_value[:, span.first : span.end])
