"""The options, each declared once, so that it means one thing in every command."""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from kvcompile.spec.units import parse_tokens


class Show(StrEnum):
    """What `--show` shows."""

    PLAN = "plan"
    GRAPH = "graph"
    SOURCE = "source"
    TIMING = "timing"


class Queries(StrEnum):
    """Which queries `--queries` asks."""

    HELD_OUT = "held-out"


def parse_contexts(text: str) -> tuple[int, ...]:
    """`8k,32k,1000` -> numbers of tokens, k = 1024."""
    try:
        lengths = tuple(int(word) if word.isdecimal() else parse_tokens(word) for word in text.lower().replace(" ", "").split(","))
    except ValueError:
        lengths = ()
    if not lengths or min(lengths) < 1:
        raise typer.BadParameter(f"{text!r} is no list of token counts; write for example 8k,32k,1000.")
    return lengths


SpecArgument = Annotated[str, typer.Argument(metavar="SPEC", help="A YAML file, or builtin:NAME (see `kvcompile specs`).")]
OutputOption = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FOLDER", help="Where results are written (output.directory).", show_default=False)
]
FormatsOption = Annotated[
    str | None, typer.Option("--formats", metavar="A,B", help="What is written there (output.formats).", show_default=False)
]
ContextsOption = Annotated[str, typer.Option("--contexts", metavar="8K,32K", help="Context lengths that the plan's bytes are told for.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=V", help="Replace one value of the spec; repeatable.", show_default=False)
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout and nothing else.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no tables: results only.")]
ShowOption = Annotated[Show | None, typer.Option("--show", help="Show this instead of the summary.", show_default=False)]
DumpOption = Annotated[
    Path | None, typer.Option("--dump", metavar="DIR", help="Write the graph after each pass into numbered files.", show_default=False)
]
StopOption = Annotated[
    str | None, typer.Option("--stop-after", metavar="PASS", help="Stop after this pass and print the graph.", show_default=False)
]
PromptOption = Annotated[
    str | None, typer.Option("--prompt", metavar="TEXT", help="Continue this text; after --prompt-file's, if both.", show_default=False)
]
PromptFileOption = Annotated[
    str | None,
    typer.Option(
        "--prompt-file", metavar="FILE", help="Continue this file's text; - is stdin, .jsonl one prompt a line.", show_default=False
    ),
]
ChatOption = Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the model's chat template.")]
TokensOption = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens", min=0, metavar="N", help="At most this many; 0 with --save-session.  [default: 64]", show_default=False
    ),
]
TemperatureOption = Annotated[
    float | None, typer.Option("--temperature", min=0.0, help="0 always takes the likeliest token.  [default: 0]", show_default=False)
]
PrefixOption = Annotated[
    str | None,
    typer.Option(
        "--prefix", metavar="NAME|none", help="Start behind this prefix of the spec.  [default: its default prefix]", show_default=False
    ),
]
SessionOption = Annotated[
    Path | None,
    typer.Option("--session", metavar="FILE", help="Go on behind what this session file holds: it is not read again.", show_default=False),
]
SaveSessionOption = Annotated[
    Path | None,
    typer.Option("--save-session", metavar="FILE", help="Write the session there, with the prompt and the answer.", show_default=False),
]
SeedOption = Annotated[int | None, typer.Option("--seed", min=0, help="For sampling (the spec's seed).", show_default=False)]

TextOption = Annotated[str, typer.Option("--text", metavar="FILE", help="A UTF-8 text of yours; - is stdin.", show_default=False)]
QueriesOption = Annotated[Queries, typer.Option("--queries", help="Which queries are asked.")]
TextTokensOption = Annotated[
    int | None,
    typer.Option(
        "--tokens", min=1, metavar="N", help="At most so many tokens of the text.  [default: the model's context]", show_default=False
    ),
]

MODEL_FORMS = "Folder, hub id, file.gguf, file.pt2, package:NAME/FILE or python:module:factory."
DEFAULT_CONTEXTS = "8k,32k,128k"


def as_overrides(
    assignments: Sequence[str] | None, output: Path | None = None, formats: str | None = None, seed: int | None = None
) -> list[str]:
    """The flags as `--set` would write them; they come after it and win over the file."""
    overrides = list(assignments or ())
    if output is not None:
        overrides.append(f"output.directory={json.dumps(str(output))}")
    if formats is not None:
        overrides.append(f"output.formats={json.dumps([word.strip() for word in formats.split(',')])}")
    if seed is not None:
        overrides.append(f"seed={seed}")
    return overrides
