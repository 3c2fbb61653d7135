// kvc_native::attend: appends the new tokens of all sessions of a call to the stores of one site, and attends over them.
// kvc_native::attend_part: attends to one part of a store that is never in memory as a whole.
//
// Which thread does what never changes a result: a chunk of keys has one state, and the states of a row are merged in the order of their
// positions.
#include <optional>
#include <vector>

#include "attend_call.h"
#include "relay.h"

namespace {

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
    for (int64_t i = 0; i < std::min((end - slot) * token_bytes, kPrefetchBytes); i += 64) __builtin_prefetch(at + i, 0, 2);
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

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(kvc_native, m) {
  m.def(
      "attend(Tensor query, Tensor key, Tensor value, Tensor? learnt_sinks, Tensor? sink_query, Tensor? slopes, Tensor table, "
      "Tensor kv_heads, Tensor(a!) out, int relay_sessions, int relay_tokens) -> int");
  m.def(
      "attend_part(Tensor query, Tensor key, Tensor value, Tensor? learnt_sinks, Tensor? slopes, Tensor table, Tensor kv_heads, "
      "Tensor(a!) out, Tensor(b!) states, int first, int end, bool last) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(kvc_native, CPU, m) {
  m.impl("attend", TORCH_BOX(&attend));
  m.impl("attend_part", TORCH_BOX(&attend_part));
}
