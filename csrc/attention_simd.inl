// Attention on the virtual vector; included by kernels_simd.inl inside its namespace.

inline Float load_kv(const float* p) { return load(p); }
inline Float load_kv(const uint16_t* p) { return load_half(p); }
inline Float load_kv(const int8_t* p) { return load_int8(p); }

inline void store_kv(float* p, Float x) { store(p, x); }
// Beyond the range of a half: its largest number, as float_to_half has it.
inline void store_kv(uint16_t* p, Float x) { store_half(p, max(min(x, splat(65504.0f)), splat(-65504.0f))); }

// The 16 scales of a block's keys; those of its values follow.
inline const float* scales_of(const AttentionArgs& a, int64_t block) {
  return reinterpret_cast<const float*>(a.block<int8_t>(block) + kv_scales_at(a.head_dim));
}

// Up to 16 numbers of x, zeros after them.
inline Float load_some(const float* x, int64_t count) {
  if (count >= kLanes) return load(x);
  alignas(64) float padded[kLanes] = {};
  std::memcpy(padded, x, count * sizeof(float));
  return load(padded);
}

// What a head's numbers are multiplied by to become 8 bits; the scale that takes it back is stored.
inline Float factor_of(const float* x, int64_t dim, float* scale) {
  Float largest = splat(0.0f);
  for (int64_t d = 0; d < dim; d += kLanes) largest = max(largest, abs(load_some(x + d, dim - d)));
  const float top = largest_of(largest);
  const bool zero = top < 1e-30f;
  *scale = zero ? 0.0f : top / 127.0f;
  return splat(zero ? 0.0f : 127.0f / top);
}

inline void write_int8(const AttentionArgs& a) {
  const int64_t padded_dim = round_up(a.head_dim, kLanes);
  for (int64_t i = 0; i < a.count; ++i) {
    const int64_t pos = a.first_position + i, slot = pos % kBlockTokens;
    int8_t* block = reinterpret_cast<int8_t*>(a.cache) + a.blocks[pos / kBlockTokens] * a.block_stride;
    int8_t* value = block + a.head_dim * kBlockTokens + slot * padded_dim;
    float* scales = reinterpret_cast<float*>(block + kv_scales_at(a.head_dim)) + slot;
    const float *k = a.k + i * a.stride, *v = a.v + i * a.stride;
    const Float key_factor = factor_of(k, a.head_dim, scales);
    const Float value_factor = factor_of(v, a.head_dim, scales + kBlockTokens);
    for (int64_t d = 0; d < a.head_dim; d += kLanes) {
      const int64_t count = a.head_dim - d < kLanes ? a.head_dim - d : kLanes;
      alignas(64) int8_t column[kLanes];
      store_low_bytes(column, to_int(mul(load_some(k + d, count), key_factor)));
      for (int64_t j = 0; j < count; ++j) block[(d + j) * kBlockTokens + slot] = column[j];
      store_low_bytes(value + d, to_int(mul(load_some(v + d, count), value_factor)));
    }
  }
}

// Keys go to columns, values to rows; both are converted 16 at a time.
template <class KV>
inline void write_floats(const AttentionArgs& a) {
  const int64_t padded_dim = round_up(a.head_dim, kLanes);
  for (int64_t i = 0; i < a.count; ++i) {
    const int64_t pos = a.first_position + i;
    KV* block = reinterpret_cast<KV*>(a.cache) + a.blocks[pos / kBlockTokens] * a.block_stride;
    KV* key = block + pos % kBlockTokens;
    KV* value = block + a.head_dim * kBlockTokens + pos % kBlockTokens * padded_dim;
    for (int64_t d = 0; d < a.head_dim; d += kLanes) {
      const int64_t count = a.head_dim - d < kLanes ? a.head_dim - d : kLanes;
      alignas(64) KV column[kLanes];
      store_kv(column, load_some(a.k + i * a.stride + d, count));
      for (int64_t j = 0; j < count; ++j) key[(d + j) * kBlockTokens] = column[j];
      store_kv(value + d, load_some(a.v + i * a.stride + d, count));
    }
  }
}

// Scores of N queries against the 16 positions of each of M blocks. scores[n] is `row` numbers long.
template <int N, int M, class KV>
inline void score_blocks(const AttentionArgs& a, const float* query, int64_t query_row, int64_t first_block,
                         float* scores, int64_t row) {
  const KV* key[M];
  for (int m = 0; m < M; ++m) key[m] = a.block<KV>(first_block + m);
  Float sum[N][M];
  for (int n = 0; n < N; ++n) {
    for (int m = 0; m < M; ++m) sum[n][m] = splat(0.0f);
  }
  for (int64_t d = 0; d < a.head_dim; ++d) {
    Float keys[M];
    for (int m = 0; m < M; ++m) keys[m] = load_kv(key[m] + d * kBlockTokens);
    for (int n = 0; n < N; ++n) {
      const Float q = splat(query[n * query_row + d]);
      for (int m = 0; m < M; ++m) sum[n][m] = fma(q, keys[m], sum[n][m]);
    }
  }
  for (int m = 0; m < M; ++m) {
    float* target = scores + (first_block + m) * kBlockTokens;
    if constexpr (sizeof(KV) == 1) {
      const Float scale = load(scales_of(a, first_block + m));
      for (int n = 0; n < N; ++n) sum[n][m] = mul(sum[n][m], scale);
    }
    for (int n = 0; n < N; ++n) store(target + n * row, sum[n][m]);
  }
}

// Scores -> probabilities without their common factor, which is returned. Of `length` places those from `gap` to
// `gap_end` do not count; they and the rest become 0.
inline float softmax(float* scores, int64_t length, int64_t gap, int64_t gap_end) {
  const int64_t padded = round_up(length, kBlockTokens);
  for (int64_t i = gap; i < gap_end; ++i) scores[i] = -INFINITY;
  for (int64_t i = length; i < padded; ++i) scores[i] = -INFINITY;
  Float largest = splat(-INFINITY);
  for (int64_t i = 0; i < padded; i += kLanes) largest = max(largest, load(scores + i));
  const Float top = splat(largest_of(largest));
  for (int64_t i = 0; i < padded; i += kLanes) store(scores + i, exp_nonpositive(sub(load(scores + i), top)));
  for (int64_t i = gap; i < gap_end; ++i) scores[i] = 0.0f;
  for (int64_t i = length; i < padded; ++i) scores[i] = 0.0f;
  Float sum = splat(0.0f);
  for (int64_t i = 0; i < padded; i += kLanes) sum = add(sum, load(scores + i));
  return 1.0f / fold_sum(sum);
}

// out[n] = sum over positions of p[n] V, for M vectors of the head's dimensions from `dim` on.
template <int N, int M, class KV>
inline void weigh_values(const AttentionArgs& a, const float* p, int64_t row, int64_t length, int64_t dim, float* out) {
  const int64_t padded_dim = round_up(a.head_dim, kLanes);
  Float sum[N][M];
  for (int n = 0; n < N; ++n) {
    for (int m = 0; m < M; ++m) sum[n][m] = splat(0.0f);
  }
  for (int64_t first = 0; first < length; first += kBlockTokens) {
    const KV* value = a.block<KV>(first / kBlockTokens) + a.head_dim * kBlockTokens + dim;
    const int64_t count = length - first < kBlockTokens ? length - first : kBlockTokens;
    for (int64_t i = 0; i < count; ++i, value += padded_dim) {
      Float values[M];
      for (int m = 0; m < M; ++m) values[m] = load_kv(value + 16 * m);
      for (int n = 0; n < N; ++n) {
        const Float weight = splat(p[n * row + first + i]);
        for (int m = 0; m < M; ++m) sum[n][m] = fma(weight, values[m], sum[n][m]);
      }
    }
  }
  for (int n = 0; n < N; ++n) {
    for (int m = 0; m < M; ++m) store(out + n * padded_dim + dim + 16 * m, sum[n][m]);
  }
}

// N neighbouring queries share every read of keys and values; a query's own sums do not depend on its company,
// because the probabilities of positions after it are exact zeros.
template <int N, class KV>
inline void attend(const AttentionArgs& a, int64_t i) {
  const int64_t padded_dim = round_up(a.head_dim, kLanes);
  const int64_t length = a.prefix_places() + a.first_position + i + N;  // of the last query
  const int64_t blocks = (length + kBlockTokens - 1) / kBlockTokens;
  const int64_t row = round_up(length, 4 * kBlockTokens);
  float* query = a.scratch;
  float* out = query + N * padded_dim;
  float* scores = out + N * padded_dim;
  for (int n = 0; n < N; ++n) {
    for (int64_t d = 0; d < a.head_dim; ++d) query[n * padded_dim + d] = a.q[(i + n) * a.stride + d] * a.query_scale;
  }
  int64_t block = 0;
  for (; block + 4 <= blocks; block += 4) score_blocks<N, 4, KV>(a, query, padded_dim, block, scores, row);
  switch (blocks - block) {
    case 3: score_blocks<N, 3, KV>(a, query, padded_dim, block, scores, row); break;
    case 2: score_blocks<N, 2, KV>(a, query, padded_dim, block, scores, row); break;
    case 1: score_blocks<N, 1, KV>(a, query, padded_dim, block, scores, row); break;
    default: break;
  }
  float factor[N];
  for (int n = 0; n < N; ++n) {
    const int64_t own = length - N + n + 1;
    for (int64_t p = own; p < blocks * kBlockTokens; ++p) scores[n * row + p] = 0.0f;
    factor[n] = softmax(scores + n * row, own, a.prefix_tokens, a.prefix_places());
  }
  if constexpr (sizeof(KV) == 1) {  // a value's scale goes into its weight
    for (block = 0; block < blocks; ++block) {
      const Float scale = load(scales_of(a, block) + kBlockTokens);
      for (int n = 0; n < N; ++n) {
        float* p = scores + n * row + block * kBlockTokens;
        store(p, mul(load(p), scale));
      }
    }
  }
  int64_t dim = 0;
  for (; dim + 64 <= padded_dim; dim += 64) weigh_values<N, 4, KV>(a, scores, row, length, dim, out);
  for (; dim < padded_dim; dim += 16) weigh_values<N, 1, KV>(a, scores, row, length, dim, out);
  for (int n = 0; n < N; ++n) {
    float* target = a.out + (i + n) * a.out_stride;
    for (int64_t d = 0; d < a.head_dim; ++d) target[d] = out[n * padded_dim + d] * factor[n];
  }
}

template <class KV>
inline void attention_over(const AttentionArgs& a) {
  if constexpr (sizeof(KV) == 1) {
    write_int8(a);
  } else {
    write_floats<KV>(a);
  }
  int64_t i = a.first_wanted;
  for (; i + kQueryTile <= a.count; i += kQueryTile) attend<kQueryTile, KV>(a, i);
  for (; i < a.count; ++i) attend<1, KV>(a, i);
}

void attention(const AttentionArgs& a) {
  if (a.kv_dtype == DType::kF32) return attention_over<float>(a);
  if (a.kv_dtype == DType::kInt8) return attention_over<int8_t>(a);
  return attention_over<uint16_t>(a);
}
