"""The index `lsh`: keys drawn by chance, those more likely that lie in a query's direction, each with a probability that is known.

Letters: H KV heads, G queries per KV head, T keys, L tables, B blocks of 16 hyperplanes, D head_dim, E value_dim, K keys drawn.

MagicPIG (Chen et al. 2024, section 4): a key is drawn that the query meets in two or more of `tables` hash tables, each by `hash_bits`
random hyperplanes.  Where query and key stand at an angle a, one bit is the same with probability p = 1 - a / pi, and the key is drawn with
u = 1 - (1 - p^bits)^tables - tables p^bits (1 - p^bits)^(tables - 1), over all hyperplanes that there could be.  Sums over keys that are
weighed by 1 / u are then right in the mean.

Keys are hashed less the mean of those that the index was made from, which adds the same to all logits of a query: without it keys of a
model stand all in one direction, and hardly one is ever drawn.  The angle is that of exactly the vectors that were hashed.

Keys that are added become a part of their own; parts of alike size become one, so that a search looks into few.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kvcompile.ir.indexes import BLOCK_TOKENS
from kvcompile.ir.lsh_facts import PART_TOKENS, LshFacts
from kvcompile.ir.policy import Select
from kvcompile.runtime.indexes.index import Borrowed, Found, Keys, Prompt, RecentQueries
from kvcompile.runtime.indexes.lsh_tables import cut, hashed, hyperplanes, interned, joined, met, parts_of, planes_of
from kvcompile.runtime.indexes.restoring import shaped, whole
from kvcompile.runtime.merge import AttentionState
from kvcompile.runtime.native_lsh import Part, Planes


class LshIndex:
    """planes: shared by all indexes that were made alike.  mean_HD: what keys are centred by, float32.  parts: in the order of positions,
    replaced and never changed: forks share them.  group: queries per KV head.

    asked, places: how many queries were asked in a KV head, and in how many places of tables they met keys.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, first: int, group: int, planes: Planes, mean_HD: Tensor, parts: tuple[Part, ...]) -> None:
        self.planes, self.mean_HD, self.parts = planes, mean_HD, parts
        self._first, self._group = first, group
        self.asked = self.places = 0
        self._borrowed = Borrowed()

    @property
    def first(self) -> int:
        return self._first

    @property
    def end(self) -> int:
        return self.parts[-1].end if self.parts else self._first

    @property
    def shape(self) -> tuple[int, int, int | None]:
        return *self.mean_HD.shape, None

    def add(self, key_HTD: Tensor, value_HTE: Tensor) -> None:
        parts = [*self.parts, *parts_of(self.planes, centred(key_HTD, self.mean_HD), self.end)]
        while len(parts) > 1 and parts[-2].tokens < 2 * parts[-1].tokens and parts[-2].tokens + parts[-1].tokens <= PART_TOKENS:
            parts[-2:] = [joined(parts[-2], parts[-1], self.planes.bits)]
        self.parts = tuple(parts)

    def search(self, query_HGD: Tensor, k: int, select: Select, keys: Keys) -> Found:
        """Each query head draws for itself; k is not asked for."""
        code_HLG = hashed(self.planes, query_HGD.float())
        found = met(self.parts, code_HLG, self.planes.bits)
        self.asked += found.places_HN.numel()
        self.places += int(found.places_HN.sum())
        return Found(found.position_HNK, k)

    def log_probability(self, query_HGD: Tensor, key_HGKD: Tensor) -> Tensor:
        """Of these keys' being drawn by these queries, [H, G, K] float32, natural logarithm."""
        key_HGKD = (key_HGKD.float() - self.mean_HD[:, None, None]).double()
        query_HGD1 = query_HGD.float().double()[..., None]
        key_size_HGK, query_size_HG1 = key_HGKD.norm(dim=3), query_HGD1.norm(dim=2)
        size_HGK = key_size_HGK * query_size_HG1
        cosine_HGK = ((key_HGKD @ query_HGD1).squeeze(3) / size_HGK).clamp(-1.0, 1.0)  # rounding may go beyond
        # a zero lies on one side of all hyperplanes: another vector is there as likely as not, another zero always
        cosine_HGK = torch.where(size_HGK > 0, cosine_HGK, (key_size_HGK + query_size_HG1 == 0).double())
        return log_drawn(torch.arccos(cosine_HGK), self.planes.bits, self.planes.tables).float()

    def rest(self, query_HGD: Tensor, found: Found, read_lse_HG: Tensor) -> AttentionState | None:
        return None

    def recalibrate(self, recent: RecentQueries, keys: Keys, k: int) -> bool:
        return True

    def rollback(self, end: int) -> None:
        kept = [part for part in self.parts if part.first < end]
        if kept and kept[-1].end > end:
            kept[-1] = cut(kept[-1], end - kept[-1].first, self.planes.bits)
        self.parts = tuple(kept)

    def fork(self) -> LshIndex:
        child = LshIndex(self._first, self._group, self.planes, self.mean_HD, self.parts)
        child._borrowed = Borrowed(child._held())
        return child

    def nbytes(self) -> int:
        """Without the hyperplanes, which belong to the process."""
        return sum(each.nbytes for each in self._held())

    def borrowed_nbytes(self) -> int:
        """Parts, until one of its own becomes one with the last of them."""
        return self._borrowed.nbytes(self._held())

    def _held(self) -> list[Tensor]:
        return [self.mean_HD, *(tensor for part in self.parts for tensor in (part.order_HLT, part.border_HLX))]

    def scanned_bytes(self, tail: bool, k: int) -> int:
        return self.planes.normal_BD16.nbytes + round(len(self.mean_HD) * self._group * self.query_bytes())

    def query_bytes(self) -> float:
        """What one query reads beside the hyperplanes: borders of buckets, places in them, and 2 bits a key to count in.

        Places: the mean of the queries so far, before the first one as many as there are where buckets are equally long.
        """
        bits, tables, tokens = self.planes.bits, self.planes.tables, self.end - self._first
        places = self.places / self.asked if self.asked else tables * tokens / 2**bits
        borders = sum(2 if part.tokens >= 1 << bits else 2 * part.tokens.bit_length() for part in self.parts)
        return 2 * tables * borders + tokens / 4 + 2 * places

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {"planes": self.planes.normal_BD16, "mean": self.mean_HD}
        for number, part in enumerate(self.parts):
            tensors |= {f"order {number}": part.order_HLT, f"border {number}": part.border_HLX}
        return {name: tensor.contiguous() for name, tensor in tensors.items()}, {
            "first": self._first,
            "group": self._group,
            "hash_bits": self.planes.bits,
            "tables": self.planes.tables,
            "parts": len(self.parts),
        }


def centred(key_HTD: Tensor, mean_HD: Tensor) -> Tensor:
    """What is hashed of keys: float32."""
    return key_HTD.float() - mean_HD[:, None]


def log_drawn(angle: Tensor, bits: int, tables: int) -> Tensor:
    """Natural logarithm of the probability of being drawn, float64 as the angle (radians) is; -inf at pi."""
    same = (1 - angle / math.pi).clamp_min(0.0) ** bits
    other = torch.log1p(-same)
    some = -torch.expm1(tables * other) - tables * same * torch.exp((tables - 1) * other)
    # of small probabilities the difference would lose digits: there the first terms of the binomial, which then fall fast
    few = torch.zeros_like(same)
    for times in range(2, min(tables, 6) + 1):
        few = few + math.comb(tables, times) * same**times * (1 - same) ** (tables - times)
    return torch.where(tables * same < 1e-2, few, some).log()


class Lsh(LshFacts):
    """The kind `lsh`."""

    def build(self, first: int, prompt: Prompt, options: Mapping[str, Any]) -> LshIndex:
        heads, tokens, head_dim = prompt.key_HTD.shape
        planes = hyperplanes(self.option("hash_bits", options), self.option("tables", options), self.option("seed", options), head_dim)
        mean_HD = prompt.key_HTD.float().mean(1) if tokens else torch.zeros(heads, head_dim)
        return LshIndex(first, prompt.queries_per_kv, planes, mean_HD, parts_of(planes, centred(prompt.key_HTD, mean_HD), first))

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> LshIndex:
        normal_BD16 = shaped(tensors, "planes", torch.float32, None, None, 16)
        mean_HD = shaped(tensors, "mean", torch.float32, None, normal_BD16.shape[1])
        bits, tables, count, first, group = (whole(numbers, name) for name in ("hash_bits", "tables", "parts", "first", "group"))
        faults = self.check({"hash_bits": bits, "tables": tables})
        if faults:
            raise ValueError(f"{faults[0].option} {faults[0].what}")
        if 16 * len(normal_BD16) < bits * tables:
            raise ValueError(f"{16 * len(normal_BD16)} hyperplanes for {tables} tables of {bits} bits")
        parts: list[Part] = []
        for number in range(count):
            part = Part(parts[-1].end if parts else first, tensors[f"order {number}"], tensors[f"border {number}"])
            _check_part(part, (len(mean_HD), tables), bits)
            parts.append(part)
        if (sum(part.tokens for part in parts)) % BLOCK_TOKENS:
            raise ValueError(f"it covers {parts[-1].end - first} tokens, no multiple of {BLOCK_TOKENS}")
        return LshIndex(first, group, planes_of(interned(normal_BD16), bits, tables), mean_HD, tuple(parts))


def _check_part(part: Part, lists: tuple[int, int], bits: int) -> None:
    """Raises ValueError for tables that a search would read beyond."""
    order_HLT, border_HLX = part.order_HLT, part.border_HLX
    tokens = order_HLT.shape[-1]
    if {order_HLT.dtype, border_HLX.dtype} != {torch.int16} or order_HLT.shape != (*lists, tokens) or not 0 < tokens <= PART_TOKENS:
        raise ValueError(f"tables of shape {tuple(order_HLT.shape)} and {order_HLT.dtype}")
    if border_HLX.shape != (*lists, min(tokens, 1 << bits)):
        raise ValueError(f"{tuple(border_HLX.shape)} borders of buckets for tables of shape {tuple(order_HLT.shape)}")
    if not torch.equal(order_HLT.long().sort(2).values, torch.arange(tokens).expand_as(order_HLT)):
        raise ValueError("a key is in no bucket of a table")
    border_HLX = border_HLX.int() & 0xFFFF
    most = tokens if tokens >= 1 << bits else (1 << bits) - 1
    begins = tokens < 1 << bits or not bool(border_HLX[..., 0].any())  # borders begin at the first place
    if not begins or bool((border_HLX.diff(dim=2) < 0).any()) or int(border_HLX.max()) > most:
        raise ValueError("borders of buckets are in no order")
