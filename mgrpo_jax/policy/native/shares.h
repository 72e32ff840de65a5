// Work that the threads that XLA has share among them.

#ifndef MGRPO_JAX_POLICY_NATIVE_SHARES_H_
#define MGRPO_JAX_POLICY_NATIVE_SHARES_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace mgrpo {

constexpr int64_t kShares = 8;   // of the work, for each thread
constexpr int kSpins = 1 << 12;  // looks before others may have the core

// Parts that are taken from a counter, so no core has less to do than others
// while there are parts, and none waits for a thread that never comes.
template <typename Do>
class Shares {
 public:
  Shares(int64_t number, int64_t threads, Do work)
      : number_(number),
        share_(std::max<int64_t>(1, number / (threads * kShares))),
        work_(std::move(work)) {}

  // Does parts until all are taken.
  void Work() {
    for (;;) {
      const int64_t first = taken_.fetch_add(share_);
      if (first >= number_) return;
      const int64_t last = std::min(first + share_, number_);
      for (int64_t part = first; part < last; ++part) work_(part);
      done_.fetch_add(last - first, std::memory_order_release);
    }
  }

  // Waits for those that others have taken.
  void Wait() const {
    for (int spins = 0; done_.load(std::memory_order_acquire) < number_;) {
      if (spins < kSpins) {
        ++spins;
      } else {
        std::this_thread::yield();
      }
    }
  }

 private:
  const int64_t number_, share_;
  const Do work_;
  std::atomic<int64_t> taken_{0}, done_{0};
};

// Calls work(0) to work(number - 1), each once, on the calling thread and on
// what others have time; returns when all are done. A thread that comes late
// finds nothing left, and `work` still there.
template <typename Do>
void Share(xla::ffi::ThreadPool pool, int64_t number, Do work) {
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  auto shares =
      std::make_shared<Shares<Do>>(number, threads, std::move(work));
  for (int64_t thread = 1; thread < std::min(threads, number); ++thread) {
    pool.Schedule([shares] { shares->Work(); });
  }
  shares->Work();
  shares->Wait();
}

}  // namespace mgrpo

#endif  // MGRPO_JAX_POLICY_NATIVE_SHARES_H_
