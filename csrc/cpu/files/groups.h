// Which N:M the tensors of a file have: of every m elements along one dimension, at most how many are not zero.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "core/problem.h"
#include "cpu/parallel.h"

namespace dimap::cpu {

// A tensor as [outer, length, inner], whose length is cut into groups. An element of 1, 2, 4 or 8 bytes is not zero if
// any bit of `mask` is set in it; of size 0 it is a bit, and the offset is in bits.
struct Grid3 {
  int32_t file;
  int64_t offset, size;
  uint64_t mask;
  int64_t outer, length, inner;
  int64_t numel() const { return outer * length * inner; }
};

struct Most {
  int64_t nonzero = 0;
  std::array<uint8_t, 17> most{};  // of groups of m; m where it does not divide the length, and below 2
};

std::vector<Most> count_groups(const std::vector<File>& files, std::span<const Grid3> tensors, const Pool& pool);

}  // namespace dimap::cpu
