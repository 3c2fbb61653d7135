"""Output error of retrieval methods at equal bytes, on the keys of SmolLM2-135M at 8K tokens and Gemma-3-270M at 32K.

    python benchmarks/retrieval_error.py [--models smollm2_8k gemma_32k] [--keep FOLDER]

The cache is everything before the last eighth of the context; queries are 48 random positions of that eighth; methods learn from tokens
before it only.  The first 64 and the last 256 tokens of the cache are always read.  Bytes are what one decode step of a KV head reads, in
% of its keys and values in bfloat16: rows read exactly, and everything an index reads.  The error is |o - o'| / |o|, the mean over queries
and heads.  Between points the error is interpolated in its logarithm.  Two views: one query head that chooses for itself, and all query
heads of a KV head, whose rows count once.

Writes benchmarks/results/retrieval_error_MODEL.json, and docs/retrieval_error.svg from these files when there is one of each model.
Exits with 1 where a claim that it checks does not hold.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from curves import Curve, Look, Point, error_at, picture, size_at
from harness import RESULTS, machine
from published_methods import CUBOIDS, HNSW, IVF, MAGICPIG, PAGES, REPRESENTATIVES, RETROINFER, ROARGRAPH, magicpig, published
from real_keys import SOURCES, Site, Source, sites
from retrieval_methods import (
    CLUSTERS_TAIL,
    EXACT,
    INT4,
    LARGE_CLUSTERS_TAIL,
    OURS,
    OURS_WITHOUT_TAIL,
    STATIC,
    STREAMING,
    Past,
    Search,
    rows_read,
    searches,
    whole_blocks,
)
from torch import Tensor

from kvcompile.codegen.toolchain import find_toolchain, machine_isa
from kvcompile.ir.graph_facts import ROARGRAPH as ROARGRAPH_FACTS
from kvcompile.ir.request import LookupRequest
from kvcompile.link import build_kernels
from kvcompile.runtime.merge import AttentionState, merge_states
from kvcompile.runtime.query_sample import QuerySample

SINK_TOKENS, RECENT_TOKENS = 64, 256
QUERIES = 48
SHARES = (0.25, 0.5, 1.0, 2.0, 5.0, 10.0)  # keys read, % of the tokens
ALONE, TOGETHER = "one query head", "query heads of a KV head"
BUDGETS = {"smollm2_8k": (8, 9, 10, 12, 14), "gemma_32k": (2, 3, 4, 5, 6, 8, 10)}
SHOWN_SHARES = (0.5, 1.0, 2.0, 5.0)
PICTURE = Path(__file__).parents[1] / "docs" / "retrieval_error.svg"
LOOKS = {
    OURS: Look("#d1481f", 2.8),
    OURS_WITHOUT_TAIL: Look("#d1481f", 1.6, "5 4"),
    EXACT: Look("#7d8590", 2.0, "2 3"),
    CLUSTERS_TAIL: Look("#2f81f7"),
    PAGES: Look("#a371f7"),
    INT4: Look("#2da44e"),
    STATIC: Look("#bf8700"),
    STREAMING: Look("#c2559d"),
    CUBOIDS: Look("#a371f7", 1.2, "4 2"),
    REPRESENTATIVES: Look("#a371f7", 1.2, "1 3"),
    RETROINFER: Look("#2f81f7", 1.2, "4 2"),
    IVF: Look("#1b7c83"),
    HNSW: Look("#1b7c83", 1.2, "4 2"),
    ROARGRAPH: Look("#1b7c83", 1.2, "1 3"),
    MAGICPIG: Look("#cf222e", 1.2, "1 3"),
}


def attention(logit_GQT: Tensor, value_TE: Tensor, read_GQT: Tensor) -> AttentionState:
    """Attention over the keys that are read; each query reads one at least."""
    logit_GQT = logit_GQT.masked_fill(~read_GQT, -torch.inf)
    return AttentionState(torch.softmax(logit_GQT, 2) @ value_TE, logit_GQT.logsumexp(2))


def measure(site: Site, query_head: int, view: str, graphs: bool) -> dict[str, list[tuple[float, float]]]:
    """(bytes in %, error) of every method at every share."""
    group = len(site.query_QTD) // len(site.key_HTD)
    head, tokens = query_head // group, site.key_HTD.shape[1]
    end = tokens - tokens // 8
    last = SINK_TOKENS + whole_blocks(end - RECENT_TOKENS - SINK_TOKENS)
    key_TD, value_TE = site.key_HTD[head, :end].float(), site.value_HTE[head, :end].float()
    query_GTD = site.query_QTD[head * group : (head + 1) * group].float() * site.scale
    sample = QuerySample(1, key_TD.shape[1], ROARGRAPH_FACTS.training_queries({}) // group)
    sample.add(query_GTD[None, :, :end], 0, 1.0)
    past = Past(key_TD[SINK_TOKENS:last], value_TE[SINK_TOKENS:last], SINK_TOKENS, sample, group, len(site.key_HTD))
    position_Q = end + torch.randperm(tokens - end, generator=torch.Generator().manual_seed(0))[:QUERIES]
    asked_GQD = query_GTD[:, position_Q]
    if view == ALONE:
        asked_GQD = asked_GQD[query_head % group, None]
    logit_GQT = (asked_GQD @ key_TD.T).double()
    value_TE = value_TE.double()
    true_GQE = attention(logit_GQT, value_TE, torch.ones_like(logit_GQT, dtype=torch.bool)).out
    row_bytes = 2 * (key_TD.shape[1] + value_TE.shape[1])

    def point(search: Search, share: float) -> tuple[float, float]:
        answer = search(asked_GQD, max(1, int(share / 100 * end)))
        read_GQT = torch.ones_like(logit_GQT, dtype=torch.bool)
        read_GQT[..., SINK_TOKENS:last] = answer.read_GQT
        weighed_GQT = logit_GQT
        if answer.log_weight_GQT is not None:
            weighed_GQT = logit_GQT.clone()
            weighed_GQT[..., SINK_TOKENS:last] += answer.log_weight_GQT
        state = attention(weighed_GQT, value_TE, read_GQT)
        if answer.rest is not None:
            state = merge_states(state, answer.rest)
        error = ((state.out - true_GQE).norm(dim=2) / true_GQE.norm(dim=2)).mean()
        return 100 * (rows_read(read_GQT) * row_bytes + answer.scanned) / (end * row_bytes), float(error)

    def mean_point(each: Sequence[Search], share: float) -> tuple[float, float]:
        sizes, errors = zip(*(point(search, share) for search in each), strict=True)
        return sum(sizes) / len(each), sum(errors) / len(each)

    methods = {name: [search] for name, search in (searches(past, view == TOGETHER) | published(past, graphs)).items()}
    methods[MAGICPIG] = magicpig(past)
    return {name: [mean_point(each, share) for share in SHARES] for name, each in methods.items()}


def curves_of(source: Source, captured: Mapping[int, Site], view: str, graphs: bool) -> dict[str, list[Point]]:
    """Bytes are the mean over heads too."""
    heads = []
    for layer, query_head in source.heads:
        heads.append(measure(captured[layer], query_head, view, graphs))
        print(f"{source.name}: {view}: {layer}.{query_head}", flush=True)
    return {
        name: [
            Point(share, sum(size for size, _ in points) / len(points), tuple(error for _, error in points))
            for share, points in zip(SHARES, zip(*(head[name] for head in heads), strict=True), strict=True)
        ]
        for name in heads[0]
    }


def tables(source: Source, view: str, curves: Mapping[str, Curve]) -> Iterator[str]:
    budgets = BUDGETS[source.name]
    yield ""
    yield f"{source.title}; {view}; error at bytes read, and error @ bytes % at a share of keys asked for"
    yield f"{'':26}" + "".join(f"{budget:7} %" for budget in budgets) + "  |" + "".join(f"{share:13} %" for share in SHOWN_SHARES)
    for name, curve in curves.items():
        found = (error_at(curve, budget) for budget in budgets)
        cells = "".join(f"{'no point' if error is None else f'{error:.4f}':>9}" for error in found)
        points = {point.share: point for point in curve}
        yield f"{name:26}{cells}  |" + "".join(f"{f'{points[s].error:.4f} @{points[s].size:5.2f}':>15}" for s in SHOWN_SHARES)


def claims(source: Source, curves: Mapping[str, Curve]) -> Iterator[tuple[str, bool]]:
    """What is said of `lookup`, each with whether these curves say so too."""
    ours = {point.share: point for point in curves[OURS]}
    large = source.name == "gemma_32k"
    others = [PAGES, CLUSTERS_TAIL, LARGE_CLUSTERS_TAIL, INT4] if large else [PAGES, CLUSTERS_TAIL, INT4]
    for share in (0.5, 1.0, 2.0, 5.0) if large else (2.0, 5.0):
        for other in others:
            yield _below(ours[share], other, curves[other])
    if large:
        for share in SHOWN_SHARES:
            yield _below(ours[share], EXACT, curves[EXACT])


def _below(point: Point, other: str, curve: Curve) -> tuple[str, bool]:
    """Where the other cannot do with so few bytes, its cheapest point is compared."""
    mine = f"{OURS} at {point.share:g} % of the keys: {point.error:.4f} @ {point.size:.2f} % of the bytes"
    theirs = error_at(curve, point.size)
    if theirs is not None:
        return f"{mine}; {other} at these bytes: {theirs:.4f}", point.error < theirs
    cheapest, dearest = min(curve, key=lambda each: each.size), max(curve, key=lambda each: each.size)
    if point.size < cheapest.size:
        return f"{mine}; {other} has no point there, its first: {cheapest.error:.4f} @ {cheapest.size:.2f} %", point.error < cheapest.error
    return f"{mine}; {other} has no point there, its last: {dearest.error:.4f} @ {dearest.size:.2f} %", False


def ratios(curves: Mapping[str, Curve]) -> Iterator[str]:
    """How many bytes one needs for the error of the other, both ways."""
    for one, other in ((EXACT, OURS), (OURS, EXACT)):
        for point in curves[one]:
            needed = size_at(curves[other], point.error)
            said = "has no point" if needed is None else f"needs {needed:.2f} %, {needed / point.size:.2f} times the bytes"
            yield f"{one} at {point.share:g} % of the keys: {point.error:.4f} @ {point.size:.2f} %; for this error {other} {said}"


def write(source: Source, views: Mapping[str, Mapping[str, Curve]], held: Sequence[tuple[str, bool]]) -> None:
    result = {
        "machine": machine(torch.get_num_threads()),
        "model": source.title,
        "heads": [f"{layer}.{head}" for layer, head in source.heads],
        "queries": QUERIES,
        "sink tokens": SINK_TOKENS,
        "recent tokens": RECENT_TOKENS,
        "views": {
            view: {
                name: {
                    "keys %": [point.share for point in curve],
                    "bytes %": [round(point.size, 3) for point in curve],
                    "error": [round(point.error, 5) for point in curve],
                    "error by head": [[round(error, 5) for error in point.errors] for point in curve],
                }
                for name, curve in curves.items()
            }
            for view, curves in views.items()
        },
        "claims": dict(held),
    }
    text = json.dumps(result, indent=1)
    text = re.sub(r"\[[^\[\]{}]*\]", lambda found: " ".join(found[0].split()), text)  # a list of numbers on one line
    RESULTS.mkdir(exist_ok=True)
    _file(source).write_text(text + "\n", encoding="utf-8")


def read(source: Source) -> dict[str, Curve]:
    """The curves of one query head, as `write` left them."""
    curves = json.loads(_file(source).read_text(encoding="utf-8"))["views"][ALONE]
    return {
        name: [Point(*point) for point in zip(curve["keys %"], curve["bytes %"], map(tuple, curve["error by head"]), strict=True)]
        for name, curve in curves.items()
    }


def _file(source: Source) -> Path:
    return RESULTS / f"retrieval_error_{source.name}.json"


@torch.no_grad()
def load_operators() -> None:
    """Sketches are made, and their codes read, by the operators of the launcher, as in a session; by torch without a compiler."""
    compiler = find_toolchain()
    if compiler is not None:
        any_kernel = LookupRequest("lookup", "cpu", 64, 64, 1, "float32", "float32", 1.0, None)  # the launcher comes with it
        build_kernels([any_kernel], machine_isa(), compiler)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [source.name for source in SOURCES]
    parser.add_argument("--models", nargs="+", choices=names, default=names)
    parser.add_argument("--keep", type=Path, help="a folder where the models' queries, keys and values stay for the next run")
    parser.add_argument("--no-graphs", action="store_true", help="leave out hnsw and roargraph, which take most of the time")
    options = parser.parse_args()
    load_operators()
    every_claim: list[tuple[str, bool]] = []
    for source in SOURCES:
        if source.name not in options.models:
            continue
        captured = sites(source, options.keep)
        views = {view: curves_of(source, captured, view, not options.no_graphs) for view in (ALONE, TOGETHER)}
        for view, curves in views.items():
            print("\n".join(tables(source, view, curves)))
        print()
        print("\n".join(ratios(views[ALONE])))
        held = list(claims(source, views[ALONE]))
        print("\n".join(f"{str(holds).lower():5} {text}" for text, holds in held), flush=True)
        write(source, views, held)
        every_claim += held
    if all(_file(source).exists() for source in SOURCES):
        panels = {source.title: read(source) for source in SOURCES}
        PICTURE.write_text(picture(panels, LOOKS, widest=20, low=0.005, high=1.0), encoding="utf-8")
    if not all(holds for _, holds in every_claim):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
