// Vectors of 16 numbers: one AVX-512 register, two of AVX2, four of SSE or NEON, in GCC's and Clang's vector extensions.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernel.h"

#define KVC_INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));
constexpr int kRegisters = 32;  // how many `Floats` the machine holds at once

template <class V>
KVC_INLINE V load_as(const void *from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
KVC_INLINE void store(float *to, Floats v) { std::memcpy(to, &v, sizeof v); }
KVC_INLINE Bits load_bytes(const void *from) {
  typedef uint8_t Bytes __attribute__((vector_size(16)));
  return __builtin_convertvector(load_as<Bytes>(from), Bits);
}
#else
#if defined(__AVX2__)
#define KVC_EACH_PART(what) what(0) what(1)
constexpr int kParts = 2;
constexpr int kRegisters = 8;
#else
#define KVC_EACH_PART(what) what(0) what(1) what(2) what(3)
constexpr int kParts = 4;
constexpr int kRegisters = 4;
#endif

// Registers side by side, each a member of its own: a vector type wider than a register, or an array of them, would live in memory.
template <class T>
struct Wide {
  typedef T Part __attribute__((vector_size(64 / kParts)));
#define KVC_MEMBER(i) Part part##i;
  KVC_EACH_PART(KVC_MEMBER)
#undef KVC_MEMBER

  template <class U>
  KVC_INLINE explicit operator Wide<U>() const {
    Wide<U> other;
#define KVC_CAST(i) other.part##i = (typename Wide<U>::Part)part##i;
    KVC_EACH_PART(KVC_CAST)
#undef KVC_CAST
    return other;
  }
};
template <class T>
struct Itself {
  typedef T type;
};

#define KVC_OPERATOR(result, sign, each_both, each_left, each_right)                    \
  template <class T>                                                                    \
  KVC_INLINE Wide<result> operator sign(const Wide<T> &a, const Wide<T> &b) {           \
    Wide<result> c;                                                                     \
    KVC_EACH_PART(each_both)                                                            \
    return c;                                                                           \
  }                                                                                     \
  template <class T>                                                                    \
  KVC_INLINE Wide<result> operator sign(const Wide<T> &a, typename Itself<T>::type b) { \
    Wide<result> c;                                                                     \
    KVC_EACH_PART(each_left)                                                            \
    return c;                                                                           \
  }                                                                                     \
  template <class T>                                                                    \
  KVC_INLINE Wide<result> operator sign(typename Itself<T>::type a, const Wide<T> &b) { \
    Wide<result> c;                                                                     \
    KVC_EACH_PART(each_right)                                                           \
    return c;                                                                           \
  }
#define KVC_ADD(i) c.part##i = a.part##i + b.part##i;
#define KVC_ADD_LEFT(i) c.part##i = a.part##i + b;
#define KVC_ADD_RIGHT(i) c.part##i = a + b.part##i;
KVC_OPERATOR(T, +, KVC_ADD, KVC_ADD_LEFT, KVC_ADD_RIGHT)
#define KVC_SUBTRACT(i) c.part##i = a.part##i - b.part##i;
#define KVC_SUBTRACT_LEFT(i) c.part##i = a.part##i - b;
#define KVC_SUBTRACT_RIGHT(i) c.part##i = a - b.part##i;
KVC_OPERATOR(T, -, KVC_SUBTRACT, KVC_SUBTRACT_LEFT, KVC_SUBTRACT_RIGHT)
#define KVC_MULTIPLY(i) c.part##i = a.part##i * b.part##i;
#define KVC_MULTIPLY_LEFT(i) c.part##i = a.part##i * b;
#define KVC_MULTIPLY_RIGHT(i) c.part##i = a * b.part##i;
KVC_OPERATOR(T, *, KVC_MULTIPLY, KVC_MULTIPLY_LEFT, KVC_MULTIPLY_RIGHT)
#define KVC_DIVIDE(i) c.part##i = a.part##i / b.part##i;
#define KVC_DIVIDE_LEFT(i) c.part##i = a.part##i / b;
#define KVC_DIVIDE_RIGHT(i) c.part##i = a / b.part##i;
KVC_OPERATOR(T, /, KVC_DIVIDE, KVC_DIVIDE_LEFT, KVC_DIVIDE_RIGHT)
#define KVC_AND(i) c.part##i = a.part##i & b.part##i;
#define KVC_AND_LEFT(i) c.part##i = a.part##i & b;
#define KVC_AND_RIGHT(i) c.part##i = a & b.part##i;
KVC_OPERATOR(T, &, KVC_AND, KVC_AND_LEFT, KVC_AND_RIGHT)
#define KVC_OR(i) c.part##i = a.part##i | b.part##i;
#define KVC_OR_LEFT(i) c.part##i = a.part##i | b;
#define KVC_OR_RIGHT(i) c.part##i = a | b.part##i;
KVC_OPERATOR(T, |, KVC_OR, KVC_OR_LEFT, KVC_OR_RIGHT)
#define KVC_SHIFT(i) c.part##i = a.part##i << b.part##i;
#define KVC_SHIFT_LEFT(i) c.part##i = a.part##i << b;
#define KVC_SHIFT_RIGHT(i) c.part##i = a << b.part##i;
KVC_OPERATOR(T, <<, KVC_SHIFT, KVC_SHIFT_LEFT, KVC_SHIFT_RIGHT)
#define KVC_SHIFT_DOWN(i) c.part##i = a.part##i >> b.part##i;
#define KVC_SHIFT_DOWN_LEFT(i) c.part##i = a.part##i >> b;
#define KVC_SHIFT_DOWN_RIGHT(i) c.part##i = a >> b.part##i;
KVC_OPERATOR(T, >>, KVC_SHIFT_DOWN, KVC_SHIFT_DOWN_LEFT, KVC_SHIFT_DOWN_RIGHT)
#define KVC_ABOVE(i) c.part##i = a.part##i > b.part##i;
#define KVC_ABOVE_LEFT(i) c.part##i = a.part##i > b;
#define KVC_ABOVE_RIGHT(i) c.part##i = a > b.part##i;
KVC_OPERATOR(int32_t, >, KVC_ABOVE, KVC_ABOVE_LEFT, KVC_ABOVE_RIGHT)
#define KVC_BELOW(i) c.part##i = a.part##i < b.part##i;
#define KVC_BELOW_LEFT(i) c.part##i = a.part##i < b;
#define KVC_BELOW_RIGHT(i) c.part##i = a < b.part##i;
KVC_OPERATOR(int32_t, <, KVC_BELOW, KVC_BELOW_LEFT, KVC_BELOW_RIGHT)
#define KVC_UP_TO(i) c.part##i = a.part##i <= b.part##i;
#define KVC_UP_TO_LEFT(i) c.part##i = a.part##i <= b;
#define KVC_UP_TO_RIGHT(i) c.part##i = a <= b.part##i;
KVC_OPERATOR(int32_t, <=, KVC_UP_TO, KVC_UP_TO_LEFT, KVC_UP_TO_RIGHT)

template <class T>
KVC_INLINE Wide<T> &operator+=(Wide<T> &a, const Wide<T> &b) {
  return a = a + b;
}
template <class T>
KVC_INLINE Wide<T> operator~(const Wide<T> &a) {
  Wide<T> c;
#define KVC_NOT(i) c.part##i = ~a.part##i;
  KVC_EACH_PART(KVC_NOT)
  return c;
}

typedef Wide<float> Floats;
typedef Wide<int32_t> Ints;
typedef Wide<uint32_t> Bits;

template <class V>
KVC_INLINE V load_as(const void *from) {
  V v;
#define KVC_LOAD(i) std::memcpy(&v.part##i, (const char *)from + i * (64 / kParts), 64 / kParts);
  KVC_EACH_PART(KVC_LOAD)
  return v;
}
KVC_INLINE Bits load_bytes(const void *from) {  // 16 of them, each in a lane
  typedef uint8_t Bytes __attribute__((vector_size(16 / kParts)));
  Bits v;
  Bytes bytes;
#define KVC_WIDEN(i)                                                        \
  std::memcpy(&bytes, (const char *)from + i * (16 / kParts), 16 / kParts); \
  v.part##i = __builtin_convertvector(bytes, Bits::Part);
  KVC_EACH_PART(KVC_WIDEN)
  return v;
}
KVC_INLINE void store(float *to, const Floats &v) {
#define KVC_STORE(i) std::memcpy((char *)to + i * (64 / kParts), &v.part##i, 64 / kParts);
  KVC_EACH_PART(KVC_STORE)
}
#endif

constexpr float kInfinity = __builtin_inff();

struct Bfloat16 {
  uint16_t bits;
};

KVC_INLINE Floats load(const float *from) { return load_as<Floats>(from); }
KVC_INLINE Bits load_bits(const void *from) { return load_as<Bits>(from); }
KVC_INLINE Floats splat(float x) { return x - Floats{}; }

// The even and the odd ones of 32 bfloat16 numbers.
KVC_INLINE Floats even(Bits pairs) { return (Floats)(pairs << 16); }
KVC_INLINE Floats odd(Bits pairs) { return (Floats)(pairs & 0xffff0000u); }

KVC_INLINE float widen(float x) { return x; }
KVC_INLINE float widen(Bfloat16 x) {
  const uint32_t bits = (uint32_t)x.bits << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}
KVC_INLINE void narrow(float x, float *to) { *to = x; }
KVC_INLINE void narrow(float x, Bfloat16 *to) {  // to the nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  to->bits = x != x ? 0x7fc0 : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

KVC_INLINE Floats select(Ints where, Floats yes, Floats no) { return (Floats)(((Ints)yes & where) | ((Ints)no & ~where)); }
KVC_INLINE Floats maximum(Floats a, Floats b) { return select(a > b, a, b); }

// Sums and maxima of the 16 lanes, in the order of a tree: the same bits on every instruction set.
KVC_INLINE float sum_lanes(Floats v) {
  float lane[16];
  store(lane, v);
  for (int step = 8; step > 0; step /= 2)
    for (int i = 0; i < step; i++) lane[i] += lane[i + step];
  return lane[0];
}
KVC_INLINE float max_lanes(Floats v) {
  float lane[16];
  store(lane, v);
  for (int step = 8; step > 0; step /= 2)
    for (int i = 0; i < step; i++) lane[i] = lane[i] > lane[i + step] ? lane[i] : lane[i + step];
  return lane[0];
}

// exp(x) for x <= 0 to 2 units in the last place; 0 from -87 down, so that no denormal number arises; NaN stays NaN.
KVC_INLINE Floats exp_negative(Floats x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Floats shifted = x * 1.44269504f + kMagic;
  const Floats n = shifted - kMagic;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r) * r + r + 1.0f;
  const Floats scaled = (Floats)((Bits)p + ((Bits)shifted << 23));
  return (Floats)((Ints)scaled & ~(x <= -87.0f));
}

// tanh(x), absolute error below 2e-7.
KVC_INLINE Floats tanh_of(Floats x) {
  const Floats size = (Floats)((Ints)x & 0x7fffffff);
  const Floats e = exp_negative(-2.0f * size);
  const Floats far = (1.0f - e) / (1.0f + e);
  const Floats s = x * x;
  Floats near = s * -8.863235530e-3f + 2.186948854e-2f;  // the series of tanh(x) / x - 1
  near = near * s - 5.396825397e-2f;
  near = near * s + 1.333333333e-1f;
  near = near * s - 3.333333333e-1f;
  near = size + size * s * near;
  const Floats positive = select(size < 0.25f, near, far);
  return (Floats)((Ints)positive | ((Ints)x & (int32_t)0x80000000));
}

// A line of memory that is wanted soon, into the second cache: into the first one, the few misses that it can have under way
// are the limit (measured: 89 % of a pure read's speed against 49 %; 8 and 16 KiB ahead are equal).
KVC_INLINE void prefetch(const void *at) { __builtin_prefetch((const char *)at + kPrefetchBytes, 0, 2); }
