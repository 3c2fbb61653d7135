// Keys and values of fewer bits: how they lie in a store (runtime/quantise.py, runtime/layout.py), and a chunk of them in float32.
//
//   int8   keys in blocks of 16 tokens: [head_dim][16] bytes, then [16] scales; a value is its bytes, then its scale.
//          A byte is a code + 128.
//   kivi   a group of keys: for each 16 of its tokens [head_dim * bits / 8][16] bytes, and apart [2][head_dim] numbers: scales, then
//          the smallest numbers.  A value: [value_dim / 16 vectors, 8 / bits of them in 16 bytes], and apart [2][value_dim / group].
//          Byte l of 16 holds lane l of 8 / bits vectors, the first one in the lowest bits.
#pragma once

#include <vector>

#include "rows.h"

// Whole numbers below 2^23 as floats.
KVC_INLINE Floats as_floats(Bits numbers) { return (Floats)(numbers | 0x4b000000u) - 8388608.0f; }

// One of the numbers that lie at any address.
template <class Kept>
KVC_INLINE float number_at(const void *from, int64_t i) {
  Kept number;
  std::memcpy(&number, (const Kept *)from + i, sizeof number);
  return widen(number);
}

// 16 tokens of keys, wherever they are kept, as [head_dim][16] floats.
template <class Kept, int HeadDim>
KVC_INLINE void unpack_exact_keys(const Kept *block, float *to) {
  if constexpr (std::is_same_v<Kept, float>) {
    std::memcpy(to, block, HeadDim * kBlockTokens * sizeof(float));
  } else {
    for (int d = 0; d < HeadDim; d += 2) {
      const Bits pairs = load_bits(block + d * kBlockTokens);
      store(to + d * 16, even(pairs)), store(to + (d + 1) * 16, odd(pairs));
    }
  }
}

template <class Kept, int HeadDim>
KVC_INLINE void unpack_int8_keys(const uint8_t *block, float *to) {
  float scale[16];
  for (int lane = 0; lane < 16; lane++) scale[lane] = number_at<Kept>(block + HeadDim * 16, lane);
  const Floats scales = load(scale);
  for (int d = 0; d < HeadDim; d++) store(to + d * 16, (as_floats(load_bytes(block + d * 16)) - 128.0f) * scales);
}

template <class Kept, int Width, int Count>
KVC_INLINE void unpack_vectors(const uint8_t *codes, const Kept *scales, int groups, int vectors_per_group, float *to) {
  constexpr int kEach = 8 / Width;
  for (int first = 0; first < Count; first += kEach) {
    const Bits bytes = load_bytes(codes + first / kEach * 16);
    for (int i = 0; i < kEach && first + i < Count; i++) {
      const int group = (first + i) / vectors_per_group;
      const Floats code = as_floats((bytes >> (uint32_t)(i * Width)) & ((1u << Width) - 1));
      store(to + (first + i) * 16, code * widen(scales[group]) + widen(scales[groups + group]));
    }
  }
}

template <class Kept, int ValueDim>
KVC_INLINE void unpack_int8_value(const uint8_t *row, float *to) {
  const float scale = number_at<Kept>(row + ValueDim, 0);
  int e = 0;
  for (; e + 16 <= ValueDim; e += 16) store(to + e, (as_floats(load_bytes(row + e)) - 128.0f) * scale);
  for (; e < ValueDim; e++) to[e] = ((float)row[e] - 128.0f) * scale;
}

// The pieces of a chunk, in float32: keys in blocks, values in rows, each from the lane on that it had.  Width: bits of a code.
template <class Kept, int HeadDim, int ValueDim, int Width, int Group>
class Unpacked {
 public:
  const KvcPiece *read(const KvcPiece *pieces, int64_t count) {
    int64_t blocks = 0;
    for (int64_t i = 0; i < count; i++) blocks += blocks_of(pieces[i]);
    if ((int64_t)numbers.size() < blocks * kBlock + kAlign) numbers.resize(blocks * kBlock + kAlign);
    float *to = numbers.data() + (-((uintptr_t)numbers.data() / sizeof(float)) & (kAlign - 1));
    found.clear();
    for (int64_t i = 0; i < count; i++) {
      const KvcPiece &piece = pieces[i];
      const int64_t lane = piece.slot % kBlockTokens, first = piece.slot - lane, its_blocks = blocks_of(piece);
      float *keys = to, *values = to + its_blocks * kBlockTokens * HeadDim;
      to = values + its_blocks * kBlockTokens * ValueDim;
      for (int64_t block = 0; block < its_blocks; block++)
        unpack_keys(piece, first + block * kBlockTokens, keys + block * kBlockTokens * HeadDim);
      for (int64_t t = lane; t < lane + piece.tokens; t++) unpack_value(piece, first + t, values + t * ValueDim);
      found.push_back({keys, values, lane, piece.tokens, piece.position});
    }
    return found.data();
  }

 private:
  static constexpr int64_t kBlock = kBlockTokens * (HeadDim + ValueDim), kAlign = 16;
  std::vector<float> numbers;
  std::vector<KvcPiece> found;

  static int64_t blocks_of(const KvcPiece &piece) { return (piece.slot % kBlockTokens + piece.tokens + kBlockTokens - 1) / kBlockTokens; }

  static void unpack_keys(const KvcPiece &piece, int64_t slot, float *to) {
    if constexpr (Width == 8) {
      unpack_int8_keys<Kept, HeadDim>((const uint8_t *)piece.key + slot * (HeadDim + sizeof(Kept)), to);
    } else if (!piece.key_scales) {
      unpack_exact_keys<Kept, HeadDim>((const Kept *)piece.key + slot * HeadDim, to);
    } else {
      const uint8_t *codes = (const uint8_t *)piece.key + slot * HeadDim * Width / 8;
      unpack_vectors<Kept, Width, HeadDim>(codes, (const Kept *)piece.key_scales + slot / Group * 2 * HeadDim, HeadDim, 1, to);
    }
  }

  static void unpack_value(const KvcPiece &piece, int64_t slot, float *to) {
    if constexpr (Width == 8) {
      unpack_int8_value<Kept, ValueDim>((const uint8_t *)piece.value + slot * (ValueDim + sizeof(Kept)), to);
    } else if (!piece.value_scales) {
      const Kept *row = (const Kept *)piece.value + slot * ValueDim;
      for (int e = 0; e < ValueDim; e++) to[e] = widen(row[e]);
    } else {
      constexpr int kCodes = (ValueDim / 16 * Width + 7) / 8 * 16, kGroups = ValueDim / Group;
      const Kept *scales = (const Kept *)piece.value_scales + slot * 2 * kGroups;
      unpack_vectors<Kept, Width, ValueDim / 16>((const uint8_t *)piece.value + slot * kCodes, scales, kGroups, Group / 16, to);
    }
  }
};

// One row of numbers in 8 bits: code + 128 of each, `stride` bytes apart.  Returns the scale.
template <class From, class Kept, int Dim>
Kept quantise_int8(const From *from, uint8_t *codes, int64_t stride) {
  float number[Dim], size = 0;
  for (int d = 0; d < Dim; d++) {
    Kept kept;
    narrow(widen(from[d]), &kept);
    number[d] = widen(kept);
    const float magnitude = number[d] < 0 ? -number[d] : number[d];
    size = magnitude > size ? magnitude : size;
  }
  Kept scale;
  narrow(size / 127.0f, &scale);
  const float step = widen(scale);
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, ties to even
  for (int d = 0; d < Dim; d++) {
    const float code = step > 0 ? (number[d] / step + kMagic) - kMagic : 0;
    codes[d * stride] = (uint8_t)(int32_t)((code > 127 ? 127 : code < -127 ? -127 : code) + 128.0f);
  }
  return scale;
}

// Writes new tokens to slots from `slot` on, in 8 bits.
template <class From, class Kept, int HeadDim, int ValueDim>
void append_int8(const KvcTokens &tokens, uint8_t *keys, uint8_t *values, int64_t slot) {
  for (int64_t t = 0; t < tokens.tokens; t++, slot++) {
    const int64_t lane = slot % kBlockTokens;
    uint8_t *block = keys + (slot - lane) * (HeadDim + sizeof(Kept)), *row = values + slot * (ValueDim + sizeof(Kept));
    const Kept key = quantise_int8<From, Kept, HeadDim>((const From *)tokens.key + t * tokens.key_stride, block + lane, kBlockTokens);
    std::memcpy(block + HeadDim * kBlockTokens + lane * sizeof(Kept), &key, sizeof(Kept));
    const Kept value = quantise_int8<From, Kept, ValueDim>((const From *)tokens.value + t * tokens.value_stride, row, 1);
    std::memcpy(row + ValueDim, &value, sizeof(Kept));
  }
}
