from __future__ import annotations

from dataclasses import fields, replace

import pytest

from kvcompile.ir.request import KernelRequest

REQUEST = KernelRequest(
    kind="attend_spans",
    device="cpu",
    head_dim=64,
    value_dim=64,
    queries_per_kv=3,
    dtype="bfloat16",
    compute_dtype="float32",
    store_dtype="bfloat16",
    scale=0.125,
    soft_cap=None,
    learnt_sinks=False,
    sink_tokens=16,
    recent_tokens=256,
)
OTHER = {
    "kind": "attend_pages",
    "device": "cuda",
    "head_dim": 128,
    "value_dim": 128,
    "queries_per_kv": 4,
    "dtype": "float32",
    "compute_dtype": "float64",
    "store_dtype": "float16",
    "scale": 0.25,
    "soft_cap": 30.0,
    "learnt_sinks": True,
    "sink_tokens": 0,
    "recent_tokens": None,
    "chunk_tokens": 8192,
    "alibi": True,
    "cache_index": True,
    "store_quantised": "int8",
    "key_layout": "rows",
}


def test_the_key_is_the_same_on_every_run_and_machine():
    """A changed key orphans every kernel that was kept under the old one: change it on purpose."""
    assert REQUEST.key == "c4c7328cddb7b0a0"
    assert replace(REQUEST).key == REQUEST.key


@pytest.mark.parametrize("name", [each.name for each in fields(KernelRequest)])
def test_every_field_is_part_of_the_key(name):
    """Trap 17."""
    request = replace(REQUEST, recent_tokens=None) if name == "key_layout" else REQUEST  # no ring keeps rows
    assert replace(request, **{name: OTHER[name]}).key != request.key


def test_a_request_names_no_layer_and_counts_no_tokens_of_a_context():
    names = {each.name for each in fields(KernelRequest)}
    assert not names & {"site", "index", "path", "layer", "kv_heads", "context_tokens", "capacity_tokens"}
