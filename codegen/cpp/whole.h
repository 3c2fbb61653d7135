// Vectors of whole numbers, 16 lanes at a time: products with codes, masks, and moves by mask.
#pragma once

#include <algorithm>

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

constexpr int32_t kNothing = INT32_MIN;  // below every score

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

}  // namespace
