"""`prefix:` of a spec: its texts in their order, every spelling of relay, and the text of each mistake."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvcompile.ir.errors import SpecError
from kvcompile.ir.spec import Prefix, SharedText
from kvcompile.spec import load_spec


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "system.txt").write_bytes("Kurz, bitte: één.\r\n".encode())
    (tmp_path / "texts" / "empty.txt").touch()
    (tmp_path / "texts" / "latin.txt").write_bytes(b"na\xefve")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(section: str, overrides: tuple[str, ...] = ()) -> Prefix:
    Path("texts/s.yaml").write_text(f"kvcompile: 1\nprefix: {section}\n", encoding="utf-8")
    return load_spec("texts/s.yaml", overrides=overrides).prefix


def test_a_file_beside_the_spec_is_read_as_it_is() -> None:
    prefix = read("{shared: [{name: system, file: system.txt}]}")
    assert prefix == Prefix("auto", (SharedText("system", "Kurz, bitte: één.\r\n", where="texts/s.yaml:2: prefix.shared[0]"),))
    moved = read("{shared: [{name: system, text: x}]}", ("prefix.shared=[{name: system, file: texts/system.txt}]",))
    assert moved.shared[0].text == prefix.shared[0].text


def test_a_spec_without_prefixes_has_none() -> None:
    assert load_spec({"kvcompile": 1}).prefix == load_spec({"kvcompile": 1, "prefix": {}}).prefix == Prefix("auto", ())


@pytest.mark.parametrize(
    ("written", "read_as"), [("off", "off"), ("auto", "auto"), ("always", "always"), ("'off'", "off"), ("false", "off"), ("False", "off")]
)
def test_every_spelling_of_relay(written: str, read_as: str) -> None:
    """`off` is a text for YAML 1.2, which we read, and false for YAML 1.1, which made the dicts that others give us."""
    assert read(f"{{relay: {written}}}").relay == read_as
    assert read("{}", (f"prefix.relay={written}",)).relay == read_as
    assert load_spec(yaml.safe_load(f"{{kvcompile: 1, prefix: {{relay: {written}}}}}")).prefix.relay == read_as


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_each_stands_behind_the_one_that_it_continues(order: tuple[int, ...]) -> None:
    entries: list[dict[str, Any]] = [
        {"name": "a", "text": "1"},
        {"name": "b", "text": "2", "after": "a", "default": True},
        {"name": "c", "text": "3", "after": "b"},
        {"name": "d", "text": "4", "after": "a"},
    ]
    found = load_spec({"kvcompile": 1, "prefix": {"shared": [entries[place] for place in order]}}).prefix.shared
    names = [each.name for each in found]
    assert sorted(names) == ["a", "b", "c", "d"]
    assert all(each.after is None or names.index(each.after) < names.index(each.name) for each in found)
    assert [each.name for each in found if each.default] == ["b"]


def test_a_chain_may_be_long() -> None:
    entries = [{"name": f"n{number}", "text": "x", **({"after": f"n{number + 1}"} if number < 3000 else {})} for number in range(3001)]
    found = load_spec({"kvcompile": 1, "prefix": {"shared": entries}}).prefix.shared
    assert [found[0].name, found[-1].name] == ["n3000", "n0"]


def shared(*entries: str) -> str:
    return f"{{shared: [{', '.join(f'{{{entry}}}' for entry in entries)}]}}"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("{relay: on}", 's.yaml:2: prefix.relay: "on" is not allowed: one of off, auto, always.\n  Write for example relay: auto.'),
        ("{relay: true}", "s.yaml:2: prefix.relay: true is not allowed: one of off, auto, always."),
        ("{relay: 0}", "s.yaml:2: prefix.relay: 0 is not allowed: one of off, auto, always."),
        ("{relay: allways}", '  Write "always".'),
        ("{relay: [auto]}", "prefix.relay: [auto] is not allowed: one of off, auto, always."),
        ("{shared: []}", "s.yaml:2: prefix.shared: an empty list is not allowed: a list of {name, file or text, after, chat, default}, at"),
        (shared("text: x"), "prefix.shared[0].name: is missing: a name of letters, digits, dots, - and _.\n"),
        (shared("name: a b, text: x"), 'prefix.shared[0].name: "a b" is not allowed: a name of letters, digits, dots, - and _.\n'),
        (shared("name: none, text: x"), 'prefix.shared[0].name: "none" is what sessions without a prefix ask for.\n  Give it another'),
        (shared("name: a, text: x", "name: a, text: y"), 'prefix.shared[1].name: the name "a" is given twice.\n  Give each prefix a name'),
        (shared("name: a"), 'prefix.shared[0]: the prefix "a" has no text.\n  Write file: system.txt, or text: ..., one of them.'),
        (shared("name: a, text: x, file: system.txt"), 'prefix.shared[0]: the prefix "a" has a file and a text.\n'),
        (shared('name: a, text: ""'), 'prefix.shared[0].text: "" is not allowed: a text.'),
        (shared("name: a, file: sytem.txt"), "prefix.shared[0].file: texts/sytem.txt cannot be read: No such file or directory."),
        (shared("name: a, file: ."), "prefix.shared[0].file: texts cannot be read: Is a directory.\n"),
        (shared("name: a, file: empty.txt"), "prefix.shared[0].file: texts/empty.txt is empty.\n  Write the text that sessions start"),
        (shared("name: a, file: latin.txt"), "prefix.shared[0].file: texts/latin.txt is not UTF-8 (byte 2).\n  Convert it to UTF-8."),
        (
            shared("name: abc, text: x", "name: b, text: x, after: abd"),
            '.after: the prefix "abd" does not exist (there are abc, b).\n  Did',
        ),
        (shared("name: abc, text: x", "name: b, text: x, after: z"), "  Name one of them."),
        (shared("name: a, text: x, after: a"), "prefix.shared[0].after: it continues itself and never begins.\n  Take `after` out."),
        (
            shared("name: a, text: x, after: b", "name: b, text: x, after: a", "name: c, text: x, after: a"),
            "prefix.shared[0].after: a, b continue each other: none of them begins.\n  Take one `after` out.",
        ),
        (
            shared("name: a, text: x", "name: b, text: x, after: a, chat: true"),
            "prefix.shared[1].chat: a system message begins a conversation and continues nothing.\n  Take chat or after out.",
        ),
        (
            shared("name: a, text: x, default: true", "name: b, text: x, default: true"),
            'prefix.shared[1].default: "a" is the default already: sessions start behind one of them.\n  Mark one.',
        ),
    ],
)
def test_the_text_of_each_mistake(section: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        read(section)
    assert message in str(caught.value)


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(SpecError) as caught:
        read(shared("name: a", "name: a, file: empty.txt", "name: b, text: x, after: c"))
    assert len(caught.value.problems) == 4
