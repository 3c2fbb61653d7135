"""What a kernel must do, without saying which layer it is for: equal layers share one kernel."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Literal, TypeAlias


@dataclass(frozen=True)
class KernelRequest:
    """A kernel that attends over spans of keys and values.

    No layer names, no pointers, no token counts: `key` is the same for equal layers and on every run.
    dtype:         of query, new keys and values, and result.  compute_dtype: of logits, weights and sums.
    store_dtype:   what keys and values are kept in.  store_quantised: "int8", "kivi BITS GROUP", or "" where they are not quantised;
                   store_dtype is then that of scales and of exact tokens.
    chunk_tokens:  of these, a query sees only keys of its own chunk of so many positions; None: no such chunks.
    alibi:         a slope a query head, given at run time, times (key position - query position) joins the logit.
    cache_index:   keys in the sinks are shown another query, rotated to its place in the cache (StreamingLLM).
    sink_tokens, recent_tokens: the visible set (ir/policy.py); recent_tokens None means every earlier token.
    key_layout:    of a C++ kernel's store: keys in blocks of 16 tokens, or a token a row, as policies that find keys keep them.
    """

    kind: Literal["attend_spans"]
    device: str
    head_dim: int
    value_dim: int
    queries_per_kv: int
    dtype: str
    compute_dtype: str
    store_dtype: str
    scale: float
    soft_cap: float | None
    learnt_sinks: bool
    sink_tokens: int
    recent_tokens: int | None
    chunk_tokens: int | None = None
    alibi: bool = False
    cache_index: bool = False
    store_quantised: str = ""
    key_layout: Literal["blocks", "rows"] = "blocks"

    def __post_init__(self) -> None:
        in_blocks = self.key_layout == "blocks"
        assert in_blocks or (self.recent_tokens is None and not self.store_quantised), "rings and quantised stores keep keys in blocks"

    @property
    def key(self) -> str:
        """Content hash, 16 hexadecimal digits."""
        return _content_hash(self)


@dataclass(frozen=True)
class LookupRequest:
    """A kernel for one new token a session: it attends over a window, over the keys that a sketch of the others finds, and estimates
    what is not read.

    Which positions are the window, the sketch, how many keys are chosen and how: given at run time.
    dtype: of query, new keys and values, and result.  store_dtype: what keys and values are kept in, a token a row.
    """

    kind: Literal["lookup"]
    device: str
    head_dim: int
    value_dim: int
    queries_per_kv: int
    dtype: str
    store_dtype: str
    scale: float
    soft_cap: float | None

    @property
    def key(self) -> str:
        """Content hash, 16 hexadecimal digits."""
        return _content_hash(self)


@dataclass(frozen=True)
class LinearRequest:
    """A kernel for linear layers of at most `max_tokens` tokens: weights [out, in] of `dtype`, any sizes."""

    kind: Literal["linears"]
    device: str
    dtype: str
    max_tokens: int

    @property
    def key(self) -> str:
        """Content hash, 16 hexadecimal digits."""
        return _content_hash(self)


Request: TypeAlias = KernelRequest | LookupRequest | LinearRequest


@functools.cache
def _content_hash(request: Request) -> str:
    return hashlib.sha256(json.dumps(asdict(request), sort_keys=True).encode()).hexdigest()[:16]
