"""Reading a prompt: SmolLM2-135M against Hugging Face's SDPA, and what streaming heads save of attention.

    python benchmarks/prefill.py [--dtype bfloat16] [--tokens 4096] [--long 8192]

Attention's share: `full` against 75 % of the KV heads streaming at --long tokens, beside what the floating-point operations say.
"""

from __future__ import annotations

import argparse
import time

import torch
from decode import attention_time
from harness import in_turn, median, smollm2, smollm2_spec, write

import kvcompile
from kvcompile.ir.policy import All
from kvcompile.runtime.model import CompiledModel

ROUNDS = 3


def operations(model: CompiledModel, tokens: int) -> float:
    """Query-key pairs that attention has to look at."""
    pairs = 0.0
    for site in model.plan.sites:
        for group in site.groups:
            (zone,) = group.policy.zones
            if isinstance(zone, All):
                seen = tokens * (tokens + 1) / 2
            else:
                whole = min(tokens, zone.window_tokens)
                seen = whole * (whole + 1) / 2 + (tokens - whole) * zone.window_tokens
            pairs += len(group.kv_heads) * seen
    return pairs


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--long", type=int, default=8192)
    options = parser.parse_args()
    full, streaming = (kvcompile.compile(smollm2_spec(options.dtype, share)) for share in (None, "75%"))
    peer = smollm2(options.dtype).load()
    peer.config._attn_implementation = "sdpa"
    ids = torch.randint(0, full.vocabulary, (options.long,), generator=torch.Generator().manual_seed(0))
    short = ids[: options.tokens]
    engines = {
        "HF SDPA": lambda: peer(short[None], use_cache=True, logits_to_keep=1),
        "ours, full": lambda: full.session().prefill(short),
        "ours, 75 % streaming": lambda: streaming.session().prefill(short),
    }
    seconds = {name: median(found) for name, found in in_turn(engines, ROUNDS, warm=1).items()}
    for name, found in seconds.items():
        print(f"{options.tokens} tokens  {name:22} {found:6.2f} s  {options.tokens / found:7.0f} tokens/s")
    attention: dict[str, list[float]] = {"full": [], "streaming": []}
    wall: dict[str, list[float]] = {"full": [], "streaming": []}
    for _ in range(ROUNDS):
        for name, model in (("full", full), ("streaming", streaming)):
            with attention_time() as spent:
                started = time.perf_counter()
                model.session().prefill(ids)
                wall[name].append(time.perf_counter() - started)
            attention[name].append(sum(spent))
    measured = 1 - median(attention["streaming"]) / median(attention["full"])
    predicted = 1 - operations(streaming, options.long) / operations(full, options.long)
    print(f"{options.long} tokens  attention {median(attention['full']):.2f} s of {median(wall['full']):.2f} s full, "
          f"{median(attention['streaming']):.2f} s of {median(wall['streaming']):.2f} s streaming: less by {measured:.0%}, "
          f"operations say {predicted:.0%}")  # fmt: skip
    write(
        f"prefill_{options.dtype}",
        torch.get_num_threads(),
        {
            "rounds": ROUNDS,
            "tokens": options.tokens,
            "seconds": seconds,
            "long": options.long,
            "attention seconds": {name: median(found) for name, found in attention.items()},
            "wall seconds": {name: median(found) for name, found in wall.items()},
            "attention less by": measured,
            "operations less by": predicted,
        },
    )


if __name__ == "__main__":
    main()
