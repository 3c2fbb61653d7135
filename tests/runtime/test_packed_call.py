"""A packed call's attention at a site, by the C++ kernels and in torch, against the float64 oracle."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from native import SITES, Text, assert_right
from torch import Tensor

from kvcompile.codegen.toolchain import find_toolchain, machine_isa, why_none
from kvcompile.ir.spec import Spec
from kvcompile.link import build_kernels
from kvcompile.runtime.model import CompiledModel, PackedCall
from kvcompile.runtime.native import NO_KERNELS, NativeKernels
from kvcompile.runtime.session import Session

TOKENS = 420
PROGRAM = cast(Any, SimpleNamespace(ends_with_attention=True))  # what a call must know of it
SPEC = Spec(None, {}, ())
NAMES = ["window_300", "all_options", "learnt_sinks", "alibi", "alibi_capped", "chunked", "chunked_300", "cache_index", "cache_index_300"]


def kernels_of(name: str, where: str) -> NativeKernels:
    """`where`: "torch"; "kernels"; "both", which is a kernel for the first group of KV heads only."""
    if where == "torch":
        return NO_KERNELS
    compiler = find_toolchain()
    if compiler is None:
        pytest.skip(f"no C++ compiler: {why_none()}")
    requests = SITES[name].requests(machine_isa())
    return build_kernels([*requests] if where == "kernels" else requests[:1], machine_isa(), compiler)


def call(sessions: list[Session], texts: list[Text], before: list[int], lengths: list[int], last_only: bool = False) -> list[Tensor]:
    """One call at the only site: [S, Q, E] of each session."""
    packed = PackedCall.begin(sessions[0].model, sessions, before, lengths, only_last=last_only)
    parts = [slice(at, at + tokens) for at, tokens in zip(before, lengths, strict=True)]
    query, sink_query, key, value = (
        torch.cat([getattr(text, name)[:, part] for text, part in zip(texts, parts, strict=True)], 1)[None]
        for name in ("query_QSD", "sink_query_QSD", "key_HSD", "value_HSE")
    )
    shown = sink_query if texts[0].attention.cache_index else None
    out = packed.attend(0, query, key, value, texts[0].sinks_Q, shown, True)
    return list(out[0].split([1 if last_only else tokens for tokens in lengths]))


@pytest.mark.parametrize("where", ["kernels", "torch", "both"])
@pytest.mark.parametrize("name", NAMES)
def test_every_session_of_a_call_gets_what_the_oracle_says(name: str, where: str) -> None:
    plan = SITES[name].plan(machine_isa())
    model = CompiledModel(PROGRAM, plan, SPEC, 1, kernels=kernels_of(name, where))
    texts = [Text(SITES[name], machine_isa(), TOKENS, seed) for seed in (1, 2)]
    texts[1].sinks_Q = texts[0].sinks_Q  # which belong to the model
    sessions, before = [model.session(), model.session()], [0, 0]
    for lengths, last_only in (([330, 1], False), ([1, 7], False), ([60, 1], True), ([1, 1], False), ([1, 64], False), ([9, 301], True)):
        outs = call(sessions, texts, before, lengths, last_only)
        before = [read + tokens for read, tokens in zip(before, lengths, strict=True)]
        for text, out, read in zip(texts, outs, before, strict=True):
            assert_right(out, text, read - len(out))


def test_a_site_whose_sinks_ask_for_a_query_says_so_where_none_is_made() -> None:
    model = CompiledModel(PROGRAM, SITES["cache_index"].plan(machine_isa()), SPEC, 1)
    text = Text(SITES["cache_index"], machine_isa(), 5)
    packed = PackedCall.begin(model, [model.session()], [0], [5], only_last=False)
    with pytest.raises(AssertionError, match="attention: nothing made the query that the sinks are shown"):
        packed.attend(0, text.query_QSD[None], text.key_HSD[None], text.value_HSE[None], None, None, True)
