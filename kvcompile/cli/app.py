"""The commands.  Each one imports what it needs when it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from kvcompile import __version__
from kvcompile.cli import options
from kvcompile.cli.options import (
    DEFAULT_CONTEXTS,
    MODEL_FORMS,
    ChatOption,
    ContextsOption,
    DumpOption,
    FormatsOption,
    JsonOption,
    OutputOption,
    PrefixOption,
    PromptFileOption,
    PromptOption,
    Queries,
    QueriesOption,
    QuietOption,
    SaveSessionOption,
    SeedOption,
    SessionOption,
    SetOption,
    ShowOption,
    SpecArgument,
    StopOption,
    TemperatureOption,
    TextOption,
    TextTokensOption,
    TokensOption,
)
from kvcompile.cli.output import Output

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,  # plain help: rich's costs 0.1 s
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvcompile {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=False)
def describe(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Compile a causal language model into a decoder whose heads remember what a YAML spec says.

    kvcompile model.yaml is kvcompile compile model.yaml.
    """


@app.command("compile")
def compile_command(
    spec: SpecArgument,
    output: OutputOption = None,
    formats: FormatsOption = None,
    contexts: ContextsOption = DEFAULT_CONTEXTS,
    assignments: SetOption = None,
    as_json: JsonOption = False,
    show: ShowOption = None,
    dump: DumpOption = None,
    stop_after: StopOption = None,
    prompt: PromptOption = None,
    prompt_file: PromptFileOption = None,
    chat: ChatOption = False,
    max_new_tokens: TokensOption = None,
    temperature: TemperatureOption = None,
    seed: SeedOption = None,
    prefix: PrefixOption = None,
    session: SessionOption = None,
    save_session: SaveSessionOption = None,
    quiet: QuietOption = False,
) -> None:
    """Compile, verify and report; continue the prompts, if any."""
    lengths = options.parse_contexts(contexts)
    if prompt is None and prompt_file is None:
        if chat or max_new_tokens is not None or temperature is not None:
            raise typer.BadParameter("--chat, --max-new-tokens and --temperature need a --prompt or a --prompt-file.")
        if session is not None or save_session is not None:
            raise typer.BadParameter("--session and --save-session need a --prompt or a --prompt-file.")
        if prefix is not None:
            raise typer.BadParameter("--prefix needs a --prompt or a --prompt-file.")
    if max_new_tokens == 0 and save_session is None:
        raise typer.BadParameter("--max-new-tokens 0 reads the prompt only: say where to with --save-session.")
    from kvcompile.cli.compiling import Job, run_job
    from kvcompile.cli.prompts import read_prompts
    from kvcompile.spec import load_spec
    from kvcompile.spec.prefixes import NONE

    loaded = load_spec(spec, overrides=options.as_overrides(assignments, output, formats, seed))
    job = Job(
        spec=loaded,
        contexts=lengths,
        show=show,
        dump=dump,
        stop_after=stop_after,
        prompts=tuple(read_prompts(prompt, prompt_file)),
        chat=chat,
        max_new_tokens=64 if max_new_tokens is None else max_new_tokens,
        temperature=0.0 if temperature is None else temperature,
        session=session,
        save_session=save_session,
        prefix=... if prefix is None else None if prefix == NONE else prefix,
    )
    voice = Output(as_json=as_json, quiet=quiet)
    try:
        run_job(job, voice)
    finally:
        voice.settle()


@app.command()
def plan(
    spec: SpecArgument,
    contexts: ContextsOption = DEFAULT_CONTEXTS,
    assignments: SetOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show what every layer stores and reads; loads no weights."""
    lengths = options.parse_contexts(contexts)
    from kvcompile.cli.compiling import show_plan
    from kvcompile.spec import load_spec

    voice = Output(as_json=as_json, quiet=quiet)
    try:
        show_plan(load_spec(spec, overrides=options.as_overrides(assignments)), lengths, voice)
    finally:
        voice.settle()


@app.command()
def validate(spec: SpecArgument, assignments: SetOption = None, as_json: JsonOption = False) -> None:
    """Check a spec and everything it names; all mistakes at once."""
    from kvcompile.spec import load_spec

    loaded = load_spec(spec, overrides=options.as_overrides(assignments))
    model = loaded.model.path if loaded.model else None
    voice = Output(as_json=as_json)
    voice.say(f"{loaded.source}: ok ({f'model {model}, ' if model else ''}policies {', '.join(sorted(loaded.policies))})")
    voice.finish({"spec": loaded.source, "ok": True, "model": model, "policies": sorted(loaded.policies), "errors": []})


@app.command()
def schema() -> None:
    """Print the JSON Schema of a spec, for editors."""
    from kvcompile.spec import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


@app.command()
def passes(as_json: JsonOption = False) -> None:
    """List the passes in their order."""
    from kvcompile.pipeline import PASSES
    from kvcompile.report import Table

    found = [
        {"name": each.name, "requires": list(each.requires), "does": (type(each).__doc__ or "").strip().split("\n")[0]} for each in PASSES
    ]
    voice = Output(as_json=as_json)
    voice.table(Table(("pass", "does"), tuple((str(each["name"]), str(each["does"])) for each in found)))
    voice.finish({"passes": found})


@app.command()
def init(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_FORMS)],
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Where to write it; stdout if left out.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a spec to start from."""
    from kvcompile.cli.files import write_new
    from kvcompile.models.header import init_spec, read_header

    text = init_spec(read_header(model) or model, output.parent if output else ".")
    voice = Output(as_json=as_json)
    if output is None:
        voice.say(text.rstrip("\n"))
    else:
        write_new(output, text, force=force)
        voice.say(f"wrote {output}; check it: kvcompile validate {output}")
    voice.finish({"file": str(output) if output else None, "text": text})


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=f"{MODEL_FORMS}  Or the file of a session or an index.")],
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show what kvcompile sees in a model: attention sites, windows, segments; or what it refuses, where, and why (exit code 1).

    Of a session file or an index file: whose it is and what it holds; every byte is checked.
    """
    from kvcompile.inspection import inspect_file, inspect_model

    voice = Output(as_json=as_json, quiet=quiet)
    try:
        kept = inspect_file(model)
        if kept is not None:
            for line in kept.lines():
                voice.say(line)
            if kept.parts:
                voice.table(kept.table())
            voice.finish(kept.as_dict())
            return
        found = inspect_model(model, progress=voice.progress)
        if found.sites:
            voice.table(found.table())
        for line in found.lines():
            voice.say(line)
        voice.finish({"model": model, **found.as_dict()})
    finally:
        voice.settle()
    if found.refused:
        raise typer.Exit(1)


@app.command()
def env(as_json: JsonOption = False) -> None:
    """Tell what this machine and this installation are, for reports and bug reports."""
    from kvcompile.cli.environment import environment

    _print_facts(environment(), as_json)


@app.command()
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove every entry that is not in use.")] = False, as_json: JsonOption = False
) -> None:
    """Show or clear what is kept between runs."""
    from datetime import datetime

    from kvcompile.models import cache as kept
    from kvcompile.report import Table, format_bytes

    freed = kept.clear() if clear else 0
    found = kept.entries()
    voice = Output(as_json=as_json)
    if clear:
        voice.say(f"freed {format_bytes(freed)}")
    used = [datetime.fromtimestamp(entry.used_at).isoformat(" ", "minutes") for entry in found]
    if found:
        rows = tuple((entry.kind, entry.key, format_bytes(entry.bytes), when) for entry, when in zip(found, used, strict=True))
        voice.table(Table(("kind", "entry", "size", "used last"), rows, right=frozenset({2})))
    voice.say(f"{kept.root()}: {format_bytes(kept.size())} of at most {format_bytes(kept.limit_bytes())}")
    voice.finish(
        {
            "folder": str(kept.root()),
            "bytes": kept.size(),
            "limit_bytes": kept.limit_bytes(),
            "freed_bytes": freed,
            "entries": [
                {"kind": entry.kind, "key": entry.key, "bytes": entry.bytes, "used": when} for entry, when in zip(found, used, strict=True)
            ],
        }
    )


@app.command()
def specs(as_json: JsonOption = False) -> None:
    """List the specs that the package carries."""
    from kvcompile.cli.files import first_comment
    from kvcompile.report import Table
    from kvcompile.spec import bundled_specs
    from kvcompile.spec.bundled import bundled_path

    found = [{"name": f"builtin:{name}", "about": first_comment(bundled_path(f"builtin:{name}"))} for name in bundled_specs()]
    voice = Output(as_json=as_json)
    voice.table(Table(("spec", "about"), tuple((each["name"], each["about"]) for each in found)))
    voice.finish({"specs": found})


@app.command()
def recall(
    spec: SpecArgument,
    text: TextOption,
    queries: QueriesOption = Queries.HELD_OUT,
    tokens: TextTokensOption = None,
    output: OutputOption = None,
    assignments: SetOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure what heads with a top_k, clusters or sample zone find of a text of yours: recall@k, output error, bytes read, index.

    The first 7/8 of the text are the cache, whose index is made as a session makes it.  --queries held-out asks up to 32 queries, evenly
    spaced in the last eighth, each as if it stood at the end of the cache: what lies between is left out.

    recall@k is the share of the k keys with the largest exact logits that was found.  output error is |o - o'| / |o| of the attention over
    window, found keys and tail against exact attention.  read is what a step reads, in % of what full attention would read.

    -o FOLDER gets recall.json, recall.txt and recall.svg, a heat map of the output error.
    """
    from kvcompile.cli.recalling import Question, run_recall
    from kvcompile.spec import load_spec

    loaded = load_spec(spec, overrides=options.as_overrides(assignments, output))
    folder = Path(loaded.output.directory).expanduser() if output is not None and loaded.output.directory is not None else None
    voice = Output(as_json=as_json, quiet=quiet)
    try:
        run_recall(Question(loaded, text, queries.value, tokens, folder), voice)
    finally:
        voice.settle()


@app.command("sweep")
def sweep_command(
    families: Annotated[
        list[str] | None, typer.Argument(metavar="[FAMILY]...", help="Model types of transformers; all of them if left out.")
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, metavar="N", help="Worker processes.")] = 1,
    timeout: Annotated[float, typer.Option("--timeout", min=1.0, metavar="S", help="Seconds for one family.")] = 600.0,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the coverage page there.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Families that are not named stay as the page of -o has them.")] = False,
    record: Annotated[
        Path | None,
        typer.Option("--record", metavar="FILE", help="Keep each result there; what it holds of the same code is not run again."),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compile a tiny random model of every causal language model family, and compare.

    Exits with 1 when one is wrong or crashed; a family that is refused, by node and reason, is a result.
    """
    from kvcompile.cli.sweeping import run_sweep

    voice = Output(as_json=as_json, quiet=quiet)
    try:
        right = run_sweep(families or (), jobs=jobs, timeout_s=timeout, file=output, merge=merge, record=record, output=voice)
    finally:
        voice.settle()
    if not right:
        raise typer.Exit(1)


def _print_facts(facts: dict[str, Any], as_json: bool) -> None:
    voice = Output(as_json=as_json)
    width = max(map(len, facts))
    for name, value in facts.items():
        voice.say(f"{name:<{width}}  {', '.join(map(str, value)) if isinstance(value, list) else value}")
    voice.finish(facts)
