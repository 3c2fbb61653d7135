// Work that is cut into numbered pieces, on threads of its own.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

// work(index, thread), the next one to whoever is free.
template <class F>
void each_on_threads(int64_t count, int64_t threads, const F &work) {
  threads = std::min(threads, count);
  std::atomic<int64_t> next{0};
  std::atomic<bool> no_memory{false};
  auto run = [&](int64_t thread) {
    try {
      for (int64_t i; (i = next++) < count && !no_memory;) work(i, thread);
    } catch (const std::bad_alloc &) {
      no_memory = true;
    }
  };
  std::vector<std::thread> helpers;
  try {
    for (int64_t thread = 1; thread < threads; thread++) helpers.emplace_back(run, thread);
  } catch (const std::system_error &) {  // no more threads: those that are there do all of it
  }
  run(0);
  for (std::thread &helper : helpers) helper.join();
  if (no_memory) throw std::bad_alloc();
}
