"""From a spec, or a module and a spec, to a compiled model.  The only file that knows every layer."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from kvcompile.codegen.segments import segment_sources
from kvcompile.ir.attend_op import ATTEND
from kvcompile.ir.errors import KvcompileError, ModelError, Problem, SpecError, TargetError, UnsupportedGraphError
from kvcompile.ir.evaluate import FakeConstantError
from kvcompile.ir.plan import Plan, PlannedPrefix
from kvcompile.ir.show import graph_text
from kvcompile.ir.spec import ModelSource, Spec
from kvcompile.ir.unit import Unit
from kvcompile.link import kernel_sources, link
from kvcompile.models import cache
from kvcompile.models.exported import as_module
from kvcompile.models.load import open_model
from kvcompile.models.opened import OpenedModel, token_ids
from kvcompile.models.weights_hash import weights_hash
from kvcompile.original import OriginalFacts
from kvcompile.passes.probe_segments import probe_segments
from kvcompile.passes.rotate_sink_queries import check_shift_invariance
from kvcompile.passes.trace import FixedLengthError, bind_weights, front_ends, trace
from kvcompile.pipeline import Pipeline
from kvcompile.prefixes import plan_prefixes
from kvcompile.report import DEFAULT_CONTEXTS, plan_text, report_compiled
from kvcompile.runtime.model import CompiledModel
from kvcompile.verify import Verification, full_plan, record_key, verify

Progress = Callable[[str], None]


def _silent(line: str) -> None:
    pass


@dataclass(frozen=True)
class PassResult:
    """What `run_passes` made: the unit after the last pass, seconds by stage."""

    unit: Unit
    timings: dict[str, float]

    @property
    def graph(self) -> torch.fx.GraphModule:
        return self.unit.graph

    @property
    def plan(self) -> Plan | None:
        """None before `build_zones`."""
        return self.unit.plan

    @property
    def warnings(self) -> tuple[str, ...]:
        return self.unit.warnings

    @property
    def text(self) -> str:
        return graph_text(self.graph)

    @property
    def sources(self) -> dict[str, str]:
        """The kernels and the distinct segments as source, by name; {} before `outline_segments`."""
        segments = segment_sources(self.graph)
        if not segments or self.plan is None:
            return segments
        return {**kernel_sources(self.graph, self.plan), **segments}


@dataclass
class _Stages:
    """Seconds of each stage, and the line that tells of it."""

    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def stage(self, name: str, line: str) -> Iterator[None]:
        self.progress(line)
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started


def compile(
    source: str | Path | nn.Module | ExportedProgram | None = None,
    spec: str | Path | Mapping[str, Any] | Spec | None = None,
    *,
    tokenizer: Any = None,
    overrides: tuple[str, ...] = (),
    progress: Progress | None = None,
    dump: str | Path | None = None,
    contexts: Sequence[int] = DEFAULT_CONTEXTS,
) -> CompiledModel:
    """Compile a causal language model.

    compile("duo.yaml")                     the spec names the model
    compile(module, spec={...} or a path)   the module is the model; the spec names none
    compile("folder-or-file.gguf", spec=…)  the source is the model's path (a .pt2 file too); the spec names none

    A module is a transformers model, any nn.Module with forward(ids [1, tokens]) -> logits [1, tokens, vocabulary] (a second
    argument `position_ids` is given where there is one), a torch.fx GraphModule or an exported program of such a function.

    overrides: `a.b=value` as the command's --set.  progress: called with a line for each stage.  dump: a folder for the
    graph after each pass.  contexts: lengths that the report of `output.directory` tells bytes for.
    Raises KvcompileError (SpecError, ModelError, UnsupportedGraphError, CapacityError, TargetError, VerificationError).
    """
    module, checked = _read(source, spec, overrides)
    _check_target(checked)
    _check_output(checked)
    stages = _Stages(progress or _silent)
    opened = None if module is not None else _open(checked, stages)
    prefixes = _prefixes(checked, opened, tokenizer)
    unit, module = _run(checked, opened, module, stages, None, dump, prefixes)
    if opened is not None:
        if module is None:
            module = _load(opened, stages)
            if not bind_weights(unit.graph, module):  # a constant that only the real model holds
                unit, module = _run(checked, None, module, stages, None, dump, prefixes)
        tokenizer = tokenizer if tokenizer is not None else opened.tokenizer()
    assert module is not None and unit.plan is not None
    check_shift_invariance(unit)  # the weights hold the rotation's numbers
    with stages.stage("probe", "probing segments"):
        probe_segments(unit.graph, unit.position_rows or unit.context_tokens)
    linked = link(unit.graph, (unit.plan, full_plan(unit.plan)), checked, stages.stage)
    compiled = CompiledModel(
        program=linked.program,
        plan=unit.plan,
        kernels=linked.kernels,
        spec=checked,
        vocabulary=_vocabulary(unit.graph),
        name=opened.name if opened else type(module).__name__,
        hash=opened.hash if opened else weights_hash(module),
        tokenizer=tokenizer,
        stop_tokens=frozenset(opened.stop_tokens if opened else _stop_tokens(module)),
        timings=stages.seconds,
        warnings=(*unit.warnings, *linked.warnings),
        explanation=_explain,
        transformers_face=functools.partial(_as_transformers, original=OriginalFacts.of(module)),
    )
    compiled = replace(compiled, verification=_verified(compiled, module, unit, linked.built, opened, stages))
    report_compiled(compiled, contexts)
    return compiled


def run_passes(
    spec: str | Path | Mapping[str, Any] | Spec,
    *,
    module: nn.Module | None = None,
    tokenizer: Any = None,
    stop_after: str | None = None,
    dump: str | Path | None = None,
    progress: Progress | None = None,
) -> PassResult:
    """Trace and run the passes up to `stop_after`, without loading weights.  tokenizer: as `compile` takes it, for prefixes."""
    _, checked = _read(module, spec, ())
    stages = _Stages(progress or _silent)
    opened = None if module is not None else _open(checked, stages)
    unit, _ = _run(checked, opened, module, stages, stop_after, dump, _prefixes(checked, opened, tokenizer))
    return PassResult(unit, stages.seconds)


def make_plan(
    spec: str | Path | Mapping[str, Any] | Spec,
    *,
    module: nn.Module | None = None,
    tokenizer: Any = None,
    dump: str | Path | None = None,
    progress: Progress | None = None,
) -> Plan:
    """The plan, without loading weights; `run_passes` tells the warnings too.

    Raises CapacityError when it does not fit `target.memory`.
    """
    plan = run_passes(spec, module=module, tokenizer=tokenizer, stop_after="request_kernels", dump=dump, progress=progress).plan
    assert plan is not None
    return plan


def _read(source: Any, spec: Any, overrides: tuple[str, ...]) -> tuple[nn.Module | None, Spec]:
    from kvcompile.spec import load_spec

    if spec is None:
        if source is None or isinstance(source, (nn.Module, ExportedProgram)):
            mend = "Give spec= a path, a dict or a Spec; {'kvcompile': 1} is policy full."
            raise SpecError(Problem("compile", "there is no spec.", mend))
        return None, _with_model(load_spec(source, overrides=overrides), None)
    checked = load_spec(spec, overrides=overrides)
    if isinstance(source, ExportedProgram):
        source = as_module(source)
    if isinstance(source, nn.Module):
        if checked.model is not None:
            raise SpecError(
                Problem(checked.where("model"), "the spec names a model and a module was given too.", "Leave `model:` out of the spec.")
            )
        return source, checked
    if source is not None and not isinstance(source, (str, Path)):
        mend = "Give a path, a torch.nn.Module, a torch.fx.GraphModule or a torch.export.ExportedProgram."
        raise ModelError(Problem("compile", f"a {type(source).__name__} is no model.", mend))
    return None, _with_model(checked, source)


def _with_model(spec: Spec, path: str | Path | None) -> Spec:
    if path is not None:
        if spec.model is not None:
            raise SpecError(
                Problem(spec.where("model"), f"the spec names a model and {str(path)!r} was given too.", "Name the model in one place.")
            )
        return replace(spec, model=ModelSource(str(path), where="source"))
    if spec.model is None:
        mend = "Write `model: {path: ...}`, or give a module: compile(module, spec=...)."
        raise SpecError(Problem(spec.where("model"), "the spec names no model.", mend))
    return spec


def _check_target(spec: Spec) -> None:
    if spec.target.device == "cuda":
        missing = "there is no CUDA device on this machine" if not torch.cuda.is_available() else "its kernels are not built yet"
        raise TargetError(
            Problem(
                spec.where("target.device"),
                f"cuda cannot run: {missing}.",
                "Write `device: cpu`; validate, plan, --show, --dump and --stop-after work for cuda without a device.",
            )
        )
    _set_threads(spec.target.threads)


_own_threads: int | None = None  # torch's number before a spec set another one


def _set_threads(threads: int | None) -> None:
    """The number is the whole process's: `auto` takes back what an earlier compile set, and nothing else."""
    global _own_threads
    if threads is not None:
        _own_threads = torch.get_num_threads() if _own_threads is None else _own_threads
        torch.set_num_threads(threads)
    elif _own_threads is not None:
        torch.set_num_threads(_own_threads)
        _own_threads = None


def _check_output(spec: Spec) -> None:
    """Before the long work: a spec that was read an hour ago may name a folder that has changed since."""
    if spec.output.directory is None:
        return
    from kvcompile.spec.resolve import UNWRITABLE_MEND, unwritable

    fault = unwritable(spec.output.directory)
    if fault is not None:
        raise SpecError(Problem(spec.where("output.directory"), fault, UNWRITABLE_MEND))


def _open(spec: Spec, stages: _Stages) -> OpenedModel:
    spec = _with_model(spec, None)
    assert spec.model is not None
    return open_model(spec.model, progress=stages.progress)


def _load(opened: OpenedModel, stages: _Stages) -> nn.Module:
    with stages.stage("load", f"loading {opened.name}"):
        return opened.load()


def _prefixes(spec: Spec, opened: OpenedModel | None, tokenizer: Any) -> tuple[PlannedPrefix, ...]:
    """The prefixes as tokens, before any work: what cannot be exact should not wait."""
    if not spec.prefix.shared:
        return ()
    return plan_prefixes(spec.prefix, tokenizer if tokenizer is not None or opened is None else opened.tokenizer())


def _run(
    spec: Spec,
    opened: OpenedModel | None,
    module: nn.Module | None,
    stages: _Stages,
    stop_after: str | None,
    dump: str | Path | None,
    prefixes: tuple[PlannedPrefix, ...],
) -> tuple[Unit, nn.Module | None]:
    """Trace and passes.  A model that is not loaded yet is traced from its configuration, with weights of no memory.

    The second is the model with its weights: the module that was given, or None unless a table had to be looked into.
    """
    if module is not None:
        return _through_front_ends(spec, module, stages, stop_after, dump, prefixes), module
    assert opened is not None
    with stages.stage("open", f"reading {opened.name}"), FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()):
        fake = opened.build()
    try:
        return _through_front_ends(spec, fake, stages, stop_after, dump, prefixes), None
    except FakeConstantError:  # a mask that is a table
        module = _load(opened, stages)
        return _through_front_ends(spec, module, stages, stop_after, dump, prefixes), module


# the passes that a front end may fail in while another one succeeds, the most telling failure last
_FRONT_PASSES = ("trace", "canonicalise_attention", "make_positions_explicit", "check_token_wise")


def _through_front_ends(
    spec: Spec, module: nn.Module, stages: _Stages, stop_after: str | None, dump: str | Path | None, prefixes: tuple[PlannedPrefix, ...]
) -> Unit:
    """Which front end serves a model is found by trying: some models ignore transformers' attention interface without a word."""
    declared = getattr(getattr(module, "config", None), "max_position_embeddings", None)
    pipeline = Pipeline(dump=Path(dump) if dump else None, on_pass=stages.seconds.__setitem__)
    failures: list[tuple[int, UnsupportedGraphError]] = []
    for front_end in front_ends(module):
        try:
            with stages.stage("trace", "tracing" if not failures else f"tracing again, with {front_end} attention"):
                graph = trace(module, front_end)
            stages.progress("running passes")
            return pipeline.run(Unit(graph, spec, context_tokens=declared, prefixes=prefixes), stop_after)
        except FixedLengthError:
            raise
        except UnsupportedGraphError as error:
            failed_in = error.problems[0].where.split(":")[0]
            if failed_in not in _FRONT_PASSES or (failed_in != "trace" and front_end == "interface" and _found_attention(graph)):
                raise  # what else mixes tokens beside attention is there whoever finds the attention
            failures.append((_FRONT_PASSES.index(failed_in), error))
    raise max(failures, key=lambda failure: failure[0])[1]


def _found_attention(graph: torch.fx.GraphModule) -> bool:
    return bool(graph.graph.find_nodes(op="call_function", target=ATTEND))


def _vocabulary(graph: torch.fx.GraphModule) -> int:
    (output,) = graph.graph.find_nodes(op="output")
    return int(output.args[0].meta["val"].shape[-1])


def _stop_tokens(module: nn.Module) -> tuple[int, ...]:
    return token_ids(*(getattr(getattr(module, name, None), "eos_token_id", None) for name in ("config", "generation_config")))


def _verified(
    compiled: CompiledModel,
    module: nn.Module,
    unit: Unit,
    built: tuple[str, ...],
    opened: OpenedModel | None,
    stages: _Stages,
) -> Verification:
    """The kept record of an earlier verification if nothing changed since, else a new one."""
    key = None
    if opened is not None:
        key = record_key(opened.hash, compiled, unit.graph, built)
        kept = cache.recall("verified", key)
        if kept is not None:
            with contextlib.suppress(KeyError, TypeError):
                return Verification.from_dict(kept)
    with stages.stage("verify", "verifying against the original model"):
        verification = verify(compiled, module, unit.graph, unit.frequency_tokens)
    if key is not None:
        cache.record("verified", key, {name: value for name, value in verification.as_dict().items() if name != "from_record"})
    return verification


def _as_transformers(compiled: CompiledModel, original: OriginalFacts) -> Any:
    from kvcompile.transformers_model import KvcompileForCausalLM

    return KvcompileForCausalLM(compiled, original)


def _explain(compiled: CompiledModel) -> str:
    seconds = ", ".join(f"{name} {value:.2f} s" for name, value in compiled.timings.items())
    proved = compiled.verification.text() if compiled.verification else "nothing is proved of this plan"
    return "\n".join([plan_text(compiled.plan), "", proved, compiled.relay.text(), f"compile: {seconds}", *compiled.warnings])


__all__ = ["KvcompileError", "PassResult", "compile", "make_plan", "run_passes", "trace"]
