"""docs/coverage.md: the text, the shares, and that it is the list of the golden file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kvcompile.ir.errors import ModelError
from kvcompile.sweep.coverage import coverage_text, environment, page_results, totals
from kvcompile.sweep.family import STATUSES, FamilyResult
from kvcompile.sweep.tiny import causal_model_types

PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"
FACTS = {"kvcompile": "1.2.3", "transformers": "5.0", "machine": "Linux x86_64"}
RESULTS = [
    FamilyResult("a", "works", 1.0, "interface", 2, ("GQA", "window"), 2e-6, 3.4e-6),
    FamilyResult("b", "works", 1.0, "eager", 2, (), 2e-4, 1e-4, 3e-4, reason="its own float32 is 3.0e-04 from its float64"),
    FamilyResult("c", "works", 1.0, "interface", 1, ("convolution",), 2e-6, 3e-6, other_mixer=True),
    FamilyResult("d", "refused", 1.0, reason="check_token_wise: layers.0: bool[1, s] a | b", lost=("Conv1d",)),
    FamilyResult("e", "refused", 1.0, reason="canonicalise_attention: layers.0.scan: cumsum", other_mixer=True),
    FamilyResult("e2", "refused", 1.0, reason="canonicalise_attention: layers.0: looks ahead", looks_ahead=True),
    FamilyResult("f", "crashed", 1.0, reason="it took longer than 240 s"),
    FamilyResult("mamba2", "no_attention", 1.0, reason="nothing in its eager run is a softmax over tokens"),
    FamilyResult("g", "unbuilt", 1.0, reason="ImportError: pillow"),
]


def test_the_page(golden: Callable[[str, str], None]) -> None:
    golden("page.md", coverage_text(RESULTS, FACTS))


def test_both_shares_are_told() -> None:
    found = totals(RESULTS)
    assert {status: found[status] for status in STATUSES} == {
        "works": 3,
        "refused": 3,
        "wrong": 0,
        "crashed": 1,
        "no_attention": 1,
        "unbuilt": 1,
    }
    assert (found["counted"], found["share"]) == (7, 3 / 7)
    assert (found["counted_attention_only"], found["share_attention_only"]) == (5, 0.6)


def test_nothing_to_count_is_no_division() -> None:
    text = coverage_text([FamilyResult("a", "unbuilt", 0.0, reason="no")], FACTS)
    assert totals([])["share"] is None and "none to count" in text


def test_a_page_is_read_as_it_was_written() -> None:
    page = PAGE.read_text(encoding="utf-8")
    facts = dict(fact.split(" ", 1) for fact in page.splitlines()[4].rstrip(".").split(", "))
    for text, made_in in ((coverage_text(RESULTS, FACTS), FACTS), (page, facts)):
        read = page_results(text, made_in)
        assert coverage_text(read, made_in) == text
        assert totals(read)["share_attention_only"] is not None
    assert page_results(coverage_text(RESULTS, FACTS), FACTS)[4].reason == RESULTS[4].reason


def test_a_page_of_another_environment_is_not_merged() -> None:
    with pytest.raises(ModelError, match=r"--merge: the page is not one of this environment\.\n  Sweep every family, with kvcompile 2, "):
        page_results(coverage_text(RESULTS, FACTS), {**FACTS, "kvcompile": "2"})


def test_a_cell_cannot_break_the_table() -> None:
    row = next(line for line in coverage_text(RESULTS, FACTS).splitlines() if line.startswith("| d | check_token_wise"))
    assert row == "| d | check_token_wise: layers.0: bool[1, s] a &#124; b |"


def test_the_environment_names_what_a_result_depends_on() -> None:
    assert set(environment()) == {"kvcompile", "transformers", "torch", "python", "machine"}


def statuses_of_the_page() -> dict[str, str]:
    """{model type: status} of the table of families."""
    text = PAGE.read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.partition("## Families")[2].partition("\n## ")[0].splitlines()]
    return {row[0]: row[1] for row in rows if len(row) > 1 and row[1] in STATUSES}


def test_the_page_of_the_project_is_the_golden_list(golden: Callable[[str, str], None]) -> None:
    """`kvcompile sweep -o docs/coverage.md`, then `pytest --update-golden` and a look at the difference."""
    golden("coverage.json", json.dumps(statuses_of_the_page(), indent=0))


def test_the_page_of_the_project_names_every_family_and_none_is_wrong() -> None:
    found = statuses_of_the_page()
    from transformers import __version__

    if f"transformers {__version__}," in PAGE.read_text(encoding="utf-8"):
        assert sorted(found) == causal_model_types()
    assert [name for name, status in found.items() if status in ("wrong", "crashed")] == []


@pytest.mark.parametrize("status", STATUSES)
def test_every_exclusion_is_listed_with_its_reason(status: str) -> None:
    lists = PAGE.read_text(encoding="utf-8").partition("## Families")[2].partition("\n## ")[2]
    for name, found in statuses_of_the_page().items():
        if found == status != "works":
            assert any(line.startswith(f"| {name} | ") and line != f"| {name} |  |" for line in lists.splitlines()), name
