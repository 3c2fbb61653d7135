"""Requests a second that a serving loop keeps up with, when all prompts begin with the same text of 2,048 tokens.

    python benchmarks/request_rate.py [--users 16] [--system-tokens 2048] [--rounds 5] [--relay auto]

The loop is examples/serve_loop.py's.  Closed: each of the users asks again as soon as it has its answer, so that the rate is the most that
can be sustained.  Three engines, a round each in turn, in one process: every request reads its whole prompt; a PrefixTree shares what
prompts have in common, relay off; the same with relay on, where the spec knows `prefix.relay`.  All get the same questions (20 to 150
tokens) and give answers of the same length.  A round ends when as many requests as there are users are answered; the first is not counted.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from harness import median, smollm2_spec, write

import kvcompile
from kvcompile.data import text
from kvcompile.ir.errors import SpecError
from kvcompile.runtime.model import CompiledModel
from kvcompile.runtime.prefix_tree import PrefixTree

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from serve_loop import Loop, Request, question


class Users:
    """Users who ask one engine, and what it took; questions depend on the seed and their number alone."""

    def __init__(self, model: CompiledModel, tree: PrefixTree | None, given: argparse.Namespace) -> None:
        self.loop = Loop(model, tree, given.piece_tokens, given.users)
        self.book = model.tokenizer(text())["input_ids"]
        self.given = given
        self.asked = 0
        self.prompt_tokens = self.reused_tokens = 0
        for _ in range(given.users):
            self.ask()

    def ask(self) -> None:
        ids = question(self.book, self.given.system_tokens, random.Random(self.asked))
        self.loop.waiting.append(Request(ids, self.given.new_tokens, self.loop.now))
        self.asked += 1

    def round(self) -> float:
        """Seconds until as many requests as there are users have been answered."""
        started, answered = time.perf_counter(), 0
        while answered < self.given.users:
            for request in self.loop.turn():
                answered += 1
                self.prompt_tokens += len(request.ids)
                self.reused_tokens += request.reused_tokens
                self.ask()
        return time.perf_counter() - started


def compiled(relay: str | None) -> CompiledModel:
    """Raises SpecError where the spec does not know `prefix.relay`."""
    prefix: dict[str, Any] = {} if relay is None else {"prefix": {"relay": relay}}
    model = kvcompile.compile(spec={**smollm2_spec("bfloat16", None), "verify": {"tokens": 16}, **prefix})
    return replace(model, stop_tokens=frozenset())  # every answer has the same length


def engines(given: argparse.Namespace) -> dict[str, Users]:
    try:
        plain, relaying = compiled("off"), compiled(given.relay)
    except SpecError as error:
        print(f"without relay: {error.problems[0].what}")
        plain, relaying = compiled(None), None
    found = {
        "no sharing": Users(plain, None, given),
        "shared prefix": Users(plain, PrefixTree(plain, given.budget), given),
    }
    if relaying is not None:
        found[f"shared prefix, relay {given.relay}"] = Users(relaying, PrefixTree(relaying, given.budget), given)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--system-tokens", type=int, default=2048)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--piece-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", default="1GiB")
    parser.add_argument("--relay", default="auto", choices=["auto", "always"])
    given = parser.parse_args()
    users = engines(given)
    seconds: dict[str, list[float]] = {name: [] for name in users}
    for turn in range(given.rounds + 1):
        for name, each in users.items():
            taken = each.round()
            if turn > 0:
                seconds[name].append(taken)
    rates = {name: given.users / median(taken) for name, taken in seconds.items()}
    result: dict[str, Any] = {}
    for name, each in users.items():
        tree = each.loop.tree
        result[name] = {
            "requests a second": rates[name],
            "times no sharing": rates[name] / rates["no sharing"],
            "seconds a round": seconds[name],
            "prompt tokens reused": each.reused_tokens / each.prompt_tokens,
            "MiB in the tree": tree.nbytes() / 2**20 if tree else 0.0,
        }
        print(
            f"{name:26s} {rates[name]:7.2f} requests a second, {result[name]['times no sharing']:5.2f} times no sharing, "
            f"{result[name]['prompt tokens reused']:4.0%} of prompt tokens reused, {result[name]['MiB in the tree']:7.1f} MiB in the tree"
        )
    asked = {name: getattr(given, name) for name in ("users", "system_tokens", "new_tokens", "piece_tokens", "rounds")}
    write("request_rate", torch.get_num_threads(), {**asked, "engines": result})


if __name__ == "__main__":
    main()
