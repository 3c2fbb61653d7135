"""docs/coverage.md: what a sweep found, as people read it."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from kvcompile.ir.errors import ModelError
from kvcompile.sweep.family import COUNTED, STATUSES, STREAMING, TOKENS, TOLERANCE, FamilyResult, Status
from kvcompile.sweep.overrides import OVERRIDES

_MEANING: dict[Status, str] = {
    "works": "prefill and single steps equal the original, streaming equals the float64 oracle",
    "refused": "an error names the node and the reason; nothing was compiled",
    "wrong": "it compiled and differs, and kvcompile's own verification or this sweep says so",
    "crashed": "kvcompile raised an error that is none of its own, took too long, or its process died",
    "no_attention": "its eager run holds no softmax over tokens: there is no KV cache to compile",
    "unbuilt": "transformers builds or runs no such model from token ids",
}
# titles of sections, and what a title says of its families behind the status
_NOISY, _LOST = "Works within its own noise", "Tiny models that lack module classes of the real one"
_MIXERS, _AHEAD = "tokens meet outside of attention as well", "a token's logits change with the tokens behind it"


def environment() -> dict[str, str]:
    """What a sweep's result depends on, beside the code."""
    import kvcompile

    return {
        "kvcompile": kvcompile.__version__,
        "transformers": version("transformers"),
        "torch": version("torch"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }


def totals(results: Sequence[FamilyResult]) -> dict[str, Any]:
    """Numbers of families by status; `share`: of all that attend, `share_attention_only`: of those that are causal and have no other
    token mixer.

    Shares are of 0 to 1, None where there is nothing to divide by.  A family that works counts in both, whatever else it holds.
    """
    counts = Counter(result.status for result in results)
    counted = [result for result in results if result.status in COUNTED]
    attention_only = [result for result in counted if not (result.other_mixer or result.looks_ahead) or result.status == "works"]
    works = counts["works"]
    return {
        "families": len(results),
        **{status: counts[status] for status in STATUSES},
        "counted": len(counted),
        "counted_attention_only": len(attention_only),
        "share": works / len(counted) if counted else None,
        "share_attention_only": works / len(attention_only) if attention_only else None,
    }


def coverage_text(results: Sequence[FamilyResult], facts: Mapping[str, str]) -> str:
    """The whole document.  facts: `environment()`."""
    numbers = totals(results)
    lines = [
        "# Coverage",
        "",
        "Written by `kvcompile sweep -o docs/coverage.md`; not by hand.",
        "",
        _facts_line(facts),
        "",
        f"Of each causal language model of transformers a tiny random model is built from its configuration class, compiled (attention in "
        f"torch and eager segments: what is proved is that the graph was understood; tests/ hold the generated kernels against the same "
        f"oracle), and read {TOKENS} tokens long, prefill in chunks and then token by token: with policy `full` against the eager "
        f"original, with {STREAMING.describe()} tokens (`streaming`) against a float64 oracle. Errors are the largest absolute "
        f"difference of a logit in float32; up to {TOLERANCE:.0e} works, and in proportion less where a model scales its logits "
        f"down to a deviation below 1.",
        "",
        *_table(("status", "families", "meaning"), ((status, str(numbers[status]), _MEANING[status]) for status in STATUSES)),
        "",
        f"- Of the {numbers['counted']} that hold a softmax over tokens, {numbers['works']} work: {_percent(numbers['share'])}.",
        f"- Without those in which tokens also meet elsewhere (a recurrence, a convolution), or know what stands behind them (they are "
        f"not causal), and which are refused, {numbers['works']} of {numbers['counted_attention_only']}: "
        f"{_percent(numbers['share_attention_only'])}.",
        "",
        "## Families",
        "",
        *_table(
            ("model type", "status", "front end", "sites", "features", "full", "streaming"),
            (
                (
                    result.model_type,
                    result.status,
                    result.front_end,
                    str(result.sites or ""),
                    ", ".join(result.features),
                    _error(result.full_error),
                    _error(result.streaming_error),
                )
                for result in results
            ),
        ),
    ]
    for status in ("wrong", "crashed", "refused", "unbuilt", "no_attention"):
        lines += _excluded(status, [result for result in results if result.status == status])
    noisy = [result for result in results if result.status == "works" and result.reason]
    lines += _section(_NOISY, ("model type", "noise"), ((result.model_type, result.reason) for result in noisy))
    lost = [result for result in results if result.lost]
    lines += _section(
        _LOST,
        ("model type", "classes"),
        ((result.model_type, ", ".join(result.lost)) for result in lost),
    )
    told = [name for name in OVERRIDES if name in {result.model_type for result in results}]
    lines += _section(
        "Fields that the configuration class does not tell",
        ("model type", "fields", "reason"),
        ((name, ", ".join(f"{field}={value}" for field, value in OVERRIDES[name][0].items()), OVERRIDES[name][1]) for name in told),
    )
    return "\n".join(lines) + "\n"


def page_results(text: str, facts: Mapping[str, str]) -> list[FamilyResult]:
    """What a coverage page says of each family, errors rounded as it writes them.  facts: `environment()`, which must be the page's.

    Raises ModelError where the page is of another environment, or none.
    """
    if _facts_line(facts) not in text.splitlines():
        raise ModelError.at("--merge", "the page is not one of this environment.", f"Sweep every family, with {_facts_line(facts)}")
    sections = dict(map(_rows_of, text.split("\n## ")[1:]))
    reasons: dict[str, str] = {}
    marks: dict[str, str] = {}
    for title, rows in sections.items():
        for row in rows if title.partition(":")[0].lower().replace(" ", "_") in STATUSES else []:
            reasons[row[0]], marks[row[0]] = row[1], title.partition(": ")[2]
    reasons |= dict(sections.get(_NOISY, ()))
    lost = {row[0]: tuple(row[1].split(", ")) for row in sections.get(_LOST, ())}
    return [
        FamilyResult(
            model_type=name,
            status=status,  # type: ignore[arg-type]
            seconds=0.0,
            front_end=front_end,
            sites=int(sites or 0),
            features=tuple(features.split(", ")) if features else (),
            full_error=float(full) if full else None,
            streaming_error=float(streaming) if streaming else None,
            other_mixer=marks.get(name) == _MIXERS,
            looks_ahead=marks.get(name) == _AHEAD,
            reason=reasons.get(name, ""),
            lost=lost.get(name, ()),
        )
        for name, status, front_end, sites, features, full, streaming in sections.get("Families", ())
    ]


def _rows_of(section: str) -> tuple[str, list[list[str]]]:
    """A section's title and the rows of its table, as they were before they were written."""
    title, _, body = section.partition("\n")
    lines = [line for line in body.splitlines() if line.startswith("| ")][2:]
    cells = [line.removeprefix("|").removesuffix("|").split("|") for line in lines]
    return title, [[cell.strip().replace("&#124;", "|").replace("&lt;", "<") for cell in row] for row in cells]


def _facts_line(facts: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items()) + "."


def _excluded(status: Status, results: Sequence[FamilyResult]) -> list[str]:
    """A status' families with the node and the reason of each; apart those with another mixer, and those that look ahead."""
    title = status.replace("_", " ").capitalize()
    mixers = [result for result in results if result.other_mixer]
    ahead = [result for result in results if result.looks_ahead and not result.other_mixer]
    attention_only = [result for result in results if not (result.other_mixer or result.looks_ahead)]
    return [
        *_section(title, ("model type", "reason"), ((result.model_type, result.reason) for result in attention_only)),
        *_section(
            f"{title}: {_MIXERS}",
            ("model type", "reason"),
            ((result.model_type, result.reason) for result in mixers),
        ),
        *_section(
            f"{title}: {_AHEAD}",
            ("model type", "reason"),
            ((result.model_type, result.reason) for result in ahead),
        ),
    ]


def _section(title: str, header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Nothing where there is no row."""
    listed = list(rows)
    return ["", f"## {title}", "", *_table(header, listed)] if listed else []


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cell.replace('|', '&#124;').replace('<', '&lt;') for cell in cells)} |"

    return [line(header), line("---" for _ in header), *map(line, rows)]


def _percent(share: float | None) -> str:
    return "none to count" if share is None else f"{share:.1%}"


def _error(error: float | None) -> str:
    return "" if error is None else f"{error:.1e}"
