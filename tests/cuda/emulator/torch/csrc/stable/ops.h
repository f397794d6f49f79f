// What the operators allocate is unset until a kernel writes it.
#pragma once

#include_next <torch/csrc/stable/ops.h>

#include <utility>

namespace torch::stable {
template <typename... Arguments>
Tensor emulated_new_empty(Arguments&&... arguments) {
  Tensor t = new_empty(std::forward<Arguments>(arguments)...);
  emulator::mark(t.mutable_data_ptr(), static_cast<size_t>(t.numel()) * t.element_size(), true);
  return t;
}
}  // namespace torch::stable
#define new_empty emulated_new_empty
