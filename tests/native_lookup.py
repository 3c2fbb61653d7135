"""One attention site with a sketch, on random data: what the operator kvc_native.lookup makes of it, and what the oracle says.

Letters: Q query heads, H KV heads, G queries per KV head, S sessions, T keys, K chosen keys, B runs of keys, D head_dim, E value_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompile.ir.indexes import SKETCH
from kvcompile.ir.policy import Select
from kvcompile.ir.request import LookupRequest
from kvcompile.runtime import reference
from kvcompile.runtime.growable import GrowableStore
from kvcompile.runtime.indexes.index import Prompt, RecentQueries
from kvcompile.runtime.indexes.sketch import build_sketch
from kvcompile.runtime.merge import AttentionState
from kvcompile.runtime.native import NativeKernels
from kvcompile.runtime.native_lookup import SELECTS, Column, lookup_native, sketch_words

FIRST, WINDOW = 5, 37  # exact tokens before what the sketch covers, and behind it
K = 24  # keys that the sketch is made for


@dataclass(frozen=True)
class Site:
    """What one kernel is made for, the units of its sketches, and the share of keys that is looked at.  Its scale is large: few keys have
    most of the weight."""

    head_dim: int
    value_dim: int
    queries_per_kv: int
    dtype: str
    store_dtype: str
    units: int
    soft_cap: float | None = None
    kv_heads: int = 2
    scanned: float = 0.25

    @property
    def request(self) -> LookupRequest:
        dims = self.head_dim, self.value_dim, self.queries_per_kv
        return LookupRequest("lookup", "cpu", *dims, self.dtype, self.store_dtype, 2 * self.head_dim**-0.5, self.soft_cap)


SITES = {
    "plain": Site(64, 64, 3, "float32", "float32", 2),
    "bf16": Site(64, 64, 3, "bfloat16", "bfloat16", 2, kv_heads=3),
    "tails": Site(80, 40, 1, "float32", "bfloat16", 3, scanned=0.6),
    "odd": Site(15, 17, 1, "float32", "float32", 1),
    "capped": Site(96, 96, 4, "float32", "float32", 3, soft_cap=8.0),
    "wide": Site(128, 64, 8, "bfloat16", "bfloat16", 4),
    "widest": Site(256, 256, 4, "float32", "bfloat16", 8, kv_heads=1),
    "many": Site(32, 32, 19, "float32", "float32", 5, kv_heads=1),
    "narrow": Site(96, 96, 2, "float32", "float32", 1),
    "coarse": Site(160, 32, 2, "float32", "float32", 2),
    "all": Site(64, 64, 3, "float32", "float32", 2, scanned=1.0),
}


class Reader:
    """A session of one site that has read FIRST + tokens + WINDOW tokens, and a sketch of the `tokens` in the middle.

    added: of these the last so many have been added to the sketch later.  forked_at: the store is a fork's, made at so many tokens.
    same_keys: the sketch's keys are one key.
    """

    def __init__(
        self, site: Site, tokens: int, added: int = 0, forked_at: int | None = None, same_keys: bool = False, seed: int = 0
    ) -> None:
        self.site = site
        generator = torch.Generator().manual_seed(seed)
        heads, dim, read = site.kv_heads, site.head_dim, FIRST + tokens + WINDOW
        spread_D = torch.logspace(0.7, -0.7, dim)  # some directions are worth more than others

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        dtype = getattr(torch, site.dtype)
        self.key_HTD = (random(heads, read + 1, dim) * spread_D + random(heads, 1, dim)).to(dtype)
        if same_keys:
            self.key_HTD[:, FIRST : FIRST + tokens] = self.key_HTD[:, :1]
        self.value_HTE = random(heads, read + 1, site.value_dim).to(dtype)
        self.query_HGD = (random(heads, site.queries_per_kv, dim) * spread_D.flip(0).sqrt()).to(dtype)
        self.sinks_HG = random(heads, site.queries_per_kv)
        self.store = GrowableStore(heads, dim, site.value_dim, getattr(torch, site.store_dtype), read + 1)
        start = 0
        if forked_at is not None:
            self.parent = self.store
            self.parent.extend(self.key_HTD[:, :forked_at], self.value_HTE[:, :forked_at])
            self.store, start = self.parent.fork(), forked_at
        self.store.extend(self.key_HTD[:, start:read], self.value_HTE[:, start:read])
        past_HCD = random(heads, 50, dim) * spread_D.flip(0).sqrt() * site.request.scale
        gram_HDD = past_HCD.transpose(1, 2) @ past_HCD
        made = FIRST + tokens - added
        recent = RecentQueries(past_HCD, torch.arange(50) + made)
        prompt = Prompt(
            self.key_HTD[:, FIRST:made], self.value_HTE[:, FIRST:made], gram_HDD, 50, recent, site.queries_per_kv, K, site.soft_cap
        )
        self.index = build_sketch(FIRST, prompt, site.units, SKETCH.run_units(dim, {"bytes_per_key": 4 * site.units}), site.scanned)
        if added:
            self.index.add(self.key_HTD[:, made : FIRST + tokens], self.value_HTE[:, made : FIRST + tokens])

    @property
    def read(self) -> int:
        return self.key_HTD.shape[1] - 1

    def row(self, kernels: NativeKernels, k: int, select: Select, tail: bool, start: int, words: Tensor | None) -> Tensor:
        self.store.rollback(self.store.tokens - self.read)
        self.store.advance(1)
        name = int(kernels.name(self.site.request.key), 16)
        row = dict.fromkeys(Column, 0) | {
            Column.KERNEL: name - (1 << 64) if name >= 1 << 63 else name,
            Column.STORE: self.store.descriptor(),
            Column.SKETCH: 0 if words is None else words.data_ptr(),
            Column.HEAD_COUNT: self.site.kv_heads,
            Column.START: start,
            Column.OUT_ROW: start,
            Column.BEFORE: self.read,
            Column.K: k,
            Column.SELECT: SELECTS[select],
            Column.TAIL: int(tail),
        }
        return torch.tensor([[row[column] for column in Column]])


def look_up(
    readers: list[Reader], kernels: NativeKernels, k: int, select: Select, tail: bool, learnt_sinks: bool = False, sketched: bool = True
) -> Tensor:
    """The operator's result for sessions of one site: [sessions, H, G, E]."""
    site = readers[0].site
    words = [sketch_words(reader.index) if sketched else None for reader in readers]
    tables = [reader.row(kernels, k, select, tail, at, words[at]) for at, reader in enumerate(readers)]
    query_QSD = torch.stack([reader.query_HGD.flatten(0, 1) for reader in readers], 1)
    key_HSD, value_HSE = (
        torch.stack([part[:, -1] for part in parts], 1)
        for parts in ([each.key_HTD for each in readers], [each.value_HTE for each in readers])
    )
    out = torch.full((1, len(readers), query_QSD.shape[0], site.value_dim), torch.nan, dtype=query_QSD.dtype)
    heads = torch.arange(site.kv_heads)
    sinks = readers[0].sinks_HG.flatten() if learnt_sinks else None
    lookup_native(query_QSD[None], key_HSD[None], value_HSE[None], sinks, tables, heads, out)
    return out[0].unflatten(1, (site.kv_heads, site.queries_per_kv))


def right(reader: Reader, k: int, select: Select, tail: bool, learnt_sinks: bool = False, sketched: bool = True) -> Tensor:
    """The oracle, float64 [H, G, E]: one softmax over the window and the chosen keys, merged with the estimate of the others that the
    torch version makes (tests/runtime/test_indexes.py holds it against its definition)."""
    site, index = reader.site, reader.index
    store_dtype = getattr(torch, site.store_dtype)
    key_HTD, value_HTE = reader.key_HTD.to(store_dtype).double(), reader.value_HTE.to(store_dtype).double()
    logit_HGT = reader.query_HGD.double() @ key_HTD.transpose(1, 2) * site.request.scale
    if site.soft_cap is not None:
        logit_HGT = site.soft_cap * torch.tanh(logit_HGT / site.soft_cap)
    seen_HGT = torch.ones_like(logit_HGT, dtype=torch.bool)
    states = []
    if sketched:
        query_HGD = reader.query_HGD.float() * site.request.scale
        found = index.search(query_HGD, k, select, lambda first, end: ())
        chosen_HGT = torch.zeros_like(seen_HGT)
        chosen_HGT.scatter_(2, torch.where(found.position_HGK >= 0, found.position_HGK, found.position_HGK[..., :1]), True)
        if tail:
            rest = index.rest(query_HGD, found, logit_HGT.masked_fill(~chosen_HGT, -torch.inf).logsumexp(2).float())
            states.append(AttentionState(rest.out.double()[:, :, None], rest.lse.double()[..., None]))
        seen_HGT[..., index.first : index.end] = chosen_HGT[..., index.first : index.end]
    logit_HGT = logit_HGT.masked_fill(~seen_HGT, -torch.inf)
    out_HGE = torch.softmax(logit_HGT, 2) @ value_HTE
    state = reference.merge([*states, AttentionState(out_HGE[:, :, None], logit_HGT.logsumexp(2)[..., None])])
    if learnt_sinks:
        state = reference.apply_learnt_sinks(state, reader.sinks_HG)
    return state.out[:, :, 0]


def assert_right(out_HGE: Tensor, right_HGE: Tensor) -> None:
    """Logits of 100 are known to 8e-6, and so are weights; the largest value is about 5.  bfloat16 is rounded once more."""
    rounding = 2.0**-8 * right_HGE.abs() if out_HGE.dtype == torch.bfloat16 else 0
    worst = ((out_HGE.double() - right_HGE).abs() / (3e-5 + rounding)).max().item()
    assert worst <= 1, f"{worst:.3g} times the tolerance"
