// Weights from a checkpoint's row-major tensors into the layouts the kernels stream.
#pragma once

#include "kernels.h"

namespace optlm {

struct Source {
  const void* data = nullptr;  // (rows, cols) row-major
  DType dtype = DType::kF32;   // f32, f16 or bf16
  int64_t rows = 0;
  int64_t cols = 0;
};

// Writes source rows [64 panel, 64 panel + 64) to panel `first_panel + panel` of w, for panel in [begin, end).
// False when a weight is not finite. `scratch` holds pack_scratch_bytes(cols).
bool pack_panels(const Kernels& kernels, const Source& source, Matrix& w, int64_t first_panel, int64_t begin,
                 int64_t end, uint8_t* scratch);

inline int64_t pack_scratch_bytes(int64_t cols) { return 5 * round_up(cols, kGroup); }

// Row `row` of w as floats: the embedding of a token when the head's matrix serves for both.
void read_row(const Matrix& w, int64_t row, float* out);

}  // namespace optlm
