// The input of every stage: tensors, the layers that sum them, the modules that rank them.
#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/magnitude.h"

namespace dimap {

// What magnitudes in a file are multiplied with before they are ranked: that of weight i is at (i / inner) % size.
struct Norms {
  std::vector<float> values;
  int64_t inner;
};

struct TensorView {
  const void* data = nullptr;  // contiguous; null where the weights lie in a file:
  int64_t numel = 0;
  DType dtype = DType::kFloat32;  // of what is ranked
  int32_t layer = 0;
  int32_t file = -1;                             // number in Problem::files,
  int64_t offset = 0;                            // and the byte there
  DType stored = dtype;                          // in the file
  std::shared_ptr<const Norms> norms = nullptr;  // then float32 products are ranked; null: the weights themselves
};

// Held open by the caller. The path is for errors.
struct File {
  int descriptor;
  std::string path;
};

// Of every m weights, `inner` apart, the n largest are kept: N:M, or whole rows.
struct Pattern {
  int64_t n, m, inner;
};

// Several ranks may share one problem. Then the tensors in memory are this rank's own and the totals those of all
// ranks; tensors in files are seen by all, and each rank has its part of them (chunks.h).
struct Problem {
  std::vector<TensorView> tensors;
  std::vector<File> files;
  int32_t rank = 0, ranks = 1;
  std::vector<int32_t> layer_module;       // [layers]
  std::vector<int64_t> keep;               // [modules]
  std::vector<int64_t> layer_total;        // [layers] weights
  std::vector<int32_t> layer_granularity;  // [layers] low zero bits of every key
  std::vector<int64_t> module_total;       // [modules] weights
  std::vector<Pattern> patterns;           // [tensors] in place of what modules keep, or none

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

// "nan", "inf" or "-inf": a weight with this key, of these bits; size: its bytes.
inline const char* non_finite_name(uint32_t key, uint32_t bits, size_t size) {
  return key > kNonFinite ? "nan" : bits >> (8 * size - 1) & 1 ? "-inf" : "inf";
}

// An infinity or a NaN among the weights: where the first one is, and its name.
struct NonFinite : std::runtime_error {
  NonFinite(int64_t tensor, int64_t index, const char* name)
      : std::runtime_error("non-finite weight"), tensor(tensor), index(index), name(name) {}
  int64_t tensor, index;
  const char* name;
};

}  // namespace dimap
