"""What a spec and a plan must know of an index before there is one: its options, and its bytes.

Built in: flat, sketch, roargraph (graph_facts.py), and those of other published systems (published_indexes.py); of the zone `sample`
lsh (lsh_facts.py).  Others are entry points of
the group `kvcompile.indexes`: an object with the attributes of `IndexFacts` and `build` and `restore` of runtime/indexes/index.py.  They
are loaded when a spec names them, not before.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from kvcompile.ir.graph_facts import ROARGRAPH
from kvcompile.ir.index_terms import Fault as Fault
from kvcompile.ir.index_terms import IndexBytes as IndexBytes
from kvcompile.ir.lsh_facts import LSH, LshFacts
from kvcompile.ir.published_indexes import PUBLISHED

ENTRY_POINTS = "kvcompile.indexes"
BLOCK_TOKENS = 32  # an index grows by so many tokens at a time
MIN_INDEXED_TOKENS = 512  # fewer than this are attended to as they are: no index is made
RECENT_STRIDE, RECENT_POSITIONS = 16, 64  # of queries that are kept: every so many positions, so many of them
UNIT_BYTES = 4  # of a sketch: 8 coordinates of 4 bits, or 16 of 2
MAX_UNITS = 64
RUNS_TOGETHER = 16  # of a sketch: their centres are read together, and what is far of them is estimated together
SCANNED = 0.25  # of a sketch's runs: the share whose keys are looked at
RUN_AXES = 24  # dimensions in which a sketch forms runs of similar keys and values
TRAINING_FROM = 64  # position of the first query that is kept for training: the first few of a text are unlike all later ones


class IndexFacts(Protocol):
    """estimates: whether it can tell what is not read (`tail: true`); scores: whether it guesses every logit (`select: sum`, `max`).

    An index that finds whole pages has an attribute `pages` that is true: a spec then writes `pages` and `page_tokens` in place of `k`,
    and its options hold page_tokens.
    """

    name: str
    estimates: bool
    scores: bool

    def check(self, options: Mapping[str, Any]) -> list[Fault]:
        """What is wrong with the options of a spec."""
        ...

    def bytes_per_token(self, head_dim: int, value_dim: int, itemsize: int, options: Mapping[str, Any]) -> IndexBytes:
        """Bytes of one token in one KV head.  itemsize: of a key's number."""
        ...

    def fixed_bytes(self, head_dim: int, value_dim: int, options: Mapping[str, Any]) -> int:
        """Bytes a KV head that the index holds whatever the context."""
        ...


class FlatFacts:
    """Reads every key: exact, and the oracle of recall."""

    name = "flat"
    estimates = False
    scores = True

    def check(self, options: Mapping[str, Any]) -> list[Fault]:
        return [Fault(name, "is no option of flat, which has none.", "Take it out.") for name in options]

    def bytes_per_token(self, head_dim: int, value_dim: int, itemsize: int, options: Mapping[str, Any]) -> IndexBytes:
        return IndexBytes(0.0, float(head_dim * itemsize), 0.0)

    def fixed_bytes(self, head_dim: int, value_dim: int, options: Mapping[str, Any]) -> int:
        return 0


class SketchFacts:
    """Options: bytes_per_key, a multiple of 4; scanned, the share of runs whose keys are looked at."""

    name = "sketch"
    estimates = True
    scores = True

    def check(self, options: Mapping[str, Any]) -> list[Fault]:
        others = [name for name in options if name not in ("bytes_per_key", "scanned")]
        faults = [Fault(name, "is no option of sketch.", "Write bytes_per_key or scanned, or take it out.") for name in others]
        size = options.get("bytes_per_key", UNIT_BYTES)
        if type(size) is not int or size % UNIT_BYTES or not 0 < size <= MAX_UNITS * UNIT_BYTES:
            what = f"{size!r} is not allowed: a multiple of {UNIT_BYTES} from {UNIT_BYTES} to {MAX_UNITS * UNIT_BYTES}."
            faults.append(Fault("bytes_per_key", what, "Write for example bytes_per_key: 8."))
        try:
            allowed = 0 < self.scanned(options) <= 1
        except (TypeError, ValueError):
            allowed = False
        if not allowed:
            what = f"{options['scanned']!r} is not allowed: a share of the keys above 0, up to 1 or 100%."
            faults.append(Fault("scanned", what, "Write for example scanned: 25%."))
        return faults

    def units(self, head_dim: int, options: Mapping[str, Any]) -> int:
        """Units of UNIT_BYTES of one key."""
        return int(options["bytes_per_key"]) // UNIT_BYTES if "bytes_per_key" in options else default_units(head_dim)

    def run_units(self, head_dim: int, options: Mapping[str, Any]) -> int:
        """Units of the centre of a run: head_dim / 4 coordinates of 4 bits, if a key has so many coordinates."""
        return min(max(1, round(head_dim / 32)), 2 * self.units(head_dim, options))

    def scanned(self, options: Mapping[str, Any]) -> float:
        """The share of runs whose keys are looked at; more, which is not counted, where a query chooses over half of their keys."""
        share = options.get("scanned", SCANNED)
        if isinstance(share, bool):
            raise TypeError("a share, not a truth")
        return float(share[:-1]) / 100 if isinstance(share, str) and share.endswith("%") else float(share)

    def bytes_per_token(self, head_dim: int, value_dim: int, itemsize: int, options: Mapping[str, Any]) -> IndexBytes:
        codes, means = self.units(head_dim, options) * UNIT_BYTES, (value_dim + 4) / BLOCK_TOKENS
        centres = (self.run_units(head_dim, options) * UNIT_BYTES + 4) / BLOCK_TOKENS
        together = means / RUNS_TOGETHER
        share = self.scanned(options)
        held = codes + 4 + means + centres + together
        ranked = (centres, together) if share < 1 else (0.0, 0.0)  # what is read to choose runs, and to estimate the others
        return IndexBytes(held, share * codes + ranked[0], share * means + ranked[1], self._search_bytes(head_dim, options))

    def fixed_bytes(self, head_dim: int, value_dim: int, options: Mapping[str, Any]) -> int:
        coordinates = self._coordinates(head_dim, options)
        maps = 4 * head_dim * coordinates + 4 * RUN_AXES * (coordinates + value_dim) + 4 * value_dim + 8 + 4
        return maps + self._search_bytes(head_dim, options)  # runtime/indexes/sketch_basis.py, and the error

    def _coordinates(self, head_dim: int, options: Mapping[str, Any]) -> int:
        """At most so many coordinates are kept."""
        return -(-min(head_dim, 16 * self.units(head_dim, options)) // 16) * 16

    def _search_bytes(self, head_dim: int, options: Mapping[str, Any]) -> int:
        """Centre and map of queries, the steps of slots, and gaps."""
        pairs = -(-head_dim // 2)
        slots = 16 * (self.units(head_dim, options) + self.run_units(head_dim, options))
        return 4 * head_dim + 4 * pairs * self._coordinates(head_dim, options) + 4 * slots + 40


def default_units(head_dim: int) -> int:
    """Units of UNIT_BYTES of a key where a spec does not say: about 8 + head_dim / 8 bytes."""
    return max(1, round(2 + head_dim / 32))


FLAT, SKETCH = FlatFacts(), SketchFacts()
BUILT_IN: dict[str, IndexFacts] = {facts.name: facts for facts in (FLAT, SKETCH, ROARGRAPH, *PUBLISHED)}
SAMPLING: dict[str, LshFacts] = {LSH.name: LSH}  # they draw keys by chance: of the zone `sample`


@runtime_checkable
class LearningFacts(Protocol):
    """Of an index that learns from the prompt's queries themselves."""

    def training_queries(self, options: Mapping[str, Any]) -> int:
        """At most so many of each KV head, of all query heads that share it."""
        ...


@runtime_checkable
class GroupFacts(Protocol):
    """Of an index whose bytes depend on how many query heads share a KV head."""

    def for_group(self, queries_per_kv: int) -> IndexFacts: ...


@runtime_checkable
class SlowFacts(Protocol):
    """Of an index that may take longer to make than the prompt takes to read."""

    def build_work(self, head_dim: int, options: Mapping[str, Any]) -> float:
        """How many multiply-adds a prompt does in the time in which one key of a KV head joins, as measured."""
        ...


@runtime_checkable
class SizedFacts(Protocol):
    """Of an index whose bytes are not as many times as large as its keys are more."""

    def held_bytes(self, tokens: int, options: Mapping[str, Any]) -> int:
        """Of a KV head's index over so many keys, beside `fixed_bytes`."""
        ...


def sample_bytes(queries_per_kv: int, head_dim: int, context_tokens: int, training_queries: int = 0) -> int:
    """Bytes a KV head of what a session remembers of its queries (runtime/query_sample.py)."""
    recent = min(-(-context_tokens // RECENT_STRIDE), RECENT_POSITIONS)
    stride = training_stride(training_queries // queries_per_kv, context_tokens)
    training = len(_every(stride, context_tokens)) if training_queries else 0
    return 4 * head_dim * (head_dim + recent * queries_per_kv) + 2 * head_dim * training * queries_per_kv


def training_stride(most: int, context_tokens: int) -> int:
    """Every so many positions, a power of 2, make at most `most` of them (at least one); those from TRAINING_FROM on."""
    stride = 1
    while len(_every(stride, context_tokens)) > max(1, most):
        stride *= 2
    return stride


def _every(stride: int, context_tokens: int) -> range:
    return range(-(-TRAINING_FROM // stride) * stride, context_tokens, stride)


def indexed_tokens(window_tokens: int, context_tokens: int) -> int:
    """Tokens that an index covers when `context_tokens` are read, of which sinks and window are `window_tokens`; 0 where none is made."""
    covered = max(0, context_tokens - window_tokens) // BLOCK_TOKENS * BLOCK_TOKENS
    return covered if covered >= MIN_INDEXED_TOKENS else 0


def index_names() -> list[str]:
    """Every index that a `top_k` zone may name; nothing is loaded."""
    return [*BUILT_IN, *sorted({point.name for point in importlib.metadata.entry_points(group=ENTRY_POINTS)} - set(BUILT_IN))]


def training_queries(name: str, options: Mapping[str, Any]) -> int:
    """Queries a KV head that a session keeps for the index to learn from; 0 for one that does not."""
    facts = index_facts(name)
    return facts.training_queries(options) if isinstance(facts, LearningFacts) else 0


def group_facts(name: str, queries_per_kv: int) -> IndexFacts:
    """The facts of an index, with the bytes of KV heads that so many query heads share each."""
    facts = index_facts(name)
    return facts.for_group(queries_per_kv) if isinstance(facts, GroupFacts) else facts


def build_work(name: str, queries_per_kv: int, head_dim: int, options: Mapping[str, Any]) -> float:
    """Of one key of a KV head, in multiply-adds of a prompt; 0 for an index that is quick to make."""
    facts = group_facts(name, queries_per_kv)
    return facts.build_work(head_dim, options) if isinstance(facts, SlowFacts) else 0.0


def index_facts(name: str) -> IndexFacts:
    """The facts of an index.  Raises LookupError, with the reason, for one that is not there or cannot be loaded."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    if name in SAMPLING:
        return SAMPLING[name]
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS, name=name):
        try:
            facts: IndexFacts = point.load()
        except Exception as error:  # whatever another's package raises
            raise LookupError(f"{point.value} cannot be loaded ({type(error).__name__}: {error})") from error
        return facts
    raise LookupError(f"there is no index {name}")
