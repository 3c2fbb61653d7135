// Loops over rows and columns whose counts are known to the compiler, and the order of numbers in a store.
#pragma once

#include <type_traits>

#include "kernel.h"
#include "vector.h"

// Calls f<m>(row) for m rows from `row` on, m = M while as many are left.
template <int M, class F>
KVC_INLINE void each_rows(int row, int rows, F f) {
  for (; row + M <= rows; row += M) f(std::integral_constant<int, M>{}, row);
  if constexpr (M > 1) each_rows<M - 1>(row, rows, f);
}

// Calls f<C>(first) for all vectors of a value, C at a time.
template <int Vectors, int C, class F>
KVC_INLINE void each_columns(F f) {
  int first = 0;
  for (; first + C <= Vectors; first += C) f(std::integral_constant<int, C>{}, first);
  if constexpr (Vectors % C > 0) f(std::integral_constant<int, Vectors % C>{}, first);
}

// Where channel d of a token lies in its block of keys.
template <class Stored>
KVC_INLINE int64_t lane_of(int d, int64_t lane) {
  if constexpr (std::is_same_v<Stored, Bfloat16>) return (d / 2 * kBlockTokens + lane) * 2 + d % 2;
  return d * kBlockTokens + lane;
}

// Values that were summed as 16 even and 16 odd numbers in turn, in their own order.
template <class Stored, int Dim>
void copy_in_order(const float *from, int rows, float *to) {
  for (int row = 0; row < rows; row++, from += Dim, to += Dim)
    for (int e = 0; e < Dim; e++) {
      const bool split = std::is_same_v<Stored, Bfloat16> && e < Dim / 32 * 32;
      to[e] = from[split ? e / 32 * 32 + e % 2 * 16 + e % 32 / 2 : e];
    }
}

// logit -> cap * tanh(logit / cap) for one row; -inf stays -inf.  The row holds a multiple of 16 numbers.
KVC_INLINE void cap_logits(float *logits, int64_t tokens, float cap) {
  for (int64_t t = 0; t < tokens; t += 16) {
    const Floats logit = load(logits + t);
    store(logits + t, select(logit > -kInfinity, cap * tanh_of(logit / cap), logit));
  }
}

// logit -> logit + slope * (key position - query position) for one row, whose keys are those of the pieces.
KVC_INLINE void add_slope(float *logits, const KvcPiece *pieces, int64_t count, int64_t position, float slope) {
  for (const KvcPiece *piece = pieces; piece < pieces + count; logits += piece++->tokens) {
    const int32_t from = (int32_t)(piece->position - position);
    for (int32_t t = 0; t < piece->tokens; t++) logits[t] += slope * (float)(from + t);
  }
}

// Tokens of a piece that lie so far before the end of what is wanted that it pays to ask for memory behind them.
template <class Stored>
KVC_INLINE int64_t tokens_before_end(const KvcPiece &piece, int64_t dim) {
  return piece.tokens + piece.follow - kPrefetchBytes / (dim * (int64_t)sizeof(Stored));
}

// sum[m][b] = query[m] . key, for 16 keys in each of B blocks.
template <bool Ahead, class Stored, int HeadDim, int M, int B>
KVC_INLINE void multiply_blocks(const float *query, const Stored *key, Floats (&sum)[M][B]) {
  constexpr bool kPairs = std::is_same_v<Stored, Bfloat16>;
  constexpr int kStep = kPairs ? 2 : 1;  // channels in a vector
#pragma GCC unroll 2
  for (int d = 0; d < HeadDim; d += kStep, key += kStep * kBlockTokens) {
    Bits lanes[B];
    for (int b = 0; b < B; b++) {
      if constexpr (Ahead) prefetch(key + b * kBlockTokens * HeadDim);
      lanes[b] = load_bits(key + b * kBlockTokens * HeadDim);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
      for (int step = 0; step < kStep; step++) {
        const Floats channel = splat(query[m * HeadDim + d + step]);
        for (int b = 0; b < B; b++) sum[m][b] += channel * (!kPairs ? (Floats)lanes[b] : step ? odd(lanes[b]) : even(lanes[b]));
      }
  }
}

// sum[m] += sum_t weights[m][t] * value[t], of tokens [from, to) and C vectors of each value.
template <bool Ahead, class Stored, int ValueDim, int M, int C>
KVC_INLINE void add_tokens(const float *weights, const Stored *value, int64_t from, int64_t to, Floats (&sum)[M][C]) {
  constexpr bool kPairs = std::is_same_v<Stored, Bfloat16>;
  value += from * ValueDim;
  for (int64_t t = from; t < to; t++, value += ValueDim) {
#pragma GCC unroll 8
    for (int c = 0; c < C; c += kPairs ? 2 : 1) {
      if constexpr (Ahead) prefetch(value + c * 16);
      const Bits lanes = load_bits(value + c * 16);
#pragma GCC unroll 24
      for (int m = 0; m < M; m++) {
        const float weight = weights[m * kChunkTokens + t];
        sum[m][c] += weight * (kPairs ? even(lanes) : (Floats)lanes);
        if constexpr (kPairs) sum[m][c + 1] += weight * odd(lanes);
      }
    }
  }
}

// Logits of one row become weights exp(logit - maximum); columns up to the next multiple of 16 become 0.
KVC_INLINE void weigh(float *logits, int64_t tokens, float *row_maximum, float *row_sum) {
  const int64_t padded = (tokens + 15) / 16 * 16;
  for (int64_t t = tokens; t < padded; t++) logits[t] = -kInfinity;
  Floats top = splat(-kInfinity), sum = {};
  for (int64_t t = 0; t < padded; t += 16) top = maximum(load(logits + t), top);
  *row_maximum = max_lanes(top);
  const float shift = *row_maximum == -kInfinity ? 0 : *row_maximum;
  for (int64_t t = 0; t < padded; t += 16) {
    const Floats weight = exp_negative(load(logits + t) - shift);
    store(logits + t, weight);
    sum += weight;
  }
  *row_sum = sum_lanes(sum);
  if (*row_sum != *row_sum) *row_maximum = 0;  // a NaN logit is no maximum: without one it would be merged as a row that saw nothing
}

// Writes new tokens to slots from `slot` on.
template <class From, class Stored, int HeadDim, int ValueDim>
void append_tokens(const KvcTokens &tokens, Stored *keys, Stored *values, int64_t slot) {
  for (int64_t t = 0; t < tokens.tokens; t++, slot++) {
    const From *key = (const From *)tokens.key + t * tokens.key_stride;
    const From *value = (const From *)tokens.value + t * tokens.value_stride;
    Stored *block = keys + slot / kBlockTokens * kBlockTokens * HeadDim;
    if constexpr (std::is_same_v<From, Bfloat16> && std::is_same_v<Stored, Bfloat16> && HeadDim % 2 == 0) {
      for (int d = 0; d < HeadDim; d += 2) std::memcpy(block + lane_of<Stored>(d, slot % kBlockTokens), key + d, 2 * sizeof(Stored));
      std::memcpy(values + slot * ValueDim, value, ValueDim * sizeof(Stored));
      continue;
    }
    for (int d = 0; d < HeadDim; d++) narrow(widen(key[d]), block + lane_of<Stored>(d, slot % kBlockTokens));
    for (int e = 0; e < ValueDim; e++) narrow(widen(value[e]), values + slot * ValueDim + e);
  }
}
