// Argument checks, one wording for both backends: the requirement, then what was got.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "bindings/check.h"
#include "core/problem.h"

namespace dimap {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
    case ScalarType::Float8_e5m2:
      return "float8_e5m2";
    default:
      return "scalar type " + std::to_string(static_cast<int>(type));
  }
}

inline std::string shape_of(const Tensor& t) {  // as Python writes it
  std::string text;
  for (const int64_t size : t.sizes()) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "(" + text + (t.dim() == 1 ? ",)" : ")");
}

inline std::string device_of(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  return t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index()) : "another device";
}

inline DType dtype_of(const Tensor& t, size_t i) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      break;
  }
  DIMAP_CHECK(false, "weights[", i, "] must be float32, bfloat16 or float16, got ", name_of(t.scalar_type()));
}

inline void check_length(const char* name, size_t got, size_t want) {
  DIMAP_CHECK(got == want, name, " must have one entry for each of the ", want, " weights, got ", got);
}

inline void check_number(const char* name, size_t i, int64_t got, int64_t end) {
  DIMAP_CHECK(got >= 0 && got < end, name, "[", i, "] must be in [0, ", end - 1, "], got ", got);
}

inline void check_same_device(const std::vector<Tensor>& weights) {
  for (size_t i = 1; i < weights.size(); ++i)
    DIMAP_CHECK(device_of(weights[i]) == device_of(weights[0]), "weights[", i, "] must be on ", device_of(weights[0]),
                " like weights[0], got ", device_of(weights[i]));
}

// Whether elements of a tensor may share memory: a step of one dimension lies inside what those of smaller steps span.
inline bool overlaps_itself(const Tensor& t) {
  std::vector<std::pair<int64_t, int64_t>> dimensions;  // stride, size
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.size(d) == 0) return false;
    if (t.size(d) > 1) dimensions.emplace_back(t.stride(d), t.size(d));
  }
  std::sort(dimensions.begin(), dimensions.end());
  int64_t span = 0;
  for (const auto& [stride, size] : dimensions) {
    if (stride <= span) return true;
    span += stride * (size - 1);
  }
  return false;
}

inline TensorView view_of(const Tensor& t, size_t i, int64_t layer) {
  const DType dtype = dtype_of(t, i);
  const void* data = t.const_data_ptr();
  DIMAP_CHECK(data != nullptr || t.numel() == 0, "weights[", i, "] must be in memory, got an emptied storage");
  return {data, t.numel(), dtype, static_cast<int32_t>(layer)};
}

// Tensors and layers; every layer in module 0. Layers are numbered below the number of tensors.
inline Problem layers_problem(const std::vector<Tensor>& weights, const std::vector<int64_t>& layers) {
  check_length("layers", layers.size(), weights.size());
  check_same_device(weights);
  Problem problem;
  int64_t count = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const TensorView view = view_of(weights[i], i, layers[i]);
    check_number("layers", i, layers[i], static_cast<int64_t>(weights.size()));
    problem.tensors.push_back(view);
    count = std::max(count, layers[i] + 1);
  }
  problem.layer_module.assign(static_cast<size_t>(count), 0);
  problem.keep.assign(1, 0);
  problem.count();
  return problem;
}

// ... with modules of the same numbering rules and what each of them keeps.
inline Problem modules_problem(const std::vector<Tensor>& weights, const std::vector<int64_t>& layers,
                               const std::vector<int64_t>& modules, const std::vector<int64_t>& keep) {
  Problem problem = layers_problem(weights, layers);
  check_length("modules", modules.size(), weights.size());
  std::vector<int64_t> first(problem.layers(), -1);  // tensor of the layer seen first
  for (size_t i = 0; i < weights.size(); ++i) {
    check_number("modules", i, modules[i], static_cast<int64_t>(keep.size()));
    int64_t& seen = first[static_cast<size_t>(layers[i])];
    if (seen < 0) seen = static_cast<int64_t>(i);
    DIMAP_CHECK(modules[i] == modules[static_cast<size_t>(seen)], "modules[", i, "] must be ",
                modules[static_cast<size_t>(seen)], " like modules[", seen, "], since both are of layer ", layers[i],
                ", got ", modules[i]);
    problem.layer_module[static_cast<size_t>(layers[i])] = static_cast<int32_t>(modules[i]);
  }
  problem.keep = keep;
  problem.count();
  for (size_t m = 0; m < keep.size(); ++m)
    DIMAP_CHECK(keep[m] >= 0 && keep[m] <= problem.module_total[m], "keep[", m, "] must be in [0, ",
                problem.module_total[m], "], got ", keep[m]);
  return problem;
}

// Where a tensor is cut into groups of m weights along a dimension: [blocks, m, inner].
struct GroupShape {
  int64_t blocks, inner;
};

constexpr int64_t kLargestGroup = 16;

// Checks the arguments of N:M, and says how each weight is cut.
inline std::vector<GroupShape> group_shapes(const std::vector<Tensor>& weights, int64_t n, int64_t m, int64_t dim) {
  DIMAP_CHECK(m >= 2 && m <= kLargestGroup, "m must be in [2, ", kLargestGroup, "], got ", m);
  DIMAP_CHECK(n >= 0 && n <= m, "n must be in [0, ", m, "], got ", n);
  check_same_device(weights);
  std::vector<GroupShape> shapes;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& t = weights[i];
    dtype_of(t, i);
    DIMAP_CHECK(t.dim() > 0, "weights[", i, "] must have a dimension to group along, got a tensor of 0 dimensions");
    DIMAP_CHECK(dim >= -t.dim() && dim < t.dim(), "dim must be in [", -t.dim(), ", ", t.dim() - 1, "] for weights[", i,
                "] of ", t.dim(), " dimensions, got ", dim);
    const int64_t at = dim < 0 ? dim + t.dim() : dim;
    DIMAP_CHECK(t.size(at) % m == 0, "weights[", i, "] must have a multiple of m, ", m, ", along dim ", dim, ", got ",
                t.size(at), " of shape ", shape_of(t));
    int64_t inner = 1;
    for (int64_t d = at + 1; d < t.dim(); ++d) inner *= t.size(d);
    shapes.push_back({inner == 0 ? 0 : t.numel() / inner / m, inner});
  }
  return shapes;
}

[[noreturn]] inline void throw_non_finite(int64_t tensor, int64_t index, const char* name) {
  DIMAP_CHECK(false, "weights[", tensor, "] must be finite, got ", name, " at flat index ", index);
  __builtin_unreachable();
}

}  // namespace dimap
