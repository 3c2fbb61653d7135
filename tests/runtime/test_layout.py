"""Keys in blocks of 16 tokens: where each number lies, and that stores of blocks and of rows hold and give back the same."""

from __future__ import annotations

import pytest
import torch

from kvcompile.runtime import growable
from kvcompile.runtime.address_space import PAGE_BYTES, release_tail
from kvcompile.runtime.growable import GrowableStore
from kvcompile.runtime.layout import BLOCK_TOKENS, KeyBlocks, KeyLayout, key_capacity, padded
from kvcompile.runtime.ring import RingStore

HEADS = 2


@pytest.mark.parametrize("head_dim", [2, 16, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_slots_that_were_written_are_read_again(dtype: torch.dtype, head_dim: int) -> None:
    slots = 40
    for slot in range(slots):
        for tokens in (1, 15, 16, 17, slots - slot):
            if slot + tokens > slots:
                continue
            memory = torch.full((HEADS, padded(slots) * head_dim + 3), -1.0).to(dtype)
            keys, right = KeyBlocks(memory, head_dim, slots), torch.full((HEADS, slots, head_dim), -1.0).to(dtype)
            key = torch.randn(HEADS, tokens, head_dim)
            keys.write(slot, key)
            right[:, slot : slot + tokens] = key.to(dtype)
            assert torch.equal(keys.read(0, slots), right)
            assert torch.equal(keys.read(slot, tokens), right[:, slot : slot + tokens])
            assert (memory[:, padded(slots) * head_dim :] == -1).all()


@pytest.mark.parametrize(("dtype", "pair"), [(torch.float32, 1), (torch.bfloat16, 2)])
def test_every_number_lies_where_kernel_h_says(dtype: torch.dtype, pair: int) -> None:
    head_dim, slots = 8, 32
    memory = torch.zeros(HEADS, slots * head_dim, dtype=dtype)
    key = torch.randn(HEADS, slots, head_dim).to(dtype)
    KeyBlocks(memory, head_dim, slots).write(0, key)
    for head in range(HEADS):
        for slot in range(slots):
            for d in range(head_dim):
                block, lane = divmod(slot, BLOCK_TOKENS)
                at = block * BLOCK_TOKENS * head_dim + (d // pair * BLOCK_TOKENS + lane) * pair + d % pair
                assert memory[head, at] == key[head, slot, d]


def test_a_block_is_whole() -> None:
    assert [padded(tokens) for tokens in (0, 1, 15, 16, 17)] == [0, 16, 16, 16, 32]
    assert [key_capacity("blocks", slots) for slots in (1, 16, 33)] == [16, 16, 48]
    assert key_capacity("rows", 33) == 33


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [(1, 7, 30, 100, -60, 5, 33), (100, -99, 1, 1, 50), (16, 16, -1, 1, -17, 90)])
def test_stores_of_blocks_hold_what_stores_of_rows_hold(steps: tuple[int, ...], dtype: torch.dtype) -> None:
    stores = [GrowableStore(HEADS, 16, 24, dtype, 50, layout) for layout in ("rows", "blocks")]
    rings = [RingStore(HEADS, 16, 24, dtype, 4, 30, 100, layout) for layout in ("rows", "blocks")]
    for tokens in steps:
        for pair in (stores, rings):
            key, value = torch.randn(HEADS, max(tokens, 0), 16), torch.randn(HEADS, max(tokens, 0), 24)
            for store in pair:
                if tokens < 0:
                    store.rollback(-tokens)
            if tokens < 0:
                assert pair[0].nbytes() == pair[1].nbytes()
                continue
            one, two = (store.extend(key, value) for store in pair)
            assert [span.first for span in one] == [span.first for span in two]
            for span, other in zip(one, two, strict=True):
                assert torch.equal(span.key_HTD, other.key_HTD)
                assert torch.equal(span.value_HTE, other.value_HTE)
            assert pair[0].nbytes() == pair[1].nbytes()


@pytest.mark.parametrize("slot", [0, 16])
def test_no_token_is_read_from_the_start_of_a_block(slot: int) -> None:
    assert KeyBlocks(torch.zeros(HEADS, 32 * 16), 16, 32).read(slot, 0).shape == (HEADS, 0, 16)


def test_an_empty_ring_of_blocks_is_forked() -> None:
    assert RingStore(HEADS, 16, 24, torch.float32, 4, 30, layout="blocks").fork().tokens == 0


@pytest.mark.parametrize("keep", [0, 1, 1000, 1024, 1030])
def test_a_rollback_gives_the_pages_of_blocks_back_as_it_does_those_of_rows(keep: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the block of the last token that stays."""
    released: list[int] = []
    release = release_tail

    def counted(tail: torch.Tensor) -> int:
        released[-1] += release(tail)
        return 0

    monkeypatch.setattr(growable, "release_tail", counted)
    tokens, head_dim = 5000, 64
    key = torch.randn(HEADS, tokens, head_dim)
    layouts: tuple[KeyLayout, ...] = ("rows", "blocks")
    for layout in layouts:
        released.append(0)
        store = GrowableStore(HEADS, head_dim, head_dim, torch.float32, 8192, layout)
        store.extend(key, key)
        before = store.nbytes()
        store.rollback(tokens - keep)
        assert store.nbytes() == before // tokens * keep
        if keep:
            (span,) = store.spans()
            assert torch.equal(span.key_HTD, key[:, :keep])
            assert torch.equal(span.value_HTE, key[:, :keep])
    if keep:
        rows, blocks = released
        block_bytes = BLOCK_TOKENS * head_dim * 4
        assert rows > 0 and abs(rows - blocks) <= 2 * HEADS * 2 * max(block_bytes, PAGE_BYTES)
