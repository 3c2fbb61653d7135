"""What `kvcompile recall` does once its options are read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvcompile.cli.output import Output
from kvcompile.cli.prompts import read_text
from kvcompile.ir.errors import KvcompileError, SpecError
from kvcompile.ir.spec import Output as Written
from kvcompile.ir.spec import Spec


@dataclass(frozen=True)
class Question:
    """text: a file, or - for stdin.  tokens: at most so many of it; None: as many as the model was made for.  queries: which are asked.

    folder: where recall.json, recall.txt and recall.svg are written; None: nowhere.
    """

    spec: Spec
    text: str
    queries: str
    tokens: int | None = None
    folder: Path | None = None


def run_recall(question: Question, output: Output) -> None:
    """Compiles, reads the text, measures, prints and writes."""
    spec, where = question.spec, f"--text {question.text}"
    policies = [spec.policies[name] for name in dict.fromkeys(rule.policy for rule in spec.heads)]
    if not any(policy.looked_up for policy in policies):
        what = "no rule names a policy with a top_k, clusters or sample zone, so that there is nothing to look up."
        mend = "Name one in heads, for example {sink_recent: ...} with {top_k: {k: 1%, index: sketch, tail: true}} as its zones."
        raise SpecError.at(spec.where("heads"), what, mend)
    text = read_text(question.text, "--text")
    from kvcompile.compiler import compile
    from kvcompile.models.load import open_model
    from kvcompile.recall import check_text, measure_recall
    from kvcompile.report import as_json, write_files

    tokenizer: Any = None
    if spec.model is not None:  # before the compile: who gave a wrong text should not wait
        tokenizer = open_model(spec.model, output.progress).tokenizer()
        if tokenizer is None:
            raise KvcompileError.at(spec.where("model"), "the model comes without a tokenizer, so no text can be read.", _TOKENIZER_MEND)
        check_text(policies, len(_ids(tokenizer, text, question.tokens)), where)
    model = compile(spec=replace(spec, output=Written()), tokenizer=tokenizer, progress=output.progress)
    most = [limit for limit in (question.tokens or model.plan.context_tokens, model.plan.position_rows) if limit is not None]
    ids = _ids(tokenizer, text, min(most, default=None))
    import torch

    found = measure_recall(model, torch.tensor(ids), where, output.progress)
    if not output.quiet:
        output.table(found.table())
    for line in found.lines():
        output.say(line)
    value = {"spec": spec.source, "model": model.name, "text": question.text, "query_kind": question.queries, **found.as_dict()}
    if question.folder is not None:
        shown = f"{spec.source}: {model.name}, {question.text}\n\n{found.table().text()}\n\n" + "\n".join(found.lines()) + "\n"
        contents = {"recall.json": as_json(value), "recall.txt": shown, "recall.svg": found.picture()}
        written = [str(path) for path in write_files(question.folder, contents)]
        output.aside(f"wrote {', '.join(written)}")
        value["written"] = written
    output.finish(value)


_TOKENIZER_MEND = "Put the tokenizer's files beside the model's, or let the factory give (module, tokenizer)."


def _ids(tokenizer: Any, text: str, most: int | None) -> list[int]:
    found: list[int] = list(tokenizer(text)["input_ids"])
    return found[:most]
