"""One attention site on random data: what the operator kvc_native.attend makes of it, and what the oracle says.

Letters: Q query heads, H KV heads, G queries per KV head, S tokens, D head_dim, E value_dim.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from kvcompile.codegen.toolchain import Isa
from kvcompile.ir.plan import HeadGroup, Plan, SitePlan
from kvcompile.ir.policy import All, HeadPolicy, Int8, Kivi, SinkRecent, Store, Zone
from kvcompile.ir.request import KernelRequest
from kvcompile.ir.sites import AttentionSite
from kvcompile.runtime import reference
from kvcompile.runtime.model import make_store
from kvcompile.runtime.native import NO_RELAY, NativeKernels, NativeTable, RelayRule, attend_native, native_sites
from kvcompile.runtime.store import KVStore

LARGE_LOGIT = 200.0
Strides: TypeAlias = Literal["heads", "tokens", "gaps"]


@dataclass(frozen=True)
class Attention:
    """A site.  groups: the KV heads of each policy, in the order of the plan.

    cache_index: its sink + recent heads show another query to the sinks.  key_layout: of its stores, KernelRequest's.
    """

    dtype: str
    store_dtype: str
    head_dim: int
    value_dim: int
    queries_per_kv: int
    groups: tuple[tuple[tuple[int, ...], Zone], ...]
    soft_cap: float | None = None
    learnt_sinks: bool = False
    rollback_tokens: int = 0
    capacity_tokens: int = 2048
    chunk_tokens: int | None = None
    alibi: bool = False
    cache_index: bool = False
    quantised: Int8 | Kivi | None = None
    key_layout: Literal["blocks", "rows"] = "blocks"

    @property
    def kv_heads(self) -> int:
        return sum(len(heads) for heads, _ in self.groups)

    @property
    def query_heads(self) -> int:
        return self.kv_heads * self.queries_per_kv

    def scale(self, isa: Isa) -> float:
        return float(self.head_dim**-0.5)

    @property
    def slopes(self) -> tuple[float, ...]:
        """Those of a head are from 1/2 to 1/256, as in the paper (Press et al. 2022, section 3)."""
        return tuple(2.0 ** -(8 * (head + 1) / self.query_heads) for head in range(self.query_heads)) if self.alibi else ()

    def plan(self, isa: Isa) -> Plan:
        site = AttentionSite(
            0,
            "attention",
            self.query_heads,
            self.kv_heads,
            self.head_dim,
            self.value_dim,
            self.scale(isa),
            self.dtype,
            soft_cap=self.soft_cap,
            learnt_sinks=self.learnt_sinks,
            chunk_tokens=self.chunk_tokens,
            slopes=self.slopes,
        )
        groups = tuple(
            HeadGroup(
                heads,
                HeadPolicy(zone.describe(), (zone,), store=Store(self.store_dtype, self.quantised), rollback_tokens=self.rollback_tokens),  # type: ignore[arg-type]
                self.capacity_tokens,
                request=self._request(zone, isa),
            )
            for heads, zone in self.groups
        )
        return Plan((SitePlan(site, groups),))

    def requests(self, isa: Isa) -> list[KernelRequest]:
        return [self._request(zone, isa) for _, zone in self.groups]

    def _request(self, zone: Zone, isa: Isa) -> KernelRequest:
        window = zone if isinstance(zone, SinkRecent) else None
        return KernelRequest(
            kind="attend_spans",
            device="cpu",
            head_dim=self.head_dim,
            value_dim=self.value_dim,
            queries_per_kv=self.queries_per_kv,
            dtype=self.dtype,
            compute_dtype="float32",
            store_dtype=self.store_dtype,
            scale=self.scale(isa),
            soft_cap=self.soft_cap,
            learnt_sinks=self.learnt_sinks,
            sink_tokens=window.sink_tokens if window else 0,
            recent_tokens=window.recent_tokens if window else None,
            chunk_tokens=self.chunk_tokens,
            alibi=self.alibi,
            cache_index=self.shows_sinks(zone),
            store_quantised=self._store_quantised(),
            key_layout=self.key_layout,
        )

    def _store_quantised(self) -> str:
        match self.quantised:
            case None:
                return ""
            case Int8():
                return "int8"
            case Kivi(bits, group):
                return f"kivi {bits} {group}"

    def shows_sinks(self, zone: Zone) -> bool:
        """Whether heads of this zone show the sinks a query of their own."""
        return self.cache_index and isinstance(zone, SinkRecent)


class Text:
    """The random queries, keys and values of one sequence.

    At odd positions the queries meet logits of +200 at every 97th key and of -200 at as many: planted, because random ones are
    small.  At even positions they do not, so that every other key counts.
    """

    def __init__(self, attention: Attention, isa: Isa, tokens: int, seed: int = 0) -> None:
        self.attention, self.isa = attention, isa
        generator = torch.Generator().manual_seed(seed)
        dtype = getattr(torch, attention.dtype)

        def random(heads: int, dim: int) -> Tensor:
            return torch.randn(heads, tokens, dim, generator=generator)

        query_QSD = random(attention.query_heads, attention.head_dim)
        key_HSD = random(attention.kv_heads, attention.head_dim)
        size = (LARGE_LOGIT / attention.scale(isa)) ** 0.5
        query_QSD[:, 0::2, 0], query_QSD[:, 1::2, 0] = 0, size
        key_HSD[..., 0] = 0
        key_HSD[:, 5::97, 0], key_HSD[:, 50::97, 0] = size, -size
        # where heads show a query of its own to the sinks: any other one will do
        sink_query_QSD = random(attention.query_heads, attention.head_dim) if attention.cache_index else query_QSD
        self.sink_query_QSD = sink_query_QSD.to(dtype)
        self.query_QSD, self.key_HSD = query_QSD.to(dtype), key_HSD.to(dtype)
        self.value_HSE = random(attention.kv_heads, attention.value_dim).to(dtype)
        self.sinks_Q = torch.randn(attention.query_heads, generator=generator) if attention.learnt_sinks else None

    def right(self, first: int, end: int) -> Tensor:
        """The oracle's attention of positions [first, end), float64 [S, Q, E], over keys and values as the store rounds them."""
        site, store_dtype = self.attention, getattr(torch, self.attention.store_dtype)
        out_SHGE = torch.empty(end - first, site.kv_heads, site.queries_per_kv, site.value_dim, dtype=torch.float64)
        for heads, zone in site.groups:
            index = list(heads)
            query_HGSD = self.query_QSD[:, first:end].unflatten(0, (site.kv_heads, site.queries_per_kv))[index]
            key_HTD, value_HTE = (part[index, :end].to(store_dtype) for part in (self.key_HSD, self.value_HSE))
            positions_S, positions_T = torch.arange(first, end), torch.arange(end)
            see_ST = reference.visible(zone, positions_S, positions_T, site.chunk_tokens)
            more: dict[str, Tensor] = {}
            if site.alibi:
                slopes_HG = torch.tensor(site.slopes).unflatten(0, (site.kv_heads, site.queries_per_kv))[index]
                more["bias_HGST"] = reference.alibi(slopes_HG, positions_S, positions_T)
            if isinstance(zone, SinkRecent) and site.shows_sinks(zone):
                sink_query_HGSD = self.sink_query_QSD[:, first:end].unflatten(0, (site.kv_heads, site.queries_per_kv))[index]
                more.update(sink_query_HGSD=sink_query_HGSD, sinks_T=positions_T < zone.sink_tokens)
            state = reference.attend(query_HGSD, key_HTD, value_HTE, see_ST, site.scale(self.isa), site.soft_cap, **more)
            if self.sinks_Q is not None:
                sinks_HG = self.sinks_Q.unflatten(0, (site.kv_heads, site.queries_per_kv))[index]
                state = reference.apply_learnt_sinks(state, sinks_HG)
            out_SHGE[:, index] = state.out.permute(2, 0, 1, 3)
        return out_SHGE.flatten(1, 2)


class Reader:
    """A session of one site: its stores, and how much of its text it has read.  stores: made by the plan unless given."""

    def __init__(self, text: Text, kernels: NativeKernels, stores: list[KVStore] | None = None, read: int = 0) -> None:
        self.text, self.kernels, self.read = text, kernels, read
        plan = text.attention.plan(text.isa)
        (site,) = plan.sites
        in_blocks = text.attention.key_layout == "blocks"
        self.stores = [make_store(site, group, in_blocks) for group in site.groups] if stores is None else stores
        self.table = NativeTable(plan, kernels, [self.stores])
        self.site = native_sites(plan, kernels)[0]
        self.heads = self.site.kv_heads

    def fork(self, text: Text | None = None) -> Reader:
        """text: what the fork reads on, if that is another."""
        return Reader(text or self.text, self.kernels, [store.fork() for store in self.stores], self.read)

    def rollback(self, tokens: int) -> None:
        for store in self.stores:
            store.rollback(tokens)
        self.read -= tokens

    def take(self, tokens: int, **options: Any) -> Tensor:
        """Reads `tokens` more tokens alone: [S, Q, E]."""
        return read_together([(self, tokens)], **options)[0]


def read_together(batch: Sequence[tuple[Reader, int]], **options: Any) -> list[Tensor]:
    """One call of the operator for several sessions, each so many tokens further: [S, Q, E] each, of the last token with last_only.

    strides: how the tokens lie: a head after another, a token after another, or with room between tokens and heads.
    """
    return read_relayed(batch, NO_RELAY, **options)[0]


def read_relayed(
    batch: Sequence[tuple[Reader, int]], relay: RelayRule, *, last_only: bool = False, strides: Strides = "tokens"
) -> tuple[list[Tensor], int]:
    """`read_together`, and how many rows of the table saw something together."""
    start = 0
    for row, (reader, tokens) in enumerate(batch):
        reader.table.count_growing(tokens)
        reader.table.count_rings(tokens, start, reader.read)
        if last_only:
            reader.table.ask_last_only(row, tokens)
        start += tokens
    query, sink_query, key, value = (
        _strided(torch.cat([getattr(reader.text, part)[:, reader.read : reader.read + tokens] for reader, tokens in batch], 1), strides)
        for part in ("query_QSD", "sink_query_QSD", "key_HSD", "value_HSE")
    )
    first = batch[0][0]
    site = first.text.attention
    rows = [1 if last_only else tokens for _, tokens in batch]
    out = torch.full((1, sum(rows), site.query_heads, site.value_dim), torch.nan, dtype=query.dtype)
    tables = [reader.table.sites[0] for reader, _ in batch]
    shown = sink_query if site.cache_index else None
    given = query, key, value, first.text.sinks_Q, tables, first.heads, out
    shared = attend_native(*given, sink_query=shown, slopes=first.site.slopes, relay=relay)
    for reader, tokens in batch:
        reader.read += tokens
    return list(out[0].split(rows)), shared


def _strided(tensor_HSX: Tensor, strides: Strides) -> Tensor:
    if strides == "heads":
        return tensor_HSX.contiguous()[None]
    if strides == "tokens":
        return tensor_HSX.transpose(0, 1).contiguous().transpose(0, 1)[None]
    heads, tokens, dim = tensor_HSX.shape
    room = torch.full((tokens, heads, dim + 3), torch.nan, dtype=tensor_HSX.dtype)
    room[..., 1 : dim + 1] = tensor_HSX.transpose(0, 1)
    return room[..., 1 : dim + 1].transpose(0, 1)[None]


def assert_right(out_SQE: Tensor, text: Text, first: int) -> None:
    """Equal to the oracle.

    float32: a logit of 200 is known to half its spacing, 8e-6, a few times over (the products that it is summed of), and a weight
    to as much of itself; ordinary ones are 100 times better.  So 1e-5 of the largest value, 5e-5 where large logits were planted.
    bfloat16: the same, and the result is rounded once, by at most 2**-8 of itself.
    """
    right = text.right(first, first + len(out_SQE))
    positions = torch.arange(first, first + len(out_SQE))
    size = text.value_HSE.abs().max().item()
    bound_S11 = (size * torch.where(positions % 2 == 1, 5e-5, 1e-5).double())[:, None, None]
    rounding = 2.0**-8 * right.abs() if out_SQE.dtype == torch.bfloat16 else 0
    error = (out_SQE.double() - right).abs()
    worst = (error / (bound_S11 + rounding)).max().item()
    assert worst <= 1, f"positions {first} to {first + len(out_SQE) - 1}: an error of {worst:.3g} times the tolerance, {error.max():.3g}"


def with_text(text: Text, other: Text, tokens: int) -> Text:
    """`text`, and from position `tokens` on `other`."""
    mixed = copy.copy(text)
    for part in ("query_QSD", "sink_query_QSD", "key_HSD", "value_HSE"):
        setattr(mixed, part, torch.cat([getattr(text, part)[:, :tokens], getattr(other, part)[:, tokens:]], 1))
    return mixed


ALL = All()
# What the tests run, and their kernels: every head_dim, value_dim, group size and policy at least once, each dtype with several.
SITES: dict[str, Attention] = {
    "plain": Attention("float32", "float32", 16, 16, 1, (((1,), ALL), ((0, 2), SinkRecent(0, 1)))),
    "bf16_store": Attention("float32", "bfloat16", 64, 64, 3, (((0, 2), ALL), ((1, 3), SinkRecent(4, 16)))),
    "tails": Attention("bfloat16", "bfloat16", 24, 24, 4, (((0,), ALL), ((1,), SinkRecent(0, 16)))),
    "window_300": Attention("float32", "float32", 80, 80, 7, (((1,), ALL), ((0,), SinkRecent(4, 300))), rollback_tokens=8),
    "narrow_values": Attention("bfloat16", "bfloat16", 96, 40, 8, (((0,), ALL), ((1,), SinkRecent(4, 1)))),
    "capped": Attention("float32", "float32", 128, 64, 16, (((0,), ALL), ((1,), SinkRecent(0, 300))), soft_cap=30.0),
    "all_options": Attention(
        "bfloat16", "bfloat16", 256, 256, 3, (((0,), SinkRecent(4, 16)), ((1,), ALL)), soft_cap=50.0, learnt_sinks=True
    ),
    "wide_values": Attention("bfloat16", "float32", 64, 128, 71, (((0,), ALL),)),
    "learnt_sinks": Attention("float32", "bfloat16", 64, 50, 8, (((0,), ALL), ((1,), SinkRecent(4, 300))), learnt_sinks=True),
    "mqa_window": Attention("float32", "float32", 64, 64, 71, (((0,), SinkRecent(4, 16)),)),
    "alibi": Attention("float32", "bfloat16", 72, 72, 3, (((0,), ALL), ((1, 2), SinkRecent(4, 300))), alibi=True),
    "alibi_capped": Attention(
        "bfloat16", "bfloat16", 112, 112, 1, (((1,), ALL), ((0,), SinkRecent(0, 16))), soft_cap=30.0, alibi=True, learnt_sinks=True
    ),
    "alibi_mqa": Attention("float32", "float32", 15, 15, 71, (((0,), ALL),), alibi=True),
    "chunked": Attention("bfloat16", "bfloat16", 40, 40, 5, (((0, 1), SinkRecent(0, 64)),), chunk_tokens=64),
    "chunked_300": Attention("float32", "float32", 20, 20, 4, (((0,), SinkRecent(0, 300)),), rollback_tokens=8, chunk_tokens=300),
    "chunk_and_window": Attention("float32", "bfloat16", 32, 32, 2, (((0,), SinkRecent(0, 30)),), chunk_tokens=70),
    "cache_index": Attention("float32", "float32", 24, 16, 3, (((1,), ALL), ((0, 2), SinkRecent(4, 16))), cache_index=True),
    "cache_index_300": Attention(
        "bfloat16", "bfloat16", 192, 128, 2, (((0,), SinkRecent(4, 300)),), soft_cap=50.0, learnt_sinks=True, cache_index=True
    ),
    "rows": Attention("float32", "float32", 16, 16, 3, (((0, 2), ALL), ((1,), ALL)), key_layout="rows"),
    "rows_bf16": Attention("bfloat16", "bfloat16", 64, 64, 3, (((1, 0), ALL),), capacity_tokens=100, key_layout="rows"),
    "rows_tails": Attention("float32", "bfloat16", 90, 50, 8, (((0,), ALL),), learnt_sinks=True, capacity_tokens=61, key_layout="rows"),
    "rows_capped": Attention("bfloat16", "float32", 27, 40, 1, (((0, 1), ALL),), soft_cap=30.0, capacity_tokens=300, key_layout="rows"),
    "rows_wide": Attention("bfloat16", "bfloat16", 256, 256, 16, (((0,), ALL),), learnt_sinks=True, soft_cap=50.0, key_layout="rows"),
    "many_sinks": Attention("float32", "bfloat16", 64, 17, 9, (((0,), SinkRecent(300, 1)),), rollback_tokens=8, cache_index=True),
}
