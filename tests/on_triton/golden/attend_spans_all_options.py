# Decode: one new token of each session attends over spans of keys and values, for one group of KV heads.
#
# Made by kvcompile from codegen/triton/attend_spans.py.jinja for request 2553c134cb5b7760; print it again with:
#     kvcompile SPEC --show source
# Policy: the first 16 tokens (sinks) and the last 256, the query's own included, of its chunk of 8192.
# Logits are 0.11180339887498948 * q.k, soft-capped at 30.0, with a learnt sink in the denominator; float16 stores, sums in float32.
#
# N sessions, H KV heads, G = 3 queries per KV head, D = 80, E = 80.  A work row is what one program does: at most a
# chunk of the visible keys of one KV head of one session, as two ranges of contiguous tokens, a and b, of which b may be empty.
# Offsets and strides count vectors of 8 elements, so that the compiler knows what is aligned.
#
# query:    fp32[2 * N, H, G, D], contiguous: those of the sessions, and as many that are shown to the sinks
# keys:     fp16, any span's first element; token t of range a is D elements from vector key_a + t * key_stride
# values:   fp16, likewise E elements from vector value_a + t * value_stride
# work:     int64[items, 7] = query * H + KV head, key_a, value_a, tokens_a, key_b, value_b, tokens_b; rows of one
#           head are neighbours
# first:    int32[N * H + 1], the work rows of a head are first[head] .. first[head + 1]; none is an empty zone
# part_out: float32[items, G, E], part_lse: float32[items, G]
# sinks:    float32[H, G], one more logit in each denominator
# out:      float32[N, H, G, E], lse: float32[N, H, G], natural logarithm; an empty zone gives (0, sink)
import triton
import triton.language as tl

QUERIES = tl.constexpr(3)
ROWS = tl.constexpr(16)  # queries of a KV head, padded to what tl.dot multiplies
HEAD_DIM = tl.constexpr(80)
VALUE_DIM = tl.constexpr(80)
HEAD_LANES = tl.constexpr(128)  # padded to a power of two
VALUE_LANES = tl.constexpr(128)
KEYS = tl.constexpr(64)  # of one tile
PARTS = tl.constexpr(16)  # merged at once
SCALE = tl.constexpr(0.11180339887498948)
SOFT_CAP = tl.constexpr(30.0)
LOG2_E = tl.constexpr(1.4426950408889634)
NEVER = tl.constexpr(float("-inf"))
VECTOR = tl.constexpr(8)
NUM_WARPS = 4
NUM_STAGES = 3


@triton.jit
def attend_spans(query, keys, values, work, part_out, part_lse, key_stride, value_stride):
    """One program a work row: softmax attention over its ranges, tile by tile (FlashAttention-2, algorithm 1)."""
    item = tl.program_id(0)
    row = work + item * 7
    head = tl.load(row)
    key_a = tl.load(row + 1)
    value_a = tl.load(row + 2)
    tokens_a = tl.load(row + 3).to(tl.int32)
    key_b = tl.load(row + 4)
    value_b = tl.load(row + 5)
    tokens_b = tl.load(row + 6).to(tl.int32)
    tiles_a = tl.cdiv(tokens_a, KEYS)
    g = tl.arange(0, ROWS)
    d = tl.arange(0, HEAD_LANES)
    e = tl.arange(0, VALUE_LANES)
    n = tl.arange(0, KEYS)
    at_GD = (head * QUERIES + g)[:, None] * HEAD_DIM + d[None, :]
    q_GD = tl.load(query + at_GD, mask=(g < QUERIES)[:, None] & (d < HEAD_DIM)[None, :], other=0.0).to(keys.dtype.element_ty)
    peak_G = tl.full((ROWS,), NEVER, tl.float32)  # of the logits so far, in units of ln 2
    total_G = tl.zeros((ROWS,), tl.float32)
    acc_GE = tl.zeros((ROWS, VALUE_LANES), tl.float32)
    for tile in range(tiles_a + tl.cdiv(tokens_b, KEYS)):  # one loop over both ranges: two nested ones take twice the registers
        in_a = tile < tiles_a
        t_N = tl.where(in_a, tile, tile - tiles_a) * KEYS + n
        real_N = t_N < tl.where(in_a, tokens_a, tokens_b)
        key_ND = keys + tl.where(in_a, key_a, key_b) * VECTOR + t_N[:, None] * (key_stride * VECTOR) + d[None, :]
        value_NE = values + tl.where(in_a, value_a, value_b) * VECTOR + t_N[:, None] * (value_stride * VECTOR) + e[None, :]
        k_ND = tl.load(key_ND, mask=real_N[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
        v_NE = tl.load(value_NE, mask=real_N[:, None] & (e < VALUE_DIM)[None, :], other=0.0)
        # tanh(x) = 1 - 2 / (1 + exp(2 x)), right at both infinities
        double_GN = tl.dot(q_GD, tl.trans(k_ND), input_precision="ieee") * (SCALE / SOFT_CAP * 2.0)
        logits_GN = (1.0 - 2.0 / (1.0 + tl.exp(double_GN))) * (SOFT_CAP * LOG2_E)
        logits_GN = tl.where(real_N[None, :], logits_GN, NEVER)
        new_peak_G = tl.maximum(peak_G, tl.max(logits_GN, 1))
        weights_GN = tl.exp2(logits_GN - new_peak_G[:, None])
        fade_G = tl.exp2(peak_G - new_peak_G)
        total_G = total_G * fade_G + tl.sum(weights_GN, 1)
        acc_GE = tl.dot(weights_GN.to(v_NE.dtype), v_NE, acc_GE * fade_G[:, None], input_precision="ieee")
        peak_G = new_peak_G
    at_G = item * QUERIES + g
    out_GE = part_out + at_G[:, None] * VALUE_DIM + e[None, :]
    tl.store(out_GE, acc_GE / total_G[:, None], mask=(g < QUERIES)[:, None] & (e < VALUE_DIM)[None, :])
    tl.store(part_lse + at_G, (peak_G + tl.log2(total_G)) / LOG2_E, mask=g < QUERIES)


@triton.jit
def merge_parts(part_out, part_lse, first, sinks, kv_heads, out, lse):
    """One program a query: its head's parts by log-sum-exp, in the order of the work rows."""
    head = tl.program_id(0)
    query = tl.program_id(1)
    e = tl.arange(0, VALUE_LANES)
    p = tl.arange(0, PARTS)
    peak = tl.load(sinks + head % kv_heads * QUERIES + query)  # a part whose value is zero
    total = tl.full((), 1.0, tl.float32)
    acc_E = tl.zeros((VALUE_LANES,), tl.float32)
    last = tl.load(first + head + 1)
    for start in range(tl.load(first + head), last, PARTS):
        at_P = (start + p) * QUERIES + query
        real_P = start + p < last
        lse_P = tl.load(part_lse + at_P, mask=real_P, other=NEVER)
        part_PE = part_out + at_P[:, None] * VALUE_DIM + e[None, :]
        out_PE = tl.load(part_PE, mask=real_P[:, None] & (e < VALUE_DIM)[None, :], other=0.0)
        new_peak = tl.maximum(peak, tl.max(lse_P, 0))
        weight_P = tl.exp(lse_P - new_peak)
        fade = tl.exp(peak - new_peak)
        total = total * fade + tl.sum(weight_P, 0)
        acc_E = acc_E * fade + tl.sum(weight_P[:, None] * out_PE, 0)
        peak = new_peak
    at = head * QUERIES + query
    tl.store(out + at * VALUE_DIM + e, acc_E / tl.where(total > 0.0, total, 1.0), mask=e < VALUE_DIM)
    tl.store(lse + at, peak + tl.log(tl.where(total > 0.0, total, 1.0)))


def decode(query, keys, values, work, first, part_out, part_lse, sinks, out, lse, key_stride, value_stride):
    """Both launches, on the current stream."""
    if work.shape[0]:
        attend_spans[(work.shape[0],)](
            query, keys, values, work, part_out, part_lse, key_stride, value_stride, num_warps=NUM_WARPS, num_stages=NUM_STAGES
        )
    heads = first.shape[0] - 1
    merge_parts[(heads, 3)](part_out, part_lse, first, sinks, sinks.shape[0], out, lse)
