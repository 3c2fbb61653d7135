"""Runs the Triton kernel "attend over spans" (codegen/triton): one new token of each session, for one group of KV heads.

The kernel comes as source text.  Nothing here imports Triton: the loaded module does.

Letters: N sessions, H KV heads, G queries per KV head, S = 1 new token, D head_dim, E value_dim.

Rules:
1. The visible keys of a head, in position order, are cut into chunks counted from the first.  A chunk is one work row, or
   several where it lies in more than two places; so a head that sees a few sinks and a short window is one row.  Sinks that
   are shown another query (cache_index) are chunks of their own.
2. A result depends on a head's own keys and rows, never on which other heads or sessions share the launch.
3. Offsets and strides count vectors: 16 bytes, or less for odd head sizes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from kvcompile.ir.request import KernelRequest
from kvcompile.runtime.attend import plan_tiles
from kvcompile.runtime.merge import AttentionState
from kvcompile.runtime.spans import Span

CHUNK_TOKENS = 512
ROW_FIELDS = 7  # head, then key offset, value offset and tokens of two ranges
OFFSETS = [1, 2, 4, 5]

Place = tuple[int, int, int]  # span, its first token, tokens


@dataclass(frozen=True)
class Work:
    """What the programs of one launch do; see the comment on top of the kernel's source.

    Valid until one of the spans' stores changes: rows hold places in memory, and only the first span is kept alive.
    keys, values: of the first span, what offsets count from.  rows: int64 [items, 7].  first: int32 [N x H + 1].
    key_stride, value_stride: from token to token, in vectors of `vector` elements (rule 3).
    """

    keys: Tensor
    values: Tensor
    rows: Tensor
    first: Tensor
    key_stride: int
    value_stride: int
    vector: int


def load(source: str, folder: Path) -> ModuleType:
    """The kernel's source as a module, from a file of the folder: Triton reads a kernel's text through its file.

    The file is named after its content and appears whole, so processes may share the folder.
    """
    name = f"kvcompile_triton_{hashlib.sha256(source.encode()).hexdigest()[:16]}"
    path = folder.resolve() / f"{name}.py"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, suffix=".tmp", delete=False) as file:
            file.write(source)
        os.replace(file.name, path)
    return _imported(name, path)


@cache
def _imported(name: str, path: Path) -> ModuleType:
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification is not None and specification.loader is not None, path
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module
    specification.loader.exec_module(module)
    return module


def attend_spans(
    kernel: ModuleType,
    request: KernelRequest,
    query_HGSD: Tensor,
    spans: Sequence[Span],
    first_query: int,
    *,
    sinks_HG: Tensor | None = None,
    sink_query_HGSD: Tensor | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> AttentionState:
    """Attention of one new token at position first_query over the keys of `spans` that the request's policy shows it.

    query_HGSD: [H, G, 1, D] in the request's dtype; the kernel rounds it to the stores'.
    spans: at least one, in position order, not overlapping.
    sinks_HG: float32 [H, G], exactly when the request has learnt sinks; they join the denominator.
    sink_query_HGSD: like query_HGSD, exactly when the request has cache_index: what the first tokens are shown.
    Returns float32 out [H, G, 1, E] and lse [H, G, 1], natural logarithm; (0, -inf) where no key is visible, or (0, sink).
    """
    assert query_HGSD.shape[2] == 1, f"the decode kernel takes one new token, not {query_HGSD.shape[2]}"
    work = plan_work(request, [spans], [first_query], chunk_tokens)
    sink_query_NHGD = None if sink_query_HGSD is None else sink_query_HGSD.squeeze(2).unsqueeze(0)
    state = attend_work(kernel, request, query_HGSD.squeeze(2).unsqueeze(0), work, sinks_HG, sink_query_NHGD)
    return AttentionState(state.out.squeeze(0).unsqueeze(2), state.lse.squeeze(0).unsqueeze(2))


def plan_work(
    request: KernelRequest, spans_N: Sequence[Sequence[Span]], positions_N: Sequence[int], chunk_tokens: int = CHUNK_TOKENS
) -> Work:
    """The work rows of one new token of each session: positions_N are the tokens' own.  Every span is on one device."""
    base = spans_N[0][0]
    kv_heads = base.key_HTD.shape[0]
    rows: list[Tensor] = []
    first = [0]
    for session, (spans, position) in enumerate(zip(spans_N, positions_N, strict=True)):
        for span in spans:
            _check_layout(span, base, request)
        head_0, per_head = _rows_of_head_0(_chunks(request, spans, position, chunk_tokens), spans, base, len(spans_N) * kv_heads)
        heads = torch.arange(kv_heads)[:, None, None]
        rows.append((head_0 + heads * per_head).view(-1, ROW_FIELDS))
        rows[-1][:, 0] += session * kv_heads
        first += [first[-1] + head_0.shape[0] * (head + 1) for head in range(kv_heads)]
    table = torch.cat(rows)
    vector = _vector(request, base.key_HTD.dtype)
    strides = torch.tensor([base.key_HTD.stride(1), base.value_HTE.stride(1)])
    assert not (table[:, OFFSETS] % vector).any() and not (strides % vector).any(), f"keys or values lie at no multiples of {vector}"
    table[:, OFFSETS] //= vector
    assert chunk_tokens * int(strides.max()) < 2**31, "the kernel counts within a chunk in int32"
    key_stride, value_stride = (strides // vector).tolist()
    device = base.key_HTD.device
    first_row = torch.tensor(first, dtype=torch.int32, device=device)
    return Work(base.key_HTD, base.value_HTE, table.to(device), first_row, key_stride, value_stride, vector)


def attend_work(
    kernel: ModuleType,
    request: KernelRequest,
    query_NHGD: Tensor,
    work: Work,
    sinks_HG: Tensor | None = None,
    sink_query_NHGD: Tensor | None = None,
) -> AttentionState:
    """Launches the kernel: out float32 [N, H, G, E], lse float32 [N, H, G]."""
    sessions, kv_heads, queries_per_kv, _ = query_NHGD.shape
    assert (sinks_HG is not None) == request.learnt_sinks, "learnt sinks go with a request that has them, and only with it"
    assert queries_per_kv == request.queries_per_kv and work.first.shape[0] == sessions * kv_heads + 1
    assert kernel.VECTOR.value == work.vector, (kernel.VECTOR, work.vector)
    assert str(query_NHGD.dtype) == f"torch.{request.dtype}", query_NHGD.dtype
    assert (sink_query_NHGD is not None) == request.cache_index, "a query for the sinks goes with a request for it, and only with it"
    query_NHGD = query_NHGD.contiguous() if sink_query_NHGD is None else torch.cat([query_NHGD, sink_query_NHGD])
    items = work.rows.shape[0]
    assert items * queries_per_kv * request.value_dim < 2**31, "the kernels count the parts' numbers in int32"
    part_out = query_NHGD.new_empty(items, queries_per_kv, request.value_dim, dtype=torch.float32)
    part_lse = query_NHGD.new_empty(items, queries_per_kv, dtype=torch.float32)
    out = query_NHGD.new_empty(sessions, kv_heads, queries_per_kv, request.value_dim, dtype=torch.float32)
    lse = query_NHGD.new_empty(sessions, kv_heads, queries_per_kv, dtype=torch.float32)
    sinks = () if sinks_HG is None else (sinks_HG.float().contiguous(),)
    tensors = (query_NHGD, work.keys, work.values, work.rows, work.first, part_out, part_lse, *sinks, out, lse)
    with torch.cuda.device_of(query_NHGD):  # Triton launches on the current device
        kernel.decode(*tensors, work.key_stride, work.value_stride)
    return AttentionState(out, lse)


@dataclass(frozen=True)
class _Chunk:
    """Keys in the places that hold them.  sinks: they are shown the query that is theirs."""

    sinks: bool
    places: list[Place]


def _chunks(request: KernelRequest, spans: Sequence[Span], position: int, chunk_tokens: int) -> list[_Chunk]:
    """The visible keys, rule 1; [] when no key is visible."""
    policy = request.sink_tokens, request.recent_tokens, request.chunk_tokens, request.cache_index
    [tile] = plan_tiles(spans, position, 1, *policy)
    chunks: list[_Chunk] = []
    room = 0
    for sinks, piece in ((block.sinks, piece) for block in tile.blocks for piece in block.pieces):
        start, end = piece.start, piece.start + piece.tokens
        while start < end:
            if not room or chunks[-1].sinks != sinks:
                chunks.append(_Chunk(sinks, []))
                room = chunk_tokens
            tokens = min(room, end - start)
            _append(chunks[-1].places, (piece.span, start, tokens))
            start, room = start + tokens, room - tokens
    return chunks


def _append(places: list[Place], place: Place) -> None:
    span, start, tokens = place
    if places and places[-1][0] == span and places[-1][1] + places[-1][2] == start:
        places[-1] = (span, places[-1][1], places[-1][2] + tokens)
    else:
        places.append(place)


def _rows_of_head_0(chunks: list[_Chunk], spans: Sequence[Span], base: Span, sink_queries: int) -> tuple[Tensor, Tensor]:
    """int64 [rows, 7] of KV head 0, and what each further head adds to them.  sink_queries: where those for the sinks begin."""
    starts = [(_distance(span.key_HTD, base.key_HTD), _distance(span.value_HTE, base.value_HTE)) for span in spans]
    rows, steps = [], []
    for chunk in chunks:
        places = chunk.places
        for at in range(0, len(places), 2):
            row, step = [sink_queries if chunk.sinks else 0], [1]
            for index, start, tokens in places[at : at + 2]:
                key_HTD, value_HTE = spans[index].key_HTD, spans[index].value_HTE
                key, value = starts[index]
                row += [key + start * key_HTD.stride(1), value + start * value_HTE.stride(1), tokens]
                step += [key_HTD.stride(0), value_HTE.stride(0), 0]
            rows.append(row + [0] * (ROW_FIELDS - len(row)))
            steps.append(step + [0] * (ROW_FIELDS - len(step)))
    return torch.tensor(rows, dtype=torch.int64).view(-1, ROW_FIELDS), torch.tensor(steps, dtype=torch.int64).view(-1, ROW_FIELDS)


def _distance(tensor: Tensor, base: Tensor) -> int:
    """From the base's first element to the tensor's, in elements; they need not share a storage."""
    distance, rest = divmod(tensor.data_ptr() - base.data_ptr(), base.element_size())
    assert rest == 0
    return distance


def _vector(request: KernelRequest, dtype: torch.dtype) -> int:
    """Elements; as codegen/triton writes it into the source."""
    return min(16 // dtype.itemsize, request.head_dim & -request.head_dim, request.value_dim & -request.value_dim)


def _check_layout(span: Span, base: Span, request: KernelRequest) -> None:
    for tensor, first, dim in ((span.key_HTD, base.key_HTD, request.head_dim), (span.value_HTE, base.value_HTE, request.value_dim)):
        assert tensor.dtype == first.dtype and str(tensor.dtype) == f"torch.{request.store_dtype}", tensor.dtype
        assert tensor.shape[0] == first.shape[0] and tensor.shape[2] == dim, tensor.shape
        assert tensor.stride()[1:] == (first.stride(1), 1), f"tokens {tensor.stride()} elements apart, not {first.stride()}"
