"""Facts of the index `lsh`, which draws keys by chance: options, bytes and probabilities.  Its code is runtime/indexes/lsh.py.

Source: MagicPIG (Chen et al. 2024, section 4).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from kvcompile.ir.index_terms import Fault, IndexBytes

PART_TOKENS = 32768  # keys whose tables lie together, so that a key's place among them has 2 bytes
LEAST_COLLISIONS = 2  # of a key's tables that a query must meet it in
_STEPS = 512  # of the integral over all angles


@dataclass(frozen=True)
class LshFacts:
    """Options: hash_bits, of a key in one table; tables; seed, of the hyperplanes.  It draws keys and is never asked for k of them."""

    queries_per_kv: int = 1

    name = "lsh"
    estimates = False
    scores = False
    samples = True
    ranges: ClassVar[dict[str, tuple[int, int, int]]] = {"hash_bits": (10, 1, 16), "tables": (150, 2, 1024), "seed": (0, 0, (1 << 63) - 1)}

    def check(self, options: Mapping[str, Any]) -> list[Fault]:
        faults = []
        for name, given in options.items():
            if name not in self.ranges:
                faults.append(Fault(name, "is no option of lsh.", f"Write {', '.join(self.ranges)}, or take it out."))
                continue
            usual, least, most = self.ranges[name]
            if type(given) is not int or not least <= given <= most:
                why = f": a key is drawn that the query meets in {LEAST_COLLISIONS} of them" if name == "tables" and given == 1 else ""
                what = f"{given!r} is not allowed: a whole number from {least} to {most}{why}."
                faults.append(Fault(name, what, f"Write for example {name}: {usual}."))
        return faults

    def option(self, name: str, options: Mapping[str, Any]) -> int:
        """What a spec says, or the usual."""
        return int(options.get(name, self.ranges[name][0]))

    def for_group(self, queries_per_kv: int) -> LshFacts:
        return replace(self, queries_per_kv=queries_per_kv)

    def sampled_share(self, head_dim: int, options: Mapping[str, Any]) -> float:
        """The share of keys that a query is expected to draw where all directions are equally likely."""
        return _isotropic_share(head_dim, self.option("hash_bits", options), self.option("tables", options))

    def bytes_per_token(self, head_dim: int, value_dim: int, itemsize: int, options: Mapping[str, Any]) -> IndexBytes:
        """searched: 2 bytes of each key that a query meets in a table, every bucket as long as all others, and 2 bits of each key to count
        in.  Beside that where a bucket of each table begins and ends, and once for all KV heads the hyperplanes."""
        bits, tables = self.option("hash_bits", options), self.option("tables", options)
        met = tables / 2**bits
        held = 2.0 * tables * (1 + min(1.0, 2**bits / PART_TOKENS))
        searched = self.queries_per_kv * (2 * met + 0.25)
        return IndexBytes(held, searched, 0.0, 4 * tables * self.queries_per_kv, 4 * padded_planes(bits, tables) * head_dim)

    def held_bytes(self, tokens: int, options: Mapping[str, Any]) -> int:
        """Of a KV head's tables over so many keys that came at once."""
        bits, tables = self.option("hash_bits", options), self.option("tables", options)
        whole, rest = divmod(tokens, PART_TOKENS)
        return whole * table_bytes(PART_TOKENS, bits, tables) + table_bytes(rest, bits, tables)

    def fixed_bytes(self, head_dim: int, value_dim: int, options: Mapping[str, Any]) -> int:
        return 4 * head_dim  # the mean that keys are centred by

    def build_work(self, head_dim: int, options: Mapping[str, Any]) -> float:
        """A product with every hyperplane, and a place in every table."""
        bits, tables = self.option("hash_bits", options), self.option("tables", options)
        return float(tables * (bits * head_dim + SORT_WORK))


SORT_WORK = 64  # multiply-adds of a prompt in the time in which a key comes into one table


def padded_planes(hash_bits: int, tables: int) -> int:
    """Hyperplanes lie in blocks of 16."""
    return -(-hash_bits * tables // 16) * 16


def table_bytes(tokens: int, hash_bits: int, tables: int) -> int:
    """Of the tables over so many keys that lie together: the keys by bucket, and where buckets begin or, of fewer keys than buckets, the
    bucket of each."""
    return 2 * tables * (tokens + min(tokens, 1 << hash_bits))


def drawn_probability(angle: float, hash_bits: int, tables: int) -> float:
    """With which a key at this angle (radians) from a query is drawn: in at least two tables all bits are the same."""
    same = (1 - angle / math.pi) ** hash_bits
    if tables * same < 1e-2:  # the first terms of the binomial: the difference below would lose digits
        return sum(math.comb(tables, n) * same**n * (1 - same) ** (tables - n) for n in range(2, min(tables, 6) + 1))
    return 1 - (1 - same) ** tables - tables * same * (1 - same) ** (tables - 1)


@functools.cache
def _isotropic_share(head_dim: int, hash_bits: int, tables: int) -> float:
    """The mean of `drawn_probability` over directions in head_dim dimensions: angles have the density sin^(head_dim - 2)."""
    total = weights = 0.0
    for step in range(_STEPS):
        angle = math.pi * (step + 0.5) / _STEPS
        weight = math.sin(angle) ** max(0, head_dim - 2)
        total, weights = total + weight * drawn_probability(angle, hash_bits, tables), weights + weight
    return total / weights


LSH = LshFacts()
