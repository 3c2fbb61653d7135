"""`prefix:` -> the texts that sessions start behind, each after the one that it continues, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from kvcompile.ir.errors import Problem
from kvcompile.ir.spec import Prefix, SharedText
from kvcompile.spec.messages import nearest
from kvcompile.spec.schema import PrefixForm, SharedForm

NONE = "none"  # on the command line: no prefix
LARGEST_FILE_BYTES = 64 << 20


def read_prefix(form: PrefixForm, where: Callable[[str], str], folder: Callable[[str], Path]) -> tuple[Prefix, list[Problem]]:
    """where: the place of a value for a message; folder: where a value's relative path starts.

    With problems, what is at fault is left out.
    """
    problems: list[Problem] = []
    shared = form.shared or []
    names: dict[str, int] = {}
    for number, entry in enumerate(shared):
        place = where(f"prefix.shared[{number}].name")
        if entry.name == NONE:
            problems.append(Problem(place, f'"{NONE}" is what sessions without a prefix ask for.', "Give it another name."))
        elif entry.name in names:
            problems.append(Problem(place, f'the name "{entry.name}" is given twice.', "Give each prefix a name of its own."))
        names.setdefault(entry.name, number)
    texts: dict[str, SharedText] = {}
    for number, entry in enumerate(shared):
        path = f"prefix.shared[{number}]"
        text, wrong = _text(entry, path, where, folder)
        wrong += _continued(entry, path, names, where)
        problems += wrong
        if text is not None and not wrong:
            texts.setdefault(entry.name, SharedText(entry.name, text, entry.after, entry.chat, entry.default, where(path)))
    for circle in _circles(shared):
        several = len(circle) > 1
        what = f"{', '.join(circle)} continue each other: none of them begins." if several else "it continues itself and never begins."
        mend = "Take one `after` out." if several else "Take `after` out."
        problems.append(Problem(where(f"prefix.shared[{names[circle[0]]}].after"), what, mend))
    marked = [number for number, entry in enumerate(shared) if entry.default]
    if len(marked) > 1:
        what = f'"{shared[marked[0]].name}" is the default already: sessions start behind one of them.'
        problems.append(Problem(where(f"prefix.shared[{marked[1]}].default"), what, "Mark one."))
    return Prefix(form.relay, () if problems else _in_order(texts)), problems


def _text(entry: SharedForm, path: str, where: Callable[[str], str], folder: Callable[[str], Path]) -> tuple[str | None, list[Problem]]:
    if (entry.file is None) == (entry.text is None):
        what = f'the prefix "{entry.name}" has {"no text" if entry.file is None else "a file and a text"}.'
        return None, [Problem(where(path), what, "Write file: system.txt, or text: ..., one of them.")]
    if entry.file is None:
        return entry.text, []
    file = folder(f"{path}.file") / Path(entry.file).expanduser()
    place = where(f"{path}.file")
    try:
        if file.stat().st_size > LARGEST_FILE_BYTES:
            return None, [Problem(place, f"{file} is larger than {LARGEST_FILE_BYTES >> 20} MiB.", "Name a smaller text.")]
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return None, [Problem(place, f"{file} is not UTF-8 (byte {error.start}).", "Convert it to UTF-8.")]
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        return None, [Problem(place, f"{file} cannot be read: {reason}.", "Name a text file; paths start at the spec's folder.")]
    return text or None, [] if text else [Problem(place, f"{file} is empty.", "Write the text that sessions start behind.")]


def _continued(entry: SharedForm, path: str, names: Mapping[str, int], where: Callable[[str], str]) -> list[Problem]:
    """What is wrong with `after`, circles apart."""
    if entry.after is None:
        return []
    place = where(f"{path}.after")
    if entry.after not in names:
        near = nearest(entry.after, names)
        mend = f'Did you mean "{near}"?' if near else "Name one of them."
        return [Problem(place, f'the prefix "{entry.after}" does not exist (there are {", ".join(names)}).', mend)]
    if entry.chat:
        what = "a system message begins a conversation and continues nothing."
        return [Problem(where(f"{path}.chat"), what, "Take chat or after out.")]
    return []


def _circles(shared: Sequence[SharedForm]) -> list[list[str]]:
    """Names of prefixes that continue each other, each circle once."""
    after = {entry.name: entry.after for entry in shared}
    seen: set[str] = set()
    circles: list[list[str]] = []
    for name in after:
        chain: dict[str, None] = {}
        here: str | None = name
        while here is not None and here in after and here not in seen:
            seen.add(here)
            chain[here] = None
            here = after[here]
        if here in chain:
            names = list(chain)
            circles.append(names[names.index(here) :])
    return circles


def _in_order(texts: Mapping[str, SharedText]) -> tuple[SharedText, ...]:
    """Each behind the one that it continues, otherwise as written."""
    ordered: dict[str, SharedText] = {}

    for entry in texts.values():
        chain: list[SharedText] = []
        here: SharedText | None = entry
        while here is not None and here.name not in ordered:
            chain.append(here)
            here = None if here.after is None else texts[here.after]
        ordered.update((each.name, each) for each in reversed(chain))
    return tuple(ordered.values())
