// Attention of many rows over a whole chunk of keys that all of them see, by products of pairs of bfloat16 numbers.
//
// One instruction adds two products to each of 16 sums, twice as many as in float32.  Products are exact and sums float32; the weights are
// rounded to bfloat16, each by at most 2^-9 of itself, and their sum is that of the exact ones.
#pragma once

#include "rows.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>

namespace {

constexpr int kPairRows = (int)kRowsAtOnce, kPairBlocks = 4;  // rows, and blocks of 16 keys, multiplied at once: 24 sums
constexpr int kPairColumns = 64;                              // of a value, added at once
constexpr int kChunkBlocks = (int)(kChunkTokens / kBlockTokens), kChunkPairs = (int)(kChunkTokens / 2);

KVC_INLINE Floats add_pairs(Floats sum, Bits a, Bits b) {
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(__m512i)a, (__m512bh)(__m512i)b);
}

// logits[m][t] = scale * query[m] . key[t]; queries and keys in pairs of channels.
template <int HeadDim, int M>
KVC_INLINE void multiply_pairs(const uint32_t *query, const uint32_t *key, float scale, float *logits) {
  for (int block = 0; block < kChunkBlocks; block += kPairBlocks, key += kPairBlocks * kBlockTokens * (HeadDim / 2)) {
    Floats sum[M][kPairBlocks] = {};
#pragma GCC unroll 2
    for (int pair = 0; pair < HeadDim / 2; pair++) {
      Bits keys[kPairBlocks];
#pragma GCC unroll 4
      for (int b = 0; b < kPairBlocks; b++) {
        const uint32_t *const at = key + (b * (HeadDim / 2) + pair) * kBlockTokens;
        prefetch(at);
        keys[b] = load_bits(at);
      }
#pragma GCC unroll 6
      for (int m = 0; m < M; m++) {
        const Bits channels = query[m * (HeadDim / 2) + pair] + Bits{};
#pragma GCC unroll 4
        for (int b = 0; b < kPairBlocks; b++) sum[m][b] = add_pairs(sum[m][b], keys[b], channels);
      }
    }
    for (int m = 0; m < M; m++)
      for (int b = 0; b < kPairBlocks; b++) store(logits + m * kChunkTokens + (block + b) * kBlockTokens, scale * sum[m][b]);
  }
}

// out[m] = sum_t weights[m][t] * value[t] in Columns numbers of each value, 32 of them in two vectors: those at 0 to 3 of every 8, and the
// others.  weights: in pairs of tokens.
template <int ValueDim, int M, int Columns>
KVC_INLINE void add_pair_values(const uint32_t *weights, const Bfloat16 *value, float *out) {
  Floats sum[M][Columns / 16] = {};
  for (int pair = 0; pair < kChunkPairs; pair++, value += 2 * ValueDim) {
#pragma GCC unroll 2
    for (int c = 0; c < Columns / 32; c++) {
      prefetch(value + 32 * c), prefetch(value + ValueDim + 32 * c);
      const __m512i one = (__m512i)load_bits(value + 32 * c), next = (__m512i)load_bits(value + ValueDim + 32 * c);
      const Bits low = (Bits)_mm512_unpacklo_epi16(one, next), high = (Bits)_mm512_unpackhi_epi16(one, next);
#pragma GCC unroll 6
      for (int m = 0; m < M; m++) {
        const Bits weight = weights[m * kChunkPairs + pair] + Bits{};
        sum[m][2 * c] = add_pairs(sum[m][2 * c], low, weight);
        sum[m][2 * c + 1] = add_pairs(sum[m][2 * c + 1], high, weight);
      }
    }
  }
  for (int m = 0; m < M; m++)
    for (int c = 0; c < Columns / 16; c++) {
      float lane[16];
      store(lane, sum[m][c]);
      for (int i = 0; i < 16; i++) out[m * ValueDim + c / 2 * 32 + i / 4 * 8 + c % 2 * 4 + i % 4] = lane[i];
    }
}

// 2^x for -150 <= x <= 0 to 2 units in the last place; what is lower is 0, NaN stays NaN.
KVC_INLINE __m512 exp2_of_pairs(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-150), x);
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), f = x - n;
  __m512 p = f * 1.535336188e-4f + 1.339887440e-3f;
  p = p * f + 9.618437357e-3f;
  p = p * f + 5.550332471e-2f;
  p = p * f + 2.402264791e-1f;
  p = p * f + 6.931472028e-1f;
  p = p * f + 1.0f;
  return _mm512_scalef_ps(p, n);
}

// What `weigh` does for one row of a whole chunk, its weights rounded to bfloat16.
KVC_INLINE void weigh_chunk(const float *logits, float *row_maximum, float *row_sum, uint32_t *weights) {
  constexpr float kLog2E = 1.44269504f;
  __m512 top = _mm512_set1_ps(-kInfinity), sum = _mm512_setzero_ps();
  for (int64_t t = 0; t < kChunkTokens; t += 16) top = _mm512_max_ps((__m512)load(logits + t), top);  // a NaN leaves it as it is
  *row_maximum = _mm512_reduce_max_ps(top);
  const float shift = *row_maximum == -kInfinity ? 0 : *row_maximum * kLog2E;
  for (int64_t t = 0; t < kChunkTokens; t += 32) {
    const __m512 low = exp2_of_pairs((__m512)load(logits + t) * kLog2E - shift);
    const __m512 high = exp2_of_pairs((__m512)load(logits + t + 16) * kLog2E - shift);
    sum += low, sum += high;
    const __m512bh both = _mm512_cvtne2ps_pbh(high, low);
    std::memcpy(weights + t / 2, &both, 64);
  }
  *row_sum = _mm512_reduce_add_ps(sum);
  if (*row_sum != *row_sum) *row_maximum = 0;
}

// Whether a chunk lies as `attend_pairs` reads it: whole blocks of one piece.
inline bool is_whole_chunk(const KvcPiece *pieces, int64_t count) {
  return count == 1 && pieces[0].tokens == kChunkTokens && pieces[0].slot % kBlockTokens == 0;
}

// Attention of queries that see a whole chunk; false, and nothing done, where it lies otherwise.  cap: of logits, 0: none.
template <int HeadDim, int ValueDim, int Queries, int Rows>
bool attend_pairs(const KvcQueries &queries, const KvcPiece *pieces, int64_t count, float scale, float cap, const KvcState &state) {
  static_assert(HeadDim % 2 == 0 && ValueDim % 32 == 0, "numbers lie in pairs, and values in whole vectors");
  if (!is_whole_chunk(pieces, count)) return false;
  const KvcPiece &piece = *pieces;
  alignas(64) uint32_t query[Rows * HeadDim / 2], weights[Rows * kChunkPairs];
  alignas(64) float logits[Rows * kChunkTokens];
  const int rows = (int)queries.tokens * Queries;
  for (int row = 0; row < rows; row++) {
    const Bfloat16 *from = (const Bfloat16 *)queries.data + row / Queries * queries.token_stride + row % Queries * queries.head_stride;
    std::memcpy(query + row * (HeadDim / 2), from, HeadDim * sizeof(Bfloat16));
  }
  const uint32_t *keys = (const uint32_t *)((const Bfloat16 *)piece.key + piece.slot * HeadDim);
  const Bfloat16 *values = (const Bfloat16 *)piece.value + piece.slot * ValueDim;
  each_rows<(kPairRows < Rows ? kPairRows : Rows)>(
      0, rows, [&](auto m, int row) { multiply_pairs<HeadDim, m>(query + row * (HeadDim / 2), keys, scale, logits + row * kChunkTokens); });
  for (int row = 0; row < rows; row++) {
    if (cap) cap_logits(logits + row * kChunkTokens, kChunkTokens, cap);
    weigh_chunk(logits + row * kChunkTokens, state.maximum + row, state.sum + row, weights + row * kChunkPairs);
  }
  const auto add = [&](auto columns, int first) {
    each_rows<(kPairRows < Rows ? kPairRows : Rows)>(0, rows, [&](auto m, int row) {
      add_pair_values<ValueDim, m, columns>(weights + row * kChunkPairs, values + first, state.out + row * ValueDim + first);
    });
  };
  for (int first = 0; first + kPairColumns <= ValueDim; first += kPairColumns) add(std::integral_constant<int, kPairColumns>{}, first);
  if constexpr (ValueDim % kPairColumns > 0)
    add(std::integral_constant<int, ValueDim % kPairColumns>{}, ValueDim - ValueDim % kPairColumns);
  return true;
}

}  // namespace
#else
template <int, int, int, int>
bool attend_pairs(const KvcQueries &, const KvcPiece *, int64_t, float, float, const KvcState &) {
  return false;
}
#endif
