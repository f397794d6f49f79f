// The tensors cut into pieces of work, in order of position.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/problem.h"

namespace dimap::cpu {

struct Chunk {
  static constexpr int64_t kWeights = 1 << 16;  // so that a position in it takes 16 bits

  int32_t tensor;
  int32_t layer, module;
  int64_t offset, n;

  // Filled by a reading:
  int32_t worker = 0;  // whose buffers hold what was set aside,
  int64_t begin = 0;   // from where,
  int64_t aside = 0;   // how many
  // Filled when ties are shared out:
  int64_t ties = 0, quota = 0;  // weights that tie with the threshold; how many of them, the first ones, are kept
};

inline void* data(const Problem& problem, const Chunk& chunk) {
  const TensorView& t = problem.tensors[chunk.tensor];
  return static_cast<char*>(const_cast<void*>(t.data)) + chunk.offset * size_of(t.dtype);
}

inline std::vector<Chunk> chunks_of(const Problem& problem) {
  std::vector<Chunk> chunks;
  for (size_t t = 0; t < problem.tensors.size(); ++t) {
    const TensorView& tensor = problem.tensors[t];
    for (int64_t at = 0; at < tensor.numel; at += Chunk::kWeights)
      chunks.push_back({static_cast<int32_t>(t), tensor.layer, problem.layer_module[tensor.layer], at,
                        std::min(Chunk::kWeights, tensor.numel - at)});
  }
  return chunks;
}

// Calls body.template operator()<kType>() for the type of a tensor.
template <typename Body>
auto for_type(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kBFloat16:
      return body.template operator()<DType::kBFloat16>();
    case DType::kFloat16:
      return body.template operator()<DType::kFloat16>();
    default:
      return body.template operator()<DType::kFloat32>();
  }
}

}  // namespace dimap::cpu
