"""Workers of a sweep: order, replacement of those that hang or die, records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sweep_checks

from kvcompile.ir.errors import ModelError
from kvcompile.sweep import run
from kvcompile.sweep.family import FamilyResult
from kvcompile.sweep.run import families, sweep


@pytest.mark.slow
def test_a_worker_that_dies_or_hangs_is_replaced_and_its_family_says_so() -> None:
    names = ["first", "dies", "second", "hangs", "third", "fourth"]
    told: list[tuple[str, int, int]] = []
    found = sweep(
        names,
        timeout_s=2.0,
        check=sweep_checks.check,
        on_result=lambda result, done, total: told.append((result.model_type, done, total)),
    )
    assert [result.model_type for result in found] == names
    assert {result.model_type: result.status for result in found if result.status != "works"} == {"dies": "crashed", "hangs": "crashed"}
    reasons = {result.model_type: result.reason for result in found}
    assert reasons["dies"] == "its process died with exit code 3"
    assert reasons["hangs"] == "it took longer than 2 s"
    assert reasons["third"] == reasons["fourth"] != reasons["second"], "one worker serves many families"
    assert told == [(name, number, 6) for number, name in enumerate(names, 1)]


@pytest.mark.slow
def test_results_keep_the_order_of_the_families_whatever_the_order_of_their_ends() -> None:
    told: list[str] = []
    found = sweep(
        ["late", "a", "b", "c"],
        jobs=2,
        check=sweep_checks.check,
        on_result=lambda result, done, total: told.append(result.model_type),
    )
    assert [result.model_type for result in found] == ["late", "a", "b", "c"]
    assert sorted(told) == ["a", "b", "c", "late"]
    assert len({result.reason for result in found}) <= 2


def test_no_family_needs_no_worker() -> None:
    assert sweep([], check=sweep_checks.never) == []


def test_a_record_of_the_same_code_is_not_checked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "build" / "sweep.jsonl"
    kept = FamilyResult("a", "refused", 1.5, features=("MoE",), reason="trace: because", lost=("Conv",))
    run._Record(path).add(kept)
    assert sweep(["a"], check=sweep_checks.never, record=path) == [kept]
    monkeypatch.setattr(run, "code_key", lambda: "another state of the code")
    assert run._Record(path).results == {}


def test_a_torn_line_of_a_record_is_no_line(tmp_path: Path) -> None:
    path = tmp_path / "sweep.jsonl"
    run._Record(path).add(FamilyResult("a", "works", 1.0))
    path.write_text(path.read_text() + json.dumps({"key": run.code_key(), "result": {"model": 1}}) + '\n{"key": "')
    assert list(run._Record(path).results) == ["a"]


def test_the_code_key_knows_every_layer() -> None:
    import kvcompile

    read = {str(path.relative_to(Path(kvcompile.__file__).parent)) for path in run._sources(Path(kvcompile.__file__).parent)}
    assert {"compiler.py", "passes/trace.py", "runtime/session.py", "codegen/segments.py", "sweep/tiny.py"} <= read


def test_families_are_sorted_and_stand_once_and_all_are_meant_by_none() -> None:
    assert families(["opt", "llama", "opt"]) == ["llama", "opt"]
    assert len(families([])) > 100


def test_an_unknown_family_is_told_its_nearest_spelling() -> None:
    with pytest.raises(ModelError, match=r"(?s)lama: transformers has no causal language model of this type\..*Did you mean llama\?"):
        families(["llama", "lama"])
    with pytest.raises(ModelError, match="Write one of the"):
        families(["zzzzzzzz"])
