// The tensors cut into pieces of work, in order of position.
#pragma once

#include <cstdint>
#include <vector>

#include "../problem.h"
#include "decide.h"

namespace dimap::cpu {

struct Chunk {
  static constexpr int64_t kWeights = 1 << 17;

  int32_t tensor;
  int32_t layer, module;
  int64_t offset, n;

  // Filled by a reading:
  int32_t worker = 0;   // whose buffers hold what was set aside,
  int64_t begin = 0;    // from where,
  int64_t aside = 0;    // how many
  int64_t atoms = 0;    // weights equal to the bracket's atom
  // Filled when ties are shared out:
  int64_t ties = 0, quota = 0;  // weights that tie with the threshold; how many of them, the first ones, are kept
};

inline const void* data(const Problem& problem, const Chunk& chunk) {
  const TensorView& t = problem.tensors[chunk.tensor];
  return static_cast<const char*>(t.data) + chunk.offset * size_of(t.dtype);
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

}  // namespace dimap::cpu
