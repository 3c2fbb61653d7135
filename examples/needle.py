"""Reads a 6000-token text with a code planted 2000 tokens before its end, under three policies, and asks for the code.

    python examples/needle.py specs/smollm2-duo.yaml

The spec's own split, policy full, and streaming on every KV head run on the same compiled segments; only the sessions'
memory differs.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

import kvcompile
from kvcompile.compiler import make_plan
from kvcompile.data import text
from kvcompile.ir.spec import HeadRule, Spec
from kvcompile.report import Table, format_bytes
from kvcompile.runtime.model import CompiledModel

PLACE, CODE = "orchard", "60494"
NEEDLE = f"\n\nThe secret code for {PLACE} is {CODE}. Remember it. {CODE} is the secret code for {PLACE}.\n\n"
QUESTION = f"\n\nThe secret code for {PLACE} is"
ANSWER_TOKENS = 32


@dataclass(frozen=True)
class Result:
    policy: str
    answer: str
    stored_bytes: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float

    @property
    def right(self) -> bool:
        return CODE in self.answer


def haystack(tokenizer: object, tokens: int, distance: int) -> list[int]:
    """Token ids [tokens]: the carried text with the needle `distance` tokens before the end, the question last."""
    encode = lambda part: tokenizer(part)["input_ids"]  # type: ignore[operator]  # noqa: E731
    book, needle, question = encode(text()), encode(NEEDLE), encode(QUESTION)
    before = tokens - distance
    after = distance - len(needle) - len(question)
    return [*book[:before], *needle, *book[before : before + after], *question]


def ask(model: CompiledModel, policy: str, ids: list[int]) -> Result:
    print(f"reading {len(ids)} tokens under {policy}", file=sys.stderr, flush=True)
    made = model.complete(ids, max_new_tokens=ANSWER_TOKENS)
    return Result(policy, made.text, made.stored_bytes, len(ids) / made.prefill_s, made.decode_tokens_per_s)


def everywhere(spec: Spec, policy: str) -> Spec:
    """The spec with one policy for every KV head."""
    from dataclasses import replace

    return replace(spec, heads=(HeadRule(policy),))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("spec", nargs="?", default="specs/smollm2-duo.yaml")
    parser.add_argument("--tokens", type=int, default=6000, help="length of the text, question included")
    parser.add_argument("--distance", type=int, default=2000, help="tokens from the planted code to the end")
    given = parser.parse_args()
    spec = kvcompile.load_spec(given.spec)
    model = kvcompile.compile(spec=spec, progress=lambda line: print(line, file=sys.stderr, flush=True))
    print(model.explain(), end="\n\n")
    ids = haystack(model.tokenizer, given.tokens, given.distance)
    streaming = make_plan(everywhere(spec, "streaming"))
    results = [
        ask(model, "this spec", ids),
        ask(model.with_plan(make_plan(everywhere(spec, "full"))), "full", ids),
        ask(model.with_plan(streaming), "streaming on every head", ids),
    ]
    rows = tuple(
        (
            r.policy,
            "right" if r.right else "wrong",
            " ".join(r.answer.split())[:44],
            format_bytes(r.stored_bytes),
            f"{r.prefill_tokens_per_s:.0f}",
            f"{r.decode_tokens_per_s:.1f}",
        )
        for r in results
    )
    header = ("policy", "answer", "text after the question", "memory", "read tokens/s", "new tokens/s")
    print(Table(header, rows, f"{len(ids)} tokens, the code {CODE} planted {given.distance} before the end", frozenset({3, 4, 5})).text())
    if [r.right for r in results] != [True, True, False]:
        raise SystemExit("expected: right, right, wrong (streaming on every head cannot know the code)")


if __name__ == "__main__":
    try:
        main()
    except kvcompile.KvcompileError as error:
        raise SystemExit(str(error)) from None
