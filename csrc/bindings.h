// What the two binding files share.
#pragma once

#include <nanobind/nanobind.h>

#include <string>

#include "kernels.h"

namespace optlm {

// Each throws std::invalid_argument, a ValueError in Python, for a name it does not know.
DType parse_dtype(const std::string& name);
Epilogue parse_activation(const std::string& name);
const Kernels& kernels_for(const std::string& isa);

void bind_kernels(nanobind::module_ module);

}  // namespace optlm
