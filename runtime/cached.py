"""Sequences whose keys and values lie in our stores while somebody else runs the model: the operator of `kvcompile.Cache`.

    kvc::attend_cached(query, key, value, padding, learnt_sinks, state, layer) -> out

query [B, query_heads, S, D], key [B, kv_heads, S, D], value [B, kv_heads, S, E]: new tokens only; out [B, S, query_heads, E]
padding        None, or bool [B, tokens so far and new ones]: False where a row has padding, which is neither kept nor answered (0)
learnt_sinks   None, or [query_heads]
state          int64 [2]: number of the `CachedSequences`, and how many tokens, padding included, it has read; the last layer writes it.
               It may be a copy whose changes are copied back after the graph (AOTAutograd), so that the sequences count for themselves
               and the first layer of the next call checks that both agree

An operator of one site does what a session does: it appends the new tokens and attends over the stores.  All layers are called in
their order; what stopped in between is taken back when the next call begins.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from kvcompile.ir.errors import Problem, SessionError
from kvcompile.runtime.model import CompiledModel, PackedCall
from kvcompile.runtime.rows import SessionRows
from kvcompile.runtime.session import Session

_UNKNOWN_TOKEN = -1  # the ids are the caller's

_numbers = itertools.count()
_living: weakref.WeakValueDictionary[int, CachedSequences] = weakref.WeakValueDictionary()


class CachedSequences(SessionRows):
    """A batch of sequences: a session a row, made by the first call.

    model: plan and kernels; its program is never run.  state: what the operator takes.
    """

    def __init__(self, model: CompiledModel) -> None:
        super().__init__(model)
        number = next(_numbers)
        self.state = torch.tensor([number, 0])
        self._call: _Call | None = None
        _living[number] = self

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, sinks: Tensor | None, state: Tensor, layer: int
    ) -> Tensor:
        """The operator.  Raises SessionError for layers out of order, another number of rows and a count in `state` that is not ours,
        CapacityError where memory is refused.
        """
        if layer == 0:
            self._check_count(int(state[1]))
            self._begin(key.shape[0], key.shape[2], padding)
        call = self._call
        if call is None or call.layer != layer:
            expected = "0" if call is None else f"{call.layer} or 0"
            what = f"layer {layer} is called where layer {expected} should be."
            raise SessionError(Problem("kvcompile.Cache", what, "Run the whole model, layer by layer."))
        last = layer == len(self.model.plan.sites) - 1
        out = call.attend(layer, query, key, value, sinks, last)
        if last:
            self._finish(call, state)
        else:
            call.layer += 1
        return out

    def expects(self, layer: int) -> bool:
        """Whether the layers before `layer` have attended in this call."""
        return self._call is not None and self._call.layer == layer

    def _check_count(self, counted: int) -> None:
        """The model has computed positions from what `state` counts."""
        if counted != self._tokens:
            raise SessionError(
                Problem(
                    "kvcompile.Cache",
                    f"the compiled model counts {counted} tokens, the cache holds {self._tokens}: what a call wrote to the count was lost.",
                    "Call reset() or crop(), which set the count anew; if it happens again, use another backend of torch.compile.",
                )
            )

    def _begin(self, rows: int, new: int, padding: Tensor | None) -> None:
        self._take_back()
        if not self._sessions:
            self._sessions = [self.model.session(prefix=None) for _ in range(rows)]
        if rows != self.rows:
            raise SessionError(
                Problem("kvcompile.Cache", f"{rows} rows for a cache of {self.rows}.", "Give it the batch that it began with, or reset it.")
            )
        for session in self._sessions:
            session.check_usable()
        real_BS = None if padding is None else padding[:, self.tokens : self.tokens + new]
        if real_BS is not None and (real_BS.shape != (rows, new) or bool(real_BS.all())):
            assert real_BS.shape == (rows, new), (real_BS.shape, rows, new)
            real_BS = None
        lengths = [new] * rows if real_BS is None else real_BS.sum(1).tolist()
        self._call = _Call(self.model, self._sessions, lengths, new, real_BS)
        self._call.begin()

    def _finish(self, call: _Call, state: Tensor) -> None:
        for session, length in zip(self._sessions, call.lengths, strict=True):
            session.settle()
            session.tokens.extend([_UNKNOWN_TOKEN] * length)
        self.note(call.real_BS, call.new)
        state[1] = self._tokens
        self._call = None

    def _take_back(self) -> None:
        """What a call that did not reach the last layer has appended."""
        if self._call is not None:
            self._call = None
            for session in self._sessions:
                session.restore_after_failure(len(session), session.convolutions, RuntimeError("the model stopped between two layers"))

    def crop(self, tokens: int) -> None:
        self._take_back()
        super().crop(tokens)
        self.state[1] = self.tokens

    def select(self, rows: Sequence[int]) -> None:
        self._take_back()
        super().select(rows)

    def reset(self) -> None:
        self._call = None
        super().reset()
        self.state[1] = 0


class _Call:
    """One pass through the layers.  real_BS: which new tokens are none of padding, None for all; layer: the next one."""

    def __init__(self, model: CompiledModel, sessions: list[Session], lengths: list[int], new: int, real_BS: Tensor | None) -> None:
        self.model, self.sessions, self.lengths, self.new, self.real_BS = model, sessions, lengths, new, real_BS
        self.layer = 0
        self._places = None if real_BS is None else real_BS.flatten().nonzero().flatten()

    def begin(self) -> None:
        """Counts the new tokens; rows that have only padding take no part."""
        kept = [(session, length) for session, length in zip(self.sessions, self.lengths, strict=True) if length]
        sessions, lengths = [session for session, _ in kept], [length for _, length in kept]
        self._packed = PackedCall.begin(self.model, sessions, [len(session) for session in sessions], lengths, only_last=False)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, final: bool) -> Tensor:
        rows, _, new, _ = query.shape
        if rows == 1 and self._places is None:
            return self._packed.attend(layer, query, key, value, sinks, None, final)
        packed = self._packed.attend(layer, self._pack(query), self._pack(key), self._pack(value), sinks, None, final)[0]
        if self._places is None:
            return packed.reshape(rows, new, *packed.shape[1:])
        out = packed.new_zeros(rows * new, *packed.shape[1:])
        out[self._places] = packed
        return out.reshape(rows, new, *packed.shape[1:])

    def _pack(self, tensor: Tensor) -> Tensor:
        """[B, H, S, D] -> [1, H, tokens, D], row after row, without padding."""
        tokens = tensor.transpose(1, 2).flatten(0, 1)
        return (tokens if self._places is None else tokens[self._places]).transpose(0, 1).unsqueeze(0)


def _attend_cached(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, learnt_sinks: Tensor | None, state: Tensor, layer: int
) -> Tensor:
    return _living[int(state[0])].attend(query, key, value, padding, learnt_sinks, state, layer)


def _attend_cached_fake(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, learnt_sinks: Tensor | None, state: Tensor, layer: int
) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


_library = torch.library.Library("kvc", "FRAGMENT")
_library.define(
    "attend_cached(Tensor query, Tensor key, Tensor value, Tensor? padding, Tensor? learnt_sinks, Tensor(a!) state, int layer) -> Tensor"
)
_library.impl("attend_cached", _attend_cached, "CompositeExplicitAutograd")
torch.library.register_fake("kvc::attend_cached", _attend_cached_fake, lib=_library)

ATTEND_CACHED = torch.ops.kvc.attend_cached.default
