"""Verification: what every compile proves on this machine before it reports anything else.

1. `full` everywhere equals the original model, prefill in two chunks and then one token at a time.
2. The runtime's attention, or convolution, equals the traced graph's at every site, on the same inputs.
3. The spec against `full`: what the approximation costs, on tokens that stand beyond every window.
In float32 the tolerance is one of rounding.  In bfloat16 two correct programs differ by rounding too, so the yardstick
is the original itself: its distance between two attention implementations of transformers.
Beyond the tolerance there is no model, and the first site that differs is named (diagnose.py).
"""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor, nn

from kvcompile.diagnose import first_difference, original_logits, original_noise, site_differences, soft_caps_applied
from kvcompile.ir.errors import Problem, VerificationError
from kvcompile.ir.indexes import MIN_INDEXED_TOKENS
from kvcompile.ir.plan import Plan
from kvcompile.ir.policy import All, HeadPolicy, Kivi
from kvcompile.ir.show import graph_text
from kvcompile.ir.spec import HeadRule, Spec
from kvcompile.ir.unit import Unit
from kvcompile.passes.assign_policies import AssignPolicies
from kvcompile.passes.build_zones import BuildZones
from kvcompile.passes.place import Place
from kvcompile.passes.request_kernels import RequestKernels
from kvcompile.runtime.model import CompiledModel
from kvcompile.text_ids import text_ids

STEP_TOKENS = 16
SHORT_CHUNKS = [3, 5, *[1] * 8]  # of the last STEP_TOKENS: 2 to 4 tokens take other kernels than 1, and than 5
BESIDE_TOKENS = 4  # the last ones are read beside another session
LOOKUP_STEPS = 64
KIVI_CHUNK_TOKENS = 32
LONGEST_WINDOW = 4096  # a longer sliding window is not filled: its text would take minutes to read on a CPU
LOGIT_TOLERANCE = {"float64": 1e-6, "float32": 1e-3}  # of a largest logit of 32, in proportion beyond; logits are given as float32
KL_TOLERANCE = {"float64": 1e-9, "float32": 1e-6, "bfloat16": 2e-2, "float16": 2e-2}  # nats; half precision: the last resort
NOISE_FACTOR = 4.0  # half precision: times the distance between the original's own two implementations ...
NOISE_FLOOR = 1e-4  # ... and at least so many nats
SITE_TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 2e-2, "float16": 4e-3}  # of the site's largest value; 2 to 3 roundings


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
    """What was proved.

    full: policy `full` against the original.  largest_site_difference: of the runtime's site from the traced graph's,
    relative to a site's largest value.  spec: the spec's policies against `full`, scored beyond every window; None when a
    window is longer than any text read.
    """

    full: Comparison
    largest_site_difference: float
    spec: Comparison | None
    dtype: str
    from_record: bool = False

    def text(self) -> str:
        kept = " (proved before, nothing changed since)" if self.from_record else ""
        spec = self.spec.text() if self.spec else f"not measured, a window is longer than the text read ({LONGEST_WINDOW} tokens at most)"
        return f"full against the original{kept}: {self.full.text()}\nthis spec against full:      {spec}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Verification:
        spec = None if record["spec"] is None else Comparison(**record["spec"])
        return cls(Comparison(**record["full"]), record["largest_site_difference"], spec, record["dtype"], from_record=True)


def full_plan(plan: Plan) -> Plan:
    """The plan with every KV head remembering every token (a sliding layer: its window), in the model's dtype.

    Made by the passes that made the spec's own plan, so that what `full` proves is what they do.
    """
    graph = torch.fx.GraphModule(nn.Module(), torch.fx.Graph())
    unit = Unit(
        graph,
        Spec(None, {"full": HeadPolicy("full", (All(),))}, (HeadRule("full"),)),
        sites=tuple(site.site for site in plan.sites),
        convolutions=tuple(each.site for each in plan.convolutions),
        context_tokens=plan.context_tokens,
        position_rows=plan.position_rows,
    )
    for each in (AssignPolicies(), BuildZones(), Place(), RequestKernels()):
        unit = each.run(unit)
    assert unit.plan is not None
    return replace(plan, sites=unit.plan.sites, notes=unit.plan.notes, convolutions=unit.plan.convolutions)


def record_key(model_hash: str, compiled: CompiledModel, graph: torch.fx.GraphModule, built: tuple[str, ...] = ()) -> str:
    """What must be unchanged for a verification to be believed again: weights, traced graph, plan, our code, the machine.

    built: hashes of the binaries that run (`Linked.built`), compiler included.
    """
    code = hashlib.sha256()
    packages = ("", ".ir", ".passes", ".codegen", ".codegen.cpp", ".runtime", ".data")
    for package in packages:
        for source in sorted(files(f"kvcompile{package}").iterdir(), key=lambda each: each.name):
            if source.name.endswith((".py", ".txt", ".h", ".cpp", ".jinja")):
                code.update(source.read_bytes())
    parts = {
        "model": model_hash,
        "graph": graph_text(graph),
        "plan": [asdict(site) for site in compiled.plan.sites],
        "convolutions": [asdict(each) for each in compiled.plan.convolutions],
        "built": list(built),
        "target": asdict(replace(compiled.spec.target, where="", memory_bytes=None)),
        "verify_tokens": compiled.spec.verify_tokens,
        "chunk_tokens": compiled.chunk_tokens,
        "code": code.hexdigest(),
        "versions": [torch.__version__, version("transformers")],
        "machine": [platform.machine(), torch.backends.cpu.get_cpu_capability()],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def verify(compiled: CompiledModel, model: nn.Module, graph: torch.fx.GraphModule, frequency_tokens: int | None = None) -> Verification:
    """Both comparisons; raises VerificationError beyond the tolerance.

    graph: the outlined graph, to find the first site that differs.  frequency_tokens: as `original_logits` wants it.
    """
    dtype = compiled.plan.sites[0].site.dtype
    room = compiled.plan.position_rows or 1 << 30
    tokens = min(compiled.spec.verify_tokens, room)
    windows = [site.site.own_window for site in compiled.plan.sites if site.site.own_window]
    reach = max((window for window in windows if window <= LONGEST_WINDOW), default=0)  # a window that nothing leaves proves nothing
    ids = text_ids(min(tokens + reach, room), compiled.vocabulary, compiled.tokenizer)
    full = compiled.with_plan(full_plan(compiled.plan))
    attentions = [plan.site for plan in compiled.plan.sites]
    with soft_caps_applied(model, attentions):
        expected = original_logits(model, ids, frequency_tokens)
    comparison = Comparison.of(expected, _prefill_and_steps(full, ids))
    sites = site_differences(graph, full, ids)
    wrong_logits = comparison.max_logit_difference > LOGIT_TOLERANCE.get(dtype, float("inf")) * max(1.0, float(expected.abs().max()) / 32)
    wrong_sites = any(not difference <= SITE_TOLERANCE[dtype] for difference in sites.values())
    capped = any(site.soft_cap for site in attentions)
    limit = KL_TOLERANCE[dtype] if capped else _kl_limit(model, ids, dtype, frequency_tokens)  # "sdpa" has no caps: nothing to compare with
    if wrong_logits or wrong_sites or not comparison.mean_kl <= limit:
        raise VerificationError(
            Problem(
                "verification",
                f"policy full differs from the original model: {comparison.text()}. First difference: "
                f"{first_difference(model, graph, full, ids, frequency_tokens)}.",
                "Nothing was kept. kvcompile misreads this model; `--dump DIR` writes what is needed to report it.",
            )
        )
    return Verification(comparison, max(sites.values()), _approximation(compiled, full, tokens, room), dtype)


def _kl_limit(model: nn.Module, ids: Tensor, dtype: str, frequency_tokens: int | None) -> float:
    """Nats that `full` may stand from the original."""
    noise = original_noise(model, ids, frequency_tokens) if dtype in ("bfloat16", "float16") else None
    if noise is None:
        return KL_TOLERANCE[dtype]
    return min(KL_TOLERANCE[dtype], max(NOISE_FLOOR, NOISE_FACTOR * Comparison.of(*noise).mean_kl))


def _prefill_and_steps(compiled: CompiledModel, ids: Tensor) -> Tensor:
    """Logits of all tokens: two long chunks, short ones (other kernels run them), one token at a time, at last beside another session."""
    session, other = compiled.session(prefix=None), compiled.session(prefix=None)
    other.prefill(ids[:1])
    body = max(1, len(ids) - STEP_TOKENS)
    chunks = [*ids[:body].split(-(-body // 2)), *ids[body:].split(SHORT_CHUNKS if len(ids) - body == sum(SHORT_CHUNKS) else 1)]
    parts = []
    for place, chunk in enumerate(chunks):
        if len(chunk) > 1 or place < len(chunks) - BESIDE_TOKENS:
            parts.append(session.prefill(chunk, logits="all"))
        else:
            parts.append(compiled.step([session, other], [int(chunk), int(chunk)])[:1])
    return torch.cat(parts)


def _approximation(compiled: CompiledModel, full: CompiledModel, tokens: int, room: int) -> Comparison | None:
    """The spec against full on the last `tokens` of a text two windows longer; None when a window is longer than any text read.

    A KIVI store quantises what a call has read once it is over: there the spec reads in chunks of KIVI_CHUNK_TOKENS, behind a residual.
    Where keys are found, which only a token that is generated does, the last LOOKUP_STEPS are read one at a time, behind a prompt that is
    long enough for an index.
    """
    policies = [group.policy for site in compiled.plan.sites for group in site.groups]
    widest = max((policy.window.window_tokens for policy in policies if policy.window is not None), default=0)
    residual = max((kivi.residual_tokens for policy in policies if isinstance(kivi := policy.store.quantised, Kivi)), default=0)
    widest = max(widest, residual)
    finds = any(policy.found is not None for policy in policies)
    tokens = LOOKUP_STEPS if finds else tokens
    length = min(tokens + 2 * max(widest, MIN_INDEXED_TOKENS if finds else 0), room, compiled.plan.context_tokens or room)
    if widest > LONGEST_WINDOW or length < widest + tokens:
        return None
    ids = text_ids(length, compiled.vocabulary, compiled.tokenizer)
    if not finds:
        session = compiled.session(prefix=None)
        read = torch.cat([session.prefill(part, logits="all") for part in ids.split(KIVI_CHUNK_TOKENS if residual else length)])
        return Comparison.of(full.session(prefix=None).prefill(ids, logits="all")[-tokens:], read[-tokens:])
    session = compiled.session(prefix=None)
    session.prefill(ids[:-tokens])
    stepped = torch.stack([session.step(int(each)) for each in ids[-tokens:]])
    return Comparison.of(full.session(prefix=None).prefill(ids, logits="all")[-tokens:], stepped)
