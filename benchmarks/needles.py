"""Needles: does a policy find, in a long text, the one line that answers?

    python benchmarks/needles.py [--models smollm2,gemma] [--needles 300]

Contexts of Python's documentation hold lines "The secret code for WORD is DIGITS." (five random digits, words of their own) at even
distances; all other lines are distractors.  Behind the context stands the beginning of one line, word by word as it was, and the digits
are scored as the model goes on: exact (every digit is the most likely token) and their cross-entropy (nats a digit, the right digits
fed).  The context is read as a prompt; the question and the digits are read as generated tokens, one at a time, so that heads of the
policy look up.  Every policy is asked the same questions.  What is read counts at the layers that look keys up (Gemma: its 3 global
ones), for the last token of each question: window, codes, means and chosen rows.
"""

from __future__ import annotations

import argparse
import math
import pydoc_data.topics
import random
import re
from dataclasses import dataclass
from typing import Any

import torch
from harness import SMOLLM2, earlier, write
from real_keys import gemma_path

import kvcompile
from kvcompile.runtime.lookup import LookupStore
from kvcompile.runtime.model import CompiledModel
from kvcompile.runtime.session import Session

DIGITS = 5
SEED = 3


@dataclass(frozen=True)
class Trial:
    """context tokens, needles of each context, and zones by the name of a policy."""

    model: str
    tokens: int
    needles_per_context: int
    zones: dict[str, tuple[dict[str, Any], ...]]


def _zones(recent: int, k: int, bytes_per_key: int, tail: bool) -> tuple[dict[str, Any], ...]:
    index = {"sketch": {"bytes_per_key": bytes_per_key, "scanned": 1.0}}  # in so short a text every key may be looked at
    top_k = {"k": k, "index": index, "select": "sum", "tail": tail}
    return {"sink_recent": {"sink_tokens": 4, "recent_tokens": recent}}, {"top_k": top_k}


TRIALS = {
    "smollm2": Trial(SMOLLM2, 2048, 20, {"lookup": _zones(4, 60, 12, False), "lookup, k = 90": _zones(4, 90, 12, False)}),
    "gemma": Trial("", 8192, 60, {"lookup": _zones(60, 400, 32, False), "lookup with a tail": _zones(60, 330, 32, True)}),
}


def haystack() -> tuple[list[str], list[str]]:
    """Sentences of the text, and words for needles."""
    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    words = sorted(set(re.findall(r"\b[a-z]{5,8}\b", text)))
    return [sentence.strip() for sentence in re.split(r"(?<=[.:])\s+", text) if len(sentence.strip()) > 20], words


def context_of(trial: Trial, tokenizer: Any, number: int) -> tuple[list[int], list[tuple[str, str]]]:
    """Ids of one context, and its needles as (beginning of the line, digits)."""
    sentences, words = haystack()
    draw = random.Random(SEED * 1000 + number)
    chosen = draw.sample(words, trial.needles_per_context)
    needles = [(f"The secret code for {word} is", "".join(draw.choices("0123456789", k=DIGITS))) for word in chosen]
    lines = [f"{begin} {digits}." for begin, digits in needles]
    budget = trial.tokens - sum(len(ids_of(tokenizer, "\n" + line)) for line in lines) - 16
    at, hay = draw.randrange(len(sentences) // 2), []
    while budget > 0:
        budget -= len(ids_of(tokenizer, " " + sentences[at]))
        hay.append(sentences[at])
        at += 1
    parts = [hay[len(hay) * place // len(lines) : len(hay) * (place + 1) // len(lines)] for place in range(len(lines))]
    text = "".join(f"{' '.join(part)}\n{line}\n" for part, line in zip(parts, lines, strict=True))
    start = ids_of(tokenizer, "", special=True)
    return (start + ids_of(tokenizer, text))[: trial.tokens], needles


def ids_of(tokenizer: Any, text: str, special: bool = False) -> list[int]:
    """Token ids, without what the tokenizer puts in front; special: only that."""
    whole = list(tokenizer(text)["input_ids"]) if callable(tokenizer) else list(tokenizer.encode(text).ids)
    front = list(tokenizer("")["input_ids"]) if callable(tokenizer) else list(tokenizer.encode("").ids)
    return front if special else whole[len(front) :]


def read_share(model: CompiledModel, session: Session) -> float:
    """Bytes that the session's last token read at the sites that look keys up, of what full attention reads there."""
    read = full = 0.0
    for place, site in enumerate(model.plan.sites):
        facts = site.site
        for store in session.stores(place):
            if isinstance(store, LookupStore):
                assert store.index is not None and store.zone.select in ("sum", "max")  # so that k rows are read, no more
                row = store.rows.kv_heads * (facts.head_dim + facts.value_dim) * 2
                exact = store.tokens - (store.index.end - store.index.first) + store.zone.tokens(store.tokens)
                read += exact * row + store.index.scanned_bytes(store.zone.tail, store.zone.tokens(store.tokens))
                full += store.tokens * row
    return read / full if full else 1.0


def ask(model: CompiledModel, trial: Trial, contexts: int) -> tuple[list[tuple[bool, float]], float]:
    """(every digit right, mean cross-entropy of a digit in nats) of each needle, and the mean share of the cache that was read."""
    found, shares = [], []
    for number in range(contexts):
        ids, needles = context_of(trial, model.tokenizer, number)
        session = model.session()
        session.prefill(ids)
        newline, *_ = ids_of(model.tokenizer, "\n")
        session.step(newline)  # the first generated token makes the indexes, once for all forks
        questions = []
        for begin, digits in needles:
            question, whole = ids_of(model.tokenizer, begin), ids_of(model.tokenizer, f"{begin} {digits}")
            assert whole[: len(question)] == question, (question, whole)
            questions.append((session.fork(), whole, len(question)))
        logits: list[list[torch.Tensor]] = [[] for _ in questions]
        for place in range(max(len(whole) for _, whole, _ in questions) - 1):
            here = [number for number, (_, whole, _) in enumerate(questions) if place < len(whole) - 1]
            answered = model.step([questions[number][0] for number in here], [questions[number][1][place] for number in here])
            for number, row in zip(here, answered, strict=True):
                logits[number].append(row)
        shares += [read_share(model, session) for session, _, _ in questions]
        for (_, whole, question), rows in zip(questions, logits, strict=True):
            wanted = torch.tensor(whole[question:])
            scored = torch.stack(rows[question - 1 :])
            loss = torch.nn.functional.cross_entropy(scored, wanted)
            found.append((bool((scored.argmax(1) == wanted).all()), float(loss)))
    return found, sum(shares) / len(shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="smollm2,gemma")
    parser.add_argument("--needles", type=int, default=300)
    options = parser.parse_args()
    results: dict[str, Any] = {}
    for name in options.models.split(","):
        trial = TRIALS[name]
        path = trial.model or gemma_path()
        contexts = math.ceil(options.needles / trial.needles_per_context)
        rows: dict[str, Any] = {}
        base: dict[str, Any] = {"kvcompile": 1, "model": {"path": path, "dtype": "bfloat16"}, "verify": {"tokens": 16}}
        for policy in ("full", *trial.zones):
            chosen = {} if policy == "full" else {"policies": {"mine": {"zones": list(trial.zones[policy])}}, "heads": [{"policy": "mine"}]}
            model = kvcompile.compile(spec=base | chosen)
            found, read = ask(model, trial, contexts)
            rows[policy] = {
                "needles": len(found),
                "accuracy": sum(right for right, _ in found) / len(found),
                "digit cross-entropy": sum(loss for _, loss in found) / len(found),
                "read of the cache": read,
            }
            print(
                f"{name} {trial.tokens} tokens  {policy:18s} {len(found)} needles  accuracy {rows[policy]['accuracy']:.3f}  "
                f"digit cross-entropy {rows[policy]['digit cross-entropy']:.3f}  reads {100 * read:.1f}% of the cache",
                flush=True,
            )
        results[name] = {"tokens": trial.tokens, "zones": trial.zones, **rows}
    write("needles", torch.get_num_threads(), earlier("needles") | results)


if __name__ == "__main__":
    main()
