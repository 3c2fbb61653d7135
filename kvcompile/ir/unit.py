"""What passes hand to each other: the graph, the spec, and what is known of them so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch

from kvcompile.ir.plan import Plan, PlannedPrefix
from kvcompile.ir.policy import HeadPolicy
from kvcompile.ir.sites import AttentionSite, ConvolutionSite
from kvcompile.ir.spec import Spec


@dataclass(frozen=True)
class Unit:
    """One model on its way through the passes.  Passes change `graph` in place and return the unit with what they learnt.

    sites:     the attention sites in execution order; from `canonicalise_attention`.
    convolutions: the causal short convolutions in execution order, numbered apart; from `canonicalise_convolution`.
    policies:  [site][kv_head]; from `assign_policies`.
    plan:      from `build_zones`; `place` and `request_kernels` complete it.
    context_tokens: tokens that the model's configuration declares, or None.
    frequency_tokens: the context for which `fix_frequency_branch` chose rotary frequencies, or None: nothing was to choose.
    position_rows: rows of a table that positions index, a bound that no session may pass; from `make_positions_explicit`.
    prefixes: what sessions may start behind, as tokens; they need a tokenizer, so whoever begins brings them.
    front_end: where its attentions were found: "interface" (transformers' attention interface), "sdpa", "products" (matmul,
               softmax, matmul), or several; from `canonicalise_attention`.
    warnings:  sentences for the user.
    """

    graph: torch.fx.GraphModule
    spec: Spec
    sites: tuple[AttentionSite, ...] = ()
    convolutions: tuple[ConvolutionSite, ...] = ()
    policies: tuple[tuple[HeadPolicy, ...], ...] = ()
    plan: Plan | None = None
    context_tokens: int | None = None
    frequency_tokens: int | None = None
    position_rows: int | None = None
    front_end: str = ""
    warnings: tuple[str, ...] = ()
    passed: tuple[str, ...] = field(default=())
    prefixes: tuple[PlannedPrefix, ...] = ()


class Pass(Protocol):
    """One step from a traced graph to a program.

    name:     the file it lives in.
    requires: names of the passes that must have run before.
    run:      does the work; raises KvcompileError for what the user can mend.
    ensures:  looks at the *result* and asserts what later passes rely on.
    """

    @property
    def name(self) -> str: ...

    @property
    def requires(self) -> tuple[str, ...]: ...

    def run(self, unit: Unit) -> Unit: ...

    def ensures(self, unit: Unit) -> None: ...
