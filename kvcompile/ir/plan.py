"""The plan: every site's resolved policies, and what they cost in bytes.

Two costs, never one "bytes a token":
  stored bytes of a context of T tokens     what a session's memory holds after T tokens, and beside it what lies on disk
  read bytes of a generated token           what one decode step reads of it
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvcompile.ir.indexes import (
    BLOCK_TOKENS,
    SAMPLING,
    IndexBytes,
    SizedFacts,
    build_work,
    group_facts,
    indexed_tokens,
    sample_bytes,
    training_queries,
)
from kvcompile.ir.policy import ITEMSIZE, HeadPolicy, LookedUp, Sample, SinkRecent, Static, Store
from kvcompile.ir.request import KernelRequest, LookupRequest
from kvcompile.ir.sites import AttentionSite, ConvolutionSite
from kvcompile.ir.spec import Relay
from kvcompile.ir.store_bytes import (
    DISK_BLOCK_TOKENS,
    STAGED_BLOCKS,
    disk_block_bytes,
    lent_bytes,
    packed_bytes,
    read_bytes,
    row_bytes,
    stored_bytes,
)


@dataclass(frozen=True)
class HeadGroup:
    """KV heads of one site that share a policy; they share one store, `[kv_heads, tokens, head_dim]`.

    capacity_tokens: address space reserved for a growable store's first span (memory is taken only when written).
    device:          where the store lives.
    request:         the kernel that attends over all that is visible, which under a policy that finds keys are its prompts.
    lookup:          the kernel that attends to what an index finds for a single token.
    Both are None until `request_kernels` ran, and where torch does it.
    """

    kv_heads: tuple[int, ...]
    policy: HeadPolicy
    capacity_tokens: int | None = None
    device: str = "cpu"
    request: KernelRequest | None = None
    lookup: LookupRequest | None = None

    @property
    def requests(self) -> tuple[KernelRequest | LookupRequest, ...]:
        return tuple(request for request in (self.request, self.lookup) if request is not None)

    def bytes_per_token(self, site: AttentionSite) -> int:
        """Bytes of one token's keys and values in all KV heads of the group, where they are not quantised."""
        return len(self.kv_heads) * (site.head_dim + site.value_dim) * ITEMSIZE[self.policy.store.dtype or site.dtype]

    def stored_bytes(self, site: AttentionSite, context_tokens: int) -> int:
        """Bytes of memory that are held after `context_tokens` tokens: keys, values, index, and what is kept of queries.

        On disk one block: the tokens that do not fill it yet.
        """
        if self.device == "disk":
            return self._block_bytes(site) if context_tokens else 0
        total = stored_bytes(*self._format(site), context_tokens, self._ring(context_tokens), self.policy.rollback_tokens)
        return total + self._chosen_bytes(site, context_tokens) + self._held_beside(site, context_tokens)

    def _held_beside(self, site: AttentionSite, context_tokens: int) -> int:
        """Bytes of the sample of queries and of the index."""
        looked_up, total = self.policy.looked_up, self._sample_bytes(site, context_tokens)
        if looked_up and (indexed := self._indexed_tokens(context_tokens)):
            facts, options = group_facts(looked_up.index, site.queries_per_kv), dict(looked_up.options)
            held = round(indexed * self._index_bytes(site, looked_up).held)
            if isinstance(facts, SizedFacts):
                held = facts.held_bytes(indexed, options)
            total += len(self.kv_heads) * (facts.fixed_bytes(site.head_dim, site.value_dim, options) + held)
        return total

    def prompt_bytes(self, site: AttentionSite, context_tokens: int, shared_tokens: int = 0) -> int:
        """Bytes of memory that a session holds itself after a prompt of `context_tokens` tokens, with the index that is then made.

        Of these the session that it was forked from had read the first `shared_tokens`; its index is counted whole all the same: it may be
        made anew.  No key of a static zone was chosen yet.
        """
        in_ring = self.policy.found is None and self.policy.window is not None
        if self.device == "disk" or in_ring:
            return self.stored_bytes(site, context_tokens)
        form = self._format(site)
        return stored_bytes(*form, context_tokens) - lent_bytes(*form, shared_tokens) + self._held_beside(site, context_tokens)

    def disk_bytes(self, site: AttentionSite, context_tokens: int) -> int:
        """Bytes that lie on disk after `context_tokens` tokens: whole blocks."""
        return context_tokens // DISK_BLOCK_TOKENS * self._block_bytes(site) if self.device == "disk" else 0

    def staging_bytes(self, site: AttentionSite) -> int:
        """Bytes of memory that blocks from the disk are read into; groups with blocks of one form share them."""
        return STAGED_BLOCKS * self._block_bytes(site) if self.device == "disk" else 0

    def _block_bytes(self, site: AttentionSite) -> int:
        return disk_block_bytes(len(self.kv_heads), site.head_dim, site.value_dim, ITEMSIZE[self.policy.store.dtype or site.dtype])

    def read_bytes(self, site: AttentionSite, context_tokens: int) -> int:
        """Bytes that one decode step reads when `context_tokens` tokens, its own included, are visible.

        Of a policy that looks keys up at most so many: query heads of a group may choose the same keys.  Where they are drawn by chance, as
        many as are expected where keys lie in all directions.
        """
        found, form = self.policy.looked_up, self._format(site)
        everything = read_bytes(*form, context_tokens, self._ring(context_tokens), self.policy.rollback_tokens)
        if found is None:
            return everything + self._chosen_bytes(site, context_tokens)
        indexed = self._indexed_tokens(context_tokens - BLOCK_TOKENS)  # so many wait, on average
        chosen = found.tokens(context_tokens)
        if chosen >= indexed:
            return everything
        if isinstance(found, Sample):
            chosen = round(indexed * SAMPLING[found.index].sampled_share(site.head_dim, dict(found.options)))
        rows = min(indexed, chosen * (site.queries_per_kv if found.select in ("per_query_head", "union") else 1))
        index = self._index_bytes(site, found)
        scanned = index.searched + (index.estimated if found.tail else 0)
        exact = everything - packed_bytes(*form, indexed) + rows * row_bytes(*form)
        return exact + len(self.kv_heads) * (round(indexed * scanned) + index.search_fixed) + index.search_shared

    def _format(self, site: AttentionSite) -> tuple[Store, str, int, int, int]:
        return self.policy.store, site.dtype, len(self.kv_heads), site.head_dim, site.value_dim

    def _ring(self, context_tokens: int) -> SinkRecent | None:
        """The ring that the tokens are kept in, if it is one: from the beginning, or since keys were chosen."""
        found = self.policy.found
        return self.policy.window if found is None or self._has_chosen(context_tokens) else None

    def _has_chosen(self, context_tokens: int) -> bool:
        found, window = self.policy.found, self.policy.window
        return isinstance(found, Static) and window is not None and context_tokens > window.window_tokens + found.keys

    def _chosen_bytes(self, site: AttentionSite, context_tokens: int) -> int:
        """Keys and values that a static zone chose are kept as the model computed them."""
        found = self.policy.found
        return found.keys * self.bytes_per_token(site) if isinstance(found, Static) and self._has_chosen(context_tokens) else 0

    def _sample_bytes(self, site: AttentionSite, context_tokens: int) -> int:
        """Of the queries that what finds keys learns from."""
        if self.policy.found is None:
            return 0
        looked_up = self.policy.looked_up
        training = training_queries(looked_up.index, dict(looked_up.options)) if looked_up else 0
        return len(self.kv_heads) * sample_bytes(site.queries_per_kv, site.head_dim, context_tokens, training)

    def _indexed_tokens(self, context_tokens: int) -> int:
        window = self.policy.window
        assert window is not None
        return indexed_tokens(window.window_tokens + self.policy.waiting_tokens, context_tokens)

    def build_work(self, site: AttentionSite, context_tokens: int) -> float:
        """Of the group's index, in multiply-adds of a prompt of so many tokens."""
        found = self.policy.looked_up
        if found is None:
            return 0.0
        of_key = build_work(found.index, site.queries_per_kv, site.head_dim, dict(found.options))
        return len(self.kv_heads) * self._indexed_tokens(context_tokens) * of_key

    def _index_bytes(self, site: AttentionSite, zone: LookedUp) -> IndexBytes:
        itemsize = ITEMSIZE[self.policy.store.dtype or site.dtype]
        facts = group_facts(zone.index, site.queries_per_kv)
        return facts.bytes_per_token(site.head_dim, site.value_dim, itemsize, dict(zone.options))


@dataclass(frozen=True)
class SitePlan:
    """One site and its groups of KV heads; every KV head is in exactly one group."""

    site: AttentionSite
    groups: tuple[HeadGroup, ...]

    def __post_init__(self) -> None:
        covered = sorted(head for group in self.groups for head in group.kv_heads)
        assert covered == list(range(self.site.kv_heads)), f"{self.site.path}: KV heads covered {covered}"

    def stored_bytes(self, context_tokens: int) -> int:
        return sum(group.stored_bytes(self.site, context_tokens) for group in self.groups)

    def disk_bytes(self, context_tokens: int) -> int:
        return sum(group.disk_bytes(self.site, context_tokens) for group in self.groups)

    def read_bytes(self, context_tokens: int) -> int:
        return sum(group.read_bytes(self.site, context_tokens) for group in self.groups)

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
class PlannedPrefix:
    """A text of the spec that sessions start behind, as tokens; it is read once.

    ids:     its own tokens.
    after:   the name of the prefix that it continues, None for one that begins a text; before: how many tokens that one ends after.
    default: whether sessions that name no prefix start behind it.
    system:  the system message that ids are, as the model's chat template writes it; None for plain text.
    """

    name: str
    ids: tuple[int, ...]
    after: str | None = None
    before: int = 0
    default: bool = False
    system: str | None = None

    @property
    def tokens(self) -> int:
        """Tokens that a session behind it has read."""
        return self.before + len(self.ids)


@dataclass(frozen=True)
class Plan:
    """All sites; weight_bytes counts every parameter and buffer once.

    relay:          whether sessions of one call that share a past read it together: a choice of each run, of which no store knows.
    prefixes:       what sessions may start behind, each after the one that it continues.

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
    relay: Relay = "auto"
    prefixes: tuple[PlannedPrefix, ...] = ()

    def prefix_bytes(self, prefix: PlannedPrefix) -> int:
        """Bytes of memory that the model holds of a prefix, once for all sessions; without those of the one that it continues, but for
        its index."""
        return self.prompt_bytes(prefix.tokens, prefix.before)

    def prompt_bytes(self, tokens: int, shared_tokens: int = 0) -> int:
        """Bytes of memory that a session holds itself after a prompt: before a static zone lets go what it does not choose."""
        groups = sum(group.prompt_bytes(each.site, tokens, shared_tokens) for each in self.sites for group in each.groups)
        return groups + sum(each.stored_bytes(tokens) for each in self.convolutions)

    def lent_bytes(self, tokens: int) -> int:
        """Bytes of a past of so many tokens that a fork reads where they are; rings, states and samples are copied, and indexes may be
        made anew."""
        groups = [(each.site, group) for each in self.sites for group in each.groups]
        return sum(group.prompt_bytes(site, tokens) - group.prompt_bytes(site, tokens, tokens) for site, group in groups)

    def stored_bytes(self, context_tokens: int) -> int:
        convolutions = sum(each.stored_bytes(context_tokens) for each in self.convolutions)
        return sum(site.stored_bytes(context_tokens) for site in self.sites) + convolutions

    def read_bytes(self, context_tokens: int) -> int:
        convolutions = sum(each.read_bytes(context_tokens) for each in self.convolutions)
        return sum(site.read_bytes(context_tokens) for site in self.sites) + convolutions

    def disk_bytes(self, context_tokens: int) -> int:
        return sum(site.disk_bytes(context_tokens) for site in self.sites)

    @property
    def staging_bytes(self) -> int:
        """Bytes of memory, once for all sessions of the process, that blocks from the disk are read into."""
        forms: dict[tuple[int, int, int, str], int] = {}
        for each in self.sites:
            for group in (group for group in each.groups if group.device == "disk"):
                dtype = group.policy.store.dtype or each.site.dtype
                forms[len(group.kv_heads), each.site.head_dim, each.site.value_dim, dtype] = group.staging_bytes(each.site)
        return sum(forms.values())

    def build_share(self, context_tokens: int) -> float:
        """About how long the indexes of a prompt of so many tokens take to make, in times of reading it: each weight meets each token, and
        each query the keys before it."""
        if not self.sites:
            return 0.0
        weights = self.weight_bytes / ITEMSIZE[self.sites[0].site.dtype]
        met = 0.0
        for site in (each.site for each in self.sites):
            met += site.query_heads * (site.head_dim + site.value_dim) * min(context_tokens / 2, site.own_window or context_tokens)
        built = sum(group.build_work(each.site, context_tokens) for each in self.sites for group in each.groups)
        return built / (context_tokens * (weights + met))

    def full_bytes(self, context_tokens: int) -> int:
        convolutions = sum(replace(each, rollback_tokens=0).stored_bytes(context_tokens) for each in self.convolutions)
        return sum(site.full_bytes(context_tokens) for site in self.sites) + convolutions
