"""The spec after it was read and checked: plain dataclasses, so that passes and runtime need neither pydantic nor PyYAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from kvcompile.ir.policy import DType, HeadPolicy


@dataclass(frozen=True)
class Pattern:
    """Scores of a model's KV heads: high means retrieval head, low means streaming head.

    scores:        [layers][kv_heads], each finite and clipped to [0, 1].
    sink_tokens, recent_tokens: what the pattern was trained with (DuoAttention's config.json); they apply only where
                   the policy leaves them out.
    """

    path: str
    scores: tuple[tuple[float, ...], ...]
    method: str = ""
    seed: int | None = None
    model_hash: str | None = None
    sink_tokens: int | None = None
    recent_tokens: int | None = None


@dataclass(frozen=True)
class HeadRule:
    """One entry of `heads:`; later rules win.  None for layers or kv_heads: all of them.

    With a pattern, the rule covers the `share` of the named KV heads that score lowest: floor(share * heads), ties by
    (score, layer, KV head).
    where: the place in the file, for messages that a pass has to make (`specs/duo.yaml:14: heads[2]`).
    """

    policy: str
    layers: tuple[int, ...] | None = None
    kv_heads: tuple[int, ...] | None = None
    pattern: Pattern | None = None
    share: float | None = None
    where: str = "heads"


@dataclass(frozen=True)
class ModelSource:
    """`model:`.  path as written; kvcompile/models resolves it.  folder: relative paths start here."""

    path: str
    dtype: DType | None = None
    folder: str = "."
    where: str = "model"


@dataclass(frozen=True)
class Target:
    """`target:`.  threads None: as many as torch chooses.  memory_bytes None: no limit declared.

    isa:      instructions that the C++ kernels are built for; None: the best that the processor has.
    kernels:  "generated", or "torch": attention and linear layers run in torch, as where there is no compiler.
    segments: "compiled" by AOTInductor, or "eager": torch runs them node by node.
    disk:     folder of the files of policies whose device is disk; None: runtime/block_file.py chooses.
    """

    device: Literal["cpu", "cuda"] = "cpu"
    threads: int | None = None
    memory_bytes: int | None = None
    deterministic: bool = False
    isa: Literal["avx512", "avx2", "portable"] | None = None
    kernels: Literal["generated", "torch"] = "generated"
    segments: Literal["compiled", "eager"] = "compiled"
    where: str = "target"
    disk: str | None = None


Relay: TypeAlias = Literal["off", "auto", "always"]


@dataclass(frozen=True)
class SharedText:
    """One entry of `prefix.shared`: a text that sessions start behind.

    after:   the name of the prefix that it continues; None for one that begins a text.
    chat:    the text is a system message, written as the model's chat template writes one.
    default: whether sessions that name no prefix start behind it.
    """

    name: str
    text: str
    after: str | None = None
    chat: bool = False
    default: bool = False
    where: str = "prefix.shared"


@dataclass(frozen=True)
class Prefix:
    """`prefix:`.  relay: whether sessions of one call that share a past read it together: never, where it pays, or always.

    shared: in an order in which each stands behind the one that it continues.
    """

    relay: Relay = "auto"
    shared: tuple[SharedText, ...] = ()


@dataclass(frozen=True)
class Output:
    """`output:`.  directory None: nothing is written."""

    directory: str | None = None
    formats: tuple[str, ...] = ()


@dataclass(frozen=True)
class Spec:
    """The whole spec.  `model` is None when a module is given to `kvcompile.compile` directly.

    lines: dotted path of each value ("heads[2].kv_heads") to its place ("specs/duo.yaml:14"), for later messages.
    """

    model: ModelSource | None
    policies: Mapping[str, HeadPolicy]
    heads: tuple[HeadRule, ...]
    target: Target = Target()
    prefill_chunk_tokens: int = 2048
    verify_tokens: int = 256
    seed: int = 0
    output: Output = Output()
    prefix: Prefix = Prefix()
    source: str = "<spec>"
    lines: Mapping[str, str] = field(default_factory=dict)

    def where(self, path: str) -> str:
        """The place of a value for a message: `specs/duo.yaml:14: heads[2].kv_heads`."""
        place = self.lines.get(path)
        return f"{place}: {path}" if place else f"{self.source}: {path}"
