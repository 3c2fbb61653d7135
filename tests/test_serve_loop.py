"""The serving loop of examples/: every answer is the one that its prompt gets alone, and what prompts share is read once."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path

import pytest
import toys
from units import some_ids

import kvcompile
from kvcompile.runtime.model import CompiledModel

BOOK = some_ids(800, 256).tolist()


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).parents[1] / "examples" / "serve_loop.py"
    spec = importlib.util.spec_from_file_location("serve_loop", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["serve_loop"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["serve_loop"]


@pytest.fixture(scope="module")
def model():
    spec = {"kvcompile": 1, "verify": {"tokens": 16}, "target": {"segments": "eager", "kernels": "torch"}}
    return kvcompile.compile(toys.llama(layers=2), spec=spec)


def requests(example, count: int) -> list:
    """One comes every third turn."""
    draw = random.Random(1)
    return [example.Request(example.question(BOOK, 200, draw), draw.randint(1, 12), 3 * number) for number in range(count)]


def served(loop, asked) -> list:
    """In the order of leaving."""
    left, coming = [], list(asked)
    while len(left) < len(asked):
        while coming and coming[0].came <= loop.now:
            loop.waiting.append(coming.pop(0))
        left += loop.turn()
    return left


@pytest.mark.parametrize("shared", [True, False])
def test_every_answer_is_the_one_that_its_prompt_gets_alone(example, model, shared):
    tree = kvcompile.PrefixTree(model, "1GiB") if shared else None
    loop = example.Loop(model, tree, piece_tokens=64, most_answers=3)
    left = served(loop, requests(example, 8))
    for request in left:
        assert tuple(request.answer) == model.complete(request.ids, max_new_tokens=request.new_tokens).tokens
        assert request.came < request.first <= request.done
    assert (loop.reading, loop.answering, list(loop.waiting)) == (None, [], [])
    reused = [request.reused_tokens for request in sorted(left, key=lambda each: each.came)]
    assert reused[0] == 0 and all(tokens >= 200 if shared else tokens == 0 for tokens in reused[1:])


def test_a_turn_reads_one_piece_and_one_token_of_every_answer(example, model, monkeypatch):
    calls = []
    real = CompiledModel.forward
    monkeypatch.setattr(
        CompiledModel, "forward", lambda self, batch, **how: calls.append([len(ids) for _, ids in batch]) or real(self, batch, **how)
    )
    loop = example.Loop(model, None, piece_tokens=64, most_answers=3)
    loop.waiting += [example.Request(BOOK[:100], 9, 0), example.Request(BOOK[:130], 9, 0)]
    for _ in range(6):
        loop.turn()
    assert calls == [[64], [36], [64], [1], [64], [1], [2], [1], [1, 1]]


def test_the_same_seed_serves_in_the_same_order(example, model):
    runs = []
    for _ in range(2):
        loop = example.Loop(model, kvcompile.PrefixTree(model, "1GiB"), piece_tokens=64, most_answers=3)
        runs.append([(each.came, each.first, each.done, each.answer) for each in served(loop, requests(example, 8))])
    assert runs[0] == runs[1]
