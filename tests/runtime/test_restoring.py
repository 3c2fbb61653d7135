"""Indexes whose file is as it was written and yet no index: every kind refuses what its kernels or torch would stumble over."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kvcompile.runtime.indexes.index import Prompt, RecentQueries
from kvcompile.runtime.indexes.registry import index_kind

HEADS, FIRST, TOKENS, DIM, VALUE_DIM = 2, 64, 512, 16, 24
OPTIONS: dict[str, dict[str, Any]] = {
    "flat": {},
    "sketch": {},
    "minmax": {"page_tokens": 16},
    "representatives": {"page_tokens": 16},
    "ivf": {"lists": 16, "probe": 4},
    "clusters": {"tokens_per_cluster": 16, "estimate": 0.25},
    "hnsw": {},
}
if importlib.util.find_spec("hnswlib") is None:
    del OPTIONS["hnsw"]


@functools.cache
def state(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Of an index that has grown."""
    generator = torch.Generator().manual_seed(0)
    key_HTD, query_HCD = (torch.randn(HEADS, n, DIM, generator=generator) for n in (TOKENS + 64, 64))
    value_HTE = torch.randn(HEADS, TOKENS + 64, VALUE_DIM, generator=generator)
    recent = RecentQueries(query_HCD, torch.full((64,), FIRST + TOKENS))
    gram_HDD = query_HCD.transpose(1, 2) @ query_HCD
    prompt = Prompt(key_HTD[:, :TOKENS], value_HTE[:, :TOKENS], gram_HDD, 64, recent, 1, 20)
    index = index_kind(name).build(FIRST, prompt, OPTIONS[name])
    for start in (TOKENS, TOKENS + 32):
        index.add(key_HTD[:, start : start + 32], value_HTE[:, start : start + 32])
    tensors, numbers = index.state()
    index_kind(name).restore(tensors, numbers)
    return tensors, numbers


# what only the keys tell is looked at by the store (test_session_file.py: an index of keys of another shape)
BY_KEYS = {("minmax", "digest"), ("clusters", "centre"), ("clusters", "mean"), ("hnsw", "base"), ("hnsw", "tail")}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_tensor_of_another_dtype_shape_or_without_a_number_is_refused(name):
    tensors, numbers = state(name)
    for key, tensor in tensors.items():
        others = [tensor.to(torch.int64 if tensor.is_floating_point() else torch.float64), tensor[None], tensor[0]]
        others += [] if (name, key) in BY_KEYS else [tensor[:1], tensor[..., :-1], torch.cat([tensor, tensor[:1]])]
        if tensor.is_floating_point():
            others.append(tensor.clone().fill_(torch.nan))
        for other in others:
            with pytest.raises(ValueError):
                index_kind(name).restore({**tensors, key: other}, numbers)
        with pytest.raises(KeyError):
            index_kind(name).restore({other: found for other, found in tensors.items() if other != key}, numbers)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_number_that_is_none_is_refused(name):
    tensors, numbers = state(name)
    for key in numbers:
        wrong: list[Any] = [-5, "many", [3], float("nan"), float("inf")]
        for value in wrong:
            with pytest.raises((ValueError, TypeError, AttributeError)):
                index_kind(name).restore(tensors, {**numbers, key: value})
        with pytest.raises(KeyError):
            index_kind(name).restore(tensors, {other: value for other, value in numbers.items() if other != key})


def twice(tensor: Tensor) -> Tensor:
    return torch.cat([tensor[:, 1:2], tensor[:, 1:]], 1)


def filled(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        other = tensor.clone()
        other.view(-1)[3 % other.numel()] = value
        return other

    return change


@pytest.mark.parametrize(
    ("name", "key", "change", "told"),
    [
        ("sketch", "position_HT.0", twice, "position_HT.0 does not hold each position from 64 to 575 once"),
        ("sketch", "position_HT.1", filled(64), "position_HT.1 does not hold each position from 576 to 639 once"),
        ("sketch", "position_HT.0", filled(-1), "position_HT.0 does not hold each position"),
        ("sketch", "position_HT.0", filled(1 << 30), "position_HT.0 does not hold each position"),
        ("sketch", "fine_H", filled(65), "units are fine"),
        ("sketch", "fine_H", filled(-1), "units are fine"),
        ("ivf", "list", filled(16), "keys are in the lists 0 to 16 of 16"),
        ("ivf", "list", filled(-1), "keys are in the lists -1 to 15 of 16"),
        ("clusters", "order", twice, "order does not hold each position from 0"),
        ("clusters", "size", filled(-1), "clusters of .* keys, and an order of 512"),
        ("clusters", "size", filled(400), "clusters of .* keys, and an order of 512"),
    ],
)
def test_places_that_are_not_there_are_refused(name, key, change, told):
    tensors, numbers = state(name)
    with pytest.raises(ValueError, match=told):
        index_kind(name).restore({**tensors, key: change(tensors[key])}, numbers)


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("flat", {"end": 65}, "it covers 1 tokens, no multiple of 32"),
        ("flat", {"first": 1024}, "end is"),
        ("sketch", {"batch_ends": [32]}, r"its batches end at \[32\]"),
        ("sketch", {"batch_ends": [64, 32]}, "its batches end at"),
        ("sketch", {"batch_ends": [31, 64]}, "its batches end at"),
        ("sketch", {"first": 96}, "does not hold each position from 96"),
        ("minmax", {"end": 96}, "32 pages of 16 for 32 tokens"),
        ("ivf", {"probe": 17}, "probe is 17, no number from 1 to 16"),
        ("clusters", {"made_from": 480}, "keys are in clusters, 480 of them from the beginning"),
        ("clusters", {"end": 96}, "512 of 32 keys are in clusters"),
        ("clusters", {"estimate": 1.5}, "estimate is 1.5, no number from 0 to 1"),
    ],
)
def test_numbers_that_do_not_fit_each_other_are_refused(name, changes, told):
    tensors, numbers = state(name)
    with pytest.raises(ValueError, match=told):
        index_kind(name).restore(tensors, {**numbers, **changes})
