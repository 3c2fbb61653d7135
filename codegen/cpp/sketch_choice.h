// Which keys a query attends to: the largest scores, found by counting; and the scan that keeps only what may be chosen.
#pragma once

#include <cmath>
#include <vector>

#include "sketch_scan.h"

namespace {

// ---- which runs are worth a look ----

// Sets the bits of the `wanted` largest numbers, a word for each vector, and clears the others'; of equal numbers the earlier are chosen.
inline void mark_largest(const int32_t *numbers, int64_t vectors, int64_t wanted, uint32_t *marked) {
  if (wanted == 0) return (void)std::fill(marked, marked + vectors, 0u);
  const int32_t last = kth_largest(numbers, vectors, 16, wanted, kNothing + 1, INT32_MAX);
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

// Whole numbers in the order of floats that are not NaN.
KVC_INLINE Ints ordered(Floats x) {
  const Ints bits = (Ints)x, below = bits < 0;
  return (bits & ~below) | ((~bits | INT32_MIN) & below);
}

// The largest of some logits, and the sums of exp(logit - largest) of each vector; marked: a word for each vector says which count.
inline float sum_marked(const float *logits, const uint32_t *marked, bool others, int64_t vectors, float *sums) {
  Floats most = splat(-kInfinity);
  const auto lanes = [&](int64_t v) {
    return select(set_lanes((others ? ~marked[v] : marked[v]) & 0xffff), load(logits + v * 16), splat(-kInfinity));
  };
  for (int64_t v = 0; v < vectors; v++) most = maximum(lanes(v), most);
  const float top = max_lanes(most);
  if (top == -kInfinity) return std::fill(sums, sums + vectors, 0.0f), top;
  for (int64_t v = 0; v < vectors; v++) sums[v] = sum_lanes(exp_negative(lanes(v) - top));
  return top;
}

// Which runs the queries of one KV head look at: those with the largest softmax weight for one of them.
template <class S>
void rank_runs(const KvcLookupQuery *query, const KvcSketch *sketch, const uint8_t *codes, const float *bias, int64_t runs, int64_t near,
               int64_t low, const KvcRanked *to) {
  const int64_t vectors = (runs + 15) / 16, units = sketch->centres.units;
  float log_sum[S::kQueries];
  for (int64_t v = 0; v < vectors; v++) {
    alignas(64) float more[16];
    for (int i = 0; i < 16; i++) more[i] = v * 16 + i < runs ? bias[v * 16 + i] + kLogRun : -kInfinity;
    each_rows<(S::kQueries < 4 ? S::kQueries : 4)>(0, S::kQueries, [&](auto m, int row) {
      Ints sum[1][m];
      score_blocks<m, 1>(query->centres.whole + row * units * kUnitCoordinates, query->centres.start + row, (int)units,
                         (int)sketch->centres.fine, codes + v * units * kUnitBytes, sum);
      for (int i = 0; i < m; i++)
        store(to->logits + ((row + i) * vectors + v) * 16,
              logits_of<S>(sum[0][i], query->centres.scale[row + i], query->centres.base[row + i]) + load(more));
    });
  }
  std::fill(to->near, to->near + vectors, 0xffffu);
  for (int row = 0; row < S::kQueries; row++) {
    const float top = sum_marked(to->logits + row * vectors * 16, to->near, false, vectors, to->far_sums);
    float sum = 0;
    for (int64_t v = 0; v < vectors; v++) sum += to->far_sums[v];
    log_sum[row] = top + std::log(sum);
  }
  for (int64_t v = 0; v < vectors; v++) {
    Floats most = splat(-kInfinity);
    for (int row = 0; row < S::kQueries; row++) most = maximum(load(to->logits + (row * vectors + v) * 16) - log_sum[row], most);
    store_ints(to->ranks + v * 16, ordered(most));
  }
  mark_largest(to->ranks, vectors, near, to->near);
  mark_largest(to->ranks, vectors, near - low, to->low);
  for (int64_t v = 0; v < vectors; v++) to->low[v] = to->near[v] & ~to->low[v];
  for (int row = 0; row < S::kQueries; row++) {
    const float *const logits = to->logits + row * vectors * 16;
    float *const sums = to->far_sums + row * vectors, sum = 0;
    const float top = sum_marked(logits, to->low, false, vectors, sums);
    for (int64_t v = 0; v < vectors; v++) sum += sums[v];
    to->low_log_sum[row] = top + std::log(sum);
    to->far_top[row] = sum_marked(logits, to->near, true, vectors, sums);
  }
}

// ---- the choice of keys ----

inline int32_t position_of(const KvcRun *runs, int32_t index) { return runs[index / kRunTokens].position[index % kRunTokens]; }

// Sets the bits of the k largest numbers and clears the others'; of equal numbers the earlier positions are chosen.  numbers: an even
// count of vectors, `stride` numbers apart; tops: the largest ones of some, in as many vectors.  Returns the smallest chosen number.
inline int32_t choose_largest(const int32_t *numbers, int64_t vectors, const int32_t *tops, int64_t top_vectors, int64_t stride, int64_t k,
                              const KvcRun *runs, uint32_t *chosen) {
  static thread_local std::vector<int32_t> candidates, indices;
  // The kth largest of the tops is no larger than the kth largest of all.
  const bool few = 4 * k <= 3 * top_vectors * 16;
  const int32_t *const looked = few ? tops : numbers;
  const int64_t looked_vectors = few ? top_vectors : vectors;
  Ints most = kNothing + Ints{}, least = most;
  for (int64_t v = 0; v < looked_vectors; v++) {
    const Ints lanes = load_as<Ints>(looked + v * stride);
    most = larger(most, lanes), least = larger(least, ~lanes);
  }
  const int32_t largest = max_of(most), from = kth_largest(looked, looked_vectors, stride, k, ~max_of(least), largest);
  int64_t count = 0;
  for (int64_t v = 0; v < vectors; v += 2) {
    const uint32_t low = lanes_from(load_as<Ints>(numbers + v * stride), from);
    const uint32_t high = lanes_from(load_as<Ints>(numbers + (v + 1) * stride), from);
    chosen[v / 2] = low | high << 16;
    count += __builtin_popcount(low) + __builtin_popcount(high);
  }
  candidates.resize(count + 16), indices.resize(count);
  count = 0;
  for (int64_t w = 0; w < vectors / 2; w++)
    for (uint32_t left = chosen[w]; left; left &= left - 1) {
      const int bit = __builtin_ctz(left);
      candidates[count] = numbers[(2 * w + bit / 16) * stride + bit % 16], indices[count++] = (int32_t)(w * 32 + bit);
    }
  std::fill(candidates.begin() + count, candidates.end(), kNothing);
  const int32_t last = few ? kth_largest(candidates.data(), (count + 15) / 16, 16, k, from, largest) : from;
  int64_t wanted = k, ties = 0;  // of equal numbers
  for (int64_t i = 0; i < count; i++) {
    if (candidates[i] > last)
      wanted--;
    else if (candidates[i] == last)
      indices[ties++] = indices[i];
    else
      chosen[indices[i] / 32] &= ~(1u << indices[i] % 32);
  }
  if (wanted == ties) return last;
  std::nth_element(indices.begin(), indices.begin() + wanted, indices.begin() + ties,
                   [&](int32_t one, int32_t other) { return position_of(runs, one) < position_of(runs, other); });
  for (int64_t i = wanted; i < ties; i++) chosen[indices[i] / 32] &= ~(1u << indices[i] % 32);
  return last;
}

// The number of that rank, and the largest one; vectors lie `stride` numbers apart.
inline int32_t find_threshold(const int32_t *scores, int64_t vectors, int64_t stride, int64_t rank, int32_t *largest) {
  Ints most = kNothing + Ints{}, least = most;
  for (int64_t v = 0; v < vectors; v++) {
    const Ints lanes = load_as<Ints>(scores + v * stride);
    most = larger(most, lanes), least = larger(least, ~lanes);
  }
  *largest = max_of(most);
  return kth_largest(scores, vectors, stride, rank, ~max_of(least), *largest);
}

// Of candidates, an even count of vectors that ends with kNothing: sets the bits of the k largest scores and clears the others'; of equal
// ones those at earlier positions.  indices: of candidates in the sketch.  Returns the largest score; kNothing where fewer than k scores
// reach the threshold.
inline int32_t pick_largest(const int32_t *scores, const int32_t *indices, int64_t vectors, int64_t k, int32_t threshold,
                            const KvcRun *runs, uint32_t *chosen) {
  Ints most = kNothing + Ints{};
  int64_t count = 0;
  for (int64_t v = 0; v < vectors; v++) {
    const Ints lanes = load_as<Ints>(scores + v * 16);
    most = larger(most, lanes);
    count += __builtin_popcount(lanes_from(lanes, threshold));
  }
  if (count < k) return kNothing;
  const int32_t largest = max_of(most), last = kth_largest(scores, vectors, 16, k, threshold, largest);
  count = 0;
  for (int64_t v = 0; v < vectors; v += 2) {
    chosen[v / 2] = lanes_from(load_as<Ints>(scores + v * 16), last) | lanes_from(load_as<Ints>(scores + v * 16 + 16), last) << 16;
    count += __builtin_popcount(chosen[v / 2]);
  }
  if (count == k) return largest;
  static thread_local std::vector<int32_t> ties;
  ties.clear();
  for (int64_t i = 0; i < vectors * 16; i++)
    if (scores[i] == last) ties.push_back((int32_t)i);
  const auto keep = ties.end() - (count - k);
  std::nth_element(ties.begin(), keep, ties.end(),
                   [&](int32_t one, int32_t other) { return position_of(runs, indices[one]) < position_of(runs, indices[other]); });
  for (auto tie = keep; tie < ties.end(); tie++) chosen[*tie / 32] &= ~(1u << *tie % 32);
  return largest;
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
// first, tops: as of `scan_sketch`, for one query.
template <class S>
void share_weights(const KvcLookupQuery *query, const float *log_sum, int32_t by_sum, const int32_t *scores, int64_t first, int64_t blocks,
                   int32_t *ranks, int32_t *tops) {
  for (int64_t b = 0; b < blocks; b++) {
    Floats shared = {};
    for (int row = 0; row < S::kQueries; row++) {
      const Floats logit =
          logits_of<S>(load_as<Ints>(scores + (b * S::kQueries + row) * 16), query->keys.scale[row], query->keys.base[row]);
      const Floats below = logit - log_sum[row], weight = exp_negative(select(below > 0.0f, Floats{}, below));
      shared = by_sum ? shared + weight : maximum(shared, weight);
    }
    store_ints(ranks + b * 16, (Ints)shared);
    int32_t *top = tops + (first + b) % kTops * 16;
    store_ints(top, larger(load_as<Ints>(top), (Ints)shared));
  }
}

// ---- the scan that keeps candidates and sums ----

// Adds the candidates among some runs to the lists; index `first` is the first key's.  Keys that no query can want weigh nothing in the
// sums where all of a run lie so far below the shift that a million of them are lost in rounding.
template <class S>
void sift_runs(const KvcLookupQuery *query, const KvcSketch *sketch, const KvcRun *runs, int64_t first, int64_t count, KvcSifted *to) {
  constexpr int kAtOnce = kRegisters >= 32 ? 2 : 1;
  constexpr int kScanned = kRegisters >= 32 ? 8 : 2;
  constexpr float kFarBelow = 32;
  alignas(64) int32_t scores[2 * S::kQueries * 16];
  alignas(64) Floats weights[S::kQueries][4];
  int32_t floor[S::kQueries];
  for (int row = 0; row < S::kQueries; row++)
    floor[row] = S::kCapped ? kNothing + 1 : to->shift[row] - (int32_t)std::min(kFarBelow / query->keys.scale[row], 1e9f);
  const int units = (int)sketch->keys.units, fine = (int)sketch->keys.fine;
  const Ints lane = load_as<Ints>(kLaneNumbers);
  for (int64_t run = 0; run < count; run++) {
    prefetch_run(runs[std::min(run + kRunsAhead, count - 1)].codes, units);
    for (int block = 0; block < 2; block += kAtOnce)
      each_rows<(kScanned < S::kQueries ? kScanned : S::kQueries)>(0, S::kQueries, [&](auto m, int row) {
        Ints sum[kAtOnce][m];
        score_blocks<m, kAtOnce>(query->keys.whole + row * units * kUnitCoordinates, query->keys.start + row, units, fine,
                                 runs[run].codes + block * units * kUnitBytes, sum);
        for (int b = 0; b < kAtOnce; b++)
          for (int i = 0; i < m; i++) store_ints(scores + ((block + b) * S::kQueries + row + i) * 16, sum[b][i]);
      });
    uint32_t kept[2] = {};
    for (int block = 0; block < 2; block++)
      for (int row = 0; row < S::kQueries; row++)
        kept[block] |= lanes_from(load_as<Ints>(scores + (block * S::kQueries + row) * 16), to->threshold[row]);
    for (int block = 0; block < 2; block++) {
      if (!kept[block]) continue;
      store_lanes(to->rows + to->count, lane + (int32_t)(first + run * kRunTokens + block * 16), kept[block]);
      for (int row = 0; row < S::kQueries; row++)
        store_lanes(to->scores + row * to->room + to->count, load_as<Ints>(scores + (block * S::kQueries + row) * 16), kept[block]);
      to->count += __builtin_popcount(kept[block]);
    }
    if (!to->sums) continue;
    for (int row = 0; row < S::kQueries; row++) {
      const Ints one = load_as<Ints>(scores + row * 16), other = load_as<Ints>(scores + (S::kQueries + row) * 16);
      weights[row][run % 4] = Floats{};
      if (!lanes_from(larger(one, other), floor[row])) continue;
      const float scale = query->keys.scale[row], base = query->keys.base[row];
      const Floats low = weights_around<S>(one, to->shift[row], scale, base), high = weights_around<S>(other, to->shift[row], scale, base);
      weights[row][run % 4] = (Floats)((Ints)low & ~set_lanes(kept[0])) + (Floats)((Ints)high & ~set_lanes(kept[1]));
    }
    if (run % 4 == 3)
      for (int row = 0; row < S::kQueries; row++) sum_four(weights[row], to->sums + row * to->sum_stride + run - 3);
    else if (run == count - 1)
      for (int row = 0; row < S::kQueries; row++)
        for (int64_t i = 0; i <= run % 4; i++) to->sums[row * to->sum_stride + run - run % 4 + i] = sum_lanes(weights[row][i]);
  }
}

// Of candidates: the weights of those that are not chosen join the sums of their runs.  Returns what all runs weigh, the chosen ones, and
// everything in low runs.
template <class S>
KvcWeights put_back(const KvcLookupQuery *query, int32_t row, int32_t shift, const int32_t *scores, const int32_t *indices, int64_t count,
                    const uint32_t *chosen, const KvcRun *runs, int64_t run_count, float *sums) {
  KvcWeights all = {};
  for (int64_t i = 0; i < count; i += 16) {
    alignas(64) float weight[16];
    store(weight, weights_around<S>(load_as<Ints>(scores + i), shift, query->keys.scale[row], query->keys.base[row]));
    for (int64_t at = 0; at < std::min<int64_t>(16, count - i); at++) {
      const int32_t run = indices[i + at] / kRunTokens;
      if (chosen[i / 32] >> (i % 32 + at) & 1) {
        all.read += weight[at];
        if (runs[run].low) all.low += weight[at];
      } else {
        sums[run] += weight[at];
      }
    }
  }
  for (int64_t run = 0; run < run_count; run++) {
    all.rest += sums[run];
    if (runs[run].low) all.low += sums[run];
  }
  return all;
}

}  // namespace
