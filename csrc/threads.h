// A team of threads that run one function together and meet at barriers.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <type_traits>
#include <vector>

namespace optlm {

struct Range {
  int64_t begin, end;
};

// The part of `count` items that falls to `rank`; parts differ by at most one and keep the order.
inline Range share(int64_t count, int rank, int size) { return {count * rank / size, count * (rank + 1) / size}; }

// Memory that is read from front to back.
struct Stream {
  const uint8_t* data = nullptr;
  int64_t bytes = 0;
};

class Team {
 public:
  // Throws std::runtime_error when the system refuses a thread.
  explicit Team(int size);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return size_; }

  // Calls body(rank) once in each of `size` threads, the caller's among them, and returns when all are done. One
  // caller at a time. Throws std::runtime_error in a forked process, which has none of the threads.
  template <class Body>
  void run(Body&& body) {
    start([](void* context, int rank) { (*static_cast<std::remove_reference_t<Body>*>(context))(rank); }, &body);
  }

  // Inside run: returns when every member has called it. What was written before is visible after. Whoever waits
  // brings memory that it reads next into the cache meanwhile.
  void barrier(const Stream& next = {});

 private:
  using Function = void (*)(void*, int);
  void start(Function function, void* context);
  void work(int rank);
  void stop();

  const int size_;
  const int process_;  // whose threads they are
  Function function_ = nullptr;
  void* context_ = nullptr;
  bool stop_ = false;
  alignas(64) std::atomic<uint32_t> job_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
  std::vector<std::thread> threads_;
};

}  // namespace optlm
