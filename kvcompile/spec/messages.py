"""pydantic's errors -> our Problems: where it stands, what was found, what is allowed, the nearest spelling."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from kvcompile.ir.errors import Problem
from kvcompile.spec.loader import Document, child
from kvcompile.spec.schema import Form, SpecForm, ZoneKind


def nearest(word: str, allowed: Iterable[str]) -> str | None:
    """The allowed word that `word` was most likely meant to be."""
    allowed = list(allowed)
    begun = [name for name in allowed if len(word) > 2 and name.startswith(word)]
    return next(iter(difflib.get_close_matches(word, allowed, n=1, cutoff=0.6) or begun), None)


def shown(value: object) -> str:
    """A value as a message names it: text in quotes, long ones cut."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list) and value and all(isinstance(item, str | int | float) for item in value):
        text = f"[{', '.join(str(item) for item in value)}]"
    elif isinstance(value, dict | list):
        kind = "a mapping" if isinstance(value, dict) else "a list"
        return f"{kind} of {len(value)}" if value else f"an empty {kind[2:]}"
    else:
        text = f'"{value}"' if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def translate(error: ValidationError, document: Document) -> list[Problem]:
    """One Problem for each place that is wrong."""
    problems: dict[str, Problem] = {}
    for detail in error.errors(include_url=False):
        path = dotted(detail["loc"])
        problems.setdefault(path, _problem(path, detail["loc"], detail["type"], detail.get("input"), detail.get("ctx", {}), document))
    return list(problems.values())


def dotted(location: Sequence[str | int]) -> str:
    path = ""
    for step in location:
        path = child(path, step)
    return path


def _problem(path: str, location: Sequence[str | int], kind: str, found: object, context: dict[str, Any], document: Document) -> Problem:
    where = document.where(path) if path else document.source
    if kind == "kvcompile":
        return Problem(where, f"{context['what']}.", context["mend"])
    form, info = _look_up(location)
    if kind == "extra_forbidden":
        return _unknown_key(where, str(location[-1]), form)
    if info is None:
        return Problem(where, f"{shown(found)} is not a mapping.", "Write keys and values, `kvcompile: 1` first.")
    inner = form_of(info.annotation)
    if inner is not None and kind in ("model_type", "dict_type") and not _names_a_field(location, kind):
        return Problem(where, f"{shown(found)} is not allowed: a mapping of {', '.join(inner.model_fields)}.", "Write keys and values.")
    example = f"Write for example {_yaml(location, info)}."
    if kind == "missing":
        return Problem(where, f"is missing: {info.description}.", example)
    near = nearest(found, _choices(info.annotation)) if isinstance(found, str) else None
    return Problem(where, f"{shown(found)} is not allowed: {info.description}.", f'Write "{near}".' if near else example)


def _names_a_field(location: Sequence[str | int], kind: str) -> bool:
    """Whether the mapping that was expected is the one of names to policies itself, not one policy."""
    return kind == "dict_type" and list(location) == ["policies"]


def _unknown_key(where: str, key: str, form: type[Form] | None) -> Problem:
    assert form is not None
    allowed = list(form.model_fields)
    what = f'zone kind "{key}" does not exist' if form is ZoneKind else f'the key "{key}" does not exist here'
    near = nearest(key, allowed)
    return Problem(where, f"{what} (there are {', '.join(allowed)}).", f'Did you mean "{near}"?' if near else "Take it out.")


def _yaml(location: Sequence[str | int], info: FieldInfo) -> str:
    """The field with an example, as it stands in a file: `device: cpu`."""
    name = next((step for step in reversed(location) if isinstance(step, str)), "")
    example = (info.examples or [""])[0]
    return f"{name}: {str(example).lower() if isinstance(example, bool) else example}"


def _look_up(location: Sequence[str | int]) -> tuple[type[Form] | None, FieldInfo | None]:
    """The form that holds the last key of a location, and its field if it has one of that name."""
    form: type[Form] | None = SpecForm
    info: FieldInfo | None = None
    inside_names = False
    for step in location:
        if isinstance(step, int):
            continue
        if inside_names:  # a policy's own name: any is allowed
            inside_names = False
            continue
        if form is None:
            break
        info = form.model_fields.get(step)
        if info is None:
            return form, None
        last, form = form, form_of(info.annotation)
        inside_names = _is_named(info.annotation)
        if step == location[-1]:
            return last, info
    return form, info


def _is_named(annotation: Any) -> bool:
    return get_origin(annotation) is dict


def form_of(annotation: Any) -> type[Form] | None:
    """The Form inside an annotation: `list[Annotated[ZoneKind, ...]] | None` -> ZoneKind."""
    if isinstance(annotation, type) and issubclass(annotation, Form):
        return annotation
    if get_origin(annotation) in (Annotated, Union, types.UnionType, list, dict):
        return next((form for form in map(form_of, get_args(annotation)) if form is not None), None)
    return None


def _choices(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [choice for choice in get_args(annotation) if isinstance(choice, str)]
    return [choice for part in get_args(annotation) for choice in _choices(part)]
