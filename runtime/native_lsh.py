"""The C++ library that hashes vectors, fills hash tables and looks into them (codegen/cpp/lsh.cpp).

Letters: H KV heads, N vectors, T keys, L tables, X borders, B blocks of 16 hyperplanes, D head_dim.

Buckets, places and borders have 16 bits without a sign; torch has few functions for such numbers, so that they stand in int16.  One library
serves the process: the one that was loaded last, should models ask for different instruction sets.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kvcompile.ir.errors import Problem, TargetError

_int, _address = ctypes.c_int64, ctypes.c_void_p


class Planes(NamedTuple):
    """Hyperplanes: normal_BD16, float32, those of a table one behind the other; `bits` of them a table; largest: norm of a normal."""

    normal_BD16: Tensor
    bits: int
    tables: int
    largest: float


class Part(NamedTuple):
    """Tables over keys at positions from `first` on.

    order_HLT: their places by bucket, ascending in each.  border_HLX: where each bucket begins; of fewer keys than buckets the bucket of
    each place in `order_HLT`.
    """

    first: int
    order_HLT: Tensor
    border_HLX: Tensor

    @property
    def tokens(self) -> int:
        return self.order_HLT.shape[2]

    @property
    def end(self) -> int:
        return self.first + self.tokens

    @property
    def nbytes(self) -> int:
        return self.order_HLT.nbytes + self.border_HLX.nbytes


class Met(NamedTuple):
    """position_HNK: of the keys that a query meets in two tables or more, int64, ascending, then -1.

    places_HN: in how many places of tables it met keys.
    """

    position_HNK: Tensor
    places_HN: Tensor


class _Planes(ctypes.Structure):
    _fields_ = (("normals", _address), *((name, _int) for name in ("blocks", "dim", "bits", "tables")), ("largest", ctypes.c_double))


class _Tables(ctypes.Structure):
    _fields_ = (("order", _address), ("borders", _address), ("first", _int), ("keys", _int))


class LshLibrary:
    """The functions of the library, with the number of threads that torch has."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._hash, self._sort, self._search = library.kvc_lsh_hash, library.kvc_lsh_sort, library.kvc_lsh_search
        self._hash.argtypes = [_address, _address, _int, _int, _address, _int]
        self._sort.argtypes = [_address, _int, _int, _int, _address, _address, _int]
        self._search.argtypes = [_address, *[_int] * 4, _address, _int, _address, _int, _address, _address, _int]
        for function in (self._hash, self._sort, self._search):
            function.restype = _int

    def hash(self, planes: Planes, vector_HND: Tensor) -> Tensor:
        """The bucket of each vector (float32) in each table, [H, L, N]."""
        vector_HND = vector_HND.contiguous()
        heads, count, dim = vector_HND.shape
        assert vector_HND.dtype == torch.float32 and planes.normal_BD16.is_contiguous()
        code_HLN = torch.empty(heads, planes.tables, count, dtype=torch.int16)
        blocks = len(planes.normal_BD16)
        given = _Planes(planes.normal_BD16.data_ptr(), blocks, dim, planes.bits, planes.tables, planes.largest)
        where = vector_HND.data_ptr(), heads, count, code_HLN.data_ptr(), torch.get_num_threads()
        _check(self._hash(ctypes.addressof(given), *where))
        return code_HLN

    def sort(self, code_HLT: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """order_HLT and border_HLX of a part whose keys have these buckets."""
        code_HLT = code_HLT.contiguous()
        heads, tables, tokens = code_HLT.shape
        order_HLT, border_HLX = torch.empty_like(code_HLT), code_HLT.new_empty(heads, tables, min(tokens, 1 << bits))
        where = order_HLT.data_ptr(), border_HLX.data_ptr(), torch.get_num_threads()
        _check(self._sort(code_HLT.data_ptr(), heads * tables, tokens, bits, *where))
        return order_HLT, border_HLX

    def search(self, parts: Sequence[Part], code_HLN: Tensor, bits: int) -> Met:
        """What queries in these buckets meet."""
        code_HLN = code_HLN.contiguous()
        heads, tables, queries = code_HLN.shape
        assert all(each.is_contiguous() for part in parts for each in (part.order_HLT, part.border_HLX))
        given = (_Tables * len(parts))(
            *(_Tables(part.order_HLT.data_ptr(), part.border_HLX.data_ptr(), part.first, part.tokens) for part in parts)
        )
        room = sum(part.tokens for part in parts)
        found_HNT = torch.empty(heads, queries, room, dtype=torch.int64)  # memory is taken only for what is written
        count_HN, places_HN = torch.empty(2, heads, queries, dtype=torch.int64).unbind()
        shape = len(parts), heads, tables, bits
        where = found_HNT.data_ptr(), room, count_HN.data_ptr(), places_HN.data_ptr(), torch.get_num_threads()
        _check(self._search(ctypes.addressof(given), *shape, code_HLN.data_ptr(), queries, *where))
        most = int(count_HN.max()) if count_HN.numel() else 0
        return Met(torch.where(torch.arange(most) < count_HN[..., None], found_HNT[..., :most], -1), places_HN)


def _check(code: int) -> None:
    if code:
        raise MemoryError("no memory for hash tables over keys")


_library: LshLibrary | None = None


def load_lsh(path: Path) -> LshLibrary:
    """Loads the library and makes it the one that indexes use.  Raises TargetError where it cannot be loaded."""
    global _library
    try:
        _library = LshLibrary(ctypes.CDLL(str(path)))
    except (OSError, AttributeError) as error:
        what = f"the library of hash tables cannot be loaded: {error}."
        raise TargetError(Problem(str(path), what, "`kvcompile cache --clear` removes it; it is built again.")) from error
    return _library


def lsh_library() -> LshLibrary | None:
    """The library that was loaded; None where none is, and torch does its work."""
    return _library
