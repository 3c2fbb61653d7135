// Attention of one new token's queries over keys and values that lie a token a row, wherever each row is.
#pragma once

#include "whole.h"

namespace {

constexpr int kRowsAhead = 16;  // rows that are asked for before they are read

template <class S>
void append_row(const void *key, const void *value, void *key_row, void *value_row) {
  for (int d = 0; d < S::kHeadDim; d++) narrow(widen(((const typename S::Query *)key)[d]), (typename S::Stored *)key_row + d);
  for (int e = 0; e < S::kValueDim; e++) narrow(widen(((const typename S::Query *)value)[e]), (typename S::Stored *)value_row + e);
}

// logits[m][t] = query[m] . keys[t], for T keys and M queries.
template <class S, int M, int T>
KVC_INLINE void multiply_rows(const float *query, const void *const *keys, float *logits) {
  constexpr bool kPairs = std::is_same_v<typename S::Stored, Bfloat16>;
  constexpr int kLanes = kPairs ? 32 : 16, kWhole = S::kHeadDim / kLanes * kLanes;
  Floats sum[M][T] = {};
  for (int d = 0; d < kWhole; d += kLanes)
    for (int t = 0; t < T; t++) {
      const Bits lanes = load_bits((const typename S::Stored *)keys[t] + d);
      for (int m = 0; m < M; m++) {
        sum[m][t] += load(query + m * S::kHeadDim + d) * (kPairs ? even(lanes) : (Floats)lanes);
        if constexpr (kPairs) sum[m][t] += load(query + m * S::kHeadDim + d + 16) * odd(lanes);
      }
    }
  for (int m = 0; m < M; m++) {
    float *to = logits + m * kChunkTokens;
    if constexpr (T == 4)
      sum_four(sum[m], to);
    else
      for (int t = 0; t < T; t++) to[t] = sum_lanes(sum[m][t]);
    for (int t = 0; t < T; t++)
      for (int d = kWhole; d < S::kHeadDim; d++) to[t] += query[m * S::kHeadDim + d] * widen(((const typename S::Stored *)keys[t])[d]);
  }
}

// out[m] += sum_t weights[m][t] * value[t], in vectors [first, first + C) of each value.
template <class S, int M, int C>
void add_rows(const float *weights, const void *const *values, int64_t tokens, int first, float *out) {
  constexpr bool kPairs = std::is_same_v<typename S::Stored, Bfloat16>;
  Floats sum[M][C];
  for (int m = 0; m < M; m++)
    for (int c = 0; c < C; c++) sum[m][c] = load(out + m * S::kValueDim + (first + c) * 16);
  for (int64_t t = 0; t < tokens; t++) {
    const typename S::Stored *value = (const typename S::Stored *)values[t] + first * 16;
    const char *ahead = (const char *)((const typename S::Stored *)values[std::min(t + kRowsAhead / 2, tokens - 1)] + first * 16);
    for (int64_t i = 0; i < C * 16 * (int64_t)sizeof(typename S::Stored); i += 64) __builtin_prefetch(ahead + i);
    for (int c = 0; c < C; c += kPairs ? 2 : 1) {
      const Bits lanes = load_bits(value + c * 16);
      for (int m = 0; m < M; m++) {
        const float weight = weights[m * kChunkTokens + t];
        sum[m][c] += weight * (kPairs ? even(lanes) : (Floats)lanes);
        if constexpr (kPairs) sum[m][c + 1] += weight * odd(lanes);
      }
    }
  }
  for (int m = 0; m < M; m++)
    for (int c = 0; c < C; c++) store(out + m * S::kValueDim + (first + c) * 16, sum[m][c]);
}

KVC_INLINE void prefetch_row(const void *row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char *)row + i, 0, 2);
}

// Attention of `rows` queries over at most kChunkTokens keys.
template <class S>
void attend_rows(const float *query, int32_t rows, const void *const *keys, const void *const *values, int64_t tokens,
                 const KvcState *state) {
  using Stored = typename S::Stored;
  constexpr bool kPairs = std::is_same_v<Stored, Bfloat16>;
  constexpr int kLanes = kPairs ? 32 : 16, kVectors = S::kValueDim / kLanes * (kPairs ? 2 : 1), kTail = S::kValueDim % kLanes;
  constexpr int kColumns = kRegisters >= 32 ? 8 : 2, kKeyRows = kRegisters >= 32 ? 4 : 2;
  constexpr int kColumnsUsed = kVectors < kColumns ? (kVectors ? kVectors : 1) : kColumns;
  constexpr int kValueRows = kRegisters >= 32 ? 24 / kColumnsUsed : 2;
  alignas(64) float logits[S::kQueries * kChunkTokens], out[S::kQueries * S::kValueDim] = {};
  const auto ask = [&](int64_t t) {
    prefetch_row(keys[t], S::kHeadDim * sizeof(Stored));
    prefetch_row(values[t], S::kValueDim * sizeof(Stored));
  };
  for (int64_t t = 0; t < std::min<int64_t>(tokens, kRowsAhead); t++) ask(t);
  const auto multiply = [&](auto count, int64_t t) {
    for (int64_t i = t + kRowsAhead; i < std::min(tokens, t + kRowsAhead + count); i++) ask(i);
    each_rows<(kKeyRows < S::kQueries ? kKeyRows : S::kQueries)>(0, rows, [&](auto m, int row) {
      multiply_rows<S, m, count>(query + row * S::kHeadDim, keys + t, logits + row * kChunkTokens + t);
    });
  };
  int64_t t = 0;
  for (; t + 4 <= tokens; t += 4) multiply(std::integral_constant<int, 4>{}, t);
  for (; t < tokens; t++) multiply(std::integral_constant<int, 1>{}, t);
  for (int row = 0; row < rows; row++) {
    if constexpr (S::kCapped) {
      for (int64_t t = tokens; t % 16; t++) logits[row * kChunkTokens + t] = 0;
      cap_logits(logits + row * kChunkTokens, tokens, S::kSoftCap);
    }
    weigh(logits + row * kChunkTokens, tokens, state->maximum + row, state->sum + row);
  }
  each_columns<kVectors, kColumns>([&](auto columns, int first) {
    each_rows<(kValueRows < S::kQueries ? kValueRows : S::kQueries)>(0, rows, [&](auto m, int row) {
      add_rows<S, m, columns>(logits + row * kChunkTokens, values, tokens, first, out + row * S::kValueDim);
    });
  });
  if constexpr (kTail > 0)
    for (int64_t t = 0; t < tokens; t++) {
      const Stored *value = (const Stored *)values[t] + S::kValueDim - kTail;
      for (int m = 0; m < rows; m++)
        for (int e = 0; e < kTail; e++) out[m * S::kValueDim + S::kValueDim - kTail + e] += logits[m * kChunkTokens + t] * widen(value[e]);
    }
  copy_in_order<Stored, S::kValueDim>(out, rows, state->out);
}

}  // namespace
