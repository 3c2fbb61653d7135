// Keys that lie a token a row, [slot][head_dim], as policies keep them that find keys: a chunk of them in blocks, and new ones.
#pragma once

#include <vector>

#include "rows.h"

typedef uint32_t FourLanes __attribute__((vector_size(16)));  // of 4 bytes: one float, or two bfloat16 numbers
#if defined(__clang__)
#define KVC_SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define KVC_SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, FourLanes{i, j, k, l})
#endif

// Four lanes of four rows, `from_bytes` apart, become four tokens of four columns, `to_bytes` apart.
KVC_INLINE void transpose_four(const char *from, int64_t from_bytes, char *to, int64_t to_bytes) {
  FourLanes row[4];
  for (int i = 0; i < 4; i++) std::memcpy(&row[i], from + i * from_bytes, sizeof row[i]);
  const FourLanes low_01 = KVC_SHUFFLE(row[0], row[1], 0, 4, 1, 5), high_01 = KVC_SHUFFLE(row[0], row[1], 2, 6, 3, 7);
  const FourLanes low_23 = KVC_SHUFFLE(row[2], row[3], 0, 4, 1, 5), high_23 = KVC_SHUFFLE(row[2], row[3], 2, 6, 3, 7);
  const FourLanes column[4] = {KVC_SHUFFLE(low_01, low_23, 0, 1, 4, 5), KVC_SHUFFLE(low_01, low_23, 2, 3, 6, 7),
                               KVC_SHUFFLE(high_01, high_23, 0, 1, 4, 5), KVC_SHUFFLE(high_01, high_23, 2, 3, 6, 7)};
  for (int i = 0; i < 4; i++) std::memcpy(to + i * to_bytes, &column[i], sizeof column[i]);
}

// Keys of `tokens` tokens, at most 16, as a block: lanes of 4 bytes [Lanes][16].
template <int Lanes>
void lay_out_block(const char *rows, int64_t tokens, char *block) {
  constexpr int64_t kLane = 4, kRow = Lanes * kLane, kColumn = kBlockTokens * kLane;
  constexpr int kFours = Lanes / 4 * 4;
  const int64_t fours = tokens / 4 * 4;
  for (int lane = 0; lane < kFours; lane += 4)
    for (int64_t t = 0; t < fours; t += 4)
      transpose_four(rows + t * kRow + lane * kLane, kRow, block + lane * kColumn + t * kLane, kColumn);
  for (int64_t t = 0; t < tokens; t++)
    for (int lane = t < fours ? kFours : 0; lane < Lanes; lane++)
      std::memcpy(block + lane * kColumn + t * kLane, rows + t * kRow + lane * kLane, kLane);
}

// The pieces of a chunk, their keys in blocks; values stay where they are.
template <class Stored, int HeadDim, int ValueDim>
class KeysInBlocks {
 public:
  const KvcPiece *read(const KvcPiece *pieces, int64_t count) {
    int64_t blocks = 0;
    for (int64_t i = 0; i < count; i++) blocks += blocks_of(pieces[i]);
    if ((int64_t)memory.size() < blocks * kBlock + kAlign) memory.resize(blocks * kBlock + kAlign);
    char *to = memory.data() + (-(uintptr_t)memory.data() & (kAlign - 1));
    found.clear();
    for (int64_t i = 0; i < count; i++) {
      const KvcPiece &piece = pieces[i];
      const char *keys = (const char *)((const Stored *)piece.key + piece.slot * HeadDim);
      found.push_back({to, (const Stored *)piece.value + piece.slot * ValueDim, 0, piece.tokens, piece.position});
      found.back().follow = piece.follow;
      for (int64_t t = 0; t < piece.tokens; t += kBlockTokens, to += kBlock)
        lay_out_block<kLanes>(keys + t * HeadDim * sizeof(Stored), piece.tokens - t < kBlockTokens ? piece.tokens - t : kBlockTokens, to);
    }
    return found.data();
  }

 private:
  static constexpr int kLanes = HeadDim * sizeof(Stored) / 4;
  static constexpr int64_t kBlock = kBlockTokens * HeadDim * sizeof(Stored), kAlign = 64;
  std::vector<char> memory;
  std::vector<KvcPiece> found;

  static int64_t blocks_of(const KvcPiece &piece) { return (piece.tokens + kBlockTokens - 1) / kBlockTokens; }
};

// Calls `attend` for at most TileTokens query tokens at a time.
template <class Query, int TileTokens, int Queries, int ValueDim, class F>
KVC_INLINE void attend_tiles(F attend, const KvcQueries &queries, const KvcPiece *pieces, int64_t count, const KvcState &state) {
  for (int64_t first = 0; first < queries.tokens; first += TileTokens) {
    const int64_t row = first * Queries, left = queries.tokens - first;
    KvcQueries tile = queries;
    tile.data = (const Query *)queries.data + first * queries.token_stride;
    tile.tokens = left < TileTokens ? left : TileTokens;
    tile.position += first;
    const KvcState its_state = {state.out + row * ValueDim, state.maximum + row, state.sum + row};
    attend(&tile, pieces, count, &its_state);
  }
}

// Writes new tokens to slots from `slot` on, keys as rows.
template <class From, class Stored, int HeadDim, int ValueDim>
void append_rows(const KvcTokens &tokens, Stored *keys, Stored *values, int64_t slot) {
  for (int64_t t = 0; t < tokens.tokens; t++, slot++) {
    const From *key = (const From *)tokens.key + t * tokens.key_stride;
    const From *value = (const From *)tokens.value + t * tokens.value_stride;
    for (int d = 0; d < HeadDim; d++) narrow(widen(key[d]), keys + slot * HeadDim + d);
    for (int e = 0; e < ValueDim; e++) narrow(widen(value[e]), values + slot * ValueDim + e);
  }
}
