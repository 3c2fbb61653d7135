"""What is said of an index: what is wrong with its options, and its bytes."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """option "" is the index as a whole."""

    option: str
    what: str
    mend: str


class IndexBytes(NamedTuple):
    """held: beside keys and values.  searched: read by a search.  estimated: read beside that where the rest is estimated.
    search_fixed: read by a search whatever the context; search_shared: likewise, once for all KV heads of a site.
    """

    held: float
    searched: float
    estimated: float
    search_fixed: int = 0
    search_shared: int = 0
