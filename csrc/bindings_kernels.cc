// Single kernels as `optlm._core.kernels`, so that tests compare every table with the reference bit by bit.
#include "bindings.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "memory.h"
#include "pack.h"

namespace nb = nanobind;

namespace optlm {
namespace {

using In1 = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using In2 = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Ids = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Out1 = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Out2 = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Any1 = nb::ndarray<nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// The weights of one matrix, packed, and the memory they stand in.
struct PackedMatrix {
  Arena arena;
  Matrix w;

  PackedMatrix(const Kernels& kernels, In2 weights, DType dtype, bool by_input) {
    w.dtype = dtype;
    w.layout = by_input ? Layout::kByInput : Layout::kPanels;
    w.rows = static_cast<int64_t>(weights.shape(0));
    w.cols = static_cast<int64_t>(weights.shape(1));
    for (int pass = 0; pass < 2; ++pass) {
      w.data = arena.take(w.data_bytes());
      w.scales = arena.take_floats(w.padded_rows());
      if (pass == 0) arena.reserve(arena.bytes(), false);
    }
    std::vector<uint8_t> scratch(pack_scratch_bytes(w.cols));
    const Source source{weights.data(), DType::kF32, w.rows, w.cols};
    if (!pack_panels(kernels, source, w, 0, 0, w.panels(), scratch.data())) {
      throw std::invalid_argument("a weight is not finite");
    }
  }
};

// Rows of x padded to whole groups, and their 8-bit form.
struct Inputs {
  std::vector<float> x;
  std::vector<int8_t> q;
  std::vector<float> scale;
  std::vector<int32_t> correction;
  std::vector<uint64_t> active;
  Activations view;

  Inputs(const Kernels& kernels, In2 rows) {
    const auto tokens = static_cast<int64_t>(rows.shape(0)), cols = static_cast<int64_t>(rows.shape(1));
    const int64_t groups = round_up(cols, kGroup) / kGroup;
    x.resize(tokens * groups * kGroup);
    for (int64_t t = 0; t < tokens; ++t) {
      std::copy_n(rows.data() + t * cols, cols, x.data() + t * groups * kGroup);
    }
    q.resize(x.size());
    scale.resize(tokens * groups);
    correction.resize(tokens * groups);
    active.resize(tokens * groups * kMaskWords);
    kernels.quantize(x.data(), tokens * groups, q.data(), scale.data(), correction.data(), active.data());
    view = {x.data(), q.data(), scale.data(), correction.data(), active.data(), groups};
  }
};

void matmul(const std::string& isa, In2 weights, In2 x, In1 bias, const std::string& dtype, bool by_input,
            const std::string& epilogue, bool skip_zeros, int64_t parts, Out2 out) {
  const Kernels& kernels = kernels_for(isa);
  const PackedMatrix packed(kernels, weights, parse_dtype(dtype), by_input);
  const Inputs inputs(kernels, x);
  std::vector<float> padded_bias(packed.w.padded_rows());
  std::copy_n(bias.data(), bias.size(), padded_bias.data());
  std::vector<float> scratch(matmul_scratch_floats(packed.w.cols));
  for (int64_t part = 0; part < parts; ++part) {
    MatmulArgs args;
    args.w = &packed.w;
    args.in = inputs.view;
    args.tokens = static_cast<int64_t>(x.shape(0));
    args.panel_begin = packed.w.panels() * part / parts;
    args.panel_end = packed.w.panels() * (part + 1) / parts;
    args.bias = padded_bias.data();
    args.out = out.data();
    args.out_stride = static_cast<int64_t>(out.shape(1));
    args.epilogue = epilogue == "add"     ? Epilogue::kAdd
                    : epilogue == "store" ? Epilogue::kStore
                                          : parse_activation(epilogue);
    args.skip_zeros = skip_zeros;
    args.scratch = scratch.data();
    kernels.matmul(args);
  }
}

// Queries, keys and values (T, 3 K) of one head, `chunk` tokens at a time. The first `virtual_tokens` rows stand before
// the text as a prefix, and have no output.
void attention(const std::string& isa, In2 qkv, Ids blocks, int64_t num_blocks, const std::string& kv_dtype,
               int64_t chunk, int64_t virtual_tokens, Out2 out) {
  const Kernels& kernels = kernels_for(isa);
  const auto tokens = static_cast<int64_t>(qkv.shape(0)), dim = static_cast<int64_t>(qkv.shape(1)) / 3;
  AttentionArgs args;
  args.kv_dtype = parse_dtype(kv_dtype);
  args.block_stride = kv_block_elements(args.kv_dtype, dim);
  std::vector<uint8_t> cache(num_blocks * args.block_stride * element_bytes(args.kv_dtype));
  std::vector<float> scratch(attention_scratch_floats(tokens + kBlockTokens, dim));
  const int64_t prefix_blocks = round_up(virtual_tokens, kBlockTokens) / kBlockTokens;
  std::vector<uint8_t> prefix(prefix_blocks * args.block_stride * element_bytes(args.kv_dtype));
  args.stride = 3 * dim;
  args.query_scale = 0.5f;
  args.head_dim = dim;
  args.out_stride = dim;
  args.scratch = scratch.data();
  if (virtual_tokens > 0) {
    std::vector<int32_t> in_order(prefix_blocks);
    for (int64_t i = 0; i < prefix_blocks; ++i) in_order[i] = static_cast<int32_t>(i);
    args.count = args.first_wanted = virtual_tokens;
    args.k = qkv.data() + dim;
    args.v = args.k + dim;
    args.blocks = in_order.data();
    args.cache = prefix.data();
    kernels.attention(args);
    args.prefix = prefix.data();
    args.prefix_tokens = virtual_tokens;
    args.first_wanted = 0;
  }
  args.blocks = blocks.data();
  args.cache = cache.data();
  for (int64_t first = virtual_tokens; first < tokens; first += chunk) {
    args.count = std::min(chunk, tokens - first);
    args.first_position = first - virtual_tokens;
    args.q = qkv.data() + first * 3 * dim;
    args.k = args.q + dim;
    args.v = args.q + 2 * dim;
    args.out = out.data() + first * dim;
    kernels.attention(args);
  }
}

void layer_norm(const std::string& isa, In1 x, In1 weight, In1 bias, Out1 y) {
  kernels_for(isa).layer_norm(x.data(), weight.data(), bias.data(), static_cast<int64_t>(x.size()), y.data());
}

void to_float(const std::string& isa, Any1 source, const std::string& dtype, Out1 target) {
  kernels_for(isa).to_float(source.data(), parse_dtype(dtype), static_cast<int64_t>(target.size()), target.data());
}

float max_abs(const std::string& isa, In1 x) {
  return kernels_for(isa).max_abs(x.data(), static_cast<int64_t>(x.size()));
}

}  // namespace

void bind_kernels(nb::module_ module) {
  module.def("matmul", &matmul, nb::arg("isa"), nb::arg("weights"), nb::arg("x"), nb::arg("bias"), nb::kw_only(),
             nb::arg("dtype"), nb::arg("by_input"), nb::arg("epilogue"), nb::arg("skip_zeros"), nb::arg("parts"),
             nb::arg("out").noconvert());
  module.def("attention", &attention, nb::arg("isa"), nb::arg("qkv"), nb::arg("blocks"), nb::kw_only(),
             nb::arg("num_blocks"), nb::arg("kv_dtype"), nb::arg("chunk"),
             nb::arg("virtual_tokens") = 0, nb::arg("out").noconvert());
  module.def("layer_norm", &layer_norm, nb::arg("isa"), nb::arg("x"), nb::arg("weight"), nb::arg("bias"),
             nb::arg("y").noconvert());
  module.def("to_float", &to_float, nb::arg("isa"), nb::arg("source"), nb::arg("dtype"),
             nb::arg("target").noconvert());
  module.def("max_abs", &max_abs, nb::arg("isa"), nb::arg("x"));
}

}  // namespace optlm
