"""The command line.  `kvcompile model.yaml` is `kvcompile compile model.yaml`.

Exit codes: 0 done, 1 an error of the user's that a message explains, 2 the command line itself is wrong, 130 Ctrl-C.
Nothing heavy is imported here or in `app`: `--help`, `validate` and `schema` need neither torch nor transformers.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from kvcompile.cli.output import print_problems
from kvcompile.ir.errors import KvcompileError, Problem

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
# What `pip install kvcompile` leaves out: a saved model runs without it, this command does not.
_OF_THE_EXTRA = {"typer", "rich", "yaml", "pydantic", "transformers", "accelerate", "gguf", "jinja2", "networkx", "huggingface_hub"}
_NOT_A_SPEC = {"--help", "-h", "--version"}


def main(words: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code (setuptools' entry point passes it to sys.exit)."""
    arguments = list(sys.argv[1:] if words is None else words)
    as_json = "--json" in arguments
    if sys.stdout is None:  # closed by the shell: `kvcompile ... >&-`
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    try:
        return _run(arguments)
    except KvcompileError as error:
        print_problems(error.problems, as_json=as_json)
        return USAGE if isinstance(error, _UsageError) else FAILED
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _OF_THE_EXTRA:
            raise
        print_problems([Problem("", f"the package {error.name} is missing.", "pip install 'kvcompile[compile]'")], as_json=as_json)
        return FAILED
    except KeyboardInterrupt:
        print("kvcompile: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `kvcompile ... | head`: nobody reads on; keep the interpreter from flushing into the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


class _UsageError(KvcompileError):
    """The command line is wrong."""


def _run(arguments: list[str]) -> int:
    from typer.main import get_command

    from kvcompile.cli.app import app

    command = get_command(app)
    names = sorted(command.commands)  # type: ignore[attr-defined]
    # Through make_context and invoke, not main(): main() has its own messages and its own way with Ctrl-C.
    try:
        with command.make_context("kvcompile", with_command(arguments, names)) as context:
            command.invoke(context)
    except Exception as error:
        # Typer carries a copy of click or uses the installed one, by release: its exceptions are known by what they have.
        if hasattr(error, "format_message"):
            raise _usage(error) from None
        if hasattr(error, "exit_code"):
            return int(error.exit_code)
        raise
    return DONE


def with_command(arguments: list[str], names: Sequence[str]) -> list[str]:
    """The arguments with `compile` in front where the first word is a spec and not a sub-command."""
    if not arguments:
        return ["--help"]
    first = arguments[0]
    if first in _NOT_A_SPEC or first in names:
        return arguments
    if first.startswith(("-", "builtin:")) or first.endswith((".yaml", ".yml")) or Path(first).exists():
        return ["compile", *arguments]
    near = get_close_matches(first, names, n=1)
    mend = f"Did you mean {near[0]}?" if near else f"Write a spec (model.yaml, builtin:NAME) or a command: {', '.join(names)}."
    raise _UsageError(Problem(first, "no such file or command.", mend))


def _usage(error: Exception) -> _UsageError:
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "kvcompile"
    what = str(error.format_message()) or "not enough arguments"  # type: ignore[attr-defined]
    return _UsageError(Problem(path, what, f"See {path} --help."))
