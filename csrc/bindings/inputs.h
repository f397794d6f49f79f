// What the kernels of both backends work on: contiguous tensors, and for in-place operators ones that may be written.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "bindings/checks.h"

namespace dimap {

inline std::vector<Tensor> contiguous(const std::vector<Tensor>& tensors) {
  std::vector<Tensor> out;
  for (const Tensor& t : tensors) out.push_back(t.is_contiguous() ? t : torch::stable::contiguous(t));
  return out;
}

// What an in-place operator works on: contiguous weights themselves, copies of the others for `write_back`. All that
// would not let itself be written is refused here, before anything has changed.
inline std::vector<Tensor> writable(const std::vector<Tensor>& weights) {
  const std::vector<Tensor> out = contiguous(weights);
  for (size_t i = 0; i < weights.size(); ++i) {
    DIMAP_CHECK(!overlaps_itself(weights[i]), "weights[", i,
                "] must not overlap itself, got an expanded tensor or one like it: clone it first");
    if (weights[i].is_contiguous()) {
      weights[i].mutable_data_ptr();  // a lazy clone gets memory of its own
    } else {                          // copying nothing asks torch whether more may be copied
      Tensor none = torch::stable::narrow(const_cast<Tensor&>(weights[i]), 0, 0, 0);
      torch::stable::copy_(none, none);
    }
  }
  return out;
}

inline void write_back(std::vector<Tensor>& weights, const std::vector<Tensor>& written) {
  for (size_t i = 0; i < weights.size(); ++i)
    if (!weights[i].is_contiguous()) torch::stable::copy_(weights[i], written[i]);
}

}  // namespace dimap
