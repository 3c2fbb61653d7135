// kvc_native::lookup: appends one new token a session and attends to a window, to the keys that a sketch finds, and to an estimate of
// the others.
//
// The work on a head is cut into stages, and each stage into pieces whose borders depend on a session's own length only; the states of
// pieces are merged in their order.  So which thread does what changes no bit.
//
// Runs are ranked by their centres first, and only the keys of the best are looked at.
#include <exception>
#include <optional>
#include <thread>

#include "lookup_head.h"

namespace {

// What one row of the operator's table says: the KV heads of a site that share a policy, in one session.
enum Column { kKernel, kStore, kSketch, kHeads, kHeadCount, kStart, kOutRow, kBefore, kK, kSelect, kTail, kColumnCount };

constexpr int64_t kInlineKeys = 4096;  // a call over so few keys is done by the calling thread
constexpr int64_t kSpins = 2000;       // looks at what a piece waits for before the processor is given to others
constexpr float kLost = 1.49e-8f;      // 2^-26: so small a share of a sum is lost in its rounding

struct Call {
  const char *query, *key, *value;
  int64_t query_head, query_token, key_head, key_token, value_head, value_token;  // strides in elements
  const float *sinks;                                                             // [query_heads], or null
  char *out;                                                                      // [rows][query_heads][value_dim]
  int64_t query_heads;
};

// Ranks the runs, and lists those that are looked at.
void rank(Head &head) {
  const Group &group = *head.group;
  const KvcLookupKernel &kernel = *group.kernel;
  const int64_t *words = group.sketch;
  const int64_t base = group.base_runs(), near = group.near_runs(), dim = kernel.value_dim, run_bytes = 2 * words[kUnits] * 64;
  const auto run_at = [&](const int64_t *part, int64_t run, bool low) {
    const int64_t tokens = part[0], row = head.head * tokens / kRunTokens + run;
    return KvcRun{(const uint8_t *)part[1] + row * run_bytes, (const int32_t *)part[2] + row * kRunTokens,
                  (const int8_t *)part[3] + row * dim, ((const float *)part[4])[row], low};
  };
  KvcRun *to = head.runs;
  if (near == base) {
    for (int64_t run = 0; run < base; run++) *to++ = run_at(group.part(0), run, false);
  } else {
    const int64_t vectors = group.far_vectors(), bytes = vectors * words[kRunUnits] * 64;
    kernel.rank(&head.query, &head.sketch, (const uint8_t *)words[kCentreCodes] + head.head * bytes,
                (const float *)words[kRunBias] + head.head * base, base, near, group.low_runs(), &head.ranked);
    for (int64_t v = 0; v < vectors; v++) {
      for (uint32_t left = head.ranked.near[v]; left; left &= left - 1) {
        const int bit = __builtin_ctz(left);
        *to++ = run_at(group.part(0), v * 16 + bit, head.ranked.low[v] >> bit & 1);
      }
      const int64_t row = head.head * vectors + v;
      head.together[v] = {nullptr, nullptr, (const int8_t *)words[kTogetherMean] + row * dim, ((const float *)words[kTogetherScale])[row],
                          0};
    }
  }
  for (int64_t part = 1; part < words[kParts]; part++)
    for (int64_t run = 0; run < group.part(part)[0] / kRunTokens; run++) *to++ = run_at(group.part(part), run, false);
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
  if (group.finds()) rank(head);
}

int64_t runs_of(const Head &head, int64_t chunk) { return std::min(kScanRuns, head.group->runs() - chunk * kScanRuns); }

void scan(const Head &head, int64_t chunk) {
  const KvcLookupKernel &kernel = *head.group->kernel;
  const int64_t queries = kernel.queries_per_kv, first = chunk * kScanRuns, runs = runs_of(head, chunk);
  int32_t *tops = head.tops + chunk * kTops * queries * 16;
  std::fill(tops, tops + std::min(kTops, 2 * runs) * queries * 16, INT32_MIN);
  kernel.scan(&head.query, &head.sketch, head.runs + first, runs, head.scores + 2 * first * queries * 16, tops);
}

void weigh(const Head &head, int64_t chunk) {
  const int64_t queries = head.group->kernel->queries_per_kv, first = chunk * kScanRuns;
  float *sums = head.chunk_sums + chunk * 2 * queries;
  head.group->kernel->weigh(&head.query, head.scores + 2 * first * queries * 16, 2 * runs_of(head, chunk), sums, sums + queries);
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
  const int64_t queries = head.group->kernel->queries_per_kv, first = chunk * kScanRuns, blocks = 2 * runs_of(head, chunk);
  int32_t *tops = head.rank_tops + chunk * kTops * 16;
  std::fill(tops, tops + std::min(kTops, blocks) * 16, INT32_MIN);
  head.group->kernel->share(&head.query, head.log_sum, head.group->select == kSum, head.scores + 2 * first * queries * 16, blocks,
                            head.ranks + 2 * first * 16, tops);
}

// Sets the bits of the keys that one query chooses, or all of them.
void choose(const Head &head, int64_t query) {
  const Group &group = *head.group;
  const int64_t queries = group.kernel->queries_per_kv;
  uint32_t *chosen = head.chosen + query * group.runs();
  if (group.shares_weights())
    group.kernel->choose(head.ranks, group.blocks(), head.rank_tops, group.top_vectors(), 16, group.k, head.runs, chosen);
  else
    group.kernel->choose(head.scores + query * 16, group.blocks(), head.tops + query * 16, group.top_vectors(), queries * 16, group.k,
                         head.runs, chosen);
}

// The positions of the chosen keys, in the order of the sketch.
void collect(const Head &head, int64_t list) {
  const Group &group = *head.group;
  uint32_t *chosen = head.chosen + list * group.runs();
  if (group.select == kUnion)
    for (int64_t q = 1; q < group.kernel->queries_per_kv; q++)
      for (int64_t w = 0; w < group.runs(); w++) chosen[w] |= head.chosen[q * group.runs() + w];
  int32_t *const begin = head.found + list * group.list_room(), *to = begin;
  const auto lies = [&](int32_t index) { return head.runs[index / kRunTokens].position + index % kRunTokens; };
  for (int64_t run = 0; run < group.runs(); run++)
    for (uint32_t left = chosen[run]; left; left &= left - 1) __builtin_prefetch(lies(*to++ = run * kRunTokens + __builtin_ctz(left)));
  for (int32_t *at = begin; at < to; at++) *at = *lies(*at);
  head.counts[list] = to - begin;
}

// What keys weigh that one query looked at, from all their scores.
void sum(const Head &head, int64_t query) {
  const Group &group = *head.group;
  const int64_t queries = group.kernel->queries_per_kv;
  int32_t top = INT32_MIN;
  for (int64_t v = 0; v < group.top_vectors(); v++) {
    const int32_t *lanes = head.tops + (v * queries + query) * 16;
    top = std::max(top, *std::max_element(lanes, lanes + 16));
  }
  head.shift[query] = top;
  head.weights[query] =
      group.kernel->sum_runs(&head.query, query, top, head.scores, head.chosen + (group.shares() ? 0 : query * group.runs()), head.runs,
                             group.runs(), head.run_sums + query * group.runs());
  head.least[query] = head.weights[query].rest * kLost / group.runs();
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

// An estimate of the keys of some runs that are not chosen, or of runs that are not looked at; gaps are not in it yet.
void rest(const Head &head, int64_t first, int64_t runs, bool far, float *memory) {
  const Group &group = *head.group;
  const KvcLookupKernel &kernel = *group.kernel;
  const int64_t queries = kernel.queries_per_kv;
  std::fill(memory, memory + group.state_floats(), 0.0f);
  const KvcState state = state_at(memory, queries, kernel.value_dim);
  if (far)
    kernel.add_runs(head.ranked.far_sums + first, group.far_vectors(), head.no_least, head.together + first, runs, &state);
  else
    kernel.add_runs(head.run_sums + first, group.runs(), head.least, head.runs + first, runs, &state);
  for (int64_t q = 0; q < queries; q++) {
    const float top = far ? head.ranked.top[q] : kernel.logit(head.shift[q], head.query.keys.scale[q], head.query.keys.base[q]);
    state.maximum[q] = state.sum[q] == 0 ? -INFINITY : top;
  }
}

// What scores leave out: the gap's base + slope * x within its bounds, or its mean where x is no number.
float guess_gap(const float *gap, float x) {
  const float guess = gap[1] + gap[2] * x;
  return std::isfinite(x) ? std::min(std::max(guess, gap[3]), gap[4]) : gap[0];
}

// The estimates join the keys that were read.  A query whose guesses of what it read are too low is thought to guess all else too low.
void add_estimates(const Head &head) {
  const Group &group = *head.group;
  const KvcLookupKernel &kernel = *group.kernel;
  const int64_t queries = kernel.queries_per_kv, dim = kernel.value_dim;
  const KvcState state = state_at(head.state, queries, dim), found = state_at(head.found_state, queries, dim);
  const KvcState near = state_at(head.rest_state, queries, dim), far = state_at(head.far_state, queries, dim);
  for (int64_t q = 0; q < queries; q++) {
    const float shift = kernel.logit(head.shift[q], head.query.keys.scale[q], head.query.keys.base[q]);
    const float read = found.maximum[q] + std::log(found.sum[q]), guessed = shift + std::log(head.weights[q].read);
    near.maximum[q] += guess_gap(head.gaps + kNearGap, read - guessed);
    if (!group.far_vectors()) continue;
    const float low = shift + std::log(head.weights[q].low) + head.gaps[kNearGap];
    far.maximum[q] += guess_gap(head.gaps + kFarGap, low - head.ranked.low_log_sum[q]);
  }
  merge(state, near, queries, dim);
  if (group.far_vectors()) merge(state, far, queries, dim);
}

// Memory of a head for one call.
void make_room(Scratch &scratch, Head &head) {
  const Group &group = *head.group;
  const KvcLookupKernel &kernel = *group.kernel;
  const int64_t queries = kernel.queries_per_kv;
  head.query.query = scratch.take<float>(queries * kernel.head_dim);
  head.state = scratch.take<float>(group.state_floats());
  if (!group.finds()) return;
  const auto code = [&](KvcCodedQuery &query, int64_t units) {
    query = {scratch.take<int8_t>(queries * units * 16), scratch.take<int32_t>(queries), scratch.take<float>(queries),
             scratch.take<float>(queries)};
  };
  code(head.query.keys, group.sketch[kUnits]);
  code(head.query.centres, group.sketch[kRunUnits]);
  const int64_t runs = group.runs(), vectors = group.far_vectors();
  head.runs = scratch.take<KvcRun>(runs);
  if (vectors) {
    head.together = scratch.take<KvcRun>(vectors);
    head.ranked = {scratch.take<float>(queries * vectors * 16),
                   scratch.take<int32_t>(vectors * 16),
                   scratch.take<uint32_t>(vectors),
                   scratch.take<uint32_t>(vectors),
                   scratch.take<float>(queries * vectors),
                   scratch.take<float>(queries),
                   scratch.take<float>(queries)};
  }
  head.scores = scratch.take<int32_t>(group.blocks() * queries * 16);
  head.shift = scratch.take<int32_t>(queries);
  head.run_sums = scratch.take<float>(queries * runs), head.least = scratch.take<float>(queries);
  head.no_least = scratch.take<float>(queries);
  std::fill(head.no_least, head.no_least + queries, 0.0f);
  head.weights = scratch.take<KvcWeights>(queries);
  head.tops = scratch.take<int32_t>(group.top_vectors() * queries * 16);
  if (group.shares_weights()) {
    head.ranks = scratch.take<int32_t>(group.blocks() * 16);
    head.rank_tops = scratch.take<int32_t>(group.top_vectors() * 16);
    head.chunk_sums = scratch.take<float>(group.chunks() * 2 * queries);
    head.log_sum = scratch.take<float>(queries);
  }
  head.chosen = scratch.take<uint32_t>(queries * runs);
  head.found = scratch.take<int32_t>(group.lists() * group.list_room());
  head.counts = scratch.take<int64_t>(group.lists());
  for (float **state : {&head.found_state, &head.rest_state, &head.far_state}) {
    *state = scratch.take<float>(group.state_floats());
    std::fill(*state, *state + group.state_floats(), 0.0f);
    const KvcState empty = state_at(*state, queries, kernel.value_dim);
    std::fill(empty.maximum, empty.maximum + queries, -INFINITY);
  }
}

// The words of a sketch, as head `head` of the group reads them.
void read_sketch(const Group &group, Head &head) {
  const int64_t *words = group.sketch, at = head.head, coordinates = words[kCoordinates], dim = group.kernel->head_dim;
  head.sketch = {(const float *)words[kCentre] + at * dim,
                 (const char *)words[kMap] + at * ((dim + 1) / 2) * coordinates * 4,
                 coordinates,
                 {(const float *)words[kStep] + at * words[kUnits] * 16, words[kUnits], ((const int64_t *)words[kFine])[at]},
                 {(const float *)words[kRunStep] + at * words[kRunUnits] * 16, words[kRunUnits], words[kRunUnits]}};
  head.gaps = (const float *)words[kGaps] + at * kGapColumns;
}

// What is done for one head, in this order: a stage begins when the one before has ended.
enum class Stage { kPrepare, kScan, kWeigh, kAddSums, kShare, kChoose, kCollect, kSum, kAttend };
constexpr int64_t kWindow = -1, kRest = -2, kFar = -3;

// What one thread does at a time.
struct Piece {
  Head *head;
  Stage stage;
  int64_t kind, first, tokens;  // first: chunk, query, token or run; kind, tokens: of kAttend, a list or one of the above, and how many
  float *state;                 // of kAttend
  const std::atomic<int64_t> *waits;  // how much is left of what it waits for
  std::atomic<int64_t> *left;         // of its own stage
};

void act(const Call &call, const Piece &piece) {
  Head &head = *piece.head;
  switch (piece.stage) {
    case Stage::kPrepare:
      return prepare(call, head);
    case Stage::kScan:
      return scan(head, piece.first);
    case Stage::kWeigh:
      return weigh(head, piece.first);
    case Stage::kAddSums:
      return add_sums(head);
    case Stage::kShare:
      return share(head, piece.first);
    case Stage::kChoose:
      choose(head, piece.first);
      if (head.group->shares()) return;
      collect(head, piece.first);
      if (head.group->tail) sum(head, piece.first);
      return;
    case Stage::kCollect:
      return collect(head, piece.first);
    case Stage::kSum:
      return sum(head, piece.first);
    case Stage::kAttend:
      if (piece.kind <= kRest) return rest(head, piece.first, piece.tokens, piece.kind == kFar, piece.state);
      const int64_t end =
          piece.kind == kWindow ? piece.first + piece.tokens : std::min(piece.first + piece.tokens, head.counts[piece.kind]);
      if (piece.first < end) attend(head, piece.kind, piece.first, end - piece.first, piece.state);
  }
}

// The pieces of a call, in an order in which none waits for one behind it: so whoever is free takes the next, and waits if it must.
class Work {
 public:
  Work(Scratch &scratch, std::vector<Head> &heads) : scratch(scratch), heads(heads) {}

  template <class Wanted, class Count>
  void add(Stage stage, const Wanted &wanted, const Count &count) {
    for (Head &head : heads) {
      if (!wanted(*head.group)) continue;
      std::atomic<int64_t> *left = new (scratch.take<std::atomic<int64_t>>(1)) std::atomic<int64_t>(count(*head.group));
      for (int64_t i = 0; i < *left; i++) pieces.push_back({&head, stage, 0, i, 0, nullptr, head.stage_left, left});
      head.stage_left = left;
    }
  }

  void attend(Head &head, int64_t kind, int64_t count, int64_t at_once) {
    for (int64_t first = 0; first < count; first += at_once)
      pieces.push_back({&head, Stage::kAttend, kind, first, std::min(at_once, count - first),
                        scratch.take<float>(head.group->state_floats()), head.stage_left, nullptr});
  }

  void run(const Call &call, bool on_threads) {
    std::atomic<bool> failed{false};
    std::exception_ptr failure;
    const auto take = [&](int64_t i) {
      const Piece &piece = pieces[i];
      if (piece.waits) wait_for(*piece.waits);
      try {
        if (!failed) act(call, piece);
      } catch (...) {  // the others still come to their end
        if (!failed.exchange(true)) failure = std::current_exception();
      }
      if (piece.left) piece.left->fetch_sub(1, std::memory_order_release);
    };
    if (on_threads)
      each_on_threads(pieces.size(), take);
    else
      for (size_t i = 0; i < pieces.size(); i++) take(i);
    if (failed) std::rethrow_exception(failure);
  }

  std::vector<Piece> pieces;

 private:
  Scratch &scratch;
  std::vector<Head> &heads;

  static void wait_for(const std::atomic<int64_t> &left) {
    for (int64_t turn = 0; left.load(std::memory_order_acquire) > 0; turn++)
      if (turn > kSpins) std::this_thread::yield();
  }
};

// The states of all pieces join that of their head, in their order.
void join(const std::vector<Piece> &pieces) {
  for (const Piece &piece : pieces) {
    if (piece.stage != Stage::kAttend) continue;
    const Head &head = *piece.head;
    if (piece.kind >= 0 && piece.first >= head.counts[piece.kind]) continue;
    const int64_t queries = head.group->kernel->queries_per_kv, dim = head.group->kernel->value_dim;
    const KvcState other = state_at(piece.state, queries, dim);
    if (piece.kind == kWindow && piece.first == 0) {  // the first one of every head
      std::copy(piece.state, piece.state + head.group->state_floats(), head.state);
    } else if (piece.kind >= 0 && !head.group->shares()) {
      const int64_t q = piece.kind;
      const KvcState found = state_at(head.found_state, queries, dim);
      merge({found.out + q * dim, found.maximum + q, found.sum + q}, {other.out + q * dim, other.maximum + q, other.sum + q}, 1, dim);
    } else {
      float *const into = piece.kind == kWindow ? head.state
                          : piece.kind == kRest ? head.rest_state
                          : piece.kind == kFar  ? head.far_state
                                                : head.found_state;
      merge(state_at(into, queries, dim), other, queries, dim);
    }
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

  Work work(scratch, heads);
  const auto all = [](const Group &) { return true; };
  const auto finds = [](const Group &group) { return group.finds(); };
  const auto shares = [](const Group &group) { return group.finds() && group.shares(); };
  const auto shares_weights = [](const Group &group) { return group.shares_weights(); };
  const auto sums_apart = [](const Group &group) { return group.finds() && group.shares() && group.tail; };
  const auto once = [](const Group &) { return int64_t(1); };
  const auto chunks = [](const Group &group) { return group.chunks(); };
  const auto queries = [](const Group &group) { return int64_t(group.kernel->queries_per_kv); };
  work.add(Stage::kPrepare, all, once);
  work.add(Stage::kScan, finds, chunks);
  work.add(Stage::kWeigh, shares_weights, chunks);
  work.add(Stage::kAddSums, shares_weights, once);
  work.add(Stage::kShare, shares_weights, chunks);
  work.add(Stage::kChoose, finds, [&](const Group &group) { return group.shares_weights() ? 1 : queries(group); });
  work.add(Stage::kCollect, shares, once);
  work.add(Stage::kSum, sums_apart, queries);
  for (Head &head : heads) {
    const Group &group = *head.group;
    work.attend(head, kWindow, group.window_tokens(), kChunkTokens);
    if (!group.finds()) continue;
    for (int64_t list = 0; list < group.lists(); list++) work.attend(head, list, group.list_room(), kChunkTokens);
    if (!group.tail) continue;
    work.attend(head, kRest, group.runs(), kRunsAtOnce);
    work.attend(head, kFar, group.far_vectors(), kRunsAtOnce);
  }
  work.run(call, keys > kInlineKeys);

  join(work.pieces);
  for (const Head &head : heads) {
    if (!head.group->finds()) continue;
    const int64_t queries = head.group->kernel->queries_per_kv, dim = head.group->kernel->value_dim;
    if (head.group->tail) add_estimates(head);
    merge(state_at(head.state, queries, dim), state_at(head.found_state, queries, dim), queries, dim);
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
  for (int64_t part = 0; part < words[kParts]; part++) {
    const int64_t of = group.part(part)[0];
    if (of <= 0 || of % kRunTokens) return false;
    tokens += of;
  }
  const auto are_units = [](int64_t units) { return units >= 1 && units <= kMaxUnits; };
  return words[kFirst] >= 0 && words[kParts] >= 1 && are_units(words[kUnits]) && are_units(words[kRunUnits]) && words[kCoordinates] >= 16 &&
         words[kCoordinates] % 16 == 0 && words[kCoordinates] <= kMaxUnits * 16 && words[kLooked] >= 1 && tokens == words[kTokens] &&
         words[kFirst] + tokens <= group.before;
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
