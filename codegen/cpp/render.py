"""C++ sources from requests: one readable file a kernel, over headers that all kernels share."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files

import jinja2

from kvcompile.ir.request import KernelRequest, LinearRequest, LookupRequest, Request

HEADERS = (
    "kernel.h",
    "vector.h",
    "rows.h",
    "quantised.h",
    "key_rows.h",
    "pairs.h",
    "whole.h",
    "sketch_scan.h",
    "sketch_choice.h",
    "sketch_rest.h",
    "attend_rows.h",
    "lookup.h",
)
LAUNCHER = ("launcher.cpp", "attend_operator.cpp", "lookup_operator.cpp", "sketch_build.cpp")
GRAPH = ("kernel.h", "vector.h", "on_threads.h", "roargraph.cpp")
HASH_TABLES = ("kernel.h", "vector.h", "on_threads.h", "lsh.cpp")
LAUNCHER_HEADERS = ("kernel.h", "stores.h", "relay.h", "operators.h", "attend_call.h", "lookup_head.h")
_TYPES = {"float32": "float", "bfloat16": "Bfloat16"}
_ROWS_LIMIT = 256  # queries that share a KV head: their logits of a chunk of keys stand on the stack


def refusal(request: Request) -> str | None:
    """Why there is no C++ kernel for a request, in words; None where there is one."""
    if isinstance(request, LinearRequest):
        return None if request.dtype in _TYPES else f"linear layers in {request.dtype} have no C++ kernel"
    for name, dtype in (("computing", request.dtype), ("stores", request.store_dtype)):
        if dtype not in _TYPES:
            return f"{name} in {dtype} has no C++ kernel"
    if max(request.head_dim, request.value_dim) > 512 or request.queries_per_kv > _ROWS_LIMIT:
        return f"head_dim {request.head_dim} with {request.queries_per_kv} queries a KV head is too large for the C++ kernels"
    if isinstance(request, LookupRequest):
        return None
    if request.store_dtype == "bfloat16" and request.head_dim % 2:
        return f"head_dim {request.head_dim} is odd, and bfloat16 keys are stored in pairs"
    return None


@dataclass(frozen=True)
class KernelSource:
    """One request's kernel as text.  name: its file, made of its content hash."""

    request: Request
    name: str
    text: str


def render(request: Request) -> KernelSource:
    """The source of a request's kernel; `refusal(request)` must be None."""
    assert refusal(request) is None, refusal(request)
    if isinstance(request, LinearRequest):
        template, words = "linears.cpp.jinja", _linear_words(request)
        constants = {"number_type": _TYPES[request.dtype], "max_tokens": request.max_tokens}
    elif isinstance(request, LookupRequest):
        template, words = "lookup.cpp.jinja", _lookup_words(request)
        constants = {
            "head_dim": request.head_dim,
            "value_dim": request.value_dim,
            "queries_per_kv": request.queries_per_kv,
            "scale": _float(request.scale),
            "soft_cap": _float(request.soft_cap) if request.soft_cap else "",
            "query_type": _TYPES[request.dtype],
            "store_type": _TYPES[request.store_dtype],
        }
    else:
        template, words = "attend_spans.cpp.jinja", _attend_words(request)
        constants = {
            "head_dim": request.head_dim,
            "value_dim": request.value_dim,
            "queries_per_kv": request.queries_per_kv,
            "scale": _float(request.scale),
            "soft_cap": _float(request.soft_cap) if request.soft_cap else "",
            "sink_tokens": request.sink_tokens,
            "recent_tokens": request.recent_tokens,
            "chunk_tokens": request.chunk_tokens,
            "alibi": request.alibi,
            "cache_index": request.cache_index,
            "query_type": _TYPES[request.dtype],
            "store_type": _TYPES[request.store_dtype],
            **_quantised(request.store_quantised),
            "keys_in_rows": request.key_layout == "rows",
            "in_pairs": _in_pairs(request),
        }
    header = [
        f"// {words[0]}",
        *(f"// {line}" for line in words[1:]),
        f"// Made by kvcompile from codegen/cpp/{template}; print it again with: kvcompile SPEC --show source",
    ]
    body = _template(template).render(key=request.key, **constants)
    return KernelSource(request, f"{request.kind}_{request.key}.cpp", "\n".join(header) + "\n" + body + "\n")


def library_sources(requests: Iterable[Request]) -> dict[str, str]:
    """File name -> text of everything that one shared object of kernels is built from."""
    kernels = sorted((render(request) for request in requests), key=lambda kernel: kernel.name)
    attends = [kernel.request.key for kernel in kernels if isinstance(kernel.request, KernelRequest)]
    linears = [kernel.request.key for kernel in kernels if isinstance(kernel.request, LinearRequest)]
    lookups = [kernel.request.key for kernel in kernels if isinstance(kernel.request, LookupRequest)]
    table = _template("kernels.cpp.jinja").render(attends=attends, linears=linears, lookups=lookups)
    return {**{name: _text(name) for name in HEADERS}, **{kernel.name: kernel.text for kernel in kernels}, "kernels.cpp": table + "\n"}


def launcher_sources() -> dict[str, str]:
    """File name -> text of the operators that call the kernels."""
    return {name: _text(name) for name in (*LAUNCHER_HEADERS, *LAUNCHER)}


def graph_sources() -> dict[str, str]:
    """File name -> text of the library that builds graphs over keys and walks through them."""
    return {name: _text(name) for name in GRAPH}


def lsh_sources() -> dict[str, str]:
    """File name -> text of the library that fills hash tables over keys and looks into them."""
    return {name: _text(name) for name in HASH_TABLES}


def _in_pairs(request: KernelRequest) -> bool:
    """Whether sessions may see keys together, and these lie as instructions for pairs of bfloat16 numbers want them."""
    plain = request.key_layout == "blocks" and not request.store_quantised and request.dtype == request.store_dtype == "bfloat16"
    sees_all = request.recent_tokens is None and request.chunk_tokens is None and not request.alibi
    return plain and sees_all and request.value_dim % 32 == 0


def _attend_words(request: KernelRequest) -> list[str]:
    seen = "every earlier token"
    if request.recent_tokens is not None:
        seen = f"the first {request.sink_tokens} tokens and the last {request.recent_tokens}"
    if request.chunk_tokens is not None:
        seen += f", of its chunk of {request.chunk_tokens}"
    extras = [f"Logits capped at {request.soft_cap:g}"] if request.soft_cap else []
    extras += ["ALiBi slopes join the logits"] if request.alibi else []
    extras += ["Sinks are shown another query"] if request.cache_index else []
    extras += ["One learnt sink a query head, which the launcher adds"] if request.learnt_sinks else []
    extras += [f"Keys and values are kept as {_kept_words(request.store_quantised)}"] if request.store_quantised else []
    extras += ["Keys lie a token a row"] if request.key_layout == "rows" else []
    return [
        f"attend_spans {request.key}: a query sees {seen}.",
        *([" ".join(f"{extra}." for extra in extras)] if extras else []),
        f"{request.queries_per_kv} queries a KV head, head_dim {request.head_dim}, value_dim {request.value_dim}; "
        f"{request.dtype} queries over {request.store_dtype} keys and values, sums in float32.",
    ]


def _lookup_words(request: LookupRequest) -> list[str]:
    return [
        f"lookup {request.key}: a query sees a window, the keys that a sketch finds, and an estimate of the others.",
        *([f"Logits capped at {request.soft_cap:g}."] if request.soft_cap else []),
        f"{request.queries_per_kv} queries a KV head, head_dim {request.head_dim}, value_dim {request.value_dim}; "
        f"{request.dtype} queries over {request.store_dtype} keys and values, a token a row, sums in float32.",
    ]


def _kept_words(store: str) -> str:
    facts = _quantised(store)
    return f"KIVI of {facts['bits']} bits, groups of {facts['group']}" if facts["group"] else store


def _quantised(store: str) -> dict[str, int]:
    """bits of a number, 0 where it is kept as it is; group: tokens or channels that share a scale, 0 where no group does."""
    match store.split():
        case ["kivi", bits, group]:
            return {"bits": int(bits), "group": int(group)}
        case ["int8"]:
            return {"bits": 8, "group": 0}
    return {"bits": 0, "group": 0}


def _linear_words(request: LinearRequest) -> list[str]:
    return [
        f"linears {request.key}: linear layers of 1 to {request.max_tokens} tokens, which read each weight once.",
        f"{request.dtype} weights [out, in], sums in float32.",
    ]


def _float(number: float) -> str:
    return f"{float(number)!r}f"


def _text(name: str) -> str:
    return files("kvcompile.codegen.cpp").joinpath(name).read_text(encoding="utf-8")


@functools.cache
def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False, keep_trailing_newline=False)
    return environment.from_string(_text(name))
