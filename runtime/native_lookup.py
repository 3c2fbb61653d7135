"""The C++ kernels that attend through a sketch, as the sessions call them: one operator a site, for one new token a session.

Scan, choice, attention over the chosen keys and over the window, and the estimate of the rest happen in the operator
`kvc_native::lookup` (codegen/cpp/lookup_operator.cpp).

Letters: H KV heads, R rows of the table, D head_dim, C coordinates.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvcompile.ir.policy import Select
from kvcompile.runtime.indexes.index import KeyIndex
from kvcompile.runtime.indexes.sketch import SketchIndex
from kvcompile.runtime.indexes.sketch_gaps import near_runs

if TYPE_CHECKING:
    from kvcompile.runtime.lookup import LookupStore


class Column(IntEnum):
    """What a row of the operator's table says: the KV heads of a site that share a policy, in one session with one new token."""

    KERNEL = 0  # NativeKernels.name as a number, signed
    STORE = 1  # address of the store's descriptor; keys lie a token a row
    SKETCH = 2  # address of `sketch_words`; 0: every earlier token is attended to
    HEADS = 3  # where its KV heads begin in the site's list of them
    HEAD_COUNT = 4
    START = 5  # row of the session's new token in the call
    OUT_ROW = 6  # row of the result
    BEFORE = 7  # tokens that the session had read before the call
    K = 8  # keys that a query head chooses; as many as the sketch covers, or more: every earlier token is attended to
    SELECT = 9  # SELECTS
    TAIL = 10  # 1: what is not read is estimated


SELECTS: dict[Select, int] = {"per_query_head": 0, "union": 1, "sum": 2, "max": 3}


def sketch_words(index: SketchIndex) -> Tensor:
    """Where the sketch lies, int64: good as long as the index has the same parts and gaps (with which its centres change), which must be
    kept alive.

    SketchWord in codegen/cpp/lookup_head.h names them; behind them, of each part, its tokens and the addresses of codes, position, mean and
    mean_scale.
    """
    basis, centres, rows = index.basis, index.centres, index.parts[0]
    looked = near_runs(rows.runs, index.scanned, 0)
    words = [index.first, len(index.parts), index.end - index.first, basis.units, basis.run_units, basis.key_HDC.shape[2], looked]
    lie = (basis.centre_HD, basis.query_HXC2, basis.step_HS, basis.fine_H, basis.run_step_HS, index.gaps_HN)
    words += [_address(each) for each in (*lie, centres.codes_HSUB, centres.bias_HR, centres.mean_HSE, centres.mean_scale_HS)]
    for part in index.parts:
        words += [part.tokens, *(_address(each) for each in (part.codes_HNUB, part.position_HT, part.mean_HRE, part.mean_scale_HR))]
    return torch.tensor(words, dtype=torch.int64)


def lookup_row(
    kernel: int, store: LookupStore, index: KeyIndex | None, heads: int, head_count: int, start: int, out_row: int, before: int
) -> list[int]:
    """A row of the table; the columns' words are those of `Column`."""
    zone = store.zone
    k = zone.tokens(store.tokens)
    return [
        kernel,
        store.descriptor(),
        store.native_words(index),
        heads,
        head_count,
        start,
        out_row,
        before,
        k,
        SELECTS[zone.select],
        int(zone.tail),
    ]


def lookup_native(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    learnt_sinks: Tensor | None,
    tables: Sequence[Tensor],
    kv_heads: Tensor,
    out: Tensor,
) -> None:
    """Appends and attends for every row of `tables` (one [R, columns] a session), into `out` [1, rows, query_heads, value_dim].

    query [1, query_heads, tokens, head_dim]; key, value [1, kv_heads, tokens, ...]; kv_heads: NativeSite's.
    """
    table = tables[0] if len(tables) == 1 else torch.cat(list(tables))
    torch.ops.kvc_native.lookup.default(query, key, value, learnt_sinks, table, kv_heads, out)


def _address(tensor: Tensor) -> int:
    assert tensor.is_contiguous(), tensor.shape
    return tensor.data_ptr()
