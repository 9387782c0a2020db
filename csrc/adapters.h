// Adapters beside the weights: low-rank changes of the matrices inside the layers, y = W x + B (A x), in float32; or
// virtual tokens that stand before the text.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "tensor.h"

namespace optlm {

// The matrices of a layer that an adapter may change, in the order of their slots.
inline constexpr const char* kSlotNames[] = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
                                             "self_attn.out_proj", "fc1", "fc2"};
inline constexpr int64_t kSlots = 6;

struct LowRank {
  int64_t rank = 0;      // 0: no change
  std::vector<float> a;  // (rank, padded inputs)
  std::vector<float> b;  // (rank, padded outputs), with the adapter's scale in it
};

struct Adapter {
  std::vector<LowRank> changes;  // (layers, slots)
  // Keys and values of virtual tokens that stand before the text: (layers, blocks of 16, block) as in the cache.
  std::vector<uint8_t> prefix;
  int64_t prefix_tokens = 0;
  int64_t text_start = 0;  // position of the text's first token
};

class Adapters {
 public:
  // Makes room for an adapter of no changes yet; its id is the lowest that is free.
  int32_t add(int64_t layers);
  void remove(int32_t id);
  bool holds(int32_t id) const { return id >= 0 && id < std::ssize(all_) && all_[id] != nullptr; }
  Adapter& operator[](int32_t id) { return *all_[id]; }
  const Adapter& operator[](int32_t id) const { return *all_[id]; }
  int64_t largest_rank() const { return largest_rank_; }

  // Sets the change of one slot from A (rank, inputs) and B (outputs, rank).
  void set(int32_t id, int64_t place, const float* a, const float* b, int64_t rank, int64_t inputs, int64_t outputs);

 private:
  std::vector<std::unique_ptr<Adapter>> all_;
  int64_t largest_rank_ = 0;
};

}  // namespace optlm
