// attend_spans 11e40466c8cbaad5: a query sees every earlier token.
// 3 queries a KV head, head_dim 64, value_dim 64; bfloat16 queries over bfloat16 keys and values, sums in float32.
// Made by kvcompile from codegen/cpp/attend_spans.cpp.jinja; print it again with: kvcompile SPEC --show source
#include "pairs.h"

namespace {

constexpr int kHeadDim = 64;
constexpr int kValueDim = 64;
constexpr int kQueries = 3;  // queries that share a KV head
constexpr float kScale = 0.125f;
using Query = Bfloat16;
using Stored = Bfloat16;

constexpr int kTileTokens = kQueries < 48 ? 48 / kQueries : 1;
constexpr int kRows = kTileTokens * kQueries;
constexpr bool kPairs = std::is_same_v<Stored, Bfloat16>;  // a vector holds two numbers a lane
constexpr int kLanes = kPairs ? 32 : 16;
constexpr int kVectors = kValueDim / kLanes * (kPairs ? 2 : 1);  // of one value, without its tail
constexpr int kTail = kValueDim % kLanes;
constexpr int kBlocks = kRegisters >= 32 ? 2 : 1;   // blocks of keys multiplied at once
constexpr int kKeyRows = kRegisters >= 32 ? 6 : 2;  // rows multiplied at once
constexpr int kColumns = kRegisters >= 32 ? 8 : 2;  // vectors of a value added at once
constexpr int kColumnsUsed = kVectors < kColumns ? (kVectors ? kVectors : 1) : kColumns;
constexpr int kValueRows = kRegisters >= 32 ? 24 / kColumnsUsed : 2;

// logits[m][t] = query[m] . key[t] for the tokens of a piece.
template <int M>
void multiply_keys(const float *query, const KvcPiece &piece, float *logits) {
  const int64_t ahead = tokens_before_end<Stored>(piece, kHeadDim);
  for (int64_t done = 0; done < piece.tokens;) {
    const int64_t slot = piece.slot + done, lane = slot % kBlockTokens, left = piece.tokens - done;
    const Stored *key = (const Stored *)piece.key + (slot - lane) * kHeadDim;
    if (lane == 0 && left >= kBlocks * kBlockTokens) {
      Floats sum[M][kBlocks] = {};
      if (done < ahead)
        multiply_blocks<true, Stored, kHeadDim>(query, key, sum);
      else
        multiply_blocks<false, Stored, kHeadDim>(query, key, sum);
      for (int m = 0; m < M; m++)
        for (int b = 0; b < kBlocks; b++) store(logits + m * kChunkTokens + done + b * kBlockTokens, sum[m][b]);
      done += kBlocks * kBlockTokens;
      continue;
    }
    Floats sum[M][1] = {};  // a block of which not every lane belongs to the piece
    multiply_blocks<false, Stored, kHeadDim>(query, key, sum);
    const int64_t lanes = left < kBlockTokens - lane ? left : kBlockTokens - lane;
    for (int m = 0; m < M; m++) std::memcpy(logits + m * kChunkTokens + done, (const float *)&sum[m][0] + lane, lanes * sizeof(float));
    done += lanes;
  }
}

// out[m] += sum_t weights[m][t] * value[t], in vectors [first, first + C) of each value.
template <int M, int C>
void add_values(const float *weights, const KvcPiece &piece, int first, float *out) {
  Floats sum[M][C];
  for (int m = 0; m < M; m++)
    for (int c = 0; c < C; c++) sum[m][c] = load(out + m * kValueDim + (first + c) * 16);
  const Stored *value = (const Stored *)piece.value + piece.slot * kValueDim + first * 16;
  int64_t ahead = tokens_before_end<Stored>(piece, kValueDim);
  ahead = ahead < 0 ? 0 : ahead < piece.tokens ? ahead : piece.tokens;
  add_tokens<true, Stored, kValueDim>(weights, value, 0, ahead, sum);
  add_tokens<false, Stored, kValueDim>(weights, value, ahead, piece.tokens, sum);
  for (int m = 0; m < M; m++)
    for (int c = 0; c < C; c++) store(out + m * kValueDim + (first + c) * 16, sum[m][c]);
}

// The last kTail numbers of each value, which fill no vector.
void add_tails(const float *weights, const KvcPiece &piece, int rows, float *out) {
  for (int64_t t = 0; t < piece.tokens; t++) {
    const Stored *value = (const Stored *)piece.value + (piece.slot + t) * kValueDim + kValueDim - kTail;
    for (int m = 0; m < rows; m++)
      for (int e = 0; e < kTail; e++) out[m * kValueDim + kValueDim - kTail + e] += weights[m * kChunkTokens + t] * widen(value[e]);
  }
}

// Logits of the piece's keys that the query at `position` may not see become -inf.
void hide(const KvcPiece &piece, int64_t position, float *logits) {
  for (int64_t t = position + 1 - piece.position < 0 ? 0 : position + 1 - piece.position; t < piece.tokens; t++) logits[t] = -kInfinity;
}

void attend(const KvcQueries *queries, const KvcPiece *pieces, int64_t count, const KvcState *state) {
  alignas(64) float query[kRows * kHeadDim], logits[kRows * kChunkTokens], out[kRows * kValueDim];
  const int rows = (int)queries->tokens * kQueries;
  std::memset(out, 0, rows * kValueDim * sizeof(float));
  for (int row = 0; row < rows; row++) {
    const Query *from = (const Query *)queries->data + row / kQueries * queries->token_stride + row % kQueries * queries->head_stride;
    for (int d = 0; d < kHeadDim; d++) query[row * kHeadDim + d] = widen(from[d]) * kScale;
  }
  int64_t tokens = 0;
  for (const KvcPiece *piece = pieces; piece < pieces + count; tokens += piece++->tokens) {
    each_rows<kKeyRows>(0, rows,
                        [&](auto m, int row) { multiply_keys<m>(query + row * kHeadDim, *piece, logits + row * kChunkTokens + tokens); });
    for (int row = 0; row < rows; row++) hide(*piece, queries->position + row / kQueries, logits + row * kChunkTokens + tokens);
  }
  for (int row = 0; row < rows; row++) {
    weigh(logits + row * kChunkTokens, tokens, state->maximum + row, state->sum + row);
  }
  tokens = 0;
  for (const KvcPiece *piece = pieces; piece < pieces + count; tokens += piece++->tokens) {
    each_columns<kVectors, kColumns>([&](auto columns, int first) {
      each_rows<kValueRows>(0, rows, [&](auto m, int row) {
        add_values<m, columns>(logits + row * kChunkTokens + tokens, *piece, first, out + row * kValueDim);
      });
    });
    if constexpr (kTail > 0) add_tails(logits + tokens, *piece, rows, out);
  }
  copy_in_order<Stored, kValueDim>(out, rows, state->out);
}

void relay(const KvcQueries *queries, const KvcPiece *pieces, int64_t count, const KvcState *state) {
  if (!attend_pairs<kHeadDim, kValueDim, kQueries, kRows>(*queries, pieces, count, kScale, 0, *state))
    attend(queries, pieces, count, state);
}

void append(const KvcTokens *tokens, void *keys, void *values, int64_t slot) {
  append_tokens<Query, Stored, kHeadDim, kValueDim>(*tokens, (Stored *)keys, (Stored *)values, slot);
}

}  // namespace

extern "C" const KvcAttendKernel kvc_attend_11e40466c8cbaad5 = {
    0x11e40466c8cbaad5, kHeadDim, kValueDim, kQueries, sizeof(Query), sizeof(Stored), kTileTokens, 0, 0, 0, 0, 0, attend, append, 0, relay};
