// Hash tables over keys by random hyperplanes, and which keys a query meets in two of them or more (MagicPIG, Chen et al. 2024).
//
// A vector's bucket in a table is one bit a hyperplane: whether it lies on the side that the plane's normal points to.  Hyperplanes lie in
// blocks of 16, dimension by dimension: normals[block][dim][16]; those of a table stand one behind the other, its first one is the bucket's
// lowest bit.
//
// A part holds the tables of up to 32768 keys: in each table the keys' places by bucket, ascending in each bucket, and where the buckets
// begin or, of fewer keys than buckets, the bucket of each of these places.
//
// Results are the same bits for any number of threads and any instruction set: a product so near to zero that its rounding could choose
// the side is computed again in double.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <new>
#include <vector>

#include "on_threads.h"
#include "vector.h"

#define KVC_EXPORT extern "C" __attribute__((visibility("default")))

struct KvcPlanes {
  const float *normals;  // [blocks][dim][16]
  int64_t blocks, dim, bits, tables;
  double largest;  // norm of a normal
};

struct KvcTables {
  const uint16_t *order;    // [heads][tables][keys]
  const uint16_t *borders;  // [heads][tables][min(keys, 2^bits)]
  int64_t first, keys;      // position of the first key, and how many there are
};

namespace {

constexpr int64_t kTileVectors = 64;             // of a product: what a thread takes at once
constexpr int kRows = kRegisters == 32 ? 8 : 4;  // of them that are summed at once
constexpr int64_t kPartWords = 32768 / 64;
constexpr int64_t kWorthThreads = 1 << 16;  // places to walk over, below which a thread costs more than it brings

double dot_exactly(const float *normal, const float *vector, int64_t dim) {
  double sum = 0;
  for (int64_t d = 0; d < dim; d++) sum += (double)normal[d * 16] * (double)vector[d];
  return sum;
}

// sides[m][block] = a bit for each of the block's 16 hyperplanes.
void find_sides(const KvcPlanes &planes, const float *vectors, int64_t count, uint16_t *sides, int64_t stride) {
  const int64_t dim = planes.dim;
  double bound[kTileVectors];
  for (int64_t m = 0; m < count; m++) {
    double square = 0;
    for (int64_t d = 0; d < dim; d++) square += (double)vectors[m * dim + d] * (double)vectors[m * dim + d];
    bound[m] = (dim + 2) * 0x1p-24 * 1.01 * planes.largest * std::sqrt(square);
  }
  alignas(64) float products[16];
  for (int64_t block = 0; block < planes.blocks; block++) {
    const float *normals = planes.normals + block * dim * 16;
    for (int64_t m = 0; m < count; m += kRows) {
      const int64_t rows = std::min<int64_t>(kRows, count - m);
      const float *row[kRows];
      for (int r = 0; r < kRows; r++) row[r] = vectors + (m + std::min<int64_t>(r, rows - 1)) * dim;
      Floats sum[kRows];
      for (int r = 0; r < kRows; r++) sum[r] = Floats{};
      for (int64_t d = 0; d < dim; d++) {
        const Floats numbers = load(normals + d * 16);
        for (int r = 0; r < kRows; r++) sum[r] = sum[r] + row[r][d] * numbers;
      }
      for (int64_t r = 0; r < rows; r++) {
        store(products, sum[r]);
        uint32_t bits = 0, unsure = 0;
        for (int i = 0; i < 16; i++) {
          bits |= (uint32_t)(products[i] >= 0) << i;
          unsure |= (uint32_t)!(std::fabs(products[i]) > bound[m + r]) << i;
        }
        for (; unsure; unsure &= unsure - 1) {
          const int i = __builtin_ctz(unsure);
          const uint32_t side = dot_exactly(normals + i, row[r], dim) >= 0;
          bits = (bits & ~(1u << i)) | side << i;
        }
        sides[(m + r) * stride + block] = bits;
      }
    }
  }
}

struct Range {
  uint32_t begin, end;
};

// Where a bucket's places lie in one table.
Range bucket(const KvcTables &part, const uint16_t *borders, int64_t buckets, uint32_t code) {
  if (part.keys >= buckets) {
    const uint32_t end = code + 1 < buckets ? borders[code + 1] : part.keys;
    return {borders[code], end};
  }
  const auto range = std::equal_range(borders, borders + part.keys, (uint16_t)code);
  return {(uint32_t)(range.first - borders), (uint32_t)(range.second - borders)};
}

}  // namespace

// codes[heads][tables][count] of vectors[heads][count][dim].
KVC_EXPORT int64_t kvc_lsh_hash(const KvcPlanes *planes, const float *vectors, int64_t heads, int64_t count, uint16_t *codes,
                                int64_t threads) try {
  const int64_t tiles = (count + kTileVectors - 1) / kTileVectors, stride = planes->blocks + 1;  // a code may begin in the last block
  const bool few = heads * count * planes->blocks * planes->dim < kWorthThreads;
  each_on_threads(heads * tiles, few ? 1 : threads, [&](int64_t index, int64_t) {
    static thread_local std::vector<uint16_t> sides;
    sides.assign(kTileVectors * stride, 0);
    const int64_t head = index / tiles, first = index % tiles * kTileVectors, rows = std::min(kTileVectors, count - first);
    find_sides(*planes, vectors + (head * count + first) * planes->dim, rows, sides.data(), stride);
    const uint32_t mask = (1u << planes->bits) - 1;
    for (int64_t table = 0; table < planes->tables; table++) {
      const int64_t bit = table * planes->bits;
      uint16_t *const to = codes + (head * planes->tables + table) * count + first;
      for (int64_t m = 0; m < rows; m++) {
        const uint16_t *from = sides.data() + m * stride + bit / 16;
        to[m] = ((from[0] | (uint32_t)from[1] << 16) >> bit % 16) & mask;
      }
    }
  });
  return 0;
} catch (const std::bad_alloc &) {
  return 1;
}

// Order and borders of a part, of codes[lists][keys]; lists are the tables of all heads.
KVC_EXPORT int64_t kvc_lsh_sort(const uint16_t *codes, int64_t lists, int64_t keys, int64_t bits, uint16_t *order, uint16_t *borders,
                                int64_t threads) try {
  const int64_t buckets = (int64_t)1 << bits;
  each_on_threads(lists, lists * keys < kWorthThreads ? 1 : threads, [&](int64_t list, int64_t) {
    const uint16_t *const from = codes + list * keys;
    uint16_t *const to = order + list * keys, *const border = borders + list * std::min(keys, buckets);
    if (keys >= buckets) {
      static thread_local std::vector<uint32_t> at;
      at.assign(buckets + 1, 0);
      for (int64_t i = 0; i < keys; i++) at[from[i] + 1]++;
      for (int64_t code = 0; code < buckets; code++) at[code + 1] += at[code], border[code] = at[code];
      for (int64_t i = 0; i < keys; i++) to[at[from[i]]++] = i;
      return;
    }
    static thread_local std::vector<uint32_t> pairs;
    pairs.resize(keys);
    for (int64_t i = 0; i < keys; i++) pairs[i] = (uint32_t)from[i] << 16 | (uint32_t)i;
    std::sort(pairs.begin(), pairs.end());
    for (int64_t i = 0; i < keys; i++) to[i] = pairs[i], border[i] = pairs[i] >> 16;
  });
  return 0;
} catch (const std::bad_alloc &) {
  return 1;
}

// The positions of keys that a query meets in two tables or more, ascending: found[heads][queries][room], and how many.  met[heads][queries]:
// places that were walked over.  codes[heads][tables][queries].
KVC_EXPORT int64_t kvc_lsh_search(const KvcTables *parts, int64_t part_count, int64_t heads, int64_t tables, int64_t bits,
                                  const uint16_t *codes, int64_t queries, int64_t *found, int64_t room, int64_t *counts, int64_t *met,
                                  int64_t threads) try {
  const int64_t buckets = (int64_t)1 << bits;
  const bool few = heads * queries * tables * (room / buckets + part_count) < kWorthThreads;
  each_on_threads(heads * queries, few ? 1 : threads, [&](int64_t index, int64_t) {
    static thread_local std::vector<Range> ranges;
    uint64_t once[kPartWords], twice[kPartWords];
    ranges.resize(tables);
    const int64_t head = index / queries, query = index % queries;
    int64_t *to = found + index * room;
    met[index] = 0;
    for (int64_t p = 0; p < part_count; p++) {
      const KvcTables &part = parts[p];
      const int64_t words = (part.keys + 63) / 64, border_count = std::min(part.keys, buckets);
      std::fill(once, once + words, 0), std::fill(twice, twice + words, 0);
      const uint16_t *const orders = part.order + head * tables * part.keys;
      for (int64_t table = 0; table < tables; table++) {
        const uint16_t *borders = part.borders + (head * tables + table) * border_count;
        ranges[table] = bucket(part, borders, buckets, codes[(head * tables + table) * queries + query]);
        __builtin_prefetch(orders + table * part.keys + ranges[table].begin);
      }
      for (int64_t table = 0; table < tables; table++) {
        const uint16_t *const order = orders + table * part.keys;
        met[index] += ranges[table].end - ranges[table].begin;
        for (uint32_t i = ranges[table].begin; i < ranges[table].end; i++) {
          const uint64_t bit = (uint64_t)1 << order[i] % 64;
          const int64_t word = order[i] / 64;
          twice[word] |= once[word] & bit;
          once[word] |= bit;
        }
      }
      for (int64_t word = 0; word < words; word++)
        for (uint64_t left = twice[word]; left; left &= left - 1) *to++ = part.first + word * 64 + __builtin_ctzll(left);
    }
    counts[index] = to - (found + index * room);
  });
  return 0;
} catch (const std::bad_alloc &) {
  return 1;
}
