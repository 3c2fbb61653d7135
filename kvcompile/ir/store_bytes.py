"""Bytes of keys and values that a store keeps and that a decode step reads, by the store's format: what plans print, and what stores are
held to.

    as computed   a number is a number
    int8          a byte a number, and one scale a token, KV head and side (key, value)
    kivi          two numbers, scale and smallest value, a group; codes of 2 or 4 bits, in whole bytes of 16 tokens or channels

Scales are of the model's dtype: the smallest number of a group is one of its numbers, so there it is exact, however large.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvcompile.ir.policy import ITEMSIZE, Int8, Kivi, SinkRecent, Store

DISK_BLOCK_TOKENS = 256  # tokens that a store on disk writes, and reads, at once
STAGED_BLOCKS = 4  # blocks of it that are in memory while they are attended to
_PAGE_BYTES = 4096

LANES = 16  # tokens of a key channel, or channels of a value, that are packed together


def code_bytes(numbers: int, bits: int) -> int:
    """Bytes of `numbers` codes, a multiple of LANES: byte i of a run of LANES holds 8 / bits of them."""
    assert numbers % LANES == 0, numbers
    return -(-(numbers // LANES) * bits // 8) * LANES


def key_group_bytes(kivi: Kivi, head_dim: int, itemsize: int) -> int:
    """`group` tokens of one KV head's keys: their codes, and a scale and a smallest value for each channel."""
    return code_bytes(kivi.group * head_dim, kivi.bits) + 2 * head_dim * itemsize


def value_token_bytes(kivi: Kivi, value_dim: int, itemsize: int) -> int:
    """One token of one KV head's values: its codes, and a scale and a smallest value for each group of channels."""
    return code_bytes(value_dim, kivi.bits) + 2 * (value_dim // kivi.group) * itemsize


def ring_residual(kivi: Kivi, window_tokens: int) -> int:
    """Tokens that a ring of `window_tokens` gathers before it quantises keys; 0 where no group fills: the ring then quantises nothing."""
    return min(kivi.residual_tokens, window_tokens // kivi.group * kivi.group)


def quantised_in(store: Store, window: SinkRecent | None, rollback_tokens: int) -> Int8 | Kivi | None:
    """How the store of a ring (window None: of every token) quantises; a ring that no group of KIVI fits in does not."""
    kivi = store.quantised
    if isinstance(kivi, Kivi) and window is not None and not ring_residual(kivi, window.recent_tokens + rollback_tokens):
        return None
    return kivi


def store_problem(store: Store, head_dim: int, value_dim: int) -> tuple[str, str] | None:
    """What of a store does not fit a head's size, and what to write instead; None where all does."""
    kivi = store.quantised
    if not isinstance(kivi, Kivi):
        return None
    if value_dim % kivi.group:
        fit = [group for group in (128, 64, 32, 16) if value_dim % group == 0]
        mend = f"Write group: {fit[0]}." if fit else "Write store: int8, which needs no groups."
        return f"kivi quantises values in groups of {kivi.group} channels, and value_dim {value_dim} is no multiple of it.", mend
    if head_dim * kivi.bits % 8:
        return f"kivi packs {8 // kivi.bits} channels of a key in a byte, and head_dim is {head_dim}.", "Write store: int8."
    return None


def stored_bytes(
    store: Store,
    dtype: str,
    kv_heads: int,
    head_dim: int,
    value_dim: int,
    tokens: int,
    window: SinkRecent | None = None,
    rollback_tokens: int = 0,
) -> int:
    """Bytes held after `tokens` tokens of a model of `dtype`.  window: of a ring, which holds rollback_tokens more; None: every token."""
    itemsize, kivi = ITEMSIZE[store.dtype or dtype], quantised_in(store, window, rollback_tokens)
    held = None if window is None else window.recent_tokens + rollback_tokens
    if not isinstance(kivi, Kivi):
        kept = tokens if window is None else min(tokens, window.window_tokens + rollback_tokens)
        return kv_heads * kept * _token_bytes(store, itemsize, head_dim, value_dim)
    sinks = 0 if window is None else min(tokens, window.sink_tokens)
    return kv_heads * _kivi(kivi, tokens - sinks, held, held).bytes(kivi, sinks, head_dim, value_dim, itemsize)


def read_bytes(
    store: Store,
    dtype: str,
    kv_heads: int,
    head_dim: int,
    value_dim: int,
    tokens: int,
    window: SinkRecent | None = None,
    rollback_tokens: int = 0,
) -> int:
    """Bytes that one decode step reads when `tokens` tokens, its own included, were given: of kivi what the store held before it, as
    far as it is visible, and its own token, which is quantised later."""
    itemsize, kivi = ITEMSIZE[store.dtype or dtype], quantised_in(store, window, rollback_tokens)
    held = None if window is None else window.recent_tokens + rollback_tokens
    if not isinstance(kivi, Kivi):
        seen = tokens if window is None else min(tokens, window.window_tokens)
        return kv_heads * seen * _token_bytes(store, itemsize, head_dim, value_dim)
    if tokens == 0:
        return 0
    sinks = 0 if window is None else min(tokens - 1, window.sink_tokens)
    visible = None if window is None else window.recent_tokens - 1
    before = _kivi(kivi, tokens - 1 - sinks, held, visible)
    return kv_heads * (before.bytes(kivi, sinks, head_dim, value_dim, itemsize) + (head_dim + value_dim) * itemsize)


def row_bytes(store: Store, dtype: str, kv_heads: int, head_dim: int, value_dim: int) -> int:
    """Bytes that are read of one token that was chosen alone, once it is quantised: of kivi with the scales of its key's whole group."""
    itemsize = ITEMSIZE[store.dtype or dtype]
    kivi = store.quantised
    if not isinstance(kivi, Kivi):
        return kv_heads * _token_bytes(store, itemsize, head_dim, value_dim)
    key = head_dim * kivi.bits // 8 + 2 * head_dim * itemsize
    return kv_heads * (key + value_token_bytes(kivi, value_dim, itemsize))


def packed_bytes(store: Store, dtype: str, kv_heads: int, head_dim: int, value_dim: int, tokens: int) -> int:
    """Bytes of `tokens` tokens in the middle of a long context, once they are quantised."""
    itemsize = ITEMSIZE[store.dtype or dtype]
    kivi = store.quantised
    if not isinstance(kivi, Kivi):
        return kv_heads * tokens * _token_bytes(store, itemsize, head_dim, value_dim)
    keys = tokens * key_group_bytes(kivi, head_dim, itemsize) // kivi.group
    return kv_heads * (keys + tokens * value_token_bytes(kivi, value_dim, itemsize))


def lent_bytes(store: Store, dtype: str, kv_heads: int, head_dim: int, value_dim: int, tokens: int) -> int:
    """Bytes of `tokens` tokens, every one kept, that a fork reads where they are: of kivi what is quantised, the rest is copied."""
    itemsize, kivi = ITEMSIZE[store.dtype or dtype], store.quantised
    if not isinstance(kivi, Kivi):
        return kv_heads * tokens * _token_bytes(store, itemsize, head_dim, value_dim)
    coded = replace(_kivi(kivi, tokens, None, None), exact_keys=0, exact_values=0)
    return kv_heads * coded.bytes(kivi, 0, head_dim, value_dim, itemsize)


def disk_block_bytes(kv_heads: int, head_dim: int, value_dim: int, itemsize: int) -> int:
    """A block of a store on disk, in whole pages."""
    return -(-DISK_BLOCK_TOKENS * kv_heads * (head_dim + value_dim) * itemsize // _PAGE_BYTES) * _PAGE_BYTES


def _token_bytes(store: Store, itemsize: int, head_dim: int, value_dim: int) -> int:
    """Of one token and KV head; kivi where a ring quantises nothing."""
    if isinstance(store.quantised, Int8):
        return head_dim + value_dim + 2 * itemsize
    return (head_dim + value_dim) * itemsize


@dataclass(frozen=True)
class _Kept:
    """What is kept of a run of tokens that KIVI quantises, sinks not counted."""

    exact_keys: int
    key_groups: int
    exact_values: int
    coded_values: int

    def bytes(self, kivi: Kivi, sinks: int, head_dim: int, value_dim: int, itemsize: int) -> int:
        exact = (sinks + self.exact_keys) * head_dim + (sinks + self.exact_values) * value_dim
        coded = self.key_groups * key_group_bytes(kivi, head_dim, itemsize)
        return exact * itemsize + coded + self.coded_values * value_token_bytes(kivi, value_dim, itemsize)


def _kivi(kivi: Kivi, tokens: int, held: int | None, visible: int | None) -> _Kept:
    """After `tokens` tokens of which a ring holds the last `held` (None: all), the parts that touch the last `visible` ones."""
    residual = kivi.residual_tokens if held is None else ring_residual(kivi, held)
    coded_keys = tokens - tokens % residual
    if held is None or visible is None:
        return _Kept(tokens - coded_keys, coded_keys // kivi.group, min(tokens, residual), max(0, tokens - residual))
    if visible == held:  # what is stored: a ring of groups
        groups = min(coded_keys // kivi.group, -(-held // kivi.group))
    else:
        groups = max(0, coded_keys // kivi.group - max(0, tokens - visible) // kivi.group)
    exact_values = min(tokens, residual, visible)
    return _Kept(min(tokens - coded_keys, visible), groups, exact_values, min(max(0, tokens - residual), max(0, visible - residual)))
