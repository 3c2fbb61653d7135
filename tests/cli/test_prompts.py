"""`--prompt` and `--prompt-file`."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvcompile.cli.prompts import read_prompts
from kvcompile.ir.errors import KvcompileError


def test_no_prompt_is_no_text() -> None:
    assert read_prompts(None, None) == []
    assert read_prompts("Once", None) == ["Once"]


def test_the_question_follows_the_book(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("A book.\n")
    assert read_prompts("Who?", str(tmp_path / "book.txt")) == ["A book.\nWho?"]


def test_jsonl_holds_one_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    path.write_text('"one"\n\n{"prompt": "two", "id": 3}\n"line\u2028separator"\n', encoding="utf-8")
    assert read_prompts(None, str(path)) == ["one", "two", "line\u2028separator"]
    assert read_prompts("!", str(path))[0] == "one!"


def test_every_wrong_line_of_jsonl_is_named(tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    path.write_text('"one"\nplain\n{"text": "x"}\n3\n')
    with pytest.raises(KvcompileError) as caught:
        read_prompts(None, str(path))
    assert [problem.where for problem in caught.value.problems] == [f"{path}:{line}" for line in (2, 3, 4)]
    assert str(caught.value.problems[0]).endswith(': is no prompt.\n  Write a JSON string, or an object with "prompt".')


def test_half_a_character_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "cut.jsonl"
    path.write_text('"one"\n"caf\\ud83d ok"\n')
    with pytest.raises(KvcompileError) as caught:
        read_prompts(None, str(path))
    told = f"{path}:2: character 3 is half of a character (a surrogate, U+D83D).\n  Write the whole character, or leave it out."
    assert str(caught.value) == told
    with pytest.raises(KvcompileError, match=r"^--prompt: character 1 is half of a character"):
        read_prompts("a\udcff", None)


def test_an_empty_prompt_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(KvcompileError, match=r"--prompt: the prompt is empty\.\n  Give at least one character\."):
        read_prompts("", None)
    with pytest.raises(KvcompileError, match=r"empty: the prompt is empty\."):
        read_prompts(None, str(tmp_path / "empty"))
    with pytest.raises(KvcompileError, match=r"empty\.jsonl: it holds no prompt\.\n  Write one JSON string a line\."):
        read_prompts(None, str(tmp_path / "empty.jsonl"))


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(KvcompileError, match=r"latin: is not UTF-8 \(byte 3\)\.\n  Convert it to UTF-8\."):
        read_prompts(None, str(tmp_path / "latin"))
    with pytest.raises(KvcompileError, match=r"nothing: cannot be read: No such file or directory\.\n  Name a text file, or - for stdin\."):
        read_prompts(None, str(tmp_path / "nothing"))
