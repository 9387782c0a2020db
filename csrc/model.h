// OPT over packed weights and a paged KV cache: one forward pass a step, for any mix of prompts and single tokens.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "adapters.h"
#include "kernels.h"
#include "memory.h"
#include "pack.h"
#include "threads.h"

namespace optlm {

struct ModelConfig {
  int64_t vocab_size = 0;
  int64_t hidden_size = 0;
  int64_t num_layers = 0;
  int64_t ffn_dim = 0;
  int64_t num_heads = 0;
  int64_t max_positions = 0;
  int64_t embed_dim = 0;
  bool norm_before = true;     // false: the 350M, norm after the residual
  bool final_norm = true;
  bool tied = true;
  Epilogue activation = Epilogue::kRelu;
  int64_t position_offset = 2;  // the position table has two rows no token uses

  DType dtype = DType::kInt8;
  DType kv_dtype = DType::kF16;
  DType positions_dtype = DType::kF32;  // the position table is kept as the checkpoint stores it
  int64_t num_blocks = 0;
  int64_t max_batch_tokens = 0;
};

// Arrays of one step; shapes as in docs/architecture.md.
struct Batch {
  const int32_t* tokens = nullptr;
  const int32_t* positions = nullptr;
  const int32_t* seq_starts = nullptr;
  const int32_t* block_tables = nullptr;
  const int32_t* adapters = nullptr;  // (num_sequences) id of each one's adapter, -1 for none; or null
  const int32_t* rows = nullptr;  // tokens whose results are wanted, ascending
  const float* embeddings = nullptr;  // (T, E) in place of tokens, or null
  bool adds_positions = true;
  Adapter* prefix = nullptr;  // keys and values go there and not to the cache, or null
  int64_t num_tokens = 0;
  int64_t num_sequences = 0;
  int64_t table_width = 0;
  int64_t num_rows = 0;
  float* logits = nullptr;  // (num_rows, V), or null
  float* hidden = nullptr;  // (num_rows, E) input of the head, or null
  int32_t* best = nullptr;  // (num_rows) the likeliest token, -1 where a logit is not finite; or null
};

struct Linear {
  Matrix w;
  float* bias = nullptr;  // (padded rows) zeros where the model has none
  int64_t place = -1;     // of its first slot among an adapter's changes; -1 where there are none
  int64_t slots = 1;      // the matrix is that many sections of equally many panels, a slot each
};

struct Norm {
  float* weight = nullptr;  // (D) ones where the model has none
  float* bias = nullptr;
};

struct Layer {
  Norm attention_norm, ffn_norm;
  Linear qkv, out, fc1, fc2;  // qkv: three sections, each padded to whole panels
};

class Model {
 public:
  // `packed`: the weights() of a model of the same config, 64-byte aligned and kept by the caller; or null, and every
  // tensor must be given to load().
  Model(const ModelConfig& config, const Kernels& kernels, int threads, uint8_t* packed, int64_t packed_bytes);

  // Copies one tensor of the checkpoint, converting to the model's format. An empty string when all is well, else
  // what is wrong with it.
  std::string load(const std::string& name, const Source& source);

  // `batch` must be valid: see check().
  void forward(const Batch& batch);
  // An empty string, or the first thing that is wrong with the batch.
  std::string check(const Batch& batch) const;

  // The last product alone: logits (rows, V) of vectors (rows, E), in steps of at most max_batch_tokens.
  void head(const float* hidden, int64_t rows, float* logits);

  // An adapter of no changes yet. `set_adapter` gives it the change of one matrix; an empty string, or what is wrong.
  int32_t add_adapter() { return adapters_.add(config_.num_layers); }
  std::string set_adapter(int32_t id, const std::string& module, const float* a, const float* b, int64_t rank,
                          int64_t inputs, int64_t outputs);
  bool has_adapter(int32_t id) const { return adapters_.holds(id); }
  void remove_adapter(int32_t id) { adapters_.remove(id); }
  // Gives an adapter virtual tokens: the keys and values of every layer (n, 2 L D), a token's layer after layer and keys
  // before values; or embeddings (n, E), which the layers turn into keys and values here, with the positions from 0 on
  // when the text comes behind them (text_start > 0).
  void set_prefix(int32_t id, const float* numbers, int64_t count, int64_t text_start);
  void set_prompt(int32_t id, const float* embeddings, int64_t count, int64_t text_start);

  void copy_blocks(const int32_t* source, const int32_t* target, int64_t count);

  const ModelConfig& config() const { return config_; }
  const Kernels& kernels() const { return kernels_; }
  int threads() const { return team_.size(); }
  // All weights in the form that runs, as one piece of memory.
  const Arena& weights() const { return weights_; }
  // Bytes of the matrices one decoded token reads when nothing is skipped.
  int64_t bytes_per_token() const;
  // To be held around everything that runs or changes the model when several threads may call.
  std::mutex& mutex() { return mutex_; }
  void set_skip_zeros(bool on) { skip_zeros_ = on; }
  // Share of fc2's inputs that were not zero since the last call; NaN when the model is not int8 or nothing ran.
  double active_share();

 private:
  struct Quantized {  // inputs of a product; shapes as in Activations
    int8_t* q = nullptr;
    float* scale = nullptr;
    int32_t* correction = nullptr;
    uint64_t* active = nullptr;
  };

  // What a thread has for itself.
  struct Own {
    float* scratch = nullptr;
    float* normed = nullptr;  // (width) one token's input of a product, and its quantised form
    Quantized quantized;
    Best* best = nullptr;  // (T)
    uint8_t* changed = nullptr;   // (T) whether the product under way changes by the token's adapter
    std::vector<float> factors;   // (largest rank) A x
  };

  // Where a tensor of the checkpoint goes: into panels of a matrix, into a vector, or into the position table.
  struct Target {
    Matrix* w = nullptr;
    int64_t first_panel = 0;
    float* vector = nullptr;
    int64_t rows = 0, cols = 0;
  };

  void place_weights();
  void place_buffers();
  void place(Linear& linear, int64_t rows, int64_t cols, Layout layout);
  void place(Norm& norm);
  Target find(const std::string& name);
  bool pack(const Source& source, const Target& target);
  bool load_positions(const Source& source);

  int64_t prefix_bytes(const Adapter& adapter) const;
  void place_prefix(Adapter& adapter, int64_t count, int64_t text_start) const;
  void run_rank(const Batch& batch, int rank);
  void embed(const Batch& batch, int rank);
  void attention_block(const Layer& layer, const Batch& batch, int64_t index, int rank);
  void attend(const Batch& batch, int64_t index, int rank);
  void keep_rows(const Batch& batch, int rank);
  void feed_forward(const Layer& layer, int64_t tokens, int rank);
  void results(const Batch& batch, int rank);
  void find_best(const Batch& batch, const Activations& in, int rank);

  Quantized place_quantized(int64_t groups);
  void normalize(const Norm& norm, int64_t tokens, int rank);
  Activations prepare(const Norm* norm, const float* x, int64_t stride, int64_t tokens, int rank, Stream next);
  void quantize(const float* x, int64_t first, int64_t count, const Quantized& z) const;
  void multiply(const Linear& linear, Range panels, const Activations& in, int64_t tokens, float* out,
                int64_t out_stride, Epilogue epilogue, int rank);
  void project(const Linear& linear, const Activations& in, int64_t tokens, float* out, int64_t out_stride,
               Epilogue epilogue, int rank, Stream next = {});
  void change(const Linear& linear, Range panels, int64_t tokens, int rank, MatmulArgs& args);
  Range panels_of(const Linear& linear, int rank) const { return share(linear.w.panels(), rank, team_.size()); }
  Stream stream(const Linear& linear, int rank) const;

  const ModelConfig config_;
  const Kernels& kernels_;
  Team team_;
  std::mutex mutex_;
  Arena weights_, cache_;

  Linear embedding_, head_, project_in_, project_out_;  // head_ is the embedding when tied
  Norm final_norm_;
  uint8_t* positions_ = nullptr;  // (S + 2, D)
  std::vector<Layer> layers_;
  bool skip_zeros_ = true;

  int64_t width_ = 0;        // D padded to a group: the stride of x, normed and context
  int64_t ffn_width_ = 0;
  int64_t embed_width_ = 0;
  int64_t qkv_section_ = 0;  // D padded to panels
  int64_t head_dim_ = 0;
  bool by_heads_ = false;    // each thread's share of queries, keys and values is that of whole heads
  bool by_groups_ = false;   // each thread's share of the feed-forward units is whole groups
  int64_t block_stride_ = 0;  // elements of one KV block of one layer

  Arena buffers_;
  float* x_ = nullptr;        // (T, width) residual stream
  float* normed_ = nullptr;   // (T, width)
  float* qkv_ = nullptr;      // (T, 3 qkv_section)
  float* context_ = nullptr;  // (T, width)
  float* ffn_ = nullptr;      // (T, ffn_width)
  float* embed_ = nullptr;    // (T, embed_width)
  Quantized quantized_, ffn_quantized_;
  std::vector<Own> own_;  // one a thread
  Adapters adapters_;
  std::vector<const Adapter*> adapter_of_;  // (T) each token's; empty when the batch has none
  float* extra_ = nullptr;                  // (T, extra_stride_) what adapters add to a product
  int64_t extra_stride_ = 0;
  int64_t active_inputs_ = 0, seen_inputs_ = 0;
};

}  // namespace optlm
