// Large zeroed memory, backed by 2 MB pages where the system grants them.
#pragma once

#include <cstdint>

namespace optlm {

// Hands out 64-byte aligned pieces. Before reserve() it only counts, so that one pass over the pieces measures and a
// second, after reserve(bytes()), places them. Untouched pages cost nothing.
class Arena {
 public:
  Arena() = default;
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // Throws std::bad_alloc when the system refuses.
  void reserve(int64_t bytes, bool huge_pages);
  // Hands out pieces of memory that somebody else owns and keeps, instead of its own. 64-byte aligned.
  void borrow(uint8_t* data, int64_t bytes);
  uint8_t* take(int64_t bytes);
  float* take_floats(int64_t count) { return reinterpret_cast<float*>(take(count * 4)); }
  int64_t bytes() const { return used_; }
  uint8_t* data() const { return data_; }
  bool borrowed() const { return data_ != nullptr && mapping_ == nullptr; }

  static constexpr int64_t piece(int64_t bytes) { return (bytes + 63) / 64 * 64; }

 private:
  uint8_t* data_ = nullptr;
  int64_t reserved_ = 0;
  int64_t used_ = 0;
  uint8_t* mapping_ = nullptr;  // what the system gave; null when borrowed
  int64_t mapped_ = 0;
};

}  // namespace optlm
