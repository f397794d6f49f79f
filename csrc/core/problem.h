// The input of every stage: tensors, the layers that sum them, the modules that rank them.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "core/magnitude.h"

namespace dimap {

struct TensorView {
  const void* data = nullptr;  // contiguous
  int64_t numel = 0;
  DType dtype = DType::kFloat32;
  int32_t layer = 0;
};

struct Problem {
  std::vector<TensorView> tensors;
  std::vector<int32_t> layer_module;       // [layers]
  std::vector<int64_t> keep;               // [modules]
  std::vector<int64_t> layer_total;        // [layers] weights
  std::vector<int32_t> layer_granularity;  // [layers] low zero bits of every key
  std::vector<int64_t> module_total;       // [modules] weights

  size_t layers() const { return layer_module.size(); }
  size_t modules() const { return keep.size(); }

  // Fills the totals from the tensors; a layer's module must be set before.
  void count() {
    layer_total.assign(layers(), 0);
    layer_granularity.assign(layers(), 23);
    module_total.assign(modules(), 0);
    for (const TensorView& t : tensors) {
      layer_total[t.layer] += t.numel;
      module_total[layer_module[t.layer]] += t.numel;
      if (granularity(t.dtype) < layer_granularity[t.layer]) layer_granularity[t.layer] = granularity(t.dtype);
    }
  }
};

// An infinity or a NaN among the weights: where the first one is.
struct NonFinite : std::runtime_error {
  NonFinite(int64_t tensor, int64_t index, bool nan)
      : std::runtime_error("non-finite weight"), tensor(tensor), index(index), nan(nan) {}
  int64_t tensor, index;
  bool nan;
};

}  // namespace dimap
