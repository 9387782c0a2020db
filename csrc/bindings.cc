// What Python sees of the core: one class. All checks of shapes and ranges are here and in Model::check; the work is
// done with the GIL released.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include <mutex>
#include <optional>
#include <stdexcept>

#include "bindings.h"
#include "model.h"

namespace nb = nanobind;

namespace optlm {

DType parse_dtype(const std::string& name) {
  if (name == "f32" || name == "F32") return DType::kF32;
  if (name == "f16" || name == "F16") return DType::kF16;
  if (name == "bf16" || name == "BF16") return DType::kBF16;
  if (name == "int8") return DType::kInt8;
  throw std::invalid_argument("unknown dtype " + name);
}

Epilogue parse_activation(const std::string& name) {
  if (name == "relu") return Epilogue::kRelu;
  if (name == "gelu") return Epilogue::kGelu;
  if (name == "gelu_new") return Epilogue::kGeluTanh;
  throw std::invalid_argument("unknown activation " + name);
}

const Kernels& kernels_for(const std::string& isa) {
  const Kernels* kernels = select_kernels(isa.c_str());
  if (kernels == nullptr) throw std::invalid_argument("instruction set " + isa + " is unknown or not supported here");
  return *kernels;
}

namespace {

using Ints = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Table = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Rows = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Chosen = nb::ndarray<int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using RawBytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// Far beyond every model, and small enough that no size of the weights and buffers overflows.
constexpr int64_t kMaxLength = int64_t{1} << 24;
constexpr int64_t kMaxWidth = int64_t{1} << 22;
constexpr int64_t kMaxLayers = int64_t{1} << 12;
constexpr int64_t kMaxCount = (int64_t{1} << 31) - 1;  // ids and positions are int32
constexpr int64_t kMaxThreads = 1024;

void check_range(const char* name, int64_t value, int64_t most) {
  if (value >= 1 && value <= most) return;
  throw std::invalid_argument(std::string(name) + " is " + std::to_string(value) + "; it must lie between 1 and " +
                              std::to_string(most));
}

void check_config(const ModelConfig& c, int threads) {
  check_range("vocab_size", c.vocab_size, kMaxLength);
  check_range("hidden_size", c.hidden_size, kMaxWidth);
  check_range("num_layers", c.num_layers, kMaxLayers);
  check_range("ffn_dim", c.ffn_dim, kMaxWidth);
  check_range("num_heads", c.num_heads, c.hidden_size);
  check_range("max_positions", c.max_positions, kMaxLength);
  check_range("embed_dim", c.embed_dim, kMaxWidth);
  check_range("num_blocks", c.num_blocks, kMaxCount);
  check_range("max_batch_tokens", c.max_batch_tokens, kMaxCount);
  check_range("threads", threads, kMaxThreads);
  if (c.hidden_size % c.num_heads != 0) throw std::invalid_argument("hidden_size must be a multiple of num_heads");
  if (c.kv_dtype == DType::kBF16) throw std::invalid_argument("keys and values are f32, f16 or int8");
  if (c.positions_dtype == DType::kInt8) throw std::invalid_argument("the position table is not quantised");
}

void load(Model& model, const std::string& name, RawBytes data, const std::string& dtype, int64_t rows, int64_t cols) {
  const Source source{data.data(), parse_dtype(dtype), rows, cols};
  if (source.dtype == DType::kInt8) throw std::invalid_argument(name + " is int8; tensors are F32, F16 or BF16");
  if (rows < 0 || cols < 0 || rows > 2 * kMaxLength || cols > kMaxLength) {
    throw std::invalid_argument(name + " has the wrong shape");
  }
  if (static_cast<int64_t>(data.size()) != rows * cols * element_bytes(source.dtype)) {
    throw std::invalid_argument(name + " has a size that does not fit its shape");
  }
  std::string problem;
  {
    nb::gil_scoped_release release;
    const std::scoped_lock lock(model.mutex());
    problem = model.load(name, source);
  }
  if (!problem.empty()) throw std::invalid_argument(name + " " + problem);
}

void forward(Model& model, Ints tokens, Ints positions, Ints seq_starts, Table block_tables, Ints rows,
             std::optional<Rows> logits, std::optional<Rows> hidden, std::optional<Chosen> best,
             std::optional<Ints> adapters) {
  Batch batch;
  batch.tokens = tokens.data();
  batch.positions = positions.data();
  batch.seq_starts = seq_starts.data();
  batch.block_tables = block_tables.data();
  batch.rows = rows.data();
  batch.num_tokens = static_cast<int64_t>(tokens.size());
  batch.num_sequences = static_cast<int64_t>(seq_starts.size()) - 1;
  batch.table_width = static_cast<int64_t>(block_tables.shape(1));
  batch.num_rows = static_cast<int64_t>(rows.size());
  const auto fits = [&](const Rows& out, int64_t width) {
    return static_cast<int64_t>(out.shape(0)) >= batch.num_rows && static_cast<int64_t>(out.shape(1)) == width;
  };
  if (positions.size() != tokens.size() || batch.num_sequences < 1 ||
      static_cast<int64_t>(block_tables.shape(0)) < batch.num_sequences) {
    throw std::invalid_argument("tokens, positions, seq_starts and block_tables do not fit each other");
  }
  if ((logits && !fits(*logits, model.config().vocab_size)) || (hidden && !fits(*hidden, model.config().embed_dim)) ||
      (best && static_cast<int64_t>(best->size()) < batch.num_rows) ||
      (adapters && static_cast<int64_t>(adapters->size()) != batch.num_sequences)) {
    throw std::invalid_argument("an array has the wrong shape");
  }
  batch.logits = logits ? logits->data() : nullptr;
  batch.hidden = hidden ? hidden->data() : nullptr;
  batch.best = best ? best->data() : nullptr;
  batch.adapters = adapters ? adapters->data() : nullptr;
  std::string problem;
  {
    nb::gil_scoped_release release;
    const std::scoped_lock lock(model.mutex());
    problem = model.check(batch);
    if (problem.empty()) model.forward(batch);
  }
  if (!problem.empty()) throw std::invalid_argument(problem);
}

int32_t add_adapter(Model& model) {
  const std::scoped_lock lock(model.mutex());
  return model.add_adapter();
}

void remove_adapter(Model& model, int32_t id) {
  const std::scoped_lock lock(model.mutex());
  if (!model.has_adapter(id)) throw std::invalid_argument("no such adapter");
  model.remove_adapter(id);
}

// A (rank, inputs) and B (outputs, rank), with the scale in one of them.
void set_adapter(Model& model, int32_t id, const std::string& module, Floats a, Floats b) {
  if (a.shape(0) != b.shape(1)) throw std::invalid_argument(module + " has two ranks");
  std::string problem;
  {
    nb::gil_scoped_release release;
    const std::scoped_lock lock(model.mutex());
    problem = !model.has_adapter(id) ? "is for no adapter that is there"
                                     : model.set_adapter(id, module, a.data(), b.data(), static_cast<int64_t>(a.shape(0)),
                                                         static_cast<int64_t>(a.shape(1)),
                                                         static_cast<int64_t>(b.shape(0)));
  }
  if (!problem.empty()) throw std::invalid_argument(module + " " + problem);
}

// Keys and values (n, 2 L D), or with `runs` embeddings (n, E).
void set_prefix(Model& model, int32_t id, Floats numbers, int64_t text_start, bool runs) {
  const ModelConfig& c = model.config();
  const auto count = static_cast<int64_t>(numbers.shape(0));
  if (static_cast<int64_t>(numbers.shape(1)) != (runs ? c.embed_dim : 2 * c.num_layers * c.hidden_size)) {
    throw std::invalid_argument("virtual tokens of the wrong width");
  }
  if (count < 1 || count >= c.max_positions || (text_start != 0 && text_start != count)) {
    throw std::invalid_argument("virtual tokens need to be fewer than the context; the text begins at 0 or after them");
  }
  nb::gil_scoped_release release;
  const std::scoped_lock lock(model.mutex());
  if (!model.has_adapter(id)) throw std::invalid_argument("no such adapter");
  if (runs) {
    model.set_prompt(id, numbers.data(), count, text_start);
  } else {
    model.set_prefix(id, numbers.data(), count, text_start);
  }
}

void head(Model& model, Rows hidden, Rows logits) {
  const auto rows = static_cast<int64_t>(hidden.shape(0));
  if (static_cast<int64_t>(hidden.shape(1)) != model.config().embed_dim ||
      static_cast<int64_t>(logits.shape(1)) != model.config().vocab_size ||
      static_cast<int64_t>(logits.shape(0)) != rows) {
    throw std::invalid_argument("hidden and logits do not fit the model");
  }
  nb::gil_scoped_release release;
  const std::scoped_lock lock(model.mutex());
  model.head(hidden.data(), rows, logits.data());
}

void copy_blocks(Model& model, Ints source, Ints target) {
  if (source.size() != target.size()) throw std::invalid_argument("source and target differ in length");
  for (size_t i = 0; i < source.size(); ++i) {
    for (const int32_t block : {source.data()[i], target.data()[i]}) {
      if (block < 0 || block >= model.config().num_blocks) throw std::invalid_argument("block id out of range");
    }
  }
  nb::gil_scoped_release release;
  const std::scoped_lock lock(model.mutex());
  model.copy_blocks(source.data(), target.data(), static_cast<int64_t>(source.size()));
}

}  // namespace
}  // namespace optlm

NB_MODULE(_core, m) {
  using namespace optlm;
  m.attr("BLOCK_TOKENS") = kBlockTokens;
  m.def(
      "instruction_set", [](const std::string& isa) { return std::string(kernels_for(isa).name); },
      nb::arg("isa") = "auto");
  m.def("trim_heap", [] {
#if defined(__GLIBC__)
    malloc_trim(0);
#endif
  });
  bind_kernels(m.def_submodule("kernels", "Single kernels, for tests."));
  nb::class_<Model>(m, "Model")
      .def(
          "__init__",
          [](Model* self, int64_t vocab_size, int64_t hidden_size, int64_t num_layers, int64_t ffn_dim,
             int64_t num_heads, int64_t max_positions, int64_t embed_dim, bool norm_before, bool final_norm, bool tied,
             const std::string& activation, const std::string& dtype, const std::string& kv_dtype, int64_t num_blocks,
             const std::string& positions_dtype, int64_t max_batch_tokens, int threads, const std::string& isa,
             std::optional<RawBytes> packed) {
            ModelConfig c;
            c.vocab_size = vocab_size;
            c.hidden_size = hidden_size;
            c.num_layers = num_layers;
            c.ffn_dim = ffn_dim;
            c.num_heads = num_heads;
            c.max_positions = max_positions;
            c.embed_dim = embed_dim;
            c.norm_before = norm_before;
            c.final_norm = final_norm;
            c.tied = tied;
            c.activation = parse_activation(activation);
            c.dtype = parse_dtype(dtype);
            c.kv_dtype = parse_dtype(kv_dtype);
            c.positions_dtype = parse_dtype(positions_dtype);
            c.num_blocks = num_blocks;
            c.max_batch_tokens = max_batch_tokens;
            check_config(c, threads);
            // Packed weights are only ever read: load() refuses to write over them.
            auto* bytes = packed ? const_cast<uint8_t*>(packed->data()) : nullptr;
            new (self) Model(c, kernels_for(isa), threads, bytes, packed ? static_cast<int64_t>(packed->size()) : 0);
          },
          nb::keep_alive<1, 20>(),
          nb::kw_only(), nb::arg("vocab_size"), nb::arg("hidden_size"), nb::arg("num_layers"), nb::arg("ffn_dim"),
          nb::arg("num_heads"), nb::arg("max_positions"), nb::arg("embed_dim"), nb::arg("norm_before"),
          nb::arg("final_norm"), nb::arg("tied"), nb::arg("activation"), nb::arg("dtype"), nb::arg("kv_dtype"),
          nb::arg("num_blocks"), nb::arg("positions_dtype"), nb::arg("max_batch_tokens"), nb::arg("threads"),
          nb::arg("isa") = "auto", nb::arg("packed").noconvert().none() = nb::none())
      .def("load", &load, nb::arg("name"), nb::arg("data"), nb::arg("dtype"), nb::arg("rows"), nb::arg("cols"))
      .def("forward", &forward, nb::arg("tokens").noconvert(), nb::arg("positions").noconvert(),
           nb::arg("seq_starts").noconvert(), nb::arg("block_tables").noconvert(), nb::arg("rows").noconvert(),
           nb::arg("logits").noconvert().none(), nb::arg("hidden").noconvert().none(),
           nb::arg("best").noconvert().none() = nb::none(), nb::arg("adapters").noconvert().none() = nb::none())
      .def("add_adapter", &add_adapter)
      .def("set_adapter", &set_adapter, nb::arg("id"), nb::arg("module"), nb::arg("a").noconvert(),
           nb::arg("b").noconvert())
      .def("set_prefix", &set_prefix, nb::arg("id"), nb::arg("numbers").noconvert(), nb::arg("text_start"),
           nb::arg("runs"))
      .def("remove_adapter", &remove_adapter, nb::arg("id"))
      .def("head", &head, nb::arg("hidden").noconvert(), nb::arg("logits").noconvert())
      .def("copy_blocks", &copy_blocks, nb::arg("source").noconvert(), nb::arg("target").noconvert())
      .def("set_skip_zeros", &Model::set_skip_zeros, nb::arg("on"))
      .def("active_share", &Model::active_share)
      .def_prop_ro(
          "weights",
          [](Model& model) {
            const Arena& weights = model.weights();
            return nb::ndarray<nb::numpy, const uint8_t, nb::ndim<1>>(
                weights.data(), {static_cast<size_t>(weights.bytes())});
          },
          nb::rv_policy::reference_internal)
      .def_prop_ro("bytes_per_token", &Model::bytes_per_token)
      .def_prop_ro("threads", &Model::threads)
      .def_prop_ro("instruction_set", [](const Model& model) { return std::string(model.kernels().name); });
}
