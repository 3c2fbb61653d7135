// What the attending operators are told of a call, and how its tokens get into the stores.
#pragma once

#include <iterator>
#include <optional>
#include <vector>

#include "kernel.h"
#include "operators.h"
#include "stores.h"

namespace {

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
    group.kernel = find_attend_kernel(row[kKernel]);
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

}  // namespace
