"""`--set heads[1].share=50%`: one value of the spec, replaced."""

from __future__ import annotations

import re
from collections.abc import Sequence

from kvcompile.ir.errors import Problem, SpecError
from kvcompile.spec.loader import Document, child, parse_value

_STEP = re.compile(r"([^.\[\]=\s]+)((?:\[[0-9]{1,6}\])*)")


def apply_overrides(document: Document, overrides: Sequence[str]) -> list[Problem]:
    """Changes the document's values and lines in place; what cannot be applied is returned, all of it."""
    problems: list[Problem] = []
    for override in overrides:
        where = f"--set {override}"
        name, equals, text = override.partition("=")
        steps = _steps(name.strip())
        if not equals or steps is None:
            problems.append(Problem(where, "is not of the form a.b=value.", "Write for example --set heads[1].share=50%."))
            continue
        try:
            value = parse_value(text, where)
        except SpecError as error:
            problems.extend(error.problems)
            continue
        problem = _put(document, steps, value, where)
        if problem is not None:
            problems.append(problem)
    return problems


def _steps(name: str) -> list[str | int] | None:
    steps: list[str | int] = []
    for part in name.split("."):
        match = _STEP.fullmatch(part)
        if match is None:
            return None
        steps.append(match[1])
        steps.extend(int(index) for index in re.findall(r"[0-9]+", match[2]))
    return steps


def _put(document: Document, steps: list[str | int], value: object, where: str) -> Problem | None:
    """Walks to the value's parent, making mappings that are missing.  An empty value takes the key out."""
    if document.value is None:
        document.value = {}
    here, path = document.value, ""
    for position, step in enumerate(steps):
        last = position == len(steps) - 1
        if isinstance(step, int):
            if not isinstance(here, list) or step >= len(here):
                count = f"has {len(here)} entries, counted from 0" if isinstance(here, list) else "is not a list"
                return Problem(where, f"{child(path, step)} does not exist: {path} {count}.", "Change an entry that exists.")
            if last:
                here[step] = value
            here = here[step]
        elif not isinstance(here, dict):
            return Problem(where, f"{path or 'the spec'} is not a mapping and has no {step}.", f"Replace {path or 'the spec'} as a whole.")
        else:
            if last and value is None:
                here.pop(step, None)
            elif last:
                here[step] = value
            else:
                here.setdefault(step, [] if isinstance(steps[position + 1], int) else {})
            here = here.get(step)
        path = child(path, step)
    for line in [line for line in document.lines if line.startswith((f"{path}.", f"{path}["))]:
        del document.lines[line]
    document.lines[path] = where
    return None
