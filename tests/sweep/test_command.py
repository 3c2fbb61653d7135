"""`kvcompile sweep`: what it prints and writes, and how it exits."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kvcompile.cli import main, sweeping
from kvcompile.sweep.family import FamilyResult


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """No worker: `llama` works, `opt` is refused, `gpt2` is wrong.  What the sweep was asked for comes back."""
    found: dict[str, Any] = {}
    made = {
        "llama": FamilyResult("llama", "works", 1.0, "interface", 2, ("GQA",), 1e-6, 2e-6),
        "opt": FamilyResult("opt", "refused", 1.0, reason="check_token_wise: layers.0: scan"),
        "gpt2": FamilyResult("gpt2", "wrong", 1.0, "interface", 2, (), 1.0, 2.0, reason="full differs by 1.0e+00"),
    }

    def sweep(names: Sequence[str], **options: Any) -> list[FamilyResult]:
        found.update(options, names=list(names))
        for number, name in enumerate(names, 1):
            options["on_result"](made[name], number, len(names))
        return [made[name] for name in names]

    monkeypatch.setattr(sweeping, "sweep", sweep)
    return found


def test_it_lists_every_family_with_what_was_found(asked: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page, record = tmp_path / "coverage.md", tmp_path / "r.jsonl"
    words = ["sweep", "opt", "llama", "--jobs", "3", "--timeout", "7", "-o", str(page), "--record", str(record)]
    assert main(words) == 0
    assert (asked["names"], asked["jobs"], asked["timeout_s"], asked["record"]) == (["llama", "opt"], 3, 7.0, record)
    out, err = capsys.readouterr()
    lines = [line.split() for line in out.splitlines()]
    assert ["llama", "works", "interface", "2", "GQA", "1.0e-06", "2.0e-06"] in lines
    assert "opt: check_token_wise: layers.0: scan" in out and "2 families: 1 works, 1 refused" in out
    assert "kvcompile: 2 of 2: opt refused (1 s): check_token_wise: layers.0: scan" in err and f"wrote {page}" in err
    assert page.read_text().startswith("# Coverage\n") and "| opt | check_token_wise: layers.0: scan |" in page.read_text()


def test_merging_keeps_the_families_that_were_not_asked_for(
    asked: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    page = tmp_path / "coverage.md"
    assert main(["sweep", "opt", "gpt2", "-o", str(page)]) == 1
    assert main(["sweep", "llama", "gpt2", "-o", str(page), "--merge"]) == 1
    rows = [line.split(" | ")[:2] for line in page.read_text().partition("## Families")[2].partition("\n## ")[0].splitlines()[4:]]
    assert rows == [["| gpt2", "wrong"], ["| llama", "works"], ["| opt", "refused"]]
    assert "| opt | check_token_wise: layers.0: scan |" in page.read_text()
    capsys.readouterr()
    assert main(["sweep", "llama", "--merge", "-o", str(tmp_path / "none.md")]) == 1
    assert "--merge: there is no page to merge with." in capsys.readouterr().err


def test_a_family_that_is_wrong_fails_the_command(asked: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "gpt2", "llama", "--quiet"]) == 1
    assert capsys.readouterr() == ("2 families: 1 works, 1 wrong\n", "")


def test_json_is_one_object(asked: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "llama", "opt", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["totals"]["share"] == 0.5 and found["transformers"]
    assert [(each["model_type"], each["status"]) for each in found["families"]] == [("llama", "works"), ("opt", "refused")]
    assert found["families"][0]["features"] == ["GQA"]


def test_an_unknown_family_is_an_error(asked: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "lama"]) == 1
    assert "Did you mean llama?" in capsys.readouterr().err
    assert asked == {}


def test_help_needs_no_torch() -> None:
    source = (
        "import sys; from kvcompile.cli import main; main(['sweep', '--help']); "
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Exits with 1 when one is wrong or crashed" in done.stdout


@pytest.mark.slow
def test_one_family_from_the_command_to_its_worker(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "kvcompile", "sweep", "mamba", "--json", "--record", str(tmp_path / "r.jsonl")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)["families"]
    assert (found["model_type"], found["status"]) == ("mamba", "no_attention")
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 1
