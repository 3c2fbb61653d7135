"""The plan: every site's resolved policies, and what they cost in bytes.

Two costs, never one "bytes a token":
  stored bytes of a context of T tokens     what a session's memory holds after T tokens
  read bytes of a generated token           what one decode step reads of it
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvcompile.ir.policy import ITEMSIZE, All, HeadPolicy, SinkRecent, Zone
from kvcompile.ir.request import KernelRequest
from kvcompile.ir.sites import AttentionSite, ConvolutionSite


def zone_stored_tokens(zone: Zone, context_tokens: int, rollback_tokens: int = 0) -> int:
    """Tokens that a zone's store holds after `context_tokens` tokens; 0 for an empty context."""
    match zone:
        case All():
            return context_tokens
        case SinkRecent():
            return min(context_tokens, zone.window_tokens + rollback_tokens)


def zone_read_tokens(zone: Zone, context_tokens: int) -> int:
    """Tokens whose keys and values one decode step reads when `context_tokens` tokens (its own included) are visible."""
    return zone_stored_tokens(zone, context_tokens)


@dataclass(frozen=True)
class HeadGroup:
    """KV heads of one site that share a policy; they share one store, `[kv_heads, tokens, head_dim]`.

    capacity_tokens: address space reserved for a growable store's first span (memory is taken only when written).
    device:          where the store lives.
    request:         the kernel that attends over it; None until `request_kernels` ran.
    """

    kv_heads: tuple[int, ...]
    policy: HeadPolicy
    capacity_tokens: int | None = None
    device: str = "cpu"
    request: KernelRequest | None = None

    def bytes_per_token(self, site: AttentionSite) -> int:
        """Bytes of one token's keys and values in all KV heads of the group."""
        return len(self.kv_heads) * (site.head_dim + site.value_dim) * ITEMSIZE[self.policy.store.dtype or site.dtype]


@dataclass(frozen=True)
class SitePlan:
    """One site and its groups of KV heads; every KV head is in exactly one group."""

    site: AttentionSite
    groups: tuple[HeadGroup, ...]

    def __post_init__(self) -> None:
        covered = sorted(head for group in self.groups for head in group.kv_heads)
        assert covered == list(range(self.site.kv_heads)), f"{self.site.path}: KV heads covered {covered}"

    def stored_bytes(self, context_tokens: int) -> int:
        return sum(
            group.bytes_per_token(self.site) * zone_stored_tokens(zone, context_tokens, group.policy.rollback_tokens)
            for group in self.groups
            for zone in group.policy.zones
        )

    def read_bytes(self, context_tokens: int) -> int:
        return sum(
            group.bytes_per_token(self.site) * zone_read_tokens(zone, context_tokens)
            for group in self.groups
            for zone in group.policy.zones
        )

    def full_bytes(self, context_tokens: int) -> int:
        """Bytes of a plain KV cache in the model's dtype: every token, in a sliding layer every token of its window."""
        site = self.site
        kept = min(context_tokens, site.own_window or context_tokens)
        return site.kv_heads * (site.head_dim + site.value_dim) * ITEMSIZE[site.dtype] * kept


@dataclass(frozen=True)
class ConvolutionPlan:
    """One convolution site and what a session keeps of it: its last inputs, whatever the policies of attention.

    rollback_tokens: how many tokens `Session.rollback` may take back: so many inputs more are kept.
    """

    site: ConvolutionSite
    rollback_tokens: int = 0

    @property
    def kept_tokens(self) -> int:
        """Inputs kept; 0 for a filter of one tap, which looks at nothing but its own token."""
        return self.site.taps - 1 + self.rollback_tokens if self.site.taps > 1 else 0

    def stored_bytes(self, context_tokens: int) -> int:
        return self._token_bytes * min(context_tokens, self.kept_tokens)

    def read_bytes(self, context_tokens: int) -> int:
        """Bytes that a decode step reads when `context_tokens` tokens, its own included, were read; 0 of none."""
        return self._token_bytes * min(context_tokens, self.site.taps - 1)

    @property
    def _token_bytes(self) -> int:
        return self.site.channels * ITEMSIZE[self.site.dtype]


@dataclass(frozen=True)
class Plan:
    """All sites; weight_bytes counts every parameter and buffer once.

    convolutions:   of a model that mixes tokens by short convolutions too; their bytes are part of all sums.

    context_tokens: tokens the model was made for, as its configuration says; None when it does not.
    position_rows:  rows of a table of learnt positions; a session of more tokens is impossible.
    """

    sites: tuple[SitePlan, ...]
    weight_bytes: int = 0
    context_tokens: int | None = None
    position_rows: int | None = None
    notes: tuple[str, ...] = ()
    convolutions: tuple[ConvolutionPlan, ...] = ()

    def stored_bytes(self, context_tokens: int) -> int:
        convolutions = sum(each.stored_bytes(context_tokens) for each in self.convolutions)
        return sum(site.stored_bytes(context_tokens) for site in self.sites) + convolutions

    def read_bytes(self, context_tokens: int) -> int:
        convolutions = sum(each.read_bytes(context_tokens) for each in self.convolutions)
        return sum(site.read_bytes(context_tokens) for site in self.sites) + convolutions

    def full_bytes(self, context_tokens: int) -> int:
        convolutions = sum(replace(each, rollback_tokens=0).stored_bytes(context_tokens) for each in self.convolutions)
        return sum(site.full_bytes(context_tokens) for site in self.sites) + convolutions
