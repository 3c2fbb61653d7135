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
  int64_t position;                                           // of the first token
  const void *key_scales = nullptr, *value_scales = nullptr;  // of slot 0, where 2 or 4 bits of a number are kept: quantised.h
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
  int32_t bits;  // of one number in a quantised store, whose scales and exact numbers have store_bytes; 0: of none
};

// A sketch of the keys of one KV head (runtime/indexes/sketch.py, codegen/cpp/lookup.h).
constexpr int64_t kRunTokens = 32;    // keys that share a mean value
constexpr int64_t kScanBlocks = 256;  // blocks of 16 keys that are scanned at once: a chunk of the sketch
constexpr int64_t kTops = 16;         // of a chunk: every kTops-th block shares its largest scores
constexpr int64_t kRunsAtOnce = kScanBlocks * kBlockTokens / kRunTokens;
constexpr int64_t kMaxUnits = 64;  // units of 4 bytes of a key
struct KvcSketch {
  const float *centre;  // [head_dim]
  const float *map;     // [head_dim][units * 16]: from a query to its coordinates
  int64_t units, fine;  // fine: so many units, the first ones, hold 4 bits a coordinate, the others 2
};
struct KvcSketchRows {
  int64_t tokens;           // a multiple of kRunTokens
  const uint8_t *codes;     // [tokens / 16][units][64]
  const int32_t *position;  // [tokens]
  const int8_t *mean;       // [tokens / kRunTokens][value_dim]
  const float *mean_scale;  // [tokens / kRunTokens]
};

// The queries of one KV head and one new token, made by `prepare`.
struct KvcLookupQuery {
  float *query;         // [queries][head_dim], in the order in which `attend` reads a key
  int8_t *whole;        // [queries][units][16]: coordinates
  int32_t *start;       // [queries]: what a score begins with
  float *scale, *base;  // [queries]: logit = scale * score + base
};

// What a scan keeps where it writes no scores: keys that may be chosen, and of each run of 32 what the others weigh.
struct KvcSifted {
  const int32_t *threshold, *shift;  // [queries]: a key whose score reaches one query's threshold is a candidate
  int64_t room;                      // of the lists; lists are written 16 numbers at a time
  int32_t *rows, *scores;            // [room], [queries][room]: of candidates, in the order of the sketch
  int64_t count;                     // of candidates so far
  float *sums;                       // [queries][sum_stride]: exp(logit - logit of `shift`) of a run's other keys; null: not wanted
  int64_t sum_stride;
};

// Scores are [blocks][queries][16], the bits of chosen keys words of 32; lookup.h says what each function does.
struct KvcLookupKernel {
  uint64_t key;
  int32_t head_dim, value_dim, queries_per_kv;
  int32_t query_bytes, store_bytes;  // of one number
  void (*append)(const void *key, const void *value, void *key_row, void *value_row);
  void (*prepare)(const void *query, int64_t head_stride, const KvcSketch *, const KvcLookupQuery *);
  void (*scan)(const KvcLookupQuery *, const KvcSketch *, const uint8_t *codes, int64_t first, int64_t blocks, int32_t *scores,
               int32_t *tops);
  void (*weigh)(const KvcLookupQuery *, const int32_t *scores, int64_t blocks, float *maximum, float *sum);
  void (*share)(const KvcLookupQuery *, const float *log_sum, int32_t by_sum, const int32_t *scores, int64_t first, int64_t blocks,
                int32_t *ranks, int32_t *tops);
  int32_t (*choose)(const int32_t *numbers, int64_t vectors, const int32_t *tops, int64_t top_vectors, int64_t stride, int64_t k,
                    const KvcSketchRows *, uint32_t *chosen);
  void (*find_tops)(const int32_t *scores, const uint32_t *chosen, int64_t runs, int32_t *top);
  void (*attend)(const float *query, int32_t queries, const void *const *keys, const void *const *values, int64_t tokens, const KvcState *);
  void (*add_rest)(const KvcLookupQuery *, const int32_t *top, const int32_t *scores, const uint32_t *chosen, int64_t chosen_stride,
                   const int8_t *mean, const float *mean_scale, int64_t runs, const KvcState *);
  float (*logit)(int32_t score, float scale, float base);
  int32_t (*find_threshold)(const int32_t *scores, int64_t vectors, int64_t stride, int64_t rank, int32_t *largest);
  void (*sift)(const KvcLookupQuery *, const KvcSketch *, const uint8_t *codes, int64_t first, int64_t runs, KvcSifted *);
  int32_t (*pick)(const int32_t *scores, const int32_t *indices, int64_t vectors, int64_t k, int32_t threshold, const KvcSketchRows *,
                  uint32_t *chosen);
  float (*put_back)(const KvcLookupQuery *, int32_t row, int32_t shift, const int32_t *scores, const int32_t *indices, int64_t count,
                    const uint32_t *chosen, float *sums, int64_t runs);
  void (*add_runs)(const float *sums, int64_t stride, const float *least, const int8_t *mean, const float *mean_scale, int64_t runs,
                   const KvcState *);
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
constexpr int64_t kKernelVersion = 4;
struct KvcKernels {
  int64_t version;
  const KvcAttendKernel *const *attend;
  int64_t attends;
  const KvcLinearKernel *const *linear;
  int64_t linears;
  const KvcLookupKernel *const *lookup;
  int64_t lookups;
};
