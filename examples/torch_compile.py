"""A Hugging Face model under torch.compile, its KV heads split by a spec: first with its own cache, then with kvcompile.Cache.

Run: python examples/torch_compile.py [FOLDER OR HUB ID]; without one, it makes a small random model.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import kvcompile

SPEC = {
    "kvcompile": 1,
    "policies": {"near": {"zones": [{"sink_recent": {"sink_tokens": 4, "recent_tokens": 32}}]}},
    "heads": [{"policy": "near"}, {"policy": "full", "kv_heads": [0]}],
}


def build() -> Any:
    if len(sys.argv) > 1:
        return AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, eos_token_id=None, **sizes)).eval()


def main() -> None:
    model = build()
    prompt = torch.randint(0, model.config.vocab_size, (1, 100), generator=torch.Generator().manual_seed(0))
    asked: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False}

    # `torch.compile(model, ...)` compiles calls of the object that it returns; generate() calls the model itself, which this compiles:
    model.compile(backend="kvcompile", options={"spec": SPEC})
    print("reads less: ", model.generate(prompt, **asked)[0, 100:].tolist())

    cache = kvcompile.Cache(model, spec=SPEC)
    print("keeps less: ", model.generate(prompt, past_key_values=cache, **asked)[0, 100:].tolist())
    print(f"{cache.nbytes()} bytes of keys and values for {cache.get_seq_length()} tokens")


if __name__ == "__main__":
    main()
