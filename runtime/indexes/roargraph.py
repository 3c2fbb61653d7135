"""The index `roargraph`: a graph over the keys, learnt from the prompt's queries, walked by every query.

Letters: H KV heads, G queries per KV head, U graphs of a KV head, T nodes, S slots, L training queries of a graph, N queries of a KV head,
D head_dim, E value_dim, K keys found, X entries.

Queries are unlike keys, and a graph that joins keys to the keys nearest to them leads no query to where it wants to go.  RetrievalAttention
(Liu et al. 2024) joins keys that the same queries find, as RoarGraph (Chen et al. 2024) does.  docs/graphs.md says how, and what it finds.

Keys stay where the session has them; a copy is made only of those that it keeps in fewer bits.  A graph is built from training queries
that were asked before, each about keys no later than itself.  Keys that come later join it one by one: they lead to what a walk for
themselves finds, and part of that leads to them, in slots that were kept for it; links that were learnt never change, so that a rollback
is exact.  They join when the next search brings the keys along.

A soft cap changes no order and is left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from kvcompile.ir.graph_facts import GRAPH_ENTRIES, RoarGraphFacts
from kvcompile.ir.policy import Select
from kvcompile.runtime.address_space import reserve
from kvcompile.runtime.indexes.index import Borrowed, Found, Keys, Prompt, RecentQueries
from kvcompile.runtime.indexes.restoring import borders, notes, shaped, share, whole
from kvcompile.runtime.indexes.select import share_chosen
from kvcompile.runtime.merge import AttentionState
from kvcompile.runtime.native_graph import Graphs, Shape, Walks, graph_library
from kvcompile.runtime.spans import Span

_JOINED = 4  # links, and as many back, that a key gets from a walk for itself
_WIDTH = 64  # of that walk
_LOOKED_AT = 1024  # candidates that a key's links are chosen from
_FEWEST = 64  # training queries of a graph: with fewer, keys ask in their place
_EF, _EF_OF_K = 256, 2.5  # width of a search's beam
_MEASURED_KEYS = 100  # recall@100 tells whether queries have drifted away ...
_DRIFT = 0.1  # ... by so much


@dataclass
class Walked:
    """Of all walks that searches made: how many, the keys that they read, and the nodes that they went on from."""

    walks: int = 0
    keys: int = 0
    hops: int = 0

    def count(self, walks: Walks) -> None:
        self.walks += walks.keys_HN.numel()
        self.keys += int(walks.keys_HN.sum())
        self.hops += int(walks.hops_HN.sum())

    @property
    def keys_per_walk(self) -> float:
        return self.keys / max(1, self.walks)


class RoarGraphIndex:
    """graphs: of the nodes that have joined.  made: nodes that were there when the graph was learnt.  tokens: nodes with those that have
    not joined yet.  ef: 0 where the spec leaves it out.  walks_per_head: of one search in a KV head.  recall: at the build, of the last
    queries; None without any.  walked: what searches cost so far.
    """

    def __init__(
        self,
        first: int,
        graphs: Graphs,
        *,
        tokens: int,
        made: int,
        shape: Shape,
        ef: int,
        walks_per_head: int,
        key_bytes: int,
        recall: float | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        self._first, self._tokens, self._made = first, tokens, made
        self._room, self._joined = graphs, len(graphs.rows_THUS)  # of at least so many nodes
        self._shared = False  # another index reads these graphs too
        self._borrowed = Borrowed()
        self._shape, self._ef, self._walks_per_head, self._key_bytes = shape, ef, walks_per_head, key_bytes
        self._recall, self._notes = recall, notes
        self.walked = Walked()

    @property
    def shape(self) -> tuple[int, int, int | None]:
        heads, _, dim = self._room.mean_HUD.shape
        return heads, dim, None

    @property
    def first(self) -> int:
        return self._first

    @property
    def end(self) -> int:
        return self._first + self._tokens

    @property
    def notes(self) -> tuple[str, ...]:
        return self._notes

    @property
    def graphs(self) -> Graphs:
        """Of the nodes that have joined."""
        return self._room.first(self._joined)

    def add(self, key_HTD: Tensor, value_HTE: Tensor) -> None:
        self._tokens += key_HTD.shape[1]

    def search(self, query_HGD: Tensor, k: int, select: Select, keys: Keys) -> Found:
        heads, group, _ = query_HGD.shape
        if k >= self._tokens:
            return Found((torch.arange(self._tokens) + self._first).expand(heads, group, self._tokens), k)
        walks = self._walk(query_HGD, k, keys(self._first, self.end))
        self.walked.count(walks)
        return Found(share_chosen(walks.node_HNK + self._first, select), k)

    def _walk(self, query_HND: Tensor, k: int, spans: Sequence[Span]) -> Walks:
        if self._joined < self._tokens:
            self._join(spans)
        width = min(max(k, self._ef or max(_EF, round(_EF_OF_K * k))), self._tokens)
        return graph_library().search(spans, query_HND.float(), k, width, self.graphs)

    def _join(self, spans: Sequence[Span]) -> None:
        """The nodes that were added become part of the graph."""
        if self._shared or len(self._room.rows_THUS) < self._tokens:
            self._move(self._tokens + self._tokens // 2)
        first, graphs = self._joined, self._room.first(self._tokens)
        if first == 0:
            graphs.rows_THUS[0], graphs.norm_THU[0] = -1, 0
            graphs.entries_HUX[..., 0] = 0
            first = 1
        graph_library().add(spans, first, self._shape, graphs)
        self._joined = self._tokens

    def _move(self, nodes: int) -> None:
        """The graphs into memory of this index alone, for so many nodes."""
        held, room = self.graphs, _room(nodes, self._room)
        room.rows_THUS[: self._joined], room.norm_THU[: self._joined] = held.rows_THUS, held.norm_THU
        room.entries_HUX = held.entries_HUX.clone()
        self._room, self._shared = room, False

    def rest(self, query_HGD: Tensor, found: Found, read_lse_HG: Tensor) -> AttentionState | None:
        return None

    def recalibrate(self, recent: RecentQueries, keys: Keys, k: int) -> bool:
        """False where the last queries find less than the prompt's last ones did: recall@100 lower by 0.1."""
        now = self.measured_recall(recent, keys(self._first, self.end))
        if now is None or self._recall is None:
            return True
        return now >= self._recall - _DRIFT

    def measured_recall(self, queries: RecentQueries, spans: Sequence[Span]) -> float | None:
        """recall@100 of queries that were asked behind the index; None without any."""
        asked = queries.behind(self.end - 1)
        k = min(_MEASURED_KEYS, self._tokens // 4)
        if asked.count == 0 or k == 0:
            return None
        right_HNK = graph_library().exact(spans, asked.query_HCD, torch.full((asked.count,), self._tokens), k)
        found_HNK = self._walk(asked.query_HCD, k, spans).node_HNK
        return float((right_HNK[..., None] == found_HNK[..., None, :]).any(3).float().mean())

    def rollback(self, end: int) -> None:
        """As KeyIndex; what was there when the index was made stays."""
        kept = max(end - self._first, self._made)
        if kept >= self._tokens:
            return
        self._tokens = kept
        if kept < self._joined:
            self._joined = kept
            if self._shared:
                self._move(kept)
            rows_THUS = self.graphs.rows_THUS
            rows_THUS.masked_fill_(rows_THUS >= kept, -1)  # later nodes are the last of a row

    def fork(self) -> RoarGraphIndex:
        """Graphs are shared until one of the two changes them."""
        child = RoarGraphIndex(
            self._first,
            self.graphs,
            tokens=self._tokens,
            made=self._made,
            shape=self._shape,
            ef=self._ef,
            walks_per_head=self._walks_per_head,
            key_bytes=self._key_bytes,
            recall=self._recall,
            notes=self._notes,
        )
        self._shared = child._shared = True
        child._borrowed = Borrowed(vars(child._room).values())
        return child

    def nbytes(self) -> int:
        graphs = self._room
        of_node = (graphs.rows_THUS.shape[3] + 1) * graphs.metric_HUDD.shape[0] * graphs.metric_HUDD.shape[1]
        return 4 * self._tokens * of_node + graphs.entries_HUX.nbytes + graphs.metric_HUDD.nbytes + graphs.mean_HUD.nbytes

    def borrowed_nbytes(self) -> int:
        """All, until a key that was added joins: it changes the links of others, so that the graphs are then copied (and not built)."""
        return self._borrowed.nbytes(vars(self._room).values())

    def scanned_bytes(self, tail: bool, k: int) -> int:
        """Keys that walks read and the rows that they went through, as measured by the searches so far: the mean."""
        heads, slots = self._room.rows_THUS.shape[1::2]
        walks = heads * self._walks_per_head / max(1, self.walked.walks)
        return round(walks * (self.walked.keys * self._key_bytes + self.walked.hops * slots * 4))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {name: tensor.contiguous() for name, tensor in vars(self.graphs).items()}
        return tensors, {
            "first": self._first,
            "tokens": self._tokens,
            "made": self._made,
            "shape": asdict(self._shape),
            "ef": self._ef,
            "walks_per_head": self._walks_per_head,
            "key_bytes": self._key_bytes,
            "recall": self._recall,
            "notes": list(self._notes),
            "sha256": _digest(tensors),
        }


class RoarGraph(RoarGraphFacts):
    """The kind `roargraph`."""

    def build(self, first: int, prompt: Prompt, options: Mapping[str, Any]) -> RoarGraphIndex:
        facts = RoarGraphFacts(prompt.queries_per_kv)
        heads, tokens, head_dim = prompt.key_HTD.shape
        graphs, degree = facts.graphs(options), facts.option("degree", options)
        slots = facts.slots(options)
        shape = Shape(facts.option("neighbours", options), degree, slots - max(1, degree // 8), _JOINED, _WIDTH, _LOOKED_AT)
        query_HULD, limit_L, notes = _training(first, prompt, graphs, facts.training_queries(options))
        made = _room(
            tokens,
            Graphs(
                torch.empty(0, heads, graphs, slots, dtype=torch.int32),
                torch.empty(0, heads, graphs),
                torch.full((heads, graphs, GRAPH_ENTRIES), -1, dtype=torch.int32),
                torch.eye(head_dim).repeat(heads, graphs, 1, 1),
                torch.zeros(heads, graphs, head_dim),
            ),
        )
        spans = [Span(first, prompt.key_HTD, prompt.value_HTE)]
        if tokens:
            graph_library().build(spans, query_HULD, limit_L, shape, made)
        index = RoarGraphIndex(
            first,
            made,
            tokens=tokens,
            made=tokens,
            shape=shape,
            ef=facts.option("ef", options),
            walks_per_head=prompt.queries_per_kv,
            key_bytes=head_dim * prompt.key_HTD.itemsize,
            notes=notes,
        )
        index._recall = index.measured_recall(prompt.recent, spans)
        return index

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> RoarGraphIndex:
        rows_THUS = shaped(tensors, "rows_THUS", torch.int32, None, None, None, None)
        nodes, heads, of_each, slots = rows_THUS.shape
        dim = shaped(tensors, "mean_HUD", torch.float32, heads, of_each, None).shape[2]
        shaped(tensors, "norm_THU", torch.float32, nodes, heads, of_each)
        shaped(tensors, "entries_HUX", torch.int32, heads, of_each, GRAPH_ENTRIES)
        shaped(tensors, "metric_HUDD", torch.float32, heads, of_each, dim, dim)
        if 0 in (heads, of_each, slots, dim):
            raise ValueError(f"graphs of the shape {list(rows_THUS.shape)}")
        graphs = Graphs(*(tensors[field.name] for field in fields(Graphs)))
        of_shape = numbers["shape"]
        sizes = {field.name: whole(of_shape, field.name, 1) for field in fields(Shape)}
        shape = Shape(**sizes)
        first, tokens = whole(numbers, "first"), whole(numbers, "tokens", nodes)
        made, ef = whole(numbers, "made", 0, nodes), whole(numbers, "ef")
        walks_per_head, key_bytes = whole(numbers, "walks_per_head", 1), whole(numbers, "key_bytes")
        recall = None if numbers["recall"] is None else share(numbers, "recall")
        borders({"first": first, "end": first + tokens})
        if not shape.degree < slots:
            raise ValueError(f"a degree of {shape.degree} in {slots} slots")
        if _digest(tensors) != numbers["sha256"]:
            raise ValueError("the graph's checksum is another")
        for named in (rows_THUS, graphs.entries_HUX):
            if bool(((named < -1) | (named >= max(1, nodes))).any()):
                raise ValueError("it names nodes that are not there")
        if bool(((rows_THUS[..., 1:] >= 0) & (rows_THUS[..., :-1] < 0)).any()):
            raise ValueError("a row has a gap")
        if nodes and not bool((rows_THUS[..., -1] < 0).any(0).all()):
            raise ValueError("no node has room for a link")
        for head in range(heads):
            for graph in range(of_each):
                _check_reachable(rows_THUS[:, head, graph], graphs.entries_HUX[head, graph])
        index = RoarGraphIndex(
            first,
            graphs,
            tokens=tokens,
            made=made,
            shape=shape,
            ef=ef,
            walks_per_head=walks_per_head,
            key_bytes=key_bytes,
            recall=recall,
            notes=notes(numbers),
        )
        index._shared = True  # with whoever gave the tensors
        return index


def _check_reachable(row_TS: Tensor, entry_X: Tensor) -> None:
    """Raises ValueError where a walk from the entries cannot come to every node: it would find fewer than it is asked for."""
    reached_T = torch.zeros(len(row_TS), dtype=torch.bool)
    front_N = entry_X[entry_X >= 0].long() if len(row_TS) else entry_X.new_zeros(0)
    while len(front_N):
        reached_T[front_N] = True
        link_N = row_TS[front_N].flatten()
        link_N = link_N[link_N >= 0].long()
        front_N = link_N[~reached_T[link_N]].unique()
    if not bool(reached_T.all()):
        raise ValueError(f"no walk comes to {int((~reached_T).sum())} of {len(reached_T)} nodes")


def _training(first: int, prompt: Prompt, graphs: int, most: int) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Queries [H, U, L, D], of each the end of the nodes that it may be asked about, and what is to be said of them."""
    given = prompt.training or prompt.recent
    tokens = prompt.key_HTD.shape[1]
    group, count = prompt.queries_per_kv, given.count // prompt.queries_per_kv
    position_C = given.position_C[:count]  # the same of every query head
    useful_C = position_C >= first
    query_HGCD, position_C = given.query_HCD.unflatten(1, (group, count))[:, :, useful_C], position_C[useful_C]
    asked = len(position_C) * (group // graphs)
    if asked >= _FEWEST or not tokens:
        limit_L = (position_C + 1 - first).clamp_max(tokens).repeat(group // graphs)
        return query_HGCD.flatten(1, 2).unflatten(1, (graphs, -1)), limit_L, ()
    key_HLD = prompt.key_HTD[:, :: max(1, -(-tokens // most))].float()
    key_HLD = key_HLD - key_HLD.mean(1, keepdim=True)
    note = f"it was learnt from the keys themselves: the prompt asked {asked} queries a graph, and {_FEWEST} are needed; it will miss much."
    return key_HLD[:, None].expand(-1, graphs, -1, -1), torch.full((key_HLD.shape[1],), tokens), (note,)


def _room(nodes: int, graphs: Graphs) -> Graphs:
    """Graphs of so many nodes, of which nothing is written yet; all else is that of others.  Memory is taken for what is written."""
    heads, of_each, slots = graphs.rows_THUS.shape[1:]
    rows_THUS = reserve(4 * nodes * heads * of_each * slots).view(torch.int32).view(nodes, heads, of_each, slots)
    norm_THU = reserve(4 * nodes * heads * of_each).view(torch.float32).view(nodes, heads, of_each)
    return replace(graphs, rows_THUS=rows_THUS, norm_THU=norm_THU)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for field in fields(Graphs):
        digest.update(tensors[field.name].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
