import math

import pytest

from kvcompile.ir.errors import SpecError
from kvcompile.spec.loader import parse_yaml, read_yaml


def value(text):
    document = parse_yaml(text, "x.yaml")
    assert not document.problems
    return document.value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3:20", "3:20"),
        ("NO", "NO"),
        ("yes", "yes"),
        ("on", "on"),
        ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"),
        ("=", "="),
        ("1e-3", 1e-3),
        ("1.5E+2", 150.0),
        (".5", 0.5),
        ("0x10", 16),
        ("0o17", 15),
        ("017", 17),
        ("-12", -12),
        ("true", True),
        ("TRUE", True),
        ("tRUE", "tRUE"),
        ("~", None),
        ("null", None),
        ("-.inf", -math.inf),
        ("'12'", "12"),
        ("!!str 12", "12"),
        ("75%", "75%"),
    ],
)
def test_scalars_follow_the_core_schema_of_yaml_1_2(text, expected):
    found = value(f"[{text}]")[0]
    assert found == expected
    assert type(found) is type(expected)


def test_every_value_remembers_its_line():
    document = parse_yaml("a: 1\nheads:\n  - {policy: full}\n  - policy: x\n    layers: 3\n", "d/x.yaml")
    assert document.lines["heads[1].layers"] == "d/x.yaml:5"
    assert document.where("heads[1].layers") == "d/x.yaml:5: heads[1].layers"
    assert document.where("heads[0].share") == "d/x.yaml:3: heads[0].share"


def test_an_equal_key_is_refused_with_both_lines():
    document = parse_yaml("a: 1\nb:\n  c: 1\n  c: 2\n", "x.yaml")
    assert [str(problem) for problem in document.problems] == ["x.yaml:4: b.c: the key stands here and in line 3.\n  Keep one of them."]


def test_a_key_without_a_value_and_a_merge_key_are_refused():
    document = parse_yaml("a:\nb: &x {c: 1}\nd: {<<: *x}\n1: 2\n", "x.yaml")
    assert [str(problem) for problem in document.problems] == [
        "x.yaml:1: a: has no value.\n  Write one, or take the line out.",
        "x.yaml:3: merge keys (<<) are not part of YAML 1.2.\n  Write the keys out.",
        "x.yaml:4: the key 1 is not text.\n  Write it in quotes.",
    ]


def test_an_alias_stands_for_a_copy_of_its_anchor():
    first, second = value("[&a {b: [1]}, *a]")
    assert first == second
    assert first is not second


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1, 2\nb: 3\n", "x.yaml:2: YAML syntax: "),
        ("a:\n\tb: 1\n", "x.yaml:2: a tab stands where YAML wants spaces.\n  Indent with spaces."),
        ("a: *nobody\n", "x.yaml:1: YAML syntax: found undefined alias 'nobody'."),
        ("a: 1\n---\nb: 2\n", "x.yaml:2: YAML syntax: "),
        ("a: !!python/object/apply:os.system [ls]\n", "x.yaml:1: the tag !!python/object/apply:os.system is not allowed."),
        ("a: !!int x\n", "x.yaml:1: 'x' cannot be read as !!int."),
        ("a: !mine 1\n", "x.yaml:1: the tag !mine is not allowed."),
        ("ok: 1\na: \x07\n", "x.yaml:2: the character U+0007 is not allowed in YAML."),
        ("a: &a [*a]\n", "is nested deeper than 64 levels."),
        ("[" * 5000, "nested deeper than 64 levels"),
        ("a: " + "9" * 5000, "cannot be read as !!int."),
        ("".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10) if n else 1}]\n" for n in range(9)), "holds more than 200000 values"),
    ],
)
def test_what_is_not_harmless_yaml_is_refused_with_its_line(text, message):
    with pytest.raises(SpecError) as caught:
        parse_yaml(text, "x.yaml")
    assert message in str(caught.value)


def test_files_that_are_no_text_are_refused(tmp_path):
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"a: 1\nb: caf\xe9\n")
    with pytest.raises(SpecError, match=r"latin.yaml:2: byte 0xe9 is not UTF-8 text.\n  Save the file as UTF-8"):
        read_yaml(latin)
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * (5 << 20))
    with pytest.raises(SpecError, match=r"large.yaml: is larger than 4 MiB; a spec is a small YAML file."):
        read_yaml(large)
    with pytest.raises(SpecError, match=r"is a folder; a spec is a YAML file\."):
        read_yaml(tmp_path)
    with pytest.raises(SpecError, match=r"none.yaml: does not exist."):
        read_yaml(tmp_path / "none.yaml")


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    file = tmp_path / "bom.yaml"
    file.write_bytes(b"\xef\xbb\xbfkvcompile: 1\n")
    assert read_yaml(file).value == {"kvcompile": 1}
