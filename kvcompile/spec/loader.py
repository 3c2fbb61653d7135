"""YAML text -> plain values, each remembering its line.

Plain PyYAML reads YAML 1.1: `3:20` is 200, `NO` is False, `1_000` is 1000, `1e-3` is text, `2024-01-01` is a date, and the last of two
equal keys wins.  Here scalars follow the core schema of YAML 1.2 (section 10.3.2), equal keys are refused, and a file is bounded in size,
depth and number of values, so that a few hundred bytes of aliases cannot become gigabytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from kvcompile.ir.errors import Problem, SpecError

SIZE_LIMIT_BYTES = 4 << 20
VALUE_LIMIT = 200_000
DEPTH_LIMIT = 64

_TAG = "tag:yaml.org,2002:"
_CORE = {
    "null": re.compile(r"~|null|Null|NULL|"),
    "bool": re.compile(r"true|True|TRUE|false|False|FALSE"),
    "int": re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"),
    "float": re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
}


class _CoreLoader(yaml.SafeLoader):
    """PyYAML's scanner and parser with the plain scalars of YAML 1.2."""


_CoreLoader.yaml_implicit_resolvers = {}
for _kind, _pattern in _CORE.items():
    _CoreLoader.add_implicit_resolver(f"{_TAG}{_kind}", re.compile(rf"(?:{_pattern.pattern})\Z"), None)


@dataclass
class Document:
    """Plain values and where they stand.

    lines: dotted path of each value ("heads[2].kv_heads") to its place ("specs/duo.yaml:14").
    problems: what was wrong and could be left out: an equal key, a key without a value.
    """

    value: object
    source: str
    lines: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def where(self, path: str) -> str:
        """`specs/duo.yaml:14: heads[2]`; the line of the nearest parent when the value itself is missing."""
        if not path:
            return self.source
        nearest = path
        while nearest and nearest not in self.lines:
            nearest = parent(nearest)
        return f"{self.lines.get(nearest, self.source)}: {path}"


def parent(path: str) -> str:
    """heads[2].kv_heads -> heads[2] -> heads -> ''."""
    return path[: max(path.rfind("."), path.rfind("["), 0)]


def child(path: str, key: str | int) -> str:
    if isinstance(key, int):
        return f"{path}[{key}]"
    return f"{path}.{key}" if path else key


def read_yaml(path: str | Path, what: str = "a spec") -> Document:
    """Reads a file; every failure is a SpecError with the file's name."""
    path = Path(path)
    if path.is_dir():
        raise SpecError.at(str(path), f"is a folder; {what} is a YAML file.", "Name a file in it.")
    try:
        with path.open("rb") as file:
            raw = file.read(SIZE_LIMIT_BYTES + 1)
    except FileNotFoundError:
        raise SpecError.at(str(path), "does not exist.", "Check the spelling and the folder.") from None
    except (OSError, ValueError) as error:
        raise SpecError.at(str(path), f"cannot be read: {getattr(error, 'strerror', None) or error}.", "Check its permissions.") from None
    if len(raw) > SIZE_LIMIT_BYTES:
        raise SpecError.at(
            str(path), f"is larger than {SIZE_LIMIT_BYTES >> 20} MiB; {what} is a small YAML file.", "Is this the right file?"
        )
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise SpecError.at(
            f"{path}:{line}", f"byte 0x{raw[error.start]:02x} is not UTF-8 text.", "Save the file as UTF-8, or name the right file."
        ) from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, source: str) -> Document:
    """Text -> Document.  Raises SpecError when the text is not YAML; smaller faults are in `problems`."""
    try:
        loader = _CoreLoader(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        raise SpecError(_syntax_problem(error, source)) from None
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise SpecError.at(
            f"{source}:{line}", f"the character U+{ord(text[error.position]):04X} is not allowed in YAML.", "Remove it."
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        raise SpecError.at(source, f"is not YAML: {error}.", "Correct the file.") from None
    except RecursionError:
        raise _too_deep(source) from None
    document = Document(None, source)
    if node is not None:
        document.value = _Builder(document).build(node, "", 0)
    return document


def parse_value(text: str, source: str) -> object:
    """One value, as `--set a.b=text` gives it."""
    document = parse_yaml(text, source)
    if document.problems:
        raise SpecError(*document.problems)
    return document.value


def from_mapping(value: Mapping[str, object]) -> Document:
    """A spec given as a dict: tuples become lists, paths text; a key whose value is None is left out."""
    document = Document(None, "<spec>")

    def plain(item: object, path: str, depth: int) -> object:
        if depth > DEPTH_LIMIT:
            raise _too_deep("<spec>")
        if isinstance(item, Mapping):
            for key in item:
                if not isinstance(key, str):
                    document.problems.append(Problem(document.where(path), f"the key {key!r} is not text.", "Write keys as text."))
            kept = {key: sub for key, sub in item.items() if isinstance(key, str) and (sub is not None or key == "all")}
            return {key: plain(sub, child(path, key), depth + 1) for key, sub in kept.items()}
        if isinstance(item, list | tuple):
            return [plain(sub, child(path, index), depth + 1) for index, sub in enumerate(item)]
        return str(item) if isinstance(item, Path) else item

    document.value = plain(value, "", 0)
    return document


class _Builder:
    """Nodes -> values, with bounds.  An alias is followed like its anchor and counts each time."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.values = 0

    def build(self, node: yaml.Node, path: str, depth: int) -> object:
        place = f"{self.document.source}:{node.start_mark.line + 1}"
        self.document.lines.setdefault(path, place)
        self.values += 1
        if self.values > VALUE_LIMIT:
            raise SpecError.at(place, f"holds more than {VALUE_LIMIT} values once its aliases are followed.", "Write fewer aliases.")
        if depth > DEPTH_LIMIT:
            raise _too_deep(place)
        if not node.tag.startswith(_TAG) or node.tag[len(_TAG) :] not in {*_CORE, "str", "seq", "map"}:
            raise SpecError.at(place, f"the tag {node.tag.replace(_TAG, '!!')} is not allowed.", "Write the plain value without a tag.")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, depth)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, child(path, index), depth + 1) for index, item in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)
        return self._scalar(node, place)

    def _mapping(self, node: yaml.MappingNode, path: str, depth: int) -> dict[str, object]:
        result: dict[str, object] = {}
        first_line: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            place = f"{self.document.source}:{line}"
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is None or key_node.tag != f"{_TAG}str":
                self._problem(place, f"the key {'of this line' if key is None else key} is not text.", "Write it in quotes.")
            elif key == "<<":
                self._problem(place, "merge keys (<<) are not part of YAML 1.2.", "Write the keys out.")
            elif key in result:
                self._problem(f"{place}: {child(path, key)}", f"the key stands here and in line {first_line[key]}.", "Keep one of them.")
            else:
                self.document.lines[child(path, key)] = place
                first_line[key] = line
                value = self.build(value_node, child(path, key), depth + 1)
                if value is None and key != "all":
                    self._problem(f"{place}: {child(path, key)}", "has no value.", "Write one, or take the line out.")
                else:
                    result[key] = value
        return result

    def _scalar(self, node: yaml.ScalarNode, place: str) -> object:
        kind, text = node.tag[len(_TAG) :], str(node.value)
        if kind == "str":
            return text
        if kind not in _CORE or not _CORE[kind].fullmatch(text) or len(text) > 100:
            raise SpecError.at(place, f"{text[:40]!r} cannot be read as !!{kind}.", "Write the plain value without a tag.")
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind == "int":
            return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))

    def _problem(self, where: str, what: str, mend: str) -> None:
        self.document.problems.append(Problem(where, what, mend))


def _too_deep(place: str) -> SpecError:
    return SpecError.at(place, f"is nested deeper than {DEPTH_LIMIT} levels.", "Write it flatter; an alias may not contain itself.")


def _syntax_problem(error: yaml.MarkedYAMLError, source: str) -> Problem:
    mark = error.problem_mark or error.context_mark
    where = f"{source}:{mark.line + 1}" if mark else source
    said = error.problem or "this is not YAML"
    if "'\\t'" in said:
        return Problem(where, "a tab stands where YAML wants spaces.", "Indent with spaces.")
    context = f" ({error.context}, line {error.context_mark.line + 1})" if error.context and error.context_mark else ""
    return Problem(where, f"YAML syntax: {said}{context}.", "Correct the line, or the one before it.")
