// The arithmetic of the core as a table of functions, one table for each instruction set.
//
// Every function is defined on a virtual vector of 16 lanes and fixed orders of summation, with fused multiply-adds
// where the reference (kernels_ref.cc) writes them. So all tables give the same bits, whatever the machine.
#pragma once

#include "tensor.h"

namespace optlm {

struct Kernels {
  const char* name;

  // n numbers of dtype (f32, f16, bf16) to float.
  void (*to_float)(const void* source, DType dtype, int64_t n, float* target);

  // Largest magnitude; 0 for n = 0. NaN and infinity come back as infinity.
  float (*max_abs)(const float* x, int64_t n);

  // target[i] = 128 + round(x[i] * inverse_scale), n a multiple of 16.
  void (*quantize_weights)(const float* x, int64_t n, float inverse_scale, uint8_t* target);

  // y = (x - mean) / sqrt(variance + 1e-5) * weight + bias.
  void (*layer_norm)(const float* x, const float* weight, const float* bias, int64_t n, float* y);

  // Groups of 128 numbers to 8 bits with one scale each.
  void (*quantize)(const float* x, int64_t groups, int8_t* q, float* scale, int32_t* correction, uint64_t* active);

  // out[t, rows of the panels] = epilogue(W x[t] + bias).
  void (*matmul)(const MatmulArgs& args);

  void (*attention)(const AttentionArgs& args);

  // u[r] = a[r] x, a (rank, n), summed in 16 lanes; n a multiple of 16.
  void (*low_rank_in)(const float* a, int64_t rank, const float* x, int64_t n, float* u);

  // y[i] = the sum over r in order of u[r] b[r * stride + i], for n outputs; n a multiple of 16.
  void (*low_rank_out)(const float* b, int64_t rank, int64_t stride, const float* u, int64_t n, float* y);
};

// Key and value (head_dim each) of one position into place `slot` of a block; what `attention` does with each new token.
void put_key_value(uint8_t* block, DType dtype, int64_t slot, const float* key, const float* value, int64_t head_dim);

const Kernels& reference_kernels();
#if defined(OPTLM_X86)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
#endif

// "auto", "reference", "avx2" or "avx512"; nullptr when unknown or not available on this machine.
const Kernels* select_kernels(const char* isa);

}  // namespace optlm
