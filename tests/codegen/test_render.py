"""The text of the C++ kernels: golden files, formatted, the same on every run; every field of a request is in it."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from kvcompile.codegen.cpp.render import HEADERS, LAUNCHER, LAUNCHER_HEADERS, launcher_sources, library_sources, refusal, render
from kvcompile.ir.request import KernelRequest, LinearRequest, LookupRequest, Request

CPP = Path(__file__).parents[2] / "codegen" / "cpp"
ALL = KernelRequest(
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
    sink_tokens=0,
    recent_tokens=None,
)
OPTIONS = replace(
    ALL,
    head_dim=80,
    value_dim=40,
    dtype="float32",
    scale=80**-0.5,
    soft_cap=30.0,
    learnt_sinks=True,
    sink_tokens=16,
    recent_tokens=256,
    chunk_tokens=8192,
    alibi=True,
    cache_index=True,
)
LINEARS = LinearRequest("linears", "cpu", "bfloat16", 4)
LOOKUP = LookupRequest("lookup", "cpu", 64, 64, 3, "float32", "bfloat16", 0.125, None)
KIVI = replace(ALL, store_quantised="kivi 2 32")
ROWS = replace(ALL, key_layout="rows")
SHOWN: dict[str, Request] = {
    "attend_spans_all": ALL,
    "attend_spans_all_options": OPTIONS,
    "attend_spans_kivi": KIVI,
    "attend_spans_rows": ROWS,
    "linears": LINEARS,
    "lookup": LOOKUP,
}
OTHER: dict[str, Any] = {
    "head_dim": 128,
    "value_dim": 128,
    "queries_per_kv": 4,
    "dtype": "float32",
    "store_dtype": "float32",
    "scale": 0.25,
    "soft_cap": 30.0,
    "learnt_sinks": True,
    "sink_tokens": 8,
    "recent_tokens": 100,
    "chunk_tokens": 512,
    "alibi": True,
    "cache_index": True,
    "store_quantised": "kivi 4 32",
    "key_layout": "rows",
    "max_tokens": 2,
}


def body(request: Request) -> str:
    """The text without the request's key, which is another for any other request."""
    return render(request).text.replace(request.key, "KEY")


def clang_format(path: str, text: str) -> str:
    """What clang-format objects to in a text of the folder of templates."""
    command = shutil.which("clang-format", path=str(Path(sys.executable).parent)) or shutil.which("clang-format")
    assert command, "clang-format is in the extra `dev`"
    asked = [command, "--dry-run", "-Werror", f"--assume-filename={CPP / path}"]
    return subprocess.run(asked, input=text, capture_output=True, text=True, check=False).stderr


@pytest.mark.parametrize("name", SHOWN)
def test_the_text_is_the_golden_one(name: str, golden: Callable[[str, str], None]) -> None:
    golden(f"{name}.cpp", render(SHOWN[name]).text)


def test_the_table_of_kernels_is_the_golden_one(golden: Callable[[str, str], None]) -> None:
    golden("kernels.cpp", library_sources(SHOWN.values())["kernels.cpp"])


def test_golden_texts_have_no_orphans() -> None:
    assert {path.name for path in (Path(__file__).parent / "golden").iterdir()} == {"kernels.cpp", *(f"{name}.cpp" for name in SHOWN)}


@pytest.mark.parametrize("name", SHOWN)
def test_a_text_is_short_and_says_what_it_is(name: str) -> None:
    source = render(SHOWN[name])
    lines = source.text.splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines[1:])) <= 140
    assert source.name == f"{SHOWN[name].kind}_{SHOWN[name].key}.cpp"
    assert lines[0].startswith(f"// {SHOWN[name].kind} {SHOWN[name].key}: ")
    assert any("print it again with: kvcompile SPEC --show source" in line for line in lines[:4])


def test_the_policy_is_told_in_words() -> None:
    assert render(ALL).text.startswith(
        f"// attend_spans {ALL.key}: a query sees every earlier token.\n"
        "// 3 queries a KV head, head_dim 64, value_dim 64; bfloat16 queries over bfloat16 keys and values, sums in float32.\n"
    )
    assert render(OPTIONS).text.startswith(
        f"// attend_spans {OPTIONS.key}: a query sees the first 16 tokens and the last 256, of its chunk of 8192.\n"
        "// Logits capped at 30. ALiBi slopes join the logits. Sinks are shown another query. One learnt sink a query head, "
        "which the launcher adds.\n"
    )


def test_how_numbers_are_kept_is_told_and_changes_the_kernel() -> None:
    texts = [body(replace(ALL, store_quantised=store)) for store in ("", "int8", "kivi 2 32", "kivi 4 32", "kivi 4 64")]
    assert len(set(texts)) == 5
    assert "// Keys and values are kept as int8.\n" in texts[1]
    assert "// Keys and values are kept as KIVI of 2 bits, groups of 32.\n" in texts[2]


def test_that_keys_lie_in_rows_is_told() -> None:
    assert render(ROWS).text.splitlines()[1] == "// Keys lie a token a row."


@pytest.mark.parametrize("file", sorted({*HEADERS, *LAUNCHER_HEADERS, *LAUNCHER}))
def test_the_written_files_are_formatted(file: str) -> None:
    assert clang_format(file, (CPP / file).read_text(encoding="utf-8")) == ""


@pytest.mark.parametrize("name", SHOWN)
@pytest.mark.parametrize("scale", [0.125, 1.0, 0.08838834764831845])
def test_the_rendered_texts_are_formatted(name: str, scale: float) -> None:
    request = SHOWN[name]
    request = request if isinstance(request, LinearRequest) else replace(request, scale=scale)
    for file, text in library_sources([request]).items():
        assert clang_format(file, text) == "", file


def test_clang_format_can_object() -> None:
    assert "error: code should be clang-formatted" in clang_format("rows.h", "int  x ;\n")


def test_the_texts_are_the_same_on_every_run_and_in_any_order() -> None:
    script = (
        "from kvcompile.codegen.cpp.render import library_sources\nfrom kvcompile.ir.request import *\n"
        f"import hashlib\nsources = library_sources([{LINEARS!r}, {OPTIONS!r}, {ALL!r}])\n"
        "print(hashlib.sha256(repr(sources).encode()).hexdigest())"
    )
    here = hashlib.sha256(repr(library_sources([ALL, OPTIONS, LINEARS])).encode()).hexdigest()
    there = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    assert there == here


def test_a_library_holds_every_request_and_every_header() -> None:
    sources = library_sources([ALL, OPTIONS, LINEARS, LOOKUP])
    kernels = {render(request).name for request in (ALL, OPTIONS, LINEARS, LOOKUP)}
    assert set(sources) == {*HEADERS, "kernels.cpp", *kernels}
    for request in (ALL, OPTIONS):
        assert f"&kvc_attend_{request.key}," in sources["kernels.cpp"]
    assert f"&kvc_linear_{LINEARS.key}," in sources["kernels.cpp"]
    assert f"&kvc_lookup_{LOOKUP.key}," in sources["kernels.cpp"]
    assert set(launcher_sources()) == {*LAUNCHER_HEADERS, *LAUNCHER}


@pytest.mark.parametrize("name", [each.name for each in fields(KernelRequest) if each.name not in ("kind", "device", "compute_dtype")])
def test_every_field_that_matters_changes_the_text(name: str) -> None:
    """Trap 17.  compute_dtype is float32 in every kernel, whose queries are refused otherwise."""
    request = ALL if name == "key_layout" else replace(ALL, recent_tokens=256)  # no ring keeps rows
    assert body(replace(request, **{name: OTHER[name]})) != body(request)


@pytest.mark.parametrize("name", [each.name for each in fields(LookupRequest) if each.name not in ("kind", "device")])
def test_every_field_of_a_lookup_that_matters_changes_the_text(name: str) -> None:
    other = "bfloat16" if name == "dtype" else OTHER[name]
    assert body(replace(LOOKUP, **{name: other})) != body(LOOKUP)


def test_a_lookup_is_told_in_words() -> None:
    assert render(replace(LOOKUP, soft_cap=30.0)).text.splitlines()[1:3] == [
        "// Logits capped at 30.",
        "// 3 queries a KV head, head_dim 64, value_dim 64; float32 queries over bfloat16 keys and values, a token a row, sums in float32.",
    ]


@pytest.mark.parametrize("name", ["dtype", "max_tokens"])
def test_every_field_of_a_linear_layer_that_matters_changes_the_text(name: str) -> None:
    assert body(replace(LINEARS, **{name: OTHER[name]})) != body(LINEARS)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (replace(ALL, dtype="float16"), "computing in float16 has no C++ kernel"),
        (replace(ALL, dtype="float64"), "computing in float64 has no C++ kernel"),
        (replace(ALL, store_dtype="float16"), "stores in float16 has no C++ kernel"),
        (replace(ALL, head_dim=63), "head_dim 63 is odd, and bfloat16 keys are stored in pairs"),
        (replace(ALL, head_dim=1024), "head_dim 1024 with 3 queries a KV head is too large for the C++ kernels"),
        (replace(ALL, value_dim=514), "head_dim 64 with 3 queries a KV head is too large for the C++ kernels"),
        (replace(ALL, queries_per_kv=257), "head_dim 64 with 257 queries a KV head is too large for the C++ kernels"),
        (replace(LINEARS, dtype="float16"), "linear layers in float16 have no C++ kernel"),
        (replace(LOOKUP, store_dtype="float16"), "stores in float16 has no C++ kernel"),
        (replace(LOOKUP, head_dim=513), "head_dim 513 with 3 queries a KV head is too large for the C++ kernels"),
        (replace(LOOKUP, head_dim=63), None),
        (ALL, None),
        (OPTIONS, None),
        (LINEARS, None),
        (replace(ALL, head_dim=63, store_dtype="float32"), None),
        (replace(ALL, value_dim=63), None),
        (replace(ALL, queries_per_kv=256), None),
    ],
)
def test_what_has_no_kernel_is_refused_in_words(request_: Request, words: str | None) -> None:
    assert refusal(request_) == words
    if words is not None:
        with pytest.raises(AssertionError, match=r"C\+\+|pairs"):
            render(request_)
