"""Facts of the indexes of published systems: options, and bytes.  Their code is in runtime/indexes/.

minmax, cuboid, representatives, mean   find whole pages of `page_tokens` keys, each by a digest of one or two vectors
"""

from __future__ import annotations

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


PUBLISHED = (MinMaxFacts(), CuboidFacts(), RepresentativesFacts(), MeanFacts())
