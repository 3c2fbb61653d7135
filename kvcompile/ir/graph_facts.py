"""Facts of the index `roargraph`: its options, and its bytes.  Its code is runtime/indexes/roargraph.py.

Source: RetrievalAttention (Liu et al. 2024), RoarGraph (Chen et al. 2024).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

from kvcompile.ir.index_terms import Fault, IndexBytes

GRAPH_ENTRIES = 9  # nodes where a walk through a graph begins
GRAPH_SCANNED = 0.07  # of the keys: as measured at 32K tokens (docs/graphs.md)


class _Range(NamedTuple):
    default: int
    least: int
    most: int


@dataclass(frozen=True)
class RoarGraphFacts:
    """A graph over the keys, learnt from queries.

    queries:    training queries a KV head, at most.  neighbours: keys that are found for each of them.
    degree:     keys that a key leads to; half as many more join them later.
    ef:         width of a search's beam; left out, the larger of 256 and two and a half times k.
    per:        kv_head: one graph learnt from the queries of all query heads that share it; query_head: one for each of these.
    """

    queries_per_kv: int = 1

    name = "roargraph"
    estimates = False
    scores = False
    ranges: ClassVar[dict[str, _Range]] = {
        "queries": _Range(4096, 64, 65536),
        "neighbours": _Range(200, 4, 1024),
        "degree": _Range(16, 4, 64),
        "ef": _Range(0, 1, 1 << 16),
    }

    def check(self, options: Mapping[str, Any]) -> list[Fault]:
        faults = []
        for name, given in options.items():
            if name == "per":
                if given not in ("kv_head", "query_head"):
                    faults.append(Fault(name, f"{given!r} is not allowed: kv_head or query_head.", "Write per: kv_head."))
            elif name not in self.ranges:
                known = f"{', '.join(self.ranges)} or per"
                faults.append(Fault(name, "is no option of roargraph.", f"Write {known}, or take it out."))
            elif type(given) is not int or not self.ranges[name].least <= given <= self.ranges[name].most:
                allowed = self.ranges[name]
                what = f"{given!r} is not allowed: a whole number from {allowed.least} to {allowed.most}."
                faults.append(Fault(name, what, f"Write for example {name}: {allowed.default or 256}."))
        return faults

    def option(self, name: str, options: Mapping[str, Any]) -> int:
        """What a spec says, or the default; ef 0: left out."""
        return int(options.get(name, self.ranges[name].default))

    def slots(self, options: Mapping[str, Any]) -> int:
        """Numbers of 4 bytes that a key has room for in a graph."""
        degree = self.option("degree", options)
        return degree + degree // 2

    def graphs(self, options: Mapping[str, Any]) -> int:
        """Of one KV head."""
        return self.queries_per_kv if options.get("per") == "query_head" else 1

    def training_queries(self, options: Mapping[str, Any]) -> int:
        return self.option("queries", options)

    def for_group(self, queries_per_kv: int) -> RoarGraphFacts:
        return replace(self, queries_per_kv=queries_per_kv)

    def bytes_per_token(self, head_dim: int, value_dim: int, itemsize: int, options: Mapping[str, Any]) -> IndexBytes:
        """searched: where every query head that shares a KV head walks for itself."""
        held = 4.0 * self.graphs(options) * (self.slots(options) + 1)
        return IndexBytes(held, GRAPH_SCANNED * self.queries_per_kv * head_dim * itemsize, 0.0)

    def build_work(self, head_dim: int, options: Mapping[str, Any]) -> float:
        """With the usual options, at 4K to 32K tokens (docs/graphs.md)."""
        return (4.5e6 + 1.5e5 * head_dim) * self.graphs(options)

    def fixed_bytes(self, head_dim: int, value_dim: int, options: Mapping[str, Any]) -> int:
        return 4 * (GRAPH_ENTRIES + head_dim * (head_dim + 1)) * self.graphs(options)


ROARGRAPH = RoarGraphFacts()
