// One query token over keys that a sketch finds: scan, choice, attention over rows, and an estimate of what is not read.
//
// The sketch of a key is some units of 4 bytes, stored 16 keys at a time; byte 4 * lane + j of a unit holds
//   4 bits a coordinate   coordinate j in its low half, 4 + j in its high half
//   2 bits                coordinates j, 4 + j, 8 + j, 12 + j from the lowest bits up
// A query's coordinates are whole numbers from -127 to 127, so a score is one too: the same on every instruction set, and the largest k
// are found by counting.  logit = scale * score + base, before a soft cap.
#pragma once

#include <algorithm>
#include <vector>

#include "rows.h"
#if defined(__AVX2__)
#if !defined(__clang__)  // GCC 12 finds fault with its own header
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#if !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif

namespace {

constexpr int kUnitBytes = 64;                // of 16 keys
constexpr int kUnitCoordinates = 16;          // places for them in a query; a unit of 4 bits uses the first 8
constexpr int kFineCoordinates = 8;           // of a unit at 4 bits
constexpr int kFineTop = 15, kCoarseTop = 3;  // the largest code
constexpr int kRowsAhead = 16;                // rows that are asked for before they are read
constexpr int32_t kNothing = INT32_MIN;       // below every score
alignas(64) constexpr int32_t kLaneNumbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// ---- vectors of whole numbers ----

// sum + the products of a lane's 4 codes with 4 coordinates of a query.  Codes are at most 15: two products fit in 16 bits.
KVC_INLINE Ints add_products(Ints sum, Bits codes, int32_t query) {
#if defined(__AVX512VNNI__)
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, _mm512_set1_epi32(query));
#elif defined(__AVX512BW__)
  const __m512i pairs = _mm512_maddubs_epi16((__m512i)codes, _mm512_set1_epi32(query));
  return sum + (Ints)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif defined(__AVX2__)
  const __m256i coordinates = _mm256_set1_epi32(query), ones = _mm256_set1_epi16(1);
#define KVC_ADD_PRODUCTS(i) sum.part##i += (Ints::Part)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)codes.part##i, coordinates), ones);
  KVC_EACH_PART(KVC_ADD_PRODUCTS)
#undef KVC_ADD_PRODUCTS
  return sum;
#else
  for (int j = 0; j < 4; j++) sum += (Ints)(codes >> (8u * j) & 0xffu) * (int32_t)(int8_t)(query >> 8 * j);
  return sum;
#endif
}

KVC_INLINE Floats to_floats(Ints v) {
#if defined(__AVX512F__)
  return __builtin_convertvector(v, Floats);
#else
  Floats f;
#define KVC_CONVERT(i) f.part##i = __builtin_convertvector(v.part##i, Floats::Part);
  KVC_EACH_PART(KVC_CONVERT)
#undef KVC_CONVERT
  return f;
#endif
}

KVC_INLINE Floats load_bytes(const int8_t *from) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
#elif defined(__AVX2__)
  Floats f;
#define KVC_LOAD_BYTES(i) \
  f.part##i = (Floats::Part)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(from + 8 * i))));
  KVC_EACH_PART(KVC_LOAD_BYTES)
#undef KVC_LOAD_BYTES
  return f;
#else
  float lane[16];
  for (int i = 0; i < 16; i++) lane[i] = from[i];
  return load(lane);
#endif
}

KVC_INLINE void store_ints(int32_t *to, Ints v) {
  const Floats bits = (Floats)v;
  store((float *)to, bits);
}

KVC_INLINE Ints larger(Ints a, Ints b) {
#if defined(__AVX512F__)
  return (Ints)_mm512_max_epi32((__m512i)a, (__m512i)b);
#else
  const Ints above = a > b;
  return (a & above) | (b & ~above);
#endif
}

KVC_INLINE int32_t max_of(Ints v) {
  int32_t lane[16];
  store_ints(lane, v);
  return *std::max_element(lane, lane + 16);
}

// Bit i says whether lane i is at least x, which is not kNothing.
KVC_INLINE uint32_t lanes_from(Ints v, int32_t x) {
#if defined(__AVX512F__)
  return _mm512_cmpge_epi32_mask((__m512i)v, _mm512_set1_epi32(x));
#elif defined(__AVX2__)
  const Ints from = v > x - 1;
  uint32_t bits = 0;
#define KVC_LANE_BITS(i) bits |= (uint32_t)_mm256_movemask_ps((__m256)from.part##i) << (8 * i);
  KVC_EACH_PART(KVC_LANE_BITS)
#undef KVC_LANE_BITS
  return bits;
#else
  int32_t lane[16];
  store_ints(lane, v);
  uint32_t bits = 0;
  for (int i = 0; i < 16; i++) bits |= (uint32_t)(lane[i] >= x) << i;
  return bits;
#endif
}

// -1 in the lanes whose bit is set, 0 in the others.
KVC_INLINE Ints set_lanes(uint32_t bits) {
#if defined(__AVX512DQ__)
  return (Ints)_mm512_movm_epi32((__mmask16)bits);
#else
  alignas(64) static constexpr uint32_t kLane[16] = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
  return (Ints)(load_bits(kLane) & bits) > 0;
#endif
}

// Writes the lanes whose bit is set one after another; what follows them, up to 16 numbers in all, is anything.
KVC_INLINE void store_lanes(int32_t *to, Ints v, uint32_t bits) {
#if defined(__AVX512F__)
  store_ints(to, (Ints)_mm512_maskz_compress_epi32((__mmask16)bits, (__m512i)v));
#else
  int32_t lane[16];
  store_ints(lane, v);
  for (; bits; bits &= bits - 1) *to++ = lane[__builtin_ctz(bits)];
#endif
}

// sums[i] = sum_lanes(v[i]), the same bits.
KVC_INLINE void sum_four(const Floats (&v)[4], float *sums) {
#if defined(__AVX512F__)
  const __m512 a = (__m512)v[0], b = (__m512)v[1], c = (__m512)v[2], d = (__m512)v[3];
  const __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));  // 8 numbers of a, 8 of b
  const __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
  __m512 all = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));  // 4 of each
  all = _mm512_add_ps(all, _mm512_permute_ps(all, 0x4e));
  all = _mm512_add_ps(all, _mm512_permute_ps(all, 0xb1));
  const __m128 last = _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, all));
  std::memcpy(sums, &last, sizeof last);
#else
  for (int i = 0; i < 4; i++) sums[i] = sum_lanes(v[i]);
#endif
}

// ---- the scan ----

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

// Scores [blocks][queries][16] of `blocks` blocks of codes, the first of which is block `first` of its chunk; tops [kTops][queries][16]
// become the largest scores of the chunk's blocks number t, t + kTops, and so on.
template <class S>
void scan_sketch(const KvcLookupQuery *query, const KvcSketch *sketch, const uint8_t *codes, int64_t first, int64_t blocks, int32_t *scores,
                 int32_t *tops) {
  constexpr int kAtOnce = kRegisters >= 32 ? (S::kQueries <= 2 ? 4 : 2) : 1;
  constexpr int kScanned = kRegisters >= 32 ? 8 : 2;  // queries at once
  const int units = (int)sketch->units, fine = (int)sketch->fine;
  const auto run = [&](auto at_once, int64_t block) {
    constexpr int B = at_once;
    each_rows<(kScanned < S::kQueries ? kScanned : S::kQueries)>(0, S::kQueries, [&](auto m, int row) {
      Ints sum[B][m];
      score_blocks<m, B>(query->whole + row * units * kUnitCoordinates, query->start + row, units, fine, codes + block * units * kUnitBytes,
                         sum);
      for (int b = 0; b < B; b++)
        for (int i = 0; i < m; i++) {
          store_ints(scores + ((block + b) * S::kQueries + row + i) * 16, sum[b][i]);
          int32_t *top = tops + ((first + block + b) % kTops * S::kQueries + row + i) * 16;
          store_ints(top, larger(load_as<Ints>(top), sum[b][i]));
        }
    });
  };
  int64_t block = 0;
  for (; block + kAtOnce <= blocks; block += kAtOnce) run(std::integral_constant<int, kAtOnce>{}, block);
  for (; block < blocks; block++) run(std::integral_constant<int, 1>{}, block);
}

// What a scan wants of the queries of one KV head: [queries][head_dim] numbers, one head after another.
template <class S>
void prepare_query(const void *data, int64_t head_stride, const KvcSketch *sketch, const KvcLookupQuery *query) {
  constexpr bool kPairs = std::is_same_v<typename S::Stored, Bfloat16>;
  for (int row = 0; row < S::kQueries; row++) {
    const typename S::Query *from = (const typename S::Query *)data + row * head_stride;
    float *to = query->query + row * S::kHeadDim, plain[S::kHeadDim];
    for (int d = 0; d < S::kHeadDim; d++) plain[d] = widen(from[d]) * S::kScale;
    for (int d = 0; d < S::kHeadDim; d++) to[kPairs && d < S::kHeadDim / 32 * 32 ? d / 32 * 32 + d % 2 * 16 + d % 32 / 2 : d] = plain[d];
    if (!sketch) continue;
    const int units = (int)sketch->units;
    int8_t *whole = query->whole + row * units * kUnitCoordinates;
    float coordinates[kMaxUnits * kUnitCoordinates], largest = 0, base = 0;
    for (int d = 0; d < S::kHeadDim; d++) base += plain[d] * sketch->centre[d];
    for (int unit = 0; unit < units; unit++) {
      const float *map = sketch->map + unit * kUnitCoordinates;
      Floats sum[4] = {};  // four chains of additions at once
      for (int d = 0; d < S::kHeadDim; d += 4)
        for (int i = 0; i < 4 && d + i < S::kHeadDim; i++) sum[i] += plain[d + i] * load(map + (int64_t)(d + i) * units * kUnitCoordinates);
      store(coordinates + unit * kUnitCoordinates, (sum[0] + sum[1]) + (sum[2] + sum[3]));
    }
    for (int i = 0; i < units * kUnitCoordinates; i++) largest = std::max(largest, std::abs(coordinates[i]));
    const float scale = std::max(largest / 127, 1.17549435e-38f);
    int32_t twice_middle = 0;
    for (int i = 0; i < units * kUnitCoordinates; i++) {
      constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
      const float rounded = coordinates[i] / scale + kMagic - kMagic;
      whole[i] = rounded > -127 ? (int8_t)std::min(rounded, 127.0f) : (int8_t)-127;  // NaN too becomes a number
      const bool fine = i / kUnitCoordinates < sketch->fine;
      if (!fine || i % kUnitCoordinates < kFineCoordinates) twice_middle += whole[i] * (fine ? kFineTop : kCoarseTop);
    }
    query->start[row] = -(twice_middle >> 1);
    query->scale[row] = scale;
    query->base[row] = base - (twice_middle & 1 ? 0.5f * scale : 0);
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

// exp(logit - logit of `shift`), where that is not too large; the sums of weights of the sifted keys.
template <class S>
KVC_INLINE Floats weights_around(Ints score, int32_t shift, float scale, float base) {
  if constexpr (S::kCapped) return exp_negative(logits_of<S>(score, scale, base) - logits_of<S>(shift + Ints{}, scale, base));
  return exp2_of(to_floats(score - shift) * (scale * 1.44269504f));
}

// ---- the choice ----

// The largest number t of which at least k of the numbers are at least t, where that is known of `low`, and none is above `high`.
// Vectors lie `stride` numbers apart.
KVC_INLINE int32_t kth_largest(const int32_t *numbers, int64_t vectors, int64_t stride, int64_t k, int64_t low, int64_t high) {
  while (low < high) {
    const int64_t middle = low + (high - low + 1) / 2;
    int64_t count = 0;
#if defined(__AVX512F__)
    for (int64_t v = 0; v < vectors; v++) count += __builtin_popcount(lanes_from(load_as<Ints>(numbers + v * stride), (int32_t)middle));
#else
    Ints counted = {};
    for (int64_t v = 0; v < vectors; v++) counted = counted - (load_as<Ints>(numbers + v * stride) > (int32_t)(middle - 1));
    int32_t lane[16];
    store_ints(lane, counted);
    for (int i = 0; i < 16; i++) count += lane[i];
#endif
    if (count >= k)
      low = middle;
    else
      high = middle - 1;
  }
  return (int32_t)low;
}

inline int32_t position_of(const KvcSketchRows *part, int32_t index) {
  for (; index >= part->tokens; part++) index -= (int32_t)part->tokens;
  return part->position[index];
}

// Sets the bits of the k largest numbers and clears the others'; of equal numbers the earlier positions are chosen.  numbers: an even
// count of vectors, `stride` numbers apart; tops: the largest ones of some, in as many vectors.  Returns the smallest chosen number.
inline int32_t choose_largest(const int32_t *numbers, int64_t vectors, const int32_t *tops, int64_t top_vectors, int64_t stride, int64_t k,
                              const KvcSketchRows *rows, uint32_t *chosen) {
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
                   [&](int32_t one, int32_t other) { return position_of(rows, one) < position_of(rows, other); });
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
                            const KvcSketchRows *rows, uint32_t *chosen) {
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
                   [&](int32_t one, int32_t other) { return position_of(rows, indices[one]) < position_of(rows, indices[other]); });
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
      total += weights_below<S>(load_as<Ints>(scores + (b * S::kQueries + row) * 16), top, query->scale[row], query->base[row]);
    maximum[row] = logit_of<S>(top, query->scale[row], query->base[row]), sum[row] = sum_lanes(total);
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
      const Floats logit = logits_of<S>(load_as<Ints>(scores + (b * S::kQueries + row) * 16), query->scale[row], query->base[row]);
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
void sift_runs(const KvcLookupQuery *query, const KvcSketch *sketch, const uint8_t *codes, int64_t first, int64_t runs, KvcSifted *to) {
  constexpr int kAtOnce = kRegisters >= 32 ? 2 : 1;
  constexpr int kScanned = kRegisters >= 32 ? 8 : 2;
  constexpr float kFarBelow = 32;
  alignas(64) int32_t scores[2 * S::kQueries * 16];
  alignas(64) Floats weights[S::kQueries][4];
  int32_t floor[S::kQueries];
  for (int row = 0; row < S::kQueries; row++)
    floor[row] = S::kCapped ? kNothing + 1 : to->shift[row] - (int32_t)std::min(kFarBelow / query->scale[row], 1e9f);
  const int units = (int)sketch->units, fine = (int)sketch->fine;
  const int64_t run_bytes = 2 * units * kUnitBytes;
  const Ints lane = load_as<Ints>(kLaneNumbers);
  for (int64_t run = 0; run < runs; run++, codes += run_bytes) {
    for (int64_t i = 0; i < run_bytes; i += 64) prefetch(codes + i);
    for (int block = 0; block < 2; block += kAtOnce)
      each_rows<(kScanned < S::kQueries ? kScanned : S::kQueries)>(0, S::kQueries, [&](auto m, int row) {
        Ints sum[kAtOnce][m];
        score_blocks<m, kAtOnce>(query->whole + row * units * kUnitCoordinates, query->start + row, units, fine,
                                 codes + block * units * kUnitBytes, sum);
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
      const float scale = query->scale[row], base = query->base[row];
      const Floats low = weights_around<S>(one, to->shift[row], scale, base), high = weights_around<S>(other, to->shift[row], scale, base);
      weights[row][run % 4] = (Floats)((Ints)low & ~set_lanes(kept[0])) + (Floats)((Ints)high & ~set_lanes(kept[1]));
    }
    if (run % 4 == 3)
      for (int row = 0; row < S::kQueries; row++) sum_four(weights[row], to->sums + row * to->sum_stride + run - 3);
    else if (run == runs - 1)
      for (int row = 0; row < S::kQueries; row++)
        for (int64_t i = 0; i <= run % 4; i++) to->sums[row * to->sum_stride + run - run % 4 + i] = sum_lanes(weights[row][i]);
  }
}

// The weights of candidates that are not chosen join the sums of their runs.  Returns the sum of all runs.
template <class S>
float put_back(const KvcLookupQuery *query, int32_t row, int32_t shift, const int32_t *scores, const int32_t *indices, int64_t count,
               const uint32_t *chosen, float *sums, int64_t runs) {
  for (int64_t i = 0; i < count; i += 16) {
    alignas(64) float weight[16];
    uint32_t left = ~chosen[i / 32] >> i % 32 & 0xffff;
    if (count - i < 16) left &= (1u << (count - i)) - 1;
    if (left) store(weight, weights_around<S>(load_as<Ints>(scores + i), shift, query->scale[row], query->base[row]));
    for (; left; left &= left - 1) {
      const int at = __builtin_ctz(left);
      sums[indices[i + at] / kRunTokens] += weight[at];
    }
  }
  Floats total = {};
  int64_t run = 0;
  for (; run + 16 <= runs; run += 16) total += load(sums + run);
  float sum = sum_lanes(total);
  for (; run < runs; run++) sum += sums[run];
  return sum;
}

// ---- attention over rows ----

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

// ---- what is not read ----

// out[m] += sum_r weights[m][r] * mean[r], in vectors [first, first + C) of each value.
template <class S, int M, int C>
void add_means(const float *weights, const int8_t *mean, int64_t runs, int first, float *out) {
  Floats sum[M][C];
  for (int m = 0; m < M; m++)
    for (int c = 0; c < C; c++) sum[m][c] = load(out + m * S::kValueDim + (first + c) * 16);
  for (int64_t r = 0; r < runs; r++)
    for (int c = 0; c < C; c++) {
      const Floats value = load_bytes(mean + r * S::kValueDim + (first + c) * 16);
      for (int m = 0; m < M; m++) sum[m][c] += weights[m * kRunsAtOnce + r] * value;
    }
  for (int m = 0; m < M; m++)
    for (int c = 0; c < C; c++) store(out + m * S::kValueDim + (first + c) * 16, sum[m][c]);
}

// The state gains at most kRunsAtOnce runs of 32 keys: all but the chosen ones, whose bits lie `chosen_stride` words apart for each query.
// top: of each query a score that none of these exceeds; the state's maximum is its logit.
template <class S>
void add_rest(const KvcLookupQuery *query, const int32_t *top, const int32_t *scores, const uint32_t *chosen, int64_t chosen_stride,
              const int8_t *mean, const float *mean_scale, int64_t runs, const KvcState *state) {
  constexpr int kVectors = S::kValueDim / 16, kTail = S::kValueDim % 16;
  constexpr int kColumns = kRegisters >= 32 ? 4 : 2, kColumnsUsed = kVectors < kColumns ? (kVectors ? kVectors : 1) : kColumns;
  constexpr int kMeanRows = kRegisters >= 32 ? 24 / kColumnsUsed : 2;
  alignas(64) float weights[S::kQueries * kRunsAtOnce];
  for (int row = 0; row < S::kQueries; row++) {
    const float scale = query->scale[row], base = query->base[row];
    const auto weigh = [&](int64_t r) {
      const uint32_t read = chosen[row * chosen_stride + r];
      const int32_t *score = scores + (2 * r * S::kQueries + row) * 16;
      const Floats first = weights_below<S>(load_as<Ints>(score), top[row], scale, base);
      const Floats second = weights_below<S>(load_as<Ints>(score + S::kQueries * 16), top[row], scale, base);
      return (Floats)((Ints)first & ~set_lanes(read & 0xffff)) + (Floats)((Ints)second & ~set_lanes(read >> 16));
    };
    int64_t run = 0;
    for (; run + 4 <= runs; run += 4) {
      const Floats four[4] = {weigh(run), weigh(run + 1), weigh(run + 2), weigh(run + 3)};
      sum_four(four, weights + row * kRunsAtOnce + run);
    }
    for (; run < runs; run++) weights[row * kRunsAtOnce + run] = sum_lanes(weigh(run));
    float sum = 0;
    for (int64_t r = 0; r < runs; r++) {
      sum += weights[row * kRunsAtOnce + r];
      weights[row * kRunsAtOnce + r] *= mean_scale[r];
    }
    state->sum[row] += sum;
  }
  each_columns<kVectors, kColumns>([&](auto columns, int first) {
    each_rows<(kMeanRows < S::kQueries ? kMeanRows : S::kQueries)>(0, S::kQueries, [&](auto m, int row) {
      add_means<S, m, columns>(weights + row * kRunsAtOnce, mean, runs, first, state->out + row * S::kValueDim);
    });
  });
  if constexpr (kTail > 0)
    for (int64_t r = 0; r < runs; r++)
      for (int row = 0; row < S::kQueries; row++)
        for (int e = S::kValueDim - kTail; e < S::kValueDim; e++)
          state->out[row * S::kValueDim + e] += weights[row * kRunsAtOnce + r] * mean[r * S::kValueDim + e];
}

// out[m] += sum_i weights[m][i] * mean[which[i]], in vectors [first, first + C) of each value.
template <class S, int M, int C>
void add_some_means(const float *weights, const int8_t *mean, const int32_t *which, int64_t count, int first, float *out) {
  Floats sum[M][C];
  for (int m = 0; m < M; m++)
    for (int c = 0; c < C; c++) sum[m][c] = load(out + m * S::kValueDim + (first + c) * 16);
  for (int64_t i = 0; i < count; i++)
    for (int c = 0; c < C; c++) {
      const Floats value = load_bytes(mean + which[i] * S::kValueDim + (first + c) * 16);
      for (int m = 0; m < M; m++) sum[m][c] += weights[m * kRunsAtOnce + i] * value;
    }
  for (int m = 0; m < M; m++)
    for (int c = 0; c < C; c++) store(out + m * S::kValueDim + (first + c) * 16, sum[m][c]);
}

// The state gains at most kRunsAtOnce runs by their sums [queries][stride]; the means of those that weigh less than `least` [queries] for
// every query are not read.
template <class S>
void add_runs(const float *sums, int64_t stride, const float *least, const int8_t *mean, const float *mean_scale, int64_t runs,
              const KvcState *state) {
  constexpr int kVectors = S::kValueDim / 16, kTail = S::kValueDim % 16;
  constexpr int kColumns = kRegisters >= 32 ? 4 : 2, kColumnsUsed = kVectors < kColumns ? (kVectors ? kVectors : 1) : kColumns;
  constexpr int kMeanRows = kRegisters >= 32 ? 24 / kColumnsUsed : 2;
  alignas(64) float weights[S::kQueries * kRunsAtOnce];
  int32_t which[kRunsAtOnce];
  int64_t count = 0;
  for (int64_t r = 0; r < runs; r++) {
    bool wanted = false;
    for (int row = 0; row < S::kQueries; row++) {
      state->sum[row] += sums[row * stride + r];
      wanted |= sums[row * stride + r] >= least[row];
    }
    if (!wanted) continue;
    for (int64_t i = 0; i < S::kValueDim; i += 64) __builtin_prefetch(mean + r * S::kValueDim + i, 0, 2);
    for (int row = 0; row < S::kQueries; row++) weights[row * kRunsAtOnce + count] = sums[row * stride + r] * mean_scale[r];
    which[count++] = (int32_t)r;
  }
  each_columns<kVectors, kColumns>([&](auto columns, int first) {
    each_rows<(kMeanRows < S::kQueries ? kMeanRows : S::kQueries)>(0, S::kQueries, [&](auto m, int row) {
      add_some_means<S, m, columns>(weights + row * kRunsAtOnce, mean, which, count, first, state->out + row * S::kValueDim);
    });
  });
  if constexpr (kTail > 0)
    for (int64_t i = 0; i < count; i++)
      for (int row = 0; row < S::kQueries; row++)
        for (int e = S::kValueDim - kTail; e < S::kValueDim; e++)
          state->out[row * S::kValueDim + e] += weights[row * kRunsAtOnce + i] * mean[which[i] * S::kValueDim + e];
}

// The largest score of keys that are not chosen, for queries that share the bits; kNothing where all are.
template <class S>
void find_tops(const int32_t *scores, const uint32_t *chosen, int64_t runs, int32_t *top) {
  for (int row = 0; row < S::kQueries; row++) {
    Ints most = kNothing + Ints{};
    for (int64_t block = 0; block < 2 * runs; block++) {
      const Ints read = set_lanes(chosen[block / 2] >> block % 2 * 16 & 0xffff);
      const Ints score = load_as<Ints>(scores + (block * S::kQueries + row) * 16);
      most = larger(most, (score & ~read) | (kNothing & read));
    }
    top[row] = max_of(most);
  }
}

template <class S>
constexpr KvcLookupKernel lookup_kernel(uint64_t key) {
  return {
      key,
      S::kHeadDim,
      S::kValueDim,
      S::kQueries,
      sizeof(typename S::Query),
      sizeof(typename S::Stored),
      append_row<S>,
      prepare_query<S>,
      scan_sketch<S>,
      sum_weights<S>,
      share_weights<S>,
      choose_largest,
      find_tops<S>,
      attend_rows<S>,
      add_rest<S>,
      logit_of<S>,
      find_threshold,
      sift_runs<S>,
      pick_largest,
      put_back<S>,
      add_runs<S>,
  };
}

}  // namespace
