// Every kernel, once, on the virtual vector that the including file defines: Float (16 numbers) and Bytes (64 bytes).
// The order of every sum is that of kernels_ref.cc; tests compare bit by bit.

#include <cmath>
#include <cstring>

#include "kernels.h"

namespace optlm::OPTLM_ISA {
namespace {

void convert(const void* source, DType dtype, int64_t n, float* target) {
  const int64_t whole = n / kLanes * kLanes;
  if (dtype == DType::kF32) {
    std::memcpy(target, source, n * sizeof(float));
    return;
  }
  const auto* bits = static_cast<const uint16_t*>(source);
  for (int64_t i = 0; i < whole; i += kLanes) {
    store(target + i, dtype == DType::kF16 ? load_half(bits + i) : load_bf16(bits + i));
  }
  reference_kernels().to_float(bits + whole, dtype, n - whole, target + whole);
}

float max_abs(const float* x, int64_t n) {
  const int64_t whole = n / kLanes * kLanes;
  // x * 0 is 0 for finite x and NaN otherwise; the sum tells of any that is not finite.
  Float largest = splat(0.0f), check = splat(0.0f);
  for (int64_t i = 0; i < whole; i += kLanes) {
    const Float value = load(x + i);
    check = fma(value, splat(0.0f), check);
    largest = max(largest, abs(value));
  }
  if (fold_sum(check) != 0.0f) return INFINITY;
  const float rest = reference_kernels().max_abs(x + whole, n - whole);
  const float best = largest_of(largest);
  return rest > best ? rest : best;
}

void quantize_weights(const float* x, int64_t n, float inverse_scale, uint8_t* target) {
  const Float factor = splat(inverse_scale);
  for (int64_t i = 0; i < n; i += kLanes) {
    store_low_bytes(target + i, add_int(to_int(mul(load(x + i), factor)), splat_int(kWeightZero)));
  }
}

// Vectors before the last, partial one are summed in full; the tail adds into its own lanes.
template <class Map>
inline float striped_sum(const float* x, int64_t n, Map map) {
  const int64_t whole = n / kLanes * kLanes;
  Float sum = splat(0.0f);
  for (int64_t i = 0; i < whole; i += kLanes) sum = map(load(x + i), sum);
  if (whole == n) return fold_sum(sum);
  alignas(64) float lane[kLanes], tail[kLanes] = {};
  for (int64_t i = whole; i < n; ++i) tail[i - whole] = x[i];
  store(lane, sum);
  alignas(64) float with_tail[kLanes];
  store(with_tail, map(load(tail), sum));
  for (int64_t i = 0; i < n - whole; ++i) lane[i] = with_tail[i];
  return fold_sum(load(lane));
}

void layer_norm(const float* x, const float* weight, const float* bias, int64_t n, float* y) {
  const auto plain = [](Float value, Float sum) { return add(sum, value); };
  const float mean = striped_sum(x, n, plain) / static_cast<float>(n);
  const Float centre = splat(mean);
  const auto squared = [centre](Float value, Float sum) {
    const Float d = sub(value, centre);
    return fma(d, d, sum);
  };
  const float variance = striped_sum(x, n, squared) / static_cast<float>(n);
  const float inverse = 1.0f / std::sqrt(variance + 1e-5f);
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    store(y + i, fma(mul(sub(load(x + i), centre), splat(inverse)), load(weight + i), load(bias + i)));
  }
  for (int64_t i = whole; i < n; ++i) y[i] = __builtin_fmaf((x[i] - mean) * inverse, weight[i], bias[i]);
}

void quantize(const float* x, int64_t groups, int8_t* q, float* scale, int32_t* correction, uint64_t* active) {
  for (int64_t g = 0; g < groups; ++g, x += kGroup, q += kGroup) {
    Float largest = splat(0.0f);
    for (int64_t i = 0; i < kGroup; i += kLanes) largest = max(largest, abs(load(x + i)));
    const float top = largest_of(largest);
    const bool zero = top < 1e-30f;
    const Float factor = splat(zero ? 0.0f : 127.0f / top);
    Bytes sum = splat_int(0);
    for (int64_t i = 0; i < kGroup; i += kLanes) {
      const Bytes rounded = to_int(mul(load(x + i), factor));
      sum = add_int(sum, rounded);
      store_low_bytes(q + i, rounded);
    }
    scale[g] = zero ? 0.0f : top / 127.0f;
    correction[g] = -kWeightZero * sum_of(sum);
    active[g] = nonzero_mask(load_bytes(q));
  }
}

inline Float exp_nonpositive(Float x) {
  x = max(x, splat(-87.0f));
  const Float n = round(mul(x, splat(1.44269504f)));
  Float r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  Float p = splat(1.3888889e-3f);
  p = fma(p, r, splat(8.3333333e-3f));
  p = fma(p, r, splat(4.1666667e-2f));
  p = fma(p, r, splat(1.6666667e-1f));
  p = fma(p, r, splat(0.5f));
  p = fma(p, r, splat(1.0f));
  p = fma(p, r, splat(1.0f));
  return mul(p, power_of_two(n));
}

inline Float gelu(Float x) {
  const Float z = mul(abs(x), splat(0.70710678f));
  const Float t = div(splat(1.0f), fma(z, splat(0.3275911f), splat(1.0f)));
  Float p = splat(1.061405429f);
  p = fma(p, t, splat(-1.453152027f));
  p = fma(p, t, splat(1.421413741f));
  p = fma(p, t, splat(-0.284496736f));
  p = fma(p, t, splat(0.254829592f));
  const Float tail = mul(mul(splat(0.5f), mul(p, t)), exp_nonpositive(sub(splat(0.0f), mul(z, z))));
  return mul(x, where_positive(x, sub(splat(1.0f), tail), tail));
}

inline Float gelu_tanh(Float x) {
  const Float u = mul(splat(1.5957691f), fma(mul(mul(splat(0.044715f), x), x), x, x));
  const Float e = exp_nonpositive(sub(splat(0.0f), abs(u)));
  return mul(x, div(where_positive(u, splat(1.0f), e), add(splat(1.0f), e)));
}

// ---- products --------------------------------------------------------------------------------------

OPTLM_INLINE void add_scaled(float* total, Bytes sum, Float scale) {
  store(total, fma(to_float(sum), scale, load(total)));
}

inline int32_t four_bytes(const int8_t* q) {
  int32_t word;
  std::memcpy(&word, q, 4);
  return word;
}

// One group of one panel, int8. `weights(c, out)` gives chunk c: 64 rows x 4 inputs in four vectors.
template <int N, class Weights>
OPTLM_INLINE void group_int8(Weights weights, const Activations& in, int64_t t, int64_t g, float* total,
                             int64_t total_stride) {
  const int64_t row = in.groups * kGroup;
  const int8_t* q = in.q + t * row + g * kGroup;
  Bytes sum[N][4];
  for (int n = 0; n < N; ++n) {
    for (int j = 0; j < 4; ++j) sum[n][j] = splat_int(in.correction[(t + n) * in.groups + g]);
  }
  for (int64_t c = 0; c < kGroup / 4; ++c) {
    Bytes w[4];
    weights(c, w);
    for (int n = 0; n < N; ++n) {
      const Bytes x = splat_int(four_bytes(q + n * row + 4 * c));
      for (int j = 0; j < 4; ++j) sum[n][j] = dot4(sum[n][j], w[j], x);
    }
  }
  for (int n = 0; n < N; ++n) {
    const Float scale = splat(in.scale[(t + n) * in.groups + g]);
    for (int j = 0; j < 4; ++j) add_scaled(total + n * total_stride + 16 * j, sum[n][j], scale);
  }
}

// Chunks that stand in panel order; `ahead` > 0 prefetches those to come.
struct PanelChunks {
  const uint8_t* data;
  int64_t ahead;

  OPTLM_INLINE void operator()(int64_t c, Bytes* w) const {
    const uint8_t* chunk = data + 256 * c;
    for (int j = 0; j < 4; ++j) w[j] = load_bytes(chunk + 64 * j);
    if (ahead > 0) {
      for (int j = 0; j < 4; ++j) __builtin_prefetch(chunk + ahead + 64 * j);
    }
  }
};

// The two 16-bit formats as types of their own, so that one template serves all.
struct BFloat16 { uint16_t bits; };
struct Half { uint16_t bits; };

inline Float load_weights(const float* p) { return load(p); }
inline Float load_weights(const BFloat16* p) { return load_bf16(&p->bits); }
inline Float load_weights(const Half* p) { return load_half(&p->bits); }

// One group of one panel, float weights: `stride` elements from one input to the next.
template <int N, class W>
OPTLM_INLINE void group_float(const W* w, int64_t stride, const Activations& in, int64_t t, int64_t g, float* total,
                        int64_t ahead) {
  const int64_t row = in.groups * kGroup;
  const float* x = in.x + t * row + g * kGroup;
  Float sum[N][4];
  for (int n = 0; n < N; ++n) {
    for (int j = 0; j < 4; ++j) sum[n][j] = splat(0.0f);
  }
  for (int64_t i = 0; i < kGroup; ++i, w += stride) {
    Float weights[4];
    for (int j = 0; j < 4; ++j) weights[j] = load_weights(w + 16 * j);
    if (ahead > 0) {
      for (size_t b = 0; b < 64 * sizeof(W); b += 64) {
        __builtin_prefetch(reinterpret_cast<const uint8_t*>(w) + ahead + b);
      }
    }
    for (int n = 0; n < N; ++n) {
      const Float value = splat(x[n * row + i]);
      for (int j = 0; j < 4; ++j) sum[n][j] = fma(value, weights[j], sum[n][j]);
    }
  }
  for (int n = 0; n < N; ++n) {
    float* out = total + n * kPanelRows;
    for (int j = 0; j < 4; ++j) store(out + 16 * j, add(load(out + 16 * j), sum[n][j]));
  }
}

// Calls tile(integral constant N, first token) over `tokens`, in tiles as even as the registers allow.
template <class Tile>
inline void for_tiles(int64_t tokens, Tile tile) {
  const int64_t tiles = (tokens + kTileTokens - 1) / kTileTokens;
  for (int64_t i = 0, t = 0; i < tiles; ++i) {
    const int64_t n = (tokens - t) / (tiles - i);
    switch (n) {
      case 1: tile.template operator()<1>(t); break;
      case 2: tile.template operator()<kTileTokens >= 2 ? 2 : 1>(t); break;
      case 3: tile.template operator()<kTileTokens >= 3 ? 3 : 1>(t); break;
      case 4: tile.template operator()<kTileTokens >= 4 ? 4 : 1>(t); break;
      case 5: tile.template operator()<kTileTokens >= 5 ? 5 : 1>(t); break;
      default: tile.template operator()<kTileTokens >= 6 ? 6 : 1>(t); break;
    }
    t += n;
  }
}

// Float totals of one panel for one token -> output.
inline void finish(const MatmulArgs& a, int64_t panel, int64_t t, float* total) {
  const int64_t row = panel * kPanelRows;
  const bool quantized = a.w->dtype == DType::kInt8;
  for (int j = 0; j < 4; ++j) {
    float* p = total + 16 * j;
    const Float bias = load(a.bias + row + 16 * j);
    Float y = quantized ? fma(load(p), load(a.w->scales + row + 16 * j), bias) : add(load(p), bias);
    if (a.epilogue == Epilogue::kRelu) y = max(y, splat(0.0f));
    if (a.epilogue == Epilogue::kGelu) y = gelu(y);
    if (a.epilogue == Epilogue::kGeluTanh) y = gelu_tanh(y);
    store(p, y);
  }
  float* out = a.out + t * a.out_stride + row;
  const int64_t rows = a.w->rows - row < kPanelRows ? a.w->rows - row : kPanelRows;
  if (a.epilogue == Epilogue::kAdd) {
    for (int64_t i = 0; i < rows; ++i) out[i] += total[i];
  } else if (rows == kPanelRows) {
    for (int j = 0; j < 4; ++j) store(out + 16 * j, load(total + 16 * j));
  } else {
    std::memcpy(out, total, rows * sizeof(float));
  }
}

// The stream of a thread's panels is contiguous, so looking ahead past a panel's end still lands on what comes next.
// Several tokens dwell longer on each chunk of weights and profit from looking further.
inline constexpr int64_t kPrefetchBytes = 4096;
inline constexpr int64_t kPrefetchBytesBatch = 8192;

template <class Group>
inline void panels_in_tiles(const MatmulArgs& a, Group group) {
  for (int64_t panel = a.panel_begin; panel < a.panel_end; ++panel) {
    for (int64_t first = 0; first < a.tokens; first += kTokenBlock) {
      const int64_t count = a.tokens - first < kTokenBlock ? a.tokens - first : kTokenBlock;
      const int64_t ahead = a.tokens > 1 ? kPrefetchBytesBatch : kPrefetchBytes;
      std::memset(a.scratch, 0, count * kPanelRows * sizeof(float));
      for (int64_t g = 0; g < a.in.groups; ++g) {
        for_tiles(count, [&]<int N>(int64_t t) {
          group.template operator()<N>(panel, first + t, g, a.scratch + t * kPanelRows,
                                       first + t == 0 ? ahead : 0);
        });
      }
      for (int64_t t = 0; t < count; ++t) finish(a, panel, first + t, a.scratch + t * kPanelRows);
    }
  }
}

template <class W>
inline void matmul_float_panels(const MatmulArgs& a) {
  const Matrix& w = *a.w;
  const bool by_input = w.layout == Layout::kByInput;
  const int64_t stride = by_input ? w.padded_rows() : kPanelRows;
  const int64_t panel_stride = by_input ? kPanelRows : kPanelRows * w.padded_cols();
  const W* data = reinterpret_cast<const W*>(w.data);
  panels_in_tiles(a, [&]<int N>(int64_t panel, int64_t t, int64_t g, float* total, int64_t ahead) {
    group_float<N>(data + panel * panel_stride + g * kGroup * stride, stride, a.in, t, g, total,
                   by_input ? 0 : ahead);
  });
}

inline void matmul_int8_panels(const MatmulArgs& a) {
  panels_in_tiles(a, [&]<int N>(int64_t panel, int64_t t, int64_t g, float* total, int64_t ahead) {
    const uint8_t* w = a.w->data + panel * a.w->panel_bytes() + g * kGroup * kPanelRows;
    group_int8<N>(PanelChunks{w, ahead}, a.in, t, g, total, kPanelRows);
  });
}

// ---- weights stored by input: zeros of the input are not read ------------------------------------------

// Four rows of 64 outputs -> four vectors of 16 outputs x 4 inputs.
OPTLM_INLINE void interleave(const uint8_t* const* row, Bytes* out) {
  const Bytes a = load_bytes(row[0]), b = load_bytes(row[1]), c = load_bytes(row[2]), d = load_bytes(row[3]);
  const Bytes ab_low = unpack_low8(a, b), ab_high = unpack_high8(a, b);
  const Bytes cd_low = unpack_low8(c, d), cd_high = unpack_high8(c, d);
  out[0] = unpack_low16(ab_low, cd_low);
  out[1] = unpack_high16(ab_low, cd_low);
  out[2] = unpack_low16(ab_high, cd_high);
  out[3] = unpack_high16(ab_high, cd_high);
}

// Up to 64 active inputs of one group, taken four at a time; a missing one repeats the last row with input 0.
struct Quads {
  int64_t count = 0;
  int16_t input[16][4];
  int32_t q[16];
};

inline Quads gather_active(uint64_t mask, const int8_t* q) {
  Quads quads;
  while (mask != 0) {
    int8_t bytes[4] = {0, 0, 0, 0};
    int16_t* input = quads.input[quads.count];
    for (int i = 0; i < 4; ++i) {
      if (mask != 0) {
        input[i] = static_cast<int16_t>(__builtin_ctzll(mask));
        bytes[i] = q[input[i]];
        mask &= mask - 1;
      } else {
        input[i] = input[i - 1];
      }
    }
    quads.q[quads.count++] = four_bytes(bytes);
  }
  return quads;
}

// Starts reading this thread's share of the rows whose inputs are active in the group to come.
inline void prefetch_rows(const uint8_t* base, int64_t row_bytes, uint64_t mask, int64_t bytes) {
  for (; mask != 0; mask &= mask - 1) {
    const uint8_t* row = base + __builtin_ctzll(mask) * row_bytes;
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(row + b);
  }
}

inline void sparse_int8(const MatmulArgs& a, int64_t t, int64_t g, const uint8_t* base, float* total) {
  const int64_t row_bytes = a.w->padded_rows();
  const int64_t at = t * a.in.groups + g;
  const Quads quads = gather_active(a.in.active[at], a.in.q + at * kGroup);
  for (int64_t panel = 0; panel < a.panel_end - a.panel_begin; ++panel, base += 64, total += kPanelRows) {
    Bytes sum[4];
    for (int j = 0; j < 4; ++j) sum[j] = splat_int(a.in.correction[at]);
    for (int64_t i = 0; i < quads.count; ++i) {
      const uint8_t* row[4];
      for (int j = 0; j < 4; ++j) row[j] = base + quads.input[i][j] * row_bytes;
      Bytes weights[4];
      interleave(row, weights);
      const Bytes x = splat_int(quads.q[i]);
      for (int j = 0; j < 4; ++j) sum[j] = dot4(sum[j], weights[j], x);
    }
    const Float scale = splat(a.in.scale[at]);
    for (int j = 0; j < 4; ++j) add_scaled(total + 16 * j, sum[j], scale);
  }
}

// Chunks made from rows of the by-input layout, and kept in panel order for the tiles after the first.
struct RowChunks {
  const uint8_t* rows;
  int64_t row_bytes;
  uint8_t* kept;

  OPTLM_INLINE void operator()(int64_t c, Bytes* w) const {
    const uint8_t* row[4];
    for (int j = 0; j < 4; ++j) {
      row[j] = rows + (4 * c + j) * row_bytes;
      __builtin_prefetch(row[j] + kGroup * row_bytes);
    }
    interleave(row, w);
    for (int j = 0; j < 4; ++j) store_bytes(kept + 256 * c + 64 * j, w[j]);
  }
};

// All 64 inputs of the group, brought into panel order once for all tokens.
inline void dense_int8(const MatmulArgs& a, int64_t first, int64_t count, int64_t g, const uint8_t* base,
                       uint8_t* kept, float* total, int64_t token_stride) {
  for (int64_t panel = 0; panel < a.panel_end - a.panel_begin; ++panel, base += 64, total += kPanelRows) {
    for_tiles(count, [&]<int N>(int64_t t) {
      float* out = total + t * token_stride;
      if (t == 0) {
        group_int8<N>(RowChunks{base, a.w->padded_rows(), kept}, a.in, first, g, out, token_stride);
      } else {
        group_int8<N>(PanelChunks{kept, 0}, a.in, first + t, g, out, token_stride);
      }
    });
  }
}

// Cycles of a quad in either form, measured roughly; only speed hangs on them.
inline bool sparse_is_cheaper(const MatmulArgs& a, int64_t first, int64_t count, int64_t g) {
  int64_t sparse = 0;
  for (int64_t t = first; t < first + count; ++t) {
    sparse += 12 + 2 * __builtin_popcountll(a.in.active[t * a.in.groups + g]);
  }
  return sparse < 16 * 10 + count * 40;
}

inline void matmul_int8_by_input(const MatmulArgs& a) {
  const int64_t width = (a.panel_end - a.panel_begin) * kPanelRows;
  const int64_t row_bytes = a.w->padded_rows();
  const uint8_t* base = a.w->data + a.panel_begin * kPanelRows;
  uint8_t* kept = reinterpret_cast<uint8_t*>(a.scratch + kTokenBlock * width);
  for (int64_t first = 0; first < a.tokens; first += kTokenBlock) {
    const int64_t count = a.tokens - first < kTokenBlock ? a.tokens - first : kTokenBlock;
    std::memset(a.scratch, 0, count * width * sizeof(float));
    for (int64_t g = 0; g < a.in.groups; ++g) {
      const uint8_t* rows = base + g * kGroup * row_bytes;
      if (a.skip_zeros && sparse_is_cheaper(a, first, count, g)) {
        if (count == 1 && g + 1 < a.in.groups) {
          prefetch_rows(rows + kGroup * row_bytes, row_bytes, a.in.active[first * a.in.groups + g + 1], width);
        }
        for (int64_t t = 0; t < count; ++t) sparse_int8(a, first + t, g, rows, a.scratch + t * width);
      } else {
        dense_int8(a, first, count, g, rows, kept, a.scratch, width);
      }
    }
    for (int64_t t = 0; t < count; ++t) {
      for (int64_t panel = a.panel_begin; panel < a.panel_end; ++panel) {
        finish(a, panel, first + t, a.scratch + t * width + (panel - a.panel_begin) * kPanelRows);
      }
    }
  }
}

// Adding 0 x weight changes no sum, so the inputs that are zero are left out.
template <class W>
inline void sparse_float(const MatmulArgs& a, int64_t t, const W* base, float* total) {
  const int64_t stride = a.w->padded_rows();
  for (int64_t g = 0; g < a.in.groups; ++g, base += kGroup * stride) {
    const float* x = a.in.x + (t * a.in.groups + g) * kGroup;
    int64_t input[kGroup], count = 0;
    for (int64_t i = 0; i < kGroup; ++i) {
      input[count] = i;
      count += x[i] != 0.0f;
    }
    for (int64_t panel = 0; panel < a.panel_end - a.panel_begin; ++panel) {
      Float sum[4];
      for (int j = 0; j < 4; ++j) sum[j] = splat(0.0f);
      for (int64_t i = 0; i < count; ++i) {
        const W* row = base + input[i] * stride + panel * kPanelRows;
        for (int j = 0; j < 4; ++j) sum[j] = fma(splat(x[input[i]]), load_weights(row + 16 * j), sum[j]);
      }
      float* out = total + panel * kPanelRows;
      for (int j = 0; j < 4; ++j) store(out + 16 * j, add(load(out + 16 * j), sum[j]));
    }
  }
}

template <class W>
inline void matmul_float_by_input(const MatmulArgs& a) {
  // With several tokens the tiles of the dense form read each weight once for all; alone, a token reads what it needs.
  if (!a.skip_zeros || a.tokens > 2) return matmul_float_panels<W>(a);
  const int64_t width = (a.panel_end - a.panel_begin) * kPanelRows;
  for (int64_t t = 0; t < a.tokens; ++t) {
    std::memset(a.scratch, 0, width * sizeof(float));
    sparse_float(a, t, reinterpret_cast<const W*>(a.w->data) + a.panel_begin * kPanelRows, a.scratch);
    for (int64_t panel = a.panel_begin; panel < a.panel_end; ++panel) {
      finish(a, panel, t, a.scratch + (panel - a.panel_begin) * kPanelRows);
    }
  }
}

void matmul(const MatmulArgs& a) {
  const bool by_input = a.w->layout == Layout::kByInput;
  switch (a.w->dtype) {
    case DType::kInt8: return by_input ? matmul_int8_by_input(a) : matmul_int8_panels(a);
    case DType::kBF16: return by_input ? matmul_float_by_input<BFloat16>(a) : matmul_float_panels<BFloat16>(a);
    case DType::kF16: return by_input ? matmul_float_by_input<Half>(a) : matmul_float_panels<Half>(a);
    default: return by_input ? matmul_float_by_input<float>(a) : matmul_float_panels<float>(a);
  }
}

#include "attention_simd.inl"

}  // namespace

static const Kernels& table() {
  static const Kernels kernels{"" OPTLM_ISA_NAME, convert, max_abs, quantize_weights, layer_norm,
                               quantize,          matmul,  attention};
  return kernels;
}

}  // namespace optlm::OPTLM_ISA
