// Where the positions of a store lie, and which of them a query sees.
#pragma once

#include <algorithm>
#include <vector>

#include "kernel.h"

namespace {

// Stores are described by int64 words, which runtime/descriptor.py writes:
//   growing   0, parts, and of each part: key, value, bytes from one head's keys to the next one's, the same of values, first
//             position, end of its positions
//   ring      1, key, value, the two strides in bytes, sink tokens, slots of the window
//   kivi      2, then KiviWord's, and of each part of keys, then of values: codes, scales, their strides, first, end, slots of a
//             ring or 0.  A place is a position behind the sinks; first and end of keys are counted in groups of places.
enum StoreKind : int64_t { kGrowing = 0, kRing = 1, kKivi = 2 };
constexpr int64_t kPartWords = 6, kPackedWords = 7;
enum KiviWord {
  kSinks = 1,
  kSinkKey,
  kSinkValue,
  kSinkKeyStride,
  kSinkValueStride,
  kExactKey,
  kExactValue,
  kExactKeyStride,
  kExactValueStride,
  kCodedKeys,    // places whose keys are quantised; the exact key of place p has slot p - kCodedKeys
  kCodedValues,  // the exact value of place p has slot p mod kExactValues
  kExactValues,
  kRoomEnd,  // positions that there is room for
  kGroupTokens,
  kExactValueBytes,  // of one token
  kValueCodeBytes,
  kValueScaleBytes,
  kKeyParts,
  kValueParts,
  kPackedParts
};

// Where unit `unit` of quantised tokens lies, and the first unit behind it that does not follow in memory.
struct PackedUnit {
  const char *codes, *scales;  // of slot 0
  int64_t slot, end;

  PackedUnit(const int64_t *part, int64_t parts, int64_t head, int64_t unit) {
    for (; parts > 1 && unit >= part[5]; parts--) part += kPackedWords;
    codes = (const char *)part[0] + head * part[2], scales = (const char *)part[1] + head * part[3];
    slot = part[6] ? unit % part[6] : unit - part[4];
    end = part[6] ? unit - slot + part[6] : part[5];
  }
};

inline void find_kivi_pieces(const int64_t *store, int64_t head, int64_t from, int64_t to, std::vector<KvcPiece> &pieces) {
  const int64_t sinks = store[kSinks], group = store[kGroupTokens], *keys = store + kPackedParts;
  const int64_t *values = keys + store[kKeyParts] * kPackedWords;
  if (from < sinks && from < to) {
    const int64_t tokens = std::min(to, sinks) - from;
    pieces.push_back({(const char *)store[kSinkKey] + head * store[kSinkKeyStride],
                      (const char *)store[kSinkValue] + head * store[kSinkValueStride], from, tokens, from});
    from += tokens;
  }
  while (from < to) {
    const int64_t place = from - sinks;
    int64_t end = to - sinks;
    KvcPiece piece = {(const char *)store[kExactKey] + head * store[kExactKeyStride],
                      (const char *)store[kExactValue] + head * store[kExactValueStride], place - store[kCodedKeys], 0, from};
    if (place < store[kCodedKeys]) {
      const PackedUnit unit(keys, store[kKeyParts], head, place / group);
      piece.key = unit.codes, piece.key_scales = unit.scales, piece.slot = unit.slot * group + place % group;
      end = std::min({end, store[kCodedKeys], unit.end * group});
    }
    // The key's slot is the piece's: the value's address is moved so that its slot has the same number.
    if (place < store[kCodedValues]) {
      const PackedUnit unit(values, store[kValueParts], head, place);
      const int64_t moved = unit.slot - piece.slot;
      piece.value = unit.codes + moved * store[kValueCodeBytes], piece.value_scales = unit.scales + moved * store[kValueScaleBytes];
      end = std::min({end, store[kCodedValues], unit.end});
    } else {
      const int64_t slot = place % store[kExactValues];
      piece.value = (const char *)piece.value + (slot - piece.slot) * store[kExactValueBytes];
      end = std::min(end, place + store[kExactValues] - slot);
    }
    piece.tokens = end - place;
    pieces.push_back(piece);
    from += piece.tokens;
  }
}

// Positions [from, to) of one head, as pieces of the store.
inline void find_pieces(const int64_t *store, int64_t head, int64_t from, int64_t to, std::vector<KvcPiece> &pieces) {
  if (store[0] == kKivi) return find_kivi_pieces(store, head, from, to, pieces);
  if (store[0] == kGrowing) {
    for (int64_t i = 0; i < store[1]; i++) {
      const int64_t *part = store + 2 + i * kPartWords;
      const int64_t first = std::max(from, part[4]), end = std::min(to, part[5]);
      if (first < end)
        pieces.push_back(
            {(const char *)part[0] + head * part[2], (const char *)part[1] + head * part[3], first - part[4], end - first, first});
    }
    return;
  }
  const int64_t sink = store[5], window = store[6];
  const char *key = (const char *)store[1] + head * store[3], *value = (const char *)store[2] + head * store[4];
  while (from < to) {
    const int64_t slot = from < sink ? from : sink + (from - sink) % window;
    const int64_t tokens = std::min(to - from, sink + window - slot);  // the first round runs through the sinks into the window
    pieces.push_back({key, value, slot, tokens, from});
    from += tokens;
  }
}

// The first position of an attention chunk, and the end of it.
inline int64_t chunk_start(const KvcAttendKernel &kernel, int64_t position) {
  return kernel.chunk_tokens ? position / kernel.chunk_tokens * kernel.chunk_tokens : 0;
}
inline int64_t chunk_end(const KvcAttendKernel &kernel, int64_t position) {
  return kernel.chunk_tokens ? chunk_start(kernel, position) + kernel.chunk_tokens : INT64_MAX;
}

// Positions that queries of one attention chunk see, at least one of them each: two ranges, sinks and others, either may be empty.
// They are one where nothing lies between them and they are shown the same query.
struct Seen {
  int64_t sink, sink_end, first, end;

  Seen(const KvcAttendKernel &kernel, int64_t first_query, int64_t last_query) {
    sink = chunk_start(kernel, first_query);
    sink_end = std::max(sink, std::min(kernel.sink_tokens, last_query + 1));
    first = kernel.recent_tokens ? std::max(sink_end, first_query + 1 - kernel.recent_tokens) : sink_end;
    end = last_query + 1;
    if (first == sink_end && !kernel.cache_index) first = sink, sink_end = sink;
  }
  int64_t tokens() const { return sink_end - sink + end - first; }
  // Of keys: the sinks that are shown another query fill chunks of their own.
  int64_t sink_chunks(const KvcAttendKernel &kernel) const { return kernel.cache_index ? chunks_of(sink_end - sink) : 0; }
  int64_t chunks(const KvcAttendKernel &kernel) const {
    return kernel.cache_index ? chunks_of(sink_end - sink) + chunks_of(end - first) : chunks_of(tokens());
  }

 private:
  static int64_t chunks_of(int64_t tokens) { return (tokens + kChunkTokens - 1) / kChunkTokens; }
};

// What is seen, in chunks of keys: pieces of chunk c are [cuts[c], cuts[c + 1]).
struct Chunks {
  std::vector<KvcPiece> pieces, found;
  std::vector<int64_t> cuts;

  void find(const KvcAttendKernel &kernel, const int64_t *store, int64_t head, const Seen &seen) {
    pieces.clear();
    cuts.assign(1, 0);
    found.clear();
    find_pieces(store, head, seen.sink, seen.sink_end, found);
    if (kernel.cache_index) cut_found();
    find_pieces(store, head, seen.first, seen.end, found);
    cut_found();
  }
  int64_t count() const { return cuts.size() - 1; }

 private:
  void cut_found() {
    int64_t room = kChunkTokens;
    for (KvcPiece piece : found)
      while (piece.tokens) {
        KvcPiece cut = piece;
        cut.tokens = std::min(piece.tokens, room), cut.follow = piece.tokens - cut.tokens;
        pieces.push_back(cut);
        piece.slot += cut.tokens, piece.position += cut.tokens, piece.tokens -= cut.tokens;
        if (!(room -= cut.tokens)) cuts.push_back(pieces.size()), room = kChunkTokens;
      }
    if (room < kChunkTokens) cuts.push_back(pieces.size());
    found.clear();
  }
};

}  // namespace
