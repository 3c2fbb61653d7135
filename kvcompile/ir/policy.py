"""What one KV head remembers: zones, store, positions.  Always per KV head, never per query head.

Visibility, for a query at absolute position p and a key at position j <= p:
  All                      every j
  SinkRecent(s, r)         j < s  or  j > p - r       (r counts the query's own token)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

DType: TypeAlias = Literal["float32", "bfloat16", "float16"]
ITEMSIZE: dict[str, int] = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class All:
    """Every token of the past: full attention, DuoAttention's retrieval head."""

    def describe(self) -> str:
        return "all"


@dataclass(frozen=True)
class SinkRecent:
    """The first `sink_tokens` and the last `recent_tokens` tokens, the query's own included (StreamingLLM, section 3.2)."""

    sink_tokens: int
    recent_tokens: int

    def __post_init__(self) -> None:
        assert self.sink_tokens >= 0 and self.recent_tokens >= 1

    @property
    def window_tokens(self) -> int:
        return self.sink_tokens + self.recent_tokens

    def describe(self) -> str:
        return f"sink {self.sink_tokens} + recent {self.recent_tokens}"


Zone: TypeAlias = All | SinkRecent


@dataclass(frozen=True)
class Store:
    """How keys and values are kept.  dtype None: as the model computes them."""

    dtype: DType | None = None


@dataclass(frozen=True)
class HeadPolicy:
    """What one KV head does.

    positions:       absolute: a query is rotated to its own position.  cache_index (StreamingLLM): it is shown to the sinks as if
                     it stood at its place in the cache, min(p, sink_tokens + recent_tokens - 1).
    rollback_tokens: how many tokens `Session.rollback` may take back after a ring has overflowed; rings are
                     larger by this many tokens.  Growable stores roll back to any length.
    """

    name: str
    zones: tuple[Zone, ...]
    positions: Literal["absolute", "cache_index"] = "absolute"
    store: Store = Store()
    rollback_tokens: int = 0

    def __post_init__(self) -> None:
        assert self.zones, f"policy {self.name} has no zone"
