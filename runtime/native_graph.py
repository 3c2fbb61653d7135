"""The C++ library that builds graphs over keys, lets them grow and walks through them (codegen/cpp/roargraph.cpp), as an index calls it.

Letters: H KV heads, U graphs of a KV head, T nodes, S slots, N queries of a KV head, L training queries of a graph, D head_dim, K found,
X entries.

Keys are read where spans have them; nothing is kept of a call but what it writes.  One library serves the process: the one that was loaded
last, should models ask for different instruction sets.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kvcompile.ir.errors import Problem, TargetError
from kvcompile.runtime.spans import Span

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # KeyType
_int, _address = ctypes.c_int64, ctypes.c_void_p


class _Part(ctypes.Structure):
    _fields_ = (("rows", _address), ("row_bytes", _int), ("first", _int), ("end", _int))


class _Graphs(ctypes.Structure):
    _fields_ = (
        ("parts", _address),
        *((name, _int) for name in ("part_count", "heads", "dim", "type", "nodes", "graphs", "slots")),
        ("rows", _address),
        ("entries", _address),
        ("entry_count", _int),
        ("threads", _int),
        ("norms", _address),
        ("metric", _address),
        ("mean", _address),
    )


class _Build(ctypes.Structure):
    _fields_ = (
        *((name, _int) for name in ("queries", "neighbours", "degree", "links", "joined", "width", "looked_at")),
        ("query", _address),
        ("limits", _address),
    )


@dataclass(frozen=True)
class Shape:
    """neighbours: of a training query.  degree: links of a key that are learnt; links: with those that a build joins to them.  joined: as
    many from one key's own walk, `width` wide.  looked_at: candidates that a key's links are chosen from.
    """

    neighbours: int
    degree: int
    links: int
    joined: int
    width: int
    looked_at: int


@dataclass
class Graphs:
    """rows_THUS: int32, of each node the nodes that it leads to, then -1; norm_THU: its squared norm, as the metric measures.  entries_HUX:
    int32, where walks begin.  metric_HUDD: the training queries' second moment.  mean_HUD: of the keys that the graph was learnt with.
    float32.
    """

    rows_THUS: Tensor
    norm_THU: Tensor
    entries_HUX: Tensor
    metric_HUDD: Tensor
    mean_HUD: Tensor

    def first(self, nodes: int) -> Graphs:
        """The graphs of the first nodes, in the same memory."""
        return replace(self, rows_THUS=self.rows_THUS[:nodes], norm_THU=self.norm_THU[:nodes])


class Walks(NamedTuple):
    """node_HNK: int64, ascending.  keys_HN, hops_HN: keys that a walk read, and nodes that it went on from; int64."""

    node_HNK: Tensor
    keys_HN: Tensor
    hops_HN: Tensor


class GraphLibrary:
    """The functions of the library, with the number of threads that torch has."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._build, self._add = library.kvc_graph_build, library.kvc_graph_add
        self._search, self._exact = library.kvc_graph_search, library.kvc_graph_exact
        self._build.argtypes = [_address, _address]
        self._add.argtypes = [_address, _address, _int]
        self._search.argtypes = [_address, _address, _int, _int, _int, _address, _address]
        self._exact.argtypes = [_address, _address, _address, _int, _int, _address]
        for function in (self._build, self._add, self._search, self._exact):
            function.restype = _int

    def build(self, spans: Sequence[Span], query_HULD: Tensor, limit_L: Tensor, shape: Shape, graphs: Graphs) -> None:
        """Writes the graphs, of at least one node.  limit_L: a query may find nodes before it."""
        keys = _Keys(spans, graphs)
        query_HULD, limit_L = query_HULD.contiguous(), limit_L.contiguous()
        build = _described(shape, query_HULD.data_ptr(), limit_L.data_ptr(), len(limit_L))
        _check(self._build(ctypes.addressof(keys.graphs), ctypes.addressof(build)))

    def add(self, spans: Sequence[Span], first: int, shape: Shape, graphs: Graphs) -> None:
        """Nodes from `first` on, which is not 0, join."""
        keys, build = _Keys(spans, graphs), _described(shape, None, None, 0)
        _check(self._add(ctypes.addressof(keys.graphs), ctypes.addressof(build), first))

    def search(self, spans: Sequence[Span], query_HND: Tensor, k: int, width: int, graphs: Graphs) -> Walks:
        """k <= T, k <= width.  Query n walks through graph n * U // N."""
        keys, query_HND = _Keys(spans, graphs), query_HND.contiguous()
        heads, queries, _ = query_HND.shape
        node_HNK, walked_HN2 = (torch.empty(heads, queries, last, dtype=torch.int64) for last in (k, 2))
        where = node_HNK.data_ptr(), walked_HN2.data_ptr()
        _check(self._search(ctypes.addressof(keys.graphs), query_HND.data_ptr(), queries, k, width, *where))
        return Walks(node_HNK, walked_HN2[..., 0], walked_HN2[..., 1])

    def exact(self, spans: Sequence[Span], query_HND: Tensor, limit_N: Tensor, k: int) -> Tensor:
        """The k nodes before its limit with the largest products, of every query: int32 [H, N, K], best first, -1 where there are fewer."""
        heads, queries, _ = query_HND.shape
        some = torch.empty(0)
        none = Graphs(torch.empty(sum(span.tokens for span in spans), heads, 1, 0, dtype=torch.int32), some, some[None, None], some, some)
        keys, query_HND, limit_N = _Keys(spans, none), query_HND.contiguous(), limit_N.contiguous()
        node_HNK = torch.empty(heads, queries, k, dtype=torch.int32)
        where = query_HND.data_ptr(), limit_N.data_ptr(), queries, k, node_HNK.data_ptr()
        _check(self._exact(ctypes.addressof(keys.graphs), *where))
        return node_HNK


class _Keys:
    """Where keys and graphs lie.  Holds what the addresses are of."""

    def __init__(self, spans: Sequence[Span], graphs: Graphs) -> None:
        nodes, heads, of_each, slots = graphs.rows_THUS.shape
        assert all(tensor.is_contiguous() for tensor in vars(graphs).values())
        self._held = [_readable(span.key_HTD) for span in spans]
        types = {key_HTD.dtype for key_HTD in self._held}
        assert len(types) == 1, types
        parts, first = [], spans[0].first
        for head in range(heads):
            for span, key_HTD in zip(spans, self._held, strict=True):
                row_bytes, at = key_HTD.stride(1) * key_HTD.itemsize, key_HTD.data_ptr() + head * key_HTD.stride(0) * key_HTD.itemsize
                parts.append(_Part(at, row_bytes, span.first - first, span.end - first))
        assert parts[-1].end == nodes, (parts[-1].end, nodes)
        self._parts = (_Part * len(parts))(*parts)
        self.graphs = _Graphs(
            ctypes.addressof(self._parts),
            len(spans),
            heads,
            self._held[0].shape[2],
            _TYPES[self._held[0].dtype],
            nodes,
            of_each,
            slots,
            graphs.rows_THUS.data_ptr(),
            graphs.entries_HUX.data_ptr(),
            graphs.entries_HUX.shape[2],
            torch.get_num_threads(),
            graphs.norm_THU.data_ptr(),
            graphs.metric_HUDD.data_ptr(),
            graphs.mean_HUD.data_ptr(),
        )


def _readable(key_HTD: Tensor) -> Tensor:
    """The keys themselves, if the library knows their numbers and they lie a token a row; else a copy."""
    key_HTD = key_HTD if key_HTD.dtype in _TYPES else key_HTD.float()
    return key_HTD if key_HTD.stride(2) == 1 or key_HTD.shape[2] == 1 else key_HTD.contiguous()


def _described(shape: Shape, query: int | None, limits: int | None, queries: int) -> _Build:
    return _Build(queries, shape.neighbours, shape.degree, shape.links, shape.joined, shape.width, shape.looked_at, query, limits)


def _check(code: int) -> None:
    if code:
        raise MemoryError("no memory for a graph over keys")


_library: GraphLibrary | None = None


def load_graphs(path: Path) -> GraphLibrary:
    """Loads the library and makes it the one that indexes use.  Raises TargetError where it cannot be loaded."""
    global _library
    try:
        _library = GraphLibrary(ctypes.CDLL(str(path)))
    except (OSError, AttributeError) as error:
        what = f"the library of graphs cannot be loaded: {error}."
        raise TargetError(Problem(str(path), what, "`kvcompile cache --clear` removes it; it is built again.")) from error
    return _library


def graph_library() -> GraphLibrary:
    """The library that was loaded.  Raises TargetError where none is."""
    if _library is None:
        what = "walks through a graph in C++, and that library is not loaded."
        raise TargetError(Problem("the index roargraph", what, "Compile a model whose spec names it, with g++ installed or CXX set."))
    return _library
