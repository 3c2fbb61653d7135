// One query token over keys that a sketch finds: scan, choice, attention over rows, and an estimate of what is not read.
#pragma once

#include "attend_rows.h"
#include "sketch_rest.h"

namespace {

template <class S>
constexpr KvcLookupKernel lookup_kernel(uint64_t key) {
  return {
      key,
      S::kHeadDim,
      S::kValueDim,
      S::kQueries,
      sizeof(typename S::Query),
      sizeof(typename S::Stored),
      append_row<S>,
      prepare_query<S>,
      rank_runs<S>,
      scan_runs<S>,
      sum_weights<S>,
      share_weights<S>,
      choose_largest,
      sum_runs<S>,
      attend_rows<S>,
      logit_of<S>,
      add_runs<S>,
  };
}

}  // namespace
