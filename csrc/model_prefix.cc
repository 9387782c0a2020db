// Virtual tokens of adapters: from what files hold to keys and values in blocks like those of the cache.
#include <algorithm>
#include <numeric>
#include <vector>

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
  const int64_t d = config_.hidden_size, element = element_bytes(config_.kv_dtype);
  const int64_t head_stride = block_stride_ / config_.num_heads;
  for (int64_t index = 0; index < config_.num_layers; ++index) {
    uint8_t* layer = adapter.prefix.data() + index * prefix_bytes(adapter);
    for (int64_t t = 0; t < count; ++t) {
      const float* key = numbers + (t * config_.num_layers + index) * 2 * d;
      for (int64_t head = 0; head < config_.num_heads; ++head, key += head_dim_) {
        uint8_t* block = layer + (t / kBlockTokens * block_stride_ + head * head_stride) * element;
        put_key_value(block, config_.kv_dtype, t % kBlockTokens, key, key + d, head_dim_);
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
