"""What heads that look keys up find of a text: recall, bytes read and output error of every KV head whose keys an index finds.

Letters: H KV heads, G queries per KV head, N queries asked, T keys of the cache, K keys found, D head_dim, E value_dim.

1. The text is read with every KV head remembering everything, so queries, keys and values are the model's own.
2. The first 7/8 of it are the cache.  Its index is made by a LookupStore, from the keys and queries of these tokens, as a session makes it.
3. Queries are held out: evenly spaced in the last eighth.  Each is asked as if it stood at the end of the cache; what lies between is left
   out, for it and for the oracle.
4. The oracle is attention in float64 over the keys and values that the model computed, whatever the policy's store makes of them.

While the text is read, only the sample that an index learns from and the held-out queries are kept; the keys are taken from the session
when their site's turn comes, and dropped with it.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from kvcompile.heat_map import Cell, heat_map
from kvcompile.ir.errors import KvcompileError, SpecError
from kvcompile.ir.indexes import MIN_INDEXED_TOKENS, indexed_tokens
from kvcompile.ir.plan import HeadGroup, Plan, SitePlan
from kvcompile.ir.policy import ITEMSIZE, HeadPolicy, Sample
from kvcompile.ir.sites import AttentionSite
from kvcompile.ir.store_bytes import packed_bytes, read_bytes, row_bytes
from kvcompile.report import Table, format_bytes
from kvcompile.runtime.growable import GrowableStore
from kvcompile.runtime.lookup import LookupStore, attend_found, look_up
from kvcompile.runtime.merge import AttentionState, apply_learnt_sinks
from kvcompile.runtime.model import CompiledModel, make_store
from kvcompile.runtime.program import Memory, Program
from kvcompile.runtime.session import Session
from kvcompile.verify import full_plan

HELD_OUT_SHARE = 8  # one of so many parts of the text is asked, the others are the cache
MOST_QUERIES = 32
LONGEST_TEXT = 1 << 20
TIE = 1e-4  # nats: a key that is so near to the k-th is as good; products of float32 and float64 differ by less


@dataclass(frozen=True)
class HeadRecall:
    """What one KV head found, over all queries and the query heads that share it.

    k:             keys that a query head asks for; of a zone that draws keys by chance, how many it drew in the mean, 1 at least.
    recall:        share of the k keys with the largest exact logits, of those that the index covers, that were found: the mean.
    output_error:  |o - o'| / |o| of the merged attention: the mean.
    scanned_share: bytes that a step reads, keys that several query heads found counted once, of those that full attention reads.
    index_bytes, build_s: this KV head's share of its group's index, and of the seconds that it took.
    """

    layer: int
    kv_head: int
    policy: str
    k: int
    recall: float
    output_error: float
    scanned_share: float
    index_bytes: float
    build_s: float


@dataclass(frozen=True)
class Recall:
    """Every KV head that looks keys up, at least one, by layer and KV head.

    tokens: of the text; cache_tokens of them are the cache.  queries: how many positions were asked.
    shape: of each attention, how many KV heads it has.  not_looked_up: the other KV heads, in words.  notes: of the indexes.
    """

    heads: tuple[HeadRecall, ...]
    tokens: int
    cache_tokens: int
    queries: int
    shape: tuple[int, ...]
    not_looked_up: str = ""
    notes: tuple[str, ...] = ()

    @property
    def worst(self) -> HeadRecall:
        """The KV head with the largest output error."""
        return max(self.heads, key=lambda head: head.output_error)

    def mean(self, field: str) -> float:
        """Of a field of HeadRecall, over all KV heads."""
        return float(sum(getattr(head, field) for head in self.heads) / len(self.heads))

    def table(self) -> Table:
        rows = tuple(
            (
                str(head.layer),
                str(head.kv_head),
                head.policy,
                str(head.k),
                f"{head.recall:.3f}",
                f"{head.output_error:.4f}",
                f"{head.scanned_share:.1%}",
                format_bytes(head.index_bytes),
                f"{1000 * head.build_s:.0f} ms",
            )
            for head in self.heads
        )
        header = ("layer", "KV head", "policy", "k", "recall@k", "output error", "read", "index", "build")
        title = f"{self.queries} held-out queries over a cache of {self.cache_tokens} tokens"
        return Table(header, rows, title, frozenset({0, 1, *range(3, len(header))}))

    def summary(self) -> str:
        """One line: the means, what all indexes cost, and the worst KV head."""
        size, built = (sum(getattr(head, field) for head in self.heads) for field in ("index_bytes", "build_s"))
        counted = "1 KV head" if len(self.heads) == 1 else f"{len(self.heads)} KV heads"
        return (
            f"{counted}: recall@k {self.mean('recall'):.3f}, output error {self.mean('output_error'):.4f}, "
            f"{self.mean('scanned_share'):.1%} of full attention's bytes read; indexes {format_bytes(size)}, built in {built:.1f} s; "
            f"worst: layer {self.worst.layer}, KV head {self.worst.kv_head}, output error {self.worst.output_error:.4f}, "
            f"recall@k {self.worst.recall:.3f}"
        )

    def lines(self) -> list[str]:
        """What stands below the table."""
        return [
            *(f"note: {note}" for note in self.notes),
            *([f"not looked up: {self.not_looked_up}"] if self.not_looked_up else []),
            self.summary(),
        ]

    def picture(self) -> str:
        """An SVG: the output error of every KV head, in percent."""
        found = {(head.layer, head.kv_head): head for head in self.heads}
        cells = [
            Cell(layer, kv_head, None if head is None else head.output_error, "not looked up" if head is None else _told(head))
            for layer, kv_heads in enumerate(self.shape)
            for kv_head in range(kv_heads)
            for head in (found.get((layer, kv_head)),)
        ]
        worst = f"worst {100 * self.worst.output_error:.2g} (layer {self.worst.layer}, KV head {self.worst.kv_head})"
        title = f"Output error of lookup, %: mean {100 * self.mean('output_error'):.2g}, {worst}"
        return heat_map(title, "layer", "KV head", cells)

    def as_dict(self) -> dict[str, Any]:
        summary = {
            "recall": self.mean("recall"),
            "output_error": self.mean("output_error"),
            "scanned_share": self.mean("scanned_share"),
            "index_bytes": sum(head.index_bytes for head in self.heads),
            "build_s": sum(head.build_s for head in self.heads),
            "worst": {"layer": self.worst.layer, "kv_head": self.worst.kv_head},
        }
        return {
            "tokens": self.tokens,
            "cache_tokens": self.cache_tokens,
            "queries": self.queries,
            "summary": summary,
            "heads": [asdict(head) for head in self.heads],
            "not_looked_up": self.not_looked_up,
            "notes": list(self.notes),
        }


def check_text(policies: Iterable[HeadPolicy], tokens: int, where: str) -> None:
    """Raises KvcompileError where `tokens` tokens are too few for an index of every policy that looks keys up.

    where: what the text was named by.
    """
    for policy in policies:
        if policy.looked_up is None or _enough(policy, tokens):
            continue
        needed = bisect_left(range(LONGEST_TEXT), True, key=partial(_enough, policy))
        if needed == LONGEST_TEXT:
            what = f"k of policy {policy.name} asks for every key, so that there is nothing to look up."
            raise KvcompileError.at(where, what, "Write a smaller k.")
        what = f"{tokens} tokens are too few to look anything up: policy {policy.name} needs {needed} ({MIN_INDEXED_TOKENS} keys or more "
        what += "than k, beside sinks and window, in the first 7/8)."
        raise KvcompileError.at(where, what, f"Give a text of at least {needed} tokens, and --tokens as many if it is given.")


def _enough(policy: HeadPolicy, tokens: int) -> bool:
    """Whether an index of the first 7/8 is made, and has a choice."""
    assert policy.window is not None and policy.looked_up is not None
    cache = cache_tokens(tokens)
    return indexed_tokens(policy.window.window_tokens + policy.waiting_tokens, cache) > policy.looked_up.tokens(cache)


def cache_tokens(tokens: int) -> int:
    """How many of a text's tokens are the cache."""
    return tokens - tokens // HELD_OUT_SHARE


def held_out(tokens: int) -> list[int]:
    """The positions that are asked."""
    first = cache_tokens(tokens)
    count = min(MOST_QUERIES, tokens - first)
    return [first + number * (tokens - first) // count for number in range(count)]


@torch.no_grad()
def measure_recall(model: CompiledModel, ids: Tensor, where: str = "text", progress: Callable[[str], None] | None = None) -> Recall:
    """What the model's heads find in a text of its tokens, ids [tokens] int64.

    where: what the text is named by in messages.  progress: called with a line for each chunk read and each layer measured.
    Raises SpecError where no KV head looks keys up, KvcompileError where the text is too short.
    """
    told = progress or (lambda line: None)
    looking = [(site, group) for site in model.plan.sites for group in site.groups if group.policy.looked_up]
    if not looking:
        mend = "Give such a policy to KV heads of layers without a window of their own."
        raise SpecError.at(model.spec.where("heads"), "no KV head of this model has a policy with a top_k, clusters or sample zone.", mend)
    check_text((group.policy for _, group in looking), len(ids), where)
    full = model.with_plan(full_plan(model.plan))
    listener = _Listener(looking, cache_tokens(len(ids)), held_out(len(ids)))
    session = replace(full, program=_listened_to(full.program, listener)).session(prefix=None)
    session.prefill(ids, on_chunk=lambda read, total: told(f"reading the text: {read} of {total} tokens"))
    heads: list[HeadRecall] = []
    notes: list[str] = []
    for number, (site, group) in enumerate(looking):
        told(f"layer {site.site.index}: {number + 1} of {len(looking)}")
        measured, told_by_index = _measure_of(session, listener, site, group)
        heads += measured
        notes += told_by_index
    heads.sort(key=lambda head: (head.layer, head.kv_head))
    shape = tuple(site.site.kv_heads for site in model.plan.sites)
    return Recall(
        tuple(heads), len(ids), listener.cache, len(listener.asked), shape, _not_looked_up(model.plan), tuple(dict.fromkeys(notes))
    )


def measure_group(
    site: AttentionSite,
    group: HeadGroup,
    store: LookupStore,
    key_HTD: Tensor,
    value_HTE: Tensor,
    asked_HGND: Tensor,
    sinks_HG: Tensor | None = None,
) -> tuple[list[HeadRecall], tuple[str, ...]]:
    """Each KV head of a group, and the notes of its index.

    store: has observed the queries of the T tokens, which it is given here.  asked_HGND: the held-out queries, not scaled.
    sinks_HG: learnt logits of the model, if it has some.
    """
    store.append(key_HTD, value_HTE)
    store.settle()
    started = time.perf_counter()
    index = store.refresh()
    build_s = time.perf_counter() - started
    assert index is not None, "too few tokens for an index"
    k, covered = store.zone.tokens(store.tokens), slice(index.first, index.end)
    queries, kv_heads = asked_HGND.shape[2], key_HTD.shape[0]
    found, given = [], []
    for number in range(queries):
        query_HG1D = asked_HGND[:, :, number : number + 1]
        found.append(look_up(store, query_HG1D, index))
        given.append(_with_sinks(attend_found(store, query_HG1D, index, found[-1]), sinks_HG).out.squeeze(2))
    measured = []
    for head, kv_head in enumerate(group.kv_heads):
        if isinstance(store.zone, Sample):
            drawn = [(each.position_HGK[head] >= 0).sum(1).float().mean() for each in found]
            k = max(1, round(float(sum(drawn)) / queries))
        key_TD, value_TE = key_HTD[head].double(), value_HTE[head].double()
        recalls, errors, rows = [], [], 0
        for number in range(queries):
            logit_GT = asked_HGND[head, :, number].double() @ key_TD.T * store.scale
            if store.soft_cap is not None:
                logit_GT = store.soft_cap * torch.tanh(logit_GT / store.soft_cap)
            position_GK = found[number].position_HGK[head]
            recalls.append(_recall(logit_GT, covered, position_GK, k))
            rows += position_GK[position_GK >= 0].unique().numel()
            exact = AttentionState((torch.softmax(logit_GT, 1) @ value_TE)[None, :, None], logit_GT.logsumexp(1)[None, :, None])
            exact_GE = _with_sinks(exact, None if sinks_HG is None else sinks_HG[head : head + 1]).out[0, :, 0]
            errors.append((exact_GE - given[number][head]).norm(dim=1) / exact_GE.norm(dim=1).clamp_min(1e-30))
        form = (group.policy.store, site.dtype, 1, site.head_dim, site.value_dim)
        exactly = read_bytes(*form, store.tokens) - packed_bytes(*form, index.end - index.first) + rows / queries * row_bytes(*form)
        measured.append(
            HeadRecall(
                layer=site.index,
                kv_head=kv_head,
                policy=group.policy.name,
                k=k,
                recall=float(torch.cat(recalls).mean()),
                output_error=float(torch.cat(errors).mean()),
                scanned_share=(exactly + index.scanned_bytes(store.zone.tail, k) / kv_heads)
                / (store.tokens * (site.head_dim + site.value_dim) * ITEMSIZE[site.dtype]),
                index_bytes=index.nbytes() / kv_heads,
                build_s=build_s / kv_heads,
            )
        )
    return measured, index.notes


def _recall(logit_GT: Tensor, covered: slice, position_GK: Tensor, k: int) -> Tensor:
    """Of each query head, the share of the k largest of the covered logits that stand at the found positions (-1: none), [G]."""
    least_G1 = logit_GT[:, covered].topk(k, 1).values[:, -1:] - TIE
    right_GK = (logit_GT.gather(1, position_GK.clamp_min(0)) >= least_G1) & (position_GK >= 0)
    return (right_GK.sum(1) / k).clamp_max(1.0)  # of equal keys more than k may be found


def _with_sinks(state: AttentionState, sinks_HG: Tensor | None) -> AttentionState:
    return state if sinks_HG is None else apply_learnt_sinks(state, sinks_HG)


def _measure_of(session: Session, listener: _Listener, site: SitePlan, group: HeadGroup) -> tuple[list[HeadRecall], tuple[str, ...]]:
    """A group of the session that has read the text; its store is dropped."""
    facts, heads = site.site, list(group.kv_heads)
    (held,) = session.stores(facts.index)
    assert isinstance(held, GrowableStore)
    spans = held.spans_between(0, listener.cache)
    key_HTD = torch.cat([span.key_HTD[heads] for span in spans], 1)
    value_HTE = torch.cat([span.value_HTE[heads] for span in spans], 1)
    asked_HGND = torch.cat(listener.queries[facts.index], 1).unflatten(0, (facts.kv_heads, facts.queries_per_kv))[heads]
    sinks = listener.sinks.get(facts.index)
    sinks_HG = None if sinks is None else sinks.unflatten(0, (facts.kv_heads, facts.queries_per_kv))[heads]
    store = listener.stores[facts.index].pop(group.kv_heads)
    return measure_group(facts, group, store, key_HTD, value_HTE, asked_HGND, sinks_HG)


class _Listener:
    """What is kept of the queries that sites are asked while a text is read.

    cache: tokens whose queries an index may learn from.  asked: positions whose queries are kept.
    stores: by site and KV heads; they sample queries, and hold no token.  queries: by site, [query_heads, some of N, D] of each chunk.
    sinks: by site, the model's learnt logits.
    """

    def __init__(self, looking: Sequence[tuple[SitePlan, HeadGroup]], cache: int, asked: list[int]) -> None:
        self.cache = cache
        self.asked = asked
        self.stores: dict[int, dict[tuple[int, ...], LookupStore]] = {}
        self.queries: dict[int, list[Tensor]] = {}
        self.sinks: dict[int, Tensor] = {}
        for site, group in looking:
            store = make_store(site, group, native=False)
            assert isinstance(store, LookupStore)
            self.stores.setdefault(site.site.index, {})[group.kv_heads] = store

    def hear(self, site: int, first: int, query: Tensor, sinks: Tensor | None) -> None:
        """query: [1, query_heads, tokens, D] of the tokens from position `first` on."""
        if site not in self.stores:
            return
        tokens = query.shape[2]
        for kv_heads, store in self.stores[site].items():
            query_HGSD = query[0].unflatten(0, (-1, store.queries_per_kv))[list(kv_heads)]
            store.observe(query_HGSD[:, :, : max(0, self.cache - first)], first)
        here = [position - first for position in self.asked if first <= position < first + tokens]
        self.queries.setdefault(site, []).append(query[0][:, here])
        if sinks is not None:
            self.sinks[site] = sinks


@dataclass(frozen=True)
class _ListenedTo(Program):
    """A program whose sites' queries are heard before they are answered."""

    listener: _Listener | None = None

    def run(self, input_ids: Tensor, position_ids: Tensor, memory: Memory, wanted: Tensor | None) -> Tensor:
        assert self.listener is not None
        return super().run(input_ids, position_ids, _Hearing(memory, self.listener, int(position_ids[0, 0])), wanted)


def _listened_to(program: Program, listener: _Listener) -> Program:
    return _ListenedTo(program.steps, program.weights, program.result, listener)


@dataclass(frozen=True)
class _Hearing:
    """A memory of one session that tells `listener` what is asked; first: position of the call's first token."""

    memory: Memory
    listener: _Listener
    first: int

    def attend(
        self,
        site: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        sink_query: Tensor | None,
        final: bool,
        choosing: Tensor | None = None,
    ) -> Tensor:
        self.listener.hear(site, self.first, query, sinks)
        return self.memory.attend(site, query, key, value, sinks, sink_query, final, choosing)

    def convolve(self, site: int, input: Tensor, weight: Tensor, bias: Tensor | None, final: bool) -> Tensor:
        return self.memory.convolve(site, input, weight, bias, final)


def _not_looked_up(plan: Plan) -> str:
    """`layers 0-4, 6 (window 512); 3 KV heads of layers 5, 7 (full)`; empty where every KV head looks keys up."""
    whole: dict[str, list[int]] = {}
    parts: dict[str, list[tuple[int, int]]] = {}
    for site in plan.sites:
        for group in site.groups:
            if group.policy.looked_up is not None:
                continue
            if len(group.kv_heads) == site.site.kv_heads:
                whole.setdefault(group.policy.name, []).append(site.site.index)
            else:
                parts.setdefault(group.policy.name, []).append((site.site.index, len(group.kv_heads)))
    told = [f"{_layers(layers)} ({name})" for name, layers in whole.items()]
    for name, found in parts.items():
        count = sum(heads for _, heads in found)
        told.append(f"{count} KV head{'s' if count > 1 else ''} of {_layers([layer for layer, _ in found])} ({name})")
    return "; ".join(told)


def _layers(numbers: Sequence[int]) -> str:
    """`layer 3`, `layers 0-4, 6`, of ascending numbers."""
    runs = [[number for _, number in run] for _, run in groupby(enumerate(dict.fromkeys(numbers)), lambda pair: pair[1] - pair[0])]
    written = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"layer{'s' if len(numbers) > 1 else ''} {written}"


def _told(head: HeadRecall) -> str:
    return f"{head.policy}: output error {100 * head.output_error:.2g} %, recall@k {head.recall:.3f}, read {100 * head.scanned_share:.2g} %"
