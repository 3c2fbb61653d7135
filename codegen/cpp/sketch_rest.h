// An estimate of what is not read: weights guessed from scores, times the means of values.
#pragma once

#include "sketch_choice.h"

namespace {

// What the keys of some runs weigh that are not chosen, a sum a run; and all in all; scores are at most `shift`.
template <class S>
KvcWeights sum_runs(const KvcLookupQuery *query, int32_t row, int32_t shift, const int32_t *scores, const uint32_t *chosen,
                    const KvcRun *runs, int64_t count, float *sums) {
  KvcWeights all = {};
  const float scale = query->keys.scale[row], base = query->keys.base[row];
  Floats read = {}, low_read = {}, four[4];
  for (int64_t run = 0; run < count; run++) {
    const int32_t *score = scores + (2 * run * S::kQueries + row) * 16;
    const Floats first = weights_below<S>(load_as<Ints>(score), shift, scale, base);
    const Floats second = weights_below<S>(load_as<Ints>(score + S::kQueries * 16), shift, scale, base);
    four[run % 4] = first + second;
    if (chosen[run]) {
      const Ints low = set_lanes(chosen[run] & 0xffff), high = set_lanes(chosen[run] >> 16);
      const Floats of_run = (Floats)((Ints)first & low) + (Floats)((Ints)second & high);
      four[run % 4] = (Floats)((Ints)first & ~low) + (Floats)((Ints)second & ~high);
      read += of_run;
      if (runs[run].low) low_read += of_run;
    }
    if (run % 4 == 3)
      sum_four(four, sums + run - 3);
    else if (run == count - 1)
      for (int64_t i = 0; i <= run % 4; i++) sums[run - run % 4 + i] = sum_lanes(four[i]);
  }
  for (int64_t run = 0; run < count; run++) {
    all.rest += sums[run];
    if (runs[run].low) all.low += sums[run];
  }
  all.read = sum_lanes(read), all.low += sum_lanes(low_read);
  return all;
}

// out[m] += sum_i weights[m][i] * mean[i], in vectors [first, first + C) of each value.
template <class S, int M, int C>
void add_means(const float *weights, const int8_t *const *means, int64_t count, int first, float *out) {
  Floats sum[M][C];
  for (int m = 0; m < M; m++)
    for (int c = 0; c < C; c++) sum[m][c] = load(out + m * S::kValueDim + (first + c) * 16);
  for (int64_t i = 0; i < count; i++)
    for (int c = 0; c < C; c++) {
      const Floats value = load_bytes(means[i] + (first + c) * 16);
      for (int m = 0; m < M; m++) sum[m][c] += weights[m * kRunsAtOnce + i] * value;
    }
  for (int m = 0; m < M; m++)
    for (int c = 0; c < C; c++) store(out + m * S::kValueDim + (first + c) * 16, sum[m][c]);
}

// The state gains at most kRunsAtOnce runs by their sums [queries][stride]; the means of those that weigh nothing, or less than `least`
// [queries] for every query, are not read.
template <class S>
void add_runs(const float *sums, int64_t stride, const float *least, const KvcRun *runs, int64_t count, const KvcState *state) {
  constexpr int kVectors = S::kValueDim / 16, kTail = S::kValueDim % 16;
  constexpr int kColumns = kRegisters >= 32 ? 4 : 2, kColumnsUsed = kVectors < kColumns ? (kVectors ? kVectors : 1) : kColumns;
  constexpr int kMeanRows = kRegisters >= 32 ? 24 / kColumnsUsed : 2;
  alignas(64) float weights[S::kQueries * kRunsAtOnce];
  const int8_t *means[kRunsAtOnce];
  int64_t used = 0;
  for (int64_t r = 0; r < count; r++) {
    bool wanted = false;
    for (int row = 0; row < S::kQueries; row++) {
      const float sum = sums[row * stride + r];
      state->sum[row] += sum;
      wanted |= sum > 0 && sum >= least[row];
    }
    if (!wanted) continue;
    for (int64_t i = 0; i < S::kValueDim; i += 64) __builtin_prefetch(runs[r].mean + i, 0, 2);
    for (int row = 0; row < S::kQueries; row++) weights[row * kRunsAtOnce + used] = sums[row * stride + r] * runs[r].mean_scale;
    means[used++] = runs[r].mean;
  }
  each_columns<kVectors, kColumns>([&](auto columns, int first) {
    each_rows<(kMeanRows < S::kQueries ? kMeanRows : S::kQueries)>(0, S::kQueries, [&](auto m, int row) {
      add_means<S, m, columns>(weights + row * kRunsAtOnce, means, used, first, state->out + row * S::kValueDim);
    });
  });
  if constexpr (kTail > 0)
    for (int64_t i = 0; i < used; i++)
      for (int row = 0; row < S::kQueries; row++)
        for (int e = S::kValueDim - kTail; e < S::kValueDim; e++)
          state->out[row * S::kValueDim + e] += weights[row * kRunsAtOnce + i] * means[i][e];
}

}  // namespace
