// What the operators of this library share: torch's threads, the states of attention, and what they ask of their tensors.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "kernel.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The kernel that was loaded under a key, or null.
const KvcAttendKernel *find_attend_kernel(uint64_t key);
const KvcLookupKernel *find_lookup_kernel(uint64_t key);

namespace {

constexpr int64_t kInlineTokens = 512;  // so little work is done at once by the calling thread

template <class F>
void on_threads(int64_t threads, const F &work) {  // work(thread, threads)
  if (threads <= 1) return work(0, 1);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; thread++) work(thread, threads);
  });
}

template <class F>
void each_on_threads(int64_t count, const F &work) {  // work(index), the next one to whoever is free
  std::atomic<int64_t> next{0};
  on_threads(std::min<int64_t>(count, torch::stable::get_num_threads()), [&](int64_t, int64_t) {
    for (int64_t i; (i = next++) < count;) work(i);
  });
}

inline KvcState state_at(float *memory, int64_t rows, int64_t value_dim) {
  return {memory, memory + rows * value_dim, memory + rows * (value_dim + 1)};
}

// The state of some keys joins that of the keys before them.
inline void merge(const KvcState &into, const KvcState &other, int64_t rows, int64_t value_dim) {
  for (int64_t r = 0; r < rows; r++) {
    const float top = std::max(into.maximum[r], other.maximum[r]);
    if (top == -INFINITY) continue;
    const auto share = [top](float maximum) { return maximum == top ? 1.0f : std::exp(maximum - top); };
    const float keep = share(into.maximum[r]), take = share(other.maximum[r]);
    into.maximum[r] = top;
    into.sum[r] = into.sum[r] * keep + other.sum[r] * take;
    for (int64_t e = 0; e < value_dim; e++)
      into.out[r * value_dim + e] = into.out[r * value_dim + e] * keep + other.out[r * value_dim + e] * take;
  }
}

inline uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return x != x ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// Writes the attention of one query; sink: null, or one more logit of the denominator.
inline void write_row(const float *out, float maximum, float sum, const float *sink, int64_t value_dim, char *to, int32_t bytes) {
  float factor = sum == 0 ? 0 : 1 / sum;  // NaN stays NaN
  if (sink) {
    const float top = std::max(maximum, *sink), scale = std::exp(maximum - top);
    factor = scale / (sum * scale + std::exp(*sink - top));
  }
  if (bytes == 4)
    for (int64_t e = 0; e < value_dim; e++) ((float *)to)[e] = out[e] * factor;
  else
    for (int64_t e = 0; e < value_dim; e++) ((uint16_t *)to)[e] = to_bfloat16(out[e] * factor);
}

// The tensor, or a copy of it in which the numbers of a token and head lie side by side.
inline Tensor rows_of(const Tensor &tensor, const char *name) {
  STD_TORCH_CHECK(tensor.dim() == 4 && tensor.size(0) == 1, name, " must be [1, heads, tokens, dim]");
  return tensor.stride(3) == 1 || tensor.size(3) == 1 ? tensor : torch::stable::contiguous(tensor);
}

// Of the numbers that a kernel knows by their size.
inline ScalarType number_type(int32_t bytes) { return bytes == 4 ? ScalarType::Float : ScalarType::BFloat16; }

inline bool are_integers(const Tensor &tensor, int64_t dims) {
  return tensor.dim() == dims && tensor.is_contiguous() && tensor.scalar_type() == ScalarType::Long;
}

inline bool are_of_heads(const Tensor &numbers, int64_t heads) {
  return numbers.dim() == 1 && numbers.is_contiguous() && numbers.size(0) == heads && numbers.scalar_type() == ScalarType::Float;
}

}  // namespace
