"""Keys that are found, not scanned: the store of a policy with sink + recent tokens exact, and between them a zone
whose keys an index finds: `top_k`, `clusters`, or `sample`, whose keys are drawn by chance.

Letters: H KV heads, G queries per KV head, S new tokens, T keys, K keys chosen, D head_dim, E value_dim.

All keys and values are kept.  A prompt is read with all its past, and its queries are sampled; the first token that is generated makes the
index of what lies between sinks and window, if that is long enough to be worth one (MIN_INDEXED_TOKENS); or `Session.make_indexes` does,
before sessions are forked: those share it, and each adds its own tokens.  Later tokens leave the window BLOCK_TOKENS at a time: until then
they are attended to exactly, so a token is always in the window, in the index or waiting.  Sites take turns with that work, so that no
single token pays for all layers.

What an index learns depends on the queries that were asked before it was made, on nothing after it but two things.  Every
RECALIBRATE_TOKENS tokens it is held against the last queries, and made anew where they have drifted away.  And it is made anew behind a
further prompt when more has been read since than it was made from: keys that are added are known by what others taught, and a sketch looks
at all of them.  `rollback` takes back keys and values, and of the index what is gone; it does not take back what was learnt from queries.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from kvcompile.ir.errors import Problem, SessionError
from kvcompile.ir.indexes import BLOCK_TOKENS, MIN_INDEXED_TOKENS, training_queries
from kvcompile.ir.policy import LookedUp, Sample, SinkRecent
from kvcompile.runtime.attend import attend_spans
from kvcompile.runtime.attend_held import attend_held
from kvcompile.runtime.indexes.index import Borrowing, Found, KeyIndex, Prompt, SamplingIndex, Shaped
from kvcompile.runtime.indexes.registry import index_kind
from kvcompile.runtime.indexes.sketch import SketchIndex
from kvcompile.runtime.merge import AttentionState, merge_all
from kvcompile.runtime.native_lookup import sketch_words
from kvcompile.runtime.query_sample import QuerySample
from kvcompile.runtime.spans import Span
from kvcompile.runtime.store import Paged, RowStore, Settling, StoreState, saved

RECALIBRATE_TOKENS = 1024
HUGE_TOKENS = 16384  # from so many on rows are moved to huge pages: 2.6 ms a MiB once, and a step reads its rows a third quicker
LATE_TOKENS = 2 * BLOCK_TOKENS  # so many wait only behind a further prompt: then they do not wait for the site's turn


class Growth(NamedTuple):
    """When there were `tokens` tokens an index came to cover all before `end`; then BLOCK_TOKENS more every BLOCK_TOKENS tokens, at `until`
    for the last time."""

    tokens: int
    end: int
    until: int

    def cut(self, tokens: int) -> Growth:
        """As it was when there were so many tokens, or at its beginning if that was later."""
        passed = max(0, min(tokens, self.until) - self.tokens)
        return self._replace(until=self.tokens + passed // BLOCK_TOKENS * BLOCK_TOKENS)

    @property
    def last_end(self) -> int:
        return self.end + self.until - self.tokens


class LookupStore:
    """Keys, values and their index, of the KV heads of one group.

    rows: holds every token.  scale, soft_cap: of the attention.  waiting_tokens: that have left the window and are in no index yet
    (HeadPolicy.waiting_tokens).  turn: of the site, among the BLOCK_TOKENS that share the work.
    """

    def __init__(
        self,
        rows: RowStore,
        window: SinkRecent,
        zone: LookedUp,
        queries_per_kv: int,
        scale: float,
        soft_cap: float | None,
        waiting_tokens: int = 0,
        turn: int = 0,
    ) -> None:
        self.rows = rows
        self.window = window
        self.zone = zone
        self.queries_per_kv = queries_per_kv
        self.scale = scale
        self.soft_cap = soft_cap
        self.waiting_tokens = waiting_tokens
        self.turn = turn
        self.index: KeyIndex | None = None
        training = training_queries(zone.index, dict(zone.options))
        self.sample = QuerySample(rows.kv_heads, rows.head_dim, max(1, training // queries_per_kv) if training else 0)
        self._checked_at = 0  # tokens when the index was made or held against queries
        self._growths: list[Growth] = []  # of the index, in order; the first tells what it was made from
        self._words: tuple[SketchIndex, object, object, Tensor] | None = None  # of which index, parts and gaps

    @property
    def tokens(self) -> int:
        return self.rows.tokens

    def extend(self, key_HSD: Tensor, value_HSE: Tensor) -> tuple[Span, ...]:
        return self.rows.extend(key_HSD, value_HSE)

    def append(self, key_HSD: Tensor, value_HSE: Tensor) -> None:
        self.rows.append(key_HSD, value_HSE)

    def advance(self, tokens: int) -> None:
        self.rows.advance(tokens)

    def settle(self) -> None:
        if isinstance(self.rows, Settling):
            self.rows.settle()

    def descriptor(self) -> int:
        return self.rows.descriptor()

    def observe(self, query_HGSD: Tensor, first: int) -> None:
        """Samples the queries of new tokens at positions from `first` on."""
        self.sample.add(query_HGSD, first, self.scale)

    def refresh(self) -> KeyIndex | None:
        """The index for the last token's query, made or extended if it is its time; None where everything is attended to."""
        tokens, index = self.tokens, self.index
        end = self._covered(tokens)
        if index is None:
            if end - self.window.sink_tokens < MIN_INDEXED_TOKENS:
                return None
            index = self._build(end)
        elif (late := end - index.end > LATE_TOKENS) or (tokens + self.turn) % BLOCK_TOKENS == 0:
            index = self._extend(index, end, late)
        return None if self.zone.tokens(tokens) >= index.end - index.first else index

    def make_index(self) -> bool:
        """Makes the index of what was read, or extends it, before a token is generated.  False where there is nothing to do: too little
        lies between sinks and window, or fewer than BLOCK_TOKENS tokens have left the window since."""
        index, end = self.index, self._covered(self.tokens)
        if index is None:
            if end - self.window.sink_tokens < MIN_INDEXED_TOKENS:
                return False
            self._build(end)
        elif end > index.end:
            self._extend(index, end, late=end - index.end > LATE_TOKENS)
        else:
            return False
        return True

    def _extend(self, index: KeyIndex, end: int, late: bool) -> KeyIndex:
        """late: a prompt was read since it was extended last."""
        outgrown = late and end - index.first > 2 * (self._growths[0].end - index.first)
        if outgrown or (self.tokens - self._checked_at >= RECALIBRATE_TOKENS and not self._still_fits(index)):
            return self._build(end)
        if end > index.end:
            index.add(*_joined(self.rows.spans_between(index.end, end)))
            last = self._growths[-1]
            if self.tokens == last.until + BLOCK_TOKENS and end == last.last_end + BLOCK_TOKENS:
                self._growths[-1] = last._replace(until=self.tokens)
            else:
                self._growths.append(Growth(self.tokens, end, self.tokens))
        return index

    def native_words(self, index: KeyIndex | None) -> int:
        """Address of what tells the C++ kernel where the index lies, good until the index changes; 0 of none."""
        if index is None:
            return 0
        assert isinstance(index, SketchIndex)
        words = self._words
        if words is None or words[0] is not index or words[1] is not index.parts or words[2] is not index.gaps_HN:
            words = self._words = (index, index.parts, index.gaps_HN, sketch_words(index))
        return words[3].data_ptr()

    def _still_fits(self, index: KeyIndex) -> bool:
        fits = index.recalibrate(self.sample.recent(), self.rows.spans_between, self.zone.tokens(self.tokens))
        self.sample.fade()
        self._checked_at = self.tokens
        return fits

    def _build(self, end: int) -> KeyIndex:
        first = self.window.sink_tokens
        keys, values = _joined(self.rows.spans_between(first, end))
        sample, k = self.sample, self.zone.tokens(self.tokens)
        training = sample.training() if sample.training_positions else None
        prompt = Prompt(keys, values, sample.gram_HDD, sample.queries, sample.recent(), self.queries_per_kv, k, self.soft_cap, training)
        index = index_kind(self.zone.index).build(first, prompt, dict(self.zone.options))
        self.index, self._checked_at, self._growths = index, self.tokens, [Growth(self.tokens, end, self.tokens)]
        for note in index.notes:
            warnings.warn(f"{self.zone.index}: {note}", stacklevel=2)
        if self.tokens >= HUGE_TOKENS and isinstance(self.rows, Paged):
            self.rows.use_huge_pages()
        return index

    def can_rollback(self, tokens: int) -> Problem | None:
        return self.rows.can_rollback(tokens)

    def rollback(self, tokens: int) -> None:
        """Takes back the last `tokens` tokens; an index that reaches into what is then the window is cut, or made anew when it is
        wanted again."""
        problem = self.can_rollback(tokens)
        if problem is not None:
            raise SessionError(problem)
        self.rows.rollback(tokens)
        self._checked_at = min(self._checked_at, self.tokens)
        index = self.index
        if index is None:
            return
        made, *later = self._growths
        self._growths = [growth.cut(self.tokens) for growth in (made, *later) if growth is made or growth.tokens <= self.tokens]
        index.rollback(self._growths[-1].last_end)  # what it covered when the session was so long
        # keys of a sample that are exact again will be quantised among others, and then lie at other angles
        quantised = isinstance(self.zone, Sample) and isinstance(self.rows, Settling)
        if index.end > (self._covered(self.tokens) if quantised else self.tokens + 1 - self.window.recent_tokens):
            self.index, self._growths = None, []

    def _covered(self, tokens: int) -> int:
        """The end of what leaves the window when so many tokens are read."""
        first = self.window.sink_tokens
        return first + (tokens - self.window.recent_tokens - self.waiting_tokens - first) // BLOCK_TOKENS * BLOCK_TOKENS

    def fork(self) -> LookupStore:
        """A store with the same tokens and the same index; what neither changes is shared."""
        child = LookupStore(
            self.rows.fork(), self.window, self.zone, self.queries_per_kv, self.scale, self.soft_cap, self.waiting_tokens, self.turn
        )
        child.index = None if self.index is None else self.index.fork()
        child.sample = self.sample.copy()
        child._checked_at, child._growths = self._checked_at, list(self._growths)
        return child

    def state(self) -> StoreState:
        """As SavedStore: the index too, so that none is built again, and when it was last held against queries."""
        inner = {"rows": saved(self.rows).state(), "sample": self.sample.state()}
        if self.index is not None:
            tensors, numbers = self.index.state()
            inner["index"] = StoreState(self.zone.index, numbers, tensors)
        return StoreState("lookup", {"checked_at": self._checked_at, "growths": [list(each) for each in self._growths]}, {}, inner)

    def restore(self, state: StoreState) -> None:
        """As SavedStore; the index is copied."""
        checked_at, growths = state.of_kind("lookup").whole("checked_at"), _growths(state.numbers["growths"])
        saved(self.rows).restore(state.inner["rows"])
        self.sample.restore(state.inner["sample"])
        if "index" in state.inner:
            found = state.inner["index"].of_kind(self.zone.index)
            self.index = index_kind(found.kind).restore({name: tensor.clone() for name, tensor in found.tensors.items()}, found.numbers)
            self._check_index(self.index)
            if not growths or growths[-1].last_end != self.index.end:
                raise ValueError(f"growths is {state.numbers['growths']!r} of an index that ends at {self.index.end}")
            self._growths = growths
        self._checked_at = min(checked_at, self.tokens)

    def _check_index(self, index: KeyIndex) -> None:
        """Raises ValueError where an index that was read covers other tokens, or keys of another shape."""
        first, tokens, rows = self.window.sink_tokens, self.tokens, self.rows
        if index.first != first or not first < index.end <= tokens or (index.end - first) % BLOCK_TOKENS:
            raise ValueError(f"an index over the positions {index.first} to {index.end} of {tokens} tokens")
        span = rows.spans_between(0, 1)[0]
        heads, dims = rows.kv_heads, (span.key_HTD.shape[2], span.value_HTE.shape[2])
        if isinstance(index, Shaped) and index.shape not in ((heads, *dims), (heads, dims[0], None)):
            raise ValueError(f"an index of the shape {index.shape} over {heads} heads of {dims}")

    def nbytes(self) -> int:
        """Keys, values, index, and the sample of queries."""
        index = 0 if self.index is None else self.index.nbytes() - self._borrowed_nbytes()
        return self.rows.nbytes() + index + self.sample.nbytes()

    def shared_nbytes(self) -> int:
        """Of keys and values, and of the index."""
        return self.rows.shared_nbytes() + self._borrowed_nbytes()

    def _borrowed_nbytes(self) -> int:
        return self.index.borrowed_nbytes() if isinstance(self.index, Borrowing) else 0


def attend_prompt(store: LookupStore, query_HGSD: Tensor, first_query: int) -> AttentionState:
    """Attention of queries at positions from `first_query` on, whose keys the store holds already, over all the past."""
    return attend_held(
        query_HGSD,
        store.rows,
        [(0, store.tokens)],
        first_query,
        sink_tokens=0,
        recent_tokens=None,
        scale=store.scale,
        soft_cap=store.soft_cap,
    )


def attend_lookup(store: LookupStore, query_HG1D: Tensor, index: KeyIndex) -> AttentionState:
    """Attention of the store's last token: exact over sinks, window and what the index finds; the rest as the policy says.

    query_HG1D: [H, G, 1, D].  Returns out [H, G, 1, E] and lse [H, G, 1], float32.
    """
    return attend_found(store, query_HG1D, index, look_up(store, query_HG1D, index))


def look_up(store: LookupStore, query_HG1D: Tensor, index: KeyIndex) -> Found:
    """What the index finds for the store's last token."""
    scaled_HGD = query_HG1D.squeeze(2).float() * store.scale
    return index.search(scaled_HGD, store.zone.tokens(store.tokens), store.zone.select, store.rows.spans_between)


def attend_found(store: LookupStore, query_HG1D: Tensor, index: KeyIndex, found: Found) -> AttentionState:
    """`attend_lookup` of keys that `look_up` gave."""
    last = store.tokens - 1
    scaled_HGD = query_HG1D.squeeze(2).float() * store.scale
    spans = [*store.rows.spans_between(0, index.first), *store.rows.spans_between(index.end, store.tokens)]
    window = attend_spans(query_HG1D.float(), spans, last, sink_tokens=0, recent_tokens=None, scale=store.scale, soft_cap=store.soft_cap)
    probability = cast(SamplingIndex, index).log_probability if isinstance(store.zone, Sample) else None
    chosen = attend_chosen(store, scaled_HGD, found.position_HGK, probability)
    states = [window, _with_token(chosen)]
    if store.zone.tail:
        rest = index.rest(scaled_HGD, found, chosen.lse)
        assert rest is not None, f"the index {store.zone.index} does not estimate"
        states.append(_with_token(rest))
    return merge_all(states)


def attend_chosen(
    store: LookupStore, scaled_HGD: Tensor, position_HGK: Tensor, log_probability: Callable[[Tensor, Tensor], Tensor] | None = None
) -> AttentionState:
    """Exact attention over chosen positions (-1: none): out [H, G, E], lse [H, G], float32; of a query that chose none (0, -inf).

    log_probability: of keys that were drawn (SamplingIndex); each then counts as often as one over it.
    """
    _, group, chosen = position_HGK.shape
    shared = store.zone.select != "per_query_head"  # one list for the group: each row is read once
    asked = position_HGK[:, 0] if shared else position_HGK.flatten(1)
    key_HKD, value_HKE = store.rows.gather(asked.clamp_min(0))
    if shared:
        key_HGKD, value_HGKE = key_HKD[:, None].float(), value_HKE[:, None].float()
    else:
        key_HGKD, value_HGKE = (each.unflatten(1, (group, chosen)).float() for each in (key_HKD, value_HKE))
    logit_HGK = (key_HGKD @ scaled_HGD[..., None]).squeeze(3)
    if store.soft_cap is not None:
        logit_HGK = store.soft_cap * torch.tanh(logit_HGK / store.soft_cap)
    if log_probability is not None:
        logit_HGK = logit_HGK - log_probability(scaled_HGD, key_HGKD)
    logit_HGK = logit_HGK.masked_fill(position_HGK < 0, -torch.inf)
    lse_HG = torch.logsumexp(logit_HGK, 2)
    weight_HGK = torch.exp(logit_HGK - lse_HG.masked_fill(lse_HG == -torch.inf, 0.0)[..., None])
    return AttentionState((weight_HGK[:, :, None] @ value_HGKE).squeeze(2), lse_HG)


def _with_token(state: AttentionState) -> AttentionState:
    return AttentionState(state.out.unsqueeze(2), state.lse.unsqueeze(2))


def _growths(written: object) -> list[Growth]:
    """As a state has them.  Raises ValueError for what it never has."""
    if not isinstance(written, list):
        raise ValueError(f"growths is {written!r}")
    for each in written:
        if not (isinstance(each, list) and len(each) == 3 and all(type(number) is int and number >= 0 for number in each)):
            raise ValueError(f"growths is {written!r}")
    growths = [Growth(*each) for each in written]
    whole = all(each.until >= each.tokens and (each.until - each.tokens) % BLOCK_TOKENS == 0 for each in growths)
    follow = all(
        one.until <= next.tokens and one.last_end < next.end and (next.end - one.last_end) % BLOCK_TOKENS == 0
        for one, next in itertools.pairwise(growths)
    )
    if not (whole and follow):
        raise ValueError(f"growths is {written!r}")
    return growths


def _joined(spans: Sequence[Span]) -> tuple[Tensor, Tensor]:
    """Keys and values of spans one behind the other; views where there is one."""
    if len(spans) == 1:
        return spans[0].key_HTD, spans[0].value_HTE
    return torch.cat([span.key_HTD for span in spans], 1), torch.cat([span.value_HTE for span in spans], 1)
