"""Requests that the tests of this folder share."""

from __future__ import annotations

from typing import Any

from kvcompile.ir.request import KernelRequest


def decode_request(head_dim: int = 16, queries_per_kv: int = 4, store_dtype: str = "float32", **other: Any) -> KernelRequest:
    fields: dict[str, Any] = {
        "kind": "attend_spans",
        "device": "cuda",
        "head_dim": head_dim,
        "value_dim": head_dim,
        "queries_per_kv": queries_per_kv,
        "dtype": store_dtype,
        "compute_dtype": "float32",
        "store_dtype": store_dtype,
        "scale": head_dim**-0.5,
        "soft_cap": None,
        "learnt_sinks": False,
        "sink_tokens": 0,
        "recent_tokens": None,
    }
    return KernelRequest(**{**fields, **other})


# name -> request; tests/on_triton/golden holds what each costs on a GPU
COMPILED = {
    "bf16 64": decode_request(64, 4, "bfloat16"),
    "bf16 72": decode_request(72, 4, "bfloat16"),
    "bf16 80": decode_request(80, 4, "bfloat16"),
    "bf16 128": decode_request(128, 4, "bfloat16"),
    "bf16 256": decode_request(256, 4, "bfloat16"),
    "bf16 192 to 128": decode_request(192, 4, "bfloat16", value_dim=128),
    "bf16 128, 1 query": decode_request(128, 1, "bfloat16"),
    "bf16 128, 64 queries": decode_request(128, 64, "bfloat16"),
    "bf16 256, 64 queries": decode_request(256, 64, "bfloat16"),
    "bf16 64, learnt sinks": decode_request(64, 8, "bfloat16", learnt_sinks=True),
    "bf16 256, soft cap": decode_request(256, 2, "bfloat16", soft_cap=50.0),
    "fp16 128": decode_request(128, 4, "float16"),
    "fp32 20": decode_request(20, 4, "float32"),
    "fp32 64": decode_request(64, 4, "float32"),
    "fp32 128": decode_request(128, 4, "float32"),
    "fp32 256": decode_request(256, 4, "float32"),
    "fp32 128, 64 queries": decode_request(128, 64, "float32"),
}
