"""A compiled model: a program, a plan and the sessions that run on them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import EllipsisType
from typing import Any, NamedTuple, NoReturn, SupportsIndex, TypeAlias, overload

import torch
from torch import Tensor

from kvcompile.ir.errors import CapacityError, Problem, SessionError
from kvcompile.ir.plan import HeadGroup, Plan, SitePlan
from kvcompile.ir.policy import HeadPolicy, Int8, Kivi, Sample, SinkRecent, Static, TopK
from kvcompile.ir.sites import AttentionSite
from kvcompile.ir.spec import Spec
from kvcompile.ir.store_bytes import quantised_in
from kvcompile.runtime.attend import attend_spans
from kvcompile.runtime.attend_chosen import attend_chosen
from kvcompile.runtime.attend_held import attend_held
from kvcompile.runtime.convolution_state import ConvolutionState, convolve_packed
from kvcompile.runtime.disk import DiskStore, LostTokens
from kvcompile.runtime.generation import Generation, Prompt, Prompts, complete, generate
from kvcompile.runtime.growable import GrowableStore
from kvcompile.runtime.kivi import KiviStore
from kvcompile.runtime.layout import KeyLayout
from kvcompile.runtime.lookup import LookupStore, attend_lookup, attend_prompt
from kvcompile.runtime.merge import AttentionState, apply_learnt_sinks
from kvcompile.runtime.native import (
    NO_KERNELS,
    NO_RELAY,
    NativeKernels,
    NativeSite,
    NativeTable,
    attend_native,
    attend_parts,
    native_sites,
)
from kvcompile.runtime.native_lookup import lookup_native, lookup_row
from kvcompile.runtime.prefix import OnChunk, ReadPrefixes, choose_prefix
from kvcompile.runtime.program import Program
from kvcompile.runtime.relay import Relay, relay_of
from kvcompile.runtime.ring import RingStore
from kvcompile.runtime.session import Session, Tokens, as_token_ids
from kvcompile.runtime.session_file import read_session
from kvcompile.runtime.static import StaticStore
from kvcompile.runtime.store import KVStore, RowStore


@dataclass(frozen=True, repr=False)
class CompiledModel:
    """The decoder that `kvcompile.compile` returns.  Holds no sequence's state; `session()` makes one.

    kernels:      the C++ kernels; where they serve a group of KV heads, its keys lie as they read them.
    vocabulary:   number of logits.
    stop_tokens:  ids that end `generate`.
    hash:         of the model's files, or of a module's weights: what a saved session belongs to.
    verification: what the compile proved (kvcompile/verify.py); None while it is being proved.
    timings:      seconds of each stage of the compile.
    transformers_face: what `as_transformers` calls.
    prefixes:     what has been read of the spec's prefixes, which sessions fork.
    """

    program: Program
    plan: Plan
    spec: Spec
    vocabulary: int
    kernels: NativeKernels = NO_KERNELS
    name: str = "module"
    hash: str = ""
    tokenizer: Any = None
    stop_tokens: frozenset[int] = frozenset()
    verification: Any = None
    timings: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    explanation: Callable[[CompiledModel], str] | None = None
    transformers_face: Callable[[CompiledModel], Any] | None = None
    prefixes: ReadPrefixes = field(init=False, repr=False, compare=False, default_factory=ReadPrefixes)

    def __repr__(self) -> str:
        return f"CompiledModel({self.name!r}, {len(self.plan.sites)} attention sites, {self.plan.weight_bytes} bytes of weights)"

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Neither copied nor pickled: what it holds is code, and memory that its sessions share."""
        mend = "Share it, it holds no sequence's state; another process compiles the spec again, and finds its binaries in the cache."
        raise SessionError(Problem("compiled model", "it can be neither copied nor pickled.", mend))

    @property
    def chunk_tokens(self) -> int:
        return self.spec.prefill_chunk_tokens

    def with_plan(self, plan: Plan) -> CompiledModel:
        """The same program with other memory: segments do not know the plan.  Nothing is proved of it.

        Groups for which no kernel was built, for prompts or for single tokens, run in torch there, and a warning says so.
        """
        groups = [group for site in plan.sites for group in site.groups]
        kernels = self.kernels
        without = sum(not (kernels.look_up(group) if group.policy.found else kernels.reads(group)) for group in groups)
        warnings = self.warnings
        if without and self.kernels.keys:
            groups_without = f"{without} of {len(groups)} groups of KV heads"
            warnings += (f"{groups_without} have no kernel that was built with this model: they run in torch, slower.",)
        return replace(self, plan=plan, verification=None, warnings=warnings)

    def session(self, *, prefix: str | EllipsisType | None = ..., on_chunk: OnChunk | None = None) -> Session:
        """A session that starts behind a prefix of the spec: the one of this name; with None an empty session.

        Left out: the only prefix that the spec declares, or the one marked `default: true`; an empty session where it declares none.
        The first session of a prefix reads it, and calls on_chunk(read, total) after each chunk; every other one finds it read.  What a
        prefix has read lies in memory once (`shared_nbytes` of each session); rings are copied.
        Raises SessionError for a name that is not declared, and for none where there are several and no default.
        """
        chosen = choose_prefix(self.plan.prefixes, prefix)
        if chosen is not None:
            return self.prefixes.fork(self, chosen, on_chunk)
        return Session(self, self.empty_stores(), tuple(map(ConvolutionState.empty, self.plan.convolutions)), [])

    def empty_stores(self) -> list[list[KVStore]]:
        """Of each site a store for each of its head groups."""
        folder = self.spec.target.disk
        return [[make_store(site, group, self.kernels.reads(group), folder) for group in site.groups] for site in self.plan.sites]

    def restore(self, path: str | Path) -> Session:
        """The session that `Session.save` wrote: it goes on as that one would have, and neither reads its tokens nor makes an index again.

        Keys and values are read where the file lies, by all processes from the same memory; new tokens go to memory of the session's own.
        The file may be removed or replaced meanwhile, but must not be cut off or overwritten in place: a process that reads what is gone is
        ended by the system (SIGBUS).
        Raises SessionError for what is no session file, is damaged, or is of another model, another plan or another version.
        """
        stores, convolutions = self.empty_stores(), tuple(map(ConvolutionState.empty, self.plan.convolutions))
        convolutions, tokens = read_session(self, path, stores, convolutions)
        return Session(self, stores, convolutions, tokens)

    @functools.cached_property
    def native_sites(self) -> list[NativeSite]:
        """Of each site, which part the C++ kernels serve."""
        return native_sites(self.plan, self.kernels)

    @functools.cached_property
    def relay(self) -> Relay:
        """When sessions see what they share together, and how often they did; decided when several step at once for the first time."""

        def make(site: SitePlan, group: HeadGroup, capacity: int) -> GrowableStore:
            store = make_store(site, replace(group, capacity_tokens=capacity), self.kernels.reads(group))
            assert isinstance(store, GrowableStore)
            return store

        return relay_of(self.plan, self.kernels, make, self.spec.target.deterministic)

    @torch.no_grad()
    def forward(self, batch: Sequence[tuple[Session, Tensor]], *, logits_of: str = "last", prompt: bool = False) -> Tensor:
        """One pass over the packed tokens of several sessions: `[(session, ids [n]), ...]`.

        prompt: a single token is part of a prompt too, which heads that look keys up read with all its past; several always are.

        Returns float32 logits: one row a session (its last token), or with logits_of="all" one row a token, sessions in
        order.  A call that fails leaves every session as it was, or broken with a message, never half advanced.
        """
        sessions = [session for session, _ in batch]
        if len(set(map(id, sessions))) != len(sessions):
            raise SessionError(Problem("step", "a session stands twice in one call.", "Fork it, or call once for each token."))
        for session in sessions:
            if session.model.program is not self.program or session.model.plan is not self.plan:
                raise SessionError(Problem("step", "a session of another model.", "Use sessions that this model made."))
            session.check_usable()
        for number, (session, ids) in enumerate(batch):
            try:
                session.check_room(len(ids))
            except CapacityError:
                for earlier in sessions[:number]:
                    earlier.release_room()
                raise
            session.warn_beyond_context(len(ids))
        before = [(len(session), session.convolutions) for session in sessions]
        try:
            if self.spec.target.deterministic:
                return torch.cat([self._forward([one], logits_of, prompt) for one in batch])
            return self._forward(batch, logits_of, prompt)
        except BaseException as error:
            for session, (length, convolutions) in zip(sessions, before, strict=True):
                session.restore_after_failure(length, convolutions, error)
            raise

    def _forward(self, batch: Sequence[tuple[Session, Tensor]], logits_of: str, prompt: bool) -> Tensor:
        sessions = [session for session, _ in batch]
        before = [len(session) for session in sessions]
        lengths = [len(ids) for _, ids in batch]
        if max(lengths) == 1:  # every token is a session's last one
            positions, wanted = torch.tensor(before), None
        else:
            positions = torch.cat([torch.arange(start, start + n) for start, n in zip(before, lengths, strict=True)])
            wanted = torch.tensor(lengths).cumsum(0) - 1 if logits_of == "last" else None
        call = PackedCall.begin(self, sessions, before, lengths, only_last=wanted is not None, prompt=prompt)
        input_ids = (batch[0][1] if len(batch) == 1 else torch.cat([ids for _, ids in batch]))[None]
        logits = self.program.run(input_ids, positions[None], call, wanted)[0].float()
        for session in sessions:
            session.settle()
        for (session, ids), convolutions in zip(batch, call.convolutions, strict=True):
            session.convolutions = tuple(convolutions)
            session.tokens.extend(ids.tolist())
        return logits

    def step(self, sessions: Sequence[Session], tokens: Tokens) -> Tensor:
        """One token for each session, in one pass; lengths may differ.  Returns float32 `[sessions, vocabulary]`."""
        mend = "Give a list of sessions, and one token for each of them."
        if isinstance(sessions, Session) or not all(isinstance(session, Session) for session in sessions):
            other = sessions if isinstance(sessions, Session) else next(each for each in sessions if not isinstance(each, Session))
            raise SessionError(Problem("step", f"a {type(other).__name__} stands where a list of sessions is wanted.", mend))
        if not sessions:
            raise SessionError(Problem("step", "there is no session.", mend))
        if isinstance(tokens, list | tuple) and any(isinstance(token, list | tuple) for token in tokens):
            raise SessionError(Problem("step", "a list of tokens stands where one token of a session is wanted.", mend))
        ids = as_token_ids(tokens, self.vocabulary)
        if len(ids) != len(sessions):
            raise SessionError(Problem("step", f"{len(ids)} tokens for {len(sessions)} sessions.", "Give one token for each session."))
        return self.forward([(session, ids[place : place + 1]) for place, session in enumerate(sessions)])

    @overload
    def complete(self, prompt: Prompt, **options: Any) -> Generation: ...

    @overload
    def complete(self, prompt: Prompts, **options: Any) -> list[Generation]: ...

    def complete(self, prompt: Prompt | Prompts, **options: Any) -> Generation | list[Generation]:
        """Continue a prompt or a list of them, as `generate` does; returns the text with what it cost."""
        return complete(self, prompt, **options)

    @overload
    def generate(self, prompt: Prompt, **options: Any) -> str: ...

    @overload
    def generate(self, prompt: Prompts, **options: Any) -> list[str]: ...

    def generate(self, prompt: Prompt | Prompts, **options: Any) -> str | list[str]:
        """The text that continues `prompt` (a string, or token ids), or the texts that continue a list of prompts.

        max_new_tokens=64; temperature=0.0 is greedy; seed (default: the spec's); stop: strings that end the text;
        chat=True wraps the prompt in the model's chat template; on_text is called with each piece of text as it comes,
        on_chunk(read, total) after each chunk of the prompt; session continues an existing session, which has then read
        the whole answer; prefix names what a new one starts behind, as `session` has it.  The model's stop tokens end the text
        and are not part of it.

        Prompts of a list may differ in length; their answers get a token each in every pass.  Each prompt draws from a generator of
        its own with the same seed, so that its answer is the one that it gets alone: to the bit under target.deterministic, else as far
        as logits that agree to rounding (1e-5 in float32) choose the same token.  session is then a list with one for each; seed may be
        one too, as several answers to one prompt want it; on_text and on_chunk get the prompt's number first.
        Raises SessionError without a tokenizer; `complete` gives tokens.
        """
        return generate(self, prompt, **options)

    def as_transformers(self) -> Any:
        """This model as transformers sees one (kvcompile/transformers_model.py): generate() with beams, sampling, assisted decoding in
        both roles and streamers; pipelines; lm-eval's HFLM.  Holds no weights of its own and no sequence's state.

        Raises SessionError for a model that `kvcompile.compile` did not make.
        """
        if self.transformers_face is None:
            what = "nothing is known of the model that this one was compiled from."
            raise SessionError(Problem("as_transformers", what, "Make it with kvcompile.compile."))
        return self.transformers_face(self)

    def explain(self) -> str:
        """The plan, what was proved, and where the time went, as text."""
        if self.explanation is None:
            return f"{self.name}: {len(self.plan.sites)} attention sites, {self.plan.weight_bytes} bytes of weights"
        return self.explanation(self)


@dataclass(frozen=True)
class PackedCall:
    """Which rows of a packed call belong to which session, and what all of them do at one site.

    convolutions: of each session, the states as far as the call has come; the session gets them when it is done.
    """

    model: CompiledModel
    sessions: list[Session]
    before: list[int]
    lengths: list[int]
    only_last: bool
    tables: list[NativeTable]
    convolutions: list[list[ConvolutionState]]
    prompt: bool = False

    @classmethod
    def begin(
        cls, model: CompiledModel, sessions: list[Session], before: list[int], lengths: list[int], only_last: bool, prompt: bool = False
    ) -> PackedCall:
        """Counts the new tokens in every store that a C++ kernel writes.  Raises CapacityError; then some have counted them."""
        if len(sessions) > 1 and max(lengths) == 1:
            _ = model.relay  # decided before any store has changed
        for session, length in zip(sessions, lengths, strict=True):
            session.native.count_growing(length)  # all of them before any ring: what is refused must break none
        start = 0
        for row, (session, length) in enumerate(zip(sessions, lengths, strict=True)):
            session.native.count_rings(length, start, before[row])
            if only_last and model.program.ends_with_attention:
                session.native.ask_last_only(row, length)
            start += length
        tables, convolutions = [session.native for session in sessions], [list(session.convolutions) for session in sessions]
        return cls(model, sessions, before, lengths, only_last, tables, convolutions, prompt)

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
        """out [1, rows, query_heads, value_dim]; rows are all tokens, at the final site only those whose logits are wanted."""
        last_only = final and self.only_last
        out = query.new_empty(1, len(self.sessions) if last_only else query.shape[2], query.shape[1], value.shape[3])
        native = self.model.native_sites[site]
        learnt = None if sinks is None else sinks.float()
        tables = [table.sites[site] for table in self.tables] if native.some else []
        if native.reads_prompts and (self.prompt or max(self.lengths) > 1) and len(prompts := self._prompts(site, query, last_only)):
            tables.append(prompts)
        if tables:
            relay = self.model.relay if len(self.sessions) > 1 and max(self.lengths) == 1 else None
            shared = attend_native(
                *(query, key, value, learnt, tables, native.kv_heads, out),
                sink_query=sink_query,
                slopes=native.slopes,
                relay=relay.rule if relay else NO_RELAY,
            )
            if relay:
                relay.count(sum(map(len, tables)), shared)
        if native.looks_up and len(lookups := self._lookups(site, query, last_only)):
            lookup_native(query, key, value, learnt, [lookups], native.kv_heads, out)
        if native.stages:
            self._attend_staged(site, query, key, value, learnt, last_only, out)
        if native.rest:
            self._attend_in_torch(site, query, key, value, sinks, sink_query, choosing, last_only, out)
        return out

    def _prompts(self, site: int, query: Tensor, last_only: bool) -> Tensor:
        """Rows of the attending operator's table: of each session that reads a prompt, the groups that find keys and whose prompts a kernel
        reads."""
        plan, kernels = self.model.plan.sites[site], self.model.kernels
        by_kv_head = (plan.site.kv_heads, plan.site.queries_per_kv)
        table: list[list[int]] = []
        start = 0
        for row, (session, before, length) in enumerate(zip(self.sessions, self.before, self.lengths, strict=True)):
            query_KGSD = query[0, :, start : start + length].unflatten(0, by_kv_head)
            skip, out_row = (length - 1, row) if last_only else (0, start)
            head = 0
            for group, store in zip(plan.groups, session.stores(site), strict=True):
                rows = self._prompt_rows(group, store, length)
                if rows is not None:
                    assert isinstance(store, LookupStore | StaticStore)
                    rows.advance(length)
                    store.observe(query_KGSD[_as_index(group.kv_heads)], before)
                    name, heads = kernels.number(group.request), len(group.kv_heads)
                    table.append([name, rows.descriptor(), head, heads, start, length, skip, out_row, before])
                head += len(group.kv_heads)
            start += length
        return torch.tensor(table, dtype=torch.int64)

    def _prompt_rows(self, group: HeadGroup, store: KVStore, length: int) -> RowStore | None:
        """Where the past of a prompt lies that a kernel reads for a group whose keys are found; None where there is no such prompt."""
        if not (self.prompt or length > 1) or not self.model.kernels.read_prompts(group):
            return None
        assert isinstance(store, LookupStore | StaticStore)
        return store.rows  # None where a static zone has chosen: it has let the rest go

    def _lookups(self, site: int, query: Tensor, last_only: bool) -> Tensor:
        """The table of the operator that looks keys up: of each session with one new token that is no prompt, the groups with a kernel."""
        plan, kernels = self.model.plan.sites[site], self.model.kernels
        by_kv_head = (plan.site.kv_heads, plan.site.queries_per_kv)
        rows: list[list[int]] = []
        start = 0
        for row, (session, before, length) in enumerate(zip(self.sessions, self.before, self.lengths, strict=True)):
            head = 0
            for group, store in zip(plan.groups, session.stores(site), strict=True):
                if self._looks_up(group, length):
                    assert isinstance(store, LookupStore)
                    store.advance(1)
                    index = store.refresh()
                    if store.sample.wants(before, 1):
                        query_KG1D = query[0, :, start : start + 1].unflatten(0, by_kv_head)
                        store.observe(query_KG1D[_as_index(group.kv_heads)], before)
                    name = kernels.number(group.lookup)
                    rows.append(lookup_row(name, store, index, head, len(group.kv_heads), start, row if last_only else start, before))
                head += len(group.kv_heads)
            start += length
        return torch.tensor(rows, dtype=torch.int64)

    def _attend_staged(
        self, site: int, query: Tensor, key: Tensor, value: Tensor, learnt: Tensor | None, last_only: bool, out: Tensor
    ) -> None:
        """The groups on disk that a kernel attends for: part by part, session by session."""
        plan, native, kernels = self.model.plan.sites[site], self.model.native_sites[site], self.model.kernels
        start = 0
        for number, (session, before, length) in enumerate(zip(self.sessions, self.before, self.lengths, strict=True)):
            skip, out_row = (length - 1, number) if last_only else (0, start)
            head = 0
            for group, store in zip(plan.groups, session.stores(site), strict=True):
                count = len(group.kv_heads)
                if kernels.stage(group):
                    assert isinstance(store, DiskStore)
                    heads, new = _as_index(group.kv_heads), slice(start, start + length)
                    store.append(key[0, heads, new], value[0, heads, new])
                    row = [kernels.number(group.request), 0, head, count, start, length, skip, out_row, before]
                    with self._of_session(number):
                        attend_parts(query, key, value, learnt, row, store.parts(), store.tokens, native.kv_heads, out, native.slopes)
                head += count
            start += length

    @contextlib.contextmanager
    def _of_session(self, number: int) -> Iterator[None]:
        """Says of tokens that are lost whose they are."""
        try:
            yield
        except LostTokens as lost:
            if len(self.sessions) > 1:
                raise LostTokens(lost.store, replace(lost.problems[0], where=f"sessions[{number}]")) from lost
            raise

    def _looks_up(self, group: HeadGroup, length: int) -> bool:
        return length == 1 and not self.prompt and self.model.kernels.look_up(group)

    def convolve(self, site: int, input: Tensor, weight: Tensor, bias: Tensor | None, final: bool) -> Tensor:
        """out [1, channels, rows]; rows as of `attend`."""
        states = [convolutions[site] for convolutions in self.convolutions]
        out, after = convolve_packed(states, self.lengths, input, weight, bias, final and self.only_last)
        for convolutions, state in zip(self.convolutions, after, strict=True):
            convolutions[site] = state
        return out

    def _attend_in_torch(
        self,
        site: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        sink_query: Tensor | None,
        choosing: Tensor | None,
        last_only: bool,
        out: Tensor,
    ) -> None:
        """The groups that have no C++ kernel for what their session does."""
        plan = self.model.plan.sites[site]
        facts = plan.site
        by_kv_head = (facts.kv_heads, facts.queries_per_kv)
        slopes_KG = torch.tensor(facts.slopes, dtype=torch.float64).unflatten(0, by_kv_head) if facts.slopes else None
        start = row = 0
        for number, (session, before, length) in enumerate(zip(self.sessions, self.before, self.lengths, strict=True)):
            skip = length - 1 if last_only else 0
            query_KGSD = query[0, :, start : start + length].unflatten(0, by_kv_head)
            sink_query_KGSD = None if sink_query is None else sink_query[0, :, start : start + length].unflatten(0, by_kv_head)
            out_SKGE = out[0, row : row + length - skip].unflatten(1, by_kv_head)
            for group, store in zip(plan.groups, session.stores(site), strict=True):
                if self.model.kernels.reads(group) or self._looks_up(group, length):
                    continue
                if self._prompt_rows(group, store, length) is not None:
                    continue
                heads = _as_index(group.kv_heads)
                new = _NewTokens(
                    query_KGSD[heads],
                    key[0, heads, start : start + length],
                    value[0, heads, start : start + length],
                    None if sink_query_KGSD is None else sink_query_KGSD[heads],
                    None if slopes_KG is None else slopes_KG[heads],
                    None if choosing is None else choosing[0, :, start : start + length],
                    before,
                    skip,
                    self.prompt or length > 1,
                )
                with self._of_session(number):
                    state = new.attend(facts, group, store)
                if sinks is not None:
                    state = apply_learnt_sinks(state, sinks.unflatten(0, by_kv_head)[heads])
                out_SKGE[:, heads] = state.out.permute(2, 0, 1, 3).to(out.dtype)
            start += length
            row += length - skip


class _NewTokens(NamedTuple):
    """One session's new tokens at one site, for the KV heads of one group.

    sink_query_HGSD, slopes_HG: of `attend_spans`.  choosing_CSJ: of `attend_chosen`.
    before: tokens read earlier.  skip: so many of the new ones ask for no result.
    prompt: they are part of a prompt.
    """

    query_HGSD: Tensor
    key_HSD: Tensor
    value_HSE: Tensor
    sink_query_HGSD: Tensor | None
    slopes_HG: Tensor | None
    choosing_CSJ: Tensor | None
    before: int
    skip: int
    prompt: bool

    def attend(self, facts: AttentionSite, group: HeadGroup, store: KVStore) -> AttentionState:
        """Appends them and attends: out [H, G, S - skip, E], lse [H, G, S - skip]."""
        asked_HGSD, first = self.query_HGSD[:, :, self.skip :], self.before + self.skip
        if isinstance(store, StaticStore):
            if not self.prompt:
                store.choose()
            store.observe(self.query_HGSD, self.before)
            return store.attend(asked_HGSD, store.extend(self.key_HSD, self.value_HSE), first)
        if isinstance(store, LookupStore):
            store.append(self.key_HSD, self.value_HSE)
            index = None if self.prompt else store.refresh()
            store.observe(self.query_HGSD, self.before)  # behind it: an index is learnt from what came before
            return attend_prompt(store, asked_HGSD, first) if index is None else attend_lookup(store, asked_HGSD, index)
        if facts.chosen_tokens is not None:
            assert self.choosing_CSJ is not None, f"{facts.path}: nothing chooses its keys"
            window = group.policy.window
            return attend_chosen(
                asked_HGSD,
                store.extend(self.key_HSD, self.value_HSE),
                first,
                choosing_CSJ=self.choosing_CSJ[:, self.skip :],
                chosen_tokens=facts.chosen_tokens,
                sink_tokens=0 if window is None else window.sink_tokens,
                recent_tokens=None if window is None else window.recent_tokens,
                scale=facts.scale,
                soft_cap=facts.soft_cap,
                chunk_tokens=facts.chunk_tokens,
            )
        request = group.request
        assert request is not None, f"{facts.path}: nothing says what its keys are attended to as"
        sink_query_HGSD = None
        if request.cache_index:
            assert self.sink_query_HGSD is not None, f"{facts.path}: nothing made the query that the sinks are shown"
            sink_query_HGSD = self.sink_query_HGSD[:, :, self.skip :]
        options: dict[str, Any] = {
            "sink_tokens": request.sink_tokens,
            "recent_tokens": request.recent_tokens,
            "scale": facts.scale,
            "soft_cap": facts.soft_cap,
            "chunk_tokens": request.chunk_tokens,
            "slopes_HG": self.slopes_HG,
            "sink_query_HGSD": sink_query_HGSD,
        }
        if isinstance(store, KiviStore | DiskStore) or (isinstance(store, GrowableStore) and store.copies_spans):
            store.append(self.key_HSD, self.value_HSE)
            return attend_held(asked_HGSD, store, store.visible(first), first, **options)
        return attend_spans(asked_HGSD, store.extend(self.key_HSD, self.value_HSE), first, **options)


def _as_index(kv_heads: tuple[int, ...]) -> slice | list[int]:
    """A slice where the heads are consecutive, so that nothing is copied."""
    first, last = kv_heads[0], kv_heads[-1]
    return slice(first, last + 1) if kv_heads == tuple(range(first, last + 1)) else list(kv_heads)


_Shape: TypeAlias = tuple[int, int, int, torch.dtype]  # KV heads, head_dim, value_dim, and what numbers are kept in


def make_store(site: SitePlan, group: HeadGroup, native: bool, folder: str | None = None) -> KVStore:
    """The empty store of a group of KV heads, as the plan placed it; native: as the C++ kernels read it; folder: of files."""
    facts, policy = site.site, group.policy
    dtype: torch.dtype = getattr(torch, policy.store.dtype or facts.dtype)
    shape = (len(group.kv_heads), facts.head_dim, facts.value_dim, dtype)
    layout: KeyLayout = "int8" if isinstance(policy.store.quantised, Int8) else "blocks" if native else "rows"
    if policy.found is None and policy.window is not None:
        return _ring(shape, policy, policy.window, layout)
    if group.device == "disk":
        return DiskStore(*shape, folder, layout, facts.path)
    assert group.capacity_tokens is not None
    rows, window = _rows(shape, policy, group.capacity_tokens, layout), policy.window
    if policy.found is None:
        return rows
    assert window is not None
    match policy.found:
        case Static():
            return StaticStore(rows, _ring(shape, policy, window, layout), policy.found, facts.scale, facts.soft_cap)
        case TopK() | Sample():
            return LookupStore(
                rows, window, policy.found, facts.queries_per_kv, facts.scale, facts.soft_cap, policy.waiting_tokens, facts.index
            )


def _rows(shape: _Shape, policy: HeadPolicy, capacity_tokens: int, layout: KeyLayout) -> GrowableStore | KiviStore:
    if isinstance(policy.store.quantised, Kivi):
        return KiviStore(*shape, policy.store.quantised, capacity_tokens, layout)
    return GrowableStore(*shape, capacity_tokens, layout)


def _ring(shape: _Shape, policy: HeadPolicy, window: SinkRecent, layout: KeyLayout) -> RingStore | KiviStore:
    kivi = quantised_in(policy.store, window, policy.rollback_tokens)
    if isinstance(kivi, Kivi):
        return KiviStore(
            *shape,
            kivi,
            layout=layout,
            sink_tokens=window.sink_tokens,
            recent_tokens=window.recent_tokens,
            rollback_tokens=policy.rollback_tokens,
        )
    return RingStore(*shape, window.sink_tokens, window.recent_tokens, policy.rollback_tokens, layout)
