// kvc_native::lookup: appends one new token a session and attends to a window, to the keys that a sketch finds, and to an estimate of
// the others.
//
// The work is cut into phases, and each phase into pieces whose borders depend on a session's own length only; the states of pieces are
// merged in their order.  So which thread does what changes no bit.
//
// Where every query head chooses for itself, many keys are sifted: a sample of them tells from which score on a key may be chosen, and the
// scan keeps only such candidates and sums over runs of the others.  Where that does not work out the scores of all keys are written, as
// for a few keys and for heads that choose together.
#include <cstdlib>
#include <memory>
#include <numeric>
#include <optional>
#include <vector>

#include "kernel.h"
#include "operators.h"
#include "stores.h"

namespace {

// What one row of the operator's table says: the KV heads of a site that share a policy, in one session.
enum Column { kKernel, kStore, kSketch, kHeads, kHeadCount, kStart, kOutRow, kBefore, kK, kSelect, kTail, kColumnCount };
enum Select : int64_t { kPerQueryHead = 0, kUnion = 1, kSum = 2, kMax = 3 };

// A sketch is described by int64 words, which runtime/native_lookup.py writes: first position, parts, units, tokens in all, addresses of
// centre, map, fine, bias; and of each part: tokens, addresses of codes, position, mean, mean_scale.
constexpr int64_t kSketchWords = 8, kSketchPartWords = 5;

constexpr int64_t kScanTokens = kScanBlocks * kBlockTokens;
constexpr int64_t kInlineKeys = 4096;  // a call over so few keys is done by the calling thread

constexpr int64_t kSiftedTokens = 4096, kSiftedShare = 8;  // sifted: so many keys or more, of which at most 1 / kSiftedShare are chosen
constexpr int64_t kSampled = 24;                           // of the keys that a head chooses, a sample has about so many
constexpr int64_t kSampledTokens = 1024;                   // at least; at most 1 / kSiftedShare of all
constexpr int64_t kSampledAhead = 16;                      // blocks of a sample that are asked for before they are read
constexpr int64_t kListRoom = kScanTokens + kBlockTokens;  // of a chunk's candidates
constexpr float kLargestAbove = 60;                        // a logit further above the shift would not do for sums in float32
constexpr float kLost = 1.49e-8f;                          // 2^-26: so small a share of a sum is lost in its rounding

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

  bool finds() const { return sketch && k < sketch[3]; }
  bool shares() const { return select != kPerQueryHead; }
  bool sifts() const {
    return finds() && (select == kPerQueryHead || select == kUnion) && sketch[3] >= kSiftedTokens && k * kSiftedShare <= sketch[3];
  }
  int64_t sample_blocks() const {
    return std::min(std::max(kSampled * sketch[3] / k, kSampledTokens), sketch[3] / kSiftedShare) / kBlockTokens;
  }
  // From the rank of a sample's score on: the k-th best of all lies below it by chance as good as never.
  int64_t sample_rank() const {
    const int64_t tokens = sample_blocks() * kBlockTokens;
    const double expected = double(k) * tokens / sketch[3];
    return std::min(int64_t(expected + 6 * std::sqrt(expected) + 4), tokens);
  }
  int64_t found_tokens() const { return finds() ? sketch[3] : 0; }
  int64_t window_tokens() const { return before + 1 - found_tokens(); }
  int64_t window_position(int64_t i) const { return finds() && i >= sketch[0] ? i + sketch[3] : i; }
  int64_t blocks() const { return found_tokens() / kBlockTokens; }
  int64_t chunks() const { return pieces_of(blocks(), kScanBlocks); }
  int64_t top_vectors() const { return (chunks() - 1) * kTops + std::min(kTops, blocks() - (chunks() - 1) * kScanBlocks); }
  int64_t words() const { return found_tokens() / 32; }
  int64_t lists() const { return shares() ? 1 : kernel->queries_per_kv; }
  int64_t list_room() const { return select == kUnion ? std::min(k * kernel->queries_per_kv, found_tokens()) : k; }
  int64_t state_floats() const { return kernel->queries_per_kv * (kernel->value_dim + 2); }
};

// One KV head of a group.
struct Head {
  const Group *group;
  int64_t head;  // of the group
  KvcSketch sketch;
  float bias;
  std::vector<KvcSketchRows> rows;
  KvcLookupQuery query;
  int32_t *scores, *tops;       // [blocks][queries][16], [top vectors][queries][16]
  int32_t *ranks, *rank_tops;   // [blocks][16], [top vectors][16]: of all queries together
  float *chunk_sums, *log_sum;  // [chunks][2][queries], [queries]
  uint32_t *chosen;             // [queries][words]; the first where queries share
  int32_t *top;                 // [queries]: no key that is not chosen has a larger score
  int32_t *found;               // [lists][list_room]: positions
  int64_t *counts;              // [lists]
  float *state;                 // what the pieces are merged into
  bool sifted;                  // the rest holds, and no scores of all keys are there
  int32_t *threshold, *shift;   // [queries]
  int32_t *candidates;          // [chunks][1 + queries][kListRoom]: rows, scores
  int64_t *candidate_counts;    // [chunks]
  float *run_sums, *least;      // [queries][words], [queries]: what `sift` sums, and what of it matters
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

struct Call {
  const char *query, *key, *value;
  int64_t query_head, query_token, key_head, key_token, value_head, value_token;  // strides in elements
  const float *sinks;                                                             // [query_heads], or null
  char *out;                                                                      // [rows][query_heads][value_dim]
  int64_t query_heads;
};

// Thresholds and shifts from a sample, the same blocks whatever the query.
void look_ahead(const Head &head) {
  const Group &group = *head.group;
  const KvcLookupKernel &kernel = *group.kernel;
  const int64_t queries = kernel.queries_per_kv, blocks = group.blocks(), sampled = group.sample_blocks();
  int32_t *const scores = head.candidates, *const tops = scores + sampled * queries * 16;
  const KvcSketchRows *rows = head.rows.data();
  const uint8_t *codes[kSampledAhead];  // of the blocks that come next
  for (int64_t i = 0, first = 0; i < sampled + kSampledAhead; i++) {
    if (i >= kSampledAhead)
      kernel.scan(&head.query, &head.sketch, codes[i % kSampledAhead], 0, 1, scores + (i - kSampledAhead) * queries * 16, tops);
    if (i >= sampled) continue;
    const int64_t block = i * blocks / sampled, bytes = head.sketch.units * 64;
    for (; block - first >= rows->tokens / kBlockTokens; rows++) first += rows->tokens / kBlockTokens;
    codes[i % kSampledAhead] = rows->codes + (block - first) * bytes;
    for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(codes[i % kSampledAhead] + byte);
  }
  for (int64_t q = 0; q < queries; q++)
    head.threshold[q] = kernel.find_threshold(scores + q * 16, sampled, queries * 16, group.sample_rank(), head.shift + q);
}

// The new token joins the store; its queries become what the kernel's functions want.
void prepare(const Call &call, Head &head) {
  const Group &group = *head.group;
  const KvcLookupKernel &kernel = *group.kernel;
  const int64_t kv_head = group.heads[head.head];
  const void *key, *value;
  StoreRows(group, head.head).find(group.before, &key, &value);
  kernel.append(call.key + (group.start * call.key_token + kv_head * call.key_head) * kernel.query_bytes,
                call.value + (group.start * call.value_token + kv_head * call.value_head) * kernel.query_bytes, const_cast<void *>(key),
                const_cast<void *>(value));
  kernel.prepare(call.query + (group.start * call.query_token + kv_head * kernel.queries_per_kv * call.query_head) * kernel.query_bytes,
                 call.query_head, group.finds() ? &head.sketch : nullptr, &head.query);
  if (group.sifts()) look_ahead(head);
}

// Calls f(rows of one part, first block in it, first block of all, blocks) for the blocks of a chunk.
template <class F>
void each_part(const Head &head, int64_t chunk, const F &f) {
  const int64_t begin = chunk * kScanBlocks, end = std::min(head.group->blocks(), begin + kScanBlocks);
  int64_t first = 0;
  for (const KvcSketchRows &rows : head.rows) {
    const int64_t blocks = rows.tokens / kBlockTokens, from = std::max(begin, first), to = std::min(end, first + blocks);
    if (from < to) f(rows, from - first, from, to - from);
    first += blocks;
  }
}

void scan(const Head &head, int64_t chunk) {
  const KvcLookupKernel &kernel = *head.group->kernel;
  const int64_t queries = kernel.queries_per_kv, vectors = std::min(kTops, head.group->blocks() - chunk * kScanBlocks);
  int32_t *tops = head.tops + chunk * kTops * queries * 16;
  std::fill(tops, tops + vectors * queries * 16, INT32_MIN);
  each_part(head, chunk, [&](const KvcSketchRows &rows, int64_t block, int64_t all, int64_t blocks) {
    kernel.scan(&head.query, &head.sketch, rows.codes + block * head.sketch.units * 64, all % kScanBlocks, blocks,
                head.scores + all * queries * 16, tops);
  });
}

void sift(const Head &head, int64_t chunk) {
  const Group &group = *head.group;
  int32_t *const list = head.candidates + chunk * (1 + group.kernel->queries_per_kv) * kListRoom;
  KvcSifted sifted = {head.threshold, head.shift, kListRoom, list, list + kListRoom, 0, nullptr, group.words()};
  each_part(head, chunk, [&](const KvcSketchRows &rows, int64_t block, int64_t all, int64_t blocks) {
    if (group.tail) sifted.sums = head.run_sums + all / 2;
    group.kernel->sift(&head.query, &head.sketch, rows.codes + block * head.sketch.units * 64, all * kBlockTokens, blocks / 2, &sifted);
  });
  head.candidate_counts[chunk] = sifted.count;
}

// Chooses among the candidates; those that are not chosen join the sums.  Leaves `sifted` false where there are too few, or where a sum
// may be too large.
void pick(Head &head) {
  static thread_local std::vector<int32_t> indices, scores;
  static thread_local std::vector<uint32_t> chosen;
  const Group &group = *head.group;
  const KvcLookupKernel &kernel = *group.kernel;
  const int64_t queries = kernel.queries_per_kv,
                count = std::accumulate(head.candidate_counts, head.candidate_counts + group.chunks(), int64_t(0));
  const int64_t words = pieces_of(count, 32), room = words * 32;
  head.sifted = false;
  indices.resize(room), scores.resize(queries * room), chosen.resize(queries * words);
  for (int64_t q = -1; q < queries; q++) {
    int32_t *to = q < 0 ? indices.data() : scores.data() + q * room;
    for (int64_t chunk = 0; chunk < group.chunks(); chunk++) {
      const int32_t *from = head.candidates + (chunk * (1 + queries) + 1 + q) * kListRoom;
      to = std::copy(from, from + head.candidate_counts[chunk], to);
    }
    std::fill(to, to + room - count, INT32_MIN);
  }
  for (int64_t q = 0; q < queries; q++) {
    const int32_t largest = kernel.pick(scores.data() + q * room, indices.data(), room / 16, group.k, head.threshold[q], head.rows.data(),
                                        chosen.data() + q * words);
    const float scale = head.query.scale[q], base = head.query.base[q];
    if (largest == INT32_MIN || kernel.logit(largest, scale, base) - kernel.logit(head.shift[q], scale, base) > kLargestAbove) return;
  }
  if (group.shares())
    for (int64_t q = 1; q < queries; q++)
      for (int64_t w = 0; w < words; w++) chosen[w] |= chosen[q * words + w];
  for (int64_t list = 0; list < group.lists(); list++) {
    int32_t *const begin = head.found + list * group.list_room(), *to = begin;
    const KvcSketchRows *rows = head.rows.data();
    int64_t first = 0;
    for (int64_t w = 0; w < words; w++)
      for (uint32_t left = chosen[list * words + w]; left; left &= left - 1) {
        const int64_t index = indices[w * 32 + __builtin_ctz(left)];
        for (; index - first >= rows->tokens; rows++) first += rows->tokens;
        *to++ = rows->position[index - first];
      }
    head.counts[list] = to - begin;
  }
  for (int64_t q = 0; q < (group.tail ? queries : 0); q++) {
    const float sum = kernel.put_back(&head.query, q, head.shift[q], scores.data() + q * room, indices.data(), count,
                                      chosen.data() + (group.shares() ? 0 : q * words), head.run_sums + q * group.words(), group.words());
    head.least[q] = sum * kLost / group.words();
  }
  head.sifted = true;
}

void weigh(const Head &head, int64_t chunk) {
  const int64_t queries = head.group->kernel->queries_per_kv, first = chunk * kScanBlocks;
  float *sums = head.chunk_sums + chunk * 2 * queries;
  head.group->kernel->weigh(&head.query, head.scores + first * queries * 16, std::min(kScanBlocks, head.group->blocks() - first), sums,
                            sums + queries);
}

void add_sums(const Head &head) {
  const int64_t queries = head.group->kernel->queries_per_kv;
  for (int64_t q = 0; q < queries; q++) {
    float maximum = head.chunk_sums[q], sum = head.chunk_sums[queries + q];
    for (int64_t chunk = 1; chunk < head.group->chunks(); chunk++) {
      const float *other = head.chunk_sums + chunk * 2 * queries + q, top = std::max(maximum, other[0]);
      sum = sum * std::exp(maximum - top) + other[queries] * std::exp(other[0] - top), maximum = top;
    }
    head.log_sum[q] = maximum + std::log(sum);
  }
}

void share(const Head &head, int64_t chunk) {
  const int64_t queries = head.group->kernel->queries_per_kv, first = chunk * kScanBlocks;
  const int64_t blocks = std::min(kScanBlocks, head.group->blocks() - first);
  int32_t *tops = head.rank_tops + chunk * kTops * 16;
  std::fill(tops, tops + std::min(kTops, blocks) * 16, INT32_MIN);
  head.group->kernel->share(&head.query, head.log_sum, head.group->select == kSum, head.scores + first * queries * 16, 0, blocks,
                            head.ranks + first * 16, tops);
}

// Sets the bits of the keys that one query chooses, or all of them.
void choose(const Head &head, int64_t query) {
  const Group &group = *head.group;
  const int64_t queries = group.kernel->queries_per_kv;
  uint32_t *chosen = head.chosen + query * group.words();
  if (group.select == kSum || group.select == kMax)
    group.kernel->choose(head.ranks, group.blocks(), head.rank_tops, group.top_vectors(), 16, group.k, head.rows.data(), chosen);
  else
    head.top[query] = group.kernel->choose(head.scores + query * 16, group.blocks(), head.tops + query * 16, group.top_vectors(),
                                           queries * 16, group.k, head.rows.data(), chosen);
}

// The positions of the chosen keys, in the order of the sketch.
void collect(const Head &head, int64_t list) {
  const Group &group = *head.group;
  uint32_t *chosen = head.chosen + list * group.words();
  if (group.select == kUnion)
    for (int64_t q = 1; q < group.kernel->queries_per_kv; q++)
      for (int64_t w = 0; w < group.words(); w++) chosen[w] |= head.chosen[q * group.words() + w];
  if (group.select == kSum || group.select == kMax) group.kernel->find_tops(head.scores, chosen, group.words(), head.top);
  int32_t *const begin = head.found + list * group.list_room(), *to = begin;
  for (const KvcSketchRows &rows : head.rows)
    for (int64_t w = 0; w < rows.tokens / 32; w++)
      for (uint32_t left = *chosen++, base = (uint32_t)w * 32; left; left &= left - 1) *to++ = rows.position[base + __builtin_ctz(left)];
  head.counts[list] = to - begin;
}

// At most kChunkTokens keys of the window (list -1) or of a list, from the one numbered `first` on.
void attend(const Head &head, int64_t list, int64_t first, int64_t tokens, float *memory) {
  const Group &group = *head.group;
  const KvcLookupKernel &kernel = *group.kernel;
  const void *keys[kChunkTokens], *values[kChunkTokens];
  StoreRows store(group, head.head);
  const int32_t *found = head.found + list * group.list_room() + first;
  for (int64_t i = 0; i < tokens; i++) store.find(list < 0 ? group.window_position(first + i) : found[i], keys + i, values + i);
  const bool alone = list >= 0 && !group.shares();
  KvcState state = state_at(memory, kernel.queries_per_kv, kernel.value_dim);
  if (alone) state = {state.out + list * kernel.value_dim, state.maximum + list, state.sum + list};
  kernel.attend(head.query.query + (alone ? list * kernel.head_dim : 0), alone ? 1 : kernel.queries_per_kv, keys, values, tokens, &state);
}

// An estimate of the keys of a chunk that are not chosen.
void rest(const Head &head, int64_t chunk, float *memory) {
  const Group &group = *head.group;
  const KvcLookupKernel &kernel = *group.kernel;
  const int64_t queries = kernel.queries_per_kv;
  std::fill(memory, memory + group.state_floats(), 0.0f);
  const KvcState state = state_at(memory, queries, kernel.value_dim);
  each_part(head, chunk, [&](const KvcSketchRows &rows, int64_t block, int64_t all, int64_t blocks) {
    const int8_t *mean = rows.mean + block / 2 * kernel.value_dim;
    const float *mean_scale = rows.mean_scale + block / 2;
    if (head.sifted) return kernel.add_runs(head.run_sums + all / 2, group.words(), head.least, mean, mean_scale, blocks / 2, &state);
    kernel.add_rest(&head.query, head.top, head.scores + all * queries * 16, head.chosen + all / 2, group.shares() ? 0 : group.words(),
                    mean, mean_scale, blocks / 2, &state);
  });
  const int32_t *const top = head.sifted ? head.shift : head.top;
  for (int64_t q = 0; q < queries; q++)
    state.maximum[q] = state.sum[q] == 0 ? -INFINITY : kernel.logit(top[q], head.query.scale[q], head.query.base[q]) + head.bias;
}

// A piece of the last phase, and which queries its state is of.
struct Piece {
  const Head *head;
  int64_t kind, first, tokens;  // kind: a list, kWindow or kRest
  float *state;
};
constexpr int64_t kWindow = -1, kRest = -2;

// Memory of a head for one call.
void make_room(Scratch &scratch, Head &head) {
  const Group &group = *head.group;
  const KvcLookupKernel &kernel = *group.kernel;
  const int64_t queries = kernel.queries_per_kv;
  head.query.query = scratch.take<float>(queries * kernel.head_dim);
  head.state = scratch.take<float>(group.state_floats());
  if (!group.finds()) return;
  head.query.whole = scratch.take<int8_t>(queries * group.sketch[2] * 16);
  head.query.start = scratch.take<int32_t>(queries);
  head.query.scale = scratch.take<float>(queries);
  head.query.base = scratch.take<float>(queries);
  const int64_t list_numbers = group.chunks() * (1 + queries) * kListRoom;
  head.scores = scratch.take<int32_t>(std::max(group.blocks() * queries * 16, group.sifts() ? list_numbers : 0));
  if (group.sifts()) {
    head.candidates = head.scores;  // they are given up before scores are written
    head.candidate_counts = scratch.take<int64_t>(group.chunks());
    head.threshold = scratch.take<int32_t>(queries), head.shift = scratch.take<int32_t>(queries);
    head.run_sums = scratch.take<float>(queries * group.words()), head.least = scratch.take<float>(queries);
  }
  head.tops = scratch.take<int32_t>(group.top_vectors() * queries * 16);
  if (group.select == kSum || group.select == kMax) {
    head.ranks = scratch.take<int32_t>(group.blocks() * 16);
    head.rank_tops = scratch.take<int32_t>(group.top_vectors() * 16);
    head.chunk_sums = scratch.take<float>(group.chunks() * 2 * queries);
    head.log_sum = scratch.take<float>(queries);
  }
  head.chosen = scratch.take<uint32_t>(queries * group.words());
  head.top = scratch.take<int32_t>(queries);
  head.found = scratch.take<int32_t>(group.lists() * group.list_room());
  head.counts = scratch.take<int64_t>(group.lists());
}

// The words of a sketch, as head `head` of the group reads them.
void read_sketch(const Group &group, Head &head) {
  const int64_t *words = group.sketch, units = words[2];
  head.sketch = {(const float *)words[4] + head.head * group.kernel->head_dim,
                 (const float *)words[5] + head.head * group.kernel->head_dim * units * 16, units, ((const int64_t *)words[6])[head.head]};
  head.bias = ((const float *)words[7])[head.head];
  for (int64_t part = 0; part < words[1]; part++) {
    const int64_t *of = words + kSketchWords + part * kSketchPartWords, tokens = of[0], runs = tokens / kRunTokens;
    head.rows.push_back({tokens, (const uint8_t *)of[1] + head.head * tokens / 16 * units * 64, (const int32_t *)of[2] + head.head * tokens,
                         (const int8_t *)of[3] + head.head * runs * group.kernel->value_dim, (const float *)of[4] + head.head * runs});
  }
}

void run(const Call &call, const std::vector<Group> &groups) {
  static thread_local Scratch scratch_of_thread;
  Scratch &scratch = scratch_of_thread;
  scratch.clear();
  std::vector<Head> heads;
  int64_t keys = 0;
  for (const Group &group : groups)
    for (int64_t h = 0; h < group.head_count; h++) {
      Head head = {};
      head.group = &group, head.head = h;
      if (group.finds()) read_sketch(group, head);
      make_room(scratch, head);
      heads.push_back(std::move(head));
      keys += group.before + 1;
    }
  std::vector<Piece> pieces;
  const auto phase = [&](const auto &work) {
    if (keys <= kInlineKeys)
      for (const Piece &piece : pieces) work(piece);
    else
      each_on_threads(pieces.size(), [&](int64_t i) { work(pieces[i]); });
    pieces.clear();
  };
  const auto add_chunks = [&](const Head &head) {
    for (int64_t chunk = 0; chunk < head.group->chunks(); chunk++) pieces.push_back({&head, kRest, chunk, 0, nullptr});
  };
  const auto shares_weights = [](const Head &head) {
    return head.group->finds() && (head.group->select == kSum || head.group->select == kMax);
  };

  for (Head &head : heads) pieces.push_back({&head, 0, 0, 0, nullptr});
  phase([&](const Piece &piece) { prepare(call, const_cast<Head &>(*piece.head)); });
  for (const Head &head : heads)
    if (head.group->sifts()) add_chunks(head);
  if (!pieces.empty()) {
    phase([](const Piece &piece) { sift(*piece.head, piece.first); });
    for (const Head &head : heads)
      if (head.group->sifts()) pieces.push_back({&head, 0, 0, 0, nullptr});
    phase([](const Piece &piece) { pick(const_cast<Head &>(*piece.head)); });
  }
  for (const Head &head : heads)
    if (!head.sifted) add_chunks(head);
  phase([](const Piece &piece) { scan(*piece.head, piece.first); });
  if (std::any_of(heads.begin(), heads.end(), shares_weights)) {
    for (const Head &head : heads)
      if (shares_weights(head)) add_chunks(head);
    phase([](const Piece &piece) { weigh(*piece.head, piece.first); });
    for (const Head &head : heads)
      if (shares_weights(head)) add_sums(head), add_chunks(head);
    phase([](const Piece &piece) { share(*piece.head, piece.first); });
  }
  for (const Head &head : heads)
    for (int64_t q = 0; q < (!head.group->finds() || head.sifted ? 0 : shares_weights(head) ? 1 : head.group->kernel->queries_per_kv); q++)
      pieces.push_back({&head, q, 0, 0, nullptr});
  phase([](const Piece &piece) { choose(*piece.head, piece.kind); });
  for (const Head &head : heads)
    for (int64_t list = 0; list < (head.group->finds() && !head.sifted ? head.group->lists() : 0); list++)
      pieces.push_back({&head, list, 0, 0, nullptr});
  phase([](const Piece &piece) { collect(*piece.head, piece.kind); });

  const auto add_pieces = [&](const Head &head, int64_t kind, int64_t tokens) {
    for (int64_t first = 0; first < tokens; first += kChunkTokens)
      pieces.push_back({&head, kind, first, std::min(kChunkTokens, tokens - first), scratch.take<float>(head.group->state_floats())});
  };
  for (const Head &head : heads) {
    add_pieces(head, kWindow, head.group->window_tokens());
    if (!head.group->finds()) continue;
    for (int64_t list = 0; list < head.group->lists(); list++) add_pieces(head, list, head.counts[list]);
    if (!head.group->tail) continue;
    for (int64_t chunk = 0; chunk < head.group->chunks(); chunk++)
      pieces.push_back({&head, kRest, chunk, 0, scratch.take<float>(head.group->state_floats())});
  }
  const std::vector<Piece> parts = pieces;
  phase([](const Piece &piece) {
    if (piece.kind == kRest)
      rest(*piece.head, piece.first, piece.state);
    else
      attend(*piece.head, piece.kind, piece.first, piece.tokens, piece.state);
  });

  for (const Piece &piece : parts) {
    const KvcLookupKernel &kernel = *piece.head->group->kernel;
    const int64_t queries = kernel.queries_per_kv, dim = kernel.value_dim;
    const KvcState state = state_at(piece.head->state, queries, dim), other = state_at(piece.state, queries, dim);
    if (piece.kind == kWindow && piece.first == 0) {  // the first one of every head
      std::copy(piece.state, piece.state + piece.head->group->state_floats(), piece.head->state);
    } else if (piece.kind >= 0 && !piece.head->group->shares()) {
      const int64_t q = piece.kind;
      merge({state.out + q * dim, state.maximum + q, state.sum + q}, {other.out + q * dim, other.maximum + q, other.sum + q}, 1, dim);
    } else {
      merge(state, other, queries, dim);
    }
  }
  for (const Head &head : heads) {
    const KvcLookupKernel &kernel = *head.group->kernel;
    const KvcState state = state_at(head.state, kernel.queries_per_kv, kernel.value_dim);
    for (int64_t q = 0; q < kernel.queries_per_kv; q++) {
      const int64_t query_head = head.group->heads[head.head] * kernel.queries_per_kv + q;
      write_row(state.out + q * kernel.value_dim, state.maximum[q], state.sum[q], call.sinks ? call.sinks + query_head : nullptr,
                kernel.value_dim, call.out + (head.group->out_row * call.query_heads + query_head) * kernel.value_dim * kernel.query_bytes,
                kernel.query_bytes);
    }
  }
}

bool is_sketch(const Group &group) {
  const int64_t *words = group.sketch;
  int64_t tokens = 0;
  for (int64_t part = 0; part < words[1]; part++) {
    const int64_t of = words[kSketchWords + part * kSketchPartWords];
    if (of < 0 || of % kRunTokens) return false;
    tokens += of;
  }
  return words[0] >= 0 && words[2] >= 1 && words[2] <= kMaxUnits && tokens == words[3] && words[0] + tokens <= group.before;
}

// query [1, query_heads, tokens, head_dim], key and value [1, kv_heads, tokens, ...]: one new token of each row's session among them.
// learnt_sinks [query_heads], float32.  table [groups, columns] and kv_heads: int64.  out [1, rows, query_heads, value_dim].
void lookup(const Tensor &any_query, const Tensor &any_key, const Tensor &any_value, const std::optional<Tensor> &learnt_sinks,
            const Tensor &table, const Tensor &kv_heads, Tensor out) {
  const Tensor query = rows_of(any_query, "query"), key = rows_of(any_key, "key"), value = rows_of(any_value, "value");
  STD_TORCH_CHECK(query.size(2) == key.size(2) && query.size(2) == value.size(2) && key.size(1) == value.size(1),
                  "query, key and value must have as many tokens, key and value as many heads");
  STD_TORCH_CHECK(out.dim() == 4 && out.is_contiguous() && out.size(2) == query.size(1),
                  "out must be contiguous, [1, rows, query_heads, value_dim]");
  STD_TORCH_CHECK(are_integers(table, 2) && table.size(1) == kColumnCount && are_integers(kv_heads, 1),
                  "table [groups, columns] and kv_heads must be contiguous int64");
  STD_TORCH_CHECK(!learnt_sinks || are_of_heads(*learnt_sinks, query.size(1)), "learnt_sinks must be one float32 number a query head");
  const ScalarType type = query.scalar_type();
  const bool one_type = key.scalar_type() == type && value.scalar_type() == type && out.scalar_type() == type;
  const Call call = {(const char *)query.data_ptr(),
                     (const char *)key.data_ptr(),
                     (const char *)value.data_ptr(),
                     query.stride(1),
                     query.stride(2),
                     key.stride(1),
                     key.stride(2),
                     value.stride(1),
                     value.stride(2),
                     learnt_sinks ? (const float *)learnt_sinks->data_ptr() : nullptr,
                     (char *)out.data_ptr(),
                     query.size(1)};
  std::vector<Group> groups(table.size(0));
  const int64_t *all_heads = (const int64_t *)kv_heads.data_ptr();
  for (size_t i = 0; i < groups.size(); i++) {
    const int64_t *row = (const int64_t *)table.data_ptr() + i * kColumnCount;
    Group &group = groups[i];
    group = {find_lookup_kernel(row[kKernel]),
             (const int64_t *)row[kStore],
             (const int64_t *)row[kSketch],
             all_heads + row[kHeads],
             row[kHeadCount],
             row[kStart],
             row[kOutRow],
             row[kBefore],
             row[kK],
             row[kSelect],
             row[kTail]};
    STD_TORCH_CHECK(group.kernel, "no kernel is loaded for this lookup");
    STD_TORCH_CHECK(one_type && type == number_type(group.kernel->query_bytes), "the kernel is for other types");
    STD_TORCH_CHECK(group.kernel->head_dim == query.size(3) && group.kernel->head_dim == key.size(3) &&
                        group.kernel->value_dim == value.size(3) && group.kernel->value_dim == out.size(3) &&
                        group.kernel->queries_per_kv * key.size(1) == query.size(1),
                    "the kernel is for other sizes");
    STD_TORCH_CHECK(group.start >= 0 && group.start < key.size(2) && group.out_row >= 0 && group.out_row < out.size(1) &&
                        group.before >= 0 && row[kHeads] >= 0 && group.head_count >= 0 &&
                        row[kHeads] + group.head_count <= kv_heads.size(0) &&
                        std::all_of(
                            group.heads, group.heads + group.head_count, [&](int64_t head) { return head >= 0 && head < key.size(1); }),
                    "the table names rows that are not there");
    const int64_t *store = group.store;
    STD_TORCH_CHECK(store && store[0] == kGrowing && store[1] > 0 && store[2 + store[1] * kPartWords - 1] > group.before,
                    "the store has no room for the new token");
    STD_TORCH_CHECK(group.k >= 1 && group.select >= kPerQueryHead && group.select <= kMax, "k or select is not allowed");
    STD_TORCH_CHECK(!group.sketch || is_sketch(group), "the sketch's words are wrong");
  }
  run(call, groups);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(kvc_native, m) {
  m.def("lookup(Tensor query, Tensor key, Tensor value, Tensor? learnt_sinks, Tensor table, Tensor kv_heads, Tensor(a!) out) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(kvc_native, CPU, m) { m.impl("lookup", TORCH_BOX(&lookup)); }
