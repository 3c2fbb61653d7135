// linears e411076089bd50d7: linear layers of 1 to 4 tokens, which read each weight once.
// bfloat16 weights [out, in], sums in float32.
// Made by kvcompile from codegen/cpp/linears.cpp.jinja; print it again with: kvcompile SPEC --show source
#include <vector>

#include "rows.h"

namespace {

using Number = Bfloat16;
constexpr int kMaxTokens = 4;
constexpr int kRows = 4;  // rows of the weight that are multiplied at once
constexpr bool kPairs = std::is_same_v<Number, Bfloat16>;
constexpr int kStep = kPairs ? 32 : 16;

// The numbers of x in the order in which `multiply_rows` meets those of a weight.
void spread(const Number *x, int64_t in, float *to) {
  for (int64_t i = 0; i < in; i++) {
    const bool split = kPairs && i < in / kStep * kStep;
    to[split ? i / 32 * 32 + i % 2 * 16 + i % 32 / 2 : i] = widen(x[i]);
  }
}

// y[m][r] = x[m] . weight[r] + bias[r] for M tokens and R rows.
template <int M, int R>
KVC_INLINE void multiply_rows(const float *x, int64_t in, const Number *weight, const Number *bias, Number *y, int64_t y_stride) {
  Floats sum[R][M] = {};
  int64_t i = 0;
  for (; i + kStep <= in; i += kStep)
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      prefetch(weight + r * in + i);
      const Bits lanes = load_bits(weight + r * in + i);
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) {
        sum[r][m] += load(x + m * in + i) * (kPairs ? even(lanes) : (Floats)lanes);
        if constexpr (kPairs) sum[r][m] += load(x + m * in + i + 16) * odd(lanes);
      }
    }
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) {
      float total = sum_lanes(sum[r][m]);
      for (int64_t tail = i; tail < in; tail++) total += x[m * in + tail] * widen(weight[r * in + tail]);
      narrow(bias ? total + widen(bias[r]) : total, y + m * y_stride + r);
    }
}

void multiply(const void *x, int64_t tokens, int64_t in, const void *weight, const void *bias, void *y, int64_t y_stride, int64_t first,
              int64_t last) {
  static thread_local std::vector<float> spread_x;
  spread_x.resize(kMaxTokens * in);
  for (int64_t m = 0; m < tokens; m++) spread((const Number *)x + m * in, in, spread_x.data() + m * in);
  const Number *offset = (const Number *)bias;
  each_rows<kMaxTokens>(0, (int)tokens, [&](auto m, int token) {
    each_rows<kRows>((int)first, (int)last, [&](auto rows, int row) {
      multiply_rows<m, rows>(spread_x.data() + token * in, in, (const Number *)weight + row * in, offset ? offset + row : nullptr,
                             (Number *)y + token * y_stride + row, y_stride);
    });
  });
}

}  // namespace

extern "C" const KvcLinearKernel kvc_linear_e411076089bd50d7 = {0xe411076089bd50d7, sizeof(Number), kMaxTokens, multiply};
