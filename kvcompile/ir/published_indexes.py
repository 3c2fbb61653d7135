"""Facts of the indexes of published systems: options, and bytes.  Their code is in runtime/indexes/.

minmax, cuboid, representatives, mean   find whole pages of `page_tokens` keys, each by a digest of one or two vectors
ivf                                     lists of keys around centres, of which a query reads some
hnsw                                    a navigable graph, of the library hnswlib
clusters                                clusters of keys, of which some are read and some estimated
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any, ClassVar

from kvcompile.ir.index_terms import Fault, IndexBytes

MOST_PAGE_TOKENS = 4096


class PageFacts:
    """Of an index that finds whole pages.  Option page_tokens comes from the zone.

    vectors: of head_dim numbers in the keys' dtype, that a page's digest holds.
    """

    name: str
    vectors: ClassVar[int]
    pages = True
    estimates = False
    scores = False

    def check(self, options: Mapping[str, Any]) -> list[Fault]:
        page_tokens = options.get("page_tokens")
        faults = self.check_own({name: value for name, value in options.items() if name != "page_tokens"}, page_tokens)
        if type(page_tokens) is not int or not 1 <= page_tokens <= MOST_PAGE_TOKENS:
            what = f"{page_tokens!r} is not allowed: a number of tokens from 1 to {MOST_PAGE_TOKENS}."
            faults.append(Fault("page_tokens", what, "Write for example page_tokens: 16."))
        return faults

    def check_own(self, options: Mapping[str, Any], page_tokens: Any) -> list[Fault]:
        """Of the options that the spec gives the index itself."""
        return [Fault(name, f"is no option of {self.name}, which has none.", "Take it out.") for name in options]

    def bytes_per_token(self, head_dim: int, value_dim: int, itemsize: int, options: Mapping[str, Any]) -> IndexBytes:
        """A last page that is not full has no digest yet; it is counted by its share."""
        digest = self.vectors * head_dim * itemsize / int(options["page_tokens"])
        return IndexBytes(digest, digest, 0.0)

    def fixed_bytes(self, head_dim: int, value_dim: int, options: Mapping[str, Any]) -> int:
        return 0


class MinMaxFacts(PageFacts):
    """Smallest and largest number of each channel: a bound of every logit of the page.  Source: Quest (Tang et al. 2024, section 3.3)."""

    name = "minmax"
    vectors = 2


class CuboidFacts(PageFacts):
    """A cuboid around the middle of each channel's range.  Source: ArkVale (Chen et al. 2024, section 4.2).

    Option radius: mean (the mean distance from the middle: tighter, no bound; the default) or max (minmax in other words).
    """

    name = "cuboid"
    vectors = 2
    RADII = ("mean", "max")

    def check_own(self, options: Mapping[str, Any], page_tokens: Any) -> list[Fault]:
        faults = [Fault(name, "is no option of cuboid.", "Write radius, or take it out.") for name in options if name != "radius"]
        if options.get("radius", "mean") not in self.RADII:
            what = f"{options['radius']!r} is not allowed: one of {', '.join(self.RADII)}."
            faults.append(Fault("radius", what, "Write radius: mean."))
        return faults


class RepresentativesFacts(PageFacts):
    """The mean of the keys that later queries ask most for.  Source: InfLLM (Xiao et al. 2024, section 3.2).

    Option keys: how many of each page, 4 where it is left out.
    """

    name = "representatives"
    vectors = 1
    DEFAULT_KEYS = 4

    def check_own(self, options: Mapping[str, Any], page_tokens: Any) -> list[Fault]:
        faults = [Fault(name, "is no option of representatives.", "Write keys, or take it out.") for name in options if name != "keys"]
        keys = options.get("keys", min(self.DEFAULT_KEYS, page_tokens if type(page_tokens) is int else 1))
        if type(keys) is not int or keys < 1 or (type(page_tokens) is int and keys > page_tokens):
            most = page_tokens if type(page_tokens) is int else "page_tokens"
            faults.append(Fault("keys", f"{keys!r} is not allowed: a number of keys from 1 to {most}.", "Write for example keys: 4."))
        return faults

    def keys(self, options: Mapping[str, Any]) -> int:
        """How many keys of a page represent it."""
        return int(options.get("keys", min(self.DEFAULT_KEYS, int(options["page_tokens"]))))

    def fixed_bytes(self, head_dim: int, value_dim: int, options: Mapping[str, Any]) -> int:
        return 4 * head_dim  # the mean query, float32


class MeanFacts(PageFacts):
    """The mean key of a page.  Source: TriForce (Sun et al. 2024, section 4.1)."""

    name = "mean"
    vectors = 1
    scores = True


class IvfFacts:
    """Inverted lists.  Source: Faiss, IndexIVFFlat with inner products (Johnson et al. 2017).

    Options lists (512) and probe (32): how many lists there are, and how many a query reads.
    """

    name = "ivf"
    estimates = False
    scores = False
    MOST_LISTS = 32767

    def check(self, options: Mapping[str, Any]) -> list[Fault]:
        known = ("lists", "probe")
        faults = [Fault(name, "is no option of ivf.", "Write lists or probe, or take it out.") for name in options if name not in known]
        lists, probe = options.get("lists", 512), options.get("probe", 32)
        if type(lists) is not int or not 1 <= lists <= self.MOST_LISTS:
            what = f"{lists!r} is not allowed: a number of lists from 1 to {self.MOST_LISTS}."
            return [*faults, Fault("lists", what, "Write for example lists: 512.")]
        if type(probe) is not int or not 1 <= probe <= lists:
            what = f"{probe!r} is not allowed: a number from 1 to {lists}, how many lists there are."
            faults.append(Fault("probe", what, f"Write for example probe: {max(1, lists // 16)}."))
        return faults

    def lists(self, options: Mapping[str, Any]) -> tuple[int, int]:
        """How many there are, and how many of them a query reads."""
        return int(options.get("lists", 512)), int(options.get("probe", 32))

    def bytes_per_token(self, head_dim: int, value_dim: int, itemsize: int, options: Mapping[str, Any]) -> IndexBytes:
        """Lists are counted as equally long; queries read the longer ones more often."""
        lists, probe = self.lists(options)
        return IndexBytes(6.0, probe / lists * (4 + head_dim * itemsize), 0.0, 2 * lists * head_dim + 4 * (lists + 1))

    def fixed_bytes(self, head_dim: int, value_dim: int, options: Mapping[str, Any]) -> int:
        lists, _ = self.lists(options)
        return 2 * lists * head_dim + 4 * (head_dim + lists + 1)


class HnswFacts:
    """A hierarchical navigable small world (Malkov and Yashunin 2016), of the library hnswlib, by inner product.

    Options m (16), ef (200) and ef_construction (200): neighbours of a key, and how many candidates a search and an insertion keep.
    centred (true): whether keys are centred by their mean; without it far less is found (runtime/indexes/hnsw.py has the numbers).
    """

    name = "hnsw"
    estimates = False
    scores = False
    LIMITS: ClassVar[dict[str, tuple[int, int, int]]] = {"m": (16, 2, 128), "ef": (200, 1, 65536), "ef_construction": (200, 1, 65536)}

    def check(self, options: Mapping[str, Any]) -> list[Fault]:
        known = (*self.LIMITS, "centred")
        others = [name for name in options if name not in known]
        faults = [Fault(name, "is no option of hnsw.", f"Write one of {', '.join(known)}, or take it out.") for name in others]
        if type(options.get("centred", True)) is not bool:
            faults.append(Fault("centred", f"{options['centred']!r} is not allowed: true or false.", "Write centred: true."))
        for name, (usual, least, most) in self.LIMITS.items():
            value = options.get(name, usual)
            if type(value) is not int or not least <= value <= most:
                what = f"{value!r} is not allowed: a number from {least} to {most}."
                faults.append(Fault(name, what, f"Write for example {name}: {usual}."))
        if importlib.util.find_spec("hnswlib") is None:
            what = "the index hnsw needs the library hnswlib, which is not installed."
            faults.append(Fault("", what, "Install the extra: pip install 'kvcompile[hnsw]', or write another index, such as ivf."))
        return faults

    def value(self, options: Mapping[str, Any], name: str) -> int:
        """Of an option, as written or the usual one."""
        return int(options.get(name, self.LIMITS[name][0]))

    def bytes_per_token(self, head_dim: int, value_dim: int, itemsize: int, options: Mapping[str, Any]) -> IndexBytes:
        """As hnswlib lays a key out: its own copy in float32, a label, 2 m neighbours and their number, and m more on each upper layer, of
        which a key has 1 / (m - 1) on average.

        A search goes through ef keys and looks at their neighbours; about half of these it has seen already.
        """
        m, ef = self.value(options, "m"), self.value(options, "ef")
        row, layer = 4 * head_dim, 4 * m + 4
        held = row + 8 + (8 * m + 4) + 4 + layer / (m - 1)
        return IndexBytes(held, 0.0, 0.0, ef * (8 * m + 4 + m * row))

    def build_work(self, head_dim: int, options: Mapping[str, Any]) -> float:
        """With the usual options, at 8K and 32K tokens (docs/graphs.md)."""
        return 8.5e4 * head_dim

    def fixed_bytes(self, head_dim: int, value_dim: int, options: Mapping[str, Any]) -> int:
        return 4 * head_dim  # the mean that keys are centred by


class ClustersFacts:
    """Clusters, the best of which are read and the next estimated.  Source: RetroInfer (Chen et al. 2025, section 4).

    Options tokens_per_cluster (16), and estimate (0.232): the share of clusters that `rest` estimates.
    """

    name = "clusters"
    estimates = True
    scores = True
    MOST_TOKENS = 1024  # of a cluster: so many added tokens are clustered at a time

    def check(self, options: Mapping[str, Any]) -> list[Fault]:
        known = ("tokens_per_cluster", "estimate")
        faults = [
            Fault(name, "is no option of clusters.", f"Write {' or '.join(known)}, or take it out.")
            for name in options
            if name not in known
        ]
        tokens, estimate = options.get("tokens_per_cluster", 16), options.get("estimate", 0.232)
        if type(tokens) is not int or not 1 <= tokens <= self.MOST_TOKENS:
            what = f"{tokens!r} is not allowed: a number of tokens from 1 to {self.MOST_TOKENS}."
            faults.append(Fault("tokens_per_cluster", what, "Write for example tokens_per_cluster: 16."))
        if type(estimate) not in (int, float) or not 0 <= estimate <= 1:
            faults.append(Fault("estimate", f"{estimate!r} is not allowed: a share from 0 to 1.", "Write for example estimate: 0.232."))
        return faults

    def sizes(self, options: Mapping[str, Any]) -> tuple[int, float]:
        """Tokens of a cluster, and the share of clusters that is estimated."""
        return int(options.get("tokens_per_cluster", 16)), float(options.get("estimate", 0.232))

    def bytes_per_token(self, head_dim: int, value_dim: int, itemsize: int, options: Mapping[str, Any]) -> IndexBytes:
        """Tokens that wait to be clustered are counted as if they were."""
        tokens, estimate = self.sizes(options)
        centre, mean = (head_dim * itemsize + 4) / tokens, value_dim * itemsize / tokens
        return IndexBytes(4 + centre + mean, centre, estimate * mean)

    def fixed_bytes(self, head_dim: int, value_dim: int, options: Mapping[str, Any]) -> int:
        return 0


PUBLISHED = (MinMaxFacts(), CuboidFacts(), RepresentativesFacts(), MeanFacts(), IvfFacts(), HnswFacts(), ClustersFacts())
