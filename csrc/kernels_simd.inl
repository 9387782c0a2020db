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
    for (int64_t w = 0; w < kMaskWords; ++w) active[g * kMaskWords + w] = nonzero_mask(load_bytes(q + 64 * w));
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
OPTLM_INLINE void group_int8(Weights weights, const Activations& in, int64_t t, int64_t g, float* total) {
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
    for (int j = 0; j < 4; ++j) add_scaled(total + n * kPanelRows + 16 * j, sum[n][j], scale);
  }
}

// What a tile prefetches: of every 256 bytes it reads, `Lines` lines of 64 that begin `bytes` further on. A template,
// because a test a line costs a sixth of the products' speed.
template <int Lines>
struct Ahead {
  int64_t bytes = 0;

  OPTLM_INLINE void prefetch(const uint8_t* chunk) const {
    for (int j = 0; j < Lines; ++j) __builtin_prefetch(chunk + bytes + 64 * j);
  }
};

// Chunks that stand in panel order.
template <int Lines>
struct PanelChunks {
  const uint8_t* data;
  Ahead<Lines> ahead;

  OPTLM_INLINE void operator()(int64_t c, Bytes* w) const {
    const uint8_t* chunk = data + 256 * c;
    for (int j = 0; j < 4; ++j) w[j] = load_bytes(chunk + 64 * j);
    ahead.prefetch(chunk);
  }
};

// The two 16-bit formats as types of their own, so that one template serves all.
struct BFloat16 { uint16_t bits; };
struct Half { uint16_t bits; };

inline Float load_weights(const float* p) { return load(p); }
inline Float load_weights(const BFloat16* p) { return load_bf16(&p->bits); }
inline Float load_weights(const Half* p) { return load_half(&p->bits); }

// One group of one panel, float weights.
template <int N, class W, int Lines>
OPTLM_INLINE void group_float(const W* w, const Activations& in, int64_t t, int64_t g, float* total,
                              Ahead<Lines> ahead) {
  const int64_t row = in.groups * kGroup;
  const float* x = in.x + t * row + g * kGroup;
  Float sum[N][4];
  for (int n = 0; n < N; ++n) {
    for (int j = 0; j < 4; ++j) sum[n][j] = splat(0.0f);
  }
  for (int64_t i = 0; i < kGroup; ++i, w += kPanelRows) {
    Float weights[4];
    for (int j = 0; j < 4; ++j) weights[j] = load_weights(w + 16 * j);
    // 64 numbers are 256 bytes of floats, or every other time 256 bytes of halves.
    if (sizeof(W) == 4 || i % 2 == 0) ahead.prefetch(reinterpret_cast<const uint8_t*>(w));
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

// Tiles of up to kTileTokens tokens share a group of weights; each prefetches its part of the four lines of every
// chunk, so that memory is asked for evenly: all four when alone, two of two or three tiles, one of more.
constexpr int lines_of(int64_t tiles) { return tiles == 1 ? 4 : tiles <= 3 ? 2 : 1; }

// The smallest tile of those that prefetch `lines` lines.
constexpr int smallest_tile(int lines) {
  return lines == 2 ? (kTileTokens + 1) / 2 : lines == 1 ? (3 * kTileTokens + 1) / 4 : 1;
}

// tile<N, Lines>(first token, index) with N = n known to the compiler.
template <int Lines, int N = kTileTokens, class Tile>
OPTLM_INLINE void call_tile(int64_t n, const Tile& tile, int64_t t, int64_t index) {
  if constexpr (N > smallest_tile(Lines)) {
    if (n < N) return call_tile<Lines, N - 1>(n, tile, t, index);
  }
  tile.template operator()<N, Lines>(t, index);
}

// Calls tile<N, Lines>(first token, index) over `tokens`, in tiles as even as the registers allow.
template <class Tile>
inline void for_tiles(int64_t tokens, bool prefetches, const Tile& tile) {
  const int64_t tiles = (tokens + kTileTokens - 1) / kTileTokens;
  const int lines = prefetches ? lines_of(tiles) : 0;
  for (int64_t i = 0, t = 0; i < tiles; ++i) {
    const int64_t n = (tokens - t) / (tiles - i);
    switch (lines) {
      case 0: call_tile<0>(n, tile, t, i); break;
      case 1: call_tile<1>(n, tile, t, i); break;
      case 2: call_tile<2>(n, tile, t, i); break;
      default: call_tile<4>(n, tile, t, i); break;
    }
    t += n;
  }
}

// 64 outputs, of which the first `rows` count, and the best so far.
inline void keep_best(const float* y, int64_t first_row, int64_t rows, Best& best) {
  if (rows == kPanelRows) {
    Float largest = load(y), check = mul(load(y), splat(0.0f));  // NaN where y is not finite
    for (int j = 1; j < 4; ++j) {
      largest = max(largest, load(y + 16 * j));
      check = fma(load(y + 16 * j), splat(0.0f), check);
    }
    if (fold_sum(check) == 0.0f && !(largest_of(largest) > best.value)) return;
  }
  for (int64_t i = 0; i < rows; ++i) {
    if (!std::isfinite(y[i])) best.value = NAN;
    if (y[i] > best.value) best = {y[i], static_cast<int32_t>(first_row + i)};
  }
}

// Float totals of one panel for one token -> output.
inline void finish(const MatmulArgs& a, int64_t panel, int64_t t, float* total) {
  const int64_t row = panel * kPanelRows;
  const bool quantized = a.w->dtype == DType::kInt8;
  const bool changed = a.changed != nullptr && a.changed[t] != 0;
  for (int j = 0; j < 4; ++j) {
    float* p = total + 16 * j;
    const Float bias = load(a.bias + row + 16 * j);
    Float y = quantized ? fma(load(p), load(a.w->scales + row + 16 * j), bias) : add(load(p), bias);
    if (changed) y = add(y, load(a.extra + t * a.extra_stride + row + 16 * j));
    if (a.epilogue == Epilogue::kRelu) y = max(y, splat(0.0f));
    if (a.epilogue == Epilogue::kGelu) y = gelu(y);
    if (a.epilogue == Epilogue::kGeluTanh) y = gelu_tanh(y);
    store(p, y);
  }
  const int64_t rows = a.w->rows - row < kPanelRows ? a.w->rows - row : kPanelRows;
  if (a.epilogue == Epilogue::kBest) return keep_best(total, row, rows, a.best[t]);
  float* out = a.out + t * a.out_stride + row;
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

// Calls group<N>(panel, token, first of its block?, group, totals, ahead) over all of the thread's panels.
template <class Group>
inline void panels_in_tiles(const MatmulArgs& a, const Group& group) {
  const int64_t bytes = a.tokens > 1 ? kPrefetchBytesBatch : kPrefetchBytes;
  for (int64_t panel = a.panel_begin; panel < a.panel_end; ++panel) {
    for (int64_t first = 0; first < a.tokens; first += kTokenBlock) {
      const int64_t count = a.tokens - first < kTokenBlock ? a.tokens - first : kTokenBlock;
      std::memset(a.scratch, 0, count * kPanelRows * sizeof(float));
      for (int64_t g = 0; g < a.in.groups; ++g) {
        for_tiles(count, first == 0, [&]<int N, int Lines>(int64_t t, int64_t tile) {
          const Ahead<Lines> ahead{bytes + 64 * (tile * Lines % 4)};
          group.template operator()<N>(panel, first + t, tile == 0, g, a.scratch + t * kPanelRows, ahead);
        });
      }
      for (int64_t t = 0; t < count; ++t) finish(a, panel, first + t, a.scratch + t * kPanelRows);
    }
  }
}

template <class W>
inline void matmul_float_panels(const MatmulArgs& a) {
  panels_in_tiles(a, [&]<int N>(int64_t panel, int64_t t, bool, int64_t g, float* total, auto ahead) {
    const W* w = reinterpret_cast<const W*>(a.w->data + panel * a.w->panel_bytes());
    group_float<N>(w + g * kGroup * kPanelRows, a.in, t, g, total, ahead);
  });
}

inline void matmul_int8_panels(const MatmulArgs& a) {
  panels_in_tiles(a, [&]<int N>(int64_t panel, int64_t t, bool, int64_t g, float* total, auto ahead) {
    const uint8_t* w = a.w->data + panel * a.w->panel_bytes() + g * kGroup * kPanelRows;
    group_int8<N>(PanelChunks{w, ahead}, a.in, t, g, total);
  });
}

// ---- weights stored by input ----------------------------------------------------------------------------

// Four inputs' weights for 64 outputs -> four vectors of 16 outputs x 4 inputs.
OPTLM_INLINE void interleave(const uint8_t* p0, const uint8_t* p1, const uint8_t* p2, const uint8_t* p3, Bytes* out) {
  const Bytes a = load_bytes(p0), b = load_bytes(p1), c = load_bytes(p2), d = load_bytes(p3);
  const Bytes ab_low = unpack_low8(a, b), ab_high = unpack_high8(a, b);
  const Bytes cd_low = unpack_low8(c, d), cd_high = unpack_high8(c, d);
  out[0] = unpack_low16(ab_low, cd_low);
  out[1] = unpack_high16(ab_low, cd_low);
  out[2] = unpack_low16(ab_high, cd_high);
  out[3] = unpack_high16(ab_high, cd_high);
}

// Chunks interleaved as they are read, and kept in panel order for the tiles after the first.
struct RowChunks {
  const uint8_t* data;
  Ahead<4> ahead;
  uint8_t* kept;

  OPTLM_INLINE void operator()(int64_t c, Bytes* w) const {
    const uint8_t* row = data + 256 * c;
    interleave(row, row + 64, row + 128, row + 192, w);
    for (int j = 0; j < 4; ++j) store_bytes(kept + 256 * c + 64 * j, w[j]);
    ahead.prefetch(row);
  }
};

inline void matmul_int8_rows(const MatmulArgs& a) {
  uint8_t* kept = reinterpret_cast<uint8_t*>(a.scratch + kTokenBlock * kPanelRows);
  panels_in_tiles(a, [&]<int N>(int64_t panel, int64_t t, bool leads, int64_t g, float* total, auto ahead) {
    const uint8_t* w = a.w->data + panel * a.w->panel_bytes() + g * kGroup * kPanelRows;
    if (leads) {
      group_int8<N>(RowChunks{w, {ahead.bytes}, kept}, a.in, t, g, total);
    } else {
      group_int8<N>(PanelChunks<0>{kept, {}}, a.in, t, g, total);
    }
  });
}

// Up to four active inputs; a missing one repeats another with the value 0.
struct Quad {
  uint16_t input[4];
  int32_t q;
};

inline constexpr int64_t kQuadsAhead = 24;  // 96 lines under way: with fewer, far pieces arrive late
// 64 inputs of which more are active are read in full: a stream is faster than its pieces.
inline constexpr int kFullWord = 48;

// Lists the inputs in `mask`, which begin at input `base` of the token's row q; returns the end.
inline Quad* list_word(uint64_t mask, const int8_t* q, int64_t base, Quad* quad) {
  if (__builtin_popcountll(mask) > kFullWord) mask = ~uint64_t{0};
  for (; mask != 0; ++quad) {
    uint32_t word = 0;
    for (int i = 0; i < 4; ++i, mask &= mask - 1) {
      const int64_t input = mask != 0 ? base + __builtin_ctzll(mask) : quad->input[0];
      if (mask != 0) word |= uint32_t{static_cast<uint8_t>(q[input])} << 8 * i;
      quad->input[i] = static_cast<uint16_t>(input);
    }
    quad->q = static_cast<int32_t>(word);
  }
  return quad;
}

// The active inputs of token t; counts[g] is the number of quads of group g.
inline Quad* list_active(const Activations& in, int64_t t, Quad* quad, uint8_t* counts) {
  const int8_t* q = in.q + t * in.groups * kGroup;
  const uint64_t* active = in.active + t * in.groups * kMaskWords;
  for (int64_t g = 0; g < in.groups; ++g) {
    const Quad* begin = quad;
    for (int64_t w = g * kMaskWords; w < (g + 1) * kMaskWords; ++w) quad = list_word(active[w], q, 64 * w, quad);
    counts[g] = static_cast<uint8_t>(quad - begin);
  }
  return quad;
}

inline void sparse_panel(const MatmulArgs& a, int64_t panel, int64_t t, const Quad* quad, const uint8_t* counts) {
  const uint8_t* rows = a.w->data + panel * a.w->panel_bytes();
  Float total[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
  for (int64_t g = 0; g < a.in.groups; ++g) {
    const int64_t at = t * a.in.groups + g;
    Bytes sum[4];
    for (int j = 0; j < 4; ++j) sum[j] = splat_int(a.in.correction[at]);
    for (const Quad* end = quad + counts[g]; quad < end; ++quad) {
      for (int j = 0; j < 4; ++j) __builtin_prefetch(rows + quad[kQuadsAhead].input[j] * kPanelRows);
      const uint16_t* input = quad->input;
      Bytes w[4];
      interleave(rows + input[0] * kPanelRows, rows + input[1] * kPanelRows, rows + input[2] * kPanelRows,
                 rows + input[3] * kPanelRows, w);
      for (int j = 0; j < 4; ++j) sum[j] = dot4(sum[j], w[j], splat_int(quad->q));
    }
    for (int j = 0; j < 4; ++j) total[j] = fma(to_float(sum[j]), splat(a.in.scale[at]), total[j]);
  }
  for (int j = 0; j < 4; ++j) store(a.scratch + 16 * j, total[j]);
  finish(a, panel, t, a.scratch);
}

inline void matmul_int8_sparse(const MatmulArgs& a) {
  const int64_t stride = a.in.groups * kGroup + 64;  // floats of scratch for one token's list
  const auto list = [&](int64_t t) { return reinterpret_cast<Quad*>(a.scratch + kPanelRows + t * stride); };
  const auto counts = [&](int64_t t) { return reinterpret_cast<uint8_t*>(list(t) + a.in.groups * kGroup / 4 + kQuadsAhead); };
  for (int64_t t = 0; t < a.tokens; ++t) {
    Quad* end = list_active(a.in, t, list(t), counts(t));
    for (int64_t i = 0; i < kQuadsAhead; ++i) end[i] = *list(t);  // the next panel begins there
  }
  for (int64_t panel = a.panel_begin; panel < a.panel_end; ++panel) {
    for (int64_t t = 0; t < a.tokens; ++t) sparse_panel(a, panel, t, list(t), counts(t));
  }
}

// One token alone always takes the list. Several are cheaper in tiles unless few inputs are active: a quad of the
// list costs some 12 cycles, a chunk of a tile 12 to interleave and 5 a token.
inline bool sparse_is_cheaper(const MatmulArgs& a) {
  const bool listable = a.in.groups * kGroup <= int64_t{1} << 16;  // Quad::input has 16 bits
  if (!a.skip_zeros || a.tokens > kSparseTokens || !listable) return false;
  if (a.tokens == 1) return true;
  int64_t active = 0;
  for (int64_t w = 0; w < a.tokens * a.in.groups * kMaskWords; ++w) active += __builtin_popcountll(a.in.active[w]);
  return 12 * active < a.in.groups * kGroup * (9 + 4 * a.tokens);
}

// Adding 0 x weight changes no sum, so the inputs that are zero are left out.
template <class W>
inline void matmul_float_sparse(const MatmulArgs& a) {
  int32_t* input = reinterpret_cast<int32_t*>(a.scratch + kPanelRows);
  for (int64_t t = 0; t < a.tokens; ++t) {
    const float* x = a.in.x + t * a.in.groups * kGroup;
    int64_t count = 0;
    for (int64_t i = 0; i < a.in.groups * kGroup; ++i) {
      input[count] = static_cast<int32_t>(i);
      count += x[i] != 0.0f;
    }
    for (int64_t panel = a.panel_begin; panel < a.panel_end; ++panel) {
      const W* rows = reinterpret_cast<const W*>(a.w->data + panel * a.w->panel_bytes());
      Float total[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
      for (int64_t i = 0, g = 0; g < a.in.groups; ++g) {
        Float sum[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
        for (; i < count && input[i] < (g + 1) * kGroup; ++i) {
          const W* row = rows + input[i] * kPanelRows;
          for (int j = 0; j < 4; ++j) sum[j] = fma(splat(x[input[i]]), load_weights(row + 16 * j), sum[j]);
        }
        for (int j = 0; j < 4; ++j) total[j] = add(total[j], sum[j]);
      }
      for (int j = 0; j < 4; ++j) store(a.scratch + 16 * j, total[j]);
      finish(a, panel, t, a.scratch);
    }
  }
}

template <class W>
inline void matmul_float(const MatmulArgs& a) {
  const bool alone = a.w->layout == Layout::kByInput && a.skip_zeros && a.tokens == 1;
  return alone ? matmul_float_sparse<W>(a) : matmul_float_panels<W>(a);
}

inline void matmul_int8(const MatmulArgs& a) {
  if (a.w->layout == Layout::kPanels) return matmul_int8_panels(a);
  return sparse_is_cheaper(a) ? matmul_int8_sparse(a) : matmul_int8_rows(a);
}

void matmul(const MatmulArgs& a) {
  switch (a.w->dtype) {
    case DType::kInt8: return matmul_int8(a);
    case DType::kBF16: return matmul_float<BFloat16>(a);
    case DType::kF16: return matmul_float<Half>(a);
    default: return matmul_float<float>(a);
  }
}

// ---- low-rank changes ------------------------------------------------------------------------------

void low_rank_in(const float* a, int64_t rank, const float* x, int64_t n, float* u) {
  constexpr int64_t kTogether = 8;  // chains of sums at a time
  for (int64_t first = 0; first < rank; first += kTogether) {
    const int64_t count = rank - first < kTogether ? rank - first : kTogether;
    Float sum[kTogether];
    for (int64_t r = 0; r < count; ++r) sum[r] = splat(0.0f);
    for (int64_t i = 0; i < n; i += kLanes) {
      const Float value = load(x + i);
      for (int64_t r = 0; r < count; ++r) sum[r] = fma(load(a + (first + r) * n + i), value, sum[r]);
    }
    for (int64_t r = 0; r < count; ++r) u[first + r] = fold_sum(sum[r]);
  }
}

void low_rank_out(const float* b, int64_t rank, int64_t stride, const float* u, int64_t n, float* y) {
  for (int64_t i = 0; i < n; i += kLanes) {
    Float sum = splat(0.0f);
    for (int64_t r = 0; r < rank; ++r) sum = fma(splat(u[r]), load(b + r * stride + i), sum);
    store(y + i, sum);
  }
}

#include "attention_simd.inl"

}  // namespace

static const Kernels& table() {
  static const Kernels kernels{"" OPTLM_ISA_NAME, convert, max_abs,   quantize_weights, layer_norm,
                               quantize,          matmul,  attention, low_rank_in,      low_rank_out};
  return kernels;
}

}  // namespace optlm::OPTLM_ISA
