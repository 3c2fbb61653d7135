"""A radix tree over token ids whose nodes hold sessions: what a prompt shares with an earlier one is not read again.

    tree = PrefixTree(model, budget="4GiB")
    session = tree.session_for(ids)         # has read exactly `ids`; reads only what no earlier prompt began with

    opened = tree.open(ids)                 # the same for a server that reads a prompt in pieces, between steps of other sessions
    for piece in opened.pieces(256):
        logits = opened.session.prefill(piece)
        tree.keep(opened.session)

Rules:
1. A node stands where a prompt ended, where a session was kept, or where two prompts part.  Its session has read the tokens from the
   root to it; a node where two prompts part may have none, when no session can be rolled back to it, until somebody reads up to there.
   None is rolled back behind a token whose query it has sampled (policies that look keys up): a sample takes no query back, and what one
   prompt asked would choose keys for another.  Nor does the tree make indexes (`Session.make_indexes`): where they are made would depend on
   what it knows, and with it what they learn.
2. Every byte of keys and values has one owner among the nodes: `keep` takes over what a session holds and leaves it a fork.  A node
   where two prompts part is a fork, rolled back, of one below it, its lender.  When the lender is evicted the longest such node gets its
   session, rolled back, and so what lies behind is given back to the system.
3. A node is evicted when it has no node below it and no living session was forked from it (nothing would be given back): the one that
   has not been asked for for the longest time first.
4. A piece of fewer than `least_tokens` tokens gets no session of its own: reading it again costs less than a session.  Nor does a session
   that has read again more than it adds to what others have brought in the meantime.

Source: RadixAttention (Zheng et al. 2023, SGLang, section 3).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from kvcompile.ir.byte_sizes import parse_bytes
from kvcompile.ir.errors import Problem, SessionError
from kvcompile.runtime.lookup import LookupStore
from kvcompile.runtime.session import Session, Tokens, as_token_ids
from kvcompile.runtime.static import StaticStore

if TYPE_CHECKING:
    from kvcompile.runtime.model import CompiledModel

LEAST_TOKENS = 16


@dataclass(frozen=True)
class PrefixStatistics:
    """What a tree was asked for since it was made, and what it holds now.

    asked_tokens: of all prompts.  reused_tokens: those of them that nobody had to read again.  nodes: where a session lies.
    stored_bytes: what the nodes hold, each byte once (samples of queries that sessions share count for each).  evictions: nodes taken out.
    """

    prompts: int
    asked_tokens: int
    reused_tokens: int
    nodes: int
    stored_bytes: int
    evictions: int

    @property
    def reused_share(self) -> float:
        """From 0.0 to 1.0; 0.0 before the first prompt."""
        return self.reused_tokens / self.asked_tokens if self.asked_tokens else 0.0


@dataclass(frozen=True)
class Opened:
    """A session that has read the known beginning of a prompt, and what it has still to read: at least one token, for its logits.

    parts_at: how long the beginning is that another prompt has too, where the tree has no session for it: None, or more than was
    reused.  Whoever ends a piece there and keeps the session saves the next prompt from reading it.
    """

    session: Session
    unread: Tensor
    reused_tokens: int = 0
    parts_at: int | None = None

    def pieces(self, most_tokens: int) -> list[Tensor]:
        """The unread tokens in order, `most_tokens` at most at a time; one piece ends at `parts_at`.

        Raises SessionError for a size below 1.
        """
        if most_tokens < 1:
            raise SessionError(Problem("most_tokens", f"{most_tokens} is less than 1.", "Read at least one token at a time."))
        cut = len(self.unread) if self.parts_at is None else self.parts_at - self.reused_tokens
        return [piece for part in (self.unread[:cut], self.unread[cut:]) if len(part) for piece in part.split(most_tokens)]


@dataclass(eq=False)
class _Node:
    """edge: the tokens behind the parent's.  tokens: how many there are from the root on.  used: when it was last asked for.
    lender: rule 2.  readers: living sessions that were forked from it."""

    edge: list[int]
    parent: _Node | None
    tokens: int
    used: int = 0
    session: Session | None = None
    nbytes: int = 0
    lender: _Node | None = None
    children: dict[int, _Node] = field(default_factory=dict)
    readers: weakref.WeakSet[Session] = field(default_factory=weakref.WeakSet)

    def hold(self, session: Session, lender: _Node | None) -> None:
        self.session, self.lender, self.nbytes = session, lender, session.nbytes()

    def upwards(self) -> Iterator[_Node]:
        """Itself, its parent, and so on, the root last."""
        node: _Node | None = self
        while node is not None:
            yield node
            node = node.parent

    def downwards(self) -> Iterator[_Node]:
        waiting = [self]
        while waiting:
            node = waiting.pop()
            yield node
            waiting += node.children.values()

    def held(self) -> _Node:
        """The nearest node with a session, from itself upwards; the root where there is none."""
        return next(node for node in self.upwards() if node.session is not None or node.parent is None)


class _Place(NamedTuple):
    """How far a prompt is known: `tokens` of it, up to `node` and, where `below` is not None, some of the edge to `below`."""

    node: _Node
    below: _Node | None
    tokens: int


class _Given(NamedTuple):
    """What a session was forked from, with so many tokens."""

    source: _Node
    tokens: int


class PrefixTree:
    """Sessions of one model by the tokens that they have read, within a budget of bytes.

    budget: such as "4GiB", or a number of bytes; of what the nodes hold in memory, blocks on disk aside.  What a living session reads is
    not given back, so that more may be held as long as it lives.  least_tokens: rule 4.
    A session of the tree goes on as one that reads its whole prompt would, as far as DESIGN.md promises it of a session that reads its
    prompt in other chunks; what KIVI has quantised stays so when it is rolled back, and what a session has generated before it is kept
    stays as it was generated.
    Not safe to be used from several threads at once.
    Raises SessionError for what is no model, no size or no number of tokens.
    """

    def __init__(self, model: CompiledModel, budget: int | str, *, least_tokens: int = LEAST_TOKENS) -> None:
        if not callable(getattr(model, "session", None)):
            what = f"{type(model).__name__} is no compiled model."
            raise SessionError(Problem("model", what, "Give what kvcompile.compile returned."))
        if type(least_tokens) is not int or least_tokens < 1:
            raise SessionError(Problem("least_tokens", f"{least_tokens!r} is no number of tokens.", "Give a whole number from 1 on."))
        self.model = model
        self.budget_bytes = _bytes(budget)
        self.least_tokens = least_tokens
        self._given: weakref.WeakKeyDictionary[Session, _Given] = weakref.WeakKeyDictionary()
        self._root = _Node([], None, 0)
        self._clock = self._prompts = self._asked = self._reused = self._evictions = 0

    def session_for(self, tokens: Tokens) -> Session:
        """A new session that has read exactly `tokens`: a fork of what is known of them, the rest prefilled and kept.

        It gives no logits; for those of the last token leave that one out: `tree.session_for(ids[:-1]).step(ids[-1])`.
        Raises SessionError as `Session.prefill`; then only what was kept at a place where prompts part is new in the tree.
        """
        ids = as_token_ids(tokens, self.model.vocabulary)
        opened = self._open(ids, len(ids))
        for piece in opened.pieces(len(ids)):
            opened.session.prefill(piece)
            self.keep(opened.session)
        return opened.session

    def open(self, tokens: Tokens) -> Opened:
        """A session that has read the known beginning of a prompt, all but its last token at most, and the tokens that it has not read.

        The caller reads them in what pieces it likes and may hand the session to `keep` after any of them.
        Raises SessionError for no token, or ids outside the vocabulary.
        """
        ids = as_token_ids(tokens, self.model.vocabulary)
        return self._open(ids, len(ids) - 1)

    def keep(self, session: Session) -> None:
        """Makes what a session has read known, as far as rule 4 wants it; the session goes on as before, as a fork of the tree's.

        Raises SessionError for a session that this tree has not given, or one that is broken.
        """
        given = self._given.get(session) if isinstance(session, Session) else None
        if given is None:
            what = "this tree did not give the session, or was cleared since."
            raise SessionError(Problem("keep", what, "Keep the session that open or session_for returned, not a fork of it."))
        session.check_usable()
        ids, end = list(session.tokens), len(session)
        place = self._find(ids, end)
        self._touch(place.node)
        if place.tokens == end and self._lender(place) is not None:
            return
        twice = max(0, place.tokens - given.tokens)  # tokens that it has read although they are known now
        new = end - place.tokens
        if 0 < new < twice:
            self._part(place)
        elif end - place.node.held().tokens >= self.least_tokens:
            taken = session.hand_over()
            node = place.node if place.below is None else self._part(place) or self._split(place)
            if new:
                leaf = _Node(ids[place.tokens :], node, end)
                node.children[leaf.edge[0]] = leaf
                node = leaf
            node.hold(taken, None)
            self._touch(node)
            self._give(session, node)
        self._shrink()

    def statistics(self) -> PrefixStatistics:
        nodes = sum(node.session is not None for node in self._root.downwards())
        return PrefixStatistics(self._prompts, self._asked, self._reused, nodes, self.nbytes(), self._evictions)

    def nbytes(self) -> int:
        """Bytes that the nodes hold, as PrefixStatistics.stored_bytes."""
        return sum(node.nbytes for node in self._root.downwards())

    def clear(self) -> None:
        """Forgets every node.  Sessions that were given live on, but can no longer be kept; the statistics go on."""
        self._root = _Node([], None, 0)
        self._given.clear()

    def _open(self, ids: Tensor, most: int) -> Opened:
        """most: so many tokens may be reused."""
        known = ids.tolist()
        place = self._find(known, most)
        lender = self._lender(place)
        parts = place.below is None or place.tokens < most  # it is a node's place, or another token follows there
        source = lender if lender is not None and lender.tokens == place.tokens else self._part(place) if parts else None
        source = source or lender or place.node.held()
        reused = place.tokens if lender is not None else source.tokens
        session = self.model.session(prefix=None) if source.session is None else source.session.fork()
        if source.tokens > reused:
            session.rollback(source.tokens - reused)
        self._touch(source)
        self._give(session, source, reused)
        self._prompts += 1
        self._asked += len(known)
        self._reused += reused
        self._shrink()
        wanted = parts and lender is None and place.tokens - reused >= self.least_tokens
        return Opened(session, ids[reused:], reused, place.tokens if wanted else None)

    def _find(self, ids: list[int], most: int) -> _Place:
        """How far ids[:most] are known."""
        node, tokens = self._root, 0
        while tokens < most and (below := node.children.get(ids[tokens])) is not None:
            same = _common(below.edge, ids[tokens : min(most, tokens + len(below.edge))])
            tokens += same
            if same < len(below.edge):
                return _Place(node, below, tokens)
            node = below
        return _Place(node, None, tokens)

    def _lender(self, place: _Place) -> _Node | None:
        """A node whose session, rolled back, has read what is known; of the place itself if there is one; None for no token."""
        if place.tokens == 0:
            return None
        waiting = [place.below or place.node]
        while waiting:
            node = waiting.pop(0)
            if node.session is None:
                waiting += node.children.values()
            elif _goes_back(node.session, node.tokens - place.tokens):
                return node
        return None

    def _part(self, place: _Place) -> _Node | None:
        """The node where what is known ends, with a session; None where none can be made, or it is too near the one before it."""
        lender = self._lender(place)
        if lender is None or lender.session is None or place.tokens - place.node.held().tokens < self.least_tokens:
            return None
        node = place.node if place.below is None else self._split(place)
        if node is not lender:
            session = lender.session.fork()
            session.rollback(lender.tokens - place.tokens)
            node.hold(session, lender)
        return node

    def _split(self, place: _Place) -> _Node:
        """A node without a session in the middle of an edge."""
        below, cut = place.below, place.tokens - place.node.tokens
        assert below is not None
        middle = _Node(below.edge[:cut], place.node, place.tokens, below.used)
        place.node.children[below.edge[0]] = middle
        middle.children[below.edge[cut]] = below
        below.edge, below.parent = below.edge[cut:], middle
        return middle

    def _give(self, session: Session, source: _Node, tokens: int | None = None) -> None:
        before = self._given.get(session)
        if before is not None:
            before.source.readers.discard(session)
        source.readers.add(session)
        self._given[session] = _Given(source, source.tokens if tokens is None else tokens)

    def _touch(self, node: _Node) -> None:
        self._clock += 1
        for each in node.upwards():
            each.used = self._clock

    def _shrink(self) -> None:
        """Rule 3, until the budget is kept or nothing is left that would give bytes back."""
        while self.nbytes() > self.budget_bytes:
            leaves = [node for node in self._root.downwards() if node.parent is not None and not node.children and not node.readers]
            if not leaves:
                return
            self._evict(min(leaves, key=lambda node: node.used))
            self._evictions += 1

    def _evict(self, leaf: _Node) -> None:
        heirs = [node for node in leaf.upwards() if node.lender is leaf]  # the longest first
        session = leaf.session
        if heirs and session is not None and _goes_back(session, leaf.tokens - heirs[0].tokens):
            session.rollback(leaf.tokens - heirs[0].tokens)
            heirs[0].hold(session, None)
            for other in heirs[1:]:
                other.lender = heirs[0]
        leaf.session = None  # heirs that could not be served keep what they read
        parent = self._take_out(leaf)
        while parent.session is None and parent.parent is not None and not parent.children:
            parent = self._take_out(parent)
        if parent.session is None and parent.parent is not None and len(parent.children) == 1:
            (only,) = parent.children.values()  # nothing parts here any more
            only.edge, only.parent = parent.edge + only.edge, parent.parent
            parent.parent.children[only.edge[0]] = only

    def _take_out(self, node: _Node) -> _Node:
        """Its parent."""
        parent = node.parent
        assert parent is not None
        del parent.children[node.edge[0]]
        return parent


def _goes_back(session: Session, tokens: int) -> bool:
    """Whether a session can be as if it had never read its last tokens (rule 1)."""
    if session.can_rollback(tokens) is not None:
        return False
    stores = [store for site in range(len(session.model.plan.sites)) for store in session.stores(site)]
    samples = [store.sample for store in stores if isinstance(store, LookupStore | StaticStore)]
    return tokens == 0 or not any(sample.wants(len(session) - tokens, tokens) for sample in samples)


def _common(one: list[int], other: list[int]) -> int:
    """How many first tokens are equal."""
    if one[: len(other)] == other:
        return len(other)
    return next(place for place, (this, that) in enumerate(zip(one, other, strict=False)) if this != that)


def _bytes(budget: int | str) -> int:
    try:
        parsed = parse_bytes(budget)
    except ValueError:
        parsed = 0
    if parsed < 1:
        raise SessionError(Problem("budget", f"{budget!r} is no size.", 'Write a size such as "4GiB" or "256MiB", or a number of bytes.'))
    return parsed
