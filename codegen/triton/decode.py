"""A request `attend_spans` as Triton source: one new token of each session over spans of keys and values.

The same request renders the same bytes.  runtime/triton_attend.py loads the text and launches it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files

import jinja2

from kvcompile.ir.errors import TargetError
from kvcompile.ir.request import KernelRequest, Request

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
SHORT_NAMES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
LARGEST_HEAD_DIM = 256
MOST_QUERIES = 64  # per KV head
ROWS = 16  # the fewest that a tensor core multiplies
TILE_BYTES = 16384  # of the keys of one tile
MERGED_PARTS = 16


@dataclass(frozen=True)
class Tile:
    """How the work is laid over a program.

    rows: queries of a KV head, padded.  head_lanes, value_lanes: head_dim and value_dim, padded.  keys: of one tile.
    parts: partial results that are merged at once.  vector: elements that every offset and stride is a multiple of.
    """

    rows: int
    head_lanes: int
    value_lanes: int
    keys: int
    parts: int
    vector: int
    warps: int
    stages: int


def sources(requests: Iterable[Request]) -> dict[str, str]:
    """Source text by name, one for each distinct attention of a CUDA device, in the order given; {} when there is none."""
    wanted = [request for request in requests if isinstance(request, KernelRequest) and request.device.startswith("cuda")]
    return {f"{request.kind}_{request.key}": render_decode(request) for request in dict.fromkeys(wanted)}


def render_decode(request: KernelRequest) -> str:
    """The text of a Python module with the entry point `decode`.  Raises TargetError for what no kernel is written for."""
    _check(request)
    tile = tile_of(request)
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    template = environment.from_string(files(__package__).joinpath("attend_spans.py.jinja").read_text(encoding="utf-8"))
    padded_value = tile.value_lanes != request.value_dim
    return template.render(
        request=request,
        tile=tile,
        dtype=SHORT_NAMES[request.store_dtype],
        query_dtype=SHORT_NAMES[request.dtype],
        to_store="" if request.dtype == request.store_dtype else ".to(keys.dtype.element_ty)",
        policy=_policy(request),
        storage=_storage(request),
        and_d=" & (d < HEAD_DIM)[None, :]" if tile.head_lanes != request.head_dim else "",
        and_e=" & (e < VALUE_DIM)[None, :]" if padded_value else "",
        mask_e=", mask=e < VALUE_DIM" if padded_value else "",
    )


def tile_of(request: KernelRequest) -> Tile:
    """The choices that were compiled for sm_80, sm_90 and sm_100 without a spilled register (tests/on_triton/golden)."""
    head_lanes, value_lanes = (max(16, _power_of_two(dim)) for dim in (request.head_dim, request.value_dim))
    rows = max(ROWS, _power_of_two(request.queries_per_kv))
    exact = request.store_dtype == "float32"  # multiplied without tensor cores: the operands stand in registers
    item_bytes = ITEM_BYTES[request.store_dtype]
    lanes = max(head_lanes, value_lanes)
    keys = max(16, min(32 if exact and lanes < 64 else 64, TILE_BYTES // (lanes * item_bytes)))
    vector = min(16 // item_bytes, request.head_dim & -request.head_dim, request.value_dim & -request.value_dim)
    warps, stages = 8 if exact else 4, 2 if exact and lanes < 256 else 3
    return Tile(rows, head_lanes, value_lanes, keys, MERGED_PARTS, vector, warps, stages)


def _check(request: KernelRequest) -> None:
    where = f"kernel request {request.key}"
    if not {request.store_dtype, request.dtype} <= set(ITEM_BYTES) or request.compute_dtype != "float32":
        raise TargetError.at(
            where,
            f"the Triton kernel takes {', '.join(ITEM_BYTES)} and computes in float32, "
            f"not queries of {request.dtype} and stores of {request.store_dtype} in {request.compute_dtype}.",
            "Load the model in one of these dtypes, or give the heads another `dtype`.",
        )
    if request.alibi:
        raise TargetError.at(where, "the Triton kernel knows no ALiBi slopes.", "Write `device: cpu` under `target`.")
    if request.store_quantised:
        raise TargetError.at(where, "the Triton kernel knows no stores of fewer bits.", "Write `device: cpu` under `target`.")
    if max(request.head_dim, request.value_dim) > LARGEST_HEAD_DIM:
        raise TargetError.at(
            where,
            f"the Triton kernel goes up to a head_dim of {LARGEST_HEAD_DIM}, not {max(request.head_dim, request.value_dim)}.",
            "Write `device: cpu` under `target`.",
        )
    if request.queries_per_kv > MOST_QUERIES:
        raise TargetError.at(
            where,
            f"the Triton kernel goes up to {MOST_QUERIES} queries per KV head, not {request.queries_per_kv}.",
            "Write `device: cpu` under `target`.",
        )


def _policy(request: KernelRequest) -> str:
    chunk = f", of its chunk of {request.chunk_tokens}" if request.chunk_tokens is not None else ""
    if request.recent_tokens is None:
        return f"Policy: every token so far{chunk}."
    seen = f"the first {request.sink_tokens} tokens (sinks) and the last {request.recent_tokens}, the query's own included"
    return f"Policy: {seen}{chunk}."


def _storage(request: KernelRequest) -> str:
    words = [f"Logits are {request.scale} * q.k"]
    if request.soft_cap is not None:
        words.append(f"soft-capped at {request.soft_cap}")
    if request.learnt_sinks:
        words.append("with a learnt sink in the denominator")
    return f"{', '.join(words)}; {request.store_dtype} stores, sums in float32."


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
