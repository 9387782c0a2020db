// Shapes and storage shared by all of the core.
//
// Letters: T tokens, B sequences, D model, E embedding, F feed-forward, H heads, K head dim, V vocabulary,
// L layers, S context. All sizes are in elements unless a name says bytes.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

namespace optlm {

inline constexpr int64_t kPanelRows = 64;    // output rows a kernel computes together: 4 vectors of 16
inline constexpr int64_t kGroup = 128;       // inputs summed before the float total is touched
inline constexpr int64_t kMaskWords = kGroup / 64;
inline constexpr int64_t kLanes = 16;        // width of the virtual vector every kernel is defined on
inline constexpr int64_t kBlockTokens = 16;  // tokens in one KV block; one vector of positions

// Weights are cut to 8 bits around zero and stored plus 128, so that they are the unsigned side of a VNNI product.
inline constexpr int32_t kWeightZero = 128;

enum class DType { kF32, kF16, kBF16, kInt8 };

constexpr int64_t element_bytes(DType dtype) {
  return dtype == DType::kF32 ? 4 : dtype == DType::kInt8 ? 1 : 2;
}

constexpr int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Each panel of 64 rows is one contiguous piece, so what a thread needs is one stream.
enum class Layout {
  // Floats as [rows / 64][cols][64], int8 as [rows / 64][cols / 4][64][4].
  kPanels,
  // For inputs with many zeros: all 64 weights of one input stand together, so that an input that is zero costs no
  // read. Floats are the same as above; int8 is [rows / 64][cols][64], with row 16 j + 4 l + e of a panel at byte
  // 16 l + 4 j + e: the order in which interleaving four inputs by 128-bit lanes yields them.
  kByInput,
};

// y[rows] = W[rows, cols] x[cols]. Rows are padded to 64 and columns to a group, with zero weights.
struct Matrix {
  DType dtype = DType::kF32;
  Layout layout = Layout::kPanels;
  int64_t rows = 0;
  int64_t cols = 0;
  uint8_t* data = nullptr;
  float* scales = nullptr;  // (padded_rows) int8 only: weight = (byte - 128) * scale

  int64_t padded_rows() const { return round_up(rows, kPanelRows); }
  int64_t padded_cols() const { return round_up(cols, kGroup); }
  int64_t panels() const { return padded_rows() / kPanelRows; }
  int64_t panel_bytes() const { return kPanelRows * padded_cols() * element_bytes(dtype); }
  int64_t data_bytes() const { return panels() * panel_bytes(); }
};

// Inputs of a product. Float matrices read x; int8 matrices read the quantised form. Rows hold `groups` groups.
struct Activations {
  const float* x = nullptr;             // (T, groups * kGroup), zero in the padding
  const int8_t* q = nullptr;            // (T, groups * kGroup)
  const float* scale = nullptr;         // (T, groups)
  const int32_t* correction = nullptr;  // (T, groups) -128 * sum of q: takes the weights' offset back
  const uint64_t* active = nullptr;     // (T, groups, kMaskWords) a bit an input: set where it is not zero
  int64_t groups = 0;
};

// kBest stores nothing: it keeps the largest of a token's outputs.
enum class Epilogue { kStore, kRelu, kGelu, kGeluTanh, kAdd, kBest };

// The largest output so far, the lowest of equals. NaN once an output is not finite.
struct Best {
  float value = -INFINITY;
  int32_t row = 0;
};

struct MatmulArgs {
  const Matrix* w = nullptr;
  Activations in;
  int64_t tokens = 0;
  int64_t panel_begin = 0;
  int64_t panel_end = 0;
  const float* bias = nullptr;  // (padded_rows)
  float* out = nullptr;         // (T, out_stride)
  int64_t out_stride = 0;
  Best* best = nullptr;         // (T) for kBest, in place of out
  const float* extra = nullptr;      // (T, extra_stride) added before the epilogue, for the tokens that are
  const uint8_t* changed = nullptr;  // (T) not 0 here; null: for none
  int64_t extra_stride = 0;
  Epilogue epilogue = Epilogue::kStore;
  bool skip_zeros = true;    // by-input layout only; changes speed, never a bit of the result
  float* scratch = nullptr;  // matmul_scratch_floats(w->cols), of this thread
};

inline constexpr int64_t kTokenBlock = 48;   // tokens that share one pass over a panel
inline constexpr int64_t kSparseTokens = 8;  // tokens whose active inputs are listed
// Totals of a block of tokens and one group of a panel; or lists of active inputs.
inline constexpr int64_t matmul_scratch_floats(int64_t cols) {
  const int64_t dense = (kTokenBlock + kGroup / 4) * kPanelRows;
  const int64_t sparse = kPanelRows + kSparseTokens * (round_up(cols, kGroup) + 64);
  return dense > sparse ? dense : sparse;
}

// Elements of a block of keys and values of one head: keys as (head_dim, 16 positions), values as (16 positions, padded
// head_dim). Those of 8 bits stand for their number times a scale; 16 float scales of the keys and 16 of the values follow.
constexpr int64_t kv_scales_at(int64_t head_dim) { return kBlockTokens * (head_dim + round_up(head_dim, kLanes)); }
constexpr int64_t kv_block_elements(DType dtype, int64_t head_dim) {
  return kv_scales_at(head_dim) + (dtype == DType::kInt8 ? 2 * kBlockTokens * static_cast<int64_t>(sizeof(float)) : 0);
}

// New tokens of one sequence in one head: their keys and values enter the cache, then each attends to all up to itself.
struct AttentionArgs {
  const float* q = nullptr;  // (count, stride): query, key and value of this head
  const float* k = nullptr;
  const float* v = nullptr;
  int64_t stride = 0;
  float query_scale = 1.0f;
  int64_t count = 0;
  int64_t first_position = 0;
  int64_t first_wanted = 0;  // tokens before it enter the cache, and their output is not needed
  const int32_t* blocks = nullptr;  // (context / 16) block ids of the sequence
  // Virtual tokens that stand before position 0, in blocks like those of the cache, one after another; their last block
  // ends in zeros. They take the places 0 to prefix_places() - 1 of a row of scores, the text those after it.
  const uint8_t* prefix = nullptr;
  int64_t prefix_tokens = 0;
  // Cache of this layer and head; block b begins at cache + b * block_stride elements of kv_dtype.
  uint8_t* cache = nullptr;
  int64_t block_stride = 0;
  DType kv_dtype = DType::kF32;
  int64_t head_dim = 0;
  float* out = nullptr;  // (count, out_stride)
  int64_t out_stride = 0;
  float* scratch = nullptr;  // attention_scratch_floats

  int64_t prefix_places() const { return round_up(prefix_tokens, kBlockTokens); }
  // The block that holds 16 places from 16 * index on.
  template <class KV>
  const KV* block(int64_t index) const {
    const int64_t own = prefix_places() / kBlockTokens;
    if (index < own) return reinterpret_cast<const KV*>(prefix) + index * block_stride;
    return reinterpret_cast<const KV*>(cache) + blocks[index - own] * block_stride;
  }
};

inline constexpr int64_t kQueryTile = 4;
// `places`: of the longest text and of the virtual tokens before it.
inline constexpr int64_t attention_scratch_floats(int64_t places, int64_t head_dim) {
  return kQueryTile * (round_up(places, 4 * kBlockTokens) + 2 * round_up(head_dim, kLanes));
}

}  // namespace optlm
