"""Indexes that find whole pages: `minmax` (Quest), `cuboid` (ArkVale), `representatives` (InfLLM), `mean` (TriForce's chunk means).

Letters: H KV heads, G queries per KV head, T keys, N pages of P keys, V vectors of a digest, M pages found, K keys found, C queries kept,
D head_dim.

1. Page n holds the keys at [first + n P, first + (n + 1) P).  It has a digest when it is full; the keys behind the last full page are
   always found, beside the pages that were asked for.
2. A digest of two vectors is a box: the corners with the least and the greatest number of each channel.  Its score is the largest logit
   that a key in the box could have.  A digest of one vector is a key that stands for all of them.
3. A digest depends on the keys of its page alone, `representatives` on queries too.  So pages that tokens were added to are digested by
   the next search, from the session's own keys, and a rollback forgets them.
4. `representatives`: a key's score is its logit for the mean of the queries that came after it (r_m of section 3.2).  Of those a session
   remembers the last RECENT_POSITIONS x RECENT_STRIDE tokens' (runtime/query_sample.py), and pages that tokens are added to are judged by
   the last that the index was shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kvcompile.ir.policy import Select
from kvcompile.ir.published_indexes import CuboidFacts, MeanFacts, MinMaxFacts, PageFacts, RepresentativesFacts
from kvcompile.runtime.indexes.index import Borrowed, Found, Keys, Prompt, RecentQueries
from kvcompile.runtime.indexes.restoring import borders, shaped, soft_cap, whole
from kvcompile.runtime.indexes.select import select_keys
from kvcompile.runtime.merge import AttentionState
from kvcompile.runtime.spans import Span


class PageIndex:
    """Digests of the full pages of [first, end).  query_HD: the mean query, of representatives."""

    notes: tuple[str, ...] = ()

    def __init__(
        self,
        facts: PageFacts,
        options: Mapping[str, Any],
        first: int,
        end: int,
        digest_HNVD: Tensor,
        soft_cap: float | None,
        query_HD: Tensor | None = None,
    ) -> None:
        self.digest_HNVD = digest_HNVD
        self._facts, self._options = facts, dict(options)
        self._first, self._end = first, end
        self._soft_cap = soft_cap
        self._query_HD = query_HD
        self._borrowed = Borrowed()

    @property
    def shape(self) -> tuple[int, int, int | None]:
        heads, _, _, head_dim = self.digest_HNVD.shape
        return heads, head_dim, None

    @property
    def first(self) -> int:
        return self._first

    @property
    def end(self) -> int:
        return self._end

    @property
    def page_tokens(self) -> int:
        return int(self._options["page_tokens"])

    def add(self, key_HTD: Tensor, value_HTE: Tensor) -> None:
        self._end += key_HTD.shape[1]

    def search(self, query_HGD: Tensor, k: int, select: Select, keys: Keys) -> Found:
        """As KeyIndex; k counts the keys of whole pages."""
        self._digest_full_pages(keys)
        heads, group, _ = query_HGD.shape
        tokens, pages, page_tokens = self._end - self._first, self.digest_HNVD.shape[1], self.page_tokens
        wanted = max(1, k // page_tokens)
        if wanted >= pages:
            return Found(torch.arange(self._first, self._end).expand(heads, group, tokens), k)
        chosen_HGM = select_keys(self.page_scores(query_HGD), wanted, select)
        position_HGK = (chosen_HGM[..., None] * page_tokens + torch.arange(page_tokens) + self._first).flatten(2)
        waiting_K = torch.arange(self._first + pages * page_tokens, self._end).expand(heads, group, -1)
        position_HGK = torch.cat([position_HGK, waiting_K], 2)
        missing_HGK = torch.nn.functional.pad((chosen_HGM < 0).repeat_interleave(page_tokens, 2), (0, waiting_K.shape[2]))
        if bool(missing_HGK.any()):
            position_HGK = position_HGK.masked_fill(missing_HGK, self._end).sort(2).values
            position_HGK = torch.where(position_HGK < self._end, position_HGK, -1)
        return Found(position_HGK, k)

    def page_scores(self, query_HGD: Tensor) -> Tensor:
        """[H, G, N], float32: of boxes the largest logit in them, else the logit of the key that stands for a page."""
        query_HGD, digest_HVND = query_HGD.float(), self.digest_HNVD.float().transpose(1, 2)
        if self._facts.vectors == 2:
            low_HDN, high_HDN = digest_HVND.transpose(2, 3).unbind(1)
            score_HGN = query_HGD.clamp_min(0) @ high_HDN + query_HGD.clamp_max(0) @ low_HDN
        else:
            score_HGN = query_HGD @ digest_HVND[:, 0].transpose(1, 2)
        return score_HGN if self._soft_cap is None else self._soft_cap * torch.tanh(score_HGN / self._soft_cap)

    def rest(self, query_HGD: Tensor, found: Found, read_lse_HG: Tensor) -> AttentionState | None:
        return None

    def recalibrate(self, recent: RecentQueries, keys: Keys, k: int) -> bool:
        """Later pages are judged by these queries; those that have a digest keep it."""
        if self._query_HD is not None and recent.count:
            self._digest_full_pages(keys)
            self._query_HD = recent.query_HCD.float().mean(1)
        return True

    def rollback(self, end: int) -> None:
        self._end = min(self._end, max(end, self._first))
        pages = (self._end - self._first) // self.page_tokens
        if pages < self.digest_HNVD.shape[1]:
            self.digest_HNVD = self.digest_HNVD[:, :pages].contiguous()

    def fork(self) -> PageIndex:
        child = PageIndex(self._facts, self._options, self._first, self._end, self.digest_HNVD, self._soft_cap, self._query_HD)
        child._borrowed = Borrowed(child._held())
        return child

    def nbytes(self) -> int:
        return sum(each.nbytes for each in self._held())

    def borrowed_nbytes(self) -> int:
        """All, until a page that is full makes its own ones."""
        return self._borrowed.nbytes(self._held())

    def _held(self) -> list[Tensor]:
        return [self.digest_HNVD] if self._query_HD is None else [self.digest_HNVD, self._query_HD]

    def scanned_bytes(self, tail: bool, k: int) -> int:
        return self.digest_HNVD.nbytes

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {"digest": self.digest_HNVD.contiguous()}
        if self._query_HD is not None:
            tensors["query"] = self._query_HD.contiguous()
        return tensors, {"first": self._first, "end": self._end, "soft_cap": self._soft_cap, "options": self._options}

    def _digest_full_pages(self, keys: Keys) -> None:
        pages = self.digest_HNVD.shape[1]
        full = (self._end - self._first) // self.page_tokens
        if full == pages:
            return
        spans = keys(self._first + pages * self.page_tokens, self._first + full * self.page_tokens)
        page_HNPD = _joined_keys(spans).unflatten(1, (full - pages, self.page_tokens))
        query_HND = None if self._query_HD is None else self._query_HD[:, None].expand(-1, full - pages, -1)
        new_HNVD = digest(self._facts, self._options, page_HNPD, query_HND)
        self.digest_HNVD = torch.cat([self.digest_HNVD, new_HNVD], 1)


def digest(facts: PageFacts, options: Mapping[str, Any], page_HNPD: Tensor, query_HND: Tensor | None) -> Tensor:
    """[H, N, V, D] in the keys' dtype.  query_HND: the mean query that a page is judged by, of representatives."""
    match facts:
        case MinMaxFacts():
            return torch.stack(page_HNPD.aminmax(dim=2), 2)
        case CuboidFacts():
            low_HND, high_HND = (edge.float() for edge in page_HNPD.aminmax(dim=2))
            middle_HND = (low_HND + high_HND) / 2
            away_HNPD = (page_HNPD.float() - middle_HND[:, :, None]).abs()
            radius_HND = away_HNPD.amax(2) if options.get("radius") == "max" else away_HNPD.mean(2)
            return torch.stack([middle_HND - radius_HND, middle_HND + radius_HND], 2).to(page_HNPD.dtype)
        case RepresentativesFacts():
            assert query_HND is not None
            score_HNP = (page_HNPD.float() @ query_HND[..., None]).squeeze(3)
            order_HNP = score_HNP.sort(dim=2, descending=True, stable=True).indices[..., : facts.keys(options)]
            kept_HNPD = page_HNPD.float().gather(2, order_HNP[..., None].expand(*order_HNP.shape, page_HNPD.shape[3]))
            return kept_HNPD.mean(2, keepdim=True).to(page_HNPD.dtype)
        case _:
            return page_HNPD.float().mean(2, keepdim=True).to(page_HNPD.dtype)


def _queries_after(first: int, pages: int, page_tokens: int, recent: RecentQueries) -> Tensor:
    """[H, N, D] float32: the mean of the kept queries that came after each page, of the last of them where none did."""
    last_N1 = first + page_tokens * torch.arange(1, pages + 1)[:, None] - 1
    after_NC = recent.position_C > last_N1
    after_NC = torch.where(after_NC.any(1, keepdim=True), after_NC, recent.position_C == recent.position_C.max())
    share_NC = after_NC.float() / after_NC.sum(1, keepdim=True)
    return share_NC @ recent.query_HCD.float()


def _joined_keys(spans: Sequence[Span]) -> Tensor:
    return spans[0].key_HTD if len(spans) == 1 else torch.cat([span.key_HTD for span in spans], 1)


class _Pages(PageFacts):
    """How each kind makes its index."""

    def build(self, first: int, prompt: Prompt, options: Mapping[str, Any]) -> PageIndex:
        heads, tokens, head_dim = prompt.key_HTD.shape
        page_tokens, recent = int(options["page_tokens"]), prompt.recent
        pages = tokens // page_tokens
        query_HD = query_HND = None
        if isinstance(self, RepresentativesFacts):
            query_HD, query_HND = torch.zeros(heads, head_dim), torch.zeros(heads, pages, head_dim)
            if recent.count:
                query_HD, query_HND = recent.query_HCD.float().mean(1), _queries_after(first, pages, page_tokens, recent)
        page_HNPD = prompt.key_HTD[:, : pages * page_tokens].unflatten(1, (pages, page_tokens))
        digest_HNVD = digest(self, options, page_HNPD, query_HND) if pages else prompt.key_HTD.new_zeros(heads, 0, self.vectors, head_dim)
        return PageIndex(self, options, first, first + tokens, digest_HNVD, prompt.soft_cap, query_HD)

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> PageIndex:
        options, (first, end) = numbers["options"], borders(numbers)
        faults = self.check(options)
        if faults:
            raise ValueError(f"{faults[0].option} {faults[0].what}")
        page_tokens = whole(options, "page_tokens", 1)
        digest_HNVD = shaped(tensors, "digest", None, None, None, self.vectors, None)
        heads, pages, _, head_dim = digest_HNVD.shape
        query_HD = shaped(tensors, "query", torch.float32, heads, head_dim) if isinstance(self, RepresentativesFacts) else None
        if pages * page_tokens > end - first:
            raise ValueError(f"{pages} pages of {page_tokens} for {end - first} tokens")
        return PageIndex(self, options, first, end, digest_HNVD, soft_cap(numbers), query_HD)


class MinMax(_Pages, MinMaxFacts):
    """The kind `minmax`."""


class Cuboid(_Pages, CuboidFacts):
    """The kind `cuboid`."""


class Representatives(_Pages, RepresentativesFacts):
    """The kind `representatives`."""


class Mean(_Pages, MeanFacts):
    """The kind `mean`."""
