"""Pattern files: scores of a model's KV heads.  Ours is YAML; a DuoAttention folder (TSV + config.json) is read too.

Published DuoAttention files hold values from -1.4e-3 to 1.0, and one had another model's number of layers: values within 1e-2 of
[0, 1] are clipped, anything else is refused, and shapes are compared with the model (`check_pattern`).
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvcompile.ir.errors import Problem, SpecError
from kvcompile.ir.spec import Pattern
from kvcompile.models.header import ModelHeader
from kvcompile.spec.loader import SIZE_LIMIT_BYTES, Document, read_yaml

CLIP_TOLERANCE = 1e-2
DUO_SCORES = "full_attention_heads.tsv"
_KEYS = ("kvcompile_pattern", "model", "model_hash", "method", "seed", "layers", "kv_heads", "scores")
_TYPES: dict[str, type] = {"layers": int, "kv_heads": int, "seed": int, "model": str, "model_hash": str, "method": str, "scores": list}
_REQUIRED = ("kvcompile_pattern", "layers", "kv_heads", "scores")


def read_pattern(path: str | Path) -> Pattern:
    """A pattern file or a DuoAttention folder.  Raises SpecError with every problem found."""
    path = Path(path)
    if path.is_dir():
        return _read_duo(path)
    if path.suffix == ".tsv" and path.exists():
        raise SpecError.at(str(path), "is the table of a DuoAttention pattern.", f"Name its folder: {path.parent}.")
    document = read_yaml(path, "a pattern")
    problems = [*document.problems, *_key_problems(document)]
    if problems:
        raise SpecError(*problems)
    content = document.value
    assert isinstance(content, dict)
    layers, kv_heads = content["layers"], content["kv_heads"]
    scores = _checked(content["scores"], layers, kv_heads, document)
    return Pattern(
        path=str(path),
        scores=scores,
        method=content.get("method", ""),
        seed=content.get("seed"),
        model_hash=content.get("model_hash"),
    )


def check_pattern(pattern: Pattern, header: ModelHeader | None, where: str) -> Iterator[Problem]:
    """Compares a pattern with the model that it will be used with; unknown facts are not compared."""
    if header is None:
        return
    other = f"it was made for another model than {header.path}"
    if pattern.model_hash is not None and header.hash is not None and pattern.model_hash != header.hash:
        what = f"{pattern.path} is for the wrong model: its model_hash is {pattern.model_hash}, the model's is {header.hash}."
        yield Problem(where, what, "Make a pattern for this model, or take its model_hash out if you know better.")
    if header.layers is not None and len(pattern.scores) != header.layers:
        what = f"{pattern.path} has {_plural(len(pattern.scores), 'layer')}, the model has {header.layers}: {other}."
        yield Problem(where, what, "Name the pattern of this model.")
    elif header.kv_heads is not None:
        for layer, (row, kv_heads) in enumerate(zip(pattern.scores, header.kv_heads, strict=True)):
            if len(row) != kv_heads:
                what = f"{pattern.path} has {_plural(len(row), 'KV head')} in layers.{layer}, the model has {kv_heads}: {other}."
                yield Problem(where, what, "Name the pattern of this model.")
                break


def write_pattern(
    path: str | Path,
    *,
    model: str,
    scores: Sequence[Sequence[float]],
    model_hash: str | None = None,
    method: str = "",
    seed: int | None = None,
) -> None:
    """Writes a pattern file, whole or not at all.  scores [layers][kv_heads] in [0, 1]; high means retrieval head."""
    path = Path(path)
    head: dict[str, object] = {"kvcompile_pattern": 1, "model": model, "model_hash": model_hash, "method": method or None, "seed": seed}
    lines = ["# Scores of KV heads, one row a layer: high is a retrieval head, low a streaming head."]
    lines += [f"{key}: {json.dumps(value)}" for key, value in head.items() if value is not None]
    lines += [f"layers: {len(scores)}", f"kv_heads: {len(scores[0])}", "scores:"]
    lines += [f"  - [{', '.join(repr(round(float(score), 6)) for score in row)}]" for row in scores]
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _key_problems(document: Document) -> Iterator[Problem]:
    content = document.value
    if not isinstance(content, dict):
        yield Problem(document.source, "is not a pattern: it is not a mapping.", f"Write the keys {', '.join(_REQUIRED)}.")
        return
    for key in content:
        if key not in _KEYS:
            yield Problem(document.where(key), f'the key "{key}" does not exist here (there are {", ".join(_KEYS)}).', "Take it out.")
    for key in _REQUIRED:
        if key not in content and key not in document.lines:
            yield Problem(document.source, f"{key} is missing.", f"A pattern has the keys {', '.join(_REQUIRED)}.")
    if type(content.get("kvcompile_pattern", 1)) is not int or content.get("kvcompile_pattern", 1) != 1:
        yield Problem(document.where("kvcompile_pattern"), "only version 1 of pattern files is known.", "Write kvcompile_pattern: 1.")
    for key, allowed in _TYPES.items():
        value = content.get(key)
        if value is not None and (not isinstance(value, allowed) or isinstance(value, bool)):
            words = {int: "a whole number", str: "text", list: "a list of lists of numbers"}[allowed]
            yield Problem(document.where(key), f"{value!r} is not allowed: {words}.", f"Write {words}.")


def _checked(rows: object, layers: int, kv_heads: int, document: Document) -> tuple[tuple[float, ...], ...]:
    """Shape and values; raises SpecError with every row and value that is wrong."""
    assert isinstance(rows, list)
    problems: list[Problem] = []
    if len(rows) != layers or not rows:
        what = f"{_plural(len(rows), 'row')} for {_plural(layers, 'layer')}."
        problems.append(Problem(document.where("scores"), what, "Write one row for each layer."))
    for layer, row in enumerate(rows):
        where = document.where(f"scores[{layer}]")
        if not isinstance(row, list) or len(row) != kv_heads or not row:
            found = _plural(len(row), "value") if isinstance(row, list) else repr(row)
            problems.append(Problem(where, f"{found} for {_plural(kv_heads, 'KV head')}.", "Write one number for each KV head."))
            continue
        for kv_head, value in enumerate(row):
            fault = _fault(value)
            if fault:
                problems.append(Problem(document.where(f"scores[{layer}][{kv_head}]"), fault, "Scores are numbers from 0 to 1."))
    if problems:
        raise SpecError(*problems)
    return tuple(tuple(min(1.0, max(0.0, float(value))) for value in row) for row in rows)


def _fault(value: object) -> str | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"{value!r} is not a number."
    if not math.isfinite(value):
        return f"the score is {value}, not a finite number."
    if not -CLIP_TOLERANCE <= value <= 1 + CLIP_TOLERANCE:
        return f"the score {value:g} is outside of 0 to 1 by more than {CLIP_TOLERANCE:g}."
    return None


def _read_duo(folder: Path) -> Pattern:
    """A folder with full_attention_heads.tsv and config.json, or one that holds such a folder and no other."""
    if not (folder / DUO_SCORES).is_file():
        below = sorted(table.parent for table in folder.glob(f"*/{DUO_SCORES}"))
        if len(below) != 1:
            what = f"{len(below)} folders in it have one" if below else "it is not there"
            raise SpecError.at(str(folder), f"a DuoAttention pattern has a {DUO_SCORES}; {what}.", "Name the folder that holds the table.")
        folder = below[0]
    table = folder / DUO_SCORES
    document = Document(None, str(table))
    rows: list[list[object]] = []
    for number, line in enumerate(_read_text(table).splitlines(), 1):
        if line.strip():
            document.lines[f"scores[{len(rows)}]"] = f"{table}:{number}"
            rows.append([_number(word) for word in line.split()])
    scores = _checked(rows, len(rows), len(rows[0]) if rows else 1, document)
    config = folder / "config.json"
    sizes = _duo_sizes(config) if config.exists() else (None, None)
    return Pattern(path=str(folder), scores=scores, method="duo_attention", sink_tokens=sizes[0], recent_tokens=sizes[1])


def _duo_sizes(config: Path) -> tuple[int | None, int | None]:
    try:
        content = json.loads(_read_text(config))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise SpecError.at(str(config), "is not a JSON object.", "Copy it again from the pattern's source.")
    sizes = content.get("sink_size"), content.get("recent_size")
    for name, size, least in zip(("sink_size", "recent_size"), sizes, (0, 1), strict=True):
        if size is not None and (type(size) is not int or size < least):
            raise SpecError.at(f"{config}: {name}", f"{size!r} is not allowed: a number of tokens from {least}.", "Correct the file.")
    return sizes


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(SIZE_LIMIT_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise SpecError.at(str(path), "is not UTF-8 text.", "Copy it again from the pattern's source.") from None
    except OSError as error:
        raise SpecError.at(str(path), f"cannot be read: {error.strerror}.", "Check its permissions.") from None


def _number(word: str) -> object:
    try:
        return float(word)
    except ValueError:
        return word


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
