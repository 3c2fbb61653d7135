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

}  // namespace

extern "C" const KvcLookupKernel kvc_lookup_3d3f69f163c19a9b = lookup_kernel<Shape>(0x3d3f69f163c19a9b);
