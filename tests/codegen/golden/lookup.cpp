// lookup 3d3f69f163c19a9b: a query sees a window, the keys that a sketch finds, and an estimate of the others.
// 3 queries a KV head, head_dim 64, value_dim 64; float32 queries over bfloat16 keys and values, a token a row, sums in float32.
// Made by kvcompile from codegen/cpp/lookup.cpp.jinja; print it again with: kvcompile SPEC --show source
#include "lookup.h"

namespace {

struct Shape {
  using Query = float;
  using Stored = Bfloat16;
  static constexpr int kHeadDim = 64;
  static constexpr int kValueDim = 64;
  static constexpr int kQueries = 3;  // queries that share a KV head
  static constexpr float kScale = 0.125f;
  static constexpr bool kCapped = false;
  static constexpr float kSoftCap = 0.0f;
};

// key: [head_dim], value: [value_dim]; rows of the store
void append(const void *key, const void *value, void *key_row, void *value_row) { append_row<Shape>(key, value, key_row, value_row); }

void prepare(const void *query, int64_t head_stride, const KvcSketch *sketch, const KvcLookupQuery *to) {
  prepare_query<Shape>(query, head_stride, sketch, *to);
}

void scan(const KvcLookupQuery *query, const KvcSketch *sketch, const uint8_t *codes, int64_t first, int64_t blocks, int32_t *scores,
          int32_t *tops) {
  scan_sketch<Shape>(*query, *sketch, codes, first, blocks, scores, tops);
}

void weigh(const KvcLookupQuery *query, const int32_t *scores, int64_t blocks, float *maximum, float *sum) {
  sum_weights<Shape>(*query, scores, blocks, maximum, sum);
}

void share(const KvcLookupQuery *query, const float *log_sum, int32_t by_sum, const int32_t *scores, int64_t first, int64_t blocks,
           int32_t *ranks, int32_t *tops) {
  share_weights<Shape>(*query, log_sum, by_sum, scores, first, blocks, ranks, tops);
}

void attend(const float *query, int32_t queries, const void *const *keys, const void *const *values, int64_t tokens,
            const KvcState *state) {
  attend_rows<Shape>(query, queries, keys, values, tokens, *state);
}

void rest(const KvcLookupQuery *query, const int32_t *top, const int32_t *scores, const uint32_t *chosen, int64_t chosen_stride,
          const int8_t *mean, const float *mean_scale, int64_t runs, const KvcState *state) {
  add_rest<Shape>(*query, top, scores, chosen, chosen_stride, mean, mean_scale, runs, *state);
}

}  // namespace

extern "C" const KvcLookupKernel kvc_lookup_3d3f69f163c19a9b = {
    0x3d3f69f163c19a9b, Shape::kHeadDim, Shape::kValueDim, Shape::kQueries, sizeof(Shape::Query), sizeof(Shape::Stored),
    append, prepare, scan, weigh, share, choose_largest, find_tops<Shape>, attend, rest, logit_of<Shape>};
