"""Time of a token of SmolLM2-135M under torch.compile: Inductor, and kvcompile's backend with 75 % of the KV heads streaming.

    python benchmarks/torch_compile.py [--context 8192] [--dtype bfloat16] [--steps 40]

Inductor and the backend run with transformers' DynamicCache, the backend also with kvcompile.Cache.  All read the same prompt,
uncompiled; then the engines take turns, a token each.  Writes benchmarks/results/torch_compile_DTYPE.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from harness import in_turn, median, smollm2, smollm2_spec, write
from transformers import DynamicCache

import kvcompile

SHARE = "75%"
WARM = 6  # DynamicCache is compiled three times: for a fixed length, for a growing one, and once more where a guard asks for it
CHUNK = 2048
ENGINES = {
    "inductor, DynamicCache": ("inductor", False),
    "kvcompile, DynamicCache": ("kvcompile", False),
    "kvcompile, kvcompile.Cache": ("kvcompile", True),
}


def engine(backend: str, own_cache: bool, dtype: str, ids: torch.Tensor) -> tuple[Callable[[], object], Any]:
    """A function that decodes a token, and the cache that it reads."""
    model: Any = smollm2(dtype).load()
    model.config._attn_implementation = "sdpa"
    spec = {name: value for name, value in smollm2_spec(dtype, SHARE).items() if name in ("kvcompile", "policies", "heads")}
    cache: Any = kvcompile.Cache(model, spec=spec) if own_cache else DynamicCache(config=model.config)
    for chunk in ids.split(CHUNK, 1):
        model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
    options: dict[str, Any] = {"options": {"spec": spec}} if backend == "kvcompile" else {}
    compiled = torch.compile(model, backend=backend, **options)
    token = ids[:, :1]
    return lambda: compiled(token, past_key_values=cache, use_cache=True, logits_to_keep=1), cache


def held_bytes(cache: Any) -> int:
    if isinstance(cache, kvcompile.Cache):
        return cache.nbytes()
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    ids = torch.randint(0, 49152, (1, options.context), generator=torch.Generator().manual_seed(0))
    made = {name: engine(*how, options.dtype, ids) for name, how in ENGINES.items()}
    seconds = in_turn({name: step for name, (step, _) in made.items()}, options.steps, WARM)
    base = median(seconds["inductor, DynamicCache"])
    rows = {
        name: {
            "ms": 1e3 * median(seconds[name]),
            "fastest ms": 1e3 * min(seconds[name]),
            "of inductor's time": median(seconds[name]) / base,
            "cache MiB": held_bytes(cache) / 2**20,
        }
        for name, (_, cache) in made.items()
    }
    for name, row in rows.items():
        print(f"{name:28} {row['ms']:7.1f} ms  {row['ms'] / base / 1e3:5.2f} of inductor's  cache {row['cache MiB']:6.1f} MiB")
    shape = {"context": options.context, "share streaming": SHARE, "dtype": options.dtype, "steps": options.steps}
    write(f"torch_compile_{options.dtype}", torch.get_num_threads(), {**shape, "engines": rows})


if __name__ == "__main__":
    main()
