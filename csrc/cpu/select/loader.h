// Where weights come from: memory, or a file. A property of a tensor; every loop reads through this.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <vector>

#include "core/problem.h"
#include "cpu/files/io.h"
#include "cpu/select/chunks.h"

namespace dimap::cpu {

class Loader {
 public:
  Loader(const Problem& problem, int workers)
      : problem_(problem), buffers_(static_cast<size_t>(workers)), products_(static_cast<size_t>(workers)) {}

  // What is ranked of weights [begin, begin + n) of a tensor: where they are, or in the worker's buffer until it loads
  // others.
  const void* load(int32_t tensor, int64_t begin, int64_t n, int worker) {
    const TensorView& t = problem_.tensors[tensor];
    const int64_t size = size_of(t.stored);
    if (t.file < 0) return static_cast<const char*>(t.data) + begin * size;
    char* memory = buffers_[worker].room(n * size);
    read_fully(problem_.files[t.file], memory, n * size, t.offset + begin * size);
    return ranked(t, memory, begin, n, worker);
  }
  const void* load(const Chunk& chunk, int worker) { return load(chunk.tensor, chunk.offset, chunk.n, worker); }
  // What is ranked of those weights, which were read: themselves, or products in another buffer of the worker.
  const void* ranked(const TensorView& t, const void* weights, int64_t begin, int64_t n, int worker) {
    if (!t.norms) return weights;
    auto* products = reinterpret_cast<float*>(products_[worker].room(n * size_of(DType::kFloat32)));
    const auto& [values, inner] = *t.norms;
    const auto length = static_cast<int64_t>(values.size());
    for_type(t.stored, [&]<DType kType>() {
      const auto* from = static_cast<const storage_t<kType>*>(weights);
      const auto magnitude = [&](int64_t i) { return std::bit_cast<float>(key_of<kType>(from[i])); };
      for (int64_t i = 0; i < n;) {  // a run with one norm, or with one for each
        const int64_t at = begin + i, place = at / inner % length;
        const float* norms = values.data() + place;
        const int64_t end = std::min(n, i + (inner == 1 ? length - place : inner - at % inner));
        if (inner == 1)
          for (; i < end; ++i) products[i] = magnitude(i) * *norms++;
        else
          for (; i < end; ++i) products[i] = magnitude(i) * *norms;
      }
    });
    return products;
  }

 private:
  const Problem& problem_;
  std::vector<Buffer> buffers_, products_;  // [workers]
};

}  // namespace dimap::cpu
