// What the launcher and a generated kernel say to each other: plain C, so that either can be compiled without the other.
//
// Keys are stored in blocks of 16 tokens, so that one vector holds one channel of 16 tokens:
//   float     [block][head_dim][16]
//   bfloat16  [block][head_dim / 2][16][2]     two channels of a token are one 32-bit lane
// Values are stored a token a row: [slot][value_dim].  Token `slot` has the lane slot % 16 of block slot / 16.
// Kernels of policies that find keys are given keys a token a row too: [slot][head_dim] (key_rows.h).
#pragma once

#include <cstdint>

constexpr int64_t kBlockTokens = 16;
constexpr int64_t kRowsAtOnce = 6;        // rows that share what is loaded of keys and values that many rows see
constexpr int64_t kChunkTokens = 256;     // keys under one softmax: a chunk's state is merged with the next one's
constexpr int64_t kPrefetchBytes = 8192;  // so far ahead memory is asked for: vector.h

// Keys and values of one KV head at contiguous positions.
struct KvcPiece {
  const void *key;    // of slot 0
  const void *value;  // of slot 0
  int64_t slot;       // of the first token
  int64_t tokens;
  int64_t position;                                           // of the first token
  const void *key_scales = nullptr, *value_scales = nullptr;  // of slot 0, where 2 or 4 bits of a number are kept: quantised.h
  int64_t follow = 0;                                         // tokens right behind it in memory that are wanted next
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
  // Like `attend`, of keys that all the queries see, with weights of fewer bits; null: there is none.
  void (*relay)(const KvcQueries *, const KvcPiece *, int64_t pieces, const KvcState *);
};

// A sketch of the keys of one KV head (runtime/indexes/sketch.py).
constexpr int64_t kRunTokens = 32;    // keys that share a centre and a mean value
constexpr int64_t kScanRuns = 128;    // runs that are scanned at once: a chunk
constexpr int64_t kTops = 16;         // of a chunk: every kTops-th block of 16 keys shares its largest scores
constexpr int64_t kRunsAtOnce = 128;  // runs whose means are added at once
constexpr int64_t kMaxUnits = 64;     // units of 4 bytes of a key
struct KvcCodes {
  const float *step;    // [units][16]
  int64_t units, fine;  // fine: so many units, the first ones, hold 4 bits a coordinate, the others 2
};
struct KvcSketch {
  const float *centre;     // [head_dim]
  const void *map;         // bfloat16 [(head_dim + 1) / 2][coordinates][2]: from a query to its coordinates
  int64_t coordinates;     // a multiple of 16
  KvcCodes keys, centres;  // centres: of runs, 16 runs a block
};
struct KvcRun {
  const uint8_t *codes;     // [2][units][64]
  const int32_t *position;  // [kRunTokens]
  const int8_t *mean;       // [value_dim]
  float mean_scale;
  int32_t low;  // whether it is one of those that tell how much runs weigh whose keys are not looked at
};

// One token's queries of a KV head, as codes are multiplied with them: logit = scale * (start + whole . code) + base.
struct KvcCodedQuery {
  int8_t *whole;   // [queries][units][16]
  int32_t *start;  // [queries]
  float *scale, *base;
};
struct KvcLookupQuery {
  float *query;  // [queries][head_dim], in the order in which `attend` reads a key
  KvcCodedQuery keys, centres;
};

// What a query learns of runs from their centres, 16 runs a vector: which it looks at, and what the others weigh.
struct KvcRanked {
  float *weights;            // [queries][vectors][16]: exp(logit - top) of each run as a whole
  int32_t *ranks;            // [vectors][16]
  uint32_t *near, *low;      // [vectors]: bits of runs that are looked at, and of the lowest of these
  float *far_sums;           // [queries][vectors]: weights of the runs that are not looked at
  float *top, *low_log_sum;  // [queries]: the largest logit of a run; of low runs
};

// exp(logit - logit of a shift), summed over the keys that are not chosen, over those that are, and over all of low runs.
struct KvcWeights {
  float rest, read, low;
};

// Scores are [blocks][queries][16], two blocks a run; the bits of chosen keys are a word a run; sketch_*.h say what each function does.
struct KvcLookupKernel {
  uint64_t key;
  int32_t head_dim, value_dim, queries_per_kv;
  int32_t query_bytes, store_bytes;  // of one number
  void (*append)(const void *key, const void *value, void *key_row, void *value_row);
  void (*prepare)(const void *query, int64_t head_stride, const KvcSketch *, const KvcLookupQuery *);
  void (*rank)(const KvcLookupQuery *, const KvcSketch *, const uint8_t *codes, const float *bias, int64_t runs, int64_t near, int64_t low,
               const KvcRanked *);
  void (*scan)(const KvcLookupQuery *, const KvcSketch *, const KvcRun *, int64_t count, int32_t *scores, int32_t *tops);
  void (*weigh)(const KvcLookupQuery *, const int32_t *scores, int64_t blocks, float *maximum, float *sum);
  void (*share)(const KvcLookupQuery *, const float *log_sum, int32_t by_sum, const int32_t *scores, int64_t blocks, int32_t *ranks,
                int32_t *tops);
  void (*choose)(const int32_t *numbers, int64_t vectors, const int32_t *tops, int64_t top_vectors, int64_t stride, int64_t k,
                 const KvcRun *, uint32_t *chosen);
  KvcWeights (*sum_runs)(const KvcLookupQuery *, int32_t row, int32_t shift, const int32_t *scores, const uint32_t *chosen, const KvcRun *,
                         int64_t count, float *sums);
  void (*attend)(const float *query, int32_t queries, const void *const *keys, const void *const *values, int64_t tokens, const KvcState *);
  float (*logit)(int32_t score, float scale, float base);
  void (*add_runs)(const float *sums, int64_t stride, const float *least, const KvcRun *, int64_t count, const KvcState *);
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
constexpr int64_t kKernelVersion = 7;
struct KvcKernels {
  int64_t version;
  const KvcAttendKernel *const *attend;
  int64_t attends;
  const KvcLinearKernel *const *linear;
  int64_t linears;
  const KvcLookupKernel *const *lookup;
  int64_t lookups;
};
