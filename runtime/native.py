"""The C++ kernels of a compiled model, as the sessions call them: one operator a site, whatever its policies and sessions.

Python says once a call where every store's positions lie; appending, attending and merging happen in the operator
`kvc_native::attend` (codegen/cpp/attend_operator.cpp).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kvcompile.ir.errors import Problem, TargetError
from kvcompile.ir.plan import HeadGroup, Plan
from kvcompile.ir.request import Request
from kvcompile.runtime.descriptor import Descriptor
from kvcompile.runtime.ring import RingStore
from kvcompile.runtime.store import KVStore


class Column(IntEnum):
    """What a row of the operator's table says: the KV heads of a site that share a policy, in one session."""

    KERNEL = 0  # NativeKernels.name as a number
    STORE = 1  # address of the store's descriptor
    HEADS = 2  # where its KV heads begin in the site's list of them
    HEAD_COUNT = 3
    START = 4  # row of the session's first new token in the call
    NEW = 5  # new tokens
    SKIP = 6  # of which so many ask for no result
    OUT_ROW = 7  # row of the first result
    BEFORE = 8  # tokens that the session had read before the call


@dataclass(frozen=True)
class NativeKernels:
    """Loaded kernels: the requests that they serve, by content hash.

    variant: 64 bits that stand for the instruction set they were built for; the operators find a kernel by its request's hash
             with these bits turned over.
    """

    keys: frozenset[str]
    variant: int = 0

    def serve(self, group: HeadGroup) -> bool:
        """Whether a C++ kernel attends for a group of KV heads, whose keys are not found but all visible ones."""
        return group.policy.found is None and self._has(group, group.request)

    def reads(self, group: HeadGroup) -> bool:
        """Whether the keys of a group of KV heads lie as C++ kernels read all of them."""
        return self.serve(group) or self.stage(group)

    def stage(self, group: HeadGroup) -> bool:
        """Whether a C++ kernel attends for a group of KV heads whose keys it sees part by part."""
        return group.device == "disk" and self._built(group.request)

    def read_prompts(self, group: HeadGroup) -> bool:
        """Whether a C++ kernel reads the prompts of a group of KV heads whose keys are found."""
        return group.policy.found is not None and self._has(group, group.request)

    def look_up(self, group: HeadGroup) -> bool:
        """Whether a C++ kernel attends to what an index finds for a group of KV heads."""
        return self._has(group, group.lookup)

    def _has(self, group: HeadGroup, request: Request | None) -> bool:
        return group.device == "cpu" and self._built(request)

    def _built(self, request: Request | None) -> bool:
        return request is not None and request.key in self.keys

    def number(self, request: Request | None) -> int:
        """What the operators' tables call a request's kernel."""
        assert request is not None
        return _signed(int(self.name(request.key), 16))

    def name(self, key: str) -> str:
        """What the operators call the kernel of request `key`: 16 hexadecimal digits."""
        return f"{int(key, 16) ^ self.variant:016x}"


NO_KERNELS = NativeKernels(frozenset())


def load_launcher(path: Path) -> None:
    """Makes the operators `kvc_native::*` known to torch; loading them again changes nothing.

    Raises TargetError where the library cannot be loaded.
    """
    if hasattr(torch.ops.kvc_native, "attend"):
        return
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise TargetError(
            Problem(str(path), f"the launcher cannot be loaded: {error}.", "`kvcompile cache --clear` removes it; it is built again.")
        ) from error
    torch.library.register_fake("kvc_native::linears", _linears_fake)


def _linears_fake(x: Tensor, weights: list[Tensor], biases: list[Tensor] | None, kernel: str) -> Tensor:
    return x.new_empty(1, x.shape[1], sum(weight.shape[0] for weight in weights))


def load_kernels(path: Path, keys: Iterable[str], variant: int) -> NativeKernels:
    """The kernels in a shared object.  Raises TargetError where it cannot be loaded."""
    try:
        torch.ops.kvc_native.load(str(path), _signed(variant))
    except RuntimeError as error:
        raise TargetError(
            Problem(
                str(path),
                f"the kernels cannot be loaded: {str(error).splitlines()[0]}.",
                "`kvcompile cache --clear` removes them; they are built again.",
            )
        ) from error
    return NativeKernels(frozenset(keys), variant)


class NativeTable:
    """The rows of one session, for every site, kept from call to call.

    Letters: R rows of a site (groups of KV heads that have a kernel).
    """

    def __init__(self, plan: Plan, kernels: NativeKernels, stores: Sequence[Sequence[KVStore]]) -> None:
        self._growing: list[tuple[int, KVStore]] = []  # with their row of the table
        self._rings: list[tuple[int, KVStore]] = []
        rows: list[list[int]] = []
        counts: list[int] = []
        for site, its_stores in zip(plan.sites, stores, strict=True):
            head = count = 0
            for group, store in zip(site.groups, its_stores, strict=True):
                if kernels.serve(group):
                    rows.append([kernels.number(group.request), 0, head, len(group.kv_heads), 0, 0, 0, 0, 0])
                    (self._rings if isinstance(store, RingStore) else self._growing).append((len(rows) - 1, store))
                    count += 1
                head += len(group.kv_heads)
            counts.append(count)
        self._table = torch.tensor(rows, dtype=torch.int64).reshape(-1, len(Column))
        self._addresses = [0] * len(rows)
        self.sites: list[Tensor] = list(self._table.split(counts))  # [R, columns] of each site; empty where it has none

    def count_growing(self, tokens: int) -> None:
        """Counts `tokens` new tokens in the stores that may have to grow.  Raises CapacityError; then some have counted them."""
        self._count(self._growing, tokens)

    def count_rings(self, tokens: int, start: int, before: int) -> None:
        """Counts them in the rings too, which never refuse, and writes down what a call must know.

        start: the session's first row in the call.  before: tokens that it had read.
        """
        self._count(self._rings, tokens)
        self._table[:, Column.START :] = torch.tensor([start, tokens, 0, start, before], dtype=torch.int64)

    def _count(self, rows: list[tuple[int, KVStore]], tokens: int) -> None:
        moved = []
        for row, store in rows:
            store.advance(tokens)
            address = store.descriptor()
            if address != self._addresses[row]:
                self._addresses[row] = address
                moved.append(row)
        if moved:
            self._table[moved, Column.STORE] = torch.tensor([self._addresses[row] for row in moved], dtype=torch.int64)

    def ask_last_only(self, row: int, tokens: int) -> None:
        """The final site's result: only the last token's, in row `row`."""
        final = self.sites[-1]
        final[:, Column.SKIP] = tokens - 1
        final[:, Column.OUT_ROW] = row


class RelayRule(NamedTuple):
    """When sessions with one new token each attend to what they share together: at least so many sessions, over so many tokens that lie
    in the same memory.  sessions 0: never.  Of the shared tokens whole chunks of 256 are taken."""

    sessions: int
    tokens: int


NO_RELAY = RelayRule(0, 0)


class NativeSite(NamedTuple):
    """kv_heads: those of a site in the order of its groups, int64.

    some, reads_prompts, looks_up, stages: whether it has groups that kernels serve, whose prompts alone a kernel reads, that a kernel
    looks keys up for, and whose keys it sees part by part.  rest: whether it has groups for which torch does one or the other.
    slopes: float32 [query_heads] of a site with ALiBi.
    """

    kv_heads: Tensor
    some: bool
    reads_prompts: bool
    looks_up: bool
    stages: bool
    rest: bool
    slopes: Tensor | None


def native_sites(plan: Plan, kernels: NativeKernels) -> list[NativeSite]:
    """What the kernels serve of each site."""
    found = []
    for site in plan.sites:
        served, staged, prompts, looked_up = (
            [has(group) for group in site.groups] for has in (kernels.serve, kernels.stage, kernels.read_prompts, kernels.look_up)
        )
        whole = zip(served, staged, prompts, looked_up, strict=True)
        rest = not all(every or parts or (prompt and single) for every, parts, prompt, single in whole)
        kv_heads = torch.tensor([head for group in site.groups for head in group.kv_heads], dtype=torch.int64)
        slopes = torch.tensor(site.site.slopes, dtype=torch.float32) if site.site.slopes else None
        found.append(NativeSite(kv_heads, any(served), any(prompts), any(looked_up), any(staged), rest, slopes))
    return found


def attend_native(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    learnt_sinks: Tensor | None,
    tables: Sequence[Tensor],
    kv_heads: Tensor,
    out: Tensor,
    *,
    sink_query: Tensor | None = None,
    slopes: Tensor | None = None,
    relay: RelayRule = NO_RELAY,
) -> int:
    """Appends and attends for every row of `tables` (one [R, columns] a session), into `out` [1, rows, query_heads, value_dim].

    query [1, query_heads, tokens, head_dim]; key, value [1, kv_heads, tokens, ...]; kv_heads, slopes: NativeSite's.
    sink_query: like query; what kernels with `cache_index` show to the sinks.
    Returns how many rows of the tables saw a part of their past together with others (runtime/relay.py).
    """
    table = tables[0] if len(tables) == 1 else torch.cat(list(tables))
    given = query, key, value, learnt_sinks, sink_query, slopes, table, kv_heads, out
    shared: int = torch.ops.kvc_native.attend.default(*given, relay.sessions, relay.tokens)
    return shared


def attend_parts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    learnt_sinks: Tensor | None,
    row: Sequence[int],
    parts: Iterator[tuple[int, int, Descriptor]],
    end: int,
    kv_heads: Tensor,
    out: Tensor,
    slopes: Tensor | None,
) -> None:
    """Attends for one row of a table, over all positions up to `end`, which `parts` shows one after the other as (first, end,
    descriptor); the new tokens are in the store already.  The other arguments as of `attend_native`."""
    per_kv = query.shape[1] // key.shape[1]
    queries = row[Column.NEW] - row[Column.SKIP]
    states = torch.empty(row[Column.HEAD_COUNT] * queries * per_kv * (value.shape[3] + 2))
    table = torch.tensor([row], dtype=torch.int64)
    for first, stop, descriptor in parts:
        table[0, Column.STORE] = descriptor.address
        torch.ops.kvc_native.attend_part.default(
            query, key, value, learnt_sinks, slopes, table, kv_heads, out, states, first, stop, stop == end
        )


def _signed(number: int) -> int:
    """The int64 with the same 64 bits."""
    return number - (1 << 64) if number >= 1 << 63 else number
