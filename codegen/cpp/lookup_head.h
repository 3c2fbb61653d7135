// What one call of kvc_native::lookup is about: groups of KV heads, their memory for the call, and where their tokens lie.
#pragma once

#include <atomic>
#include <cstdlib>
#include <memory>
#include <vector>

#include "operators.h"
#include "stores.h"

namespace {

enum Select : int64_t { kPerQueryHead = 0, kUnion = 1, kSum = 2, kMax = 3 };

// A sketch is described by int64 words, which runtime/native_lookup.py writes; behind them, of each part: tokens, addresses of codes,
// position, mean, mean_scale.
enum SketchWord {
  kFirst,  // position
  kParts,
  kTokens,  // of all parts
  kUnits,
  kRunUnits,
  kCoordinates,
  kLooked,  // runs of the first part that are looked at whatever k
  kCentre,
  kMap,
  kStep,
  kFine,
  kRunStep,
  kGaps,
  kCentreCodes,
  kRunBias,
  kTogetherMean,  // of 16 runs
  kTogetherScale,
  kSketchWords
};
constexpr int64_t kSketchPartWords = 5;
// Columns of gaps: runtime/indexes/sketch_gaps.py.
enum Gap { kNearGap = 0, kFarGap = 5, kGapColumns = 10 };

int64_t pieces_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Memory for one call at a time, kept from call to call.  What was taken stays where it is until the next `clear`.
class Scratch {
 public:
  void clear() {
    if (slabs.size() > 1) {  // the next call finds all of it in one
      size_t total = 0;
      for (const Slab &slab : slabs) total += slab.size;
      slabs.clear();
      open(total);
    }
    used = 0;
  }
  template <class T>
  T *take(int64_t count) {
    const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
    if (slabs.empty() || used + bytes > slabs.back().size) open(std::max(bytes, size_t(1) << 20)), used = 0;
    T *memory = (T *)(slabs.back().memory.get() + used);
    used += bytes;
    return memory;
  }

 private:
  struct Free {
    void operator()(char *memory) const { std::free(memory); }
  };
  struct Slab {
    std::unique_ptr<char, Free> memory;
    size_t size;
  };
  std::vector<Slab> slabs;
  size_t used = 0;

  void open(size_t size) {
    slabs.push_back({std::unique_ptr<char, Free>((char *)std::aligned_alloc(64, size)), size});
    STD_TORCH_CHECK(slabs.back().memory, "no memory for the scores of a lookup: ", size, " bytes");
  }
};

struct Group {
  const KvcLookupKernel *kernel;
  const int64_t *store, *sketch;  // sketch null: every earlier token is attended to
  const int64_t *heads;           // KV heads of the site
  int64_t head_count, start, out_row, before, k, select, tail;

  bool finds() const { return sketch && k < sketch[kTokens]; }
  bool shares() const { return select != kPerQueryHead; }
  bool shares_weights() const { return finds() && (select == kSum || select == kMax); }
  const int64_t *part(int64_t i) const { return sketch + kSketchWords + i * kSketchPartWords; }
  // Runs with centres; those of them that are looked at; and all that are, with the keys that were added later.
  int64_t base_runs() const { return part(0)[0] / kRunTokens; }
  int64_t near_runs() const { return std::min(base_runs(), std::max(sketch[kLooked], pieces_of(2 * k, kRunTokens))); }
  int64_t low_runs() const { return std::max<int64_t>(1, 3 * near_runs() / 4); }
  int64_t far_vectors() const { return near_runs() < base_runs() ? pieces_of(base_runs(), 16) : 0; }
  int64_t runs() const { return finds() ? near_runs() + sketch[kTokens] / kRunTokens - base_runs() : 0; }
  int64_t tokens() const { return runs() * kRunTokens; }
  int64_t blocks() const { return 2 * runs(); }
  int64_t chunks() const { return pieces_of(runs(), kScanRuns); }
  int64_t top_vectors() const { return (chunks() - 1) * kTops + std::min(kTops, blocks() - (chunks() - 1) * 2 * kScanRuns); }
  int64_t window_tokens() const { return before + 1 - (finds() ? sketch[kTokens] : 0); }
  int64_t window_position(int64_t i) const { return finds() && i >= sketch[kFirst] ? i + sketch[kTokens] : i; }
  int64_t lists() const { return shares() ? 1 : kernel->queries_per_kv; }
  int64_t list_room() const { return select == kUnion ? std::min(k * kernel->queries_per_kv, tokens()) : k; }
  int64_t state_floats() const { return kernel->queries_per_kv * (kernel->value_dim + 2); }
};

// One KV head of a group.
struct Head {
  const Group *group;
  int64_t head;  // of the group
  KvcSketch sketch;
  const float *gaps;
  KvcLookupQuery query;
  KvcRanked ranked;
  KvcRun *runs, *together;             // that are looked at; sixteens of all runs with centres
  int32_t *scores, *tops;              // [blocks][queries][16], [top vectors][queries][16]
  int32_t *ranks, *rank_tops;          // [blocks][16], [top vectors][16]: of all queries together
  float *chunk_sums, *log_sum;         // [chunks][2][queries], [queries]
  uint32_t *chosen;                    // [queries][runs]; the first where queries share
  int32_t *found;                      // [lists][list_room]: positions
  int64_t *counts;                     // [lists]
  int32_t *shift;                      // [queries]; weights are exp(logit - logit of `shift`)
  float *run_sums, *least, *no_least;  // [queries][runs], [queries]: what keys that are not chosen weigh, and what of it matters
  KvcWeights *weights;                 // [queries]
  float *state, *found_state, *rest_state, *far_state;  // what the pieces are merged into
  const std::atomic<int64_t> *stage_left;               // how much is left of the stage that was planned last
};

// Where tokens of one head lie.
class StoreRows {
 public:
  StoreRows(const Group &group, int64_t head)
      : store(group.store),
        head(head),
        key_bytes(int64_t(group.kernel->head_dim) * group.kernel->store_bytes),
        value_bytes(int64_t(group.kernel->value_dim) * group.kernel->store_bytes),
        part(store + 2) {}
  void find(int64_t position, const void **key, const void **value) {
    if (position < part[4] || position >= part[5])
      for (part = store + 2; position >= part[5];) part += kPartWords;
    *key = (const char *)part[0] + head * part[2] + (position - part[4]) * key_bytes;
    *value = (const char *)part[1] + head * part[3] + (position - part[4]) * value_bytes;
  }

 private:
  const int64_t *store;
  int64_t head, key_bytes, value_bytes;
  const int64_t *part;
};

}  // namespace
