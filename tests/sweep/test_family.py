"""What a sweep says of one family: each status, and what it compares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import kvcompile
from kvcompile.ir.errors import Problem, UnsupportedGraphError, VerificationError
from kvcompile.sweep import family
from kvcompile.sweep.family import FamilyResult, check_family, one_line


@pytest.mark.slow
def test_a_family_that_works_says_what_was_compiled() -> None:
    found = check_family("gemma2")
    assert (found.status, found.reason) == ("works", "")
    assert found.front_end in ("interface", "sdpa", "eager") and found.sites == 2
    assert {"GQA", "window", "soft cap"} <= set(found.features)
    assert found.full_error is not None and 0 < found.full_error < 1e-4
    assert found.streaming_error is not None and 0 < found.streaming_error < 1e-4
    assert not found.other_mixer and found.lost == ()
    assert FamilyResult.from_dict(found.as_dict()) == found


@pytest.mark.slow
@pytest.mark.parametrize("spoilt", ["full", "streaming"])
def test_a_difference_in_either_comparison_is_wrong(monkeypatch: pytest.MonkeyPatch, spoilt: str) -> None:
    original = family._incremental_logits
    calls: list[str] = []

    def spoil(compiled: Any, ids: torch.Tensor) -> torch.Tensor:
        calls.append("full" if not calls else "streaming")
        return original(compiled, ids) + (1e-3 if calls[-1] == spoilt else 0.0)

    monkeypatch.setattr(family, "_incremental_logits", spoil)
    found = check_family("llama")
    assert calls == ["full", "streaming"]
    assert found.status == "wrong"
    assert found.reason.startswith(f"{spoilt} differs by 1.0e-03 (tolerance 1e-04, noise ")
    assert found.noise is not None and found.noise < 1e-4


@pytest.mark.slow
def test_streaming_is_compared_with_an_oracle_that_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    """An oracle that remembers more must find fault: the tokens reach beyond sink and window."""
    monkeypatch.setattr(family, "STREAMING", family.All())
    found = check_family("llama")
    assert found.status == "wrong" and found.reason.startswith("streaming differs by ")
    assert found.streaming_error is not None and found.streaming_error > 0.1


def _raise(error: Exception) -> Callable[..., Any]:
    def raiser(*arguments: Any, **keywords: Any) -> Any:
        raise error

    return raiser


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (
            UnsupportedGraphError(Problem("check_token_wise: model.layers.0", "scan is not\n  token-wise.", "Wait.")),
            "refused",
            "check_token_wise: model.layers.0: scan is not token-wise.",
        ),
        (VerificationError(Problem("verification", "it differs.", "Report it.")), "wrong", "verification: it differs."),
        (RuntimeError("a view\nof nothing"), "crashed", "RuntimeError: a view of nothing"),
    ],
)
def test_errors_of_a_compile_are_told_apart(monkeypatch: pytest.MonkeyPatch, error: Exception, status: str, reason: str) -> None:
    monkeypatch.setattr(kvcompile, "compile", _raise(error))
    found = check_family("llama")
    assert (found.status, found.reason, found.sites, found.full_error) == (status, reason, 0, None)
    assert found.seconds > 0


def test_what_transformers_does_not_build_is_unbuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family, "build_tiny", _raise(ImportError("it needs a picture library")))
    found = check_family("llama")
    assert (found.status, found.reason) == ("unbuilt", "ImportError: it needs a picture library")


def test_a_family_without_attention_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvcompile, "compile", _raise(AssertionError("compiled")))
    found = check_family("mamba")
    assert (found.status, found.reason) == ("no_attention", "nothing in its eager run is a softmax over tokens")


def test_a_hybrid_is_known_by_what_its_tokens_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvcompile, "compile", _raise(UnsupportedGraphError(Problem("trace", "no.", ""))))
    assert check_family("jamba").other_mixer
    assert not check_family("mixtral").other_mixer


def test_a_difference_that_is_not_finite_is_no_small_one() -> None:
    assert family._distance(torch.tensor([[float("nan"), 1.0]]), torch.zeros(1, 2)) == float("inf")
    assert family._distance(torch.tensor([[0.5, 1.0]]), torch.zeros(1, 2)) == 1.0


def test_an_error_of_several_lines_is_one_line() -> None:
    assert one_line(ValueError("first\n   second")) == "ValueError: first second"
    assert one_line(UnsupportedGraphError(Problem("", "what.", "mend"))) == "what."
