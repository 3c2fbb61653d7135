"""`--prompt` and `--prompt-file` become a list of texts; `--text` becomes one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from kvcompile.ir.errors import KvcompileError, Problem
from kvcompile.ir.texts import surrogate_problem


def read_prompts(prompt: str | None, prompt_file: str | None) -> list[str]:
    """The texts to continue, none if neither is given.

    With both, each text of the file is followed by `prompt` (the question after the book).  `-` is stdin.  A `.jsonl` file
    holds one prompt a line: a string, or an object with "prompt"; empty lines are skipped.
    """
    if prompt_file is None:
        return [] if prompt is None else [_some(prompt, "--prompt")]
    text = read_text(prompt_file, "--prompt-file")
    texts = _lines(text, prompt_file) if prompt_file.endswith(".jsonl") else [text]
    if not texts:
        raise KvcompileError.at(prompt_file, "it holds no prompt.", "Write one JSON string a line.")
    return [_some(each + (prompt or ""), prompt_file) for each in texts]


def _some(text: str, where: str) -> str:
    if not text:
        raise KvcompileError.at(where, "the prompt is empty.", "Give at least one character.")
    broken = surrogate_problem(text, where)
    if broken is not None:
        raise KvcompileError(broken)
    return text


def read_text(file: str, option: str) -> str:
    """The text of a UTF-8 file, or of stdin for `-`.  option: what named it."""
    try:
        raw = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return raw.decode("utf-8")
    except OSError as error:
        mend = "Name a text file, or - for stdin."
        raise KvcompileError.at(f"{option} {file}", f"cannot be read: {error.strerror}.", mend) from error
    except UnicodeDecodeError as error:
        raise KvcompileError.at(f"{option} {file}", f"is not UTF-8 (byte {error.start}).", "Convert it to UTF-8.") from error


def _lines(text: str, prompt_file: str) -> list[str]:
    texts: list[str] = []
    problems: list[Problem] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict):
            value = value.get("prompt")
        if isinstance(value, str):
            texts.append(value)
            broken = surrogate_problem(value, f"{prompt_file}:{number}")
            problems += [] if broken is None else [broken]
        else:
            problems.append(Problem(f"{prompt_file}:{number}", "is no prompt.", 'Write a JSON string, or an object with "prompt".'))
    if problems:
        raise KvcompileError(*problems)
    return texts
