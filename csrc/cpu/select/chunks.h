// The tensors cut into chunks of work, in order of position.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

#include "core/problem.h"

namespace dimap::cpu {

struct Chunk {
  static constexpr int64_t kWeights = 1 << 16;  // so that a position in it takes 16 bits; of wide groups more

  int32_t tensor;
  int32_t layer, module;
  int64_t offset, n;

  bool mine = true;  // this rank's to read and write

  // Filled by a reading:
  int32_t worker = 0;    // whose buffers hold what was set aside,
  bool counted = false;  // as a count for each magnitude of the bracket,
  int64_t begin = 0;     // from where, and from where their positions,
  int64_t place = 0;
  int64_t aside = 0;  // how many numbers
  int64_t above = 0;  // weights above the bracket
  // Filled when ties are shared out:
  int64_t ties = 0, quota = 0;  // weights that tie with the threshold; how many of them, the first ones, are kept
};

inline void* data(const Problem& problem, const Chunk& chunk) {
  const TensorView& t = problem.tensors[chunk.tensor];
  return static_cast<char*>(const_cast<void*>(t.data)) + chunk.offset * size_of(t.dtype);
}

// Which rank has what begins at a byte of a file: neighbouring bytes of all files laid end to end, to each about as
// many. So a rank has whole files, but for the first and the last of its part, and one tensor is shared too.
class Shares {
 public:
  explicit Shares(const Problem& problem) : ranks_(problem.ranks), before_(problem.files.size()) {
    for (const TensorView& t : problem.tensors)
      if (t.file >= 0) before_[t.file] = std::max(before_[t.file], t.offset + t.numel * size_of(t.stored));
    for (int64_t& file : before_) total_ += std::exchange(file, total_);
  }
  int32_t rank_of(int32_t file, int64_t byte) const {
    const auto at = static_cast<unsigned __int128>(before_[file] + byte) * static_cast<unsigned>(ranks_);
    return static_cast<int32_t>(std::min<unsigned __int128>(at / static_cast<uint64_t>(total_), ranks_ - 1));
  }

 private:
  int32_t ranks_;
  std::vector<int64_t> before_;  // [files] bytes in the files before it
  int64_t total_ = 1;
};

inline std::vector<Chunk> chunks_of(const Problem& problem) {
  const Shares shares(problem);
  std::vector<Chunk> chunks;
  for (size_t t = 0; t < problem.tensors.size(); ++t) {
    const TensorView& tensor = problem.tensors[t];
    int64_t step = Chunk::kWeights;
    if (!problem.patterns.empty()) {  // whole groups, and whole bytes of bits
      const int64_t least = std::lcm(problem.patterns[t].m * problem.patterns[t].inner, int64_t{8});
      step = std::max<int64_t>(step / least, 1) * least;
    }
    for (int64_t at = 0; at < tensor.numel; at += step) {
      const bool mine = tensor.file < 0 || problem.ranks == 1 ||
                        shares.rank_of(tensor.file, tensor.offset + at * size_of(tensor.stored)) == problem.rank;
      chunks.push_back({static_cast<int32_t>(t), tensor.layer, problem.layer_module[tensor.layer], at,
                        std::min(step, tensor.numel - at), mine});
    }
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
