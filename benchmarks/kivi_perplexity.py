"""Perplexity of SmolLM2-135M whose keys and values are kept in 8, 4 or 2 bits, and the bytes that this takes.

    python benchmarks/kivi_perplexity.py [--tokens 2048] [--chunk 32] [--kernels generated]

The text is Python's own documentation (pydoc_data.topics).  It is read in chunks of 32 tokens and each of its tokens is scored: a chunk
sees what came before it as the store keeps it, quantised, and its own tokens exactly.  In one prompt nothing would be quantised before
it is scored.  Bytes are what the session holds after the text, and what the plan's formula says of as many tokens.
"""

from __future__ import annotations

import argparse
import math
import pydoc_data.topics
from typing import Any

import torch
from harness import SMOLLM2, write
from torch import Tensor

import kvcompile

STORES: dict[str, Any] = {
    "bfloat16": "bfloat16",
    "int8": "int8",
    "kivi 4": {"kivi": {"bits": 4, "group": 32, "residual_tokens": 128}},
    "kivi 2": {"kivi": {"bits": 2, "group": 32, "residual_tokens": 128}},
}
LIMITS = {"int8": 0.01, "kivi 4": 0.01}  # so much more perplexity than bfloat16's is allowed


def compiled(store: Any, kernels: str) -> kvcompile.CompiledModel:
    spec = {
        "kvcompile": 1,
        "model": {"path": SMOLLM2, "dtype": "bfloat16"},
        "target": {"kernels": kernels},
        "policies": {"kept": {"zones": ["all"], "store": store}},
        "heads": [{"policy": "kept"}],
    }
    return kvcompile.compile(spec=spec)


def text_ids(model: kvcompile.CompiledModel, tokens: int) -> Tensor:
    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    ids = model.tokenizer.encode(text[: tokens * 8])
    return torch.tensor((ids if isinstance(ids, list) else ids.ids)[:tokens])


def measure(model: kvcompile.CompiledModel, ids: Tensor, chunk: int) -> dict[str, Any]:
    session = model.session()
    nats = 0.0
    for first in range(0, len(ids), chunk):
        part = ids[first : first + chunk]
        logits = session.prefill(part, logits="all")
        following = ids[first + 1 : first + chunk + 1]
        nats += torch.nn.functional.cross_entropy(logits[: len(following)], following, reduction="sum").item()
    read = len(ids)
    return {
        "perplexity": math.exp(nats / (read - 1)),
        "stored bytes": session.nbytes(),
        "formula": model.plan.stored_bytes(read),
        "bytes of the full cache": model.plan.full_bytes(read),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--tokens", type=int, default=2048)
    options.add_argument("--chunk", type=int, default=32)
    options.add_argument("--kernels", choices=("generated", "torch"), default="generated")
    given = options.parse_args()
    found: dict[str, dict[str, Any]] = {}
    for name, store in STORES.items():
        model = compiled(store, given.kernels)
        ids = text_ids(model, given.tokens)
        found[name] = measure(model, ids, given.chunk)
        found[name]["more than bfloat16"] = found[name]["perplexity"] / found["bfloat16"]["perplexity"] - 1
        found[name]["of the full cache"] = found[name]["stored bytes"] / found[name]["bytes of the full cache"]
        print(
            f"{name:9} perplexity {found[name]['perplexity']:.4f} ({found[name]['more than bfloat16']:+.2%})   "
            f"{found[name]['stored bytes']} bytes, formula {found[name]['formula']}, "
            f"{found[name]['of the full cache']:.1%} of the full cache"
        )
    accepted = {
        "stored bytes equal the formula": all(each["stored bytes"] == each["formula"] for each in found.values()),
        **{f"{name} within {limit:.0%}": found[name]["more than bfloat16"] <= limit for name, limit in LIMITS.items()},
    }
    for what, holds in accepted.items():
        print(f"{'yes' if holds else 'NO ':3} {what}")
    result = {"model": "SmolLM2-135M-Instruct Q4_1 in bfloat16", "tokens": given.tokens, "chunk": given.chunk, "kernels": given.kernels}
    write("kivi_perplexity", torch.get_num_threads(), {**result, "stores": found, "accepted": accepted})


if __name__ == "__main__":
    main()
