"""Attention time of one generated token: the policy `lookup` against our own `full`, in caches of many tokens.

    python benchmarks/lookup_decode.py [--context 65536] [--curve 8192,32768,131072,524288] [--rounds 12]

The model is SmolLM2-135M in bfloat16, made for 8,192 tokens; a longer cache is filled with tokens drawn from its own: each layer's keys,
values and queries of a real text of 8,192 tokens are captured, and its cache holds so many of their pairs, drawn with replacement (all KV
heads of a token together), each with noise of a tenth of its channel's standard deviation, so that no two are equal.  Queries that ask are
real ones of the text's last eighth.  What is timed is PackedCall.attend, appending included, of all layers (`model`) or of one (`curve`);
the engines take turns, medians.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from harness import SMOLLM2, median, write
from real_keys import Site, Source, sites
from torch import Tensor

import kvcompile
from kvcompile.runtime.model import CompiledModel, PackedCall
from kvcompile.runtime.session import Session

NOISE = 0.1
PIECE = 4096  # tokens that are drawn at a time
LAYERS = 30
CURVE_LAYER = 5
TEXT = Source("smollm2_all", "SmolLM2-135M, every layer", lambda: SMOLLM2, 8192, tuple((layer, 0) for layer in range(LAYERS)))
POLICIES: dict[str, dict[str, Any]] = {
    "full": {},
    "lookup 1%": {"k": "1%", "index": "sketch", "tail": True},
    "lookup 0.5%": {"k": "0.5%", "index": "sketch", "tail": True},
    "lookup 0.25%": {"k": "0.25%", "index": "sketch", "tail": True},
}


def compiled(zone: dict[str, Any]) -> CompiledModel:
    spec: dict[str, Any] = {"kvcompile": 1, "model": {"path": SMOLLM2, "dtype": "bfloat16"}, "verify": {"tokens": 16}}
    if zone:
        spec["policies"] = {"mine": {"zones": [{"sink_recent": {"sink_tokens": 64, "recent_tokens": 256}}, {"top_k": zone}]}}
        spec["heads"] = [{"policy": "mine"}]
    return kvcompile.compile(spec=spec)


def fill(store: Any, site: Site, context: int, seed: int) -> None:
    """`context` tokens drawn from the captured ones; a store that samples queries is shown those of the same tokens."""
    generator = torch.Generator().manual_seed(seed)
    group = len(site.query_QTD) // len(site.key_HTD)
    deviations = [each.float().std(1, keepdim=True) * NOISE for each in (site.key_HTD, site.value_HTE)]
    for first in range(0, context, PIECE):
        count = min(PIECE, context - first)
        chosen_T = torch.randint(site.key_HTD.shape[1], (count,), generator=generator)
        key, value = (
            (each[:, chosen_T].float() + deviation * torch.randn(len(each), count, each.shape[2], generator=generator)).bfloat16()
            for each, deviation in zip((site.key_HTD, site.value_HTE), deviations, strict=True)
        )
        store.extend(key, value)
        if hasattr(store, "observe"):
            store.observe(site.query_QTD[:, chosen_T].unflatten(0, (-1, group)), first)


def filled(model: CompiledModel, layers: dict[int, Site], context: int) -> Session:
    session = model.session()
    for layer, site in layers.items():
        for store in session.stores(layer):
            fill(store, site, context, layer)
    session.tokens.extend([0] * context)
    return session


class Asker:
    """Attends for one token more at some layers of a session, again and again; seconds of each time."""

    def __init__(self, model: CompiledModel, layers: dict[int, Site], context: int) -> None:
        self.model, self.layers, self.session = model, layers, filled(model, layers, context)
        self.turn = 0
        self.inputs: list[dict[int, tuple[Tensor, ...]]] = []
        for position in range(7 * TEXT.tokens // 8, TEXT.tokens, 16):
            token = slice(position, position + 1)
            self.inputs.append(
                {
                    layer: tuple(each[None, :, token].clone() for each in (site.query_QTD, site.key_HTD, site.value_HTE))
                    for layer, site in layers.items()
                }
            )

    def __call__(self) -> float:
        inputs = self.inputs[self.turn % len(self.inputs)]
        self.turn += 1
        call = PackedCall.begin(self.model, [self.session], [len(self.session)], [1], only_last=False)
        started = time.perf_counter()
        for layer, (query, key, value) in inputs.items():
            call.attend(layer, query, key, value, None, None, False)
        seconds = time.perf_counter() - started
        self.session.tokens.append(0)
        return seconds


def compare(models: dict[str, CompiledModel], layers: dict[int, Site], context: int, rounds: int) -> dict[str, Any]:
    askers: dict[str, Asker] = {}
    first: dict[str, float] = {}
    for name, model in models.items():
        askers[name] = Asker(model, layers, context)
        first[name] = askers[name]()  # makes the index
    seconds: dict[str, list[float]] = {name: [] for name in askers}
    for turn in range(rounds + 3):
        for name, ask in askers.items():
            taken = ask()
            if turn >= 3:
                seconds[name].append(taken)
    full = median(seconds["full"])
    rows: dict[str, Any] = {}
    for name, asker in askers.items():
        stores = [store for layer in layers for store in asker.session.stores(layer)]
        rows[name] = {
            "milliseconds": median(seconds[name]) * 1e3,
            "times below full": full / median(seconds[name]),
            "first token, with the index made, seconds": first[name],
            "MiB held": sum(store.nbytes() for store in stores) / 2**20,
            "MiB read as the plan counts": sum(asker.model.plan.sites[layer].read_bytes(context) for layer in layers) / 2**20,
        }
        print(
            f"{context:8,d} tokens, {len(layers):2d} layers  {name:14s} {rows[name]['milliseconds']:9.3f} ms  "
            f"{rows[name]['times below full']:5.1f} times below full  {rows[name]['MiB held']:9.1f} MiB held  "
            f"first token {first[name]:.2f} s",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=65536)
    parser.add_argument("--curve", default="8192,32768,131072,524288")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--keep", type=Path, help="folder where the captured tensors stay for the next run")
    options = parser.parse_args()
    layers = sites(TEXT, options.keep)
    models = {name: compiled(zone) for name, zone in POLICIES.items()}
    curve = {}
    for context in map(int, options.curve.split(",")):
        curve[context] = compare(models, {CURVE_LAYER: layers[CURVE_LAYER]}, context, options.rounds)
    result = compare(models, layers, options.context, options.rounds)
    write("lookup_decode", torch.get_num_threads(), {"context": options.context, "model": result, "curve": curve})


if __name__ == "__main__":
    main()
