// What the launcher and a generated kernel say to each other: plain C, so that either can be compiled without the other.
//
// Keys are stored in blocks of 16 tokens, so that one vector holds one channel of 16 tokens:
//   float     [block][head_dim][16]
//   bfloat16  [block][head_dim / 2][16][2]     two channels of a token are one 32-bit lane
// Values are stored a token a row: [slot][value_dim].  Token `slot` has the lane slot % 16 of block slot / 16.
#pragma once

#include <cstdint>

constexpr int64_t kBlockTokens = 16;
constexpr int64_t kChunkTokens = 256;  // keys under one softmax: a chunk's state is merged with the next one's

// Keys and values of one KV head at contiguous positions.
struct KvcPiece {
  const void *key;    // of slot 0, in blocks
  const void *value;  // of slot 0
  int64_t slot;       // of the first token
  int64_t tokens;
  int64_t position;  // of the first token
};

// The queries of one KV head: row = token * queries_per_kv + query head.
struct KvcQueries {
  const void *data;      // [tokens][queries_per_kv][head_dim]
  int64_t token_stride;  // in elements
  int64_t head_stride;   // in elements
  int64_t tokens;
  int64_t position;     // of the first token
  const float *slopes;  // [queries_per_kv] for a kernel with `alibi`: slope * (key position - query position) joins the logit
};

// New keys and values of one KV head.
struct KvcTokens {
  const void *key;
  const void *value;
  int64_t key_stride;  // elements from one token to the next
  int64_t value_stride;
  int64_t tokens;
};

// Attention of R rows over some keys, before it is divided by `sum`; maximum -inf and sum 0 where a row saw no key.
struct KvcState {
  float *out;      // [R][value_dim]
  float *maximum;  // [R]
  float *sum;      // [R], of exp(logit - maximum)
};

struct KvcAttendKernel {
  uint64_t key;
  int32_t head_dim, value_dim, queries_per_kv;
  int32_t query_bytes, store_bytes;    // of one number
  int32_t tile_tokens;                 // at most so many query tokens in one call of `attend`
  int64_t sink_tokens, recent_tokens;  // recent_tokens 0: every earlier token is visible
  int64_t chunk_tokens;                // 0, or: a query sees only its own chunk of so many positions
  int32_t alibi, cache_index;          // cache_index: keys below sink_tokens are shown another query
  // At most kChunkTokens keys, in the order of their positions; with chunk_tokens all of one such chunk, queries too.
  void (*attend)(const KvcQueries *, const KvcPiece *, int64_t pieces, const KvcState *);
  void (*append)(const KvcTokens *, void *key, void *value, int64_t slot);
};

// Rows [first, last) of a linear layer for a few tokens: y[m][o] = sum_i x[m][i] * w[o][i] + bias[o].
struct KvcLinearKernel {
  uint64_t key;
  int32_t bytes;  // of one number of x, weight, bias and y
  int32_t max_tokens;
  void (*multiply)(const void *x, int64_t tokens, int64_t in, const void *weight, const void *bias, void *y, int64_t y_stride,
                   int64_t first, int64_t last);
};

// What a shared object of kernels holds; its symbol `kvc_kernels` returns it.
constexpr int64_t kKernelVersion = 2;
struct KvcKernels {
  int64_t version;
  const KvcAttendKernel *const *attend;
  int64_t attends;
  const KvcLinearKernel *const *linear;
  int64_t linears;
};
