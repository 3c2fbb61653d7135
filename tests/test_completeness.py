"""Every pass, codegen module and shipped spec has its tests; every refusal of a pass has a test of its text."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from kvcompile.pipeline import PASSES
from kvcompile.spec import bundled_specs, load_spec

TESTS = Path(__file__).parent
ROOT = TESTS.parent
# what the passes are made of: front ends, and checks that need weights
WITHOUT_TEXT = {"rewrite_attention", "recognise_choice", "probe_scores", "probe_segments"}
PARTS = {"trace", "huggingface", "route_densely"} | WITHOUT_TEXT
PASS_FILES = sorted(path for path in (ROOT / "passes").glob("*.py") if path.stem != "__init__")


def test_every_pass_of_the_folder_is_in_the_pipeline():
    assert {path.stem for path in PASS_FILES} - PARTS == {each.name for each in PASSES}


@pytest.mark.parametrize("path", [path for path in PASS_FILES if path.stem not in WITHOUT_TEXT], ids=lambda path: path.stem)
def test_every_pass_has_a_test_file_with_a_golden_text(path):
    tests = TESTS / "passes" / f"test_{path.stem}.py"
    assert tests.exists()
    assert "golden(" in tests.read_text()
    assert list((TESTS / "passes" / "golden").glob(f"{path.stem}*.txt"))


@pytest.mark.parametrize("each", PASSES, ids=lambda each: each.name)
def test_every_pass_is_compared_before_and_after(each):
    """In numbers where it changes the graph, as text where it does not."""
    source = (TESTS / "passes" / f"test_{each.name}.py").read_text()
    assert f'agrees_before_and_after("{each.name}"' in source or "the_graph_is_not_touched" in source


def _phrases(path: Path) -> list[str]:
    """The longest constant piece of each `Problem`'s and `_refuse`'s sentence."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or getattr(node.func, "id", "") not in ("Problem", "_refuse"):
            continue
        what = node.args[1] if node.func.id == "Problem" else node.args[0]
        pieces = [piece.value for piece in ast.walk(what) if isinstance(piece, ast.Constant) and isinstance(piece.value, str)]
        if pieces:
            found.append(max(pieces, key=len).strip(" :.("))
    return found


@pytest.mark.parametrize("path", PASS_FILES, ids=lambda path: path.stem)
def test_every_refusal_of_a_pass_has_a_test_of_its_text(path):
    tested = (TESTS / "passes" / f"test_{path.stem}.py").read_text().replace("\\", "")
    missing = [phrase for phrase in _phrases(path) if not any(part in tested for part in (phrase, phrase.rsplit(" ", 2)[0]))]
    assert not missing


def test_golden_texts_have_no_orphans():
    tests = "".join(path.read_text() for path in (TESTS / "passes").glob("test_*.py"))
    for path in (TESTS / "passes" / "golden").glob("*.txt"):
        name = path.stem
        assert f'golden("{name}"' in tests or f'golden(f"{name.split("_")[0]}_' in tests, name


@pytest.mark.parametrize("name", bundled_specs())
def test_every_shipped_spec_is_read_and_its_model_named(name):
    spec = load_spec(f"builtin:{name}", check_model=False)
    assert spec.model is not None and spec.heads
    tests = "".join(path.read_text() for path in TESTS.rglob("test_*.py"))
    assert f"builtin:{name}" in tests, f"no test runs builtin:{name}"
