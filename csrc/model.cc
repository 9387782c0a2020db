#include "model.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>
#include <new>
#include <stdexcept>

namespace optlm {

Model::Model(const ModelConfig& config, const Kernels& kernels, int threads, uint8_t* packed, int64_t packed_bytes)
    : config_(config), kernels_(kernels), team_(threads) {
  head_dim_ = config_.hidden_size / config_.num_heads;
  width_ = round_up(config_.hidden_size, kGroup);
  ffn_width_ = round_up(config_.ffn_dim, kGroup);
  embed_width_ = round_up(config_.embed_dim, kGroup);
  qkv_section_ = round_up(config_.hidden_size, kPanelRows);
  const int64_t size = team_.size();
  by_heads_ = config_.num_heads % size == 0 && config_.num_heads / size * head_dim_ % kPanelRows == 0;
  by_groups_ = ffn_width_ / kGroup % size == 0;
  block_stride_ = config_.num_heads * kv_block_elements(config_.kv_dtype, head_dim_);
  int64_t elements = 0;
  if (__builtin_mul_overflow(config_.num_layers * block_stride_, 4 * config_.num_blocks, &elements)) {
    throw std::bad_alloc();
  }
  layers_.resize(config_.num_layers);
  place_weights();
  if (packed == nullptr) {
    weights_.reserve(weights_.bytes(), true);
  } else if (packed_bytes == weights_.bytes()) {
    weights_.borrow(packed, packed_bytes);
  } else {
    throw std::invalid_argument("the packed weights have " + std::to_string(packed_bytes) +
                                " bytes; this model needs " + std::to_string(weights_.bytes()));
  }
  place_weights();
  place_buffers();
  buffers_.reserve(buffers_.bytes(), false);
  place_buffers();
  cache_.reserve(config_.num_layers * config_.num_blocks * block_stride_ * element_bytes(config_.kv_dtype), false);
}

void Model::place(Linear& linear, int64_t rows, int64_t cols, Layout layout) {
  linear.w = Matrix{config_.dtype, layout, rows, cols, nullptr, nullptr};
  linear.w.data = weights_.take(linear.w.data_bytes());
  if (config_.dtype == DType::kInt8) linear.w.scales = weights_.take_floats(linear.w.padded_rows());
  linear.bias = weights_.take_floats(linear.w.padded_rows());
}

void Model::place(Norm& norm) {
  norm.weight = weights_.take_floats(config_.hidden_size);
  norm.bias = weights_.take_floats(config_.hidden_size);
  if (norm.weight != nullptr && !weights_.borrowed()) std::fill_n(norm.weight, config_.hidden_size, 1.0f);
}

void Model::place_weights() {
  const int64_t d = config_.hidden_size, e = config_.embed_dim, f = config_.ffn_dim;
  place(embedding_, config_.vocab_size, e, Layout::kPanels);
  if (config_.tied) {
    head_ = embedding_;
  } else {
    place(head_, config_.vocab_size, e, Layout::kPanels);
  }
  if (e != d) {
    place(project_in_, d, e, Layout::kPanels);
    place(project_out_, e, d, Layout::kPanels);
  }
  const int64_t positions = (config_.max_positions + config_.position_offset) * d;
  positions_ = weights_.take(positions * element_bytes(config_.positions_dtype));
  if (config_.final_norm) place(final_norm_);
  int64_t slots = 0;
  for (Layer& layer : layers_) {
    place(layer.attention_norm);
    place(layer.qkv, 3 * qkv_section_, d, Layout::kPanels);
    place(layer.out, d, d, Layout::kPanels);
    place(layer.ffn_norm);
    place(layer.fc1, f, d, Layout::kPanels);
    place(layer.fc2, d, f, Layout::kByInput);
    layer.qkv.slots = 3;
    for (Linear* linear : {&layer.qkv, &layer.out, &layer.fc1, &layer.fc2}) {
      linear->place = slots;
      slots += linear->slots;
    }
  }
}

void Model::place_buffers() {
  const int64_t tokens = config_.max_batch_tokens;
  x_ = buffers_.take_floats(tokens * width_);
  normed_ = buffers_.take_floats(tokens * width_);
  qkv_ = buffers_.take_floats(tokens * 3 * qkv_section_);
  context_ = buffers_.take_floats(tokens * width_);
  ffn_ = buffers_.take_floats(tokens * ffn_width_);
  embed_ = buffers_.take_floats(tokens * embed_width_);
  quantized_ = place_quantized(tokens * std::max(width_, embed_width_) / kGroup);
  ffn_quantized_ = place_quantized(tokens * ffn_width_ / kGroup);
  const int64_t floats = std::max({matmul_scratch_floats(ffn_width_), config_.hidden_size,
                                   attention_scratch_floats(2 * config_.max_positions + kBlockTokens, head_dim_)});
  own_.resize(team_.size());
  for (Own& own : own_) {
    own.scratch = buffers_.take_floats(floats);
    own.normed = buffers_.take_floats(std::max(width_, embed_width_));
    own.quantized = place_quantized(std::max(width_, embed_width_) / kGroup);
    own.best = reinterpret_cast<Best*>(buffers_.take(tokens * static_cast<int64_t>(sizeof(Best))));
    own.changed = buffers_.take(tokens);
  }
  extra_stride_ = std::max(3 * qkv_section_, round_up(config_.ffn_dim, kPanelRows));
  extra_ = buffers_.take_floats(tokens * extra_stride_);
}

Model::Quantized Model::place_quantized(int64_t groups) {
  Quantized z;
  z.q = reinterpret_cast<int8_t*>(buffers_.take(groups * kGroup));
  z.scale = buffers_.take_floats(groups);
  z.correction = reinterpret_cast<int32_t*>(buffers_.take(groups * 4));
  z.active = reinterpret_cast<uint64_t*>(buffers_.take(groups * kMaskWords * 8));
  return z;
}

// ---- weights -----------------------------------------------------------------------------------------

Model::Target Model::find(const std::string& name) {
  const int64_t d = config_.hidden_size, e = config_.embed_dim, f = config_.ffn_dim, v = config_.vocab_size;
  const auto norm = [d](Norm& n, const std::string& part) {
    return Target{nullptr, 0, part == "weight" ? n.weight : part == "bias" ? n.bias : nullptr, d, 1};
  };
  const auto linear = [](Linear& l, const std::string& part, int64_t row, int64_t rows, int64_t cols) {
    if (part == "weight") return Target{&l.w, row / kPanelRows, nullptr, rows, cols};
    return Target{nullptr, 0, part == "bias" ? l.bias + row : nullptr, rows, 1};
  };
  if (name == "lm_head.weight" && !config_.tied) return {&head_.w, 0, nullptr, v, e};
  const std::string root = "model.decoder.";
  if (!name.starts_with(root)) return {};
  std::string rest = name.substr(root.size());
  const std::string part = rest.substr(rest.rfind('.') + 1);
  if (rest == "embed_tokens.weight") return {&embedding_.w, 0, nullptr, v, e};
  if (rest == "project_in.weight" && e != d) return {&project_in_.w, 0, nullptr, d, e};
  if (rest == "project_out.weight" && e != d) return {&project_out_.w, 0, nullptr, e, d};
  if (rest.starts_with("final_layer_norm.") && config_.final_norm) return norm(final_norm_, part);
  if (!rest.starts_with("layers.")) return {};
  int64_t index = -1;
  const char* end = rest.data() + rest.size();
  const auto [after, error] = std::from_chars(rest.data() + 7, end, index);
  if (error != std::errc() || after == end || *after != '.' || index < 0 || index >= config_.num_layers) return {};
  Layer& layer = layers_[index];
  rest = rest.substr(after + 1 - rest.data(), rest.rfind('.') - (after + 1 - rest.data()));
  if (rest == "self_attn_layer_norm") return norm(layer.attention_norm, part);
  if (rest == "final_layer_norm") return norm(layer.ffn_norm, part);
  if (rest == "self_attn.q_proj") return linear(layer.qkv, part, 0, d, d);
  if (rest == "self_attn.k_proj") return linear(layer.qkv, part, qkv_section_, d, d);
  if (rest == "self_attn.v_proj") return linear(layer.qkv, part, 2 * qkv_section_, d, d);
  if (rest == "self_attn.out_proj") return linear(layer.out, part, 0, d, d);
  if (rest == "fc1") return linear(layer.fc1, part, 0, f, d);
  if (rest == "fc2") return linear(layer.fc2, part, 0, d, f);
  return {};
}

bool Model::pack(const Source& source, const Target& target) {
  const int64_t panels = round_up(source.rows, kPanelRows) / kPanelRows;
  std::vector<char> finite(team_.size(), 1);
  team_.run([&](int rank) {
    std::vector<uint8_t> scratch(pack_scratch_bytes(source.cols));
    const Range part = share(panels, rank, team_.size());
    finite[rank] = pack_panels(kernels_, source, *target.w, target.first_panel, part.begin, part.end, scratch.data());
  });
  return std::all_of(finite.begin(), finite.end(), [](char ok) { return ok; });
}

bool Model::load_positions(const Source& source) {
  const int64_t row_bytes = source.cols * element_bytes(source.dtype);
  std::memcpy(positions_, source.data, source.rows * row_bytes);
  std::vector<float> row(source.cols);
  for (int64_t r = 0; r < source.rows; ++r) {
    kernels_.to_float(positions_ + r * row_bytes, source.dtype, source.cols, row.data());
    if (!std::isfinite(kernels_.max_abs(row.data(), source.cols))) return false;
  }
  return true;
}

std::string Model::load(const std::string& name, const Source& source) {
  if (weights_.borrowed()) return "cannot be loaded over packed weights";
  if (name == "model.decoder.embed_positions.weight") {
    const bool fits = source.rows == config_.max_positions + config_.position_offset &&
                      source.cols == config_.hidden_size && source.dtype == config_.positions_dtype;
    if (!fits) return "has the wrong shape or dtype";
    return load_positions(source) ? "" : "holds NaN or infinity";
  }
  const Target target = find(name);
  if (target.w == nullptr && target.vector == nullptr) return "is not part of this model";
  if (source.rows != target.rows || source.cols != target.cols) return "has the wrong shape";
  if (target.w != nullptr) return pack(source, target) ? "" : "holds NaN or infinity";
  kernels_.to_float(source.data, source.dtype, source.rows, target.vector);
  return std::isfinite(kernels_.max_abs(target.vector, source.rows)) ? "" : "holds NaN or infinity";
}

std::string Model::set_adapter(int32_t id, const std::string& module, const float* a, const float* b, int64_t rank,
                               int64_t inputs, int64_t outputs) {
  const Target target = find(module + ".weight");
  const std::string root = "model.decoder.layers.";
  const size_t dot = module.find('.', root.size());
  const std::string name = dot == std::string::npos ? "" : module.substr(dot + 1);
  const auto slot = std::find(std::begin(kSlotNames), std::end(kSlotNames), name);
  if (target.w == nullptr || !module.starts_with(root) || slot == std::end(kSlotNames)) {
    return "is no matrix inside a layer";
  }
  if (inputs != target.cols || outputs != target.rows || rank < 1) return "has the wrong shape";
  const int64_t layer = std::stoll(module.substr(root.size(), dot - root.size()));
  adapters_.set(id, layer * kSlots + (slot - std::begin(kSlotNames)), a, b, rank, inputs, outputs);
  for (Own& own : own_) own.factors.resize(adapters_.largest_rank());
  return {};
}

int64_t Model::bytes_per_token() const {
  int64_t bytes = head_.w.data_bytes();
  if (project_in_.w.data != nullptr) bytes += project_in_.w.data_bytes() + project_out_.w.data_bytes();
  for (const Layer& layer : layers_) {
    for (const Linear* linear : {&layer.qkv, &layer.out, &layer.fc1, &layer.fc2}) bytes += linear->w.data_bytes();
  }
  return bytes;
}

// ---- one step -----------------------------------------------------------------------------------------

std::string Model::check(const Batch& b) const {
  if (b.num_tokens < 1 || b.num_tokens > config_.max_batch_tokens) return "number of tokens out of range";
  if (b.seq_starts[0] != 0 || b.seq_starts[b.num_sequences] != b.num_tokens) return "seq_starts must run from 0 to T";
  for (int64_t s = 0; s < b.num_sequences; ++s) {
    const int32_t begin = b.seq_starts[s], end = b.seq_starts[s + 1];
    if (end <= begin) return "every sequence needs a token";
    if (end > b.num_tokens) return "seq_starts must run from 0 to T";
    if (b.adapters != nullptr && b.adapters[s] != -1 && !adapters_.holds(b.adapters[s])) return "no such adapter";
    const int64_t first = b.positions[begin], last = first + (end - begin) - 1;
    const int64_t start = b.adapters != nullptr && b.adapters[s] >= 0 ? adapters_[b.adapters[s]].text_start : 0;
    if (first < 0 || last + start >= config_.max_positions) return "position out of range";
    if (last / kBlockTokens >= b.table_width) return "block table too short";
    for (int32_t t = begin; t < end; ++t) {
      if (b.positions[t] != first + (t - begin)) return "positions of a sequence must be consecutive";
    }
    for (int64_t i = 0; i <= last / kBlockTokens; ++i) {
      const int32_t block = b.block_tables[s * b.table_width + i];
      if (block < 0 || block >= config_.num_blocks) return "block id out of range";
    }
  }
  for (int64_t t = 0; t < b.num_tokens; ++t) {
    if (b.tokens[t] < 0 || b.tokens[t] >= config_.vocab_size) return "token id out of range";
  }
  for (int64_t r = 0; r < b.num_rows; ++r) {
    if (b.rows[r] <= (r > 0 ? b.rows[r - 1] : -1) || b.rows[r] >= b.num_tokens) return "rows must ascend within T";
  }
  return {};
}

void Model::forward(const Batch& batch) {
  adapter_of_.clear();
  for (int64_t s = 0; batch.adapters != nullptr && s < batch.num_sequences; ++s) {
    const Adapter* adapter = batch.adapters[s] < 0 ? nullptr : &adapters_[batch.adapters[s]];
    adapter_of_.resize(batch.seq_starts[s + 1], adapter);
  }
  team_.run([&](int rank) { run_rank(batch, rank); });
}

void Model::run_rank(const Batch& batch, int rank) {
  embed(batch, rank);
  int64_t tokens = batch.num_tokens;
  for (int64_t i = 0; i < config_.num_layers; ++i) {
    const Layer& layer = layers_[i];
    attention_block(layer, batch, i, rank);
    if (i + 1 == config_.num_layers && batch.num_rows < tokens) {
      if (batch.num_rows == 0) return;
      keep_rows(batch, rank);
      tokens = batch.num_rows;
    }
    const Activations mixed = prepare(nullptr, context_, width_, tokens, rank, stream(layer.out, rank));
    project(layer.out, mixed, tokens, x_, width_, Epilogue::kAdd, rank, stream(layer.fc1, rank));
    feed_forward(layer, tokens, rank);
  }
  results(batch, rank);
}

// Fills context_: what the heads found, side by side.
void Model::attention_block(const Layer& layer, const Batch& batch, int64_t index, int rank) {
  const int64_t tokens = batch.num_tokens;
  const Norm* norm = config_.norm_before ? &layer.attention_norm : nullptr;
  const Activations in = prepare(norm, x_, width_, tokens, rank, stream(layer.qkv, rank));
  if (by_heads_) {
    // What a thread's heads attend with, it made itself: nothing to wait for.
    const Range part = share(qkv_section_ / kPanelRows, rank, team_.size());
    for (int64_t first = 0; first < layer.qkv.w.panels(); first += qkv_section_ / kPanelRows) {
      multiply(layer.qkv, {first + part.begin, first + part.end}, in, tokens, qkv_, 3 * qkv_section_,
               Epilogue::kStore, rank);
    }
  } else {
    project(layer.qkv, in, tokens, qkv_, 3 * qkv_section_, Epilogue::kStore, rank);
  }
  attend(batch, index, rank);
  team_.barrier(stream(layer.out, rank));
}

void Model::feed_forward(const Layer& layer, int64_t tokens, int rank) {
  if (!config_.norm_before) normalize(layer.attention_norm, tokens, rank);
  const Norm* norm = config_.norm_before ? &layer.ffn_norm : nullptr;
  const Activations in = prepare(norm, x_, width_, tokens, rank, stream(layer.fc1, rank));
  Activations units = {ffn_, nullptr, nullptr, nullptr, nullptr, ffn_width_ / kGroup};
  if (config_.dtype != DType::kInt8) {
    project(layer.fc1, in, tokens, ffn_, ffn_width_, config_.activation, rank);
  } else {
    Range groups = share(units.groups, rank, team_.size());
    if (by_groups_) {
      const int64_t panels_a_group = kGroup / kPanelRows;
      const Range panels = {std::min(groups.begin * panels_a_group, layer.fc1.w.panels()),
                            std::min(groups.end * panels_a_group, layer.fc1.w.panels())};
      multiply(layer.fc1, panels, in, tokens, ffn_, ffn_width_, config_.activation, rank);
    } else {
      project(layer.fc1, in, tokens, ffn_, ffn_width_, config_.activation, rank);
    }
    const Quantized& z = ffn_quantized_;
    for (int64_t t = 0; t < tokens; ++t) quantize(ffn_, t * units.groups + groups.begin, groups.end - groups.begin, z);
    team_.barrier();
    units = {ffn_, z.q, z.scale, z.correction, z.active, units.groups};
  }
  project(layer.fc2, units, tokens, x_, width_, Epilogue::kAdd, rank);
  if (!config_.norm_before) normalize(layer.ffn_norm, tokens, rank);
}

void Model::embed(const Batch& batch, int rank) {
  const bool projects = project_in_.w.data != nullptr;
  const Range part = share(batch.num_tokens, rank, team_.size());
  for (int64_t t = part.begin; t < part.end; ++t) {
    float* target = projects ? embed_ + t * embed_width_ : x_ + t * width_;
    if (batch.embeddings == nullptr) {
      read_row(embedding_.w, batch.tokens[t], target);
    } else {
      std::memcpy(target, batch.embeddings + t * config_.embed_dim, config_.embed_dim * 4);
    }
  }
  if (projects) {
    team_.barrier();
    const Activations in = prepare(nullptr, embed_, embed_width_, batch.num_tokens, rank, {});
    project(project_in_, in, batch.num_tokens, x_, width_, Epilogue::kStore, rank);
  }
  const int64_t row_bytes = config_.hidden_size * element_bytes(config_.positions_dtype);
  float* position = own_[rank].scratch;
  for (int64_t t = part.begin; t < part.end && batch.adds_positions; ++t) {
    const int64_t start = adapter_of_.empty() || adapter_of_[t] == nullptr ? 0 : adapter_of_[t]->text_start;
    const uint8_t* row = positions_ + (batch.positions[t] + start + config_.position_offset) * row_bytes;
    kernels_.to_float(row, config_.positions_dtype, config_.hidden_size, position);
    for (int64_t d = 0; d < config_.hidden_size; ++d) x_[t * width_ + d] += position[d];
  }
  team_.barrier(stream(layers_[0].qkv, rank));
}

// The residual stream itself, where norms come after the residual.
void Model::normalize(const Norm& norm, int64_t tokens, int rank) {
  const Range part = share(tokens, rank, team_.size());
  for (int64_t t = part.begin; t < part.end; ++t) {
    float* x = x_ + t * width_;
    kernels_.layer_norm(x, norm.weight, norm.bias, config_.hidden_size, x);
  }
  team_.barrier();
}

// Rows x (tokens, stride), or their norms, as a product wants them. A single token is prepared by every thread for
// itself, which takes less time than to wait for another.
Activations Model::prepare(const Norm* norm, const float* x, int64_t stride, int64_t tokens, int rank, Stream next) {
  const bool alone = tokens == 1;
  const Quantized& z = alone ? own_[rank].quantized : quantized_;
  float* normed = alone ? own_[rank].normed : normed_;
  const int64_t groups = stride / kGroup;
  const bool quantizes = config_.dtype == DType::kInt8;
  const Range part = alone ? Range{0, 1} : share(tokens, rank, team_.size());
  const float* ready = norm != nullptr ? normed : x;
  for (int64_t t = part.begin; t < part.end; ++t) {
    if (norm != nullptr) {
      kernels_.layer_norm(x + t * stride, norm->weight, norm->bias, config_.hidden_size, normed + t * stride);
    }
    if (quantizes) quantize(ready, t * groups, groups, z);
  }
  if (!alone && (norm != nullptr || quantizes)) team_.barrier(next);
  if (!quantizes) return {ready, nullptr, nullptr, nullptr, nullptr, groups};
  return {ready, z.q, z.scale, z.correction, z.active, groups};
}

// Groups first to first + count of x.
void Model::quantize(const float* x, int64_t first, int64_t count, const Quantized& z) const {
  kernels_.quantize(x + first * kGroup, count, z.q + first * kGroup, z.scale + first, z.correction + first,
                    z.active + first * kMaskWords);
}

void Model::multiply(const Linear& linear, Range panels, const Activations& in, int64_t tokens, float* out,
                     int64_t out_stride, Epilogue epilogue, int rank) {
  MatmulArgs args;
  args.w = &linear.w;
  args.in = in;
  args.tokens = tokens;
  args.panel_begin = panels.begin;
  args.panel_end = panels.end;
  args.bias = linear.bias;
  args.out = out;
  args.out_stride = out_stride;
  args.best = own_[rank].best;
  args.epilogue = epilogue;
  args.skip_zeros = skip_zeros_;
  args.scratch = own_[rank].scratch;
  if (linear.place >= 0 && !adapter_of_.empty()) change(linear, panels, tokens, rank, args);
  kernels_.matmul(args);
  if (rank == 0 && linear.w.layout == Layout::kByInput && in.active != nullptr) {
    for (int64_t i = 0; i < tokens * in.groups * kMaskWords; ++i) active_inputs_ += __builtin_popcountll(in.active[i]);
    seen_inputs_ += tokens * linear.w.cols;
  }
}

// What the tokens' adapters add to the thread's panels. Every thread makes A x for itself.
void Model::change(const Linear& linear, Range panels, int64_t tokens, int rank, MatmulArgs& args) {
  Own& own = own_[rank];
  const int64_t section = linear.w.panels() / linear.slots;
  const int64_t inputs = linear.w.padded_cols();
  for (int64_t t = 0; t < tokens; ++t) {
    own.changed[t] = 0;
    if (adapter_of_[t] == nullptr) continue;
    const LowRank* changes = adapter_of_[t]->changes.data() + linear.place;
    own.changed[t] = std::any_of(changes, changes + linear.slots, [](const LowRank& c) { return c.rank > 0; });
    for (int64_t s = 0; own.changed[t] != 0 && s < linear.slots; ++s) {
      const Range part = {std::max(panels.begin, s * section), std::min(panels.end, (s + 1) * section)};
      if (part.begin >= part.end) continue;
      const LowRank& c = changes[s];
      kernels_.low_rank_in(c.a.data(), c.rank, args.in.x + t * inputs, inputs, own.factors.data());
      kernels_.low_rank_out(c.b.data() + (part.begin - s * section) * kPanelRows, c.rank, section * kPanelRows,
                            own.factors.data(), (part.end - part.begin) * kPanelRows,
                            extra_ + t * extra_stride_ + part.begin * kPanelRows);
    }
  }
  args.extra = extra_;
  args.changed = own.changed;
  args.extra_stride = extra_stride_;
}

// The whole product, divided among the threads; `next` is what this thread reads after it.
void Model::project(const Linear& linear, const Activations& in, int64_t tokens, float* out, int64_t out_stride,
                    Epilogue epilogue, int rank, Stream next) {
  multiply(linear, panels_of(linear, rank), in, tokens, out, out_stride, epilogue, rank);
  team_.barrier(next);
}

Stream Model::stream(const Linear& linear, int rank) const {
  const Range part = panels_of(linear, rank);
  const int64_t bytes = linear.w.panel_bytes();
  return {linear.w.data + part.begin * bytes, (part.end - part.begin) * bytes};
}

void Model::attend(const Batch& batch, int64_t index, int rank) {
  const int64_t element = element_bytes(config_.kv_dtype);
  const int64_t head_stride = block_stride_ / config_.num_heads;
  uint8_t* cache = batch.prefix == nullptr ? cache_.data() + index * config_.num_blocks * block_stride_ * element
                                           : batch.prefix->prefix.data() + index * prefix_bytes(*batch.prefix);
  // By heads of every sequence, or by sequences and heads together.
  const int64_t heads = by_heads_ ? config_.num_heads / team_.size() : config_.num_heads;
  const int64_t first_head = by_heads_ ? heads * rank : 0;
  const int64_t items = batch.num_sequences * heads;
  const Range part = by_heads_ ? Range{0, items} : share(items, rank, team_.size());
  for (int64_t item = part.begin; item < part.end; ++item) {
    const int64_t sequence = item / heads, head = first_head + item % heads;
    const int64_t first = batch.seq_starts[sequence];
    const float* q = qkv_ + first * 3 * qkv_section_ + head * head_dim_;
    AttentionArgs args;
    args.q = q;
    args.k = q + qkv_section_;
    args.v = q + 2 * qkv_section_;
    args.stride = 3 * qkv_section_;
    args.query_scale = 1.0f / std::sqrt(static_cast<float>(head_dim_));
    args.count = batch.seq_starts[sequence + 1] - first;
    args.first_position = batch.positions[first];
    if (index + 1 == config_.num_layers) {
      const int32_t* wanted = std::lower_bound(batch.rows, batch.rows + batch.num_rows, first);
      const bool any = wanted < batch.rows + batch.num_rows;
      args.first_wanted = any ? std::min(*wanted - first, args.count) : args.count;
    }
    args.blocks = batch.block_tables + sequence * batch.table_width;
    args.cache = cache + head * head_stride * element;
    if (const Adapter* adapter = adapter_of_.empty() ? nullptr : adapter_of_[first]; adapter != nullptr) {
      args.prefix = adapter->prefix.data() + index * prefix_bytes(*adapter) + head * head_stride * element;
      args.prefix_tokens = adapter->prefix_tokens;
    }
    args.block_stride = block_stride_;
    args.kv_dtype = config_.kv_dtype;
    args.head_dim = head_dim_;
    args.out = context_ + first * width_ + head * head_dim_;
    args.out_stride = width_;
    args.scratch = own_[rank].scratch;
    kernels_.attention(args);
  }
}

// After the last attention only the wanted rows go on; each moves up, never over one that is still needed.
void Model::keep_rows(const Batch& batch, int rank) {
  if (rank == 0) {
    for (int64_t r = 0; r < batch.num_rows; ++r) {
      if (batch.rows[r] == r) continue;
      std::memcpy(x_ + r * width_, x_ + batch.rows[r] * width_, width_ * 4);
      std::memcpy(context_ + r * width_, context_ + batch.rows[r] * width_, width_ * 4);
      if (!adapter_of_.empty()) adapter_of_[r] = adapter_of_[batch.rows[r]];
    }
  }
  team_.barrier();
}

void Model::results(const Batch& batch, int rank) {
  const int64_t rows = batch.num_rows;
  const Norm* norm = config_.final_norm ? &final_norm_ : nullptr;
  const bool projects = project_out_.w.data != nullptr;
  const Stream head = stream(head_, rank);
  Activations in = prepare(norm, x_, width_, rows, rank, projects ? stream(project_out_, rank) : head);
  if (projects) {
    project(project_out_, in, rows, embed_, embed_width_, Epilogue::kStore, rank, head);
    in = prepare(nullptr, embed_, embed_width_, rows, rank, head);
  }
  if (batch.hidden != nullptr) {
    const Range part = share(rows, rank, team_.size());
    for (int64_t r = part.begin; r < part.end; ++r) {
      std::memcpy(batch.hidden + r * config_.embed_dim, in.x + r * in.groups * kGroup, config_.embed_dim * 4);
    }
  }
  if (batch.logits != nullptr) {
    project(head_, in, rows, batch.logits, config_.vocab_size, Epilogue::kStore, rank);
  }
  if (batch.best != nullptr) find_best(batch, in, rank);
}

// The head without storing the logits: each thread keeps the best of its rows, then one compares.
void Model::find_best(const Batch& batch, const Activations& in, int rank) {
  std::fill_n(own_[rank].best, batch.num_rows, Best{});
  project(head_, in, batch.num_rows, nullptr, 0, Epilogue::kBest, rank);
  if (rank != 0) return;
  for (int64_t r = 0; r < batch.num_rows; ++r) {
    Best best = own_[0].best[r];
    for (const Own& own : own_) {  // ascending rows, so that the lowest of equals stays
      if (std::isnan(own.best[r].value) || own.best[r].value > best.value) best = own.best[r];
      if (std::isnan(best.value)) break;
    }
    batch.best[r] = std::isnan(best.value) ? -1 : best.row;
  }
}

void Model::head(const float* hidden, int64_t rows, float* logits) {
  const int64_t e = config_.embed_dim;
  for (int64_t first = 0; first < rows; first += config_.max_batch_tokens) {
    const int64_t count = std::min(rows - first, config_.max_batch_tokens);
    for (int64_t r = 0; r < count; ++r) std::memcpy(embed_ + r * embed_width_, hidden + (first + r) * e, e * 4);
    team_.run([&](int rank) {
      const Activations in = prepare(nullptr, embed_, embed_width_, count, rank, stream(head_, rank));
      project(head_, in, count, logits + first * config_.vocab_size, config_.vocab_size, Epilogue::kStore, rank);
    });
  }
}

void Model::copy_blocks(const int32_t* source, const int32_t* target, int64_t count) {
  const int64_t bytes = block_stride_ * element_bytes(config_.kv_dtype);
  for (int64_t layer = 0; layer < config_.num_layers; ++layer) {
    uint8_t* cache = cache_.data() + layer * config_.num_blocks * bytes;
    for (int64_t i = 0; i < count; ++i) std::memcpy(cache + target[i] * bytes, cache + source[i] * bytes, bytes);
  }
}

double Model::active_share() {
  const double result = static_cast<double>(active_inputs_) / static_cast<double>(seen_inputs_);
  active_inputs_ = seen_inputs_ = 0;
  return result;
}

}  // namespace optlm
