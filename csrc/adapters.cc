#include "adapters.h"

#include <algorithm>

namespace optlm {

int32_t Adapters::add(int64_t layers) {
  const auto free = std::find(all_.begin(), all_.end(), nullptr);
  const auto id = static_cast<int32_t>(free - all_.begin());
  if (free == all_.end()) all_.emplace_back();
  all_[id] = std::make_unique<Adapter>();
  all_[id]->changes.resize(layers * kSlots);
  return id;
}

void Adapters::remove(int32_t id) { all_[id] = nullptr; }

void Adapters::set(int32_t id, int64_t place, const float* a, const float* b, int64_t rank, int64_t inputs,
                   int64_t outputs) {
  const int64_t padded_inputs = round_up(inputs, kGroup), padded_outputs = round_up(outputs, kPanelRows);
  LowRank change;
  change.rank = rank;
  change.a.assign(rank * padded_inputs, 0.0f);
  change.b.assign(rank * padded_outputs, 0.0f);
  for (int64_t r = 0; r < rank; ++r) {
    std::copy_n(a + r * inputs, inputs, change.a.data() + r * padded_inputs);
    for (int64_t o = 0; o < outputs; ++o) change.b[r * padded_outputs + o] = b[o * rank + r];
  }
  all_[id]->changes[place] = std::move(change);
  largest_rank_ = std::max(largest_rank_, rank);
}

}  // namespace optlm
