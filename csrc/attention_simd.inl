// Attention on the virtual vector; included by kernels_simd.inl inside its namespace.

inline Float load_kv(const float* p) { return load(p); }
inline Float load_kv(const uint16_t* p) { return load_half(p); }

inline void store_kv(float* p, Float x) { store(p, x); }
// Beyond the range of a half: its largest number, as float_to_half has it.
inline void store_kv(uint16_t* p, Float x) { store_half(p, max(min(x, splat(65504.0f)), splat(-65504.0f))); }

// Keys go to columns, values to rows; both are converted 16 at a time.
template <class KV>
inline void write_cache(const AttentionArgs& a) {
  const int64_t padded_dim = round_up(a.head_dim, kLanes);
  for (int64_t i = 0; i < a.count; ++i) {
    const int64_t pos = a.first_position + i;
    KV* block = reinterpret_cast<KV*>(a.cache) + a.blocks[pos / kBlockTokens] * a.block_stride;
    KV* key = block + pos % kBlockTokens;
    KV* value = block + a.head_dim * kBlockTokens + pos % kBlockTokens * padded_dim;
    for (int64_t d = 0; d < a.head_dim; d += kLanes) {
      const int64_t count = a.head_dim - d < kLanes ? a.head_dim - d : kLanes;
      alignas(64) float padded[2][kLanes] = {};
      const float* k = a.k + i * a.stride + d;
      const float* v = a.v + i * a.stride + d;
      if (count < kLanes) {
        std::memcpy(padded[0], k, count * sizeof(float));
        std::memcpy(padded[1], v, count * sizeof(float));
        k = padded[0];
        v = padded[1];
      }
      alignas(64) KV column[kLanes];
      store_kv(column, load(k));
      for (int64_t j = 0; j < count; ++j) key[(d + j) * kBlockTokens] = column[j];
      store_kv(value + d, load(v));
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
  for (int n = 0; n < N; ++n) {
    for (int m = 0; m < M; ++m) store(scores + n * row + (first_block + m) * kBlockTokens, sum[n][m]);
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
  write_cache<KV>(a);
  int64_t i = a.first_wanted;
  for (; i + kQueryTile <= a.count; i += kQueryTile) attend<kQueryTile, KV>(a, i);
  for (; i < a.count; ++i) attend<1, KV>(a, i);
}

void attention(const AttentionArgs& a) {
  if (a.kv_dtype == DType::kF32) return attention_over<float>(a);
  return attention_over<uint16_t>(a);
}
