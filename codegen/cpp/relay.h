// Which sessions of a call see the same keys: spans that are attended to once for all of them (RelayAttention, Zhu et al. 2024).
//
// Sessions that were forked read the past where their parent has it, so what they share is what lies at the same address.  Spans are
// whole chunks of keys, so a session's chunks are the same as without, and their states are merged in the same order.
#pragma once

#include "stores.h"

namespace {

// When it pays to relay: so many sessions, over so many tokens at least.  sessions 0: never.
struct RelayRule {
  int64_t sessions, tokens;
  bool pays(int64_t of_sessions, int64_t of_tokens) const {
    return sessions && of_sessions >= std::max<int64_t>(2, sessions) && of_tokens >= std::max<int64_t>(1, tokens);
  }
};

// One session's store that grows, seen by one token; kind: only stores of one kind may hold the same keys.
struct Seer {
  const int64_t *store;
  int64_t tokens;  // before the new one
  std::pair<const void *, const void *> kind;
};

// Positions [first, end), whole chunks, that `members` (places in a list of seers) all see at one place in memory.  Spans of one member
// lie one behind the other from 0 on; depth: how many come before.
struct Relay {
  std::vector<int64_t> members;
  int64_t first, end, depth;
};

class Relays {
 public:
  std::vector<Relay> found;
  std::vector<int64_t> ends;  // of each seer: what relays cover of its past; 0 of none

  Relays(const std::vector<Seer> &seers, const RelayRule &rule) : ends(seers.size()), seers(seers), rule(rule) {
    std::vector<int64_t> all;
    for (size_t i = 0; i < seers.size(); i++) all.push_back(i);
    if (rule.sessions) share(all, 0, 0, 0);
  }

 private:
  const std::vector<Seer> &seers;
  const RelayRule rule;

  // The part of a store that holds a position.
  const int64_t *part_at(int64_t member, int64_t position) const {
    const int64_t *part = seers[member].store + 2;
    for (int64_t left = seers[member].store[1]; left > 1 && position >= part[5]; left--) part += kPartWords;
    return part;
  }

  // `members` see the same up to `at`, and relays cover it up to `first`: what do they see from there on?
  void share(std::vector<int64_t> members, int64_t first, int64_t at, int64_t depth) {
    const auto lies = [&](int64_t member) {
      const int64_t *part = part_at(member, at);
      return std::make_tuple(seers[member].kind, part[0], part[4]);
    };
    members.erase(std::remove_if(members.begin(), members.end(), [&](int64_t member) { return seers[member].tokens <= at; }),
                  members.end());
    std::stable_sort(members.begin(), members.end(), [&](int64_t one, int64_t other) { return lies(one) < lies(other); });
    for (auto begin = members.begin(), end = begin; begin != members.end(); begin = end) {
      end = std::find_if(begin, members.end(), [&](int64_t member) { return lies(member) != lies(*begin); });
      if (end - begin < std::max<int64_t>(2, rule.sessions)) continue;  // and no part of them is more
      const std::vector<int64_t> same(begin, end);
      int64_t until = INT64_MAX;
      for (int64_t member : same) until = std::min({until, seers[member].tokens, part_at(member, at)[5]});
      const int64_t whole = until / kChunkTokens * kChunkTokens;
      const bool pays = rule.pays(same.size(), whole - first);
      if (pays) {
        found.push_back({same, first, whole, depth});
        for (int64_t member : same) ends[member] = whole;
      }
      share(same, pays ? whole : first, until, depth + pays);
    }
  }
};

}  // namespace
