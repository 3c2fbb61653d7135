"""Keys chosen once: sinks, a recent window, and the tokens that the prompt's last queries attended to most.

Letters: H KV heads, G queries per KV head, S new tokens, T keys, K keys chosen, D head_dim, E value_dim.
Source: SnapKV (Li et al. 2024, section 3): the last queries of a prompt vote; here a KV head's whole group votes with its weights.

A prompt is read with all its past.  The first token that is generated chooses, and what is neither sink, window nor chosen is let go.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompile.ir.errors import Problem, SessionError
from kvcompile.ir.policy import Static
from kvcompile.runtime.attend import attend_spans
from kvcompile.runtime.kivi import KiviStore
from kvcompile.runtime.merge import AttentionState, merge_states
from kvcompile.runtime.query_sample import QuerySample
from kvcompile.runtime.ring import RingStore
from kvcompile.runtime.spans import Span
from kvcompile.runtime.store import RowStore, Settling, StoreState, saved


class StaticStore:
    """Everything while a prompt is read, then a ring and the chosen keys.

    rows: holds the prompt; ring: empty, what it moves to.  scale, soft_cap: of the attention.
    """

    def __init__(self, rows: RowStore, ring: RingStore | KiviStore, zone: Static, scale: float, soft_cap: float | None) -> None:
        self.rows: RowStore | None = rows
        self.ring = ring
        self.zone = zone
        self.scale = scale
        self.soft_cap = soft_cap
        self.sample = QuerySample(rows.kv_heads, rows.head_dim)
        self._key_HKD: Tensor | None = None
        self._value_HKE: Tensor | None = None
        self._chosen_end = 0  # behind the last chosen position

    @property
    def tokens(self) -> int:
        return self.ring.tokens if self.rows is None else self.rows.tokens

    def observe(self, query_HGSD: Tensor, first: int) -> None:
        """Samples the queries of new tokens at positions from `first` on, while a prompt is read."""
        if self.rows is not None:
            self.sample.add(query_HGSD, first, self.scale)

    def choose(self) -> None:
        """Ends the prompt, if more was read than the window holds: chooses, and keeps nothing else of what lies before the window."""
        rows, recent_tokens = self.rows, self.ring.recent_tokens
        assert recent_tokens is not None, "a store of every token where a ring should be"
        if rows is None or rows.tokens <= self.ring.sink_tokens + recent_tokens + self.zone.keys:
            return
        first, end = self.ring.sink_tokens, rows.tokens + 1 - recent_tokens
        spans = rows.spans()
        position_HK = self._most_attended(spans, first, end)
        key_HKD, value_HKE = (chosen.to(self.ring.dtype) for chosen in rows.gather(position_HK))
        ring = self.ring.fork()
        for span in spans:
            ring.extend(span.key_HTD, span.value_HTE)
        self._chosen_end = int(position_HK.max()) + 1
        self.rows, self.ring, self._key_HKD, self._value_HKE = None, ring, key_HKD, value_HKE  # at once: an interrupt leaves all as it was

    def _most_attended(self, spans: tuple[Span, ...], first: int, end: int) -> Tensor:
        """Positions [first, end) with the largest weight, summed over the sampled queries behind them; ascending, [H, K]."""
        key_HTD = torch.cat([span.key_HTD.float() for span in spans], 1)
        recent = self.sample.recent()
        logit_HCT = recent.query_HCD @ key_HTD.transpose(1, 2)
        if self.soft_cap is not None:
            logit_HCT = self.soft_cap * torch.tanh(logit_HCT / self.soft_cap)
        later_CT = torch.arange(key_HTD.shape[1]) > recent.position_C[:, None]
        votes_HT = torch.softmax(logit_HCT.masked_fill_(later_CT, -torch.inf), 2).sum(1)[:, first:end]
        return votes_HT.sort(dim=1, descending=True, stable=True).indices[:, : self.zone.keys].sort(dim=1).values + first

    def extend(self, key_HSD: Tensor, value_HSE: Tensor) -> tuple[Span, ...]:
        return (self.ring if self.rows is None else self.rows).extend(key_HSD, value_HSE)

    def attend(self, query_HGSD: Tensor, spans: tuple[Span, ...], first_query: int) -> AttentionState:
        """Attention of the new tokens' queries over what `extend` gave and the chosen keys."""
        ring = self.ring
        sink_tokens, recent_tokens = (0, None) if self.rows is not None else (ring.sink_tokens, ring.recent_tokens)
        state = attend_spans(
            query_HGSD,
            spans,
            first_query,
            sink_tokens=sink_tokens,
            recent_tokens=recent_tokens,
            scale=self.scale,
            soft_cap=self.soft_cap,
        )
        if self._key_HKD is None or self._value_HKE is None:
            return state
        chosen = (Span(0, self._key_HKD, self._value_HKE),)  # all of them earlier than any query
        return merge_states(
            state,
            attend_spans(query_HGSD, chosen, first_query, sink_tokens=0, recent_tokens=None, scale=self.scale, soft_cap=self.soft_cap),
        )

    def settle(self) -> None:
        held = self.ring if self.rows is None else self.rows
        if isinstance(held, Settling):
            held.settle()

    def advance(self, tokens: int) -> None:
        raise AssertionError("no kernel writes to a store of chosen keys")

    def descriptor(self) -> int:
        raise AssertionError("no kernel reads a store of chosen keys")

    def can_rollback(self, tokens: int) -> Problem | None:
        """Any depth while a prompt is read; then what the ring allows, never into what was chosen from."""
        if self.rows is not None:
            return self.rows.can_rollback(tokens)
        problem = self.ring.can_rollback(tokens)
        window_start = self.tokens - tokens + 1 - (self.ring.recent_tokens or 0)
        if problem is None and window_start < self._chosen_end:  # what was chosen would stand in the window too
            what = f"a static zone has chosen keys up to position {self._chosen_end - 1}, and has let go what they were chosen from."
            problem = Problem(f"rollback({tokens})", what, "Fork the session before the first token that is generated.")
        return problem

    def rollback(self, tokens: int) -> None:
        problem = self.can_rollback(tokens)
        if problem is not None:
            raise SessionError(problem)
        (self.ring if self.rows is None else self.rows).rollback(tokens)

    def fork(self) -> StaticStore:
        """A store with the same tokens; what was chosen is shared."""
        rows = self.rows
        child = StaticStore.__new__(StaticStore)
        child.rows = None if rows is None else rows.fork()
        child.ring, child.zone, child.scale, child.soft_cap = self.ring.fork(), self.zone, self.scale, self.soft_cap
        child.sample = self.sample.copy()
        child._key_HKD, child._value_HKE, child._chosen_end = self._key_HKD, self._value_HKE, self._chosen_end
        return child

    def state(self) -> StoreState:
        """As SavedStore: the prompt, or what was chosen of it and the window."""
        inner = {"sample": self.sample.state()}
        if self.rows is not None:
            return StoreState("static", {"chosen_end": 0}, {}, inner | {"rows": saved(self.rows).state()})
        assert self._key_HKD is not None and self._value_HKE is not None
        tensors = {"keys": self._key_HKD, "values": self._value_HKE}
        return StoreState("static", {"chosen_end": self._chosen_end}, tensors, inner | {"ring": self.ring.state()})

    def restore(self, state: StoreState) -> None:
        """As SavedStore."""
        end, rows = state.of_kind("static").whole("chosen_end"), self.rows
        assert rows is not None, "it has chosen already"
        self.sample.restore(state.inner["sample"])
        if "rows" in state.inner:
            saved(rows).restore(state.inner["rows"])
            return
        self.ring.restore(state.inner["ring"])
        heads, keys, dtype = self.ring.kv_heads, self.zone.keys, self.ring.dtype
        self._key_HKD = state.tensor("keys", dtype, heads, keys, self.ring.head_dim).clone()
        self._value_HKE = state.tensor("values", dtype, heads, keys, self.ring.value_dim).clone()
        self._chosen_end = end
        self.rows = None

    def nbytes(self) -> int:
        """Keys and values of window and chosen keys, or of the prompt; and the sample of its queries."""
        held = (self.ring if self.rows is None else self.rows).nbytes()
        return held + self.sample.nbytes() + sum(each.nbytes for each in (self._key_HKD, self._value_HKE) if each is not None)

    def shared_nbytes(self) -> int:
        return 0 if self.rows is None else self.rows.shared_nbytes()
