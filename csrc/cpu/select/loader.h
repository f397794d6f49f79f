// Where weights come from: memory, or a file. A property of a tensor; every loop reads through this.
#pragma once

#include <cstdint>
#include <vector>

#include "core/problem.h"
#include "cpu/files/io.h"
#include "cpu/select/chunks.h"

namespace dimap::cpu {

class Loader {
 public:
  Loader(const Problem& problem, int workers) : problem_(problem), buffers_(static_cast<size_t>(workers)) {}

  // Weights [begin, begin + n) of a tensor: where they are, or in the worker's buffer until it loads others.
  const void* load(int32_t tensor, int64_t begin, int64_t n, int worker) {
    const TensorView& t = problem_.tensors[tensor];
    const int64_t size = size_of(t.dtype);
    if (t.file < 0) return static_cast<const char*>(t.data) + begin * size;
    char* memory = buffers_[worker].room(n * size);
    read_fully(problem_.files[t.file], memory, n * size, t.offset + begin * size);
    return memory;
  }
  const void* load(const Chunk& chunk, int worker) { return load(chunk.tensor, chunk.offset, chunk.n, worker); }

 private:
  const Problem& problem_;
  std::vector<Buffer> buffers_;  // [workers]
};

}  // namespace dimap::cpu
