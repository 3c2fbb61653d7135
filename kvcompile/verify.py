"""Verification: what every compile proves on this machine before it reports anything else.

1. `full` everywhere equals the original model, prefill in two chunks and then one token at a time.
2. The spec against `full`: what the approximation costs, on tokens that stand beyond every window.
Beyond the tolerance there is no model, and the first site that differs is named (diagnose.py).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor, nn

from kvcompile.diagnose import first_difference, original_logits
from kvcompile.ir.errors import Problem, VerificationError
from kvcompile.ir.plan import HeadGroup, Plan, SitePlan
from kvcompile.ir.policy import All, HeadPolicy, SinkRecent
from kvcompile.runtime.model import CompiledModel
from kvcompile.text_ids import text_ids

STEP_TOKENS = 16
LONGEST_WINDOW = 4096  # a longer sliding window is not filled: its text would take minutes to read on a CPU
# bfloat16 and float16 compare two roundings of one model: SmolLM2's eager bfloat16 is 0.0013 nats from its float32
KL_TOLERANCE = {"float64": 1e-9, "float32": 1e-6, "bfloat16": 2e-2, "float16": 2e-2}
LOGIT_TOLERANCE = {"float64": 1e-8, "float32": 1e-3}


@dataclass(frozen=True)
class Comparison:
    """Two models' logits on the same tokens.

    max_logit_difference: largest absolute difference of a logit.
    mean_kl:              mean over tokens of KL(first || second), nats.
    greedy_agreement:     share of tokens with the same largest logit, 0 to 1.
    """

    tokens: int
    max_logit_difference: float
    mean_kl: float
    greedy_agreement: float

    @classmethod
    def of(cls, first_TV: Tensor, second_TV: Tensor) -> Comparison:
        """first_TV, second_TV: logits [tokens, vocabulary]."""
        first, second = first_TV.double(), second_TV.double()
        log_p, log_q = first.log_softmax(-1), second.log_softmax(-1)
        return cls(
            tokens=first.shape[0],
            max_logit_difference=float((first - second).abs().max()),
            mean_kl=float((log_p.exp() * (log_p - log_q)).sum(-1).mean().clamp_min(0.0)),
            greedy_agreement=float((first.argmax(-1) == second.argmax(-1)).double().mean()),
        )

    def text(self) -> str:
        return (
            f"max |logit difference| {self.max_logit_difference:.2e}, mean KL {self.mean_kl:.2e} nats, "
            f"greedy agreement {self.greedy_agreement:.1%} of {self.tokens} tokens"
        )


@dataclass(frozen=True)
class Verification:
    """full: policy `full` against the original.  spec: the spec's policies against `full`, scored beyond every window."""

    full: Comparison
    spec: Comparison
    dtype: str
    from_record: bool = False

    def text(self) -> str:
        kept = " (proved before, nothing changed since)" if self.from_record else ""
        return f"full against the original{kept}: {self.full.text()}\nthis spec against full:      {self.spec.text()}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Verification:
        return cls(Comparison(**record["full"]), Comparison(**record["spec"]), record["dtype"], from_record=True)


def full_plan(plan: Plan) -> Plan:
    """The plan with every KV head remembering every token (a sliding layer: its window), in the model's dtype."""

    def full(site: SitePlan) -> SitePlan:
        facts, first = site.site, site.groups[0]
        zone = SinkRecent(0, facts.sliding_window) if facts.sliding_window else All()
        assert first.request is not None
        request = replace(first.request, store_dtype=facts.dtype, sink_tokens=0, recent_tokens=facts.sliding_window)
        capacity = plan.position_rows or plan.context_tokens or 32768
        group = HeadGroup(tuple(range(facts.kv_heads)), HeadPolicy("full", (zone,)), capacity, first.device, request)
        return SitePlan(facts, (group,))

    return replace(plan, sites=tuple(full(site) for site in plan.sites))


def record_key(model_hash: str, compiled: CompiledModel) -> str:
    """What must be unchanged for a verification to be believed again: the model, the plan, the code that runs, torch."""
    code = hashlib.sha256()
    for package in ("kvcompile.ir", "kvcompile.passes", "kvcompile.runtime"):
        for source in sorted(files(package).iterdir(), key=lambda each: each.name):
            if source.name.endswith(".py"):
                code.update(source.read_bytes())
    parts = {
        "model": model_hash,
        "plan": [asdict(site) for site in compiled.plan.sites],
        "verify_tokens": compiled.spec.verify_tokens,
        "chunk_tokens": compiled.chunk_tokens,
        "code": code.hexdigest(),
        "torch": torch.__version__,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def verify(compiled: CompiledModel, model: nn.Module, graph: torch.fx.GraphModule) -> Verification:
    """Both comparisons; raises VerificationError beyond the tolerance.

    graph: the outlined graph, to find the first site that differs.
    """
    dtype = compiled.plan.sites[0].site.dtype
    room = compiled.plan.position_rows or 1 << 30
    tokens = min(compiled.spec.verify_tokens, room)
    windows = [site.site.sliding_window for site in compiled.plan.sites if site.site.sliding_window]
    reach = max((window for window in windows if window <= LONGEST_WINDOW), default=0)  # a window that nothing leaves proves nothing
    ids = text_ids(min(tokens + reach, room), compiled.vocabulary, compiled.tokenizer)
    full = compiled.with_plan(full_plan(compiled.plan))
    expected = original_logits(model, ids)
    found = _prefill_and_steps(full, ids)
    comparison = Comparison.of(expected, found)
    bad = not (comparison.mean_kl <= KL_TOLERANCE[dtype]) or not (
        comparison.max_logit_difference <= LOGIT_TOLERANCE.get(dtype, float("inf")) * max(1.0, float(expected.abs().max()) / 32)
    )
    if bad:
        raise VerificationError(
            Problem(
                "verification",
                f"policy full differs from the original model: {comparison.text()}. First difference: "
                f"{first_difference(model, graph, full, ids)}.",
                "Nothing was kept. kvcompile misreads this model; `--dump DIR` writes what is needed to report it.",
            )
        )
    return Verification(comparison, _approximation(compiled, full, tokens, room), dtype)


def _prefill_and_steps(compiled: CompiledModel, ids: Tensor) -> Tensor:
    """Logits of all tokens: two prefill chunks, then one token at a time."""
    session = compiled.session()
    steps = min(STEP_TOKENS, len(ids) // 2)
    body = len(ids) - steps
    parts = [session.prefill(ids[: body // 2], logits="all"), session.prefill(ids[body // 2 : body], logits="all")] if body > 1 else []
    parts += [session.step(int(token))[None] for token in ids[body if body > 1 else 0 :]]
    return torch.cat(parts)


def _approximation(compiled: CompiledModel, full: CompiledModel, tokens: int, room: int) -> Comparison:
    """The spec against full on the last `tokens` of a text of three times the widest window."""
    zones = [zone for site in compiled.plan.sites for group in site.groups for zone in group.policy.zones]
    windows = [zone.window_tokens for zone in zones if isinstance(zone, SinkRecent) and zone.window_tokens <= LONGEST_WINDOW]
    length = min(tokens + 2 * max(windows, default=0), room, compiled.plan.context_tokens or room)
    ids = text_ids(length, compiled.vocabulary, compiled.tokenizer)
    first, second = (each.session().prefill(ids, logits="all")[-tokens:] for each in (full, compiled))
    return Comparison.of(first, second)
