"""What a session keeps of a causal short convolution: its last inputs.

Letters: C channels, S new tokens, K inputs kept, T columns that a filter slides over.

The first token sees taps - 1 zeros before it.  They are kept as inputs of the positions -(taps - 1) to -1, so that neither
the start of a session nor a rollback to it is a case of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompile.ir.convolve_op import causal_filter
from kvcompile.ir.errors import Problem, SessionError
from kvcompile.ir.plan import ConvolutionPlan
from kvcompile.runtime.store import StoreState, rollback_range_problem


@dataclass(frozen=True)
class ConvolutionState:
    """The last inputs of one convolution in one session.  Never changed in place: forks share it, an older one can be put back.

    inputs_CK: of the positions [tokens - K, tokens); the zeros before the first token among them.
    tokens:    how many tokens the session has read.
    """

    plan: ConvolutionPlan
    inputs_CK: Tensor
    tokens: int

    @classmethod
    def empty(cls, plan: ConvolutionPlan) -> ConvolutionState:
        dtype: torch.dtype = getattr(torch, plan.site.dtype)
        return cls(plan, torch.zeros(plan.site.channels, plan.site.taps - 1, dtype=dtype), 0)

    @property
    def before_C(self) -> Tensor:
        """What the next token sees beside its own input: [C, taps - 1]."""
        return self.inputs_CK[:, self.inputs_CK.shape[1] - (self.plan.site.taps - 1) :]

    def extended(self, input_CS: Tensor) -> ConvolutionState:
        """The state after S more tokens.  input_CS: [C, S], any strides."""
        kept = self.plan.kept_tokens
        assert input_CS.shape[0] == self.plan.site.channels, (input_CS.shape, self.plan.site)
        inputs_CK = torch.cat([self.inputs_CK, input_CS[:, max(0, input_CS.shape[1] - kept) :]], dim=1)
        surplus = max(0, inputs_CK.shape[1] - kept)
        return ConvolutionState(self.plan, inputs_CK[:, surplus:].clone(), self.tokens + input_CS.shape[1])

    def can_rollback(self, tokens: int) -> Problem | None:
        """Possible when the inputs that the next token would see are kept; to the start, and of a single tap, always."""
        problem = rollback_range_problem(tokens, self.tokens)
        taps = self.plan.site.taps
        if problem is not None or taps == 1 or tokens == self.tokens or self.inputs_CK.shape[1] - tokens >= taps - 1:
            return problem
        most = self.inputs_CK.shape[1] - (taps - 1)
        return Problem(
            f"rollback({tokens})",
            f"a convolution of {taps} taps that has read {self.tokens} tokens can take back {most} of them, not {tokens}: "
            "the inputs that they would see are no longer kept.",
            f"Write `rollback: {self.plan.rollback_tokens + tokens - most}` in a policy of the model, which keeps as many inputs more, "
            "or fork the session before the tokens that may be taken back.",
        )

    def rolled_back(self, tokens: int) -> ConvolutionState:
        """The state without the last `tokens` tokens; raises SessionError where `can_rollback` objects."""
        problem = self.can_rollback(tokens)
        if problem is not None:
            raise SessionError(problem)
        if tokens == self.tokens:
            return ConvolutionState.empty(self.plan)
        left = max(0, self.inputs_CK.shape[1] - tokens)
        return ConvolutionState(self.plan, self.inputs_CK[:, :left].clone(), self.tokens - tokens)

    def state(self) -> StoreState:
        """As SavedStore."""
        return StoreState("convolution", {"tokens": self.tokens}, {"inputs": self.inputs_CK})

    def restored(self, state: StoreState) -> ConvolutionState:
        """What gave the state: a copy.  Raises as SavedStore."""
        tokens, site = state.of_kind("convolution").whole("tokens"), self.plan.site
        inputs_CK = state.tensor("inputs", self.inputs_CK.dtype, site.channels, None)
        if not site.taps - 1 <= inputs_CK.shape[1] <= max(self.plan.kept_tokens, site.taps - 1):
            raise ValueError(f"{inputs_CK.shape[1]} inputs of {site.taps} taps")
        return ConvolutionState(self.plan, inputs_CK.clone(), tokens)

    def nbytes(self) -> int:
        """Bytes of the inputs kept, the zeros before the first token aside; a fork that reads on has its own."""
        return min(self.tokens, self.inputs_CK.shape[1]) * self.plan.site.channels * self.inputs_CK.element_size()


def convolve_packed(
    states: Sequence[ConvolutionState], lengths: Sequence[int], input: Tensor, weight: Tensor, bias: Tensor | None, last_only: bool
) -> tuple[Tensor, list[ConvolutionState]]:
    """out [1, channels, rows] of the packed input [1, channels, tokens], and every session's state after it.

    states, lengths: of each session, whose tokens follow one another.  last_only: one row a session, its last token's.
    """
    columns: list[Tensor] = []
    after: list[ConvolutionState] = []
    wanted: list[Tensor] = []
    place = 0  # of the session's first result among those of one filter over all columns
    for state, input_CS in zip(states, input[0].split(list(lengths), dim=1), strict=True):
        columns += [state.before_C, input_CS]
        after.append(state.extended(input_CS))
        end = place + input_CS.shape[1]
        wanted.append(torch.arange(end - 1 if last_only else place, end))
        place = end + state.plan.site.taps - 1  # results between two sessions mix both and are left out
    out_CT = causal_filter(torch.cat(columns, dim=1), weight, bias)
    if last_only or len(states) > 1:
        out_CT = out_CT.index_select(1, torch.cat(wanted))
    return out_CT[None].to(input.dtype), after
