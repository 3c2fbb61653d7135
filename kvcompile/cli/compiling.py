"""What `kvcompile compile` does once its options are read."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any

from kvcompile.cli.options import Show
from kvcompile.cli.output import Output
from kvcompile.ir.errors import KvcompileError
from kvcompile.ir.relaying import relay_remark
from kvcompile.ir.spec import Spec
from kvcompile.report import Table, compiled_dict, format_bytes, plan_dict, plan_remarks, plan_tables, report_files, verified_text

if TYPE_CHECKING:
    from kvcompile.ir.plan import Plan
    from kvcompile.runtime.generation import Generation
    from kvcompile.runtime.model import CompiledModel
    from kvcompile.runtime.session import Session


@dataclass(frozen=True)
class Job:
    """A compile as it was asked for.  prompts: texts to continue when it is done, behind what the file `session` holds; save_session: where
    the session of the only one is written to; prefix: of the spec, what prompts stand behind: a name, None, or ... for its default."""

    spec: Spec
    contexts: tuple[int, ...]
    show: Show | None = None
    dump: Path | None = None
    stop_after: str | None = None
    prompts: tuple[str, ...] = ()
    chat: bool = False
    max_new_tokens: int = 64
    temperature: float = 0.0
    session: Path | None = None
    save_session: Path | None = None
    prefix: str | EllipsisType | None = ...

    @property
    def needs_weights(self) -> bool:
        """Whether the model must be loaded: a plan and a graph are known without."""
        return bool(self.prompts) or self.show in (None, Show.TIMING) or self.spec.output.directory is not None


def run_job(job: Job, output: Output) -> None:
    """Compiles, shows, writes and generates as the job says."""
    if job.stop_after is not None or job.show in (Show.GRAPH, Show.SOURCE):
        _run_passes(job, output)
    elif job.needs_weights:
        _compile(job, output)
    else:
        show_plan(job.spec, job.contexts, output, job.dump)


def show_plan(spec: Spec, contexts: tuple[int, ...], output: Output, dump: Path | None = None) -> None:
    """The plan and what the passes warn of; no weights are loaded."""
    from kvcompile.compiler import run_passes

    found = run_passes(spec, stop_after="request_kernels", dump=dump, progress=output.progress)
    assert found.plan is not None
    _print_plan(found.plan, contexts, output, relay_remark(found.plan, spec.target))
    for warning in found.warnings:
        output.aside(f"warning: {warning}")
    output.finish({"spec": spec.source, "plan": plan_dict(found.plan, contexts), "warnings": list(found.warnings)})


def _run_passes(job: Job, output: Output) -> None:
    option = "--stop-after" if job.stop_after is not None else f"--show {job.show}"
    if job.spec.output.directory is not None:
        what = f"nothing is written to {job.spec.output.directory}: the compile ends before there is a report."
        if job.spec.lines.get("output.directory", "").startswith("--set "):  # asked for in the same breath, by -o or --set
            raise KvcompileError.at(option, what, "Take -o out, or write the graphs with --dump.")
        output.aside(f"{option}: {what}")
    if job.prompts:
        raise KvcompileError.at(option, "nothing is generated: the compile ends before there is a model.", "Take the prompt out.")
    from kvcompile.compiler import run_passes

    result = run_passes(job.spec, stop_after=job.stop_after, dump=job.dump, progress=output.progress)
    if job.show is Show.PLAN and result.plan is not None:
        _print_plan(result.plan, job.contexts, output)  # which kernels there will be, a later pass knows, and with it what relays
    elif job.show is Show.TIMING:
        output.table(_timing_table(result.timings))
    elif job.show is Show.SOURCE:
        for name, source in result.sources.items():
            output.say(f"{'//' if name.endswith('.cpp') else '#'} {name}\n{source.rstrip()}\n")
    else:
        output.say(result.text)
    for warning in result.warnings:
        output.aside(f"warning: {warning}")
    plan = None if result.plan is None else plan_dict(result.plan, job.contexts)
    output.finish(
        {
            "spec": job.spec.source,
            "stop_after": job.stop_after,
            "graph": result.text,
            "sources": result.sources,
            "plan": plan,
            "warnings": list(result.warnings),
            "timings": dict(result.timings),
        }
    )


def _check_session_files(job: Job) -> None:
    """Before the compile: who names a file that is not there, or one that cannot be written, should not wait."""
    from kvcompile.runtime.checked_file import check_target, open_checked
    from kvcompile.runtime.session_file import SESSION_FILE

    if job.session is not None:
        with open_checked(job.session, SESSION_FILE):
            pass
    if job.save_session is None:
        return
    if len(job.prompts) > 1:
        what = f"there are {len(job.prompts)} prompts, each with a session of its own."
        raise KvcompileError.at("--save-session", what, "Give one prompt.")
    check_target(job.save_session, SESSION_FILE)


def _check_prefix(job: Job) -> None:
    """Before the compile too: which prefix the prompts stand behind."""
    from kvcompile.spec.messages import nearest

    names = [each.name for each in job.spec.prefix.shared]
    if job.session is not None:
        if job.prefix is not ...:
            raise KvcompileError.at("--prefix", "what the session file holds has a past of its own.", "Leave --prefix out, or --session.")
        return
    if isinstance(job.prefix, str) and job.prefix not in names:
        near = nearest(job.prefix, names)
        mend = f"Did you mean {near}?" if near else "Name one of them, or none." if names else "Take it out."
        what = f"the spec declares no prefix of this name (there are {', '.join(names)})." if names else "the spec declares no prefix."
        raise KvcompileError.at(f"--prefix {job.prefix}", what, mend)
    if job.prompts and job.prefix is ... and len(names) > 1 and not any(each.default for each in job.spec.prefix.shared):
        what = f"the spec declares {len(names)} prefixes, {', '.join(names)}, and none is the default."
        raise KvcompileError.at("--prefix", what, f"Write --prefix {names[0]}, or --prefix none.")


def _compile(job: Job, output: Output) -> None:
    from kvcompile.compiler import compile

    _check_session_files(job)
    _check_prefix(job)
    if job.chat and job.spec.model is not None:  # before the compile: who asks for what is not there should not wait
        from kvcompile.models.load import open_model

        if not open_model(job.spec.model, output.progress).has_chat_template:
            raise KvcompileError.at("--chat", "this model has no chat template.", "Write the prompt as the model was trained to read it.")
    started = time.perf_counter()
    model = compile(spec=job.spec, progress=output.progress, dump=job.dump, contexts=job.contexts)
    timings = {**model.timings, "whole compile": time.perf_counter() - started}
    if not output.quiet:
        _print_summary(job, model, timings, output)
    found = {**compiled_dict(model, job.contexts), "timings": timings}
    written = [str(path) for path in report_files(job.spec.output)]
    if written:
        output.aside(f"wrote {' and '.join(written)}")
        found["report"] = written
    past = None
    if job.session is not None:
        past, found["session"] = _restored(model, job.session, output)
    elif job.prompts and (read := _read_prefix(job, model, output)) is not None:
        found["prefix"] = read
    found["generations"] = [_generate(job, model, past, number, output) for number in range(len(job.prompts))]
    if "prefix" in found:
        output.aside(_saving(found["prefix"]))
    output.finish(found)


def _restored(model: CompiledModel, path: Path, output: Output) -> tuple[Session, dict[str, Any]]:
    started = time.perf_counter()
    session = model.restore(path)
    seconds = time.perf_counter() - started
    read, own = session.shared_nbytes(), session.nbytes()
    output.aside(
        f"restored {len(session)} tokens from {path} in {seconds:.2f} s: {format_bytes(read)} are read where the file lies, "
        f"{format_bytes(own)} were copied"
    )
    return session, {"file": str(path), "tokens": len(session), "restore_s": seconds, "shared_bytes": read, "stored_bytes": own}


def _read_prefix(job: Job, model: CompiledModel, output: Output) -> dict[str, Any] | None:
    """What the prompts stand behind is read before the first of them, so that none pays for it; None where there is nothing."""
    from kvcompile.runtime.prefix import choose_prefix

    chosen = choose_prefix(model.plan.prefixes, job.prefix)
    if chosen is None:
        return None
    output.progress(f"reading prefix {chosen.name}: {chosen.tokens} tokens")

    def on_chunk(read: int, total: int) -> None:
        if read < total:
            output.progress(f"reading prefix {chosen.name}: {read} of {total} tokens")

    started = time.perf_counter()
    session = model.session(prefix=job.prefix, on_chunk=on_chunk)
    seconds = time.perf_counter() - started
    return {
        "name": chosen.name,
        "tokens_read_once": chosen.tokens,
        "read_s": seconds,
        "shared_bytes": session.shared_nbytes(),
        "prompts": len(job.prompts),
        "tokens_saved": chosen.tokens * (len(job.prompts) - 1),
    }


def _saving(prefix: Mapping[str, Any]) -> str:
    many = f"{prefix['prompts']} prompts started behind it" if prefix["prompts"] > 1 else "1 prompt started behind it"
    return (
        f"prefix {prefix['name']}: {prefix['tokens_read_once']} tokens read once in {prefix['read_s']:.2f} s, "
        f"{format_bytes(prefix['shared_bytes'])} that all sessions read where they lie; {many}, "
        f"{prefix['tokens_saved']} tokens were not read again"
    )


def _saved(session: Session, path: Path, output: Output) -> dict[str, Any]:
    started = time.perf_counter()
    session.save(path)
    seconds, size = time.perf_counter() - started, path.stat().st_size
    output.aside(f"saved {len(session)} tokens to {path} in {seconds:.2f} s, {format_bytes(size)}")
    return {"file": str(path), "tokens": len(session), "save_s": seconds, "file_bytes": size}


def _print_plan(plan: Plan, contexts: tuple[int, ...], output: Output, *further: str) -> None:
    for number, table in enumerate(plan_tables(plan, contexts)):
        if number:
            output.say()
        output.table(table)
    for line in (*plan_remarks(plan, contexts), *further):
        output.say(line)


def _print_summary(job: Job, model: CompiledModel, timings: Mapping[str, float], output: Output) -> None:
    if job.show is Show.TIMING:
        output.table(_timing_table(timings))
        return
    _print_plan(model.plan, job.contexts, output, relay_remark(model.plan, job.spec.target, model.kernels.serve))
    for warning in model.warnings:
        output.say(f"warning: {warning}")
    if job.show is None and verified_text(model):
        output.say()
        output.say(verified_text(model))


def _timing_table(timings: Mapping[str, float]) -> Table:
    rows = tuple((stage, f"{seconds:.2f}") for stage, seconds in timings.items())
    return Table(("stage", "seconds"), rows, right=frozenset({1}))


def _generate(job: Job, model: CompiledModel, past: Session | None, number: int, output: Output) -> dict[str, Any]:
    """past: what the prompt stands behind; every prompt continues a fork of it."""
    prompt = job.prompts[number]
    session = past.fork() if past is not None else model.session(prefix=job.prefix) if job.save_session is not None else None
    if len(job.prompts) > 1:
        output.aside(f"prompt {number + 1} of {len(job.prompts)}:")
    output.settle()

    def on_chunk(read: int, total: int) -> None:
        if read < total:
            output.progress(f"reading the prompt: {read} of {total} tokens")

    made = model.complete(
        prompt,
        max_new_tokens=job.max_new_tokens,
        temperature=job.temperature,
        chat=job.chat,
        on_text=output.piece,
        on_chunk=on_chunk,
        session=session,
        prefix=job.prefix if session is None else ...,
    )
    if made.new_tokens:
        output.say()
    output.aside(_cost(made))
    kept = {}
    if job.save_session is not None:
        assert session is not None
        kept = {"saved_session": _saved(session, job.save_session, output)}
    return {
        "text": made.text,
        "prompt_tokens": made.prompt_tokens,
        "new_tokens": made.new_tokens,
        "prefill_s": made.prefill_s,
        "decode_s": made.decode_s,
        "decode_tokens_per_s": made.decode_tokens_per_s,
        "stored_bytes": made.stored_bytes,
        **kept,
    }


def _cost(made: Generation) -> str:
    words = [
        f"{made.prompt_tokens} prompt tokens in {made.prefill_s:.2f} s",
        f"{made.new_tokens} new tokens" + (f" at {made.decode_tokens_per_s:.1f} a second" if made.decode_tokens_per_s else ""),
        f"the session holds {format_bytes(made.stored_bytes)}",
    ]
    return ", ".join(words)
