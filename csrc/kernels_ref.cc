// The specification of every kernel: plain loops, one number at a time, in the order all other tables must keep.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "float16.h"
#include "kernels.h"

namespace optlm {
namespace {

// Sum and maximum over 16 lanes fold the upper half onto the lower: 8, 4, 2, 1.
float fold_sum(float* lane) {
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lane[i] += lane[i + half];
  }
  return lane[0];
}

void to_float(const void* source, DType dtype, int64_t n, float* target) {
  if (dtype == DType::kF32) {
    std::memcpy(target, source, n * sizeof(float));
    return;
  }
  const auto* bits = static_cast<const uint16_t*>(source);
  for (int64_t i = 0; i < n; ++i) target[i] = dtype == DType::kF16 ? half_to_float(bits[i]) : bf16_to_float(bits[i]);
}

float max_abs(const float* x, int64_t n) {
  float largest = 0.0f;
  for (int64_t i = 0; i < n; ++i) {
    if (!std::isfinite(x[i])) return INFINITY;
    largest = std::max(largest, std::fabs(x[i]));
  }
  return largest;
}

void quantize_weights(const float* x, int64_t n, float inverse_scale, uint8_t* target) {
  for (int64_t i = 0; i < n; ++i) {
    target[i] = static_cast<uint8_t>(kWeightZero + static_cast<int32_t>(std::nearbyint(x[i] * inverse_scale)));
  }
}

void layer_norm(const float* x, const float* weight, const float* bias, int64_t n, float* y) {
  float sum[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) sum[i % kLanes] += x[i];
  const float mean = fold_sum(sum) / static_cast<float>(n);
  float square[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) {
    const float centred = x[i] - mean;
    square[i % kLanes] = std::fma(centred, centred, square[i % kLanes]);
  }
  const float variance = fold_sum(square) / static_cast<float>(n);
  const float inverse = 1.0f / std::sqrt(variance + 1e-5f);
  for (int64_t i = 0; i < n; ++i) y[i] = std::fma((x[i] - mean) * inverse, weight[i], bias[i]);
}

void quantize(const float* x, int64_t groups, int8_t* q, float* scale, int32_t* correction, uint64_t* active) {
  for (int64_t g = 0; g < groups; ++g, x += kGroup, q += kGroup) {
    const float largest = max_abs(x, kGroup);
    // Below 1e-30 the inverse would overflow; such a group is zero beside anything else in the sum.
    const bool zero = largest < 1e-30f;
    const float inverse = zero ? 0.0f : 127.0f / largest;
    int32_t sum = 0;
    uint64_t* mask = active + g * kMaskWords;
    std::fill_n(mask, kMaskWords, 0);
    for (int64_t i = 0; i < kGroup; ++i) {
      q[i] = static_cast<int8_t>(std::nearbyint(x[i] * inverse));
      sum += q[i];
      if (q[i] != 0) mask[i / 64] |= uint64_t{1} << i % 64;
    }
    scale[g] = zero ? 0.0f : largest / 127.0f;
    correction[g] = -kWeightZero * sum;
  }
}

// 2^(x log2 e) by a degree-6 polynomial on [-ln2/2, ln2/2]; relative error below 2e-7. x <= 0.
float exp_nonpositive(float x) {
  x = std::max(x, -87.0f);
  const float n = std::nearbyint(x * 1.44269504f);
  float r = std::fma(n, -0.693359375f, x);
  r = std::fma(n, 2.12194440e-4f, r);
  float p = 1.3888889e-3f;
  p = std::fma(p, r, 8.3333333e-3f);
  p = std::fma(p, r, 4.1666667e-2f);
  p = std::fma(p, r, 1.6666667e-1f);
  p = std::fma(p, r, 0.5f);
  p = std::fma(p, r, 1.0f);
  p = std::fma(p, r, 1.0f);
  return p * std::bit_cast<float>((static_cast<int32_t>(n) + 127) << 23);
}

// x times the normal distribution's share below x. The tail below -|x| is Abramowitz and Stegun's 7.1.26
// (error under 1.5e-7) in x / sqrt(2); so nothing cancels on the negative side.
float gelu(float x) {
  const float z = std::fabs(x) * 0.70710678f;
  const float t = 1.0f / std::fma(z, 0.3275911f, 1.0f);
  float p = 1.061405429f;
  p = std::fma(p, t, -1.453152027f);
  p = std::fma(p, t, 1.421413741f);
  p = std::fma(p, t, -0.284496736f);
  p = std::fma(p, t, 0.254829592f);
  const float tail = 0.5f * (p * t) * exp_nonpositive(-(z * z));
  return x * (x > 0.0f ? 1.0f - tail : tail);
}

// The approximation with tanh: x times the logistic function of 1.5957691 (x + 0.044715 x^3).
float gelu_tanh(float x) {
  const float u = 1.5957691f * std::fma(0.044715f * x * x, x, x);
  const float e = exp_nonpositive(-std::fabs(u));
  return x * ((u > 0.0f ? 1.0f : e) / (1.0f + e));
}

float activate(float value, Epilogue epilogue) {
  if (epilogue == Epilogue::kRelu) return value > 0.0f ? value : 0.0f;
  if (epilogue == Epilogue::kGelu) return gelu(value);
  if (epilogue == Epilogue::kGeluTanh) return gelu_tanh(value);
  return value;
}

// Weight of `row` for input `col`, as stored.
template <class T>
T stored(const Matrix& w, int64_t row, int64_t col) {
  const int64_t r = row % kPanelRows;
  const T* panel = reinterpret_cast<const T*>(w.data) + row / kPanelRows * kPanelRows * w.padded_cols();
  if (sizeof(T) > 1) return panel[col * kPanelRows + r];
  if (w.layout == Layout::kByInput) return panel[col * kPanelRows + 16 * (r / 4 % 4) + 4 * (r / 16) + r % 4];
  return panel[col / 4 * 4 * kPanelRows + r * 4 + col % 4];
}

float float_weight(const Matrix& w, int64_t row, int64_t col) {
  if (w.dtype == DType::kF32) return stored<float>(w, row, col);
  const uint16_t bits = stored<uint16_t>(w, row, col);
  return w.dtype == DType::kF16 ? half_to_float(bits) : bf16_to_float(bits);
}

// Products of one group are summed first; the totals of the groups are summed in order.
float dot_int8(const Matrix& w, const Activations& in, int64_t row, int64_t t) {
  float total = 0.0f;
  for (int64_t g = 0; g < in.groups; ++g) {
    int32_t sum = in.correction[t * in.groups + g];
    for (int64_t i = g * kGroup; i < (g + 1) * kGroup; ++i) {
      sum += int32_t{stored<uint8_t>(w, row, i)} * in.q[t * in.groups * kGroup + i];
    }
    total = std::fma(static_cast<float>(sum), in.scale[t * in.groups + g], total);
  }
  return total;
}

float dot_float(const Matrix& w, const Activations& in, int64_t row, int64_t t) {
  float total = 0.0f;
  for (int64_t g = 0; g < in.groups; ++g) {
    float sum = 0.0f;
    for (int64_t i = g * kGroup; i < (g + 1) * kGroup; ++i) {
      sum = std::fma(in.x[t * in.groups * kGroup + i], float_weight(w, row, i), sum);
    }
    total += sum;
  }
  return total;
}

void matmul(const MatmulArgs& a) {
  const Matrix& w = *a.w;
  const int64_t end = std::min(a.panel_end * kPanelRows, w.rows);
  for (int64_t t = 0; t < a.tokens; ++t) {
    for (int64_t row = a.panel_begin * kPanelRows; row < end; ++row) {
      float y = w.dtype == DType::kInt8 ? std::fma(dot_int8(w, a.in, row, t), w.scales[row], a.bias[row])
                                        : dot_float(w, a.in, row, t) + a.bias[row];
      if (a.changed != nullptr && a.changed[t]) y += a.extra[t * a.extra_stride + row];
      if (a.epilogue == Epilogue::kBest) {
        Best& best = a.best[t];
        if (!std::isfinite(y)) best.value = NAN;
        if (y > best.value) best = {y, static_cast<int32_t>(row)};
        continue;
      }
      float& out = a.out[t * a.out_stride + row];
      out = a.epilogue == Epilogue::kAdd ? out + y : activate(y, a.epilogue);
    }
  }
}

float load_kv(const uint8_t* block, DType dtype, int64_t index) {
  if (dtype == DType::kF32) return reinterpret_cast<const float*>(block)[index];
  if (dtype == DType::kInt8) return reinterpret_cast<const int8_t*>(block)[index];
  return half_to_float(reinterpret_cast<const uint16_t*>(block)[index]);
}

// What a block's 8-bit keys (kind 0) or values (kind 1) are multiplied by.
float kv_scale(const AttentionArgs& a, const uint8_t* block, int64_t kind, int64_t slot) {
  if (a.kv_dtype != DType::kInt8) return 1.0f;
  return reinterpret_cast<const float*>(block + kv_scales_at(a.head_dim))[kind * kBlockTokens + slot];
}

// Numbers of one position, `step` elements apart from `begin` on.
void put_numbers(uint8_t* block, DType dtype, const float* x, int64_t dim, int64_t begin, int64_t step, float* scale) {
  float factor = 1.0f;
  if (dtype == DType::kInt8) {
    const float largest = max_abs(x, dim);
    const bool zero = largest < 1e-30f;
    factor = zero ? 0.0f : 127.0f / largest;
    *scale = zero ? 0.0f : largest / 127.0f;
  }
  for (int64_t d = 0; d < dim; ++d) {
    const int64_t place = begin + d * step;
    if (dtype == DType::kF32) {
      reinterpret_cast<float*>(block)[place] = x[d];
    } else if (dtype == DType::kF16) {
      reinterpret_cast<uint16_t*>(block)[place] = float_to_half(x[d]);
    } else {
      reinterpret_cast<int8_t*>(block)[place] = static_cast<int8_t>(std::nearbyint(x[d] * factor));
    }
  }
}

const uint8_t* block_of(const AttentionArgs& a, int64_t index) {
  if (a.kv_dtype == DType::kF32) return reinterpret_cast<const uint8_t*>(a.block<float>(index));
  if (a.kv_dtype == DType::kInt8) return reinterpret_cast<const uint8_t*>(a.block<int8_t>(index));
  return reinterpret_cast<const uint8_t*>(a.block<uint16_t>(index));
}

void attend(const AttentionArgs& a, int64_t i) {
  const int64_t length = a.prefix_places() + a.first_position + i + 1;
  const int64_t padded_dim = round_up(a.head_dim, kLanes);
  const auto is_empty = [&a](int64_t pos) { return pos >= a.prefix_tokens && pos < a.prefix_places(); };
  float* p = a.scratch;
  float largest = -INFINITY;
  for (int64_t pos = 0; pos < length; ++pos) {
    if (is_empty(pos)) continue;
    const uint8_t* block = block_of(a, pos / kBlockTokens);
    float score = 0.0f;
    for (int64_t d = 0; d < a.head_dim; ++d) {
      const float key = load_kv(block, a.kv_dtype, d * kBlockTokens + pos % kBlockTokens);
      score = std::fma(a.q[i * a.stride + d] * a.query_scale, key, score);
    }
    p[pos] = score * kv_scale(a, block, 0, pos % kBlockTokens);
    largest = std::max(largest, p[pos]);
  }
  float sum[kLanes] = {};
  for (int64_t pos = 0; pos < length; ++pos) {
    p[pos] = is_empty(pos) ? 0.0f : exp_nonpositive(p[pos] - largest);
    sum[pos % kLanes] += p[pos];
  }
  const float inverse = 1.0f / fold_sum(sum);
  for (int64_t pos = 0; pos < length; ++pos) {
    p[pos] *= kv_scale(a, block_of(a, pos / kBlockTokens), 1, pos % kBlockTokens);
  }
  for (int64_t d = 0; d < a.head_dim; ++d) {
    float total = 0.0f;
    for (int64_t pos = 0; pos < length; ++pos) {
      const uint8_t* block = block_of(a, pos / kBlockTokens);
      const int64_t value = a.head_dim * kBlockTokens + pos % kBlockTokens * padded_dim + d;
      total = std::fma(p[pos], load_kv(block, a.kv_dtype, value), total);
    }
    a.out[i * a.out_stride + d] = total * inverse;
  }
}

void attention(const AttentionArgs& a) {
  for (int64_t i = 0; i < a.count; ++i) {
    const int64_t pos = a.first_position + i;
    uint8_t* block = a.cache + a.blocks[pos / kBlockTokens] * a.block_stride * element_bytes(a.kv_dtype);
    put_key_value(block, a.kv_dtype, pos % kBlockTokens, a.k + i * a.stride, a.v + i * a.stride, a.head_dim);
  }
  for (int64_t i = a.first_wanted; i < a.count; ++i) attend(a, i);
}

void low_rank_in(const float* a, int64_t rank, const float* x, int64_t n, float* u) {
  for (int64_t r = 0; r < rank; ++r) {
    float sum[kLanes] = {};
    for (int64_t i = 0; i < n; ++i) sum[i % kLanes] = std::fma(a[r * n + i], x[i], sum[i % kLanes]);
    u[r] = fold_sum(sum);
  }
}

void low_rank_out(const float* b, int64_t rank, int64_t stride, const float* u, int64_t n, float* y) {
  for (int64_t i = 0; i < n; ++i) {
    y[i] = 0.0f;
    for (int64_t r = 0; r < rank; ++r) y[i] = std::fma(u[r], b[r * stride + i], y[i]);
  }
}

}  // namespace

void put_key_value(uint8_t* block, DType dtype, int64_t slot, const float* key, const float* value, int64_t head_dim) {
  const int64_t padded_dim = round_up(head_dim, kLanes);
  float* scales = reinterpret_cast<float*>(block + kv_scales_at(head_dim)) + slot;
  put_numbers(block, dtype, key, head_dim, slot, kBlockTokens, scales);
  put_numbers(block, dtype, value, head_dim, head_dim * kBlockTokens + slot * padded_dim, 1, scales + kBlockTokens);
}

const Kernels& reference_kernels() {
  static const Kernels table{"reference", to_float, max_abs,   quantize_weights, layer_norm,
                             quantize,    matmul,   attention, low_rank_in,      low_rank_out};
  return table;
}

}  // namespace optlm
