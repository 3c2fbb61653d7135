"""What one KV head remembers: zones, store, positions.  Always per KV head, never per query head.

Visibility, for a query at absolute position p and a key at position j <= p:
  All                      every j
  SinkRecent(s, r)         j < s  or  j > p - r       (r counts the query's own token)
  TopK, Sample, Static     some of s <= j <= p - r, beside the SinkRecent zone of the same policy: which, is found at run time
A prompt (more than one token in a call) is read with all its past under a policy that has one of these: they are learnt from it.  What
Static has let go does not come back for a second prompt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

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


Select: TypeAlias = Literal["per_query_head", "union", "sum", "max"]


@dataclass(frozen=True)
class TopK:
    """The keys that matter most to a query among those that its policy's SinkRecent zone does not show, found by an index.

    k:       how many, or a share (0 to 1) of the tokens that the session has read.
    index:   name of the index (runtime/indexes/registry.py); options: what the spec gives it.
    select:  how the query heads that share a KV head choose.  per_query_head: each its own k.  union: all that one of them chose,
             for all.  sum, max: the k keys with the largest sum, or maximum, of their attention weights.
    tail:    what is not read is estimated.
    """

    k: int | float
    index: str = "flat"
    options: tuple[tuple[str, Any], ...] = ()
    select: Select = "union"
    tail: bool = False

    def tokens(self, context_tokens: int) -> int:
        """How many keys each query head chooses after `context_tokens` tokens: at least one."""
        return max(1, math.ceil(self.k * context_tokens) if isinstance(self.k, float) else self.k)

    @property
    def page_tokens(self) -> int | None:
        """Tokens of a page, of an index that finds whole pages: k is a multiple of them."""
        return dict(self.options).get("page_tokens")

    def describe(self) -> str:
        k = f"{100 * self.k:.4g}% of the tokens" if isinstance(self.k, float) else str(self.k)
        if self.page_tokens is not None and isinstance(self.k, int):
            k = f"{self.k // self.page_tokens} pages of {self.page_tokens}"
        options = "".join(f" {name}={value}" for name, value in self.options if name != "page_tokens")
        return f"top {k} by {self.index}{options}, {self.select}{' + tail' if self.tail else ''}"


@dataclass(frozen=True)
class Sample:
    """Keys drawn by chance among those that the policy's SinkRecent zone does not show.

    Each counts as often as one over the probability of its being drawn: so the sums above and below the fraction of the attention are right
    in the mean.

    A key is drawn that lies in the query's bucket in two or more of `tables` hash tables; a bucket is which side of `hash_bits` random
    hyperplanes a vector lies on.  seed: of the hyperplanes.  Query heads that share a KV head draw each for itself.
    Source: MagicPIG (Chen et al. 2024, section 4).
    """

    hash_bits: int = 10
    tables: int = 150
    seed: int = 0

    index: ClassVar[str] = "lsh"
    select: ClassVar[Select] = "per_query_head"
    tail: ClassVar[bool] = False

    @property
    def options(self) -> tuple[tuple[str, Any], ...]:
        """What the index is given."""
        return ("hash_bits", self.hash_bits), ("seed", self.seed), ("tables", self.tables)

    def tokens(self, context_tokens: int) -> int:
        """No number of keys is asked for."""
        return 0

    def describe(self) -> str:
        return f"sample by {self.index} hash_bits={self.hash_bits} tables={self.tables}"


@dataclass(frozen=True)
class Static:
    """`keys` tokens that the prompt's last queries attend to most, chosen when the prompt ends: secondary sinks.

    Source: SnapKV (Li et al. 2024, section 3) chooses so; here beside StreamingLLM's zone.
    """

    keys: int

    def describe(self) -> str:
        return f"static {self.keys}"


LookedUp: TypeAlias = TopK | Sample  # an index finds its keys
Zone: TypeAlias = All | SinkRecent | LookedUp | Static


@dataclass(frozen=True)
class Int8:
    """Keys and values of 8 bits: one scale a token and KV head."""

    def describe(self) -> str:
        return "int8"


@dataclass(frozen=True)
class Kivi:
    """KIVI (Liu et al. 2024, section 3.2): keys quantised per channel in groups of `group` tokens, values per token in groups of
    `group` channels; the last tokens stay in full precision: of keys what does not fill `residual_tokens` yet, of values the last
    `residual_tokens`.
    """

    bits: Literal[2, 4]
    group: int = 32
    residual_tokens: int = 128

    def describe(self) -> str:
        return f"kivi {self.bits} bits, groups of {self.group}, {self.residual_tokens} residual"


@dataclass(frozen=True)
class Store:
    """How keys and values are kept.  dtype None: as the model computes them; quantised: of fewer bits than that."""

    dtype: DType | None = None
    quantised: Int8 | Kivi | None = None

    def describe(self) -> str:
        """A few words; empty where keys and values are kept as the model computes them."""
        return self.quantised.describe() if self.quantised is not None else self.dtype or ""


def can_stand_together(zones: tuple[Zone, ...]) -> bool:
    """One zone that needs no other, or SinkRecent and one whose keys are found behind it."""
    match zones:
        case (All() | SinkRecent(),) | (SinkRecent(), TopK() | Sample() | Static()):
            return True
    return False


@dataclass(frozen=True)
class HeadPolicy:
    """What one KV head does.

    positions:       absolute: a query is rotated to its own position.  cache_index (StreamingLLM): it is shown to the sinks as if
                     it stood at its place in the cache, min(p, sink_tokens + recent_tokens - 1).
    rollback_tokens: how many tokens `Session.rollback` may take back after a ring has overflowed; rings are
                     larger by this many tokens.  Growable stores roll back to any length.
    device:          where keys and values lie; None: on the target's device.
    """

    name: str
    zones: tuple[Zone, ...]
    positions: Literal["absolute", "cache_index"] = "absolute"
    store: Store = Store()
    rollback_tokens: int = 0
    device: Literal["disk"] | None = None

    def __post_init__(self) -> None:
        assert self.zones, f"policy {self.name} has no zone"
        assert can_stand_together(self.zones), self.zones
        assert self.device is None or (self.zones == (All(),) and self.store.quantised is None), self

    @property
    def found(self) -> LookedUp | Static | None:
        """The zone whose keys are found at run time."""
        return next((zone for zone in self.zones if isinstance(zone, LookedUp | Static)), None)

    @property
    def looked_up(self) -> LookedUp | None:
        """The zone whose keys an index finds."""
        return next((zone for zone in self.zones if isinstance(zone, LookedUp)), None)

    @property
    def waiting_tokens(self) -> int:
        """So many tokens that have left the window are in no index yet.

        They are what `rollback` may take back, and under Sample those that KIVI has still to quantise, which changes their angles.
        """
        quantised, window = self.store.quantised, self.window
        if isinstance(self.found, Sample) and isinstance(quantised, Kivi) and window is not None:
            return self.rollback_tokens + max(0, quantised.residual_tokens - window.recent_tokens)
        return self.rollback_tokens

    @property
    def window(self) -> SinkRecent | None:
        """The zone of sinks and recent tokens."""
        return next((zone for zone in self.zones if isinstance(zone, SinkRecent)), None)
