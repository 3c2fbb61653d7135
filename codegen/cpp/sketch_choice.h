// Which runs a query looks at, and which keys it attends to: the largest numbers, found by counting.
#pragma once

#include <cmath>
#include <vector>

#include "sketch_scan.h"

namespace {

// ---- which runs are worth a look ----

// Sets the bits of the `wanted` largest numbers, a word for each vector, and clears the others'; of equal numbers the earlier are chosen.
inline void mark_largest(const int32_t *numbers, int64_t vectors, int64_t wanted, uint32_t *marked) {
  if (wanted == 0) return (void)std::fill(marked, marked + vectors, 0u);
  const int32_t last = kth_largest(numbers, vectors, 16, wanted, kNothing, INT32_MAX);
  for (int64_t v = 0; v < vectors; v++) wanted -= __builtin_popcount(marked[v] = lanes_from(load_as<Ints>(numbers + v * 16), last));
  for (int64_t v = vectors; wanted < 0; v--) {  // there are more of the last one
    const Ints lanes = load_as<Ints>(numbers + (v - 1) * 16);
    uint32_t equal = lanes_from(lanes, last) & (last == INT32_MAX ? ~0u : ~lanes_from(lanes, last + 1));
    for (; equal && wanted < 0; wanted++) {
      const uint32_t bit = 1u << (31 - __builtin_clz(equal));
      marked[v - 1] &= ~bit, equal &= ~bit;
    }
  }
}

// Which runs the queries of one KV head look at: those with the largest softmax weight for one of them.
template <class S>
void rank_runs(const KvcLookupQuery *query, const KvcSketch *sketch, const uint8_t *codes, const float *bias, int64_t runs, int64_t near,
               int64_t low, const KvcRanked *to) {
  const int64_t vectors = (runs + 15) / 16, units = sketch->centres.units;
  Floats most[S::kQueries];
  for (int row = 0; row < S::kQueries; row++) most[row] = splat(-kInfinity);
  for (int64_t v = 0; v < vectors; v++) {
    alignas(64) float more[16];
    for (int i = 0; i < 16; i++) more[i] = v * 16 + i < runs ? bias[v * 16 + i] + kLogRun : -kInfinity;
    each_rows<(S::kQueries < 4 ? S::kQueries : 4)>(0, S::kQueries, [&](auto m, int row) {
      Ints sum[1][m];
      score_blocks<m, 1>(query->centres.whole + row * units * kUnitCoordinates, query->centres.start + row, (int)units,
                         (int)sketch->centres.fine, codes + v * units * kUnitBytes, sum);
      for (int i = 0; i < m; i++) {
        const Floats logit = logits_of<S>(sum[0][i], query->centres.scale[row + i], query->centres.base[row + i]) + load(more);
        store(to->weights + ((row + i) * vectors + v) * 16, logit);
        most[row + i] = maximum(logit, most[row + i]);
      }
    });
  }
  std::fill(to->ranks, to->ranks + vectors * 16, 0);
  for (int row = 0; row < S::kQueries; row++) {
    float *const weights = to->weights + row * vectors * 16;
    Floats sum = {};
    to->top[row] = max_lanes(most[row]);
    for (int64_t v = 0; v < vectors; v++) {
      const Floats weight = exp_negative(load(weights + v * 16) - to->top[row]);
      store(weights + v * 16, weight);
      sum += weight;
    }
    const float share = 1 / sum_lanes(sum);
    for (int64_t v = 0; v < vectors; v++)  // floats that are not negative have the order of their bits
      store_ints(to->ranks + v * 16, larger(load_as<Ints>(to->ranks + v * 16), (Ints)(load(weights + v * 16) * share)));
  }
  if (runs % 16) {  // what is no run ranks below all
    const Ints real = set_lanes((1u << runs % 16) - 1);
    int32_t *const last = to->ranks + (vectors - 1) * 16;
    store_ints(last, (load_as<Ints>(last) & real) | (kNothing & ~real));
  }
  mark_largest(to->ranks, vectors, near, to->near);
  mark_largest(to->ranks, vectors, near - low, to->low);
  for (int64_t v = 0; v < vectors; v++) to->low[v] = to->near[v] & ~to->low[v];
  for (int row = 0; row < S::kQueries; row++) {
    const float *const weights = to->weights + row * vectors * 16;
    Floats low_sum = {}, four[4];
    float *const sums = to->far_sums + row * vectors;
    for (int64_t v = 0; v < vectors; v++) {
      const Ints weight = load_as<Ints>(weights + v * 16);
      low_sum += (Floats)(weight & set_lanes(to->low[v]));
      four[v % 4] = (Floats)(weight & ~set_lanes(to->near[v]));
      if (v % 4 == 3)
        sum_four(four, sums + v - 3);
      else if (v == vectors - 1)
        for (int64_t i = 0; i <= v % 4; i++) sums[v - v % 4 + i] = sum_lanes(four[i]);
    }
    to->low_log_sum[row] = to->top[row] + std::log(sum_lanes(low_sum));
  }
}

// ---- the choice of keys ----

inline int32_t position_of(const KvcRun *runs, int32_t index) { return runs[index / kRunTokens].position[index % kRunTokens]; }

// Sets the bits of the k largest numbers and clears the others'; of equal numbers the earlier positions are chosen.  numbers: an even
// count of vectors, `stride` numbers apart; tops: the largest ones of some, in as many vectors.
inline void choose_largest(const int32_t *numbers, int64_t vectors, const int32_t *tops, int64_t top_vectors, int64_t stride, int64_t k,
                           const KvcRun *runs, uint32_t *chosen) {
  static thread_local std::vector<int32_t> large, ties;
  // The kth largest of the tops is no larger than the kth largest of all: what is below it need not be looked at again.
  const bool few = 4 * k <= 3 * top_vectors * 16;
  const int32_t *const looked = few ? tops : numbers;
  const int64_t looked_vectors = few ? top_vectors : vectors;
  Ints most = kNothing + Ints{}, least = most;
  for (int64_t v = 0; v < looked_vectors; v++) {
    const Ints lanes = load_as<Ints>(looked + v * stride);
    most = larger(most, lanes), least = larger(least, ~lanes);
  }
  const int32_t largest = max_of(most);
  int32_t last = kth_largest(looked, looked_vectors, stride, k, ~max_of(least), largest);
  if (few) {
    large.resize((vectors + 1) * 16);
    int64_t count = 0;
    for (int64_t v = 0; v < vectors; v++) {
      const Ints lanes = load_as<Ints>(numbers + v * stride);
      const uint32_t bits = lanes_from(lanes, last);
      if (bits) store_lanes(large.data() + count, lanes, bits);
      count += __builtin_popcount(bits);
    }
    std::fill_n(large.begin() + count, 16, kNothing);
    last = kth_largest(large.data(), (count + 15) / 16, 16, k, last, largest);
  }
  int64_t count = 0;
  for (int64_t v = 0; v < vectors; v += 2) {
    const uint32_t low = lanes_from(load_as<Ints>(numbers + v * stride), last);
    const uint32_t high = lanes_from(load_as<Ints>(numbers + (v + 1) * stride), last);
    chosen[v / 2] = low | high << 16;
    count += __builtin_popcount(chosen[v / 2]);
  }
  if (count == k) return;
  ties.clear();  // of the last one
  for (int64_t run = 0; run < vectors / 2; run++)
    for (uint32_t left = chosen[run]; left; left &= left - 1) {
      const int bit = __builtin_ctz(left);
      if (numbers[(2 * run + bit / 16) * stride + bit % 16] == last) ties.push_back((int32_t)(run * kRunTokens + bit));
    }
  const auto keep = ties.end() - (count - k);
  std::nth_element(ties.begin(), keep, ties.end(),
                   [&](int32_t one, int32_t other) { return position_of(runs, one) < position_of(runs, other); });
  for (auto tie = keep; tie < ties.end(); tie++) chosen[*tie / kRunTokens] &= ~(1u << *tie % kRunTokens);
}

// Of each query: the largest logit of some blocks, and the sum of exp(logit - largest).
template <class S>
void sum_weights(const KvcLookupQuery *query, const int32_t *scores, int64_t blocks, float *maximum, float *sum) {
  for (int row = 0; row < S::kQueries; row++) {
    Ints most = kNothing + Ints{};
    for (int64_t b = 0; b < blocks; b++) most = larger(most, load_as<Ints>(scores + (b * S::kQueries + row) * 16));
    const int32_t top = max_of(most);
    Floats total = {};
    for (int64_t b = 0; b < blocks; b++)
      total += weights_below<S>(load_as<Ints>(scores + (b * S::kQueries + row) * 16), top, query->keys.scale[row], query->keys.base[row]);
    maximum[row] = logit_of<S>(top, query->keys.scale[row], query->keys.base[row]), sum[row] = sum_lanes(total);
  }
}

// Ranks [blocks][16] of keys for all queries together: the bits of the sum, or of the largest, of their weights exp(logit - log_sum).
// tops: as of `scan_runs`, for one query.
template <class S>
void share_weights(const KvcLookupQuery *query, const float *log_sum, int32_t by_sum, const int32_t *scores, int64_t blocks, int32_t *ranks,
                   int32_t *tops) {
  for (int64_t b = 0; b < blocks; b++) {
    Floats shared = {};
    for (int row = 0; row < S::kQueries; row++) {
      const Floats logit =
          logits_of<S>(load_as<Ints>(scores + (b * S::kQueries + row) * 16), query->keys.scale[row], query->keys.base[row]);
      const Floats below = logit - log_sum[row], weight = exp_negative(select(below > 0.0f, Floats{}, below));
      shared = by_sum ? shared + weight : maximum(shared, weight);
    }
    store_ints(ranks + b * 16, (Ints)shared);
    int32_t *top = tops + b % kTops * 16;
    store_ints(top, larger(load_as<Ints>(top), (Ints)shared));
  }
}

}  // namespace
