"""The text of the rendered kernels; needs no Triton."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest
from on_triton.cases import COMPILED, decode_request

from kvcompile.codegen.triton import render_decode, sources
from kvcompile.ir.errors import TargetError
from kvcompile.ir.request import LinearRequest

GOLDEN = Path(__file__).parent / "golden"
SHOWN = {
    "attend_spans_everything": decode_request(128, 4, "bfloat16"),
    "attend_spans_all_options": decode_request(
        80,
        3,
        "float16",
        dtype="float32",
        soft_cap=30.0,
        learnt_sinks=True,
        sink_tokens=16,
        recent_tokens=256,
        chunk_tokens=8192,
        cache_index=True,
    ),
}


@pytest.mark.parametrize("name", SHOWN)
def test_the_text_is_the_golden_one(name: str, request: pytest.FixtureRequest) -> None:
    path, text = GOLDEN / f"{name}.py", render_decode(SHOWN[name])
    if request.config.getoption("--update-golden"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", COMPILED)
def test_the_text_is_python_of_at_most_150_lines_and_names_its_request(name: str) -> None:
    text = render_decode(COMPILED[name])
    ast.parse(text)
    assert len(text.splitlines()) <= 150
    assert max(len(line) for line in text.splitlines()) <= 140
    assert f"for request {COMPILED[name].key}" in text
    assert "kvcompile SPEC --show source" in text
    assert text == render_decode(replace(COMPILED[name]))


def test_sources_are_the_distinct_attentions_of_cuda_devices() -> None:
    first, second = decode_request(), decode_request(32)
    requests = [first, second, replace(first), replace(first, device="cpu"), LinearRequest("linears", "cuda", "float32", 8)]
    assert sources(requests) == {f"attend_spans_{each.key}": render_decode(each) for each in (first, second)}
    assert sources([]) == {}


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"compute_dtype": "float64"}, "not queries of float32 and stores of float32 in float64"),
        ({"store_dtype": "int8"}, "takes bfloat16, float16, float32 and computes in float32, not queries of int8 and stores of int8"),
        ({"alibi": True}, "knows no ALiBi slopes"),
        ({"store_quantised": "int8"}, "knows no stores of fewer bits"),
        ({"head_dim": 320}, "goes up to a head_dim of 256, not 320"),
        ({"value_dim": 257}, "goes up to a head_dim of 256, not 257"),
        ({"queries_per_kv": 65}, "goes up to 64 queries per KV head, not 65"),
    ],
)
def test_what_no_kernel_is_written_for_is_refused(other: dict[str, object], text: str) -> None:
    with pytest.raises(TargetError, match=text) as caught:
        render_decode(decode_request(**other))
    assert "kernel request" in str(caught.value)
