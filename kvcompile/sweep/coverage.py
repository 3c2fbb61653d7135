"""docs/coverage.md: what a sweep found, as people read it."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

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
    """Numbers of families by status; `share`: of all that attend, `share_attention_only`: of those without another token mixer.

    Shares are of 0 to 1, None where there is nothing to divide by.  A family that works counts in both, whatever else it holds.
    """
    counts = Counter(result.status for result in results)
    counted = [result for result in results if result.status in COUNTED]
    attention_only = [result for result in counted if not result.other_mixer or result.status == "works"]
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
        ", ".join(f"{name} {value}" for name, value in facts.items()) + ".",
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
        f"- Without those in which tokens also meet elsewhere (a recurrence, a convolution) and which are refused for it, "
        f"{numbers['works']} of {numbers['counted_attention_only']}: {_percent(numbers['share_attention_only'])}.",
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
    lines += _section("Works within its own noise", ("model type", "noise"), ((result.model_type, result.reason) for result in noisy))
    lost = [result for result in results if result.lost]
    lines += _section(
        "Tiny models that lack module classes of the real one",
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


def _excluded(status: Status, results: Sequence[FamilyResult]) -> list[str]:
    """A status' families with the node and the reason of each; those with another mixer apart."""
    title = status.replace("_", " ").capitalize()
    mixers = [result for result in results if result.other_mixer]
    attention_only = [result for result in results if not result.other_mixer]
    return [
        *_section(title, ("model type", "reason"), ((result.model_type, result.reason) for result in attention_only)),
        *_section(
            f"{title}: tokens meet outside of attention as well",
            ("model type", "reason"),
            ((result.model_type, result.reason) for result in mixers),
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
