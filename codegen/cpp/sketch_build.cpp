// kvc_native::sketch_*: the parts of making a sketch that torch does in many passes (runtime/native_sketch.py).
//
// Work is cut into pieces by heads, runs and queries only, and no sum goes over two pieces: which thread does what changes no bit.
#include <functional>
#include <limits>
#include <memory>
#include <vector>

#include "operators.h"

// The launcher is built for every processor of its family; what computes is built for newer ones too, and chosen when it is loaded.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define KVC_CLONES __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define KVC_CLONES
#endif
#define KVC_ALWAYS inline __attribute__((always_inline))

namespace {

constexpr int64_t kRunTokens = 32, kLanes = 16, kUnitBytes = 64, kSlots = 16, kFineCoordinates = 8;
constexpr int64_t kSamplePoints = 128, kPowerSteps = 3;  // of a node, for its direction
constexpr int64_t kTogether = 2048;                      // points of a node, from which on one thread cuts it to the end
constexpr float kRounds = 12582912.0f;                   // 1.5 * 2^23: adding it and taking it away rounds to an integer

KVC_ALWAYS float rounded(float x) { return (x + kRounds) - kRounds; }

KVC_ALWAYS float within(float x, float least, float most) {
  x = x < least ? least : x;
  return x > most ? most : x;
}

// exp(x) for x <= 0 to 2 units in the last place; 0 from -87 down.
KVC_ALWAYS float exp_negative(float x) {
  const float bounded = x > -87.0f ? x : -87.0f;
  const float whole = bounded * 1.44269504f + kRounds, n = whole - kRounds;
  const float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  float sum = 1.0f / 5040;
  sum = sum * r + 1.0f / 720;
  sum = sum * r + 1.0f / 120;
  sum = sum * r + 1.0f / 24;
  sum = sum * r + 1.0f / 6;
  sum = sum * r + 0.5f;
  sum = sum * r + 1.0f;
  sum = sum * r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &whole, 4);
  bits = (bits << 23) + 0x3f800000;
  float power;
  std::memcpy(&power, &bits, 4);
  return x > -87.0f ? sum * power : 0.0f;
}

// The sum of `count` rows of numbers that lie side by side, a multiple of 8 each.
KVC_ALWAYS float dot(const float *a, const float *b, int64_t count) {
  float sum[8] = {};
  for (int64_t i = 0; i < count; i += 8)
    for (int64_t j = 0; j < 8; j++) sum[j] += a[i + j] * b[i + j];
  return ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
}

KVC_ALWAYS float maximum(const float *x, int64_t count) {
  float most[16];
  for (int64_t j = 0; j < 16; j++) most[j] = -INFINITY;
  int64_t i = 0;
  for (; i + 16 <= count; i += 16)
    for (int64_t j = 0; j < 16; j++) most[j] = x[i + j] > most[j] ? x[i + j] : most[j];
  for (; i < count; i++) most[0] = x[i] > most[0] ? x[i] : most[0];
  for (int64_t j = 1; j < 16; j++) most[0] = most[j] > most[0] ? most[j] : most[0];
  return most[0];
}

KVC_ALWAYS float log_sum(const float *x, int64_t count) {
  const float top = maximum(x, count);
  if (top == -INFINITY) return top;
  float sum[16] = {};
  int64_t i = 0;
  for (; i + 16 <= count; i += 16)
    for (int64_t j = 0; j < 16; j++) sum[j] += exp_negative(x[i + j] - top);
  for (; i < count; i++) sum[0] += exp_negative(x[i] - top);
  for (int64_t j = 1; j < 16; j++) sum[0] += sum[j];
  return top + std::log(sum[0]);
}

// As unsigned numbers they are ordered as floats are; what is no number comes first.
KVC_ALWAYS uint32_t ordered(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  return x == x ? bits ^ ((bits >> 31 & 0x7fffffff) ^ INT32_MIN) : 0;
}

// The points of one head, `dim` numbers each, a multiple of 8; and their order so far.
struct Points {
  const float *points;
  int64_t dim;
  int32_t *order, *other;
  uint64_t *keys;
};

// The direction in which some points spread most, by a sample: [dim].  centred: memory for the sample.
KVC_ALWAYS void find_direction(const Points &of, int64_t begin, int64_t count, int64_t stride, float *direction, float *centred) {
  const int64_t dim = of.dim, samples = (count + stride - 1) / stride;
  std::vector<float> mean(dim), spread(dim), next(dim);
  for (int64_t i = 0; i < samples; i++) {
    const float *point = of.points + of.order[begin + i * stride] * dim;
    for (int64_t d = 0; d < dim; d++) mean[d] += point[d];
  }
  for (int64_t d = 0; d < dim; d++) mean[d] /= samples;
  for (int64_t i = 0; i < samples; i++) {
    const float *point = of.points + of.order[begin + i * stride] * dim;
    for (int64_t d = 0; d < dim; d++) {
      const float x = point[d] - mean[d];
      centred[i * dim + d] = x, spread[d] += x * x;
    }
  }
  std::fill(direction, direction + dim, 0.0f);
  direction[std::max_element(spread.begin(), spread.end()) - spread.begin()] = 1;
  for (int64_t step = 0; step < kPowerSteps; step++) {
    std::fill(next.begin(), next.end(), 0.0f);
    for (int64_t i = 0; i < samples; i++) {
      const float along = dot(centred + i * dim, direction, dim);
      for (int64_t d = 0; d < dim; d++) next[d] += along * centred[i * dim + d];
    }
    const float factor = 1 / std::max(std::sqrt(dot(next.data(), next.data(), dim)), 1e-30f);
    for (int64_t d = 0; d < dim; d++) direction[d] = next[d] * factor;
  }
}

// Puts the points in `size` slots, `count` of them, in order along their direction; equal ones stay in the order that they had.
KVC_CLONES void arrange(const Points &of, int64_t begin, int64_t count, int64_t size) {
  std::vector<float> direction(of.dim), centred(kSamplePoints * of.dim);
  find_direction(of, begin, count, std::max<int64_t>(1, size / kSamplePoints), direction.data(), centred.data());
  uint64_t *const keys = of.keys + begin;
  int32_t *const order = of.order + begin, *const other = of.other + begin;
  for (int64_t i = 0; i < count; i++) {
    const float along = dot(of.points + order[i] * of.dim, direction.data(), of.dim);
    keys[i] = (uint64_t)ordered(along) << 32 | (uint32_t)i;
  }
  std::sort(keys, keys + count);
  for (int64_t i = 0; i < count; i++) other[i] = order[(uint32_t)keys[i]];
  std::copy(other, other + count, order);
}

// Cuts the points in `size` slots, whose left half is filled first, until no more than a run lies together.
void cut(const Points &of, int64_t begin, int64_t count, int64_t size) {
  for (; count > 0 && size > kRunTokens; size /= 2) {
    arrange(of, begin, count, size);
    cut(of, begin + size / 2, count - size / 2, size / 2);
    count = std::min(count, size / 2);
  }
}

// points [H, T, P] -> order [H, T] int32, whose runs of kRunTokens lie close together: a tree of cuts, as runtime/indexes/balanced.py.
void sketch_order(const Tensor &points, Tensor order) {
  const int64_t heads = points.size(0), tokens = points.size(1), dim = points.size(2), wide = (dim + 7) / 8 * 8;
  STD_TORCH_CHECK(points.dim() == 3 && points.is_contiguous() && points.scalar_type() == ScalarType::Float && tokens % kRunTokens == 0 &&
                      tokens < INT32_MAX / std::max<int64_t>(wide, 1),
                  "points must be contiguous float32 [heads, tokens, dims], whole runs");
  STD_TORCH_CHECK(order.dim() == 2 && order.is_contiguous() && order.scalar_type() == ScalarType::Int && order.size(0) == heads &&
                      order.size(1) == tokens,
                  "order must be int32 [heads, tokens]");
  int32_t *const to = (int32_t *)order.data_ptr();
  for (int64_t head = 0; head < heads; head++)
    for (int64_t i = 0; i < tokens; i++) to[head * tokens + i] = i;
  if (tokens <= kRunTokens) return;
  const float *data = (const float *)points.data_ptr();
  std::vector<float> padded;
  if (wide != dim) {
    padded.resize(heads * tokens * wide);
    for (int64_t i = 0; i < heads * tokens; i++) std::copy(data + i * dim, data + (i + 1) * dim, padded.begin() + i * wide);
    data = padded.data();
  }
  std::vector<int32_t> other(heads * tokens);
  std::vector<uint64_t> keys(heads * tokens);
  int64_t size = kRunTokens;
  while (size < tokens) size *= 2;
  const auto of = [&](int64_t head) {
    return Points{data + head * tokens * wide, wide, to + head * tokens, other.data() + head * tokens, keys.data() + head * tokens};
  };
  for (; size > kTogether; size /= 2) {
    const int64_t nodes = (tokens + size - 1) / size;
    each_on_threads(heads * nodes, [&](int64_t node) {
      const int64_t begin = node % nodes * size, count = std::min(size, tokens - begin);
      arrange(of(node / nodes), begin, count, size);
    });
  }
  const int64_t nodes = (tokens + size - 1) / size;
  const auto finish = [&](int64_t node) {
    const int64_t begin = node % nodes * size;
    cut(of(node / nodes), begin, std::min(size, tokens - begin), size);
  };
  each_on_threads(heads * nodes, finish);
}

// sample [H, T, C], weight [H, T], steps [F, H, C] -> errors [F, H, C]: the weighted mean squared error of coordinates rounded to levels
// of each step.
KVC_CLONES void step_errors(const float *sample, const float *weight, const float *step, int64_t tokens, int64_t dim, float top,
                            float *error) {
  const float middle = top / 2;
  std::vector<float> inverse(dim);
  float *const factor = inverse.data();
  for (int64_t c = 0; c < dim; c++) factor[c] = 1 / step[c];
  std::fill(error, error + dim, 0.0f);
  for (int64_t t = 0; t < tokens; t++) {
    const float *x = sample + t * dim, w = weight[t];
    for (int64_t c = 0; c < dim; c++) {
      const float miss = (rounded(within(x[c] * factor[c] + middle, 0, top)) - middle) * step[c] - x[c];
      error[c] += miss * miss * w;
    }
  }
  for (int64_t c = 0; c < dim; c++) error[c] /= tokens;
}

bool are_numbers(const Tensor &tensor, std::initializer_list<int64_t> sizes) {
  if (tensor.dim() != (int64_t)sizes.size() || !tensor.is_contiguous() || tensor.scalar_type() != ScalarType::Float) return false;
  int64_t dim = 0;
  return std::all_of(sizes.begin(), sizes.end(), [&](int64_t size) { return tensor.size(dim++) == size; });
}

void sketch_step_errors(const Tensor &sample, const Tensor &weight, const Tensor &steps, int64_t bits, Tensor errors) {
  const int64_t heads = sample.size(0), tokens = sample.size(1), dim = sample.size(2), factors = steps.size(0);
  STD_TORCH_CHECK(are_numbers(sample, {heads, tokens, dim}) && are_numbers(weight, {heads, tokens}) &&
                      are_numbers(steps, {factors, heads, dim}) && are_numbers(errors, {factors, heads, dim}),
                  "sample [heads, tokens, dims], weight [heads, tokens], steps and errors [factors, heads, dims]: contiguous float32");
  each_on_threads(factors * heads, [&](int64_t i) {
    const int64_t head = i % heads;
    step_errors((const float *)sample.data_ptr() + head * tokens * dim, (const float *)weight.data_ptr() + head * tokens,
                (const float *)steps.data_ptr() + i * dim, tokens, dim, (1 << bits) - 1, (float *)errors.data_ptr() + i * dim);
  });
}

// What is kept of one run: 2 blocks of codes, the mean of its coordinates, and the mean of its values in bytes.
struct RunSource {
  const float *coordinates, *values, *step;
  int64_t dim, value_dim, units, fine;
};

// The codes of one key's unit from its coordinates, of which `take` are there.
template <bool fine>
KVC_ALWAYS uint32_t unit_codes(const float *x, int64_t take, const float *step) {
  constexpr int64_t wide = fine ? kFineCoordinates : kSlots;
  constexpr float top = fine ? 15 : 3;
  float slots[kSlots] = {};
  if (take == wide)
    for (int64_t i = 0; i < wide; i++) slots[i] = x[i];
  else
    for (int64_t i = 0; i < take; i++) slots[i] = x[i];
  uint32_t levels[kSlots] = {}, codes = 0;
  for (int64_t i = 0; i < wide; i++) levels[i] = (int32_t)rounded(within(slots[i] / step[i] + top / 2, 0, top));
  for (int64_t j = 0; j < 4; j++) {
    const uint32_t low = levels[j] | levels[4 + j] << (fine ? 4 : 2), high = levels[8 + j] << 4 | levels[12 + j] << 6;
    codes |= (fine ? low : low | high) << 8 * j;
  }
  return codes;
}

KVC_CLONES void encode_run(const RunSource &from, const int32_t *place, uint8_t *codes, float *__restrict centre, int8_t *__restrict mean,
                           float *scale, float *__restrict sums) {
  std::fill(centre, centre + from.dim, 0.0f);
  std::fill(sums, sums + from.value_dim, 0.0f);
  for (int64_t token = 0; token < kRunTokens; token++) {
    const float *x = from.coordinates + place[token] * from.dim, *value = from.values + place[token] * from.value_dim;
    for (int64_t c = 0; c < from.dim; c++) centre[c] += x[c];
    for (int64_t e = 0; e < from.value_dim; e++) sums[e] += value[e];
    uint8_t *to = codes + token / kLanes * from.units * kUnitBytes + token % kLanes * 4;
    int64_t at = 0;
    for (int64_t unit = 0; unit < from.units; unit++, to += kUnitBytes) {
      const float *step = from.step + unit * kSlots;
      const int64_t wide = unit < from.fine ? kFineCoordinates : kSlots, take = std::min(std::max<int64_t>(from.dim - at, 0), wide);
      const uint32_t word = unit < from.fine ? unit_codes<true>(x + at, take, step) : unit_codes<false>(x + at, take, step);
      for (int64_t j = 0; j < 4; j++) to[j] = word >> 8 * j;
      at += take;
    }
  }
  for (int64_t c = 0; c < from.dim; c++) centre[c] /= kRunTokens;
  float size = 0;
  for (int64_t e = 0; e < from.value_dim; e++) sums[e] /= kRunTokens, size = std::max(size, std::fabs(sums[e]));
  const float unit = std::max(size / 127, std::numeric_limits<float>::min());
  for (int64_t e = 0; e < from.value_dim; e++) mean[e] = (int8_t)rounded(within(sums[e] / unit, -127, 127));
  *scale = unit;
}

// coordinate [H, T, C], value [H, T, E], order [H, T] int32, step [H, 16 U], fine [H] int64 -> codes uint8 [H, T / 16, U, 64] in this
// order; of its runs, centre [H, R, C], mean int8 [H, R, E], scale [H, R].
void sketch_rows(const Tensor &coordinate, const Tensor &value, const Tensor &order, const Tensor &step, const Tensor &fine, Tensor codes,
                 Tensor centre, Tensor mean, Tensor scale) {
  const int64_t heads = coordinate.size(0), tokens = coordinate.size(1), dim = coordinate.size(2), value_dim = value.size(2);
  const int64_t units = step.size(1) / kSlots, runs = tokens / kRunTokens;
  STD_TORCH_CHECK(are_numbers(coordinate, {heads, tokens, dim}) && are_numbers(value, {heads, tokens, value_dim}) &&
                      are_numbers(step, {heads, units * kSlots}) && are_numbers(centre, {heads, runs, dim}) &&
                      are_numbers(scale, {heads, runs}) && tokens == runs * kRunTokens,
                  "coordinates, values, steps, centres and scales must be contiguous float32 of the same heads and runs");
  STD_TORCH_CHECK(order.is_contiguous() && order.scalar_type() == ScalarType::Int && order.numel() == heads * tokens &&
                      are_integers(fine, 1) && fine.size(0) == heads,
                  "order must be int32 [heads, tokens], fine int64 [heads]");
  STD_TORCH_CHECK(codes.is_contiguous() && codes.scalar_type() == ScalarType::Byte && codes.numel() == heads * tokens * units * 4 &&
                      mean.is_contiguous() && mean.scalar_type() == ScalarType::Char && mean.numel() == heads * runs * value_dim,
                  "codes must be uint8, means int8, of the same heads and runs");
  const int32_t *places = (const int32_t *)order.data_ptr();
  STD_TORCH_CHECK(std::all_of(places, places + heads * tokens, [&](int32_t place) { return place >= 0 && place < tokens; }),
                  "order names keys that are not there");
  constexpr int64_t at_once = 16;
  const int64_t pieces = (runs + at_once - 1) / at_once;
  each_on_threads(heads * pieces, [&](int64_t i) {
    const int64_t head = i / pieces, first = i % pieces * at_once;
    const RunSource from = {(const float *)coordinate.data_ptr() + head * tokens * dim,
                            (const float *)value.data_ptr() + head * tokens * value_dim,
                            (const float *)step.data_ptr() + head * units * kSlots,
                            dim,
                            value_dim,
                            units,
                            ((const int64_t *)fine.data_ptr())[head]};
    std::vector<float> sums(value_dim);
    for (int64_t run = head * runs + first; run < head * runs + std::min(runs, first + at_once); run++)
      encode_run(from, places + run * kRunTokens, (uint8_t *)codes.data_ptr() + run * 2 * units * kUnitBytes,
                 (float *)centre.data_ptr() + run * dim, (int8_t *)mean.data_ptr() + run * value_dim, (float *)scale.data_ptr() + run,
                 sums.data());
  });
}

KVC_CLONES void unpack_block(const uint8_t *codes, int64_t units, int64_t fine, float *to) {
  for (int64_t unit = 0; unit < units; unit++)
    for (int64_t lane = 0; lane < kLanes; lane++) {
      const uint8_t *from = codes + unit * kUnitBytes + lane * 4;
      float *slots = to + (lane * units + unit) * kSlots;
      for (int64_t j = 0; j < 4; j++) {
        const bool wide = unit < fine;
        slots[j] = wide ? from[j] & 15 : from[j] & 3;
        slots[4 + j] = wide ? from[j] >> 4 : from[j] >> 2 & 3;
        slots[8 + j] = wide ? 0 : from[j] >> 4 & 3;
        slots[12 + j] = wide ? 0 : from[j] >> 6;
      }
    }
}

// codes [H, N, U, 64], fine [H] int64 -> levels float32 [H, 16 N, 16 U].
void sketch_levels(const Tensor &codes, const Tensor &fine, Tensor levels) {
  const int64_t heads = codes.size(0), blocks = codes.size(1), units = codes.size(2);
  STD_TORCH_CHECK(codes.dim() == 4 && codes.is_contiguous() && codes.scalar_type() == ScalarType::Byte && codes.size(3) == kUnitBytes &&
                      are_integers(fine, 1) && fine.size(0) == heads && are_numbers(levels, {heads, blocks * kLanes, units * kSlots}),
                  "codes must be uint8 [heads, blocks, units, 64], fine int64 [heads], levels float32 [heads, tokens, slots]");
  constexpr int64_t at_once = 64;
  each_on_threads((heads * blocks + at_once - 1) / at_once, [&](int64_t i) {
    for (int64_t block = i * at_once; block < std::min(heads * blocks, (i + 1) * at_once); block++)
      unpack_block((const uint8_t *)codes.data_ptr() + block * units * kUnitBytes, units,
                   ((const int64_t *)fine.data_ptr())[block / blocks], (float *)levels.data_ptr() + block * kLanes * units * kSlots);
  });
}

// Of one query: each run's log-sum-exp over the keys up to `last`, and how many these are; and the logits of every stride-th run.
KVC_CLONES void add_runs(const float *logit, const int32_t *place, int64_t last, int64_t runs, int64_t stride, float *log_sums, float *seen,
                         float *kept) {
  for (int64_t run = 0; run < runs; run++, place += kRunTokens) {
    float x[kRunTokens];
    int32_t count = 0;
    for (int64_t i = 0; i < kRunTokens; i++) x[i] = logit[place[i]];
    if (run % stride == 0) std::copy(x, x + kRunTokens, kept), kept += kRunTokens;
    for (int64_t i = 0; i < kRunTokens; i++) count += place[i] <= last;
    if (count < kRunTokens)
      for (int64_t i = 0; i < kRunTokens; i++) x[i] = place[i] <= last ? x[i] : -INFINITY;
    log_sums[run] = log_sum(x, kRunTokens), seen[run] = count;
  }
}

// logit [H, C, T] in the order of positions, order [H, T] int32, last [C] int64 -> log_sum, seen [H, C, R]; kept [H, C, 32 R / stride].
void sketch_runs(const Tensor &logit, const Tensor &order, const Tensor &last, int64_t stride, Tensor log_sums, Tensor seen, Tensor kept) {
  const int64_t heads = logit.size(0), queries = logit.size(1), tokens = logit.size(2), runs = tokens / kRunTokens;
  STD_TORCH_CHECK(stride >= 1 && are_numbers(logit, {heads, queries, tokens}) && tokens == runs * kRunTokens, "logits must be float32");
  const int64_t kept_keys = (runs + stride - 1) / stride * kRunTokens;
  STD_TORCH_CHECK(are_numbers(log_sums, {heads, queries, runs}) && are_numbers(seen, {heads, queries, runs}) &&
                      are_numbers(kept, {heads, queries, kept_keys}) && are_integers(last, 1) && last.size(0) == queries &&
                      order.is_contiguous() && order.scalar_type() == ScalarType::Int && order.numel() == heads * tokens,
                  "order, last, log_sums, seen and kept must be of the same heads, queries and runs");
  const int32_t *places = (const int32_t *)order.data_ptr();
  STD_TORCH_CHECK(std::all_of(places, places + heads * tokens, [&](int32_t place) { return place >= 0 && place < tokens; }),
                  "order names keys that are not there");
  each_on_threads(heads * queries, [&](int64_t i) {
    add_runs((const float *)logit.data_ptr() + i * tokens, places + i / queries * tokens, ((const int64_t *)last.data_ptr())[i % queries],
             runs, stride, (float *)log_sums.data_ptr() + i * runs, (float *)seen.data_ptr() + i * runs,
             (float *)kept.data_ptr() + i * kept_keys);
  });
}

// Sums of a query, in the order of runtime/native_sketch.py's columns.
enum Sum { kLeftTrue, kLeftGuess, kReadTrue, kReadGuess, kFarTrue, kFarRuns, kLowGuess, kLowRuns, kError, kSumColumns };

struct Chosen {
  int64_t near, low, k;  // runs that are looked at and the lowest of these, and keys that are read
};

KVC_ALWAYS float deviation(const float *truth, const float *guess, int64_t count) {
  double sum = 0, squares = 0;
  for (int64_t first = 0; first < count; first += kRunTokens) {
    float part[8] = {}, square[8] = {};
    for (int64_t i = first; i < first + kRunTokens; i += 8)
      for (int64_t j = 0; j < 8; j++) {
        const float miss = truth[i + j] - guess[i + j];
        part[j] += miss, square[j] += miss * miss;
      }
    for (int64_t j = 0; j < 8; j++) sum += part[j], squares += square[j];
  }
  return std::sqrt(std::max(0.0, (squares - sum * sum / count) / (count - 1)));
}

// The k-th largest of `count` numbers, a multiple of 8.  memory: as many.
KVC_ALWAYS float largest(const float *x, int64_t count, int64_t k, float *memory) {
  float least = -INFINITY;
  const int64_t groups = count / 8;
  if (k <= groups) {  // as many groups reach the k-th largest of their maxima, so no smaller number counts
    for (int64_t g = 0; g < groups; g++) memory[g] = *std::max_element(x + g * 8, x + g * 8 + 8);
    std::nth_element(memory, memory + k - 1, memory + groups, std::greater<float>());
    least = memory[k - 1];
  }
  int64_t kept = 0;
  for (int64_t i = 0; i < count; i++) memory[kept] = x[i], kept += x[i] >= least;
  std::nth_element(memory, memory + k - 1, memory + kept, std::greater<float>());
  return memory[k - 1];
}

// truth, guess [32 runs], run [runs]: of one query, whose keys end at `last`.  memory: 7 numbers a key.
KVC_CLONES void sum_kinds(const float *truth, const float *guess, const float *run, const int32_t *place, int64_t last, int64_t runs,
                          const Chosen &chosen, float *memory, float *sums) {
  const int64_t keys = runs * kRunTokens, near_keys = chosen.near * kRunTokens;
  sums[kError] = deviation(truth, guess, keys);
  std::vector<uint64_t> rank(runs);  // of the runs, the best first; of equal ones the earlier
  for (int64_t r = 0; r < runs; r++) rank[r] = (uint64_t)~ordered(run[r]) << 32 | (uint32_t)r;
  std::sort(rank.begin(), rank.end());
  float *near_true = memory, *near_guess = near_true + keys, *left_true = near_guess + keys, *left_guess = left_true + keys;
  float *read_true = left_guess + keys, *read_guess = read_true + keys, *far = read_guess + keys;
  const auto take = [&](const float *x, int64_t n, float *to) {  // what the query sees of the run that is n-th best
    const int64_t first = (uint32_t)rank[n] * kRunTokens;
    for (int64_t i = 0; i < kRunTokens; i++) to[i] = place[first + i] <= last ? x[first + i] : -INFINITY;
  };
  for (int64_t n = 0; n < chosen.near; n++) take(truth, n, near_true + n * kRunTokens), take(guess, n, near_guess + n * kRunTokens);
  for (int64_t i = 0; i < near_keys; i++) far[i] = near_guess[i] == near_guess[i] ? near_guess[i] : -INFINITY;
  const float least = largest(far, near_keys, chosen.k, left_true);
  int64_t equals = chosen.k, left = 0, read = 0;
  for (int64_t i = 0; i < near_keys; i++) equals -= far[i] > least;
  for (int64_t i = 0; i < near_keys; i++) {
    const bool equal = far[i] == least, is_read = far[i] > least || (equal && equals > 0);
    equals -= equal;
    left_true[left] = read_true[read] = near_true[i], left_guess[left] = read_guess[read] = near_guess[i];
    left += !is_read, read += is_read;
  }
  const int64_t above = chosen.near - chosen.low, far_runs = runs - chosen.near;
  sums[kLeftTrue] = log_sum(left_true, left), sums[kLeftGuess] = log_sum(left_guess, left);
  sums[kReadTrue] = log_sum(read_true, read), sums[kReadGuess] = log_sum(read_guess, read);
  sums[kLowGuess] = log_sum(near_guess + above * kRunTokens, chosen.low * kRunTokens);
  for (int64_t n = 0; n < far_runs; n++) take(truth, chosen.near + n, far + n * kRunTokens);
  sums[kFarTrue] = log_sum(far, far_runs * kRunTokens);
  for (int64_t r = 0; r < runs; r++) far[r] = run[(uint32_t)rank[r]];
  sums[kFarRuns] = log_sum(far + chosen.near, far_runs), sums[kLowRuns] = log_sum(far + above, chosen.low);
}

// truth, guess [H, C, 32 R], run [H, C, R] of some runs, order [H, 32 R] int32: their keys; last [C] int64 -> sums [H, C, Sum].
void sketch_gaps(const Tensor &truth, const Tensor &guess, const Tensor &run, const Tensor &order, const Tensor &last, int64_t near,
                 int64_t low, int64_t k, Tensor sums) {
  const int64_t heads = run.size(0), queries = run.size(1), runs = run.size(2), keys = runs * kRunTokens;
  STD_TORCH_CHECK(are_numbers(truth, {heads, queries, keys}) && are_numbers(guess, {heads, queries, keys}) &&
                      are_numbers(run, {heads, queries, runs}) && are_numbers(sums, {heads, queries, kSumColumns}) &&
                      order.is_contiguous() && order.scalar_type() == ScalarType::Int && order.numel() == heads * keys &&
                      are_integers(last, 1) && last.size(0) == queries,
                  "logits, guesses, order, last and sums must be of the same heads, queries and runs");
  STD_TORCH_CHECK(low >= 1 && low <= near && near <= runs && k >= 1 && k <= near * kRunTokens, "no such choice of runs and keys");
  each_on_threads(heads * queries, [&](int64_t i) {
    const std::unique_ptr<float[]> memory(new float[7 * keys]);
    const Chosen chosen = {near, low, k};
    const int64_t until = ((const int64_t *)last.data_ptr())[i % queries];
    sum_kinds((const float *)truth.data_ptr() + i * keys, (const float *)guess.data_ptr() + i * keys,
              (const float *)run.data_ptr() + i * runs, (const int32_t *)order.data_ptr() + i / queries * keys, until, runs, chosen,
              memory.get(), (float *)sums.data_ptr() + i * kSumColumns);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(kvc_native, m) {
  m.def("sketch_order(Tensor points, Tensor(a!) order) -> ()");
  m.def("sketch_step_errors(Tensor sample, Tensor weight, Tensor steps, int bits, Tensor(a!) errors) -> ()");
  m.def(
      "sketch_rows(Tensor coordinate, Tensor value, Tensor order, Tensor step, Tensor fine, Tensor(a!) codes, Tensor(b!) centre, "
      "Tensor(c!) mean, Tensor(d!) scale) -> ()");
  m.def("sketch_levels(Tensor codes, Tensor fine, Tensor(a!) levels) -> ()");
  m.def("sketch_runs(Tensor logit, Tensor order, Tensor last, int stride, Tensor(a!) log_sums, Tensor(b!) seen, Tensor(c!) kept) -> ()");
  m.def("sketch_gaps(Tensor truth, Tensor guess, Tensor run, Tensor order, Tensor last, int near, int low, int k, Tensor(a!) sums) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(kvc_native, CPU, m) {
  m.impl("sketch_order", TORCH_BOX(&sketch_order));
  m.impl("sketch_step_errors", TORCH_BOX(&sketch_step_errors));
  m.impl("sketch_rows", TORCH_BOX(&sketch_rows));
  m.impl("sketch_levels", TORCH_BOX(&sketch_levels));
  m.impl("sketch_runs", TORCH_BOX(&sketch_runs));
  m.impl("sketch_gaps", TORCH_BOX(&sketch_gaps));
}
