#include "threads.h"

#include <unistd.h>

#include <stdexcept>
#include <string>
#include <system_error>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace optlm {
namespace {

// Long enough to bridge the Python between two steps, short enough not to burn a core that others want.
constexpr int kIdleSpins = 4000;
// Members of a phase arrive within microseconds, unless two share a core: then spinning keeps the late one from
// arriving, and the core must be given away.
constexpr int kBarrierSpins = 300;
// Read in advance by a member that waits: some microseconds of memory's time, and a part of the second-level cache.
constexpr int64_t kAheadBytes = 128 * 1024;

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

}  // namespace

Team::Team(int size) : size_(size), process_(getpid()) {
  try {
    for (int rank = 1; rank < size_; ++rank) threads_.emplace_back([this, rank] { work(rank); });
  } catch (const std::system_error&) {
    const std::string started = std::to_string(threads_.size() + 1);
    stop();
    throw std::runtime_error("the system grants " + started + " of " + std::to_string(size_) + " threads");
  }
}

Team::~Team() { stop(); }

void Team::stop() {
  stop_ = true;
  job_.fetch_add(1, std::memory_order_release);
  job_.notify_all();
  for (auto& thread : threads_) thread.join();
}

void Team::start(Function function, void* context) {
  if (size_ == 1) return function(context, 0);
  if (getpid() != process_) {
    throw std::runtime_error("this process was forked after the model was loaded, which leaves its threads behind; "
                             "load the model in the new process");
  }
  function_ = function;
  context_ = context;
  job_.fetch_add(1, std::memory_order_release);
  job_.notify_all();
  function(context, 0);
  barrier();
}

void Team::work(int rank) {
  uint32_t seen = 0;
  while (true) {
    for (int spin = 0; spin < kIdleSpins && job_.load(std::memory_order_acquire) == seen; ++spin) pause();
    job_.wait(seen, std::memory_order_acquire);
    ++seen;
    if (stop_) return;
    function_(context_, rank);
    barrier();
  }
}

void Team::barrier(const Stream& next) {
  if (size_ == 1) return;
  const uint32_t phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    return;
  }
  const int64_t ahead = next.bytes < kAheadBytes ? next.bytes : kAheadBytes;
  for (int64_t i = 0; i < ahead && phase_.load(std::memory_order_acquire) == phase; i += 64) {
    __builtin_prefetch(next.data + i, 0, 2);  // into the second-level cache
  }
  for (int spin = 0; phase_.load(std::memory_order_acquire) == phase; ++spin) {
    if (spin < kBarrierSpins) {
      pause();
    } else {
      std::this_thread::yield();
    }
  }
}

}  // namespace optlm
