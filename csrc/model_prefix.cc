// Virtual tokens of adapters: from what files hold to keys and values in blocks like those of the cache.
#include <algorithm>
#include <numeric>
#include <vector>

#include "float16.h"
#include "model.h"

namespace optlm {

// Bytes of one layer of an adapter's virtual tokens.
int64_t Model::prefix_bytes(const Adapter& adapter) const {
  return round_up(adapter.prefix_tokens, kBlockTokens) / kBlockTokens * block_stride_ * element_bytes(config_.kv_dtype);
}

void Model::place_prefix(Adapter& adapter, int64_t count, int64_t text_start) const {
  adapter.prefix_tokens = count;
  adapter.text_start = text_start;
  adapter.prefix.assign(config_.num_layers * prefix_bytes(adapter), 0);
}

void Model::set_prefix(int32_t id, const float* numbers, int64_t count, int64_t text_start) {
  Adapter& adapter = adapters_[id];
  place_prefix(adapter, count, text_start);
  const int64_t d = config_.hidden_size, padded_dim = round_up(head_dim_, kLanes);
  const int64_t head_stride = block_stride_ / config_.num_heads;
  const auto put = [&](uint8_t* layer, int64_t index, float value) {
    if (config_.kv_dtype == DType::kF32) {
      reinterpret_cast<float*>(layer)[index] = value;
    } else {
      reinterpret_cast<uint16_t*>(layer)[index] = float_to_half(value);
    }
  };
  for (int64_t index = 0; index < config_.num_layers; ++index) {
    uint8_t* layer = adapter.prefix.data() + index * prefix_bytes(adapter);
    for (int64_t t = 0; t < count; ++t) {
      const float* key = numbers + (t * config_.num_layers + index) * 2 * d;
      const int64_t block = t / kBlockTokens * block_stride_, slot = t % kBlockTokens;
      for (int64_t i = 0; i < d; ++i) {
        const int64_t head = block + i / head_dim_ * head_stride, dim = i % head_dim_;
        put(layer, head + dim * kBlockTokens + slot, key[i]);
        put(layer, head + head_dim_ * kBlockTokens + slot * padded_dim + dim, key[d + i]);
      }
    }
  }
}

void Model::set_prompt(int32_t id, const float* embeddings, int64_t count, int64_t text_start) {
  Adapter& adapter = adapters_[id];
  place_prefix(adapter, count, text_start);
  std::vector<int32_t> positions(count);
  std::vector<int32_t> blocks(round_up(count, kBlockTokens) / kBlockTokens);
  std::iota(positions.begin(), positions.end(), 0);
  std::iota(blocks.begin(), blocks.end(), 0);
  adapter_of_.clear();
  for (int64_t first = 0; first < count; first += config_.max_batch_tokens) {
    Batch batch;
    batch.num_tokens = std::min(config_.max_batch_tokens, count - first);
    const int32_t starts[] = {0, static_cast<int32_t>(batch.num_tokens)};
    batch.embeddings = embeddings + first * config_.embed_dim;
    batch.positions = positions.data() + first;
    batch.seq_starts = starts;
    batch.block_tables = blocks.data();
    batch.table_width = static_cast<int64_t>(blocks.size());
    batch.num_sequences = 1;
    batch.adds_positions = text_start > 0;
    batch.prefix = &adapter;
    team_.run([&](int rank) { run_rank(batch, rank); });
  }
}

}  // namespace optlm
