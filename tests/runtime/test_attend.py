"""The torch kernel against the float64 oracle, and its promises about bits and about work."""

from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kvcompile.ir.policy import All, SinkRecent
from kvcompile.runtime import reference
from kvcompile.runtime.attend import attend_spans, plan_tiles
from kvcompile.runtime.merge import merge_states
from kvcompile.runtime.spans import Span

EVERYTHING = {"sink_tokens": 0, "recent_tokens": None}


def problem(kv_heads, queries_per_kv, new, tokens, head_dim=16, value_dim=16, dtype=torch.float32):
    torch.manual_seed(tokens * 7 + head_dim)
    query = torch.randn(kv_heads, queries_per_kv, new, head_dim)
    return query, torch.randn(kv_heads, tokens, head_dim).to(dtype), torch.randn(kv_heads, tokens, value_dim).to(dtype)


def oracle(
    query,
    key,
    value,
    first,
    scale,
    sink_tokens=0,
    recent_tokens=None,
    soft_cap=None,
    chunk_tokens=None,
    slopes_HG=None,
    sink_query_HGSD=None,
):
    zone = All() if recent_tokens is None else SinkRecent(sink_tokens, recent_tokens)
    queries, keys = torch.arange(first, first + query.shape[2]), torch.arange(key.shape[1])
    see = reference.visible(zone, queries, keys, chunk_tokens)
    bias = None if slopes_HG is None else reference.alibi(slopes_HG, queries, keys)
    sinks = None if sink_query_HGSD is None else keys < sink_tokens
    return reference.attend(query, key, value, see, scale, soft_cap, bias, sink_query_HGSD, sinks)


def feature(name, query):
    """Options of a site or of a policy; those of `query`'s shape are cut by `rows` as the query is."""
    torch.manual_seed(99)
    slopes = 2.0 ** -torch.arange(1.0, 1 + query.shape[0] * query.shape[1]).view(query.shape[:2])
    return {
        "alibi": {"sink_tokens": 0, "recent_tokens": None, "slopes_HG": slopes},
        "alibi in a window": {"sink_tokens": 4, "recent_tokens": 90, "slopes_HG": slopes, "soft_cap": 5.0},
        "chunks": {"sink_tokens": 0, "recent_tokens": 64, "chunk_tokens": 64},
        "chunks of 1100": {"sink_tokens": 0, "recent_tokens": 1100, "chunk_tokens": 1100},
        "chunks, a window and sinks": {"sink_tokens": 70, "recent_tokens": 30, "chunk_tokens": 100, "slopes_HG": slopes},
        "own sinks": {"sink_tokens": 5, "recent_tokens": 100, "sink_query_HGSD": torch.randn(query.shape)},
        "many own sinks": {"sink_tokens": 1030, "recent_tokens": 1, "soft_cap": 5.0, "sink_query_HGSD": torch.randn(query.shape)},
    }[name]


FEATURES = ["alibi", "alibi in a window", "chunks", "chunks of 1100", "chunks, a window and sinks", "own sinks", "many own sinks"]


def rows(options, queries, heads=slice(None)):
    """The options of these queries and heads."""
    cuts = {"slopes_HG": lambda slopes: slopes[heads], "sink_query_HGSD": lambda query: query[heads][:, :, queries]}
    return {name: cuts.get(name, lambda same: same)(option) for name, option in options.items()}


def cut(key, value, borders):
    borders = [0, *borders, key.shape[1]]
    return [Span(a, key[:, a:b], value[:, a:b]) for a, b in pairwise(borders)]


def assert_close(state, right, tolerance=1e-5):
    torch.testing.assert_close(state.out.double(), right.out, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(state.lse.double(), right.lse, rtol=tolerance, atol=tolerance)


def bit_equal(first, second):
    return torch.equal(first.out, second.out) and torch.equal(first.lse, second.lse)


@pytest.mark.parametrize("zone", [EVERYTHING, {"sink_tokens": 4, "recent_tokens": 50}, {"sink_tokens": 0, "recent_tokens": 1}])
@pytest.mark.parametrize("queries_per_kv", [1, 3, 4, 7, 8, 71])
@pytest.mark.parametrize(("new", "tokens"), [(1, 1), (1, 1500), (2, 1024), (8, 1030), (300, 300), (5, 5)])
def test_it_equals_the_oracle_for_every_group_size(queries_per_kv, new, tokens, zone):
    """Trap 3, lse included."""
    query, key, value = problem(2, queries_per_kv, new, tokens)
    state = attend_spans(query, cut(key, value, []), tokens - new, scale=0.25, **zone)
    assert state.out.shape == (2, queries_per_kv, new, 16)
    assert state.lse.shape == (2, queries_per_kv, new)
    assert_close(state, oracle(query, key, value, tokens - new, 0.25, **zone))


@pytest.mark.parametrize(
    ("head_dim", "value_dim"),
    [(16, 16), (24, 40), (17, 23), (40, 40), (64, 64), (72, 72), (80, 80), (96, 32), (112, 112), (128, 128), (192, 128), (256, 256)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("soft_cap", [None, 5.0])
def test_head_sizes_store_dtypes_and_the_soft_cap(head_dim, value_dim, dtype, soft_cap):
    query, key, value = problem(2, 3, 5, 1200, head_dim, value_dim, dtype)
    for zone in (EVERYTHING, {"sink_tokens": 3, "recent_tokens": 30}):
        state = attend_spans(query, cut(key, value, [700]), 1195, scale=head_dim**-0.5, soft_cap=soft_cap, **zone)
        assert state.out.dtype == state.lse.dtype == torch.float32
        assert_close(state, oracle(query, key, value, 1195, head_dim**-0.5, soft_cap=soft_cap, **zone))


def test_float64_stays_float64():
    query, key, value = problem(2, 3, 40, 1100, dtype=torch.float64)
    state = attend_spans(query, cut(key, value, [9]), 1060, scale=0.25, **EVERYTHING)
    assert state.out.dtype == torch.float64
    assert_close(state, oracle(query, key, value, 1060, 0.25), 1e-12)


@pytest.mark.parametrize(("size", "tolerance"), [(200.0, 1e-4), (-200.0, 1e-4), (2e4, 5e-3)])  # float32 holds 2e4 to 1e-3
def test_large_logits_neither_overflow_nor_vanish(size, tolerance):
    """Trap 4: logits of +-200 and far beyond."""
    query, key, value = problem(1, 2, 3, 2100)
    query[..., 0], key[..., 0] = size, 1.0
    key[:, 1500, 0] = -1.0
    state = attend_spans(query, cut(key, value, []), 2097, scale=1.0, **EVERYTHING)
    assert state.out.isfinite().all()
    assert_close(state, oracle(query, key, value, 2097, 1.0), tolerance)


@pytest.mark.parametrize("zone", [EVERYTHING, {"sink_tokens": 5, "recent_tokens": 100}, {"sink_tokens": 0, "recent_tokens": 300}])
def test_no_result_depends_on_the_chunk(zone):
    """Trap 5."""
    tokens = 700
    query, key, value = problem(2, 3, tokens, tokens)
    right = oracle(query, key, value, 0, 0.25, **zone)
    for chunk in (1, 7, 64, 512, tokens):
        for first in range(0, tokens, chunk):
            end = min(first + chunk, tokens)
            state = attend_spans(query[:, :, first:end], cut(key[:, :end], value[:, :end], []), first, scale=0.25, **zone)
            torch.testing.assert_close(state.out.double(), right.out[:, :, first:end], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(state.lse.double(), right.lse[:, :, first:end], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize(("head_dim", "value_dim", "queries_per_kv", "dtype"), [(24, 16, 3, torch.float32), (15, 20, 2, torch.bfloat16)])
def test_slopes_chunks_and_own_sinks_equal_the_oracle_in_any_chunk(name, head_dim, value_dim, queries_per_kv, dtype):
    tokens = 1400
    query, key, value = problem(2, queries_per_kv, tokens, tokens, head_dim, value_dim, dtype)
    options = feature(name, query)
    right = oracle(query, key, value, 0, 0.25, **options)
    for chunk, first in ((tokens, 0), (700, 0), (333, 0), (7, 1000), (7, 1095), (1, 0), (1, 63), (1, 64), (1, 300), (1, 1100), (1, 1399)):
        for start in range(first, min(tokens, first + 4 * chunk), chunk):
            now = slice(start, min(tokens, start + chunk))
            spans = cut(key[:, : now.stop], value[:, : now.stop], [now.stop // 3] if now.stop > 2 else [])
            state = attend_spans(query[:, :, now], spans, start, scale=0.25, **rows(options, now))
            torch.testing.assert_close(state.out.double(), right.out[:, :, now], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(state.lse.double(), right.lse[:, :, now], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("head_dim", [16, 20])
def test_their_bits_depend_on_no_cut_and_no_grouping(name, head_dim):
    for new, tokens in ((1, 1), (1, 1331), (4, 1103), (300, 1200)):
        query, key, value = problem(3, 2, new, tokens, head_dim, 28)
        options = feature(name, query)
        whole = attend_spans(query, cut(key, value, []), tokens - new, scale=0.2, **options)
        for borders in ([], [3, 5, 1000, 1024], list(range(100, tokens, 97))):
            spans = cut(key, value, [border for border in borders if border < tokens])
            assert bit_equal(whole, attend_spans(query, spans, tokens - new, scale=0.2, **options))
        for heads in ([0], [2, 1]):
            mine = rows(options, slice(None), heads)
            alone = attend_spans(query[heads], cut(key[heads], value[heads], []), tokens - new, scale=0.2, **mine)
            assert torch.equal(alone.out, whole.out[heads])
            assert torch.equal(alone.lse, whole.lse[heads])


def test_with_the_same_query_for_the_sinks_nothing_changes():
    query, key, value = problem(2, 3, 40, 900)
    zone = {"sink_tokens": 5, "recent_tokens": 100, "scale": 0.25}
    plain = attend_spans(query, cut(key, value, []), 860, **zone)
    torch.testing.assert_close(attend_spans(query, cut(key, value, []), 860, sink_query_HGSD=query, **zone), plain, rtol=1e-5, atol=1e-5)


def test_a_block_ends_at_the_last_sink_and_a_tile_with_its_chunk():
    spans = [Span(0, torch.empty(1, 5000, 1), torch.empty(1, 5000, 1))]
    (tile,) = plan_tiles(spans, 4000, 1, 5, 100, None, True)
    assert [(block.sinks, block.pieces) for block in tile.blocks] == [(True, ((0, 0, 5, 0),)), (False, ((0, 3901, 100, 3901),))]
    assert [block.tokens for block in plan_tiles(spans, 4000, 1, 5, 100)[0].blocks] == [105]
    (tile,) = plan_tiles(spans, 3, 1, 5, 100, None, True)
    assert [(block.sinks, block.tokens) for block in tile.blocks] == [(True, 4)]
    tiles = plan_tiles(spans, 250, 300, 0, 100, 100)
    assert [(tile.first, tile.end, tile.touched_tokens) for tile in tiles] == [
        (250, 256, 56),
        (256, 300, 100),
        (300, 400, 100),
        (400, 500, 100),
        (500, 512, 12),
        (512, 550, 50),
    ]


@pytest.mark.parametrize("head_dim", [16, 20, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("zone", [EVERYTHING, {"sink_tokens": 5, "recent_tokens": 1300}])
def test_the_cut_of_the_spans_does_not_change_a_bit(zone, dtype, head_dim):
    for new, tokens in ((1, 2500), (3, 2077), (600, 1500)):
        query, key, value = problem(3, 3, new, tokens, head_dim, 28, dtype)
        whole = attend_spans(query, cut(key, value, []), tokens - new, scale=0.2, **zone)
        for borders in ([1], [3, 5, 1000, 1024], [17, 1023, 1025], list(range(100, tokens, 97))):
            spans = cut(key, value, borders)
            assert bit_equal(whole, attend_spans(query, spans, tokens - new, scale=0.2, **zone))
            fresh = [Span(span.first, span.key_HTD.clone(), span.value_HTE.clone()) for span in spans]
            assert bit_equal(whole, attend_spans(query, fresh, tokens - new, scale=0.2, **zone))


@pytest.mark.parametrize("head_dim", [16, 20, 24, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("soft_cap", [None, 3.0])
def test_the_grouping_of_heads_does_not_change_a_bit(dtype, head_dim, soft_cap):
    for new, tokens in ((1, 1), (1, 2331), (4, 1037), (300, 555)):
        query, key, value = problem(5, 3, new, tokens, head_dim, 20, dtype)
        zone = {"sink_tokens": 5, "recent_tokens": 800, "scale": 0.2, "soft_cap": soft_cap}
        together = attend_spans(query, cut(key, value, [tokens // 2]), tokens - new, **zone)
        for heads in ([0], [1], [4], [1, 3], [4, 2, 0]):
            alone = attend_spans(query[heads], cut(key[heads], value[heads], []), tokens - new, **zone)
            assert torch.equal(alone.out, together.out[heads])
            assert torch.equal(alone.lse, together.lse[heads])


def test_grouping_changes_no_bit_where_panels_are_merged():
    query, key, value = problem(3, 2, 1, 40_000)
    together = attend_spans(query, cut(key, value, [21_111]), 39_999, scale=0.25, **EVERYTHING)
    assert_close(together, oracle(query, key, value, 39_999, 0.25))
    for heads in ([0], [1, 2]):
        alone = attend_spans(query[heads], cut(key[heads], value[heads], []), 39_999, scale=0.25, **EVERYTHING)
        assert torch.equal(alone.out, together.out[heads])
        assert torch.equal(alone.lse, together.lse[heads])


@pytest.mark.parametrize(("sink", "recent", "tokens"), [(16, 256, 272), (0, 40, 40), (4, 1500, 1504), (30, 5, 35)])
def test_below_overflow_a_window_is_bit_equal_to_everything(sink, recent, tokens):
    for first in (0, 1, tokens // 2, tokens - 1):
        query, key, value = problem(2, 3, tokens - first, tokens)
        spans = cut(key, value, [])
        banded = attend_spans(query, spans, first, sink_tokens=sink, recent_tokens=recent, scale=0.25)
        assert bit_equal(banded, attend_spans(query, spans, first, scale=0.25, **EVERYTHING))


def test_work_is_proportional_to_sink_and_recent():
    spans = [Span(0, torch.empty(1, 50_000, 1), torch.empty(1, 50_000, 1))]
    for first, new in ((0, 50_000), (30_000, 2048), (49_999, 1), (777, 5)):
        tiles = plan_tiles(spans, first, new, 16, 256)
        assert tiles[0].first == first
        assert tiles[-1].end == first + new
        assert all(tile.end == after.first for tile, after in pairwise(tiles))
        for tile in tiles:
            assert tile.touched_tokens == min(tile.end, 16 + 255 + tile.end - tile.first)
    assert [tile.touched_tokens for tile in plan_tiles(spans, 49_999, 1, 16, 256)] == [272]
    assert sum(tile.touched_tokens for tile in plan_tiles(spans, 0, 50_000, 16, 256)) < 50_000 * 2.1
    assert [tile.touched_tokens for tile in plan_tiles(spans, 49_999, 1, 0, None)] == [50_000]
    assert plan_tiles(spans, 5, 0, 0, None) == []


def test_keys_outside_the_window_are_not_read():
    query, key, value = problem(2, 3, 300, 3000)
    first, sink, recent = 2700, 8, 200
    zone = {"sink_tokens": sink, "recent_tokens": recent, "scale": 0.25}
    right = attend_spans(query, cut(key, value, []), first, **zone)
    for tensor in (key, value):
        tensor[:, sink : first - recent + 1] = torch.nan
    assert bit_equal(attend_spans(query, cut(key, value, []), first, **zone), right)


def test_no_span_is_our_mistake_and_no_token_is_empty():
    query, key, value = problem(2, 3, 4, 0)
    state = attend_spans(query, [Span(0, key, value)], 0, scale=1.0, **EVERYTHING)
    assert torch.equal(state.out, torch.zeros(2, 3, 4, 16))
    assert torch.equal(state.lse, torch.full((2, 3, 4), -torch.inf))
    query, key, value = problem(2, 3, 0, 6)
    assert attend_spans(query, [Span(0, key, value)], 6, scale=1.0, **EVERYTHING).out.shape == (2, 3, 0, 16)
    with pytest.raises(AssertionError, match="no span at all"):
        attend_spans(query, [], 0, scale=1.0, **EVERYTHING)


def test_queries_that_see_no_key_are_zero_beside_those_that_do():
    query, key, value = problem(2, 3, 10, 5)
    state = attend_spans(query, [Span(4, key, value)], 0, scale=0.25, **EVERYTHING)  # positions 4 to 8
    assert torch.equal(state.lse == -torch.inf, (torch.arange(10) < 4).expand(2, 3, 10))
    assert not state.out[:, :, :4].any()
    see = reference.visible(All(), torch.arange(10), torch.arange(4, 9))
    assert_close(state, reference.attend(query, key, value, see, 0.25))
    beyond = attend_spans(query, [Span(4, key, value)], 100, sink_tokens=2, recent_tokens=7, scale=0.25)
    assert beyond.lse.eq(-torch.inf).all()
    assert not beyond.out.any()


@pytest.mark.parametrize("border", [0, 1, 1024, 1337, 2000])
def test_a_shared_prefix_and_the_rest_merge_to_the_whole(border):
    query, key, value = problem(2, 4, 7, 2000)
    prefix, rest = cut(key, value, [border])
    parts = [attend_spans(query, [span], 1993, scale=0.25, **EVERYTHING) for span in (prefix, rest)]
    assert_close(merge_states(*parts), oracle(query, key, value, 1993, 0.25), 2e-6)


class LargestNewTensor(TorchDispatchMode):
    """Bytes of the largest tensor made inside, apart from views of the given ones."""

    def __init__(self, *given):
        super().__init__()
        self.nbytes = 0
        self.given = {tensor.untyped_storage().data_ptr() for tensor in given}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.given:
                self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize(("new", "dtype"), [(1, torch.float32), (1, torch.bfloat16), (600, torch.float32)])
def test_temporary_memory_does_not_grow_with_the_context(new, dtype):
    largest = []
    for tokens in (20_000, 60_000):
        query, key, value = problem(1, 2, new, tokens, dtype=dtype)
        spans = cut(key, value, [tokens // 3])
        with LargestNewTensor(query, key, value) as seen:
            attend_spans(query, spans, tokens - new, scale=0.25, **EVERYTHING)
        largest.append(seen.nbytes)
    assert 0 < largest[0] == largest[1] <= 8 << 20


@pytest.mark.parametrize("threads", [2])
def test_bits_are_the_same_on_every_call_with_several_threads(threads):
    torch.set_num_threads(threads)
    for new, tokens in ((1, 3000), (40, 1100)):
        query, key, value = problem(3, 3, new, tokens, 64, 64, torch.bfloat16)
        zone = {"sink_tokens": 5, "recent_tokens": 2000, "scale": 0.125}
        whole = attend_spans(query, cut(key, value, []), tokens - new, **zone)
        for borders in ([], [77, 1030]):
            assert bit_equal(whole, attend_spans(query, cut(key, value, borders), tokens - new, **zone))
        alone = attend_spans(query[2:], cut(key[2:], value[2:], [500]), tokens - new, **zone)
        assert torch.equal(alone.out[0], whole.out[2])
        assert torch.equal(alone.lse[0], whole.lse[2])
