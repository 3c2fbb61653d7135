"""What `kvcompile sweep` does once its options are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvcompile.cli.files import write_new
from kvcompile.cli.output import Output
from kvcompile.ir.errors import ModelError
from kvcompile.report import Table
from kvcompile.sweep.coverage import coverage_text, environment, page_results, totals
from kvcompile.sweep.family import STATUSES, FamilyResult
from kvcompile.sweep.run import families, sweep

_FAILED = ("wrong", "crashed")


def run_sweep(
    asked: Sequence[str], *, jobs: int, timeout_s: float, file: Path | None, merge: bool, record: Path | None, output: Output
) -> bool:
    """Whether no family is wrong and none crashed.  merge: families that are not asked for stay as the page `file` has them."""
    model_types, facts = families(asked), environment()
    kept = page_results(_page(file), facts) if merge else []
    output.progress(f"{len(model_types)} families")

    def told(result: FamilyResult, done: int, total: int) -> None:
        output.progress(f"{done} of {total}: {result.model_type} {result.status} ({result.seconds:.0f} s){_because(result)}")

    results = sweep(model_types, jobs=jobs, timeout_s=timeout_s, on_result=told, record=record)
    results = sorted([*results, *(each for each in kept if each.model_type not in model_types)], key=lambda each: each.model_type)
    numbers = totals(results)
    if file is not None:
        write_new(file, coverage_text(results, facts), force=True)
    if not output.quiet:
        output.table(_table(results))
        for result in results:
            if result.reason:
                output.say(f"{result.model_type}: {result.reason}")
    counted = ", ".join(f"{numbers[status]} {status.replace('_', ' ')}" for status in STATUSES if numbers[status])
    output.say(f"{numbers['families']} families: {counted}")
    if file is not None:
        output.aside(f"wrote {file}")
    output.finish({**facts, "totals": numbers, "families": [result.as_dict() for result in results]})
    return not any(result.status in _FAILED for result in results)


def _page(file: Path | None) -> str:
    if file is None or not file.exists():
        raise ModelError.at("--merge", "there is no page to merge with.", "Name it: -o docs/coverage.md.")
    return file.read_text(encoding="utf-8")


def _because(result: FamilyResult) -> str:
    return f": {result.reason[:100]}" if result.reason else ""


def _table(results: Sequence[FamilyResult]) -> Table:
    rows = tuple(
        (
            result.model_type,
            result.status,
            result.front_end,
            str(result.sites or ""),
            ", ".join(result.features),
            "" if result.full_error is None else f"{result.full_error:.1e}",
            "" if result.streaming_error is None else f"{result.streaming_error:.1e}",
        )
        for result in results
    )
    return Table(("model type", "status", "front end", "sites", "features", "full", "streaming"), rows, right=frozenset({3}))
