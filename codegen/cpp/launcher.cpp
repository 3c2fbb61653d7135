// The operators that a compiled model calls, on torch's stable ABI: one build serves every torch from 2.11 on.
//
//   kvc_native::load(...)        makes the kernels of a shared object known by their content hash
//   kvc_native::attend(...)      appends new tokens to the stores of one site and attends over them, for all sessions of a call
//   kvc_native::attend_part(...) attends to one part of a store that is never in memory as a whole
//   kvc_native::lookup(...)      the same for one token over keys that a sketch finds (lookup_operator.cpp)
//   kvc_native::sketch_*(...)    the parts of making a sketch (sketch_build.cpp)
//   kvc_native::linears(...)     linear layers of one input; few tokens go to a generated kernel, many to torch
//
// Kernels run on torch's own threads.  Which thread does what never changes a result: a chunk of keys has one state, and the
// states of a row are merged in the order of their positions.
#include <dlfcn.h>

#include <cstdlib>
#include <iterator>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "kernel.h"
#include "operators.h"
#include "relay.h"
#include "stores.h"

namespace {

std::shared_mutex loading;
std::unordered_map<uint64_t, const KvcAttendKernel *> attend_kernels;
std::unordered_map<uint64_t, const KvcLinearKernel *> linear_kernels;
std::unordered_map<uint64_t, const KvcLookupKernel *> lookup_kernels;

// Loads a shared object of generated kernels; returns how many it holds.  A kernel is called by its content hash, of which the
// bits of `variant` are turned over: one request built for two instruction sets is two kernels.  What is known stays as it is.
int64_t load(std::string path, int64_t variant) {
  const std::unique_lock<std::shared_mutex> lock(loading);
  void *library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  STD_TORCH_CHECK(library, "cannot load ", path, ": ", dlerror());
  using List = const KvcKernels *(*)();
  const List list = (List)dlsym(library, "kvc_kernels");
  STD_TORCH_CHECK(list, path, " holds no kernels of kvcompile");
  const KvcKernels *kernels = list();
  STD_TORCH_CHECK(kernels->version == kKernelVersion, path, " was made for another version of the launcher");
  for (int64_t i = 0; i < kernels->attends; i++) attend_kernels.insert({kernels->attend[i]->key ^ variant, kernels->attend[i]});
  for (int64_t i = 0; i < kernels->linears; i++) linear_kernels.insert({kernels->linear[i]->key ^ variant, kernels->linear[i]});
  for (int64_t i = 0; i < kernels->lookups; i++) lookup_kernels.insert({kernels->lookup[i]->key ^ variant, kernels->lookup[i]});
  return kernels->attends + kernels->linears + kernels->lookups;
}

// The kernel that was loaded under a key, or null.
template <class Kernel>
const Kernel *find_kernel(const std::unordered_map<uint64_t, const Kernel *> &kernels, uint64_t key) {
  const std::shared_lock<std::shared_mutex> lock(loading);
  const auto found = kernels.find(key);
  return found == kernels.end() ? nullptr : found->second;
}

constexpr int64_t kAskedBytes = 8192;  // kPrefetchBytes of vector.h

// What one row of the operator's table says: the KV heads of a site that share a policy, in one session.
enum Column { kKernel, kStore, kHeads, kHeadCount, kStart, kNew, kSkip, kOutRow, kBefore, kColumnCount };

struct Group {
  const KvcAttendKernel *kernel;
  const int64_t *store;
  const int64_t *heads;  // KV heads of the site
  int64_t head_count, start, tokens, skip, out_row, before;
  std::vector<int64_t> staged;  // a descriptor of what the queries see, where the ring cannot show it
  std::vector<char> memory;     // what it points to

  int64_t end() const { return before + tokens; }
  int64_t queries() const { return tokens - skip; }
  const int64_t *seen() const { return staged.empty() ? store : staged.data(); }
  int64_t state_floats() const { return kernel->queries_per_kv * (kernel->value_dim + 2); }
  int64_t key_bytes() const { return token_bytes(kernel->head_dim); }
  int64_t value_bytes() const { return token_bytes(kernel->value_dim); }

 private:
  int64_t token_bytes(int64_t dim) const { return kernel->bits == 8 ? dim + kernel->store_bytes : dim * kernel->store_bytes; }
};

// The tensors of a call.
struct Call {
  const char *query, *sink_query, *key, *value;  // sink_query: what the sinks are shown where a kernel asks for it, else query
  int64_t query_head, query_token, sink_query_head, sink_query_token, key_head, key_token, value_head, value_token;  // strides in elements
  // sinks, slopes: [query_heads], or null; out: [rows][query_heads][value_dim]
  const float *sinks, *slopes;
  char *out;
  int64_t query_heads;
};

// Whether what a group sees may be seen together with other sessions: all of its past, in every session as the same logits.
bool may_share(const Group &group) {
  const KvcAttendKernel &kernel = *group.kernel;
  return group.store[0] == kGrowing && !kernel.recent_tokens && !kernel.chunk_tokens && !kernel.alibi && !kernel.cache_index;
}

// Writes the attention of `tokens` query tokens; a learnt sink is one more logit of the denominator.
void finish(const Call &call, const Group &group, int64_t head, int64_t query, int64_t tokens, const KvcState &state) {
  const KvcAttendKernel &kernel = *group.kernel;
  for (int64_t r = 0; r < tokens * kernel.queries_per_kv; r++) {
    const int64_t query_head = group.heads[head] * kernel.queries_per_kv + r % kernel.queries_per_kv;
    const int64_t row = group.out_row + query + r / kernel.queries_per_kv;
    char *to = call.out + (row * call.query_heads + query_head) * kernel.value_dim * kernel.query_bytes;
    write_row(state.out + r * kernel.value_dim, state.maximum[r], state.sum[r], call.sinks ? call.sinks + query_head : nullptr,
              kernel.value_dim, to, kernel.query_bytes);
  }
}

// Query tokens [first, first + tokens) of one head, as the sinks are shown them or as all other keys are.
KvcQueries queries_of(const Call &call, const Group &group, int64_t head, int64_t first, int64_t tokens, bool at_sinks) {
  const char *data = at_sinks ? call.sink_query : call.query;
  const int64_t token_stride = at_sinks ? call.sink_query_token : call.query_token;
  const int64_t head_stride = at_sinks ? call.sink_query_head : call.query_head;
  const int64_t row = group.start + group.skip + first, query_head = group.heads[head] * group.kernel->queries_per_kv;
  return {data + (row * token_stride + query_head * head_stride) * group.kernel->query_bytes,
          token_stride,
          head_stride,
          tokens,
          group.before + group.skip + first,
          call.slopes ? call.slopes + query_head : nullptr};
}

// New tokens [first, first + tokens) of one head.
KvcTokens tokens_of(const Call &call, const Group &group, int64_t head, int64_t first, int64_t tokens) {
  const int64_t key = (group.start + first) * call.key_token + group.heads[head] * call.key_head;
  const int64_t value = (group.start + first) * call.value_token + group.heads[head] * call.value_head;
  return {call.key + key * group.kernel->query_bytes, call.value + value * group.kernel->query_bytes, call.key_token, call.value_token,
          tokens};
}

// Appends new tokens [first, end) of the call to the store, wherever their positions lie there.
void append(const Call &call, const Group &group, const int64_t *store, int64_t head, int64_t first, int64_t end) {
  static thread_local std::vector<KvcPiece> places;
  places.clear();
  find_pieces(store, head, group.before + first, group.before + end, places);
  for (const KvcPiece &place : places) {
    const KvcTokens tokens = tokens_of(call, group, head, place.position - group.before, place.tokens);
    group.kernel->append(&tokens, const_cast<void *>(place.key), const_cast<void *>(place.value), place.slot);
  }
}

// Lane `slot` of each of `lanes` vectors becomes what lane `from` of others is.
void copy_lanes(char *target, int64_t slot, const char *source, int64_t from, int64_t lanes, int64_t lane_bytes) {
  target += slot % kBlockTokens * lane_bytes, source += from % kBlockTokens * lane_bytes;
  for (int64_t i = 0; i < lanes; i++)
    std::memcpy(target + i * kBlockTokens * lane_bytes, source + i * kBlockTokens * lane_bytes, lane_bytes);
}

// One token from one store to another: its key's channels lie in the lanes of a block, of int8 in bytes with a scale behind them.
void copy_token(const Group &group, const KvcPiece &from, char *key, char *value, int64_t slot) {
  const int64_t block = kBlockTokens * group.key_bytes(), bytes = group.kernel->bits == 8 ? group.kernel->head_dim : 0;
  const char *source = (const char *)from.key + from.slot / kBlockTokens * block;
  char *target = key + slot / kBlockTokens * block;
  if (bytes) {
    copy_lanes(target, slot, source, from.slot, bytes, 1);
    copy_lanes(target + bytes * kBlockTokens, slot, source + bytes * kBlockTokens, from.slot, 1, group.kernel->store_bytes);
  } else {
    copy_lanes(target, slot, source, from.slot, group.key_bytes() / 4, 4);
  }
  std::memcpy(value + slot * group.value_bytes(), (const char *)from.value + from.slot * group.value_bytes(), group.value_bytes());
}

// A chunk of a prompt may overwrite what its own first queries see of a ring.  Then the sinks stay in the ring, and the window
// before the chunk and the chunk itself are laid out side by side.
bool needs_staging(const Group &group) {
  return group.tokens > 1 && group.store[0] == kRing && group.end() > group.store[5] + group.store[6];
}

void stage(Group &group) {
  const int64_t *ring = group.store, sink = ring[5], recent = group.kernel->recent_tokens;
  const int64_t first = std::min(group.before, std::max(sink, group.before + 1 - recent));
  const int64_t blocks = (group.end() - first + kBlockTokens - 1) / kBlockTokens;
  const int64_t key = blocks * kBlockTokens * group.key_bytes(), value = blocks * kBlockTokens * group.value_bytes();
  group.memory.resize(group.head_count * (key + value));
  char *keys = group.memory.data(), *values = keys + group.head_count * key;
  const int64_t sinks[] = {ring[1], ring[2], ring[3], ring[4], 0, std::min(first, sink)};
  const int64_t others[] = {(int64_t)keys, (int64_t)values, key, value, first, group.end()};
  group.staged = {kGrowing, 2};
  group.staged.insert(group.staged.end(), std::begin(sinks), std::end(sinks));
  group.staged.insert(group.staged.end(), std::begin(others), std::end(others));
}

void fill_stage(const Call &call, const Group &group, int64_t head) {
  const int64_t *part = group.staged.data() + 2 + kPartWords;
  std::vector<KvcPiece> before;
  find_pieces(group.store, head, part[4], group.before, before);
  char *key = (char *)part[0] + head * part[2], *value = (char *)part[1] + head * part[3];
  for (KvcPiece piece : before)
    for (; piece.tokens; piece.tokens--, piece.slot++, piece.position++) copy_token(group, piece, key, value, piece.position - part[4]);
  append(call, group, group.staged.data(), head, 0, group.tokens);
}

// The tokens of the chunk that keep a slot: the sinks among them and the last `window` of the others.
void fill_ring(const Call &call, const Group &group, int64_t head) {
  const int64_t sink = group.store[5], window = group.store[6];
  const int64_t sinks = std::max<int64_t>(0, std::min(group.tokens, sink - group.before));
  append(call, group, group.store, head, 0, sinks);
  append(call, group, group.store, head, std::max(sinks, group.tokens - window), group.tokens);
}

// Attention of a tile of queries over all that it sees, chunk after chunk.
void attend_tile(const Call &call, const Group &group, int64_t head, int64_t first, int64_t tokens) {
  static thread_local Chunks chunks;
  static thread_local std::vector<float> memory;
  const KvcAttendKernel &kernel = *group.kernel;
  const int64_t rows = tokens * kernel.queries_per_kv, floats = rows * (kernel.value_dim + 2);
  memory.resize(2 * floats);
  const int64_t position = group.before + group.skip + first;
  const Seen seen(kernel, position, position + tokens - 1);
  const KvcState state = state_at(memory.data(), rows, kernel.value_dim), next = state_at(memory.data() + floats, rows, kernel.value_dim);
  chunks.find(kernel, group.seen(), head, seen);
  for (int64_t c = 0; c < chunks.count(); c++) {
    const KvcQueries queries = queries_of(call, group, head, first, tokens, c < seen.sink_chunks(kernel));
    kernel.attend(&queries, chunks.pieces.data() + chunks.cuts[c], chunks.cuts[c + 1] - chunks.cuts[c], c ? &next : &state);
    if (c) merge(state, next, rows, kernel.value_dim);
  }
  finish(call, group, head, first, tokens, state);
}

// One KV head of a session with one query token.
struct Run {
  Group *group;
  int64_t head, first_chunk;
  int64_t relayed;  // positions that it sees together with other sessions; their state lies before those of its chunks
  int64_t state;    // where its states begin

  Seen seen() const {
    Seen seen(*group->kernel, group->end() - 1, group->end() - 1);
    if (relayed) seen.first = relayed;
    return seen;
  }
};

// The queries of some members of a relay over its keys, chunk after chunk; states: of each member, of the chunks before and then with
// these.
void attend_relay(const Call &call, const Relay &relay, const std::vector<const Run *> &runs, const std::vector<float *> &states) {
  static thread_local Chunks chunks;
  static thread_local std::vector<float> memory;
  static thread_local std::vector<char> gathered;
  const Run &first = *runs[0];
  const KvcAttendKernel &kernel = *first.group->kernel;
  const int64_t members = runs.size(), queries = kernel.queries_per_kv, rows = members * queries, dim = kernel.value_dim;
  const int64_t query_bytes = kernel.head_dim * kernel.query_bytes;
  gathered.resize(rows * query_bytes);
  for (int64_t row = 0; row < rows; row++) {
    const KvcQueries from = queries_of(call, *runs[row / queries]->group, first.head, 0, 1, false);
    const char *data = (const char *)from.data + row % queries * from.head_stride * kernel.query_bytes;
    std::memcpy(gathered.data() + row * query_bytes, data, query_bytes);
  }
  memory.resize(2 * rows * (dim + 2));
  const KvcState all = state_at(memory.data(), rows, dim), next = state_at(memory.data() + rows * (dim + 2), rows, dim);
  const auto copy = [&](bool in) {
    for (int64_t m = 0; m < members; m++) {
      const KvcState one = state_at(states[m], queries, dim);
      const KvcState here = {all.out + m * queries * dim, all.maximum + m * queries, all.sum + m * queries};
      const KvcState &from = in ? one : here, &to = in ? here : one;
      std::copy_n(from.out, queries * dim, to.out), std::copy_n(from.maximum, queries, to.maximum), std::copy_n(from.sum, queries, to.sum);
    }
  };
  if (relay.first) copy(true);
  Seen seen(kernel, relay.end - 1, relay.end - 1);
  seen.first = relay.first;
  chunks.find(kernel, first.group->store, first.head, seen);
  const auto attend = kernel.relay ? kernel.relay : kernel.attend;
  const KvcQueries together = {gathered.data(), queries * kernel.head_dim, kernel.head_dim, members, relay.end, nullptr};
  for (int64_t c = 0; c < chunks.count(); c++) {
    const bool begins = relay.first == 0 && c == 0;
    attend(&together, chunks.pieces.data() + chunks.cuts[c], chunks.cuts[c + 1] - chunks.cuts[c], begins ? &all : &next);
    if (!begins) merge(all, next, rows, dim);
  }
  copy(false);
}

// In how many tiles the sessions of each head are cut: so that all threads end together, as far as rows come in groups.
int64_t cuts_of(const Group &group, int64_t sessions) {
  const int64_t threads = torch::stable::get_num_threads(), queries = group.kernel->queries_per_kv;
  const int64_t fewest = (sessions + group.kernel->tile_tokens - 1) / group.kernel->tile_tokens;
  int64_t best = fewest, least = INT64_MAX;
  for (int64_t cuts = fewest; cuts <= std::min(sessions, fewest + 2 * threads); cuts++) {
    const int64_t rows = (sessions + cuts - 1) / cuts * queries, rounds = (group.head_count * cuts + threads - 1) / threads;
    const int64_t cost = rounds * ((rows + kRowsAtOnce - 1) / kRowsAtOnce);
    if (cost < least) least = cost, best = cuts;
  }
  return best;
}

// Asks for what is read and written first of chunks of keys: where they begin (behind that the kernel asks for itself), and the block
// in which the last token lies, or will.
void ask_for(const Group &group, const KvcPiece &first, const KvcPiece &last) {
  if (group.store[0] == kKivi) return;
  const auto ask = [](const void *from, int64_t slot, int64_t end, int64_t token_bytes) {
    const char *at = (const char *)from + slot * token_bytes;
    for (int64_t i = 0; i < std::min((end - slot) * token_bytes, kAskedBytes); i += 64) __builtin_prefetch(at + i, 0, 2);
  };
  const auto block = [](int64_t slot) { return slot / kBlockTokens * kBlockTokens; };
  const int64_t slot = last.slot + last.tokens - 1;
  ask(last.key, block(slot), block(slot) + kBlockTokens, group.key_bytes()), ask(last.value, slot, slot + 1, group.value_bytes());
  ask(first.key, block(first.slot), first.slot + first.tokens, group.key_bytes());
  ask(first.value, first.slot, first.slot + first.tokens, group.value_bytes());
}

// What sessions see together: in tiles of sessions, the spans that come first first.  run_of: of each seer, its first run.
void attend_relays(const Call &call, const Relays &relays, const std::vector<Run> &runs, const std::vector<int64_t> &run_of,
                   float *states) {
  struct Tile {
    const Relay *relay;
    int64_t head, first, members;
  };
  std::vector<Tile> tiles;
  int64_t deepest = 0;
  for (const Relay &relay : relays.found) deepest = std::max(deepest, relay.depth);
  for (int64_t depth = 0; depth <= deepest; depth++) {
    tiles.clear();
    for (const Relay &relay : relays.found) {
      if (relay.depth != depth) continue;
      const Group &group = *runs[run_of[relay.members[0]]].group;
      const int64_t count = relay.members.size(), cuts = cuts_of(group, count);
      for (int64_t head = 0; head < group.head_count; head++)
        for (int64_t cut = 0; cut < cuts; cut++)
          tiles.push_back({&relay, head, count * cut / cuts, count * (cut + 1) / cuts - count * cut / cuts});
    }
    each_on_threads(tiles.size(), [&](int64_t i) {
      const Tile &tile = tiles[i];
      std::vector<const Run *> of_members;
      std::vector<float *> their_states;
      for (int64_t m = tile.first; m < tile.first + tile.members; m++) {
        const Run &run = runs[run_of[tile.relay->members[m]] + tile.head];
        of_members.push_back(&run), their_states.push_back(states + run.state);
      }
      attend_relay(call, *tile.relay, of_members, their_states);
    });
  }
}

// One query token a session: what sessions share first, then all other chunks of all heads in a row, cut evenly between the threads.
// Returns how many groups saw something together with others.
int64_t attend_single(const Call &call, const std::vector<Group *> &groups, const RelayRule &rule) {
  static thread_local std::vector<Run> runs;
  static thread_local std::vector<float> memory;
  static thread_local std::vector<char> written;  // of each run, whether its result is
  std::vector<Seer> seers;
  std::vector<int64_t> run_of, seer_of(groups.size(), -1);
  for (size_t i = 0; rule.sessions && i < groups.size(); i++) {
    const Group &group = *groups[i];
    if (!may_share(group)) continue;
    seer_of[i] = seers.size();
    seers.push_back({group.store, group.before, {group.kernel, group.heads}});
  }
  const Relays relays(seers, rule);
  runs.clear();
  int64_t chunks = 0, floats = 0, tokens = 0, shared = 0;
  for (size_t i = 0; i < groups.size(); i++) {
    Group *group = groups[i];
    const int64_t relayed = seer_of[i] < 0 ? 0 : relays.ends[seer_of[i]];
    if (seer_of[i] >= 0) run_of.push_back(runs.size());
    shared += relayed > 0;
    for (int64_t head = 0; head < group->head_count; head++) {
      runs.push_back({group, head, chunks, relayed, floats});
      const Seen seen = runs.back().seen();
      const int64_t count = seen.chunks(*group->kernel);
      chunks += count, floats += (count + (relayed > 0)) * group->state_floats(), tokens += seen.tokens();
    }
  }
  memory.resize(floats);
  float *states = memory.data();
  const std::vector<Run> &all = runs;
  if (shared) attend_relays(call, relays, all, run_of, states);
  const int64_t threads = tokens <= kInlineTokens ? 1 : std::min<int64_t>(chunks, torch::stable::get_num_threads());
  const auto end_of = [&](size_t i) { return i + 1 < all.size() ? all[i + 1].first_chunk : chunks; };
  const auto write = [&, states](size_t i) {
    const Run &run = all[i];
    const int64_t rows = run.group->kernel->queries_per_kv, dim = run.group->kernel->value_dim;
    const int64_t count = end_of(i) - run.first_chunk + (run.relayed > 0);
    const KvcState state = state_at(states + run.state, rows, dim);
    for (int64_t c = 1; c < count; c++) merge(state, state_at(states + run.state + c * run.group->state_floats(), rows, dim), rows, dim);
    finish(call, *run.group, run.head, 0, 1, state);
  };
  written.assign(all.size(), 0);
  char *const done = written.data();
  on_threads(threads, [&, states, done](int64_t thread, int64_t count) {
    static thread_local Chunks found[2];
    const int64_t begin = chunks * thread / count, end = chunks * (thread + 1) / count;
    const auto look = [&](size_t i) {
      const Run &run = all[i];
      found[i % 2].find(*run.group->kernel, run.group->store, run.head, run.seen());
      const Chunks &chunks = found[i % 2];
      ask_for(*run.group, chunks.pieces[chunks.cuts[std::max(begin, run.first_chunk) - run.first_chunk]], chunks.pieces.back());
    };
    size_t i = 0;
    while (i < all.size() && end_of(i) <= begin) i++;
    if (begin < end) look(i);
    for (; i < all.size() && all[i].first_chunk < end; i++) {
      const Run &run = all[i];
      const Group &group = *run.group;
      const Chunks &here = found[i % 2];
      const int64_t last = end_of(i), from = std::max(begin, run.first_chunk), to = std::min(end, last);
      if (to == last) append(call, group, group.store, run.head, 0, 1);  // the last chunk holds the new token
      const int64_t sinks = run.seen().sink_chunks(*group.kernel);
      float *own = states + run.state + (run.relayed > 0) * group.state_floats();
      for (int64_t chunk = from - run.first_chunk; chunk < to - run.first_chunk; chunk++) {
        if (chunk + 1 == last - run.first_chunk && last < end) look(i + 1);  // while this one is read
        const KvcState state = state_at(own + chunk * group.state_floats(), group.kernel->queries_per_kv, group.kernel->value_dim);
        const KvcQueries query = queries_of(call, group, run.head, 0, 1, chunk < sinks);
        group.kernel->attend(&query, here.pieces.data() + here.cuts[chunk], here.cuts[chunk + 1] - here.cuts[chunk], &state);
      }
      if (from == run.first_chunk && to == last) write(i), done[i] = 1;
    }
  });
  for (size_t i = 0; i < all.size(); i++)
    if (!done[i]) write(i);  // threads had parts of it
  return shared;
}

// Several query tokens a session: tiles of queries, the longest ones first.
void attend_many(const Call &call, const std::vector<Group *> &groups) {
  struct Work {
    Group *group;
    int64_t head, first, tokens, seen;
  };
  std::vector<Work> heads, tiles;
  for (Group *group : groups) {
    if (needs_staging(*group)) stage(*group);
    for (int64_t head = 0; head < group->head_count; head++) heads.push_back({group, head, 0, 0, 0});
  }
  each_on_threads(heads.size(), [&](int64_t i) {
    const Work &work = heads[i];
    if (work.group->staged.empty()) return append(call, *work.group, work.group->store, work.head, 0, work.group->tokens);
    fill_stage(call, *work.group, work.head);
  });
  for (const Work &work : heads) {
    // Tiles end at multiples of their size and with an attention chunk; where every earlier token is visible, or every one of the
    // chunk, no bit of a result depends on the tile.
    const KvcAttendKernel &kernel = *work.group->kernel;
    const int64_t size = kernel.tile_tokens, begin = work.group->before + work.group->skip;
    for (int64_t at = begin, end; at < work.group->end(); at = end) {
      end = std::min({work.group->end(), (at / size + 1) * size, chunk_end(kernel, at)});
      tiles.push_back({work.group, work.head, at - begin, end - at, Seen(kernel, at, end - 1).tokens()});
    }
  }
  std::stable_sort(tiles.begin(), tiles.end(), [](const Work &one, const Work &other) { return one.seen > other.seen; });
  each_on_threads(tiles.size(), [&](int64_t i) { attend_tile(call, *tiles[i].group, tiles[i].head, tiles[i].first, tiles[i].tokens); });
  each_on_threads(heads.size(), [&](int64_t i) {
    if (!heads[i].group->staged.empty()) fill_ring(call, *heads[i].group, heads[i].head);
  });
}

// Attention of a tile of queries over positions [from, to), merged into the state of those before; `last` writes the result.
void attend_part_of_tile(const Call &call, const Group &group, int64_t head, int64_t first, int64_t tokens, int64_t from, int64_t to,
                         bool last, float *states) {
  static thread_local Chunks chunks;
  static thread_local std::vector<float> memory;
  const KvcAttendKernel &kernel = *group.kernel;
  const int64_t rows = tokens * kernel.queries_per_kv, position = group.before + group.skip + first;
  const KvcState state = state_at(states + (head * group.queries() + first) * group.state_floats(), rows, kernel.value_dim);
  memory.resize(rows * (kernel.value_dim + 2));
  const KvcState next = state_at(memory.data(), rows, kernel.value_dim);
  Seen seen(kernel, position, position + tokens - 1);
  seen.first = from, seen.end = std::min(to, seen.end);
  if (seen.first < seen.end) {
    const KvcQueries queries = queries_of(call, group, head, first, tokens, false);
    chunks.find(kernel, group.store, head, seen);
    for (int64_t c = 0; c < chunks.count(); c++) {
      const bool begins = from == 0 && c == 0;
      kernel.attend(&queries, chunks.pieces.data() + chunks.cuts[c], chunks.cuts[c + 1] - chunks.cuts[c], begins ? &state : &next);
      if (!begins) merge(state, next, rows, kernel.value_dim);
    }
  }
  if (last) finish(call, group, head, first, tokens, state);
}

// One query token: each chunk of each head has a thread; their states are merged in order.
void attend_part_of_single(const Call &call, const Group &group, int64_t from, int64_t to, bool last, float *states) {
  static thread_local std::vector<float> memory;
  const KvcAttendKernel &kernel = *group.kernel;
  const int64_t count = (to - from + kChunkTokens - 1) / kChunkTokens, floats = group.state_floats();
  memory.resize(group.head_count * count * floats);
  float *found = memory.data();
  const auto attend_chunk = [&, found](int64_t i) {
    static thread_local Chunks chunks;
    const int64_t head = i / count, at = from + i % count * kChunkTokens;
    Seen seen(kernel, group.end() - 1, group.end() - 1);
    seen.first = at, seen.end = std::min(to, at + kChunkTokens);
    chunks.find(kernel, group.store, head, seen);
    const KvcQueries query = queries_of(call, group, head, 0, 1, false);
    const KvcState state = state_at(found + i * floats, kernel.queries_per_kv, kernel.value_dim);
    kernel.attend(&query, chunks.pieces.data(), chunks.pieces.size(), &state);
  };
  if ((to - from) * group.head_count <= kInlineTokens)
    for (int64_t i = 0; i < group.head_count * count; i++) attend_chunk(i);
  else
    each_on_threads(group.head_count * count, attend_chunk);
  for (int64_t head = 0; head < group.head_count; head++) {
    const KvcState state = state_at(states + head * floats, kernel.queries_per_kv, kernel.value_dim);
    for (int64_t c = 0; c < count; c++) {
      float *next = found + (head * count + c) * floats;
      if (from == 0 && c == 0)
        std::copy(next, next + floats, states + head * floats);
      else
        merge(state, state_at(next, kernel.queries_per_kv, kernel.value_dim), kernel.queries_per_kv, kernel.value_dim);
    }
    if (last) finish(call, group, head, 0, 1, state);
  }
}

bool names_heads_of(const Group &group, int64_t kv_heads) {
  return std::all_of(group.heads, group.heads + group.head_count, [&](int64_t head) { return head >= 0 && head < kv_heads; });
}

// Whether the positions of the new tokens lie in the store: a ring has a place for every one.
bool has_room(const Group &group) {
  const int64_t *store = group.store, parts = store[1];
  if (store[0] == kKivi) return store[kRoomEnd] >= group.end();
  return store[0] == kRing || (parts > 0 && store[2 + parts * kPartWords - 1] >= group.end());
}

// Whether the parts of a `growing` store hold positions [first, end) without a gap.
bool holds(const int64_t *store, int64_t first, int64_t end) {
  if (store[0] != kGrowing) return false;
  for (int64_t i = 0; i < store[1]; i++) {
    const int64_t *part = store + 2 + i * kPartWords;
    if (part[4] <= first) first = std::max(first, part[5]);
  }
  return first >= end;
}

// What a call was given; the tensors live as long as the pointers to them.
struct Arguments {
  Tensor query, key, value, sink_query;
  Call call;
  std::vector<Group> groups;
};

// query [1, query_heads, tokens, head_dim], key and value [1, kv_heads, tokens, ...]: new tokens of all sessions, one after another.
// learnt_sinks, slopes [query_heads], float32.  sink_query: like query, what kernels with `cache_index` show to the sinks.
// table [groups, columns] and kv_heads: int64.  out [1, rows, query_heads, value_dim].
Arguments read_arguments(const Tensor &any_query, const Tensor &any_key, const Tensor &any_value, const std::optional<Tensor> &learnt_sinks,
                         const std::optional<Tensor> &any_sink_query, const std::optional<Tensor> &slopes, const Tensor &table,
                         const Tensor &kv_heads, const Tensor &out) {
  const Tensor query = rows_of(any_query, "query"), key = rows_of(any_key, "key"), value = rows_of(any_value, "value");
  const Tensor sink_query = any_sink_query ? rows_of(*any_sink_query, "sink_query") : query;
  STD_TORCH_CHECK(query.size(2) == key.size(2) && query.size(2) == value.size(2) && key.size(1) == value.size(1),
                  "query, key and value must have as many tokens, key and value as many heads");
  STD_TORCH_CHECK(out.dim() == 4 && out.is_contiguous() && out.size(2) == query.size(1),
                  "out must be contiguous, [1, rows, query_heads, value_dim]");
  STD_TORCH_CHECK(are_integers(table, 2) && table.size(1) == kColumnCount && are_integers(kv_heads, 1),
                  "table [groups, columns] and kv_heads must be contiguous int64");
  STD_TORCH_CHECK(!learnt_sinks || are_of_heads(*learnt_sinks, query.size(1)), "learnt_sinks must be one float32 number a query head");
  STD_TORCH_CHECK(!slopes || are_of_heads(*slopes, query.size(1)), "slopes must be one float32 number a query head");
  STD_TORCH_CHECK(sink_query.size(1) == query.size(1) && sink_query.size(2) == query.size(2) && sink_query.size(3) == query.size(3) &&
                      sink_query.scalar_type() == query.scalar_type(),
                  "sink_query must be like query");
  const ScalarType type = query.scalar_type();
  const bool one_type = key.scalar_type() == type && value.scalar_type() == type && out.scalar_type() == type;
  Call call = {(const char *)query.data_ptr(),
               (const char *)sink_query.data_ptr(),
               (const char *)key.data_ptr(),
               (const char *)value.data_ptr(),
               query.stride(1),
               query.stride(2),
               sink_query.stride(1),
               sink_query.stride(2),
               key.stride(1),
               key.stride(2),
               value.stride(1),
               value.stride(2),
               learnt_sinks ? (const float *)learnt_sinks->data_ptr() : nullptr,
               slopes ? (const float *)slopes->data_ptr() : nullptr,
               (char *)out.data_ptr(),
               query.size(1)};
  std::vector<Group> groups(table.size(0));
  const int64_t *all_heads = (const int64_t *)kv_heads.data_ptr();
  for (size_t i = 0; i < groups.size(); i++) {
    const int64_t *row = (const int64_t *)table.data_ptr() + i * kColumnCount;
    Group &group = groups[i];
    group.kernel = find_kernel(attend_kernels, row[kKernel]);
    STD_TORCH_CHECK(group.kernel, "no kernel is loaded for this attention");
    STD_TORCH_CHECK(one_type && type == number_type(group.kernel->query_bytes), "the kernel is for other types");
    STD_TORCH_CHECK(group.kernel->head_dim == query.size(3) && group.kernel->head_dim == key.size(3) &&
                        group.kernel->value_dim == value.size(3) && group.kernel->value_dim == out.size(3) &&
                        group.kernel->queries_per_kv * key.size(1) == query.size(1),
                    "the kernel is for other sizes");
    STD_TORCH_CHECK(bool(group.kernel->alibi) == bool(slopes), "slopes go with a kernel for them, and only with it");
    STD_TORCH_CHECK(any_sink_query || !group.kernel->cache_index, "the kernel asks for the query that the sinks are shown");
    group.store = (const int64_t *)row[kStore];
    group.heads = all_heads + row[kHeads];
    group.head_count = row[kHeadCount], group.start = row[kStart], group.tokens = row[kNew], group.skip = row[kSkip];
    group.out_row = row[kOutRow], group.before = row[kBefore];
    STD_TORCH_CHECK(group.start >= 0 && group.start + group.tokens <= key.size(2) && group.skip >= 0 && group.skip < group.tokens &&
                        group.out_row >= 0 && group.out_row + group.queries() <= out.size(1) && group.before >= 0 && row[kHeads] >= 0 &&
                        group.head_count >= 0 && row[kHeads] + group.head_count <= kv_heads.size(0) && names_heads_of(group, key.size(1)),
                    "the table names rows that are not there");
    STD_TORCH_CHECK(group.store, "the store has no room for the new tokens");
  }
  return {query, key, value, sink_query, call, groups};
}

// relay_sessions, relay_tokens: RelayRule.  Returns how many rows of the table saw something together with others.
int64_t attend(const Tensor &query, const Tensor &key, const Tensor &value, const std::optional<Tensor> &learnt_sinks,
               const std::optional<Tensor> &sink_query, const std::optional<Tensor> &slopes, const Tensor &table, const Tensor &kv_heads,
               Tensor out, int64_t relay_sessions, int64_t relay_tokens) {
  Arguments given = read_arguments(query, key, value, learnt_sinks, sink_query, slopes, table, kv_heads, out);
  std::vector<Group *> single, many;
  for (Group &group : given.groups) {
    STD_TORCH_CHECK(has_room(group), "the store has no room for the new tokens");
    (group.tokens == 1 ? single : many).push_back(&group);
  }
  if (!many.empty()) attend_many(given.call, many);
  return single.empty() ? 0 : attend_single(given.call, single, {relay_sessions, relay_tokens});
}

// Attends to positions [first, end) for one row of the table, whose store shows a part of the past that holds them, the new tokens as
// much as others: nothing is appended.  states: float32, [KV heads of the row, queries, queries_per_kv, value_dim + 2] in number, what
// the positions before `first` gave; the parts come in order, and with the last one the result is written.
void attend_part(const Tensor &query, const Tensor &key, const Tensor &value, const std::optional<Tensor> &learnt_sinks,
                 const std::optional<Tensor> &slopes, const Tensor &table, const Tensor &kv_heads, Tensor out, Tensor states, int64_t first,
                 int64_t end, bool last) {
  const Arguments given = read_arguments(query, key, value, learnt_sinks, std::nullopt, slopes, table, kv_heads, out);
  STD_TORCH_CHECK(given.groups.size() == 1, "parts are attended to for one row of the table at a time");
  const Group &group = given.groups[0];
  const KvcAttendKernel &kernel = *group.kernel;
  STD_TORCH_CHECK(!kernel.recent_tokens && !kernel.chunk_tokens, "parts are attended to by kernels that see all the past");
  STD_TORCH_CHECK(first >= 0 && first % kChunkTokens == 0 && first < end && end <= group.end() && holds(group.store, first, end),
                  "the store does not show these positions");
  STD_TORCH_CHECK(states.is_contiguous() && states.scalar_type() == ScalarType::Float &&
                      states.numel() == group.head_count * group.queries() * group.state_floats(),
                  "states must be contiguous float32, value_dim + 2 numbers a query and head");
  float *memory = (float *)states.data_ptr();
  if (group.tokens == 1) return attend_part_of_single(given.call, group, first, end, last, memory);
  struct Work {
    int64_t head, first, tokens;
  };
  std::vector<Work> tiles;
  const int64_t size = kernel.tile_tokens, begin = group.before + group.skip;
  for (int64_t head = 0; head < group.head_count; head++)
    for (int64_t at = begin, stop; at < group.end(); at = stop) {
      stop = std::min(group.end(), (at / size + 1) * size);
      tiles.push_back({head, at - begin, stop - at});
    }
  each_on_threads(tiles.size(), [&](int64_t i) {
    attend_part_of_tile(given.call, group, tiles[i].head, tiles[i].first, tiles[i].tokens, first, end, last, memory);
  });
}

Tensor linear_of_many(const Tensor &x, const Tensor &weight, const std::optional<Tensor> &bias) {
  StableIValue stack[] = {torch::stable::detail::from(x), torch::stable::detail::from(weight), torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor concatenate(const std::vector<Tensor> &parts) {
  StableIValue stack[] = {torch::stable::detail::from(parts), torch::stable::detail::from(int64_t(-1))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::cat", "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// x [1, tokens, in], weights [out_i, in], biases none or [out_i] each: [1, tokens, sum of out_i].  AOTInductor hands an empty
// list over as none.
Tensor linears(const Tensor &any_x, const std::vector<Tensor> &weights, const std::optional<std::vector<Tensor>> &some_biases,
               std::string key) {
  const std::vector<Tensor> biases = some_biases.value_or(std::vector<Tensor>());
  const KvcLinearKernel *const found = find_kernel(linear_kernels, std::strtoull(key.c_str(), nullptr, 16));
  STD_TORCH_CHECK(found, "no kernel is loaded for these linear layers");
  const KvcLinearKernel &kernel = *found;
  STD_TORCH_CHECK(any_x.dim() == 3 && any_x.size(0) == 1, "x must be [1, tokens, in]");
  const Tensor x = any_x.is_contiguous() ? any_x : torch::stable::contiguous(any_x);
  STD_TORCH_CHECK(!weights.empty() && (biases.empty() || biases.size() == weights.size()),
                  "each weight or none must have a bias of its own");
  const int64_t tokens = x.size(1), in = x.size(2);
  const bool in_rows = std::all_of(weights.begin(), weights.end(), [](const Tensor &weight) { return weight.is_contiguous(); });
  if (tokens > kernel.max_tokens || tokens == 0 || !in_rows) {
    std::vector<Tensor> parts;
    for (size_t i = 0; i < weights.size(); i++)
      parts.push_back(linear_of_many(x, weights[i], biases.empty() ? std::nullopt : std::optional<Tensor>(biases[i])));
    return parts.size() == 1 ? parts[0] : concatenate(parts);
  }
  const ScalarType type = number_type(kernel.bytes);
  STD_TORCH_CHECK(x.scalar_type() == type, "x must be of the kernel's type");
  int64_t out = 0;
  for (size_t i = 0; i < weights.size(); out += weights[i++].size(0)) {
    const Tensor &weight = weights[i];
    STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == in && weight.scalar_type() == type, "a weight of another size or type");
    STD_TORCH_CHECK(biases.empty() || (biases[i].dim() == 1 && biases[i].is_contiguous() && biases[i].size(0) == weight.size(0) &&
                                       biases[i].scalar_type() == type),
                    "a bias of another size or type");
  }
  Tensor y = torch::stable::new_empty(x, {1, tokens, out});
  constexpr int64_t kGrain = 8;  // rows of one thread are a multiple of it
  const int64_t grains = (out + kGrain - 1) / kGrain;
  const int64_t threads = out * in < 1 << 15 ? 1 : std::min<int64_t>(grains, torch::stable::get_num_threads());
  on_threads(threads, [&](int64_t thread, int64_t count) {
    const int64_t begin = grains * thread / count * kGrain, end = std::min(out, grains * (thread + 1) / count * kGrain);
    int64_t row = 0;
    for (size_t i = 0; i < weights.size(); row += weights[i++].size(0)) {
      const int64_t first = std::max(begin - row, int64_t(0)), last = std::min(end - row, weights[i].size(0));
      if (first < last)
        kernel.multiply(x.data_ptr(), tokens, in, weights[i].data_ptr(), biases.empty() ? nullptr : biases[i].data_ptr(),
                        (char *)y.data_ptr() + row * kernel.bytes, out, first, last);
    }
  });
  return y;
}

}  // namespace

const KvcLookupKernel *find_lookup_kernel(uint64_t key) { return find_kernel(lookup_kernels, key); }

STABLE_TORCH_LIBRARY(kvc_native, m) {
  m.def("load(str path, int variant) -> int");
  m.def(
      "attend(Tensor query, Tensor key, Tensor value, Tensor? learnt_sinks, Tensor? sink_query, Tensor? slopes, Tensor table, "
      "Tensor kv_heads, Tensor(a!) out, int relay_sessions, int relay_tokens) -> int");
  m.def(
      "attend_part(Tensor query, Tensor key, Tensor value, Tensor? learnt_sinks, Tensor? slopes, Tensor table, Tensor kv_heads, "
      "Tensor(a!) out, Tensor(b!) states, int first, int end, bool last) -> ()");
  m.def("linears(Tensor x, Tensor[] weights, Tensor[]? biases, str kernel) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(kvc_native, CompositeExplicitAutograd, m) { m.impl("load", TORCH_BOX(&load)); }
STABLE_TORCH_LIBRARY_IMPL(kvc_native, CPU, m) {
  m.impl("attend", TORCH_BOX(&attend));
  m.impl("attend_part", TORCH_BOX(&attend_part));
  m.impl("linears", TORCH_BOX(&linears));
}
