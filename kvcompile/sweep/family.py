"""One family of the sweep: a tiny random model compiled and compared with the original.

1. What counts: a model that transformers builds and runs from token ids, and that attends (attention_seen.py).
2. `full`: the original on the whole sequence against prefill in two chunks, then one token at a time.
3. `streaming`: the same, against the float64 oracle on the whole sequence (oracle.py).
4. The tolerance is that of logits with a deviation of 1 or more, and in proportion below.  Where the original's own float32 is
   farther from its float64 than that, the result says so and its distance is the yardstick.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from kvcompile.ir.errors import KvcompileError, VerificationError
from kvcompile.ir.policy import All, SinkRecent
from kvcompile.ir.unit import Unit
from kvcompile.sweep.attention_seen import attends, looks_ahead, mixes_otherwise
from kvcompile.sweep.oracle import Oracle
from kvcompile.sweep.tiny import TinyModel, build_tiny
from kvcompile.verify import full_plan

if TYPE_CHECKING:
    from kvcompile.runtime.model import CompiledModel

CHUNKS, STEPS = (20, 16), 12  # a prefill beyond every window of a tiny model, and as many tokens again as a window
TOKENS = sum(CHUNKS) + STEPS
TOLERANCE = 1e-4  # of a logit, float32; most tiny models' logits have a deviation near 1, a few scale theirs down to 0.06
STREAMING = SinkRecent(sink_tokens=3, recent_tokens=9)
SPEC: dict[str, Any] = {
    "kvcompile": 1,
    "target": {"kernels": "torch", "segments": "eager"},
    "policies": {"streaming": {"zones": [{"sink_recent": asdict(STREAMING)}]}},
    "heads": [{"policy": "streaming"}],
    "verify": {"tokens": TOKENS},
}

# works: full equals the original, streaming equals the oracle.  refused: an error names a node.  wrong: it compiled and differs.
# unbuilt: transformers itself builds or runs no such model.  no_attention: nothing in the eager graph is a softmax over tokens.
# crashed: kvcompile raised what is no KvcompileError, its worker died, or it took too long.
Status = Literal["works", "refused", "wrong", "unbuilt", "no_attention", "crashed"]
STATUSES: tuple[Status, ...] = ("works", "refused", "wrong", "crashed", "no_attention", "unbuilt")
COUNTED: frozenset[Status] = frozenset({"works", "refused", "wrong", "crashed"})


@dataclass(frozen=True)
class FamilyResult:
    """What the sweep found for one model type.

    front_end, sites, features: of a model that was compiled.  full_error, streaming_error: largest absolute difference of a logit.
    noise: distance of the original's float32 from its float64, where an error is beyond the tolerance; else None.
    other_mixer: tokens meet outside an attention as well (a convolution, a recurrence).
    looks_ahead: a token's logits change with the tokens behind it.
    reason: why it is not `works`, in one line.  lost: module classes that the tiny model lacks.
    """

    model_type: str
    status: Status
    seconds: float
    front_end: str = ""
    sites: int = 0
    features: tuple[str, ...] = ()
    full_error: float | None = None
    streaming_error: float | None = None
    noise: float | None = None
    other_mixer: bool = False
    looks_ahead: bool = False
    reason: str = ""
    lost: tuple[str, ...] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> FamilyResult:
        return cls(**{**record, "features": tuple(record["features"]), "lost": tuple(record["lost"])})


def check_family(model_type: str) -> FamilyResult:
    """Builds, compiles and compares; whatever is raised on the way is a status and a reason."""
    started = time.perf_counter()
    found: dict[str, Any] = {}
    try:
        status, reason = _check(model_type, found)
    except KvcompileError as error:
        status, reason = "wrong" if isinstance(error, VerificationError) else "refused", one_line(error)
    except Exception as error:
        status, reason = "crashed", one_line(error)
    return FamilyResult(model_type, status, time.perf_counter() - started, reason=reason, **found)


def one_line(error: BaseException) -> str:
    """An error's first problem, or its class and its first line."""
    if isinstance(error, KvcompileError):
        problem = error.problems[0]
        text = f"{problem.where}: {problem.what}" if problem.where else problem.what
    else:
        text = f"{type(error).__name__}: {error}"
    return " ".join(text.split())


def _check(model_type: str, found: dict[str, Any]) -> tuple[Status, str]:
    import kvcompile

    ids = _ids()
    try:
        tiny = build_tiny(model_type)
        original = eager_logits(tiny.model)
        expected = original(ids[None])[0]
    except Exception as error:  # transformers raises anything
        return "unbuilt", one_line(error)
    if not expected.isfinite().all():
        return "unbuilt", "the original's own logits are not finite"
    found["lost"] = tuple(sorted(tiny.lost))
    if not attends(original, ids[None]):
        return "no_attention", "nothing in its eager run is a softmax over tokens"
    found["other_mixer"] = mixes_otherwise(original, ids[None])
    found["looks_ahead"] = looks_ahead(original, ids[None])
    compiled = kvcompile.compile(tiny.model, spec=SPEC)
    sited = _sited(tiny.model)
    found["front_end"] = sited.front_end
    oracle = Oracle(sited.graph, STREAMING)
    found["sites"] = len(compiled.plan.sites)
    found["features"] = features(compiled, tiny, oracle.rotated_share(ids))
    full = _incremental_logits(compiled.with_plan(full_plan(compiled.plan)), ids)
    found["full_error"] = _distance(full, expected)
    found["streaming_error"] = _distance(_incremental_logits(compiled, ids), oracle.logits(ids))
    worst = max(found["full_error"], found["streaming_error"])
    tolerance = TOLERANCE * min(1.0, float(expected.std()))
    if worst <= tolerance:
        return "works", ""
    found["noise"] = _distance(expected, Oracle(sited.graph, All()).logits(ids))
    if worst <= found["noise"]:
        return "works", f"its own float32 is {found['noise']:.1e} from its float64"
    which = "full" if found["full_error"] > max(tolerance, found["noise"]) else "streaming"
    return "wrong", f"{which} differs by {found[f'{which}_error']:.1e} (tolerance {tolerance:.0e}, noise {found['noise']:.1e})"


def _ids() -> Tensor:
    return torch.randint(3, 200, (TOKENS,), generator=torch.Generator().manual_seed(1))


def eager_logits(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The original's logits of ids [1, tokens], without a cache."""
    taken = inspect.signature(model.forward).parameters
    keywords = {"use_cache": False} if "use_cache" in taken else {}

    def logits(ids: Tensor) -> Tensor:
        with torch.no_grad():
            out: Tensor = model(input_ids=ids, **keywords).logits
        return out.detach()

    return logits


def _sited(model: nn.Module) -> Unit:
    """The model's graph with its sites, as `Oracle` takes it."""
    from kvcompile.compiler import run_passes

    return run_passes(SPEC, module=model, stop_after="check_token_wise").unit


def _incremental_logits(compiled: CompiledModel, ids: Tensor) -> Tensor:
    """Logits [tokens, vocabulary] of one session: `CHUNKS`, then `STEPS` single tokens."""
    session = compiled.session()
    parts = [session.prefill(chunk, logits="all") for chunk in ids[: sum(CHUNKS)].split(CHUNKS)]
    parts += [session.step(int(token))[None] for token in ids[sum(CHUNKS) :]]
    return torch.cat(parts)


def _distance(first_TV: Tensor, second_TV: Tensor) -> float:
    """The largest absolute difference; infinite where one is not finite."""
    difference = float((first_TV.double() - second_TV.double()).abs().max())
    return difference if difference == difference else float("inf")


def features(compiled: CompiledModel, tiny: TinyModel, rotated_share: list[float]) -> tuple[str, ...]:
    """What is special about a model's sites and blocks, as the table tells it.  rotated_share: `Oracle.rotated_share`."""
    sites = [plan.site for plan in compiled.plan.sites]
    told = {
        "MQA": any(site.kv_heads == 1 < site.query_heads for site in sites),
        "GQA": any(1 < site.kv_heads < site.query_heads for site in sites),
        "MLA": any(site.value_dim != site.head_dim for site in sites),
        "window": any(site.sliding_window for site in sites),
        "chunks": any(site.chunk_tokens for site in sites),
        "ALiBi": any(site.slopes for site in sites),
        "chosen keys": any(site.chosen_tokens for site in sites),
        "soft cap": any(site.soft_cap for site in sites),
        "learnt sinks": any(site.learnt_sinks for site in sites),
        "partial rotary": any(0 < share < 1 for share in rotated_share),
        "NoPE": any(rotated_share) and not all(rotated_share),
        "MoE": any("expert" in type(module).__name__.lower() for module in tiny.model.modules()),
        "convolution": bool(compiled.plan.convolutions),
    }
    return tuple(name for name, holds in told.items() if holds)
