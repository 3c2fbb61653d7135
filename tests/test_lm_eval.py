"""lm-eval's own HFLM on `as_transformers()`: examples/lm_eval_local.py's task with a random model that reads bytes."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import toys
from test_torch_backend import loud_llama
from test_transformers_model import SHORT_RING, compiled

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield importlib.import_module("lm_eval_local")


def test_questions_have_one_right_answer_each_time_in_another_place(example: ModuleType) -> None:
    from kvcompile.data import text

    words = " ".join(text().split())
    made = example.questions(40)
    assert len(made) == 40 and made == example.questions(40)
    for number, question in enumerate(made):
        assert question["answer"] == number % 4 and len(set(question["choices"])) == 4
        goes_on = [f"{question['passage']} {choice}" in words for choice in question["choices"]]
        assert goes_on == [place == question["answer"] for place in range(4)]
        assert len(question["passage"].split()) == 80


@pytest.mark.needs_package
def test_hflm_gives_the_originals_score(example: ModuleType) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is installed by whoever runs the example")
    original: Any = loud_llama()
    tokenizer = toys.byte_tokenizer()
    want = example.score(original, tokenizer, 8, 4)
    found = example.score(compiled(original), tokenizer, 8, 4)
    assert (found.accuracy, found.normalised) == (want.accuracy, want.normalised)
    assert max(abs(one - two) for one, two in zip(found.likelihoods, want.likelihoods, strict=True)) < 1e-2
    streaming = example.score(compiled(original, SHORT_RING), tokenizer, 8, 4)
    assert max(abs(one - two) for one, two in zip(streaming.likelihoods, want.likelihoods, strict=True)) > 0.1
