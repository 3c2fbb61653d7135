"""The rendered kernels in Triton's interpreter, on CPU tensors, against the float64 oracle.

What the interpreter does not see: races, layouts, limits of shared memory, the tensor core's own rounding.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

from itertools import pairwise

import pytest
import torch
from on_triton import interpreter_bf16
from on_triton.cases import decode_request

from kvcompile.codegen.triton import render_decode
from kvcompile.ir.policy import All, SinkRecent
from kvcompile.runtime import reference
from kvcompile.runtime.growable import GrowableStore
from kvcompile.runtime.merge import AttentionState
from kvcompile.runtime.ring import RingStore
from kvcompile.runtime.spans import Span
from kvcompile.runtime.triton_attend import attend_spans, attend_work, load, plan_work

CHUNK = 64
ROUNDING = 2e-6  # of float32 sums, exponentials and logarithms

interpreter_bf16.install()

pytestmark = [  # the interpreter's own; exp(inf) is meant
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
]


def problem(request, kv_heads, tokens):
    torch.manual_seed(tokens * 7 + request.head_dim)
    dtype = getattr(torch, request.store_dtype)
    query = torch.randn(kv_heads, request.queries_per_kv, 1, request.head_dim).to(dtype)
    key, value = (torch.randn(kv_heads, tokens, dim).to(dtype) for dim in (request.head_dim, request.value_dim))
    return query, key, value


def cut(key, value, borders=()):
    """Spans in buffers of their own, each between tokens that are not to be read: NaN."""
    return [Span(a, fenced(key[:, a:b]), fenced(value[:, a:b])) for a, b in pairwise([0, *borders, key.shape[1]])]


def fenced(part):
    buffer = part.new_full((part.shape[0], part.shape[1] + 5, part.shape[2]), torch.nan)
    buffer[:, 3:-2] = part
    return buffer[:, 3:-2]


def oracle(request, query, key, value, position, sinks=None, sink_query=None):
    """The state, and what rounding the weights to the stores' dtype may change in `out`: half an ulp of each weight."""
    zone = All() if request.recent_tokens is None else SinkRecent(request.sink_tokens, request.recent_tokens)
    keys = torch.arange(key.shape[1])
    see = reference.visible(zone, torch.tensor([position]), keys, request.chunk_tokens)
    own = {} if sink_query is None else {"sink_query_HGSD": sink_query, "sinks_T": keys < request.sink_tokens}
    state, sizes = (reference.attend(query, key, each, see, request.scale, request.soft_cap, **own) for each in (value, value.abs()))
    if sinks is not None:
        state, sizes = (reference.apply_learnt_sinks(each, sinks) for each in (state, sizes))
    return state, sizes.out * torch.finfo(key.dtype).eps / 2


def run(request, tmp_path, query, spans, position, **options):
    return attend_spans(load(render_decode(request), tmp_path), request, query, spans, position, chunk_tokens=CHUNK, **options)


def assert_close(state, right, slack, rounding=ROUNDING):
    assert state.out.dtype == state.lse.dtype == torch.float32
    assert state.out.shape == right.out.shape
    excess = (state.out.double() - right.out).abs() - slack
    assert excess.max() <= rounding, excess.max()
    torch.testing.assert_close(state.lse.double(), right.lse, rtol=rounding, atol=rounding)


def bit_equal(first, second):
    return torch.equal(first.out, second.out) and torch.equal(first.lse, second.lse)


@pytest.mark.parametrize("store_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("head_dim", "value_dim"), [(16, 16), (24, 40), (20, 20), (64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)]
)
def test_head_sizes_and_dtypes(head_dim, value_dim, store_dtype, tmp_path):
    request = decode_request(head_dim, 4, store_dtype, value_dim=value_dim)
    query, key, value = problem(request, 2, 100)
    assert_close(run(request, tmp_path, query, cut(key, value), 99), *oracle(request, query, key, value, 99))


@pytest.mark.parametrize("queries_per_kv", [1, 3, 4, 7, 8, 17, 64])
@pytest.mark.parametrize("zone", [{}, {"sink_tokens": 5, "recent_tokens": 40}])
def test_group_sizes(queries_per_kv, zone, tmp_path):
    request = decode_request(32, queries_per_kv, "bfloat16", **zone)
    query, key, value = problem(request, 3, 100)
    assert_close(run(request, tmp_path, query, cut(key, value), 99), *oracle(request, query, key, value, 99))


@pytest.mark.parametrize("tokens", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 1, 300, 20 * CHUNK])
def test_borders_of_chunks(tokens, tmp_path):
    request = decode_request()
    query, key, value = problem(request, 1, tokens)
    assert_close(run(request, tmp_path, query, cut(key, value), tokens - 1), *oracle(request, query, key, value, tokens - 1))


@pytest.mark.parametrize("rising", [1, -1])
def test_parts_of_unequal_weight(rising, tmp_path):
    """More parts than are merged at once, the heaviest in the last or in the first; exp(400) is no float32."""
    request, tokens = decode_request(scale=1.0), 40 * CHUNK
    query, key, value = problem(request, 1, tokens)
    query[..., 0] = 1.0
    key[..., 0] = rising * torch.linspace(0, 400, tokens)
    assert_close(run(request, tmp_path, query, cut(key, value), tokens - 1), *oracle(request, query, key, value, tokens - 1), 1e-4)


@pytest.mark.parametrize(("sink", "recent"), [(5, 40), (0, 40), (0, 1), (3, 1), (70, 150)])
@pytest.mark.parametrize("beyond", [None, -1, 0, 1, 50])
def test_sinks_and_window(sink, recent, beyond, tmp_path):
    """Lengths around sink + recent; and around the sinks alone."""
    request = decode_request(sink_tokens=sink, recent_tokens=recent)
    lengths = {max(1, sink - 1), max(1, sink), sink + 1} if beyond is None else {max(1, sink + recent + beyond)}
    for tokens in lengths:
        query, key, value = problem(request, 2, tokens)
        right = oracle(request, query, key, value, tokens - 1)
        if tokens > sink + recent:
            key[:, sink : tokens - recent] = torch.nan  # not to be read
            value[:, sink : tokens - recent] = torch.nan
        assert_close(run(request, tmp_path, query, cut(key, value), tokens - 1), *right)


def test_a_head_that_sees_sinks_and_a_short_window_is_one_row():
    request = decode_request(sink_tokens=4, recent_tokens=40)
    _, key, value = problem(request, 3, 500)
    work = plan_work(request, [cut(key, value)], [499], CHUNK)
    assert work.rows[:, [0, 3, 6]].tolist() == [[0, 4, 40], [1, 4, 40], [2, 4, 40]]
    assert work.first.tolist() == [0, 1, 2, 3]
    work = plan_work(decode_request(), [cut(key, value, [100])], [499], CHUNK)
    assert work.rows[:8, [3, 6]].tolist() == [[64, 0], [36, 28], *[[64, 0]] * 5, [52, 0]]


@pytest.mark.parametrize("zone", [{"recent_tokens": 70}, {"recent_tokens": 30}, {"sink_tokens": 20, "recent_tokens": 30}, {}])
@pytest.mark.parametrize("position", [0, 69, 70, 71, 100, 139, 140, 199])
def test_a_chunk_hides_what_lies_before_it(zone, position, tmp_path):
    request = decode_request(16, 3, "bfloat16", chunk_tokens=70, **zone)
    query, key, value = problem(request, 2, position + 1)
    right = oracle(request, query, key, value, position)
    key[:, : position // 70 * 70] = torch.nan  # not to be read
    assert_close(run(request, tmp_path, query, cut(key, value), position), *right)


@pytest.mark.parametrize("store_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sink", [1, 5, 70])
@pytest.mark.parametrize("tokens", [1, 5, 6, 70, 71, 110, 111, 250])
def test_sinks_are_shown_their_own_query(tokens, sink, store_dtype, tmp_path):
    request = decode_request(16, 3, store_dtype, sink_tokens=sink, recent_tokens=40, cache_index=True)
    query, key, value = problem(request, 2, tokens)
    sink_query = torch.randn(query.shape).to(query.dtype)
    state = run(request, tmp_path, query, cut(key, value, [tokens // 2]), tokens - 1, sink_query_HGSD=sink_query)
    assert_close(state, *oracle(request, query, key, value, tokens - 1, sink_query=sink_query))


def test_sessions_that_show_sinks_their_own_query_share_a_launch(tmp_path):
    request = decode_request(16, 3, sink_tokens=3, recent_tokens=100, cache_index=True)
    kernel = load(render_decode(request), tmp_path)
    problems = [problem(request, 2, tokens) for tokens in (250, 1, 90)]
    spans, positions = [cut(key, value) for _, key, value in problems], [249, 0, 89]
    query_NHGD = torch.stack([query.squeeze(2) for query, _, _ in problems])
    sink_query_NHGD = torch.randn(query_NHGD.shape)
    together = attend_work(kernel, request, query_NHGD, plan_work(request, spans, positions, CHUNK), None, sink_query_NHGD)
    for index, (query, _, _) in enumerate(problems):
        sink_query = sink_query_NHGD[index].unsqueeze(2)
        alone = run(request, tmp_path, query, spans[index], positions[index], sink_query_HGSD=sink_query)
        assert torch.equal(together.out[index], alone.out.squeeze(2))
        assert torch.equal(together.lse[index], alone.lse.squeeze(2))


@pytest.mark.parametrize("borders", [[1], [64], [3, 64, 65], [10, 11, 12, 13, 14, 100], list(range(7, 200, 7))])
@pytest.mark.parametrize("zone", [{}, {"sink_tokens": 12, "recent_tokens": 90}])
def test_several_spans(borders, zone, tmp_path):
    request = decode_request(16, 3, "bfloat16", **zone)
    query, key, value = problem(request, 2, 203)
    assert_close(run(request, tmp_path, query, cut(key, value, borders), 202), *oracle(request, query, key, value, 202))


def test_a_wrapped_ring_and_a_forked_store(tmp_path):
    request = decode_request(16, 3, sink_tokens=4, recent_tokens=50)
    query, key, value = problem(request, 2, 170)
    ring = RingStore(2, 16, 16, torch.float32, sink_tokens=4, recent_tokens=50)
    for at in range(170):
        spans = ring.extend(key[:, at : at + 1], value[:, at : at + 1])
        if at in (3, 53, 54, 60, 169):
            right = oracle(request, query, key[:, : at + 1], value[:, : at + 1], at)
            assert_close(run(request, tmp_path, query, spans, at), *right)
    request = decode_request(16, 3)
    parent = GrowableStore(2, 16, 16, torch.float32, capacity_tokens=100)
    parent.extend(key[:, :90], value[:, :90])
    child = parent.fork()
    spans = child.extend(key[:, 90:], value[:, 90:])
    assert len(spans) > 1
    assert_close(run(request, tmp_path, query, spans, 169), *oracle(request, query, key, value, 169))


@pytest.mark.parametrize("learnt_sinks", [False, True])
@pytest.mark.parametrize("sink_tokens", [0, 2])
def test_an_empty_zone_is_zero_and_minus_infinity(learnt_sinks, sink_tokens, tmp_path):
    """No token, and tokens that the window has left behind."""
    request = decode_request(16, 3, learnt_sinks=learnt_sinks, sink_tokens=sink_tokens, recent_tokens=7)
    sinks = torch.randn(2, 3) if learnt_sinks else None
    for tokens in (0, 5):
        query, key, value = problem(request, 2, tokens)
        key, value = key[:, sink_tokens:], value[:, sink_tokens:]
        span = Span(sink_tokens, key, value)
        state = run(request, tmp_path, query, [span], 100, sinks_HG=sinks)
        assert torch.equal(state.out, torch.zeros(2, 3, 1, 16))
        expected = torch.full((2, 3), -torch.inf) if sinks is None else sinks
        assert torch.equal(state.lse, expected[..., None])


@pytest.mark.parametrize("soft_cap", [None, 5.0, 50.0])
@pytest.mark.parametrize("learnt_sinks", [False, True])
@pytest.mark.parametrize("store_dtype", ["float32", "bfloat16"])
def test_soft_cap_and_learnt_sinks(soft_cap, learnt_sinks, store_dtype, tmp_path):
    request = decode_request(64, 3, store_dtype, soft_cap=soft_cap, learnt_sinks=learnt_sinks)
    query, key, value = problem(request, 2, 150)
    sinks = 3.0 * torch.randn(2, 3) + 2.0 if learnt_sinks else None
    state = run(request, tmp_path, query, cut(key, value), 149, sinks_HG=sinks)
    assert_close(state, *oracle(request, query, key, value, 149, sinks), rounding=5e-6)


@pytest.mark.parametrize("size", [200.0, -200.0, 2e4])
@pytest.mark.parametrize("soft_cap", [None, 30.0])
def test_large_logits_neither_overflow_nor_vanish(size, soft_cap, tmp_path):
    request = decode_request(16, 2, scale=1.0, soft_cap=soft_cap)
    query, key, value = problem(request, 1, 210)
    query[..., 0], key[..., 0] = size, 1.0
    key[:, 150, 0] = -1.0
    state = run(request, tmp_path, query, cut(key, value), 209)
    assert state.out.isfinite().all()
    assert_close(state, *oracle(request, query, key, value, 209), rounding=1e-4 if abs(size) < 1e3 else 5e-3)


def test_sessions_of_one_launch_are_bit_equal_to_launches_of_their_own(tmp_path):
    request = decode_request(16, 3, "bfloat16", sink_tokens=3, recent_tokens=100, learnt_sinks=True)
    kernel, sinks = load(render_decode(request), tmp_path), torch.randn(2, 3)
    problems = [problem(request, 2, tokens) for tokens in (250, 1, 90)]
    spans = [cut(key, value, [key.shape[1] // 2]) for _, key, value in problems]
    positions = [span[-1].end - 1 for span in spans]
    query_NHGD = torch.stack([query.squeeze(2) for query, _, _ in problems])
    together = attend_work(kernel, request, query_NHGD, plan_work(request, spans, positions, CHUNK), sinks)
    for index, (query, _, _) in enumerate(problems):
        alone = run(request, tmp_path, query, spans[index], positions[index], sinks_HG=sinks)
        assert torch.equal(together.out[index], alone.out.squeeze(2))
        assert torch.equal(together.lse[index], alone.lse.squeeze(2))


def test_heads_alone_are_bit_equal_to_heads_together_and_runs_repeat(tmp_path):
    request = decode_request(16, 3)
    query, key, value = problem(request, 3, 300)
    together = run(request, tmp_path, query, cut(key, value), 299)
    assert bit_equal(together, run(request, tmp_path, query, cut(key, value), 299))
    for head in range(3):
        alone = run(request, tmp_path, query[head : head + 1], cut(key[head : head + 1], value[head : head + 1]), 299)
        assert bit_equal(alone, AttentionState(together.out[head : head + 1], together.lse[head : head + 1]))


@pytest.mark.parametrize(("dtype", "store_dtype"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("bfloat16", "float16")])
def test_a_query_is_rounded_to_the_stores_dtype(dtype, store_dtype, tmp_path):
    request = decode_request(16, 3, store_dtype, dtype=dtype)
    query, key, value = problem(request, 2, 70)
    query = torch.randn(query.shape).to(getattr(torch, dtype))
    right = oracle(request, query.to(key.dtype), key, value, 69)
    assert_close(run(request, tmp_path, query, cut(key, value), 69), *right)


def test_what_the_kernel_cannot_read_is_refused(tmp_path):
    request = decode_request(16, 3)
    query, key, value = problem(request, 2, 10)
    with pytest.raises(AssertionError, match="one new token, not 2"):
        run(request, tmp_path, query.expand(2, 3, 2, 16), cut(key, value), 9)
    with pytest.raises(AssertionError, match="learnt sinks go with a request that has them"):
        run(request, tmp_path, query, cut(key, value), 9, sinks_HG=torch.zeros(2, 3))
    with pytest.raises(AssertionError, match="a query for the sinks goes with a request for it"):
        run(request, tmp_path, query, cut(key, value), 9, sink_query_HGSD=query)
    wide = torch.zeros(2, 10, 17)
    with pytest.raises(AssertionError, match="at no multiples of 4"):
        run(request, tmp_path, query, [Span(0, wide[..., 1:], wide[..., 1:])], 9)
    with pytest.raises(AssertionError, match="elements apart"):
        run(request, tmp_path, query, [Span(0, key, value), Span(10, torch.zeros(2, 4, 20)[..., :16], value[:, :4])], 13)
    with pytest.raises(AssertionError, match="float64"):
        run(request, tmp_path, query.double(), cut(key, value), 9)
    with pytest.raises(AssertionError, match="bfloat16"):
        run(request, tmp_path, query, [Span(0, key.bfloat16(), value)], 9)


@pytest.mark.parametrize("operation", ["x + x", "-x", "x * x", "x > x"])
def test_the_interpreter_refuses_bfloat16_arithmetic(operation, tmp_path):
    """Without the patch it computes on bit patterns."""
    text = "import triton\nimport triton.language as tl\n\n\n@triton.jit\ndef kernel(p):\n"
    text += f"    x = tl.load(p + tl.arange(0, 16))\n    tl.store(p + tl.arange(0, 16), ({operation}).to(tl.bfloat16))\n"
    with pytest.raises(Exception, match=r"cast to tl\.float32 first"):
        load(text, tmp_path).kernel[(1,)](torch.ones(16, dtype=torch.bfloat16))
