// What a sketch says of keys and of whole runs of them: a query's coordinates, scores, and which runs are worth a look.
//
// runtime/indexes/sketch_codes.py says how coordinates lie in memory.  A query's coordinates are whole numbers from -127 to 127, so a score
// is one too: the same on every instruction set, and the largest k are found by counting.  logit = scale * score + base, before a soft cap.
#pragma once

#include <vector>

#include "whole.h"

namespace {

constexpr int kUnitBytes = 64;                // of 16 keys
constexpr int kUnitCoordinates = 16;          // places for them in a query; a unit of 4 bits uses the first 8
constexpr int kFineCoordinates = 8;           // of a unit at 4 bits
constexpr int kFineTop = 15, kCoarseTop = 3;  // the largest code
constexpr float kLogRun = 3.46573590f;        // log(kRunTokens)

constexpr int64_t kRunsAhead = 4;  // runs whose codes are asked for before they are read

KVC_INLINE void prefetch_run(const uint8_t *codes, int units) {
  for (int i = 0; i < 2 * units; i++) __builtin_prefetch(codes + i * kUnitBytes, 0, 3);
}

// The scores of 16 keys in each of B blocks, for M queries.
template <int M, int B>
KVC_INLINE void score_blocks(const int8_t *query, const int32_t *start, int units, int fine, const uint8_t *codes, Ints (&sum)[B][M]) {
  const int query_bytes = units * kUnitCoordinates;
  for (int b = 0; b < B; b++)
    for (int m = 0; m < M; m++) sum[b][m] = start[m] + Ints{};
  const auto add = [&](int unit, int group, const Bits(&level)[B]) {
    for (int m = 0; m < M; m++) {
      int32_t coordinates;
      std::memcpy(&coordinates, query + m * query_bytes + unit * kUnitCoordinates + group * 4, 4);
      for (int b = 0; b < B; b++) sum[b][m] = add_products(sum[b][m], level[b], coordinates);
    }
  };
  Bits code[B], level[B];
  int unit = 0;
  for (; unit < fine; unit++) {
    for (int b = 0; b < B; b++) code[b] = load_bits(codes + (b * units + unit) * kUnitBytes);
    for (int b = 0; b < B; b++) level[b] = code[b] & 0x0f0f0f0fu;
    add(unit, 0, level);
    for (int b = 0; b < B; b++) level[b] = code[b] >> 4u & 0x0f0f0f0fu;
    add(unit, 1, level);
  }
  for (; unit < units; unit++) {
    for (int b = 0; b < B; b++) code[b] = load_bits(codes + (b * units + unit) * kUnitBytes);
#pragma GCC unroll 4
    for (int group = 0; group < 4; group++) {
      for (int b = 0; b < B; b++) level[b] = code[b] >> (2u * group) & 0x03030303u;
      add(unit, group, level);
    }
  }
}

// What a scan wants of one query with these coordinates; base: its logit with the keys' centre.
inline void code_query(const float *coordinates, int64_t count, const KvcCodes &codes, float base, int64_t row, const KvcCodedQuery &to) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  float slots[kMaxUnits * kUnitCoordinates], largest = 0;
  int8_t *const whole = to.whole + row * codes.units * kUnitCoordinates;
  for (int64_t unit = 0, at = 0; unit < codes.units; unit++) {
    const int64_t take = std::min<int64_t>(unit < codes.fine ? kFineCoordinates : kUnitCoordinates, count - at);
    for (int64_t i = 0; i < kUnitCoordinates; i++) {
      const int64_t slot = unit * kUnitCoordinates + i;
      slots[slot] = i < take ? coordinates[at + i] * codes.step[slot] : 0;
      largest = std::max(largest, std::abs(slots[slot]));
    }
    at += take;
  }
  const float scale = std::max(largest / 127, 1.17549435e-38f);
  int32_t twice_middle = 0;
  for (int64_t i = 0; i < codes.units * kUnitCoordinates; i++) {
    const float rounded = slots[i] / scale + kMagic - kMagic;
    whole[i] = rounded > -127 ? (int8_t)std::min(rounded, 127.0f) : (int8_t)-127;  // NaN too becomes a number
    const bool fine = i / kUnitCoordinates < codes.fine;
    if (!fine || i % kUnitCoordinates < kFineCoordinates) twice_middle += whole[i] * (fine ? kFineTop : kCoarseTop);
  }
  to.start[row] = -(twice_middle >> 1);
  to.scale[row] = scale;
  to.base[row] = base - (twice_middle & 1 ? 0.5f * scale : 0);
}

// The queries of one KV head as the kernel's functions want them: [queries][head_dim] numbers, one head after another.
template <class S>
void prepare_query(const void *data, int64_t head_stride, const KvcSketch *sketch, const KvcLookupQuery *query) {
  constexpr bool kPairs = std::is_same_v<typename S::Stored, Bfloat16>;
  constexpr int kChannelPairs = (S::kHeadDim + 1) / 2;
  for (int row = 0; row < S::kQueries; row++) {
    const typename S::Query *from = (const typename S::Query *)data + row * head_stride;
    float *to = query->query + row * S::kHeadDim, plain[2 * kChannelPairs] = {};
    for (int d = 0; d < S::kHeadDim; d++) plain[d] = widen(from[d]) * S::kScale;
    for (int d = 0; d < S::kHeadDim; d++) to[kPairs && d < S::kHeadDim / 32 * 32 ? d / 32 * 32 + d % 2 * 16 + d % 32 / 2 : d] = plain[d];
    if (!sketch) continue;
    float coordinates[kMaxUnits * kUnitCoordinates], base = 0;
    for (int d = 0; d < S::kHeadDim; d++) base += plain[d] * sketch->centre[d];
    for (int64_t c = 0; c < sketch->coordinates; c += 16) {
      Floats sum[4] = {};  // four chains of additions at once
      for (int pair = 0; pair < kChannelPairs; pair += 2)
        for (int i = 0; i < 2 && pair + i < kChannelPairs; i++) {
          const Bits lanes = load_bits((const Bfloat16 *)sketch->map + ((pair + i) * sketch->coordinates + c) * 2);
          sum[2 * i] += plain[2 * (pair + i)] * even(lanes);
          sum[2 * i + 1] += plain[2 * (pair + i) + 1] * odd(lanes);
        }
      store(coordinates + c, (sum[0] + sum[1]) + (sum[2] + sum[3]));
    }
    code_query(coordinates, sketch->coordinates, sketch->keys, base, row, query->keys);
    code_query(coordinates, sketch->coordinates, sketch->centres, base, row, query->centres);
  }
}

// ---- logits from scores ----

template <class S>
KVC_INLINE Floats logits_of(Ints score, float scale, float base) {
  const Floats logit = to_floats(score) * scale + base;
  if constexpr (S::kCapped) return S::kSoftCap * tanh_of(logit / S::kSoftCap);
  return logit;
}

template <class S>
float logit_of(int32_t score, float scale, float base) {
  float lane[16];
  store(lane, logits_of<S>(score + Ints{}, scale, base));
  return lane[0];
}

// 2^x for x <= 0 to 2 units in the last place.
KVC_INLINE Floats exp2_of(Floats x) {
#if defined(__AVX512F__)  // two instructions in place of ten: most of the time of an estimate goes into this
  const Floats n = (Floats)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), f = x - n;
  Floats p = f * 1.535336188e-4f + 1.339887440e-3f;
  p = p * f + 9.618437357e-3f;
  p = p * f + 5.550332471e-2f;
  p = p * f + 2.402264791e-1f;
  p = p * f + 6.931472028e-1f;
  p = p * f + 1.0f;
  return (Floats)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  return exp_negative(x * 0.693147181f);
#endif
}

// exp(logit - logit of `top`), for scores up to `top`.
template <class S>
KVC_INLINE Floats weights_below(Ints score, int32_t top, float scale, float base) {
  if constexpr (S::kCapped) {
    const Floats below = logits_of<S>(score, scale, base) - logits_of<S>(top + Ints{}, scale, base);
    return exp_negative(select(below > 0.0f, Floats{}, below));  // rounded tanh need not rise everywhere
  }
  return exp2_of(to_floats(score - top) * (scale * 1.44269504f));
}

// ---- the scan ----

// Scores [2 * runs][queries][16] of the keys of some runs; tops [kTops][queries][16] become the largest scores of blocks number t, t + kTops,
// and so on.
template <class S>
void scan_runs(const KvcLookupQuery *query, const KvcSketch *sketch, const KvcRun *runs, int64_t count, int32_t *scores, int32_t *tops) {
  constexpr int kAtOnce = kRegisters >= 32 ? 2 : 1;
  constexpr int kScanned = kRegisters >= 32 ? 8 : 2;  // queries at once
  const int units = (int)sketch->keys.units, fine = (int)sketch->keys.fine;
  for (int64_t run = 0; run < count; run++) {
    prefetch_run(runs[std::min(run + kRunsAhead, count - 1)].codes, units);
    for (int block = 0; block < 2; block += kAtOnce)
      each_rows<(kScanned < S::kQueries ? kScanned : S::kQueries)>(0, S::kQueries, [&](auto m, int row) {
        Ints sum[kAtOnce][m];
        score_blocks<m, kAtOnce>(query->keys.whole + row * units * kUnitCoordinates, query->keys.start + row, units, fine,
                                 runs[run].codes + block * units * kUnitBytes, sum);
        for (int b = 0; b < kAtOnce; b++)
          for (int i = 0; i < m; i++) {
            store_ints(scores + ((2 * run + block + b) * S::kQueries + row + i) * 16, sum[b][i]);
            int32_t *top = tops + ((2 * run + block + b) % kTops * S::kQueries + row + i) * 16;
            store_ints(top, larger(load_as<Ints>(top), sum[b][i]));
          }
      });
  }
}

}  // namespace
