#include "pack.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "float16.h"

namespace optlm {
namespace {

// Weight (row, 0) of a float matrix; the next column follows kPanelRows elements on.
template <class T>
T* column_start(Matrix& w, int64_t row) {
  return reinterpret_cast<T*>(w.data + row / kPanelRows * w.panel_bytes()) + row % kPanelRows;
}

void place_int8(Matrix& w, int64_t row, const uint8_t* q) {
  const int64_t r = row % kPanelRows, cols = w.padded_cols();
  uint8_t* panel = w.data + row / kPanelRows * w.panel_bytes();
  if (w.layout == Layout::kPanels) {
    for (int64_t c = 0; c < cols / 4; ++c) std::memcpy(panel + 256 * c + 4 * r, q + 4 * c, 4);
  } else {
    const int64_t byte = 16 * (r / 4 % 4) + 4 * (r / 16) + r % 4;
    for (int64_t c = 0; c < cols; ++c) panel[c * kPanelRows + byte] = q[c];
  }
}

void place_row(const Kernels& kernels, Matrix& w, int64_t row, const float* x, float largest, uint8_t* bytes) {
  const int64_t cols = w.padded_cols();
  if (w.dtype == DType::kF32) {
    float* target = column_start<float>(w, row);
    for (int64_t c = 0; c < cols; ++c) target[c * kPanelRows] = x[c];
  } else if (w.dtype != DType::kInt8) {
    uint16_t* target = column_start<uint16_t>(w, row);
    const auto narrow = w.dtype == DType::kF16 ? float_to_half : float_to_bf16;
    for (int64_t c = 0; c < cols; ++c) target[c * kPanelRows] = narrow(x[c]);
  } else {
    const bool zero = largest < 1e-30f;
    w.scales[row] = zero ? 0.0f : largest / 127.0f;
    kernels.quantize_weights(x, cols, zero ? 0.0f : 127.0f / largest, bytes);
    place_int8(w, row, bytes);
  }
}

}  // namespace

bool pack_panels(const Kernels& kernels, const Source& source, Matrix& w, int64_t first_panel, int64_t begin,
                 int64_t end, uint8_t* scratch) {
  float* x = reinterpret_cast<float*>(scratch);
  uint8_t* bytes = scratch + 4 * w.padded_cols();
  const auto* data = static_cast<const uint8_t*>(source.data);
  const int64_t row_bytes = source.cols * element_bytes(source.dtype);
  bool finite = true;
  for (int64_t row = begin * kPanelRows; row < end * kPanelRows; ++row) {
    std::fill(x, x + w.padded_cols(), 0.0f);
    float largest = 0.0f;
    if (row < source.rows) {
      kernels.to_float(data + row * row_bytes, source.dtype, source.cols, x);
      largest = kernels.max_abs(x, source.cols);
      if (!std::isfinite(largest)) finite = false;
    }
    if (finite) place_row(kernels, w, first_panel * kPanelRows + row, x, largest, bytes);
  }
  return finite;
}

void read_row(const Matrix& w, int64_t row, float* out) {
  const int64_t panel = row / kPanelRows, r = row % kPanelRows;
  const uint8_t* base = w.data + panel * w.panel_bytes();
  for (int64_t c = 0; c < w.cols; ++c) {
    if (w.dtype == DType::kF32) {
      out[c] = reinterpret_cast<const float*>(base)[c * kPanelRows + r];
    } else if (w.dtype != DType::kInt8) {
      const uint16_t bits = reinterpret_cast<const uint16_t*>(base)[c * kPanelRows + r];
      out[c] = w.dtype == DType::kF16 ? half_to_float(bits) : bf16_to_float(bits);
    } else {
      const int32_t byte = base[c / 4 * 256 + 4 * r + c % 4];
      out[c] = static_cast<float>(byte - kWeightZero) * w.scales[row];
    }
  }
}

}  // namespace optlm
