"""Golden texts: the difference that a pass makes, kept in golden/ and written anew by `pytest --update-golden`."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

import pytest

FOLDER = Path(__file__).with_name("golden")
Golden = Callable[[str, str], None]


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """golden(name, text): fails with the difference unless golden/<name>.txt holds exactly `text`."""

    def check(name: str, text: str) -> None:
        path = FOLDER / f"{name}.txt"
        text = text.rstrip("\n") + "\n"
        if request.config.getoption("--update-golden"):
            path.write_text(text, encoding="utf-8")
            return
        kept = path.read_text(encoding="utf-8") if path.exists() else ""
        if kept != text:
            diff = difflib.unified_diff(kept.splitlines(), text.splitlines(), f"golden/{path.name}", "now", lineterm="")
            pytest.fail("\n".join([*diff, "", "If the change is meant: pytest --update-golden, and read the difference in git."]))

    return check
