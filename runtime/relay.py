"""When sessions attend together to a prefix that they share (RelayAttention, Zhu et al. 2024): decided by times measured on this machine.

A session that was forked reads the past where its parent has it.  When several step at once, the kernel attends to what lies in the same
memory once for all of them, their queries side by side.  That reads the prefix once and not once a session, and multiplies more rows at
a time; but a session's own chunks of keys could have been cut more evenly between the threads.  So it is measured: the plan's own kernels,
over a prefix that forks share, together and in turn.

Chunks of keys are the same either way, and their states are merged in the same order: in float32 which way runs changes no bit.  Where
bfloat16 is multiplied in pairs (codegen/cpp/pairs.h) relay rounds weights otherwise; who wants the same tokens whatever the clock says
writes `relay: off` or `always`, or `target.deterministic`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kvcompile.ir.errors import CapacityError
from kvcompile.ir.plan import HeadGroup, Plan, SitePlan
from kvcompile.ir.relaying import ALWAYS, CHUNK_TOKENS, can_relay, why_off
from kvcompile.runtime.growable import GrowableStore
from kvcompile.runtime.native import NO_RELAY, NativeKernels, RelayRule, attend_native

_SESSIONS = (2, 3, 4, 6, 8)
_LONG, _LENGTHS = 2048, (256, 512, 1024)
_ROUNDS = 7
_GAIN = 0.97  # of the time in turn: what is measured as no more than even is left in turn

MakeStore = Callable[[SitePlan, HeadGroup, int], GrowableStore]


@dataclass
class Relay:
    """rule: when sessions see together.  reason: why, for people.

    calls: attention calls over several sessions with one new token each; shared: of the rows of their tables (groups of KV heads of a
    session), those that saw a prefix together with others; rows: all of them.  Counts of calls from several threads are about right.
    """

    rule: RelayRule
    reason: str
    calls: int = 0
    rows: int = 0
    shared: int = 0

    def count(self, rows: int, shared: int) -> None:
        self.calls += 1
        self.rows += rows
        self.shared += shared

    def text(self) -> str:
        """One line: when, why, and how often so far."""
        return f"relay {self.reason}" + (f"; so far {self.shared} of {self.rows} rows in {self.calls} calls" if self.calls else "")


class Timed(NamedTuple):
    """Seconds of one site's attention."""

    together: float
    in_turn: float

    @property
    def pays(self) -> bool:
        return self.together < _GAIN * self.in_turn


def relay_of(plan: Plan, kernels: NativeKernels, make: MakeStore, deterministic: bool = False) -> Relay:
    """What the spec's `prefix: {relay}` means on this machine; with `auto` the kernels are timed, which takes a tenth of a second.

    make(site, group, capacity): an empty store.
    """
    off = why_off(plan, deterministic, lambda group: may_relay(group, kernels))
    if off is not None:
        return Relay(NO_RELAY, off)
    if plan.relay == "always":
        return Relay(RelayRule(2, CHUNK_TOKENS), ALWAYS)
    site, group = _measured_site(plan, kernels)
    try:
        times = {sessions: _timed(site, group, kernels, make, sessions, _LONG) for sessions in _SESSIONS}
        return chosen(times, lambda sessions, tokens: _timed(site, group, kernels, make, sessions, tokens))
    except CapacityError:
        return Relay(NO_RELAY, "off: there is no memory to measure it in")


def chosen(times: dict[int, Timed], timed: Callable[[int, int], Timed]) -> Relay:
    """The rule that times over long prefixes by number of sessions, and `timed(sessions, tokens)` of shorter ones, speak for."""
    paying = [sessions for sessions in times if all(times[more].pays for more in times if more >= sessions)]
    if not paying:
        most = max(times)
        return Relay(NO_RELAY, f"off: {_told(times[most], most, _LONG)}")
    fewest = paying[0]
    shorter = {tokens: timed(fewest, tokens) for tokens in _LENGTHS}
    enough = next((tokens for tokens in _LENGTHS if all(shorter[more].pays for more in _LENGTHS if more >= tokens)), _LONG)
    shown = {**shorter, _LONG: times[fewest]}[enough]
    return Relay(RelayRule(fewest, enough), f"from {fewest} sessions and {enough} shared tokens on: {_told(shown, fewest, enough)}")


def _told(times: Timed, sessions: int, tokens: int) -> str:
    together, in_turn = (f"{seconds * 1e6:.0f} us" for seconds in times)
    return f"{sessions} sessions over {tokens} shared tokens take {together} together and {in_turn} in turn (measured, one layer)"


def may_relay(group: HeadGroup, kernels: NativeKernels) -> bool:
    """Whether sessions can see the past of a group of KV heads together, with these kernels."""
    return kernels.serve(group) and can_relay(group)


def _measured_site(plan: Plan, kernels: NativeKernels) -> tuple[SitePlan, HeadGroup]:
    """The group with the most KV heads."""
    able = [(site, group) for site in plan.sites for group in site.groups if may_relay(group, kernels)]
    return max(able, key=lambda found: len(found[1].kv_heads))


def _timed(site: SitePlan, group: HeadGroup, kernels: NativeKernels, make: MakeStore, sessions: int, tokens: int) -> Timed:
    """One site's attention of `sessions` forks of one prefix, on random numbers, the two ways taking turns: the best of some rounds."""
    facts, heads = site.site, len(group.kv_heads)
    generator = torch.Generator().manual_seed(0)
    dtype: torch.dtype = getattr(torch, facts.dtype)

    def random(each: int, count: int, dim: int) -> Tensor:
        return torch.randn(each, count, dim, generator=generator).to(dtype)

    base = make(site, group, tokens)
    base.append(random(heads, tokens, facts.head_dim), random(heads, tokens, facts.value_dim))
    stores = [base.fork() for _ in range(sessions)]
    for store in stores:
        store.capacity_tokens = 2 * _ROUNDS
    query = random(facts.query_heads, sessions, facts.head_dim)[None]
    key, value = (random(facts.kv_heads, sessions, dim)[None] for dim in (facts.head_dim, facts.value_dim))
    sinks = torch.zeros(facts.query_heads) if facts.learnt_sinks else None
    kv_heads, kernel = torch.tensor(group.kv_heads), kernels.number(group.request)
    out = query.new_empty(1, sessions, facts.query_heads, facts.value_dim)
    best = [float("inf"), float("inf")]
    for _ in range(_ROUNDS):
        for way, rule in enumerate((RelayRule(2, CHUNK_TOKENS), NO_RELAY)):
            before = [store.tokens for store in stores]
            for store in stores:
                store.advance(1)
            rows = [[kernel, store.descriptor(), 0, heads, row, 1, 0, row, before[row]] for row, store in enumerate(stores)]
            table = torch.tensor(rows, dtype=torch.int64)
            began = time.perf_counter()
            attend_native(query, key, value, sinks, [table], kv_heads, out, relay=rule)
            best[way] = min(best[way], time.perf_counter() - began)
    return Timed(*best)
