"""Zones that find keys over stores of fewer bits: the bytes of the plan, forks, and how near they are to exact keys."""

from __future__ import annotations

import functools

import pytest
import torch
import toys
from units import some_ids

import kvcompile
from kvcompile.runtime.model import CompiledModel

STORES = {"int8": "int8", "kivi": {"kivi": {"bits": 4, "group": 16, "residual_tokens": 32}}}
ZONES = {
    "top_k": {"top_k": {"k": 64, "index": "flat"}},
    "static": {"static": {"keys": 64}},
    "sample": {"sample": {"lsh": {"hash_bits": 3, "tables": 40}}},
}
PROMPT, STEPS = 1100, 40  # a sample of queries is full


@functools.cache
def compiled(zone: str, store: str | None) -> CompiledModel:
    policy = {"zones": [{"sink_recent": {"sink_tokens": 4, "recent_tokens": 64}}, ZONES[zone]]}
    policy |= {} if store is None else {"store": STORES[store]}
    spec = {"kvcompile": 1, "verify": {"tokens": 16}, "target": {"segments": "eager"}, "policies": {"found": policy}}
    return kvcompile.compile(toys.llama(layers=2), spec=spec | {"heads": [{"policy": "found"}]})


def read(model: CompiledModel) -> tuple[kvcompile.Session, torch.Tensor]:
    session, ids = model.session(), some_ids(PROMPT + STEPS, 256)
    session.prefill(ids[:PROMPT])
    return session, torch.stack([session.step(int(each)) for each in ids[PROMPT:]])


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("zone", ZONES)
def test_keys_are_found_and_kept_in_fewer_bits(zone, store):
    session, logits = read(compiled(zone, store))
    exact_session, exact = read(compiled(zone, None))
    assert 1e-5 < (logits - exact).abs().max() < 0.2
    planned = session.model.plan.stored_bytes(PROMPT + STEPS)
    late = 0.05 if zone == "sample" else 0  # an index that waits for its site's turn is a block behind
    assert session.nbytes() == pytest.approx(planned, rel=late) and session.nbytes() < exact_session.nbytes()
    child = session.fork()
    assert torch.equal(child.step(3), session.step(3))
    session.rollback(1)
    assert session.nbytes() + session.shared_nbytes() <= child.nbytes() + child.shared_nbytes()
